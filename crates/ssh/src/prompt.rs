//! Who is asked when a key needs a passphrase or a host is not known.

use std::fmt::Debug;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::Stdio;

use async_trait::async_trait;
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};

/// Asks a person.
#[async_trait]
pub trait Prompt: Send + Sync + Debug {
    /// Whether somebody may take their time to answer.
    fn interactive(&self) -> bool;
    /// Asks for a secret; none when nobody answers.
    async fn secret(&self, question: &str) -> Option<String>;
    /// Asks for a yes; anything else is a no.
    async fn confirm(&self, question: &str) -> bool;
}

/// Nobody is there.
#[derive(Debug, Clone, Copy)]
pub struct Batch;

#[async_trait]
impl Prompt for Batch {
    fn interactive(&self) -> bool {
        false
    }

    async fn secret(&self, _: &str) -> Option<String> {
        None
    }

    async fn confirm(&self, _: &str) -> bool {
        false
    }
}

/// A program gets the question as its argument and prints the passphrase, as `SSH_ASKPASS` does. It is not asked about hosts:
/// a program that always answers would accept every key.
#[derive(Debug, Clone)]
pub struct Askpass(pub PathBuf);

#[async_trait]
impl Prompt for Askpass {
    fn interactive(&self) -> bool {
        true
    }

    async fn secret(&self, question: &str) -> Option<String> {
        let output = tokio::process::Command::new(&self.0)
            .arg(question)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .ok()?;
        let answer = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| answer.trim_end_matches(['\r', '\n']).to_owned())
    }

    async fn confirm(&self, _: &str) -> bool {
        false
    }
}

/// The terminal of this process, even when its standard input is something else.
#[derive(Debug, Clone, Copy)]
pub struct Terminal;

#[async_trait]
impl Prompt for Terminal {
    fn interactive(&self) -> bool {
        true
    }

    async fn secret(&self, question: &str) -> Option<String> {
        let question = question.to_owned();
        tokio::task::spawn_blocking(move || ask(&question, true)).await.ok()?.ok()
    }

    async fn confirm(&self, question: &str) -> bool {
        let question = format!("{question} (yes/no) ");
        let answer = tokio::task::spawn_blocking(move || ask(&question, false)).await;
        matches!(answer, Ok(Ok(answer)) if answer == "yes")
    }
}

fn ask(question: &str, hidden: bool) -> io::Result<String> {
    let mut terminal = std::fs::File::options().read(true).write(true).open("/dev/tty")?;
    terminal.write_all(question.as_bytes())?;
    let before = tcgetattr(&terminal)?;
    if hidden {
        let mut quiet = before.clone();
        quiet.local_modes -= LocalModes::ECHO;
        tcsetattr(&terminal, OptionalActions::Flush, &quiet)?;
    }
    let mut answer = String::new();
    let read = BufReader::new(&terminal).read_line(&mut answer);
    if hidden {
        tcsetattr(&terminal, OptionalActions::Flush, &before)?;
        terminal.write_all(b"\n")?;
    }
    match read? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(answer.trim_end_matches(['\r', '\n']).to_owned()),
    }
}
