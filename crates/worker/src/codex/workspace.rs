//! Tells whether a call that codex asks about stays inside the node's working directory.
//!
//! The answer decides whether the auto-approve policy may say yes by itself, so a doubt counts as outside: a command with
//! anything that only a shell can work out goes to a person.

use std::path::{Component, Path, PathBuf};

/// The working directory of the node, with symbolic links resolved.
#[derive(Debug, Clone)]
pub(super) struct Workspace {
    root: PathBuf,
}

impl Workspace {
    pub(super) fn new(root: &Path) -> Self {
        Self { root: std::fs::canonicalize(root).unwrap_or_else(|_| root.to_owned()) }
    }

    /// Whether this path, taken from `cwd` when relative, lies inside. A part that exists is resolved on disk, so that a
    /// symbolic link does not lead out.
    pub(super) fn holds(&self, cwd: &Path, path: &str) -> bool {
        let Some(plain) = without_dots(&self.root.join(cwd).join(path)) else { return false };
        plain.starts_with(&self.root) && resolved(&plain).is_some_and(|real| real.starts_with(&self.root))
    }

    /// Whether this command, as far as its words tell, touches nothing outside.
    pub(super) fn holds_command(&self, cwd: &Path, command: &str) -> bool {
        if !self.holds(Path::new(""), &cwd.to_string_lossy()) {
            return false;
        }
        let script = unwrap_shell(command);
        if script.contains(['$', '`', '~', '\\', '*', '?', '[', '{', '\n']) {
            return false;
        }
        let separators = |c: char| {
            c.is_whitespace() || matches!(c, ';' | '&' | '|' | '<' | '>' | '(' | ')' | '=' | ':' | ',' | '\'' | '"')
        };
        let words: Vec<&str> = script.split(separators).filter(|word| !word.is_empty()).collect();
        // Words that change where later relative paths lead, or that run other words as code.
        let obscure = [
            "cd", "pushd", "eval", "exec", "source", ".", "env", "xargs", "sudo", "ssh", "python", "python3", "perl",
            "node",
        ];
        words.iter().all(|word| {
            *word == "/dev/null" || (!obscure.contains(word) && !word.contains("://") && self.holds(cwd, word))
        })
    }
}

/// Takes `.` and `..` out by the letter; none when it would climb above the root.
fn without_dots(path: &Path) -> Option<PathBuf> {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                if !plain.pop() {
                    return None;
                }
            }
            other => plain.push(other),
        }
    }
    Some(plain)
}

/// Resolves the longest part of the path that exists, and puts the rest behind it.
fn resolved(path: &Path) -> Option<PathBuf> {
    path.ancestors().find_map(|ancestor| {
        let real = std::fs::canonicalize(ancestor).ok()?;
        Some(path.strip_prefix(ancestor).map_or(real.clone(), |rest| real.join(rest)))
    })
}

/// Codex runs commands as `/bin/bash -lc '...'`; what counts is what stands in there.
fn unwrap_shell(command: &str) -> &str {
    let mut words = command.splitn(3, ' ');
    let (Some(shell), Some(flag), Some(script)) = (words.next(), words.next(), words.next()) else { return command };
    let is_shell = shell.rsplit('/').next().is_some_and(|name| matches!(name, "bash" | "sh" | "zsh" | "dash"));
    if is_shell && matches!(flag, "-c" | "-lc") { script } else { command }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_certainly_stays_inside_is_inside() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("ws");
        std::fs::create_dir_all(root.join("sub")).unwrap();
        std::os::unix::fs::symlink("/etc", root.join("link")).unwrap();
        let workspace = Workspace::new(&root);
        let sub = root.join("sub");

        assert!(workspace.holds(&root, "a/b.txt") && workspace.holds(&sub, "../x"));
        for outside in ["../x", "/etc/passwd", "link/passwd", "sub/../../x", "../../../../../../.."] {
            assert!(!workspace.holds(&root, outside), "{outside}");
        }
        for inside in
            ["/bin/bash -lc 'echo hi > out.txt && cat out.txt'", "make -j4", "touch sub/../a", "true >/dev/null"]
        {
            assert!(workspace.holds_command(&root, inside), "{inside}");
        }
        for outside in [
            "touch /etc/x",
            "touch ../x",
            "echo hi > link/x",
            "rm -rf ~",
            "rm -rf $HOME",
            "cat `which sh`",
            "cp a --target-directory=/tmp",
            "curl http://example.com",
            "/bin/bash -lc 'cd .. && rm x'",
            "python3 -c 'pass'",
        ] {
            assert!(!workspace.holds_command(&root, outside), "{outside}");
        }
        assert!(!workspace.holds_command(Path::new("/"), "ls"));
    }
}
