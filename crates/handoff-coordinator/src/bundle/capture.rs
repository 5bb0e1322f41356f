//! From a working directory to pieces.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::manifest::{Entry, Kind, Manifest};
use super::{BundleError, Limits, failed};
use crate::files;
use crate::store::pieces::{PIECE, keep_piece};

/// What one capture did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Captured {
    /// Name of the manifest among the pieces.
    pub manifest: String,
    /// Bytes of all files.
    pub bytes: u64,
    /// Files, directories and links.
    pub entries: usize,
    /// Files that were read, because they were new or changed.
    pub read: usize,
    /// Pieces that were written, because they were not there.
    pub written: usize,
}

/// By what a file is known as unchanged: device, inode, size, and when it and its inode changed.
type Stamp = (u64, u64, u64, (i64, i64), (i64, i64));

/// Captures one working directory again and again, and reads only what has changed.
#[derive(Debug)]
pub struct Capturer {
    dir: PathBuf,
    pieces: PathBuf,
    limits: Limits,
    seen: BTreeMap<String, (Stamp, Vec<String>)>,
    last: Option<String>,
}

struct Walk {
    entries: Vec<Entry>,
    bytes: u64,
    /// Bytes and entries below each entry at the top.
    tops: BTreeMap<String, (u64, u64)>,
}

impl Capturer {
    /// Of a directory, into the pieces of its session.
    pub fn new(dir: impl Into<PathBuf>, pieces: impl Into<PathBuf>, limits: Limits) -> Self {
        Self { dir: dir.into(), pieces: pieces.into(), limits, seen: BTreeMap::new(), last: None }
    }

    /// Captures the directory as it is. The agent must not run meanwhile.
    pub fn capture(&mut self) -> Result<Captured, BundleError> {
        files::make_dir(&self.pieces).map_err(failed("make", &self.pieces))?;
        // All sizes first: what is too large is refused before anything is copied.
        let mut walk = Walk { entries: Vec::new(), bytes: 0, tops: BTreeMap::new() };
        self.walk(&self.dir.clone(), "", &mut walk)?;
        let (mut read, mut written) = (0, 0);
        let mut seen = BTreeMap::new();
        for entry in &mut walk.entries {
            let Kind::File { size, pieces, .. } = &mut entry.kind else { continue };
            let path = self.dir.join(&entry.path);
            let stamp = stamp(&path)?;
            if let Some((before, known)) = self.seen.get(&entry.path).filter(|(before, _)| *before == stamp) {
                pieces.clone_from(known);
                seen.insert(entry.path.clone(), (*before, known.clone()));
                continue;
            }
            let (names, new) = self.keep(&path, *size)?;
            if self::stamp(&path)? != stamp {
                return Err(BundleError::Changing { path });
            }
            read += 1;
            written += new;
            pieces.clone_from(&names);
            seen.insert(entry.path.clone(), (stamp, names));
        }
        self.seen = seen;
        let manifest = Manifest { v: Manifest::VERSION, entries: walk.entries };
        let (entries, bytes) = (manifest.entries.len(), manifest.bytes());
        let text =
            serde_json::to_vec(&manifest).map_err(std::io::Error::from).map_err(failed("write", &self.pieces))?;
        let (names, new) = self.keep_bytes(&text)?;
        written += new;
        // A manifest may be longer than a piece; then its name is that of the list of its pieces.
        let (manifest, new) =
            keep_piece(&self.pieces, names.join("\n").as_bytes()).map_err(failed("write a piece in", &self.pieces))?;
        written += usize::from(new);
        files::sync_dir(&self.pieces).map_err(failed("keep", &self.pieces))?;
        self.last = Some(manifest.clone());
        Ok(Captured { manifest, bytes, entries, read, written })
    }

    fn walk(&self, dir: &Path, below: &str, walk: &mut Walk) -> Result<(), BundleError> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(failed("list", dir))? {
            let name = entry.map_err(failed("list", dir))?.file_name();
            names.push(name.into_string().map_err(|name| BundleError::Name { path: dir.join(name) })?);
        }
        names.sort_unstable();
        for name in names {
            let path = dir.join(&name);
            let relative = if below.is_empty() { name.clone() } else { format!("{below}/{name}") };
            let meta = std::fs::symlink_metadata(&path).map_err(failed("look at", &path))?;
            let mode = meta.mode() & 0o7777;
            let in_git = relative.starts_with(".git/") || relative.contains("/.git/");
            let kind = if meta.is_dir() {
                Kind::Dir { mode }
            } else if meta.is_symlink() {
                let target = std::fs::read_link(&path).map_err(failed("read", &path))?;
                let target =
                    target.into_os_string().into_string().map_err(|_| BundleError::Name { path: path.clone() })?;
                Kind::Link { target }
            } else if meta.is_file() && !(in_git && Path::new(&name).extension().is_some_and(|end| end == "lock")) {
                let changed_ns = meta.mtime() * 1_000_000_000 + meta.mtime_nsec();
                Kind::File { mode, size: meta.len(), changed_ns, pieces: Vec::new() }
            } else {
                continue;
            };
            let size = if let Kind::File { size, .. } = &kind { *size } else { 0 };
            let top = relative.split('/').next().unwrap_or_default().to_owned();
            let below = walk.tops.entry(top).or_default();
            (below.0, below.1) = (below.0 + size, below.1 + 1);
            walk.bytes += size;
            walk.entries.push(Entry { path: relative.clone(), kind });
            self.check(walk)?;
            if meta.is_dir() {
                self.walk(&path, &relative, walk)?;
            }
        }
        Ok(())
    }

    fn check(&self, walk: &Walk) -> Result<(), BundleError> {
        let refuse = |most, of, by: fn(&(u64, u64)) -> u64| {
            let largest =
                walk.tops.iter().max_by_key(|(_, below)| by(below)).map_or(String::new(), |(top, _)| top.clone());
            Err(BundleError::TooLarge { dir: self.dir.clone(), most, of, largest })
        };
        if walk.bytes > self.limits.bytes {
            refuse(self.limits.bytes, "bytes", |below| below.0)
        } else if walk.entries.len() > self.limits.entries {
            refuse(self.limits.entries as u64, "files", |below| below.1)
        } else {
            Ok(())
        }
    }

    fn keep(&self, path: &Path, size: u64) -> Result<(Vec<String>, usize), BundleError> {
        let mut file = files::open(path, false).map_err(failed("open", path))?.take(size + 1);
        let (mut names, mut written, mut total) = (Vec::new(), 0, 0);
        loop {
            let mut piece = Vec::new();
            file.by_ref().take(PIECE as u64).read_to_end(&mut piece).map_err(failed("read", path))?;
            if piece.is_empty() {
                break;
            }
            total += piece.len() as u64;
            let (name, new) = keep_piece(&self.pieces, &piece).map_err(failed("write a piece in", &self.pieces))?;
            names.push(name);
            written += usize::from(new);
        }
        if total == size { Ok((names, written)) } else { Err(BundleError::Changing { path: path.to_owned() }) }
    }

    fn keep_bytes(&self, bytes: &[u8]) -> Result<(Vec<String>, usize), BundleError> {
        let (mut names, mut written) = (Vec::new(), 0);
        for piece in bytes.chunks(PIECE) {
            let (name, new) = keep_piece(&self.pieces, piece).map_err(failed("write a piece in", &self.pieces))?;
            names.push(name);
            written += usize::from(new);
        }
        Ok((names, written))
    }
}

fn stamp(path: &Path) -> Result<Stamp, BundleError> {
    let meta = std::fs::symlink_metadata(path).map_err(failed("look at", path))?;
    let (changed, inode) = ((meta.mtime(), meta.mtime_nsec()), (meta.ctime(), meta.ctime_nsec()));
    Ok((meta.dev(), meta.ino(), meta.len(), changed, inode))
}
