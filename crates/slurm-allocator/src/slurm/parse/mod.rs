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

/// A word for people from a field that somebody else filled: one short line.
fn tame(field: &str) -> String {
    given(field).chars().filter(|c| !c.is_control()).take(200).collect()
}
