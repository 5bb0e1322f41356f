//! The proof in any size: episodes of trouble, each followed by a calm in which everything has to come to its end.

use std::fmt::{self, Display};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use anyhow::bail;
use drover_handoff::core::Settings;
use drover_types::{Epoch, SessionId};
use rand::Rng;

use super::judge::Verdict;
use super::shared::Missing;
use super::world::{Fault, Weather, World};

/// Everything that was asked for is answered within this after the trouble has ended.
const SETTLES: Duration = Duration::from_mins(3);

/// Lines that a violation tells of what came before it.
const LAST_WORDS: usize = 60;
/// Episodes after which a long run says how far it is.
const SAYS: u64 = 500;

/// Quick timers, so that much happens in little virtual time.
pub fn settings() -> Settings {
    Settings {
        timeout: Duration::from_secs(5),
        retry_delay: Duration::from_millis(300),
        rpc_timeout: Duration::from_secs(1),
        residence: Duration::from_secs(2),
        chunk: 512,
        window: 2048,
        freeze_lag: 256,
        resend: Duration::from_millis(200),
        lease: Duration::from_secs(5),
        store_retry: Duration::from_millis(50),
        flush_wait: Duration::from_millis(100),
        max_held: 8,
        hold: Duration::from_secs(2),
        memory: Duration::from_secs(3),
        max_turns: 1000,
        remembered: 64,
        ..Settings::default()
    }
}

/// One episode: some nodes, some sessions, one kind of weather.
pub fn episode(seed: u64, missing: Option<Missing>) -> Verdict {
    run_episode(seed, missing, false).0
}

/// The same, with everything that happened in words.
pub fn story(seed: u64, missing: Option<Missing>) -> (Verdict, Vec<String>, u64) {
    run_episode(seed, missing, true)
}

fn run_episode(seed: u64, missing: Option<Missing>, told: bool) -> (Verdict, Vec<String>, u64) {
    let mut world = World::new(seed, 2, settings(), Weather::FAIR, missing);
    let nodes = world.rng.random_range(2..=5);
    let (lossy, files, kills) = (world.rng.random_bool(0.7), world.rng.random_bool(0.5), world.rng.random_bool(0.6));
    let weather = Weather {
        loss: if lossy { world.rng.random_range(0.0..0.3) } else { 0.0 },
        twice: if world.rng.random_bool(0.7) { 0.1 } else { 0.0 },
        damage: if lossy { 0.01 } else { 0.0 },
        way: *[2_000, 20_000, 300_000].get(world.rng.random_range(0..3)).unwrap_or(&2_000),
        unknown: if files { world.rng.random_range(0.0..0.1) } else { 0.0 },
        late: if files { world.rng.random_range(0.0..0.03) } else { 0.0 },
        kill: if kills { world.rng.random_range(0.0..0.004) } else { 0.0 },
    };
    world = World::new(seed ^ 0x5eed, nodes, settings(), weather, missing);
    world.story = told.then(Vec::new);
    // A panic anywhere in it is a finding like any other, and its story is told too.
    let settled = catch_unwind(AssertUnwindSafe(|| live(&mut world))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        world.judge.panicked(text.unwrap_or("without a word"));
        false
    });
    let verdict = close(&mut world, settled);
    (verdict, world.story.take().unwrap_or_default(), world.trace())
}

/// All that happens in one episode. Says whether everything came to its end.
fn live(world: &mut World) -> bool {
    let sessions: Vec<SessionId> =
        (0..world.rng.random_range(2..=6)).map(|n| format!("s{n}").parse().expect("a harmless name")).collect();
    for (n, session) in sessions.iter().enumerate() {
        for _ in 0..world.rng.random_range(1..=2) {
            let turns = world.rng.random_range(5..=40);
            world.client(session, n % 2 == 0, turns);
        }
    }
    let end = Duration::from_secs(world.rng.random_range(10..=40));
    while world.now < end && !world.judge.is_broken() {
        trouble(world, &sessions);
        let pause = Duration::from_micros(world.rng.random_range(500..150_000));
        world.run_for(pause);
    }
    world.heal();
    let healed = world.now;
    while world.now < healed + SETTLES && !world.is_quiet() && !world.judge.is_broken() {
        world.run_for(Duration::from_millis(500));
    }
    world.is_quiet()
}

/// The judge's last word.
fn close(world: &mut World, settled: bool) -> Verdict {
    let late_calls = world.shared.tool.refused;
    let mut judge = std::mem::take(&mut world.judge);
    if !judge.is_broken() {
        for (session, files) in &world.shared.sessions {
            let records = match files.read(Epoch(u64::MAX), world.missing()) {
                Ok((_, _, records)) => records,
                Err(why) => {
                    judge.lost(session, &why);
                    continue;
                }
            };
            let carried_out = world.shared.tool.carried_out.iter().filter(|((of, _), _)| of == session);
            judge = judge.finish(session, &records, carried_out.map(|(_, times)| *times));
        }
    }
    let mut verdict = judge.verdict(late_calls);
    if !settled && verdict.broken.is_empty() {
        let pending = world.clients.iter().flat_map(|client| &client.pending);
        let waiting: Vec<String> = pending.map(|pending| pending.request.to_string()).collect();
        verdict.broken.push(format!("long after the trouble not all is settled: {waiting:?}"));
    }
    verdict
}

/// Does one bad thing, or has a session move.
fn trouble(world: &mut World, sessions: &[SessionId]) {
    let nodes = world.len();
    let node = world.rng.random_range(0..nodes);
    let other = (node + world.rng.random_range(1..nodes)) % nodes;
    let session = sessions[world.rng.random_range(0..sessions.len())].clone();
    let rough = world.weather.kill > 0.0;
    match world.rng.random_range(0..100) {
        0..60 => {
            let at = world.server(&session).filter(|_| world.rng.random_bool(0.9)).unwrap_or(node);
            let to = world.rng.random_bool(0.4).then_some(other).filter(|to| *to != at);
            world.request(at, &session, to);
        }
        60..63 if rough => {
            let back = Duration::from_millis(world.rng.random_range(10..6_000));
            world.kill(node, back);
        }
        63..67 => {
            let most = if world.rng.random_bool(0.05) { 60_000 } else { 3_000 };
            let span = Duration::from_millis(world.rng.random_range(5..most));
            world.pause(node, span);
        }
        67..71 => {
            let span = Duration::from_millis(world.rng.random_range(50..5_000));
            world.cut(node, other, span);
            if world.rng.random_bool(0.7) {
                world.cut(other, node, span);
            }
        }
        71..73 if world.weather.unknown > 0.0 => {
            let span = Duration::from_millis(world.rng.random_range(50..3_000));
            world.cut_off_files(node, span);
        }
        73..75 => {
            let span = Duration::from_millis(world.rng.random_range(100..3_000));
            world.slander(node, span);
        }
        75..77 => {
            let load = world.rng.random_range(0.0..1.0);
            world.load(node, load);
        }
        77..80 => world.interrupt(node, &session),
        _ => {}
    }
}

/// One session on three nodes talks and moves once; at one effect after the move began one thing goes wrong.
///
/// Says how many effects the move took without it.
pub fn one_move(seed: u64, fault: Option<(u64, Fault)>) -> anyhow::Result<u64> {
    let mut world = World::new(seed, 3, settings(), Weather::FAIR, None);
    let session: SessionId = "s0".parse()?;
    world.client(&session, seed.is_multiple_of(2), 12);
    world.client(&session, seed.is_multiple_of(2), 12);
    let mut waited = Duration::ZERO;
    while world.server(&session).is_none() || waited < Duration::from_secs(1) {
        world.run_for(Duration::from_millis(100));
        waited += Duration::from_millis(100);
    }
    let at = world.server(&session).unwrap_or(0);
    let before = world.effects;
    world.fault = fault.map(|(step, fault)| (before + step, fault));
    world.request(at, &session, Some((at + 1) % 3));
    world.run_for(Duration::from_millis(200));
    let took = world.effects - before;
    // Faults end by themselves, and within the longest of them and this everything is settled.
    let end = world.now + Duration::from_mins(2);
    while world.now < end && !world.is_quiet() && !world.judge.is_broken() {
        world.run_for(Duration::from_millis(500));
    }
    let settled = world.is_quiet();
    let verdict = close(&mut world, settled);
    match verdict.broken.first() {
        Some(first) => bail!("seed {seed}, {fault:?}: {first}"),
        None => Ok(took),
    }
}

/// Every fault at every so-many-th step of a move, with sessions whose turns may run again and with those whose may not. Says how many moves
/// that were.
pub fn every_step(each: u64) -> anyhow::Result<u64> {
    let mut moves = 0;
    for seed in [2, 3] {
        let steps = one_move(seed, None)?;
        anyhow::ensure!(steps >= 15, "a move of {steps} steps is none");
        for (offset, fault) in (0..).zip(Fault::ALL) {
            for step in (1 + offset % each..=steps).step_by(each as usize) {
                one_move(seed, Some((step, fault)))?;
                moves += 1;
            }
        }
    }
    Ok(moves)
}

/// What came of many episodes.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Episodes.
    pub episodes: u64,
    /// All their verdicts.
    pub all: Verdict,
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = &self.all;
        writeln!(f, "| figure | ours | goal |\n| --- | --- | --- |")?;
        writeln!(
            f,
            "| handoffs that set out, in {} episodes | {} | 1,000,000 in the long size |",
            self.episodes, all.started
        )?;
        writeln!(
            f,
            "| arrived / stayed or went elsewhere / their source was killed | {} / {} / {} | |",
            all.completed, all.failed, all.orphaned
        )?;
        writeln!(f, "| sessions lost | 0 | 0 |")?;
        writeln!(f, "| epochs in which two acted, of {} | 0 | 0 |", all.epochs)?;
        writeln!(f, "| turns lost or answered twice, of {} acknowledged | 0 | 0 |", all.acknowledged)?;
        writeln!(f, "| turns cut off by a kill that may not run twice, and were answered so | {} | |", all.cut_off)?;
        writeln!(f, "| turns that were interrupted, and were answered so | {} | |", all.interrupted)?;
        writeln!(f, "| calls of overtaken owners that the tool refused | {} | |", all.late_calls)?;
        writeln!(f, "| longest handoff, in trouble, virtual | {:.1} s | |", all.longest.as_secs_f64())?;
        writeln!(f, "| not settled {} virtual s after the trouble | 0 | 0 |", SETTLES.as_secs())
    }
}

/// Runs episodes until so many handoffs have set out, and says how far it is about every so many episodes. An error names the seed of
/// the episode that shows it, and tells the end of its story.
pub fn run(seed: u64, handoffs: u64, mut so_far: impl FnMut(&Report)) -> anyhow::Result<Report> {
    let mut report = Report::default();
    while report.all.started < handoffs {
        let seed = seed + report.episodes;
        let verdict = episode(seed, None);
        if let Some(first) = verdict.broken.first() {
            let (_, story, _) = story(seed, None);
            let end = story[story.len().saturating_sub(LAST_WORDS)..].join("\n");
            bail!(
                "{} sound episodes, {} handoffs; then the episode of seed {seed} (`--story {seed}` tells all of it): {} broken, the first: {first}\n{end}",
                report.episodes,
                report.all.started,
                verdict.broken.len()
            );
        }
        report.episodes += 1;
        report.all.add(verdict);
        if report.episodes.is_multiple_of(SAYS) {
            so_far(&report);
        }
    }
    Ok(report)
}

/// How many episodes it takes until the judge notices what is missing, and what it says.
pub fn finds(seed: u64, missing: Missing, most: u64) -> Option<(u64, String)> {
    (0..most).find_map(|n| {
        let verdict = episode(seed + n, Some(missing));
        verdict.broken.into_iter().next().map(|text| (n + 1, text))
    })
}
