//! Finding the first node, and finding lost ones again.

use std::net::SocketAddr;

use rand::Rng;

use super::effect::{Effect, Note};
use super::engine::Core;
use super::record::NodeKey;
use super::settings::Settings;
use super::time::Time;

#[derive(Debug)]
pub(super) struct Join {
    seeds: Vec<Seed>,
    /// Next time when a seed, or a lost node, is tried.
    next: Time,
    /// The state of the cluster has been got from somebody.
    done: bool,
    /// How often all seeds have been tried in vain.
    rounds: u32,
    turn: usize,
}

#[derive(Debug)]
struct Seed {
    addr: SocketAddr,
    attempts: u32,
}

impl Join {
    /// Most addresses that are kept.
    const MOST: usize = 1024;
    /// Seeds that are tried at once.
    const AT_ONCE: usize = 3;

    pub(super) fn new(now: Time, seeds: Vec<SocketAddr>, own: SocketAddr) -> Self {
        let mut join = Self { seeds: Vec::new(), next: now, done: false, rounds: 0, turn: 0 };
        join.add(now, seeds);
        join.seeds.retain(|seed| seed.addr != own);
        join
    }

    pub(super) fn add(&mut self, now: Time, seeds: Vec<SocketAddr>) {
        for addr in seeds {
            if self.seeds.len() < Self::MOST && !self.seeds.iter().any(|seed| seed.addr == addr) {
                self.seeds.push(Seed { addr, attempts: 0 });
            }
        }
        self.rounds = 0;
        self.next = now;
    }

    pub(super) fn is_done(&self) -> bool {
        self.done
    }

    pub(super) fn finish(&mut self) {
        self.done = true;
        self.rounds = 0;
    }

    pub(super) fn deadline(&self) -> Time {
        self.next
    }
}

impl Core {
    /// Tries seeds until somebody answers; later looks now and then for nodes that are missing.
    pub(super) fn run_join(&mut self, out: &mut Vec<Effect>) {
        if self.now < self.join.next {
            return;
        }
        let period = self.settings.period();
        if self.join.done && self.table.up() > 0 {
            // Several missing at once look like a cut network, not like broken nodes: that is looked into more often.
            let pause = if self.look_for_missing(out) > 1 { period } else { period * Settings::RECONNECT_PERIODS };
            self.join.next = self.now + pause / 2 + self.jitter(pause);
            return;
        }
        for _ in 0..Join::AT_ONCE.min(self.join.seeds.len()) {
            self.try_seed(out);
        }
        if self.join.seeds.is_empty() {
            self.look_for_missing(out);
        }
        // A tenth of a period at first, then longer, up to five.
        let shift = self.join.rounds.min(6);
        self.join.rounds += 1;
        let pause = (period / 10 * (1 << shift)).min(period * 5);
        self.join.next = self.now + pause + self.jitter(pause / 2);
    }

    fn try_seed(&mut self, out: &mut Vec<Effect>) {
        let count = self.join.seeds.len();
        self.join.turn = (self.join.turn + 1) % count.max(1);
        let Some(seed) = self.join.seeds.get_mut(self.join.turn) else { return };
        seed.attempts = seed.attempts.saturating_add(1);
        // The first few tell nothing: nodes of one launch start at the same time.
        if seed.attempts >= 5 && seed.attempts.is_power_of_two() {
            out.push(Effect::Note(Note::SeedSilent { addr: seed.addr, attempts: seed.attempts }));
        }
        out.push(Effect::Hello { addr: seed.addr });
    }

    /// A cluster that was cut in two grows together again only if somebody looks for those who are missing. Says how many are.
    fn look_for_missing(&mut self, out: &mut Vec<Effect>) -> usize {
        let missing = self.table.missing();
        if !missing.is_empty() {
            for _ in 0..missing.len().min(Join::AT_ONCE) {
                let at = self.rng.random_range(0..missing.len());
                out.push(Effect::Hello { addr: missing[at].record.addr });
            }
            return missing.len();
        }
        if self.join.seeds.is_empty() {
            return 0;
        }
        // A seed that nobody here has ever met may be the door to another part of the cluster.
        let known = |addr| self.table.iter().any(|member| member.record.record.addr == addr);
        let at = self.rng.random_range(0..self.join.seeds.len());
        if self.join.seeds.get(at).is_some_and(|seed| !known(seed.addr)) {
            self.join.turn = (at + self.join.seeds.len() - 1) % self.join.seeds.len();
            self.try_seed(out);
        }
        0
    }

    /// A hello has succeeded. Whoever has no view yet pulls one from there.
    pub(super) fn contacted(&mut self, key: NodeKey, out: &mut Vec<Effect>) {
        if let Some(addr) = self.table.get(key).map(|member| member.record.record.addr)
            && let Some(seed) = self.join.seeds.iter_mut().find(|seed| seed.addr == addr)
        {
            seed.attempts = 0;
        }
        if !self.join.done {
            self.pull(key, out);
        }
    }
}
