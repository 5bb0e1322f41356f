//! How long a move is felt, and what moving gains: figures of real daemons on this machine.
#![expect(clippy::disallowed_methods, reason = "a test program has no tracked tasks; the handles are waited for")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use drover_proto::handoff::send_response::Update;
use drover_proto::handoff::{OpenSession, SendRequest};
use tokio::time::{MissedTickBehavior, sleep, timeout};

use super::nodes::{Door, LIMIT, Nodes, Plan};

/// Pause between two turns of the client that feels the moves.
const BEAT: Duration = Duration::from_millis(5);
/// How long a session stays where it is before the load alone moves it: shorter than by default, so that no figure waits for it.
const RESIDENCE: Duration = Duration::from_secs(3);
/// Nothing more moves after so long.
const SETTLED: Duration = Duration::from_secs(5);

fn ask(session: &str, request: String, prompt: &str) -> SendRequest {
    SendRequest {
        session_id: session.to_owned(),
        request_id: request,
        prompt: prompt.to_owned(),
        open: Some(OpenSession { agent: "echo".to_owned(), ..OpenSession::default() }),
        ..SendRequest::default()
    }
}

/// Sends a turn; how long it took until it was kept, or until it was answered.
async fn turn(door: &mut Door, request: SendRequest, only_kept: bool) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    let mut stream = timeout(LIMIT, door.send(request)).await??.into_inner();
    while let Some(response) = timeout(LIMIT, stream.message()).await?? {
        match response.update {
            Some(Update::Accepted(_)) if only_kept => return Ok(begun.elapsed()),
            Some(Update::Answer(answer)) => {
                ensure!(answer.fault.is_empty(), "{answer:?}");
                return Ok(begun.elapsed());
            }
            _ => {}
        }
    }
    anyhow::bail!("no answer")
}

/// The smallest of them that so large a share of them does not exceed.
fn share(sorted: &[Duration], of: f64) -> Duration {
    let at = (sorted.len() as f64 * of).ceil() as usize;
    sorted.get(at.saturating_sub(1)).copied().unwrap_or_default()
}

/// What a client felt of the moves.
#[derive(Debug, Clone)]
pub struct Felt {
    /// The longest wait of a turn in a move, p99 of the moves, in milliseconds.
    pub longest_ms: f64,
    /// The wait of a turn while nothing moved, p99, in milliseconds.
    pub calm_ms: f64,
    /// All of it in words.
    pub words: String,
}

/// [`felt`] in words.
pub async fn freeze(mib: usize, moves: usize) -> anyhow::Result<String> {
    Ok(felt(mib, moves).await?.words)
}

/// A client sends a turn every 5 ms while its session, which has so many MiB, moves to and fro. Of each move the turn counts that
/// waited longest to be kept.
pub async fn felt(mib: usize, moves: usize) -> anyhow::Result<Felt> {
    let nodes = Arc::new(Nodes::start(Plan::fast(2)).await?);
    nodes.say(0, "felt", "open", "hello").await?;
    for n in 0..mib {
        nodes.say(0, "felt", &format!("grow{n}"), "@echo size=1048576").await?;
    }
    let over = Arc::new(AtomicBool::new(false));
    let beats = tokio::spawn({
        let (nodes, over) = (Arc::clone(&nodes), Arc::clone(&over));
        async move {
            let (mut ticks, mut sent) = (tokio::time::interval(BEAT), Vec::new());
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let door = nodes.door(0);
            for n in 0_u64.. {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                ticks.tick().await;
                let (mut door, request) = (door.clone(), ask("felt", format!("beat{n}"), "x"));
                let at = Instant::now();
                sent.push(tokio::spawn(async move { turn(&mut door, request, true).await.map(|kept| (at, kept)) }));
            }
            let mut felt = Vec::new();
            for one in sent {
                felt.push(one.await??);
            }
            Ok::<_, anyhow::Error>(felt)
        }
    });
    let (mut spans, mut frozen) = (Vec::new(), Vec::new());
    for _ in 0..moves {
        sleep(Duration::from_millis(100)).await;
        let from = nodes.owner("felt").context("nobody owns the session")?.1;
        let begun = Instant::now();
        let moved = nodes.hand_over(from, "felt", 1 - from).await?;
        spans.push((begun, begun.elapsed()));
        frozen.push(Duration::from_micros(moved.frozen_us));
    }
    sleep(Duration::from_millis(300)).await;
    over.store(true, Ordering::Relaxed);
    let felt = beats.await??;
    let mut calm: Vec<Duration> = Vec::new();
    let mut worst: Vec<Duration> = spans.iter().map(|_| Duration::ZERO).collect();
    for (at, kept) in &felt {
        let within = spans.iter().position(|(begun, took)| *at + *kept >= *begun && *at <= *begun + *took);
        match within {
            Some(index) => worst[index] = worst[index].max(*kept),
            None => calm.push(*kept),
        }
    }
    calm.sort_unstable();
    let longest = longest_at(&worst);
    worst.sort_unstable();
    frozen.sort_unstable();
    let ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let words = format!(
        "{mib} MiB, {moves} moves, {} turns: the longest wait in a move p50 {:.1?} p99 {:.1?} at most {:.1?}, frozen p50 {:.1?} \
         p99 {:.1?} at most {:.1?}; without a move p50 {:.1?} p99 {:.1?} at most {:.1?}; \
         the longest: {longest}",
        felt.len(),
        share(&worst, 0.5),
        share(&worst, 0.99),
        share(&worst, 1.0),
        share(&frozen, 0.5),
        share(&frozen, 0.99),
        share(&frozen, 1.0),
        share(&calm, 0.5),
        share(&calm, 0.99),
        share(&calm, 1.0),
    );
    Ok(Felt { longest_ms: ms(share(&worst, 0.99)), calm_ms: ms(share(&calm, 0.99)), words })
}

/// The longest waits and the numbers of their moves, in words: whether they come at random or in a beat says where to look.
fn longest_at(worst: &[Duration]) -> String {
    let mut all: Vec<(usize, &Duration)> = worst.iter().enumerate().collect();
    all.sort_unstable_by_key(|(_, wait)| std::cmp::Reverse(*wait));
    let words: Vec<String> = all.iter().take(8).map(|(number, wait)| format!("{wait:.0?} (move {number})")).collect();
    words.join(", ")
}

/// What 200 sessions that all begin on one of four nodes feel, which each serve 8 turns of 50 ms at a time: with moves and without.
pub async fn balance(sessions: usize, turns: usize) -> anyhow::Result<String> {
    let without = loaded(false, sessions, turns).await?;
    let with = loaded(true, sessions, turns).await?;
    let gain = without.p99.as_secs_f64() / with.p99.as_secs_f64();
    let figures = format!("without handoff {without}, with it {with}: {gain:.1} times");
    ensure!(gain >= 3.0, "{figures}");
    ensure!(with.moved <= 2, "a session moved {} times; {figures}", with.moved);
    Ok(format!("{figures}; no session moved more than {} times", with.moved))
}

/// How long the turns of many sessions took.
struct Loaded {
    p50: Duration,
    p99: Duration,
    /// Sessions by node, in the end.
    spread: Vec<usize>,
    /// Most moves of one session.
    moved: u64,
}

impl std::fmt::Display for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "p50 {:.2?} p99 {:.2?} (sessions by node {:?})", self.p50, self.p99, self.spread)
    }
}

async fn loaded(enabled: bool, sessions: usize, turns: usize) -> anyhow::Result<Loaded> {
    // What the machine itself has to do means nothing where it plays four nodes, so that of each is told to it: much, so that a node with all
    // the sessions it may have is overloaded, and one with half of them is not any more.
    let full = sessions * 87 / 200;
    let plan = Plan { usage: Some((0.7, 0.7)), ..Plan::led(4) };
    let swarm = plan.swarm.replace("handoff: {", &format!("handoff: {{ enabled: {enabled},")).replace(
        "load_monitor: { enabled: false, max_sessions: 100000 }",
        &format!("load_monitor: {{ enabled: true, interval: 1s, max_sessions: {full} }}"),
    );
    let residence = format!("{}s", RESIDENCE.as_secs());
    let environment = [("DROVER_SESSION_TURNS", "8"), ("DROVER_SESSION_RESIDENCE", &residence)];
    let environment = environment.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec();
    let nodes = Arc::new(Nodes::start(Plan { swarm, environment, ..plan }).await?);
    let names: Vec<String> = (0..sessions).map(|n| format!("load-{n}")).collect();
    for batch in names.chunks(16) {
        let opened = batch.iter().map(|name| {
            let mut door = nodes.door(0);
            let request = SendRequest { placed: true, ..ask(name, "open".to_owned(), "hello") };
            async move { turn(&mut door, request, false).await }
        });
        futures::future::try_join_all(opened).await?;
    }
    if enabled {
        // They stay for a while where they came to, and then as many go as the load asks for.
        let (begun, mut last, mut since) = (Instant::now(), 0, Instant::now());
        loop {
            let away = names.iter().filter(|name| nodes.owner(name).is_some_and(|(_, owner, _)| owner != 0)).count();
            if away != last {
                (last, since) = (away, Instant::now());
            }
            if begun.elapsed() > RESIDENCE && last > 0 && since.elapsed() > SETTLED {
                break;
            }
            ensure!(begun.elapsed() < 3 * LIMIT, "only {last} of {sessions} sessions have moved");
            sleep(Duration::from_millis(500)).await;
        }
    }
    let talks = names.iter().map(|name| {
        let (nodes, name) = (Arc::clone(&nodes), name.clone());
        tokio::spawn(async move {
            let owner = nodes.owner(&name).context("a session is lost")?.1;
            let (mut door, mut took) = (nodes.door(owner), Vec::new());
            for n in 0..turns {
                took.push(turn(&mut door, ask(&name, format!("t{n}"), "@echo delay=50ms"), false).await?);
            }
            Ok::<_, anyhow::Error>(took)
        })
    });
    let talks: Vec<_> = talks.collect();
    let mut took = Vec::new();
    for talk in talks {
        took.extend(talk.await??);
    }
    took.sort_unstable();
    let (mut spread, mut moved) = (vec![0; 4], 0);
    for (epoch, owner, _) in names.iter().filter_map(|name| nodes.owner(name)) {
        spread[owner] += 1;
        moved = moved.max(epoch - 1);
    }
    Ok(Loaded { p50: share(&took, 0.5), p99: share(&took, 0.99), spread, moved })
}
