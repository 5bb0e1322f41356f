//! Where the dispatcher is, in a file of the mailbox that nodes read.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use drover_service::process::{self, ProcessId};
use serde::{Deserialize, Serialize};

use super::pool_dir;

/// What stands in the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Whereabouts {
    v: u32,
    /// The dispatcher's host.
    pub host: String,
    /// Its port for nodes, as host:port.
    pub listen: String,
    pid: u32,
    start_time: u64,
}

impl Whereabouts {
    pub(super) fn of(listen: SocketAddr) -> Self {
        let (me, host) = (ProcessId::current(), process::hostname());
        let listen =
            if listen.ip().is_unspecified() { format!("{host}:{}", listen.port()) } else { listen.to_string() };
        Self { v: 1, host, listen, pid: me.pid, start_time: me.start_time }
    }

    fn path(root: &Path) -> PathBuf {
        pool_dir(root).join("dispatcher.json")
    }

    pub(super) fn write(&self, root: &Path) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(pool_dir(root))?;
        let (path, fresh) = (Self::path(root), pool_dir(root).join(format!(".dispatcher.{}", self.pid)));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        fs::rename(fresh, path)
    }

    /// Takes the file away, unless another dispatcher has written it since.
    pub(super) fn remove(&self, root: &Path) -> io::Result<()> {
        if Self::read(root).as_ref() == Some(self) { fs::remove_file(Self::path(root)) } else { Ok(()) }
    }

    /// What the dispatcher of this mailbox said last; none when it said nothing that can be read.
    pub fn read(root: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(Self::path(root)).ok()?).ok()
    }

    /// The address to try from this host: one on loopback leads nowhere from another.
    pub fn reachable(&self) -> Option<&str> {
        let loopback = self.listen.parse::<SocketAddr>().is_ok_and(|addr| addr.ip().is_loopback());
        (!loopback || self.host == process::hostname()).then_some(self.listen.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_wrote_it_takes_it_away_and_loopback_is_of_one_host() {
        let dir = tempfile::tempdir().unwrap();
        let here = Whereabouts::of("127.0.0.1:7955".parse().unwrap());
        assert_eq!(Whereabouts::read(dir.path()), None);
        here.write(dir.path()).unwrap();
        let other = Whereabouts { pid: 1, ..here.clone() };
        other.remove(dir.path()).unwrap();
        assert_eq!(Whereabouts::read(dir.path()).as_ref(), Some(&here));
        assert_eq!(here.reachable(), Some("127.0.0.1:7955"));
        assert_eq!(Whereabouts { host: "elsewhere.example".to_owned(), ..here.clone() }.reachable(), None);
        let open = Whereabouts::of("0.0.0.0:7".parse().unwrap());
        assert!(open.listen.ends_with(":7") && !open.listen.starts_with("0.0.0.0"), "{open:?}");
        here.remove(dir.path()).unwrap();
        assert_eq!(Whereabouts::read(dir.path()), None);
    }
}
