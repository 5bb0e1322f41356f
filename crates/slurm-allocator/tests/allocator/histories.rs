//! Random histories of the whole program against the fake Slurm's programs: answers that are lost, commands that die, a controller
//! that is away, jobs cancelled and put back by others, an allocator that is killed anywhere.
//!
//! What must hold: no submission ever makes two jobs; at the end every living job is a swarm's, the one that the swarm says it has,
//! and whatever is over has none; no minute has more calls than allowed.
//!
//! CI runs a few; `cargo xtask chaos slurm-histories` runs 200. A history is named by its seed, which is printed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use drover_proto::allocator::{Allocation, AllocationState, EnsureAllocationRequest};
use drover_proto::common::LaunchSpec;
use drover_testkit::fake_slurm::{Accounting, Dialect, FakeSlurm, Kind, Phase, Plan};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

use crate::bench::Bench;

/// The commands that ask the controller something.
const COMMANDS: [&str; 6] = ["squeue", "sbatch", "scancel", "sacct", "scontrol", "sinfo"];
/// Between a decision and the start of its command lies some time, and not always the same.
const MINUTE_MS: i64 = 57_000;
const SWARMS: usize = 4;

/// How many requests the controller gets by a command, as `sdiag` of a real one counts them.
fn requests(command: &str) -> usize {
    match command {
        "squeue" => 3,
        "scontrol" | "sinfo" => 2,
        _ => 1,
    }
}

/// How much is done.
#[derive(Debug, Clone, Copy)]
struct Size {
    histories: usize,
    at_once: usize,
    steps: usize,
    /// How long loose ends may take to be found. In the short size an unknown outcome may still be unknown then, which
    /// must be told.
    settle: Duration,
    whole: bool,
}

const SHORT: Size = Size { histories: 4, at_once: 4, steps: 16, settle: Duration::from_mins(1), whole: false };
const WHOLE: Size = Size { histories: 200, at_once: 12, steps: 40, settle: Duration::from_mins(6), whole: true };

/// One history.
struct World {
    /// First, because it is ended by what lies in the bench's directory: behind the bench its jobs would stay for ever.
    slurm: FakeSlurm,
    bench: Bench,
    dice: SmallRng,
    seed: u64,
    budget: usize,
    /// Swarms that were asked for, and whether their end was.
    asked: BTreeMap<String, bool>,
    /// Calls that somebody else made.
    others: usize,
    said: Vec<String>,
}

impl World {
    async fn begin(seed: u64, size: Size) -> Self {
        let mut dice = SmallRng::seed_from_u64(seed);
        let mut bench = Bench::new("");
        let at = |name: &str| bench.dir.path().join(name);
        let mut plan = Plan { nodes: 6, ..Plan::default() };
        plan.settings.dialect = *Dialect::ALL.choose(&mut dice).unwrap();
        plan.settings.accounting =
            if dice.random_bool(0.7) { Accounting::On { lag_s: dice.random_range(0..3) } } else { Accounting::Off };
        plan.settings.drop_comments = dice.random_bool(0.3);
        plan.settings.requeue_delay_s = 1;
        plan.settings.latency_ms = BTreeMap::from([("*".to_owned(), dice.random_range(0..120))]);
        let slurm = FakeSlurm::start(&at("fake"), &plan).unwrap();
        for dir in ["shared", "local"] {
            fs::create_dir(at(dir)).unwrap();
        }
        // Whatever it is told to be, it stays until it is ended.
        fs::write(at("program"), "#!/bin/sh\nexec sleep 1000\n").unwrap();
        fs::set_permissions(at("program"), fs::Permissions::from_mode(0o755)).unwrap();
        let budget = if size.whole { *[40, 80, 120].choose(&mut dice).unwrap() } else { 180 };
        let config = format!(
            "worker: {{agent: echo}}\ncluster:\n  slurm: {{ssh: none, workspace_root: {0}/shared, cluster_subdir: c, local_dir: {0}/local, \
             program: {0}/program, partition: batch, time_limit: '10', poll: 1s, calls_per_minute: {budget}}}\n",
            bench.dir.path().display()
        );
        fs::write(at("config.yaml"), config).unwrap();
        bench.path = Some(slurm.path().unwrap());
        bench.up().await;
        Self { bench, slurm, dice, seed, budget, asked: BTreeMap::new(), others: 0, said: Vec::new() }
    }

    fn say(&mut self, what: String) {
        self.said.push(what);
    }

    async fn step(&mut self) {
        match self.dice.random_range(0..100) {
            0..=24 if self.asked.len() < SWARMS => self.launch().await,
            0..=34 => self.release().await,
            35..=59 => self.fault(),
            60..=67 => {
                self.say("faults end".into());
                self.slurm.set(|settings| settings.faults.clear()).unwrap();
            }
            68..=77 => {
                self.say("kill -9".into());
                self.bench.kill_allocator();
                self.bench.up().await;
            }
            78..=87 => self.meddle(),
            88..=93 => {
                let blocked = self.dice.random_bool(0.5).then(|| "Priority".to_owned());
                self.say(format!("blocked: {blocked:?}"));
                self.slurm.set(|settings| settings.blocked = blocked).unwrap();
            }
            _ => {}
        }
        let pause = Duration::from_millis(self.dice.random_range(0..400));
        tokio::time::sleep(pause).await;
    }

    /// Asks for a swarm, or for one that was asked for before, and does not wait for the answer.
    async fn launch(&mut self) {
        let swarm = format!("s{}", self.dice.random_range(0..SWARMS));
        self.say(format!("launch {swarm}"));
        if !self.asked.contains_key(&swarm) {
            self.asked.insert(swarm.clone(), false);
        }
        self.ask_for(&swarm).await;
    }

    async fn ask_for(&self, swarm: &str) {
        let mut client = self.bench.client().await;
        let spec = LaunchSpec { node_count: 2, agent: "echo".into(), ..LaunchSpec::default() };
        let request = EnsureAllocationRequest { swarm_id: swarm.to_owned(), spec: Some(spec) };
        // An allocator that is killed answers nobody; the launch is asked for again at the end.
        let call = async move { client.ensure_allocation(request).await };
        let _ = tokio::time::timeout(Duration::from_millis(300), call).await;
    }

    async fn release(&mut self) {
        let Some(swarm) = self.asked.keys().cloned().collect::<Vec<_>>().choose(&mut self.dice).cloned() else {
            return;
        };
        let force = self.dice.random_bool(0.5);
        self.say(format!("release {swarm} force={force}"));
        let release = self.bench.release(&swarm, force);
        if let Ok(Ok(known)) = tokio::time::timeout(Duration::from_secs(5), release).await {
            // One that nobody knows yet may still be launched.
            let ends = self.asked.get_mut(&swarm).unwrap();
            *ends |= known;
        }
    }

    fn fault(&mut self) {
        let command =
            *["*", "squeue", "sbatch", "sbatch", "scancel", "sacct", "scontrol"].choose(&mut self.dice).unwrap();
        let done = self.dice.random_bool(0.5);
        let kind = match self.dice.random_range(0..6) {
            0 => Kind::Unreachable { after_ms: 30 },
            1 => Kind::Timeout { done },
            2 => Kind::Dies { done },
            3 => Kind::Slow { ms: 700 },
            4 => Kind::Banner { text: "Welcome to the cluster\n".into() },
            _ => Kind::Truncated { bytes: self.dice.random_range(0..60) },
        };
        let times = self.dice.random_range(1..4);
        self.say(format!("fault {command} {kind:?} x{times}"));
        self.slurm.fault(command, kind, Some(times)).unwrap();
    }

    /// Somebody else does something to a job of ours.
    fn meddle(&mut self) {
        let living: Vec<u32> = self.living().into_iter().map(|(id, _)| id).collect();
        let Some(job) = living.choose(&mut self.dice) else { return };
        let args: &[&str] = if self.dice.random_bool(0.5) { &["scancel"] } else { &["scontrol", "requeue"] };
        self.say(format!("{args:?} {job}"));
        // It may be refused, or hit by a fault.
        let program = self.slurm.bin().join(args[0]);
        let _ = Command::new(program).args(&args[1..]).arg(job.to_string()).output();
        self.others += 2;
    }

    /// Jobs that have not ended: id and name.
    fn living(&self) -> Vec<(u32, String)> {
        let jobs = self.slurm.cluster().unwrap().jobs;
        let living = jobs.into_iter().filter(|(_, job)| !matches!(job.phase, Phase::Over { .. }));
        living.map(|(id, job)| (id, job.asked.name)).collect()
    }

    /// What must hold at any time.
    fn check_always(&self) {
        let jobs = self.slurm.cluster().unwrap().jobs;
        let mut names = BTreeSet::new();
        for job in jobs.values() {
            assert!(names.insert(job.asked.name.clone()), "two jobs of one submission: {}{self:?}", job.asked.name);
        }
        let calls: Vec<i64> = self
            .slurm
            .calls()
            .unwrap()
            .iter()
            .filter(|call| COMMANDS.contains(&call.command.as_str()))
            .flat_map(|call| std::iter::repeat_n(call.at_ms, requests(&call.command)))
            .collect();
        let most = self.budget + self.others;
        for (n, at) in calls.iter().enumerate() {
            let within = calls[n..].iter().take_while(|other| **other < at + MINUTE_MS).count();
            assert!(within <= most, "{within} requests in a minute, {most} are allowed{self:?}");
        }
    }

    /// What is not as it must be in the end; empty when all is.
    async fn loose_ends(&self, size: Size) -> Vec<String> {
        let board: BTreeMap<String, Allocation> =
            self.bench.watch().await.snapshot().await.into_iter().map(|it| (it.swarm_id.clone(), it)).collect();
        let mut loose = Vec::new();
        let mut living: BTreeMap<String, Vec<u32>> = BTreeMap::new();
        for (id, name) in self.living() {
            let swarm = name.strip_prefix("drover-").and_then(|rest| rest.rsplit_once('.')).unwrap().0.to_owned();
            living.entry(swarm).or_default().push(id);
        }
        for swarm in living.keys().filter(|swarm| !board.contains_key(*swarm)) {
            loose.push(format!("nobody knows of the job of {swarm}"));
        }
        for (swarm, known) in &board {
            let jobs = living.get(swarm).cloned().unwrap_or_default();
            let over = matches!(known.state(), AllocationState::Completed | AllocationState::Failed);
            let unsure = known.reason.contains("whether there is a job is not known");
            let ends = self.asked.get(swarm).copied().unwrap_or_default();
            let right = match (over, &jobs[..]) {
                (true, []) => true,
                (false, [job]) => known.job_id == job.to_string() && !ends,
                (false, []) => unsure && !size.whole,
                _ => false,
            };
            // The queue has it and nobody has looked since.
            if !(right || (unsure && !size.whole && jobs.len() <= 1)) {
                loose.push(format!("{swarm} is {} ({}), its jobs: {jobs:?}", known.backend_state, known.reason));
            }
        }
        loose
    }

    async fn end(&mut self, size: Size) {
        self.say("all is well from here".into());
        self.slurm
            .set(|settings| {
                settings.faults.clear();
                settings.blocked = None;
            })
            .unwrap();
        let deadline = Instant::now() + size.settle;
        loop {
            self.check_always();
            let loose = self.loose_ends(size).await;
            if loose.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "loose ends: {loose:#?}{self:?}");
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "\nseed {}:\n  {}", self.seed, self.said.join("\n  "))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_each_submission_is_one_job_and_none_is_lost() {
    let whole = std::env::var("DROVER_SIM").is_ok_and(|size| size == "whole");
    let size = if whole { WHOLE } else { SHORT };
    let chosen = std::env::var("DROVER_SEED").ok().and_then(|seed| seed.parse::<u64>().ok());
    let fresh = chosen.unwrap_or_else(|| rand::rng().random_range(0..1 << 40));
    println!("{} histories, seeds 1 and {fresh} to {}", size.histories, fresh + size.histories as u64 - 2);
    let mut seeds = (fresh..).take(size.histories - 1).chain([1]).collect::<Vec<_>>();
    let begun = Instant::now();
    while !seeds.is_empty() {
        let some = seeds.split_off(seeds.len().saturating_sub(size.at_once));
        let histories = some.into_iter().map(|seed| async move {
            let mut world = World::begin(seed, size).await;
            for _ in 0..size.steps {
                world.step().await;
                world.check_always();
            }
            world.end(size).await;
        });
        futures::future::join_all(histories).await;
        if whole {
            println!("{} left after {:?}", seeds.len(), begun.elapsed());
        }
    }
}
