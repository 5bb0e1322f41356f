//! Aligned columns that fit the terminal. The last column gives way when they do not.

use crate::render::colour::{Paint, Tone};

/// One cell: its text and its tone. Padding is never coloured.
#[derive(Debug, Clone)]
pub(crate) struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    pub(crate) fn toned(text: impl Into<String>, tone: Tone) -> Self {
        Self { text: one_line(&text.into()), tone }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::toned(text, Tone::Plain)
    }
}

/// A table with a head.
#[derive(Debug)]
pub(crate) struct Table {
    head: Vec<&'static str>,
    right: Vec<bool>,
    rows: Vec<Vec<Cell>>,
}

/// Space between columns.
const GAP: usize = 2;
/// Characters of a line that no terminal shows: more than any reason or preview has.
const NO_TERMINAL: usize = 2000;
/// The last column never gets narrower than this.
const NARROWEST: usize = 12;

impl Table {
    /// A table of these columns; a name that begins with `>` is a column of numbers.
    pub(crate) fn new(head: &[&'static str]) -> Self {
        Self {
            head: head.iter().map(|name| name.trim_start_matches('>')).collect(),
            right: head.iter().map(|name| name.starts_with('>')).collect(),
            rows: Vec::new(),
        }
    }

    pub(crate) fn row(&mut self, cells: Vec<Cell>) {
        debug_assert_eq!(cells.len(), self.head.len(), "a row has as many cells as the head");
        self.rows.push(cells);
    }

    /// The lines, no wider than `width` as long as the last column can give way.
    pub(crate) fn render(&self, width: usize, paint: Paint) -> String {
        let mut widths: Vec<usize> = self.head.iter().map(|name| length(name)).collect();
        for row in &self.rows {
            for (column, cell) in row.iter().enumerate() {
                widths[column] = widths[column].max(length(&cell.text));
            }
        }
        let fixed: usize = widths.iter().rev().skip(1).map(|width| width + GAP).sum();
        if let Some(last) = widths.last_mut() {
            *last = (*last).min(width.saturating_sub(fixed).max(NARROWEST));
        }
        let mut out = String::new();
        let head = self.head.iter().map(|name| Cell::toned(*name, Tone::Dim)).collect::<Vec<_>>();
        for row in std::iter::once(&head).chain(&self.rows) {
            let mut line = String::new();
            for (column, cell) in row.iter().enumerate() {
                let text = cut(&cell.text, widths[column]);
                let space = " ".repeat(widths[column] - length(&text));
                let painted = paint.paint(cell.tone, &text);
                let last = column + 1 == row.len();
                match (self.right[column], last) {
                    (true, _) => line.extend([space.as_str(), &painted]),
                    (false, true) => line.push_str(&painted),
                    (false, false) => line.extend([painted.as_str(), &space]),
                }
                if !last {
                    line.push_str(&" ".repeat(GAP));
                }
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

fn length(text: &str) -> usize {
    text.chars().count()
}

/// The text, shortened to `width` characters with a mark where it was cut.
pub(crate) fn cut(text: &str, width: usize) -> String {
    if length(text) <= width {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(width.saturating_sub(1)).collect();
    short.push('…');
    short
}

/// Line ends and control characters would break a table, and could move the cursor of a terminal.
pub(crate) fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").chars().filter(|c| !c.is_control()).collect()
}

/// Text of several lines that somebody else wrote, without what could move the cursor of a terminal.
pub(crate) fn tame(text: &str) -> String {
    text.chars().filter(|c| matches!(c, '\n' | '\t') || !c.is_control()).collect()
}

/// The width of the terminal on standard output; 80 when it has no sensible one. What goes to a file or a program is not
/// shortened to fit a screen.
pub(crate) fn width() -> usize {
    match rustix::termios::tcgetwinsize(std::io::stdout()) {
        Ok(size) => Some(usize::from(size.ws_col)).filter(|&columns| columns >= 40).unwrap_or(80),
        Err(_) => NO_TERMINAL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_the_last_gives_way() {
        let mut table = Table::new(&["NAME", ">NODES", "PROMPT"]);
        table.row(vec!["a".into(), "4".into(), "short".into()]);
        table.row(vec!["longer".into(), "1000".into(), "a prompt that does not fit\nat all \x1b[31m".into()]);
        let text = table.render(32, Paint::OFF);
        insta::assert_snapshot!(text, @r"
        NAME    NODES  PROMPT
        a           4  short
        longer   1000  a prompt that do…
        ");
        assert!(text.lines().all(|line| line.chars().count() <= 32));
    }
}
