//! What `drover site` answers. Later versions may add fields; none is renamed.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// The follower of a login host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FollowerFound {
    /// Where it listens, on loopback of its host.
    pub listen: SocketAddr,
    /// Its host.
    pub host: String,
    /// Its process there.
    pub pid: u32,
    /// Its version.
    pub version: String,
    /// It did not run before.
    pub started: bool,
    /// It took the place of one of an earlier version.
    pub replaced: bool,
}

/// What a host of a cluster is like, seen from there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteReport {
    /// The host.
    pub host: String,
    /// Version of the program that looked.
    pub version: String,
    /// Its clock, in microseconds of Unix time.
    pub now_us: u64,
    /// Kind of the network file system that holds the directory; none when it is a local disk.
    pub file_system: Option<String>,
    /// Whether the file that was asked for is there.
    pub sees: Option<bool>,
    /// How long a record takes to be durable there; none when it could not be written.
    pub write_us: Option<u64>,
    /// Why it could not be written.
    #[serde(default)]
    pub write_error: String,
    /// The codex that a worker there would run; none when there is none that can be used, or when nobody asked.
    pub codex: Option<String>,
    /// There is one, whether or not it can be used.
    #[serde(default)]
    pub codex_found: bool,
    /// Why there is none.
    #[serde(default)]
    pub codex_error: String,
    /// What to do about it.
    #[serde(default)]
    pub codex_hint: String,
}

/// Codex in the shared file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodexInstalled {
    /// The program.
    pub path: String,
    /// Its version.
    pub version: String,
    /// It was not there before.
    pub installed: bool,
}
