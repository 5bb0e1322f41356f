//! What is done to a cluster, one thing at a time.

use std::time::Duration;

use drover_membership::core::Settings;

use super::invariants::Verdict;
use super::network::Weather;
use super::world::{End, World};

/// A cluster of `nodes` in which all know all. Every node joins through the first three, all within 50 ms.
pub fn cluster(seed: u64, nodes: usize, weather: Weather, settings: Settings) -> World {
    let mut world = World::new(seed, weather, settings);
    mass_join(&mut world, nodes);
    world
}

/// Starts `nodes` at once. Says how long it took until all saw all; nothing when that was not so after a minute.
pub fn mass_join(world: &mut World, nodes: usize) -> Option<Duration> {
    let start = world.now;
    let step = Duration::from_millis(50) / nodes.max(1) as u32;
    for node in 0..nodes {
        let seeds: Vec<usize> = (0..nodes.min(3)).filter(|seed| *seed != node).collect();
        world.start(&seeds);
        world.run_for(step);
    }
    let all = nodes - 1;
    world.run_until(Duration::from_millis(10), Duration::from_mins(1), |world| {
        world.seen.iter().all(|seen| *seen == all)
    })?;
    Some(world.now.since(start))
}

/// Kills one node after the other in good weather, each when all have told of the one before and it is back.
pub fn kills(seed: u64, nodes: usize, end: End, count: usize) -> Verdict {
    let mut world = cluster(seed, nodes, Weather::default(), Settings::default());
    world.run_for(Duration::from_secs(5));
    for turn in 0..count {
        let victim = (turn * 7 + 3) % nodes;
        world.kill(victim, end, Duration::from_secs(30));
        // An odd pause, so that kills do not keep step with probes.
        let pause = Duration::from_millis(20_000 + (turn as u64 * 137) % 1000);
        world.run_for(pause);
        let seeds: Vec<usize> = (0..nodes).filter(|node| *node != victim).take(3).collect();
        world.restart(victim, turn % 2 == 0, &seeds);
        world.run_for(Duration::from_secs(3));
    }
    let now = world.now;
    world.judge.finish(now)
}

/// What came of letting a cluster run.
#[derive(Debug, Clone)]
pub struct Calm {
    /// What was told.
    pub verdict: Verdict,
    /// Bytes that each node sent per second, with all headers.
    pub bytes: f64,
    /// Requests over a stream that each node made per minute.
    pub streams: f64,
}

/// Lets a cluster run with loss, while some nodes are stopped for 3 s of every 3.5 s. Nobody ends.
pub fn calm(seed: u64, nodes: usize, loss: f64, stopped: usize, span: Duration, settings: Settings) -> Calm {
    let mut world = cluster(seed, nodes, Weather::default(), settings);
    world.run_for(Duration::from_mins(1));
    world.network.weather.loss = loss;
    let (before, start) = (world.traffic, world.now);
    let cycle = Duration::from_millis(3500);
    while world.now.since(start) < span {
        // Not all at the same moment.
        for turn in 0..stopped {
            world.pause(turn * (nodes / stopped), Duration::from_secs(3));
            world.run_for(cycle / 4 / stopped as u32);
        }
        let used = if stopped == 0 { Duration::ZERO } else { cycle / 4 / stopped as u32 * stopped as u32 };
        let rest = cycle.saturating_sub(used);
        world.run_for(rest);
    }
    let seconds = world.now.since(start).as_secs_f64();
    let bytes = (world.traffic.bytes - before.bytes) as f64 / seconds / nodes as f64;
    let streams = (world.traffic.streams - before.streams) as f64 / seconds * 60.0 / nodes as f64;
    let now = world.now;
    Calm { verdict: world.judge.finish(now), bytes, streams }
}

/// Cuts a cluster in two halves for a while. Says how long it took after the healing until all saw all.
pub fn cut(seed: u64, nodes: usize, span: Duration) -> (Option<Duration>, Verdict) {
    let mut world = cluster(seed, nodes, Weather::default(), Settings::default());
    world.run_for(Duration::from_secs(5));
    for node in 0..nodes / 2 {
        world.network.place(node, 1);
    }
    let most = Duration::from_mins(1);
    world.judge.cut(world.now + span + most);
    world.run_for(span);
    for node in 0..nodes / 2 {
        world.network.place(node, 0);
    }
    let healed = world.run_until(Duration::from_millis(100), most, |world| world.judge.agrees());
    let now = world.now;
    (healed, world.judge.finish(now))
}
