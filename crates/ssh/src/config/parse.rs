//! The lines of a configuration file, and which of them are about a host.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{list_matches, matches, tilde};

/// Deepest that files may include each other, as in OpenSSH.
const DEEPEST: usize = 16;

/// What the files say about one host, in the order in which they say it.
pub(super) struct Found {
    host: String,
    home: PathBuf,
    values: Vec<(String, String)>,
}

impl Found {
    pub(super) fn new(host: &str, home: &Path) -> Self {
        Self { host: host.to_owned(), home: home.to_owned(), values: Vec::new() }
    }

    pub(super) fn set(&mut self, key: &str, value: &str) -> Result<(), String> {
        let key = key.to_ascii_lowercase();
        let value = match key.as_str() {
            // These take the rest of the line as it is, or several words.
            "proxycommand" | "proxyjump" | "userknownhostsfile" | "globalknownhostsfile" => value.to_owned(),
            _ => words(value)?.into_iter().next().ok_or("it has no value")?,
        };
        self.values.push((key, value));
        Ok(())
    }

    pub(super) fn one(&self, key: &str) -> Option<&str> {
        self.all(key).next()
    }

    pub(super) fn all<'a, 'k>(&'a self, key: &'k str) -> impl Iterator<Item = &'a str> + use<'a, 'k> {
        self.values.iter().filter(move |(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    /// The first value of any of these keys, with its key.
    pub(super) fn first_of(&self, keys: &[&'static str]) -> Option<(&'static str, &str)> {
        self.values
            .iter()
            .find_map(|(name, value)| keys.iter().find(|key| *key == name).map(|key| (*key, value.as_str())))
    }

    pub(super) fn flag(&self, key: &str) -> Result<bool, String> {
        match self.one(key).map(str::to_ascii_lowercase).as_deref() {
            None | Some("no" | "false") => Ok(false),
            Some("yes" | "true") => Ok(true),
            Some(other) => Err(format!("{key} is yes or no, not `{other}`")),
        }
    }

    pub(super) fn seconds(&self, key: &str) -> Result<Option<Duration>, String> {
        self.one(key).filter(|value| !value.eq_ignore_ascii_case("none")).map(time).transpose()
    }

    /// Reads a file. One that is not there is an error only when it must be.
    pub(super) fn read(&mut self, file: &Path, must: bool) -> Result<(), String> {
        self.file(file, must, true, 0)
    }

    fn file(&mut self, file: &Path, must: bool, mut about_us: bool, depth: usize) -> Result<(), String> {
        let text = match std::fs::read(file) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) if error.kind() == ErrorKind::NotFound && !must => return Ok(()),
            Err(error) => return Err(format!("{} cannot be read: {error}", file.display())),
        };
        // A block that includes a file holds for all of it; one that the file opens holds no further than its end.
        let included_for_us = about_us;
        for (at, line) in text.lines().enumerate() {
            let wrong = |why: &str| format!("{}:{}: {why}", file.display(), at + 1);
            let Some((key, value)) = split(line) else { continue };
            match key.as_str() {
                "host" => {
                    let patterns = words(value).map_err(|why| wrong(&why))?;
                    about_us = included_for_us && list_matches(patterns.iter().map(String::as_str), &self.host);
                }
                "match" => about_us = included_for_us && value.trim().eq_ignore_ascii_case("all"),
                "include" if about_us => {
                    if depth == DEEPEST {
                        return Err(wrong("files include each other too deeply"));
                    }
                    for pattern in words(value).map_err(|why| wrong(&why))? {
                        for included in self.glob(&pattern, file) {
                            self.file(&included, false, true, depth + 1)?;
                        }
                    }
                }
                _ if about_us => self.set(&key, value).map_err(|why| wrong(&format!("{key}: {why}")))?,
                _ => {}
            }
        }
        Ok(())
    }

    /// The files of an `Include`, sorted by name. A relative one is beside the user's configuration, or beside the system's.
    fn glob(&self, pattern: &str, from: &Path) -> Vec<PathBuf> {
        let base = if from.starts_with("/etc/ssh") { PathBuf::from("/etc/ssh") } else { self.home.join(".ssh") };
        let whole = base.join(tilde(pattern, &self.home));
        let mut found = vec![PathBuf::from("/")];
        for part in whole.components().skip(1) {
            let part = part.as_os_str().to_string_lossy().into_owned();
            if !part.contains(['*', '?']) {
                for dir in &mut found {
                    dir.push(&part);
                }
                continue;
            }
            found = found.iter().flat_map(|dir| entries(dir, &part)).collect();
        }
        found
    }
}

fn entries(dir: &Path, pattern: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            (pattern.starts_with('.') || !name.starts_with('.')) && matches(pattern, &name)
        })
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found
}

/// The key in lower case and the rest of the line: `Key value`, `Key=value`, `Key = value`.
fn split(line: &str) -> Option<(String, &str)> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return None;
    }
    let end = line.find(|c: char| c.is_whitespace() || c == '=').unwrap_or(line.len());
    let rest = line[end..].trim_start();
    let rest = rest.strip_prefix('=').unwrap_or(rest).trim();
    Some((line[..end].to_ascii_lowercase(), rest))
}

/// The words of a value; quotes hold one together, `#` begins a comment.
pub(super) fn words(value: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut chars = value.chars().peekable();
    loop {
        while chars.next_if(|c| c.is_whitespace()).is_some() {}
        match chars.peek() {
            None | Some('#') => return Ok(words),
            Some(_) => {}
        }
        let mut word = String::new();
        let mut quote = None;
        while let Some(c) = chars.next_if(|c| quote.is_some() || !c.is_whitespace()) {
            match c {
                c if quote == Some(c) => quote = None,
                '"' | '\'' if quote.is_none() => quote = Some(c),
                '\\' if chars.peek().is_some_and(|next| "\"'\\".contains(*next)) => word.extend(chars.next()),
                c => word.push(c),
            }
        }
        if quote.is_some() {
            return Err(format!("`{value}` has a quote that is not closed"));
        }
        words.push(word);
    }
}

/// Seconds, or numbers with s, m, h, d, w.
fn time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a time");
    let mut total = 0_u64;
    let mut number = String::new();
    for c in text.chars() {
        let unit = match c.to_ascii_lowercase() {
            c if c.is_ascii_digit() => {
                number.push(c);
                continue;
            }
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86400,
            'w' => 604_800,
            _ => return Err(wrong()),
        };
        let count: u64 = std::mem::take(&mut number).parse().map_err(|_| wrong())?;
        total = count.checked_mul(unit).and_then(|more| total.checked_add(more)).ok_or_else(wrong)?;
    }
    if !number.is_empty() {
        total = number.parse::<u64>().ok().and_then(|more| total.checked_add(more)).ok_or_else(wrong)?;
    } else if text.is_empty() {
        return Err(wrong());
    }
    Ok(Duration::from_secs(total))
}
