//! A swarm at full rate for a while: nothing grows that should not, and what goes in comes out.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use drover_proto::router::{InjectRequest, InjectionState, WatchEventsRequest};
use drover_testkit::cluster::{Cluster, DAEMONS, RouterClient};

use crate::chaos::launch;

/// Nodes of the swarm, each with one prompt at a time.
const NODES: u32 = 4;
/// Memory may grow while caches fill; after this share of the time it must stand still.
const SETTLED: f64 = 0.2;

/// What one process used, over time.
#[derive(Debug, Default)]
struct Course {
    /// Seconds since the start, resident MiB.
    memory: Vec<(f64, f64)>,
    /// Open file descriptors.
    files: Vec<usize>,
}

/// What was seen.
#[derive(Debug)]
pub struct Report {
    /// Prompts carried out.
    pub prompts: usize,
    /// Events in the log, each seen once by a live subscriber.
    pub events: usize,
    /// By daemon: MiB that it grew after it had settled, and its largest and last number of open files.
    pub daemons: BTreeMap<&'static str, (f64, usize, usize)>,
}

/// Runs at full rate for this long. Growth beyond `growth_mib` is an error.
pub async fn run(time: Duration, growth_mib: f64) -> anyhow::Result<Report> {
    let cluster = Cluster::start("{}").await?;
    let swarm = launch(&mut cluster.router(), "echo", NODES).await?;
    let until = Instant::now() + time;
    let prompting =
        futures::future::try_join_all((0..NODES).map(|node| prompts(cluster.router(), &swarm, node, until)));
    let watching = watch(&cluster, until);
    let (prompts, courses, counted) = tokio::try_join!(prompting, watching, count_live(cluster.router(), until))?;

    let mut daemons = BTreeMap::new();
    for (daemon, course) in &courses {
        let grown = growth(&course.memory, time.as_secs_f64() * SETTLED);
        let (most, last) = (course.files.iter().max().copied().unwrap_or(0), course.files.last().copied().unwrap_or(0));
        daemons.insert(*daemon, (grown, most, last));
        ensure!(grown < growth_mib, "{daemon} grew by {grown:.2} MiB: {:?}", course.memory);
        let early = course.files.get(course.files.len() / 5).copied().unwrap_or(0);
        ensure!(last <= early + 4, "{daemon} had {early} files open, then {last}");
    }
    let events = count_log(cluster.router()).await?;
    ensure!(counted == events, "the log holds {events} events, the live subscriber saw {counted}");
    Ok(Report { prompts: prompts.iter().sum(), events, daemons })
}

/// One prompt after the other on one node.
async fn prompts(mut router: RouterClient, swarm: &str, node: u32, until: Instant) -> anyhow::Result<usize> {
    let mut done = 0;
    while Instant::now() < until {
        let request = InjectRequest {
            swarm_id: swarm.to_owned(),
            nodes: vec![node],
            content: format!("soak {node} {done}\n@echo deltas=100 size=300"),
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
    let request = drover_proto::router::GetSwarmRequest { swarm_id: swarm.to_owned() };
    let swarm = router.get_swarm(request).await?.into_inner().swarm.context("no swarm in the answer")?;
    Ok(swarm.nodes.get(node as usize).context("no such node")?.outstanding)
}

/// Samples every daemon until the end.
async fn watch(cluster: &Cluster, until: Instant) -> anyhow::Result<BTreeMap<&'static str, Course>> {
    let begun = Instant::now();
    let mut courses: BTreeMap<&'static str, Course> = BTreeMap::new();
    while Instant::now() < until {
        for daemon in DAEMONS {
            let pid = cluster.daemon(daemon).with_context(|| format!("{daemon} is gone"))?.pid;
            let course = courses.entry(daemon).or_default();
            course.memory.push((begun.elapsed().as_secs_f64(), resident_mib(pid)?));
            course.files.push(fs::read_dir(format!("/proc/{pid}/fd"))?.count());
        }
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

/// Events that a live subscriber sees from the first on, until the log has been quiet behind the end.
async fn count_live(mut router: RouterClient, until: Instant) -> anyhow::Result<usize> {
    let request = WatchEventsRequest { follow: true, ..Default::default() };
    let mut stream = router.watch_events(request).await?.into_inner();
    let mut seen = 0;
    loop {
        match tokio::time::timeout(Duration::from_secs(2), stream.message()).await {
            Ok(batch) => seen += batch?.context("the stream ended")?.events.len(),
            Err(_) if Instant::now() > until => return Ok(seen),
            Err(_) => {}
        }
    }
}

async fn count_log(mut router: RouterClient) -> anyhow::Result<usize> {
    let mut stream = router.watch_events(WatchEventsRequest::default()).await?.into_inner();
    let mut seen = 0;
    while let Some(batch) = stream.message().await? {
        seen += batch.events.len();
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::growth;

    #[test]
    fn growth_is_seen_and_noise_is_not() {
        let rising: Vec<_> = (0..100).map(|second| (f64::from(second), 10.0 + 0.1 * f64::from(second))).collect();
        assert!((growth(&rising, 20.0) - 7.9).abs() < 0.01);
        let noisy: Vec<_> = (0..100).map(|second| (f64::from(second), 10.0 + f64::from(second % 2))).collect();
        assert!(growth(&noisy, 20.0).abs() < 0.1);
    }
}
