//! Datagrams.

use std::sync::Arc;

use super::buf::{Put, Reader, WireError};
use crate::core::{Accusation, Load, MAX_RUMORS, Message, NodeKey, Rumor, SignedRecord};

const PING: u8 = 1;
const ACK: u8 = 2;
const RELAY: u8 = 3;
const RELAY_ACK: u8 = 4;
const NACK: u8 = 5;
const GOSSIP: u8 = 6;
const LOAD: u8 = 7;
/// Set in the tag of a message with a load.
const OVERLOADED: u8 = 0x80;

const ALIVE: u8 = 0;
const ALIVE_BARE: u8 = 1;
const SUSPECT: u8 = 2;
const SUSPECT_REFUSED: u8 = 3;
const DEAD: u8 = 4;
const DEAD_REFUSED: u8 = 5;

/// The highest score that stands for something.
const FULL: u8 = 200;

/// Appends the bytes of a message. A record that is out of bounds is left out: its node would be refused anyway.
pub fn encode(message: &Message, out: &mut Vec<u8>) {
    match message {
        Message::Ping { seq, digest, load, rumors } => put_probe(PING, *seq, *digest, *load, rumors, out),
        Message::Ack { seq, digest, load, rumors } => put_probe(ACK, *seq, *digest, *load, rumors, out),
        Message::Relay { seq, target } => put_relayed(RELAY, *seq, *target, out),
        Message::RelayAck { seq, target } => put_relayed(RELAY_ACK, *seq, *target, out),
        Message::Nack { seq, target } => put_relayed(NACK, *seq, *target, out),
        Message::Gossip { rumors } => {
            out.push(GOSSIP);
            put_rumors(rumors, out);
        }
        Message::Load { load } => {
            out.push(tag(LOAD, *load));
            put_load(*load, out);
        }
    }
}

fn tag(kind: u8, load: Load) -> u8 {
    kind | if load.overloaded { OVERLOADED } else { 0 }
}

fn put_load(load: Load, out: &mut Vec<u8>) {
    out.push(load.score.min(FULL));
    out.extend_from_slice(&load.seq.to_le_bytes());
}

fn put_probe(kind: u8, seq: u32, digest: u64, load: Load, rumors: &[Rumor], out: &mut Vec<u8>) {
    out.push(tag(kind, load));
    out.put_varint(u64::from(seq));
    out.put_fixed64(digest);
    put_load(load, out);
    put_rumors(rumors, out);
}

fn put_relayed(kind: u8, seq: u32, target: NodeKey, out: &mut Vec<u8>) {
    out.push(kind);
    out.put_varint(u64::from(seq));
    out.put_fixed64(target.0);
}

fn put_rumors(rumors: &[Rumor], out: &mut Vec<u8>) {
    for rumor in rumors.iter().take(MAX_RUMORS) {
        match rumor {
            Rumor::Alive { record, bare } => {
                let before = out.len();
                out.push(if *bare { ALIVE_BARE } else { ALIVE });
                if record.encode(*bare, out).is_err() {
                    out.truncate(before);
                }
            }
            Rumor::Suspect(accusation) => put_accusation(SUSPECT, SUSPECT_REFUSED, accusation, out),
            Rumor::Dead(accusation) => put_accusation(DEAD, DEAD_REFUSED, accusation, out),
        }
    }
}

fn put_accusation(silent: u8, refused: u8, accusation: &Accusation, out: &mut Vec<u8>) {
    out.push(if accusation.refused { refused } else { silent });
    out.put_fixed64(accusation.key.0);
    // A boot is nearly always so great that a number of variable length would be longer.
    out.put_fixed64(accusation.boot);
    out.put_varint(u64::from(accusation.incarnation));
    out.put_fixed64(accusation.accuser.0);
}

/// Reads a message. Signatures have yet to be checked.
pub fn decode(bytes: &[u8]) -> Result<Message, WireError> {
    let mut reader = Reader::new(bytes);
    let tag = reader.u8()?;
    let overloaded = tag & OVERLOADED != 0;
    let message = match tag & !OVERLOADED {
        kind @ (PING | ACK) => {
            let seq = reader.small("sequence number")?;
            let digest = reader.fixed64()?;
            let load = take_load(&mut reader, overloaded)?;
            let rumors = take_rumors(&mut reader)?;
            if kind == PING {
                Message::Ping { seq, digest, load, rumors }
            } else {
                Message::Ack { seq, digest, load, rumors }
            }
        }
        LOAD => Message::Load { load: take_load(&mut reader, overloaded)? },
        _ if overloaded => return Err(WireError::Invalid("tag")),
        GOSSIP => Message::Gossip { rumors: take_rumors(&mut reader)? },
        kind @ (RELAY | RELAY_ACK | NACK) => {
            let seq = reader.small("sequence number")?;
            let target = NodeKey(reader.fixed64()?);
            match kind {
                RELAY => Message::Relay { seq, target },
                RELAY_ACK => Message::RelayAck { seq, target },
                _ => Message::Nack { seq, target },
            }
        }
        _ => return Err(WireError::Invalid("tag")),
    };
    reader.end()?;
    Ok(message)
}

fn take_load(reader: &mut Reader<'_>, overloaded: bool) -> Result<Load, WireError> {
    let score = reader.u8()?;
    if score > FULL {
        return Err(WireError::Invalid("load"));
    }
    Ok(Load { score, overloaded, seq: u16::from_le_bytes(reader.array()?) })
}

fn take_rumors(reader: &mut Reader<'_>) -> Result<Vec<Rumor>, WireError> {
    let mut rumors = Vec::new();
    while reader.left() > 0 {
        if rumors.len() == MAX_RUMORS {
            return Err(WireError::TooLong("list of rumours"));
        }
        rumors.push(match reader.u8()? {
            kind @ (ALIVE | ALIVE_BARE) => {
                let rest = reader.take(reader.left())?;
                let (record, rest) = SignedRecord::decode(rest).map_err(|_| WireError::Invalid("record"))?;
                *reader = Reader::new(rest);
                let bare = kind == ALIVE_BARE;
                if bare != record.cert.is_empty() {
                    return Err(WireError::Invalid("record"));
                }
                Rumor::Alive { record: Arc::new(record), bare }
            }
            kind @ (SUSPECT | SUSPECT_REFUSED | DEAD | DEAD_REFUSED) => {
                let accusation = Accusation {
                    key: NodeKey(reader.fixed64()?),
                    boot: reader.fixed64()?,
                    incarnation: reader.small("incarnation")?,
                    accuser: NodeKey(reader.fixed64()?),
                    refused: matches!(kind, SUSPECT_REFUSED | DEAD_REFUSED),
                };
                if kind < DEAD { Rumor::Suspect(accusation) } else { Rumor::Dead(accusation) }
            }
            _ => return Err(WireError::Invalid("rumour")),
        });
    }
    Ok(rumors)
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::core::Record;

    pub(in crate::wire) fn record(id: &str, labels: BTreeMap<String, String>, cert: &[u8]) -> SignedRecord {
        let record = Record {
            node_id: id.to_owned(),
            boot: 1_790_000_000_000_000,
            incarnation: 3,
            addr: ([127, 0, 0, 1], 7946).into(),
            rpc_port: 7954,
            protocol: 1,
            region: "default".to_owned(),
            capabilities: BTreeMap::new(),
            labels,
            dh_public: [9; 32],
            leaving: false,
            timestamp_us: 1,
        };
        SignedRecord::new(record, [5; 64], Arc::from(cert))
    }

    fn loads() -> impl Strategy<Value = Load> {
        (0..=FULL, any::<bool>(), any::<u16>()).prop_map(|(score, overloaded, seq)| Load { score, overloaded, seq })
    }

    fn rumors() -> impl Strategy<Value = Vec<Rumor>> {
        let accusations = any::<(u64, u64, u32, u64, bool)>().prop_map(|(key, boot, incarnation, accuser, refused)| {
            Accusation { key: NodeKey(key), boot, incarnation, accuser: NodeKey(accuser), refused }
        });
        let alive = ("[a-z/]{1,20}", vec(any::<u8>(), 1..60), any::<bool>()).prop_map(|(id, cert, bare)| {
            Rumor::Alive { record: Arc::new(record(&id, BTreeMap::new(), if bare { &[] } else { &cert })), bare }
        });
        vec(prop_oneof![alive, accusations.clone().prop_map(Rumor::Suspect), accusations.prop_map(Rumor::Dead)], 0..6)
    }

    fn messages() -> impl Strategy<Value = Message> {
        let target = || any::<(u32, u64)>();
        prop_oneof![
            (any::<(u32, u64)>(), loads(), rumors()).prop_map(|((seq, digest), load, rumors)| Message::Ping {
                seq,
                digest,
                load,
                rumors
            }),
            (any::<(u32, u64)>(), loads(), rumors()).prop_map(|((seq, digest), load, rumors)| Message::Ack {
                seq,
                digest,
                load,
                rumors
            }),
            target().prop_map(|(seq, target)| Message::Relay { seq, target: NodeKey(target) }),
            target().prop_map(|(seq, target)| Message::RelayAck { seq, target: NodeKey(target) }),
            target().prop_map(|(seq, target)| Message::Nack { seq, target: NodeKey(target) }),
            rumors().prop_map(|rumors| Message::Gossip { rumors }),
            loads().prop_map(|load| Message::Load { load }),
        ]
    }

    proptest! {
        #[test]
        fn a_message_comes_back_as_it_was(message in messages()) {
            let mut bytes = Vec::new();
            encode(&message, &mut bytes);
            prop_assert_eq!(decode(&bytes), Ok(message));
        }

        #[test]
        fn a_rumour_takes_no_more_than_it_says(rumors in rumors()) {
            for rumor in rumors {
                let (mut with, size) = (Vec::new(), rumor.size());
                encode(&Message::Gossip { rumors: vec![rumor] }, &mut with);
                prop_assert!(with.len() - 1 <= size, "{} > {size}", with.len() - 1);
            }
        }

        #[test]
        fn a_cut_or_changed_message_is_refused_or_another(message in messages(), cut in any::<usize>(), bit in any::<usize>()) {
            let mut bytes = Vec::new();
            encode(&message, &mut bytes);
            prop_assert!(decode(&bytes[..cut % bytes.len()]) != Ok(message.clone()));
            let at = bit % (bytes.len() * 8);
            bytes[at / 8] ^= 1 << (at % 8);
            if let Ok(other) = decode(&bytes) {
                let mut again = Vec::new();
                encode(&other, &mut again);
                prop_assert_eq!(again, bytes, "two encodings of one message");
            }
        }

        #[test]
        fn any_bytes_are_taken_without_panic(bytes in vec(any::<u8>(), 0..1500)) {
            let _ = decode(&bytes);
        }
    }

    #[test]
    fn a_quiet_probe_is_small() {
        let load = Load { score: 10, overloaded: true, seq: 700 };
        let mut bytes = Vec::new();
        encode(&Message::Ping { seq: 70_000, digest: u64::MAX, load, rumors: Vec::new() }, &mut bytes);
        assert!(bytes.len() <= 15, "{} bytes", bytes.len());
    }

    #[test]
    fn more_rumours_than_anybody_sends_are_refused() {
        let accusation = Accusation { key: NodeKey(1), boot: 1, incarnation: 1, accuser: NodeKey(2), refused: false };
        let mut bytes = vec![GOSSIP];
        for _ in 0..=MAX_RUMORS {
            put_accusation(SUSPECT, SUSPECT_REFUSED, &accusation, &mut bytes);
        }
        assert_eq!(decode(&bytes), Err(WireError::TooLong("list of rumours")));
    }
}
