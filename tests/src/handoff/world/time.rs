//! Time: what happens next, to whom it comes, and what a node is fed with.

use std::cmp::Reverse;
use std::time::Duration;

use drover_handoff::core::{ClaimOutcome, Input, ReplyTo};
use rand::Rng as _;

use super::World;
use super::parts::{Happening, Process, Scheduled};

/// An episode takes a small part of this; more is nodes that keep each other busy.
const MOST_EFFECTS: u64 = 2_000_000;

impl World {
    /// Lets virtual time pass.
    pub fn run_for(&mut self, span: Duration) {
        let end = self.now + span;
        while let Some(Reverse(next)) = self.queue.peek()
            && next.at <= end
        {
            self.step();
            if self.effects > MOST_EFFECTS {
                self.judge.storm();
                break;
            }
        }
        self.now = end;
    }

    pub(super) fn step(&mut self) {
        let Some(Reverse(Scheduled { at, what, .. })) = self.queue.pop() else { return };
        self.now = self.now.max(at);
        match what {
            Happening::Timer { node, start } => {
                let slot = &mut self.nodes[node];
                if slot.start == start && slot.timer == at && slot.process == Process::Running {
                    slot.timer = Duration::MAX;
                    self.feed(node, Input::Tick);
                }
            }
            Happening::Wake { node, start } => self.wake(node, start),
            Happening::Start { node } => self.start(node),
            Happening::Joined { a, b } => {
                self.cut.remove(&(a, b));
            }
            Happening::Reached { node } => {
                self.unreachable.remove(&node);
            }
            Happening::Believed { node } => {
                let killed = self.nodes[node].process == Process::Killed;
                let long = self.now >= self.nodes[node].killed_at + Duration::from_secs(1);
                self.nodes[node].believed_gone = killed && long;
                self.tell_peers();
            }
            Happening::Heard { client, request, reply } => self.hear(client, &request, &reply),
            Happening::Again { client, request, try_number } => {
                if self.tries.get(&request) == Some(&try_number) {
                    // Somewhere else, perhaps.
                    if self.rng.random_bool(0.5) {
                        self.clients[client].node = self.rng.random_range(0..self.nodes.len());
                    }
                    self.ask(client, &request);
                }
            }
            Happening::Next { client } => self.next(client),
            Happening::Op { node, start, op } => self.operate(node, start, op),
            other => self.arrive(other),
        }
    }

    pub(super) fn wake(&mut self, node: usize, start: u32) {
        if self.nodes[node].start != start || self.nodes[node].process != Process::Stopped {
            return;
        }
        self.nodes[node].process = Process::Running;
        self.nodes[node].timer = Duration::MAX;
        self.say(|| format!("node {node} goes on"));
        let timer_first = self.rng.random_bool(0.5);
        if timer_first {
            self.feed(node, Input::Tick);
        }
        for what in std::mem::take(&mut self.nodes[node].waiting) {
            self.arrive(what);
        }
        self.feed(node, Input::Tick);
    }

    /// Something comes to a process, which may be stopped or another one by now.
    pub(super) fn arrive(&mut self, what: Happening) {
        let (node, start) = match &what {
            Happening::Input { node, start, .. }
            | Happening::Kept { node, start, .. }
            | Happening::Agent { node, start, .. } => (*node, Some(*start)),
            Happening::Said { to, .. } => (*to, None),
            Happening::Asked { node, .. } => (*node, None),
            _ => return,
        };
        let slot = &mut self.nodes[node];
        if start.is_some_and(|start| start != slot.start) || slot.process == Process::Killed {
            return;
        }
        if slot.process == Process::Stopped {
            slot.waiting.push_back(what);
            return;
        }
        match what {
            Happening::Input { input, .. } => {
                if let Input::Claimed { session, outcome: ClaimOutcome::Won, epoch } = &input {
                    self.adopt(node, session, *epoch);
                }
                self.feed(node, input);
            }
            Happening::Said { from, message, .. } => {
                let from = self.nodes[from].id.clone();
                self.feed(node, Input::Message { from, message });
            }
            Happening::Asked { client, request, .. } => {
                self.order += 1;
                let reply = ReplyTo(self.order);
                if let Some(asked) = self.clients[client].ask(&request, reply, self.now) {
                    self.replies.insert(reply, (client, request));
                    self.feed(node, Input::Turn(Box::new(asked)));
                }
            }
            Happening::Kept { session, epoch, first, records, outcome, unknown, .. } => {
                self.kept(node, session, epoch, first, &records, outcome, unknown);
            }
            Happening::Agent { session, life, .. } => self.agent(node, &session, life),
            _ => {}
        }
    }

    pub(super) fn feed(&mut self, node: usize, input: Input) {
        if let Some(story) = &mut self.story {
            let name = self.nodes[node].engine.me().clone();
            if !matches!(input, Input::Tick | Input::Peers(_) | Input::Own(_)) {
                story.push(format!("{:?} {name} <- {input:?}", self.now));
            }
        }
        let start = self.nodes[node].start;
        let mut effects = std::mem::take(&mut self.scratch);
        self.nodes[node].engine.handle(self.now, input, &mut effects);
        for effect in effects.drain(..) {
            self.effects += 1;
            if let Some((_, fault)) = self.fault.take_if(|(at, _)| *at == self.effects) {
                self.strike(node, fault);
            }
            if self.weather.kill > 0.0 && self.rng.random_bool(self.weather.kill) {
                let back = Duration::from_millis(self.rng.random_range(10..8_000));
                self.kill(node, back);
            }
            if self.nodes[node].process == Process::Killed || self.nodes[node].start != start {
                break;
            }
            self.perform(node, effect);
        }
        effects.clear();
        self.scratch = effects;
        let slot = &mut self.nodes[node];
        let deadline = slot.engine.deadline();
        if slot.process == Process::Running && deadline < slot.timer {
            let at = deadline.max(self.now);
            slot.timer = at;
            let start = slot.start;
            self.order += 1;
            self.queue.push(Reverse(Scheduled { at, order: self.order, what: Happening::Timer { node, start } }));
        }
    }

    pub(super) fn schedule(&mut self, after: Duration, what: Happening) {
        self.order += 1;
        self.queue.push(Reverse(Scheduled { at: self.now + after, order: self.order, what }));
    }

    pub(super) fn mix(&mut self, part: u64) {
        self.trace = (self.trace ^ part).wrapping_mul(0x0100_0000_01b3).rotate_left(17);
    }

    pub(super) fn span(&mut self, micros: std::ops::Range<u64>) -> Duration {
        Duration::from_micros(self.rng.random_range(micros))
    }

    pub(super) fn later(&mut self, node: usize, micros: std::ops::Range<u64>, input: Input) {
        let (after, start) = (self.span(micros), self.nodes[node].start);
        self.schedule(after, Happening::Input { node, start, input });
    }
}
