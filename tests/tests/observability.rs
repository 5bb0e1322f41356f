//! What is measured is read by those who are to read it: a real Prometheus finds and scrapes every daemon, its own tool judges the
//! alerts, and every question of the dashboard and of the alerts is about something that exists.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helper functions")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use drover_e2e::cli::run;
use drover_service::address_book::{self, Entry};
use drover_testkit::cluster::{Cluster, end};
use drover_testkit::codex::repository_root;
use drover_testkit::emulate::{Connection, command};
use drover_testkit::{skip, this_test};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_mins(1);

/// A program of Debian's package, installed or unpacked by `cargo xtask test`.
fn tool(name: &str) -> Option<PathBuf> {
    let unpacked = repository_root().join("target/prometheus/usr/bin").join(name);
    let installed = Path::new("/usr/bin").join(name);
    let found = [unpacked, installed].into_iter().find(|path| path.is_file());
    if found.is_none() {
        skip(&this_test(), &format!("{name} is missing: cargo xtask test unpacks Debian's package prometheus"));
    }
    found
}

fn deployed(file: &str) -> String {
    let path = repository_root().join("deploy").join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Asks by HTTP, and gives the body of a good answer.
fn http(addr: SocketAddr, method: &str, path: &str, body: &str) -> Result<String, String> {
    let mut stream = TcpStream::connect(addr).map_err(|error| error.to_string())?;
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n\
         Content-Length: {length}\r\n\r\n"
    );
    stream.write_all((head + body).as_bytes()).map_err(|error| error.to_string())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(|error| error.to_string())?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    if head.lines().next().is_some_and(|line| line.contains(" 200 ")) { Ok(body.to_owned()) } else { Err(answer) }
}

struct Prometheus {
    child: Child,
    addr: SocketAddr,
    log: PathBuf,
}

impl Prometheus {
    /// With the configuration that is shipped, but for the router's address and the pace.
    fn start(program: &Path, dir: &Path, router: &str) -> Self {
        let config = deployed("prometheus/prometheus.yml");
        for fixed in ["127.0.0.1:7950", "interval: 15s"] {
            assert!(config.contains(fixed), "the shipped configuration does not say {fixed}");
        }
        let config = config.replace("127.0.0.1:7950", router).replace("interval: 15s", "interval: 1s");
        fs::write(dir.join("prometheus.yml"), config).unwrap();
        fs::write(dir.join("alerts.yml"), deployed("prometheus/alerts.yml")).unwrap();
        let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let log = dir.join("prometheus.log");
        let file = fs::File::create(&log).unwrap();
        let child = Command::new(program)
            .arg(format!("--config.file={}", dir.join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", dir.join("tsdb").display()))
            .arg(format!("--web.listen-address={addr}"))
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        Self { child, addr, log }
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn get(&self, path: &str) -> Result<Value, String> {
        serde_json::from_str(&http(self.addr, "GET", path, "")?).map_err(|error| error.to_string())
    }

    /// The answer to a question, as often as it has a series.
    fn query(&self, expression: &str) -> Vec<Value> {
        let encoded = expression.bytes().fold(String::new(), |mut encoded, byte| {
            let _ = write!(encoded, "%{byte:02X}");
            encoded
        });
        let answer = http(self.addr, "POST", "/api/v1/query", &format!("query={encoded}"));
        let answer: Value =
            serde_json::from_str(&answer.unwrap_or_else(|error| panic!("{expression}: {error}"))).unwrap();
        answer["data"]["result"].as_array().unwrap_or_else(|| panic!("{expression}: {answer}")).clone()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        end(&mut self.child, Duration::from_secs(5));
    }
}

/// The questions of the dashboard, as Grafana would ask them.
fn panels() -> Vec<String> {
    let dashboard: Value = serde_json::from_str(&deployed("grafana/drover.json")).unwrap();
    let mut questions = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let question = target["expr"].as_str().unwrap();
            questions.push(question.replace("$__rate_interval", "1m").replace("$host", ".*"));
        }
    }
    assert!(questions.len() > 30, "{questions:?}");
    questions
}

/// Name and question of every alert.
fn alerts(rules: &Value) -> BTreeMap<String, String> {
    let all = rules["data"]["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap());
    all.map(|rule| (rule["name"].as_str().unwrap().to_owned(), rule["query"].as_str().unwrap().to_owned())).collect()
}

/// Every word of ours in a question.
fn metrics_of(question: &str) -> BTreeSet<String> {
    let words = question.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("drover_")).map(str::to_owned).collect()
}

/// The names under which a daemon's metrics are stored.
fn stored_names(metrics: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for line in metrics.lines() {
        let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) else { continue };
        let ends: &[&str] = match kind {
            "counter" => &["_total"],
            "histogram" => &["_bucket", "_sum", "_count"],
            "info" => &["_info"],
            _ => &[""],
        };
        names.extend(ends.iter().map(|end| format!("{name}{end}")));
    }
    names
}

fn must(cluster: &Cluster, args: &[&str]) {
    let ran = run(cluster, args).unwrap();
    assert_eq!(ran.code, 0, "{args:?}: {}{}", ran.stdout, ran.stderr);
}

/// Some series are there only once they have something to count: a command of a JSON-line client, a node that cannot show who it
/// is, and a membership daemon that has something to complain about, which is returned.
async fn what_counts_only_when_it_happens(cluster: &Cluster) -> Running {
    let control = cluster.control_addr().unwrap().parse().unwrap();
    let mut client = Connection::open(control).await.unwrap();
    client.send(&command("swarm_list", &serde_json::json!({}))).await.unwrap();
    client.next().await.unwrap();

    let of_nodes = |entry: &Entry| entry.name.starts_with("gossip-membership-");
    let deadline = Instant::now() + PATIENCE;
    let of_sessions = |entry: &Entry| entry.name.starts_with("handoff-coordinator-");
    let node = loop {
        let entries = address_book::list(cluster.state());
        let sessions = entries.iter().any(of_sessions);
        match entries.into_iter().find(of_nodes) {
            Some(node) if sessions => break node,
            _ => assert!(Instant::now() < deadline, "no node's membership daemon and daemon of sessions listen"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let mut stranger = TcpStream::connect(&node.listen).unwrap();
    stranger.set_read_timeout(Some(PATIENCE)).unwrap();
    stranger.write_all(&[0x16, 3, 1, 0, 5, 1, 2, 3, 4, 5]).unwrap();
    let mut answer = Vec::new();
    // Closed with an alert, or at once: what matters is that it is over.
    let _ = stranger.read_to_end(&mut answer);

    let mut alone = cluster.command(&["daemon", "gossip-membership", "--listen", "127.0.0.1:0"]);
    let alone = alone.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let alone = Running(alone);
    let deadline = Instant::now() + PATIENCE;
    while address_book::read(cluster.state(), "gossip-membership").is_none() {
        assert!(Instant::now() < deadline, "the daemon without an identity does not listen");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    alone
}

/// A process that ends with this.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        end(&mut self.0, Duration::from_secs(5));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_prometheus_finds_and_scrapes_every_daemon() {
    let Some(program) = tool("prometheus") else { return };
    let cluster = Cluster::start("worker: {agent: echo}\n").await.unwrap();
    must(&cluster, &["launch", "--nodes", "2", "--prompt", "hello"]);
    fs::write(cluster.dir().join("prompts.txt"), "one\ntwo\n").unwrap();
    must(&cluster, &["dispatch", "prompts.txt", "--provider", "sim"]);
    let _alone = what_counts_only_when_it_happens(&cluster).await;
    // Of each kind at least one.
    let entries = address_book::list(cluster.state());
    let kinds = [
        "router",
        "slurm-allocator",
        "outbox-follower",
        "llm-dispatcher",
        "worker",
        "gossip-membership",
        "handoff-coordinator",
    ];
    for kind in kinds {
        assert!(entries.iter().any(|entry| entry.name.starts_with(kind)), "no {kind} among {entries:?}");
    }
    let router = entries.iter().find(|entry| entry.name == "router").unwrap().listen.clone();
    let prometheus = Prometheus::start(&program, cluster.dir(), &router);

    let deadline = Instant::now() + PATIENCE;
    loop {
        let last = match prometheus.get("/api/v1/targets?state=active") {
            Ok(targets) => {
                let targets = targets["data"]["activeTargets"].as_array().unwrap().clone();
                let up = |kind: &str| {
                    let mut of_kind = targets.iter().filter(|target| target["labels"]["daemon"] == kind).peekable();
                    of_kind.peek().is_some() && of_kind.all(|target| target["health"] == "up")
                };
                if kinds.into_iter().all(up) {
                    break;
                }
                format!("{targets:?}")
            }
            Err(error) => error,
        };
        assert!(Instant::now() < deadline, "not everything is scraped: {last}\n{}", prometheus.log());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }

    let mut known = BTreeSet::new();
    for entry in &entries {
        let addr: SocketAddr = entry.listen.parse().unwrap();
        known.extend(stored_names(&http(addr, "GET", "/metrics", "").unwrap()));
    }
    let alerts = alerts(&prometheus.get("/api/v1/rules").unwrap());
    assert!(alerts.len() > 15, "{alerts:?}");
    for question in panels().iter().chain(alerts.values()) {
        // Prometheus says what is wrong with a question, not that it is about nothing.
        prometheus.query(question);
        for name in metrics_of(question) {
            assert!(known.contains(&name), "{name} of {question} is what no daemon has");
        }
    }
    assert!(!known.contains("drover_nonsense_total"), "whatever is asked for is known");

    // Some that must have counted something by now; what has been scraped once is there.
    for (question, least) in [
        ("sum(drover_router_events_total)", 4.0),
        ("sum(drover_worker_turns_total{status=\"completed\"})", 2.0),
        ("sum(drover_router_nodes{state=\"idle\"})", 2.0),
        ("sum(drover_rpc_calls_total{daemon=\"router\",code=\"ok\"})", 2.0),
        ("sum(drover_rpc_seconds_count{daemon=\"outbox-follower\"})", 1.0),
        ("sum(drover_dispatcher_tasks_total{status=\"succeeded\"})", 2.0),
        ("sum(drover_dispatcher_tokens_total)", 2.0),
        ("min(drover_process_resident_memory_bytes)", 1e6),
        ("min(drover_membership_members{state=\"alive\"})", 1.0),
    ] {
        let value = || {
            let answer = prometheus.query(question);
            answer.first().and_then(|series| series["value"][1].as_str()?.parse::<f64>().ok())
        };
        let deadline = Instant::now() + PATIENCE;
        while value().is_none_or(|value| value < least) {
            assert!(Instant::now() < deadline, "{question} is {:?}, not {least}", value());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

#[test]
fn the_alerts_wake_whom_they_should() {
    let Some(promtool) = tool("promtool") else { return };
    let dir = repository_root().join("deploy/prometheus");
    let judged = |args: &[&str]| {
        let output = Command::new(&promtool).args(args).current_dir(&dir).output().unwrap();
        assert!(
            output.status.success(),
            "promtool {args:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    };
    judged(&["check", "config", "prometheus.yml"]);
    judged(&["check", "rules", "alerts.yml"]);
    judged(&["test", "rules", "alerts_test.yml"]);
}

#[test]
fn every_alert_is_in_the_runbook() {
    let rules = deployed("prometheus/alerts.yml");
    let names: Vec<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(names.len() > 15, "{names:?}");
    let runbook = fs::read_to_string(repository_root().join("docs/runbook.md")).unwrap();
    let sections: Vec<&str> =
        runbook.lines().filter_map(|line| line.strip_prefix("## Drover").map(|_| &line[3..])).collect();
    assert_eq!(sections, names, "one section for each alert, in their order");
    for section in runbook.split("\n## Drover").skip(1) {
        let section = section.split("\n## ").next().unwrap();
        for part in ["**It means**", "**Do**"] {
            assert!(section.contains(part), "{part} is missing in: {section}");
        }
    }
    for name in names {
        let link = format!("runbook: docs/runbook.md#{}", name.to_lowercase());
        assert!(rules.contains(&link), "{name} does not lead to its section");
    }
}
