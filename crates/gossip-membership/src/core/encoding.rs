//! The bytes of a record: the one form that is signed, so every record has exactly one.
//!
//! ```text
//! record  = format u8 | node_id str | boot u64 | incarnation var | addr | rpc_port u16 | protocol var | region str
//!           | capabilities map | labels map | dh_public 32 | leaving u8 | timestamp_us u64
//! str     = length var | UTF-8          map = count var | (key str | value str)*, keys strictly ascending
//! addr    = 4 or 6 | 4 or 16 bytes | port u16          signed = length var | record | signature 64 | length var | cert
//! ```
//!
//! Numbers of fixed width are big-endian, `var` is LEB128 in its shortest form. Decoding allocates nothing before the length
//! that asks for it has been compared with its bound and with the bytes that are there.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use super::record::{BOUNDS, ClusterId, Record, RecordError, SignedRecord};

/// The layout above.
const FORMAT: u8 = 1;
/// Goes before what is signed, so that no other signature of the same key can be passed off as one of a record.
const DOMAIN: &[u8] = b"drover gossip record 1\0";

impl Record {
    /// The canonical bytes, or which bound is broken.
    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        self.check_bounds()?;
        let mut out = Vec::with_capacity(256);
        self.write(&mut out);
        if out.len() > BOUNDS.record { Err(RecordError::TooLarge(out.len())) } else { Ok(out) }
    }

    /// Reads canonical bytes; anything else is refused.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        if bytes.len() > BOUNDS.record {
            return Err(RecordError::TooLarge(bytes.len()));
        }
        let mut reader = Reader { rest: bytes };
        let record = Self::read(&mut reader)?;
        if !reader.rest.is_empty() {
            return Err(RecordError::Trailing);
        }
        Ok(record)
    }

    /// What the signature covers: a domain, the cluster and the canonical bytes.
    pub fn signed_bytes(&self, cluster: &ClusterId) -> Result<Vec<u8>, RecordError> {
        let encoded = self.encode()?;
        let mut out = Vec::with_capacity(DOMAIN.len() + cluster.len() + encoded.len());
        out.extend_from_slice(DOMAIN);
        out.extend_from_slice(cluster);
        out.extend_from_slice(&encoded);
        Ok(out)
    }

    /// Length of the canonical bytes.
    pub fn encoded_len(&self) -> usize {
        let map = |map: &BTreeMap<String, String>| {
            var_len(map.len() as u64) + map.iter().map(|(key, value)| str_len(key) + str_len(value)).sum::<usize>()
        };
        1 + str_len(&self.node_id)
            + 8
            + var_len(u64::from(self.incarnation))
            + 1
            + if self.addr.is_ipv4() { 4 } else { 16 }
            + 2
            + 2
            + var_len(u64::from(self.protocol))
            + str_len(&self.region)
            + map(&self.capabilities)
            + map(&self.labels)
            + 32
            + 1
            + 8
    }

    fn check_bounds(&self) -> Result<(), RecordError> {
        let longer = |field, len, bound| if len > bound { Err(RecordError::TooLong(field)) } else { Ok(()) };
        if self.node_id.is_empty() {
            return Err(RecordError::Empty("node id"));
        }
        longer("node id", self.node_id.len(), BOUNDS.node_id)?;
        longer("region", self.region.len(), BOUNDS.region)?;
        longer("list of capabilities", self.capabilities.len(), BOUNDS.pairs)?;
        longer("list of labels", self.labels.len(), BOUNDS.pairs)?;
        for (key, value) in self.capabilities.iter().chain(&self.labels) {
            longer("key of a capability or label", key.len(), BOUNDS.key)?;
            longer("value of a capability or label", value.len(), BOUNDS.value)?;
        }
        Ok(())
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.push(FORMAT);
        put_str(out, &self.node_id);
        out.extend_from_slice(&self.boot.to_be_bytes());
        put_var(out, u64::from(self.incarnation));
        match self.addr.ip() {
            IpAddr::V4(ip) => {
                out.push(4);
                out.extend_from_slice(&ip.octets());
            }
            IpAddr::V6(ip) => {
                out.push(6);
                out.extend_from_slice(&ip.octets());
            }
        }
        out.extend_from_slice(&self.addr.port().to_be_bytes());
        out.extend_from_slice(&self.rpc_port.to_be_bytes());
        put_var(out, u64::from(self.protocol));
        put_str(out, &self.region);
        for map in [&self.capabilities, &self.labels] {
            put_var(out, map.len() as u64);
            for (key, value) in map {
                put_str(out, key);
                put_str(out, value);
            }
        }
        out.extend_from_slice(&self.dh_public);
        out.push(u8::from(self.leaving));
        out.extend_from_slice(&self.timestamp_us.to_be_bytes());
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, RecordError> {
        let format = reader.byte()?;
        if format != FORMAT {
            return Err(RecordError::UnknownFormat(format));
        }
        let node_id = reader.text("node id", BOUNDS.node_id)?;
        if node_id.is_empty() {
            return Err(RecordError::Empty("node id"));
        }
        let boot = u64::from_be_bytes(reader.array()?);
        let incarnation = narrow(reader.var()?, "incarnation")?;
        let ip = match reader.byte()? {
            4 => IpAddr::V4(Ipv4Addr::from(reader.array::<4>()?)),
            6 => IpAddr::V6(Ipv6Addr::from(reader.array::<16>()?)),
            _ => return Err(RecordError::NotCanonical("address")),
        };
        let addr = SocketAddr::new(ip, u16::from_be_bytes(reader.array()?));
        let rpc_port = u16::from_be_bytes(reader.array()?);
        let protocol = narrow(reader.var()?, "protocol version")?;
        let region = reader.text("region", BOUNDS.region)?;
        let capabilities = reader.map("list of capabilities")?;
        let labels = reader.map("list of labels")?;
        let dh_public = reader.array()?;
        let leaving = match reader.byte()? {
            0 => false,
            1 => true,
            _ => return Err(RecordError::NotCanonical("leaving")),
        };
        let timestamp_us = u64::from_be_bytes(reader.array()?);
        Ok(Self {
            node_id,
            boot,
            incarnation,
            addr,
            rpc_port,
            protocol,
            region,
            capabilities,
            labels,
            dh_public,
            leaving,
            timestamp_us,
        })
    }
}

impl SignedRecord {
    /// Wraps a record whose signature has been made.
    pub fn new(record: Record, signature: [u8; 64], cert: Arc<[u8]>) -> Self {
        let key = record.key();
        Self { record, key, signature, cert }
    }

    /// Appends the encoded form. `bare` leaves the certificate out.
    pub fn encode(&self, bare: bool, out: &mut Vec<u8>) -> Result<(), RecordError> {
        let record = self.record.encode()?;
        put_var(out, record.len() as u64);
        out.extend_from_slice(&record);
        out.extend_from_slice(&self.signature);
        let cert: &[u8] = if bare { &[] } else { &self.cert };
        put_var(out, cert.len() as u64);
        out.extend_from_slice(cert);
        Ok(())
    }

    /// Reads one from the beginning of `bytes`, and gives back what follows it. The signature has yet to be checked.
    pub fn decode(bytes: &[u8]) -> Result<(Self, &[u8]), RecordError> {
        let mut reader = Reader { rest: bytes };
        let length = reader.length("record", BOUNDS.record)?;
        let record = Record::decode(reader.take(length)?)?;
        let signature = reader.array()?;
        let length = reader.length("certificate", BOUNDS.cert)?;
        let cert = Arc::from(reader.take(length)?);
        Ok((Self::new(record, signature, cert), reader.rest))
    }
}

/// Reads from bytes that anybody may have made.
struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], RecordError> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(RecordError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], RecordError> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(RecordError::Truncated)?;
        self.rest = rest;
        Ok(*taken)
    }

    fn byte(&mut self) -> Result<u8, RecordError> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn var(&mut self) -> Result<u64, RecordError> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            // The tenth byte has room for one bit; a last byte of zero would be a longer form of a shorter number.
            if (shift == 63 && bits > 1) || (shift > 0 && byte == 0) {
                return Err(RecordError::NotCanonical("number"));
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(RecordError::NotCanonical("number"))
    }

    fn length(&mut self, field: &'static str, bound: usize) -> Result<usize, RecordError> {
        let length = self.var()?;
        match usize::try_from(length) {
            Ok(length) if length <= bound => Ok(length),
            _ => Err(RecordError::TooLong(field)),
        }
    }

    fn text(&mut self, field: &'static str, bound: usize) -> Result<String, RecordError> {
        let length = self.length(field, bound)?;
        let text = std::str::from_utf8(self.take(length)?).map_err(|_| RecordError::NotText(field))?;
        Ok(text.to_owned())
    }

    fn map(&mut self, field: &'static str) -> Result<BTreeMap<String, String>, RecordError> {
        let count = self.length(field, BOUNDS.pairs)?;
        let mut map = BTreeMap::new();
        for _ in 0..count {
            let key = self.text("key of a capability or label", BOUNDS.key)?;
            let value = self.text("value of a capability or label", BOUNDS.value)?;
            if map.last_key_value().is_some_and(|(last, _)| *last >= key) {
                return Err(RecordError::NotCanonical("order of keys"));
            }
            map.insert(key, value);
        }
        Ok(map)
    }
}

fn narrow<T: TryFrom<u64>>(value: u64, field: &'static str) -> Result<T, RecordError> {
    T::try_from(value).map_err(|_| RecordError::NotCanonical(field))
}

fn put_var(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_str(out: &mut Vec<u8>, text: &str) {
    put_var(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
}

fn var_len(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

fn str_len(text: &str) -> usize {
    var_len(text.len() as u64) + text.len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pairs() -> impl Strategy<Value = BTreeMap<String, String>> {
        proptest::collection::btree_map(".{0,12}", ".{0,12}", 0..5)
    }

    prop_compose! {
        fn records()(
            node_id in ".{1,20}",
            numbers in any::<(u64, u32, u16, u16, u16, u64)>(),
            ip in any::<IpAddr>(),
            region in ".{0,10}",
            capabilities in pairs(),
            labels in pairs(),
            dh_public in any::<[u8; 32]>(),
            leaving in any::<bool>(),
        ) -> Record {
            let (boot, incarnation, port, rpc_port, protocol, timestamp_us) = numbers;
            Record {
                node_id, boot, incarnation, addr: SocketAddr::new(ip, port), rpc_port, protocol, region, capabilities,
                labels, dh_public, leaving, timestamp_us,
            }
        }
    }

    proptest! {
        #[test]
        fn a_record_comes_back_as_it_was(record in records(), cert in proptest::collection::vec(any::<u8>(), 0..40)) {
            prop_assume!(record.check_bounds().is_ok());
            let Ok(bytes) = record.encode() else { return Ok(()) };
            prop_assert_eq!(bytes.len(), record.encoded_len());
            prop_assert_eq!(&Record::decode(&bytes).unwrap(), &record);
            let signed = SignedRecord::new(record, [7; 64], Arc::from(cert));
            let mut out = Vec::new();
            signed.encode(false, &mut out).unwrap();
            out.push(9);
            let (back, rest) = SignedRecord::decode(&out).unwrap();
            prop_assert_eq!(back, signed);
            prop_assert_eq!(rest, &[9]);
        }

        /// Whatever decodes is what encoding would have made: there are no two byte strings for one record.
        #[test]
        fn a_changed_byte_is_refused_or_another_record(record in records(), at in any::<usize>(), to in any::<u8>()) {
            prop_assume!(record.check_bounds().is_ok());
            let Ok(mut bytes) = record.encode() else { return Ok(()) };
            let at = at % bytes.len();
            bytes[at] = to;
            if let Ok(other) = Record::decode(&bytes) {
                prop_assert_eq!(other.encode().unwrap(), bytes);
            }
        }

        #[test]
        fn any_bytes_are_taken_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..1200)) {
            let _ = Record::decode(&bytes);
            let _ = SignedRecord::decode(&bytes);
        }
    }

    #[test]
    fn a_count_without_bytes_behind_it_is_refused() {
        let mut bytes = vec![FORMAT, 1, b'a'];
        bytes.extend([0; 8]);
        bytes.extend([0, 4, 127, 0, 0, 1, 0, 1, 0, 1, 1, 0]);
        for count in [32, 33] {
            let mut bytes = bytes.clone();
            bytes.push(count);
            let expected =
                if count == 32 { RecordError::Truncated } else { RecordError::TooLong("list of capabilities") };
            assert_eq!(Record::decode(&bytes), Err(expected));
        }
    }
}
