//! How a program gets its arguments as they are, whatever the login shell of the account is.
//!
//! An SSH server hands the one string that it gets to the login shell of the account, and sh, csh and fish disagree about
//! nearly every character in it. So the string that we send is fixed, and holds nothing on which shells disagree: it starts
//! the host's `/bin/sh`, which says a word of ours and then reads one line. That line comes over standard input, is quoted for
//! a POSIX shell, and ends in an `exec` of the program, which inherits the rest of the input.
//!
//! ```text
//! us                                    login shell -> /bin/sh -> program
//! exec /bin/sh -c 'echo W; read c && eval "$c"'  ->
//!                                       <-  (greetings of rc files) W
//! exec 'program' 'argument' \n  rest of stdin  ->
//!                                       <-  stdout of the program
//! ```
//!
//! The word serves twice. What rc files print before it is dropped, and until it has come nothing of ours has run: a
//! connection that dies before it leaves no doubt. Arguments also stay out of reach of the limits that old shells put on a
//! line. Only builtins read byte by byte, so nothing of the program's input is lost.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use bytes::{Bytes, BytesMut};

use crate::Command;

/// Most bytes that rc files may print before the word.
const MOST_GREETING: usize = 256 << 10;

/// A word that nobody else prints.
pub(crate) fn word() -> String {
    format!("drover-ready-{:032x}", rand::random::<u128>())
}

/// What the login shell is given.
pub(crate) fn login_line(word: &str) -> String {
    format!("exec /bin/sh -c 'echo {word}; IFS= read -r c && eval \"$c\"'")
}

/// What `/bin/sh` then reads: one line.
pub(crate) fn argument_line(command: &Command) -> Bytes {
    let mut line = BytesMut::new();
    let words =
        || [&command.program].into_iter().chain(&command.args).chain(command.env.iter().map(|(_, value)| value));
    if words().any(|word| word.as_bytes().contains(&b'\n')) {
        // The substitution drops newlines at its end, hence the letter that is taken off again.
        line.extend_from_slice(b"drover_newline=$(printf '\\n_'); drover_newline=${drover_newline%_}; ");
    }
    for (name, value) in &command.env {
        line.extend_from_slice(b"export ");
        line.extend_from_slice(name.as_bytes());
        line.extend_from_slice(b"=");
        quote(value, &mut line);
        line.extend_from_slice(b"; ");
    }
    line.extend_from_slice(b"exec");
    for word in [&command.program].into_iter().chain(&command.args) {
        line.extend_from_slice(b" ");
        quote(word, &mut line);
    }
    line.extend_from_slice(b"\n");
    line.freeze()
}

fn quote(word: &OsStr, line: &mut BytesMut) {
    line.extend_from_slice(b"'");
    for byte in word.as_bytes() {
        match byte {
            b'\'' => line.extend_from_slice(b"'\\''"),
            b'\n' => line.extend_from_slice(b"'\"$drover_newline\"'"),
            byte => line.extend_from_slice(&[*byte]),
        }
    }
    line.extend_from_slice(b"'");
}

/// Waits for the word on the standard output.
#[derive(Debug)]
pub(crate) struct Greeting {
    line: Vec<u8>,
    heard: BytesMut,
}

impl Greeting {
    pub(crate) fn new(word: &str) -> Self {
        Self { line: format!("{word}\n").into_bytes(), heard: BytesMut::new() }
    }

    /// Takes what came; once the word is there, returns what came after it.
    pub(crate) fn hear(&mut self, bytes: &[u8]) -> Option<Bytes> {
        // The word may have begun in what came before.
        let from = self.heard.len().saturating_sub(self.line.len());
        self.heard.extend_from_slice(bytes);
        let found = self.heard[from..].windows(self.line.len()).position(|window| window == self.line);
        if let Some(at) = found {
            return Some(self.heard.split_off(from + at + self.line.len()).freeze());
        }
        let over = self.heard.len().saturating_sub(MOST_GREETING);
        let _ = self.heard.split_to(over);
        None
    }

    /// What was heard instead of the word.
    pub(crate) fn said(&self) -> String {
        String::from_utf8_lossy(&self.heard).trim().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_login_line_has_nothing_that_shells_read_differently() {
        let line = login_line(&word());
        let (_, inside) = line.split_once('\'').unwrap();
        let inside = inside.strip_suffix('\'').unwrap();
        assert!(!inside.contains(['\'', '\\', '!', '\n', '%', '{']), "{line}");
        assert!(line.len() < 200, "a csh word has an end");
    }

    #[test]
    fn arguments_are_one_line() {
        let command = Command::new("prog").arg("it's").arg("a\nb").env("K", "v w");
        let line = argument_line(&command);
        let text = std::str::from_utf8(&line).unwrap();
        assert_eq!(text.matches('\n').count(), 1);
        assert!(text.ends_with("export K='v w'; exec 'prog' 'it'\\''s' 'a'\"$drover_newline\"'b'\n"), "{text}");
        assert!(!std::str::from_utf8(&argument_line(&Command::new("a"))).unwrap().contains("newline"));
    }

    #[test]
    fn the_word_is_found_in_pieces_and_behind_noise() {
        let word = word();
        let all = format!("Welcome!\r\nquota: ok\n{word}\nanswer\n");
        for step in [1, 2, 7, all.len()] {
            let mut greeting = Greeting::new(&word);
            let mut after = None;
            for piece in all.as_bytes().chunks(step) {
                match &mut after {
                    None => after = greeting.hear(piece).map(|bytes| bytes.to_vec()),
                    Some(bytes) => bytes.extend_from_slice(piece),
                }
            }
            assert_eq!(after.unwrap(), b"answer\n", "in steps of {step}");
        }
        let mut greeting = Greeting::new(&word);
        for _ in 0..100 {
            assert_eq!(greeting.hear(&[b'x'; 10_000]), None);
        }
        assert!(greeting.said().len() <= MOST_GREETING);
        assert_eq!(greeting.hear(format!("{word}\n").as_bytes()).unwrap(), "");
    }
}
