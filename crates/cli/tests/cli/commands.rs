//! Every command against a router that the test writes: what is printed, what is asked, and the exit code.

use crate::fake::{Fake, SWARM, Script, accepted, event, swarm};
use drover_proto::allocator::Provider;
use drover_proto::router as pb;
use drover_types::{ErrorCode, Failure};
use serde_json::Value;

/// What a run printed, and how it ended.
struct Run {
    code: i32,
    out: String,
    err: String,
}

fn run(fake: &Fake, args: &[&str]) -> Run {
    let output = fake.drover(args).output().unwrap();
    Run {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Two nodes; node 0 answers in two pieces, node 1 in one.
fn answered() -> Vec<pb::Event> {
    vec![
        event(3, 0, "turn_started", "{}"),
        event(4, 0, "assistant_delta", r#"{"content":"hello\nfrom "}"#),
        event(5, 1, "turn_started", "{}"),
        event(6, 0, "assistant_delta", r#"{"content":"zero"}"#),
        event(7, 1, "assistant", r#"{"content":"hello from one"}"#),
        event(8, 0, "assistant", r#"{"content":"hello\nfrom zero"}"#),
        event(9, 0, "turn_complete", r#"{"status":"completed"}"#),
        event(10, 1, "turn_complete", r#"{"status":"completed"}"#),
    ]
}

#[test]
fn list_and_status_show_swarms_to_people_and_to_scripts() {
    let fake = Fake::start(Script { swarms: vec![swarm()], ..Script::default() });
    insta::assert_snapshot!(run(&fake, &["list"]).out, @r"
    SWARM     STATUS   NODES  AGENT  JOB      AGE  PROMPT
    0199c7a2  running      2  echo   local-1    -
    ");
    insta::assert_snapshot!(run(&fake, &["status", "0199"]).out, @r"
    swarm      0199c7a2-7d58-7c4e-9a35-2f4f6a1c0b11
    status     running
    job        local-1 on local (RUNNING)
    agent      echo
    age        -
    NODE  STATE  HOST  PID  START  WAITING  REASON
       0  idle   here  100      1        0
       1  idle   here  101      1        0
    ");
    let list = json(&run(&fake, &["list", "--json"]).out);
    assert_eq!(list[0]["swarm_id"], SWARM);
    let status = json(&run(&fake, &["--json", "status", "0199"]).out);
    assert_eq!((&status["status"], &status["nodes"][1]["state"]), (&Value::from("running"), &Value::from("idle")));
}

#[test]
fn no_swarms_is_no_error_and_says_what_to_do() {
    let fake = Fake::start(Script::default());
    let run = run(&fake, &["list"]);
    assert_eq!((run.code, run.out.as_str()), (0, ""));
    assert!(run.err.contains("drover launch"), "{}", run.err);
}

#[test]
fn a_wrong_swarm_or_node_is_named_with_what_to_do() {
    let fake = Fake::start(Script { swarms: vec![swarm()], ..Script::default() });
    let unknown = run(&fake, &["status", "nosuch"]);
    assert_eq!(unknown.code, 1);
    assert!(unknown.err.contains("nosuch") && unknown.err.contains("drover list"), "{}", unknown.err);

    let range = run(&fake, &["inject", "0199", "--prompt", "x", "--node", "2"]);
    assert_eq!(range.code, 1);
    assert!(range.err.contains("its nodes are 0 to 1"), "{}", range.err);
    assert!(fake.seen(|seen| seen.injects.is_empty()), "nothing is sent to the nodes that exist either");

    let scripted = run(&fake, &["--json", "status", "nosuch"]);
    let error = json(&scripted.err);
    assert_eq!((scripted.out.as_str(), error["error"]["code"].as_str()), ("", Some("unknown_swarm")));
}

#[test]
fn what_the_router_refuses_is_passed_on_with_its_hint() {
    let failure = Failure::new(ErrorCode::StoreUnavailable, "the event log cannot be written: no space left on device");
    let fake = Fake::start(Script { failure: Some(failure), ..Script::default() });
    let run = run(&fake, &["list"]);
    assert_eq!(run.code, 1);
    assert!(run.err.contains("no space left") && run.err.contains("free space"), "{}", run.err);
    assert!(!run.err.contains("Failure") && !run.err.contains("Status"), "no debug output: {}", run.err);
}

#[test]
fn a_router_of_another_version_is_named_with_both_versions() {
    let fake = Fake::start(Script { version: Some("99.1.0".into()), ..Script::default() });
    let run = run(&fake, &["list"]);
    assert_eq!(run.code, 1);
    for word in ["99.1.0", drover_types::VERSION, "4242", "drover down", "swarms go on"] {
        assert!(run.err.contains(word), "{word}: {}", run.err);
    }
}

#[test]
fn inject_streams_every_event_once_although_the_router_goes_away_twice() {
    let fake = Fake::start(Script {
        swarms: vec![swarm()],
        injects: vec![accepted(0), accepted(1)],
        events: answered(),
        cuts: vec![2, 4],
        ..Script::default()
    });
    let plain = run(&fake, &["inject", "0199", "--prompt", "Say hello"]);
    assert_eq!(plain.code, 0, "{}", plain.err);
    insta::assert_snapshot!(plain.out, @r"
    node 0 | hello
    node 1 | hello from one
    node 0 | from zero
    node 0 | [done (6.0 ms)]
    node 1 | [done (5.0 ms)]
    ");
    assert_eq!(plain.err.matches("reconnecting").count(), 2, "{}", plain.err);
    fake.seen(|seen| {
        assert_eq!(seen.after, [0, 4, 7], "each time behind what was seen");
        assert_eq!(seen.injects.len(), 1);
        assert_eq!((seen.injects[0].swarm_id.as_str(), seen.injects[0].content.as_str()), (SWARM, "Say hello"));
        assert!(!seen.injects[0].request_id.is_empty() && seen.injects[0].traceparent.len() == 55);
    });

    let lines = run(&fake, &["inject", "0199", "--prompt", "Say hello", "--json"]).out;
    let lines: Vec<Value> = lines.lines().map(json).collect();
    let seqs: Vec<u64> = lines.iter().filter_map(|line| line["seq"].as_u64()).collect();
    assert_eq!(seqs, [3, 4, 5, 6, 7, 8, 9, 10]);
    assert_eq!(lines.last().unwrap()["summary"]["completed"], 2);
}

#[test]
fn inject_fails_when_one_node_does_and_says_which_and_why() {
    let mut events = answered();
    events[7].data = r#"{"status":"failed","error":"the worker died","code":"turn_lost"}"#.into();
    let fake = Fake::start(Script {
        swarms: vec![swarm()],
        injects: vec![accepted(0), accepted(1)],
        events,
        ..Script::default()
    });
    let mut command = fake.drover(&["inject", "0199", "--prompt", "-"]);
    let output = command.write_stdin("from standard input\n").output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        err.contains("failed on 1 of 2 nodes: node 1: the worker died") && err.contains("drover why inj-1"),
        "{err}"
    );
    assert!(String::from_utf8(output.stdout).unwrap().contains("node 0 | hello"));
    assert_eq!(fake.seen(|seen| seen.injects[0].content.clone()), "from standard input\n");

    let empty = run(&fake, &["inject", "0199", "--prompt", "  "]);
    assert_eq!(empty.code, 2);
    assert!(empty.err.contains("the prompt is empty"), "{}", empty.err);
}

#[test]
fn a_node_that_cannot_take_the_prompt_fails_it() {
    let refused = pb::InjectResponse {
        state: pb::InjectionState::Failed.into(),
        error: "the node was given up".into(),
        ..accepted(1)
    };
    let fake = Fake::start(Script { swarms: vec![swarm()], injects: vec![accepted(1), refused], ..Script::default() });
    let run = run(&fake, &["inject", "0199", "--prompt", "x", "--node", "1", "--node", "1", "--steer"]);
    assert_eq!(run.code, 1);
    assert!(run.err.contains("node 1: the node was given up"), "{}", run.err);
    fake.seen(|seen| assert_eq!((seen.injects[0].nodes.as_slice(), seen.injects[0].steer), ([1].as_slice(), true)));
}

#[test]
fn launch_sends_what_was_asked_for_and_prints_the_agreed_fields() {
    let fake = Fake::start(Script { swarms: vec![swarm()], ..Script::default() });
    let rules = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(rules.path().join("skills/fmt")).unwrap();
    std::fs::write(rules.path().join("AGENTS.md"), "be brief").unwrap();
    std::fs::write(rules.path().join("skills/fmt/SKILL.md"), "format").unwrap();
    let rules = rules.path().display().to_string();
    let line = [
        "launch",
        "--nodes",
        "4",
        "--partition",
        "mi2508x",
        "--time",
        "00:10:00",
        "--prompt",
        "You are focused.",
        "--account",
        "a1",
        "--qos",
        "q1",
        "--cluster",
        "hpc",
        "--agent",
        "echo",
        "--param",
        "gpus=2",
        "--agents-md",
        &rules,
        "--detach",
        "--json",
    ];
    let launched = run(&fake, &line);
    assert_eq!(launched.code, 0, "{}", launched.err);
    let document = json(&launched.out);
    for field in
        ["swarm_id", "job_id", "node_count", "system_prompt", "status", "slurm_state", "partition", "time", "nodes"]
    {
        assert!(document.get(field).is_some(), "{field} is missing in {document}");
    }
    fake.seen(|seen| {
        let spec = &seen.launches[0];
        assert_eq!((spec.node_count, spec.partition.as_str(), spec.time.as_str()), (4, "mi2508x", "00:10:00"));
        assert_eq!(
            (spec.account.as_str(), spec.qos.as_str(), spec.provider.as_str(), spec.agent.as_str()),
            ("a1", "q1", "hpc", "echo")
        );
        assert_eq!((spec.agents_md.as_str(), spec.skills[0].path.as_str()), ("be brief", "fmt/SKILL.md"));
        assert_eq!(spec.params["gpus"], "2");
    });

    // Without a prompt there is nothing to follow.
    let silent = run(&fake, &["launch", "--nodes", "2"]);
    assert_eq!(silent.code, 0, "{}", silent.err);
    assert!(silent.out.starts_with(&format!("swarm      {SWARM}\nstatus     running")), "{}", silent.out);
}

#[test]
fn a_followed_launch_ends_when_every_node_has_answered() {
    let fake = Fake::start(Script { swarms: vec![swarm()], events: answered(), ..Script::default() });
    let run = run(&fake, &["launch", "--nodes", "2", "--prompt", "hi"]);
    assert_eq!(run.code, 0, "{}", run.err);
    assert!(run.out.contains("node 0 | from zero") && run.out.contains("node 1 | hello from one"), "{}", run.out);
}

#[test]
fn a_followed_launch_fails_with_its_first_prompt_or_its_swarm() {
    let mut events = answered();
    events[7].data = r#"{"status":"failed","error":"no such model"}"#.into();
    let fake = Fake::start(Script { swarms: vec![swarm()], events, ..Script::default() });
    let failed = run(&fake, &["launch", "--nodes", "2", "--prompt", "hi"]);
    assert_eq!(failed.code, 1);
    assert!(failed.err.contains("failed on 1 of 2 nodes: node 1: no such model"), "{}", failed.err);

    let mut events = answered();
    events.truncate(7);
    events.push(pb::Event { node_id: None, injection_id: String::new(), ..event(11, 0, "swarm_terminated", "{}") });
    let fake = Fake::start(Script { swarms: vec![swarm()], events, ..Script::default() });
    let ended = run(&fake, &["launch", "--nodes", "2", "--prompt", "hi"]);
    assert_eq!(ended.code, 1);
    assert!(ended.err.contains("ended before every node had answered") && ended.err.contains("why"), "{}", ended.err);
}

#[test]
fn launch_prints_one_document_for_scripts() {
    let fake = Fake::start(Script { swarms: vec![swarm()], events: answered(), ..Script::default() });
    let launched = run(&fake, &["launch", "--nodes", "2", "--prompt", "hi", "--json"]);
    assert_eq!((launched.code, launched.out.lines().count()), (0, 1), "{}", launched.out);
    assert_eq!(json(&launched.out)["swarm_id"], SWARM);
}

#[test]
fn last_is_the_swarm_that_was_launched_last() {
    let older = pb::Swarm { swarm_id: "0088".into(), created_ms: 1, ..swarm() };
    let newer = pb::Swarm { created_ms: 2, ..swarm() };
    let fake = Fake::start(Script { swarms: vec![newer, older], ..Script::default() });
    let status = json(&run(&fake, &["status", "last", "--json"]).out);
    assert_eq!(status["swarm_id"], SWARM);
    assert_eq!(run(&fake, &["why", "last/1"]).code, 0);
    fake.seen(|seen| assert_eq!(seen.explained, [format!("{SWARM}/1")]));
    let none = run(&Fake::start(Script::default()), &["status", "last"]);
    assert!(none.code == 1 && none.err.contains("drover launch"), "{}", none.err);
}

#[test]
fn a_launch_without_codex_names_the_agent_that_needs_none() {
    let failure = Failure::new(ErrorCode::CodexMissing, "no program named codex on PATH");
    let fake = Fake::start(Script { failure: Some(failure), ..Script::default() });
    let run = run(&fake, &["launch", "--nodes", "1", "--detach"]);
    assert_eq!(run.code, 1);
    assert!(run.err.contains("no program named codex") && run.err.contains("--agent echo"), "{}", run.err);
}

#[test]
fn a_dry_run_launches_nothing_and_names_the_place() {
    let providers = vec![
        Provider { id: "local".into(), label: "This machine".into(), backend: "local".into(), ..Default::default() },
        Provider {
            id: "hpc".into(),
            label: "HPC".into(),
            backend: "slurm".into(),
            disabled: true,
            disabled_reason: "not built yet".into(),
            ..Default::default()
        },
    ];
    let fake = Fake::start(Script { providers, ..Script::default() });
    let plan = run(&fake, &["launch", "--nodes", "4", "--agent", "echo", "--dry-run"]);
    assert_eq!(plan.code, 0, "{}", plan.err);
    insta::assert_snapshot!(plan.out, @r"
    configuration built in
    cluster       local (This machine, local)
    nodes         4
    agent         echo
    ");
    let disabled = run(&fake, &["launch", "--cluster", "hpc", "--dry-run"]);
    assert_eq!(disabled.code, 1);
    assert!(disabled.err.contains("not built yet") && disabled.err.contains("local"), "{}", disabled.err);
    let unknown = run(&fake, &["launch", "--cluster", "nosuch", "--dry-run"]);
    assert!(unknown.err.contains("no cluster \"nosuch\"") && unknown.err.contains("local, hpc"), "{}", unknown.err);
    assert!(fake.seen(|seen| seen.launches.is_empty()));
}

#[test]
fn a_number_beyond_the_log_is_of_another_log() {
    let fake = Fake::start(Script::default());
    let run = run(&fake, &["events", "--since", "999999"]);
    assert_eq!(run.code, 1, "{}", run.err);
    assert!(run.err.contains("--since 999999 lies beyond") && run.err.contains("--since 0"), "{}", run.err);
}

#[test]
fn events_are_one_line_each_and_survive_a_reader_that_leaves() {
    let fake = Fake::start(Script { swarms: vec![swarm()], events: answered(), ..Script::default() });
    let text = run(&fake, &["events", "--since", "0", "--swarm", "0199"]);
    assert_eq!(text.code, 0, "{}", text.err);
    assert_eq!(text.out.lines().count(), 8);
    assert!(text.out.lines().all(|line| line.chars().count() <= 80), "{}", text.out);
    let lines: Vec<Value> = run(&fake, &["events", "--json"]).out.lines().map(json).collect();
    assert_eq!(lines[0]["data"], json("{}"));
    assert_eq!(
        (lines[1]["seq"].as_u64(), lines[1]["timestamp"].as_str()),
        (Some(4), Some("2026-02-25T23:58:58.004000+00:00"))
    );

    // `drover events --follow | head -1`: the reader goes away, which is no failure.
    let addr = fake.drover(&["events", "--follow", "--since", "0"]);
    let mut command = std::process::Command::new(addr.get_program());
    command.args(addr.get_args()).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    for (name, value) in addr.get_envs() {
        command.env(name, value.unwrap_or_default());
    }
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

fn waiting(decision: &str) -> pb::Approval {
    pb::Approval {
        approval_id: "91ce0000-1111".into(),
        swarm_id: SWARM.into(),
        node_id: 1,
        status: "pending".into(),
        decision: decision.into(),
        data: br#"{"command":["git","push"],"reason":"publish"}"#.as_slice().into(),
        ..Default::default()
    }
}

#[test]
fn an_approval_is_listed_and_answered_by_the_beginning_of_its_id() {
    let fake = Fake::start(Script { approvals: vec![waiting("")], ..Script::default() });
    insta::assert_snapshot!(run(&fake, &["approvals"]).out, @r"
    APPROVAL  NODE             AGE  COMMAND
    91ce0000  0199c7a2-7d58/1    -  git push (publish)
    ");
    let list = json(&run(&fake, &["approvals", "--json"]).out);
    assert_eq!(
        (list["approvals_version"].as_u64(), list["approvals"][0]["data"]["reason"].as_str()),
        (Some(3), Some("publish"))
    );
    assert_eq!(run(&fake, &["approve", "91ce"]).out, "approved: git push (publish)\n");
    assert_eq!(run(&fake, &["approve", "91ce", "--decline"]).out, "declined: git push (publish)\n");
    assert_eq!(run(&fake, &["approve", "91ce", "--session"]).code, 0);
    fake.seen(|seen| {
        let answers: Vec<_> =
            seen.answers.iter().map(|a| (a.approval_id.as_str(), a.approved, a.decision.as_str())).collect();
        let id = "91ce0000-1111";
        assert_eq!(answers, [(id, true, ""), (id, false, ""), (id, true, "\"acceptForSession\"")]);
    });
    assert_eq!(run(&fake, &["approve", "91ce", "--session", "--decline"]).code, 2);
}

#[test]
fn an_approval_that_was_answered_before_is_said_to_be() {
    let fake = Fake::start(Script { approvals: vec![waiting("\"decline\"")], ..Script::default() });
    let late = run(&fake, &["approve", "91ce"]);
    assert_eq!(late.code, 1);
    assert!(late.err.contains("answered before") && late.err.contains("the earlier answer stands"), "{}", late.err);
}

#[test]
fn why_interrupt_and_terminate_say_what_they_did() {
    let explain = pb::ExplainResponse {
        kind: "node".into(),
        id: format!("{SWARM}/1"),
        state: "restarting".into(),
        because: vec!["its worker ended with exit code 1".into(), "it has been started 3 times".into()],
        next: vec![format!("look at its log: nodes/{SWARM}/01.log")],
    };
    let fake = Fake::start(Script { swarms: vec![swarm()], explain, ..Script::default() });
    insta::assert_snapshot!(run(&fake, &["why", "0199/1"]).out, @r"
    node 0199c7a2-7d58-7c4e-9a35-2f4f6a1c0b11/1 is restarting
      because  its worker ended with exit code 1
      because  it has been started 3 times
      next     look at its log: nodes/0199c7a2-7d58-7c4e-9a35-2f4f6a1c0b11/01.log
    ");
    let interrupt = run(&fake, &["interrupt", "0199", "--node", "1", "--injection", "inj-1"]);
    assert!(interrupt.out.starts_with("1 node told to interrupt"), "{}", interrupt.out);
    let terminate = run(&fake, &["terminate", "0199", "--force"]);
    assert_eq!((terminate.code, terminate.out), (0, format!("swarm {SWARM} terminated\n")));
    fake.seen(|seen| {
        assert_eq!((seen.interrupts[0].swarm_id.as_str(), seen.interrupts[0].injection_id.as_str()), (SWARM, "inj-1"));
        assert!(seen.terminated[0].force && seen.terminated[0].swarm_id == SWARM);
    });
}

#[test]
fn a_remote_router_is_examined_too() {
    let fake = Fake::start(Script::default());
    let document = json(&run(&fake, &["doctor", "--json"]).out);
    let checks = document["checks"].as_array().unwrap();
    let names: Vec<&str> = checks.iter().filter_map(|check| check["name"].as_str()).collect();
    assert!(
        names.contains(&"router answers") && names.contains(&"event log") && !names.contains(&"ports"),
        "{names:?}"
    );
    assert!(!names.contains(&"codex"), "its nodes run elsewhere: {names:?}");

    let other = Fake::start(Script { version: Some("99.1.0".into()), ..Script::default() });
    let document = json(&run(&other, &["doctor", "--json"]).out);
    let answers =
        document["checks"].as_array().unwrap().iter().find(|check| check["name"] == "router answers").unwrap();
    assert!(answers["detail"].as_str().unwrap().contains("99.1.0"), "{answers}");
    assert!(answers["hint"].as_str().unwrap().contains("`drover down` on here"), "{answers}");
}

/// A member as the router lists it.
fn member(index: u32, state: &str) -> pb::Member {
    pb::Member {
        node_id: format!("{SWARM}/{index}"),
        swarm_id: SWARM.into(),
        node_index: Some(index),
        addr: "127.0.0.1".into(),
        port: 7946 + index,
        state: state.into(),
        load_score: Some(0.25),
        incarnation: 3,
        boot: 9,
        version: "1".into(),
        timestamp_us: 1_772_063_938_000_000,
        host: "here".into(),
        labels: [("host".to_owned(), "here".to_owned())].into(),
        capabilities: [("agent".to_owned(), "echo".to_owned())].into(),
        ..pb::Member::default()
    }
}

fn members(all: Vec<pb::Member>) -> pb::ListMembersResponse {
    pb::ListMembersResponse { members: all, reporter: format!("{SWARM}/0"), epoch: 1, term: 2, heard_us: 1 }
}

#[test]
fn members_have_the_agreed_fields_and_no_swarm_means_null() {
    let outside =
        pb::Member { node_id: "laptop".into(), state: "left".into(), cause: "left".into(), ..Default::default() };
    let fake = Fake::start(Script {
        swarms: vec![swarm()],
        members: members(vec![member(0, "alive"), outside]),
        ..Script::default()
    });
    let listed = json(&run(&fake, &["members", "--json"]).out);
    let first = listed[0].as_object().unwrap();
    for field in [
        "node_id",
        "swarm_id",
        "node_index",
        "addr",
        "port",
        "state",
        "load_score",
        "incarnation",
        "capabilities",
        "labels",
        "version",
        "timestamp",
    ] {
        assert!(first.contains_key(field), "{field}: {listed}");
    }
    assert_eq!(
        (&listed[0]["node_id"], &listed[0]["node_index"]),
        (&Value::from(format!("{SWARM}/0")), &Value::from(0))
    );
    assert_eq!((&listed[0]["state"], &listed[0]["load_score"]), (&Value::from("alive"), &Value::from(0.25)));
    assert_eq!(listed[0]["labels"]["host"], "here");
    assert_eq!(
        (&listed[1]["swarm_id"], &listed[1]["node_index"], &listed[1]["load_score"]),
        (&Value::Null, &Value::Null, &Value::Null)
    );
    let people = run(&fake, &["members"]);
    assert!(people.out.contains("0199c7a2/0") && people.out.contains("laptop"), "{}", people.out);
    assert!(people.err.contains("1 alive, 1 left") && people.err.contains("by 0199c7a2/0"), "{}", people.err);
    let one = json(&run(&fake, &["members", "0199", "--json"]).out);
    assert_eq!(one.as_array().map(Vec::len), Some(1));

    let none = run(&Fake::start(Script::default()), &["members"]);
    assert_eq!((none.code, none.out.as_str()), (0, ""));
    assert!(none.err.contains("no members yet"), "{}", none.err);
}

#[test]
fn a_watch_of_members_goes_on_through_a_lost_router_and_tells_nothing_twice() {
    use drover_proto::router::watch_members_response::Update;
    use std::io::BufRead as _;
    let fake = Fake::start(Script {
        members: members(vec![member(0, "alive"), member(1, "alive")]),
        member_changes: vec![Update::Changed(member(1, "suspect")), Update::Removed(format!("{SWARM}/1"))],
        // The first connection breaks behind its snapshot.
        cuts: vec![1],
        ..Script::default()
    });
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin!("drover"))
        .args(["members", "--watch", "--json", "--router", &fake.address()])
        .env_clear()
        .env("HOME", "/nonexistent")
        .env("DROVER_STATE_DIR", "/nonexistent/state")
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    let told: Vec<String> = lines
        .take(4)
        .map(|line| {
            let member = json(&line.unwrap());
            format!("{} {} {}", member["node_index"], member["state"].as_str().unwrap(), member["removed"])
        })
        .collect();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(told, ["0 alive null", "1 alive null", "1 suspect null", "1 suspect true"]);
}

#[test]
fn status_shows_each_node_as_the_others_see_it() {
    let mut seen = swarm();
    seen.nodes[0].membership = "alive".into();
    seen.nodes[0].load_score = Some(0.5);
    seen.nodes[1].membership = "suspect".into();
    seen.nodes[1].membership_notes = vec![pb::MembershipNote {
        code: "clock_off".into(),
        message: "the clock is an hour off".into(),
        current: true,
        ..Default::default()
    }];
    let fake = Fake::start(Script { swarms: vec![seen], ..Script::default() });
    insta::assert_snapshot!(run(&fake, &["status", "0199"]).out, @r"
    swarm      0199c7a2-7d58-7c4e-9a35-2f4f6a1c0b11
    status     running
    job        local-1 on local (RUNNING)
    agent      echo
    age        -
    NODE  STATE  MEMBER   LOAD  HOST  PID  START  WAITING  REASON
       0  idle   alive    0.50  here  100      1        0
       1  idle   suspect     -  here  101      1        0  the clock is an hour off
    ");
    let status = json(&run(&fake, &["status", "0199", "--json"]).out);
    assert_eq!(
        (&status["nodes"][0]["membership"]["state"], &status["nodes"][0]["membership"]["load_score"]),
        (&Value::from("alive"), &Value::from(0.5))
    );
    assert_eq!(status["nodes"][1]["membership"]["notes"][0]["code"], "clock_off");
}

#[test]
fn keys_are_listed_with_who_has_them_and_a_refusal_says_who_would_be_cut_off() {
    let key = |key_id, in_use, nodes, missing: &[&str]| pb::RingKey {
        key_id,
        fingerprint: format!("{key_id:02x}00000000000000"),
        in_use,
        nodes,
        nodes_using: if in_use { 2 } else { 0 },
        missing: missing.iter().map(|&id| id.into()).collect(),
    };
    let keys = pb::ListKeysResponse {
        keys: vec![key(0xa1, true, 2, &[]), key(0xb2, false, 1, &["s/1"])],
        revision: 2,
        nodes: 2,
    };
    let refusal =
        Failure::new(ErrorCode::NotAllowed, "key b2 would cut off 1 of the nodes that do not have it yet: s/1")
            .hint("wait");
    let fake = Fake::start(Script { keys, key_refusal: Some(refusal), ..Script::default() });
    insta::assert_snapshot!(run(&fake, &["keys", "list"]).out, @r"
    KEY  IN USE  NODES  SEALING  FINGERPRINT       MISSING ON
    a1   yes       2/2        2  a100000000000000
    b2   no        1/2        0  b200000000000000  s/1
    ");
    let listed = json(&run(&fake, &["keys", "list", "--json"]).out);
    assert_eq!(
        (&listed["nodes"], &listed["keys"][1]["key_id"], &listed["keys"][1]["nodes"]),
        (&Value::from(2), &Value::from("b2"), &Value::from(1))
    );
    let added = run(&fake, &["keys", "add"]);
    assert!(added.code == 0 && added.err.contains("drover keys use b2"), "{}", added.err);
    let refused = run(&fake, &["keys", "use", "b2"]);
    assert!(refused.code == 1 && refused.err.contains("s/1") && refused.err.contains("wait"), "{}", refused.err);
    assert_eq!(run(&fake, &["keys", "use", "b2", "--force"]).code, 0);
    assert_eq!(run(&fake, &["keys", "remove", "a1"]).code, 0);
    assert_eq!(run(&fake, &["keys", "use", "xyz"]).code, 2);
    let asked = fake.seen(|seen| seen.keys.clone());
    assert_eq!(asked, ["add 0", "use b2 false", "use b2 true", "remove a1 false"]);
}
