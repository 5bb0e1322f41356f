//! Which user is at the other end of a loopback connection, from the kernel's socket table.
//!
//! `127.0.0.1` on a login node can be reached by every user of that node, and the JSON-line protocol has no way to
//! authenticate. The kernel knows who owns each socket of the host, so we ask it.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Socket states in the kernel's table (include/net/tcp_states.h).
const ESTABLISHED: u8 = 0x01;
const LISTEN: u8 = 0x0A;

/// One row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Row {
    local: SocketAddr,
    remote: SocketAddr,
    state: u8,
    uid: u32,
    inode: u64,
}

/// The user whose process holds the other end of the connection between `local` (ours) and `peer`; `None` when no
/// process holds it any more, or the peer is on another host.
pub fn uid_of_peer(local: SocketAddr, peer: SocketAddr) -> Option<u32> {
    let (local, peer) = (plain(local), plain(peer));
    // An orphaned socket has no inode and is shown with uid 0, whoever it belonged to.
    rows(peer).find(|row| row.local == peer && row.remote == local && row.inode != 0).map(|row| row.uid)
}

/// The user and socket inode of whoever listens on `addr`.
pub fn listener_of(addr: SocketAddr) -> Option<(u32, u64)> {
    let addr = plain(addr);
    rows(addr)
        .find(|row| {
            row.state == LISTEN
                && row.local.port() == addr.port()
                && (row.local.ip() == addr.ip() || row.local.ip().is_unspecified())
        })
        .map(|row| (row.uid, row.inode))
}

/// How many established connections reach the local port.
pub fn established_on(port: u16) -> usize {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    rows(any).filter(|row| row.state == ESTABLISHED && row.local.port() == port).count()
}

/// An IPv4 address that a dual-stack socket shows as IPv6 is the IPv4 address.
fn plain(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

fn rows(near: SocketAddr) -> impl Iterator<Item = Row> {
    // A client may reach an IPv4 address from an IPv6 socket, so both tables count for it.
    let tables: &[&str] = if near.is_ipv4() { &["/proc/net/tcp", "/proc/net/tcp6"] } else { &["/proc/net/tcp6"] };
    tables.iter().flat_map(|table| {
        let text = fs::read_to_string(table).unwrap_or_default();
        text.lines().skip(1).filter_map(parse_row).collect::<Vec<_>>()
    })
}

fn parse_row(line: &str) -> Option<Row> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let local = parse_addr(fields.next()?)?;
    let remote = parse_addr(fields.next()?)?;
    let state = u8::from_str_radix(fields.next()?, 16).ok()?;
    let uid = fields.nth(3)?.parse().ok()?;
    let inode = fields.nth(1)?.parse().ok()?;
    Some(Row { local, remote, state, uid, inode })
}

/// The table writes each 32-bit word of an address in host byte order.
fn parse_addr(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |at: usize| u32::from_str_radix(ip.get(at..at + 8)?, 16).ok().map(u32::to_ne_bytes);
    let ip = match ip.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for (index, chunk) in bytes.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(index * 8)?);
            }
            IpAddr::V6(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    Some(plain(SocketAddr::new(ip, port)))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn our_own_connection_is_ours() {
        let me = rustix::process::geteuid().as_raw();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        assert_eq!(listener_of(addr).map(|(uid, _)| uid), Some(me));

        let client = TcpStream::connect(addr).unwrap();
        let (server, peer) = listener.accept().unwrap();
        assert_eq!(uid_of_peer(server.local_addr().unwrap(), peer), Some(me));
        drop(client);
        assert_eq!(uid_of_peer(addr, peer), None, "a closed socket belongs to nobody");
    }

    #[test]
    fn a_dual_stack_client_is_found_in_the_other_table() {
        let row = "   1: 0000000000000000FFFF00000100007F:D431 0000000000000000FFFF00000100007F:223D 01 \
                   00000000:00000000 00:00000000 00000000  1000        0 48211 1 0000 20 0 0 10 -1";
        let row = parse_row(row).unwrap();
        assert_eq!(row.local, "127.0.0.1:54321".parse().unwrap());
        assert_eq!((row.remote.port(), row.uid, row.inode, row.state), (8765, 1000, 48211, ESTABLISHED));
    }
}
