//! A rolling restart and upgrade: every daemon is told to end in its turn and comes back from a program file that was replaced
//! meanwhile, while clients inject, talk to sessions and have models called as fast as they are served. A client tries again at
//! most three times, and for five seconds at most; the agents' own ledgers, the whole log, the sessions and the provider's ledger
//! judge what became of each request.

mod load;
mod version;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use drover_proto::handoff::GetSessionRequest;
use drover_service::StateDir;
use drover_service::address_book::{self, Entry};
use drover_testkit::cluster::{Cluster, program, scratch_dir, signal};
use drover_testkit::mock_llm::{MockLlm, Settings};
use rustix::process::Signal;

use crate::chaos::judge::{ledgers, whole_log};
use crate::chaos::launch;
use crate::subscriber::{Subscriber, View};
use load::{Load, Taken};
use version::Programs;

/// How long a daemon may take to be back.
const BACK: Duration = Duration::from_mins(1);
/// How long all that was sent may take to end.
const SETTLE: Duration = Duration::from_mins(2);
/// Clients that inject at one time.
const CLIENTS: usize = 8;
/// Sessions, each with one turn after the other.
const SESSIONS: usize = 2;

/// How much to do.
#[derive(Debug, Clone)]
pub struct Plan {
    /// How many prompts are sent.
    pub injections: usize,
    /// How many nodes there are.
    pub nodes: u32,
    /// How often every daemon has its turn.
    pub rounds: usize,
    /// The program that runs before the first round. Unset: the one that was built, each round one that says that it is a
    /// version later.
    pub from: Option<PathBuf>,
    /// Breaks the clients on purpose: they try once. The proof must fail then.
    pub gives_up: bool,
}

/// What was seen.
#[derive(Debug)]
pub struct Report {
    /// Daemons that were replaced, and how long each was away at the most.
    pub replaced: BTreeMap<String, Duration>,
    /// The versions that ran, the first one first.
    pub versions: Vec<String>,
    /// Prompts sent while daemons were being replaced; all were carried out.
    pub injections: usize,
    /// Turns of sessions; all are answered, and stand in their session once.
    pub turns: usize,
    /// Model calls; all are answered.
    pub calls: usize,
    /// Model calls that the provider was asked twice, because the dispatcher's end came between.
    pub paid_again: u64,
    /// Requests that were asked for again, by how often.
    pub tried_again: BTreeMap<usize, usize>,
    /// The longest that a client waited for its prompt to be taken.
    pub longest: Duration,
    /// The longest that one waited for an answer in a session, and of a model.
    pub longest_answers: (Duration, Duration),
    /// Events, each seen once and in order by a subscriber that resumes.
    pub events: usize,
    /// How often it resumed.
    pub resumed: u32,
}

/// Runs the plan and judges it; an error is a violation.
pub async fn run(plan: Plan) -> anyhow::Result<Report> {
    let bin = scratch_dir("rolling-")?;
    let mut programs = Programs::new(bin.path(), plan.from.as_deref(), &program("drover")?)?;
    let mock = MockLlm::start(Settings { latency_ms: 20.0, ..Settings::default() })?;
    let config = format!(
        "worker: {{agent: echo, restart_delay: 50ms, healthy_after: 500ms, run_tasks: true}}\n\
         swarm: {{discovery: {{gossip_interval: 200ms, node_timeout: 2s, dead_node_timeout: 10s}}}}\n\
         node_scaling:\n  listen: 127.0.0.1:0\n  provider: {{name: mock, model: m, base_url: \"{}\"}}\n",
        mock.base_url("openai")
    );
    let mut cluster = Cluster::prepare(&config)?;
    cluster.use_program(programs.drover.clone());
    cluster.up().await?;
    let swarm = launch(&mut cluster.router(), "echo", plan.nodes).await?;
    for kind in OF_NODES {
        let running = || of_kind(cluster.state(), kind).len();
        wait_for(&format!("the nodes' {kind}"), BACK, async || running() == plan.nodes as usize).await?;
    }
    let subscriber = Subscriber::start(cluster.router());
    let load = Load::new(cluster.state(), &swarm, &plan);
    load.open_sessions().await?;

    let judged = async {
        let rolling = async {
            let rolled = roll(&mut cluster, &mut programs, plan.rounds).await;
            load.stop();
            rolled
        };
        let prompts = futures::future::try_join_all((0..CLIENTS).map(|_| load.prompts()));
        let turns = futures::future::try_join_all((0..SESSIONS).map(|session| load.turns(session)));
        let (replaced, taken, turns, calls) = tokio::try_join!(rolling, prompts, turns, load.calls())?;
        let taken = Work { prompts: taken.into_iter().flatten().collect(), turns, calls };
        let report = judge(&cluster, &subscriber, &taken, replaced).await?;
        Ok(Report { versions: programs.versions.clone(), paid_again: mock.ledger().answered_again, ..report })
    };
    let judged: anyhow::Result<Report> = judged.await;
    judged.map_err(|error| error.context(cluster.logs()))
}

/// Daemons of which each node has one, in the order in which they are replaced. A worker takes the other two with it, so that each of
/// them is told of both ways.
const OF_NODES: [&str; 3] = ["gossip-membership-", "handoff-coordinator-", "worker-"];
/// Daemons that `drover up` keeps.
const OF_UP: [&str; 4] = ["outbox-follower", "slurm-allocator", "llm-dispatcher", "router"];

/// Replaces the file, and every daemon in its turn; then `drover up` with all that it keeps.
async fn roll(
    cluster: &mut Cluster,
    programs: &mut Programs,
    rounds: usize,
) -> anyhow::Result<BTreeMap<String, Duration>> {
    let mut replaced = BTreeMap::<String, Duration>::new();
    for _ in 0..rounds {
        programs.replace()?;
        let state = cluster.state().clone();
        let of_nodes = OF_NODES.iter().flat_map(|kind| of_kind(&state, kind)).map(|entry| entry.name);
        let names: Vec<String> = OF_UP.into_iter().map(str::to_owned).chain(of_nodes).collect();
        for name in names {
            let before = address_book::read(&state, &name).with_context(|| format!("{name} does not run"))?;
            let began = Instant::now();
            signal(before.pid, Signal::TERM)?;
            back(&state, programs, &name, before.pid).await?;
            let away = replaced.entry(name).or_default();
            *away = began.elapsed().max(*away);
            // Nobody replaces the next one before the last is whole.
            cluster.wait_ready(BACK).await?;
        }
        let before: Vec<Entry> = OF_UP.iter().filter_map(|name| address_book::read(&state, name)).collect();
        let began = Instant::now();
        restart_up(cluster).await?;
        for entry in before {
            back(&state, programs, &entry.name, entry.pid).await?;
        }
        let away = replaced.entry("up".to_owned()).or_default();
        *away = began.elapsed().max(*away);
    }
    Ok(replaced)
}

/// Waits until a daemon runs as another process than before, from the file that is in place now.
async fn back(state: &StateDir, programs: &Programs, name: &str, before: u32) -> anyhow::Result<()> {
    let back = || address_book::read(state, name).filter(|entry| entry.pid != before);
    wait_for(&format!("{name} to be back"), BACK, async || match back() {
        Some(entry) => tokio::net::TcpStream::connect(&entry.listen).await.is_ok(),
        None => false,
    })
    .await?;
    let entry = back().with_context(|| format!("{name} is gone again"))?;
    let runs = fs::metadata(format!("/proc/{}/exe", entry.pid))?.ino();
    ensure!(runs == programs.inode()?, "{name} was started from the file that was replaced");
    ensure!(entry.version == programs.version(), "{name} says that it is {}", entry.version);
    Ok(())
}

/// Ends `drover up`, and starts it again from the file that is in place now.
async fn restart_up(cluster: &mut Cluster) -> anyhow::Result<()> {
    cluster.tell_up(Signal::TERM)?;
    let deadline = Instant::now() + BACK;
    while cluster.is_up()? {
        ensure!(Instant::now() < deadline, "drover up does not end");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    cluster.up().await
}

fn of_kind(state: &StateDir, kind: &str) -> Vec<Entry> {
    address_book::list(state).into_iter().filter(|entry| entry.name.starts_with(kind)).collect()
}

async fn wait_for(what: &str, limit: Duration, mut done: impl AsyncFnMut() -> bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + limit;
    while !done().await {
        ensure!(Instant::now() < deadline, "{what}: not within {limit:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// All that was taken.
struct Work {
    prompts: Vec<Taken>,
    /// By session.
    turns: Vec<Vec<Taken>>,
    calls: Vec<Taken>,
}

/// Whether each prompt ended well, once, and was carried out once; and each turn stands in its session once.
async fn judge(
    cluster: &Cluster,
    subscriber: &Subscriber,
    work: &Work,
    replaced: BTreeMap<String, Duration>,
) -> anyhow::Result<Report> {
    let taken = &work.prompts;
    let ended = |one: &Taken, view: &View| view.injections.get(&one.id).is_some_and(|seen| seen.outcome.is_some());
    if !subscriber.wait(SETTLE, |view| taken.iter().all(|one| ended(one, view))).await {
        let view = subscriber.view();
        let open: Vec<&str> = taken.iter().filter(|one| !ended(one, &view)).map(|one| one.name.as_str()).collect();
        bail!("{} prompts have not ended: {open:?}", open.len());
    }
    let log = whole_log(cluster).await?;
    let executed = ledgers(cluster)?;
    let mut violations = Vec::new();
    for one in taken {
        let seen = log.injections.get(&one.id);
        let times = |event: &str| seen.and_then(|seen| seen.counts.get(event)).copied().unwrap_or(0);
        let outcome = seen.and_then(|seen| seen.outcome.clone());
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
        violations.push(format!("the subscriber saw {} events, of {}, and they differ", seen.len(), log.seqs.len()));
    }
    for (number, turns) in work.turns.iter().enumerate() {
        violations.extend(judge_session(cluster, number, turns).await?);
    }
    ensure!(violations.is_empty(), "{} violations\n{}", violations.len(), violations.join("\n"));
    let all = || taken.iter().chain(work.turns.iter().flatten()).chain(&work.calls);
    let mut tried_again = BTreeMap::new();
    for one in all().filter(|one| one.again > 0) {
        *tried_again.entry(one.again).or_default() += 1;
    }
    Ok(Report {
        replaced,
        versions: Vec::new(),
        injections: taken.len(),
        turns: work.turns.iter().map(Vec::len).sum(),
        calls: work.calls.len(),
        paid_again: 0,
        tried_again,
        longest: longest(taken),
        longest_answers: (
            work.turns.iter().map(|turns| longest(turns)).max().unwrap_or_default(),
            longest(&work.calls),
        ),
        events: log.seqs.len(),
        resumed,
    })
}

fn longest(taken: &[Taken]) -> Duration {
    taken.iter().map(|one| one.took).max().unwrap_or_default()
}

/// What a session holds beside what was asked in it.
async fn judge_session(cluster: &Cluster, number: usize, turns: &[Taken]) -> anyhow::Result<Vec<String>> {
    let request = GetSessionRequest { session_id: load::session(number), last: 0 };
    let found = load::door(cluster.state()).get_session(request).await?.into_inner();
    let of = |role: &str| -> Vec<String> {
        found.messages.iter().filter(|message| message.role == role).map(|message| message.content.clone()).collect()
    };
    let asked: Vec<String> = turns.iter().map(|turn| turn.name.clone()).collect();
    let mut violations = Vec::new();
    for (role, has) in [("user", of("user")), ("assistant", of("assistant"))] {
        // The first turn opened it.
        let has: Vec<String> = has.into_iter().skip(1).collect();
        if has != asked {
            violations.push(format!("session {number}: {} turns were asked, {role} has {}", asked.len(), has.len()));
        }
    }
    Ok(violations)
}
