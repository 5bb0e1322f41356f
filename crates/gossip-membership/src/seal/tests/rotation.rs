//! The ring changes while everybody talks.

use drover_service::pki::RingSummary;
use proptest::prelude::*;

use super::*;

const NODES: usize = 4;

#[derive(Debug, Clone)]
enum Step {
    Add(usize),
    /// Uses the newest key that it may.
    Use(usize),
    /// Removes the oldest key that it may.
    Remove(usize),
    /// One node sees another's record, and fetches the ring when that one's is newer.
    Hear(usize, usize),
    Talk(usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let node = 0..NODES;
    prop_oneof![
        1 => node.clone().prop_map(Step::Add),
        1 => node.clone().prop_map(Step::Use),
        1 => node.clone().prop_map(Step::Remove),
        6 => (node.clone(), node.clone()).prop_map(|(a, b)| Step::Hear(a, b)),
        4 => (node.clone(), node).prop_map(|(a, b)| Step::Talk(a, b)),
    ]
}

/// What a node believes of the others' rings: the records that it has seen.
type Views = Vec<Vec<Arc<SignedRecord>>>;

fn summaries(view: &[Arc<SignedRecord>]) -> Vec<(&str, Option<RingSummary>)> {
    let ring = |record: &Arc<SignedRecord>| RingSummary::parse(record.record.labels.get(RING_LABEL)?);
    view.iter().map(|record| (record.record.node_id.as_str(), ring(record))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_datagram_is_refused_while_the_ring_changes(steps in prop::collection::vec(step(), 1..160)) {
        let mut nodes: Vec<Node> = (0..NODES).map(|number| Node::new(number as u8 + 1, 1)).collect();
        let records: Vec<_> = nodes.iter().map(|node| Arc::clone(&node.record)).collect();
        for node in &mut nodes {
            for record in &records {
                node.sealer.learn(record);
            }
        }
        let mut views: Views = vec![records; NODES];
        for step in steps {
            match step {
                Step::Add(at) => {
                    let mut ring = nodes[at].sealer.ring().clone();
                    // One change at a time, as by one operator.
                    let settled = nodes.iter().all(|node| node.sealer.ring() == &ring);
                    if settled && ring.list().len() < 4 {
                        ring.add_fresh().unwrap();
                        nodes[at].set_ring(ring);
                    }
                }
                Step::Use(at) | Step::Remove(at) => {
                    let mut ring = nodes[at].sealer.ring().clone();
                    views[at][at] = Arc::clone(&nodes[at].record);
                    let members = summaries(&views[at]);
                    let ids: Vec<_> = ring.ids().filter(|id| *id != ring.primary()).collect();
                    let newest = nodes.iter().all(|node| node.sealer.ring().revision() <= ring.revision());
                    let changed = ids.into_iter().filter(|_| newest).any(|id| match step {
                        Step::Use(_) => {
                            RingSummary::may_use(&ring, id, members.clone()).is_ok() && ring.use_key(id).is_ok()
                        }
                        _ => RingSummary::may_remove(&ring, id, members.clone()).is_ok() && ring.remove(id).is_ok(),
                    });
                    if changed {
                        nodes[at].set_ring(ring);
                    }
                }
                Step::Hear(at, of) if at != of => {
                    let record = Arc::clone(&nodes[of].record);
                    nodes[at].sealer.learn(&record);
                    views[at][of] = record;
                    let mut ring = nodes[at].sealer.ring().clone();
                    let theirs = nodes[of].sealer.ring();
                    let behind = ring.is_behind(&theirs.summary());
                    prop_assert_eq!(ring.adopt(theirs), behind);
                    if behind {
                        nodes[at].set_ring(ring);
                    }
                }
                Step::Talk(a, b) if a != b => {
                    let to = nodes[b].key();
                    let (mut out, mut plain) = (Vec::new(), Vec::new());
                    prop_assert!(nodes[a].sealer.seal(to, b"news", &mut out));
                    let (from, key) = (nodes[a].addr, nodes[a].key());
                    prop_assert_eq!(nodes[b].sealer.open(START, from, &out, &mut plain), Ok(Opened::Message(key)));
                }
                Step::Hear(..) | Step::Talk(..) => {}
            }
        }
    }
}

#[test]
fn a_whole_rotation_ends_with_one_new_key_and_a_stolen_old_one_opens_nothing() {
    let (mut a, mut b) = (Node::new(1, 1), Node::new(2, 1));
    meet(&mut a, &mut b);
    let mut ring = a.sealer.ring().clone();
    let old = ring.primary();
    let fresh = ring.add([2; 32]).unwrap();
    for step in 0..3 {
        match step {
            0 => {}
            1 => ring.use_key(fresh).unwrap(),
            _ => ring.remove(old).unwrap(),
        }
        a.set_ring(ring.clone());
        talk(&mut a, &mut b);
        b.set_ring(ring.clone());
        talk(&mut a, &mut b);
        acquaint(&mut a, &mut b);
        talk(&mut a, &mut b);
    }
    assert_eq!((a.sealer.refusals().total(), b.sealer.refusals().total()), (0, 0));
    let mut outsider = Node::start(identity_of(&SITE.ours, "s/3"), 3, 1, KeyRing::of([1; 32]));
    assert_eq!(b.open(outsider.addr, &outsider.hello(b.addr)).0, Err(Refusal::UnknownKey));
}
