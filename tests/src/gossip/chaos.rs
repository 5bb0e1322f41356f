//! Everything at once, for long: kills, stops, restarts under the same id, good-byes, joins, new metadata, clocks that jump and keys that
//! roll, in bad weather.

use std::time::Duration;

use drover_membership::core::{Command, Load, Settings};
use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;

use super::invariants::Verdict;
use super::network::Weather;
use super::scenario::mass_join;
use super::world::{End, World};

/// One cluster and how long it is tormented.
#[derive(Debug, Clone, Copy)]
pub struct Episode {
    /// Decides everything.
    pub seed: u64,
    /// Nodes at the beginning.
    pub nodes: usize,
    /// Kills in all.
    pub kills: usize,
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct Report {
    /// Kills, verdicts and what was broken.
    pub verdict: Verdict,
    /// Kills that were made.
    pub kills: usize,
    /// Sums up the run.
    pub trace: u64,
    /// Virtual time that passed.
    pub span: Duration,
    /// Share of datagrams lost.
    pub loss: f64,
}

/// A kill must be known to all within this, however bad the weather.
const BOUND: Duration = Duration::from_mins(1);

/// Runs one episode.
pub fn run(episode: Episode) -> Report {
    run_in(World::new(episode.seed, Weather::default(), Settings::default()), episode)
}

/// Runs one episode in a world that somebody has prepared.
pub fn run_in(mut world: World, episode: Episode) -> Report {
    let weather = Weather {
        loss: *[0.0, 0.01, 0.1, 0.25, 0.4].choose(&mut world.rng).unwrap_or(&0.0),
        duplicates: world.rng.random_range(0.0..0.1),
        late: world.rng.random_range(0.0..0.1),
        one_way: *[0.0, 0.0, 0.02].choose(&mut world.rng).unwrap_or(&0.0),
        ..Weather::default()
    };
    // Among a handful of nodes a one-way link may leave somebody whom nobody can reach at all.
    let weather = Weather { one_way: if episode.nodes < 10 { 0.0 } else { weather.one_way }, ..weather };
    let loss = weather.loss;
    let mut broken = Vec::new();
    if mass_join(&mut world, episode.nodes).is_none() {
        broken.push("the join was not done in a minute".to_owned());
    }
    world.network.weather = weather;
    let kills = torment(&mut world, episode);
    if world.run_until(Duration::from_millis(500), Duration::from_mins(3), |world| world.judge.agrees()).is_none() {
        let pair = world.judge.disagreement().unwrap_or_default();
        broken.push(format!("no agreement three minutes after the last event: {pair}"));
    }
    let (trace, span, now) = (world.trace(), world.now.since(drover_membership::core::Time::ZERO), world.now);
    let mut verdict = world.judge.finish(now);
    verdict.broken.extend(broken);
    Report { verdict, kills, trace, span, loss }
}

fn torment(world: &mut World, episode: Episode) -> usize {
    // At most a third is gone at once, so that what is judged is detection and not the lack of anybody to detect.
    let most_down = (episode.nodes / 3).max(1);
    let mut down: Vec<(Duration, usize)> = Vec::new();
    let mut kills = 0;
    let start = world.now;
    let mut key = 0_u8;
    while kills < episode.kills {
        let pause = Duration::from_millis(world.rng.random_range(50..1500));
        world.run_for(pause);
        let passed = world.now.since(start);
        revive(world, &mut down, passed);
        let running: Vec<usize> = world.alive().into_iter().filter(|node| world.is_running(*node)).collect();
        let Some(node) = running.choose(&mut world.rng).copied() else { continue };
        match world.rng.random_range(0..20) {
            0..=9 if down.len() < most_down => {
                let end = if world.rng.random_bool(0.5) { End::Process } else { End::Host };
                world.kill(node, end, BOUND);
                let pause = Duration::from_millis(world.rng.random_range(500..90_000));
                down.push((passed + pause, node));
                kills += 1;
            }
            // No more than a fifth at once: beyond that nobody promises anything.
            10..=13 if world.stopped() < episode.nodes / 5 => {
                let span = Duration::from_millis(world.rng.random_range(200..3000));
                world.pause(node, span);
            }
            14 if down.len() < most_down => {
                world.leave(node);
                let pause = Duration::from_millis(world.rng.random_range(3_000..60_000));
                down.push((passed + pause, node));
            }
            15 => {
                let labels = std::iter::once(("step".to_owned(), kills.to_string())).collect();
                world.command(node, Command::Update { capabilities: None, labels: Some(labels) });
            }
            16 => {
                let load = Load { score: world.rng.random_range(0..=200), overloaded: false, seq: 0 };
                world.command(node, Command::Load(load));
            }
            17 => {
                let off = world.rng.random_range(-3_600_000_000..3_600_000_000);
                world.set_clock(node, off);
            }
            18 if world.len() < episode.nodes + episode.nodes / 10 => {
                let seeds = seeds(world, node);
                let new = world.start(&seeds);
                world.set_keys(new, key, &[key]);
            }
            19 => roll_keys(world, &mut key),
            _ => {}
        }
    }
    // Stops that are under way end, and all who are down come back.
    for (_, node) in down {
        world.run_for(Duration::from_millis(500));
        if !world.is_alive(node) {
            let seeds = seeds(world, node);
            world.restart(node, true, &seeds);
        }
    }
    kills
}

fn revive(world: &mut World, down: &mut Vec<(Duration, usize)>, passed: Duration) {
    let due: Vec<usize> = down.iter().filter(|(at, _)| *at <= passed).map(|(_, node)| *node).collect();
    down.retain(|(at, _)| *at > passed);
    for node in due {
        if world.is_alive(node) {
            // Its good-bye is not over yet.
            down.push((passed + Duration::from_secs(2), node));
            continue;
        }
        let with_snapshot = world.rng.random_bool(0.5);
        let seeds = seeds(world, node);
        world.restart(node, with_snapshot, &seeds);
    }
}

/// Three nodes that are there: what a launch would hand out.
fn seeds(world: &mut World, but: usize) -> Vec<usize> {
    let there: Vec<usize> = world.alive().into_iter().filter(|node| *node != but).collect();
    let mut rng: SmallRng = world.rng.clone();
    world.rng.random::<u64>();
    there.choose_multiple(&mut rng, 3).copied().collect()
}

/// The next ring key: all get it, then all use it, then the old one is taken away.
fn roll_keys(world: &mut World, key: &mut u8) {
    let (old, new) = (*key, key.wrapping_add(1));
    *key = new;
    for step in 0..3 {
        for node in 0..world.len() {
            match step {
                0 => world.set_keys(node, old, &[old, new]),
                1 => world.set_keys(node, new, &[old, new]),
                _ => world.set_keys(node, new, &[new]),
            }
            if node % 16 == 0 {
                world.run_for(Duration::from_millis(1));
            }
        }
        // What was sealed before is still under way.
        world.run_for(Duration::from_millis(600));
    }
}
