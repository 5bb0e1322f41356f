//! Sessions on nodes that no network leads to: each on a host of its own, which is a network namespace, sharing nothing with the router but
//! the directory of the mailbox.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helper functions")]

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use drover_e2e::cli::{json, json_lines, ok, run};
use drover_e2e::sure::{PATIENCE, must, wait_for};
use drover_service::{StateDir, address_book};
use drover_testkit::cluster::{Cluster, end, signal};
use drover_testkit::netns::{self, Host, Lab};
use drover_testkit::{skip, this_test};
use rustix::process::Signal;
use serde_json::Value;

const CONFIG: &str = "swarm:\n  discovery: {gossip_interval: 200ms, node_timeout: 2s, dead_node_timeout: 10s}\n\
                      cluster: {backend: static, hosts: [h0, h1], workspace_root: shared}\n\
                      worker: {agent: echo, drain_grace: 1s}\n";

/// An instance and its two hosts. The fields end in this order: what runs before where it runs.
struct Far {
    workers: Vec<Child>,
    cluster: Cluster,
    lab: Lab,
}

impl Drop for Far {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            end(worker, Duration::from_secs(10));
        }
    }
}

impl Far {
    async fn start() -> Option<Self> {
        if let Err(why) = netns::usable(&[]) {
            skip(&this_test(), &why);
            return None;
        }
        let (lab, cluster) = (must(Lab::new(&[2])), must(Cluster::start(CONFIG).await));
        let mut far = Self { workers: Vec::new(), cluster, lab };
        for index in 0..2 {
            let worker = far.worker(index, &far.lab.hosts()[index]);
            far.workers.push(worker);
        }
        Some(far)
    }

    /// What all share.
    fn mailbox(&self) -> PathBuf {
        self.cluster.state().path().join("shared/mailbox")
    }

    /// What a host has for itself.
    fn state(&self, index: usize) -> PathBuf {
        self.cluster.dir().join(format!("host-{index}"))
    }

    fn worker(&self, index: usize, host: &Host) -> Child {
        let here = self.cluster.command(&["daemon", "worker", "--static", "--host", &format!("h{index}")]);
        let mut there = host.command(here.get_program());
        there.args(here.get_args()).arg("--mailbox").arg(self.mailbox()).current_dir(self.cluster.dir());
        for (name, value) in here.get_envs() {
            match value {
                Some(value) => there.env(name, value),
                None => there.env_remove(name),
            };
        }
        let log = fs::File::create(self.cluster.dir().join(format!("host-{index}.log"))).unwrap();
        // There is no way to anywhere else by which a host could find out its own address.
        there.env("DROVER_SWARM__BIND_ADDR", "0.0.0.0").env("DROVER_SWARM__ADVERTISE_ADDR", host.addr.to_string());
        there.env("DROVER_STATE_DIR", self.state(index));
        there.stdin(Stdio::null()).stderr(log).spawn().unwrap()
    }

    /// The daemon of sessions of a host.
    fn sessions(&self, index: usize) -> u32 {
        let state = StateDir::open(&self.state(index)).unwrap();
        let (_, daemon) = drover_sessions::local(&state).remove(0);
        address_book::read(&state, &daemon).unwrap().pid
    }

    /// Ends a daemon of the instance as a crash does; `up` starts it again.
    fn crash(&self, daemon: &str) {
        let before = self.cluster.daemon(daemon).unwrap();
        signal(before.pid, Signal::KILL).unwrap();
        wait_for("the daemon comes back", || self.cluster.daemon(daemon).filter(|now| *now != before));
    }
}

fn said(listed: &Value) -> Vec<&str> {
    listed["said"].as_array().unwrap().iter().map(|said| said["content"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_behind_a_mailbox_are_talked_to_moved_and_drained_and_no_word_is_lost() {
    let Some(far) = Far::start().await else { return };
    let cluster = &far.cluster;
    let launched = must(json(cluster, &["launch", "--nodes", "2", "--detach", "--json"]));
    let swarm = launched["swarm_id"].as_str().unwrap().to_owned();
    let members = wait_for("nodes that take sessions", || {
        let members = must(json(cluster, &["members", &swarm, "--json"]));
        let ready = |member: &Value| member["state"] == "alive" && member["capabilities"]["handoff"].is_string();
        let members = members.as_array().unwrap().clone();
        (members.len() == 2 && members.iter().all(ready)).then_some(members)
    });
    for host in far.lab.hosts() {
        assert!(members.iter().any(|member| member["addr"] == host.addr.to_string()), "{members:?}");
    }

    // Opened, listed, moved, read, explained.
    let heard = must(ok(cluster, &["send", "notes", "--agent", "echo", "--prompt", "Remember heliotrope."]));
    assert_eq!(heard.stdout, "Remember heliotrope.\n");
    let log = fs::read_to_string(cluster.state().path().join("logs/router.log")).unwrap();
    assert!(log.contains("goes through the mailbox"), "no network leads there from here:\n{log}");
    let listed = must(json(cluster, &["sessions", "--json"]));
    let first = listed[0]["owner"].as_str().unwrap().to_owned();
    assert_eq!((listed[0]["state"].as_str(), listed[0]["agent"].as_str()), (Some("active"), Some("echo")), "{listed}");
    let moved = must(json(cluster, &["handoff", "notes", "--json"]));
    let second = moved["to"].as_str().unwrap().to_owned();
    assert!(moved["from"] == first.as_str() && second != first, "{moved}");
    let why = must(json(cluster, &["why", "notes", "--json"]));
    assert_eq!(why["owners"].as_array().unwrap().len(), 2, "{why}");
    let none = must(run(cluster, &["handoff", "nosuch"]));
    assert!(none.code == 1 && none.stderr.contains("nosuch") && none.stderr.contains("hint:"), "{}", none.stderr);

    // In the middle of an answer the way breaks, and then the router: the one who listens notices nothing.
    let text = "one two three four five six seven eight nine ten eleven twelve";
    let prompt = format!("@echo over=6s\n{text}");
    let mut talking = cluster.command(&["send", "notes", "--json", "--prompt", &prompt]);
    let mut talking = talking.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
    let (mut heard, mut answer, mut crashes) = (String::new(), Value::Null, ["outbox-follower", "router"].into_iter());
    for line in BufReader::new(talking.stdout.take().unwrap()).lines() {
        let line: Value = serde_json::from_str(&line.unwrap()).unwrap();
        match line["event"].as_str() {
            Some("text") => {
                heard.push_str(line["content"].as_str().unwrap());
                if let Some(daemon) = crashes.next() {
                    far.crash(daemon);
                }
            }
            Some("again") => panic!("the turn is run again: {line}"),
            Some("answer") => answer = line,
            _ => {}
        }
    }
    assert!(talking.wait().unwrap().success(), "{answer}\n{}", cluster.logs());
    assert_eq!((heard.as_str(), answer["content"].as_str()), (text, Some(text)));
    assert!(crashes.next().is_none(), "it was said in pieces");

    // Emptied, by one who is on neither of the nodes.
    must(cluster.wait_ready(PATIENCE).await);
    let drained = must(json_lines(cluster, &["drain", &second, "--json"]));
    assert_eq!(drained.last().unwrap()["left"], 0, "{drained:?}");
    let listed = must(json(cluster, &["sessions", "notes", "--json"]));
    assert_eq!(listed["owner"], first.as_str(), "{listed}");
    assert_eq!(said(&listed)[2..], [prompt.as_str(), text], "asked and answered once");

    // No node looks for calls: that is said, with every way that was tried.
    for index in 0..2 {
        signal(far.sessions(index), Signal::STOP).unwrap();
    }
    let silent = must(run(cluster, &["handoff", "notes"]));
    assert_eq!(silent.code, 1, "{}", silent.stdout);
    for words in ["has not looked for calls in its mailbox", "outbox-follower", "hint:"] {
        assert!(silent.stderr.contains(words), "{words}: {}", silent.stderr);
    }
    for index in 0..2 {
        signal(far.sessions(index), Signal::CONT).unwrap();
    }
    let heard = must(ok(cluster, &["send", "notes", "--prompt", "@echo recall"]));
    assert!(heard.stdout.contains("heliotrope"), "{}", heard.stdout);
    must(ok(cluster, &["terminate", &swarm]));
}
