//! Members: what leaders report, late, twice and against each other, and the events that come of it.

use super::*;
use crate::core::ring::Ring;

/// A member as a leader writes it.
fn member(swarm: &SwarmId, index: u32, state: &str, claim: (u64, u32)) -> Value {
    json!({
        "node_id": format!("{swarm}/{index}"), "swarm_id": swarm.as_str(), "node_index": index, "addr": "10.0.0.1",
        "port": 7946, "state": state, "load_score": 0.25, "overloaded": false, "overload_reason": null,
        "incarnation": claim.1, "boot": claim.0, "capabilities": {"agent": "echo"}, "labels": {"host": "n"},
        "region": "default", "version": "1", "timestamp": 5, "cause": null,
    })
}

impl World {
    /// The node reports as the leader of a term.
    fn reports(&mut self, outbox: &OutboxId, complete: bool, term: u64, members: &[Value]) {
        self.says(outbox, "members", None, json!({"complete": complete, "epoch": 1, "term": term, "members": members}));
    }

    /// Names and nodes of the events of membership so far.
    fn told(&self) -> Vec<String> {
        let of_members = self.events.iter().filter(|event| event.name.starts_with("Node"));
        of_members
            .map(|event| format!("{} {}", &*event.name, event.node.map_or_else(|| "-".into(), |n| n.to_string())))
            .collect()
    }

    fn states(&self) -> Vec<(String, &'static str)> {
        let name = |id: &String| id.rsplit('/').next().unwrap_or_default().to_owned();
        self.core.book.members.iter().map(|(id, facts)| (name(id), facts.word.state.as_str())).collect()
    }
}

#[test]
fn each_change_is_told_once_with_its_payload_however_often_it_is_reported() {
    let mut world = World::new();
    let swarm = world.running(3);
    let leader = World::outbox(&swarm, 0, 1);
    let all = |state: &str, claim| vec![member(&swarm, 0, "alive", (7, 1)), member(&swarm, 1, state, claim)];
    world.reports(&leader, true, 1, &all("alive", (7, 1)));
    assert_eq!(world.told(), ["NodeJoined 0", "NodeJoined 1"]);
    let (event, data) = world.last("NodeJoined");
    assert_eq!(event.swarm.as_ref(), Some(&swarm));
    let payload = json!({
        "ID": format!("{swarm}/1"), "Addr": "10.0.0.1", "Port": 7946, "AgentCaps": {"agent": "echo"}, "LoadScore": 0.25,
        "Labels": {"host": "n"}, "Timestamp": 5, "Version": "1",
    });
    assert_eq!(data, payload);
    world.reports(&leader, true, 1, &all("alive", (7, 1)));
    assert_eq!(world.count("members"), 0, "the reports themselves are no events");

    world.reports(&leader, false, 1, &all("suspect", (7, 1))[1..]);
    assert_eq!(world.last("NodeSuspect").1, json!({"NodeID": format!("{swarm}/1")}));
    world.reports(&leader, true, 1, &all("suspect", (7, 1)));
    world.reports(&leader, false, 1, &all("alive", (7, 2))[1..]);
    assert_eq!(world.last("NodeAlive").1["ID"], json!(format!("{swarm}/1")));
    world.reports(&leader, false, 1, &all("dead", (7, 2))[1..]);
    world.reports(&leader, true, 1, &all("dead", (7, 2)));
    // It comes back, and once so fast that nobody saw it gone.
    world.reports(&leader, false, 1, &all("alive", (8, 1))[1..]);
    world.reports(&leader, false, 1, &all("alive", (9, 1))[1..]);
    world.reports(&leader, false, 1, &all("left", (9, 2))[1..]);
    assert_eq!(
        world.told()[2..],
        ["NodeSuspect 1", "NodeAlive 1", "NodeLeft 1", "NodeJoined 1", "NodeLeft 1", "NodeJoined 1", "NodeLeft 1"]
    );
    assert_eq!(world.states(), [("0".into(), "alive"), ("1".into(), "left")]);
}

#[test]
fn of_two_who_lead_the_later_term_is_believed_and_a_newer_claim_whoever_brings_it() {
    let mut world = World::new();
    let swarm = world.running(3);
    let (old, new) = (World::outbox(&swarm, 0, 1), World::outbox(&swarm, 1, 1));
    let two = |state: &str, claim| vec![member(&swarm, 2, state, claim)];
    world.reports(&old, true, 4, &two("alive", (7, 1)));
    world.reports(&old, false, 4, &two("dead", (7, 1)));
    // The next leader sees it alive under the same claim: the first one was cut off, not the node.
    world.reports(&new, true, 5, &two("alive", (7, 1)));
    assert_eq!(world.told(), ["NodeJoined 2", "NodeLeft 2", "NodeJoined 2"]);
    // What the first one still says is late, and a snapshot of it ends nobody.
    world.reports(&old, false, 4, &two("dead", (7, 1)));
    world.reports(&old, true, 4, &[]);
    assert_eq!(world.states(), [("2".into(), "alive")]);
    assert_eq!(world.core.book.members_view.ballot.term, 5);
    // A claim of the node itself counts, whoever passes it on; an older one never again.
    world.reports(&old, false, 4, &two("left", (7, 3)));
    world.reports(&new, false, 5, &two("alive", (7, 2)));
    assert_eq!((world.told().len(), world.states()), (4, vec![("2".into(), "left")]));
}

#[test]
fn a_snapshot_ends_whom_it_does_not_know_and_part_of_one_does_not() {
    let mut world = World::new();
    let swarm = world.running(3);
    let leader = World::outbox(&swarm, 0, 1);
    let three: Vec<Value> = (0..3).map(|index| member(&swarm, index, "alive", (7, 1))).collect();
    world.reports(&leader, true, 1, &three);
    world.reports(&leader, false, 1, &three[..1]);
    assert_eq!(world.told().len(), 3);
    let dead = [three[0].clone(), member(&swarm, 1, "dead", (7, 1)), three[2].clone()];
    world.reports(&leader, true, 1, &dead);
    world.reports(&leader, true, 1, &three[..1]);
    assert_eq!(world.told()[3..], ["NodeLeft 1", "NodeLeft 2"], "who was said to be dead has left already");
    assert_eq!(world.states(), [("0".into(), "alive")]);
    let shown = world.core.swarms[&world.core.by_id[&swarm]].view().swarm.nodes;
    assert_eq!(
        (shown[0].membership.as_str(), shown[0].load_score, shown[2].membership.as_str()),
        ("alive", Some(0.25), "")
    );
}

#[test]
fn what_was_known_is_known_after_a_restart_and_told_once() {
    let mut world = World::new();
    let swarm = world.running(2);
    let leader = World::outbox(&swarm, 0, 1);
    let both: Vec<Value> = (0..2).map(|index| member(&swarm, index, "alive", (7, 1))).collect();
    world.reports(&leader, true, 3, &both);
    let outside = json!({"node_id": "elsewhere", "state": "alive", "boot": 1});
    world.reports(&leader, false, 3, std::slice::from_ref(&outside));
    assert_eq!(world.told().last().unwrap(), "NodeJoined -");
    let before = (world.told(), world.states(), world.core.book.members_view.clone());
    world.crash();
    assert_eq!((world.told(), world.states(), world.core.book.members_view.clone()), before);
    let shown = world.core.swarms[&world.core.by_id[&swarm]].view().swarm.nodes;
    assert_eq!(shown[1].membership, "alive");
    world.reports(&leader, true, 3, &[both[0].clone(), both[1].clone(), outside]);
    assert_eq!(world.told(), before.0);
    // A late word of a leader from before the restart is as late as it was.
    world.reports(&World::outbox(&swarm, 1, 1), false, 2, &[member(&swarm, 0, "dead", (7, 1))]);
    assert_eq!(world.told(), before.0);
}

#[test]
fn members_go_with_their_swarm_and_nobody_brings_them_back() {
    let mut world = World::new();
    let (ending, other) = (world.running(1), world.running(1));
    let leader = World::outbox(&other, 0, 1);
    let all = [member(&ending, 0, "alive", (7, 1)), member(&other, 0, "suspect", (7, 1))];
    world.reports(&leader, true, 1, &all);
    world.terminate("t1", &ending, true);
    let mut over = World::allocation(&ending, 1);
    over.state = AllocationState::Completed;
    world.happen(Input::AllocationChanged(over));
    assert_eq!(world.status(&ending), "terminated");
    let left = world.names().iter().rposition(|name| *name == "NodeLeft").unwrap();
    let terminated = world.names().iter().rposition(|name| *name == "swarm_terminated").unwrap();
    assert!(left < terminated, "whoever waits for the end has seen all of it");
    let told = world.told();
    world.reports(&leader, false, 1, &[member(&ending, 0, "alive", (7, 9))]);
    assert_eq!((world.told(), world.states()), (told, vec![("0".into(), "suspect")]));
    // A worker that was replaced does not speak against its successor of the same term.
    world.says(&World::outbox(&other, 0, 2), "worker_hello", None, json!({}));
    let mut again = World::allocation(&other, 1);
    again.nodes[0].generation = 2;
    world.happen(Input::AllocationChanged(again));
    world.says(&World::outbox(&other, 0, 2), "worker_hello", None, json!({}));
    world.reports(&World::outbox(&other, 0, 2), true, 1, &[member(&other, 0, "alive", (7, 1))]);
    world.reports(&leader, true, 1, &[]);
    assert_eq!(world.states(), [("0".into(), "alive")]);
}

#[test]
fn a_ring_reaches_every_node_once_also_after_a_restart() {
    let mut world = World::new();
    let ring = |revision: u64| Ring { revision, json: format!(r#"{{"v":1,"revision":{revision}}}"#).into() };
    world.happen(Input::Ring(ring(1)));
    let swarm = world.running(2);
    assert!(world.deliveries.is_empty(), "new nodes start with the ring as it is");
    world.happen(Input::Ring(ring(2)));
    // The word is lost with the follower's; the router is started again and reads the ring's file.
    world.deliveries.clear();
    world.crash();
    world.happen(Input::Ring(ring(2)));
    let sent = world.deliver_all(&Outcome::Written);
    let kinds: Vec<(u32, usize)> = sent.iter().map(|order| (order.node.0, order.records.len())).collect();
    assert_eq!(kinds, [(0, 1), (1, 1)]);
    let InboxBody::Control { kind: "keyring", data } = &sent[0].records[0].body else { panic!("{sent:?}") };
    assert_eq!(serde_json::from_str::<Value>(data).unwrap(), json!({"ring": {"v": 1, "revision": 2}}));
    world.happen(Input::Ring(ring(2)));
    assert!(world.deliveries.is_empty());

    let node = World::outbox(&swarm, 1, 1);
    world.says(&node, "keyring_state", None, json!({"ids": [1, 2], "primary": 2}));
    assert_eq!(world.core.rings_said()[&(swarm.clone(), 1)].primary, 2);
    let note = json!({"code": "seed_unreachable", "message": "no seed answers", "hint": "look at the network", "current": true});
    world.says(&node, "membership_notes", None, json!({"notes": [note]}));
    world.crash();
    assert_eq!(world.core.rings_said()[&(swarm.clone(), 1)].ids, [1, 2]);
    let why = world.core.explanation(&format!("{swarm}/1"), world.now).unwrap();
    assert!(why.because.iter().any(|line| line.contains("no seed answers")), "{why:?}");
    assert!(why.next.contains(&"look at the network".to_owned()), "{why:?}");
    assert_eq!(world.count("keyring_state") + world.count("membership_notes"), 0);
}

#[test]
fn why_names_a_member_that_is_not_heard_or_has_too_much_to_do() {
    let mut world = World::new();
    let swarm = world.running(2);
    let mut busy = member(&swarm, 1, "suspect", (7, 1));
    busy["load_score"] = json!(0.93);
    busy["overloaded"] = json!(true);
    busy["overload_reason"] = json!("cpu 98 %");
    world.reports(&World::outbox(&swarm, 0, 1), true, 1, &[member(&swarm, 0, "alive", (7, 1)), busy]);
    let of_swarm = world.core.explanation(swarm.as_str(), world.now).unwrap().because.join(" ");
    assert!(of_swarm.contains("Node 1: The other nodes do not hear it") && !of_swarm.contains("Node 0"), "{of_swarm}");
    let of_node = world.core.explanation(&format!("{swarm}/1"), world.now).unwrap();
    assert!(of_node.because.iter().any(|line| line.contains("0.93") && line.contains("cpu 98 %")), "{of_node:?}");
}
