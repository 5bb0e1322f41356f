//! Tells the supervisor how we fare, in systemd's protocol (sd_notify): ready, stopping, and still alive.
//!
//! The supervisor names a datagram socket in the environment; each datagram is a few `KEY=value` lines. Where nobody named one,
//! nothing happens. The sign of life is given only after this daemon's own port has answered: a process that runs and serves
//! nobody is to be restarted too.

use std::ffi::{OsStr, OsString};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// Names the socket.
const SOCKET: &str = "NOTIFY_SOCKET";
/// How many microseconds may pass between two signs of life.
const WATCHDOG: &str = "WATCHDOG_USEC";
/// Whom that is meant for.
const WATCHDOG_PID: &str = "WATCHDOG_PID";

/// Says something to the supervisor, when there is one.
pub(crate) fn tell(lines: &str) {
    let Some(name) = std::env::var_os(SOCKET).filter(|name| !name.is_empty()) else { return };
    if let Err(error) = send(&name, lines) {
        debug!(%error, "the supervisor does not listen");
    }
}

fn send(name: &OsStr, lines: &str) -> io::Result<()> {
    let bytes = name.as_bytes();
    let addr = match bytes.strip_prefix(b"@") {
        Some(name) => UnixAddr::from_abstract_name(name)?,
        None => UnixAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    // A supervisor that does not read must not hold us up.
    socket.set_nonblocking(true)?;
    socket.send_to_addr(lines.as_bytes(), &addr).map(drop)
}

/// How often a sign of life is expected from this process; `None` when nobody waits for one.
pub(crate) fn expected_every() -> Option<Duration> {
    interval(std::env::var_os(WATCHDOG), std::env::var_os(WATCHDOG_PID), std::process::id())
}

fn interval(every: Option<OsString>, whom: Option<OsString>, me: u32) -> Option<Duration> {
    // The variables are inherited: a daemon that another one started is not meant.
    if whom.is_some_and(|pid| pid.to_str().and_then(|pid| pid.parse().ok()) != Some(me)) {
        return None;
    }
    let micros = every?.to_str()?.parse().ok()?;
    (micros > 0).then(|| Duration::from_micros(micros))
}

/// Gives a sign of life three times in each interval, as long as our own port answers.
pub(crate) async fn signs_of_life(every: Duration, port: SocketAddr, stop: CancellationToken) {
    let pause = every / 3;
    let mut silent = false;
    loop {
        match tokio::time::timeout(pause, healthy(port)).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            Ok(()) => {
                tell("WATCHDOG=1");
                silent = false;
            }
            // While it drains it says that it is stopping.
            Err(error) if !silent && !stop.is_cancelled() => {
                silent = true;
                warn!(%error, listen = %port, "our own port does not answer; the supervisor is not told that we are well");
            }
            Err(_) => {}
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Asks our own port as anybody would.
async fn healthy(port: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect(reachable(port)).await?;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await?;
    if answer == *b"HTTP/1.1 200" {
        Ok(())
    } else {
        Err(io::Error::other(String::from_utf8_lossy(&answer).into_owned()))
    }
}

/// A socket that listens everywhere is reached on loopback.
fn reachable(port: SocketAddr) -> SocketAddr {
    let ip = match port.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, port.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_process_that_is_meant_gives_signs_of_life() {
        let text = |text: &str| Some(OsString::from(text));
        assert_eq!(interval(text("3000000"), text("7"), 7), Some(Duration::from_secs(3)));
        assert_eq!(interval(text("3000000"), None, 7), Some(Duration::from_secs(3)));
        assert_eq!(interval(text("3000000"), text("8"), 7), None, "meant for whoever started us");
        assert_eq!(interval(text("0"), None, 7), None);
        assert_eq!(interval(text("soon"), None, 7), None);
        assert_eq!(interval(None, None, 7), None);
    }

    #[test]
    fn words_arrive_by_path_and_by_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("drover-notify-{}", std::process::id());
        let by_path = UnixDatagram::bind(&path).unwrap();
        let by_name = UnixDatagram::bind_addr(&UnixAddr::from_abstract_name(&name).unwrap()).unwrap();
        for (socket, address) in [(by_path, path.into_os_string()), (by_name, format!("@{name}").into())] {
            send(&address, "READY=1\nSTATUS=here").unwrap();
            let mut heard = [0; 64];
            let length = socket.recv(&mut heard).unwrap();
            assert_eq!(&heard[..length], b"READY=1\nSTATUS=here");
        }
        send(OsStr::new("/nowhere/notify"), "READY=1").unwrap_err();
    }

    #[tokio::test]
    async fn a_port_that_nobody_serves_is_not_healthy() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap();
        drop(listener);
        healthy(port).await.unwrap_err();
        assert_eq!(reachable("0.0.0.0:7954".parse().unwrap()), "127.0.0.1:7954".parse().unwrap());
        assert_eq!(reachable("[::]:7954".parse().unwrap()), "[::1]:7954".parse().unwrap());
    }
}
