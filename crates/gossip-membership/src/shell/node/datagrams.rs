//! What comes in and goes out over UDP, and why some of it is dropped.

use std::net::SocketAddr;
use std::sync::Arc;

use drover_service::now_us;
use tracing::debug;

use super::Node;
use crate::core::{Input, Message, NodeKey, SignedRecord};
use crate::seal::{Opened, Refusal};
use crate::shell::socket::MAX_DATAGRAM;
use crate::wire;

/// Addresses whose answer to a hello is remembered.
const ANSWERED: usize = 256;

impl Node {
    pub(super) fn receive(&mut self) {
        // What comes is opened while the socket is read; the core's turn is after each datagram.
        let mut batch = Vec::new();
        self.socket.drain(|from, datagram| batch.push((from, datagram.to_vec())));
        for (from, datagram) in batch {
            self.datagram(from, &datagram);
        }
    }

    fn datagram(&mut self, from: SocketAddr, datagram: &[u8]) {
        if datagram.len() > MAX_DATAGRAM {
            return self.refused_here(Refusal::Oversized, from);
        }
        let mut plain = std::mem::take(&mut self.plain);
        match self.link.open(self.moment(), from, datagram, &mut plain) {
            Ok(Opened::Message(key)) => match wire::decode(&plain) {
                Ok(message) => self.input(Input::Datagram { from: key, message }),
                Err(_) => self.refused_here(Refusal::Malformed, from),
            },
            Ok(Opened::Contact { record, answer }) => {
                if answer {
                    self.socket.send(from, &plain);
                }
                self.contact(from, record);
            }
            Ok(Opened::Answer) => self.socket.send(from, &plain),
            Ok(Opened::Hint(why)) => self.refused_there(why, from),
            Err(why) => {
                if !plain.is_empty() {
                    self.socket.send(from, &plain);
                }
                self.refused_here(why, from);
            }
        }
        self.plain = plain;
    }

    fn contact(&mut self, from: SocketAddr, record: Arc<SignedRecord>) {
        self.notes().over("seed_unreachable");
        self.handle.shared.answered.send_if_modified(|all| {
            let fresh = !all.contains(&from);
            if fresh {
                if all.len() == ANSWERED {
                    all.remove(0);
                }
                all.push(from);
            }
            fresh
        });
        self.input(Input::Contact { record });
    }

    pub(super) fn count_refusal(&mut self, reason: &'static str) {
        *self.refused.entry(reason).or_default() += 1;
        self.metrics().refuse(reason);
    }

    /// A datagram was dropped.
    fn refused_here(&mut self, why: Refusal, from: SocketAddr) {
        self.count_refusal(why.code());
        debug!(reason = why.code(), %from, "datagram dropped");
        let code = match why {
            Refusal::UnknownKey => "wrong_key",
            Refusal::WrongCluster => "wrong_cluster",
            Refusal::BadCert | Refusal::ForeignName => "bad_certificate",
            Refusal::ExpiredCert | Refusal::Future => "clock_off",
            Refusal::Plaintext => "plaintext_peer",
            _ => return,
        };
        self.notes().notice(now_us(), code, format!("a datagram of {from} was dropped: {why}"));
    }

    /// Another node says that it dropped one of ours.
    fn refused_there(&self, why: Refusal, from: SocketAddr) {
        let code = match why {
            Refusal::UnknownKey => "wrong_key",
            Refusal::WrongCluster => "wrong_cluster",
            Refusal::BadCert | Refusal::ForeignName => "bad_certificate",
            Refusal::ExpiredCert | Refusal::Future => "clock_off",
            // A node that has just started knows nobody yet.
            _ => return,
        };
        self.notes().notice(now_us(), code, format!("{from} drops what this node sends: {why}"));
    }

    pub(super) fn send(&mut self, to: NodeKey, message: &Message) {
        let Some(addr) = self.peers.get(&to).map(|record| record.record.addr) else { return };
        let (mut plain, mut sealed) = (std::mem::take(&mut self.plain), std::mem::take(&mut self.sealed));
        plain.clear();
        wire::encode(message, &mut plain);
        self.link.seal(to, &plain, &mut sealed);
        if !sealed.is_empty() {
            self.socket.send(addr, &sealed);
        }
        (self.plain, self.sealed) = (plain, sealed);
    }
}
