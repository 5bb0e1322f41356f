//! What goes in and out: messages, inputs, effects, and what is kept on disk.

use std::sync::Arc;
use std::time::Duration;

use ring::signature::{ED25519, UnparsedPublicKey};
use serde::{Deserialize, Serialize};

use super::choice::Peer;
use super::set::{SetVersion, Voter, VoterSet};
use crate::core::NodeKey;

/// Orders every leadership of an instance: first by the epoch, which only the login side raises, then by the term.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Ballot {
    /// Which charter it is under. 0 is "none".
    pub epoch: u64,
    /// Which leadership under it. 0 is "none yet".
    pub term: u64,
}

impl Ballot {
    /// The first term under a charter, before any vote.
    pub fn of_epoch(epoch: u64) -> Self {
        Self { epoch, term: 0 }
    }

    /// The next term under the same charter.
    #[must_use]
    pub fn next(self) -> Self {
        Self { epoch: self.epoch, term: self.term.saturating_add(1) }
    }
}

/// How long everything takes; all of it follows from the probe period of the gossip.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Pause between two renewals, and between looks at the voter set.
    pub renew: Duration,
    /// Length of a lease.
    pub lease: Duration,
    /// How much of a lease two clocks may differ by, and then as much again, before leases could overlap.
    pub drift: Duration,
    /// Longest wait for the answers to a probe or a vote.
    pub round: Duration,
    /// A voter that has not answered its leader for so long is replaced, even if the gossip thinks that it lives.
    pub mute: Duration,
}

impl Timing {
    /// The timing for a probe period.
    pub fn new(period: Duration) -> Self {
        Self { renew: period, lease: 4 * period, drift: period / 5, round: period.mul_f64(1.5), mute: 12 * period }
    }
}

/// What the login side signs: which epoch it is, and who its first voters are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Charter {
    /// Counts up by one with each charter of an instance, from 1.
    pub epoch: u64,
    /// The first voters. Their seat is the generation under which the login side launched them.
    pub voters: Vec<Voter>,
}

/// A charter as it travels: encoded, with the signature of the instance CA.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedCharter {
    /// The encoded charter.
    pub bytes: Arc<[u8]>,
    /// Ed25519 signature over [`SignedCharter::message`].
    pub signature: Arc<[u8]>,
}

impl Charter {
    const MAGIC: &[u8] = b"drover charter 1\0";

    /// The bytes that are signed and sent: a fixed encoding, so that a signature fits one charter only.
    pub fn encode(&self) -> Arc<[u8]> {
        let mut bytes = Vec::with_capacity(16 + 16 * self.voters.len());
        bytes.extend_from_slice(&self.epoch.to_be_bytes());
        bytes.extend_from_slice(&(self.voters.len() as u64).to_be_bytes());
        for voter in &self.voters {
            bytes.extend_from_slice(&voter.key.0.to_be_bytes());
            bytes.extend_from_slice(&voter.seat.to_be_bytes());
        }
        bytes.into()
    }

    /// Reads what [`Charter::encode`] wrote. `None` for anything else.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut words = bytes.chunks(8).map(|word| word.try_into().map(u64::from_be_bytes));
        let epoch = words.next()?.ok()?;
        let count = usize::try_from(words.next()?.ok()?).ok()?;
        if epoch == 0 || count == 0 || count > super::MAX_VOTERS || bytes.len() != 16 + 16 * count {
            return None;
        }
        let mut voters = Vec::with_capacity(count);
        for _ in 0..count {
            voters.push(Voter { key: NodeKey(words.next()?.ok()?), seat: words.next()?.ok()? });
        }
        voters.sort_unstable();
        voters.windows(2).all(|pair| pair[0].key != pair[1].key).then_some(Self { epoch, voters })
    }
}

impl SignedCharter {
    /// Signs a charter with the instance CA's key.
    pub fn new<E>(
        charter: &Charter,
        cluster_id: &[u8; 16],
        sign: impl FnOnce(&[u8]) -> Result<Vec<u8>, E>,
    ) -> Result<Self, E> {
        let bytes = charter.encode();
        let signature = sign(&Self::message(cluster_id, &bytes))?.into();
        Ok(Self { bytes, signature })
    }

    /// What the signature is over: a text of its own, the cluster id and the charter, so that it fits nothing else.
    pub fn message(cluster_id: &[u8; 16], charter: &[u8]) -> Vec<u8> {
        [Charter::MAGIC, cluster_id, charter].concat()
    }

    /// The charter, if the instance CA with this Ed25519 key signed it for this cluster.
    pub fn verify(&self, ca_public: &[u8], cluster_id: &[u8; 16]) -> Option<Charter> {
        UnparsedPublicKey::new(&ED25519, ca_public)
            .verify(&Self::message(cluster_id, &self.bytes), &self.signature)
            .ok()?;
        Charter::decode(&self.bytes)
    }
}

/// Says whether a charter is the login side's. The shell's is [`SignedCharter::verify`] with the instance CA; a simulator's
/// is cheaper.
pub trait Notary: Send {
    /// The charter, if it is genuine.
    fn check(&self, signed: &SignedCharter) -> Option<Charter>;
}

/// What one node asks of another. The shell says from whom it is, by the certificate of the connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The seat that is meant; a node in another seat refuses. Without meaning for [`Ask::Invite`] and [`Ask::Who`].
    pub seat: u64,
    /// What is asked.
    pub ask: Ask,
    /// The charter under which it is asked, for a node that may not have it.
    pub charter: Option<SignedCharter>,
}

/// The questions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// Would you vote for me? Changes nothing, so that a node that nobody can follow disturbs nobody.
    Probe {
        /// The term that it would be.
        ballot: Ballot,
        /// Which start of the asker this is.
        boot: u64,
        /// The set that the asker would lead.
        version: SetVersion,
    },
    /// Vote for me, and grant me the first lease.
    Vote {
        /// The term.
        ballot: Ballot,
        /// Which start of the asker this is.
        boot: u64,
        /// The set that the asker would lead.
        version: SetVersion,
    },
    /// I lead: grant me the lease anew, and take this set for the one in force.
    Renew {
        /// The term.
        ballot: Ballot,
        /// Which start of the asker this is.
        boot: u64,
        /// Comes back in the answer; the asker knows when it sent it.
        seq: u64,
        /// The set in force; left out for a voter that has said that it has it.
        set: Option<VoterSet>,
    },
    /// I no longer lead and never will in this term: the lease is free at once.
    Release {
        /// The term.
        ballot: Ballot,
        /// Which start of the asker this is.
        boot: u64,
        /// The last set of the term, so that whoever comes next knows it.
        set: Option<VoterSet>,
    },
    /// Which seat have you? Asked of nodes that may become voters.
    Invite,
    /// Who leads, as far as you know?
    Who,
}

/// The answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The ballot of the request, for the asker to know which one is meant.
    pub ballot: Ballot,
    /// The seat of the answering node.
    pub seat: u64,
    /// The highest ballot that the answering node has promised.
    pub promised: Ballot,
    /// What came of it.
    pub outcome: Outcome,
    /// The set of the answering node, when it is newer than the asker's.
    pub set: Option<VoterSet>,
    /// The charter of the answering node, when its epoch is higher than the asker's.
    pub charter: Option<SignedCharter>,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// To [`Ask::Probe`]: yes.
    Would,
    /// To [`Ask::Vote`]: voted, and the first lease granted.
    Voted,
    /// To [`Ask::Renew`]: granted, and this is the set that is now on disk here.
    Granted {
        /// As in the request.
        seq: u64,
        /// The set on disk.
        version: SetVersion,
    },
    /// To [`Ask::Release`]: noted.
    Released,
    /// To [`Ask::Invite`]: yes, in the seat of the answer.
    Willing,
    /// To [`Ask::Who`]: what I know.
    Knows(Known),
    /// To anything: no.
    Refused(Refusal),
}

/// Why not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The node has another seat than the one that was meant.
    OtherSeat,
    /// It has promised a higher ballot.
    OldBallot,
    /// It has voted for another in this term.
    Voted,
    /// It has granted a lease that runs for so much longer.
    LeaseRuns(Duration),
    /// It knows a newer set.
    OldSet,
    /// It has no charter, or not this one, and was not given it.
    NoCharter,
    /// It is leaving.
    Leaving,
    /// The message makes no sense.
    Nonsense,
}

/// Who leads, as far as a node knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// The leader and its term; the last that was heard of.
    pub leader: Option<(NodeKey, Ballot)>,
    /// How long the lease that this node granted still runs; zero when it has granted none.
    pub left: Duration,
}

/// What is kept on disk. All of it is small, and changes only with a term or a set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Durable {
    /// The seat of this node: the generation in which this file was begun.
    pub seat: u64,
    /// The highest ballot that was promised.
    pub promised: Ballot,
    /// Whom it voted for in that ballot.
    #[serde(with = "as_number")]
    pub vote: Option<NodeKey>,
    /// The newest set that is known; empty until there is a charter.
    pub set: VoterSet,
    /// The charter of the promised epoch.
    pub charter: Option<SignedCharter>,
}

/// What happens to the state machine.
#[derive(Debug, Clone)]
pub enum Input {
    /// The time of [`super::Lease::deadline`] has come. Harmless at any other time.
    Timer,
    /// A request of another node; `call` comes back in [`Effect::Answer`].
    Request {
        /// Which call it is, for the shell.
        call: u64,
        /// Whose certificate the connection shows.
        from: NodeKey,
        /// What it asks.
        request: Request,
    },
    /// The answer to an [`Effect::Ask`]. A call that failed is simply not answered.
    Reply {
        /// Who answered.
        from: NodeKey,
        /// What it said.
        reply: Reply,
    },
    /// The members as the gossip sees them now, this node included. Only advice.
    View(Vec<Peer>),
    /// A charter that came from the login side, by file or by mailbox. Not yet checked.
    Charter(SignedCharter),
    /// A member says in its signed record that it leads. What a node that is no voter knows of the leader, and only advice.
    Claim {
        /// Who says so.
        leader: NodeKey,
        /// In which term.
        ballot: Ballot,
    },
    /// This node leaves in order: it hands its seat and its leadership to others, as far as there are any. The shell waits
    /// for [`Standing::Gone`], or as long as it likes.
    Leave,
}

/// What the shell carries out, in this order. When a [`Effect::Persist`] fails, nothing behind it may be carried out: the
/// shell ends the lease's part in this process, as if it had crashed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Write this, synced, before the next effect.
    Persist(Durable),
    /// Send a request; its answer comes back as [`Input::Reply`].
    Ask {
        /// To whom.
        to: NodeKey,
        /// What.
        request: Request,
    },
    /// Answer the call.
    Answer {
        /// Of [`Input::Request`].
        call: u64,
        /// What.
        reply: Reply,
    },
    /// Where this node stands has changed.
    Standing(Standing),
}

/// Where a node stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Nobody is known to lead.
    Leaderless,
    /// Another leads.
    Follows {
        /// Who.
        leader: NodeKey,
        /// In which term.
        ballot: Ballot,
    },
    /// This node leads, as long as [`super::Lease::leads`] says so at the very moment of acting.
    Leads {
        /// In which term.
        ballot: Ballot,
    },
    /// This node has left, and no longer counts as a voter, or there was nobody to take its place.
    Gone,
}

/// A node's key in a file: a number.
mod as_number {
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    use crate::core::NodeKey;

    #[expect(clippy::ref_option, reason = "serde calls it so")]
    pub(super) fn serialize<S: Serializer>(key: &Option<NodeKey>, to: S) -> Result<S::Ok, S::Error> {
        key.map(|key| key.0).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<NodeKey>, D::Error> {
        Ok(Option::<u64>::deserialize(from)?.map(NodeKey))
    }
}
