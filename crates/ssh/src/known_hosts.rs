//! Which key a host may show.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use ring::hmac;
use russh::keys::PublicKey;
use russh::keys::ssh_encoding::base64::{Base64, Encoding as _};
use russh::keys::ssh_key::public::KeyData;

use crate::config::list_matches;

/// What the known hosts say about a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is the host's.
    Known,
    /// Nothing is known about the host, or only keys of other kinds.
    Unknown,
    /// Another key of this kind is known for the host.
    Changed {
        /// The file that says so.
        file: PathBuf,
        /// And its line.
        line: usize,
    },
    /// The key was revoked.
    Revoked {
        /// The file that says so.
        file: PathBuf,
        /// And its line.
        line: usize,
    },
}

/// The lines about one host.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    entries: Vec<Entry>,
}

#[derive(Debug, Clone)]
struct Entry {
    marker: Marker,
    key: PublicKey,
    file: PathBuf,
    line: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Marker {
    None,
    Revoked,
    Authority,
}

/// How a host is named in the files: with its port unless that is 22.
pub(crate) fn name(host: &str, port: u16) -> String {
    let host = host.to_lowercase();
    if port == 22 { host } else { format!("[{host}]:{port}") }
}

impl Known {
    /// Reads what the files say about a host. A file that is not there says nothing; one that cannot be read is an error,
    /// for it may hold a revocation.
    pub(crate) fn read(files: &[PathBuf], name: &str) -> io::Result<Self> {
        let mut known = Self::default();
        for file in files {
            match std::fs::read(file) {
                Ok(bytes) => known.add(file, &String::from_utf8_lossy(&bytes), name),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(io::Error::new(error.kind(), format!("{} cannot be read: {error}", file.display())));
                }
            }
        }
        Ok(known)
    }

    fn add(&mut self, file: &Path, text: &str, name: &str) {
        for (at, line) in text.lines().enumerate() {
            let mut fields = line.split_ascii_whitespace().peekable();
            let marker = match fields.next_if(|field| field.starts_with('@')) {
                None => Marker::None,
                Some("@revoked") => Marker::Revoked,
                Some("@cert-authority") => Marker::Authority,
                Some(_) => continue,
            };
            let Some(hosts) = fields.next().filter(|hosts| !hosts.starts_with('#')) else { continue };
            let (Some(kind), Some(base64)) = (fields.next(), fields.next()) else { continue };
            if !about(hosts, name) {
                continue;
            }
            // A key of a kind that we do not know cannot be shown to us either.
            let Ok(key) = PublicKey::from_openssh(&format!("{kind} {base64}")) else { continue };
            self.entries.push(Entry { marker, key, file: file.to_owned(), line: at + 1 });
        }
    }

    /// Judges the key that a host showed.
    pub(crate) fn judge(&self, key: &PublicKey) -> Verdict {
        let with = |marker| self.entries.iter().filter(move |entry| entry.marker == marker);
        if let Some(entry) = with(Marker::Revoked).find(|entry| entry.key.key_data() == key.key_data()) {
            return Verdict::Revoked { file: entry.file.clone(), line: entry.line };
        }
        if with(Marker::None).any(|entry| entry.key.key_data() == key.key_data()) {
            return Verdict::Known;
        }
        match with(Marker::None).find(|entry| entry.key.algorithm() == key.algorithm()) {
            Some(entry) => Verdict::Changed { file: entry.file.clone(), line: entry.line },
            None => Verdict::Unknown,
        }
    }

    /// The keys whose certificates are good for the host.
    pub(crate) fn authorities(&self) -> Vec<&KeyData> {
        let revoked = |key: &PublicKey| {
            self.entries.iter().any(|e| e.marker == Marker::Revoked && e.key.key_data() == key.key_data())
        };
        self.entries
            .iter()
            .filter(|entry| entry.marker == Marker::Authority && !revoked(&entry.key))
            .map(|entry| entry.key.key_data())
            .collect()
    }

    /// The keys that are known for the host, so that it can be asked for one of their kind.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &PublicKey> {
        self.entries.iter().filter(|entry| entry.marker == Marker::None).map(|entry| &entry.key)
    }
}

/// Whether the host field of a line is about a host.
fn about(hosts: &str, name: &str) -> bool {
    match hosts.strip_prefix("|1|") {
        Some(hashed) => hashed_matches(hashed, name),
        None => list_matches(hosts.split(','), name),
    }
}

/// Hashed names are an HMAC of the name under a salt.
fn hashed_matches(hashed: &str, name: &str) -> bool {
    let Some((salt, hash)) = hashed.split_once('|') else { return false };
    let (Ok(salt), Ok(hash)) = (Base64::decode_vec(salt), Base64::decode_vec(hash)) else { return false };
    let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, &salt);
    hmac::verify(&key, name.as_bytes(), &hash).is_ok()
}

/// Remembers the key of a host, after a person has said that it is right.
pub(crate) fn remember(file: &Path, name: &str, key: &PublicKey) -> io::Result<()> {
    if let Some(dir) = file.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    let before = match std::fs::read(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        before => before.unwrap_or_default(),
    };
    let mut line = String::new();
    if before.last().is_some_and(|byte| *byte != b'\n') {
        line.push('\n');
    }
    let bare = PublicKey::new(key.key_data().clone(), "");
    let text = bare.to_openssh().map_err(io::Error::other)?;
    let _ = writeln!(line, "{name} {}", text.trim());
    std::fs::File::options().append(true).create(true).mode(0o600).open(file)?.write_all(line.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ";
    const TWO: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIA6rWI3G1sz07DnfFlrouTcysQlj2P+jpNSOEWD9OJ3X";

    fn verdict(text: &str, host: &str, port: u16) -> Verdict {
        let mut known = Known::default();
        known.add(Path::new("f"), &text.replace("ONE", ONE).replace("TWO", TWO), &name(host, port));
        known.judge(&PublicKey::from_openssh(ONE).unwrap())
    }

    fn changed(line: usize) -> Verdict {
        Verdict::Changed { file: "f".into(), line }
    }

    #[test]
    fn lines() {
        let revoked = |line| Verdict::Revoked { file: "f".into(), line };
        for (text, host, port, expected) in [
            ("", "h", 22, Verdict::Unknown),
            ("h ONE", "h", 22, Verdict::Known),
            ("H,x ONE a comment", "h", 22, Verdict::Known),
            ("h ONE", "H", 22, Verdict::Known),
            ("  h\tONE", "h", 22, Verdict::Known),
            ("# h ONE\n#h ONE", "h", 22, Verdict::Unknown),
            ("h ONE", "h", 2222, Verdict::Unknown),
            ("[h]:2222 ONE", "h", 2222, Verdict::Known),
            ("[h]:2222 ONE", "h", 22, Verdict::Unknown),
            ("*.org,!bad.org ONE", "a.org", 22, Verdict::Known),
            ("*.org,!bad.org ONE", "bad.org", 22, Verdict::Unknown),
            ("\nh TWO", "h", 22, changed(2)),
            ("h TWO\nh ONE", "h", 22, Verdict::Known),
            ("h ONE\n@revoked * ONE", "h", 22, revoked(2)),
            ("h ONE\n@revoked * TWO", "h", 22, Verdict::Known),
            ("@cert-authority h ONE", "h", 22, Verdict::Unknown),
            ("@strange h ONE", "h", 22, Verdict::Unknown),
            ("h ssh-dss AAAA\nh broken\nh ssh-ed25519 ????", "h", 22, Verdict::Unknown),
            (
                "h ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBGk=",
                "h",
                22,
                Verdict::Unknown,
            ),
        ] {
            assert_eq!(verdict(text, host, port), expected, "{text:?} for {host}:{port}");
        }
    }

    #[test]
    fn hashed_names() {
        let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, b"01234567890123456789");
        let hashed = |name: &str| {
            let hash = hmac::sign(&key, name.as_bytes());
            format!("|1|{}|{}", Base64::encode_string(b"01234567890123456789"), Base64::encode_string(hash.as_ref()))
        };
        assert_eq!(verdict(&format!("{} ONE", hashed("h")), "h", 22), Verdict::Known);
        assert_eq!(verdict(&format!("{} TWO", hashed("[h]:77")), "h", 77), changed(1));
        assert_eq!(verdict(&format!("{} ONE", hashed("other")), "h", 22), Verdict::Unknown);
        assert_eq!(verdict("|1|?|? ONE\n|1|x ONE", "h", 22), Verdict::Unknown);
    }

    #[test]
    fn what_is_remembered_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("new/known_hosts");
        let key = PublicKey::from_openssh(ONE).unwrap();
        remember(&file, &name("h", 7), &key).unwrap();
        std::fs::write(&file, std::fs::read_to_string(&file).unwrap().trim_end()).unwrap();
        remember(&file, &name("g", 22), &key).unwrap();
        for (host, port) in [("h", 7), ("g", 22)] {
            let known = Known::read(std::slice::from_ref(&file), &name(host, port)).unwrap();
            assert_eq!(known.judge(&key), Verdict::Known);
        }
        assert!(Known::read(&[dir.path().to_owned()], "h").is_err(), "a directory cannot be read");
    }
}
