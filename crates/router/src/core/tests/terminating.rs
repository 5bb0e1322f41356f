//! Ends: asked for, asked for twice, forced, and unasked.

use super::*;

fn ended(swarm: &SwarmId, nodes: u32, state: AllocationState, reason: &str) -> Allocation {
    let mut allocation = World::allocation(swarm, nodes);
    allocation.state = state;
    allocation.reason = reason.into();
    for node in &mut allocation.nodes {
        node.state = WorkerState::Exited;
    }
    allocation
}

#[test]
fn a_graceful_end_waits_for_turns_and_answers_everybody() {
    let mut world = World::new();
    let swarm = world.running(1);
    let token = world.inject("r1", &swarm, &[0], "x");
    let id = world.injections(token)[0].clone();
    world.deliver_all(&Outcome::Written);
    let outbox = World::outbox(&swarm, 0, 1);
    world.says(&outbox, "turn_started", Some(&id), json!({}));
    world.terminate("t1", &swarm, false);
    assert_eq!(world.last("swarm_status").1["status"], "terminating");
    assert!(world.releases.is_empty());
    let refused = world.inject("r2", &swarm, &[0], "y");
    assert_eq!(world.failure(refused).code, ErrorCode::SwarmOver);
    world.crash();
    world.says(&outbox, "assistant", Some(&id), json!({"content": "z"}));
    world.says(&outbox, "turn_complete", Some(&id), json!({"status": "completed"}));
    assert_eq!(world.releases.pop(), Some((swarm.clone(), false)));
    let orders = world.deliver_all(&Outcome::Written);
    assert!(matches!(orders[0].records[0].body, InboxBody::Control { kind: "shutdown", .. }));
    world.happen(Input::Released(swarm.clone(), Ok(true)));
    world.terminate("t2", &swarm, false);
    assert_eq!(world.releases.pop(), Some((swarm.clone(), true)), "asking again forces it");
    world.happen(Input::Released(swarm.clone(), Ok(true)));
    world.happen(Input::AllocationChanged(ended(&swarm, 1, AllocationState::Completed, "")));
    assert_eq!(world.status(&swarm), "terminated");
    let told: BTreeSet<String> = world
        .events
        .iter()
        .filter(|event| *event.name == *"swarm_terminated")
        .map(|event| serde_json::from_slice::<Value>(&event.data).unwrap()["request_id"].to_string())
        .collect();
    assert_eq!(told, BTreeSet::from(["\"t1\"".to_owned(), "\"t2\"".to_owned()]));
    let late = world.terminate("t3", &swarm, false);
    assert!(world.answers[&late].last().unwrap().is_last(), "one that is over is answered at once");
    assert_eq!(world.last("swarm_terminated").1["request_id"], "t3");
}

#[test]
fn a_turn_that_does_not_end_is_killed_after_the_timeout_and_closed_for_its_clients() {
    let mut world = World::new();
    let swarm = world.running(1);
    let token = world.inject("r1", &swarm, &[0], "x");
    let id = world.injections(token)[0].clone();
    world.deliver_all(&Outcome::Written);
    world.says(&World::outbox(&swarm, 0, 1), "turn_started", Some(&id), json!({}));
    world.terminate("t1", &swarm, false);
    world.pass(21 * SECOND);
    assert_eq!(world.releases.pop(), Some((swarm.clone(), true)));
    world.happen(Input::Released(swarm.clone(), Ok(true)));
    world.happen(Input::AllocationChanged(ended(&swarm, 1, AllocationState::Completed, "")));
    assert_eq!(world.status(&swarm), "terminating", "the last words may still be unread");
    world.pass(3 * SECOND);
    assert_eq!(world.status(&swarm), "terminated");
    let names = world.names();
    let end = names.iter().rposition(|name| *name == "turn_complete").unwrap();
    assert!(names[end + 1..].contains(&"swarm_terminated"), "prompts end before their swarm");
    assert_eq!(world.last("turn_complete").1["code"], "swarm_over");
    invariants::hold(&world.events);
}

#[test]
fn an_end_goes_on_after_restarts_until_the_allocator_has_taken_it() {
    let mut world = World::new();
    let swarm = world.running(1);
    world.terminate("t1", &swarm, true);
    assert_eq!(world.releases.pop(), Some((swarm.clone(), true)));
    world.happen(Input::Released(swarm.clone(), Err(Failure::new(ErrorCode::BackendUnavailable, "down"))));
    world.crash();
    assert_eq!(world.releases.pop(), Some((swarm.clone(), true)));
    world.happen(Input::Released(swarm.clone(), Ok(false)));
    world.pass(3 * SECOND);
    assert_eq!(world.status(&swarm), "terminated");
    assert_eq!(world.last("swarm_terminated").1["request_id"], "t1");
}

#[test]
fn a_launch_that_is_terminated_fails_and_its_late_allocation_is_given_back() {
    let mut world = World::new();
    world.launch("r1", LaunchSpec { node_count: 1, ..LaunchSpec::default() });
    let (swarm, _) = world.ensures.pop().unwrap();
    world.terminate("t1", &swarm, false);
    assert_eq!(world.releases.pop(), Some((swarm.clone(), false)));
    world.happen(Input::Released(swarm.clone(), Ok(false)));
    assert_eq!(world.status(&swarm), "terminating", "it may be in the making");
    world.happen(Input::Ensured(swarm.clone(), Ok(World::allocation(&swarm, 1))));
    world.pass(6 * SECOND);
    assert_eq!(world.releases.pop(), Some((swarm.clone(), true)));
    world.happen(Input::Released(swarm.clone(), Ok(false)));
    world.pass(3 * SECOND);
    assert_eq!(world.status(&swarm), "terminated");
    assert_eq!(world.count("swarm_launched"), 0);
}

#[test]
fn an_allocation_that_ends_by_itself_ends_the_swarm_with_its_reason() {
    let mut world = World::new();
    let swarm = world.running(1);
    let token = world.inject("r1", &swarm, &[0], "x");
    let id = world.injections(token)[0].clone();
    world.deliver_all(&Outcome::Written);
    let outbox = World::outbox(&swarm, 0, 1);
    // Written before the end, read after it.
    world.write(&outbox, "turn_started", Some(&id), json!({}));
    world.write(&outbox, "assistant", Some(&id), json!({"content": "in time"}));
    world.write(&outbox, "turn_complete", Some(&id), json!({"status": "completed"}));
    world.write(&outbox, "worker_bye", None, json!({"reason": "walltime"}));
    world.happen(Input::AllocationChanged(ended(&swarm, 1, AllocationState::Failed, "TIMEOUT")));
    while world.ship(&outbox, 1) {}
    assert_eq!(world.status(&swarm), "terminated");
    assert_eq!(world.last("turn_complete").1["status"], "completed");
    let data = world.last("swarm_terminated").1;
    assert_eq!((&data["reason"], &data["request_id"]), (&json!("TIMEOUT"), &Value::Null));
    invariants::hold(&world.events);
}

#[test]
fn an_ended_swarm_is_kept_exactly_as_long_as_configured() {
    for keep in [0, SECOND, 7 * SECOND, 45 * SECOND] {
        let mut world = World::new();
        world.core.book.settings.keep_ended = keep;
        let swarm = world.running(1);
        world.terminate("t1", &swarm, true);
        world.happen(Input::Released(swarm.clone(), Ok(false)));
        let ended = world.last("swarm_terminated").0.at;
        world.take(Input::Tick);
        world.now = world.now.max(ended + keep.saturating_sub(SECOND / 10));
        world.happen(Input::Tick);
        assert_eq!(world.core.by_id.contains_key(&swarm), keep > 0, "{keep}");
        world.now = ended + keep;
        world.happen(Input::Tick);
        assert!(!world.core.by_id.contains_key(&swarm), "{keep}");
        assert_eq!(world.count("swarm_removed"), 1, "{keep}");
    }
}

#[test]
fn a_swarm_that_ended_long_ago_is_forgotten_with_its_mailbox() {
    let mut world = World::new();
    let swarm = world.running(1);
    world.terminate("t1", &swarm, true);
    world.happen(Input::Released(swarm.clone(), Ok(false)));
    world.pass(SECOND);
    assert_eq!(world.status(&swarm), "terminated");
    world.now += 60 * MINUTE;
    world.pass(SECOND);
    assert_eq!(world.last("swarm_removed").1["swarm_id"], swarm.as_str());
    assert_eq!(world.removed, std::slice::from_ref(&swarm));
    world.crash();
    assert_eq!(world.removed.len(), 2, "asked for until it is done");
    world.happen(Input::MailboxRemoved(swarm.clone()));
    world.crash();
    assert_eq!(world.removed.len(), 2);
    assert!(world.core.swarms.is_empty());
    let seq = world.events.last().unwrap().seq;
    world.launch("r9", LaunchSpec { node_count: 1, ..LaunchSpec::default() });
    assert_eq!(world.events.last().unwrap().seq, seq + 1);
}
