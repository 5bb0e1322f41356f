//! The control plane as its clients see it: emulated originals, each row of what ends a command, and everything that a
//! stranger can do to a line protocol.

#![expect(clippy::unwrap_used, reason = "a fault in a test's own machinery should end the test")]

pub mod fake;
mod wire;

use std::time::Duration;

use drover_testkit::emulate::{
    Attach, Client, Inject, Launch, OneShot, OpenClaw, Screen, SeedInject, SeedOneShot, Step, StopAll, Terminate,
    WebBackend, command, id_of, run, run_until,
};
use drover_types::{ErrorCode, Failure};
use fake::{Knobs, Plane, until, within};
use serde_json::{Value, json};

/// Longer than any answer takes, short enough to wait for what never comes.
const PATIENCE: Duration = Duration::from_secs(20);
const A_WHILE: Duration = Duration::from_millis(400);

fn echo() -> Knobs {
    Knobs { echo: true, ..Knobs::default() }
}

// ---- the emulators are faithful: what ends a command, row by row ---------------------------------------------------

type Row = (&'static str, Box<dyn Client>, Vec<(&'static str, Value)>, Option<i32>);

/// Feeds events to a client that has begun. `REQ` stands for the id of the last command it sent.
fn play(client: &mut dyn Client, events: &[(&'static str, Value)]) -> Option<i32> {
    let mut screen = Screen::default();
    let mut last_id = client.begin().last().map(id_of).unwrap_or_default();
    for (name, data) in events {
        let mut data = data.clone();
        if data["request_id"] == "REQ" {
            data["request_id"] = json!(last_id);
        }
        match client.event(&json!({"type": "event", "event": name, "data": data}), &mut screen) {
            Step::Wait => {}
            Step::Send(commands) => last_id = commands.last().map(id_of).unwrap_or_default(),
            Step::Exit(code) => return Some(code),
        }
    }
    None
}

#[test]
fn the_emulators_end_as_the_originals_do() {
    let mine = |extra: Value| {
        let mut data = json!({"request_id": "REQ", "swarm_id": "s", "node_id": 0, "node_count": 1, "swarms": {}});
        data.as_object_mut().unwrap().extend(extra.as_object().cloned().unwrap_or_default());
        data
    };
    let plain = || mine(json!({}));
    let foreign = || json!({"request_id": "other", "swarm_id": "s", "node_id": 0});
    let runtime = || json!({"swarm_id": "s", "node_id": 0, "injection_id": "i", "content": ""});
    let detached = || Box::new(Launch::new(1, "p", true)) as Box<dyn Client>;
    let followed = || Box::new(Launch::new(1, "p", false)) as Box<dyn Client>;
    let inject = || Box::new(Inject::new("s", None, "p")) as Box<dyn Client>;
    let terminate = || Box::new(Terminate::new("s")) as Box<dyn Client>;
    let status = || ("swarm_status", mine(json!({})));
    let rows: Vec<Row> = vec![
        ("list", Box::new(OneShot::list()), vec![("swarm_list", plain())], Some(0)),
        ("list", Box::new(OneShot::list()), vec![("command_rejected", plain())], Some(1)),
        ("list", Box::new(OneShot::list()), vec![("queue_updated", plain())], Some(1)),
        ("list", Box::new(OneShot::list()), vec![("swarm_list", foreign()), ("usage", runtime())], None),
        ("status", Box::new(OneShot::status("s")), vec![status()], Some(0)),
        ("status", Box::new(OneShot::status("s")), vec![("swarm_list", plain())], Some(1)),
        ("providers", Box::new(OneShot::providers()), vec![("providers_list", plain())], Some(0)),
        ("launch -d", detached(), vec![("swarm_launch_progress", plain()), ("swarm_launched", plain())], Some(0)),
        ("launch -d", detached(), vec![("command_rejected", plain())], Some(1)),
        ("launch -d", detached(), vec![("inject_ack", plain())], Some(1)),
        ("launch", followed(), vec![("swarm_launched", plain()), ("inject_ack", plain())], None),
        ("launch", followed(), vec![("swarm_launched", plain()), ("swarm_terminated", runtime())], None),
        ("launch", followed(), vec![("swarm_launched", mine(json!({"swarm_id": 7})))], Some(1)),
        ("inject", inject(), vec![("command_rejected", plain())], Some(1)),
        ("inject", inject(), vec![("swarm_status", mine(json!({"node_count": null})))], Some(1)),
        ("inject", inject(), vec![status(), ("inject_failed", plain())], Some(1)),
        ("inject", inject(), vec![status(), ("command_rejected", plain())], None),
        (
            "inject",
            inject(),
            vec![
                status(),
                ("inject_ack", plain()),
                ("turn_complete", runtime()),
                ("inject_delivered", plain()),
                ("assistant", runtime()),
            ],
            Some(0),
        ),
        // A turn that completes before the acknowledgement is lost to it.
        (
            "inject",
            inject(),
            vec![
                status(),
                ("turn_complete", runtime()),
                ("inject_ack", plain()),
                ("inject_delivered", plain()),
                ("assistant", runtime()),
            ],
            None,
        ),
        // And without an `assistant` it never ends.
        (
            "inject",
            inject(),
            vec![status(), ("inject_ack", plain()), ("inject_delivered", plain()), ("turn_complete", runtime())],
            None,
        ),
        (
            "terminate",
            terminate(),
            vec![("swarm_status", plain()), ("swarm_terminate_progress", plain()), ("swarm_terminated", plain())],
            Some(0),
        ),
        ("terminate", terminate(), vec![("command_rejected", plain())], Some(1)),
        ("terminate", terminate(), vec![("workspace_archive_ready", plain())], Some(1)),
        ("terminate", terminate(), vec![("swarm_terminated", foreign())], None),
        ("stop-all", Box::new(StopAll::default()), vec![("swarm_list", plain())], Some(0)),
        (
            "stop-all",
            Box::new(StopAll::default()),
            vec![
                ("swarm_list", mine(json!({"swarms": {"a": {"job_id": "1"}, "b": {"job_id": "2"}}}))),
                ("swarm_terminated", plain()),
                ("swarm_terminated", plain()),
            ],
            Some(0),
        ),
        ("attach", Box::new(Attach::new("s", false)), vec![("command_rejected", plain())], Some(1)),
        ("attach", Box::new(Attach::new("s", true)), vec![status(), ("swarm_terminated", runtime())], None),
        ("seed list", Box::new(SeedOneShot::list()), vec![("whatever", plain())], Some(0)),
        ("seed status", Box::new(SeedOneShot::status("s")), vec![("command_rejected", plain())], Some(0)),
        ("seed launch", Box::new(SeedOneShot::launch(1, "p", "t", "x")), vec![("command_rejected", plain())], Some(0)),
        ("seed inject", Box::new(SeedInject::new("s", "p")), vec![("inject_failed", plain())], None),
    ];
    for (index, (name, mut client, events, exit)) in rows.into_iter().enumerate() {
        assert_eq!(play(client.as_mut(), &events), exit, "row {index}: {name} {events:?}");
    }
}

// ---- the later command line against our server ---------------------------------------------------------------------

#[tokio::test]
async fn head_list_status_and_providers() {
    let plane = Plane::start(Knobs::default());
    let swarm = plane.fake.add_swarm(4);
    let list = run(plane.addr, &mut OneShot::list(), PATIENCE).await.unwrap();
    assert_eq!((list.exit, list.closed), (Some(0), false));
    assert!(list.screen.out.contains(&format!("{swarm} | job 272900 | nodes 4 | running")), "{}", list.screen.out);

    let status = run(plane.addr, &mut OneShot::status(&swarm), PATIENCE).await.unwrap();
    assert_eq!(status.exit, Some(0));
    for line in ["node_count: 4", "status: running", "slurm_state: RUNNING", "job_id: 272900"] {
        assert!(status.screen.out.contains(line), "{line}: {}", status.screen.out);
    }
    assert!(!status.screen.out.contains("[object Object]"));

    // The beginning of an id is not an id here, least of all for what ends a swarm.
    for unknown in ["", &swarm[..8]] {
        let ended = run(plane.addr, &mut Terminate::new(unknown), PATIENCE).await.unwrap();
        assert_eq!((ended.exit, ended.screen.err.as_str()), (Some(1), "Terminate failed: unknown swarm_id\n"));
        let mut inject = SeedInject::new(unknown, "x");
        let refused = run_until(plane.addr, &mut inject, PATIENCE, |screen| !screen.err.is_empty()).await.unwrap();
        assert_eq!(refused.screen.err, "Inject failed: unknown swarm_id\n");
    }
    for unknown in ["nonsense", &swarm[..8]] {
        let status = run(plane.addr, &mut OneShot::status(unknown), PATIENCE).await.unwrap();
        assert_eq!((status.exit, status.screen.err.as_str()), (Some(1), "Error: unknown swarm_id\n"));
    }

    let providers = run(plane.addr, &mut OneShot::providers(), PATIENCE).await.unwrap();
    assert_eq!((providers.exit, providers.screen.out.as_str()), (Some(0), "local | backend=local\n"));

    plane.fake.turn_knobs(|knobs| knobs.list_failure = Some(Failure::new(ErrorCode::StoreUnavailable, "disk full")));
    let list = run(plane.addr, &mut OneShot::list(), PATIENCE).await.unwrap();
    assert_eq!((list.exit, list.screen.err.as_str()), (Some(1), "Error: disk full\n"));
}

#[tokio::test]
async fn head_launch_detached_and_followed() {
    let plane = Plane::start(echo());
    let launch = run(plane.addr, &mut Launch::new(2, "grüße 🙂", true), PATIENCE).await.unwrap();
    assert_eq!(launch.exit, Some(0), "{:?}", launch.screen);
    assert!(launch.screen.out.starts_with("[launch:queued] recorded\n"), "{}", launch.screen.out);
    assert!(launch.screen.out.contains("node_count: 2\n") && !launch.screen.out.contains("[object"));

    let mut followed = Launch::new(1, "grüße 🙂", false);
    let seen =
        run_until(plane.addr, &mut followed, PATIENCE, |screen| screen.out.contains("turn complete")).await.unwrap();
    assert_eq!((seen.exit, seen.broken.len()), (None, 0));
    assert!(seen.screen.out.contains("[node 0] assistant\necho: grüße 🙂"), "{}", seen.screen.out);
    assert!(seen.screen.out.contains("[INFO] node 0 total tokens=42"));
    // Nothing but progress bears the launch's id before it is launched.
    let id = id_of(&followed.begin()[0]);
    let names = seen.names_with("request_id", &id);
    let launched = names.iter().position(|name| *name == "swarm_launched").unwrap();
    assert!(names[..launched].iter().all(|name| *name == "swarm_launch_progress"), "{names:?}");
    assert!(names[launched..].contains(&"inject_ack"));

    let failure = Failure::new(ErrorCode::CodexMissing, "no codex program was found").hint("launch with --agent echo");
    plane.fake.turn_knobs(|knobs| knobs.launch_failure = Some(failure));
    let failed = run(plane.addr, &mut Launch::new(1, "", true), PATIENCE).await.unwrap();
    assert_eq!(failed.exit, Some(1));
    assert_eq!(failed.screen.err, "Launch failed: no codex program was found; launch with --agent echo\n");
    assert!(failed.screen.out.contains("[launch:ready] up"), "progress comes before the rejection");

    // A router that goes away says so; without a word the command would end with 0.
    plane.fake.turn_knobs(|knobs| knobs.launches_hang = true);
    let mut hanging = Launch::new(1, "", true);
    let hanging = run(plane.addr, &mut hanging, PATIENCE);
    let (hanging, ()) = tokio::join!(hanging, async {
        let before = plane.fake.last_seq();
        until(|| plane.fake.last_seq() > before).await;
        plane.ctx.shutdown().cancel();
    });
    let hanging = hanging.unwrap();
    assert_eq!((hanging.exit, hanging.closed), (Some(1), false));
    assert!(hanging.screen.err.starts_with("Launch failed: the router is shutting down"), "{}", hanging.screen.err);
}

#[tokio::test]
async fn head_inject_ends_with_the_turns_and_with_the_first_failure() {
    let plane = Plane::start(echo());
    let swarm = plane.fake.add_swarm(8);
    for round in 0..20 {
        let prompt = format!("round {round} grüße 🙂");
        let inject = run(plane.addr, &mut Inject::new(&swarm, None, &prompt), PATIENCE).await.unwrap();
        assert_eq!(inject.exit, Some(0), "{:?}", inject.screen);
        for node in 0..8 {
            let block = format!("[Swarm {swarm} | Node {node}]\n");
            assert!(inject.screen.out.contains(&block), "{}", inject.screen.out);
        }
        assert_eq!(inject.screen.out.matches(&format!("echo: {prompt}\n")).count(), 8);
    }
    let one = run(plane.addr, &mut Inject::new(&swarm, Some(3), "only you"), PATIENCE).await.unwrap();
    assert_eq!(one.exit, Some(0));

    plane.fake.turn_knobs(|knobs| knobs.broken_node = Some(5));
    let failed = run(plane.addr, &mut Inject::new(&swarm, None, "again"), PATIENCE).await.unwrap();
    assert_eq!((failed.exit, failed.screen.err.as_str()), (Some(1), "Inject failed: the inbox is on fire\n"));

    let unknown = run(plane.addr, &mut Inject::new("nonsense", None, "x"), PATIENCE).await.unwrap();
    assert_eq!((unknown.exit, unknown.screen.err.as_str()), (Some(1), "Error: unknown swarm_id\n"));

    // A swarm that is over: its status is known, the injection is not possible, and the command must not hang.
    run(plane.addr, &mut Terminate::new(&swarm), PATIENCE).await.unwrap();
    let over = run(plane.addr, &mut Inject::new(&swarm, None, "x"), PATIENCE).await.unwrap();
    assert_eq!((over.exit, over.screen.err.as_str()), (Some(1), "Inject failed: swarm is terminating or terminated\n"));
}

#[tokio::test]
async fn head_terminate_and_stop_all() {
    let plane = Plane::start(Knobs::default());
    let swarms = [plane.fake.add_swarm(1), plane.fake.add_swarm(2), plane.fake.add_swarm(3)];
    // Twice at once: each asker hears of the end under its own id.
    let (mut a, mut b) = (Terminate::new(&swarms[0]), Terminate::new(&swarms[0]));
    let (a, b) = tokio::join!(run(plane.addr, &mut a, PATIENCE), run(plane.addr, &mut b, PATIENCE));
    assert_eq!((a.unwrap().exit, b.unwrap().exit), (Some(0), Some(0)));

    let unknown = run(plane.addr, &mut Terminate::new("nonsense"), PATIENCE).await.unwrap();
    assert_eq!((unknown.exit, unknown.screen.err.as_str()), (Some(1), "Terminate failed: unknown swarm_id\n"));

    let all = run(plane.addr, &mut StopAll::default(), PATIENCE).await.unwrap();
    assert_eq!(all.exit, Some(0));
    assert!(all.screen.out.contains("Stopped 3 swarm(s)."), "{}", all.screen.out);
}

#[tokio::test]
async fn head_attach_streams_until_it_is_told_to_stop() {
    let plane = Plane::start(echo());
    let swarm = plane.fake.add_swarm(1);
    let unknown = run(plane.addr, &mut Attach::new("nonsense", false), PATIENCE).await.unwrap();
    assert_eq!((unknown.exit, unknown.screen.err.as_str()), (Some(1), "Invalid swarm_id.\n"));
    let unknown = run(plane.addr, &mut Attach::new("nonsense", true), PATIENCE).await.unwrap();
    assert!(unknown.exit == Some(1) && unknown.screen.out.contains("command_rejected"));

    // It sees another client's injection, also its acknowledgement, but no rejection of another's.
    let (mut attach, mut inject) = (Attach::new(&swarm, true), Inject::new(&swarm, None, "hello"));
    let attached = run_until(plane.addr, &mut attach, PATIENCE, |screen| screen.out.contains("turn_complete"));
    let injecting = async {
        loop {
            let done = run(plane.addr, &mut inject, PATIENCE).await.unwrap();
            assert_eq!(done.exit, Some(0));
            if plane.fake.last_seq() > 0 {
                break;
            }
        }
    };
    let (attached, ()) = tokio::join!(attached, async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        injecting.await;
    });
    let attached = attached.unwrap();
    assert_eq!(attached.exit, None);
    let names: Vec<Value> =
        attached.screen.out.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["event"].clone()).collect();
    assert!(names.starts_with(&[json!("inject_ack"), json!("turn_started")]), "{names:?}");
}

// ---- the seed's command line -------------------------------------------------------------------------------------

#[tokio::test]
async fn seed_commands() {
    let plane = Plane::start(echo());
    let mut launch = SeedOneShot::launch(2, "mi2508x", "00:10:00", "You are");
    let launched = run(plane.addr, &mut launch, PATIENCE).await.unwrap();
    assert_eq!(launched.exit, Some(0));
    let spec = &plane.fake.specs()[0];
    assert_eq!((spec.node_count, spec.partition.as_str(), spec.time.as_str()), (2, "mi2508x", "00:10:00"));

    let list = run(plane.addr, &mut SeedOneShot::list(), PATIENCE).await.unwrap();
    assert!(list.exit == Some(0) && list.screen.out.contains("| nodes 2 | running"));
    let unknown = run(plane.addr, &mut SeedOneShot::status("nonsense"), PATIENCE).await.unwrap();
    assert_eq!((unknown.exit, unknown.screen.out.as_str()), (Some(0), ""));

    let swarm = plane.fake.add_swarm(2);
    let mut inject = SeedInject::new(&swarm, "hi");
    let shown = run_until(plane.addr, &mut inject, PATIENCE, |screen| screen.out.matches("echo: hi").count() == 2);
    let shown = shown.await.unwrap();
    assert_eq!(shown.exit, None);
    assert!(shown.screen.out.contains("Inject acknowledged (node 1)"));
    let mut inject = SeedInject::new("nonsense", "hi");
    let refused = run_until(plane.addr, &mut inject, PATIENCE, |screen| !screen.err.is_empty());
    assert_eq!(refused.await.unwrap().screen.err, "Inject failed: unknown swarm_id\n");
}

// ---- long connections --------------------------------------------------------------------------------------------

#[tokio::test]
async fn the_web_backend_keeps_its_picture_and_comes_back_after_a_restart() {
    let plane = Plane::start(echo());
    let (kept, gone) = (plane.fake.add_swarm(1), plane.fake.add_swarm(1));
    let mut web = WebBackend::new(Duration::from_millis(20));
    let both = |web: &WebBackend| web.swarms.len() == 2 && web.answers.get("approvals_list").is_some_and(|&n| n > 3);
    web.live(plane.addr, PATIENCE, both).await.unwrap();

    plane.fake.forget_swarm(&gone);
    let living = web.live(plane.addr, PATIENCE, |web| web.swarms.len() == 2 && web.passed_on.contains_key("delta"));
    let others = async {
        // A launch by the command line shows up without a poll of its own.
        run(plane.addr, &mut Launch::new(1, "hello", true), PATIENCE).await.unwrap();
    };
    let (living, ()) = tokio::join!(living, others);
    living.unwrap();
    assert!(web.swarms.contains_key(&kept) && web.dropped.contains(&gone));
    for answer in ["swarm_list", "queue_list", "project_list", "approvals_list"] {
        assert!(web.answers.get(answer).is_some_and(|&count| count >= 1), "{answer}: {:?}", web.answers);
    }
    assert!(web.passed_on.contains_key("queue_updated") && web.passed_on.contains_key("projects_updated"));
    assert!(!web.answers.contains_key("command_rejected"));

    // The router restarts on the same port with a swarm that is new to it; the bridge comes back by itself.
    let connects = web.connects;
    plane.ctx.shutdown().cancel();
    let addr = plane.addr;
    until(|| std::net::TcpStream::connect(addr).is_err()).await;
    let plane = Plane::start_at(addr);
    let new = plane.fake.add_swarm(1);
    web.live(addr, PATIENCE, |web| web.swarms.contains_key(&new)).await.unwrap();
    assert!(web.connects > connects && !web.swarms.contains_key(&kept));
}

#[tokio::test]
async fn openclaw_is_not_disturbed_by_other_clients_rejections() {
    let plane = Plane::start(echo());
    let mut connection = plane.connect().await;
    let mut claw = OpenClaw::default();
    connection.send(&OpenClaw::launch(2, "")).await.unwrap();
    while claw.launched.is_empty() {
        claw.message(&within(connection.next()).await.unwrap().unwrap());
    }
    let other = run(plane.addr, &mut Terminate::new("nonsense"), PATIENCE).await.unwrap();
    assert_eq!(other.exit, Some(1));
    connection.send(&OpenClaw::inject(&claw.launched[0], "go")).await.unwrap();
    while claw.turns < 2 {
        claw.message(&within(connection.next()).await.unwrap().unwrap());
    }
    assert_eq!(claw.rejections, Vec::<String>::new(), "another client's rejection is not its business");
    assert_eq!(claw.said.values().collect::<Vec<_>>(), ["echo: go", "echo: go"]);
}

#[tokio::test]
async fn what_is_not_there_answers_empty_or_says_so() {
    let plane = Plane::start(Knobs::default());
    let mut connection = plane.connect().await;
    let mut watcher = plane.connect().await;
    for (name, answer, key, empty) in
        [("queue_list", "queue_list", "items", json!([])), ("project_list", "project_list", "projects", json!({}))]
    {
        let ask = command(name, &json!({}));
        connection.send(&ask).await.unwrap();
        let got = within(connection.find(|event| event["data"]["request_id"] == id_of(&ask))).await.unwrap().unwrap();
        assert_eq!((&got["event"], &got["data"][key]), (&json!(answer), &empty));
        let updated = if name == "queue_list" { "queue_updated" } else { "projects_updated" };
        let got = within(watcher.find(|event| event["event"] == updated)).await.unwrap().unwrap();
        assert_eq!((&got["data"][key], &got["data"]["request_id"]), (&empty, &Value::Null));
    }
    for name in ["enqueue_inject", "project_create", "project_plan", "project_resume_preview", "make_coffee"] {
        let ask = command(name, &json!({}));
        connection.send(&ask).await.unwrap();
        let got = within(connection.find(|event| event["data"]["request_id"] == id_of(&ask))).await.unwrap().unwrap();
        assert_eq!(got["event"], "command_rejected", "{name}");
        assert!(got["data"]["reason"].as_str().is_some_and(|reason| !reason.is_empty()));
    }
}

#[tokio::test]
async fn approvals_are_listed_and_answered_once() {
    let plane = Plane::start(Knobs::default());
    let swarm = plane.fake.add_swarm(1);
    plane.fake.add_approval(&swarm, "call-1");
    let mut connection = plane.connect().await;
    let ask = command("approvals_list", &json!({}));
    connection.send(&ask).await.unwrap();
    let list = within(connection.find(|event| event["event"] == "approvals_list")).await.unwrap().unwrap();
    let approval = &list["data"]["approvals"][&swarm]["0"][0];
    assert_eq!((&approval["approval_status"], &approval["command"]), (&json!("pending"), &json!(["touch", "x"])));

    let answer =
        |call: &str| command("approve_execution", &json!({"job_id": "272900", "call_id": call, "approved": true}));
    let (first, second, wrong) = (answer("call-1"), answer("call-1"), answer("call-2"));
    for (ask, name) in
        [(&first, "exec_approval_submitted"), (&second, "exec_approval_resolved"), (&wrong, "command_rejected")]
    {
        connection.send(ask).await.unwrap();
        let got = within(connection.find(|event| event["data"]["request_id"] == id_of(ask))).await.unwrap().unwrap();
        assert_eq!(got["event"], name);
        match name {
            "exec_approval_resolved" => assert_eq!(got["data"]["idempotent"], true),
            "command_rejected" => assert_eq!(got["data"]["reason"], "unknown approval request"),
            _ => assert_eq!((&got["data"]["approved"], &got["data"]["node_id"]), (&json!(true), &json!(0))),
        }
    }
    // The event answered the first asker; the call must not have answered it again.
    let again = tokio::time::timeout(A_WHILE, connection.find(|event| event["data"]["request_id"] == id_of(&first)));
    assert!(again.await.is_err(), "answered twice");
    until(|| plane.fake.last_seq() == 1).await;
}
