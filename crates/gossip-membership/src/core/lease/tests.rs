use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use ring::signature::{Ed25519KeyPair, KeyPair as _};

use super::choice::{Field, Worth};
use super::*;
use crate::core::{NodeKey, Time};

fn voter(key: u64) -> Voter {
    Voter { key: NodeKey(key), seat: 1 }
}

fn set(voters: &[u64], old: &[u64]) -> VoterSet {
    let of = |keys: &[u64]| keys.iter().map(|&key| voter(key)).collect();
    VoterSet { version: SetVersion::default(), voters: of(voters), old: of(old) }
}

#[test]
fn a_joint_set_needs_both_majorities() {
    let joint = set(&[1, 4, 5], &[1, 2, 3]);
    let agreed = |yes: &[u64]| joint.agreed(|voter| yes.contains(&voter.key.0));
    assert!(agreed(&[1, 2, 4]));
    assert!(!agreed(&[1, 4, 5]), "the old ones have not agreed");
    assert!(!agreed(&[1, 2, 3]), "the new ones have not agreed");
    assert_eq!(joint.reached(|voter| voter.key.0), 2, "4 among the new ones, 2 among the old ones");
}

#[test]
fn a_charter_is_taken_only_as_it_was_signed() {
    let pair = Ed25519KeyPair::from_seed_unchecked(&[7; 32]).unwrap();
    let charter = Charter { epoch: 3, voters: vec![voter(1), voter(2)] };
    let bytes = charter.encode();
    let signature = pair.sign(&SignedCharter::message(&[1; 16], &bytes)).as_ref().into();
    let signed = SignedCharter { bytes, signature };
    let ca = pair.public_key().as_ref();
    assert_eq!(signed.verify(ca, &[1; 16]), Some(charter));
    assert_eq!(signed.verify(ca, &[2; 16]), None, "another cluster");
    let mut other = signed.bytes.to_vec();
    other[7] = 4;
    assert_eq!(SignedCharter { bytes: other.into(), ..signed }.verify(ca, &[1; 16]), None, "another epoch");
    assert_eq!(Charter::decode(&[0; 15]), None);
    assert_eq!(Charter::decode(&Charter { epoch: 1, voters: vec![voter(1), voter(1)] }.encode()), None, "twice");
}

#[test]
fn what_is_kept_on_disk_comes_back() {
    let durable = Durable {
        seat: 4,
        promised: Ballot { epoch: 2, term: u64::MAX },
        vote: Some(NodeKey(u64::MAX)),
        set: set(&[1, 2], &[3]),
        charter: Some(SignedCharter { bytes: [1, 2].into(), signature: [3].into() }),
    };
    let text = serde_json::to_string(&durable).unwrap();
    assert_eq!(serde_json::from_str::<Durable>(&text).unwrap(), durable);
}

/// Members by key, region and state; what each voter is worth; who is willing; the next voters.
fn choose(current: &[u64], view: &[(u64, &str, PeerState)], worth: &[(u64, Worth)]) -> Option<Vec<u64>> {
    let set = set(current, &[]);
    let view: BTreeMap<NodeKey, Peer> = view
        .iter()
        .map(|&(key, region, state)| (NodeKey(key), Peer { key: NodeKey(key), state, region: region.into() }))
        .collect();
    let willing = view.keys().map(|key| (*key, 1)).collect();
    let field = Field { me: NodeKey(1), set: &set, view: &view, willing: &willing };
    let worth: BTreeMap<u64, Worth> = worth.iter().copied().collect();
    let chosen = field.choose(|voter| worth.get(&voter.key.0).copied().unwrap_or(Worth::Good));
    chosen.map(|voters| voters.iter().map(|voter| voter.key.0).collect())
}

#[test]
fn voters_are_replaced_not_given_up_and_their_number_is_odd() {
    use PeerState::{Alive, Dead, Left};
    let here = |keys: &[u64]| keys.iter().map(|&key| (key, "a", Alive)).collect::<Vec<_>>();
    let with = |keys: &[u64], other: (u64, &'static str, PeerState)| {
        let mut view = here(keys);
        view.push(other);
        view
    };
    assert_eq!(choose(&[1], &here(&[1, 2]), &[]), None, "two are no safer than one");
    assert_eq!(choose(&[1], &here(&[1, 2, 3]), &[]), Some(vec![1, 2, 3]));
    assert_eq!(choose(&[1, 2, 3], &here(&[1, 2, 3]), &[]), None);
    let lost = with(&[1, 2], (3, "a", Dead));
    assert_eq!(choose(&[1, 2, 3], &lost, &[(3, Worth::Lost)]), None, "nobody instead, and it may come back");
    let spare = with(&[1, 2, 4], (3, "a", Dead));
    assert_eq!(choose(&[1, 2, 3], &spare, &[(3, Worth::Lost)]), Some(vec![1, 2, 4]));
    let left = with(&[1, 2], (3, "a", Left));
    assert_eq!(choose(&[1, 2, 3], &left, &[(3, Worth::Gone)]), Some(vec![1]), "of two voters one alone cannot go on");
    assert_eq!(
        choose(&[1, 2, 3], &here(&[1, 2, 3]), &[(1, Worth::Gone)]),
        Some(vec![2]),
        "this node goes, 2 or 3 stays"
    );
    assert_eq!(choose(&[1], &[], &[(1, Worth::Gone)]), None, "the last one has nobody to go to");
    let most_lost = [(4, Worth::Lost), (5, Worth::Lost), (3, Worth::Lost)];
    assert_eq!(choose(&[1, 2, 3, 4, 5], &here(&[1, 2]), &most_lost), None);
}

#[test]
fn voters_are_spread_over_the_regions() {
    let view: Vec<(u64, &str, PeerState)> =
        (1..=12).map(|key| (key, ["a", "b", "c"][key as usize % 3], PeerState::Alive)).collect();
    let chosen = choose(&[1], &view, &[]).unwrap();
    assert_eq!(chosen.len(), MAX_VOTERS);
    for region in 0..3 {
        assert!(chosen.iter().filter(|&&key| key % 3 == region).count() >= 2, "{chosen:?}");
    }
}

proptest! {
    /// Two majorities of one set meet, and a joint set's majorities meet those of both its parts: what all else rests on.
    #[test]
    fn majorities_meet(old in keys(), new in keys(), ours: u16, theirs: u16) {
        let (before, joint, after) = (set(&old, &[]), set(&new, &old), set(&new, &[]));
        let in_mask = |mask: u16| move |voter: Voter| mask >> voter.key.0 & 1 == 1;
        for (one, other) in [(&before, &before), (&before, &joint), (&joint, &joint), (&joint, &after)] {
            if one.agreed(in_mask(ours)) && other.agreed(in_mask(theirs)) {
                prop_assert!(ours & theirs != 0, "{old:?} {new:?} {ours:b} {theirs:b}");
            }
        }
    }
}

fn keys() -> impl Strategy<Value = Vec<u64>> {
    proptest::collection::btree_set(0_u64..10, 1..=MAX_VOTERS).prop_map(|keys| keys.into_iter().collect())
}

/// A node under test, alone with the one who asks.
fn lone(durable: Option<Durable>, now: Time) -> Lease {
    struct Anything;
    impl Notary for Anything {
        fn check(&self, signed: &SignedCharter) -> Option<Charter> {
            Charter::decode(&signed.bytes)
        }
    }
    let start = Start {
        me: NodeKey(1),
        boot: 1,
        seat: 1,
        durable,
        timing: Timing::new(Duration::from_secs(1)),
        seed: 1,
        notary: Box::new(Anything),
        guards: Guards::default(),
    };
    Lease::new(start, now)
}

fn charter(epoch: u64) -> SignedCharter {
    let voters = vec![voter(1), voter(2), voter(3)];
    SignedCharter { bytes: Charter { epoch, voters }.encode(), signature: Arc::from([]) }
}

/// What the node answers, and what it wrote before it answered.
fn asked(lease: &mut Lease, now: Time, from: u64, ask: Ask) -> (Outcome, Option<Durable>) {
    let mut out = Vec::new();
    let request = Request { seat: 1, ask, charter: None };
    lease.handle(now, Input::Request { call: 9, from: NodeKey(from), request }, &mut out);
    let mut written = None;
    for effect in out {
        match effect {
            Effect::Persist(durable) => written = Some(durable),
            Effect::Answer { call: 9, reply } => return (reply.outcome, written),
            _ => {}
        }
    }
    panic!("no answer");
}

#[test]
fn a_vote_is_written_before_it_is_given_and_outlasts_a_restart() {
    let now = Time(1_000_000);
    let mut lease = lone(None, now);
    lease.handle(now, Input::Charter(charter(1)), &mut Vec::new());
    let version = lease.voters().version;
    let vote = |term: u64| Ask::Vote { ballot: Ballot { epoch: 1, term }, boot: 5, version };
    let (outcome, written) = asked(&mut lease, now, 2, vote(1));
    assert_eq!(outcome, Outcome::Voted);
    let written = written.unwrap();
    assert_eq!((written.promised.term, written.vote), (1, Some(NodeKey(2))));

    let (outcome, _) = asked(&mut lease, now + Duration::from_secs(4), 3, vote(2));
    assert!(matches!(outcome, Outcome::Refused(Refusal::LeaseRuns(_))), "{outcome:?}");

    let mut again = lone(Some(written), now);
    let (outcome, _) = asked(&mut again, now + Duration::from_mins(1), 3, vote(1));
    assert_eq!(outcome, Outcome::Refused(Refusal::Voted), "one vote in a term");
    let mut again = lone(Some(again.durable().clone()), now);
    let (outcome, _) = asked(&mut again, now, 3, vote(2));
    assert!(matches!(outcome, Outcome::Refused(Refusal::LeaseRuns(_))), "it may have granted a lease: {outcome:?}");
    let renew = Ask::Renew { ballot: Ballot { epoch: 1, term: 1 }, boot: 5, seq: 1, set: None };
    let (outcome, _) = asked(&mut again, now, 2, renew);
    assert!(matches!(outcome, Outcome::Granted { .. }), "that one lease it may go on with: {outcome:?}");
}

#[test]
fn another_seat_and_a_foreign_epoch_are_refused() {
    let now = Time(1_000_000);
    let mut lease = lone(None, now);
    let ballot = Ballot { epoch: 1, term: 1 };
    let probe = Ask::Probe { ballot, boot: 1, version: SetVersion::default() };
    assert_eq!(asked(&mut lease, now, 2, probe.clone()).0, Outcome::Refused(Refusal::NoCharter));
    lease.handle(now, Input::Charter(charter(1)), &mut Vec::new());
    let mut out = Vec::new();
    let request = Request { seat: 2, ask: probe, charter: None };
    lease.handle(now, Input::Request { call: 1, from: NodeKey(2), request }, &mut out);
    let refused = |effect: &Effect| {
        matches!(effect, Effect::Answer { reply: Reply { outcome: Outcome::Refused(Refusal::OtherSeat), .. }, .. })
    };
    assert!(out.iter().any(refused), "{out:?}");
    let far = Ask::Probe { ballot: Ballot { epoch: 1, term: u64::MAX }, boot: 1, version: SetVersion::default() };
    assert_eq!(asked(&mut lease, now, 2, far).0, Outcome::Refused(Refusal::Nonsense), "the numbers are not used up");
    lease.handle(now, Input::Charter(charter(2)), &mut out);
    let old = Ask::Probe { ballot: Ballot { epoch: 1, term: 9 }, boot: 1, version: SetVersion::default() };
    assert_eq!(asked(&mut lease, now, 2, old).0, Outcome::Refused(Refusal::OldBallot));
}
