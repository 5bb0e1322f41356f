//! Which user is at the other end of a loopback connection, from the kernel's socket table.
//!
//! `127.0.0.1` on a login node can be reached by every user of that node, and the JSON-line protocol has no way to
//! authenticate. The kernel knows who owns each socket of the host, so we ask it.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, netlink};

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

/// Whose a socket is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    Uid(u32),
    Nobody,
}

/// The user whose process holds the other end of the connection between `local` (ours) and `peer`; `None` when no
/// process holds it any more, or the peer is on another host.
pub fn uid_of_peer(local: SocketAddr, peer: SocketAddr) -> Option<u32> {
    let (local, peer) = (plain(local), plain(peer));
    match ask_for_one(peer, local) {
        Some(Holder::Uid(uid)) => return Some(uid),
        Some(Holder::Nobody) => return None,
        None => {}
    }
    // An orphaned socket has no inode and is shown with uid 0, whoever it belonged to.
    rows(peer).find(|row| row.local == peer && row.remote == local && row.inode != 0).map(|row| row.uid)
}

/// Asks the kernel for the one socket whose own end is `local` (linux/inet_diag.h): reading the whole table takes
/// milliseconds on a busy host, and every connection waits for it. `None` means that this cannot be asked here.
fn ask_for_one(local: SocketAddr, remote: SocketAddr) -> Option<Holder> {
    const BY_FAMILY: u16 = 20;
    const NO_SUCH: i32 = rustix::io::Errno::NOENT.raw_os_error();
    let family = match (local.ip(), remote.ip()) {
        (IpAddr::V4(_), IpAddr::V4(_)) => AddressFamily::INET,
        (IpAddr::V6(_), IpAddr::V6(_)) => AddressFamily::INET6,
        _ => return None,
    };
    let place = place(local, remote, |ip| ip);
    let mut request = Vec::with_capacity(72);
    request.extend(72_u32.to_ne_bytes());
    request.extend(BY_FAMILY.to_ne_bytes());
    request.extend(1_u16.to_ne_bytes()); // A request.
    request.extend([0; 8]); // Its number, and the port of the asker, which the kernel knows.
    request.extend([family.as_raw() as u8, 6, 0, 0]); // TCP.
    request.extend(u32::MAX.to_ne_bytes()); // In any state.
    request.extend(&place);
    request.extend([0; 4]); // On any interface.
    request.extend([0xff; 8]); // Whatever its cookie.

    let socket = rustix::net::socket(AddressFamily::NETLINK, SocketType::DGRAM, Some(netlink::SOCK_DIAG)).ok()?;
    rustix::net::send(&socket, &request, SendFlags::empty()).ok()?;
    let mut answer = [0; 512];
    let (length, _) = rustix::net::recv(&socket, &mut answer[..], RecvFlags::DONTWAIT).ok()?;
    let answer = &answer[..length];
    let word = |at: usize| Some(u32::from_ne_bytes(answer.get(at..at + 4)?.try_into().ok()?));
    match u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?) {
        BY_FAMILY => {
            // A listener on the port would do for the kernel where the connection itself is gone. A dual-stack socket
            // shows its IPv4 addresses as IPv6.
            let mapped = |ip| match ip {
                IpAddr::V4(ip) => IpAddr::V6(ip.to_ipv6_mapped()),
                IpAddr::V6(ip) => IpAddr::V6(ip),
            };
            let told = answer.get(20..20 + place.len())?;
            let found = told == place || told == self::place(local, remote, mapped);
            let (uid, inode) = (word(16 + 4 + 48 + 12)?, word(16 + 4 + 48 + 16)?);
            Some(if found && inode != 0 { Holder::Uid(uid) } else { Holder::Nobody })
        }
        // An error: there is none, or the question is not understood here.
        2 if word(16)?.cast_signed() == -NO_SUCH => Some(Holder::Nobody),
        _ => None,
    }
}

/// Both ends of a connection as the kernel writes them.
fn place(local: SocketAddr, remote: SocketAddr, shown: impl Fn(IpAddr) -> IpAddr) -> [u8; 36] {
    let mut place = [0; 36];
    place[..2].copy_from_slice(&local.port().to_be_bytes());
    place[2..4].copy_from_slice(&remote.port().to_be_bytes());
    for (at, ip) in [(4, local.ip()), (20, remote.ip())] {
        match shown(ip) {
            IpAddr::V4(ip) => place[at..at + 4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => place[at..at + 16].copy_from_slice(&ip.octets()),
        }
    }
    place
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
    fn the_kernel_answers_for_one_socket_as_its_table_does() {
        let me = rustix::process::geteuid().as_raw();
        for bind in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(bind) else { continue };
            let addr = listener.local_addr().unwrap();
            let client = TcpStream::connect(addr).unwrap();
            let (_server, peer) = listener.accept().unwrap();
            let Some(answer) = ask_for_one(peer, addr) else { continue };
            assert_eq!(answer, Holder::Uid(me), "{bind}");
            assert_eq!(rows(peer).find(|row| row.local == peer && row.remote == addr).map(|row| row.uid), Some(me));
            drop(client);
            assert_eq!(ask_for_one(peer, addr), Some(Holder::Nobody), "{bind}: a closed socket belongs to nobody");
            // Nobody is connected from the listener's own address.
            assert_eq!(ask_for_one(addr, peer_of_nobody(addr)), Some(Holder::Nobody), "{bind}");
        }
    }

    fn peer_of_nobody(addr: SocketAddr) -> SocketAddr {
        SocketAddr::new(addr.ip(), 1)
    }

    #[test]
    fn a_dual_stack_client_is_found_by_its_plain_address() {
        let Ok(listener) = TcpListener::bind("[::]:0") else { return };
        let port = listener.local_addr().unwrap().port();
        let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (server, peer) = listener.accept().unwrap();
        let me = rustix::process::geteuid().as_raw();
        // Seen from the client, the other end is the dual-stack socket.
        assert_eq!(uid_of_peer(client.local_addr().unwrap(), client.peer_addr().unwrap()), Some(me));
        assert_eq!(uid_of_peer(server.local_addr().unwrap(), peer), Some(me));
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
