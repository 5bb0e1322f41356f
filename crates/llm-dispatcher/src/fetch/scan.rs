//! Takes HTML apart into tags and texts, once, from front to back, in time in proportion to its length whatever it is.
//!
//! This is no parser: it does not know what may stand where. It exists because a real parser can be made to need minutes or
//! gigabytes for a page of two megabytes, and because the pages read here were chosen by strangers.

/// A piece of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    /// Text as it stands, with its entities.
    Text(&'a str),
    /// A start tag: its name as written, and what stands between the name and the end of the tag.
    Open { name: &'a str, inside: &'a str },
    /// An end tag.
    Close { name: &'a str },
}

/// Elements whose content is no markup.
const RAW: &[&str] = &["script", "style", "title", "textarea", "iframe", "noembed", "noframes", "xmp", "plaintext"];

/// The pieces of a page.
pub(super) struct Pieces<'a> {
    rest: &'a str,
    /// The element whose text is being read as it stands.
    raw: Option<&'a str>,
}

impl<'a> Pieces<'a> {
    pub(super) fn of(html: &'a str) -> Self {
        Self { rest: html, raw: None }
    }

    fn take(&mut self, bytes: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(bytes);
        self.rest = rest;
        taken
    }
}

impl<'a> Iterator for Pieces<'a> {
    type Item = Piece<'a>;

    fn next(&mut self) -> Option<Piece<'a>> {
        if let Some(name) = self.raw.take() {
            let end = end_of_raw(self.rest, name);
            if end > 0 {
                return Some(Piece::Text(self.take(end)));
            }
        }
        while !self.rest.is_empty() {
            let text = self.rest.find('<').unwrap_or(self.rest.len());
            if text > 0 {
                return Some(Piece::Text(self.take(text)));
            }
            let behind = &self.rest[1..];
            let first = behind.bytes().next().unwrap_or_default();
            if let Some(comment) = behind.strip_prefix("!--") {
                // `<!-->` and `<!--->` are whole.
                let whole = ["->", ">"].iter().find(|end| comment.starts_with(**end)).map(|end| 4 + end.len());
                let length = whole.or_else(|| comment.find("-->").map(|at| 4 + at + 3)).unwrap_or(self.rest.len());
                self.take(length);
            } else if first.is_ascii_alphabetic() {
                let (tag, length) = tag(behind);
                self.take(1 + length);
                let name = &tag[..name_length(tag)];
                if RAW.iter().any(|raw| raw.eq_ignore_ascii_case(name)) {
                    self.raw = Some(name);
                }
                return Some(Piece::Open { name, inside: &tag[name.len()..] });
            } else if first == b'/' && behind[1..].starts_with(|letter: char| letter.is_ascii_alphabetic()) {
                let (tag, length) = tag(&behind[1..]);
                self.take(2 + length);
                return Some(Piece::Close { name: &tag[..name_length(tag)] });
            } else if matches!(first, b'!' | b'?' | b'/') {
                let length = behind.find('>').map_or(self.rest.len(), |at| at + 2);
                self.take(length);
            } else {
                return Some(Piece::Text(self.take(1)));
            }
        }
        None
    }
}

fn name_length(tag: &str) -> usize {
    tag.find(|letter: char| letter.is_ascii_whitespace() || letter == '/').unwrap_or(tag.len())
}

/// A tag without its brackets, from its name on, and how many bytes it takes with its end.
fn tag(text: &str) -> (&str, usize) {
    let mut quote = None;
    let mut after_equals = false;
    for (at, byte) in text.bytes().enumerate() {
        match quote {
            Some(open) if open == byte => quote = None,
            None if byte == b'>' => return (&text[..at], at + 1),
            // A quote opens a value only right behind the sign; elsewhere it is part of a word.
            None if after_equals && matches!(byte, b'"' | b'\'') => quote = Some(byte),
            _ => {}
        }
        after_equals = quote.is_none() && (byte == b'=' || (after_equals && byte.is_ascii_whitespace()));
    }
    (text, text.len())
}

/// Where the text of a raw element ends: before its end tag, or with the page.
fn end_of_raw(text: &str, name: &str) -> usize {
    let mut from = 0;
    while let Some(at) = text[from..].find("</") {
        let at = from + at;
        let behind = &text.as_bytes()[at + 2..];
        let same = behind.get(..name.len()).is_some_and(|word| word.eq_ignore_ascii_case(name.as_bytes()));
        let ends = behind.get(name.len()).is_none_or(|byte| byte.is_ascii_whitespace() || matches!(byte, b'/' | b'>'));
        if same && ends {
            return at;
        }
        from = at + 2;
    }
    text.len()
}

/// The attributes of a tag that are asked for, each by its first place, shortened to what an honest page needs.
pub(super) fn attributes<'a>(inside: &'a str, wanted: &[&'static str]) -> Vec<(&'static str, &'a str)> {
    const LONGEST: usize = 2048;
    /// More names are never looked at.
    const MOST: usize = 64;
    let mut found: Vec<(&'static str, &str)> = Vec::new();
    let mut rest = inside;
    for _ in 0..MOST {
        rest = rest.trim_start_matches(|letter: char| letter.is_ascii_whitespace() || letter == '/');
        if rest.is_empty() {
            break;
        }
        let ends = |letter: char| letter.is_ascii_whitespace() || matches!(letter, '=' | '/');
        // A sign at the very beginning belongs to the name.
        let first = rest.chars().next().map_or(0, char::len_utf8);
        let name = rest[first..].find(ends).map_or(rest.len(), |at| at + first);
        let (word, behind) = rest.split_at(name);
        let mut value = "";
        let trimmed = behind.trim_ascii_start();
        rest = behind;
        if let Some(given) = trimmed.strip_prefix('=') {
            let given = given.trim_ascii_start();
            let quoted = ['"', '\''].into_iter().find_map(|quote| Some((quote, given.strip_prefix(quote)?)));
            let (text, behind) = match quoted {
                Some((quote, inner)) => inner.split_once(quote).unwrap_or((inner, "")),
                None => given.split_at(given.find(|letter: char| letter.is_ascii_whitespace()).unwrap_or(given.len())),
            };
            (value, rest) = (text, behind);
        }
        let known = wanted.iter().find(|name| name.eq_ignore_ascii_case(word));
        if let Some(&name) = known
            && value.len() <= LONGEST
            && !found.iter().any(|(earlier, _)| *earlier == name)
        {
            found.push((name, value));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(html: &str) -> Vec<String> {
        Pieces::of(html)
            .map(|piece| match piece {
                Piece::Text(text) => format!("t:{text}"),
                Piece::Open { name, inside } => format!("o:{name}|{inside}"),
                Piece::Close { name } => format!("c:{name}"),
            })
            .collect()
    }

    #[test]
    fn pages_come_apart_as_browsers_take_them() {
        assert_eq!(
            pieces("<!DOCTYPE html><P class='a>b'>x<br/>y</p ><!-- <b> -->z<!-->1<?php ?>2</ x>3"),
            ["o:P| class='a>b'", "t:x", "o:br|/", "t:y", "c:p", "t:z", "t:1", "t:2", "t:3"]
        );
        assert_eq!(
            pieces("<script>if (a</b/.x) '</scripty>'</SCRIPT >a<title>1 < 2 <b></title>"),
            ["o:script|", "t:if (a</b/.x) '</scripty>'", "c:SCRIPT", "t:a", "o:title|", "t:1 < 2 <b>", "c:title"]
        );
        assert_eq!(pieces("a < b <3 <>"), ["t:a ", "t:<", "t: b ", "t:<", "t:3 ", "t:<", "t:>"]);
        // What never ends ends with the page.
        assert_eq!(pieces("a<p class=\"x"), ["t:a", "o:p| class=\"x"]);
        assert_eq!(pieces("a<!-- b"), ["t:a"]);
        assert_eq!(pieces("<style>a"), ["o:style|", "t:a"]);
        assert_eq!(pieces("<p a=it's>b</p>"), ["o:p| a=it's", "t:b", "c:p"]);
    }

    #[test]
    fn attributes_are_found_by_name_and_only_once() {
        let wanted = &["href", "class"];
        assert_eq!(attributes(" HREF = \"a b\" class=x/y href=c data-x", wanted), [("href", "a b"), ("class", "x/y")]);
        assert_eq!(attributes("/class/href='q'>", wanted), [("class", ""), ("href", "q")]);
        assert_eq!(attributes("=é href=é 𐕯ﬂ=1 é", wanted), [("href", "é")]);
        assert_eq!(attributes(&format!(" href={}", "x".repeat(5000)), wanted), []);
        assert_eq!(attributes(&format!("{} href=x", "a ".repeat(100)), wanted), [], "hidden behind too many");
    }

    proptest! {
        #[test]
        fn nothing_is_invented_and_nothing_panics(html in "(<[a-z/!?]{0,3}[ a-z='\"/]{0,8}>?|\\PC{0,5}|</?script>|<!--|-->){0,30}") {
            let mut length = 0;
            for piece in Pieces::of(&html) {
                length += match piece {
                    Piece::Text(text) => text.len(),
                    Piece::Open { name, inside } => {
                        for (_, value) in attributes(inside, &["href", "class", "id"]) {
                            prop_assert!(inside.contains(value));
                        }
                        name.len() + inside.len()
                    }
                    Piece::Close { name } => name.len(),
                };
            }
            prop_assert!(length <= html.len());
        }
    }
}
