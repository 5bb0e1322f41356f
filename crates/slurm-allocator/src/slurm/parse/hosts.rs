//! Host lists as Slurm writes them: `n[1-3,07],login`.

/// The hosts of a list, in order, at most so many. What is not understood is left out.
pub(crate) fn expand(list: &str, most: usize) -> Vec<String> {
    let mut hosts = Vec::new();
    let mut rest = list.trim();
    while !rest.is_empty() && hosts.len() < most {
        let (part, after) = split_part(rest);
        rest = after;
        expand_part(part, most, &mut hosts);
    }
    hosts
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

fn expand_part(part: &str, most: usize, hosts: &mut Vec<String>) {
    let Some((prefix, rest)) = part.split_once('[') else {
        if !part.is_empty() {
            hosts.push(part.to_owned());
        }
        return;
    };
    let Some((ranges, suffix)) = rest.split_once(']') else { return };
    for range in ranges.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (Ok(from), Ok(to)) = (first.parse::<u64>(), last.parse::<u64>()) else { continue };
        for number in from..=to {
            if hosts.len() >= most {
                return;
            }
            // A second pair of brackets, as in rack[1-2]node[1-4], is expanded in its turn.
            expand_part(&format!("{prefix}{number:0width$}{suffix}", width = first.len()), most, hosts);
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
    }
}
