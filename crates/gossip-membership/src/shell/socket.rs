//! The UDP socket: many datagrams per wake-up, and never a wait for sending.

use std::io;
use std::net::{SocketAddr, UdpSocket as StdSocket};

use anyhow::Context as _;
use rustix::net::sockopt;
use tokio::net::UdpSocket;

use crate::metrics::Metrics;

/// The largest datagram that we send: it fits the frame of every usual network, headers included.
pub(crate) const MAX_DATAGRAM: usize = 1_400;
/// A byte more than we accept, so that one that is too long is seen to be.
const BUFFER: usize = 2_048;
/// Datagrams that are taken in one go before timers get their turn.
const BATCH: usize = 64;
/// What the kernel may hold for us while a burst of joins comes in.
const KERNEL_BUFFER: usize = 1 << 20;

/// The socket.
#[derive(Debug)]
pub(crate) struct Socket {
    inner: UdpSocket,
    addr: SocketAddr,
    metrics: Metrics,
}

/// Why a socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BindError {
    /// The port belongs to somebody else.
    #[error("UDP {0} is in use by another program")]
    Taken(SocketAddr),
    /// Anything else, such as an address that this machine does not have.
    #[error("UDP {0} cannot be bound: {1}")]
    Other(SocketAddr, String),
}

impl Socket {
    /// Binds. A default port that is taken is replaced by a free one; a configured one is not.
    pub(crate) fn bind(wanted: SocketAddr, configured: bool, metrics: &Metrics) -> Result<Self, BindError> {
        let inner = match StdSocket::bind(wanted) {
            Ok(socket) => socket,
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                if configured {
                    return Err(BindError::Taken(wanted));
                }
                let any = SocketAddr::new(wanted.ip(), 0);
                StdSocket::bind(any).map_err(|error| BindError::Other(any, error.to_string()))?
            }
            Err(error) => return Err(BindError::Other(wanted, error.to_string())),
        };
        let other = |error: io::Error| BindError::Other(wanted, error.to_string());
        // The kernel gives what it may; less is no reason to stop.
        let _ = sockopt::set_socket_recv_buffer_size(&inner, KERNEL_BUFFER);
        let _ = sockopt::set_socket_send_buffer_size(&inner, KERNEL_BUFFER);
        inner.set_nonblocking(true).map_err(other)?;
        let addr = inner.local_addr().map_err(other)?;
        let inner = UdpSocket::from_std(inner).map_err(other)?;
        Ok(Self { inner, addr, metrics: metrics.clone() })
    }

    /// Where it is bound.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Returns when there is something to take.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        self.inner.readable().await
    }

    /// Hands over what has come, up to a batch.
    pub(crate) fn drain(&self, mut each: impl FnMut(SocketAddr, &[u8])) {
        let mut buffer = [0; BUFFER];
        for _ in 0..BATCH {
            match self.inner.try_recv_from(&mut buffer) {
                Ok((length, from)) => {
                    self.metrics.datagrams_in.inc();
                    self.metrics.bytes_in.inc_by(length as u64);
                    each(from, &buffer[..length]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // An earlier datagram of ours was refused by its host; the next read is about something else.
                Err(_) => {}
            }
        }
    }

    /// Sends, or drops and counts: gossip is built for losses, and waiting would hold up everybody else.
    pub(crate) fn send(&self, to: SocketAddr, datagram: &[u8]) {
        match self.inner.try_send_to(datagram, to) {
            Ok(sent) => {
                self.metrics.datagrams_out.inc();
                self.metrics.bytes_out.inc_by(sent as u64);
            }
            Err(_) => {
                self.metrics.send_errors.inc();
            }
        }
    }
}

/// The address of this machine that packets to `seed` leave from; nothing is sent to find out.
pub(crate) fn address_towards(seed: SocketAddr) -> anyhow::Result<std::net::IpAddr> {
    let any: SocketAddr = if seed.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0_u16; 8], 0).into() };
    let socket = StdSocket::bind(any).context("failed to open a socket")?;
    socket.connect(seed).with_context(|| format!("no way to {seed}"))?;
    Ok(socket.local_addr()?.ip())
}
