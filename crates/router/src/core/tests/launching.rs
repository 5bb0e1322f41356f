//! Launches: every way to come up, and every way not to.

use super::*;

fn spec(nodes: u32) -> LaunchSpec {
    LaunchSpec { node_count: nodes, ..LaunchSpec::default() }
}

#[test]
fn a_launch_is_recorded_first_and_its_prompt_comes_last() {
    let mut world = World::new();
    let token =
        world.launch("r1", LaunchSpec { node_count: 2, system_prompt: "be kind".into(), ..LaunchSpec::default() });
    assert_eq!(world.names(), ["swarm_launch_progress"]);
    assert_eq!(world.last("swarm_launch_progress").1["stage"], "queued");
    let (swarm, asked) = world.ensures.pop().unwrap();
    assert_eq!(asked.agent, "echo", "the default agent is settled before anybody is asked");
    world.happen(Input::AllocatorProgress {
        swarm: swarm.clone(),
        stage: "starting".into(),
        message: "2 workers".into(),
    });
    world.happen(Input::Ensured(swarm.clone(), Ok(World::allocation(&swarm, 2))));
    for node in 0..2 {
        assert_eq!(world.status(&swarm), "launching");
        assert!(world.hot.contains(&(swarm.clone(), node)), "its hello is waited for");
        world.says(&World::outbox(&swarm, node, 1), "worker_hello", None, json!({"host": "n"}));
    }
    let names = world.names();
    let launched = names.iter().position(|name| *name == "swarm_launched").unwrap();
    assert_eq!(names[..launched].iter().filter(|name| **name != "worker_hello").collect::<BTreeSet<_>>().len(), 1);
    assert_eq!(names[launched + 1..], ["inject_ack", "inject_ack"]);
    let data = world.last("swarm_launched").1;
    assert_eq!((&data["request_id"], &data["job_id"], &data["node_count"]), (&json!("r1"), &json!("job-1"), &json!(2)));
    assert_eq!((&data["provider"], &data["agent_runtime"]), (&json!("local"), &json!("echo")));
    assert_eq!(world.last("inject_ack").1, json!({"request_id": "r1", "prompt": "be kind"}));
    assert!(matches!(world.answers[&token][..], [Step::Launch(_)]));
    assert_eq!(world.deliver_all(&Outcome::Written).len(), 2);
    assert_eq!(world.count("inject_delivered"), 2);
}

#[test]
fn a_swarm_that_is_up_before_the_allocators_answer_stays_up() {
    let mut world = World::new();
    world.launch("r1", spec(1));
    let (swarm, _) = world.ensures.pop().unwrap();
    world.happen(Input::AllocationChanged(World::allocation(&swarm, 1)));
    world.says(&World::outbox(&swarm, 0, 1), "worker_hello", None, json!({}));
    assert_eq!(world.status(&swarm), "running");
    world.happen(Input::Ensured(swarm.clone(), Ok(World::allocation(&swarm, 1))));
    world.pass(30 * SECOND);
    assert_eq!((world.status(&swarm).as_str(), world.releases.len(), world.ensures.len()), ("running", 0, 0));
}

#[test]
fn a_repeated_launch_answers_with_the_same_swarm_also_after_a_restart() {
    let mut world = World::new();
    world.launch("r1", spec(1));
    world.launch("r1", spec(1));
    world.crash();
    world.launch("r1", spec(1));
    assert_eq!(world.core.swarms.len(), 1);
    assert!(world.ensures.iter().all(|(swarm, _)| *swarm == world.ensures[0].0), "one swarm is asked for");
    assert_eq!(world.ensures.len(), 2, "once, and again after the restart");
    let other = world.launch("r1", spec(2));
    assert_eq!(world.failure(other).code, ErrorCode::RequestReused);
}

#[test]
fn what_makes_no_sense_is_refused_before_anything_is_recorded() {
    let mut world = World::new();
    let skill = |path: &str| drover_proto::common::SkillFile { path: path.into(), content: String::new() };
    for (wrong, named) in [
        (spec(0), "1 to"),
        (spec(1_000_000), "1 to"),
        (LaunchSpec { agent: "codx".into(), ..spec(1) }, "codex"),
        (LaunchSpec { skills: vec![skill("../x")], ..spec(1) }, "../x"),
        (LaunchSpec { skills: vec![skill("/etc/x")], ..spec(1) }, "/etc/x"),
    ] {
        let token = world.launch("r", wrong);
        let failure = world.failure(token);
        assert_eq!(failure.code, ErrorCode::InvalidRequest);
        assert!(failure.message.contains(named), "{failure}");
    }
    assert!(world.events.is_empty() && world.core.swarms.is_empty());
}

#[test]
fn an_allocator_that_does_not_answer_delays_a_launch_and_a_refusal_ends_it() {
    let mut world = World::new();
    world.launch("r1", spec(1));
    for _ in 0..3 {
        let (swarm, _) = world.ensures.pop().unwrap();
        let down = Failure::new(ErrorCode::BackendUnavailable, "connection refused");
        world.happen(Input::AllocatorDown("connection refused".into()));
        world.happen(Input::Ensured(swarm.clone(), Err(down)));
        assert!(world.ensures.is_empty(), "not at once");
        assert_eq!(world.status(&swarm), "launching");
        let why = world.core.explanation(swarm.as_str(), world.now).unwrap();
        assert!(why.because.iter().any(|line| line.contains("connection refused")), "{why:?}");
        assert!(!why.next.is_empty());
        world.pass(11 * SECOND);
    }
    let (swarm, _) = world.ensures.pop().unwrap();
    world.happen(Input::Ensured(swarm.clone(), Err(Failure::new(ErrorCode::LaunchFailed, "partition is required"))));
    assert_eq!(world.status(&swarm), "failed");
    let data = world.last("swarm_launch_failed").1;
    assert_eq!((&data["reason"], &data["request_id"]), (&json!("partition is required"), &Value::Null));
    assert_eq!(world.releases, [(swarm.clone(), true)], "what it may have is given back");
    let again = world.launch("r1", spec(1));
    assert_eq!(world.failure(again).message, "partition is required");
}

#[test]
fn a_missing_codex_fails_the_launch_at_once_and_names_the_way_out() {
    let mut world = World::new();
    world.launch("r1", spec(2));
    let (swarm, _) = world.ensures.pop().unwrap();
    world.happen(Input::Ensured(swarm.clone(), Ok(World::allocation(&swarm, 2))));
    let error = json!({"code": "codex_missing", "message": "no codex on PATH", "hint": "install it", "fatal": true});
    world.says(&World::outbox(&swarm, 0, 1), "worker_error", None, error.clone());
    assert_eq!(world.status(&swarm), "launching", "the other node may still come up");
    world.says(&World::outbox(&swarm, 1, 1), "worker_error", None, error);
    assert_eq!(world.status(&swarm), "failed");
    let data = world.last("swarm_launch_failed").1;
    assert_eq!(data["code"], "codex_missing");
    assert!(data["hint"].as_str().unwrap().contains("--agent echo"), "{data}");
    assert_eq!(world.releases, [(swarm, true)]);
}

#[test]
fn a_launch_goes_on_without_the_nodes_that_stay_away_and_gets_them_back() {
    let mut world = World::new();
    world.launch("r1", spec(3));
    let (swarm, _) = world.ensures.pop().unwrap();
    world.happen(Input::Ensured(swarm.clone(), Ok(World::allocation(&swarm, 3))));
    world.says(&World::outbox(&swarm, 0, 1), "worker_hello", None, json!({}));
    world.pass(59 * SECOND);
    assert_eq!(world.status(&swarm), "launching");
    world.pass(2 * SECOND);
    assert_eq!(world.status(&swarm), "degraded");
    let why = world.core.explanation(swarm.as_str(), world.now).unwrap();
    assert!(why.because[0].contains("1 of 3 nodes up"), "{why:?}");
    world.says(&World::outbox(&swarm, 1, 1), "worker_hello", None, json!({}));
    world.says(&World::outbox(&swarm, 2, 1), "worker_hello", None, json!({}));
    assert_eq!(world.status(&swarm), "running");
    assert_eq!(world.last("swarm_state").1["previous"], "degraded");
}

#[test]
fn a_launch_that_nobody_reports_from_fails_after_the_hard_timeout_but_a_queue_has_none() {
    let mut world = World::new();
    world.launch("r1", spec(1));
    let (swarm, _) = world.ensures.pop().unwrap();
    let mut pending = World::allocation(&swarm, 1);
    pending.state = AllocationState::Pending;
    pending.backend_state = "PENDING".into();
    pending.reason = "Priority".into();
    pending.nodes.clear();
    world.happen(Input::Ensured(swarm.clone(), Ok(pending)));
    world.pass(10 * MINUTE);
    assert_eq!(world.status(&swarm), "launching");
    let why = world.core.explanation(swarm.as_str(), world.now).unwrap();
    assert!(why.because[0].contains("PENDING") && why.because[0].contains("Priority"), "{why:?}");
    world.happen(Input::AllocationChanged(World::allocation(&swarm, 1)));
    world.pass(3 * MINUTE + SECOND);
    assert_eq!(world.status(&swarm), "failed");
}

#[test]
fn a_failing_backend_changes_no_status_and_only_a_whole_snapshot_ends_a_swarm() {
    let mut world = World::new();
    let swarm = world.running(1);
    world.happen(Input::AllocatorDown("hung".into()));
    world.pass(60 * MINUTE);
    assert_eq!(world.status(&swarm), "running");
    // A snapshot that was begun before the allocation was confirmed says nothing about it.
    world.happen(Input::AllocatorSnapshot { begun_at: 1, allocations: Vec::new() });
    assert_eq!(world.status(&swarm), "running");
    world.happen(Input::AllocatorSnapshot { begun_at: world.now, allocations: vec![World::allocation(&swarm, 1)] });
    assert_eq!(world.status(&swarm), "running");
    world.happen(Input::AllocatorSnapshot { begun_at: world.now, allocations: Vec::new() });
    world.pass(3 * SECOND);
    assert_eq!(world.status(&swarm), "terminated");
    assert!(world.last("swarm_terminated").1["reason"].as_str().unwrap().contains("no longer knows"));
}

#[test]
fn a_launch_in_flight_is_asked_for_again_after_a_restart() {
    let mut world = World::new();
    world.launch("r1", spec(1));
    let (swarm, _) = world.ensures.pop().unwrap();
    world.crash();
    assert_eq!(world.ensures.pop().unwrap().0, swarm);
    world.happen(Input::Ensured(swarm.clone(), Ok(World::allocation(&swarm, 1))));
    world.crash();
    world.says(&World::outbox(&swarm, 0, 1), "worker_hello", None, json!({}));
    assert_eq!(world.status(&swarm), "running");
    assert_eq!(world.count("swarm_launched"), 1);
}

#[test]
fn the_first_word_of_a_launch_names_where_it_goes() {
    let mut world = World::new();
    let token = world.token();
    let place = Some(crate::core::input::LaunchPlace { backend: "local".into(), provider: "here".into() });
    let order = LaunchOrder { request_id: "r1".into(), spec: spec(1), trace: String::new(), place, prior: None };
    world.happen(Input::Launch(token, Box::new(order)));
    let queued = world.last("swarm_launch_progress").1;
    assert_eq!(
        (&queued["stage"], &queued["provider"], &queued["provider_id"]),
        (&json!("queued"), &json!("local"), &json!("here"))
    );
    let (swarm, asked) = world.ensures.pop().unwrap();
    assert_eq!(asked.provider, "", "the allocator is asked for what was asked for");
    world.happen(Input::AllocatorProgress { swarm, stage: "starting".into(), message: "1 worker".into() });
    assert_eq!(world.last("swarm_launch_progress").1["provider"], "local");
}

#[test]
fn the_backends_word_on_a_launch_that_failed_goes_on() {
    let mut world = World::new();
    world.launch("r1", spec(1));
    let (swarm, _) = world.ensures.pop().unwrap();
    world.happen(Input::Ensured(swarm.clone(), Ok(World::allocation(&swarm, 1))));
    let error = json!({"code": "codex_missing", "message": "no codex on PATH", "hint": "install it", "fatal": true});
    world.says(&World::outbox(&swarm, 0, 1), "worker_error", None, error);
    let shown = |world: &World| world.core.swarms[&world.core.by_id[&swarm]].view().swarm.slurm_state;
    assert_eq!((world.status(&swarm).as_str(), shown(&world).as_str()), ("failed", "RUNNING"));
    let mut ending = World::allocation(&swarm, 1);
    ending.backend_state = "COMPLETING".into();
    world.happen(Input::AllocationChanged(ending.clone()));
    assert_eq!(shown(&world), "COMPLETING");
    // The last word was missed: what the backend no longer has does not run.
    world.crash();
    world.happen(Input::AllocatorSnapshot { begun_at: world.now, allocations: Vec::new() });
    assert_eq!((shown(&world).as_str(), world.status(&swarm).as_str()), ("COMPLETED", "failed"));
}
