//! The `%` words and variables in values of the configuration.

use std::path::{Path, PathBuf};

use super::tilde;

pub(super) struct Tokens<'a> {
    pub(super) alias: &'a str,
    pub(super) host: &'a str,
    pub(super) port: u16,
    pub(super) user: &'a str,
    pub(super) local_user: &'a str,
    pub(super) home: &'a Path,
}

impl Tokens<'_> {
    pub(super) fn path(&self, value: &str) -> Result<PathBuf, String> {
        let value = self.replace(&variables(value)?)?;
        let path = tilde(&value, self.home);
        // A relative path would depend on where we were started.
        Ok(if path.is_absolute() { path } else { self.home.join(path) })
    }

    /// A command for the shell of this host; its variables are the shell's to replace.
    pub(super) fn command(&self, value: &str) -> Result<String, String> {
        self.replace(value)
    }

    fn replace(&self, value: &str) -> Result<String, String> {
        let mut out = String::new();
        let mut chars = value.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            match chars.next() {
                Some('%') => out.push('%'),
                Some('h') => out.push_str(self.host),
                Some('n') => out.push_str(self.alias),
                Some('p') => out.push_str(&self.port.to_string()),
                Some('r') => out.push_str(self.user),
                Some('u') => out.push_str(self.local_user),
                Some('d') => out.push_str(&self.home.to_string_lossy()),
                Some('i') => out.push_str(&rustix::process::getuid().as_raw().to_string()),
                Some(other) => return Err(format!("`%{other}` in `{value}` is not known here")),
                None => return Err(format!("`{value}` ends in a lone %")),
            }
        }
        Ok(out)
    }
}

fn variables(value: &str) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = value;
    while let Some((before, after)) = rest.split_once("${") {
        let (name, behind) = after.split_once('}').ok_or(format!("`{value}` has no closing brace"))?;
        out.push_str(before);
        out.push_str(&std::env::var(name).map_err(|_| format!("the variable {name} in `{value}` is not set"))?);
        rest = behind;
    }
    out.push_str(rest);
    Ok(out)
}
