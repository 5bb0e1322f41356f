//! Prompts, the records of their turns, approvals, and workers that come back.

use super::*;

fn turn(world: &mut World, outbox: &OutboxId, id: &InjectionId) {
    world.says(outbox, "turn_started", Some(id), json!({}));
    world.says(outbox, "assistant_delta", Some(id), json!({"content": id.as_str()}));
    world.says(outbox, "assistant", Some(id), json!({"content": "done"}));
    world.says(outbox, "turn_complete", Some(id), json!({"status": "completed"}));
}

/// A worker of a later generation has taken over.
fn restart(world: &mut World, swarm: &SwarmId, nodes: u32, node: u32, generation: u32) -> OutboxId {
    let mut allocation = World::allocation(swarm, nodes);
    let told = &mut allocation.nodes[node as usize];
    told.generation = generation;
    told.reason = "killed by signal 9".into();
    told.restarts = generation - 1;
    world.happen(Input::AllocationChanged(allocation));
    World::outbox(swarm, node, generation)
}

#[test]
fn a_prompt_goes_its_way_and_its_events_follow_its_acknowledgement() {
    let mut world = World::new();
    let swarm = world.running(2);
    let token = world.inject("r1", &swarm, &[1], "hello");
    let [id] = &world.injections(token)[..] else { panic!() };
    let id = id.clone();
    assert_eq!(world.last("inject_ack").1, json!({"request_id": "r1", "prompt": "hello"}));
    let order = world.deliver_all(&Outcome::Written);
    assert!(matches!(&order[0].records[0].body, InboxBody::Inject(request) if &*request.content == "hello"));
    assert_eq!((order[0].node, &*order[0].job, order[0].generation), (NodeIndex(1), "job-1", 1));
    let outbox = World::outbox(&swarm, 1, 1);
    world.says(&outbox, "turn_started", Some(&id), json!({}));
    assert_eq!(world.node_state(&swarm, 1), "busy");
    assert!(world.hot.contains(&(swarm.clone(), 1)));
    turn(&mut world, &outbox, &id);
    assert_eq!(world.node_state(&swarm, 1), "idle");
    assert!(!world.hot.contains(&(swarm.clone(), 1)), "a quiet node is looked at seldom");
    assert!(!world.core.book.injections.contains_key(&id), "what has ended leaves the memory");
    invariants::hold(&world.events);
}

#[test]
fn repeating_a_request_runs_nothing_again() {
    let mut world = World::new();
    let swarm = world.running(2);
    let first = world.inject("r1", &swarm, &[], "hello");
    let second = world.inject("r1", &swarm, &[1, 0], "hello");
    assert_eq!(world.injections(first), world.injections(second));
    let ids = world.injections(first);
    world.deliver_all(&Outcome::Written);
    turn(&mut world, &World::outbox(&swarm, 0, 1), &ids[0]);
    world.crash();
    let third = world.inject("r1", &swarm, &[], "hello");
    assert_eq!(world.injections(third), ids, "also when a part of it has ended and the router was restarted");
    assert_eq!(world.count("inject_ack"), 2);
    for (nodes, content) in [(&[0][..], "hello"), (&[], "other")] {
        let token = world.inject("r1", &swarm, nodes, content);
        assert_eq!(world.failure(token).code, ErrorCode::RequestReused);
    }
    // Twice in one batch, before anything is on disk.
    let (a, b) = (world.token(), world.token());
    let order = world.inject_order("r2", &swarm, &[0], "again");
    world.take(Input::Inject(a, Box::new(order.clone())));
    world.take(Input::Inject(b, Box::new(order)));
    world.commit();
    assert_eq!(world.injections(a), world.injections(b));
    invariants::hold(&world.events);
}

#[test]
fn a_chosen_injection_id_names_one_prompt_for_ever() {
    let mut world = World::new();
    let swarm = world.running(2);
    let chosen: InjectionId = "mine-1".parse().unwrap();
    let send = |world: &mut World, request: &str, nodes: &[u32], content: &str| {
        let token = world.token();
        let mut order = world.inject_order(request, &swarm, nodes, content);
        order.prior_injection = world.disk.prior_injection("mine-1");
        order.injection_id = Some(chosen.clone());
        world.happen(Input::Inject(token, Box::new(order)));
        token
    };
    let first = send(&mut world, "r1", &[0], "x");
    assert_eq!(world.injections(first), std::slice::from_ref(&chosen));
    let again = send(&mut world, "r2", &[0], "x");
    assert_eq!(world.injections(again), std::slice::from_ref(&chosen));
    for (nodes, content) in [(&[1][..], "x"), (&[0], "y")] {
        let token = send(&mut world, "r3", nodes, content);
        assert_eq!(world.failure(token).code, ErrorCode::RequestReused);
    }
    let token = send(&mut world, "r4", &[], "x");
    assert_eq!(world.failure(token).code, ErrorCode::InvalidRequest);
    assert_eq!(world.count("inject_ack"), 1);
}

#[test]
fn wrong_targets_are_named() {
    let mut world = World::new();
    let swarm = world.running(2);
    let token = world.inject("r", &swarm, &[2], "x");
    let failure = world.failure(token);
    assert_eq!(failure.code, ErrorCode::NodeOutOfRange);
    assert!(failure.hint.contains("0 to 1"), "{failure:?}");
    let token = world.inject("r", &"nobody".parse().unwrap(), &[], "x");
    assert_eq!(world.failure(token).message, "unknown swarm_id");
    let prefix: SwarmId = swarm.as_str()[..8].parse().unwrap();
    let token = world.inject("r", &prefix, &[0], "x");
    assert_eq!(world.injections(token).len(), 1, "the beginning of an id will do");
}

#[test]
fn an_uncertain_delivery_is_repeated_and_never_called_failed() {
    let mut world = World::new();
    let swarm = world.running(1);
    world.inject("r1", &swarm, &[0], "one");
    let mut seqs = BTreeSet::new();
    for _ in 0..20 {
        for order in world.deliver_all(&Outcome::Uncertain("timed out".into())) {
            seqs.extend(order.records.iter().map(|record| record.seq));
        }
        assert!(world.deliveries.is_empty(), "not at once");
        world.pass(6 * SECOND);
    }
    for _ in 0..30 {
        world.deliver_all(&Outcome::Refused("disk full".into()));
        world.pass(6 * SECOND);
    }
    assert_eq!(seqs.len(), 1, "always under the same number, so that it runs once");
    assert_eq!((world.count("inject_failed"), world.count("inject_delivered")), (0, 0));
    world.deliver_all(&Outcome::Written);
    assert_eq!(world.count("inject_delivered"), 1);
}

#[test]
fn a_delivery_refused_for_good_fails_and_the_next_goes_on() {
    let mut world = World::new();
    let swarm = world.running(1);
    world.inject("r1", &swarm, &[0], "one");
    world.pass(SECOND);
    world.inject("r2", &swarm, &[0], "two");
    for _ in 0..12 {
        world.deliver_all(&Outcome::Refused("no such directory".into()));
        world.pass(6 * SECOND);
    }
    assert_eq!(world.count("inject_failed"), 1);
    let data = world.last("inject_failed").1;
    assert_eq!((&data["request_id"], &data["error"]), (&json!("r1"), &json!("no such directory")));
    world.deliver_all(&Outcome::Written);
    assert_eq!(world.last("inject_delivered").1["request_id"], "r2");
    invariants::hold(&world.events);
}

#[test]
fn two_deliveries_to_a_node_are_never_under_way_at_once() {
    let mut world = World::new();
    let swarm = world.running(1);
    for n in 0..5 {
        world.inject(&format!("r{n}"), &swarm, &[0], "x");
        assert_eq!(world.deliveries.len(), 1);
    }
    let orders = world.deliver_all(&Outcome::Written);
    let seqs: Vec<u64> = orders.iter().flat_map(|order| order.records.iter().map(|record| record.seq)).collect();
    assert_eq!(seqs, [1, 2, 3, 4, 5], "in order, each once");
}

#[test]
fn records_that_come_again_or_with_a_gap_are_taken_once() {
    let mut world = World::new();
    let swarm = world.running(1);
    let token = world.inject("r1", &swarm, &[0], "x");
    let id = world.injections(token)[0].clone();
    world.deliver_all(&Outcome::Written);
    let outbox = World::outbox(&swarm, 0, 1);
    for n in 0..6 {
        world.write(&outbox, "assistant_delta", Some(&id), json!({ "content": n }));
    }
    let start = world.following[&outbox].offset;
    let whole = |world: &mut World| world.ship_from(&outbox, start, 4).unwrap();
    let behind = world.ship_from(&outbox, start + 5, 1).unwrap();
    world.happen(Input::Records(behind));
    assert_eq!(world.count("assistant_delta"), 0, "a gap is not jumped");
    assert_eq!(world.following[&outbox].offset, start, "what is missing is asked for again");
    // That did not help, as when a network file system shows it an old end once more: it is asked for until it comes.
    for _ in 0..3 {
        let behind = world.ship_from(&outbox, start + 5, 1).unwrap();
        world.happen(Input::Records(behind));
        world.following.remove(&outbox);
        world.pass(2 * SECOND);
        assert_eq!(world.following[&outbox].offset, start);
    }
    for _ in 0..2 {
        let chunk = whole(&mut world);
        world.happen(Input::Records(chunk));
    }
    let overlapping = world.ship_from(&outbox, start + 2, 4).unwrap();
    world.happen(Input::Records(overlapping));
    assert_eq!(world.count("assistant_delta"), 6);
    world.crash();
    assert_eq!(world.following[&outbox].offset, start + 6, "a restarted router reads on where it was");
    invariants::hold(&world.events);
}

#[test]
fn usage_that_says_nothing_new_is_dropped() {
    let mut world = World::new();
    let swarm = world.running(1);
    let token = world.inject("r1", &swarm, &[0], "x");
    let id = world.injections(token)[0].clone();
    let outbox = World::outbox(&swarm, 0, 1);
    for total in [5, 5, 9, 9, 5] {
        world.says(&outbox, "usage", Some(&id), json!({ "total_tokens": total }));
    }
    assert_eq!(world.count("usage"), 3);
}

#[test]
fn a_worker_that_comes_back_settles_what_was_lost_and_late_words_are_fenced() {
    let mut world = World::new();
    let swarm = world.running(1);
    let token = world.inject("r1", &swarm, &[0], "x");
    let id = world.injections(token)[0].clone();
    world.deliver_all(&Outcome::Written);
    let old = World::outbox(&swarm, 0, 1);
    world.says(&old, "turn_started", Some(&id), json!({}));
    let new = restart(&mut world, &swarm, 1, 0, 2);
    let (event, data) = world.last("node_restarted");
    assert_eq!((event.node, &data["generation"], &data["restarts"]), (Some(0), &json!(2), &json!(1)));
    assert_eq!(data["reason"], "killed by signal 9");
    assert_eq!((world.status(&swarm).as_str(), world.node_state(&swarm, 0).as_str()), ("degraded", "starting"));
    world.says(&new, "worker_hello", None, json!({}));
    assert_eq!(world.status(&swarm), "running");
    world.says(&new, "assistant", Some(&id), json!({"content": ""}));
    // The new worker has spoken of it: what the old one said is history, even while nothing has ended.
    world.says(&old, "turn_complete", Some(&id), json!({"status": "completed"}));
    assert!(world.core.book.injections.contains_key(&id));
    world.says(&new, "turn_complete", Some(&id), json!({"status": "failed", "code": "turn_lost", "error": "killed"}));
    // Words of the old worker that were still unread.
    world.says(&old, "assistant_delta", Some(&id), json!({"content": "late"}));
    world.says(&old, "turn_complete", Some(&id), json!({"status": "completed"}));
    assert_eq!(world.last("assistant_delta").1, json!({"fenced": true, "content": "late"}));
    assert_eq!(world.count("turn_complete"), 1, "the first last word counts");
    invariants::hold(&world.events);
}

#[test]
fn a_late_result_counts_while_no_later_worker_has_spoken_of_the_prompt() {
    let mut world = World::new();
    let swarm = world.running(1);
    let token = world.inject("r1", &swarm, &[0], "x");
    let id = world.injections(token)[0].clone();
    world.deliver_all(&Outcome::Written);
    let old = World::outbox(&swarm, 0, 1);
    let new = restart(&mut world, &swarm, 1, 0, 2);
    world.says(&new, "worker_hello", None, json!({}));
    world.says(&old, "turn_started", Some(&id), json!({}));
    assert_eq!(world.node_state(&swarm, 0), "idle", "it is not the present worker that runs it");
    world.says(&old, "assistant", Some(&id), json!({"content": "made it"}));
    world.says(&old, "turn_complete", Some(&id), json!({"status": "completed"}));
    assert_eq!(world.last("turn_complete").1, json!({"status": "completed"}));
    world.says(&old, "thread_status", None, json!({}));
    assert_eq!(world.last("thread_status").1, json!({"fenced": true}));
    invariants::hold(&world.events);
}

#[test]
fn a_node_that_is_given_up_ends_its_prompts_once_for_everybody() {
    let mut world = World::new();
    let swarm = world.running(2);
    let token = world.inject("r1", &swarm, &[0], "x");
    let running = world.injections(token)[0].clone();
    world.deliver_all(&Outcome::Written);
    world.says(&World::outbox(&swarm, 0, 1), "turn_started", Some(&running), json!({}));
    world.inject("r2", &swarm, &[0], "y");
    world.deliveries.clear();
    let mut allocation = World::allocation(&swarm, 2);
    allocation.nodes[0].state = WorkerState::Failed;
    allocation.nodes[0].reason = "died 5 times".into();
    world.happen(Input::AllocationChanged(allocation));
    assert_eq!(world.last("node_failed").1["reason"], "died 5 times");
    assert_eq!(world.status(&swarm), "degraded");
    assert_eq!(world.count("turn_complete"), 0, "its last words may still be unread");
    world.pass(3 * SECOND);
    assert_eq!(world.last("turn_complete").1["status"], "failed");
    assert_eq!(world.last("turn_complete").1["code"], "turn_lost");
    assert_eq!(world.last("inject_failed").1["request_id"], "r2");
    let token = world.inject("r3", &swarm, &[0], "z");
    assert_eq!(world.answers[&token].len(), 2, "acknowledged and failed in one go");
    assert!(world.last("inject_failed").1["error"].as_str().unwrap().contains("died 5 times"));
    world.says(&World::outbox(&swarm, 0, 1), "turn_complete", Some(&running), json!({"status": "completed"}));
    invariants::hold(&world.events);
}

#[test]
fn the_first_answer_to_an_approval_counts() {
    let mut world = World::new();
    let swarm = world.running(1);
    let token = world.inject("r1", &swarm, &[0], "x");
    let id = world.injections(token)[0].clone();
    world.deliver_all(&Outcome::Written);
    let outbox = World::outbox(&swarm, 0, 1);
    let asked = json!({"approval_id": "a1", "call_id": "c1", "command": "rm -rf x"});
    world.says(&outbox, "exec_approval_required", Some(&id), asked);
    let version = world.last("exec_approval_required").1["approvals_version"].as_u64().unwrap();
    assert_eq!(world.core.waiting_approvals()[0].status, "pending");
    let answer = |world: &mut World, approved| {
        let token = world.token();
        let order = ResolveOrder { job_id: "job-1".into(), call_id: "c1".into(), approved, ..ResolveOrder::default() };
        world.happen(Input::Resolve(token, order));
        match world.plain.remove(&token).unwrap().unwrap() {
            Answer::Resolved(answer) => *answer,
            Answer::Interrupted(_) => panic!(),
        }
    };
    let first = answer(&mut world, false);
    assert!(!first.already_resolved);
    world.crash();
    let second = answer(&mut world, true);
    assert!(second.already_resolved);
    assert_eq!(second.approval.unwrap().status, "denied_pending_ack");
    assert_eq!(world.count("exec_approval_submitted"), 1);
    let orders = world.deliver_all(&Outcome::Written);
    let last = orders.last().unwrap().records.last().unwrap();
    let InboxBody::Control { kind: "approval", data } = &last.body else { panic!("{last:?}") };
    let data: Value = serde_json::from_str(data).unwrap();
    assert_eq!(
        (&data["approved"], &data["decision"], &data["call_id"]),
        (&json!(false), &json!("decline"), &json!("c1"))
    );
    world.says(&outbox, "exec_approval_resolved", Some(&id), json!({"approval_id": "a1", "source": "router"}));
    assert!(world.core.waiting_approvals().is_empty());
    assert!(world.last("exec_approval_resolved").1["approvals_version"].as_u64().unwrap() > version);
}

#[test]
fn two_questions_of_one_name_are_answered_each_for_itself() {
    let mut world = World::new();
    let swarm = world.running(3);
    let token = world.inject("r1", &swarm, &[], "x");
    let ids = world.injections(token);
    world.deliver_all(&Outcome::Written);
    let asked = json!({"approval_id": "a1", "call_id": "c1"});
    for (node, id) in ids.iter().enumerate() {
        let outbox = World::outbox(&swarm, node as u32, 1);
        world.says(&outbox, "exec_approval_required", Some(id), asked.clone());
        // The same question once more, as older app-servers ask it.
        world.says(&outbox, "exec_approval_required", Some(id), asked.clone());
    }
    assert_eq!(world.count("exec_approval_required"), 3, "one of each node");
    let waiting = world.core.waiting_approvals();
    let names: BTreeSet<&str> = waiting.iter().map(|approval| approval.approval_id.as_str()).collect();
    assert_eq!((waiting.len(), names.len()), (3, 3), "{waiting:?}");

    world.crash();
    for node in [2_u32, 0, 1] {
        let name = waiting.iter().find(|approval| approval.node_id == node).unwrap().approval_id.clone();
        let approved = node == 1;
        let token = world.token();
        let order = ResolveOrder { approval_id: name.clone(), approved, ..ResolveOrder::default() };
        world.happen(Input::Resolve(token, order));
        let orders = world.deliver_all(&Outcome::Written);
        let [order] = &orders[..] else { panic!("{orders:?}") };
        assert_eq!(order.node.0, node, "the answer reaches the node that asked");
        let InboxBody::Control { kind: "approval", data } = &order.records.last().unwrap().body else { panic!() };
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!((&data["approval_id"], &data["approved"]), (&json!("a1"), &json!(approved)), "in its own words");
        let settled = json!({"approval_id": "a1", "call_id": "c1", "approved": approved, "source": "router"});
        world.says(&World::outbox(&swarm, node, 1), "exec_approval_resolved", Some(&ids[node as usize]), settled);
        assert_eq!(world.last("exec_approval_resolved").1["approval_id"], name.as_str(), "in ours");
        assert!(world.core.waiting_approvals().iter().all(|approval| approval.approval_id != name));
    }
    assert!(world.core.waiting_approvals().is_empty());

    // Settled, and asked again under the old name by the next worker of the node.
    restart(&mut world, &swarm, 3, 0, 2);
    let token = world.inject("r2", &swarm, &[0], "y");
    let id = world.injections(token)[0].clone();
    world.says(&World::outbox(&swarm, 0, 2), "exec_approval_required", Some(&id), asked);
    assert_eq!(world.core.waiting_approvals().len(), 1, "a new question is no old one");
}

#[test]
fn a_workers_time_is_told_and_a_clock_that_cannot_be_right_is_not() {
    let mut world = World::new();
    let swarm = world.running(1);
    let outbox = World::outbox(&swarm, 0, 1);
    let created = world.core.swarms[&world.core.by_id[&swarm]].facts.created;
    let turn = |world: &mut World, begun: Micros, ended: Micros| {
        let token = world.inject(&format!("{begun}-{ended}"), &swarm, &[0], "x");
        let id = world.injections(token)[0].clone();
        world.deliver_all(&Outcome::Written);
        world.says_at(begun, &outbox, "turn_started", Some(&id));
        let explained = world.core.explanation(id.as_str(), world.now).unwrap().because.join(" ");
        let told = world.last("turn_started").0.happened;
        world.says_at(ended, &outbox, "turn_complete", Some(&id));
        (told, world.last("turn_complete").0.happened, explained)
    };
    // The router was away for ten minutes; the turn took two of them.
    world.pass(10 * MINUTE);
    let now = world.now;
    let (begun, ended, why) = turn(&mut world, now - 9 * MINUTE, now - 7 * MINUTE);
    assert_eq!((begun, ended), (now - 9 * MINUTE, now - 7 * MINUTE));
    assert!(why.contains("begun 9 min ago"), "{why}");
    // An hour ahead, and a day behind.
    for absurd in [now + 60 * MINUTE, created - 1, 0, Micros::MAX] {
        let before = world.now;
        let (begun, ended, _) = turn(&mut world, absurd, absurd);
        assert!(before < begun && begun < ended && ended <= world.now, "{absurd}: {begun} {ended}");
    }
    // However the clocks go, times of storing do not go back, and both survive on disk.
    assert!(world.events.is_sorted_by_key(|event| event.at));
    let stored = world.disk.times();
    let told: Vec<(u64, u64)> = world.events.iter().map(|event| (event.at, event.happened)).collect();
    assert_eq!(stored, told);
}

#[test]
fn an_approval_ends_with_its_turn() {
    let mut world = World::new();
    let swarm = world.running(1);
    let token = world.inject("r1", &swarm, &[0], "x");
    let id = world.injections(token)[0].clone();
    let outbox = World::outbox(&swarm, 0, 1);
    world.says(&outbox, "exec_approval_required", Some(&id), json!({"approval_id": "a1", "call_id": "c1"}));
    let why = world.core.explanation(id.as_str(), world.now).unwrap();
    assert!(why.next.iter().any(|line| line.contains("drover approve a1")), "{why:?}");
    world.says(&outbox, "turn_complete", Some(&id), json!({"status": "interrupted"}));
    assert!(world.core.waiting_approvals().is_empty());
    assert_eq!(world.last("exec_approval_resolved").1["source"], "turn_end");
}

#[test]
fn an_interrupt_reaches_the_turn_and_withdraws_what_never_left() {
    let mut world = World::new();
    let swarm = world.running(2);
    let interrupt = |world: &mut World, nodes: &[u32], injection: Option<&InjectionId>| {
        let token = world.token();
        let order = InterruptOrder { swarm: swarm.to_string(), nodes: nodes.to_vec(), injection: injection.cloned() };
        world.happen(Input::Interrupt(token, order));
        world.plain.remove(&token).unwrap()
    };
    let Ok(Answer::Interrupted(none)) = interrupt(&mut world, &[], None) else { panic!() };
    assert_eq!((none.nodes, world.deliveries.len()), (0, 0), "an idle node must not lose its next turn");
    let first = world.inject("r1", &swarm, &[0], "one");
    let second = world.inject("r2", &swarm, &[0], "two");
    let (first, second) = (world.injections(first)[0].clone(), world.injections(second)[0].clone());
    assert!(interrupt(&mut world, &[], Some(&second)).is_ok());
    assert!(world.last("inject_failed").1["error"].as_str().unwrap().contains("withdrawn"));
    world.deliver_all(&Outcome::Written);
    assert!(interrupt(&mut world, &[0], Some(&first)).is_ok());
    let orders = world.deliver_all(&Outcome::Written);
    let record = &orders[0].records[0];
    assert!(matches!(record.body, InboxBody::Control { kind: "interrupt", .. }));
    assert_eq!(record.injection.as_ref(), Some(&first));
    let failure = interrupt(&mut world, &[], Some(&second)).unwrap_err();
    assert_eq!(failure.code, ErrorCode::UnknownInjection);
}
