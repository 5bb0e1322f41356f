//! Keys of providers: where they come from, and how they are kept out of everything that people see.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use http::HeaderValue;
use thiserror::Error;

/// Longest key that is read from a file; more is a wrong file.
const MAX_KEY_BYTES: u64 = 8 << 10;
/// What stands in place of a key.
const MASK: &str = "***";

/// A key. It shows itself as `***`, and hides itself in texts of others.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Takes over a key; blanks around it are none of it. `None` when nothing is left.
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        (!text.is_empty()).then(|| Self(text.to_owned()))
    }

    /// The key itself, for a header and nothing else.
    pub(crate) fn header(&self, scheme: &str) -> Option<HeaderValue> {
        let mut value = HeaderValue::from_str(&format!("{scheme}{}", self.0)).ok()?;
        value.set_sensitive(true);
        Some(value)
    }

    /// Whether this text is the key, in a time that does not tell how much of it is right.
    pub(crate) fn is(&self, text: &str) -> bool {
        let digest = |text: &str| ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
        digest(&self.0).as_ref() == digest(text).as_ref()
    }

    /// The text with the key masked wherever it is in there: providers like to repeat what they were sent.
    pub fn scrub(&self, text: &str) -> String {
        if text.contains(&self.0) { text.replace(&self.0, MASK) } else { text.to_owned() }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASK)
    }
}

/// Where a key comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// None is needed.
    None,
    /// An environment variable, or else a file, when there is one.
    Env {
        /// Name of the variable.
        variable: String,
        /// Looked at when the variable is not set.
        file: Option<PathBuf>,
    },
    /// A file.
    File(PathBuf),
    /// Given by the program itself, in tests.
    Given(Secret),
}

/// Why there is no key.
#[derive(Debug, Error)]
pub enum KeyError {
    /// Neither the variable nor the file is there.
    #[error("no key: set the environment variable {variable}{}", or_file(.file.as_deref()))]
    Missing {
        /// The variable.
        variable: String,
        /// The file.
        file: Option<PathBuf>,
    },
    /// The file cannot be read.
    #[error("cannot read the key file {}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Others could read the file.
    #[error("the key file {} can be read by others (mode {mode:03o}): chmod 600 it, and take a new key if others may have seen it", .path.display())]
    TooOpen {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// The file is someone else's.
    #[error("the key file {} belongs to another user", .path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// There is no key in the file, or more than a key.
    #[error("the key file {} must hold one key and nothing else", .path.display())]
    Unlikely {
        /// The file.
        path: PathBuf,
    },
    /// The key cannot be sent.
    #[error("the key from {from} has characters that no key has")]
    Unsendable {
        /// Where it came from.
        from: String,
    },
}

fn or_file(file: Option<&Path>) -> String {
    file.map(|path| format!(", or put the key into {} with mode 0600", path.display())).unwrap_or_default()
}

impl KeySource {
    /// Reads the key. `variables` is the environment, passed in so that it can be another.
    pub fn load(&self, variables: impl Fn(&str) -> Option<String>) -> Result<Option<Secret>, KeyError> {
        let found = match self {
            Self::None => return Ok(None),
            Self::Given(secret) => return Ok(Some(secret.clone())),
            Self::File(path) => (read_key_file(path)?, path.display().to_string()),
            Self::Env { variable, file } => match variables(variable).as_deref().and_then(Secret::new) {
                Some(secret) => (secret, format!("the environment variable {variable}")),
                None => match file.as_deref().filter(|path| path.exists()) {
                    Some(path) => (read_key_file(path)?, path.display().to_string()),
                    None => return Err(KeyError::Missing { variable: variable.clone(), file: file.clone() }),
                },
            },
        };
        let (secret, from) = found;
        if secret.header("").is_none() {
            return Err(KeyError::Unsendable { from });
        }
        Ok(Some(secret))
    }
}

/// Reads a secret from a file that only its owner, who is this user, can read. A name without a directory is that of a
/// credential which the supervisor hands over, where it does.
pub fn read_key_file(path: &Path) -> Result<Secret, KeyError> {
    let handed_over = std::env::var_os(CREDENTIALS).map(PathBuf::from).filter(|dir| dir.is_absolute());
    read_key(path, handed_over.as_deref())
}

/// Where systemd puts what `LoadCredential=` names.
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";

fn read_key(path: &Path, handed_over: Option<&Path>) -> Result<Secret, KeyError> {
    let credential = handed_over.filter(|_| path.components().count() == 1).map(|dir| dir.join(path));
    let (path, is_credential) = (credential.as_deref().unwrap_or(path), credential.is_some());
    let unreadable = |source| KeyError::Unreadable { path: path.to_owned(), source };
    let file = File::open(path).map_err(unreadable)?;
    // Of the open file, not of the path: that may be another one by now.
    let metadata = file.metadata().map_err(unreadable)?;
    // A credential is root's, and we alone may read it by an access list, whose mask stands where the group's rights do.
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o777);
    if owner != rustix::process::geteuid().as_raw() && !(is_credential && owner == 0) {
        return Err(KeyError::Foreign { path: path.to_owned() });
    }
    if mode & (if is_credential { 0o007 } else { 0o077 }) != 0 {
        return Err(KeyError::TooOpen { path: path.to_owned(), mode });
    }
    let mut text = String::new();
    file.take(MAX_KEY_BYTES + 1).read_to_string(&mut text).map_err(unreadable)?;
    let likely = text.len() as u64 <= MAX_KEY_BYTES && !text.trim().contains(char::is_whitespace);
    Secret::new(&text).filter(|_| likely).ok_or_else(|| KeyError::Unlikely { path: path.to_owned() })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_key_comes_from_the_variable_or_from_a_file_that_is_only_ours() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gemini-key.txt");
        std::fs::write(&path, "  from-file\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let source = KeySource::Env { variable: "A_KEY".into(), file: Some(path.clone()) };

        assert!(source.load(|_| Some("from-env".into())).unwrap().unwrap().is("from-env"));
        assert!(source.load(|_| None).unwrap().unwrap().is("from-file"));
        // An empty variable is an unset one.
        assert!(source.load(|_| Some(" ".into())).unwrap().unwrap().is("from-file"));

        for mode in [0o640, 0o604, 0o666] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let error = source.load(|_| None).unwrap_err().to_string();
            assert!(error.contains("chmod 600") && error.contains(&format!("{mode:o}")), "{error}");
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        for content in ["", "\n", "two words", &"x".repeat(9000)] {
            std::fs::write(&path, content).unwrap();
            assert!(matches!(source.load(|_| None), Err(KeyError::Unlikely { .. })), "{content:?}");
        }
        std::fs::remove_file(&path).unwrap();
        let error = source.load(|_| None).unwrap_err().to_string();
        assert!(error.contains("A_KEY") && error.contains("gemini-key.txt"), "{error}");
        let bad = source.load(|_| Some("tab\u{1}inside".into())).unwrap_err().to_string();
        assert!(!bad.contains("tab"), "{bad}");
    }

    #[test]
    fn a_name_without_a_directory_is_a_credential_where_there_are_some() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys_openai");
        std::fs::write(&path, "handed-over\n").unwrap();
        let mode = |mode| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        mode(0o440);
        let read = |name: &str| read_key(Path::new(name), Some(dir.path()));
        assert!(read("keys_openai").unwrap().is("handed-over"));
        // By its whole name it is a file as any other, and others may read it.
        assert!(matches!(read_key(&path, Some(dir.path())), Err(KeyError::TooOpen { .. })));
        assert!(matches!(read_key(Path::new("keys_openai"), None), Err(KeyError::Unreadable { .. })));
        assert!(matches!(read("../keys_openai"), Err(KeyError::Unreadable { .. })));
        mode(0o444);
        assert!(matches!(read("keys_openai"), Err(KeyError::TooOpen { .. })));
    }

    #[test]
    fn a_key_does_not_show_itself() {
        let secret = Secret::new("sk-very-secret").unwrap();
        let source = KeySource::Given(secret.clone());
        let header = secret.header("Bearer ").unwrap();
        for shown in [format!("{secret:?}"), format!("{source:?}"), format!("{header:?}")] {
            assert!(!shown.contains("very"), "{shown}");
        }
        assert_eq!(secret.scrub("bad key sk-very-secret, again: sk-very-secret"), "bad key ***, again: ***");
        assert!(secret.is("sk-very-secret") && !secret.is("sk-very-secre"));
    }
}
