//! From pieces to a working directory.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use super::manifest::{Kind, Manifest};
use super::{BundleError, Limits, failed};
use crate::files;
use crate::store::pieces::read_piece;

/// Reads a manifest back.
fn manifest(pieces: &Path, name: &str, limits: Limits) -> Result<Manifest, BundleError> {
    let list =
        String::from_utf8(read_piece(pieces, name)?).map_err(|_| BundleError::Damaged("its list is no text".into()))?;
    let mut text = Vec::new();
    for piece in list.lines() {
        text.extend(read_piece(pieces, piece)?);
    }
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|error| BundleError::Damaged(error.to_string()))?;
    manifest.check()?;
    if manifest.bytes() > limits.bytes || manifest.entries.len() > limits.entries {
        return Err(BundleError::Damaged(format!(
            "it has {} bytes in {} entries",
            manifest.bytes(),
            manifest.entries.len()
        )));
    }
    Ok(manifest)
}

/// Makes `into` what the manifest says, in place of whatever is there: it is built beside it and then takes its name, so that a crash leaves the old
/// one, none, or the new one, never half of it.
pub fn restore(pieces: &Path, name: &str, into: &Path, limits: Limits) -> Result<Manifest, BundleError> {
    let manifest = manifest(pieces, name, limits)?;
    let parent = into.parent().filter(|parent| !parent.as_os_str().is_empty());
    let parent = parent.ok_or_else(|| BundleError::Damaged("the working directory has no parent".into()))?;
    files::make_dir(parent).map_err(failed("make", parent))?;
    let fresh = files::scratch(parent, "files");
    let built = build(pieces, &manifest, &fresh);
    if built.is_err() {
        let _ = std::fs::remove_dir_all(&fresh);
    }
    built?;
    let old = files::scratch(parent, "old");
    let replaced = match std::fs::rename(into, &old) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        other => {
            other.map_err(failed("move away", into))?;
            true
        }
    };
    std::fs::rename(&fresh, into).map_err(failed("put in place", into))?;
    files::sync_dir(parent).map_err(failed("keep", parent))?;
    if replaced {
        std::fs::remove_dir_all(&old).map_err(failed("remove", &old))?;
    }
    Ok(manifest)
}

/// A directory stands before what is in it, and nothing is ever made through a link: links come last.
fn build(pieces: &Path, manifest: &Manifest, root: &Path) -> Result<(), BundleError> {
    DirBuilder::new().mode(0o700).create(root).map_err(failed("make", root))?;
    for entry in &manifest.entries {
        let path = root.join(&entry.path);
        match &entry.kind {
            Kind::Dir { .. } => DirBuilder::new().mode(0o700).create(&path).map_err(failed("make", &path))?,
            Kind::File { mode, size, changed_ns, pieces: names } => {
                let mut file = OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(&path)
                    .map_err(failed("make", &path))?;
                let mut total = 0;
                for name in names {
                    let piece = read_piece(pieces, name)?;
                    total += piece.len() as u64;
                    file.write_all(&piece).map_err(failed("write", &path))?;
                }
                if total != *size {
                    return Err(BundleError::Damaged(format!(
                        "{} has {total} bytes and should have {size}",
                        entry.path
                    )));
                }
                finish(&file, *mode, *changed_ns).map_err(failed("finish", &path))?;
            }
            Kind::Link { .. } => {}
        }
    }
    for entry in &manifest.entries {
        if let Kind::Link { target } = &entry.kind {
            let path = root.join(&entry.path);
            std::os::unix::fs::symlink(target, &path).map_err(failed("link", &path))?;
        }
    }
    // From the inside out, for a directory may forbid to write in it.
    for entry in manifest.entries.iter().rev() {
        if let Kind::Dir { mode } = entry.kind {
            let path = root.join(&entry.path);
            files::sync_dir(&path).map_err(failed("keep", &path))?;
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).map_err(failed("finish", &path))?;
        }
    }
    files::sync_dir(root).map_err(failed("keep", root))
}

fn finish(file: &File, mode: u32, changed_ns: i64) -> std::io::Result<()> {
    if let Ok(nanos) = u64::try_from(changed_ns) {
        file.set_modified(UNIX_EPOCH + Duration::from_nanos(nanos))?;
    }
    file.set_permissions(Permissions::from_mode(mode))?;
    file.sync_data()
}
