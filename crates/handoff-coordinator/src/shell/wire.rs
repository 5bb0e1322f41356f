//! The core's messages as they go over the wire. What comes from there is checked here, once.

use drover_proto::transfer::tell_request::Message as Wire;
use drover_proto::transfer::{self as pb, TellRequest};
use drover_types::{Epoch, SessionId};
use prost::Message as _;
use ring::digest::{SHA256, digest};

use crate::core::{Digest, HandoffId, Held, Message, Needs, NodeId, Refusal, Rejection, Rooms};

/// A message that cannot be one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WireError {
    /// A field makes no sense.
    #[error("{0}")]
    Field(String),
    /// A piece of a session was damaged on its way.
    #[error("a piece of a session does not fit its digest")]
    Damaged,
}

/// What another node says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Said {
    /// A step of a handoff.
    Message(Message),
    /// Look after this session.
    Recover(SessionId),
    /// Sessions of this node may go there.
    Relief(Rooms),
    /// A node is to be emptied.
    Ordered,
}

/// Most nodes in one plan; a plan has room for a few sessions.
const ROOMS: usize = 64;

const REJECTIONS: [Rejection; 7] = [
    Rejection::Overloaded,
    Rejection::Full,
    Rejection::NoCapability,
    Rejection::Leaving,
    Rejection::Duplicate,
    Rejection::NoSpace,
    Rejection::TooLarge,
];

fn refusal_name(why: Refusal) -> &'static str {
    match why {
        Refusal::Unknown => "unknown",
        Refusal::Digest => "digest",
        Refusal::Disk => "disk",
        Refusal::Lost => "lost",
    }
}

/// One piece of a session's records.
pub(crate) fn chunk(handoff: HandoffId, offset: u64, data: bytes::Bytes) -> TellRequest {
    let sha256 = bytes::Bytes::copy_from_slice(digest(&SHA256, &data).as_ref());
    TellRequest { handoff: handoff.0, message: Some(Wire::Chunk(pb::Chunk { offset, data, sha256 })) }
}

/// Look after a session.
pub(crate) fn recover(session: &SessionId) -> TellRequest {
    let session_id = session.to_string();
    TellRequest { handoff: 0, message: Some(Wire::Recover(pb::Recover { session_id })) }
}

/// Where a node's sessions may go.
pub(crate) fn relief(rooms: &Rooms) -> TellRequest {
    let rooms = rooms.iter().map(|(node, sessions)| pb::Room { node_id: node.to_string(), sessions: *sessions });
    TellRequest { handoff: 0, message: Some(Wire::Relief(pb::Relief { rooms: rooms.collect() })) }
}

/// A node is to be emptied.
pub(crate) fn ordered() -> TellRequest {
    TellRequest { handoff: 0, message: Some(Wire::Ordered(pb::Ordered {})) }
}

pub(crate) fn encode(message: Message) -> TellRequest {
    let handoff = message.handoff();
    let message = match message {
        Message::Request { session, epoch, attempt, len, needs, fresh, .. } => Wire::Prepare(pb::Prepare {
            session_id: session.to_string(),
            epoch: epoch.0,
            attempt,
            len,
            capabilities: needs.capabilities.into_iter().collect(),
            fresh,
        }),
        Message::Accept { have, taken, .. } => Wire::Accept(pb::Accept { have, taken }),
        Message::Reject { why, .. } => Wire::Reject(pb::Reject { reason: why.as_str().to_owned() }),
        Message::Chunk { offset, bytes, .. } => return chunk(handoff, offset, bytes),
        Message::Received { len, again, .. } => Wire::Received(pb::Received { len, again }),
        Message::Offer { epoch, len, digest, .. } => {
            Wire::Offer(pb::Offer { epoch: epoch.0, len, digest: bytes::Bytes::copy_from_slice(&digest.0) })
        }
        Message::Committed { epoch, .. } => Wire::Committed(pb::Committed { epoch: epoch.0 }),
        Message::Refused { why, .. } => Wire::Refused(pb::Refused { reason: refusal_name(why).to_owned() }),
        Message::Abort { .. } => Wire::Abort(pb::Abort {}),
        Message::Flush { session, turns, .. } => {
            let held = |turn: Held| pb::HeldTurn { request_id: turn.request.to_string(), prompt: turn.prompt };
            Wire::Flush(pb::Flush { session_id: session.to_string(), turns: turns.into_iter().map(held).collect() })
        }
    };
    TellRequest { handoff: handoff.0, message: Some(message) }
}

fn session(text: &str) -> Result<SessionId, WireError> {
    text.parse().map_err(|error: drover_types::IdError| WireError::Field(error.to_string()))
}

pub(crate) fn decode(request: TellRequest) -> Result<Said, WireError> {
    let handoff = HandoffId(request.handoff);
    let missing = || WireError::Field("a message without content".to_owned());
    let message = match request.message.ok_or_else(missing)? {
        Wire::Prepare(prepare) => Message::Request {
            handoff,
            session: session(&prepare.session_id)?,
            epoch: Epoch(prepare.epoch),
            attempt: prepare.attempt,
            len: prepare.len,
            needs: Needs { capabilities: prepare.capabilities.into_iter().collect() },
            fresh: prepare.fresh,
        },
        Wire::Accept(accept) => Message::Accept { handoff, have: accept.have, taken: accept.taken },
        Wire::Reject(reject) => {
            // A reason of a later version is one all the same: another node may take it.
            let why = REJECTIONS.into_iter().find(|why| why.as_str() == reject.reason);
            Message::Reject { handoff, why: why.unwrap_or(Rejection::Full) }
        }
        Wire::Chunk(chunk) => {
            if digest(&SHA256, &chunk.data).as_ref() != chunk.sha256.as_ref() {
                return Err(WireError::Damaged);
            }
            Message::Chunk { handoff, offset: chunk.offset, bytes: chunk.data }
        }
        Wire::Received(received) => Message::Received { handoff, len: received.len, again: received.again },
        Wire::Offer(offer) => {
            let digest = offer.digest.as_ref().try_into();
            let digest = digest.map_err(|_| WireError::Field("a digest has 32 bytes".to_owned()))?;
            Message::Offer { handoff, epoch: Epoch(offer.epoch), len: offer.len, digest: Digest(digest) }
        }
        Wire::Committed(committed) => Message::Committed { handoff, epoch: Epoch(committed.epoch) },
        Wire::Refused(refused) => {
            let all = [Refusal::Unknown, Refusal::Digest, Refusal::Disk, Refusal::Lost];
            let why = all.into_iter().find(|why| refusal_name(*why) == refused.reason);
            Message::Refused { handoff, why: why.unwrap_or(Refusal::Unknown) }
        }
        Wire::Abort(_) => Message::Abort { handoff },
        Wire::Flush(flush) => {
            let held = |turn: pb::HeldTurn| {
                let request = turn.request_id.parse();
                let request = request.map_err(|error: drover_types::IdError| WireError::Field(error.to_string()))?;
                Ok(Held { request, prompt: turn.prompt })
            };
            let turns = flush.turns.into_iter().map(held).collect::<Result<_, WireError>>()?;
            Message::Flush { handoff, session: session(&flush.session_id)?, turns }
        }
        Wire::Recover(recover) => return Ok(Said::Recover(session(&recover.session_id)?)),
        Wire::Relief(relief) => {
            let rooms = relief.rooms.into_iter().take(ROOMS);
            return Ok(Said::Relief(rooms.map(|room| (NodeId::new(&room.node_id), room.sessions)).collect()));
        }
        Wire::Ordered(_) => return Ok(Said::Ordered),
    };
    Ok(Said::Message(message))
}

/// What a message says that another node sent, and the same as we would send it; nothing when it cannot be one. Public for fuzzing.
pub fn understood(bytes: &[u8]) -> Option<(String, Vec<u8>)> {
    let said = decode(TellRequest::decode(bytes).ok()?).ok()?;
    let words = format!("{said:?}");
    let again = match said {
        Said::Message(message) => encode(message),
        Said::Recover(session) => recover(&session),
        Said::Relief(rooms) => relief(&rooms),
        Said::Ordered => ordered(),
    };
    Some((words, again.encode_to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_reads_as_it_was_sent() {
        let (handoff, session): (_, SessionId) = (HandoffId(7 << 60), "s1".parse().unwrap());
        let held = Held { request: "r1".parse().unwrap(), prompt: "p".to_owned() };
        let needs = Needs { capabilities: ["agents=echo".to_owned()].into() };
        let mut all = vec![
            Message::Request {
                handoff,
                session: session.clone(),
                epoch: Epoch(3),
                attempt: 2,
                len: 9,
                needs,
                fresh: true,
            },
            Message::Accept { handoff, have: 5, taken: Some(7) },
            Message::Accept { handoff, have: 5, taken: None },
            Message::Chunk { handoff, offset: 5, bytes: "abc".into() },
            Message::Received { handoff, len: 8, again: true },
            Message::Offer { handoff, epoch: Epoch(3), len: 8, digest: Digest([7; 32]) },
            Message::Committed { handoff, epoch: Epoch(4) },
            Message::Abort { handoff },
            Message::Flush { handoff, session: session.clone(), turns: vec![held] },
        ];
        all.extend(REJECTIONS.map(|why| Message::Reject { handoff, why }));
        all.extend(
            [Refusal::Unknown, Refusal::Digest, Refusal::Disk, Refusal::Lost]
                .map(|why| Message::Refused { handoff, why }),
        );
        for message in all {
            assert_eq!(decode(encode(message.clone())), Ok(Said::Message(message)));
        }
        assert_eq!(decode(recover(&session)), Ok(Said::Recover(session)));
        let rooms = Rooms::from([(NodeId::new("s/1"), 3), (NodeId::new("s/2"), 1)]);
        assert_eq!(decode(relief(&rooms)), Ok(Said::Relief(rooms)));
        assert_eq!(decode(ordered()), Ok(Said::Ordered));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let mut damaged = chunk(HandoffId(1), 0, "abc".into());
        if let Some(Wire::Chunk(chunk)) = &mut damaged.message {
            chunk.data = "abd".into();
        }
        assert_eq!(decode(damaged), Err(WireError::Damaged));
        let recover = pb::Recover { session_id: "../x".to_owned() };
        for message in [
            None,
            Some(Wire::Recover(recover)),
            Some(Wire::Offer(pb::Offer { epoch: 1, len: 1, digest: "short".into() })),
        ] {
            assert!(matches!(decode(TellRequest { handoff: 1, message }), Err(WireError::Field(_))));
        }
    }
}
