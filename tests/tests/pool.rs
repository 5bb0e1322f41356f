//! The real Codex with its model at the dispatcher: over TLS, and through the mailbox from a network that has nothing but
//! loopback. The judge of calls and money is the mock provider's own ledger.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use drover_e2e::cli::{json, json_lines, ok};
use drover_e2e::sure::must;
use drover_testkit::cluster::{Cluster, signal};
use drover_testkit::codex::codex_bin;
use drover_testkit::mock_llm::{MockLlm, Settings};
use drover_testkit::{skip, this_test};
use rustix::process::Signal;
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// How long anything may take before a test gives up.
const PATIENCE: Duration = Duration::from_mins(1);
/// What the provider wants to be shown. No node may have it.
const KEY: &str = "the-providers-key";

fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn mock(settings: Settings) -> MockLlm {
    let settings = Settings { api_key: Some(KEY.to_owned()), ..settings };
    must(MockLlm::start(Settings { input_price: 1_000_000, output_price: 2_000_000, ..settings }))
}

/// An instance whose agents are codex and ask the pool, and whose dispatcher asks this mock.
fn prepare(mock: &MockLlm, codex: &Path, worker: &str, more: &str) -> Cluster {
    let url = mock.base_url("openai");
    let config = format!(
        "model_pricing: {{m: {{input_tokens_usd_per_m: 1.0, output_tokens_usd_per_m: 2.0}}}}\n\
         node_scaling:\n  listen: 127.0.0.1:0\n  \
         provider: {{name: mock, model: m, base_url: \"{url}\", api_key_env: PROVIDER_API_KEY, max_tokens: 4096}}\n  \
         limits: {{hedge: false, max_attempts: 1}}\n  cost: {{max_daily_spend: 5}}\n\
         worker:\n  codex_bin: {}\n  codex_provider: pool\n  sandbox_mode: danger-full-access\n  approval_policy: never\n\
         \x20 agent_env: [PROVIDER_API_KEY]\n{worker}{more}",
        codex.display()
    );
    let mut cluster = must(Cluster::prepare(&config));
    cluster.set_env("PROVIDER_API_KEY", KEY);
    // Whatever this user has set up for codex is none of the test's business.
    cluster.set_env("CODEX_HOME", cluster.dir().join("no-codex-home"));
    cluster
}

fn launch(cluster: &Cluster) -> String {
    let launched = must(json(cluster, &["launch", "--nodes", "1", "--detach", "--json"]));
    launched["swarm_id"].as_str().unwrap().to_owned()
}

/// The answer to a prompt.
fn ask(cluster: &Cluster, swarm: &str, prompt: &str) -> String {
    must(ok(cluster, &["inject", swarm, "--prompt", prompt])).stdout
}

/// A prompt that is answered, one whose answer is a command that codex runs, and one that hangs until it is taken back.
fn talk(cluster: &Cluster, swarm: &str, mock: &MockLlm) {
    assert!(ask(cluster, swarm, "[[say:words of the pool]]").contains("words of the pool"));
    assert_eq!(mock.ledger().answered, 1);
    // Whether the command ends in time is for codex to judge; that it was asked for and begun came through the pool.
    ask(cluster, swarm, "[[tool:exec_command {\"cmd\":\"echo $((40+2))\"}]]");
    let events = must(json_lines(cluster, &["events", "--since", "0", "--swarm", swarm, "--json"]));
    let begun = |event: &Value| event["event"] == "command_started" && event.to_string().contains("echo $((40+2))");
    assert!(events.iter().any(begun), "the tool call passed through");
    assert_eq!((mock.ledger().answered, mock.ledger().refused), (3, 0));

    let mut hanging = cluster.command(&["inject", swarm, "--prompt", "[[hang]]"]).spawn().unwrap();
    until("the call that hangs", || (mock.ledger().in_flight == 1).then_some(()));
    must(ok(cluster, &["interrupt", swarm]));
    assert!(!hanging.wait().unwrap().success(), "an interrupted turn is no success");
    until("the end of the call at the provider", || (mock.ledger().in_flight == 0).then_some(()));
    assert_eq!((mock.ledger().calls, mock.ledger().aborted), (4, 1), "it was broken off, and asked for once");
    assert!(ask(cluster, swarm, "[[say:still there]]").contains("still there"));

    let spent = must(json(cluster, &["spend", "--json"]));
    assert!(spent.to_string().contains("\"mock\""), "it counts against the budget: {spent}");
}

/// Codex among the descendants of a process.
fn codex_below(pid: u32) -> Option<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
    let lists = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
    let children: Vec<u32> =
        lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect();
    let is_codex = |pid: &u32| drover_service::process::program(*pid).is_some_and(|name| name.starts_with("codex"));
    children.iter().copied().find(is_codex).or_else(|| children.into_iter().find_map(codex_below))
}

/// What codex of this worker was given: its arguments and its environment.
fn given(worker: u32) -> (String, String) {
    let codex = until("codex", || codex_below(worker));
    let read =
        |what: &str| String::from_utf8_lossy(&std::fs::read(format!("/proc/{codex}/{what}")).unwrap()).into_owned();
    (read("cmdline"), read("environ"))
}

#[tokio::test(flavor = "multi_thread")]
async fn codex_asks_the_pool_over_tls_and_through_the_mailbox() {
    let Some(codex) = codex_bin() else { return };
    for way in ["grpc", "mailbox"] {
        let mock = mock(Settings::default());
        let mut cluster = prepare(&mock, &codex, &format!("  pool_carriage: {way}\n"), "");
        must(cluster.up().await);
        let swarm = launch(&cluster);
        talk(&cluster, &swarm, &mock);

        let status = must(json(&cluster, &["status", &swarm, "--json"]));
        let (arguments, environment) = given(status["nodes"][0]["pid"].as_u64().unwrap() as u32);
        let token = environment.split('\0').find_map(|variable| variable.strip_prefix("DROVER_POOL_TOKEN=")).unwrap();
        assert!(token.len() == 64 && !arguments.contains(token), "the token is for the environment only");
        assert!(!environment.contains(KEY) && !arguments.contains(KEY), "no node has the provider's key");
        assert!(arguments.contains("http://127.0.0.1:"), "{arguments}");
    }
}

/// A worker in a network namespace of its own, whose only interface is loopback.
fn start_apart(cluster: &Cluster, host: &str) -> Child {
    let inner = cluster.command(&["daemon", "worker", "--static", "--host", host]);
    let log = std::fs::File::create(cluster.dir().join("worker.log")).unwrap();
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", "ip link set lo up && exec \"$0\" \"$@\""]);
    command.arg(inner.get_program()).args(inner.get_args());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.current_dir(cluster.dir()).stdin(Stdio::null()).stderr(log).spawn().unwrap()
}

/// Ends the worker, whatever happens to the test.
struct Apart(Child);

impl Drop for Apart {
    fn drop(&mut self) {
        drover_testkit::cluster::end(&mut self.0, Duration::from_secs(10));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn codex_runs_where_there_is_nothing_but_loopback() {
    let Some(codex) = codex_bin() else { return };
    if !rustix::process::geteuid().is_root() {
        return skip(&this_test(), "a network namespace needs root");
    }
    let mock = mock(Settings::default());
    let mut cluster =
        prepare(&mock, &codex, "", "cluster: {backend: static, hosts: [apart], workspace_root: shared}\n");
    must(cluster.up().await);
    let worker = Apart(start_apart(&cluster, "apart"));
    let pid = worker.0.id();
    let interfaces = || {
        let text = std::fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap_or_default();
        text.lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned())).collect::<Vec<_>>()
    };
    until("the namespace", || (interfaces() == ["lo"]).then_some(()));
    let swarm = launch(&cluster);
    talk(&cluster, &swarm, &mock);
    let dir = cluster.state().path().to_owned();
    let left = || {
        let pool = until("the mailbox", || find(&dir, "pool"));
        ["asks", "answers"]
            .iter()
            .map(|part| std::fs::read_dir(pool.join(part)).map_or(0, Iterator::count))
            .sum::<usize>()
    };
    until("requests and answers to be cleared away", || (left() == 0).then_some(()));
}

fn find(dir: &Path, name: &str) -> Option<std::path::PathBuf> {
    let here = dir.join(name);
    if here.is_dir() {
        return Some(here);
    }
    std::fs::read_dir(dir)
        .ok()?
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .find_map(|entry| find(&entry.path(), name))
}

/// Stands between worker and dispatcher, and cuts every connection when it is told to.
struct Cutter {
    addr: SocketAddr,
    carried: Arc<Mutex<JoinSet<()>>>,
    /// Ends with this.
    _accepting: JoinSet<()>,
}

impl Cutter {
    async fn start(to: impl Fn() -> Option<SocketAddr> + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (addr, all) = (listener.local_addr().unwrap(), Arc::<Mutex<JoinSet<()>>>::default());
        let carried = Arc::clone(&all);
        let mut accepting = JoinSet::new();
        accepting.spawn(async move {
            while let Ok((mut from, _)) = listener.accept().await {
                let Some(to) = to() else { continue };
                let one = async move {
                    if let Ok(mut to) = TcpStream::connect(to).await {
                        let _ = tokio::io::copy_bidirectional(&mut from, &mut to).await;
                    }
                };
                carried.lock().unwrap().spawn(one);
            }
        });
        Self { addr, carried: all, _accepting: accepting }
    }

    /// Cuts what is carried; gives how many connections that were.
    fn cut(&self) -> usize {
        let mut carried = self.carried.lock().unwrap();
        while carried.try_join_next().is_some() {}
        let count = carried.len();
        carried.abort_all();
        count
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_carriage_that_breaks_is_taken_up_and_paid_for_once() {
    let Some(codex) = codex_bin() else { return };
    let mock = mock(Settings { latency_ms: 3000.0, ..Settings::default() });
    let there: Arc<Mutex<Option<SocketAddr>>> = Arc::default();
    let known = Arc::clone(&there);
    let cutter = Cutter::start(move || *known.lock().unwrap()).await;
    let worker = format!("  pool_carriage: grpc\n  pool_address: {}\n", cutter.addr);
    let mut cluster = prepare(&mock, &codex, &worker, "");
    must(cluster.up().await);
    let entry = until("the dispatcher", || {
        drover_service::address_book::read(cluster.state(), "llm-dispatcher").filter(|entry| !entry.listen.is_empty())
    });
    *there.lock().unwrap() = Some(entry.listen.parse().unwrap());
    let swarm = launch(&cluster);
    let mut asking = cluster
        .command(&["inject", &swarm, "--prompt", "[[say:it arrived all the same]]"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    until("the call", || (mock.ledger().in_flight == 1).then_some(()));
    let mut cuts = 0;
    while mock.ledger().in_flight == 1 {
        cuts += cutter.cut();
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    let status = asking.wait().unwrap();
    let mut said = String::new();
    std::io::Read::read_to_string(&mut asking.stdout.take().unwrap(), &mut said).unwrap();
    assert!(status.success() && said.contains("it arrived all the same"), "{said}");
    assert!(cuts >= 2, "the connection was cut again and again: {cuts}");
    let ledger = mock.ledger();
    assert_eq!((ledger.calls, ledger.answered, ledger.aborted), (1, 1, 0), "{ledger:?}");

    // The worker dies in the middle of a call: its codex goes with it, and nobody asks again.
    let status = must(json(&cluster, &["status", &swarm, "--json"]));
    let worker = status["nodes"][0]["pid"].as_u64().unwrap() as u32;
    let mut lost = cluster.command(&["inject", &swarm, "--prompt", "[[say:never heard]]"]).spawn().unwrap();
    until("the call", || (mock.ledger().in_flight == 1).then_some(()));
    signal(worker, Signal::KILL).unwrap();
    assert!(!lost.wait().unwrap().success());
    until("the end of the call", || (mock.ledger().in_flight == 0).then_some(()));
    assert!(ask(&cluster, &swarm, "[[say:the next one]]").contains("the next one"));
    assert_eq!(mock.ledger().calls, 3);
}
