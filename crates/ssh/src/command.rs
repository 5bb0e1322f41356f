//! What is run, and what came of it.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::time::Duration;

use bytes::Bytes;

use crate::SshError;

/// Longest deadline that counts: an instant that far away can still be computed.
const LONGEST: Duration = Duration::from_hours(365 * 24);

/// A program with its arguments. Nothing in it is ever read by a shell.
#[derive(Debug, Clone)]
pub struct Command {
    pub(crate) program: OsString,
    pub(crate) args: Vec<OsString>,
    pub(crate) env: Vec<(String, OsString)>,
    pub(crate) stdin: Bytes,
    pub(crate) deadline: Duration,
    pub(crate) max_output: usize,
}

impl Command {
    /// A command with empty input, a deadline of 30 s and at most 8 MiB of output.
    pub fn new(program: impl Into<OsString>) -> Self {
        Self {
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            stdin: Bytes::new(),
            deadline: Duration::from_secs(30),
            max_output: 8 << 20,
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of the program's environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// What the program reads on its standard input, which ends after it.
    #[must_use]
    pub fn stdin(mut self, stdin: impl Into<Bytes>) -> Self {
        self.stdin = stdin.into();
        self
    }

    /// How long everything together may take: waiting for a connection and for a free session included.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline.min(LONGEST);
        self
    }

    /// Most bytes that the standard output may have. A program that says more is stopped and the command fails: half an
    /// answer must not be taken for a whole one. Of the standard error only the last part is kept.
    #[must_use]
    pub fn max_output(mut self, bytes: usize) -> Self {
        self.max_output = bytes;
        self
    }

    /// The program as it is named in messages and logs; arguments may hold secrets and are not named.
    pub fn name(&self) -> String {
        self.program.to_string_lossy().into_owned()
    }

    /// Refuses what no system call could carry, and names that a shell would take for something else.
    pub(crate) fn check(&self) -> Result<(), SshError> {
        let invalid = |why: &str| SshError::Invalid { program: self.name(), why: why.to_owned() };
        let program = self.program.as_bytes();
        if program.is_empty() {
            return Err(invalid("it has no name"));
        }
        if program.starts_with(b"-") {
            return Err(invalid("its name begins with a dash"));
        }
        let values =
            self.args.iter().map(OsString::as_os_str).chain(self.env.iter().map(|(_, value)| value.as_os_str()));
        if values.chain([self.program.as_os_str()]).any(has_nul) {
            return Err(invalid("a NUL byte cannot be passed to a program"));
        }
        if !self.env.iter().all(|(name, _)| is_variable(name)) {
            return Err(invalid("the name of a variable may only have letters, digits and underscores"));
        }
        Ok(())
    }
}

fn has_nul(value: &OsStr) -> bool {
    value.as_bytes().contains(&0)
}

fn is_variable(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

/// What a program said, and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub exit: Exit,
    /// All of its standard output.
    pub stdout: Bytes,
    /// The last part of its standard error.
    pub stderr: Bytes,
}

impl Output {
    /// Whether it ended with status 0.
    pub fn success(&self) -> bool {
        self.exit == Exit::Code(0)
    }

    /// The standard error as text for a message.
    pub fn complaint(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim().to_owned()
    }
}

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this status. 127: there is no such program; 126: it cannot be executed.
    Code(u32),
    /// By a signal.
    Signal(String),
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit status {code}"),
            Self::Signal(name) => write!(f, "signal {name}"),
        }
    }
}

/// The last bytes of a stream that nobody reads while it runs.
#[derive(Debug, Default, Clone)]
pub(crate) struct Tail(Vec<u8>);

impl Tail {
    const KEPT: usize = 64 << 10;

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        if self.0.len() > 2 * Self::KEPT {
            self.0.drain(..self.0.len() - Self::KEPT);
        }
    }

    pub(crate) fn bytes(mut self) -> Bytes {
        let over = self.0.len().saturating_sub(Self::KEPT);
        self.0.drain(..over);
        self.0.into()
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0).trim().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_carried_is_refused() {
        for bad in [
            Command::new(""),
            Command::new("-x"),
            Command::new("a\0b"),
            Command::new("a").arg("x\0y"),
            Command::new("a").env("A=B", "x"),
            Command::new("a").env("", "x"),
            Command::new("a").env("1A", "x"),
            Command::new("a").env("A", "\0"),
        ] {
            assert!(matches!(bad.check(), Err(SshError::Invalid { .. })), "{bad:?}");
        }
        Command::new("a b").arg("$(x)").arg("").arg("-\n'").env("_A1", "=").check().unwrap();
    }

    #[test]
    fn a_tail_keeps_the_end() {
        let mut tail = Tail::default();
        for _ in 0..100 {
            tail.push(&[b'a'; 10_000]);
        }
        tail.push(b"end");
        let bytes = tail.bytes();
        assert_eq!(bytes.len(), Tail::KEPT);
        assert!(bytes.ends_with(b"aend"));
    }
}
