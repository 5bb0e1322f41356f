//! "Nothing lost, nothing twice": daemons, workers and agents are killed with SIGKILL in random order while prompts run.
//!
//! The judge is not drover: it is the agent programs' own ledgers of the prompts they carried out, and the files on disk
//! at the moment of each kill.

mod judge;
mod killer;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use drover_proto::common::LaunchSpec;
use drover_proto::router::launch_swarm_response::Step;
use drover_proto::router::{InjectRequest, LaunchSwarmRequest};
use drover_testkit::cluster::{Cluster, RouterClient, program};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::subscriber::Subscriber;

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
}

/// What was seen.
#[derive(Debug, Default)]
pub struct Report {
    /// Kills by what was killed.
    pub kills: HashMap<&'static str, usize>,
    /// Kills between append and commit.
    pub gap_kills: usize,
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

/// One prompt on its way.
#[derive(Debug, Clone)]
pub(crate) struct Sent {
    pub(crate) injection_id: String,
    pub(crate) prompt: String,
    pub(crate) swarm: String,
    pub(crate) node: u32,
}

/// What the parts share while it runs.
pub(crate) struct Run {
    pub(crate) cluster: Cluster,
    pub(crate) swarms: Vec<Swarm>,
    pub(crate) kills_done: AtomicUsize,
    pub(crate) over: AtomicBool,
    pub(crate) unanswered: AtomicUsize,
}

/// A swarm under test.
#[derive(Debug, Clone)]
pub(crate) struct Swarm {
    pub(crate) id: String,
    pub(crate) agent: &'static str,
    pub(crate) nodes: u32,
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
        over: AtomicBool::new(false),
        unanswered: AtomicUsize::new(0),
    };
    let subscriber = Subscriber::start(run.cluster.router());

    let result = async {
        let (sent, kills) = tokio::try_join!(drive(plan, &run, &subscriber), killer::kill(plan, &run))?;
        judge::judge(plan, &run, &subscriber, &sent, kills).await
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
            let (logs, kept) = (run.cluster.logs(), run.cluster.keep());
            Err(error.context(format!("seed {}, {unanswered} calls unanswered, kept {kept}\n{logs}", plan.seed)))
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

/// Sends the prompts, spread over the time that the kills take, and waits until each has ended.
async fn drive(plan: Plan, run: &Run, subscriber: &Subscriber) -> anyhow::Result<Vec<Sent>> {
    let mut rng = StdRng::seed_from_u64(plan.seed ^ 0xD21E);
    let places: Vec<(String, u32)> =
        run.swarms.iter().flat_map(|swarm| (0..swarm.nodes).map(|node| (swarm.id.clone(), node))).collect();
    let mut sent: Vec<Sent> = Vec::new();
    for index in 0..plan.injections {
        // In step with the kills, with a head start, so that turns are under way at every kill.
        let due = |kills: usize| (kills + 1) * plan.injections / plan.kills.max(1) + places.len();
        while index >= due(run.kills_done.load(Ordering::Relaxed)) && !run.over.load(Ordering::Relaxed) {
            // The next kill waits for a turn in flight, so there must always be one.
            if !any_open(subscriber, &sent[sent.len().saturating_sub(places.len() * 4)..]) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let (swarm, node) = places[rng.random_range(0..places.len())].clone();
        let prompt = format!(
            "chaos-{}-{index}\n@echo delay={}ms\n@mock delay={}ms deltas=3",
            plan.seed,
            rng.random_range(20..900),
            rng.random_range(5..300)
        );
        let injection_id = inject(run, &swarm, node, &prompt, &format!("chaos-{}-{index}", plan.seed)).await?;
        sent.push(Sent { injection_id, prompt, swarm, node });
    }
    let limit = Duration::from_mins(2);
    let all_ended = subscriber
        .wait(limit, |view| {
            run.over.load(Ordering::Relaxed)
                && sent
                    .iter()
                    .all(|sent| view.injections.get(&sent.injection_id).is_some_and(|seen| seen.outcome.is_some()))
        })
        .await;
    if !all_ended {
        let view = subscriber.view();
        let open: Vec<_> = sent
            .iter()
            .filter(|sent| view.injections.get(&sent.injection_id).is_none_or(|seen| seen.outcome.is_none()))
            .map(|sent| {
                format!(
                    "{} on {}/{}: {:?}",
                    sent.injection_id,
                    sent.swarm,
                    sent.node,
                    view.injections.get(&sent.injection_id)
                )
            })
            .collect();
        bail!("{} prompts have not ended:\n{}", open.len(), open.join("\n"));
    }
    Ok(sent)
}

/// Whether one of these has not ended yet.
fn any_open(subscriber: &Subscriber, sent: &[Sent]) -> bool {
    let view = subscriber.view();
    sent.iter().any(|sent| view.injections.get(&sent.injection_id).is_none_or(|seen| seen.outcome.is_none()))
}

/// How long a router that runs may leave an inject without an answer before it is asked again.
const PATIENT: Duration = Duration::from_secs(20);

/// Sends one prompt, again with the same request id until the router has taken it.
async fn inject(run: &Run, swarm: &str, node: u32, content: &str, request_id: &str) -> anyhow::Result<String> {
    let deadline = Instant::now() + Duration::from_mins(1);
    let mut router = run.cluster.router();
    let request = InjectRequest {
        request_id: request_id.to_owned(),
        swarm_id: swarm.to_owned(),
        nodes: vec![node],
        content: content.to_owned(),
        ..Default::default()
    };
    loop {
        let tried = async {
            let mut steps = router.inject(request.clone()).await?.into_inner();
            steps.message().await?.context("no answer").map_err(|error| tonic::Status::unavailable(error.to_string()))
        };
        let Ok(tried) = tokio::time::timeout(PATIENT, tried).await else {
            run.unanswered.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        match tried {
            Ok(step) => return Ok(step.injection_id),
            Err(status) if Instant::now() > deadline => bail!("{request_id} was not taken: {status}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}
