//! Effects of the core, performed.

use bytes::Bytes;
use drover_handoff::core::{Cause, ClaimOutcome, Effect, Event, Input, Message, NodeId, Reserved};
use drover_handoff::session::{Outcome, TurnFault};
use rand::Rng as _;

use super::super::shared::Missing;
use super::World;
use super::parts::{Agent, Happening, Op};

impl World {
    pub(super) fn perform(&mut self, node: usize, effect: Effect) {
        self.say(|| format!("   {node} -> {effect:?}"));
        self.mix(self.effects << 8 | node as u64);
        let start = self.nodes[node].start;
        let owner = self.nodes[node].engine.me().clone();
        match effect {
            Effect::Reply { to, session, reply } => self.reply(node, to, &session, reply),
            Effect::Send { to, message } => self.send(node, &to, &message),
            Effect::SendChunk { to, handoff, session, offset, len } => {
                let local = self.nodes[node].local.entry(session).or_default();
                let end = ((offset + len) as usize).min(local.bytes.len());
                let mut bytes = local.bytes[(offset as usize).min(end)..end].to_vec();
                if !bytes.is_empty() && self.rng.random_bool(self.weather.damage) {
                    let at = self.rng.random_range(0..bytes.len());
                    bytes[at] ^= 1;
                }
                self.send(node, &to, &Message::Chunk { handoff, offset, bytes: Bytes::from(bytes) });
            }
            Effect::Look { session } => self.operation(node, Op::Look(session)),
            Effect::Claim { record } => {
                if self.missing == Some(Missing::ClaimBeforeReading)
                    && matches!(record.cause, Cause::TakenOver | Cause::Recovered)
                    && let Some(files) = self.shared.sessions.get(&record.session)
                {
                    let early = files.read(record.epoch, self.missing);
                    self.nodes[node].early.insert(record.session.clone(), early);
                }
                if self.weather.unknown > 0.0 && self.rng.random_bool(self.weather.unknown) {
                    // It happens late, or not at all, and the node is not told.
                    let (session, epoch) = (record.session.clone(), record.epoch);
                    self.later(node, 500..2_000, Input::Claimed { session, epoch, outcome: ClaimOutcome::Unknown });
                    if self.rng.random_bool(0.6) {
                        let late = self.span(0..4_000_000);
                        self.schedule(late, Happening::Op { node, start: u32::MAX, op: Op::Claim(record) });
                    }
                } else {
                    self.operation(node, Op::Claim(record));
                }
            }
            Effect::Load { session, epoch } => self.operation(node, Op::Load(session, epoch)),
            Effect::Append { session, epoch, first, records } => {
                self.judge.acts(&session, epoch, &owner);
                let unknown = self.weather.unknown > 0.0 && self.rng.random_bool(self.weather.unknown);
                let local = self.nodes[node].local.entry(session.clone()).or_default();
                if local.journal.0 != epoch {
                    local.journal = (epoch, 0);
                }
                let offset = local.journal.1;
                let op = Op::Append { session, epoch, first, records, offset, looked: false, unknown };
                self.operation(node, op);
            }
            Effect::Park { session, epoch, handoff } => {
                self.nodes[node].agents.remove(&session);
                self.later(node, 100..5_000, Input::Parked { session, epoch, handoff });
            }
            Effect::Reserve { handoff, session, fresh, .. } => {
                let copy = self.nodes[node].copies.entry(session).or_default();
                if fresh {
                    copy.clear();
                }
                let have = copy.len() as u64;
                self.later(node, 50..1_000, Input::Reserved { handoff, outcome: Reserved::Room(have) });
            }
            Effect::Write { handoff, session, offset, bytes } => {
                let copy = self.nodes[node].copies.entry(session).or_default();
                copy.truncate(offset as usize);
                copy.extend_from_slice(&bytes);
                let len = Some(copy.len() as u64);
                self.later(node, 50..1_000, Input::Written { handoff, len });
            }
            Effect::Install { handoff, len, digest, record } => {
                self.install(node, handoff, &record.session, len, digest);
            }
            // Kept, so that the next attempt need not begin at the beginning.
            Effect::Discard { .. } | Effect::Suspect { .. } => {}
            Effect::Run { session, epoch, turn, .. } => {
                self.judge.acts(&session, epoch, &owner);
                self.lives += 1;
                let agent = Agent { life: self.lives, epoch, turn, step: 0 };
                self.nodes[node].agents.insert(session.clone(), agent);
                self.schedule_agent(node, &session);
            }
            Effect::Interrupt { session, epoch, turn } => {
                let agents = &mut self.nodes[node].agents;
                if agents.get(&session).is_some_and(|agent| (agent.epoch, agent.turn) == (epoch, turn)) {
                    agents.remove(&session);
                    let outcome = Outcome::Failed { fault: TurnFault::Interrupted, message: owner.to_string() };
                    let ended = Input::Ended { session, epoch, turn, outcome, notes: Vec::new(), at_us: 0 };
                    self.later(node, 100..5_000, ended);
                }
            }
            Effect::Call { session, epoch, call } => {
                self.judge.acts(&session, epoch, &owner);
                let after = self.span(100..200_000);
                self.schedule(after, Happening::Op { node, start, op: Op::Tool { session, epoch, call } });
            }
            Effect::Resume { session, epoch, call } => {
                self.judge.acts(&session, epoch, &owner);
                if let Some(agent) = self.nodes[node].agents.get_mut(&session).filter(|agent| agent.turn == call.turn)
                    && agent.step == call.n
                {
                    agent.step += 1;
                    self.schedule_agent(node, &session);
                }
            }
            Effect::Stop { session, .. } => {
                self.nodes[node].agents.remove(&session);
            }
            Effect::Event(event) => {
                if let Event::Serving { session, .. } = &event {
                    self.serving.insert(session.clone(), node);
                }
                self.judge.event(self.now, &owner, &event);
            }
        }
    }

    pub(super) fn send(&mut self, from: usize, to: &NodeId, message: &Message) {
        let Some(to) = self.nodes.iter().position(|node| node.id == *to) else { return };
        if self.cut.contains(&(from, to)) || self.rng.random_bool(self.weather.loss) {
            return;
        }
        let times = if self.rng.random_bool(self.weather.twice) { 2 } else { 1 };
        for _ in 0..times {
            let mut after = self.span(50..self.weather.way.max(51));
            if self.weather.twice > 0.0 && self.rng.random_bool(0.01) {
                // An old one turns up when nobody thinks of it.
                after += self.span(0..20_000_000);
            }
            self.schedule(after, Happening::Said { from, to, message: message.clone() });
        }
    }
}
