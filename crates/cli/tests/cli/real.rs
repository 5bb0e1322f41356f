//! The program with its real daemons: what it starts, keeps alive, and leaves behind.

use std::io::{BufRead as _, BufReader};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::fake::drover;

/// A home of its own; whatever was started for it ends with it.
pub(crate) struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Other instances on this machine may hold the defaults; these come from the kernel.
        let text = "router:\n  listen: 127.0.0.1:0\n  control_listen: 127.0.0.1:0\nworker:\n  agent: echo\n";
        std::fs::write(dir.path().join("drover.yaml"), text).unwrap();
        Self { dir }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn run(&self, args: &[&str]) -> (Option<i32>, String, String) {
        let output = drover(self.path()).args(args).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    }

    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let (code, out, err) = self.run(&[args, &["--json"]].concat());
        assert_eq!(code, Some(0), "{args:?}: {err}");
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{args:?}: {error}: {out}"))
    }

    /// Starts a command that stays.
    pub(crate) fn spawn(&self, args: &[&str]) -> Child {
        let template = drover(self.path());
        let mut command = std::process::Command::new(template.get_program());
        command.env_clear().args(args).current_dir(self.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
        for (name, value) in template.get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        command.env("TMPDIR", self.path()).spawn().unwrap()
    }

    pub(crate) fn pid_of(&self, daemon: &str) -> Option<u32> {
        let text = std::fs::read(self.path().join("state/run").join(format!("{daemon}.json"))).ok()?;
        let entry: Value = serde_json::from_slice(&text).ok()?;
        entry["pid"].as_u64().map(|pid| pid as u32).filter(|pid| is_alive(*pid))
    }

    /// Processes that were started for this home.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let home = std::fs::canonicalize(self.path()).unwrap();
        let started_here = |pid: &u32| {
            let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environ
                .split(|&byte| byte == 0)
                .filter_map(|variable| variable.strip_prefix(b"DROVER_STATE_DIR="))
                .any(|dir| Path::new(std::ffi::OsStr::from_bytes(dir)).starts_with(&home))
        };
        let all =
            std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        all.filter(started_here).filter(|pid| is_alive(*pid)).collect()
    }

    /// The same without the membership daemons, which come and go with their workers.
    pub(crate) fn processes_but_companions(&self) -> Vec<u32> {
        let companions: [&[u8]; 2] = [b"gossip-membership", b"handoff-coordinator"];
        let is_companion = |pid: u32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|&byte| byte == 0).any(|word| companions.contains(&word))
        };
        self.processes().into_iter().filter(|pid| !is_companion(*pid)).collect()
    }

    fn demo_directories(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.path()).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.to_string_lossy().contains("drover-demo-")).collect()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        for _ in 0..50 {
            let left = self.processes();
            if left.is_empty() {
                return;
            }
            for pid in left {
                send(pid, Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

pub(crate) fn send(pid: u32, signal: Signal) {
    let _ = kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal);
}

pub(crate) fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with(['Z', 'X']))
}

/// Waits for something to become true.
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits for the end of a child.
pub(crate) fn exit_code(child: &mut Child) -> Option<i32> {
    until("the end of the command", || child.try_wait().unwrap()).code()
}

#[test]
fn the_demo_shows_everything_and_leaves_nothing_behind() {
    let home = Home::new();
    let began = Instant::now();
    let output = drover(home.path()).args(["demo", "--json"]).env("TMPDIR", home.path()).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{out}\n{err}");
    assert!(began.elapsed() < Duration::from_secs(30));
    assert!(
        err.contains("codex is not ready here") && err.contains("echo"),
        "it says why it shows another agent: {err}"
    );
    let last: Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    assert_eq!(last["ok"], true);
    let steps: Vec<&str> = last["steps"].as_array().unwrap().iter().filter_map(|step| step["step"].as_str()).collect();
    let expected = [
        "start",
        "launch",
        "first answer",
        "inject",
        "status",
        "members",
        "session",
        "worker killed",
        "it answers",
        "router killed",
        "terminate",
        "the log",
        "dispatch",
        "stop",
        "in all",
    ];
    assert_eq!(steps, expected);
    assert_eq!((home.processes(), home.demo_directories()), (vec![], vec![]));
    assert!(!home.path().join("state").exists(), "the user's own state directory is not touched");
}

#[test]
fn a_demo_that_is_interrupted_leaves_nothing_behind_either() {
    let home = Home::new();
    let mut demo = home.spawn(&["demo", "--agent", "echo"]);
    let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().starts_with("> drover inject")), "it got that far");
    send(demo.id(), Signal::INT);
    lines.for_each(drop);
    assert_eq!(exit_code(&mut demo), Some(1));
    assert_eq!((home.processes(), home.demo_directories()), (vec![], vec![]));
}

#[test]
fn commands_start_what_is_missing_say_so_and_the_quick_start_works() {
    let home = Home::new();
    let (code, out, err) = home.run(&["launch", "--nodes", "2", "--prompt", "You are focused.", "--detach"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("starting outbox-follower, slurm-allocator, router (logs: "), "{err}");
    let swarm = out.lines().next().unwrap().trim_start_matches("swarm").trim().to_owned();

    let (code, out, err) = home.run(&["inject", &swarm[..8], "--prompt", "Optimize GEMM tiling."]);
    assert_eq!(code, Some(0), "{err}");
    assert!(!err.contains("starting"), "they run already: {err}");
    for node in 0..2 {
        assert!(out.contains(&format!("node {node} | Optimize GEMM tiling.")), "{out}");
    }
    let status = home.json(&["status", &swarm[..8]]);
    assert_eq!((&status["status"], &status["nodes"][1]["node_id"]), (&Value::from("running"), &Value::from(1)));
    let why = home.json(&["why", &swarm]);
    assert!(why["because"].as_array().is_some_and(|because| !because.is_empty()), "{why}");

    // A daemon that died is started by the next command, and nothing was lost with it.
    let router = home.pid_of("router").unwrap();
    send(router, Signal::KILL);
    until("the router's end", || (!is_alive(router)).then_some(()));
    let (code, out, err) = home.run(&["list"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("starting router") && out.contains(&swarm[..8]), "{out}{err}");
    let events = home.run(&["events", "--since", "0", "--swarm", &swarm, "--json"]).1;
    let ended = events.lines().filter(|line| line.contains("\"turn_complete\"")).count();
    assert_eq!(ended, 4, "{events}");

    let doctor = home.json(&["doctor"]);
    assert_eq!(doctor["ok"], true, "{doctor}");
    assert_eq!(home.run(&["terminate", &swarm]).0, Some(0));
    let after = home.run(&["inject", &swarm, "--prompt", "x"]);
    assert_eq!(after.0, Some(1), "{}", after.2);
    assert!(after.2.contains("hint:"), "{}", after.2);
}

#[test]
fn up_restarts_what_dies_and_its_end_does_not_end_the_swarms_of_others() {
    let home = Home::new();
    let mut up = home.spawn(&["up", "--nodes", "1", "--agent", "echo"]);
    let lines = BufReader::new(up.stdout.take().unwrap()).lines();
    let own = lines.map_while(Result::ok).find(|line| line.starts_with("swarm ")).unwrap();
    let own = own.split(' ').nth(1).unwrap().to_owned();
    let launched = home.json(&["launch", "--nodes", "1", "--detach"])["swarm_id"].as_str().unwrap().to_owned();
    for daemon in ["router", "outbox-follower", "slurm-allocator"] {
        let before = until(daemon, || home.pid_of(daemon));
        send(before, Signal::KILL);
        until("its restart", || home.pid_of(daemon).filter(|pid| *pid != before));
    }
    let (code, out, err) = home.run(&["inject", &launched, "--prompt", "still there?"]);
    assert_eq!(code, Some(0), "{out}{err}");
    let second = home.run(&["up"]);
    assert_eq!(second.0, Some(1));
    assert!(second.2.contains(&format!("pid {}", up.id())), "{}", second.2);

    send(up.id(), Signal::TERM);
    let mut said = String::new();
    std::io::Read::read_to_string(&mut up.stderr.take().unwrap(), &mut said).unwrap();
    assert_eq!(exit_code(&mut up), Some(0), "{said}");
    assert_eq!(said.matches("starting it again").count(), 3, "{said}");
    assert!(said.contains(&format!("terminating swarm {own}")), "{said}");
    for daemon in ["router", "outbox-follower", "slurm-allocator"] {
        assert_eq!(home.pid_of(daemon), None, "{daemon}");
    }
    assert_eq!(home.processes_but_companions().len(), 1, "the other swarm's worker goes on");
    assert_eq!(home.json(&["status", &launched])["status"], "running");
    assert_eq!(home.run(&["terminate", &launched, "--force"]).0, Some(0));
}

#[test]
fn up_takes_over_daemons_that_run_and_names_who_holds_a_configured_port() {
    let home = Home::new();
    assert_eq!(home.run(&["list"]).0, Some(0));
    let router = home.pid_of("router").unwrap();
    let mut up = home.spawn(&["up", "--json"]);
    let first = BufReader::new(up.stdout.take().unwrap()).lines().next().unwrap().unwrap();
    let shown: Value = serde_json::from_str(&first).unwrap();
    assert!(shown["daemons"].as_array().unwrap().iter().any(|daemon| daemon["pid"] == router), "{shown}");
    send(up.id(), Signal::INT);
    assert_eq!(exit_code(&mut up), Some(0));
    assert_eq!(home.processes(), Vec::<u32>::new());

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap();
    std::fs::write(home.path().join("taken.yaml"), format!("router:\n  listen: {addr}\n")).unwrap();
    for args in [&["up", "--config", "taken.yaml"][..], &["list", "--config", "taken.yaml"][..]] {
        let (code, _, err) = home.run(args);
        assert_eq!(code, Some(69), "{err}");
        assert!(err.contains(&addr.to_string()) && err.contains(&format!("pid {}", std::process::id())), "{err}");
    }
}

#[test]
fn a_person_answers_an_approval_and_interrupts_a_turn_from_another_terminal() {
    let home = Home::new();
    let swarm = home.json(&["launch", "--nodes", "1", "--detach"])["swarm_id"].as_str().unwrap().to_owned();

    let mut asks = home.spawn(&["inject", &swarm, "--prompt", "@echo approval=touch /outside"]);
    let waiting = until("the approval", || {
        let list = home.json(&["approvals", &swarm]);
        list["approvals"].as_array().unwrap().first().cloned()
    });
    let id = waiting["approval_id"].as_str().unwrap();
    let (code, out, err) = home.run(&["approve", &id[..id.len() - 1]]);
    assert_eq!((code, out.starts_with("approved: touch /outside")), (Some(0), true), "{out}{err}");
    assert_eq!(exit_code(&mut asks), Some(0));
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut asks.stdout.take().unwrap(), &mut answer).unwrap();
    assert!(answer.contains("waits for your word: touch /outside") && answer.contains("accepted"), "{answer}");

    let mut long = home.spawn(&["inject", &swarm, "--prompt", "@echo delay=60s"]);
    until("the turn", || (home.json(&["status", &swarm])["nodes"][0]["state"] == "busy").then_some(()));
    assert_eq!(home.run(&["interrupt", &swarm]).0, Some(0));
    assert_eq!(exit_code(&mut long), Some(1));
    let mut said = String::new();
    std::io::Read::read_to_string(&mut long.stderr.take().unwrap(), &mut said).unwrap();
    assert!(said.contains("interrupted"), "{said}");
    assert_eq!(home.run(&["terminate", &swarm]).0, Some(0));
}

/// What the terminal of a person gets, through a terminal of our own.
#[test]
fn the_lane_of_a_node_that_thinks_does_not_stand_still() {
    let home = Home::new();
    assert_eq!(home.run(&["launch", "--nodes", "2", "--detach"]).0, Some(0));
    let template = drover(home.path());
    let line = format!("{} inject last --prompt '@echo delay=1500ms'", template.get_program().to_string_lossy());
    let output = std::process::Command::new("script")
        .args(["-qec", &line, "/dev/null"])
        .env_clear()
        .envs(template.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .env("TERM", "xterm")
        .current_dir(home.path())
        .stdin(Stdio::null())
        .output();
    let Ok(output) = output else {
        drover_testkit::skip(&drover_testkit::this_test(), "needs script(1) for a terminal");
        return;
    };
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{shown}");
    for node in ["node 0", "node 1"] {
        let glyphs: std::collections::BTreeSet<char> = shown
            .match_indices(node)
            .filter_map(|(at, _)| shown[at + node.len()..].trim_start_matches(' ').chars().next())
            .filter(|glyph| ('\u{2800}'..='\u{28ff}').contains(glyph))
            .collect();
        assert!(glyphs.len() > 4, "{node} showed only {glyphs:?}: {shown:?}");
    }
}
