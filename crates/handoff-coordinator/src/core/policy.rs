//! When a session moves by itself, and where to.

use std::collections::BTreeSet;

use drover_types::SessionId;
use rand::Rng;

use super::ids::NodeId;
use super::message::{Needs, Rejection};
use super::settings::Settings;

/// How another node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerState {
    /// It answers.
    Alive,
    /// It may be gone.
    Suspect,
    /// It is gone, or has left.
    Gone,
}

/// Another node, as the membership tells of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Peer {
    /// Its name.
    pub node: NodeId,
    /// How it is.
    pub state: PeerState,
    /// Its load, from 0 to 1.
    pub load: f64,
    /// It says that it is overloaded.
    pub overloaded: bool,
    /// What it can do.
    pub capabilities: BTreeSet<String>,
}

impl Eq for Peer {}

/// This node.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Own {
    /// Its load, from 0 to 1.
    pub load: f64,
    /// It takes no further sessions, because it leaves.
    pub leaving: bool,
    /// What it can do.
    pub capabilities: BTreeSet<String>,
}

impl Eq for Own {}

/// Overloaded from the threshold on, until clearly below it.
#[derive(Debug, Clone, Copy, Default)]
pub struct LoadGate {
    over: bool,
}

impl LoadGate {
    /// Takes a new load, and says whether it is too much.
    pub fn update(&mut self, load: f64, settings: &Settings) -> bool {
        if load >= settings.load_threshold {
            self.over = true;
        } else if load < settings.relief.min(settings.load_threshold) {
            self.over = false;
        }
        self.over
    }

    /// What it said last.
    pub fn is_over(self) -> bool {
        self.over
    }
}

/// A node that a session may go to.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Its name.
    pub node: NodeId,
    /// The less the better: its load, less what the session gains there.
    pub cost: f64,
}

/// How much load a session's own place is worth: it comes back there sooner than elsewhere, so what is warm there may still be.
const AFFINITY: f64 = 0.1;

/// The better of two that are drawn at random, so that many who look at once do not all choose the same node.
pub fn choose_target(
    rng: &mut impl Rng,
    settings: &Settings,
    session: &SessionId,
    needs: &Needs,
    peers: impl IntoIterator<Item = Peer>,
    tried: &BTreeSet<NodeId>,
) -> Option<NodeId> {
    let fit: Vec<Peer> = peers
        .into_iter()
        .filter(|peer| {
            peer.state == PeerState::Alive
                && !peer.overloaded
                && peer.load < settings.load_threshold
                && !tried.contains(&peer.node)
                && needs.capabilities.is_subset(&peer.capabilities)
        })
        .collect();
    let home = fit.iter().max_by_key(|peer| place(session, &peer.node)).map(|peer| peer.node.clone());
    let mut candidates: Vec<Candidate> = fit
        .into_iter()
        .map(|peer| {
            let gain = if home.as_ref() == Some(&peer.node) { AFFINITY } else { 0.0 };
            Candidate { cost: peer.load - gain, node: peer.node }
        })
        .collect();
    if candidates.is_empty() {
        return None;
    }
    let first = candidates.swap_remove(rng.random_range(0..candidates.len()));
    if candidates.is_empty() {
        return Some(first.node);
    }
    let second = candidates.swap_remove(rng.random_range(0..candidates.len()));
    Some(if second.cost < first.cost { second.node } else { first.node })
}

/// The same for everybody who asks: the node with the greatest number is where the session belongs.
fn place(session: &SessionId, node: &NodeId) -> u64 {
    let mut word = 0xcbf2_9ce4_8422_2325_u64;
    for byte in session.as_str().bytes().chain([0]).chain(node.as_str().bytes()) {
        word = (word ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    word ^= word >> 31;
    word.wrapping_mul(0x94d0_49bb_1331_11eb) ^ (word >> 29)
}

/// What a node says when it is asked to take a session; nothing: yes.
pub(crate) fn reject(
    own: &Own,
    over: bool,
    held: usize,
    len: u64,
    needs: &Needs,
    settings: &Settings,
) -> Option<Rejection> {
    if own.leaving {
        Some(Rejection::Leaving)
    } else if !needs.capabilities.is_subset(&own.capabilities) {
        Some(Rejection::NoCapability)
    } else if len > settings.max_bytes {
        Some(Rejection::TooLarge)
    } else if over {
        Some(Rejection::Overloaded)
    } else if held >= settings.max_sessions {
        Some(Rejection::Full)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    use super::*;

    fn peer(name: &str, load: f64) -> Peer {
        let node = NodeId::new(name);
        Peer { node, state: PeerState::Alive, load, overloaded: false, capabilities: BTreeSet::from(["echo".into()]) }
    }

    #[test]
    fn overloaded_from_the_threshold_until_clearly_below_it() {
        let (settings, mut gate) = (Settings::default(), LoadGate::default());
        let said: Vec<bool> =
            [0.79, 0.8, 0.7, 0.65, 0.64, 0.7, 0.9].map(|load| gate.update(load, &settings)).into_iter().collect();
        assert_eq!(said, [false, true, true, true, false, false, true]);
    }

    #[test]
    fn only_nodes_that_can_take_it_are_chosen() {
        let (settings, mut rng) = (Settings::default(), SmallRng::seed_from_u64(1));
        let session: SessionId = "s".parse().unwrap();
        let needs = Needs { capabilities: BTreeSet::from(["echo".into()]) };
        let mut unable = peer("unable", 0.0);
        unable.capabilities.clear();
        let mut suspect = peer("suspect", 0.0);
        suspect.state = PeerState::Suspect;
        let mut over = peer("over", 0.7);
        over.overloaded = true;
        let all = [unable, suspect, over, peer("full", 0.8), peer("tried", 0.0), peer("good", 0.79)];
        let tried = BTreeSet::from([NodeId::new("tried")]);
        for _ in 0..50 {
            let chosen = choose_target(&mut rng, &settings, &session, &needs, all.clone(), &tried);
            assert_eq!(chosen, Some(NodeId::new("good")));
        }
        let none = choose_target(&mut rng, &settings, &session, &needs, all[..5].to_vec(), &tried);
        assert_eq!(none, None);
    }

    #[test]
    fn many_who_choose_at_once_do_not_all_choose_the_same() {
        let (settings, mut rng) = (Settings::default(), SmallRng::seed_from_u64(2));
        let peers: Vec<Peer> = (0..10).map(|n| peer(&format!("n{n}"), f64::from(n) * 0.05)).collect();
        let mut chosen = BTreeMap::<NodeId, u32>::new();
        for n in 0..1000 {
            let session: SessionId = format!("s{n}").parse().unwrap();
            let to = choose_target(&mut rng, &settings, &session, &Needs::default(), peers.clone(), &BTreeSet::new());
            *chosen.entry(to.unwrap()).or_default() += 1;
        }
        // The least loaded of ten is in a fifth of all pairs; with the gain of home a little more.
        assert!(chosen.values().all(|count| *count < 300), "{chosen:?}");
        let light: u32 = peers[..5].iter().filter_map(|peer| chosen.get(&peer.node)).sum();
        assert!(light > 600, "the less loaded half gets more than half: {chosen:?}");
    }

    #[test]
    fn what_a_node_says_when_it_is_asked() {
        let settings = Settings { max_sessions: 2, ..Settings::default() };
        let own = Own { load: 0.1, leaving: false, capabilities: BTreeSet::from(["echo".into()]) };
        let (none, codex) = (Needs::default(), Needs { capabilities: BTreeSet::from(["codex".into()]) });
        assert_eq!(reject(&own, false, 1, 10, &none, &settings), None);
        assert_eq!(reject(&own, false, 2, 10, &none, &settings), Some(Rejection::Full));
        assert_eq!(reject(&own, true, 1, 10, &none, &settings), Some(Rejection::Overloaded));
        assert_eq!(reject(&own, false, 1, 10, &codex, &settings), Some(Rejection::NoCapability));
        assert_eq!(reject(&own, false, 1, u64::MAX, &none, &settings), Some(Rejection::TooLarge));
        let leaving = Own { leaving: true, ..own };
        assert_eq!(reject(&leaving, false, 0, 0, &none, &settings), Some(Rejection::Leaving));
    }
}
