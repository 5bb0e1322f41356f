//! Probing: a ping, then others who ping on one's behalf and at the same time a ping over the stream.
//!
//! Every second probe goes to the next node on the ring of keys, so that each node has a watcher of its own and the time until
//! its first missed probe is bounded; the others go round in shuffled order, so that no silent pair can hide a dead node.

use super::effect::{Effect, Note};
use super::engine::Core;
use super::member::{Member, State};
use super::message::{Accusation, Message, Request, Rumor};
use super::record::NodeKey;
use super::settings::Settings;
use super::time::Time;

#[derive(Debug)]
pub(super) struct Prober {
    /// When the next probe begins.
    pub(super) next: Time,
    /// The next one goes to the neighbour on the ring.
    ring: bool,
    seq: u32,
    probes: Vec<Probe>,
    relays: Vec<Relay>,
}

#[derive(Debug)]
struct Probe {
    target: NodeKey,
    seq: u32,
    /// When the wait for the direct answer ends; never again once others have been asked.
    direct: Time,
    end: Time,
    asked: usize,
    nacks: usize,
    stream: Option<u32>,
}

/// A ping on behalf of another node.
#[derive(Debug)]
struct Relay {
    seq: u32,
    asker: NodeKey,
    asker_seq: u32,
    target: NodeKey,
    /// When the asker is told that there was no answer.
    nack: Time,
    /// Until when a late answer is still passed on.
    end: Time,
}

impl Prober {
    /// Most probes and most relays under way at once.
    const MOST: usize = 64;

    pub(super) fn new(now: Time) -> Self {
        Self { next: now, ring: true, seq: 0, probes: Vec::new(), relays: Vec::new() }
    }

    pub(super) fn deadline(&self) -> Time {
        let probes = self.probes.iter().map(|probe| probe.direct.min(probe.end));
        let relays = self.relays.iter().map(|relay| relay.nack.min(relay.end));
        probes.chain(relays).fold(self.next, Time::min)
    }

    /// Whatever is under way will not be judged.
    pub(super) fn forget(&mut self) {
        self.probes.clear();
        self.relays.clear();
    }

    fn is_probing(&self, target: NodeKey) -> bool {
        self.probes.iter().any(|probe| probe.target == target)
    }

    /// The node is there: a probe of it has its answer.
    pub(super) fn answered(&mut self, target: NodeKey) {
        self.probes.retain(|probe| probe.target != target);
    }

    fn next_seq(&mut self) -> u32 {
        self.seq = self.seq.wrapping_add(1);
        self.seq
    }
}

impl Core {
    /// What a node must be told before anything else: that it is suspect, or given up. Only it can answer that.
    pub(super) fn notice_for(&self, key: NodeKey) -> Vec<Rumor> {
        let Some(member) = self.table.get(key) else { return Vec::new() };
        let (boot, incarnation) = member.version();
        let refused = member.suspicion.as_ref().is_some_and(|suspicion| suspicion.refused);
        let accusation = Accusation { key, boot, incarnation, accuser: self.me, refused };
        match member.state {
            State::Alive | State::Left => Vec::new(),
            State::Suspect => vec![Rumor::Suspect(accusation)],
            State::Dead => vec![Rumor::Dead(accusation)],
        }
    }

    /// Probes a node now, unless that is under way.
    pub(super) fn probe(&mut self, target: NodeKey, out: &mut Vec<Effect>) {
        if self.prober.is_probing(target) || self.prober.probes.len() >= Prober::MOST {
            return;
        }
        if self.table.get(target).is_none() {
            return;
        }
        let seq = self.prober.next_seq();
        let direct = self.now + self.health.scale(self.settings.direct_timeout());
        let end = self.now + self.health.scale(self.settings.probe_timeout());
        self.prober.probes.push(Probe { target, seq, direct, end, asked: 0, nacks: 0, stream: None });
        self.ping(target, seq, out);
    }

    /// Probes a node over all ways at once.
    pub(super) fn probe_by_all_means(&mut self, target: NodeKey, out: &mut Vec<Effect>) {
        self.prober.answered(target);
        self.probe(target, out);
        if let Some(at) = self.prober.probes.iter().position(|probe| probe.target == target) {
            self.ask_others(at, out);
        }
    }

    fn ping(&mut self, target: NodeKey, seq: u32, out: &mut Vec<Effect>) {
        let first = self.notice_for(target);
        let rumors = self.news(first);
        let digest = super::engine::Engine::digest(self);
        out.push(Effect::Send { to: target, message: Message::Ping { seq, digest, load: self.load, rumors } });
    }

    /// Starts and ends probes that are due.
    pub(super) fn run_probes(&mut self, out: &mut Vec<Effect>) {
        if self.now >= self.prober.next {
            let pause = self.health.scale(self.settings.period());
            // Keeps the pace when the timer is a little late, and does not make up for a long pause.
            self.prober.next = self.now.max(self.prober.next + pause / 2) + pause / 2;
            self.prober.next = self.prober.next.min(self.now + pause);
            if let Some(target) = self.next_target() {
                self.probe(target, out);
            }
        }
        let mut at = 0;
        while let Some(probe) = self.prober.probes.get(at) {
            if self.now >= probe.end {
                let probe = self.prober.probes.remove(at);
                self.probe_failed(&probe, false, out);
            } else {
                if self.now >= probe.direct {
                    self.ask_others(at, out);
                }
                at += 1;
            }
        }
        self.run_relays(out);
    }

    fn next_target(&mut self) -> Option<NodeKey> {
        let ring = self.prober.ring;
        self.prober.ring = !ring;
        if ring {
            let neighbour = self.table.after(self.me, |member| member.state == State::Alive);
            if neighbour.is_some() {
                return neighbour;
            }
        }
        self.table.next_in_turn(&mut self.rng)
    }

    fn ask_others(&mut self, at: usize, out: &mut Vec<Effect>) {
        let Some(probe) = self.prober.probes.get(at) else { return };
        let (target, seq) = (probe.target, probe.seq);
        let relays = self.table.sample(Settings::RELAYS, &[target], &mut self.rng);
        let asked = relays.len();
        for to in relays {
            out.push(Effect::Send { to, message: Message::Relay { seq, target } });
        }
        let stream = self.stream(target, Request::Ping, out);
        if let Some(member) = self.table.get(target).filter(|member| member.heard.is_none()) {
            // It may not know this node yet, and then cannot open what it is sent.
            out.push(Effect::Hello { addr: member.record.record.addr });
        }
        if let Some(probe) = self.prober.probes.get_mut(at) {
            probe.direct = Time::FAR;
            probe.asked = asked;
            probe.stream = Some(stream);
        }
    }

    fn probe_failed(&mut self, probe: &Probe, refused: bool, out: &mut Vec<Effect>) {
        let target = probe.target;
        out.push(Effect::Note(Note::ProbeFailed { target, refused }));
        if !refused {
            // Relays that say "no answer" prove that this node hears and is heard; silence of relays says that it may not.
            let missing = if probe.asked > 0 { probe.asked - probe.nacks.min(probe.asked) } else { 1 };
            if self.health.worse(missing.min(1)) {
                out.push(Effect::Note(Note::Health(self.health.score())));
            }
        }
        let Some(member) = self.table.get(target).filter(|member| Member::is_up(member)) else { return };
        let (boot, incarnation) = member.version();
        self.suspect(Accusation { key: target, boot, incarnation, accuser: self.me, refused }, out);
    }

    pub(super) fn on_ack(&mut self, from: NodeKey, seq: u32, out: &mut Vec<Effect>) {
        if self.prober.probes.iter().any(|probe| probe.seq == seq && probe.target == from) {
            self.prober.answered(from);
            if self.health.better() {
                out.push(Effect::Note(Note::Health(self.health.score())));
            }
            return;
        }
        let relay = self.prober.relays.iter().position(|relay| relay.seq == seq && relay.target == from);
        if let Some(at) = relay {
            let relay = self.prober.relays.swap_remove(at);
            let message = Message::RelayAck { seq: relay.asker_seq, target: from };
            out.push(Effect::Send { to: relay.asker, message });
        }
    }

    pub(super) fn on_relay_ack(&mut self, seq: u32, target: NodeKey, out: &mut Vec<Effect>) {
        // Asked for just now, so as good as a sign of life of its own.
        if self.prober.probes.iter().any(|probe| probe.seq == seq && probe.target == target) {
            self.hear(target, out);
        }
    }

    pub(super) fn on_nack(&mut self, seq: u32, target: NodeKey) {
        if let Some(probe) = self.prober.probes.iter_mut().find(|probe| probe.seq == seq && probe.target == target) {
            probe.nacks += 1;
        }
    }

    pub(super) fn on_relay(&mut self, asker: NodeKey, asker_seq: u32, target: NodeKey, out: &mut Vec<Effect>) {
        if target == self.me {
            out.push(Effect::Send { to: asker, message: Message::RelayAck { seq: asker_seq, target } });
            return;
        }
        if self.table.get(target).is_none() || self.prober.relays.len() >= Prober::MOST {
            return;
        }
        let seq = self.prober.next_seq();
        let nack = self.now + self.settings.direct_timeout();
        let end = self.now + self.settings.probe_timeout();
        self.prober.relays.push(Relay { seq, asker, asker_seq, target, nack, end });
        self.ping(target, seq, out);
    }

    fn run_relays(&mut self, out: &mut Vec<Effect>) {
        for relay in &mut self.prober.relays {
            if self.now >= relay.nack {
                relay.nack = Time::FAR;
                let message = Message::Nack { seq: relay.asker_seq, target: relay.target };
                out.push(Effect::Send { to: relay.asker, message });
            }
        }
        self.prober.relays.retain(|relay| self.now < relay.end);
    }

    pub(super) fn on_pong(&mut self, id: u32, out: &mut Vec<Effect>) {
        if let Some(probe) = self.prober.probes.iter().find(|probe| probe.stream == Some(id)) {
            let target = probe.target;
            if let Some(member) = self.table.get(target) {
                // It runs, and no datagram came through: it may have been started again, or not know this node any more.
                out.push(Effect::Hello { addr: member.record.record.addr });
            }
            self.hear(target, out);
        }
    }

    pub(super) fn on_refused(&mut self, id: u32, out: &mut Vec<Effect>) {
        if let Some(at) = self.prober.probes.iter().position(|probe| probe.stream == Some(id)) {
            let probe = self.prober.probes.remove(at);
            self.probe_failed(&probe, true, out);
        }
    }
}
