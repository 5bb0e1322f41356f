//! Pages read on eight nodes, three of which are killed midway: none lost, none done twice, evenly spread. Of some of them a
//! model is asked: that is done by the dispatcher, once for each, whatever happens to nodes.
//!
//! Nodes are real workers of a swarm on this machine, with their membership. The judge is the site that they read, which counts
//! every request: a page may be asked for again only when a node died while it was being read.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream as StdStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use drover_service::{StateDir, address_book};
use drover_testkit::cluster::{Cluster, signal};
use drover_testkit::mock_llm::{MockLlm, Settings};
use rustix::process::Signal;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::cli::json;

/// How long the site takes for a page, so that some are under way at any moment.
const PAGE: Duration = Duration::from_millis(20);
/// How long a page may have been under way when its node was killed, on a machine that stalls.
const UNDER_WAY: Duration = Duration::from_secs(10);
/// How much later than its node's death a request may be read, on such a machine.
const LATE: Duration = Duration::from_secs(1);
/// How far a node may be from the mean of those that lived as long.
const EVEN: f64 = 0.10;
const PATIENCE: Duration = Duration::from_mins(2);
/// What the model says about every page.
const ANSWER: &str = "It is the page that was shown.";

/// How much to do.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Pages.
    pub tasks: usize,
    /// A model is asked about one in so many.
    pub extract_every: usize,
    /// Nodes.
    pub nodes: usize,
    /// How many of them are killed, at equal distances.
    pub kills: usize,
}

impl Plan {
    fn is_extract(self, number: usize) -> bool {
        number.is_multiple_of(self.extract_every)
    }
}

/// What was seen.
#[derive(Debug, Default)]
pub struct Report {
    /// Pages by the node that read them, those that were killed included.
    pub read_by: BTreeMap<String, usize>,
    /// Nodes that were killed.
    pub killed: Vec<String>,
    /// Pages asked for a second time, each of them under way at a kill.
    pub asked_again: usize,
    /// Calls to the model, by its own count: one for each page that it is asked about.
    pub model_calls: u64,
    /// The furthest that a node which lived was from their mean, as a share of it.
    pub furthest: f64,
    /// How long the run took.
    pub took: Duration,
}

/// The site: a page for every path, and a count of who asked when.
struct Site {
    addr: SocketAddr,
    asked: Arc<Mutex<HashMap<String, Vec<Instant>>>>,
    /// Of its own, so that it keeps answering while the judge waits.
    runtime: Option<tokio::runtime::Runtime>,
}

impl Site {
    fn start() -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
        let addr = listener.local_addr()?;
        let asked: Arc<Mutex<HashMap<String, Vec<Instant>>>> = Arc::default();
        let counting = Arc::clone(&asked);
        runtime.spawn(async move {
            let mut served = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                while served.try_join_next().is_some() {}
                let counting = Arc::clone(&counting);
                // A node that is killed breaks off; that is its business.
                served.spawn(async move { drop(serve(stream, counting).await) });
            }
        });
        Ok(Self { addr, asked, runtime: Some(runtime) })
    }

    fn asked(&self) -> MutexGuard<'_, HashMap<String, Vec<Instant>>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self) -> usize {
        self.asked().len()
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn serve(
    mut stream: tokio::net::TcpStream,
    asked: Arc<Mutex<HashMap<String, Vec<Instant>>>>,
) -> std::io::Result<()> {
    let mut text = Vec::new();
    loop {
        while !text.windows(4).any(|window| window == b"\r\n\r\n") {
            if stream.read_buf(&mut text).await? == 0 {
                return Ok(());
            }
        }
        let head = String::from_utf8_lossy(&std::mem::take(&mut text)).into_owned();
        let path = head.split_whitespace().nth(1).unwrap_or_default().to_owned();
        let (status, body) = if let Some(number) = path.strip_prefix("/page/") {
            asked.lock().unwrap_or_else(PoisonError::into_inner).entry(path.clone()).or_default().push(Instant::now());
            tokio::time::sleep(PAGE).await;
            ("200 OK", words(number))
        } else {
            ("404 Not Found", String::new())
        };
        let answer =
            format!("HTTP/1.1 {status}\r\ncontent-type: text/plain\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        stream.write_all(answer.as_bytes()).await?;
    }
}

fn words(number: &str) -> String {
    format!("These are the words of page number {number}.")
}

/// Reads the pages, kills, and judges.
pub async fn run(plan: Plan) -> anyhow::Result<Report> {
    let site = tokio::task::spawn_blocking(Site::start).await??;
    let model = MockLlm::start(Settings { latency_ms: 5.0, answer: Some(ANSWER.to_owned()), ..Settings::default() })?;
    let config = format!(
        "worker: {{agent: echo, run_tasks: true, max_restarts: 0}}\n\
         swarm:\n  discovery: {{gossip_interval: 200ms, node_timeout: 1s}}\n  \
         load_monitor: {{cpu_weight: 0, memory_weight: 0, session_weight: 1}}\n\
         node_scaling:\n  listen: 127.0.0.1:0\n  provider: {{name: mock, model: m, base_url: \"{}\", max_tokens: 64}}\n  \
         cost: {{allow_unknown_prices: true}}\n  limits: {{max_nodes: 32, max_concurrent_api: 32, hedge: false}}\n  \
         fetch: {{allow: [\"{}\"]}}\n",
        model.base_url("openai"),
        site.addr
    );
    // All nodes share one machine, so what is measured of it says nothing about any of them: only their sessions count.
    let cluster = Cluster::start(&config).await?;
    let nodes = plan.nodes.to_string();
    let launched = json(&cluster, &["launch", "--nodes", &nodes, "--detach", "--json"])?;
    let swarm = launched["swarm_id"].as_str().context("no swarm")?.to_owned();
    let all_there = || metric(cluster.state(), "drover_task_nodes").is_some_and(|there| there as usize == plan.nodes);
    wait_for("every node takes tasks", all_there).with_context(|| cluster.logs())?;

    let mut tasks = String::new();
    for number in 0..plan.tasks {
        let what = if plan.is_extract(number) {
            r#""kind": "extract", "prompt": "Which page is it?""#
        } else {
            r#""kind": "fetch""#
        };
        let _ = writeln!(tasks, r#"{{"id": "{number}", {what}, "url": "http://{}/page/{number}"}}"#, site.addr);
    }
    let file = cluster.dir().join("tasks.jsonl");
    std::fs::write(&file, tasks)?;
    let (out, began) = (cluster.dir().join("results"), Instant::now());
    let mut command = cluster.command(&["dispatch", &file.to_string_lossy(), "--unordered", "--json"]);
    let mut dispatching = command.stdout(std::fs::File::create(&out)?).spawn()?;

    let status = json(&cluster, &["status", &swarm, "--json"])?;
    let pid = |node: usize| status["nodes"][node]["pid"].as_u64().map(|pid| pid as u32).context("a node has no worker");
    let (mut killed, mut when) = (Vec::new(), Vec::new());
    for kill in 0..plan.kills {
        let from = plan.tasks * (kill + 1) / (plan.kills + 2);
        wait_for("the run comes to its next kill", || site.count() >= from)?;
        let node = kill * 2 + 1;
        signal(pid(node)?, Signal::KILL)?;
        when.push(Instant::now());
        killed.push(format!("{swarm}/{node}"));
    }
    let deadline = Instant::now() + PATIENCE * 3;
    let ended = loop {
        if let Some(ended) = dispatching.try_wait()? {
            break ended;
        }
        if Instant::now() > deadline {
            let _ = dispatching.kill();
            bail!("the run does not end: {} of {} pages\n{}", site.count(), plan.tasks, cluster.logs());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let took = began.elapsed();
    ensure!(ended.success(), "the run failed: {ended}\n{}", cluster.logs());
    let text = std::fs::read_to_string(&out)?;
    let lines: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let report = judge(plan, &lines, &killed, &when, &site)?;
    let ledger = model.ledger();
    let asked_about = (0..plan.tasks).filter(|number| plan.is_extract(*number)).count() as u64;
    ensure!(ledger.answered == asked_about && ledger.answered_again == 0, "not one call for each page: {ledger:?}");
    Ok(Report { took, model_calls: ledger.calls, ..report })
}

fn judge(plan: Plan, lines: &[Value], killed: &[String], when: &[Instant], site: &Site) -> anyhow::Result<Report> {
    let results: Vec<&Value> = lines.iter().filter(|line| line["summary"].is_null()).collect();
    ensure!(results.len() == plan.tasks, "{} results for {} tasks", results.len(), plan.tasks);
    let mut report = Report { killed: killed.to_vec(), ..Report::default() };
    let mut seen = vec![false; plan.tasks];
    for result in results {
        let id: usize = result["id"].as_str().context("no id")?.parse()?;
        ensure!(!std::mem::replace(&mut seen[id], true), "task {id} has two results");
        let told = result["output"].as_str().unwrap_or_default().trim().to_owned();
        let page = words(&id.to_string());
        let wanted = if plan.is_extract(id) { ANSWER } else { &page };
        ensure!(result["status"] == "succeeded" && told == wanted, "{result}");
        if plan.is_extract(id) {
            // What the model was shown is this page, whichever node read it.
            let shown = &result["detail"];
            let own = shown["url"] == format!("http://{}/page/{id}", site.addr) && shown["chars"] == page.len();
            ensure!(own && result["provider"] == "mock", "{result}");
        }
        let node = result["detail"]["read_by"].as_str().with_context(|| format!("no node read it: {result}"))?;
        *report.read_by.entry(node.to_owned()).or_default() += 1;
    }
    let asked = site.asked();
    ensure!(asked.len() == plan.tasks, "{} pages were asked for", asked.len());
    for (path, times) in asked.iter().filter(|(_, times)| times.len() > 1) {
        // Only a death between two requests is a reason for the second.
        let excused = |pair: &[Instant]| {
            when.iter().any(|kill| {
                // What the node had asked for when it died may be read by the site a little later.
                pair[0] <= *kill + LATE
                    && *kill <= pair[1] + PAGE
                    && kill.saturating_duration_since(pair[0]) < UNDER_WAY
            })
        };
        ensure!(times.windows(2).all(excused), "{path} was read again without need: {times:?}, kills {when:?}");
        report.asked_again += 1;
    }
    // Each node that was killed had only so many under way.
    ensure!(report.asked_again <= plan.kills * 32, "{} pages were read again", report.asked_again);
    let living: Vec<usize> =
        report.read_by.iter().filter(|(node, _)| !killed.contains(node)).map(|(_, count)| *count).collect();
    ensure!(living.len() == plan.nodes - plan.kills, "not every node read: {:?}", report.read_by);
    let mean = living.iter().sum::<usize>() as f64 / living.len() as f64;
    report.furthest = living.iter().map(|count| (*count as f64 - mean).abs() / mean).fold(0.0, f64::max);
    ensure!(report.furthest <= EVEN, "not even: {:?}", report.read_by);
    // Those that were killed had their share until then: in the order of their deaths, never more than who lived longer.
    let counts: Vec<usize> = killed.iter().map(|node| report.read_by.get(node).copied().unwrap_or(0)).collect();
    ensure!(counts.windows(2).all(|pair| pair[0] <= pair[1] + 32), "not even among the killed: {counts:?}");
    ensure!(
        counts.iter().all(|count| (*count as f64) < mean * (1.0 + EVEN)),
        "a killed node read too much: {counts:?}"
    );
    Ok(report)
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        ensure!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A metric of the dispatcher.
fn metric(state: &StateDir, name: &str) -> Option<f64> {
    let entry = address_book::read(state, "llm-dispatcher")?;
    let mut stream = StdStream::connect(&entry.listen).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    let request = format!("GET /metrics HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", entry.listen);
    stream.write_all(request.as_bytes()).ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}
