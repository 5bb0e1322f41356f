//! Kills the dispatcher as a crash would, again and again, and judges by the provider's own ledger what became of the money and of
//! the work: never above the cap, nearly all of it usable, and nothing that was finished is paid for again.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use drover_service::process::{self, ProcessId};
use drover_testkit::cluster::{Cluster, signal};
use drover_testkit::mock_llm::{MockLlm, Settings};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use rustix::process::Signal;
use serde_json::Value;

const DISPATCHER: &str = "llm-dispatcher";
/// How long anything may take.
const PATIENCE: Duration = Duration::from_mins(3);
/// What a token costs, in micro-USD a million, which is pico-USD for one.
const PRICES: (u64, u64) = (1_000_000, 2_000_000);
/// Tokens of an answer: all that it may have, as long answers do.
const TOKENS: u32 = 1000;

/// How much is done.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Decides everything random.
    pub seed: u64,
    /// Histories of a day with a cap, each with one kill.
    pub histories: u32,
    /// Calls that the cap of a history pays for.
    pub paid: u32,
    /// Tasks of the run that is killed in its middle.
    pub tasks: usize,
    /// Its width.
    pub width: u32,
}

/// What was seen.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Most of the cap that the provider was paid.
    pub most_spent: f64,
    /// Least of it that could be used.
    pub least_used: f64,
    /// Results that had been seen before a kill, over all histories.
    pub finished_before: usize,
    /// Calls that the provider did in all.
    pub calls: u64,
    /// Results of the large run that were seen, and kept, when it was killed.
    pub resumed: usize,
    /// Its prompts that the provider answered twice: under way, or answered and not kept, when it was killed.
    pub answered_again: u64,
}

/// Runs the plan. Fails at the first breach.
pub fn run(plan: &Plan) -> anyhow::Result<Report> {
    let mut rng = SmallRng::seed_from_u64(plan.seed);
    let mut report = Report { least_used: f64::INFINITY, ..Report::default() };
    for number in 1..=plan.histories {
        let seed = rng.random();
        let seen = history(plan, seed).with_context(|| format!("history {number} of seed {}", plan.seed))?;
        report.most_spent = report.most_spent.max(seen.used);
        report.least_used = report.least_used.min(seen.used);
        report.finished_before += seen.finished;
        report.calls += seen.calls;
        if number % 10 == 0 {
            say(&format!("{number} of {} histories: {report:?}", plan.histories));
        }
    }
    if plan.tasks > 0 {
        (report.resumed, report.answered_again) = resumed(plan)?;
    }
    Ok(report)
}

fn say(line: &str) {
    let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{line}\n"));
}

/// A mock, and an instance whose dispatcher asks it.
struct Scene {
    mock: MockLlm,
    cluster: Cluster,
    file: String,
    runs: u32,
}

impl Scene {
    fn new(settings: Settings, tasks: usize, width: u32, more: &str) -> anyhow::Result<Self> {
        let mock = MockLlm::start(Settings { input_price: PRICES.0, output_price: PRICES.1, ..settings })?;
        let config = format!(
            "model_pricing: {{m: {{input_tokens_usd_per_m: 1.0, output_tokens_usd_per_m: 2.0}}}}\nnode_scaling:\n  \
             listen: 127.0.0.1:0\n  provider: {{name: mock, model: m, base_url: \"{}\", max_tokens: {TOKENS}}}\n  \
             limits:\n    max_nodes: {width}\n    max_concurrent_api: {width}\n{more}",
            mock.base_url("openai")
        );
        let cluster = Cluster::prepare(&config)?;
        let mut text = String::new();
        for number in 1..=tasks {
            let _ = writeln!(text, "{}", prompt(number));
        }
        let file = cluster.dir().join("prompts.txt");
        fs::write(&file, text)?;
        let file = file.to_str().context("the path is no text")?.to_owned();
        Ok(Self { mock, cluster, file, runs: 0 })
    }

    fn spent(&self) -> f64 {
        self.mock.ledger().spent_pico as f64
    }

    fn begin(&mut self, args: &[&str]) -> anyhow::Result<Command> {
        self.runs += 1;
        let out = self.cluster.dir().join(format!("out-{}", self.runs));
        let err = out.with_extension("err");
        let mut all = vec!["dispatch", self.file.as_str(), "--unordered", "--json"];
        all.extend(args);
        let mut command = self.cluster.command(&all);
        command.stdin(Stdio::null()).stdout(File::create(&out)?).stderr(File::create(&err)?);
        Ok(Command { child: command.spawn()?, out, err })
    }

    /// Kills the dispatcher as a crash would, and waits until the provider has noticed.
    fn crash(&self) -> anyhow::Result<()> {
        let id: ProcessId = self.cluster.daemon(DISPATCHER).context("the dispatcher does not run")?;
        signal(id.pid, Signal::KILL)?;
        until("the dispatcher is gone", || (!process::is_alive(&id)).then_some(()))?;
        until("its calls are gone", || (self.mock.ledger().in_flight == 0).then_some(()))
    }

    /// How often each of these tasks was answered.
    fn answers(&self, tasks: &[usize]) -> BTreeMap<usize, u32> {
        tasks.iter().map(|&number| (number, self.mock.answers_to(&prompt(number)))).collect()
    }
}

fn prompt(number: usize) -> String {
    format!("prompt number {number}")
}

fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> anyhow::Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return Ok(answer);
        }
        ensure!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A command under way, whose output goes into files.
struct Command {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

impl Command {
    fn wait(&mut self) -> anyhow::Result<i32> {
        let code = until("the command ends", || self.child.try_wait().ok().flatten().map(|status| status.code()));
        if code.is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        Ok(code?.unwrap_or(-1))
    }

    /// Results that it printed.
    fn results(&self) -> anyhow::Result<Vec<Value>> {
        let text = fs::read_to_string(&self.out)?;
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        Ok(lines.filter(|line| line["number"].is_u64()).collect())
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.err).unwrap_or_default()
    }
}

/// Tasks with an answer among results.
fn finished(results: &[Value]) -> Vec<usize> {
    let answered = results.iter().filter(|result| result["status"] == "succeeded");
    answered.filter_map(|result| result["number"].as_u64()).map(|number| number as usize).collect()
}

struct Seen {
    used: f64,
    finished: usize,
    calls: u64,
}

/// A day with a cap: a run is killed somewhere on its way and goes on until no call can be paid any more.
fn history(plan: &Plan, seed: u64) -> anyhow::Result<Seen> {
    const WIDTH: u32 = 8;
    let mut rng = SmallRng::seed_from_u64(seed);
    let worst = |tasks: u32| f64::from(tasks) * f64::from(TOKENS) * PRICES.1 as f64;
    let cap = worst(plan.paid);
    let settings = Settings {
        latency_ms: 5.0,
        jitter: 0.5,
        // Hedges, and calls that are given up, are paid for too.
        slow_rate: 0.03,
        slow_ms: 60.0,
        error_rate: 0.02,
        output_tokens: Some(u64::from(TOKENS)),
        seed,
        ..Settings::default()
    };
    let more = format!("  cost: {{max_daily_spend: {:.9}}}\n", cap / 1e12);
    let mut scene = Scene::new(settings, plan.paid as usize * 5 / 4, WIDTH, &more)?;
    let mut first = scene.begin(&["--run", "day"])?;
    let mark = cap * rng.random_range(0.02..0.95);
    until("some money is spent", || {
        (scene.spent() >= mark || !matches!(first.child.try_wait(), Ok(None))).then_some(())
    })?;
    std::thread::sleep(Duration::from_micros(rng.random_range(0..5000)));
    scene.crash()?;
    let code = first.wait()?;
    ensure!(code == 69, "the first command ended with {code}: {}", first.said());
    ensure!(scene.spent() <= cap, "{} of {cap} were spent before the kill", scene.spent());
    let before = scene.answers(&finished(&first.results()?));

    let mut second = scene.begin(&["--resume", "day"])?;
    let code = second.wait()?;
    ensure!(code == 1, "the resumed command ended with {code}, and no task was refused: {}", second.said());
    let ledger = scene.mock.ledger();
    let used = ledger.spent_pico as f64 / cap;
    ensure!(used <= 1.0, "the provider was paid {used} of the cap");
    let after = scene.answers(&before.keys().copied().collect::<Vec<_>>());
    ensure!(after == before, "a task that was finished was asked again");
    let results = finished(&second.results()?);
    let missing = before.keys().find(|number| !results.contains(number));
    ensure!(missing.is_none(), "the result of task {missing:?} is lost");
    if used < 0.97 {
        bail!("only {used:.4} of the cap could be used; {ledger:?}\n{}", second.said());
    }
    Ok(Seen { used, finished: before.len(), calls: ledger.calls })
}

/// A large run that is killed in its middle.
fn resumed(plan: &Plan) -> anyhow::Result<(usize, u64)> {
    let settings = Settings { latency_ms: 20.0, jitter: 0.5, seed: plan.seed, ..Settings::default() };
    // A hedge that comes second is a second answer too, and not what is judged here.
    let mut scene = Scene::new(settings, plan.tasks, plan.width, "    hedge: false\n")?;
    let mut first = scene.begin(&["--run", "large"])?;
    let half = plan.tasks as u64 / 2;
    until("half of it is answered", || (scene.mock.ledger().answered >= half).then_some(()))?;
    scene.crash()?;
    let code = first.wait()?;
    ensure!(code == 69, "the first command ended with {code}: {}", first.said());
    let answered = scene.mock.ledger().answered;
    let seen = finished(&first.results()?);

    let mut second = scene.begin(&["--resume", "large"])?;
    let code = second.wait()?;
    ensure!(code == 0, "the resumed command ended with {code}: {}", second.said());
    let results = second.results()?;
    let mut all = finished(&results);
    all.sort_unstable();
    ensure!(all.iter().copied().eq(1..=plan.tasks), "{} results for {} tasks", all.len(), plan.tasks);
    let kept: Vec<usize> =
        finished(&results.into_iter().filter(|result| result["resumed"] == true).collect::<Vec<_>>());
    let lost = seen.iter().find(|number| !kept.contains(number));
    ensure!(lost.is_none(), "task {lost:?} was seen finished, and was asked again");
    for (number, answers) in scene.answers(&kept) {
        ensure!(answers == 1, "task {number} was finished, and was answered {answers} times");
    }
    let ledger = scene.mock.ledger();
    // Only what was answered and had not been kept yet can be answered a second time.
    let unkept = answered.saturating_sub(kept.len() as u64);
    ensure!(ledger.answered_again <= unkept, "{} again, {unkept} were not kept", ledger.answered_again);
    ensure!(unkept <= 4 * u64::from(plan.width), "{unkept} answers had come and were not kept");
    ensure!(ledger.answered == plan.tasks as u64 + ledger.answered_again, "{ledger:?}");
    Ok((kept.len(), ledger.answered_again))
}
