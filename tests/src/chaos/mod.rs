//! "Nothing lost, nothing twice": daemons, workers and agents are killed with SIGKILL in random order while prompts run.
//!
//! The judge is not drover: it is the agent programs' own ledgers of the prompts they carried out, and the files on disk
//! at the moment of each kill.
//!
//! Two parties share the run. The killer looks at the files until a turn is in flight, holds its victim still, makes sure
//! that the moment is the one that it wants, and kills. The sender sees to it that there is such a moment: while somebody is
//! to be killed about half of the nodes are at work, on turns that say something new every few hundredths of a second.

mod deck;
mod disk;
pub(crate) mod judge;
mod killer;
mod sender;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::bail;
use drover_proto::common::LaunchSpec;
use drover_proto::router::LaunchSwarmRequest;
use drover_proto::router::launch_swarm_response::Step;
use drover_testkit::cluster::{Cluster, RouterClient, program};

use self::disk::Disk;
use crate::subscriber::Subscriber;

/// What is killed.
const KINDS: [&str; 5] = ["router", "outbox-follower", "slurm-allocator", "worker", "codex"];
/// At most this share of the prompts may fail.
const MAY_FAIL: f64 = 0.03;

/// How much to do.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Decides everything random.
    pub seed: u64,
    /// How many processes are killed.
    pub kills: usize,
    /// How many prompts are sent.
    pub injections: usize,
    /// How many nodes there are, half of them with each agent.
    pub nodes: u32,
    /// How many kills must hit between a worker's append and the commit of the router's cursor.
    pub gap_kills: usize,
    /// Breaks drover on purpose: the worker that comes after a killed one finds no journal. The proof must fail then.
    pub forget: bool,
}

/// What was seen.
#[derive(Debug, Default)]
pub struct Report {
    /// Kills by what was killed.
    pub kills: BTreeMap<&'static str, usize>,
    /// Kills of router or follower between append and commit.
    pub gap_kills: usize,
    /// Kills of a worker or an agent in a turn of its own.
    pub own_turn_kills: usize,
    /// Fewest nodes with a turn in flight at a kill.
    pub fewest_in_flight: usize,
    /// Prompts that ended well.
    pub completed: usize,
    /// Prompts that failed, each with its reason.
    pub failed: Vec<String>,
    /// Prompts in the agents' ledgers.
    pub executed: usize,
    /// Events seen.
    pub events: usize,
    /// How often the subscriber resumed.
    pub resumed: u32,
    /// Calls that a running router left without an answer, so that they were repeated; there should be none.
    pub unanswered: usize,
    /// How long it took.
    pub took: Duration,
}

/// A node of a swarm.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Place {
    pub(crate) swarm: String,
    pub(crate) node: u32,
}

/// One prompt on its way.
#[derive(Debug, Clone)]
pub(crate) struct Sent {
    pub(crate) injection_id: String,
    /// Its first line, by which the ledgers know it.
    pub(crate) name: String,
    pub(crate) place: Place,
}

/// What the parts share while it runs.
pub(crate) struct Run {
    pub(crate) cluster: Cluster,
    pub(crate) swarms: Vec<Swarm>,
    pub(crate) kills_done: AtomicUsize,
    /// Somebody is there to be killed, as soon as turns are in flight.
    pub(crate) wanted: AtomicBool,
    pub(crate) over: AtomicBool,
    pub(crate) unanswered: AtomicUsize,
}

impl Run {
    /// A fresh reader of the files.
    pub(crate) fn disk(&self) -> anyhow::Result<Disk> {
        Disk::new(self.cluster.state().path(), &self.swarms)
    }

    /// The agent of a node.
    pub(crate) fn agent(&self, place: &Place) -> &'static str {
        self.swarms.iter().find(|swarm| swarm.id == place.swarm).map_or("", |swarm| swarm.agent)
    }
}

/// A swarm under test.
#[derive(Debug, Clone)]
pub(crate) struct Swarm {
    pub(crate) id: String,
    pub(crate) agent: &'static str,
    pub(crate) nodes: u32,
}

impl Swarm {
    /// Its nodes.
    pub(crate) fn places(&self) -> impl Iterator<Item = Place> {
        (0..self.nodes).map(|node| Place { swarm: self.id.clone(), node })
    }
}

/// Runs the plan and judges it; an error is a violation.
pub async fn run(plan: Plan) -> anyhow::Result<Report> {
    let begun = Instant::now();
    let config = format!(
        "worker:\n  codex_bin: {}\n  max_restarts: 100000\n  max_agent_restarts: 100000\n  \
         restart_delay: 50ms\n  healthy_after: 500ms\n  sandbox_mode: danger-full-access\n",
        program("fake-app-server")?.display()
    );
    let cluster = Cluster::start(&config).await?;
    let half = plan.nodes / 2;
    let mut swarms = Vec::new();
    for (agent, nodes) in [("echo", plan.nodes - half), ("codex", half)] {
        let id = launch(&mut cluster.router(), agent, nodes).await?;
        swarms.push(Swarm { id, agent, nodes });
    }
    let mut run = Run {
        cluster,
        swarms,
        kills_done: AtomicUsize::new(0),
        wanted: AtomicBool::new(false),
        over: AtomicBool::new(false),
        unanswered: AtomicUsize::new(0),
    };
    let subscriber = Subscriber::start(run.cluster.router());

    let result = async {
        let (sent, kills) = tokio::try_join!(sender::drive(plan, &run, &subscriber), killer::kill(plan, &run))?;
        judge::judge(&plan, &run, &subscriber, &sent, &kills).await
    }
    .await;
    match result {
        Ok(mut report) => {
            report.took = begun.elapsed();
            report.unanswered = run.unanswered.load(Ordering::Relaxed);
            Ok(report)
        }
        Err(error) => {
            let unanswered = run.unanswered.load(Ordering::Relaxed);
            let kills = run.kills_done.load(Ordering::Relaxed);
            let logs = run.cluster.logs();
            // A run that was broken on purpose is of no interest to anybody.
            let kept = if plan.forget { "nothing".to_owned() } else { run.cluster.keep() };
            let seed = plan.seed;
            Err(error.context(format!(
                "seed {seed}, {kills} kills done, {unanswered} calls unanswered, kept {kept}\n{logs}"
            )))
        }
    }
}

/// Launches a swarm and waits until it is up.
pub(crate) async fn launch(router: &mut RouterClient, agent: &str, nodes: u32) -> anyhow::Result<String> {
    let spec = LaunchSpec { node_count: nodes, agent: agent.to_owned(), ..Default::default() };
    let mut steps =
        router.launch_swarm(LaunchSwarmRequest { spec: Some(spec), ..Default::default() }).await?.into_inner();
    while let Some(step) = steps.message().await? {
        if let Some(Step::Launched(swarm)) = step.step {
            return Ok(swarm.swarm_id);
        }
    }
    bail!("the launch ended without a swarm")
}
