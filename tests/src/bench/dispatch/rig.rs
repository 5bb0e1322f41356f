//! What is measured: a real dispatcher, started by the real command, and the mock provider as a process of its own, each on a core
//! of its own where that is asked for.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use drover_service::address_book;
use drover_testkit::cluster::{Cluster, program};
use drover_testkit::mock_llm::{Call, Ledger, Settings};
use serde_json::Value;

/// Its name in the address book.
pub(super) const DISPATCHER: &str = "llm-dispatcher";
/// The core of whoever stands around the dispatcher: the mock and the driver.
pub(super) const THEIRS: &str = "0";
/// The core of the dispatcher, where it has one to itself.
pub(super) const OURS: &str = "1";
/// How long one command may take.
const PATIENCE: Duration = Duration::from_mins(10);
/// What a token costs in these measurements, in micro-USD a million.
const PRICES: (u64, u64) = (1_000_000, 2_000_000);

/// The mock provider, a process.
pub(super) struct Mock {
    child: Child,
    addr: SocketAddr,
}

impl Mock {
    /// Starts it, on this core or anywhere.
    pub(super) fn start(settings: &Settings, core: Option<&str>) -> anyhow::Result<Self> {
        let settings = Settings { input_price: PRICES.0, output_price: PRICES.1, ..settings.clone() };
        let mut command = pinned(core, program("mock-llm")?);
        command.arg("--settings").arg(serde_json::to_string(&settings)?);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot start mock-llm")?;
        let mut line = String::new();
        let out = child.stdout.take().context("mock-llm has no output")?;
        BufReader::new(out).read_line(&mut line)?;
        let addr = line.trim().rsplit(' ').next().and_then(|addr| addr.parse().ok());
        let addr = addr.with_context(|| format!("mock-llm said {line:?}"))?;
        Ok(Self { child, addr })
    }

    /// Where it is.
    pub(super) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What happened so far.
    pub(super) fn ledger(&self) -> anyhow::Result<Ledger> {
        Ok(serde_json::from_str(&self.ask("GET", "ledger", "")?)?)
    }

    /// Every answered call.
    pub(super) fn calls(&self) -> anyhow::Result<Vec<Call>> {
        Ok(serde_json::from_str(&self.ask("GET", "calls", "")?)?)
    }

    /// Changes some of its settings.
    pub(super) fn change(&self, settings: &Value) -> anyhow::Result<()> {
        self.ask("PATCH", "settings", &settings.to_string()).map(drop)
    }

    /// Forgets everything but its settings.
    pub(super) fn reset(&self) -> anyhow::Result<()> {
        self.ask("POST", "reset", "").map(drop)
    }

    fn ask(&self, method: &str, what: &str, body: &str) -> anyhow::Result<String> {
        let answer = http(self.addr, method, &format!("/__mock/{what}"), "", body)?;
        ensure!(answer.0 == 200, "the mock answered {what} with {}: {}", answer.0, answer.1);
        Ok(answer.1)
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where there is one core only, everything shares it.
pub(super) fn have_two_cores() -> bool {
    std::thread::available_parallelism().is_ok_and(|cores| cores.get() >= 2)
}

fn pinned(core: Option<&str>, program: PathBuf) -> Command {
    match core.filter(|_| have_two_cores()) {
        None => Command::new(program),
        Some(core) => {
            let mut command = Command::new("taskset");
            command.args(["-c", core]).arg(program);
            command
        }
    }
}

/// One request on a connection of its own: status and body of the answer.
pub(super) fn http(
    addr: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: &str,
) -> anyhow::Result<(u16, String)> {
    let mut stream = TcpStream::connect(addr)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n{headers}\r\n"
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).context("no status")?;
    Ok((status, body.to_owned()))
}

/// A dispatcher that asks a mock.
pub(super) struct Rig {
    /// Its instance.
    pub(super) cluster: Cluster,
    /// Whom it asks.
    pub(super) mock: Mock,
    runs: u32,
}

/// Where the parts run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cores {
    /// Wherever the system puts them, as at a user's.
    Any,
    /// The dispatcher on one, all others on the other.
    Apart,
}

/// How many at once: nodes, and calls to the provider.
#[derive(Debug, Clone, Copy)]
pub(super) struct Width(pub(super) u32, pub(super) u32);

impl From<u32> for Width {
    fn from(both: u32) -> Self {
        Self(both, both)
    }
}

/// What came of a run.
#[derive(Debug, Clone)]
pub(super) struct Ran {
    /// Its results, in the order in which they came.
    pub(super) results: Vec<Value>,
    /// Its last line.
    pub(super) summary: Value,
}

impl Ran {
    /// How long the run took, by the dispatcher.
    pub(super) fn wall(&self) -> f64 {
        self.summary["wall_ms"].as_f64().unwrap_or(f64::NAN) / 1000.0
    }

    /// Fails unless each of so many tasks has one result, and that is an answer.
    pub(super) fn whole(&self, tasks: usize) -> anyhow::Result<()> {
        let mut numbers: Vec<u64> = self.results.iter().filter_map(|result| result["number"].as_u64()).collect();
        numbers.sort_unstable();
        numbers.dedup();
        let results = self.results.len();
        ensure!(numbers.len() == tasks && results == tasks, "{} of {tasks} tasks, {results} results", numbers.len());
        let unanswered = self.results.iter().find(|result| result["status"] != "succeeded");
        ensure!(unanswered.is_none(), "a task was not answered: {}", unanswered.unwrap_or(&Value::Null));
        Ok(())
    }
}

impl Rig {
    /// Prepares both and starts the dispatcher. `limits` is further YAML of `node_scaling.limits`, `more` of `node_scaling`.
    pub(super) fn start(
        settings: &Settings,
        cores: Cores,
        width: impl Into<Width>,
        limits: &str,
        more: &str,
    ) -> anyhow::Result<Self> {
        let Width(nodes, calls) = width.into();
        let mock = Mock::start(settings, (cores == Cores::Apart).then_some(THEIRS))?;
        let (input, output) = (PRICES.0 as f64 / 1e6, PRICES.1 as f64 / 1e6);
        let config = format!(
            "model_pricing: {{m: {{input_tokens_usd_per_m: {input:?}, output_tokens_usd_per_m: {output:?}}}}}\n\
             node_scaling:\n  listen: 127.0.0.1:0\n  \
             provider: {{name: mock, model: m, base_url: \"http://{}/v1\", max_tokens: 64}}\n  \
             limits:\n    max_nodes: {nodes}\n    max_concurrent_api: {calls}\n{limits}{more}",
            mock.addr()
        );
        let rig = Self { cluster: Cluster::prepare(&config)?, mock, runs: 0 };
        // What its first command starts runs where that command does.
        let file = rig.prompts("warm-up", 1)?;
        let mut command = rig.cluster.command(&["dispatch", &file]);
        if cores == Cores::Apart && have_two_cores() {
            let plain = command;
            command = Command::new("taskset");
            command.args(["-c", OURS]).arg(plain.get_program()).args(plain.get_args());
            for (name, value) in plain.get_envs() {
                match value {
                    Some(value) => command.env(name, value),
                    None => command.env_remove(name),
                };
            }
        }
        let output = command.current_dir(rig.cluster.dir()).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "the first run failed: {said}{}", rig.cluster.logs());
        rig.mock.reset()?;
        Ok(rig)
    }

    /// A file of so many different prompts.
    pub(super) fn prompts(&self, name: &str, count: usize) -> anyhow::Result<String> {
        let mut text = String::with_capacity(count * 32);
        for number in 1..=count {
            let _ = writeln!(text, "{name}: prompt number {number}");
        }
        let path = self.cluster.dir().join(format!("{name}.txt"));
        fs::write(&path, text)?;
        Ok(path.to_str().context("the path is no text")?.to_owned())
    }

    /// Starts a run; its results go into a file.
    pub(super) fn begin(&mut self, args: &[&str]) -> anyhow::Result<Under> {
        self.runs += 1;
        let out = self.cluster.dir().join(format!("out-{}", self.runs));
        let mut all = vec!["dispatch", "--unordered", "--json"];
        all.extend(args);
        let mut command = self.cluster.command(&all);
        let err = out.with_extension("err");
        command.stdin(Stdio::null()).stdout(File::create(&out)?).stderr(File::create(&err)?);
        Ok(Under { child: command.spawn()?, out, err })
    }

    /// Does a whole run.
    pub(super) fn dispatch(&mut self, args: &[&str]) -> anyhow::Result<Ran> {
        self.begin(args)?.wait()
    }

    /// The process of the dispatcher.
    pub(super) fn pid(&self) -> anyhow::Result<u32> {
        Ok(self.cluster.daemon(DISPATCHER).context("the dispatcher does not run")?.pid)
    }

    /// Address of its front, and the headers of a request to it.
    pub(super) fn front(&self) -> anyhow::Result<(SocketAddr, String)> {
        let entry = address_book::read(self.cluster.state(), DISPATCHER).context("the dispatcher does not run")?;
        let token = fs::read_to_string(self.cluster.state().path().join("dispatcher/token"))?;
        Ok((entry.listen.parse()?, format!("authorization: Bearer {}\r\n", token.trim())))
    }
}

/// A run under way.
pub(super) struct Under {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

impl Under {
    /// Waits for its end.
    pub(super) fn wait(mut self) -> anyhow::Result<Ran> {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                bail!("a run did not end: {}", self.said());
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut results = self.results()?;
        let last = results.pop().unwrap_or_default();
        let code = status.code().unwrap_or(-1);
        ensure!(last["summary"].is_object() || code != 0, "a run has no summary: {last} {}", self.said());
        Ok(Ran { results, summary: last["summary"].clone() })
    }

    /// What it printed so far; a line that is half written is left out.
    pub(super) fn results(&self) -> anyhow::Result<Vec<Value>> {
        let text = fs::read_to_string(&self.out)?;
        Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    /// What it said to a person.
    pub(super) fn said(&self) -> String {
        fs::read_to_string(&self.err).unwrap_or_default()
    }

    /// Its process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }
}

/// Processor time of all threads of a process, user and system, in seconds.
pub(super) fn cpu(pid: u32) -> anyhow::Result<f64> {
    let mut nanos = 0.0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        // One that ended meanwhile has nothing to say.
        let Ok(text) = fs::read_to_string(thread?.path().join("schedstat")) else { continue };
        nanos += text.split(' ').next().and_then(|first| first.parse::<f64>().ok()).unwrap_or(0.0);
    }
    Ok(nanos / 1e9)
}
