use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// The datagrams of a whole acquaintance: four of a hello, and one between the pair.
fn every_kind() -> (Node, Node, Vec<(SocketAddr, Vec<u8>)>) {
    let (mut a, mut b) = (Node::new(1, 1), Node::new(2, 1));
    let mut all = meet(&mut a, &mut b);
    let datagram = a.seal(&b, b"a ping with some news in it");
    all.push((a.addr, datagram));
    (a, b, all)
}

#[test]
fn a_changed_bit_is_refused_and_counted_wherever_it_is() {
    let (mut a, mut b, all) = every_kind();
    assert_eq!(all.len(), 5);
    for (index, (from, datagram)) in all.iter().enumerate() {
        let receiver = if *from == a.addr { &mut b } else { &mut a };
        for bit in 0..datagram.len() * 8 {
            let mut forged = datagram.clone();
            forged[bit / 8] ^= 1 << (bit % 8);
            let before = receiver.sealer.refusals().total();
            let (opened, out) = receiver.open(*from, &forged);
            assert!(opened.is_err(), "datagram {index}, bit {bit}: {opened:?}");
            assert_eq!(receiver.sealer.refusals().total(), before + 1);
            assert!(out.is_empty() || out.len() < forged.len(), "an answer longer than the question");
        }
    }
    let (from, pair) = all.last().unwrap();
    assert_eq!(b.open(*from, pair).0, Ok(Opened::Message(a.key())), "what was tried did not keep the true one out");
}

#[test]
fn a_datagram_that_is_cut_or_too_long_is_refused_and_counted() {
    let (mut a, mut b, all) = every_kind();
    for (from, datagram) in &all {
        let receiver = if *from == a.addr { &mut b } else { &mut a };
        for length in 0..datagram.len() {
            assert!(receiver.open(*from, &datagram[..length]).0.is_err(), "{length} of {}", datagram.len());
        }
        let mut longer = datagram.clone();
        longer.push(0);
        assert!(receiver.open(*from, &longer).0.is_err());
    }
    assert!(b.refused(Refusal::Truncated) > 0);
    assert_eq!(b.open(a.addr, &vec![1; 65_000]).0, Err(Refusal::Oversized));
    assert_eq!(b.open(a.addr, &[0xd7, 1, 0]).0, Err(Refusal::Plaintext));
    assert_eq!(b.open(a.addr, &[9; 60]).0, Err(Refusal::UnknownVersion));
    let mut out = Vec::new();
    assert!(!a.sealer.seal(b.key(), &[0; envelope::MAX_DATAGRAM], &mut out) && out.is_empty());
    assert!(!a.sealer.seal(NodeKey(77), b"x", &mut out) && out.is_empty());
}

#[test]
fn what_is_sealed_says_nothing() {
    let (mut a, b, _) = every_kind();
    let datagram = a.seal(&b, b"a prompt nobody may read");
    assert_eq!(datagram.len(), b"a prompt nobody may read".len() + envelope::OVERHEAD);
    assert!(!datagram.windows(6).any(|six| six == b"prompt" || six == &a.record.record.node_id.as_bytes()[..3]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn each_datagram_is_taken_once_in_whatever_order_they_come(
        count in 1_usize..90,
        order in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 1..300),
    ) {
        let (mut a, mut b) = (Node::new(1, 1), Node::new(2, 1));
        acquaint(&mut a, &mut b);
        let sealed: Vec<Vec<u8>> = (0..count).map(|number| a.seal(&b, &[number as u8])).collect();
        let (mut taken, mut highest) = (BTreeSet::new(), 0);
        for (index, _) in order {
            let index = index.index(count);
            let near = index + 64 > highest;
            let (opened, out) = b.open(a.addr, &sealed[index]);
            if near && taken.insert(index) {
                highest = highest.max(index);
                prop_assert_eq!((opened, out), (Ok(Opened::Message(a.key())), vec![index as u8]));
            } else {
                prop_assert_eq!(opened, Err(Refusal::Replayed));
            }
        }
        // Nor does anybody else take them, the sender included.
        let mut c = Node::new(3, 1);
        acquaint(&mut a, &mut c);
        prop_assert_eq!(c.open(a.addr, &sealed[0]).0, Err(Refusal::Forged));
        prop_assert_eq!(a.open(b.addr, &sealed[0]).0, Err(Refusal::Replayed));
    }

    #[test]
    fn no_key_meets_a_counter_twice_over_boots_and_acquaintances(steps in prop::collection::vec(0_u8..8, 1..60)) {
        let mut nodes = [Node::new(1, 1), Node::new(2, 1)];
        let mut used = BTreeSet::new();
        let [a, b] = &mut nodes;
        acquaint(a, b);
        for step in steps {
            let [a, b] = &mut nodes;
            match step {
                0 => *a = a.restart(),
                1 => *b = b.restart(),
                2 => a.sealer.forget(b.key()),
                3 => {
                    let mut ring = a.sealer.ring().clone();
                    ring.add_fresh().ok();
                    ring.use_key(ring.ids().last().unwrap()).unwrap();
                    a.set_ring(ring.clone());
                    b.set_ring(ring);
                }
                _ => {}
            }
            acquaint(a, b);
            for (from, to) in [(0, 1), (1, 0)] {
                let to_key = nodes[to].key();
                let key = nodes[from].sealer.send_key(to_key);
                let mut out = Vec::new();
                prop_assert!(nodes[from].sealer.seal(to_key, b"x", &mut out));
                let counter: [u8; 8] = out[11..19].try_into().unwrap();
                prop_assert!(used.insert((key, counter)), "a key and a nonce came again");
            }
        }
    }
}

#[test]
fn what_was_sent_before_a_peer_was_forgotten_cannot_be_played_when_it_is_back() {
    let (mut a, mut b) = (Node::new(1, 1), Node::new(2, 1));
    acquaint(&mut a, &mut b);
    let old: Vec<Vec<u8>> = (0..5).map(|_| a.seal(&b, b"old")).collect();
    for datagram in &old {
        b.open(a.addr, datagram).0.unwrap();
    }
    b.sealer.forget(a.key());
    assert_eq!(b.open(a.addr, &old[0]).0, Err(Refusal::UnknownPeer));
    b.sealer.learn(&a.record);
    for datagram in &old {
        assert_eq!(b.open(a.addr, datagram).0, Err(Refusal::Replayed));
    }
    talk(&mut a, &mut b);
    // A new boot makes the old datagrams those of a stranger.
    let mut a = a.restart();
    acquaint(&mut a, &mut b);
    assert_eq!(b.open(a.addr, &old[4]).0, Err(Refusal::UnknownPeer));
    talk(&mut a, &mut b);
}
