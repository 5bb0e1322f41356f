//! A rolling restart and upgrade: every daemon is told to end in its turn and comes back from a program file that was replaced
//! meanwhile, while clients inject as fast as they are served. A client tries again at most three times, and for five seconds
//! at most; the agents' own ledgers and the whole log judge what became of each prompt.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use drover_proto::router::{InjectRequest, InjectionState};
use drover_service::address_book::{self, Entry};
use drover_testkit::cluster::{Cluster, program, scratch_dir, signal};
use rustix::process::Signal;

use crate::chaos::judge::{ledgers, whole_log};
use crate::chaos::launch;
use crate::subscriber::Subscriber;

/// What a client may do about a failure: how long it waits before each further try. With what the tries themselves take, a router
/// has nearly five seconds to come back.
const WAITS: [Duration; 3] = [Duration::from_millis(300), Duration::from_millis(1200), Duration::from_secs(3)];
/// When a client gives up whatever is left of its tries.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a daemon may take to be back.
const BACK: Duration = Duration::from_mins(1);
/// How long all that was sent may take to end.
const SETTLE: Duration = Duration::from_mins(2);
/// Clients that inject at one time.
const CLIENTS: usize = 8;

/// How much to do.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// How many prompts are sent.
    pub injections: usize,
    /// How many nodes there are.
    pub nodes: u32,
    /// How often every daemon has its turn.
    pub rounds: usize,
    /// Breaks the clients on purpose: they try once. The proof must fail then.
    pub gives_up: bool,
}

/// What was seen.
#[derive(Debug)]
pub struct Report {
    /// Daemons that were replaced, and how long each was away at the most.
    pub replaced: BTreeMap<String, Duration>,
    /// Prompts sent while daemons were being replaced; all were carried out.
    pub injections: usize,
    /// Prompts that were asked for again, by how often.
    pub tried_again: BTreeMap<usize, usize>,
    /// The longest that a client waited for its prompt to be taken.
    pub longest: Duration,
    /// Events, each seen once and in order by a subscriber that resumes.
    pub events: usize,
    /// How often it resumed.
    pub resumed: u32,
}

/// Runs the plan and judges it; an error is a violation.
pub async fn run(plan: Plan) -> anyhow::Result<Report> {
    let bin = scratch_dir("rolling-")?;
    let drover = bin.path().join("drover");
    fs::copy(program("drover")?, &drover)?;
    let mut cluster = Cluster::prepare("worker: {agent: echo, restart_delay: 50ms, healthy_after: 500ms}\n")?;
    cluster.use_program(drover.clone());
    cluster.up().await?;
    let swarm = launch(&mut cluster.router(), "echo", plan.nodes).await?;
    let members = || of_kind(&cluster, "gossip-membership-").len();
    wait_for("the members of the swarm", BACK, async || members() == plan.nodes as usize).await?;
    let subscriber = Subscriber::start(cluster.router());

    let load =
        Load { cluster: &cluster, swarm: &swarm, plan, next: AtomicUsize::new(0), rolled: AtomicBool::new(false) };
    let rolling = async {
        let rolled = roll(&cluster, &drover, plan).await;
        load.rolled.store(true, Ordering::Relaxed);
        rolled
    };
    let clients = futures::future::try_join_all((0..CLIENTS).map(|_| load.client()));
    let judged = async {
        let (replaced, taken) = tokio::try_join!(rolling, clients)?;
        let taken: Vec<Taken> = taken.into_iter().flatten().collect();
        judge(&cluster, &subscriber, &taken, replaced).await
    };
    judged.await.map_err(|error| error.context(cluster.logs()))
}

/// Replaces the file, and every daemon in its turn.
async fn roll(cluster: &Cluster, drover: &Path, plan: Plan) -> anyhow::Result<BTreeMap<String, Duration>> {
    let mut replaced = BTreeMap::<String, Duration>::new();
    for _ in 0..plan.rounds {
        // As an upgrade does it: a new file takes the name of the old one, which goes on as long as somebody runs it.
        let fresh = drover.with_extension("fresh");
        fs::copy(drover, &fresh)?;
        fs::rename(&fresh, drover)?;
        let file = fs::metadata(drover)?.ino();
        let mut names: Vec<String> = ["outbox-follower", "slurm-allocator", "router"].map(str::to_owned).into();
        // A worker takes its member with it, so that each is told of both ways.
        for kind in ["gossip-membership-", "worker-"] {
            names.extend(of_kind(cluster, kind).into_iter().map(|entry| entry.name));
        }
        for name in names {
            let before = address_book::read(cluster.state(), &name).with_context(|| format!("{name} does not run"))?;
            let began = Instant::now();
            signal(before.pid, Signal::TERM)?;
            let back = || address_book::read(cluster.state(), &name).filter(|entry| entry.pid != before.pid);
            wait_for(&format!("{name} to be back"), BACK, async || match back() {
                Some(entry) => tokio::net::TcpStream::connect(&entry.listen).await.is_ok(),
                None => false,
            })
            .await?;
            let away = replaced.entry(name.clone()).or_default();
            *away = began.elapsed().max(*away);
            let pid = back().with_context(|| format!("{name} is gone again"))?.pid;
            let runs = fs::metadata(format!("/proc/{pid}/exe"))?.ino();
            ensure!(runs == file, "{name} was started from the file that was replaced");
            // Nobody replaces the next one before the last is whole.
            cluster.wait_ready(BACK).await?;
        }
    }
    Ok(replaced)
}

fn of_kind(cluster: &Cluster, kind: &str) -> Vec<Entry> {
    address_book::list(cluster.state()).into_iter().filter(|entry| entry.name.starts_with(kind)).collect()
}

async fn wait_for(what: &str, limit: Duration, mut done: impl AsyncFnMut() -> bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    while !done().await {
        ensure!(Instant::now() < deadline, "{what}: not within {limit:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// One prompt that was taken.
struct Taken {
    name: String,
    injection_id: String,
    again: usize,
    took: Duration,
}

struct Load<'a> {
    cluster: &'a Cluster,
    swarm: &'a str,
    plan: Plan,
    next: AtomicUsize,
    rolled: AtomicBool,
}

impl Load<'_> {
    /// Sends one prompt after the other, until there are enough and every daemon has been replaced.
    async fn client(&self) -> anyhow::Result<Vec<Taken>> {
        let mut taken = Vec::new();
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.plan.injections && self.rolled.load(Ordering::Relaxed) {
                return Ok(taken);
            }
            taken.push(self.prompt(number).await?);
            // As many as are wanted, over the time that the restarts take: they are to meet each other.
            let early = number >= self.plan.injections / 2 && !self.rolled.load(Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(if early { 100 } else { 20 })).await;
        }
    }

    /// A prompt until it is in its node's inbox.
    async fn prompt(&self, number: usize) -> anyhow::Result<Taken> {
        let name = format!("rolling-{number}");
        let request = InjectRequest {
            request_id: name.clone(),
            swarm_id: self.swarm.to_owned(),
            nodes: vec![number as u32 % self.plan.nodes],
            content: format!("{name}\n@echo deltas=3 over=50ms"),
            ..Default::default()
        };
        let began = Instant::now();
        let mut again = 0;
        loop {
            let failed =
                match tokio::time::timeout(PATIENCE.saturating_sub(began.elapsed()), self.attempt(&request)).await {
                    Ok(Ok(injection_id)) => return Ok(Taken { name, injection_id, again, took: began.elapsed() }),
                    Ok(Err(status)) => status.to_string(),
                    Err(_) => "no answer".to_owned(),
                };
            let wait = WAITS.get(again).filter(|wait| !self.plan.gives_up && began.elapsed() + **wait < PATIENCE);
            let Some(wait) = wait else {
                bail!("{name} was not taken after {} tries in {:?}: {failed}", again + 1, began.elapsed());
            };
            again += 1;
            tokio::time::sleep(*wait).await;
        }
    }

    async fn attempt(&self, request: &InjectRequest) -> Result<String, tonic::Status> {
        let mut steps = self.cluster.router().inject(request.clone()).await?.into_inner();
        while let Some(step) = steps.message().await? {
            match step.state() {
                InjectionState::Failed => return Err(tonic::Status::failed_precondition(step.error)),
                InjectionState::Accepted => return Ok(step.injection_id),
                _ => {}
            }
        }
        Err(tonic::Status::unavailable("the stream ended"))
    }
}

/// Whether each prompt ended well, once, and was carried out once.
async fn judge(
    cluster: &Cluster,
    subscriber: &Subscriber,
    taken: &[Taken],
    replaced: BTreeMap<String, Duration>,
) -> anyhow::Result<Report> {
    let ended = |name: &Taken, view: &crate::subscriber::View| {
        view.injections.get(&name.injection_id).is_some_and(|seen| seen.outcome.is_some())
    };
    if !subscriber.wait(SETTLE, |view| taken.iter().all(|one| ended(one, view))).await {
        let view = subscriber.view();
        let open: Vec<&str> = taken.iter().filter(|one| !ended(one, &view)).map(|one| one.name.as_str()).collect();
        bail!("{} prompts have not ended: {open:?}", open.len());
    }
    let log = whole_log(cluster).await?;
    let executed = ledgers(cluster)?;
    let mut violations = Vec::new();
    for one in taken {
        let times = |event: &str| {
            log.injections.get(&one.injection_id).and_then(|seen| seen.counts.get(event)).copied().unwrap_or(0)
        };
        let outcome = log.injections.get(&one.injection_id).and_then(|seen| seen.outcome.clone());
        let ran = executed.get(&one.name).copied().unwrap_or(0);
        let once = (times("inject_ack"), times("turn_complete"), ran) == (1, 1, 1);
        if !once || outcome.as_deref() != Some("completed") {
            violations.push(format!(
                "{}: {outcome:?}, acknowledged {}, complete {}, carried out {ran} times",
                one.name,
                times("inject_ack"),
                times("turn_complete")
            ));
        }
    }
    let (seen, resumed) = {
        let view = subscriber.view();
        (view.seqs.clone(), view.resumed)
    };
    if log.seqs.get(..seen.len()) != Some(&seen[..]) {
        violations.push(format!(
            "the subscriber saw {} events, the log holds {} and they differ",
            seen.len(),
            log.seqs.len()
        ));
    }
    ensure!(violations.is_empty(), "{} violations\n{}", violations.len(), violations.join("\n"));
    let mut tried_again = BTreeMap::new();
    for one in taken.iter().filter(|one| one.again > 0) {
        *tried_again.entry(one.again).or_default() += 1;
    }
    Ok(Report {
        replaced,
        injections: taken.len(),
        tried_again,
        longest: taken.iter().map(|one| one.took).max().unwrap_or_default(),
        events: log.seqs.len(),
        resumed,
    })
}
