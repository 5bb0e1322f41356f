//! What Slurm's programs print, read. Pure: text in, facts out.
//!
//! We choose every format ourselves, so that versions differ little: fields that cannot have a `|` come first, text that people
//! choose comes last. A line that is not understood never makes a job disappear: the list it stands in is then not whole.

pub(crate) mod history;
pub(crate) mod hosts;
pub(crate) mod partitions;
pub(crate) mod queue;
#[cfg(test)]
mod recorded;
pub(crate) mod show;
pub(crate) mod submit;

/// A field in which Slurm says that there is nothing.
fn given(field: &str) -> &str {
    match field.trim() {
        "N/A" | "(null)" | "Unknown" | "None assigned" => "",
        other => other,
    }
}

/// A word for people from a field that somebody else filled: one short line that shows what it is.
fn tame(field: &str) -> String {
    given(field).chars().filter(|c| is_shown(*c)).take(200).collect()
}

/// A list of hosts, which is long when they do not stand side by side. Names of hosts have few signs.
fn tame_list(field: &str) -> String {
    given(field).chars().filter(char::is_ascii_graphic).take(LONGEST_LIST).collect()
}

/// Room for a thousand names one by one.
const LONGEST_LIST: usize = 64 << 10;

/// Whether a terminal shows it as what it is: it neither acts nor changes the order of what stands around it.
pub(crate) fn is_shown(c: char) -> bool {
    !c.is_control()
        && !matches!(c, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}
