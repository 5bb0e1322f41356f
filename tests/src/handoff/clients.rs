//! Clients: each asks one turn after the other, of whichever node it thinks is right, and asks again under the same name until it
//! has an answer.

use std::time::Duration;

use drover_handoff::core::{Asked, Reply, ReplyTo};
use drover_handoff::session::Opening;
use drover_types::{AgentKind, Epoch, RequestId, SessionId};

/// What a client waits for.
#[derive(Debug, Clone)]
pub struct Pending {
    /// The turn's name.
    pub request: RequestId,
    /// What is asked.
    pub prompt: String,
    /// It was acknowledged.
    pub accepted: bool,
}

/// One client of one session.
#[derive(Debug)]
pub struct Client {
    /// Of which session.
    pub session: SessionId,
    /// Turns that it has asked for and that are not answered, in their order.
    pub pending: Vec<Pending>,
    /// The node that it asks.
    pub node: usize,
    /// The newest epoch that it has heard of.
    pub known: Epoch,
    /// Whether the session's turns may be run again.
    pub replayable: bool,
    number: usize,
    asked: usize,
    /// Turns that it asks for in all.
    pub turns: usize,
}

impl Client {
    /// A client that has asked for nothing yet.
    pub fn new(number: usize, session: SessionId, replayable: bool, node: usize, turns: usize) -> Self {
        Self { session, pending: Vec::new(), node, known: Epoch(0), replayable, number, asked: 0, turns }
    }

    /// The next turn, when there is one.
    pub fn next_turn(&mut self) -> Option<RequestId> {
        if self.asked >= self.turns {
            return None;
        }
        let request: RequestId = format!("c{}-{}", self.number, self.asked).parse().expect("a harmless name");
        let prompt = format!("question {} of {}", self.asked, self.number);
        self.asked += 1;
        self.pending.push(Pending { request: request.clone(), prompt, accepted: false });
        Some(request)
    }

    /// All turns are answered.
    pub fn is_done(&self) -> bool {
        self.asked >= self.turns && self.pending.is_empty()
    }

    /// The message for a turn.
    pub fn ask(&self, request: &RequestId, reply: ReplyTo, now: Duration) -> Option<Asked> {
        let pending = self.pending.iter().find(|pending| pending.request == *request)?;
        let opening = Opening {
            agent: AgentKind::Echo,
            replayable: self.replayable,
            capabilities: ["echo".to_owned()].into(),
            metadata: std::collections::BTreeMap::new(),
            at_us: 0,
        };
        Some(Asked {
            session: self.session.clone(),
            request: request.clone(),
            prompt: pending.prompt.clone(),
            reply,
            known: self.known,
            open: Some(opening),
            at_us: now.as_micros() as u64,
        })
    }

    /// It hears something about a turn. Says when it asks again, and whether the turn is over.
    pub fn hear(
        &mut self,
        request: &RequestId,
        reply: &Reply,
        node_of: impl Fn(&str) -> usize,
    ) -> (Option<Duration>, bool) {
        let Some(at) = self.pending.iter().position(|pending| pending.request == *request) else {
            return (None, false);
        };
        match reply {
            Reply::Accepted { epoch, .. } => {
                self.pending[at].accepted = true;
                self.known = self.known.max(*epoch);
                (None, false)
            }
            Reply::Answer { epoch, .. } => {
                self.pending.remove(at);
                self.known = self.known.max(*epoch);
                (None, true)
            }
            Reply::Redirect(record) => {
                self.node = node_of(record.owner.node.as_str());
                self.known = self.known.max(record.epoch);
                (Some(Duration::from_millis(1)), false)
            }
            Reply::Retry => (Some(Duration::from_millis(200)), false),
            Reply::Refused(_) | Reply::Closed | Reply::Interrupted { .. } => (Some(Duration::from_secs(1)), false),
        }
    }
}
