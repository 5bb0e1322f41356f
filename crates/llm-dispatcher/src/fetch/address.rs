//! Which addresses belong to the public internet. Everything else is somebody's own network, and no page of the web may make
//! us read there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Why a fetch must not go to this address; `None` for a public one.
pub fn forbidden(addr: IpAddr) -> Option<&'static str> {
    match addr {
        IpAddr::V4(addr) => forbidden_v4(addr),
        IpAddr::V6(addr) => forbidden_v6(addr),
    }
}

/// Networks of the registry of special purposes that are not reachable from everywhere, and what they are.
const V4: &[(Ipv4Addr, u32, &str)] = &[
    (Ipv4Addr::UNSPECIFIED, 8, "this host"),
    (Ipv4Addr::new(10, 0, 0, 0), 8, "a private network"),
    (Ipv4Addr::new(100, 64, 0, 0), 10, "a carrier's network"),
    (Ipv4Addr::new(127, 0, 0, 0), 8, "this host"),
    (Ipv4Addr::new(169, 254, 0, 0), 16, "a link-local address, where clouds keep their metadata"),
    (Ipv4Addr::new(172, 16, 0, 0), 12, "a private network"),
    (Ipv4Addr::new(192, 0, 0, 0), 24, "an address of protocols"),
    (Ipv4Addr::new(192, 0, 2, 0), 24, "an address of documentation"),
    (Ipv4Addr::new(192, 88, 99, 0), 24, "a relay of tunnels"),
    (Ipv4Addr::new(192, 168, 0, 0), 16, "a private network"),
    (Ipv4Addr::new(198, 18, 0, 0), 15, "a network of benchmarks"),
    (Ipv4Addr::new(198, 51, 100, 0), 24, "an address of documentation"),
    (Ipv4Addr::new(203, 0, 113, 0), 24, "an address of documentation"),
    (Ipv4Addr::new(224, 0, 0, 0), 4, "a multicast address"),
    (Ipv4Addr::new(240, 0, 0, 0), 4, "a reserved address"),
    // Public by its number, and yet the host's own platform answers there.
    (Ipv4Addr::new(168, 63, 129, 16), 32, "the metadata of a cloud"),
];

fn forbidden_v4(addr: Ipv4Addr) -> Option<&'static str> {
    let inside = |network: Ipv4Addr, bits: u32| {
        let mask = u32::MAX << (32 - bits);
        addr.to_bits() & mask == network.to_bits() & mask
    };
    V4.iter().find(|(network, bits, _)| inside(*network, *bits)).map(|(_, _, why)| *why)
}

/// An IPv4 address that the last four bytes of an IPv6 one spell.
fn tail(addr: Ipv6Addr) -> Ipv4Addr {
    Ipv4Addr::from_bits(addr.to_bits() as u32)
}

fn forbidden_v6(addr: Ipv6Addr) -> Option<&'static str> {
    let parts = addr.segments();
    match parts {
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => return Some("this host"),
        [0, 0, 0, 0, 0, 0xffff | 0, ..] | [0, 0, 0, 0, 0xffff, 0, ..] => {
            return Some("an IPv4 address in the clothes of an IPv6 one");
        }
        // The one translation that networks without IPv4 depend on: judged by what it leads to.
        [0x64, 0xff9b, 0, 0, 0, 0, ..] => return forbidden_v4(tail(addr)),
        _ => {}
    }
    match parts[0] {
        0xfc00..=0xfdff | 0xfec0..=0xfeff => return Some("a private network"),
        0xfe80..=0xfebf => return Some("a link-local address"),
        0xff00..=0xffff => return Some("a multicast address"),
        0x2002 => return Some("a tunnel to an IPv4 address"),
        0x2000..=0x3fff => {}
        _ => return Some("no public address"),
    }
    match (parts[0], parts[1]) {
        (0x2001, 0) => return Some("a tunnel to an IPv4 address"),
        (0x2001, 0x0db8) | (0x3fff, 0..=0x0fff) => return Some("an address of documentation"),
        (0x2001, 1..=0x01ff) => return Some("an address of protocols"),
        _ => {}
    }
    // Interface identifiers of ISATAP lead to the IPv4 address at their end.
    if parts[4] & 0xfdff == 0 && parts[5] == 0x5efe {
        return forbidden_v4(tail(addr)).map(|_| "a tunnel to an IPv4 address");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(text: &str) -> Option<&'static str> {
        forbidden(text.parse().unwrap())
    }

    #[test]
    fn networks_end_where_their_registry_says() {
        for text in [
            "0.0.0.0",
            "0.255.255.255",
            "10.0.0.0",
            "10.255.255.255",
            "100.64.0.0",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.255",
            "169.254.169.254",
            "172.16.0.0",
            "172.31.255.255",
            "192.0.0.192",
            "192.168.0.0",
            "192.168.255.255",
            "198.18.0.0",
            "198.19.255.255",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "168.63.129.16",
            "192.0.2.9",
            "203.0.113.1",
            "198.51.100.77",
            "100.100.100.200",
        ] {
            assert!(judged(text).is_some(), "{text}");
        }
        for text in [
            "1.0.0.0",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "128.0.0.0",
            "169.253.255.255",
            "169.255.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.0",
            "192.167.255.255",
            "192.169.0.0",
            "198.17.255.255",
            "198.20.0.0",
            "223.255.255.255",
            "168.63.129.17",
            "8.8.8.8",
        ] {
            assert_eq!(judged(text), None, "{text}");
        }
    }

    #[test]
    fn ipv6_is_public_only_where_it_is_and_by_what_it_leads_to() {
        for text in [
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:8.8.8.8",
            "::127.0.0.1",
            "::ffff:0:127.0.0.1",
            "fc00::1",
            "fdff::1",
            "fd00:ec2::254",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::1",
            "2001::1",
            "2001:db8::1",
            "2001:1::1",
            "2001:1ff::1",
            "2002:7f00:1::",
            "2002:808:808::",
            "3fff::1",
            "4000::1",
            "100::1",
            "64:ff9b::127.0.0.1",
            "64:ff9b::10.0.0.1",
            "64:ff9b:1::8.8.8.8",
            "64:ff9b::a9fe:a9fe",
            "2a00::5efe:10.0.0.1",
            "2a00::200:5efe:127.0.0.1",
            "5f00::1",
        ] {
            assert!(judged(text).is_some(), "{text}");
        }
        for text in [
            "2606:4700:4700::1111",
            "2a00:1450:4001::200e",
            "2001:4860:4860::8888",
            "64:ff9b::8.8.8.8",
            "2a00::5efe:8.8.8.8",
        ] {
            assert_eq!(judged(text), None, "{text}");
        }
    }
}
