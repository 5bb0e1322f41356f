//! Swarms whose files are elsewhere: each is reached through the follower of its cluster, and only through that.

use super::*;

const FAR: &str = "outbox-follower@hpc";

fn up(side: &str) -> Input {
    Input::FollowerUp(side.into())
}

fn down(side: &str) -> Input {
    Input::FollowerDown(side.into(), format!("{side} is gone"))
}

/// A swarm of one node on that cluster, which has an allocation; nothing is heard of its worker yet.
fn far_away(world: &mut World) -> SwarmId {
    let name = format!("far-{}", world.next_token);
    world.launch(&name, LaunchSpec { node_count: 1, ..LaunchSpec::default() });
    let (swarm, _) = world.ensures.pop().unwrap();
    let allocation = Allocation { follower: FAR.into(), ..World::allocation(&swarm, 1) };
    world.happen(Input::Ensured(swarm.clone(), Ok(allocation)));
    swarm
}

fn greets(world: &mut World, swarm: &SwarmId) {
    world.says(&World::outbox(swarm, 0, 1), "worker_hello", None, json!({"host": "n1", "pid": 7}));
}

#[test]
fn each_follower_answers_for_its_own_swarms_only() {
    let mut world = World::new();
    let near = world.running(1);
    assert!(world.reached.is_empty(), "without a cluster there is one follower");
    let far = far_away(&mut world);
    assert_eq!(world.reached, [FAR.into()].into());
    assert!(!world.following.contains_key(&World::outbox(&far, 0, 1)), "nobody is there yet");
    world.happen(up(FAR));
    greets(&mut world, &far);
    assert_eq!(world.status(&far), "running");

    // The one beside the router goes away: the cluster's swarm does not notice.
    world.happen(down(""));
    world.inject("r1", &far, &[0], "x");
    world.inject("r2", &near, &[0], "y");
    let orders = world.deliver_all(&Outcome::Written);
    assert_eq!(orders.iter().map(|order| (&*order.side, &order.swarm)).collect::<Vec<_>>(), [(FAR, &far)]);
    world.happen(up(""));
    let orders = world.deliver_all(&Outcome::Written);
    assert_eq!(orders.iter().map(|order| (&*order.side, &order.swarm)).collect::<Vec<_>>(), [("", &near)]);

    // And the other way round.
    world.happen(down(FAR));
    world.inject("r3", &far, &[0], "x");
    world.inject("r4", &near, &[0], "y");
    let orders = world.deliver_all(&Outcome::Written);
    assert_eq!(orders.iter().map(|order| &*order.side).collect::<Vec<_>>(), [""]);
    let why = world.core.explanation(far.as_str(), world.now).unwrap();
    assert!(why.because.iter().any(|words| words.contains("outbox-follower@hpc is gone")), "{why:?}");
    assert!(why.next.iter().any(|words| words.contains("drover doctor --cluster hpc")), "{why:?}");
    let why = world.core.explanation(near.as_str(), world.now).unwrap();
    assert!(!why.because.iter().any(|words| words.contains("follower")), "{why:?}");
    world.happen(up(FAR));
    assert_eq!(world.deliver_all(&Outcome::Written).len(), 1);
}

#[test]
fn a_router_that_comes_back_finds_the_way_to_every_side() {
    let mut world = World::new();
    let far = far_away(&mut world);
    world.happen(up(FAR));
    greets(&mut world, &far);
    world.inject("r1", &far, &[0], "x");
    world.deliveries.clear();
    world.crash();
    assert_eq!(world.reached, [FAR.into()].into());
    assert!(world.deliver_all(&Outcome::Written).is_empty(), "nothing is asked of it before it is heard of");
    world.happen(up(FAR));
    assert!(world.following.contains_key(&World::outbox(&far, 0, 1)));
    assert_eq!(world.deliver_all(&Outcome::Written).len(), 1);
    // An allocator that does not speak of followers does not move the swarm.
    world.happen(Input::AllocationChanged(World::allocation(&far, 1)));
    world.inject("r2", &far, &[0], "y");
    assert_eq!(&*world.deliver_all(&Outcome::Written)[0].side, FAR);
}

#[test]
fn a_cluster_without_swarms_is_let_go_and_its_mailbox_is_removed_by_its_own_follower() {
    let mut world = World::new();
    let far = far_away(&mut world);
    world.happen(up(FAR));
    greets(&mut world, &far);
    world.terminate("t1", &far, true);
    world.happen(Input::Released(far.clone(), Ok(false)));
    world.pass(SECOND);
    assert_eq!(world.status(&far), "terminated");
    assert_eq!(world.reached.len(), 1, "its last words may still come");
    world.pass(MINUTE);
    assert!(world.reached.is_empty(), "nobody keeps the login host busy");
    world.happen(up(FAR));
    world.happen(down(FAR));
    assert!(world.reached.is_empty(), "late words of it change nothing");

    world.now += 60 * MINUTE;
    world.pass(SECOND);
    assert_eq!(world.removed, std::slice::from_ref(&far));
    assert_eq!(world.reached, [FAR.into()].into());
    world.crash();
    assert_eq!((world.removed.len(), world.reached.len()), (2, 1), "the side is remembered with the mailbox");
    world.happen(Input::MailboxRemoved(far));
    world.pass(SECOND);
    assert!(world.reached.is_empty());
}

#[test]
fn last_words_from_afar_are_waited_for_longer() {
    let mut world = World::new();
    let (far, near) = (far_away(&mut world), world.running(1));
    world.happen(up(FAR));
    greets(&mut world, &far);
    world.inject("r1", &far, &[0], "x");
    world.inject("r2", &near, &[0], "x");
    world.deliver_all(&Outcome::Written);
    world.happen(down(FAR));
    world.happen(down(""));
    for (swarm, follower) in [(&far, FAR), (&near, "")] {
        let over =
            Allocation { state: AllocationState::Completed, follower: follower.into(), ..World::allocation(swarm, 1) };
        world.happen(Input::AllocationChanged(over));
    }
    world.pass(MINUTE);
    assert_eq!((world.status(&near).as_str(), world.status(&far).as_str()), ("terminated", "running"));
    world.happen(up(FAR));
    world.says(&World::outbox(&far, 0, 1), "worker_bye", None, json!({}));
    world.pass(SECOND);
    assert_eq!(world.status(&far), "terminated");
}

#[test]
fn what_a_leader_of_one_cluster_says_ends_nobody_on_another() {
    let mut world = World::new();
    let near = world.running(1);
    let far = far_away(&mut world);
    world.happen(up(FAR));
    greets(&mut world, &far);
    let member = |swarm: &SwarmId| {
        json!({
            "node_id": format!("{swarm}/0"), "swarm_id": swarm.as_str(), "node_index": 0, "state": "alive",
            "incarnation": 1, "boot": 7,
        })
    };
    let report = |world: &mut World, swarm: &SwarmId, epoch: u64, members: &[Value]| {
        let said = json!({"complete": true, "epoch": epoch, "term": 1, "members": members});
        world.says(&World::outbox(swarm, 0, 1), "members", None, said);
    };
    report(&mut world, &near, 1, &[member(&near)]);
    report(&mut world, &far, 2, &[member(&far)]);
    report(&mut world, &near, 1, &[member(&near)]);
    let known: Vec<&String> = world.core.book.members.keys().collect();
    assert_eq!(known.len(), 2, "{known:?}");
    report(&mut world, &far, 2, &[]);
    assert_eq!(world.core.book.members.keys().collect::<Vec<_>>(), [&format!("{near}/0")], "of its own it does");
}
