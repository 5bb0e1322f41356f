//! Picks a victim, makes sure that the moment is a bad one, and kills it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use drover_mailbox::{Line, Mailbox, decode_line};
use drover_proto::router::GetSwarmRequest;
use drover_service::process::{self, ProcessId};
use drover_testkit::cluster::signal;
use drover_types::{Generation, NodeIndex, OutboxId, SwarmId};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rustix::process::Signal;

use super::{Plan, Run, Swarm};

/// What was killed.
#[derive(Debug, Default)]
pub(crate) struct Kills {
    pub(crate) by_kind: HashMap<&'static str, usize>,
    pub(crate) between_append_and_commit: usize,
    /// Kills of the worker or the agent of a node.
    pub(crate) by_node: HashMap<(String, u32), usize>,
}

/// How long a victim may take to be there, and a bad moment to come.
const PATIENCE: Duration = Duration::from_secs(30);

/// Kills as often as the plan says.
pub(crate) async fn kill(plan: Plan, run: &Run) -> anyhow::Result<Kills> {
    let mut rng = StdRng::seed_from_u64(plan.seed);
    let mut kills = Kills::default();
    let result = async {
        for round in 0..plan.kills {
            // Most kills go to the daemons: only a turn on a killed worker or agent may be lost, and few may.
            let kind = match rng.random_range(0..100) {
                0..35 => "router",
                35..65 => "outbox-follower",
                65..80 => "slurm-allocator",
                80..90 => "worker",
                _ => "codex",
            };
            let left = plan.kills - round;
            let gap_wanted = kills.between_append_and_commit + left >= plan.gap_kills;
            let gap = gap_wanted && matches!(kind, "router" | "outbox-follower");
            one_kill(run, &mut rng, kind, gap, &mut kills).await?;
            *kills.by_kind.entry(kind).or_default() += 1;
            run.kills_done.store(round + 1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..300))).await;
        }
        ensure!(
            kills.between_append_and_commit >= plan.gap_kills,
            "only {} kills fell between append and commit",
            kills.between_append_and_commit
        );
        Ok(())
    }
    .await;
    run.over.store(true, Ordering::Relaxed);
    result.map(|()| kills)
}

async fn one_kill(run: &Run, rng: &mut StdRng, kind: &'static str, gap: bool, kills: &mut Kills) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        ensure!(Instant::now() < deadline, "no chance to kill {kind} within {PATIENCE:?}");
        let Some((victim, node)) = victim(run, rng, kind).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        // Held still while the moment is judged, so that it is still the moment when the victim dies.
        if signal(victim.pid, Signal::STOP).is_err() {
            continue;
        }
        let judged = tokio::time::timeout(Duration::from_millis(400), bad_moment(run, gap)).await;
        if let Ok(moment) = judged {
            let moment = moment?;
            ensure!(process::is_alive(&victim), "the victim was gone before it was killed");
            signal(victim.pid, Signal::KILL).context("failed to kill")?;
            kills.between_append_and_commit += usize::from(moment.uncommitted);
            if let Some(node) = node {
                *kills.by_node.entry(node).or_default() += 1;
            }
            return Ok(());
        }
        // A follower that is held most of the time delivers nothing, and then no turn is ever in flight: let it work.
        let _ = signal(victim.pid, Signal::CONT);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// A living process of the kind, and whose node it serves.
async fn victim(run: &Run, rng: &mut StdRng, kind: &str) -> Option<(ProcessId, Option<(String, u32)>)> {
    if kind != "worker" && kind != "codex" {
        return run.cluster.daemon(kind).map(|id| (id, None));
    }
    let with_agent: Vec<&Swarm> =
        run.swarms.iter().filter(|swarm| kind == "worker" || swarm.agent == "codex").collect();
    let swarm = with_agent[rng.random_range(0..with_agent.len())];
    let node = rng.random_range(0..swarm.nodes);
    let answer = run.cluster.router().get_swarm(GetSwarmRequest { swarm_id: swarm.id.clone() }).await.ok()?;
    let pid = answer.into_inner().swarm?.nodes.get(node as usize)?.pid;
    let worker = process::of(pid).filter(|_| pid != 0)?;
    let victim = if kind == "worker" { worker } else { agent_of(pid)? };
    Some((victim, Some((swarm.id.clone(), node))))
}

/// The agent program below a worker.
fn agent_of(worker: u32) -> Option<ProcessId> {
    let children = std::fs::read_dir(format!("/proc/{worker}/task")).ok()?.filter_map(Result::ok).flat_map(|task| {
        let listed = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        listed.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>()
    });
    children
        .filter_map(process::of)
        .find(|child| process::program(child.pid).is_some_and(|name| name.starts_with("fake-app")))
}

struct Moment {
    uncommitted: bool,
}

/// Waits until a turn is in flight and, when asked, records wait that the router has not committed.
async fn bad_moment(run: &Run, gap: bool) -> anyhow::Result<Moment> {
    loop {
        let state = disk_state(run)?;
        if state.turns_in_flight > 0 && (!gap || state.uncommitted > 0) {
            return Ok(Moment { uncommitted: state.uncommitted > 0 });
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

struct DiskState {
    turns_in_flight: i64,
    uncommitted: u64,
}

/// What the files say: turns begun and not ended, and bytes behind the cursors in the router's database.
fn disk_state(run: &Run) -> anyhow::Result<DiskState> {
    let mailbox = Mailbox::new(run.cluster.state().path().join("mailbox"));
    let cursors = committed_cursors(&run.cluster.state().path().join("router/router.sqlite"))?;
    let mut state = DiskState { turns_in_flight: 0, uncommitted: 0 };
    for swarm in &run.swarms {
        let swarm_id: SwarmId = swarm.id.parse()?;
        for node in (0..swarm.nodes).map(NodeIndex) {
            for generation in mailbox.generations(&swarm_id, node)? {
                let outbox = OutboxId { swarm: swarm_id.clone(), node, generation };
                let newest = mailbox.generations(&swarm_id, node)?.last() == Some(&generation);
                let (appended, open) = read_outbox(&mailbox.outbox_dir(&outbox), newest)?;
                let committed = cursors.get(&key(&swarm.id, node, generation)).copied().unwrap_or(0);
                state.uncommitted += appended.saturating_sub(committed);
                state.turns_in_flight += open;
            }
        }
    }
    Ok(state)
}

fn key(swarm: &str, node: NodeIndex, generation: Generation) -> String {
    format!("{swarm}/{node}/{generation}")
}

/// Bytes in an outbox (it never fills a segment here), and turns begun and not ended in it.
fn read_outbox(dir: &Path, count_turns: bool) -> anyhow::Result<(u64, i64)> {
    let path: PathBuf = dir.join("00000001.jsonl");
    let Ok(bytes) = std::fs::read(&path) else { return Ok((0, 0)) };
    if dir.join("00000002.jsonl").exists() {
        bail!("{} was rotated; this proof counts on one segment", dir.display());
    }
    let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    let mut open = 0;
    if count_turns {
        for line in bytes[..whole].split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            if let Ok(Line::Record(record)) = decode_line(line) {
                open += i64::from(record.kind == "turn_started") - i64::from(record.kind == "turn_complete");
            }
        }
    }
    Ok((whole as u64, open.max(0)))
}

/// The router's committed cursors, read as any other program would read its database.
fn committed_cursors(database: &Path) -> anyhow::Result<HashMap<String, u64>> {
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY | rusqlite::OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = rusqlite::Connection::open_with_flags(database, flags)?;
    let mut query = connection
        .prepare("SELECT swarms.id, node, generation, offset FROM streams JOIN swarms ON swarms.key = streams.swarm")?;
    let rows = query.query_map([], |row| {
        let (swarm, node, generation): (String, u32, u32) = (row.get(0)?, row.get(1)?, row.get(2)?);
        Ok((key(&swarm, NodeIndex(node), Generation(generation)), row.get::<_, i64>(3)?.unsigned_abs()))
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}
