//! Who leads: a lease that a majority of the last agreed voter set grants.
//!
//! A pure state machine, apart from the gossip: it has its own small voter set (at most [`MAX_VOTERS`]), agreed on by
//! majorities, and takes from the gossip only advice on whom to choose as a voter. So a view that is wrong, or that differs
//! from node to node, can cost a leader its time but never makes two of them.
//!
//! ```text
//! charter (signed by the login side: epoch, first voters)
//!     |                                  Probe, Vote                 Renew (grants the lease, carries the voter set)
//!     v          lease ran out          majority: yes               every period, to every voter
//!  Follower ------------------> Candidate --------------> Leader -------------------------------> Follower
//!                                                          stops acting before any grant of its lease runs out
//! ```
//!
//! What it rests on, and which test shows that it does (`tests/src/gossip/lease_sim.rs` removes each in turn):
//!
//! - A voter writes down what it promised before it answers ([`Effect::Persist`] comes before the answer, and the shell carries
//!   effects out in order). So nobody votes twice in a term, however often it restarts.
//! - A voter grants nobody else before the lease that it granted has run out on its own clock, plus a margin; after a
//!   restart it waits a whole lease, for it may have granted one. The leader counts from before it asked, and stops earlier by a
//!   margin. So leases do not overlap while clocks run within [`Timing::drift`] of real time.
//! - A voter set is changed through a joint set, which needs a majority of the old and one of the new; and a candidate needs the
//!   newest set that its majority knows. So two sets whose majorities do not meet are never in force together.
//! - A voter is a node *and a seat*: a node that lost its memory has another seat, and is asked in anew.
//!
//! Time is the node's own monotonic clock in microseconds. On Linux the shell takes `CLOCK_BOOTTIME`, which goes on while the
//! machine is suspended.

mod candidate;
mod choice;
mod engine;
mod leader;
mod set;
#[cfg(test)]
mod tests;
mod types;
mod voter;

pub use choice::{Peer, PeerState};
pub use engine::{Guards, Lease, Start};
pub use set::{SetVersion, Voter, VoterSet};
pub use types::{
    Ask, Ballot, Charter, Durable, Effect, Input, Known, Notary, Outcome, Refusal, Reply, Request, SignedCharter,
    Standing, Timing,
};

/// Most voters. More would not make it safer, only slower.
pub const MAX_VOTERS: usize = 7;
