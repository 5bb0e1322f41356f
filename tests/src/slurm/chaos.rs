//! "Nothing lost, nothing twice" on a real Slurm: one fault after the other, each while prompts run on all nodes of a swarm.
//!
//! The judge is not drover: it is the ledgers that the agents keep on the disks of the compute hosts, and Slurm's own programs.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use drover_proto::router::InjectRequest;
use drover_testkit::cluster::RouterClient;
use drover_testkit::lab::Options;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::Value;
use tonic::Code;

use super::faults::Harm;
pub use super::faults::{Fault, all};
use super::judge::{self, Round};
use super::{PATIENCE, Seat, Site};
use crate::subscriber::{Subscriber, View};

/// How long a router may be away; a laptop is gone for two minutes.
const AWAY: Duration = Duration::from_mins(5);

/// How much to do.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Decides everything random.
    pub seed: u64,
    /// From where drover is used.
    pub seat: Seat,
    /// Nodes of the swarm. The cluster has one more, so that a job that lost a host finds another.
    pub nodes: u32,
    /// Prompts during each fault.
    pub injections: usize,
    /// How long prompts run before the fault, and after it was put right.
    pub margin: Duration,
    /// How long lasts what lasts; a laptop is gone for twice as long.
    pub long: Duration,
    /// For how long hosts believe what they know of files on the shared directory.
    pub cache_seconds: u32,
    /// What is done, one after the other.
    pub faults: Vec<Fault>,
}

/// What one fault came to.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What was done.
    pub fault: Fault,
    /// Prompts that were carried out and said to be.
    pub completed: usize,
    /// Prompts that failed, each with its reason, and were carried out at most once.
    pub failed: usize,
    /// Prompts that were not taken, because the swarm was over.
    pub refused: usize,
    /// Highest generation of a worker at the end.
    pub generation: u64,
    /// Slurm's last word on the job.
    pub state: String,
    /// From the end of the fault until every prompt had ended.
    pub settled: Duration,
    /// All in all.
    pub took: Duration,
}

/// One prompt on its way.
#[derive(Debug, Clone)]
pub(crate) struct Sent {
    pub(crate) injection_id: String,
    /// Its first line, by which the ledgers know it.
    pub(crate) name: String,
}

/// What became of the prompts of a round.
#[derive(Debug, Default)]
struct Prompts {
    sent: Vec<Sent>,
    refused: Vec<String>,
}

/// Runs the plan and judges each fault by itself; an error is a violation. `tell` hears of each outcome at once.
pub fn run(plan: &Plan, tell: impl Fn(&Outcome) + Send + Sync) -> anyhow::Result<Vec<Outcome>> {
    let quota_mib = if plan.faults.contains(&Fault::Quota) { 512 } else { 0 };
    let options = Options { nodes: plan.nodes + 1, cache_seconds: plan.cache_seconds, quota_mib, ..Options::default() };
    let more = "worker: {agent: echo, drain_grace: 2s}\n";
    super::with(options, plan.seat, more, async |site| {
        let subscriber = Subscriber::start(site.router());
        let mut outcomes = Vec::new();
        for (index, &fault) in plan.faults.iter().enumerate() {
            let round = one(plan, site, &subscriber, fault, plan.seed.wrapping_add(index as u64)).await;
            let outcome = round.with_context(|| format!("{fault:?}, seed {}", plan.seed))?;
            tell(&outcome);
            outcomes.push(outcome);
        }
        judge::log(site, &subscriber).await?;
        Ok(outcomes)
    })
}

#[expect(clippy::disallowed_methods, reason = "a test program has no tracked tasks; the handle is waited for")]
async fn one(
    plan: &Plan,
    site: &mut Site,
    subscriber: &Subscriber,
    fault: Fault,
    seed: u64,
) -> anyhow::Result<Outcome> {
    let begun = Instant::now();
    let nodes = plan.nodes.to_string();
    let args = ["launch", "--nodes", &nodes, "--partition", "mi2508x", "--time", fault.time(), "--detach", "--json"];
    let launched = site.json(&args)?;
    let swarm = launched["swarm_id"].as_str().context("no swarm")?.to_owned();
    let before = site.wait_status(&swarm, "the swarm runs", |status| at_rest(status, plan.nodes))?;

    let span = plan.margin * 2 + fault.lasts(plan.long);
    let sending = tokio::spawn(send(site.router(), swarm.clone(), plan.nodes, plan.injections, span, seed));
    tokio::time::sleep(plan.margin).await;
    fault.strike(site, &swarm, plan.long).await?;
    let mended = Instant::now();
    let Prompts { sent, refused } = sending.await.context("the sender panicked")??;
    let ended = |view: &View| sent.iter().all(|sent| outcome_of(view, sent).is_some());
    if !subscriber.wait(PATIENCE * 2, ended).await {
        let view = subscriber.view();
        let open = sent.iter().filter(|sent| outcome_of(&view, sent).is_none());
        let open: Vec<String> =
            open.map(|sent| format!("{}: {:?}", sent.name, view.injections.get(&sent.injection_id))).collect();
        drop(view);
        let status = site.status(&swarm);
        bail!("{} prompts have not ended:\n{}\n{status:#?}\nqueue: {:?}", open.len(), open.join("\n"), site.queue());
    }
    let settled = mended.elapsed();

    let after = match fault.harm() {
        Harm::None | Harm::Workers => {
            site.wait_status(&swarm, "the swarm runs again", |status| at_rest(status, plan.nodes))?
        }
        Harm::Job(states) => site.wait_status(&swarm, "the end of the job is seen", |status| {
            states.iter().any(|state| status["slurm_state"] == **state) && is_over(status)
        })?,
    };
    if fault == Fault::Walltime {
        // Whether Slurm ended the workers or they were gone in time.
        let reason = after["reason"].as_str().unwrap_or_default();
        ensure!(reason.contains("time limit"), "the end of its time is not given as the reason: {reason:?}");
    }
    let round = Round { fault, swarm: &swarm, sent: &sent, refused: &refused, before: &before, after: &after };
    let outcome = judge::judge(site, &subscriber.view(), &round)?;
    site.ok(&["terminate", &swarm])?;
    let last = site.wait_status(&swarm, "the end is confirmed", |status| {
        matches!(status["slurm_state"].as_str(), Some("CANCELLED" | "COMPLETED" | "TIMEOUT")) && is_over(status)
    })?;
    site.wait("Slurm's queue is empty", || Ok(site.queue()?.is_empty().then_some(())))?;
    let state = last["slurm_state"].as_str().unwrap_or_default().to_owned();
    Ok(Outcome { state, settled, took: begun.elapsed(), ..outcome })
}

/// Every node is there and does nothing.
fn at_rest(status: &Value, nodes: u32) -> bool {
    let idle = status["nodes"].as_array().map(|all| all.iter().filter(|node| node["state"] == "idle").count());
    status["slurm_state"] == "RUNNING" && status["status"] == "running" && idle == Some(nodes as usize)
}

fn is_over(status: &Value) -> bool {
    matches!(status["status"].as_str(), Some("terminated" | "failed"))
}

fn outcome_of<'a>(view: &'a View, sent: &Sent) -> Option<&'a String> {
    view.injections.get(&sent.injection_id)?.outcome.as_ref()
}

/// Sends so many prompts evenly over a time; later ones come at once when the router was away.
async fn send(
    router: RouterClient,
    swarm: String,
    nodes: u32,
    count: usize,
    span: Duration,
    seed: u64,
) -> anyhow::Result<Prompts> {
    let mut rng = StdRng::seed_from_u64(seed);
    let begun = tokio::time::Instant::now();
    let mut prompts = Prompts::default();
    for index in 0..count {
        tokio::time::sleep_until(begun + span.mul_f64(index as f64 / count as f64)).await;
        let name = format!("{swarm}-{index}");
        let length: u64 = rng.random_range(20..600);
        let content = format!("{name}\n@echo deltas={} over={length}ms", length / 20);
        let node = rng.random_range(0..nodes);
        match inject(router.clone(), &swarm, node, &content, &name).await? {
            Ok(injection_id) => prompts.sent.push(Sent { injection_id, name }),
            Err(why) => prompts.refused.push(why),
        }
    }
    Ok(prompts)
}

/// Sends one prompt, again with the same request id until the router has taken it, or has said that it will not.
async fn inject(
    mut router: RouterClient,
    swarm: &str,
    node: u32,
    content: &str,
    request_id: &str,
) -> anyhow::Result<Result<String, String>> {
    let deadline = Instant::now() + AWAY;
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
            steps.message().await?.ok_or_else(|| tonic::Status::unavailable("no answer"))
        };
        let status = match tokio::time::timeout(Duration::from_secs(20), tried).await {
            Ok(Ok(step)) => return Ok(Ok(step.injection_id)),
            Ok(Err(status)) => status,
            Err(_) => tonic::Status::deadline_exceeded("no answer for 20 s"),
        };
        if matches!(status.code(), Code::FailedPrecondition | Code::NotFound | Code::Aborted) {
            return Ok(Err(status.message().to_owned()));
        }
        if Instant::now() > deadline {
            bail!("{request_id} was not taken: {status}");
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
