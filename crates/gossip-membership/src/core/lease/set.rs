//! The voter set: who votes, and which majorities count.

use serde::{Deserialize, Serialize};

use super::types::Ballot;
use crate::core::NodeKey;

/// One voter. A node that comes back without its memory has another seat, and is another voter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Voter {
    /// The node.
    #[serde(with = "as_number")]
    pub key: NodeKey,
    /// Its seat: the generation in which it began to remember.
    pub seat: u64,
}

/// Which set is newer: the one that a later leader wrote, and of one leader's sets the later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct SetVersion {
    /// The term of the leader that wrote it.
    pub ballot: Ballot,
    /// Counts the sets of an instance; grows with each that is written.
    pub generation: u64,
}

/// The agreed voters; during a change both the old and the new ones.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VoterSet {
    /// Which set it is.
    pub version: SetVersion,
    /// The voters, sorted.
    pub voters: Vec<Voter>,
    /// During a change the voters before it, sorted; else empty.
    pub old: Vec<Voter>,
}

impl VoterSet {
    /// Whether it is in the middle of a change.
    pub fn is_joint(&self) -> bool {
        !self.old.is_empty()
    }

    /// Whether this is one of the voters, old or new.
    pub fn contains(&self, voter: Voter) -> bool {
        self.voters.contains(&voter) || self.old.contains(&voter)
    }

    /// Old and new voters, each once.
    pub fn union(&self) -> impl Iterator<Item = Voter> {
        let added = self.old.iter().filter(|voter| !self.voters.contains(voter));
        self.voters.iter().chain(added).copied()
    }

    /// Whether those for whom `yes` holds are a majority of the voters, and during a change also of the old ones.
    pub fn agreed(&self, mut yes: impl FnMut(Voter) -> bool) -> bool {
        majority(&self.voters, &mut yes) && (self.old.is_empty() || majority(&self.old, &mut yes))
    }

    /// The greatest value that a majority has at least reached, and during a change also a majority of the old ones.
    pub fn reached<T: Ord + Default>(&self, mut value: impl FnMut(Voter) -> T) -> T {
        let new = middle(&self.voters, &mut value);
        if self.old.is_empty() { new } else { new.min(middle(&self.old, &mut value)) }
    }

    /// Whether it can be a set at all. What comes from the network must be.
    pub fn is_sound(&self) -> bool {
        let sound = |group: &[Voter]| {
            group.len() <= super::MAX_VOTERS && group.windows(2).all(|pair| pair[0].key < pair[1].key)
        };
        !self.voters.is_empty() && sound(&self.voters) && sound(&self.old)
    }
}

fn majority(group: &[Voter], yes: &mut impl FnMut(Voter) -> bool) -> bool {
    group.iter().filter(|voter| yes(**voter)).count() > group.len() / 2
}

fn middle<T: Ord + Default>(group: &[Voter], value: &mut impl FnMut(Voter) -> T) -> T {
    let mut values: Vec<T> = group.iter().map(|voter| value(*voter)).collect();
    values.sort_unstable_by(|a, b| b.cmp(a));
    values.into_iter().nth(group.len() / 2).unwrap_or_default()
}

/// A node's key in a file: a number.
mod as_number {
    use serde::{Deserialize as _, Deserializer, Serializer};

    use crate::core::NodeKey;

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
    pub(super) fn serialize<S: Serializer>(key: &NodeKey, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(key.0)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<NodeKey, D::Error> {
        Ok(NodeKey(u64::deserialize(from)?))
    }
}
