//! The cluster of containers: up, a swarm on it, hosts that die or are cut off, down. The daemon of the containers is one of our own, in
//! a network namespace of its own, so that nothing of this machine's network changes.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use drover_testkit::cluster::{program, scratch_dir};
use drover_testkit::{skip, this_test};
use serde_json::Value;

/// Slurm misses a host after ten seconds, and starts its jobs anew some seconds later; a busy machine takes longer.
const LIMIT: Duration = Duration::from_mins(2);

/// A daemon of containers, and what it keeps.
struct Engine {
    dir: tempfile::TempDir,
    child: Child,
}

impl Engine {
    /// `Err` says why containers cannot be had here.
    fn start() -> anyhow::Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "containers need root");
        install(&[("dockerd", "docker.io"), ("docker-compose", "docker-compose"), ("debootstrap", "debootstrap")])?;
        let dir = scratch_dir("docker-")?;
        let log = fs::File::create(dir.path().join("log"))?;
        let own = |name: &str| format!("{}", dir.path().join(name).display());
        // Its bridges, addresses and rules stay in the namespaces that `unshare` makes.
        let child = Command::new("unshare")
            .args(["--net", "--mount", "--kill-child", "sh", "-c"])
            .arg("ip link set lo up && exec dockerd --data-root \"$1\" --exec-root \"$2\" --host \"unix://$3\" --pidfile \"$4\" --bridge none")
            .args(["sh", &own("data"), &own("exec"), &own("socket"), &own("pid")])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        let mut engine = Self { dir, child };
        let began = Instant::now();
        while !engine.docker(&["version"]).status().is_ok_and(|status| status.success()) {
            if let Some(status) = engine.child.try_wait()? {
                bail!("dockerd ended with {status}:\n{}", fs::read_to_string(engine.dir.path().join("log"))?);
            }
            ensure!(began.elapsed() < LIMIT, "dockerd does not answer");
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(engine)
    }

    fn host(&self) -> String {
        format!("unix://{}", self.dir.path().join("socket").display())
    }

    fn docker(&self, args: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command
            .env("DOCKER_HOST", self.host())
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
    }

    /// What is left of the cluster: containers, networks of its own, volumes.
    fn left(&self) -> String {
        let label = "label=com.docker.compose.project=drover-sim";
        let list = [&["ps", "--all"][..], &["network", "ls"], &["volume", "ls"]];
        let lists = list.iter().map(|what| {
            let mut command = self.docker(what);
            command.args(["--quiet", "--filter", label]).stdout(Stdio::piped());
            String::from_utf8(command.output().unwrap().stdout).unwrap()
        });
        lists.collect()
    }

    /// A script of the simulation, and what it said: to programs, and to people.
    fn script(&self, name: &str, args: &[&str]) -> anyhow::Result<[String; 2]> {
        let path =
            Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("no parent")?.join("deploy/compose").join(name);
        let output = Command::new(path)
            .args(args)
            .env("DOCKER_HOST", self.host())
            .env("SIM_BASE", "drover-sim-base")
            .env_remove("SIM_PROJECT")
            .stdin(Stdio::null())
            .output()?;
        let [said, told] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        ensure!(output.status.success(), "{name} {args:?}: {}\n{said}{told}", output.status);
        Ok([said, told])
    }

    fn sim(&self, args: &[&str]) -> anyhow::Result<String> {
        self.script("sim", args).map(|[said, _]| said)
    }

    /// drover on the login host: all that it said.
    fn drover(&self, args: &[&str]) -> anyhow::Result<String> {
        Ok(self.script("sim", &[&["on", "login", "timeout", "100", "drover"], args].concat())?.concat())
    }

    fn json(&self, args: &[&str]) -> anyhow::Result<Value> {
        let said = self.sim(&[&["on", "login", "timeout", "100", "drover"], args, &["--json"]].concat())?;
        Ok(serde_json::from_str(&said)?)
    }

    /// Asks until the answer is good.
    #[track_caller]
    fn eventually(&self, args: &[&str], what: &str, good: impl Fn(&Value) -> bool) -> Value {
        let began = Instant::now();
        loop {
            let answer = self.json(args);
            match &answer {
                Ok(value) if good(value) => return answer.unwrap(),
                _ => assert!(began.elapsed() < LIMIT, "{what}: still {answer:?}"),
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Err(error) = self.sim(&["down"]) {
            let _ = writeln!(std::io::stderr(), "{error:#}");
        }
        // Its own way to end takes its children along.
        let pid = fs::read_to_string(self.dir.path().join("pid")).ok().and_then(|pid| pid.trim().parse().ok());
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        } else {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}

/// What is missing comes from the distribution's packages.
fn install(wanted: &[(&str, &str)]) -> anyhow::Result<()> {
    let found = |name: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|dir| dir.join(name).is_file())
    };
    let missing: Vec<&str> = wanted.iter().filter(|(name, _)| !found(name)).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    ensure!(std::env::var_os("CI").is_some(), "{} not installed", missing.join(" and "));
    // Nothing that is installed may start a service of its own.
    let script = "set -e; test -e /usr/sbin/policy-rc.d || { printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d; \
                  chmod 755 /usr/sbin/policy-rc.d; trap 'rm -f /usr/sbin/policy-rc.d' EXIT; }; \
                  apt-get -o DPkg::Lock::Timeout=300 update -qq; \
                  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends \"$@\"";
    let output = Command::new("sh").args(["-c", script, "sh"]).args(&missing).stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "{missing:?} cannot be installed: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Programs without what only a debugger reads: an image of those is made in seconds.
fn stripped(engine: &Engine) -> PathBuf {
    let bin = engine.dir.path().join("bin");
    fs::create_dir(&bin).unwrap();
    for name in ["drover", "mock-llm"] {
        let status = Command::new("strip").arg("-o").arg(bin.join(name)).arg(program(name).unwrap()).status().unwrap();
        assert!(status.success(), "strip {name}");
    }
    bin
}

fn nodes_in(state: &'static str, count: usize) -> impl Fn(&Value) -> bool {
    move |status| {
        let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
        nodes.len() == count && nodes.iter().all(|node| node["state"] == state)
    }
}

/// Every answer to a prompt that all nodes were sent, by node.
fn answers(engine: &Engine, prompt: &str, nodes: usize) {
    let said = engine.drover(&["inject", "last", "--prompt", prompt]).unwrap();
    for node in 0..nodes {
        let times = said.lines().filter(|line| *line == format!("node {node} | {prompt}")).count();
        assert_eq!(times, 1, "node {node} answered {times} times:\n{said}");
    }
}

/// The session knows what was said first, and is answered by the node that has it.
#[track_caller]
fn recalls(engine: &Engine, owner: &Value) {
    let said = engine.drover(&["send", "notes", "--prompt", "@echo recall"]).unwrap();
    assert!(said.contains("heliotrope"), "{said}");
    let sessions = engine.json(&["sessions"]).unwrap();
    let is_there = |session: &Value| session["session_id"] == "notes" && session["owner"] == *owner;
    assert!(sessions.as_array().is_some_and(|all| all.iter().any(is_there)), "{sessions}");
}

#[test]
fn a_swarm_on_containers_survives_the_loss_of_a_host_and_of_a_network_and_nothing_is_left() {
    let engine = match Engine::start() {
        Ok(engine) => engine,
        Err(why) => return skip(&this_test(), &format!("{why:#}")),
    };
    engine.script("base", &["drover-sim-base"]).unwrap();
    let bin = stripped(&engine);
    engine.sim(&["up", "--bin", bin.to_str().unwrap()]).unwrap();
    let begun = Instant::now();
    while engine.drover(&["list", "--json"]).is_err() {
        assert!(begun.elapsed() < LIMIT, "the daemons do not answer: {}", engine.sim(&["logs"]).unwrap());
        std::thread::sleep(Duration::from_millis(500));
    }

    // The login host has a key for whoever comes from the laptop.
    assert_eq!(engine.sim(&["on", "laptop", "ssh", "hpcfund", "hostname"]).unwrap().trim(), "login");

    // The commands of the founding document, from a machine that has nothing but SSH.
    let from_laptop = |args: &[&str]| {
        let drover = ["on", "laptop", "timeout", "100", "drover"];
        engine.script("sim", &[&drover, args, &["--config", "configs/hpcfund.json"]].concat()).unwrap().concat()
    };
    let answered = |said: &str, prompt: &str| {
        said.lines().filter(|line| line.starts_with("node ") && line.ends_with(&format!("| {prompt}"))).count()
    };
    let limits = ["--partition", "mi2508x", "--time", "00:10:00"];
    let said =
        from_laptop(&[&["launch", "--nodes", "4", "--agent", "echo", "--prompt", "Be brief."], &limits[..]].concat());
    assert_eq!(answered(&said, "Be brief."), 4, "{said}");
    let said = from_laptop(&["inject", "last", "--prompt", "Optimize GEMM tiling."]);
    assert_eq!(answered(&said, "Optimize GEMM tiling."), 4, "{said}");
    assert!(from_laptop(&["status", "last"]).contains("on slurm (RUNNING)"));
    from_laptop(&["terminate", "last"]);

    let said = engine.drover(&["launch", "--nodes", "3", "--agent", "echo", "--prompt", "You are focused."]).unwrap();
    assert_eq!(answered(&said, "You are focused."), 3, "{said}");
    answers(&engine, "first", 3);
    let status = engine.eventually(&["status", "last"], "all idle", nodes_in("idle", 3));
    let hosts: Vec<String> =
        status["nodes"].as_array().unwrap().iter().map(|node| node["host"].as_str().unwrap().to_owned()).collect();
    assert!(hosts.iter().all(|host| host.starts_with("compute")), "{hosts:?}");

    // A conversation begins on one host and goes on on another, with all that was said in it.
    engine.drover(&["send", "notes", "--agent", "echo", "--prompt", "Remember the word heliotrope."]).unwrap();
    let moved = engine.eventually(&["handoff", "notes"], "a session that moves", |moved| moved["from"] != moved["to"]);
    let host_of = |node: &Value| {
        let (_, index) = node.as_str().unwrap().rsplit_once('/').unwrap();
        hosts[index.parse::<usize>().unwrap()].clone()
    };
    assert_ne!(host_of(&moved["from"]), host_of(&moved["to"]), "{moved}");
    recalls(&engine, &moved["to"]);

    // A power cut: Slurm starts the job anew on three hosts of the four, and the swarm goes on.
    engine.sim(&["kill", &hosts[1]]).unwrap();
    engine.eventually(&["status", "last"], "three hosts without the dead one", |status| {
        let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
        nodes_in("idle", 3)(status) && nodes.iter().all(|node| node["host"] != hosts[1].as_str())
    });
    answers(&engine, "second", 3);

    // A host without network goes on writing to the shared directory, and is heard.
    let status = engine.json(&["status", "last"]).unwrap();
    let cut = status["nodes"][0]["host"].as_str().unwrap().to_owned();
    engine.sim(&["cut", &cut]).unwrap();
    answers(&engine, "third", 3);
    engine.sim(&["mend", &cut]).unwrap();

    // The mock of a provider answers the dispatcher, without a key of anybody.
    let said = engine.sim(&["on", "login", "sh", "-c", "printf 'one\\ntwo\\n' | drover dispatch -"]).unwrap();
    assert!(said.contains("mock answer to: one") && said.contains("mock answer to: two"), "{said}");

    engine.drover(&["terminate", "last"]).unwrap();
    engine.sim(&["down"]).unwrap();
    assert_eq!(engine.left(), "");
}
