//! The port: what the rest of drover may ask of a login host.

use std::net::SocketAddr;
use std::time::SystemTime;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::{Command, Output, Pipe, SshError, Upload, Uploaded, content};

/// A host on which commands run, files are placed and tunnels end.
#[async_trait]
pub trait Remote: Send + Sync {
    /// Runs a command to its end and returns what it said. A status other than zero is no error.
    async fn run(&self, command: Command) -> Result<Output, SshError>;

    /// Starts a command that lives long and returns its standard input and output. The deadline is for the start only.
    async fn open(&self, command: Command) -> Result<Pipe, SshError>;

    /// Places a file: checked by its SHA-256, put into place whole or not at all, not sent when it is there already.
    async fn upload(&self, upload: Upload) -> Result<Uploaded, SshError> {
        content::place(self, upload).await
    }

    /// Connects to an address as it is seen from the host.
    async fn tunnel(&self, to: SocketAddr) -> Result<Pipe, SshError>;

    /// Whether the host can be reached, now and from now on.
    fn state(&self) -> watch::Receiver<State>;
}

/// How it stands with the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Commands go through.
    Up {
        /// When the connection was made.
        since: SystemTime,
    },
    /// There is no connection; it is being made or tried again.
    Connecting {
        /// How many times it has failed since it was last up.
        attempt: u32,
        /// Why it failed the last time.
        why: Option<String>,
    },
    /// The host or its key was refused, or it refused us: trying again changes nothing until a person has acted.
    Refused {
        /// What happened.
        why: String,
        /// What to do about it.
        hint: String,
    },
}
