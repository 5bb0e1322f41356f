//! Content under the name of its digest: what is there already is not written again, and what is damaged is found.

use std::fmt::Write as _;
use std::io;
use std::path::Path;

use ring::digest::{SHA256, digest};

use super::{StoreError, failed};
use crate::files;

/// Most bytes of a piece.
pub(crate) const PIECE: usize = 1 << 20;

/// The name of content.
pub(crate) fn name_of(content: &[u8]) -> String {
    digest(&SHA256, content).as_ref().iter().fold(String::with_capacity(64), |mut name, byte| {
        let _ = write!(name, "{byte:02x}");
        name
    })
}

/// Keeps a piece under its name, unless it is there. Says whether it was written. The disk keeps its name once its directory is synced.
pub(crate) fn keep_piece(dir: &Path, content: &[u8]) -> io::Result<(String, bool)> {
    let name = name_of(content);
    let path = dir.join(&name);
    // A crash leaves no half piece under its name, so a file of this length is the piece; what a disk spoils, reading finds.
    if std::fs::metadata(&path).is_ok_and(|meta| meta.is_file() && meta.len() == content.len() as u64) {
        return Ok((name, false));
    }
    let fresh = files::scratch(dir, "new");
    let written = files::write_new(&fresh, content).and_then(|()| std::fs::rename(&fresh, &path));
    if written.is_err() {
        let _ = files::remove(&fresh);
    }
    written?;
    Ok((name, true))
}

/// Reads a piece and checks that it is what its name says.
pub(crate) fn read_piece(dir: &Path, name: &str) -> Result<Vec<u8>, StoreError> {
    let path = dir.join(name);
    let mismatch = |why: &str| StoreError::Mismatch { path: path.clone(), why: why.to_owned() };
    if name.len() != 64 || !name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(mismatch("its name is none of a piece"));
    }
    let content = files::read_small(&path, PIECE as u64).map_err(failed("read", &path))?;
    let content = content.ok_or_else(|| mismatch("it is not there"))?;
    if name_of(&content) == name { Ok(content) } else { Err(mismatch("its content is not what its name says")) }
}
