//! What a leader does: renews its lease, keeps the voter set in good order, and goes in good order.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::choice::{Field, PeerState, Worth};
use super::engine::{Lease, Role};
use super::set::{SetVersion, Voter, VoterSet};
use super::types::{Ask, Ballot, Effect, Outcome, Refusal, Reply, Request};
use crate::core::{NodeKey, Time};

/// Renewals whose answers still count.
const REMEMBERED: usize = 16;

/// What a leader knows beside what is on disk.
pub(super) struct Leading {
    pub(super) ballot: Ballot,
    since: Time,
    seq: u64,
    /// When each of the last renewals was sent.
    sent: VecDeque<(u64, Time)>,
    acks: BTreeMap<Voter, Ack>,
    /// The lease as it stood under the set before the present one. It still counts: nobody can be elected under either set
    /// without a majority of that one, until the next change begins.
    carried: Option<Time>,
    pub(super) next_renew: Time,
    /// Whether a majority has the present set on disk.
    committed: bool,
    /// Voters that were taken out and may not know it yet, with the number of times left to tell them.
    former: Vec<(Voter, u32)>,
    /// Nodes that said that they would be voters, with their seat and when they said so.
    willing: BTreeMap<NodeKey, (u64, Time)>,
    /// Voters whose node said that it has another seat now.
    unseated: BTreeSet<Voter>,
}

/// The last that was heard of a voter.
#[derive(Debug, Clone, Copy)]
struct Ack {
    /// When the newest request was sent that it has granted.
    sent: Time,
    /// When it was heard.
    heard: Time,
    /// The set that it has on disk.
    version: SetVersion,
}

impl Lease {
    /// Majorities as they count here.
    pub(super) fn agreed(&self, set: &VoterSet, yes: impl FnMut(Voter) -> bool) -> bool {
        if self.guards.old_majority { set.agreed(yes) } else { VoterSet { old: Vec::new(), ..set.clone() }.agreed(yes) }
    }

    /// Until when this node may act, by its own clock.
    pub(super) fn lease_until(&self, leading: &Leading) -> Time {
        leading.carried.max(self.granted_until(leading, &self.disk.set)).unwrap_or(Time::ZERO)
    }

    fn granted_until(&self, leading: &Leading, set: &VoterSet) -> Option<Time> {
        let of = |voter: Voter| leading.acks.get(&voter).map(|ack| ack.sent);
        let sent = if self.guards.old_majority {
            set.reached(of)
        } else {
            VoterSet { old: Vec::new(), ..set.clone() }.reached(of)
        };
        sent.map(|sent| sent + self.timing.lease - self.timing.drift)
    }

    /// Leads from now on, with the lease that came with the votes.
    pub(super) fn take_office(
        &mut self,
        now: Time,
        ballot: Ballot,
        asked: Time,
        yes: &BTreeSet<Voter>,
        out: &mut Vec<Effect>,
    ) {
        let ack = Ack { sent: asked, heard: now, version: SetVersion::default() };
        let leading = Leading {
            ballot,
            since: now,
            seq: 0,
            sent: VecDeque::new(),
            acks: yes.iter().map(|voter| (*voter, ack)).collect(),
            carried: None,
            next_renew: now,
            committed: false,
            former: Vec::new(),
            willing: BTreeMap::new(),
            unseated: BTreeSet::new(),
        };
        self.leader = Some((self.me, ballot));
        // The set becomes a set of this term. What an earlier leader wrote and may not have brought to an end is brought to
        // an end by this one, or by nobody.
        let VoterSet { voters, old, .. } = self.disk.set.clone();
        self.role = Role::Leader(leading);
        self.write_set(now, voters, old, out);
    }

    /// Puts the next set into force, and tells it.
    fn write_set(&mut self, now: Time, voters: Vec<Voter>, old: Vec<Voter>, out: &mut Vec<Effect>) {
        let Role::Leader(leading) = &self.role else { return };
        let carried = self.granted_until(leading, &self.disk.set);
        let version = SetVersion { ballot: leading.ballot, generation: self.disk.set.version.generation + 1 };
        let before: Vec<Voter> = self.disk.set.union().collect();
        self.disk.set = VoterSet { version, voters, old };
        self.persist(out);
        let (me, set) = (self.self_voter(), &self.disk.set);
        let Role::Leader(leading) = &mut self.role else { return };
        leading.carried = carried;
        leading.committed = false;
        leading
            .former
            .extend(before.into_iter().filter(|voter| !set.contains(*voter) && *voter != me).map(|voter| (voter, 3)));
        self.renew(now, out);
    }

    /// Asks every voter for the lease anew, and looks after the set.
    pub(super) fn renew(&mut self, now: Time, out: &mut Vec<Effect>) {
        let me = self.self_voter();
        let set = self.disk.set.clone();
        let (boot, drift, lease) = (self.boot, self.timing.drift, self.timing.lease);
        let Role::Leader(leading) = &mut self.role else { return };
        leading.next_renew = now + self.timing.renew;
        leading.seq += 1;
        leading.sent.push_back((leading.seq, now));
        if leading.sent.len() > REMEMBERED {
            leading.sent.pop_front();
        }
        let (ballot, seq) = (leading.ballot, leading.seq);
        if set.contains(me) {
            leading.acks.insert(me, Ack { sent: now, heard: now, version: set.version });
        }
        let former: Vec<Voter> = leading.former.iter().map(|(voter, _)| *voter).collect();
        for entry in &mut leading.former {
            entry.1 -= 1;
        }
        leading.former.retain(|(voter, times)| *times > 0 && !set.contains(*voter));
        let audience: Vec<(Voter, Option<SetVersion>)> = set
            .union()
            .filter(|voter| *voter != me)
            .chain(former)
            .map(|voter| (voter, leading.acks.get(&voter).map(|ack| ack.version)))
            .collect();
        // Its own grant: no other gets this node's vote before its own lease has run out.
        if let Some(grant) = &mut self.grant {
            grant.until = grant.until.max(now + lease + drift);
        }
        for (voter, known) in audience {
            let set = (known != Some(set.version)).then(|| set.clone());
            let first = known.is_none_or(|version| version == SetVersion::default());
            self.ask(voter, Ask::Renew { ballot, boot, seq, set }, first, out);
        }
        self.settle(now, out);
        self.look_after_voters(now, out);
    }

    pub(super) fn on_reply_to_leader(&mut self, now: Time, from: NodeKey, reply: &Reply, out: &mut Vec<Effect>) {
        let voter = Voter { key: from, seat: reply.seat };
        let in_set = self.disk.set.contains(voter);
        let Role::Leader(leading) = &mut self.role else { return };
        match &reply.outcome {
            Outcome::Granted { seq, version } if reply.ballot == leading.ballot => {
                let Some((_, sent)) = leading.sent.iter().find(|(known, _)| known == seq).copied() else { return };
                let ack = leading.acks.entry(voter).or_insert(Ack { sent, heard: now, version: *version });
                ack.sent = ack.sent.max(sent);
                ack.heard = ack.heard.max(now);
                ack.version = ack.version.max(*version);
                self.settle(now, out);
            }
            Outcome::Willing => {
                leading.willing.insert(from, (reply.seat, now));
            }
            Outcome::Refused(Refusal::OtherSeat) => {
                let others = self.disk.set.union().filter(|other| other.key == from && other.seat != reply.seat);
                leading.unseated.extend(others);
            }
            // A voter has promised a later term to somebody who then did not win. It would grant nothing any more in this
            // term: the way out is a later one, which the others give to the holder of the lease at once.
            Outcome::Refused(Refusal::OldBallot)
                if in_set && reply.promised > leading.ballot && reply.promised.epoch == leading.ballot.epoch =>
            {
                self.disk.promised = reply.promised;
                self.disk.vote = None;
                self.persist(out);
                self.follow(now);
            }
            _ => {}
        }
    }

    /// Brings a change of the set one step on, once a majority has the present one on disk.
    fn settle(&mut self, now: Time, out: &mut Vec<Effect>) {
        let set = &self.disk.set;
        let Role::Leader(leading) = &self.role else { return };
        let on_disk = |voter: Voter| leading.acks.get(&voter).is_some_and(|ack| ack.version == set.version);
        if leading.committed || !self.agreed(set, on_disk) {
            return;
        }
        let voters = set.is_joint().then(|| set.voters.clone());
        if let Role::Leader(leading) = &mut self.role {
            leading.committed = true;
        }
        if let Some(voters) = voters {
            self.write_set(now, voters, Vec::new(), out);
        } else if !self.disk.set.contains(self.self_voter()) {
            self.resign(out);
        }
    }

    /// Whether anybody could take over from this node.
    pub(super) fn has_heirs(&self) -> bool {
        let alive = |peer: &PeerState| matches!(peer, PeerState::Alive | PeerState::Suspect);
        self.view.values().any(|peer| peer.key != self.me && alive(&peer.state))
    }

    /// Gives the lease back and goes.
    pub(super) fn resign(&mut self, out: &mut Vec<Effect>) {
        let Role::Leader(leading) = std::mem::replace(&mut self.role, Role::Follower) else { return };
        // Those that were taken out may not know it; they hold a grant that somebody may be waiting for.
        let told: Vec<Voter> = leading.former.iter().map(|(voter, _)| *voter).collect();
        self.give_back(leading.ballot, out);
        for voter in told {
            let ask = Ask::Release { ballot: leading.ballot, boot: self.boot, set: Some(self.disk.set.clone()) };
            self.ask(voter, ask, false, out);
        }
        if self.leaving.is_some() {
            self.role = Role::Gone;
        }
    }

    /// Invites nodes that may be needed, and begins a change of the set when one would be better.
    fn look_after_voters(&mut self, now: Time, out: &mut Vec<Effect>) {
        let Role::Leader(leading) = &self.role else { return };
        if !leading.committed || self.disk.set.is_joint() {
            return;
        }
        let fresh: BTreeMap<NodeKey, u64> = leading
            .willing
            .iter()
            .filter(|(_, (_, said))| now < *said + self.timing.renew * 3)
            .map(|(key, (seat, _))| (*key, *seat))
            .collect();
        let field = Field { me: self.me, set: &self.disk.set, view: &self.view, willing: &fresh };
        let worth = |voter: Voter| self.worth(now, leading, voter);
        let chosen = field.choose(worth);
        let wanted = field.wanted(worth);
        for key in wanted {
            let charter = self.disk.charter.clone();
            out.push(Effect::Ask { to: key, request: Request { seat: 0, ask: Ask::Invite, charter } });
        }
        if let Some(voters) = chosen {
            let old = self.disk.set.voters.clone();
            self.write_set(now, voters, old, out);
        }
    }

    fn worth(&self, now: Time, leading: &Leading, voter: Voter) -> Worth {
        let state = self.view.get(&voter.key).map(|peer| peer.state);
        if voter == self.self_voter() {
            return if self.leaving.is_some() { Worth::Gone } else { Worth::Good };
        }
        if state == Some(PeerState::Left) || leading.unseated.contains(&voter) {
            return Worth::Gone;
        }
        let silent = now.since(leading.acks.get(&voter).map_or(leading.since, |ack| ack.heard));
        if silent < self.timing.renew * 3 {
            return Worth::Good;
        }
        match state {
            Some(PeerState::Alive | PeerState::Suspect) if silent < self.timing.mute => Worth::Good,
            None if silent >= self.timing.mute => Worth::Gone,
            _ => Worth::Lost,
        }
    }
}
