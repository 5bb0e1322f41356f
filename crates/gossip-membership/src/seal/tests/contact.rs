use super::*;

#[test]
fn two_nodes_meet_in_four_steps_and_nothing_is_kept_before_the_echo() {
    let (mut a, mut b) = (Node::new(1, 1), Node::new(2, 1));
    let ask = a.hello(b.addr);
    let (opened, show) = b.open(a.addr, &ask);
    assert_eq!(opened, Ok(Opened::Answer));
    assert!(show.len() <= ask.len(), "{} for {}: somebody else's address could be flooded", show.len(), ask.len());
    assert_eq!(b.sealer.known(), 0);
    let (opened, introduce) = a.open(b.addr, &show);
    assert_eq!(opened, Ok(Opened::Answer));
    let (opened, met) = b.open(a.addr, &introduce);
    assert_eq!(opened, Ok(Opened::Contact { record: Arc::clone(&a.record), answer: true }));
    let (opened, nothing) = a.open(b.addr, &met);
    assert_eq!(opened, Ok(Opened::Contact { record: Arc::clone(&b.record), answer: false }));
    assert!(nothing.is_empty() && introduce.len() < 1400 && met.len() < 1400);

    assert_eq!(meet(&mut a, &mut b).len(), 4);
    talk(&mut a, &mut b);
    assert_eq!((a.sealer.refusals().total(), b.sealer.refusals().total()), (0, 0));
}

/// From an address that does not answer nothing comes back but less than was sent, and nothing stays.
#[test]
fn an_address_that_was_made_up_gets_no_further_than_the_first_step() {
    let (mut a, mut b) = (Node::new(1, 1), Node::new(2, 1));
    let victim = SocketAddr::from(([10, 0, 0, 99], 7946));
    let (mut sent, mut answered) = (0, 0);
    let met = meet(&mut a, &mut b);
    for _ in 0..500 {
        let ask = a.hello(b.addr);
        for datagram in std::iter::once(&ask).chain(met.iter().map(|(_, datagram)| datagram)) {
            sent += datagram.len();
            answered += b.open(victim, datagram).1.len();
        }
    }
    assert!(answered <= sent, "{answered} bytes for {sent}");
    assert_eq!(b.sealer.known(), 1, "only whom it has met");
    assert!(b.refused(Refusal::TooMany) > 0, "asks are not answered without end");
}

#[test]
fn a_challenge_is_good_for_seconds_and_for_one_address() {
    let (mut a, mut b) = (Node::new(1, 1), Node::new(2, 1));
    let ask = a.hello(b.addr);
    let show = b.open(a.addr, &ask).1;
    let introduce = a.open(b.addr, &show).1;
    let other = SocketAddr::new(a.addr.ip(), 1);
    assert_eq!(b.open(other, &introduce).0, Err(Refusal::Forged));
    let mut out = Vec::new();
    assert!(b.sealer.open(at(4), a.addr, &introduce, &mut out).is_ok());
    assert_eq!(b.sealer.open(at(30), a.addr, &introduce, &mut out), Err(Refusal::Forged));
}

#[test]
fn a_node_that_was_started_again_is_met_again_by_itself() {
    let (mut a, mut b) = (Node::new(1, 1), Node::new(2, 1));
    meet(&mut a, &mut b);
    talk(&mut a, &mut b);
    let mut b = b.restart();
    // A pings the old boot; the new one does not know A and says so; A asks who it is.
    let ping = a.seal(&b, b"ping");
    let (opened, hint) = b.open(a.addr, &ping);
    assert_eq!(opened, Err(Refusal::UnknownPeer));
    assert!(!hint.is_empty() && hint.len() < ping.len());
    let (opened, ask) = a.open(b.addr, &hint);
    assert_eq!(opened, Ok(Opened::Answer));
    let show = b.open(a.addr, &ask).1;
    let introduce = a.open(b.addr, &show).1;
    let (opened, met) = b.open(a.addr, &introduce);
    assert!(matches!(opened, Ok(Opened::Contact { .. })));
    let Ok(Opened::Contact { record, .. }) = a.open(b.addr, &met).0 else { panic!("a does not know the new boot") };
    assert_eq!(record.record.boot, 2);
    a.sealer.learn(&record);
    b.sealer.learn(&a.record);
    talk(&mut a, &mut b);
    // The same hint from elsewhere, or about something that was never sent, makes nobody send anything.
    let stranger = SocketAddr::from(([10, 9, 9, 9], 1));
    assert!(a.open(stranger, &hint).1.is_empty());
    let mut odd = hint.clone();
    odd[11] ^= 0x40;
    assert_eq!(a.open(b.addr, &odd), (Err(Refusal::Forged), Vec::new()));
}

#[test]
fn a_wrong_key_cluster_or_clock_is_refused_and_the_sender_gets_a_hint() {
    let ring = || KeyRing::of([1; 32]);
    let cases = [
        (Node::start(identity_of(&SITE.ours, "s/1"), 1, 1, KeyRing::of([2; 32])), START, Refusal::UnknownKey),
        (Node::start(identity_of(&SITE.theirs, "s/1"), 1, 1, ring()), START, Refusal::WrongCluster),
        (Node::new(1, 1), Moment { unix_us: START.unix_us + 3_600_000_000, ..START }, Refusal::Future),
    ];
    for (mut a, moment, refusal) in cases {
        let mut b = Node::new(2, 1);
        let mut ask = Vec::new();
        a.sealer.hello(moment, b.addr, &mut ask);
        let (opened, hint) = b.open(a.addr, &ask);
        assert_eq!((opened, b.refused(refusal)), (Err(refusal), 1));
        let mut out = Vec::new();
        assert_eq!(a.sealer.open(moment, b.addr, &hint, &mut out), Ok(Opened::Hint(refusal)));
        assert!(out.is_empty());
    }
    // A clock an hour behind: then it is the answer that comes from the future.
    let (mut a, mut b) = (Node::new(1, 1), Node::new(2, 1));
    let behind = Moment { unix_us: START.unix_us - 3_600_000_000, ..START };
    let mut ask = Vec::new();
    a.sealer.hello(behind, b.addr, &mut ask);
    let show = b.open(a.addr, &ask).1;
    let mut out = Vec::new();
    assert_eq!(a.sealer.open(behind, b.addr, &show, &mut out), Err(Refusal::Future));
}

#[test]
fn a_node_with_an_older_ring_finds_in_with_the_key_that_is_left() {
    let mut ring = KeyRing::of([1; 32]);
    let mut old = Node::start(identity_of(&SITE.ours, "s/1"), 1, 1, ring.clone());
    let fresh = ring.add([2; 32]).unwrap();
    ring.use_key(fresh).unwrap();
    let mut new = Node::start(identity_of(&SITE.ours, "s/2"), 2, 1, ring);
    meet(&mut old, &mut new);
    talk(&mut old, &mut new);
    // And the other way round: the first ask is with the key that the other lacks, the second with another one.
    let (mut old, mut new) = (old.restart(), new.restart());
    assert_eq!(old.open(new.addr, &new.hello(old.addr)).0, Err(Refusal::UnknownKey));
    assert!(meet(&mut new, &mut old).len() == 4);
    talk(&mut old, &mut new);
}
