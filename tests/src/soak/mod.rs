//! Swarms at full rate for a while, one after the other, beside one that stands all the time, sessions that are talked in and model calls:
//! nothing grows that should not, in any daemon, and what goes in comes out.

mod beside;
mod progress;

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use drover_proto::router::terminate_swarm_response::Step;
use drover_proto::router::{
    GetInfoRequest, GetSwarmRequest, InjectRequest, InjectionState, TerminateSwarmRequest, WatchEventsRequest,
};
use drover_testkit::cluster::{Cluster, DAEMONS, RouterClient};
use drover_testkit::mock_llm::{MockLlm, Settings};
use tokio::sync::watch;

pub use self::progress::Least;
use self::progress::Progress;
use crate::chaos::launch;

/// Nodes of each swarm, each with one prompt after the other.
const NODES: u32 = 4;
/// Pieces that each prompt asks for.
const DELTAS: usize = 100;
/// Memory and files may grow while caches fill; after this share of the time they must stand still.
const SETTLED: f64 = 0.2;
/// Parts of the time of which each is long enough for a moment with few open files: connections are kept for a minute and more.
const WINDOWS: usize = 3;
/// A subscriber that is so long without an event, while the log has more, has lost one. Machines stall for seconds.
const LOST: Duration = Duration::from_mins(1);

/// How long, and what is allowed.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// How long prompts are sent, at least.
    pub time: Duration,
    /// What has to be done, however long a slow machine takes for it; then what grew is judged by what went through.
    pub least: Least,
    /// How many events go by before memory and files have to stand still, besides a share of the time.
    pub settling_events: u64,
    /// Bytes of each piece.
    pub delta_bytes: usize,
    /// How long each swarm lives. Its successor finds no trace of it a little later.
    pub swarm_time: Duration,
    /// Most turns of a session; its successor begins when it is closed.
    pub session_turns: usize,
    /// How many events the log keeps: with fewer than there are, old ones make room all the time.
    pub keep_events: usize,
    /// By how many MiB the memory of a daemon may grow after it has settled.
    pub growth_mib: f64,
    /// How many more files a daemon may have open in the second half than in the first, when it has fewest.
    pub growth_files: f64,
    /// By how many files the line fitted to those times may rise after it has settled.
    pub slope_files: f64,
}

/// What one process used, over time.
#[derive(Debug, Default)]
struct Course {
    /// Seconds since the start, resident MiB.
    memory: Vec<(f64, f64)>,
    /// Seconds since the start, open file descriptors.
    files: Vec<(f64, f64)>,
}

/// What one daemon came to.
#[derive(Debug)]
pub struct Use {
    /// MiB that it grew after it had settled.
    pub grown_mib: f64,
    /// MiB that it had at the most.
    pub most_mib: f64,
    /// Open files at the least, after it had settled: before the middle of that time, and after.
    pub files: (f64, f64),
    /// By how many files the fitted line rose.
    pub grown_files: f64,
}

/// What was seen.
#[derive(Debug)]
pub struct Report {
    /// Swarms that came and went.
    pub swarms: usize,
    /// Prompts carried out.
    pub prompts: usize,
    /// Turns of sessions that were answered, and sessions.
    pub turns: (usize, usize),
    /// Model calls that were answered.
    pub calls: u64,
    /// Events that a live subscriber saw, each once and in order.
    pub events: usize,
    /// Of these, how many were compared with the log one by one.
    pub compared: usize,
    /// By daemon.
    pub daemons: BTreeMap<&'static str, Use>,
    /// MiB of the state directory with its mailbox, at the most: before the middle of the time, and after.
    pub disk_mib: (f64, f64),
    /// MiB of all daemons' logs in the end, those of nodes among them.
    pub logs_mib: f64,
}

/// Most MiB of logs that daemons which are well may write, however much they do.
const MOST_LOGS: f64 = 1.0;

/// Runs at full rate. Growth beyond what the plan allows is an error.
pub async fn run(plan: Plan) -> anyhow::Result<Report> {
    let mock = MockLlm::start(Settings { latency_ms: 5.0, ..Settings::default() })?;
    let config = format!(
        "router: {{keep_events: {}, keep_ended_swarms_for: 5s}}\nworker: {{run_tasks: true}}\nnode_scaling:\n  \
         listen: 127.0.0.1:0\n  provider: {{name: mock, model: m, base_url: \"{}\"}}\n",
        plan.keep_events,
        mock.base_url("openai")
    );
    let cluster = Cluster::start(&config).await?;
    let standing = launch(&mut cluster.router(), "echo", 1).await?;
    beside::ready(&cluster, &standing).await?;
    let progress = &Progress::new(plan.time, plan.least);
    let (over, is_over) = watch::channel(0);
    let ended = || progress.is_over();
    let working = async {
        let (worked, stood, turns, calls) = tokio::try_join!(
            work(cluster.router(), plan, progress),
            prompts(cluster.router(), &standing, 0, plan.delta_bytes, &ended),
            beside::talk(cluster.state(), plan, progress),
            beside::dispatch(cluster.state(), progress),
        )?;
        // What the subscriber has to wait for.
        over.send_replace(cluster.router().get_info(GetInfoRequest {}).await?.into_inner().last_seq);
        Ok(((worked.0 + 1, worked.1 + stood), turns, calls))
    };
    let (((swarms, prompts), turns, calls), courses, live) = tokio::try_join!(
        working,
        sample(&cluster, &standing, progress),
        subscribe(cluster.router(), plan.keep_events, is_over, progress)
    )?;
    let answered = mock.ledger().answered;
    ensure!(answered == calls, "{calls} calls were made, the provider answered {answered}");

    ensure!(live.completed == prompts, "{prompts} prompts were sent, {} turns completed", live.completed);
    ensure!(live.deltas == prompts * DELTAS, "{prompts} prompts gave {} deltas of {DELTAS} each", live.deltas);
    let log = read_log(cluster.router(), live.last.front().map_or(0, |first| first - 1)).await?;
    ensure!(live.last == log, "the log's last {} events are not the {} that were seen", log.len(), live.last.len());

    let settled = settled(&courses.events, plan.settling_events);
    let (mut daemons, mut faults) = (BTreeMap::new(), Vec::new());
    for (daemon, course) in &courses.daemons {
        // Files are opened and closed all the time; one that is never closed is there also when there are fewest.
        let files: Vec<(f64, f64)> = course.files.iter().filter(|(at, _)| *at >= settled).copied().collect();
        let half = floors(&files, 2);
        let used = Use {
            grown_mib: growth(&course.memory, settled),
            most_mib: most(course.memory.iter().map(|sample| sample.1)),
            files: (half.first().map_or(0.0, |low| low.1), half.last().map_or(0.0, |low| low.1)),
            grown_files: growth(&floors(&files, WINDOWS), settled),
        };
        if used.grown_mib >= plan.growth_mib {
            faults.push(format!("{daemon} grew by {:.2} MiB: {:.1?}", used.grown_mib, course.memory));
        }
        if used.files.1 > used.files.0 + plan.growth_files {
            faults.push(format!("{daemon} had {} files open, then {}", used.files.0, used.files.1));
        }
        if used.grown_files >= plan.slope_files {
            faults.push(format!("{daemon} opened {:.1} more files: {:.0?}", used.grown_files, course.files));
        }
        daemons.insert(*daemon, used);
    }
    // Those that were put aside have a number behind it.
    let is_log = |name: &str| name.contains(".log");
    let logs_mib = bytes_below(cluster.state().path(), &is_log) as f64 / f64::from(1 << 20);
    if logs_mib > MOST_LOGS {
        faults.push(format!("the daemons wrote {logs_mib:.2} MiB of logs"));
    }
    let report = Report {
        logs_mib,
        swarms,
        prompts,
        turns,
        calls,
        events: live.seen,
        compared: log.len(),
        daemons,
        disk_mib: halves(courses.disk_mib.iter().copied()),
    };
    ensure!(faults.is_empty(), "{}\n{report:#?}", faults.join("\n"));
    Ok(report)
}

/// Swarm after swarm. Returns how many there were, and how many prompts they carried out.
async fn work(mut router: RouterClient, plan: Plan, progress: &Progress) -> anyhow::Result<(usize, usize)> {
    let (mut swarms, mut done) = (0, 0);
    while !progress.is_over() {
        let swarm = launch(&mut router, "echo", NODES).await?;
        let end = Instant::now() + plan.swarm_time;
        let ended = || progress.is_over() || Instant::now() >= end;
        let prompting = (0..NODES).map(|node| prompts(router.clone(), &swarm, node, plan.delta_bytes, &ended));
        done += futures::future::try_join_all(prompting).await?.iter().sum::<usize>();
        let request = TerminateSwarmRequest { swarm_id: swarm, ..Default::default() };
        let mut steps = router.terminate_swarm(request).await?.into_inner();
        let mut terminated = false;
        while let Some(step) = steps.message().await? {
            terminated |= matches!(step.step, Some(Step::Terminated(_)));
        }
        ensure!(terminated, "the termination ended without an end");
        swarms += 1;
        progress.swarm();
    }
    Ok((swarms, done))
}

/// One prompt after the other on one node, until the end.
async fn prompts(
    mut router: RouterClient,
    swarm: &str,
    node: u32,
    size: usize,
    ended: &dyn Fn() -> bool,
) -> anyhow::Result<usize> {
    let mut done = 0;
    while !ended() {
        let request = InjectRequest {
            swarm_id: swarm.to_owned(),
            nodes: vec![node],
            content: format!("soak {node} {done}\n@echo deltas={DELTAS} size={size}"),
            ..Default::default()
        };
        let mut steps = router.inject(request).await?.into_inner();
        let mut delivered = false;
        while let Some(step) = steps.message().await? {
            match step.state() {
                InjectionState::Delivered => delivered = true,
                InjectionState::Failed => bail!("{}", step.error),
                _ => {}
            }
        }
        ensure!(delivered, "a prompt was not delivered");
        done += 1;
        // Delivered is not done; a short queue on the node is what full rate means.
        while outstanding(&mut router, swarm, node).await? > 4 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    while outstanding(&mut router, swarm, node).await? > 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(done)
}

async fn outstanding(router: &mut RouterClient, swarm: &str, node: u32) -> anyhow::Result<u32> {
    let request = GetSwarmRequest { swarm_id: swarm.to_owned() };
    let swarm = router.get_swarm(request).await?.into_inner().swarm.context("no swarm in the answer")?;
    Ok(swarm.nodes.get(node as usize).context("no such node")?.outstanding)
}

/// What was used, over time.
#[derive(Debug, Default)]
struct Courses {
    daemons: BTreeMap<&'static str, Course>,
    disk_mib: Vec<f64>,
    /// Seconds since the start, events so far.
    events: Vec<(f64, u64)>,
}

/// Samples every daemon until the end.
async fn sample(cluster: &Cluster, standing: &str, progress: &Progress) -> anyhow::Result<Courses> {
    let begun = Instant::now();
    let mut courses = Courses::default();
    let of_node = beside::OF_NODE.map(|daemon| (daemon, beside::name_of(daemon, standing)));
    let all: Vec<(&str, String)> = DAEMONS
        .iter()
        .chain(&["llm-dispatcher"])
        .map(|daemon| (*daemon, (*daemon).to_owned()))
        .chain(of_node)
        .collect();
    while !progress.is_over() {
        courses.events.push((begun.elapsed().as_secs_f64(), progress.events()));
        for (daemon, name) in &all {
            let pid = cluster.daemon(name).with_context(|| format!("{name} is gone"))?.pid;
            let course = courses.daemons.entry(daemon).or_default();
            let at = begun.elapsed().as_secs_f64();
            course.memory.push((at, resident_mib(pid)?));
            course.files.push((at, fs::read_dir(format!("/proc/{pid}/fd"))?.count() as f64));
        }
        courses.disk_mib.push(bytes_below(cluster.state().path(), &|_| true) as f64 / f64::from(1 << 20));
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    Ok(courses)
}

/// Resident memory of a process in MiB.
pub fn resident_mib(pid: u32) -> anyhow::Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
    let kib: f64 = line.split_whitespace().nth(1).context("no figure")?.parse()?;
    Ok(kib / 1024.0)
}

/// Size of all files with such names; what goes away meanwhile counts nothing.
fn bytes_below(dir: &Path, counts: &dyn Fn(&str) -> bool) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
    entries
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => bytes_below(&entry.path(), counts),
            Ok(kind) if kind.is_file() && counts(&entry.file_name().to_string_lossy()) => {
                entry.metadata().map_or(0, |meta| meta.len())
            }
            _ => 0,
        })
        .sum()
}

/// From which second on nothing may grow any more.
fn settled(events: &[(f64, u64)], after: u64) -> f64 {
    let (all, _) = events.last().copied().unwrap_or_default();
    let passed = events.iter().find(|(_, count)| *count >= after).map_or(all, |(at, _)| *at);
    passed.max(all * SETTLED)
}

/// By how much the fitted line rises between `from` seconds and the end.
fn growth(samples: &[(f64, f64)], from: f64) -> f64 {
    let settled: Vec<&(f64, f64)> = samples.iter().filter(|(at, _)| *at >= from).collect();
    let count = settled.len() as f64;
    if settled.len() < 2 {
        return 0.0;
    }
    let mean = |pick: fn(&(f64, f64)) -> f64| settled.iter().map(|sample| pick(sample)).sum::<f64>() / count;
    let (time, size) = (mean(|sample| sample.0), mean(|sample| sample.1));
    let slope = settled.iter().map(|(at, mib)| (at - time) * (mib - size)).sum::<f64>()
        / settled.iter().map(|(at, _)| (at - time).powi(2)).sum::<f64>();
    slope * (settled.last().map_or(0.0, |last| last.0) - from)
}

/// The lowest sample of each of so many parts, at the time of the last in it.
fn floors(samples: &[(f64, f64)], parts: usize) -> Vec<(f64, f64)> {
    let of_part = |part: &[(f64, f64)]| {
        let low = part.iter().map(|sample| sample.1).fold(f64::INFINITY, f64::min);
        (part.last().map_or(0.0, |last| last.0), low)
    };
    samples.chunks(samples.len().div_ceil(parts).max(1)).map(of_part).collect()
}

fn most(samples: impl Iterator<Item = f64>) -> f64 {
    samples.fold(0.0, f64::max)
}

/// The largest of each half.
fn halves(samples: impl Iterator<Item = f64>) -> (f64, f64) {
    let samples: Vec<f64> = samples.collect();
    let (early, late) = samples.split_at(samples.len() / 2);
    (most(early.iter().copied()), most(late.iter().copied()))
}

/// What a live subscriber has seen.
#[derive(Debug, Default)]
struct Live {
    seen: usize,
    deltas: usize,
    completed: usize,
    /// Numbers of the last events.
    last: VecDeque<u64>,
}

/// Every event from the first to the one that `over` names in the end.
async fn subscribe(
    mut router: RouterClient,
    remember: usize,
    over: watch::Receiver<u64>,
    progress: &Progress,
) -> anyhow::Result<Live> {
    let request = WatchEventsRequest { follow: true, ..Default::default() };
    let mut stream = router.watch_events(request).await?.into_inner();
    let mut live = Live::default();
    let (mut seq, mut heard) = (0, Instant::now());
    loop {
        let end = *over.borrow();
        if end > 0 && seq >= end {
            return Ok(live);
        }
        // Quiet for a while: look again whether it is over.
        let Ok(batch) = tokio::time::timeout(Duration::from_secs(1), stream.message()).await else {
            let last = router.get_info(GetInfoRequest {}).await?.into_inner().last_seq;
            if seq >= last {
                heard = Instant::now();
            }
            let silent = heard.elapsed();
            ensure!(silent < LOST, "no event for {silent:?} behind {seq}, and the log is at {last}");
            continue;
        };
        heard = Instant::now();
        for event in batch?.context("the stream ended")?.events {
            ensure!(event.seq > seq, "event {} came behind {seq}", event.seq);
            seq = event.seq;
            live.seen += 1;
            live.deltas += usize::from(event.event == "assistant_delta");
            live.completed += usize::from(event.event == "turn_complete");
            if live.last.len() == remember {
                live.last.pop_front();
            }
            live.last.push_back(seq);
        }
        progress.seen(live.seen as u64);
    }
}

/// Numbers of the events in the log behind `after`.
async fn read_log(mut router: RouterClient, after: u64) -> anyhow::Result<VecDeque<u64>> {
    let request = WatchEventsRequest { after_seq: after, ..Default::default() };
    let mut stream = router.watch_events(request).await?.into_inner();
    let mut seqs = VecDeque::new();
    while let Some(batch) = stream.message().await? {
        seqs.extend(batch.events.iter().map(|event| event.seq));
    }
    Ok(seqs)
}

#[cfg(test)]
mod tests {
    use super::{floors, growth, halves, settled};

    #[test]
    fn growth_is_seen_and_noise_is_not() {
        let rising: Vec<_> = (0..100).map(|second| (f64::from(second), 10.0 + 0.1 * f64::from(second))).collect();
        assert!((growth(&rising, 20.0) - 7.9).abs() < 0.01);
        let noisy: Vec<_> = (0..100).map(|second| (f64::from(second), 10.0 + f64::from(second % 2))).collect();
        assert!(growth(&noisy, 20.0).abs() < 0.1);
        let opened = |leak: f64| {
            let files = |second: u32| f64::from(second % 7) + leak * f64::from(second);
            let samples: Vec<_> = (0..100).map(|second| (f64::from(second), files(second))).collect();
            growth(&floors(&samples, 10), 0.0)
        };
        assert!(opened(0.0).abs() < 0.01 && opened(0.1) > 7.0);
        assert_eq!(floors(&[(1.0, 5.0), (2.0, 3.0), (3.0, 4.0)], 2), [(2.0, 3.0), (3.0, 4.0)]);
        let events = [(1.0, 10), (2.0, 50), (3.0, 100), (10.0, 110)];
        assert!((settled(&events, 50) - 2.0).abs() < 1e-9 && (settled(&events, 100) - 3.0).abs() < 1e-9);
        assert!((settled(&events, 5) - 2.0).abs() < 1e-9, "a share of the time at least");
        assert_eq!(halves([1.0, 3.0, 2.0, 5.0].into_iter()), (3.0, 5.0));
    }
}
