//! Host lists as Slurm writes them: `n[1-3,07],login`.

/// The longest name that a host can have.
const LONGEST: usize = 255;
/// Pairs of brackets in one name: racks, chassis, nodes.
const DEEPEST: usize = 4;

/// The hosts of a list, in order, at most so many. What is not understood is left out, and costs little.
pub(crate) fn expand(list: &str, most: usize) -> Vec<String> {
    let mut hosts = Hosts { found: Vec::new(), most, steps: most.saturating_mul(2) + 1000 };
    let mut rest = list.trim();
    while !rest.is_empty() && hosts.go_on() {
        let (part, after) = split_part(rest);
        rest = after;
        if part.matches('[').count() <= DEEPEST {
            hosts.take(part);
        }
    }
    hosts.found
}

/// Up to the next comma outside brackets.
fn split_part(list: &str) -> (&str, &str) {
    let mut depth = 0_u32;
    for (at, c) in list.char_indices() {
        match c {
            '[' => depth += 1,
            ']' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => return (&list[..at], &list[at + 1..]),
            _ => {}
        }
    }
    (list, "")
}

/// Names as they are found, and how much more may be tried: a list may promise four billion names and give none.
struct Hosts {
    found: Vec<String>,
    most: usize,
    steps: usize,
}

impl Hosts {
    fn go_on(&mut self) -> bool {
        self.steps = self.steps.saturating_sub(1);
        self.found.len() < self.most && self.steps > 0
    }

    fn take(&mut self, part: &str) {
        let Some((prefix, rest)) = part.split_once('[') else {
            if (1..=LONGEST).contains(&part.len()) {
                self.found.push(part.to_owned());
            }
            return;
        };
        let Some((ranges, suffix)) = rest.split_once(']') else { return };
        for range in ranges.split(',') {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (Ok(from), Ok(to)) = (first.parse::<u64>(), last.parse::<u64>()) else { continue };
            let width = first.len().min(LONGEST);
            for number in from..=to {
                if !self.go_on() {
                    return;
                }
                // A second pair of brackets, as in rack[1-2]node[1-4], is expanded in its turn.
                self.take(&format!("{prefix}{number:0width$}{suffix}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_expanded_in_order_and_within_bounds() {
        for (list, wanted) in [
            ("n1", "n1"),
            ("n[1-3]", "n1 n2 n3"),
            ("n[08-10,12],login", "n08 n09 n10 n12 login"),
            ("r[1-2]n[1-2]", "r1n1 r1n2 r2n1 r2n2"),
            ("n[1-2]-ib", "n1-ib n2-ib"),
            ("", ""),
            ("n[1-", ""),
            ("n[x],m", "m"),
            ("n[3-1]", ""),
        ] {
            assert_eq!(expand(list, 100).join(" "), wanted, "{list}");
        }
        assert_eq!(expand("n[1-4000000000]", 3), ["n1", "n2", "n3"]);
        assert_eq!(expand("n[1-2]", 0), Vec::<String>::new());
        assert_eq!(expand(&format!("n[1-3],{},m", "x".repeat(300)), 100), ["n1", "n2", "n3", "m"]);
    }

    #[test]
    fn a_list_that_promises_much_and_gives_nothing_costs_little() {
        let begun = std::time::Instant::now();
        for list in [
            "n[1-4000000000][".to_owned(),
            "n[1-4000000000]x[1-4000000000]y[".to_owned(),
            "[1-2]".repeat(10_000),
            format!("n[{}1-9]", "0".repeat(60_000)),
            format!("n[1-18446744073709551615]{}", "x".repeat(60_000)),
            "[".repeat(60_000),
            ",".repeat(60_000),
        ] {
            assert_eq!(expand(&list, 64), Vec::<String>::new(), "{list:.40}");
        }
        assert!(begun.elapsed().as_secs() < 10, "{:?}", begun.elapsed());
    }
}
