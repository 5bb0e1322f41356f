//! The text of a page that a person would read: the article without the menus around it, as Markdown.
//!
//! Finding the article is the work of a well-kept crate. Before it sees a page, the page is written anew by [`tame`]: few kinds of
//! tags, all closed in order, none deep. So neither its tree nor its time grows with the ill will of the page.

use std::borrow::Cow;

use dom_smoothie::{Config, Readability, TextMode};

use super::scan::{Piece, Pieces, attributes};

/// A page as text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Readable {
    pub(super) title: Option<String>,
    pub(super) text: String,
    /// An article was found; otherwise the text is all of the page's.
    pub(super) article: bool,
}

/// Tags beyond these are left out, their text is kept.
const MOST_TAGS: usize = 20_000;
const DEEPEST: usize = 64;
/// An article shorter than this is rather a teaser; the whole page says more.
const SHORT: usize = 250;
const LONGEST_TITLE: usize = 300;
/// Pages beyond these are read whole, without looking for an article in them.
const LONGEST_RUN: usize = 16 << 10;
const LONGEST_PAGE: usize = 1 << 20;

/// Elements that shape a text.
const KEPT: &[&str] = &[
    "a",
    "address",
    "article",
    "aside",
    "blockquote",
    "caption",
    "dd",
    "details",
    "div",
    "dl",
    "dt",
    "figcaption",
    "figure",
    "footer",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "header",
    "hgroup",
    "li",
    "main",
    "nav",
    "ol",
    "p",
    "pre",
    "section",
    "summary",
    "table",
    "tbody",
    "td",
    "tfoot",
    "th",
    "thead",
    "tr",
    "ul",
];
/// Elements whose content nobody reads.
const DROPPED: &[&str] = &[
    "script", "style", "noscript", "template", "svg", "math", "iframe", "object", "embed", "canvas", "audio", "video",
    "select", "textarea", "button", "noembed", "noframes", "head", "dialog", "map",
];
/// Elements that may stand in a head.
const OF_A_HEAD: &[&str] = &["head", "meta", "link", "base", "script", "style", "noscript", "template"];
/// Attributes by which articles are told from menus.
const ATTRIBUTES: &[&str] = &["class", "id", "role", "href", "itemprop", "rel", "hidden", "aria-hidden", "style"];

/// The readable part of a page.
pub(super) fn readable(html: &str, url: &str) -> Readable {
    let Tame { html, title, plain_enough } = tame(html);
    let config = || Config { text_mode: TextMode::Markdown, disable_json_ld: true, ..Config::default() };
    let article = if plain_enough {
        Readability::new(html.as_str(), Some(url), Some(config()))
            .and_then(|mut reader| reader.parse())
            .map(|article| tidy(&article.text_content))
            .unwrap_or_default()
    } else {
        String::new()
    };
    if article.chars().count() >= SHORT {
        return Readable { title, text: article, article: true };
    }
    let whole = Readability::new(html.as_str(), Some(url), Some(config()))
        .map(|reader| tidy(&reader.doc.md(None)))
        .unwrap_or_default();
    if whole.len() > article.len() {
        return Readable { title, text: whole, article: false };
    }
    Readable { title, article: !article.is_empty(), text: article }
}

/// A page written anew.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Tame {
    html: String,
    title: Option<String>,
    /// It is worth looking for an article in it: neither huge nor all of one piece. The time that the search takes grows faster than the text.
    plain_enough: bool,
}

/// Writes a page anew with the tags that shape its text, each closed in order, so that no parser has to repair anything.
fn tame(html: &str) -> Tame {
    let mut out = String::with_capacity(html.len() / 2 + 64);
    out.push_str("<html><body>");
    let mut title = String::new();
    let mut open: Vec<&'static str> = Vec::new();
    let mut in_title = false;
    let mut dropped = Dropped::default();
    let mut tags = 0;
    let mut longest = 0;
    for piece in Pieces::of(html) {
        match piece {
            Piece::Text(text) if in_title => {
                if title.len() < 4 * LONGEST_TITLE {
                    title.push_str(text);
                }
            }
            Piece::Text(text) if dropped.reading() => {
                longest = longest.max(text.len());
                out.push_str(&harmless(text));
            }
            Piece::Text(_) => {}
            Piece::Open { name, inside } => {
                if name.eq_ignore_ascii_case("title") {
                    in_title = title.is_empty() && !dropped.inside_picture();
                } else if dropped.opens(name) || !dropped.reading() {
                    // Nobody reads it.
                } else if ["br", "hr"].iter().any(|void| void.eq_ignore_ascii_case(name)) {
                    tags += 1;
                    out.push_str(if tags <= MOST_TAGS { "<br>" } else { "\n" });
                } else if let Some(&name) = KEPT.iter().find(|kept| kept.eq_ignore_ascii_case(name)) {
                    implied_ends(name, &mut open, &mut out);
                    tags += 1;
                    // A link in a link, or too much of anything: the text alone is kept.
                    if tags > MOST_TAGS || open.len() >= DEEPEST || (name == "a" && open.contains(&"a")) {
                        out.push(' ');
                        continue;
                    }
                    open.push(name);
                    start(name, inside, &mut out);
                } else {
                    out.push_str(apart(name));
                }
            }
            Piece::Close { name } => {
                if name.eq_ignore_ascii_case("title") {
                    in_title = false;
                } else if dropped.closes(name) || !dropped.reading() {
                    // Nobody read it.
                } else if let Some(at) = open.iter().rposition(|kept| kept.eq_ignore_ascii_case(name)) {
                    close(at, &mut open, &mut out);
                } else {
                    out.push_str(apart(name));
                }
            }
        }
    }
    close(0, &mut open, &mut out);
    out.push_str("</body></html>");
    let plain_enough = tags <= MOST_TAGS && longest <= LONGEST_RUN && out.len() <= LONGEST_PAGE;
    Tame { html: out, title: title_of(&title), plain_enough }
}

/// Inside which of the elements that nobody reads a page is at the moment.
#[derive(Debug, Default)]
struct Dropped {
    name: Option<&'static str>,
    depth: usize,
}

impl Dropped {
    fn reading(&self) -> bool {
        self.name.is_none()
    }

    /// Pictures have titles of their own.
    fn inside_picture(&self) -> bool {
        matches!(self.name, Some("svg" | "math"))
    }

    fn opens(&mut self, name: &str) -> bool {
        if self.name == Some("head") && !OF_A_HEAD.iter().any(|known| known.eq_ignore_ascii_case(name)) {
            // A head that was never closed ends where something else begins.
            self.name = None;
        }
        match self.name {
            Some(open) if open.eq_ignore_ascii_case(name) => self.depth += 1,
            Some(_) => {}
            None => {
                let found = DROPPED.iter().find(|dropped| dropped.eq_ignore_ascii_case(name));
                if let Some(&found) = found.filter(|found| **found != "embed") {
                    (self.name, self.depth) = (Some(found), 1);
                    return true;
                }
                return found.is_some();
            }
        }
        false
    }

    fn closes(&mut self, name: &str) -> bool {
        if !self.name.is_some_and(|open| open.eq_ignore_ascii_case(name)) {
            return false;
        }
        self.depth -= 1;
        if self.depth == 0 {
            self.name = None;
        }
        true
    }
}

/// Elements that end by themselves when the next of their kind begins.
fn implied_ends(name: &str, open: &mut Vec<&'static str>, out: &mut String) {
    let (ends, within): (&[&str], &[&str]) = match name {
        "li" => (&["li"], &["ul", "ol"]),
        "dt" | "dd" => (&["dt", "dd"], &["dl"]),
        "tr" => (&["tr"], &["table"]),
        "td" | "th" => (&["td", "th"], &["table", "tr"]),
        "tbody" | "thead" | "tfoot" => (&["tbody", "thead", "tfoot"], &["table"]),
        "a" => return,
        _ => (&["p"], &["td", "th", "li", "dd", "blockquote", "figure"]),
    };
    let at = open.iter().rposition(|element| ends.contains(element) || within.contains(element));
    if let Some(at) = at.filter(|at| ends.contains(&open[*at])) {
        close(at, open, out);
    }
}

/// Closes everything from the `at`th open element on.
fn close(at: usize, open: &mut Vec<&'static str>, out: &mut String) {
    for name in open.drain(at..).rev() {
        out.extend(["</", name, ">"]);
    }
}

fn start(name: &str, inside: &str, out: &mut String) {
    out.extend(["<", name]);
    for (key, value) in attributes(inside, ATTRIBUTES) {
        let value = value.replace(['"', '<', '>'], " ");
        // Only whether a style hides is of interest.
        if key != "style" || value.contains("none") || value.contains("hidden") {
            out.extend([" ", key, "=\"", &value, "\""]);
        }
    }
    out.push('>');
}

/// What an element that is not kept leaves between the words around it.
fn apart(name: &str) -> &'static str {
    const INLINE: &[&str] = &[
        "abbr", "b", "bdi", "bdo", "big", "cite", "code", "data", "del", "dfn", "em", "font", "i", "ins", "kbd",
        "mark", "q", "s", "samp", "small", "span", "strike", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr",
    ];
    if INLINE.iter().any(|inline| inline.eq_ignore_ascii_case(name)) { "" } else { " " }
}

/// Text that no parser can take for a tag.
fn harmless(text: &str) -> Cow<'_, str> {
    if text.contains('<') { Cow::Owned(text.replace('<', "&lt;")) } else { Cow::Borrowed(text) }
}

fn title_of(raw: &str) -> Option<String> {
    // A parser is borrowed for the entities.
    let page = format!("<html><body><p>{}</p></body></html>", harmless(raw));
    let text =
        Readability::new(page.as_str(), None, None).map(|reader| reader.doc.text().to_string()).unwrap_or_default();
    let words: Vec<&str> = text.split_whitespace().collect();
    let title: String = words.join(" ").chars().take(LONGEST_TITLE).collect();
    (!title.is_empty()).then_some(title)
}

/// Lines without trailing blanks, at most one empty line in a row, no characters that would steer a terminal.
pub(super) fn tidy(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut empty = 0;
    for line in text.lines() {
        let line: String = line.chars().filter(|letter| *letter == '\t' || !letter.is_control()).collect();
        let line = line.trim_end();
        if line.is_empty() {
            empty += 1;
            continue;
        }
        if !out.is_empty() {
            out.push_str(if empty > 0 { "\n\n" } else { "\n" });
        }
        empty = 0;
        out.push_str(line);
    }
    out
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use proptest::prelude::*;

    use super::*;

    const URL: &str = "https://example.org/a/page";

    fn paragraphs(count: usize) -> String {
        let mut text = String::new();
        for nth in 0..count {
            let _ = write!(
                text,
                "<p>Paragraph {nth} of the article, with commas, clauses, and enough words that it counts as prose; it goes on for \
                 a while, <b>as prose does</b>, and ends with a full stop.</p>"
            );
        }
        text
    }

    #[test]
    fn an_article_is_found_among_menus_and_read_without_them() {
        let html = format!(
            "<!doctype html><html><head><title>Sheep &amp; goats\n today</title><style>p {{}}</style><script>var a = '<p>script</p>';</script></head>\
             <body class=x><nav><ul><li><a href=/1>Menu one</a><li><a href=/2>Menu two</a></ul></nav>\
             <div id=content><h1>About sheep</h1>{}<ul><li>first thing<li>second thing</ul><table><tr><td>a<td>b</table></div>\
             <footer><a href=/imprint>Imprint</a> all rights reserved</footer><noscript>turn it on</noscript></body></html>",
            paragraphs(8)
        );
        let page = readable(&html, URL);
        assert!(page.article, "{page:?}");
        assert_eq!(page.title.as_deref(), Some("Sheep & goats today"));
        for part in ["Paragraph 0", "Paragraph 7", "as prose does", "first thing", "second thing"] {
            assert!(page.text.contains(part), "{part} is missing in {}", page.text);
        }
        for part in ["Menu one", "script", "Imprint", "turn it on", "<p>"] {
            assert!(!page.text.contains(part), "{part} is left in {}", page.text);
        }
    }

    #[test]
    fn a_page_that_is_no_article_is_read_whole() {
        let page = readable(
            "<title>Prices</title><h1>Prices</h1><table><tr><td>Hay</td><td>3 &euro;</td></tr></table><p>Call us.",
            URL,
        );
        assert_eq!(page.title.as_deref(), Some("Prices"));
        for part in ["Prices", "Hay", "3 €", "Call us."] {
            assert!(page.text.contains(part), "{part}: {page:?}");
        }
        assert_eq!(readable("", URL), Readable::default());
        assert!(readable("<html><head><title>x</title><meta a=b><p>no end of the head", URL).text.contains("no end"));
        assert!(readable("just text & more < less", URL).text.contains("just text & more"));
    }

    /// Deepest nesting, and whether every tag is closed in order.
    fn shape(html: &str) -> (usize, usize) {
        let mut open = Vec::new();
        let (mut deepest, mut tags) = (0, 0);
        for piece in Pieces::of(html) {
            match piece {
                Piece::Open { name: "br", .. } => tags += 1,
                Piece::Open { name, .. } => {
                    open.push(name);
                    tags += 1;
                    deepest = deepest.max(open.len());
                }
                Piece::Close { name } => assert_eq!(open.pop(), Some(name), "closed out of order"),
                Piece::Text(_) => {}
            }
        }
        assert!(open.is_empty(), "left open: {open:?}");
        (deepest, tags)
    }

    /// Pages that are known to cost a parser its time, its memory or its stack.
    fn hostile() -> Vec<(&'static str, String)> {
        let big = 1 << 17;
        let fill = |unit: &str| unit.repeat(big / unit.len());
        vec![
            ("deep", fill("<div>")),
            ("deep lists", fill("<ul><li>")),
            ("deep tables", fill("<table><tr><td>")),
            ("deep unknown", fill("<x-y/>")),
            ("deep links", fill("<a href=x>")),
            ("formatting kept open", format!("<p>{}{}", "<b><i><font>".repeat(2000), fill("<p>x"))),
            ("many attributes", format!("<p {}>x", fill("a1 b2 c3="))),
            ("many wide tags", fill("<p a b c d e f g h i j k l m n o p q r s t u v w x y z>")),
            ("open comment", format!("x<!--{}", fill("--!"))),
            ("open quote", format!("<p title=\"{}", fill("<p>"))),
            ("closings", fill("</div>")),
            ("brackets", fill("<")),
            ("raw ends", format!("<script>{}", fill("</scrip"))),
            ("entities", fill("&amp&#x;&nope")),
            ("paragraphs", fill("<p>a, b, c")),
            ("nested spans", fill("<span>x")),
            ("svg", format!("<svg>{}</svg>tail", fill("<path d=1/>"))),
            ("prose", paragraphs(4000)),
            ("one line", fill("word ")),
        ]
    }

    #[test]
    fn no_page_takes_long_or_deep() {
        for (name, html) in hostile() {
            let began = std::time::Instant::now();
            let tame = tame(&html);
            let (deepest, tags) = shape(&tame.html);
            assert!(deepest <= DEEPEST + 2 && tags <= MOST_TAGS + 2, "{name}: {deepest} deep, {tags} tags");
            let page = readable(&html, URL);
            // Lists are indented by their depth.
            assert!(page.text.len() <= html.len() * 4 + (4 << 20), "{name}");
            assert!(began.elapsed().as_secs() < 30, "{name} took {:?}", began.elapsed());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn whatever_comes_is_tamed_and_read(html in "(<(/?)(p|div|li|ul|table|td|tr|a|h1|script|title|head|body|svg|b|br|x)( (class|href|id|style)=(\"[a-z<>]{0,5}\"|[a-z'\"]{0,4})?){0,2}/?>?|\\PC{0,6}|&[a-z#0-9]{0,5};?|<!--|-->){0,60}") {
            let tame = tame(&html);
            shape(&tame.html);
            let page = readable(&html, URL);
            prop_assert!(!page.text.chars().any(|letter| letter.is_control() && letter != '\n' && letter != '\t'));
            prop_assert!(!page.text.contains("\n\n\n"));
        }
    }

    #[test]
    fn text_is_tidied_and_cannot_steer_a_terminal() {
        assert_eq!(tidy("  \n\n a  \n\n\n\nb\u{1b}[2J\r\nc\u{7}\n \n"), " a\n\nb[2J\nc");
    }
}
