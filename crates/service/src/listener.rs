//! Listening sockets that let only allowed users in.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use tokio::net::{TcpListener, TcpStream};

use crate::caller::Caller;
use crate::context::Context;
use crate::peer;
use crate::process;
use crate::tls::Gate;

/// Connections that may wait to be accepted. The system lowers it to what it allows itself.
const BACKLOG: i32 = 4096;

/// A bound socket. Connections of users that are not allowed are closed before anybody reads from them.
pub struct Listener {
    inner: TcpListener,
    gate: Gate,
}

impl Context {
    /// Binds a socket. An address from the command line or the configuration must be free; a default that is taken is
    /// replaced by a free port, which the address book then tells.
    pub fn bind(
        &self,
        what: &'static str,
        explicit: Option<SocketAddr>,
        default: SocketAddr,
    ) -> anyhow::Result<Listener> {
        let wanted = explicit.unwrap_or(default);
        if !wanted.ip().is_loopback() && self.identity().is_none() {
            bail!(
                "{what} cannot listen on {wanted}: it is not a loopback address, and without an identity it cannot tell nodes \
                 from strangers; give it one (--identity, DROVER_IDENTITY), or listen on 127.0.0.1"
            );
        }
        let inner = match (std::net::TcpListener::bind(wanted), explicit) {
            (Ok(socket), _) => socket,
            (Err(error), None) if error.kind() == io::ErrorKind::AddrInUse => {
                std::net::TcpListener::bind(SocketAddr::new(wanted.ip(), 0)).context("failed to bind a free port")?
            }
            (Err(error), _) if error.kind() == io::ErrorKind::AddrInUse => {
                let holder = who_listens(wanted).unwrap_or_else(|| "another program".to_owned());
                bail!("{what} cannot listen on {wanted}: {holder} already does; stop it or choose another address");
            }
            (Err(error), _) => return Err(error).with_context(|| format!("{what} failed to listen on {wanted}")),
        };
        inner.set_nonblocking(true)?;
        // Room for a burst: whoever finds none waits a second for the next try.
        rustix::net::listen(&inner, BACKLOG)?;
        let addr = inner.local_addr()?;
        Ok(Listener {
            inner: TcpListener::from_std(inner)?,
            gate: Gate {
                listen: addr,
                allowed: self.allowed_uids(),
                guests: Arc::default(),
                observers: self.observer_uids(),
                refused: self.refused_connections(),
                nodes: self.nodes().clone(),
            },
        })
    }
}

impl Listener {
    /// The address it is bound to.
    pub fn local_addr(&self) -> SocketAddr {
        self.gate.listen
    }

    /// Also lets these users in, whom the daemon itself asks what they may do.
    #[must_use]
    pub fn with_guests(mut self, uids: BTreeSet<u32>) -> Self {
        self.gate.guests = Arc::new(uids);
        self
    }

    /// The next connection of an allowed user of this host, and whose it is. The door is for the daemon to name.
    pub async fn accept(&self) -> io::Result<(TcpStream, Caller)> {
        loop {
            let (stream, peer) = self.inner.accept().await?;
            if let Some(caller) = self.gate.admit_user(&stream, peer).await {
                // Answers are small and waited for.
                let _ = stream.set_nodelay(true);
                return Ok((stream, caller));
            }
        }
    }

    /// The next connection of anybody; [`Gate::admit`] decides about it without holding up the others.
    pub(crate) async fn accept_any(&self) -> io::Result<(TcpStream, SocketAddr)> {
        self.inner.accept().await
    }

    pub(crate) fn gate(&self) -> &Gate {
        &self.gate
    }
}

/// Who listens on an address, in words: program, pid and user as far as we may know.
pub fn who_listens(addr: SocketAddr) -> Option<String> {
    let (uid, inode) = peer::listener_of(addr)?;
    match pid_of_socket(inode) {
        Some(pid) => Some(format!("{} (pid {pid})", process::program(pid).unwrap_or_else(|| "a program".to_owned()))),
        None => Some(format!("a program of uid {uid}")),
    }
}

fn pid_of_socket(inode: u64) -> Option<u32> {
    let wanted = format!("socket:[{inode}]");
    fs::read_dir("/proc").ok()?.filter_map(Result::ok).find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let held = fs::read_dir(entry.path().join("fd")).ok()?.filter_map(Result::ok);
        held.filter_map(|fd| fs::read_link(fd.path()).ok())
            .any(|target| target.as_os_str() == wanted.as_str())
            .then_some(pid)
    })
}
