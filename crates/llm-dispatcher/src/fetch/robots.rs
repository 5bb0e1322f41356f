//! What a robots.txt says (RFC 9309). Reading and matching take time in proportion to the text: a pattern cannot be made to
//! explode.

/// The product name that a site's owner writes to speak of this program.
pub const AGENT: &str = "drover";
/// What lies behind is not read, as the RFC allows.
const MAX_BYTES: usize = 500 * 1024;
const MAX_RULES: usize = 10_000;

/// The rules that hold for us on one site.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Robots {
    rules: Vec<Rule>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    allow: bool,
    pattern: Vec<u8>,
}

impl Robots {
    /// No robots.txt: everything may be read.
    pub fn everything() -> Self {
        Self::default()
    }

    /// The rules of the groups that name `agent`; without one, of those for everybody.
    pub fn read(text: &[u8], agent: &str) -> Self {
        let mut ours = Vec::new();
        let mut everybodys = Vec::new();
        let mut named = false;
        // Whom the group at hand is for, and whether its rules have begun.
        let (mut for_us, mut for_all, mut in_rules) = (false, false, false);
        let text = &text[..text.len().min(MAX_BYTES)];
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
        for line in text.split(|byte| matches!(byte, b'\n' | b'\r')) {
            let line = line.split(|&byte| byte == b'#').next().unwrap_or_default();
            let Some(colon) = line.iter().position(|&byte| byte == b':') else { continue };
            let (key, value) = (line[..colon].trim_ascii(), line[colon + 1..].trim_ascii());
            if key.eq_ignore_ascii_case(b"user-agent") {
                if in_rules {
                    (for_us, for_all, in_rules) = (false, false, false);
                }
                let of_a_name = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
                let word: Vec<u8> = value.iter().copied().take_while(of_a_name).collect();
                let names_us = word.eq_ignore_ascii_case(agent.as_bytes());
                for_us |= names_us;
                for_all |= value == b"*";
                named |= names_us;
                continue;
            }
            let allow = key.eq_ignore_ascii_case(b"allow");
            if !allow && !key.eq_ignore_ascii_case(b"disallow") {
                continue;
            }
            in_rules = true;
            // An empty pattern matches nothing: `Disallow:` lets everything be read.
            for list in [for_us.then_some(&mut ours), for_all.then_some(&mut everybodys)].into_iter().flatten() {
                if !value.is_empty() && list.len() < MAX_RULES {
                    list.push(Rule { allow, pattern: normal(value) });
                }
            }
        }
        Self { rules: if named { ours } else { everybodys } }
    }

    /// Whether a page may be read. `path` is that of the URL with its query. The longest pattern that fits decides; of two as
    /// long the friendlier.
    pub fn allows(&self, path: &str) -> bool {
        let path = normal(path.as_bytes());
        if path == b"/robots.txt" {
            return true;
        }
        let fitting = self.rules.iter().filter(|rule| fits(&rule.pattern, &path));
        fitting.max_by_key(|rule| (rule.pattern.len(), rule.allow)).is_none_or(|rule| rule.allow)
    }
}

/// One way to write a path: what needs no escape is not escaped, what is beyond ASCII is, and escapes are in capitals.
fn normal(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, behind)) = rest.split_first() {
        rest = behind;
        let escaped = (byte == b'%').then(|| behind.first_chunk::<2>()).flatten().and_then(|digits| hex(*digits));
        if let Some(value) = escaped {
            rest = &behind[2..];
            if value.is_ascii_alphanumeric() || matches!(value, b'-' | b'.' | b'_' | b'~') {
                out.push(value);
            } else {
                escape(value, &mut out);
            }
        } else if byte.is_ascii() {
            out.push(byte);
        } else {
            escape(byte, &mut out);
        }
    }
    out
}

fn hex(digits: [u8; 2]) -> Option<u8> {
    let value = |digit: u8| char::from(digit).to_digit(16);
    Some((value(digits[0])? * 16 + value(digits[1])?) as u8)
}

fn escape(byte: u8, out: &mut Vec<u8>) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    out.extend([b'%', DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
}

/// `*` stands for anything, a `$` at the end for the end of the path; otherwise a pattern fits every path that begins with it.
/// Taking each piece at its first place is enough, so this never tries a second way.
fn fits(pattern: &[u8], path: &[u8]) -> bool {
    let (pattern, to_the_end) = match pattern.strip_suffix(b"$") {
        Some(pattern) => (pattern, true),
        None => (pattern, false),
    };
    let mut pieces = pattern.split(|&byte| byte == b'*');
    let first = pieces.next().unwrap_or_default();
    let Some(mut rest) = path.strip_prefix(first) else { return false };
    let mut last = None;
    for piece in pieces {
        // The piece before is not the last: it takes its first place.
        if let Some(middle) = last.replace(piece) {
            match find(middle, rest) {
                Some(at) => rest = &rest[at + middle.len()..],
                None => return false,
            }
        }
    }
    match last {
        None => !to_the_end || rest.is_empty(),
        Some(piece) if to_the_end => rest.ends_with(piece),
        Some(piece) => find(piece, rest).is_some(),
    }
}

/// First place of a piece. A text of bytes is searched as one of characters, whose search is linear.
fn find(piece: &[u8], text: &[u8]) -> Option<usize> {
    // Both are ASCII after `normal`.
    std::str::from_utf8(text).ok()?.find(std::str::from_utf8(piece).ok()?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn allows(text: &str, path: &str) -> bool {
        Robots::read(text.as_bytes(), AGENT).allows(path)
    }

    #[test]
    fn the_group_that_names_us_wins_over_the_one_for_all() {
        let text = "User-agent: *\nDisallow: /\n\nUser-agent: other\nUser-agent: Drover/2.0\nDisallow: /private\nAllow: /private/open\n\
            Sitemap: https://example.org/map\nDisallow: /late # and a remark\nuser-agent: third\nDisallow: /third\n";
        assert!(allows(text, "/") && allows(text, "/third") && allows(text, "/private/open/x"));
        assert!(!allows(text, "/private") && !allows(text, "/privateer") && !allows(text, "/late/x"));
        // Groups of one name are one group, wherever they stand.
        let twice = "user-agent: drover\ndisallow: /a\nuser-agent: x\ndisallow: /b\nUSER-AGENT:DROVER\nDISALLOW:/c";
        assert!(!allows(twice, "/a") && allows(twice, "/b") && !allows(twice, "/c"));
        assert!(!allows("User-agent: *\rDisallow: /\r", "/x") && allows("", "/") && allows("Disallow: /", "/x"));
        assert!(allows("user-agent: *\ndisallow:\n", "/x"), "an empty pattern forbids nothing");
        assert!(!allows("user-agent: drover\n\nuser-agent: *\ndisallow: /\n", "/x"), "an empty line parts no group");
        assert!(allows("user-agent: droverbot\ndisallow: /", "/x"), "another program's name");
        assert!(allows("user-agent: *\ndisallow: /", "/robots.txt"));
        assert!(!allows("\u{feff}user-agent: *\ndisallow: /", "/x"));
    }

    #[test]
    fn the_longest_pattern_decides_and_of_two_the_friendlier() {
        let cases = [
            ("/p", "/", "/page", true),
            ("/p", "/page", "/page", false),
            ("/folder", "/folder", "/folder/page", true),
            ("/page", "/*.htm", "/page.htm", false),
            ("/$", "/", "/", true),
            ("/$", "/", "/page.htm", false),
        ];
        for (allow, disallow, path, expected) in cases {
            let text = format!("user-agent: *\nallow: {allow}\ndisallow: {disallow}");
            assert_eq!(allows(&text, path), expected, "{allow} {disallow} {path}");
        }
    }

    #[test]
    fn stars_ends_and_escapes_fit_as_the_standard_says() {
        for (pattern, path) in [
            ("/*", "/"),
            ("*", "/x"),
            ("/fish*.php", "/fishheads/catfish.php?x"),
            ("/*.php$", "/a/b.php"),
            ("/a**b$", "/axb"),
            ("/foo/bar?baz=http%3A%2F%2Ffoo", "/foo/bar?baz=http%3a%2F%2Ffoo"),
            ("/%62an", "/banana"),
            ("/ツ", "/%E3%83%84"),
            ("/a*a$", "/aaa"),
            ("/$", "/"),
            ("/x*$", "/x"),
            ("$", ""),
        ] {
            assert!(fits(&normal(pattern.as_bytes()), &normal(path.as_bytes())), "{pattern} {path}");
        }
        for (pattern, path) in [
            ("/*.php$", "/b.php5"),
            ("/a*a$", "/a"),
            ("/fish", "/Fish"),
            ("/a%2fb", "/a/b"),
            ("/ab*c", "/abd"),
            ("x", "/x"),
        ] {
            assert!(!fits(&normal(pattern.as_bytes()), &normal(path.as_bytes())), "{pattern} {path}");
        }
    }

    /// The slow and obvious way.
    fn obviously(pattern: &[u8], path: &[u8]) -> bool {
        match pattern.split_first() {
            None => true,
            Some((b'$', [])) => path.is_empty(),
            Some((b'*', rest)) => (0..=path.len()).any(|at| obviously(rest, &path[at..])),
            Some((byte, rest)) => {
                path.split_first().is_some_and(|(first, behind)| first == byte && obviously(rest, behind))
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        #[test]
        fn the_quick_match_is_the_obvious_one(pattern in "[ab*$]{0,8}", path in "[ab$]{0,10}") {
            prop_assert_eq!(fits(pattern.as_bytes(), path.as_bytes()), obviously(pattern.as_bytes(), path.as_bytes()), "{} {}", pattern, path);
        }

        #[test]
        fn no_text_breaks_the_reader(text in proptest::collection::vec(any::<u8>(), 0..400), path in "\\PC{0,40}", lines in "((user-agent|allow|disallow|x)[: ]{1,2}[*/a$%#]{0,6}[\r\n]){0,20}") {
            for text in [text.as_slice(), lines.as_bytes()] {
                let robots = Robots::read(text, AGENT);
                let verdict = robots.allows(&path);
                prop_assert_eq!(verdict, robots.allows(&path));
                prop_assert!(robots.allows("/robots.txt"));
                // Forbidding more never allows more.
                let mut more = text.to_vec();
                more.extend(b"\nuser-agent: drover\ndisallow: /\n");
                if robots.rules.is_empty() {
                    prop_assert!(!Robots::read(&more, AGENT).allows("/anything"));
                }
            }
        }
    }

    #[test]
    fn hostile_files_are_read_in_no_time() {
        let began = std::time::Instant::now();
        let stars = format!("user-agent: *\ndisallow: /{}b$\n", "a*".repeat(200_000));
        assert!(Robots::read(stars.as_bytes(), AGENT).allows(&format!("/{}", "a".repeat(8_000))), "no b in it");
        let many = format!("user-agent: *\n{}", "disallow: /*a*a*a*a*b\n".repeat(40_000));
        let robots = Robots::read(many.as_bytes(), AGENT);
        assert!(robots.rules.len() <= MAX_RULES && robots.allows(&format!("/{}", "a".repeat(8_000))));
        assert!(began.elapsed().as_secs() < 30, "{:?}", began.elapsed());
    }
}
