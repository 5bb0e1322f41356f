//! The secret that callers of the router have to know, where its owner wants one beside the check of the user: a port that
//! was forwarded by SSH is used in the name of whoever forwards it.

use std::fmt;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use thiserror::Error;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};

/// A shorter one could be guessed.
const LEAST: usize = 16;
/// A longer one is a wrong file.
const MOST: usize = 1024;

/// A token that cannot be used.
#[derive(Debug, Error)]
pub enum TokenError {
    /// The file is not there, or may not be read.
    #[error("cannot read security.token_file {path}: make it with `openssl rand -hex 32`, mode 600")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Others may read it.
    #[error("security.token_file {path} can be read by others than its owner: chmod 600 it")]
    Open {
        /// The file.
        path: PathBuf,
    },
    /// It is no token.
    #[error(
        "security.token_file {path} must hold one line of {LEAST} to {MOST} letters, digits or signs without blanks: make it with `openssl rand -hex 32`"
    )]
    Unusable {
        /// The file.
        path: PathBuf,
    },
}

/// The secret, or none where none is wanted. It shows itself as `***`.
#[derive(Clone, Default)]
pub struct Token(Option<MetadataValue<Ascii>>);

impl Token {
    /// The token of a file that only its owner may read; without a file there is none.
    pub fn load(path: Option<&Path>) -> Result<Self, TokenError> {
        let Some(path) = path else { return Ok(Self::default()) };
        let path = path.to_owned();
        let mut text = String::new();
        let read = fs::File::open(&path).and_then(|file| {
            let mode = file.metadata()?.mode();
            file.take(MOST as u64 + 2).read_to_string(&mut text)?;
            Ok(mode)
        });
        let mode = match read {
            Ok(mode) => mode,
            Err(source) => return Err(TokenError::Io { path, source }),
        };
        if mode & 0o077 != 0 {
            return Err(TokenError::Open { path });
        }
        let token = text.trim();
        let usable = (LEAST..=MOST).contains(&token.len()) && token.bytes().all(|byte| byte.is_ascii_graphic());
        match MetadataValue::try_from(format!("Bearer {token}")) {
            Ok(mut value) if usable => {
                value.set_sensitive(true);
                Ok(Self(Some(value)))
            }
            _ => Err(TokenError::Unusable { path }),
        }
    }

    /// Whether one is wanted.
    pub fn is_wanted(&self) -> bool {
        self.0.is_some()
    }

    /// Whether this text is the token; any is when none is wanted.
    pub fn is(&self, shown: Option<&str>) -> bool {
        self.matches(shown.map(|shown| format!("Bearer {shown}")).as_deref())
    }

    /// Whether a call shows it, in its `authorization`.
    pub fn is_shown(&self, metadata: &MetadataMap) -> bool {
        self.matches(metadata.get("authorization").and_then(|value| value.to_str().ok()))
    }

    /// In a time that does not tell how much of it is right.
    fn matches(&self, shown: Option<&str>) -> bool {
        let Some(wanted) = &self.0 else { return true };
        let digest = |text: &[u8]| ring::digest::digest(&ring::digest::SHA256, text);
        shown.is_some_and(|shown| digest(shown.as_bytes()).as_ref() == digest(wanted.as_bytes()).as_ref())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_wanted() { "***" } else { "none" })
    }
}

/// Shows the token with every call.
impl Interceptor for Token {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.clone());
        }
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_token_is_of_a_file_that_only_its_owner_reads() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let load = |text: &str, mode: u32| {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            Token::load(Some(&path))
        };
        let secret = "0123456789abcdef-of-the-test";
        let token = load(&format!("{secret}\n"), 0o600).unwrap();
        assert!(token.is_wanted() && token.is(Some(secret)));
        for wrong in [None, Some(""), Some("0123456789abcdef-of-the-tesT"), Some("Bearer 0123456789abcdef-of-the-test")]
        {
            assert!(!token.is(wrong), "{wrong:?}");
        }
        assert!(!format!("{token:?}").contains("0123"), "{token:?}");
        let mut shown = token.clone().call(Request::new(())).unwrap();
        assert!(token.is_shown(shown.metadata()) && !token.is_shown(&MetadataMap::new()));
        assert!(!format!("{:?}", shown.metadata_mut()).contains("0123"), "a sensitive header shows itself");

        assert!(matches!(load(secret, 0o640), Err(TokenError::Open { .. })));
        for unusable in ["", "short", "two words, and long enough", "zeichen-\u{fc}ber-16-lang", &"x".repeat(MOST + 1)]
        {
            let error = load(unusable, 0o600).unwrap_err();
            assert!(matches!(error, TokenError::Unusable { .. }), "{unusable}: {error}");
            assert!(unusable.is_empty() || !error.to_string().contains(unusable));
        }
        assert!(matches!(Token::load(Some(&dir.path().join("none"))), Err(TokenError::Io { .. })));
        let none = Token::load(None).unwrap();
        assert!(!none.is_wanted() && none.is(None) && none.is(Some("x")) && none.is_shown(&MetadataMap::new()));
    }
}
