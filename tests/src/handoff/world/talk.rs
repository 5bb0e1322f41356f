//! What clients ask and hear, and what agents say.

use std::time::Duration;

use drover_handoff::core::{Call, Input, Reply, ReplyTo};
use drover_handoff::session::Outcome;
use drover_types::{RequestId, SessionId};
use rand::Rng as _;

use super::World;
use super::parts::Happening;

/// A client that hears nothing asks again after this.
const PATIENCE: Duration = Duration::from_millis(1500);

impl World {
    pub(super) fn next(&mut self, client: usize) {
        if let Some(request) = self.clients[client].next_turn() {
            self.ask(client, &request);
            // Some do not wait for one answer before they ask the next thing.
            if self.clients[client].pending.len() < 2 && self.rng.random_bool(0.2) {
                let after = self.span(0..3_000);
                self.schedule(after, Happening::Next { client });
            }
        }
    }

    pub(super) fn ask(&mut self, client: usize, request: &RequestId) {
        let number = self.tries.entry(request.clone()).or_default();
        *number += 1;
        let try_number = *number;
        let mut nodes = vec![self.clients[client].node];
        if self.rng.random_bool(self.weather.twice) {
            nodes.push(self.rng.random_range(0..self.nodes.len()));
        }
        for node in nodes {
            if !self.rng.random_bool(self.weather.loss) {
                let after = self.span(50..self.weather.way.max(51));
                self.schedule(after, Happening::Asked { client, request: request.clone(), node });
            }
        }
        self.schedule(PATIENCE, Happening::Again { client, request: request.clone(), try_number });
    }

    pub(super) fn hear(&mut self, client: usize, request: &RequestId, reply: &Reply) {
        let nodes = &self.nodes;
        let node_of = |name: &str| nodes.iter().position(|node| node.id.as_str() == name).unwrap_or(0);
        let (again, over) = self.clients[client].hear(request, reply, node_of);
        if let Some(after) = again {
            let number = self.tries.entry(request.clone()).or_default();
            *number += 1;
            let try_number = *number;
            self.schedule(after, Happening::Again { client, request: request.clone(), try_number });
        }
        if over {
            let after = self.span(1_000..400_000);
            self.schedule(after, Happening::Next { client });
        }
    }

    pub(super) fn reply(&mut self, node: usize, to: ReplyTo, session: &SessionId, reply: Reply) {
        let Some((client, request)) = self.replies.get(&to).cloned() else { return };
        let owner = self.nodes[node].engine.me().clone();
        match &reply {
            Reply::Accepted { turn, epoch } => {
                self.judge.acts(session, *epoch, &owner);
                self.judge.acknowledges(session, &request, *turn);
            }
            Reply::Answer { turn, epoch } => {
                self.judge.acts(session, *epoch, &owner);
                let outcome = self.nodes[node].local.get(session).and_then(|local| local.outcomes.get(turn)).cloned();
                let lost = Outcome::Answer("nothing on this node's disk".into());
                self.judge.answers(session, &request, *turn, &outcome.unwrap_or(lost));
            }
            _ => {}
        }
        if !self.rng.random_bool(self.weather.loss) {
            let after = self.span(50..self.weather.way.max(51));
            self.schedule(after, Happening::Heard { client, request, reply });
        }
    }

    pub(super) fn agent(&mut self, node: usize, session: &SessionId, life: u64) {
        let slot = &mut self.nodes[node];
        let Some(agent) = slot.agents.get_mut(session).filter(|agent| agent.life == life) else { return };
        let (epoch, turn, step) = (agent.epoch, agent.turn, agent.step);
        let local = slot.local.entry(session.clone()).or_default();
        let prompt = local.prompts.get(&turn).cloned().unwrap_or_default();
        let calls = prompt.bytes().map(u32::from).sum::<u32>() % 3;
        let session = session.clone();
        if step < calls {
            let call = Call { turn, n: step };
            self.feed(node, Input::Called { session, epoch, call, what: "tool".into() });
        } else {
            let owner = slot.engine.me();
            // Names who answered, so that an answer that was given twice shows.
            let text = format!("{prompt}: turn {}, {owner} in {}", turn.0, epoch.0);
            let outcome = Outcome::Answer(text);
            slot.agents.remove(&session);
            self.feed(node, Input::Ended { session, epoch, turn, outcome, notes: Vec::new(), at_us: 0 });
        }
    }

    pub(super) fn schedule_agent(&mut self, node: usize, session: &SessionId) {
        let Some(agent) = self.nodes[node].agents.get(session) else { return };
        let (life, start) = (agent.life, self.nodes[node].start);
        let after = self.span(500..60_000);
        self.schedule(after, Happening::Agent { node, start, session: session.clone(), life });
    }
}
