//! What the core decides, carried out.

use drover_service::now_us;
use tracing::{debug, info};

use super::{Node, STREAMS};
use crate::core::{Cause, Effect, Engine as _, Event, Input, NodeKey, Note, Outcome, Request, Time, Untrusted};
use crate::events::Kind;
use crate::shell::handle::{Change, Handle, Phase};
use crate::shell::streams::{self, Ended};
use crate::shell::view;

/// Clocks that differ by more are worth a word.
const SKEW_US: i64 = 60_000_000;

impl Node {
    pub(super) fn perform(&mut self, now: Time, effect: Effect) {
        match effect {
            Effect::Send { to, message } => self.send(to, &message),
            Effect::Hello { addr } => {
                let mut sealed = std::mem::take(&mut self.sealed);
                self.link.hello(self.moment(), addr, &mut sealed);
                if !sealed.is_empty() {
                    self.socket.send(addr, &sealed);
                }
                self.sealed = sealed;
            }
            Effect::Stream { id, to, request } => self.stream(id, to, request),
            Effect::Reply { id, reply } => {
                if let Some(tell) = self.replies.remove(&id) {
                    let _ = tell.send(reply);
                }
            }
            Effect::Learn(record) => {
                self.link.learn(&record);
                self.look_for_ring(&record);
                self.peers.insert(record.key, record);
            }
            Effect::Forget(key) => {
                self.link.forget(key);
                if let Some(record) = self.peers.remove(&key) {
                    self.tell(|| Change::Removed(record.record.node_id.clone()));
                }
                self.count();
            }
            Effect::Local(record) => {
                self.link.local(&record);
                self.tell_local(now);
            }
            Effect::Event(event) => self.event(now, &event),
            Effect::Persist => self.writer.put(self.core.snapshot()),
            Effect::LeaveDone => self.handle.set_phase(Phase::Left),
            Effect::Note(note) => self.note(&note),
        }
    }

    fn stream(&mut self, id: u32, to: NodeKey, request: Request) {
        let kind = match request {
            Request::Pull(_) => "pull",
            Request::Push(_) => "push",
            Request::Ping => "ping",
        };
        let peer = self.peer(to);
        let (Some(peer), true) = (peer, self.running < STREAMS) else {
            return self.fail_stream(id);
        };
        self.running += 1;
        self.metrics().stream(kind);
        let (dial, tell, ping) = (self.dial.clone(), self.ended.clone(), self.settings.gossip_interval);
        self.ctx.spawn("exchange", async move {
            let ended = streams::ask(dial, peer, request, ping).await;
            // There is a place for each that may be under way.
            let _ = tell.try_send((id, ended, to));
        });
    }

    /// The outcome comes with the next turn, never while the core is still speaking.
    fn fail_stream(&self, id: u32) {
        let (tell, key) = (self.ended.clone(), NodeKey::default());
        let ended = Ended { outcome: Outcome::Silent, skew_us: None, why: None };
        self.ctx.spawn("exchange", async move {
            let _ = tell.send((id, ended, key)).await;
        });
    }

    pub(super) fn stream_ended(&mut self, id: u32, ended: Ended, peer: NodeKey) {
        if peer != NodeKey::default() {
            self.running = self.running.saturating_sub(1);
        }
        let name = self.peers.get(&peer).map(|record| record.record.node_id.clone()).unwrap_or_default();
        if let Some(why) = &ended.why {
            self.metrics().stream("failed");
            debug!(node_id = name, why, "exchange over a connection came to nothing");
        }
        if let Some(skew) = ended.skew_us {
            self.handle.compare_clocks(&name, skew);
        }
        self.input(Input::StreamEnded { id, outcome: ended.outcome });
    }

    fn event(&mut self, now: Time, event: &Event) {
        let load_of = |node: &Self, key| node.seen(key).and_then(|seen| seen.load).unwrap_or_default();
        let (kind, key) = match event {
            Event::Joined(record) => {
                self.handle.set_phase(Phase::Joined);
                (Some(Kind::NodeJoined(view::info(&record.record, load_of(self, record.key)))), record.key)
            }
            Event::Left { record, cause: cause_of } => {
                let cause = match cause_of {
                    Cause::Dead => "it did not answer",
                    Cause::Left => "it said good-bye",
                    Cause::Restarted => "it was started again",
                    Cause::Distrusted => "its certificate is not believed any more",
                };
                info!(node_id = record.record.node_id, cause, "node is gone");
                if *cause_of == Cause::Distrusted {
                    // What it sends is not opened any more; to say hello it would need another certificate.
                    self.link.forget(record.key);
                }
                (Some(Kind::NodeLeft(record.record.node_id.clone())), record.key)
            }
            Event::Suspect(record) => (Some(Kind::NodeSuspect(record.record.node_id.clone())), record.key),
            Event::Alive(record) => {
                (Some(Kind::NodeAlive(view::info(&record.record, load_of(self, record.key)))), record.key)
            }
            Event::Updated(record) => (None, record.key),
            Event::Load { key, .. } => (None, *key),
        };
        if let Some(kind) = kind {
            self.handle.shared.events.publish(now_us(), kind);
            self.count();
        }
        if let (Some(record), Some(seen)) = (self.core.record(key).cloned(), self.seen(key)) {
            self.tell(|| Change::Changed(Box::new(view::member(&record.record, seen, now))));
        }
    }

    fn note(&mut self, note: &Note) {
        let now = now_us();
        match *note {
            Note::SeedSilent { addr, attempts } if self.seeds.contains(&addr) => {
                let message = format!("seed {addr} does not answer, tried {attempts} times");
                self.notes().notice(now, "seed_unreachable", message);
            }
            Note::SeedSilent { addr, .. } => debug!(%addr, "a node of the last run does not answer"),
            Note::OwnPause(lag) => {
                self.pauses += 1;
                self.metrics().own_pauses.inc();
                info!(?lag, "this process did not run for a while; nobody is given up for that time");
            }
            Note::Refuted { incarnation, accuser } => {
                info!(incarnation, %accuser, "this node was thought to be dead and has said that it is not");
            }
            Note::Rival { addr } => {
                let message = format!("another process at {addr} runs under the name of this node");
                self.notes().notice(now, "name_taken", message);
            }
            Note::Untrusted { key, reason } => {
                self.count_refusal("untrusted");
                let code = if reason == Untrusted::ExpiredCert { "clock_off" } else { "bad_certificate" };
                self.notes().notice(now, code, format!("a record of node {key} is not believed: {reason}"));
            }
            Note::StrangerAccused { .. } => {
                self.count_refusal("stranger");
            }
            Note::UpdateRefused(error) => tracing::warn!(%error, "metadata was not changed"),
            Note::Exchanged { with, news } => debug!(%with, news, "state exchanged"),
            Note::ProbeFailed { target, refused } => debug!(%target, refused, "no answer to a probe"),
            Note::Health(score) => {
                self.metrics().local_health.set(i64::from(score));
                debug!(score, "health of this node");
            }
        }
    }
}

impl Handle {
    /// Says so when the clock of another node differs from ours by much; `skew_us` is theirs minus ours.
    pub(crate) fn compare_clocks(&self, node_id: &str, skew_us: i64) {
        if skew_us.abs() <= SKEW_US {
            return;
        }
        let (by, how) = (skew_us.unsigned_abs() / 1_000_000, if skew_us > 0 { "ahead of" } else { "behind" });
        let message = format!("the clock of {node_id} is {by} s {how} this node's");
        self.shared.notes.notice(now_us(), "clock_off", message);
    }
}
