//! The network between simulated nodes: delay, loss, duplicates, reordering, one-way links, cuts, keys.

use std::collections::BTreeSet;
use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;

/// How datagrams fare.
#[derive(Debug, Clone)]
pub struct Weather {
    /// Shortest way from node to node.
    pub delay: Duration,
    /// Added at random; what makes datagrams overtake each other.
    pub jitter: Duration,
    /// Share that is lost.
    pub loss: f64,
    /// Share that arrives twice.
    pub duplicates: f64,
    /// Share that arrives up to half a second late.
    pub late: f64,
    /// Share of ordered pairs of nodes between which no datagram passes in that direction.
    pub one_way: f64,
}

impl Default for Weather {
    fn default() -> Self {
        Self {
            delay: Duration::from_micros(200),
            jitter: Duration::from_micros(800),
            loss: 0.0,
            duplicates: 0.0,
            late: 0.0,
            one_way: 0.0,
        }
    }
}

/// Who can reach whom.
#[derive(Debug)]
pub struct Network {
    /// How datagrams fare now.
    pub weather: Weather,
    seed: u64,
    /// Part of the network that each node is in; nodes of different parts do not reach each other at all.
    part: Vec<u8>,
    /// Ring key that each node seals with, and those that it opens.
    keys: Vec<(u8, BTreeSet<u8>)>,
}

impl Network {
    /// All in one part, with one key.
    pub fn new(seed: u64, weather: Weather) -> Self {
        Self { weather, seed, part: Vec::new(), keys: Vec::new() }
    }

    /// One more node.
    pub fn grow(&mut self) {
        self.part.push(0);
        self.keys.push((0, BTreeSet::from([0])));
    }

    /// Puts a node into a part.
    pub fn place(&mut self, node: usize, part: u8) {
        self.part[node] = part;
    }

    /// Gives a node another ring.
    pub fn set_keys(&mut self, node: usize, seals: u8, opens: BTreeSet<u8>) {
        self.keys[node] = (seals, opens);
    }

    /// Whether the two are in one part.
    pub fn joined(&self, from: usize, to: usize) -> bool {
        self.part[from] == self.part[to]
    }

    /// When copies of a datagram arrive, if any do.
    pub fn datagram(&self, from: usize, to: usize, rng: &mut SmallRng) -> Vec<Duration> {
        let weather = &self.weather;
        if !self.joined(from, to) || !self.keys[to].1.contains(&self.keys[from].0) || self.is_one_way(from, to) {
            return Vec::new();
        }
        let copies = if weather.duplicates > 0.0 && rng.random_bool(weather.duplicates) { 2 } else { 1 };
        let mut arrivals = Vec::with_capacity(copies);
        for _ in 0..copies {
            if weather.loss > 0.0 && rng.random_bool(weather.loss) {
                continue;
            }
            let mut delay = self.way(rng);
            if weather.late > 0.0 && rng.random_bool(weather.late) {
                delay += Duration::from_millis(rng.random_range(1..500));
            }
            arrivals.push(delay);
        }
        arrivals
    }

    /// One way over an established stream: reliable, so that a loss costs time.
    pub fn way(&self, rng: &mut SmallRng) -> Duration {
        self.weather.delay + self.weather.jitter.mul_f64(rng.random::<f64>())
    }

    fn is_one_way(&self, from: usize, to: usize) -> bool {
        if self.weather.one_way <= 0.0 {
            return false;
        }
        let mut hash = self.seed ^ ((from as u64) << 32 | to as u64);
        for _ in 0..3 {
            hash = (hash ^ (hash >> 31)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        (hash >> 11) as f64 / (1_u64 << 53) as f64 <= self.weather.one_way
    }
}
