//! A task of a Slurm job from outside: the test plays `srun`.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use drover_mailbox::{Mailbox, Owner, Record, StreamWriter, encode_line};
use drover_types::{Generation, NodeIndex, OutboxId, SwarmId};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::value::to_raw_value;
use serde_json::{Value, json};

fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_mins(1);
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn signal(pid: u32, signal: Signal) {
    let _ = kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), signal);
}

fn lives(pid: u32) -> bool {
    drover_service::process::of(pid).is_some()
}

/// A compute host with one task. The task ends with it.
struct Host {
    dir: tempfile::TempDir,
    task: Child,
}

impl Host {
    fn start(worker: &Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("drover.json"), json!({ "worker": worker, "swarm": {"enabled": false} }).to_string()).unwrap();
        let log = fs::File::create(at("job.log")).unwrap();
        let task = Command::new(env!("CARGO_BIN_EXE_drover-worker"))
            .args(["--slurm", "--listen", "127.0.0.1:0"])
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", dir.path())
            .env("DROVER_CONFIG", at("drover.json"))
            .env("DROVER_STATE_DIR", at("local"))
            .env("DROVER_MAILBOX", at("mailbox"))
            .env("DROVER_SLURM_DIR", at("swarm"))
            .env("DROVER_SWARM_ID", "s")
            .env("DROVER_AGENT", "echo")
            .env("SLURM_PROCID", "1")
            .env("SLURM_JOB_ID", "7")
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Self { dir, task }
    }

    fn mailbox(&self) -> Mailbox {
        Mailbox::new(self.dir.path().join("mailbox"))
    }

    fn outbox(generation: u32) -> OutboxId {
        let swarm: SwarmId = "s".parse().unwrap();
        OutboxId { swarm, node: NodeIndex(1), generation: Generation(generation) }
    }

    fn generations(&self) -> Vec<u32> {
        let found = self.mailbox().generations(&Self::outbox(0).swarm, NodeIndex(1)).unwrap_or_default();
        found.into_iter().map(|generation| generation.0).collect()
    }

    /// The worker that has claimed a generation.
    fn worker(&self, generation: u32) -> u32 {
        until("a worker claims its node", || self.mailbox().owner(&Self::outbox(generation)).ok().flatten()).pid
    }

    /// Gives the node a prompt that takes longer than the test.
    fn busy(&self) {
        let data = to_raw_value(&json!({"content": "@echo delay=1m", "steer": false})).unwrap();
        let record = Record {
            seq: 1,
            ts: 1,
            job_id: "7".into(),
            node_id: 1,
            generation: 0,
            injection_id: Some("long".into()),
            trace: None,
            kind: "inject".into(),
            data: &data,
        };
        let mut line = Vec::new();
        encode_line(&record, &mut line);
        let mut inbox =
            StreamWriter::open(self.mailbox().inbox_dir(&Self::outbox(0).swarm, NodeIndex(1)), 4096).unwrap();
        inbox.append(&line).unwrap();
        inbox.sync().unwrap();
        let outbox = self.mailbox().outbox_dir(&Self::outbox(1));
        until("the turn runs", || {
            let files = fs::read_dir(&outbox).ok()?.filter_map(Result::ok);
            let mut texts = files.filter_map(|file| fs::read_to_string(file.path()).ok());
            texts.any(|text| text.contains("turn_started")).then_some(())
        });
    }

    fn word_file(&self) -> PathBuf {
        self.dir.path().join("swarm/nodes/01/worker.json")
    }

    fn word(&self, state: &str) -> Value {
        until(&format!("it says that it is {state}"), || {
            let word: Value = serde_json::from_str(&fs::read_to_string(self.word_file()).ok()?).ok()?;
            (word["state"] == state).then_some(word)
        })
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("job.log")).unwrap_or_default()
    }

    fn end(&mut self) -> Option<i32> {
        let status = until("the task ends", || self.task.try_wait().unwrap());
        status.code()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The worker ends with its parent.
        let _ = self.task.kill();
        let _ = self.task.wait();
    }
}

const WORKER: &str = r#"{"restart_delay": "20ms", "max_restarts": 2, "drain_grace": "1s", "healthy_after": "1h"}"#;

fn settings() -> Value {
    serde_json::from_str(WORKER).unwrap()
}

#[test]
fn a_worker_that_is_killed_is_followed_by_the_next_generation_until_there_were_enough() {
    let mut host = Host::start(&settings());
    for generation in 1..=3 {
        signal(host.worker(generation), Signal::KILL);
    }
    let word = host.word("failed");
    assert_eq!((&word["generation"], &word["restarts"]), (&json!(3), &json!(2)), "{word}\n{}", host.log());
    assert!(word["reason"].as_str().unwrap().contains("given up after 2 restarts"), "{word}");
    assert_eq!((host.end(), host.generations()), (Some(1), vec![1, 2, 3]), "{}", host.log());
}

#[test]
fn the_end_of_either_is_the_end_of_both() {
    // Slurm's signal reaches the parent, and here only the parent.
    let mut host = Host::start(&settings());
    let worker = host.worker(1);
    signal(host.task.id(), Signal::TERM);
    assert_eq!(host.end(), Some(0), "{}", host.log());
    assert!(!lives(worker) && host.log().contains("whoever started this is gone"), "{}", host.log());
    assert_eq!(host.generations(), [1]);

    // Both at once are one signal to each: the worker drains.
    let mut host = Host::start(&settings());
    let worker = host.worker(1);
    signal(worker, Signal::TERM);
    signal(host.task.id(), Signal::TERM);
    assert_eq!(host.end(), Some(0), "{}", host.log());
    assert!(!host.log().contains("second signal"), "{}", host.log());

    // Also when the end of the parent is seen before the signal: only one that comes twice is in a hurry.
    for (signals, code) in [(1, 0), (2, 1)] {
        let mut host = Host::start(&settings());
        let worker = host.worker(1);
        host.busy();
        signal(host.task.id(), Signal::TERM);
        until("the parent lets go", || host.log().contains("whoever started this is gone").then_some(()));
        signal(worker, Signal::TERM);
        if signals == 2 {
            // Signals of one kind that wait are one.
            while lives(worker) {
                signal(worker, Signal::TERM);
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        assert_eq!(host.end(), Some(code), "{}", host.log());
        assert_eq!(host.log().contains("second signal"), code != 0, "{}", host.log());
    }

    let host = Host::start(&settings());
    host.worker(1);
    signal(host.task.id(), Signal::KILL);
    until("the worker ends without its parent", || host.log().contains("stopped").then_some(()));
    assert_eq!(host.generations(), [1]);
}

#[test]
fn a_node_that_another_job_has_taken_over_is_left_alone() {
    let mut host = Host::start(&settings());
    let worker = host.worker(1);
    // A worker that has claimed still looks whether it was the last: nobody else comes before it has.
    until("it serves its node", || host.log().contains("serving").then_some(()));
    // The job was put back and runs elsewhere.
    let elsewhere = Owner { host: "another".to_owned(), pid: 1, start_time: 1 };
    host.mailbox().claim(&Host::outbox(2), &elsewhere).unwrap();
    signal(worker, Signal::KILL);
    host.end();
    assert_eq!(host.generations(), [1, 2], "{}", host.log());
}
