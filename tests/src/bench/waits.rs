//! How long a record waits between a worker's append and the event at a client: where the system tells of changes and where
//! it does not, on nodes at work and on quiet ones.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use drover_proto::router::{InjectRequest, InjectionState};
use drover_testkit::cluster::scratch_dir;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use super::control::{Lines, command, latency, request_id};
use super::figures::{Figure, Goal, Latencies};
use super::ideal;
use crate::stage::{News, Player, Stage};

/// Records per second where the system tells.
const RATE: u64 = 100;
/// `follower.hot_poll` as it is by default.
const HOT_POLL: Duration = Duration::from_millis(50);
/// What a record may take that waits for nobody, in milliseconds.
const PROMPT_MS: f64 = 15.0;

/// How much to measure.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Records of each node where the system tells.
    pub told: u32,
    /// Records of a node at work where the follower polls.
    pub hot: u32,
    /// Quiet nodes where the follower polls, with one record each.
    pub cold: u32,
    /// How often a quiet node is looked at.
    pub cold_poll: Duration,
    /// Once more through a file system of the follower's own, as from another host; see [`crate::mounts::fuse`].
    pub mounted: bool,
}

impl Plan {
    /// The figures of `docs/benchmarks.md`, with the intervals that are the default.
    pub const FULL: Self = Self { told: 500, hot: 200, cold: 100, cold_poll: Duration::from_secs(20), mounted: true };
    /// To see that it works.
    pub const SHORT: Self = Self { told: 50, hot: 10, cold: 8, cold_poll: Duration::from_secs(1), mounted: false };
}

/// All of them.
pub async fn run(plan: Plan) -> anyhow::Result<Vec<Figure>> {
    let cold = plan.cold_poll;
    let mut figures = told(plan.told).await?;
    figures.extend(polled(plan, News::Polled { cold }, "polled").await?);
    if plan.mounted {
        figures.extend(polled(plan, News::Mounted { cold }, "polled through FUSE").await?);
    }
    Ok(figures)
}

async fn told(records: u32) -> anyhow::Result<Vec<Figure>> {
    let stage = Stage::start().await?;
    let swarm = stage.launch(4).await?;
    let quiet = stage.player(&swarm, 0)?;
    let at_work = put_to_work(&stage, &swarm, 1).await?;
    let every = |player: Arc<Mutex<Player>>| -> Vec<Append> {
        (0..records)
            .map(|index| Append { at: Duration::from_micros(1_000_000 / RATE) * index, player: Arc::clone(&player) })
            .collect()
    };
    let quiet = append_to_event(&stage, every(quiet)).await?;
    let at_work = append_to_event(&stage, every(at_work)).await?;
    let echo = latency(&ideal::tcp_echo().await?, RATE, Duration::from_secs(2)).await?;
    let both = [("quiet", &quiet), ("at work", &at_work)].into_iter().flat_map(|(node, waits)| {
        let name = format!("append to event, told of, node {node}, {RATE}/s");
        pair(&name, waits, &echo, ("median", 0.5, Goal::Below(PROMPT_MS)), ("p99", 0.99, Goal::Shown))
    });
    Ok(both.collect())
}

async fn polled(plan: Plan, news: News, how: &str) -> anyhow::Result<Vec<Figure>> {
    let stage = Stage::start_with(news).await?;
    let swarm = stage.launch(plan.cold + 1).await?;
    let dir = scratch_dir("ideal-")?;
    let mut figures = Vec::new();

    let at_work = put_to_work(&stage, &swarm, plan.cold).await?;
    // Further apart than the looks, and at every distance from them.
    let times: Vec<Duration> =
        (0..plan.hot).map(|index| HOT_POLL * 2 * index + HOT_POLL.mul_f64(spread(index))).collect();
    let appends = times.iter().map(|&at| Append { at, player: Arc::clone(&at_work) }).collect();
    let (ours, bare) = beside(&stage, appends, dir.path().join("hot"), HOT_POLL, times).await?;
    let hot_ms = HOT_POLL.as_secs_f64() * 1000.0;
    figures.extend(pair(
        &format!("append to event, {how} every {} ms, node at work", HOT_POLL.as_millis()),
        &ours,
        &bare,
        ("median", 0.5, Goal::Below(hot_ms / 2.0 + PROMPT_MS)),
        ("p99", 0.99, Goal::Below(hot_ms + PROMPT_MS)),
    ));

    let times: Vec<Duration> = (0..plan.cold).map(|index| plan.cold_poll.mul_f64(spread(index))).collect();
    let appends = (0..plan.cold)
        .zip(&times)
        .map(|(node, &at)| Ok(Append { at, player: stage.player(&swarm, node)? }))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let (ours, bare) = beside(&stage, appends, dir.path().join("cold"), plan.cold_poll, times).await?;
    figures.extend(pair(
        &format!("append to event, {how} every {} s, {} quiet nodes", plan.cold_poll.as_secs(), plan.cold),
        &ours,
        &bare,
        ("median", 0.5, Goal::Shown),
        ("slowest", 1.0, Goal::Below(plan.cold_poll.as_secs_f64() * 1000.0)),
    ));
    Ok(figures)
}

/// A share of an interval for each number, evenly spread and in no step with anything (the golden ratio).
fn spread(index: u32) -> f64 {
    (f64::from(index) * 0.618_033_988_749_895).fract()
}

/// What is measured at one share of the latencies: its name, the share, and what it has to be.
type At = (&'static str, f64, Goal);

fn pair(name: &str, ours: &Latencies, ideal: &Latencies, first: At, second: At) -> Vec<Figure> {
    let figure = |(at, quantile, goal): At| Figure {
        name: format!("{name}, {at}"),
        ours: ours.quantile_ms(quantile),
        ideal: Some(ideal.quantile_ms(quantile)),
        unit: "ms",
        goal,
    };
    vec![figure(first), figure(second)]
}

/// One record to be appended.
struct Append {
    /// When, counted from the start.
    at: Duration,
    player: Arc<Mutex<Player>>,
}

/// A node with a turn that does not end.
async fn put_to_work(stage: &Stage, swarm: &str, node: u32) -> anyhow::Result<Arc<Mutex<Player>>> {
    let request = InjectRequest {
        swarm_id: swarm.to_owned(),
        nodes: vec![node],
        content: "go on".to_owned(),
        ..Default::default()
    };
    let mut steps = stage.router().inject(request).await?.into_inner();
    while let Some(step) = steps.message().await? {
        ensure!(step.state() != InjectionState::Failed, "the prompt was not delivered: {}", step.error);
    }
    let player = stage.player(swarm, node)?;
    {
        let mut player = player.lock().unwrap_or_else(PoisonError::into_inner);
        let prompt = player.prompts()?.pop().context("the prompt is not in the inbox")?;
        player.write("turn_started", Some(&prompt.injection_id), "{}")?;
    }
    Ok(player)
}

/// Ours, and at the same times a bare loop that looks at a file.
async fn beside(
    stage: &Stage,
    appends: Vec<Append>,
    file: PathBuf,
    pause: Duration,
    mut times: Vec<Duration>,
) -> anyhow::Result<(Latencies, Latencies)> {
    times.sort_unstable();
    let bare = tokio::task::spawn_blocking(move || ideal::poll(&file, pause, &times));
    let ours = append_to_event(stage, appends).await?;
    let mut latencies = Latencies::default();
    bare.await.context("the bare loop panicked")??.into_iter().for_each(|wait| latencies.add(wait));
    Ok((ours, latencies))
}

/// From the time at which a record should have been appended to the event at a JSON-line client.
///
/// Appended by a thread of its own and its sleep: the runtime's timer has steps of a millisecond.
async fn append_to_event(stage: &Stage, mut appends: Vec<Append>) -> anyhow::Result<Latencies> {
    appends.sort_by_key(|append| append.at);
    let times: Vec<Duration> = appends.iter().map(|append| append.at).collect();
    let limit = times.last().copied().unwrap_or_default() + Duration::from_mins(1);
    let (reader, mut writer) = TcpStream::connect(stage.control_addr()?).await?.into_split();
    let mut lines = Lines::new(reader);
    // Whoever got an answer gets every later event too.
    writer.write_all(command("ready").as_bytes()).await?;
    let mut ready = false;
    while !ready {
        ensure!(lines.read(|line| ready |= request_id(line) == Some("ready")).await?, "the connection ended");
    }

    let begun = Instant::now();
    let writing = tokio::task::spawn_blocking(move || {
        appends.into_iter().enumerate().try_for_each(|(index, append)| {
            std::thread::sleep((begun + append.at).saturating_duration_since(Instant::now()));
            let data = format!("{{\"content\":\"bench-{index}-\"}}");
            append.player.lock().unwrap_or_else(PoisonError::into_inner).write("assistant_delta", None, &data)
        })
    });
    let receiving = async {
        let mut latencies = Latencies::default();
        let mut open: HashSet<usize> = (0..times.len()).collect();
        while !open.is_empty() {
            let more = lines.read(|line| {
                let text = String::from_utf8_lossy(line);
                let index = text.split("bench-").nth(1).and_then(|rest| rest.split('-').next()?.parse().ok());
                if let Some(index) = index.filter(|index| open.remove(index)) {
                    latencies.add(begun.elapsed().saturating_sub(times[index]));
                }
            });
            ensure!(more.await?, "the connection ended with {} events missing", open.len());
        }
        Ok(latencies)
    };
    let Ok(latencies) = tokio::time::timeout(limit, receiving).await else {
        bail!("some events have not come after {limit:?}")
    };
    writing.await.context("the writer panicked")??;
    latencies
}
