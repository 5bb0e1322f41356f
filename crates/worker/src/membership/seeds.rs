//! How the nodes of an instance find each other first: one small file per node in the shared mailbox.
//!
//! ```text
//! <mailbox>/gossip/voters.json   who may vote first, signed by the login side
//! <mailbox>/gossip/<key>.json    {"v":1,"node_id","addr","swarm_id"}, written by that node's worker, removed at its orderly end
//! ```
//!
//! A file may be old, or of a node that is gone: it is advice on whom to ask, and certificates say who answers.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use drover_service::pki::node_domain;
use serde::{Deserialize, Serialize};

/// Files that a node reads at most at a time.
const MOST: usize = 32;
/// Nobody's file is longer.
const MOST_BYTES: u64 = 4096;
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct Written {
    v: u32,
    node_id: String,
    addr: String,
    swarm_id: String,
}

/// Directory of the files.
pub(super) fn dir(mailbox: &Path) -> PathBuf {
    mailbox.join("gossip")
}

/// Puts what the login side says of who may vote where the daemon looks for it: beside the node's identity. It is signed, so
/// that nobody has to trust the directory that it came through.
pub(super) fn hand_over_charter(mailbox: &Path, identity: &Path) -> io::Result<()> {
    let charter = match fs::read(dir(mailbox).join("voters.json")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let path = identity.join("charter.json");
    if fs::read(&path).is_ok_and(|found| found == charter) { Ok(()) } else { replace(&path, &charter) }
}

/// A node's name in the directory.
pub(super) fn key_of(node_id: &str) -> String {
    let domain = node_domain(node_id);
    domain.split_once('.').map_or(domain.clone(), |(key, _)| key.to_owned())
}

fn file(dir: &Path, node_id: &str) -> PathBuf {
    dir.join(format!("{}.json", key_of(node_id)))
}

/// Says where this node can be reached. Nothing is written when that stands there already.
pub(super) fn write(dir: &Path, node_id: &str, swarm_id: &str, addr: &str) -> io::Result<()> {
    let written =
        Written { v: VERSION, node_id: node_id.to_owned(), addr: addr.to_owned(), swarm_id: swarm_id.to_owned() };
    let (path, bytes) = (file(dir, node_id), serde_json::to_vec(&written)?);
    if fs::read(&path).is_ok_and(|found| found == bytes) {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    replace(&path, &bytes)
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let fresh = path.with_extension(format!("{}.new", std::process::id()));
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&fresh)?;
    file.write_all(bytes)?;
    drop(file);
    fs::rename(&fresh, path)
}

/// Takes a node's file away. Without success it stays advice on whom to ask in vain.
pub(super) fn remove(dir: &Path, node_id: &str) {
    let _ = fs::remove_file(file(dir, node_id));
}

/// Addresses of nodes whose keys are not among the `known`: those of the same swarm first, then the newest.
pub(super) fn read(dir: &Path, swarm_id: &str, known: &BTreeSet<String>) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let unknown = |name: &str| {
        let key = name.strip_suffix(".json")?;
        (key.len() == 16 && key.bytes().all(|byte| byte.is_ascii_hexdigit()) && !known.contains(key)).then_some(())
    };
    let mut found: Vec<(SystemTime, PathBuf)> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            unknown(entry.file_name().to_str()?)?;
            Some((entry.metadata().and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH), entry.path()))
        })
        .collect();
    found.sort_by(|a, b| b.cmp(a));
    let mut seeds: Vec<Written> = found.iter().take(MOST).filter_map(|(_, path)| read_one(path)).collect();
    // A stable sort: among equals the newest stay first.
    seeds.sort_by_key(|seed| seed.swarm_id != swarm_id);
    seeds.into_iter().map(|seed| seed.addr).collect()
}

fn read_one(path: &Path) -> Option<Written> {
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(MOST_BYTES).read_to_end(&mut bytes).ok()?;
    let written: Written = serde_json::from_slice(&bytes).ok()?;
    (written.v == VERSION && written.addr.parse::<std::net::SocketAddr>().is_ok()).then_some(written)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_find_those_that_they_do_not_know_their_own_swarm_first() {
        let root = tempfile::tempdir().unwrap();
        let dir = dir(root.path());
        assert!(read(&dir, "a", &BTreeSet::new()).is_empty(), "nobody was here yet");
        for (id, swarm, addr) in [("a/0", "a", "127.0.0.1:1"), ("a/1", "a", "127.0.0.1:2"), ("b/0", "b", "127.0.0.1:3")]
        {
            write(&dir, id, swarm, addr).unwrap();
        }
        write(&dir, "a/0", "a", "127.0.0.1:9").unwrap();
        fs::write(dir.join("0123456789abcdef.json"), "{\"v\":1,").unwrap();
        fs::write(dir.join("voters.json"), "{}").unwrap();
        let known = BTreeSet::from([key_of("a/1")]);
        assert_eq!(read(&dir, "b", &known), ["127.0.0.1:3", "127.0.0.1:9"]);
        assert_eq!(read(&dir, "a", &known), ["127.0.0.1:9", "127.0.0.1:3"]);
        remove(&dir, "b/0");
        assert_eq!(read(&dir, "b", &known), ["127.0.0.1:9"]);
        for index in 0..2 * MOST {
            write(&dir, &format!("c/{index}"), "c", "127.0.0.1:4").unwrap();
        }
        assert_eq!(read(&dir, "a", &known).len(), MOST);
        assert_eq!(key_of("a/0").len(), 16);
        for text in ["{}", "{\"v\":2}"] {
            fs::write(dir.join("voters.json"), text).unwrap();
            hand_over_charter(root.path(), root.path()).unwrap();
            assert_eq!(fs::read_to_string(root.path().join("charter.json")).unwrap(), text);
        }
    }
}
