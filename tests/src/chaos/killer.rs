//! Picks a victim, makes sure that the moment is a bad one, and kills it.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use drover_service::process::{self, ProcessId};
use drover_testkit::cluster::signal;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use rustix::process::Signal;

use super::deck::{Card, When, deal};
use super::disk::{Disk, Node};
use super::{Place, Plan, Run};

/// One kill as it happened.
#[derive(Debug, Clone)]
pub(crate) struct Kill {
    /// What was killed.
    pub(crate) kind: &'static str,
    /// Whose worker or agent it was.
    pub(crate) node: Option<Place>,
    /// Nodes with a turn in flight at that moment.
    pub(crate) in_flight: usize,
    /// Bytes of records appended while router or follower was held still, and committed by nobody.
    pub(crate) uncommitted: u64,
    /// Whether the node that was hit had a turn in flight.
    pub(crate) own_turn: bool,
}

/// How long a victim may take to be there, and a bad moment to come.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long a victim is held still until the moment is bad.
const HOLD: Duration = Duration::from_secs(2);
/// Between two looks at the files.
const LOOK: Duration = Duration::from_millis(5);

/// Kills as often as the plan says.
pub(crate) async fn kill(plan: Plan, run: &Run) -> anyhow::Result<Vec<Kill>> {
    let mut rng = StdRng::seed_from_u64(plan.seed);
    let mut disk = run.disk()?;
    let mut kills = Vec::new();
    let result = async {
        for card in deal(&plan, &mut rng) {
            kills.push(one_kill(run, &mut disk, &mut rng, card, plan.forget).await?);
            run.kills_done.store(kills.len(), Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..300))).await;
        }
        Ok(())
    }
    .await;
    run.over.store(true, Ordering::Relaxed);
    result.map(|()| kills)
}

async fn one_kill(run: &Run, disk: &mut Disk, rng: &mut StdRng, card: Card, forget: bool) -> anyhow::Result<Kill> {
    let deadline = Instant::now() + PATIENCE;
    let mut attempts = 0;
    loop {
        let mut nodes = disk.look()?;
        if forget && card.kind == "worker" {
            nodes.retain(|node| disk.has_worked(&node.place));
        }
        let victim = victim(run, rng, card, &nodes);
        // Prompts are for the moments at which somebody is there to be killed. On nodes somebody always is.
        let waits = victim.is_some() || matches!(card.when, When::Busy | When::Idle);
        run.wanted.store(waits, Ordering::Relaxed);
        if let Some((victim, node)) = victim
            && nodes.iter().any(|node| node.busy)
        {
            attempts += 1;
            if let Some(kill) = strike(disk, card, victim, node, forget).await? {
                run.wanted.store(false, Ordering::Relaxed);
                return Ok(kill);
            }
        }
        if Instant::now() > deadline {
            bail!("no chance for {card:?} within {PATIENCE:?}: held {attempts} times, nodes {nodes:#?}");
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// A living process for this card, and whose node it serves.
fn victim(run: &Run, rng: &mut StdRng, card: Card, nodes: &[Node]) -> Option<(ProcessId, Option<Place>)> {
    if !matches!(card.when, When::Busy | When::Idle) {
        return run.cluster.daemon(card.kind).filter(process::is_alive).map(|id| (id, None));
    }
    let fits = |node: &&Node| suits(node, card.when) && (card.kind == "worker" || run.agent(&node.place) == "codex");
    let fitting: Vec<&Node> = nodes.iter().filter(fits).collect();
    let node = fitting.choose(rng)?;
    let victim = if card.kind == "worker" { node.worker } else { agent_of(node.worker.pid)? };
    Some((victim, Some(node.place.clone())))
}

/// Whether now is the moment to hit this node.
fn suits(node: &Node, when: When) -> bool {
    match when {
        When::Busy => node.busy,
        When::Idle => node.idle,
        When::Any | When::Gap => true,
    }
}

/// Holds the victim still, so that a bad moment stays one until it is dead, and kills it when the moment is bad. None when
/// the moment has passed; then the victim goes on.
async fn strike(
    disk: &mut Disk,
    card: Card,
    victim: ProcessId,
    place: Option<Place>,
    forget: bool,
) -> anyhow::Result<Option<Kill>> {
    if signal(victim.pid, Signal::STOP).is_err() {
        return Ok(None);
    }
    let deadline = Instant::now() + HOLD;
    let mut struck = None;
    if stopped(&victim, deadline).await {
        disk.look()?;
        // Whatever is appended from here on passes neither router nor follower when that is the victim.
        let before = disk.appended();
        while Instant::now() < deadline {
            let nodes = disk.look()?;
            let in_flight = nodes.iter().filter(|node| node.busy).count();
            let own = nodes.iter().find(|node| Some(&node.place) == place.as_ref());
            let own_turn = own.is_some_and(|node| node.busy);
            if in_flight == 0 || place.is_some() && !own.is_some_and(|node| suits(node, card.when)) {
                break;
            }
            let pipe = matches!(card.kind, "router" | "outbox-follower");
            // A router that is held in the middle of a commit may not let anybody read; that is no reason to give up.
            let uncommitted = if pipe { disk.uncommitted_since(&before).unwrap_or(0) } else { 0 };
            if card.when != When::Gap || uncommitted > 0 {
                struck = Some(Kill { kind: card.kind, node: place, in_flight, uncommitted, own_turn });
                break;
            }
            tokio::time::sleep(LOOK).await;
        }
    }
    if let Some(kill) = &struck {
        if forget
            && kill.kind == "worker"
            && let Some(place) = &kill.node
        {
            disk.forget(place)?;
        }
        ensure!(process::is_alive(&victim), "the victim was gone before it was killed");
        signal(victim.pid, Signal::KILL)?;
    } else {
        let _ = signal(victim.pid, Signal::CONT);
    }
    Ok(struck)
}

/// Waits until no thread of it runs any more.
async fn stopped(victim: &ProcessId, deadline: Instant) -> bool {
    while process::is_alive(victim) && Instant::now() < deadline {
        let threads = std::fs::read_dir(format!("/proc/{}/task", victim.pid)).into_iter().flatten();
        let running = threads.filter_map(Result::ok).any(|thread| {
            let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            let state = stat.rsplit_once(')').and_then(|(_, fields)| fields.split_ascii_whitespace().next());
            !matches!(state, Some("T" | "t") | None)
        });
        if !running {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    false
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
