//! How two nodes get to know each other. The side that is asked keeps nothing until the other has sent back a number that only
//! somebody at its address can have got.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ring::hmac;

use super::refusal::Refusal;
use crate::core::{ClusterId, SignedRecord, Time};

/// Clocks may be this far apart. A node whose clock is further ahead is told so, and not let in.
pub(super) const MAX_AHEAD_US: u64 = 10 * 60 * 1_000_000;

/// A challenge is good for one to two of these.
const SLOT_US: u64 = 5_000_000;

pub(super) type Challenge = [u8; 16];

const ASK: u8 = 1;
const SHOW: u8 = 2;
const INTRODUCE: u8 = 3;
const MET: u8 = 4;

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Hello {
    /// Who are you?
    Ask { challenge: Challenge },
    /// Show that you are at that address.
    Show { echo: Challenge, challenge: Challenge },
    /// I am, and this is who I am.
    Introduce { echo: Challenge, challenge: Challenge, proof: Box<[u8; 64]>, record: Arc<SignedRecord> },
    /// Then this is who I am.
    Met { echo: Challenge, proof: Box<[u8; 64]>, record: Arc<SignedRecord> },
}

impl Hello {
    /// cluster 16 | sender's clock 8 | step 1 | two challenges 32 | [proof 64 | record]. Ask and show have the same length.
    pub(super) fn encode(&self, cluster: &ClusterId, unix_us: u64) -> Option<Vec<u8>> {
        let mut out = Vec::with_capacity(64);
        out.extend_from_slice(cluster);
        out.extend_from_slice(&unix_us.to_be_bytes());
        let none = [0; 16];
        let (step, first, second) = match self {
            Self::Ask { challenge } => (ASK, challenge, &none),
            Self::Show { echo, challenge } => (SHOW, echo, challenge),
            Self::Introduce { echo, challenge, .. } => (INTRODUCE, echo, challenge),
            Self::Met { echo, .. } => (MET, echo, &none),
        };
        out.push(step);
        out.extend_from_slice(first);
        out.extend_from_slice(second);
        if let Self::Introduce { proof, record, .. } | Self::Met { proof, record, .. } = self {
            out.extend_from_slice(proof.as_slice());
            record.encode(false, &mut out).ok()?;
        }
        Some(out)
    }

    /// Reads a step whose seal was good.
    pub(super) fn decode(bytes: &[u8], cluster: &ClusterId, unix_us: u64) -> Result<Self, Refusal> {
        let (theirs, rest) = bytes.split_first_chunk::<16>().ok_or(Refusal::Malformed)?;
        if theirs != cluster {
            return Err(Refusal::WrongCluster);
        }
        let (clock, rest) = rest.split_first_chunk::<8>().ok_or(Refusal::Malformed)?;
        if u64::from_be_bytes(*clock) > unix_us.saturating_add(MAX_AHEAD_US) {
            return Err(Refusal::Future);
        }
        let (step, rest) = rest.split_first_chunk::<1>().ok_or(Refusal::Malformed)?;
        let (first, rest) = rest.split_first_chunk::<16>().ok_or(Refusal::Malformed)?;
        let (second, rest) = rest.split_first_chunk::<16>().ok_or(Refusal::Malformed)?;
        let (first, second) = (*first, *second);
        match step {
            [ASK | SHOW] if !rest.is_empty() => Err(Refusal::Malformed),
            [ASK] => Ok(Self::Ask { challenge: first }),
            [SHOW] => Ok(Self::Show { echo: first, challenge: second }),
            [step @ (INTRODUCE | MET)] => {
                let (proof, rest) = rest.split_first_chunk::<64>().ok_or(Refusal::Malformed)?;
                let (record, rest) = SignedRecord::decode(rest).map_err(|_| Refusal::Malformed)?;
                if !rest.is_empty() {
                    return Err(Refusal::Malformed);
                }
                let (proof, record) = (Box::new(*proof), Arc::new(record));
                Ok(if *step == INTRODUCE {
                    Self::Introduce { echo: first, challenge: second, proof, record }
                } else {
                    Self::Met { echo: first, proof, record }
                })
            }
            _ => Err(Refusal::Malformed),
        }
    }
}

/// What a node signs to show that it is there now: the other side's challenge. Without this, whoever holds the ring key could
/// bring along somebody else's record.
pub(super) fn proved(cluster: &ClusterId, tag: u64, step: Step, echo: &Challenge) -> Vec<u8> {
    let mut message = b"drover gossip hello 1\0".to_vec();
    message.extend_from_slice(cluster);
    message.extend_from_slice(&tag.to_be_bytes());
    message.push(match step {
        Step::Introduce => INTRODUCE,
        Step::Met => MET,
    });
    message.extend_from_slice(echo);
    message
}

/// The two steps that are signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Introduce,
    Met,
}

/// What a challenge is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To know an answer to what we asked.
    Asked = 1,
    /// To know that somebody is at the address.
    Shown = 2,
}

/// Makes challenges, and knows them again without remembering any.
pub(super) struct Challenges {
    key: hmac::Key,
}

impl Challenges {
    pub(super) fn new(secret: &[u8; 32]) -> Self {
        Self { key: hmac::Key::new(hmac::HMAC_SHA256, secret) }
    }

    pub(super) fn make(&self, now: Time, peer: SocketAddr, purpose: Purpose) -> Challenge {
        self.of(now.0 / SLOT_US, peer, purpose)
    }

    pub(super) fn fits(&self, now: Time, peer: SocketAddr, purpose: Purpose, echo: &Challenge) -> bool {
        let slot = now.0 / SLOT_US;
        [Some(slot), slot.checked_sub(1)].into_iter().flatten().any(|slot| {
            let made = self.of(slot, peer, purpose);
            // Every byte is compared, whatever the first ones are.
            made.iter().zip(echo).fold(0, |different, (a, b)| different | (a ^ b)) == 0
        })
    }

    fn of(&self, slot: u64, peer: SocketAddr, purpose: Purpose) -> Challenge {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(&[purpose as u8]);
        context.update(&slot.to_be_bytes());
        match peer.ip() {
            IpAddr::V4(ip) => context.update(&ip.octets()),
            IpAddr::V6(ip) => context.update(&ip.octets()),
        }
        context.update(&peer.port().to_be_bytes());
        let mut challenge = [0; 16];
        for (to, from) in challenge.iter_mut().zip(context.sign().as_ref()) {
            *to = *from;
        }
        challenge
    }
}
