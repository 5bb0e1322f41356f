//! What happened, for people and programs: the last events with their numbers, and of each session what befell it here last.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use drover_service::now_us;
use drover_types::SessionId;
use serde_json::{Value, json};
use tokio::sync::{broadcast, watch};
use tracing::{info, warn};

use crate::core::{Event, Failure, NodeId, Why};

/// Events that are kept.
const KEPT: usize = 1024;
/// What is kept of one session, and of how many.
const PER_SESSION: usize = 16;
const SESSIONS: usize = 4096;
/// Events that a reader within this daemon may be behind.
const READER: usize = 4096;

/// One event of the stream.
#[derive(Debug, Clone)]
pub(crate) struct Told {
    pub(crate) seq: u64,
    pub(crate) at_us: u64,
    pub(crate) name: &'static str,
    pub(crate) data: Value,
}

#[derive(Debug, Default)]
struct Inner {
    seq: u64,
    kept: VecDeque<Arc<Told>>,
    sessions: HashMap<SessionId, VecDeque<(u64, String)>>,
    order: VecDeque<SessionId>,
    /// In which epoch each session that leaves set out, and why.
    leaving: BTreeMap<SessionId, (u64, Why)>,
}

/// The events of this node. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Events {
    me: NodeId,
    inner: Arc<Mutex<Inner>>,
    seq: watch::Sender<u64>,
    raw: broadcast::Sender<Event>,
}

impl Events {
    pub(crate) fn new(me: NodeId) -> Self {
        Self { me, inner: Arc::default(), seq: watch::Sender::new(0), raw: broadcast::Sender::new(READER) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The core's own events as they come.
    pub(crate) fn listen(&self) -> broadcast::Receiver<Event> {
        self.raw.subscribe()
    }

    /// Counts up with every event.
    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.seq.subscribe()
    }

    /// Events after a number.
    pub(crate) fn after(&self, seq: u64) -> Vec<Arc<Told>> {
        self.lock().kept.iter().filter(|told| told.seq > seq).cloned().collect()
    }

    /// What befell a session here last.
    pub(crate) fn of(&self, session: &SessionId) -> Vec<(u64, String)> {
        self.lock().sessions.get(session).map(|events| events.iter().cloned().collect()).unwrap_or_default()
    }

    /// A node is reported.
    pub(crate) fn suspected(&self, node: &NodeId) {
        warn!(by = %self.me, node = %node, "a node keeps failing to take sessions and is reported");
    }

    /// Takes an event of the core.
    pub(crate) fn add(&self, event: &Event) {
        let _ = self.raw.send(event.clone());
        let mut inner = self.lock();
        let (session, text) = match event {
            Event::Serving { session, epoch } => {
                info!(session_id = %session, epoch = epoch.0, "serving a session");
                (session, format!("{} serves it, in epoch {epoch}", self.me))
            }
            Event::NotMoved { session, error } => (session, format!("it was to move and did not: {}", say(error))),
            Event::Started { handoff, session, to, epoch, why } => {
                info!(session_id = %session, handoff = %handoff, to = %to, epoch = epoch.0, why = why_name(*why), "handoff started");
                inner.leaving.insert(session.clone(), (epoch.0, *why));
                let operation = self.operation(session, &handoff.to_string(), to, epoch.0, *why);
                inner.publish("HandoffStarted", operation);
                (session, format!("it sets out for {to} because of {} (handoff {handoff})", why_name(*why)))
            }
            Event::Completed { handoff, session, to, epoch, bytes, attempts, frozen, total } => {
                let why = inner.leaving.remove(session).map_or(Why::Operator, |(_, why)| why);
                info!(
                    session_id = %session, handoff = %handoff, to = %to, epoch = epoch.0, bytes, attempts,
                    frozen_ms = frozen.as_millis() as u64, total_ms = total.as_millis() as u64, "handoff completed"
                );
                let mut data = self.operation(session, &handoff.to_string(), to, epoch.0 - 1, why);
                data["result"] = json!({
                    "epoch": epoch.0, "bytes": bytes, "attempts": attempts,
                    "frozen_us": micros(*frozen), "total_us": micros(*total),
                });
                inner.publish("HandoffCompleted", data);
                (session, format!("it arrived at {to} as epoch {epoch} after {} ms", total.as_millis()))
            }
            Event::Failed { handoff, session, to, error, attempts } => {
                let (epoch, why) = inner.leaving.remove(session).unwrap_or((0, Why::Operator));
                warn!(session_id = %session, handoff = %handoff, to = %to, attempts, error = say(error), "handoff failed");
                let mut data = self.operation(session, &handoff.to_string(), to, epoch, why);
                data["error"] = json!({ "code": code(error), "message": say(error), "attempts": attempts });
                inner.publish("HandoffFailed", data);
                (session, format!("handoff {handoff} failed: {}", say(error)))
            }
        };
        inner.note(session, text);
        let seq = inner.seq;
        drop(inner);
        self.seq.send_replace(seq);
    }

    fn operation(&self, session: &SessionId, handoff: &str, to: &NodeId, epoch: u64, why: Why) -> Value {
        json!({
            "handoff_id": handoff, "session_id": session, "from": self.me.as_str(), "to": to.as_str(),
            "epoch": epoch, "reason": why_name(why),
        })
    }
}

impl Inner {
    fn publish(&mut self, name: &'static str, data: Value) {
        self.seq += 1;
        self.kept.push_back(Arc::new(Told { seq: self.seq, at_us: now_us(), name, data }));
        if self.kept.len() > KEPT {
            self.kept.pop_front();
        }
    }

    fn note(&mut self, session: &SessionId, text: String) {
        if !self.sessions.contains_key(session) {
            self.order.push_back(session.clone());
            if self.order.len() > SESSIONS
                && let Some(oldest) = self.order.pop_front()
            {
                self.sessions.remove(&oldest);
            }
        }
        let events = self.sessions.entry(session.clone()).or_default();
        events.push_back((now_us(), text));
        if events.len() > PER_SESSION {
            events.pop_front();
        }
    }
}

fn micros(time: Duration) -> u64 {
    time.as_micros() as u64
}

pub(crate) fn why_name(why: Why) -> &'static str {
    match why {
        Why::Operator => "operator",
        Why::Load => "load",
        Why::Drain => "drain",
    }
}

/// A failure's stable spelling.
pub(crate) fn code(failure: &Failure) -> &'static str {
    match failure {
        Failure::UnknownSession => "unknown_session",
        Failure::UnknownTurn => "unknown_turn",
        Failure::SessionClosed => "session_closed",
        Failure::SessionFull => "session_full",
        Failure::TooLong => "too_long",
        Failure::NotHere => "not_here",
        Failure::Moving => "moving",
        Failure::NoTarget => "no_target",
        Failure::NobodyTook(_) => "nobody_took",
        Failure::Silent => "silent",
        Failure::Refused(_) => "refused",
        Failure::Busy => "busy",
        Failure::Lost => "lost",
    }
}

/// The same in words.
pub(crate) fn say(failure: &Failure) -> String {
    match failure {
        Failure::UnknownSession => "there is no such session".to_owned(),
        Failure::UnknownTurn => "the session has no such turn, or none that runs".to_owned(),
        Failure::SessionClosed => "the session has ended".to_owned(),
        Failure::SessionFull => "the session has as many turns or bytes as one may have; begin another".to_owned(),
        Failure::TooLong => "the prompt is too long".to_owned(),
        Failure::NotHere => "the session is not on this node".to_owned(),
        Failure::Moving => "the session is moving already, or about to be served".to_owned(),
        Failure::NoTarget => "there is no node that could take it".to_owned(),
        Failure::NobodyTook(Some(why)) => format!("no node took it; the last one said: {}", why.as_str()),
        Failure::NobodyTook(None) => "no node took it".to_owned(),
        Failure::Silent => "the other node stopped answering".to_owned(),
        Failure::Refused(why) => format!("the other node would not go on ({why:?})").to_lowercase(),
        Failure::Busy => "a turn ran for longer than a handoff may take".to_owned(),
        Failure::Lost => "another node has taken the session over meanwhile".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use drover_types::Epoch;

    use super::*;
    use crate::core::HandoffId;

    #[test]
    fn events_have_numbers_and_their_operation() {
        let events = Events::new(NodeId::new("s/0"));
        let session: SessionId = "a".parse().unwrap();
        let (handoff, to) = (HandoffId(1), NodeId::new("s/1"));
        events.add(&Event::Serving { session: session.clone(), epoch: Epoch(1) });
        events.add(&Event::Started {
            handoff,
            session: session.clone(),
            to: to.clone(),
            epoch: Epoch(1),
            why: Why::Drain,
        });
        let frozen = Duration::from_millis(3);
        let (bytes, attempts, total) = (7, 1, 2 * frozen);
        let session_id = session.clone();
        events.add(&Event::Completed {
            handoff,
            session: session_id,
            to,
            epoch: Epoch(2),
            bytes,
            attempts,
            frozen,
            total,
        });
        let told = events.after(0);
        assert_eq!(
            told.iter().map(|told| (told.seq, told.name)).collect::<Vec<_>>(),
            [(1, "HandoffStarted"), (2, "HandoffCompleted")]
        );
        assert_eq!(told[1].data["reason"], "drain");
        assert_eq!((&told[1].data["result"]["frozen_us"], &told[1].data["to"]), (&json!(3000), &json!("s/1")));
        assert_eq!(events.after(1).len(), 1);
        assert_eq!(events.of(&session).len(), 3);

        let (to, why) = (NodeId::new("s/2"), Why::Load);
        events.add(&Event::Started { handoff, session: session.clone(), to: NodeId::new("s/1"), epoch: Epoch(2), why });
        let error = Failure::Silent;
        events.add(&Event::Failed { handoff, session, to, error, attempts: 3 });
        let failed = &events.after(3)[0];
        assert_eq!(
            (failed.name, &failed.data["reason"], &failed.data["epoch"]),
            ("HandoffFailed", &json!("load"), &json!(2))
        );
        assert_eq!((&failed.data["to"], &failed.data["error"]["code"]), (&json!("s/2"), &json!("silent")));
    }
}
