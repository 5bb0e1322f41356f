//! Files that are placed on a host: checked by their SHA-256, whole or not at all.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use ring::digest;

use crate::{Command, Remote, SshError};

/// Prints `same` when the file is there with this content.
const LOOK: &str = concat!(
    r#"dest=$1 sum=$2 mode=$3
"#,
    include_str!("digest.sh"),
    r#"
if [ -f "$dest" ] && digest "$dest" && [ "$found" = "$sum" ] && chmod "$mode" "$dest"; then echo same; fi
"#
);

/// Reads the file from its input beside its place, checks it and moves it there. Whatever ends it early takes the part away.
const PLACE: &str = concat!(
    r#"dest=$1 sum=$2 mode=$3 size=$4 part=$5
umask 077
fail() { echo "$1" >&2; exit 1; }
"#,
    include_str!("digest.sh"),
    r#"
[ ! -d "$dest" ] || fail "there is a directory of that name"
mkdir -p -- "${dest%/*}/" || exit 1
trap 'rm -f -- "$part"' EXIT
trap 'exit 1' HUP INT TERM PIPE
cat > "$part" || exit 1
have=$(($(wc -c < "$part")))
[ "$have" = "$size" ] || fail "only $have of $size bytes arrived"
digest "$part" || fail "the host has none of sha256sum, shasum and openssl to check it with"
[ "$found" = "$sum" ] || fail "its checksum there is $found instead of $sum"
chmod "$mode" "$part" || exit 1
sync "$part" 2>/dev/null
mv -f -- "$part" "$dest" || exit 1
"#
);

/// An absolute path of a file on a host.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RemotePath(String);

impl RemotePath {
    /// The path, when it is absolute, names a file and has no NUL.
    pub fn new(path: impl Into<String>) -> Result<Self, SshError> {
        let path = path.into();
        let why = if !path.starts_with('/') {
            "it is not absolute"
        } else if path.ends_with('/') || path.ends_with("/.") || path.ends_with("/..") {
            "it names a directory"
        } else if path.contains('\0') {
            "it has a NUL byte"
        } else {
            return Ok(Self(path));
        };
        Err(SshError::Upload { path: path.escape_debug().to_string(), why: why.to_owned() })
    }

    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for RemotePath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where the content comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// Memory.
    Bytes(Bytes),
    /// A file of this host, read once.
    File(PathBuf),
}

/// A file to place.
#[derive(Debug, Clone)]
pub struct Upload {
    pub(crate) source: Source,
    pub(crate) to: RemotePath,
    pub(crate) mode: u32,
    pub(crate) deadline: Duration,
}

impl Upload {
    /// A file that only its owner may read, with a deadline of two minutes.
    pub fn new(source: Source, to: RemotePath) -> Self {
        Self { source, to, mode: 0o600, deadline: Duration::from_mins(2) }
    }

    /// The permissions of the file.
    #[must_use]
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode & 0o7777;
        self
    }

    /// How long everything together may take.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }
}

/// What became of an upload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uploaded {
    /// SHA-256 of the content, in hexadecimal digits.
    pub sha256: String,
    /// Whether it had to be sent; not when it was there.
    pub sent: bool,
}

pub(crate) async fn place<R: Remote + ?Sized>(remote: &R, upload: Upload) -> Result<Uploaded, SshError> {
    let started = tokio::time::Instant::now();
    let fail = |why: String| SshError::Upload { path: upload.to.to_string(), why };
    let (content, sha256) = load(upload.source.clone()).await.map_err(fail)?;
    let shell = |script: &str| {
        let args = ["-c", script, "drover-upload", upload.to.as_str(), &sha256].map(str::to_owned);
        Command::new("/bin/sh")
            .args(args)
            .arg(format!("{:o}", upload.mode))
            .deadline(upload.deadline.saturating_sub(started.elapsed()))
            .max_output(64 << 10)
    };
    let look = remote.run(shell(LOOK)).await?;
    if look.stdout.as_ref() == b"same\n" {
        return Ok(Uploaded { sha256, sent: false });
    }
    let part = format!("{}.{:016x}.part", upload.to, rand::random::<u64>());
    let place = shell(PLACE).arg(content.len().to_string()).arg(part).stdin(content);
    let output = remote.run(place).await?;
    if output.success() {
        return Ok(Uploaded { sha256, sent: true });
    }
    let mut why = output.complaint();
    if why.is_empty() {
        why = output.exit.to_string();
    }
    let full = ["No space left", "quota exceeded", "File too large"].iter().any(|sign| why.contains(sign));
    if full {
        why.push_str("; free space there or choose a directory on another file system");
    }
    Err(fail(why))
}

async fn load(source: Source) -> Result<(Bytes, String), String> {
    let work = move || {
        let content = match source {
            Source::Bytes(bytes) => bytes,
            Source::File(path) => {
                std::fs::read(&path).map_err(|error| format!("{} cannot be read: {error}", path.display()))?.into()
            }
        };
        let mut sha256 = String::new();
        for byte in digest::digest(&digest::SHA256, &content).as_ref() {
            let _ = write!(sha256, "{byte:02x}");
        }
        Ok((content, sha256))
    };
    tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        for bad in ["", "a", "./a", "~/a", "/", "/a/", "/a/..", "/a\0"] {
            assert!(RemotePath::new(bad).is_err(), "{bad:?}");
        }
        assert_eq!(RemotePath::new("/a b/'c").unwrap().as_str(), "/a b/'c");
    }
}
