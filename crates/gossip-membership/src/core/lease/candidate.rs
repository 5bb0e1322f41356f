//! Standing for election: first a probe, which changes nothing anywhere, then the vote.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::engine::{Lease, Role};
use super::set::Voter;
use super::types::{Ask, Ballot, Effect, Outcome, Refusal, Reply};
use crate::core::{NodeKey, Time};

/// One attempt.
pub(super) struct Campaign {
    pub(super) ballot: Ballot,
    pub(super) step: Step,
    /// When it was asked: the lease counts from here.
    pub(super) asked: Time,
    /// When those that have not answered are asked again.
    pub(super) again: Time,
    /// When it is given up.
    pub(super) ends: Time,
    yes: BTreeSet<Voter>,
    /// Those that refused, and how long each will go on refusing, as far as it said.
    no: BTreeMap<Voter, Option<Duration>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Probe,
    Vote,
}

impl Lease {
    /// Asks whether the others would vote for this node.
    pub(super) fn stand(&mut self, now: Time, out: &mut Vec<Effect>) {
        let ballot = self.disk.promised.next();
        match self.may_vote(now, self.me, self.boot, ballot, self.disk.set.version) {
            Ok(()) => {}
            Err(Refusal::LeaseRuns(left)) => {
                self.try_at = self.some_time_after(now + left);
                return;
            }
            Err(_) => {
                self.try_at = self.some_time_after(now + self.timing.round);
                return;
            }
        }
        self.campaign(now, ballot, Step::Probe, out);
    }

    /// Votes for itself, which is on disk before anybody is asked, and asks for the votes.
    fn ask_for_votes(&mut self, now: Time, ballot: Ballot, out: &mut Vec<Effect>) {
        if self.may_vote(now, self.me, self.boot, ballot, self.disk.set.version).is_err() {
            self.give_up(now, None, out);
            return;
        }
        self.disk.promised = ballot;
        self.disk.vote = Some(self.me);
        self.persist(out);
        self.grant_lease(now, self.me, self.boot, ballot);
        self.campaign(now, ballot, Step::Vote, out);
    }

    fn campaign(&mut self, now: Time, ballot: Ballot, step: Step, out: &mut Vec<Effect>) {
        let me = self.self_voter();
        let yes = BTreeSet::from([me]);
        let ends = now + self.timing.round;
        self.role = Role::Candidate(Campaign { ballot, step, asked: now, again: now, ends, yes, no: BTreeMap::new() });
        self.ask_the_silent(now, out);
        self.count(now, out);
    }

    /// Asks whoever has not answered yet: a lost message must not cost a lease's time.
    pub(super) fn ask_the_silent(&mut self, now: Time, out: &mut Vec<Effect>) {
        let Role::Candidate(campaign) = &mut self.role else { return };
        campaign.again = now + self.timing.round / 4;
        let Role::Candidate(campaign) = &self.role else { return };
        let (ballot, boot, version) = (campaign.ballot, self.boot, self.disk.set.version);
        for voter in self.disk.set.union() {
            if campaign.yes.contains(&voter) || campaign.no.contains_key(&voter) {
                continue;
            }
            let ask = match campaign.step {
                Step::Probe => Ask::Probe { ballot, boot, version },
                Step::Vote => Ask::Vote { ballot, boot, version },
            };
            self.ask(voter, ask, true, out);
        }
    }

    pub(super) fn on_reply_to_candidate(&mut self, now: Time, from: NodeKey, reply: &Reply, out: &mut Vec<Effect>) {
        let Role::Candidate(campaign) = &mut self.role else { return };
        let voter = Voter { key: from, seat: reply.seat };
        if reply.ballot != campaign.ballot {
            return;
        }
        match (reply.outcome.clone(), campaign.step) {
            (Outcome::Would, Step::Probe) | (Outcome::Voted, Step::Vote) => {
                campaign.yes.insert(voter);
            }
            (Outcome::Refused(Refusal::LeaseRuns(left)), _) => {
                campaign.no.insert(voter, Some(left));
            }
            (Outcome::Refused(Refusal::OldBallot), _) => {
                // Next time above what they have promised.
                if reply.promised.epoch == self.disk.promised.epoch && reply.promised > self.disk.promised {
                    self.disk.promised = reply.promised;
                    self.disk.vote = None;
                    self.persist(out);
                }
                self.give_up(now, Some(Duration::ZERO), out);
                return;
            }
            (Outcome::Refused(_), _) => {
                campaign.no.insert(voter, None);
            }
            _ => return,
        }
        self.count(now, out);
    }

    fn count(&mut self, now: Time, out: &mut Vec<Effect>) {
        let Role::Candidate(campaign) = &self.role else { return };
        let set = &self.disk.set;
        let (ballot, asked) = (campaign.ballot, campaign.asked);
        if self.agreed(set, |voter| campaign.yes.contains(&voter)) {
            match campaign.step {
                Step::Probe => self.ask_for_votes(now, ballot, out),
                Step::Vote => {
                    let yes = campaign.yes.clone();
                    self.take_office(now, ballot, asked, &yes, out);
                }
            }
        } else if !self.agreed(set, |voter| !campaign.no.contains_key(&voter)) {
            // No majority can come of it any more. After how long could one, by what they said?
            let mut waits: Vec<Duration> = campaign.no.values().copied().flatten().collect();
            waits.sort_unstable();
            let free = |wait: Duration| {
                self.agreed(set, |voter| match campaign.no.get(&voter) {
                    Some(left) => left.is_some_and(|left| left <= wait),
                    None => true,
                })
            };
            let wait = waits.into_iter().find(|&wait| free(wait));
            self.give_up(now, wait, out);
        }
    }

    /// Ends the attempt, and frees whoever has voted for it: they need not wait for a lease that nobody uses.
    pub(super) fn give_up(&mut self, now: Time, wait: Option<Duration>, out: &mut Vec<Effect>) {
        let Role::Candidate(campaign) = std::mem::replace(&mut self.role, Role::Follower) else { return };
        if campaign.step == Step::Vote {
            self.give_back(campaign.ballot, out);
        }
        let wait = wait.unwrap_or(self.timing.round / 2).min(self.timing.lease + self.timing.drift);
        self.try_at = self.some_time_after(now + wait);
    }

    /// Frees all voters of the lease of this term. From here on this node never leads in this term.
    pub(super) fn give_back(&mut self, ballot: Ballot, out: &mut Vec<Effect>) {
        let me = self.self_voter();
        let (boot, set) = (self.boot, &self.disk.set);
        for voter in set.union().filter(|voter| *voter != me) {
            self.ask(voter, Ask::Release { ballot, boot, set: Some(set.clone()) }, false, out);
        }
        if self.grant.is_some_and(|grant| grant.holder == self.me) {
            self.grant = None;
        }
        self.released = self.released.max(ballot);
    }
}
