//! What a voter answers. Every promise is on disk before the answer.

use std::time::Duration;

use super::engine::{Grant, Lease, Role};
use super::set::{SetVersion, VoterSet};
use super::types::{Ask, Ballot, Effect, Known, Outcome, Refusal, Reply, Request};
use crate::core::{NodeKey, Time};

/// A term that is so far ahead is no honest one; taking it would use up the numbers.
const MAX_LEAP: u64 = 1 << 20;

impl Lease {
    pub(super) fn on_request(&mut self, now: Time, from: NodeKey, request: Request, out: &mut Vec<Effect>) -> Reply {
        if let Some(signed) = &request.charter {
            self.adopt_charter(now, signed, out);
        }
        let (ballot, version) = match &request.ask {
            Ask::Probe { ballot, version, .. } | Ask::Vote { ballot, version, .. } => (*ballot, *version),
            Ask::Renew { ballot, set, .. } | Ask::Release { ballot, set, .. } => {
                (*ballot, set.as_ref().map_or(self.disk.set.version, |set| set.version))
            }
            Ask::Invite | Ask::Who => (self.disk.promised, self.disk.set.version),
        };
        let outcome = self.answer(now, from, request, ballot, out);
        Reply {
            ballot,
            seat: self.disk.seat,
            promised: self.disk.promised,
            outcome,
            set: (self.disk.set.version > version).then(|| self.disk.set.clone()),
            charter: if self.disk.promised.epoch > ballot.epoch { self.disk.charter.clone() } else { None },
        }
    }

    fn answer(&mut self, now: Time, from: NodeKey, request: Request, ballot: Ballot, out: &mut Vec<Effect>) -> Outcome {
        if matches!(request.ask, Ask::Who) {
            let left = self.grant.map_or(Duration::ZERO, |grant| grant.until.since(now));
            return Outcome::Knows(Known { leader: self.leader, left });
        }
        if self.disk.charter.is_none() || ballot.epoch > self.disk.promised.epoch {
            return Outcome::Refused(Refusal::NoCharter);
        }
        if matches!(request.ask, Ask::Invite) {
            // One that must still keep quiet would only hold up the set that it is taken into.
            return match (self.leaving, self.quiet_until.since(now)) {
                (Some(_), _) => Outcome::Refused(Refusal::Leaving),
                (None, Duration::ZERO) => Outcome::Willing,
                (None, left) => Outcome::Refused(Refusal::LeaseRuns(left)),
            };
        }
        if request.seat != self.disk.seat {
            return Outcome::Refused(Refusal::OtherSeat);
        }
        if ballot.term > self.disk.promised.term.saturating_add(MAX_LEAP) || from == self.me {
            return Outcome::Refused(Refusal::Nonsense);
        }
        match request.ask {
            Ask::Probe { boot, version, .. } => match self.may_vote(now, from, boot, ballot, version) {
                Ok(()) => Outcome::Would,
                Err(why) => Outcome::Refused(why),
            },
            Ask::Vote { boot, version, .. } => match self.may_vote(now, from, boot, ballot, version) {
                Ok(()) => self.vote(now, from, boot, ballot, out),
                Err(why) => Outcome::Refused(why),
            },
            Ask::Renew { boot, seq, set, .. } => {
                match self.may_grant(now, from, boot, ballot, set.as_ref()) {
                    Ok(()) => self.grant_renewal(now, from, boot, ballot, set.as_ref(), out),
                    Err(why) => return Outcome::Refused(why),
                }
                Outcome::Granted { seq, version: self.disk.set.version }
            }
            Ask::Release { boot, set, .. } => {
                self.take_back(now, from, boot, ballot, set.as_ref(), out);
                Outcome::Released
            }
            Ask::Invite | Ask::Who => Outcome::Refused(Refusal::Nonsense),
        }
    }

    /// Whether this node may vote for that one, itself included.
    pub(super) fn may_vote(
        &self,
        now: Time,
        candidate: NodeKey,
        boot: u64,
        ballot: Ballot,
        version: SetVersion,
    ) -> Result<(), Refusal> {
        if ballot < self.disk.promised {
            return Err(Refusal::OldBallot);
        }
        if ballot == self.disk.promised && self.disk.vote.is_some_and(|vote| vote != candidate) {
            return Err(Refusal::Voted);
        }
        if version < self.disk.set.version {
            return Err(Refusal::OldSet);
        }
        self.free_for(now, candidate, boot, false)
    }

    /// Whether no lease runs that stands in that node's way.
    fn free_for(&self, now: Time, holder: NodeKey, boot: u64, voted_for: bool) -> Result<(), Refusal> {
        if !self.guards.wait_out {
            return Ok(());
        }
        // What was granted and forgotten in the promised term can only have been to the one that was voted for.
        if now < self.quiet_until && !voted_for {
            return Err(Refusal::LeaseRuns(self.quiet_until.since(now)));
        }
        match self.grant {
            Some(grant) if now < grant.until && (grant.holder, grant.boot) != (holder, boot) => {
                Err(Refusal::LeaseRuns(grant.until.since(now)))
            }
            _ => Ok(()),
        }
    }

    fn vote(&mut self, now: Time, candidate: NodeKey, boot: u64, ballot: Ballot, out: &mut Vec<Effect>) -> Outcome {
        if self.disk.promised != ballot || self.disk.vote != Some(candidate) {
            self.disk.promised = ballot;
            self.disk.vote = Some(candidate);
            self.persist(out);
        }
        self.follow(now);
        self.grant_lease(now, candidate, boot, ballot);
        Outcome::Voted
    }

    fn may_grant(
        &self,
        now: Time,
        leader: NodeKey,
        boot: u64,
        ballot: Ballot,
        set: Option<&VoterSet>,
    ) -> Result<(), Refusal> {
        if ballot < self.disk.promised || ballot <= self.released {
            return Err(Refusal::OldBallot);
        }
        let voted_for = ballot == self.disk.promised && self.disk.vote == Some(leader);
        // One leader in a term: this node has voted for another, who then did not win, or the message is not honest.
        let leads_too = matches!(&self.role, Role::Leader(leading) if leading.ballot == ballot);
        if leads_too || set.is_some_and(|set| !set.is_sound() || set.version.ballot > ballot) {
            return Err(Refusal::Nonsense);
        }
        self.free_for(now, leader, boot, voted_for)
    }

    fn grant_renewal(
        &mut self,
        now: Time,
        leader: NodeKey,
        boot: u64,
        ballot: Ballot,
        set: Option<&VoterSet>,
        out: &mut Vec<Effect>,
    ) {
        let mut changed = false;
        if ballot > self.disk.promised || self.disk.vote != Some(leader) {
            self.disk.promised = ballot;
            self.disk.vote = Some(leader);
            changed = true;
        }
        if let Some(set) = set {
            changed |= self.learn_set(set);
        }
        if changed {
            self.persist(out);
        }
        self.role = Role::Follower;
        self.leader = Some((leader, ballot));
        self.grant_lease(now, leader, boot, ballot);
    }

    /// Grants the lease from now on, and plans to stand when it has run out.
    pub(super) fn grant_lease(&mut self, now: Time, holder: NodeKey, boot: u64, ballot: Ballot) {
        let until = now + self.timing.lease + self.timing.drift;
        self.grant = Some(Grant { holder, boot, ballot, until });
        self.try_at = self.some_time_after(until);
    }

    fn take_back(
        &mut self,
        now: Time,
        holder: NodeKey,
        boot: u64,
        ballot: Ballot,
        set: Option<&VoterSet>,
        out: &mut Vec<Effect>,
    ) {
        if let Some(set) = set
            && self.learn_set(set)
        {
            self.persist(out);
        }
        // Only the holder itself speaks for its lease, and only for terms up to the one it names.
        let same = |grant: &Grant| (grant.holder, grant.boot) == (holder, boot) && grant.ballot <= ballot;
        if self.grant.as_ref().is_some_and(same) {
            self.grant = None;
            self.released = self.released.max(ballot);
            if matches!(self.role, Role::Follower) {
                self.try_at = self.some_time_after(now.max(self.quiet_until));
            }
        }
    }
}
