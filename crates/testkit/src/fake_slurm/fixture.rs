//! What a command was recorded to answer, and the shape of an answer: what is left when everything is taken away that differs
//! from one run to the next.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// One recorded call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fixture {
    /// What was called, quoted for a shell.
    pub command: String,
    /// How it ended.
    pub status: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Where the recordings are, one folder per version.
pub fn recordings() -> PathBuf {
    crate::codex::repository_root().join("crates/slurm-allocator/tests/fixtures/slurm")
}

impl Fixture {
    /// Reads one recording.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = fs::read(path).with_context(|| format!("failed to read {}", path.display()))?;
        let text = String::from_utf8_lossy(&text);
        let broken = || format!("{} is no recording", path.display());
        let (head, rest) = text.split_once("--- stdout\n").with_context(broken)?;
        // The last such line: it is the one that the recorder wrote.
        let at = rest.rfind("--- stderr\n").with_context(broken)?;
        let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        Ok(Self {
            command: field("command:").with_context(broken)?.to_owned(),
            status: field("exit:").and_then(|status| status.parse().ok()).with_context(broken)?,
            stdout: rest[..at].to_owned(),
            stderr: rest[at + "--- stderr\n".len()..].to_owned(),
        })
    }

    /// Reads all recordings of a folder by their names.
    pub fn read_all(folder: &Path) -> anyhow::Result<Vec<(String, Self)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(folder).with_context(|| format!("failed to read {}", folder.display()))? {
            let path = entry?.path();
            if path.extension().is_some_and(|end| end == "txt") {
                let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
                found.push((name, Self::read(&path)?));
            }
        }
        found.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(found)
    }
}

/// An answer without what differs from run to run: each time becomes `<time>`, each span `<span>`, other numbers `#`, and each of
/// the `words` (a user's name, a directory, a host) what it is to be called.
pub fn shape(text: &str, words: &[(&str, &str)]) -> String {
    let mut text = text.to_owned();
    for (word, name) in words {
        text = text.replace(word, name);
    }
    let mut out = String::new();
    let mut rest = text.as_str();
    while let Some(first) = rest.chars().next() {
        if !first.is_ascii_digit() {
            out.push(first);
            rest = &rest[first.len_utf8()..];
            continue;
        }
        let end = rest.find(|c: char| !c.is_ascii_digit() && !matches!(c, ':' | '-' | 'T')).unwrap_or(rest.len());
        let whole = rest[..end].trim_end_matches(|c: char| !c.is_ascii_digit());
        if is_time(whole) {
            out.push_str("<time>");
            rest = &rest[whole.len()..];
        } else if is_span(whole) {
            out.push_str("<span>");
            rest = &rest[whole.len()..];
        } else {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            out.push('#');
            rest = &rest[digits..];
        }
    }
    out
}

fn is_time(text: &str) -> bool {
    let pattern = "dddd-dd-ddTdd:dd:dd";
    text.len() == pattern.len()
        && text.chars().zip(pattern.chars()).all(|(c, p)| if p == 'd' { c.is_ascii_digit() } else { c == p })
}

/// `0:05`, `00:10:00`, `1-02:03:04`; an exit code `0:0` has one digit behind its colon.
fn is_span(text: &str) -> bool {
    let clock = text.split_once('-').map_or(text, |(_, clock)| clock);
    let parts: Vec<&str> = clock.split(':').collect();
    (2..=3).contains(&parts.len()) && parts.iter().skip(1).all(|part| part.len() == 2) && !text.contains('T')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_keeps_what_matters() {
        let line = "7|RUNNING|None|0:05|n[1-4]|2026-11-21T13:00:00|1-02:03:04|drover:first:1|0:0|/home/anna/x";
        assert_eq!(
            shape(line, &[("/home/anna", "DIR")]),
            "#|RUNNING|None|<span>|n[#-#]|<time>|<span>|drover:first:#|#:#|DIR/x"
        );
    }
}
