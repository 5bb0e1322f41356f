//! The clients that exist, played against the real router with real workers: each row of what ends a command, the long
//! connections, and a command line that starts our router itself.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helper functions")]

use std::ffi::OsString;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use drover_e2e::sure::must;
use drover_service::{StateDir, address_book, process};
use drover_testkit::cluster::{Cluster, processes_of, program, scratch_dir, signal};
use drover_testkit::emulate::{
    Attach, AutoSpawn, Client, Connection, Ended, Found, Inject, Launch, OneShot, OpenClaw, SeedInject, SeedOneShot,
    StopAll, Terminate, WebBackend, command, id_of, probe, run, run_until,
};
use drover_testkit::{skip, this_test};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;

/// Longer than anything takes.
const PATIENCE: Duration = Duration::from_secs(30);
/// Text that small chunks cut in the middle of its characters.
const GREETING: &str = "Grüße, 世界 🙂";

/// Checks until it holds.
async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A port that nobody uses at the moment: clients of this kind know their router's port beforehand.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// An instance whose launches, which name no agent, run `echo`.
async fn start() -> (Cluster, SocketAddr) {
    let addr: SocketAddr = ([127, 0, 0, 1], free_port()).into();
    let config = format!(
        "router: {{control_listen: \"{addr}\", graceful_terminate_timeout: 1s}}\nworker: {{agent: echo, restart_delay: 50ms}}"
    );
    (must(Cluster::start(&config).await), addr)
}

/// Runs a client that must end.
async fn to_the_end(addr: SocketAddr, mut client: impl Client) -> Ended {
    let ended = run(addr, &mut client, PATIENCE).await.unwrap();
    assert!(ended.exit.is_some() && !ended.closed, "it waits for ever: {:?}\n{:#?}", ended.screen, ended.events);
    assert_eq!(ended.broken, Vec::<String>::new(), "every line is JSON");
    for event in &ended.events {
        assert!(event["type"] == "event" && event["data"].is_object(), "{event}");
    }
    ended
}

/// Launches as the command line does and gives the swarm's id.
async fn launch(addr: SocketAddr, nodes: u32, prompt: &str) -> String {
    let launched = to_the_end(addr, Launch::new(nodes, prompt, true)).await;
    assert_eq!(launched.exit, Some(0), "{:?}", launched.screen);
    let line = launched.screen.out.lines().find_map(|line| line.strip_prefix("swarm_id: "));
    line.unwrap_or_else(|| panic!("{}", launched.screen.out)).to_owned()
}

// ---- the later command line ----------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn head_row_by_row() {
    let (cluster, addr) = start().await;

    let providers = to_the_end(addr, OneShot::providers()).await;
    assert_eq!((providers.exit, providers.screen.out.as_str()), (Some(0), "local | backend=local\n"));
    let list = to_the_end(addr, OneShot::list()).await;
    assert_eq!((list.exit, list.screen.out.contains("Available Swarms:")), (Some(0), true));
    for client in [OneShot::status("nonsense"), OneShot::status("")] {
        let unknown = to_the_end(addr, client).await;
        assert_eq!((unknown.exit, unknown.screen.err.as_str()), (Some(1), "Error: unknown swarm_id\n"));
    }

    // launch --detach: progress, then the swarm; or the reason.
    let launched = to_the_end(addr, Launch::new(2, "", true)).await;
    assert_eq!(launched.exit, Some(0), "{:?}", launched.screen);
    assert!(launched.screen.out.starts_with("[launch:queued] "), "{}", launched.screen.out);
    assert!(launched.screen.out.contains("node_count: 2\n") && !launched.screen.out.contains("[object"));
    for (payload, said) in [
        (json!({"nodes": 1, "provider": "nowhere"}), "no provider is called \"nowhere\""),
        (json!({"nodes": 0}), "Launch failed: "),
        (json!({"nodes": 100_000}), "Launch failed: "),
    ] {
        let refused = to_the_end(addr, Launch::with(&payload, true)).await;
        assert_eq!(refused.exit, Some(1), "{payload}: {:?}", refused.screen);
        assert!(refused.screen.err.contains(said), "{payload}: {}", refused.screen.err);
    }

    // launch, followed: never ends by itself, shows the first turn, which comes after `swarm_launched`.
    let mut followed = Launch::new(1, GREETING, false);
    let seen = run_until(addr, &mut followed, PATIENCE, |screen| screen.out.contains("turn complete")).await.unwrap();
    assert_eq!((seen.exit, seen.broken.len()), (None, 0), "{:?}", seen.screen);
    assert!(seen.screen.out.contains(&format!("[node 0] assistant\n{GREETING}")), "{}", seen.screen.out);
    let names = seen.names_with("request_id", &id_of(&followed.begin()[0]));
    let at = names.iter().position(|name| *name == "swarm_launched").expect("it was launched");
    assert!(names[..at].iter().all(|name| *name == "swarm_launch_progress"), "{names:?}");
    assert!(names[at..].contains(&"inject_ack"), "{names:?}");

    let swarm = launch(addr, 4, "").await;
    let list = to_the_end(addr, OneShot::list()).await;
    assert!(list.screen.out.contains(&format!("{swarm} | job ")), "{}", list.screen.out);
    assert!(list.screen.out.contains(" | nodes 4 | running\n"), "{}", list.screen.out);
    let status = to_the_end(addr, OneShot::status(&swarm)).await;
    assert_eq!(status.exit, Some(0));
    for line in ["node_count: 4\n", "status: running\n", "slurm_state: RUNNING\n"] {
        assert!(status.screen.out.contains(line), "{line}: {}", status.screen.out);
    }
    assert!(!status.screen.out.contains("[object"), "{}", status.screen.out);

    // inject: ends when each node has acknowledged, delivered, answered and completed.
    for round in 0..5 {
        let said = to_the_end(addr, Inject::new(&swarm, None, &format!("{round} {GREETING}"))).await;
        assert_eq!(said.exit, Some(0), "{:?}", said.screen);
        assert_eq!(said.screen.out.matches(&format!("{round} {GREETING}\n")).count(), 4, "{}", said.screen.out);
    }
    assert_eq!(to_the_end(addr, Inject::new(&swarm, Some(3), "only you")).await.exit, Some(0));
    // Turns without a text, turns that fail, and turns of many deltas end it too.
    for prompt in ["@echo say=", "@echo fail=no luck", "@echo deltas=300 size=100", "@echo usage=42"] {
        assert_eq!(to_the_end(addr, Inject::new(&swarm, None, prompt)).await.exit, Some(0), "{prompt}");
    }
    let beyond = to_the_end(addr, Inject::new(&swarm, Some(4), "x")).await;
    assert_eq!((beyond.exit, beyond.screen.err.as_str()), (Some(1), "Invalid node index\n"));
    let unknown = to_the_end(addr, Inject::new("nonsense", None, "x")).await;
    assert_eq!((unknown.exit, unknown.screen.err.as_str()), (Some(1), "Error: unknown swarm_id\n"));

    // attach: sees what other clients do in its swarm, until it is told to stop.
    let unknown = to_the_end(addr, Attach::new("nonsense", false)).await;
    assert_eq!((unknown.exit, unknown.screen.err.as_str()), (Some(1), "Invalid swarm_id.\n"));
    let (mut attach, node) = (Attach::new(&swarm, true), Some(1));
    let attached = run_until(addr, &mut attach, PATIENCE, |screen| screen.out.contains("\"turn_complete\""));
    let poking = async {
        // Injects until the attached client has seen one whole turn; the first may come before it is attached.
        loop {
            to_the_end(addr, Inject::new(&swarm, node, "hello there")).await;
        }
    };
    let attached = tokio::select! {
        attached = attached => attached.unwrap(),
        () = poking => unreachable!("it injects for ever"),
    };
    assert_eq!((attached.exit, attached.broken.len()), (None, 0));
    assert!(attached.screen.out.contains("\"assistant_delta\""), "{}", attached.screen.out);

    // terminate: asked for twice at once, each asker hears of it; a prompt afterwards fails by name.
    let busy = to_the_end(addr, Terminate::new("nonsense")).await;
    assert_eq!((busy.exit, busy.screen.err.as_str()), (Some(1), "Terminate failed: unknown swarm_id\n"));
    let both = tokio::join!(to_the_end(addr, Terminate::new(&swarm)), to_the_end(addr, Terminate::new(&swarm)));
    assert_eq!((both.0.exit, both.1.exit), (Some(0), Some(0)), "{both:?}");
    let late = to_the_end(addr, Inject::new(&swarm, None, "x")).await;
    assert_eq!((late.exit, late.screen.err.as_str()), (Some(1), "Inject failed: swarm is terminating or terminated\n"));

    // stop-all: one after another, and the ended ones do no harm.
    let all = to_the_end(addr, StopAll::default()).await;
    assert_eq!(all.exit, Some(0), "{:?}", all.screen);
    let list = to_the_end(addr, OneShot::list()).await;
    assert!(!list.screen.out.contains("| running"), "{}", list.screen.out);
    drop(cluster);
}

/// A client whose connection simply ends would exit 0 without a word, so whoever waits is answered first.
#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_stops_answers_those_who_wait() {
    let (cluster, addr) = start().await;
    let swarm = launch(addr, 1, "").await;
    let allocator = cluster.daemon("slurm-allocator").unwrap();
    signal(allocator.pid, Signal::STOP).unwrap();
    let router = cluster.daemon("router").unwrap();
    let mut launching = Launch::new(1, "", true);
    let waiting = run(addr, &mut launching, PATIENCE);
    let stopping = async {
        // Its end is begun when the launch is known.
        loop {
            let list = to_the_end(addr, OneShot::list()).await;
            if list.screen.out.contains("| launching") {
                break;
            }
        }
        signal(router.pid, Signal::TERM).unwrap();
    };
    let (waited, ()) = tokio::join!(waiting, stopping);
    let waited = waited.unwrap();
    assert_eq!((waited.exit, waited.closed), (Some(1), false), "{:?}", waited.screen);
    assert!(waited.screen.err.starts_with("Launch failed: "), "{}", waited.screen.err);

    // It comes back, and what was begun goes on.
    signal(allocator.pid, Signal::CONT).unwrap();
    until("another router", || cluster.daemon("router").is_some_and(|now| now != router)).await;
    let deadline = Instant::now() + PATIENCE;
    while to_the_end(addr, OneShot::list()).await.screen.out.matches("| running").count() < 2 {
        assert!(Instant::now() < deadline, "{}", cluster.logs());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(to_the_end(addr, Inject::new(&swarm, None, GREETING)).await.exit, Some(0));
}

// ---- the seed's command line ---------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn seed_row_by_row() {
    let (cluster, addr) = start().await;
    let launched = to_the_end(addr, SeedOneShot::launch(2, "mi2508x", "00:10:00", "You are")).await;
    assert_eq!(launched.exit, Some(0), "{:?}", launched.screen);
    // Any event with its id ends it, so the first one has to be worth printing.
    assert!(launched.screen.out.starts_with("Swarm launched successfully:\n"), "{}", launched.screen.out);
    let mut swarm = String::new();
    let deadline = Instant::now() + PATIENCE;
    while swarm.is_empty() {
        assert!(Instant::now() < deadline, "{}", cluster.logs());
        let list = to_the_end(addr, SeedOneShot::list()).await;
        assert_eq!(list.exit, Some(0));
        if let Some(line) = list.screen.out.lines().find(|line| line.ends_with("| nodes 2 | running")) {
            line[..36].clone_into(&mut swarm);
        }
    }
    let status = to_the_end(addr, SeedOneShot::status(&swarm)).await;
    assert!(status.exit == Some(0) && status.screen.out.contains("slurm_state: RUNNING\n"), "{:?}", status.screen);
    assert!(status.screen.out.contains("partition: mi2508x\n"), "{}", status.screen.out);
    let unknown = to_the_end(addr, SeedOneShot::status("nonsense")).await;
    assert_eq!((unknown.exit, unknown.screen.out.as_str()), (Some(0), ""));

    let mut inject = SeedInject::new(&swarm, GREETING);
    let shown = run_until(addr, &mut inject, PATIENCE, |screen| screen.out.matches(GREETING).count() == 2);
    let shown = shown.await.unwrap();
    assert_eq!((shown.exit, shown.broken.len()), (None, 0), "{:?}", shown.screen);
    for node in 0..2 {
        assert!(shown.screen.out.contains(&format!("Inject acknowledged (node {node})\n")), "{}", shown.screen.out);
    }
    let mut inject = SeedInject::new("nonsense", "hi");
    let refused = run_until(addr, &mut inject, PATIENCE, |screen| !screen.err.is_empty()).await.unwrap();
    assert_eq!(refused.screen.err, "Inject failed: unknown swarm_id\n");
}

// ---- long connections, probes, small chunks ------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn web_backend_openclaw_and_probes() {
    let (cluster, addr) = start().await;
    // Its second is shorter here; what it sends and expects is not.
    let mut web = WebBackend::new(Duration::from_millis(25));
    let mut claw = OpenClaw::default();
    let mut talk = Connection::open(addr).await.unwrap();
    // A byte at a time: every character of more than one byte would be cut.
    talk.chunk = 1;
    let mut swarms = Vec::new();
    {
        let watching = web.live(addr, PATIENCE, |web| {
            web.passed_on.get("turn_complete").is_some_and(|&turns| turns >= 4)
                && web.answers.get("approvals_list").is_some_and(|&answers| answers > 10)
                && web.swarms.len() == 2
        });
        let talking = async {
            talk.send(&OpenClaw::launch(2, GREETING)).await.unwrap();
            while claw.turns < 2 {
                claw.message(&next(&mut talk).await);
            }
            let rejected = to_the_end(addr, Terminate::new("nonsense")).await;
            assert_eq!(rejected.exit, Some(1));
            // The web backend never asked for it and shows it all the same.
            swarms.push(launch(addr, 1, "").await);
            talk.send(&OpenClaw::inject(&claw.launched[0], GREETING)).await.unwrap();
            while claw.turns < 4 {
                claw.message(&next(&mut talk).await);
            }
        };
        let probing = async {
            for _ in 0..200 {
                assert!(probe(addr).await, "the port answers");
            }
        };
        let (watching, (), ()) = tokio::join!(watching, talking, probing);
        watching.unwrap();
    }
    assert_eq!(claw.rejections, Vec::<String>::new(), "another client's rejection is not its business");
    let greetings: usize = claw.said.values().map(|text| text.matches(GREETING).count()).sum();
    assert_eq!(greetings, 4, "{:?}", claw.said);
    assert_eq!(talk.decoder.broken, Vec::<String>::new());
    swarms.push(claw.launched[0].clone());
    for answer in ["swarm_list", "queue_list", "project_list", "approvals_list"] {
        assert!(web.answers.get(answer).is_some_and(|&count| count >= 1), "{answer}: {:?}", web.answers);
    }
    assert!(web.passed_on.contains_key("delta") && !web.answers.contains_key("command_rejected"));
    assert!(swarms.iter().all(|swarm| web.swarms.get(swarm).is_some_and(|status| status == "running")));

    // The router dies; the bridge comes back by itself to the same picture.
    let (router, connects) = (cluster.daemon("router").unwrap(), web.connects);
    signal(router.pid, Signal::KILL).unwrap();
    until("another router", || cluster.daemon("router").is_some_and(|now| now != router)).await;
    web.live(addr, PATIENCE, |web| web.connects > connects && web.passed_on["swarm_list"] > 1).await.unwrap();
    assert!(web.dropped.is_empty() && web.swarms.len() == 2, "{:?} {:?}", web.swarms, web.dropped);
    assert!(cluster.command(&["list"]).output().unwrap().status.success());
}

async fn next(connection: &mut Connection) -> Value {
    let message = tokio::time::timeout(PATIENCE, connection.next()).await.expect("an event within the time");
    message.unwrap().expect("the connection stays")
}

/// What leaves the router is ASCII, whatever goes in and wherever it comes out.
#[tokio::test(flavor = "multi_thread")]
async fn every_line_is_ascii() {
    let (_cluster, addr) = start().await;
    let swarm = launch(addr, 1, GREETING).await;
    let mut connection = Connection::open(addr).await.unwrap();
    let mut foreign = command("swarm_status", &json!({ "swarm_id": GREETING }));
    foreign["request_id"] = json!(format!("health-{GREETING}"));
    let prompt = format!("{GREETING}\u{7f}\u{2028}\n@echo deltas=2\n");
    let ask = command("inject", &json!({"swarm_id": swarm, "nodes": [0], "content": prompt}));
    for line in [&foreign, &ask, &command("swarm_list", &json!({}))] {
        connection.send(line).await.unwrap();
    }
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 4096];
    while !String::from_utf8_lossy(&bytes).contains("\"turn_complete\"") {
        let read = tokio::time::timeout(PATIENCE, connection.stream.read(&mut buffer)).await.unwrap().unwrap();
        assert_ne!(read, 0, "the connection stays");
        bytes.extend_from_slice(&buffer[..read]);
    }
    assert!(bytes.is_ascii());
    let messages = connection.decoder.push(&bytes);
    assert_eq!(connection.decoder.broken, Vec::<String>::new());
    let rejected = messages.iter().find(|message| message["event"] == "command_rejected").unwrap();
    assert_eq!(rejected["data"]["request_id"], foreign["request_id"]);
    let acked = messages.iter().find(|message| message["data"]["prompt"] == json!(prompt));
    assert!(acked.is_some(), "the prompt comes back whole");
}

// ---- a command line that starts our router --------------------------------------------------------------------------

/// A repository of theirs in which our router stands in for theirs.
struct Home {
    spawn: AutoSpawn,
    state: StateDir,
    started: Vec<Child>,
    _dir: tempfile::TempDir,
}

/// What an administrator puts where the older router's file was.
const ROUTER_PY: &str = r#"import os, sys
home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.environ.setdefault("CODESWARM_ROUTER_PID_FILE", os.path.join(home, "router.pid"))
drover = os.environ["DROVER"]
os.execv(drover, [drover, "daemon", "router", *sys.argv[1:]])
"#;

/// The same as a wrapper of the interpreter: questions go to a real one, the module is ours.
const PYTHON_SH: &str = r#"#!/bin/sh
case "$1" in
  -c) exec python3 "$@" ;;
esac
[ "$1 $2 $3" = "-u -m router.router" ] || exit 64
shift 3
export CODESWARM_ROUTER_PID_FILE="$CODESWARM_HOME/router.pid"
exec "$DROVER" daemon router "$@"
"#;

impl Home {
    fn new() -> Self {
        let dir = must(scratch_dir("foreign-"));
        let home = dir.path().join("codeswarm");
        for sub in ["router", "configs"] {
            std::fs::create_dir_all(home.join(sub)).unwrap();
        }
        std::fs::write(home.join("router/router.py"), ROUTER_PY).unwrap();
        // A file of theirs, with one key of ours, because launches of theirs name no agent.
        let config = r#"{"cluster": {"backend": "local", "local": {}},
            "router": {"inject_timeout_seconds": 60, "listen": "127.0.0.1:0"}, "worker": {"agent": "echo"}}"#;
        std::fs::write(home.join("configs/local.json"), config).unwrap();
        let state = must(StateDir::open(&dir.path().join("state")).map_err(Into::into));
        let port = free_port();
        let set = |name: &str, value: &Path| (OsString::from(name), value.as_os_str().to_owned());
        let env = vec![
            set("DROVER", &must(program("drover"))),
            set("DROVER_STATE_DIR", state.path()),
            set("DROVER_CONFIG", Path::new("")),
            set("CODESWARM_HOME", &home),
            set("CODESWARM_ROUTER_PORT", Path::new(&port.to_string())),
        ];
        let spawn =
            AutoSpawn { home, config: "configs/local.json".to_owned(), env, addr: ([127, 0, 0, 1], port).into() };
        Self { spawn, state, started: Vec::new(), _dir: dir }
    }

    async fn head(&mut self) -> bool {
        match self.spawn.head().await.unwrap_or_else(|error| panic!("{error}: {}", self.logs())) {
            Found::Existing => false,
            Found::Started(child) => {
                self.started.push(child);
                true
            }
        }
    }

    fn pid(&self, daemon: &str) -> Option<u32> {
        address_book::read(&self.state, daemon).map(|entry| entry.pid)
    }

    fn logs(&self) -> String {
        let files = std::fs::read_dir(self.state.path().join("logs")).into_iter().flatten().filter_map(Result::ok);
        let texts = files.map(|file| {
            format!("--- {}\n{}\n", file.path().display(), std::fs::read_to_string(file.path()).unwrap_or_default())
        });
        texts.collect()
    }

    /// Ends the router as `stop-all` does, and sees that nothing of it is left but the swarms.
    async fn stop_all(&mut self) {
        let addr = self.spawn.addr;
        assert_eq!(to_the_end(addr, StopAll::default()).await.exit, Some(0));
        let beside = ["slurm-allocator", "outbox-follower"].map(|daemon| self.pid(daemon).unwrap());
        let mut router = self.started.pop().unwrap();
        let reaped = std::thread::spawn(move || router.wait().unwrap());
        let (pid, went) = self.spawn.stop_router().await.unwrap();
        assert!(went, "the router {pid} was still there after two seconds: {}", self.logs());
        assert!(reaped.join().unwrap().success(), "{}", self.logs());
        assert!(!self.spawn.home.join("router.pid").exists());
        until("allocator and follower have ended", || beside.iter().all(|&pid| process::of(pid).is_none())).await;
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        for pid in processes_of(self.state.path()) {
            let _ = signal(pid, Signal::KILL);
        }
        for child in &mut self.started {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn has_python() -> bool {
    let found = std::process::Command::new("python3").arg("--version").output().is_ok_and(|ran| ran.status.success());
    if !found {
        skip(&this_test(), "python3 is not installed");
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn the_later_command_line_starts_our_router_and_stops_it() {
    if !has_python() {
        return;
    }
    let mut home = Home::new();
    let addr = home.spawn.addr;
    assert!(home.head().await, "nothing answered the probe");
    let router = home.started[0].id();
    let swarm = launch(addr, 2, GREETING).await;
    assert!(!home.head().await, "the next command finds it");
    assert_eq!(to_the_end(addr, Inject::new(&swarm, None, GREETING)).await.exit, Some(0));
    let pid_file = std::fs::read_to_string(home.spawn.home.join("router.pid")).unwrap();
    assert_eq!(pid_file, format!("{router}\n"), "the process that was started is the router");
    assert_eq!(home.pid("router"), Some(router));
    // Its output was thrown away, and it says all the same what it did.
    let log = std::fs::read_to_string(home.state.path().join("logs/router.log")).unwrap();
    for said in
        ["slurm-allocator did not run; started it", "outbox-follower did not run; started it", "TCP CONTROL READY"]
    {
        assert!(log.contains(said), "{said}: {log}");
    }

    // What dies beside it comes back, and meanwhile nothing is lost.
    let before = ["slurm-allocator", "outbox-follower"].map(|daemon| home.pid(daemon).unwrap());
    for pid in before {
        signal(pid, Signal::KILL).unwrap();
    }
    assert_eq!(to_the_end(addr, Inject::new(&swarm, None, "and again")).await.exit, Some(0));
    launch(addr, 1, "").await;
    let after = ["slurm-allocator", "outbox-follower"].map(|daemon| home.pid(daemon).unwrap());
    assert!(before.iter().all(|pid| !after.contains(pid)), "{before:?} {after:?}");

    home.stop_all().await;
    // And once more, over the same state.
    assert!(home.head().await);
    let list = to_the_end(addr, OneShot::list()).await;
    assert!(list.screen.out.contains(&swarm), "{}", list.screen.out);
    home.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interpreter_that_is_ours_and_a_seed_that_always_starts_one() {
    if !has_python() {
        return;
    }
    let mut home = Home::new();
    let wrapper: PathBuf = home.spawn.home.join("python");
    std::fs::write(&wrapper, PYTHON_SH).unwrap();
    std::fs::set_permissions(&wrapper, std::fs::Permissions::from_mode(0o755)).unwrap();
    home.spawn.env.push(("CODESWARM_PYTHON".into(), wrapper.into()));
    // Without the stand-in only the wrapper can have started it.
    std::fs::rename(home.spawn.home.join("router"), home.spawn.home.join("aside")).unwrap();
    let addr = home.spawn.addr;
    assert!(home.head().await);
    launch(addr, 1, "").await;

    // The seed starts another router with every command; it must go away again and leave the first alone.
    std::fs::rename(home.spawn.home.join("aside"), home.spawn.home.join("router")).unwrap();
    let (router, allocator) = (home.pid("router").unwrap(), home.pid("slurm-allocator").unwrap());
    for _ in 0..2 {
        let mut second = home.spawn.seed().await.unwrap();
        let list = to_the_end(addr, SeedOneShot::list()).await;
        assert!(list.screen.out.contains("| nodes 1 | running"), "{}", list.screen.out);
        let reaped = std::thread::spawn(move || second.wait().unwrap());
        until("the second router has gone", || reaped.is_finished()).await;
        assert_eq!(reaped.join().unwrap().code(), Some(1));
    }
    assert_eq!((home.pid("router"), home.pid("slurm-allocator")), (Some(router), Some(allocator)));
    assert_eq!(std::fs::read_to_string(home.spawn.home.join("router.pid")).unwrap(), format!("{router}\n"));
    assert!(home.logs().contains("router already runs with state directory"), "{}", home.logs());
    home.stop_all().await;
}
