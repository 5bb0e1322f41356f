//! Swarms on Slurm, from a login host that is this host, over programs that answer as Slurm's do and run jobs as processes here.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::BTreeSet;
use std::process::Command;

use drover_e2e::cli::{json, json_lines, ok, run};
use drover_e2e::sure::{must, wait_for};
use drover_testkit::cluster::{Cluster, scratch_dir, signal};
use drover_testkit::fake_slurm::{FakeSlurm, Fault, Kind, Phase, Plan};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

/// An instance on the login host of a fake cluster. The fields end in this order: the instance first.
struct Site {
    cluster: Cluster,
    slurm: FakeSlurm,
    _dir: TempDir,
}

impl Site {
    async fn start() -> Self {
        let dir = must(scratch_dir("slurm-"));
        let path = |name: &str| dir.path().join(name);
        let slurm = must(FakeSlurm::start(&path("fake"), &Plan::default()));
        let config = format!(
            "cluster:\n  slurm: {{ssh: none, workspace_root: {shared}, cluster_subdir: codeswarm, local_dir: {local}, poll: 1s, calls_per_minute: 300}}\n\
             worker: {{agent: echo, drain_grace: 1s}}\n",
            shared = path("shared").display(),
            local = path("local").display(),
        );
        for made in ["shared", "local"] {
            std::fs::create_dir(path(made)).unwrap();
        }
        let mut cluster = must(Cluster::prepare(&config));
        cluster.set_env("PATH", must(slurm.path()));
        must(cluster.up().await);
        Self { cluster, slurm, _dir: dir }
    }

    fn status(&self, swarm: &str) -> Value {
        must(json(&self.cluster, &["status", swarm, "--json"]))
    }

    /// Waits until the status of a swarm is as described.
    fn wait_status(&self, swarm: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        wait_for(what, || Some(self.status(swarm)).filter(&is))
    }

    fn launch(&self, more: &[&str]) -> Value {
        let args = [&["launch", "--partition", "batch", "--time", "00:10:00", "--detach", "--json"], more].concat();
        must(json(&self.cluster, &args))
    }

    /// One of Slurm's programs, called by somebody else.
    fn slurm(&self, args: &[&str]) {
        let output = Command::new(self.slurm.bin().join(args[0])).args(&args[1..]).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn generations(&self, swarm: &str) -> Vec<u64> {
        let nodes = self.status(swarm)["nodes"].as_array().unwrap().clone();
        nodes.iter().map(|node| node["generation"].as_u64().unwrap_or(0)).collect()
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swarm_on_slurm_from_its_launch_to_its_end() {
    let site = Site::start().await;
    let cluster = &site.cluster;
    for (args, words) in [
        (&["launch", "--nodes", "1", "--time", "10"][..], "partition is required"),
        (&["launch", "--nodes", "1", "--partition", "batch"], "time is required"),
        (&["launch", "--nodes", "1", "--partition", "nosuch", "--time", "10"], "the cluster has batch, off, short"),
        (&["launch", "--nodes", "5", "--partition", "batch", "--time", "10"], "has 4 nodes, 5 were asked for"),
        (&["launch", "--nodes", "1", "--partition", "short", "--time", "10"], "allows 00:05:00"),
        (&["launch", "--nodes", "1", "--partition", "batch", "--time", "soon"], "is no time limit"),
        (&["launch", "--nodes", "1", "--partition", "$(touch x)", "--time", "10"], "partition cannot be"),
        (
            &["launch", "--nodes", "1", "--partition", "batch", "--time", "10", "--account", "nobody"],
            "Slurm refused the job",
        ),
    ] {
        let refused = must(run(cluster, args));
        assert_eq!(refused.code, 1, "{args:?}: {}{}", refused.stdout, refused.stderr);
        assert!(refused.stderr.contains(words), "{args:?}: {}", refused.stderr);
    }
    assert!(must(site.slurm.cluster()).jobs.is_empty());

    // As the mission shows it.
    let prompt = "You are a focused autonomous agent.";
    let launched = must(ok(
        cluster,
        &[
            "launch",
            "--nodes",
            "4",
            "--partition",
            "batch",
            "--time",
            "00:10:00",
            "--agent",
            "echo",
            "--prompt",
            prompt,
        ],
    ));
    let answers = launched.stdout.lines().filter(|line| line.starts_with("node ") && line.ends_with(prompt)).count();
    assert_eq!(answers, 4, "{}", launched.stdout);
    let status = site.status("last");
    let swarm = text(&status, "swarm_id").to_owned();
    assert_eq!((text(&status, "slurm_state"), text(&status, "status")), ("RUNNING", "running"), "{status}");
    assert_eq!((text(&status, "partition"), text(&status, "time")), ("batch", "00:10:00"));
    let jobs = must(site.slurm.cluster()).jobs;
    assert_eq!(jobs.len(), 1, "one swarm is one job");
    let (id, job) = jobs.first_key_value().unwrap();
    assert_eq!(text(&status, "job_id"), id.to_string());
    assert_eq!(job.asked.name, format!("drover-{swarm}.1"));
    let said = must(ok(cluster, &["inject", &swarm, "--prompt", "Optimize GEMM tiling."]));
    assert_eq!(said.stdout.matches("Optimize GEMM tiling.").count(), 4, "{}", said.stdout);

    // Put back into the queue: the same job, the next generation of every worker.
    site.slurm(&["scontrol", "requeue", &id.to_string()]);
    site.wait_status(&swarm, "the job runs again", |status| {
        text(status, "slurm_state") == "RUNNING"
            && text(status, "status") == "running"
            && site.generations(&swarm).iter().all(|&generation| generation == 2)
    });
    let said = must(ok(cluster, &["inject", &swarm, "--prompt", "once more"]));
    assert_eq!(said.stdout.matches("once more").count(), 4, "{}", said.stdout);
    assert_eq!(must(site.slurm.cluster()).jobs.len(), 1);

    must(ok(cluster, &["terminate", &swarm]));
    // Workers that were told to end may be faster than scancel.
    let over = site.wait_status(&swarm, "the end is confirmed", |status| {
        matches!(text(status, "slurm_state"), "CANCELLED" | "COMPLETED") && text(status, "status") == "terminated"
    });
    assert_eq!(text(&over, "job_id"), id.to_string());
    wait_for("nothing runs any more", || must(site.slurm.processes()).is_empty().then_some(()));
    // Their last words may be on their way for a moment longer than they are.
    wait_for("each worker took its leave", || {
        let events = must(json_lines(cluster, &["events", "--since", "0", "--swarm", &swarm, "--json"]));
        let byes = events.iter().filter(|event| event["event"] == "worker_bye");
        let byes: BTreeSet<u64> = byes.filter_map(|event| event["node_id"].as_u64()).collect();
        (byes.len() == 4).then_some(())
    });
    let squeues = must(site.slurm.calls()).into_iter().filter(|call| call.command == "squeue");
    assert!(squeues.into_iter().all(|call| call.args.contains(&"--me".to_owned())), "one question for all jobs");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_slurm_does_to_a_swarm_is_told_and_nothing_is_submitted_twice() {
    let site = Site::start().await;
    let cluster = &site.cluster;
    // The answer of sbatch is lost; the job is there.
    must(site.slurm.fault("sbatch", Kind::Timeout { done: true }, Some(1)));
    let first = site.launch(&["--nodes", "2"]);
    let swarm = text(&first, "swarm_id").to_owned();
    assert_eq!(must(site.slurm.cluster()).jobs.len(), 1);

    // Nobody can say how it is: nothing changes, and the workers go on.
    must(site.slurm.fault("*", Kind::Unreachable { after_ms: 10 }, None));
    let away = |status: &Value| status["nodes"].to_string().contains("cannot be reached since");
    let told = site.wait_status(&swarm, "the controller is said to be away", away);
    assert_eq!((text(&told, "slurm_state"), text(&told, "status")), ("RUNNING", "running"), "{told}");
    let said = must(ok(cluster, &["inject", &swarm, "--prompt", "still there"]));
    assert_eq!(said.stdout.matches("still there").count(), 2, "{}", said.stdout);

    // Meanwhile the allocator is killed.
    let before = cluster.daemon("slurm-allocator").unwrap();
    signal(before.pid, Signal::KILL).unwrap();
    wait_for("another allocator runs", || cluster.daemon("slurm-allocator").filter(|now| *now != before));
    must(site.slurm.set(|settings| settings.faults.clear()));
    site.wait_status(&swarm, "the job is seen again", |status| {
        text(status, "slurm_state") == "RUNNING" && !away(status)
    });

    // A second one waits, and says for what.
    let args = ["launch", "--nodes", "4", "--partition", "batch", "--time", "10", "--detach"];
    let mut waiting =
        cluster.command(&args).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
    let pending = wait_for("the second job waits", || {
        let listed = must(json(cluster, &["list", "--json"]));
        let other = listed.as_array()?.iter().find(|other| text(other, "swarm_id") != swarm)?.clone();
        let other = site.status(text(&other, "swarm_id"));
        (text(&other, "slurm_state") == "PENDING" && text(&other, "reason").contains("Resources")).then_some(other)
    });
    assert!(text(&pending, "reason").contains("waits since"), "{pending}");

    // Cancelled by somebody else.
    site.slurm(&["scancel", text(&first, "job_id")]);
    let over = site.wait_status(&swarm, "the end is seen", |status| text(status, "slurm_state") == "CANCELLED");
    assert!(text(&over, "reason").contains("cancelled from outside"), "{over}");
    // Then there is room for the other one.
    let second = text(&pending, "swarm_id").to_owned();
    site.wait_status(&second, "the second job runs", |status| text(status, "status") == "running");
    assert_eq!(waiting.wait().unwrap().code(), Some(0));
    let said = must(ok(cluster, &["inject", &second, "--prompt", "hello"]));
    assert_eq!(said.stdout.matches("hello").count(), 4, "{}", said.stdout);
    must(ok(cluster, &["terminate", &second]));
    assert_eq!(must(site.slurm.cluster()).jobs.len(), 2, "two swarms, two jobs");
    wait_for("nothing runs any more", || must(site.slurm.processes()).is_empty().then_some(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_stops_and_comes_back_in_whatever_order_the_list_is_right() {
    let site = Site::start().await;
    let cluster = &site.cluster;
    // What is true of each swarm, however often those who say it were killed.
    let mut truth: Vec<(String, &str)> = Vec::new();
    let daemons = ["router", "slurm-allocator", "outbox-follower"];
    let orders = [[0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0], [0, 2, 1]];
    let changes = ["nothing", "requeue", "scancel", "terminate", "scancel"];
    for (order, change) in orders.into_iter().zip(changes) {
        if truth.iter().all(|(_, state)| *state != "RUNNING") {
            let launched = site.launch(&["--nodes", "2"]);
            truth.push((text(&launched, "swarm_id").to_owned(), "RUNNING"));
        }
        let (swarm, state) = truth.last_mut().unwrap();
        let job = text(&site.status(swarm), "job_id").to_owned();
        if change == "terminate" {
            // Asked for, and those who carry it out are gone before it is confirmed.
            must(ok(cluster, &["terminate", swarm]));
        }
        for at in order {
            let daemon = wait_for("the daemon runs", || cluster.daemon(daemons[at]));
            // It may have ended by itself because another one is gone.
            let _ = signal(daemon.pid, Signal::KILL);
            if at == order[1] && matches!(change, "requeue" | "scancel") {
                let call: &[&str] =
                    if change == "requeue" { &["scontrol", "requeue", &job] } else { &["scancel", &job] };
                site.slurm(call);
            }
        }
        match change {
            "scancel" => *state = "CANCELLED",
            "terminate" => *state = "ended",
            _ => {}
        }
        let told = wait_for("the list is right", || {
            let listed = run(cluster, &["list", "--json"]).ok().filter(|ran| ran.code == 0)?;
            let listed: Vec<Value> = serde_json::from_str(&listed.stdout).ok()?;
            let right = truth.iter().all(|(swarm, state)| {
                listed.iter().filter(|told| text(told, "swarm_id") == swarm).count() == 1
                    && json(cluster, &["status", swarm, "--json"]).is_ok_and(|told| match *state {
                        "RUNNING" => (text(&told, "slurm_state"), text(&told, "status")) == ("RUNNING", "running"),
                        "ended" => text(&told, "status") == "terminated",
                        state => text(&told, "slurm_state") == state && text(&told, "status") != "running",
                    })
            });
            right.then_some(listed)
        });
        assert_eq!(told.len(), truth.len(), "nothing is forgotten and nothing is made up: {told:?}");
        assert_eq!(must(site.slurm.cluster()).jobs.len(), truth.len(), "one job for each swarm");
        let (swarm, state) = truth.last().unwrap();
        if *state == "RUNNING" {
            let said = must(ok(cluster, &["inject", swarm, "--prompt", change]));
            assert_eq!(said.stdout.matches(change).count(), 2, "{}", said.stdout);
        }
    }
    wait_for("nothing runs any more", || must(site.slurm.processes()).is_empty().then_some(()));
}

/// Nothing that is printed is long, or does something to a terminal.
fn is_plain(cluster: &Cluster, args: &[&str]) {
    let ran = must(run(cluster, args));
    for said in [&ran.stdout, &ran.stderr] {
        assert!(said.len() < 32 << 10, "{args:?}: {} bytes", said.len());
        let odd =
            |c: char| c != '\n' && (c.is_control() || matches!(c, '\u{200e}'..='\u{200f}' | '\u{202a}'..='\u{202e}'));
        assert!(!said.contains(odd), "{args:?}: {said:?}");
        assert!(!said.contains("panicked"), "{args:?}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_slurm_answers_swarms_go_on_and_what_is_shown_is_plain() {
    let site = Site::start().await;
    let cluster = &site.cluster;
    let launched = site.launch(&["--nodes", "1"]);
    let (swarm, job) = (text(&launched, "swarm_id").to_owned(), text(&launched, "job_id").to_owned());
    site.wait_status(&swarm, "it runs", |status| text(status, "status") == "running");

    let says = |command: &str, stdout: String, stderr: String, status: u8| {
        let kind = Kind::Says { stdout, stderr, status };
        let fault = Fault { command: command.to_owned(), kind, after: 0, times: None };
        must(site.slurm.set(|settings| settings.faults = vec![fault.clone()]));
    };
    // A line of a mebibyte may be half written when it is read.
    let looks = || {
        let calls = wait_for("the calls can be read", || site.slurm.calls().ok());
        calls.iter().filter(|call| call.command == "squeue").count()
    };
    for value in [
        "-rf a'b\"c $(touch pwned) `touch pwned` \u{1b}[2J\u{1b}]0;x\u{7} \u{9b}31m \r\u{8} \u{202e}gnp n[1-4000000000][".to_owned(),
        format!("a\n{job}|COMPLETED|None|n1|N/A|drover-{swarm}.1|drover:{swarm}:1"),
        "a\0b".to_owned(),
        format!("\u{1b}[31m{}", "x".repeat(1 << 20)),
    ] {
        // Our job, one that somebody gave our mark, and one of somebody else.
        let rows = [
            format!("{job}|{value}|{value}|{value}|{value}|drover-{swarm}.1|drover:{swarm}:1"),
            format!("77|{value}|{value}|{value}|N/A|drover-other.1|drover:other:1"),
            format!("78|RUNNING|None|n1|N/A|{value}|{value}"),
        ];
        let answer = format!("JOBID|STATE|REASON|NODELIST|START_TIME|NAME|COMMENT\n{}\n", rows.join("\n"));
        says("squeue", answer, value.clone(), 0);
        // The second one began after the answer was changed, and what the first one said has been taken in.
        let (before, shown) = (looks(), value.chars().take(20).collect::<String>());
        wait_for("the queue is looked at", || (looks() >= before + 3).then_some(()));
        for args in [&["status", &swarm][..], &["list"], &["list", "--orphans"], &["why", &swarm], &["status", "other"]] {
            is_plain(cluster, args);
        }
        let status = site.status(&swarm);
        assert_eq!((text(&status, "status"), text(&status, "job_id")), ("running", job.as_str()), "{shown:?}: {status}");

        let place = ["launch", "--nodes", "1", "--time", "10", "--partition"];
        says("sinfo", format!("{value}|up|1:00|4|idle\n{value}|{value}|{value}|{value}|{value}\n"), value.clone(), 0);
        is_plain(cluster, &[&place[..], &["nosuch"]].concat());
        says("sbatch", String::new(), format!("sbatch: error: {value}"), 1);
        // Of a mebibyte the end is kept, and that is not a refusal.
        if !value.contains('\n') && value.len() < 1000 {
            is_plain(cluster, &[&place[..], &["batch"]].concat());
        }
        must(site.slurm.set(|settings| settings.faults.clear()));
    }

    // What was said of it is over. A job with our mark that is nobody's is shown as that, and nobody touches it.
    site.slurm(&["sbatch", "--hold", "--job-name=drover-stranger.1", "--wrap", "true"]);
    let orphan = wait_for("the orphan is found", || {
        let told = must(run(cluster, &["status", "stranger", "--json"]));
        serde_json::from_str::<Value>(&told.stdout).ok().filter(|told| text(told, "status") == "orphan")
    });
    assert_eq!(text(&orphan, "slurm_state"), "PENDING", "{orphan}");
    let listed = must(json(cluster, &["list", "--orphans", "--json"]));
    assert_eq!((listed.as_array().unwrap().len(), text(&listed[0], "swarm_id")), (1, "stranger"), "{listed}");
    let shown = must(ok(cluster, &["status", "stranger"]));
    assert!(shown.stdout.contains("orphan: a job of this swarm"), "{}", shown.stdout);

    site.wait_status(&swarm, "it is seen to run", |status| text(status, "slurm_state") == "RUNNING");
    let said = must(ok(cluster, &["inject", &swarm, "--prompt", "still there"]));
    assert_eq!(said.stdout.matches("still there").count(), 1, "{}", said.stdout);
    must(ok(cluster, &["terminate", &swarm]));
    site.wait_status(&swarm, "the end is confirmed", |status| text(status, "status") == "terminated");
    let jobs = must(site.slurm.cluster()).jobs;
    assert_eq!(jobs.len(), 2, "one was launched, one was submitted by somebody else");
    let stranger = jobs.values().find(|job| job.asked.name == "drover-stranger.1").unwrap();
    assert!(matches!(stranger.phase, Phase::Waiting { .. }), "it is left alone: {:?}", stranger.phase);
}
