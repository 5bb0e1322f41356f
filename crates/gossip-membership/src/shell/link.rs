//! Datagrams between the core's messages and the socket: sealed, or in the clear when that is asked for.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::core::{NodeKey, SignedRecord};
use crate::seal::{Moment, Opened, Refusal, Sealer};

/// Marks a datagram in the clear, with its layout.
const PLAIN: [u8; 2] = [0xd7, 1];
const HELLO: u8 = 0;
const HELLO_ANSWER: u8 = 1;
const MESSAGE: u8 = 2;

/// Without keys: everybody on the network is believed.
#[derive(Debug)]
pub(super) struct PlainLink {
    own: Arc<SignedRecord>,
}

impl PlainLink {
    pub(super) fn new(own: Arc<SignedRecord>) -> Self {
        Self { own }
    }

    pub(super) fn local(&mut self, record: &Arc<SignedRecord>) {
        self.own = Arc::clone(record);
    }

    fn head(&self, kind: u8, out: &mut Vec<u8>) {
        out.clear();
        out.extend_from_slice(&PLAIN);
        out.push(kind);
        out.extend_from_slice(&self.own.key.0.to_be_bytes());
    }

    fn introduce(&self, kind: u8, out: &mut Vec<u8>) {
        self.head(kind, out);
        if self.own.encode(false, out).is_err() {
            out.clear();
        }
    }

    pub(super) fn hello(&mut self, out: &mut Vec<u8>) {
        self.introduce(HELLO, out);
    }

    pub(super) fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) {
        self.head(MESSAGE, out);
        out.extend_from_slice(plain);
    }

    pub(super) fn open(&mut self, datagram: &[u8], out: &mut Vec<u8>) -> Result<Opened, Refusal> {
        out.clear();
        let (head, rest) = datagram.split_first_chunk::<11>().ok_or(Refusal::Truncated)?;
        if head[..2] != PLAIN {
            return Err(Refusal::UnknownVersion);
        }
        let mut key = [0; 8];
        key.copy_from_slice(&head[3..]);
        let from = NodeKey(u64::from_be_bytes(key));
        if from == self.own.key {
            return Err(Refusal::Replayed);
        }
        match head[2] {
            MESSAGE => {
                out.extend_from_slice(rest);
                Ok(Opened::Message(from))
            }
            kind @ (HELLO | HELLO_ANSWER) => {
                let (record, rest) = SignedRecord::decode(rest).map_err(|_| Refusal::Malformed)?;
                if !rest.is_empty() || record.key != from {
                    return Err(Refusal::Malformed);
                }
                let answer = kind == HELLO;
                if answer {
                    self.introduce(HELLO_ANSWER, out);
                }
                Ok(Opened::Contact { record: Arc::new(record), answer })
            }
            _ => Err(Refusal::Malformed),
        }
    }
}

/// The way datagrams take.
pub(super) enum Link {
    /// In the clear.
    Plain(PlainLink),
    /// Sealed, between nodes that know each other's certified records.
    Sealed(Box<Sealer>),
}

impl Link {
    /// This node's own record has changed.
    pub(super) fn local(&mut self, record: &Arc<SignedRecord>) {
        match self {
            Self::Plain(link) => link.local(record),
            Self::Sealed(sealer) => sealer.local(Arc::clone(record)),
        }
    }

    /// The first datagram to somebody unknown.
    pub(super) fn hello(&mut self, at: Moment, to: SocketAddr, out: &mut Vec<u8>) {
        match self {
            Self::Plain(link) => link.hello(out),
            Self::Sealed(sealer) => sealer.hello(at, to, out),
        }
    }

    /// A datagram to a known node; `out` stays empty when that is not possible.
    pub(super) fn seal(&mut self, to: NodeKey, plain: &[u8], out: &mut Vec<u8>) {
        out.clear();
        match self {
            Self::Plain(link) => link.seal(plain, out),
            Self::Sealed(sealer) => {
                sealer.seal(to, plain, out);
            }
        }
    }

    /// Opens a datagram; what is in it, or is to be sent back, is put into `out`, also when it is refused.
    pub(super) fn open(
        &mut self,
        at: Moment,
        from: SocketAddr,
        datagram: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Opened, Refusal> {
        match self {
            Self::Plain(link) => link.open(datagram, out),
            Self::Sealed(sealer) => sealer.open(at, from, datagram, out),
        }
    }

    /// A node's newest record, checked by the core.
    pub(super) fn learn(&mut self, record: &SignedRecord) {
        match self {
            Self::Plain(_) => {}
            Self::Sealed(sealer) => sealer.learn(record),
        }
    }

    /// A node is gone for good.
    pub(super) fn forget(&mut self, key: NodeKey) {
        match self {
            Self::Plain(_) => {}
            Self::Sealed(sealer) => sealer.forget(key),
        }
    }

    /// What seals, when something does.
    pub(super) fn sealer(&self) -> Option<&Sealer> {
        match self {
            Self::Plain(_) => None,
            Self::Sealed(sealer) => Some(sealer),
        }
    }

    /// What seals, to change its ring.
    pub(super) fn sealer_mut(&mut self) -> Option<&mut Sealer> {
        match self {
            Self::Plain(_) => None,
            Self::Sealed(sealer) => Some(sealer),
        }
    }
}
