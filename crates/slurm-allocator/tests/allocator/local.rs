//! The local backend from outside: a real allocator, real processes, real kill -9.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::bench::{Bench, LIMIT, alive, echo, mode, session, signal, until};
use drover_proto::allocator::{Allocation, AllocationState, WorkerState};
use drover_proto::common::{LaunchSpec, SkillFile};
use drover_service::process;
use drover_types::ErrorCode;
use rustix::process::Signal;
use serde_json::json;

const CONFIG: &str = "worker: {restart_delay: 20ms, drain_grace: 1s, max_restarts: 2, healthy_after: 1h}\n\
                      allocator: {max_local_nodes: 8}\n";

fn all_run(allocation: &Allocation) -> bool {
    allocation.nodes.iter().all(|node| node.state() == WorkerState::Running)
}

/// Waits until the stand-in workers have come as far as their loop.
async fn all_started(bench: &Bench, swarm: &str, allocation: &Allocation) {
    for node in &allocation.nodes {
        let line = format!("start {} {}", node.generation, node.pid);
        until("the worker has started", || bench.ledger(swarm, node.node_id).contains(&line).then_some(())).await;
    }
}

async fn running(bench: &Bench, swarm: &str, nodes: u32) -> Allocation {
    bench.ensure(swarm, echo(nodes)).await.unwrap();
    let allocation = bench.wait(swarm, "every node runs", all_run).await;
    all_started(bench, swarm, &allocation).await;
    allocation
}

#[tokio::test]
async fn a_launch_starts_workers_in_their_own_sessions_with_the_documented_environment() {
    let bench = Bench::start(CONFIG).await;
    let mut watch = bench.watch().await;
    assert!(watch.snapshot().await.is_empty());
    let skills = vec![SkillFile { path: "fmt/SKILL.md".into(), content: "how".into() }];
    let params = [("sandbox_mode".to_owned(), "read-only".to_owned())].into();
    let spec = LaunchSpec { agents_md: "rules".into(), skills, params, ..echo(2) };
    let allocation = bench.ensure("s", spec).await.unwrap();
    assert_eq!((allocation.backend.as_str(), allocation.provider.as_str()), ("local", "local"));
    assert!(allocation.job_id.starts_with("local-"));

    let lines = watch.progress_until("ready").await;
    let stages: Vec<&str> = lines.iter().map(|line| line.stage.as_str()).collect();
    assert_eq!(stages, ["starting", "config", "submitting", "submitting", "ready"]);
    let allocation = bench.wait("s", "both run", all_run).await;
    assert_eq!((allocation.state(), allocation.backend_state.as_str()), (AllocationState::Running, "RUNNING"));
    all_started(&bench, "s", &allocation).await;

    let node = &allocation.nodes[1];
    assert_eq!((node.node_id, node.generation, node.restarts), (1, 1, 0));
    assert_eq!(node.host, process::hostname());
    assert_eq!(session(node.pid), Some(node.pid));
    let dir = bench.node_dir("s", 1);
    let text = fs::read_to_string(dir.join("environment")).unwrap();
    let state = bench.state().display().to_string();
    for expected in [
        "DROVER_SWARM_ID=s",
        "DROVER_NODE_ID=1",
        "DROVER_GENERATION=1",
        "DROVER_AGENT=echo",
        "OPENAI_API_KEY=sk-test",
        "DROVER_WORKER__SANDBOX_MODE=read-only",
        &format!("DROVER_JOB_ID={}", allocation.job_id),
        &format!("DROVER_MAILBOX={state}/mailbox"),
        &format!("DROVER_NODE_DIR={state}/nodes/s/01"),
        &format!("DROVER_STATE_DIR={state}"),
        &format!("DROVER_CONFIG={}", bench.dir.path().join("config.yaml").display()),
    ] {
        assert!(text.lines().any(|line| line == expected), "{expected} is missing in\n{text}");
    }
    assert!(!text.contains("DROVER_SECRET_OF_NOBODY") && !text.contains("CARGO"), "{text}");

    assert_eq!(mode(&dir), 0o700);
    assert_eq!(mode(&bench.state().join("nodes/s/01.log")), 0o600);
    assert_eq!(mode(&bench.record_file("s")), 0o600);
    let mailbox = bench.state().join("mailbox/s/01");
    assert_eq!(fs::read_to_string(mailbox.join("bundle/AGENTS.md")).unwrap(), "rules");
    assert_eq!(fs::read_to_string(mailbox.join("bundle/.agents/skills/fmt/SKILL.md")).unwrap(), "how");
    assert!(mailbox.join("inbox").is_dir());

    let again = bench.ensure("s", echo(5)).await.unwrap();
    assert_eq!(again.job_id, allocation.job_id);
    assert_eq!(again.nodes.len(), 2);
    assert_eq!(bench.workers("s", 0).len() + bench.workers("s", 1).len(), 2);
}

#[tokio::test]
async fn ten_callers_at_once_get_one_allocation() {
    let bench = Bench::start(CONFIG).await;
    let launched = futures::future::join_all((0..10).map(|_| bench.ensure("s", echo(2)))).await;
    let jobs: BTreeSet<String> = launched.into_iter().map(|answer| answer.unwrap().job_id).collect();
    assert_eq!(jobs.len(), 1);
    let allocation = bench.wait("s", "both run", all_run).await;
    all_started(&bench, "s", &allocation).await;
    assert_eq!(bench.processes().iter().filter(|&&pid| session(pid) == Some(pid)).count(), 2);
}

#[tokio::test]
async fn a_killed_worker_comes_back_as_the_next_generation_and_what_it_left_is_gone() {
    let bench = Bench::start(CONFIG).await;
    let before = running(&bench, "s", 2).await;
    let victim = before.nodes[1].pid;
    let left: Vec<u32> =
        bench.processes().into_iter().filter(|&pid| pid != victim && session(pid) == Some(victim)).collect();
    assert!(!left.is_empty(), "the stand-in has a child of its own");
    let mut watch = bench.watch().await;
    watch.snapshot().await;
    signal(victim, Signal::KILL);
    let allocation =
        watch.wait("s", "it is said aloud", |allocation| allocation.nodes[1].state() == WorkerState::Restarting).await;
    let node = &allocation.nodes[1];
    assert!(node.reason.starts_with("worker ended with signal 9; restart 1 of 2 in 0."), "{}", node.reason);
    assert_eq!(allocation.state(), AllocationState::Running);
    let allocation = watch.wait("s", "it runs again", all_run).await;
    let node = &allocation.nodes[1];
    assert_eq!((node.generation, node.restarts), (2, 1));
    assert_ne!(node.pid, victim);
    assert_eq!((allocation.nodes[0].generation, allocation.nodes[0].pid), (1, before.nodes[0].pid));
    assert!(left.iter().all(|&pid| !alive(pid)), "a child of the dead worker still runs");
}

#[tokio::test]
async fn a_worker_that_always_fails_is_given_up_with_the_end_of_its_log() {
    let bench = Bench::start(CONFIG).await;
    bench.behave("echo 'no such model' >&2; exit 3");
    bench.ensure("s", echo(1)).await.unwrap();
    let allocation = bench.wait("s", "given up", |a| a.state() == AllocationState::Failed).await;
    let node = &allocation.nodes[0];
    assert_eq!((node.state(), node.generation, node.restarts), (WorkerState::Failed, 3, 2));
    for part in ["exit code 3", "given up after 2 restarts", "no such model"] {
        assert!(node.reason.contains(part) && allocation.reason.contains(part), "{}", node.reason);
    }
}

#[tokio::test]
async fn a_restarted_allocator_finds_its_workers_and_goes_on_supervising_them() {
    let mut bench = Bench::start(CONFIG).await;
    let before = running(&bench, "s", 3).await;
    bench.kill_allocator();
    assert!(before.nodes.iter().all(|node| alive(node.pid)), "workers died with their allocator");
    signal(before.nodes[2].pid, Signal::KILL);
    until("it is dead", || (!alive(before.nodes[2].pid)).then_some(())).await;

    bench.up().await;
    let allocation = bench.wait("s", "all run again", all_run).await;
    assert_eq!(allocation.job_id, before.job_id);
    for index in [0, 1] {
        assert_eq!(allocation.nodes[index], before.nodes[index], "a living worker was not found again");
    }
    assert_eq!((allocation.nodes[2].generation, allocation.nodes[2].restarts), (2, 1));

    // One that this allocator did not start dies: that is seen as well.
    signal(before.nodes[0].pid, Signal::KILL);
    let allocation = bench.wait("s", "restarted", |a| a.nodes[0].generation == 2 && all_run(a)).await;
    assert_ne!(allocation.nodes[0].pid, before.nodes[0].pid);

    let watch = bench.watch().await;
    let asked = Instant::now();
    bench.stop_allocator().await;
    assert!(asked.elapsed() < Duration::from_secs(3), "a watcher holds up the end");
    assert_eq!(watch.end().await.code, ErrorCode::ShuttingDown);
    assert!(allocation.nodes.iter().all(|node| alive(node.pid)), "an orderly end took the workers with it");
    bench.up().await;
    let again = bench.wait("s", "found again", all_run).await;
    assert_eq!(again.nodes, allocation.nodes);
}

#[tokio::test]
async fn a_pid_that_somebody_else_has_now_is_not_believed_and_not_hit() {
    let mut bench = Bench::start(CONFIG).await;
    let before = running(&bench, "s", 1).await;
    bench.kill_allocator();
    signal(before.nodes[0].pid, Signal::KILL);
    until("it is dead", || (!alive(before.nodes[0].pid)).then_some(())).await;
    let mut bystander = Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
    let mut record = bench.record("s");
    record["nodes"][0]["process"]["pid"] = json!(bystander.id());
    bench.set_record("s", &record);

    bench.up().await;
    let allocation = bench.wait("s", "runs again", all_run).await;
    assert_eq!(allocation.nodes[0].generation, 2);
    assert_ne!(allocation.nodes[0].pid, bystander.id());
    bench.release("s", true).await.unwrap();
    bench.wait("s", "over", |a| a.state() == AllocationState::Completed).await;
    assert!(bystander.try_wait().unwrap().is_none(), "a process of somebody else was killed");
    bystander.kill().unwrap();
    bystander.wait().unwrap();
}

/// The record as it is when the allocator dies between a start and the note of it.
fn forget_the_start(bench: &Bench, swarm: &str) {
    let mut record = bench.record(swarm);
    for node in record["nodes"].as_array_mut().unwrap() {
        node["phase"] = json!("starting");
        node.as_object_mut().unwrap().remove("process");
    }
    bench.set_record(swarm, &record);
}

#[tokio::test]
async fn a_worker_that_was_started_but_not_noted_is_adopted() {
    for behaviour in ["", "claim=no"] {
        let mut bench = Bench::start(CONFIG).await;
        bench.behave(behaviour);
        let before = running(&bench, "s", 2).await;
        bench.kill_allocator();
        forget_the_start(&bench, "s");
        bench.up().await;
        let allocation = bench.wait("s", "adopted", all_run).await;
        assert_eq!(allocation.nodes, before.nodes, "with behaviour {behaviour:?}");
    }
}

#[tokio::test]
async fn a_start_that_never_happened_is_made_up_for_with_the_next_generation() {
    let mut bench = Bench::start(CONFIG).await;
    let before = running(&bench, "s", 1).await;
    bench.kill_allocator();
    signal(before.nodes[0].pid, Signal::KILL);
    until("it is dead", || (!alive(before.nodes[0].pid)).then_some(())).await;
    forget_the_start(&bench, "s");
    bench.up().await;
    let allocation = bench.wait("s", "runs again", all_run).await;
    assert_eq!((allocation.nodes[0].generation, allocation.nodes[0].restarts), (2, 0));
}

#[tokio::test]
async fn a_stale_worker_that_nobody_supervises_makes_room() {
    let mut bench = Bench::start(CONFIG).await;
    let before = running(&bench, "s", 1).await;
    bench.kill_allocator();
    // The record of a start that came after: its worker died, but an older one holds the node.
    let mut record = bench.record("s");
    record["nodes"][0] = json!({"generation": 5, "phase": "waiting", "restarts": 0, "ran": true});
    bench.set_record("s", &record);
    bench.up().await;
    let allocation = bench.wait("s", "a new one runs", |a| all_run(a) && a.nodes[0].generation > 6).await;
    assert!(!alive(before.nodes[0].pid));
    all_started(&bench, "s", &allocation).await;
    assert_eq!(bench.workers("s", 0), [allocation.nodes[0].pid]);
}

#[tokio::test]
async fn whatever_is_killed_whenever_each_node_ends_up_with_one_worker() {
    const NODES: u32 = 4;
    let seed: u64 = std::env::var("DROVER_TEST_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| u64::from(std::process::id()) ^ drover_service::now_us());
    println!("DROVER_TEST_SEED={seed}");
    let mut state = seed;
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let config = CONFIG.replace("max_restarts: 2", "max_restarts: 1000").replace("20ms", "1ms");
    let mut bench = Bench::start(&config).await;
    for _ in 0..12 {
        // The launch itself is hit in the first rounds, restarts in the later ones.
        let ensured = tokio::time::timeout(Duration::from_millis(random(60)), bench.ensure("s", echo(NODES)));
        let _ = ensured.await;
        let workers = bench.processes();
        if !workers.is_empty() {
            for _ in 0..random(3) {
                signal(workers[random(workers.len() as u64) as usize], Signal::KILL);
            }
            tokio::time::sleep(Duration::from_millis(random(15))).await;
        }
        bench.kill_allocator();
        bench.up().await;
    }
    bench.ensure("s", echo(NODES)).await.unwrap();
    let allocation = bench.wait("s", "all run", all_run).await;
    // A worker may die of its killed child's absence a moment later; wait until what is said and what is there agree.
    let deadline = Instant::now() + LIMIT;
    loop {
        let said = bench.get("s").await.unwrap();
        let there: Vec<Vec<u32>> = (0..NODES).map(|node| bench.workers("s", node)).collect();
        let agree = said.nodes.iter().zip(&there).all(|(node, pids)| *pids == [node.pid]);
        if agree {
            break;
        }
        assert!(Instant::now() < deadline, "{said:#?} but there are {there:?}; seed {seed}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(allocation.nodes.len(), NODES as usize);
    for node in 0..NODES {
        let starts: Vec<u32> = bench
            .ledger("s", node)
            .iter()
            .filter_map(|line| line.strip_prefix("start ")?.split(' ').next()?.parse().ok())
            .collect();
        assert!(starts.is_sorted_by(|a, b| a < b), "node {node} was started as {starts:?}; seed {seed}");
    }
}

#[tokio::test]
async fn a_release_drains_and_then_kills_and_stays_released() {
    let mut bench = Bench::start(CONFIG).await;
    let stubborn = running(&bench, "stubborn", 1).await;
    signal(stubborn.nodes[0].pid, Signal::KILL);
    bench.behave("trap '' TERM");
    let stubborn = bench.wait("stubborn", "restarted", |a| a.nodes[0].generation == 2 && all_run(a)).await;
    all_started(&bench, "stubborn", &stubborn).await;
    bench.behave("");
    let polite = running(&bench, "polite", 2).await;

    assert!(!bench.release("nosuch", false).await.unwrap());
    assert!(bench.release("polite", false).await.unwrap());
    assert!(bench.release("stubborn", false).await.unwrap());
    let completing = bench.get("stubborn").await.unwrap();
    assert_eq!(completing.backend_state, "COMPLETING");
    let done = bench.wait("polite", "over", |a| a.state() == AllocationState::Completed).await;
    assert!(done.nodes.iter().all(|node| node.state() == WorkerState::Exited && node.pid == 0));
    assert_eq!(bench.ledger("polite", 1), [format!("start 1 {}", polite.nodes[1].pid), "term 1".to_owned()]);

    // The one that ignores the request is killed when its grace is over, by whichever allocator runs then.
    assert!(alive(stubborn.nodes[0].pid));
    bench.kill_allocator();
    bench.up().await;
    assert_eq!(bench.get("stubborn").await.unwrap().state(), AllocationState::Completing);
    bench.wait("stubborn", "over", |a| a.state() == AllocationState::Completed).await;
    assert!(!alive(stubborn.nodes[0].pid));

    bench.kill_allocator();
    bench.up().await;
    for swarm in ["polite", "stubborn"] {
        assert_eq!(bench.get(swarm).await.unwrap().state(), AllocationState::Completed);
        assert!(bench.release(swarm, true).await.unwrap());
        assert_eq!(bench.ensure(swarm, echo(1)).await.unwrap().state(), AllocationState::Completed);
    }
    assert!(bench.processes().is_empty());
}

#[tokio::test]
async fn force_kills_at_once_with_everything_the_worker_started() {
    let bench = Bench::start(CONFIG).await;
    bench.behave("trap '' TERM");
    running(&bench, "s", 2).await;
    assert!(bench.processes().len() >= 4);
    let asked = Instant::now();
    assert!(bench.release("s", true).await.unwrap());
    bench.wait("s", "over", |a| a.state() == AllocationState::Completed).await;
    assert!(asked.elapsed() < Duration::from_secs(3), "force waited for a grace period");
    until("nothing is left", || bench.processes().is_empty().then_some(())).await;
}

#[tokio::test]
async fn a_second_allocator_on_the_same_state_directory_refuses() {
    let bench = Bench::start(CONFIG).await;
    let second = bench.run_second();
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(said.contains("already runs") && said.contains(&bench.allocator_pid().to_string()), "{said}");
}

#[tokio::test]
async fn a_state_directory_that_cannot_be_written_is_a_clear_error_and_heals() {
    let bench = Bench::start(CONFIG).await;
    // What a full disk does to the write of a record, whoever runs the test.
    let block = |swarm: &str| bench.state().join(format!("allocator/.{swarm}.new"));
    fs::create_dir(block("s")).unwrap();
    let failure = bench.ensure("s", echo(1)).await.unwrap_err();
    assert_eq!(failure.code, ErrorCode::StoreUnavailable);
    assert!(failure.message.contains("allocator/s.json") && !failure.hint.is_empty(), "{failure:?}");
    assert!(bench.processes().is_empty());
    assert!(bench.get("s").await.is_none());
    fs::remove_dir(block("s")).unwrap();
    let before = running(&bench, "s", 1).await;

    fs::create_dir(block("s")).unwrap();
    assert_eq!(bench.release("s", false).await.unwrap_err().code, ErrorCode::StoreUnavailable);
    signal(before.nodes[0].pid, Signal::KILL);
    bench.wait("s", "it says what it waits for", |a| a.nodes[0].reason.contains("cannot use")).await;
    assert!(bench.workers("s", 0).is_empty(), "a start that is not on disk was carried out");
    fs::remove_dir(block("s")).unwrap();
    let allocation = bench.wait("s", "it runs again", all_run).await;
    assert!(allocation.nodes[0].generation > before.nodes[0].generation);
}

#[tokio::test]
async fn what_cannot_be_launched_says_why_and_what_to_do() {
    let mut bench = Bench::start(CONFIG).await;
    let skills = vec![SkillFile { path: "../../x".into(), content: String::new() }];
    for (swarm, spec, code, words) in [
        ("s", echo(9), ErrorCode::InvalidRequest, "max_local_nodes"),
        ("s", echo(0), ErrorCode::InvalidRequest, "not 0"),
        ("../s", echo(1), ErrorCode::InvalidRequest, "swarm id"),
        ("s", LaunchSpec { agent: "cluade".into(), ..echo(1) }, ErrorCode::InvalidRequest, "cluade"),
        ("s", LaunchSpec { provider: "moon".into(), ..echo(1) }, ErrorCode::UnknownProvider, "launch on one of: local"),
        ("s", LaunchSpec { skills, ..echo(1) }, ErrorCode::InvalidRequest, "../../x"),
    ] {
        let failure = bench.ensure(swarm, spec).await.unwrap_err();
        assert_eq!(failure.code, code, "{failure:?}");
        assert!(format!("{} {}", failure.message, failure.hint).contains(words), "{failure:?}");
    }
    fs::remove_file(bench.dir.path().join("worker.sh")).unwrap();
    let failure = bench.ensure("s", echo(1)).await.unwrap_err();
    assert!(failure.code == ErrorCode::LaunchFailed && failure.message.contains("worker.sh"), "{failure:?}");
    assert!(bench.get("s").await.is_none());

    bench.stop_allocator().await;
    fs::write(bench.record_file("t"), "{\"v\":1,").unwrap();
    let refused = bench.run_second();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && said.contains("allocator/t.json"), "{said}");
}
