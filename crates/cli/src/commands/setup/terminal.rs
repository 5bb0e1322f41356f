//! Asking a person.

use std::io::{self, BufRead as _, IsTerminal as _, Write as _};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::fault::Fault;

/// A person who sits here.
pub(super) struct Terminal {
    stdin: io::Stdin,
}

impl Terminal {
    /// When somebody is there to be asked, and may be.
    pub(super) fn when(allowed: bool) -> Option<Self> {
        let stdin = io::stdin();
        (allowed && stdin.is_terminal() && io::stderr().is_terminal()).then_some(Self { stdin })
    }

    /// Asks for a word; an empty answer is the usual one.
    pub(super) fn ask(&self, what: &str, usual: &str) -> Result<String, Fault> {
        let usually = if usual.is_empty() { String::new() } else { format!(" [{usual}]") };
        let said = self.prompt(&format!("{what}{usually}: "))?;
        Ok(if said.is_empty() { usual.to_owned() } else { said })
    }

    /// Asks for a secret; what is typed is not shown. `None` for an empty answer.
    pub(super) fn ask_hidden(&self, what: &str) -> Result<Option<String>, Fault> {
        let _hidden = Hidden::begin().map_err(|error| Fault::failed(format!("cannot hide what is typed: {error}")))?;
        let said = self.prompt(&format!("{what}: "));
        let _ = writeln!(io::stderr());
        let said = said?;
        if said.is_empty() { Ok(None) } else { super::write::clean_key(&said).map(Some) }
    }

    fn prompt(&self, text: &str) -> Result<String, Fault> {
        let mut line = String::new();
        let read = io::stderr().write_all(text.as_bytes()).and_then(|()| self.stdin.lock().read_line(&mut line));
        match read {
            Ok(0) => {
                Err(Fault::failed("nothing was answered")
                    .hint("`drover setup --help` shows how to do without questions"))
            }
            Ok(_) => Ok(line.trim().to_owned()),
            Err(error) => Err(Fault::failed(format!("cannot read the answer: {error}"))),
        }
    }
}

/// The terminal shows nothing of what is typed until this is dropped.
struct Hidden(Termios);

impl Hidden {
    fn begin() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut quiet = before.clone();
        quiet.local_modes.remove(LocalModes::ECHO);
        tcsetattr(io::stdin(), OptionalActions::Flush, &quiet)?;
        Ok(Self(before))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
    }
}
