//! The worker from outside: the real program with the echo agent, its inbox written and its outbox read as others do.

mod node_support;

use std::fs;
use std::time::{Duration, Instant};

use drover_proto::worker::worker_service_client::WorkerServiceClient;
use drover_proto::worker::{DrainRequest, GetStatusRequest, GetStatusResponse};
use drover_service::{StateDir, address_book};
use drover_testkit::codex::codex_bin;
use drover_testkit::mock_responses::{MockResponses, codex_config};
use drover_types::NodeIndex;
use node_support::{Node, mode, until};
use serde_json::json;

#[test]
fn a_prompt_becomes_a_turn_and_every_record_says_whose_it_is() {
    let mut node = Node::new(json!({}));
    let bundle = node.mailbox.bundle_dir(&node.swarm, NodeIndex(2));
    fs::create_dir_all(bundle.join("skills/fmt")).unwrap();
    fs::write(bundle.join("AGENTS.md"), "# Rules").unwrap();
    fs::write(bundle.join("skills/fmt/SKILL.md"), "fmt").unwrap();
    node.inject("a", "one two three");
    node.start();
    let hello = node.wait_for("worker_hello", "").data;
    assert_eq!((&hello["agent"], &hello["pid"]), (&json!("echo"), &json!(node.pid())));
    assert_eq!(fs::read_to_string(node.node_dir().join("work/AGENTS.md")).unwrap(), "# Rules");
    assert_eq!(fs::read_to_string(node.node_dir().join("work/.agents/skills/fmt/SKILL.md")).unwrap(), "fmt");

    assert_eq!(node.wait_end("a"), json!({ "status": "completed" }));
    until("thread is idle", || (node.of("a").last()?.data["status"]["type"] == "idle").then_some(()));
    let order =
        ["thread_status", "turn_started", "assistant_delta", "usage", "assistant", "turn_complete", "thread_status"];
    assert_eq!(node.kinds("a"), order);
    let records = node.of("a");
    let text = |kind: &str| -> String {
        records.iter().filter(|seen| seen.kind == kind).map(|seen| seen.data["content"].as_str().unwrap()).collect()
    };
    assert_eq!((text("assistant_delta").as_str(), text("assistant").as_str()), ("one two three", "one two three"));
    let usage = records.iter().find(|seen| seen.kind == "usage").unwrap();
    assert_eq!(usage.data["total_tokens"], 6);
    assert!(records.iter().all(|seen| seen.trace.as_deref() == Some("00-trace-of-a")));
    let numbers: Vec<u64> = node.seen().iter().map(|seen| seen.seq).collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());

    node.inject("b", "  @echo bogus\nhi");
    node.wait_end("b");
    let answer = node.of("b").into_iter().find(|seen| seen.kind == "assistant").unwrap();
    assert_eq!(answer.data["content"], "hi\nunknown directive \"bogus\"");
    node.inject("c", "@echo fail=no more paper");
    let end = node.wait_end("c");
    assert_eq!((&end["status"], &end["error"]), (&json!("failed"), &json!("no more paper")));
    assert_eq!(node.ledger(), ["a", "b", "c"]);
    for private in [node.node_dir(), node.mailbox.inbox_dir(&node.swarm, NodeIndex(2))] {
        assert_eq!(mode(&private), 0o700, "{}", private.display());
    }

    assert_eq!(node.terminate().code(), Some(0));
    let last = node.seen().pop().unwrap();
    assert_eq!(last.kind, "worker_bye");
    assert!(last.data["reason"].as_str().unwrap().contains("signal"), "{}", last.data);
}

#[test]
fn a_killed_worker_runs_nothing_twice_and_its_successor_goes_on_in_order() {
    let mut node = Node::up(json!({}));
    node.inject("done", "x");
    node.wait_end("done");
    node.inject("lost", "@echo delay=60s");
    for name in ["b", "c"] {
        node.inject(name, name);
    }
    until("the prompt runs", || node.ledger().contains(&"lost".to_owned()).then_some(()));
    node.kill_9();
    node.start();
    let end = node.wait_end("lost");
    assert_eq!((&end["status"], &end["code"]), (&json!("failed"), &json!("turn_lost")));
    assert_eq!(node.wait_end("c"), json!({ "status": "completed" }));
    let kinds: Vec<_> = node.of("lost").into_iter().filter(|seen| seen.generation == 2).map(|seen| seen.kind).collect();
    assert_eq!(kinds, ["assistant", "turn_complete"]);

    // What ended stays ended, also for the next one; a record that comes again changes nothing.
    node.kill_9();
    node.append(2, "inject", Some("lost"), &json!({ "content": "x", "steer": false }));
    node.deliver("inject", Some("done"), json!({ "content": "x", "steer": false }));
    node.inject("d", "d");
    node.start();
    node.wait_end("d");
    assert_eq!(node.ledger(), ["done", "lost", "b", "c", "d"]);
    for name in ["done", "lost", "b", "c", "d"] {
        assert_eq!(node.of(name).iter().filter(|seen| seen.kind == "turn_complete").count(), 1, "{name}");
    }
    let journals = node.mailbox.node_dir(&node.swarm, NodeIndex(2)).join("journal");
    assert_eq!(fs::read_dir(journals).unwrap().count(), 1, "only the newest journal is kept");
}

#[test]
fn an_agent_that_takes_the_process_down_costs_only_its_turn() {
    let mut node = Node::up(json!({}));
    node.inject("bomb", "@echo crash");
    node.inject("next", "x");
    assert_eq!(node.exit().code(), Some(134));
    node.start();
    assert_eq!(node.wait_end("next"), json!({ "status": "completed" }));
    assert_eq!(node.wait_end("bomb")["code"], "turn_lost");
    assert_eq!(node.ledger(), ["bomb", "next"]);
}

#[test]
fn sigterm_gives_the_turn_its_grace_then_interrupts_it_and_leaves_the_queue() {
    let mut node = Node::up(json!({ "drain_grace": "200ms" }));
    node.inject("a", "@echo delay=60s");
    node.inject("b", "x");
    node.wait_for("turn_started", "a");
    let began = Instant::now();
    assert_eq!(node.terminate().code(), Some(0));
    assert!(began.elapsed() >= Duration::from_millis(200), "{:?}", began.elapsed());
    assert_eq!(node.wait_end("a"), json!({ "status": "interrupted" }));
    assert_eq!(node.seen().pop().unwrap().kind, "worker_bye");
    assert!(node.of("b").is_empty());
    node.start();
    assert_eq!(node.wait_end("b"), json!({ "status": "completed" }));
    assert_eq!(node.ledger(), ["a", "b"]);

    // A turn that ends inside the grace is not interrupted.
    let mut node = Node::up(json!({ "drain_grace": "10s" }));
    node.inject("c", "@echo delay=300ms");
    node.wait_for("turn_started", "c");
    assert_eq!(node.terminate().code(), Some(0));
    assert_eq!(node.wait_end("c"), json!({ "status": "completed" }));
}

#[test]
fn orders_from_the_inbox_are_carried_out() {
    let mut node = Node::up(json!({ "approval_timeout": "300ms", "drain_grace": "10s" }));
    // An approval that is answered, and one that nobody answers.
    node.inject("a", "@echo approval=make all");
    let wanted = node.wait_for("exec_approval_required", "a").data;
    assert_eq!(wanted["command"], "make all");
    let call = wanted["call_id"].as_str().unwrap().to_owned();
    node.deliver("approval", None, json!({ "call_id": call, "approved": true, "decision": "accept" }));
    node.wait_end("a");
    node.inject("b", "@echo approval=make clean");
    node.wait_end("b");
    let told = |name: &str| {
        let records = node.of(name);
        let data = |kind: &str| records.iter().find(|seen| seen.kind == kind).unwrap().data.clone();
        (data("assistant")["content"].clone(), data("exec_approval_resolved")["source"].clone())
    };
    assert_eq!(told("a"), (json!("accepted"), json!("router")));
    assert_eq!(told("b"), (json!("declined"), json!("timeout")));

    // Steer into a running turn, withdraw a waiting prompt, interrupt the running one.
    node.inject("c", "@echo delay=1500ms\nfirst");
    node.wait_for("turn_started", "c");
    node.deliver("inject", Some("s"), json!({ "content": "second", "steer": true }));
    node.inject("w", "never");
    node.deliver("interrupt", Some("w"), json!({}));
    assert_eq!(node.wait_end("w"), json!({ "status": "interrupted" }));
    assert_eq!(node.wait_end("s"), json!({ "status": "completed" }));
    let answer = node.of("c").into_iter().find(|seen| seen.kind == "assistant").unwrap();
    assert_eq!(answer.data["content"], "first\nsecond");
    assert_eq!(node.kinds("s"), ["turn_started", "assistant", "turn_complete"]);
    assert_eq!(node.kinds("w"), ["assistant", "turn_complete"]);
    node.inject("e", "@echo delay=60s");
    node.wait_for("turn_started", "e");
    node.deliver("interrupt", None, json!({}));
    assert_eq!(node.wait_end("e"), json!({ "status": "interrupted" }));

    // Rubbish is skipped; the end of the swarm fails what waits.
    node.append_raw(b"this is no record\n");
    node.deliver("dance", None, json!({}));
    node.wait_for("worker_error", "");
    node.inject("f", "@echo delay=300ms");
    node.inject("g", "x");
    node.wait_for("turn_started", "f");
    node.deliver("shutdown", None, json!({ "reason": "terminated by its owner", "ends_swarm": true }));
    assert_eq!(node.exit().code(), Some(0));
    assert_eq!(node.wait_end("f"), json!({ "status": "completed" }));
    assert_eq!(node.wait_end("g")["code"], "swarm_over");
    assert_eq!(node.seen().pop().unwrap().data, json!({ "reason": "terminated by its owner" }));
    assert_eq!(node.ledger(), ["a", "b", "c", "s", "e", "f"]);
}

#[test]
fn a_node_has_one_worker() {
    let mut node = Node::up(json!({}));
    let refused = |node: &Node, generation: u32, state: &str| {
        let mut command = node.command(generation);
        let output = command.env("DROVER_STATE_DIR", node.dir.path().join(state)).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let told = refused(&node, 2, "other");
    assert!(told.contains(&format!("pid {}", node.pid())) && told.contains("node 2 of swarm swarm-1"), "{told}");
    assert!(refused(&node, 2, "state").contains("already runs"));
    node.terminate();
    let told = refused(&node, 1, "other");
    assert!(told.contains("generation 1") && told.contains("already belongs to"), "{told}");
    node.start();
    node.wait_for("worker_hello", "");
    node.terminate();
    let told = refused(&node, 1, "other");
    assert!(told.contains("superseded by generation 2"), "{told}");

    let output = node.command(3).env_remove("DROVER_MAILBOX").output().unwrap();
    assert_eq!(output.status.code(), Some(64));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("--mailbox") && told.contains("DROVER_MAILBOX"), "{told}");
}

#[test]
fn without_codex_the_worker_says_what_to_do_and_leaves_the_queue() {
    let mut node = Node::new(json!({}));
    node.inject("a", "x");
    let output = node.command(1).env("DROVER_AGENT", "codex").env("PATH", "/nonexistent").output().unwrap();
    node.generation = 1;
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("--agent echo"), "{told}");
    let error = node.wait_for("worker_error", "").data;
    assert_eq!((&error["code"], &error["fatal"]), (&json!("codex_missing"), &json!(true)));
    assert!(node.of("a").is_empty());
    node.start();
    assert_eq!(node.wait_end("a"), json!({ "status": "completed" }));
}

#[test]
fn the_real_codex_answers_through_the_mailbox() {
    let Some(bin) = codex_bin() else { return };
    let mock = MockResponses::start().unwrap();
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("config.toml"), codex_config(&mock.base_url(), "mock-model")).unwrap();
    let mut node = Node::new(json!({
        "codex_bin": bin, "codex_home": home.path(), "sandbox_mode": "danger-full-access", "approval_policy": "untrusted",
    }));
    node.agent = "codex";
    node.start();
    let hello = node.wait_for("worker_hello", "").data;
    assert_eq!(hello["agent"], "codex");
    node.inject("a", "@mock say='forty two' deltas=2");
    assert_eq!(node.wait_end("a"), json!({ "status": "completed" }));
    let kinds = node.kinds("a");
    let at = |kind: &str| kinds.iter().position(|other| other == kind);
    assert!(at("turn_started") < at("assistant_delta") && at("assistant_delta") < at("assistant"), "{kinds:?}");
    assert!(at("assistant") < at("turn_complete") && at("usage").is_some(), "{kinds:?}");
    assert_eq!(node.of("a").iter().filter(|seen| seen.kind == "assistant").count(), 1);

    // A command that is declined leaves no file; one that is accepted does.
    for (name, approved) in [("no", false), ("yes", true)] {
        node.inject(name, &format!("@mock run='touch {name}.txt' then='ok'"));
        let wanted = node.wait_for("exec_approval_required", name).data;
        let answer =
            json!({ "call_id": wanted["call_id"], "approval_id": wanted["approval_id"], "approved": approved });
        node.deliver("approval", Some(name), answer);
        node.wait_end(name);
        assert_eq!(node.node_dir().join("work").join(format!("{name}.txt")).exists(), approved);
    }

    // The successor of a killed worker goes on with the same thread.
    node.inject("lost", "@mock hang");
    node.wait_for("turn_started", "lost");
    node.inject("next", "@mock say=again");
    node.kill_9();
    node.start();
    assert_eq!(node.wait_end("next"), json!({ "status": "completed" }));
    assert_eq!(node.wait_end("lost")["code"], "turn_lost");
    let hello = node.wait_for("worker_hello", "").data;
    assert_eq!(hello["detail"]["resumed"], true, "{hello}");
    assert_eq!(node.terminate().code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_door_tells_what_it_does_and_takes_the_word_to_end() {
    let mut node = Node::up(json!({ "drain_grace": "0s" }));
    let state = StateDir::open(&node.state_dir()).unwrap();
    let entry = until("the address", || address_book::read(&state, "worker-swarm-1-2"));
    let mut client = WorkerServiceClient::connect(format!("http://{}", entry.listen)).await.unwrap();
    let status = client.get_status(GetStatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.state.as_str(), status.agent.as_str(), status.generation), ("idle", "echo", 1));
    node.inject("a", "@echo delay=60s");
    node.inject("b", "x");
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let GetStatusResponse { state, running_injection, queued, .. } =
            client.get_status(GetStatusRequest {}).await.unwrap().into_inner();
        if (state.as_str(), running_injection.as_str(), queued) == ("busy", "a", 1) {
            break;
        }
        assert!(Instant::now() < deadline, "{state} {running_injection} {queued}");
        tokio::task::yield_now().await;
    }
    client.drain(DrainRequest { reason: "maintenance".into() }).await.unwrap();
    assert_eq!(node.exit().code(), Some(0));
    assert_eq!(node.seen().pop().unwrap().data, json!({ "reason": "maintenance" }));
    assert_eq!(node.wait_end("a"), json!({ "status": "interrupted" }));
}

#[test]
fn many_deltas_pass_whole_and_in_order_over_many_segments() {
    let mut node = Node::up(json!({ "segment_bytes": "64KiB" }));
    let began = Instant::now();
    node.inject("a", "@echo deltas=20000 size=300");
    node.wait_end("a");
    let deltas: Vec<String> = (node.of("a").into_iter())
        .filter(|seen| seen.kind == "assistant_delta")
        .map(|seen| seen.data["content"].as_str().unwrap().to_owned())
        .collect();
    eprintln!("{} deltas in {:?}, waiting and reading included", deltas.len(), began.elapsed());
    assert_eq!(deltas.len(), 20_000);
    assert!(deltas.iter().enumerate().all(|(n, text)| text.len() == 300 && text.starts_with(&format!("{n} "))));
}

/// kill -9 at random moments of a run of many prompts. The agent's own ledger is the judge.
#[test]
fn random_kills_lose_nothing_and_repeat_nothing() {
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    eprintln!("seed {seed}");
    let mut state = seed;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let mut node = Node::up(json!({ "segment_bytes": "4KiB" }));
    let names: Vec<String> = (0..60).map(|n| format!("i{n}")).collect();
    let mut kills = 0;
    for (n, name) in names.iter().enumerate() {
        node.inject(name, &format!("@echo delay={}ms\nprompt {n}", random(8)));
        if n % 5 == 4 {
            let wait = Instant::now() + Duration::from_micros(random(30_000));
            until("a moment", || (Instant::now() >= wait).then_some(()));
            node.kill_9();
            kills += 1;
            node.start();
        }
    }
    let mut lost = 0;
    for name in &names {
        let end = node.wait_end(name);
        if end["status"] != "completed" {
            assert_eq!(end["code"], "turn_lost", "{name}: {end}");
            lost += 1;
        }
    }
    assert!(lost <= kills, "{lost} turns lost by {kills} kills");
    for name in &names {
        let kinds: Vec<String> = node.of(name).into_iter().map(|seen| seen.kind).collect();
        for kind in ["assistant", "turn_complete"] {
            assert_eq!(kinds.iter().filter(|other| *other == kind).count(), 1, "{kind} of {name}: {kinds:?}");
        }
    }
    let mut ledger = node.ledger();
    assert!(ledger.len() + kills >= names.len());
    let order: Vec<usize> = ledger.iter().map(|name| names.iter().position(|other| other == name).unwrap()).collect();
    assert!(order.is_sorted(), "{order:?}");
    ledger.dedup();
    assert_eq!(ledger.len(), order.len(), "a prompt was carried out twice");
}
