//! The state machine itself: one input in, effects out.

use std::collections::BTreeMap;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use super::candidate::Campaign;
use super::choice::{Peer, PeerState};
use super::leader::Leading;
use super::set::{SetVersion, Voter, VoterSet};
use super::types::{
    Ask, Ballot, Charter, Durable, Effect, Input, Notary, Reply, Request, SignedCharter, Standing, Timing,
};
use crate::core::{NodeKey, Time};

/// What a node starts with.
pub struct Start {
    /// This node.
    pub me: NodeKey,
    /// Which start of the node this is; greater than every one before.
    pub boot: u64,
    /// The seat that it takes when it remembers nothing: the generation of its launch.
    pub seat: u64,
    /// What it remembers.
    pub durable: Option<Durable>,
    /// How long everything takes.
    pub timing: Timing,
    /// Decides the random pauses.
    pub seed: u64,
    /// Who checks charters.
    pub notary: Box<dyn Notary>,
    /// For the simulator alone.
    #[doc(hidden)]
    pub guards: Guards,
}

/// What the simulator takes away to show that its invariants notice. In production all of them stand.
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub struct Guards {
    /// A change of the voter set needs a majority of the old set too.
    pub old_majority: bool,
    /// A voter waits until the lease that it granted has run out.
    pub wait_out: bool,
}

impl Default for Guards {
    fn default() -> Self {
        Self { old_majority: true, wait_out: true }
    }
}

/// The lease of one node. See the module's page.
pub struct Lease {
    pub(super) me: NodeKey,
    pub(super) boot: u64,
    pub(super) timing: Timing,
    pub(super) guards: Guards,
    pub(super) notary: Box<dyn Notary>,
    pub(super) rng: SmallRng,
    /// What is on disk, or will be before anybody hears of it.
    pub(super) disk: Durable,
    /// The lease that this node has granted.
    pub(super) grant: Option<Grant>,
    /// Until then a lease may run that this node granted and has forgotten, or that is of an epoch before.
    pub(super) quiet_until: Time,
    /// Leases up to this ballot were given back by their holder.
    pub(super) released: Ballot,
    pub(super) role: Role,
    pub(super) view: BTreeMap<NodeKey, Peer>,
    /// Who was last heard to lead.
    pub(super) leader: Option<(NodeKey, Ballot)>,
    /// When a follower stands for election next.
    pub(super) try_at: Time,
    /// Set once this node leaves: when it goes even if nobody took its place.
    pub(super) leaving: Option<Time>,
    standing: Standing,
}

/// A lease that this node granted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grant {
    pub(super) holder: NodeKey,
    pub(super) boot: u64,
    pub(super) ballot: Ballot,
    pub(super) until: Time,
}

pub(super) enum Role {
    Follower,
    Candidate(Campaign),
    Leader(Leading),
    /// It has left and takes no further part, but for answering others.
    Gone,
}

impl Lease {
    /// Begins at `now`. Call [`Lease::handle`] with [`Input::Timer`] next.
    pub fn new(start: Start, now: Time) -> Self {
        let Start { me, boot, seat, durable, timing, seed, notary, guards } = start;
        let remembers = durable.is_some();
        let disk = durable.unwrap_or_else(|| Durable {
            seat,
            promised: Ballot::default(),
            vote: None,
            set: VoterSet::default(),
            charter: None,
        });
        // Whoever has been in an election may have granted a lease before it was restarted.
        let may_have_granted = remembers && (disk.promised.term > 0 || disk.promised.epoch > 1);
        let quiet_until = if may_have_granted && guards.wait_out { now + timing.lease + timing.drift } else { now };
        let mut lease = Self {
            me,
            boot,
            timing,
            guards,
            notary,
            rng: SmallRng::seed_from_u64(seed ^ me.0 ^ boot),
            disk,
            grant: None,
            quiet_until,
            released: Ballot::default(),
            role: Role::Follower,
            view: BTreeMap::new(),
            leader: None,
            try_at: quiet_until,
            leaving: None,
            standing: Standing::Leaderless,
        };
        lease.try_at = lease.some_time_after(quiet_until);
        lease
    }

    /// Takes one input at `now` and appends what is to be done.
    pub fn handle(&mut self, now: Time, input: Input, out: &mut Vec<Effect>) {
        // Before anything else: a process that was stopped must not act on a lease that has run out meanwhile.
        self.end_what_is_over(now, out);
        match input {
            Input::Timer => {}
            Input::Request { call, from, request } => {
                let reply = self.on_request(now, from, request, out);
                out.push(Effect::Answer { call, reply });
            }
            Input::Reply { from, reply } => self.on_reply(now, from, &reply, out),
            Input::View(peers) => self.view = peers.into_iter().map(|peer| (peer.key, peer)).collect(),
            Input::Charter(signed) => self.adopt_charter(now, &signed, out),
            Input::Claim { leader, ballot } => {
                if self.leader.is_none_or(|(_, known)| ballot > known) && leader != self.me {
                    self.leader = Some((leader, ballot));
                }
            }
            Input::Leave => self.leaving = self.leaving.or(Some(now + self.timing.round * 4)),
        }
        self.tick(now, out);
        self.tell_standing(now, out);
    }

    /// When to call next with [`Input::Timer`]; `None` while only a message can change anything.
    pub fn deadline(&self, now: Time) -> Option<Time> {
        let role = match &self.role {
            Role::Follower => self.may_stand().then_some(self.try_at),
            Role::Candidate(campaign) => Some(campaign.ends.min(campaign.again)),
            Role::Leader(leading) => Some(leading.next_renew.min(self.lease_until(leading))),
            Role::Gone => None,
        };
        let grant = self.grant.filter(|grant| grant.until > now).map(|grant| grant.until);
        let leaving = self.leaving.filter(|_| !matches!(self.role, Role::Gone));
        [role, grant, leaving].into_iter().flatten().min()
    }

    /// The term in which this node leads at this very moment. Whoever acts as the leader asks right before the act, and
    /// gives the ballot to whom it acts upon, who refuses lower ones.
    pub fn leads(&self, now: Time) -> Option<Ballot> {
        match &self.role {
            Role::Leader(leading) if now < self.lease_until(leading) => Some(leading.ballot),
            _ => None,
        }
    }

    /// How long the lease still runs that makes this node the leader, or that it granted to the leader.
    pub fn remaining(&self, now: Time) -> Duration {
        match &self.role {
            Role::Leader(leading) => self.lease_until(leading).since(now),
            _ => self.grant.map_or(Duration::ZERO, |grant| grant.until.since(now)),
        }
    }

    /// Where this node stands.
    pub fn standing(&self, now: Time) -> Standing {
        if matches!(self.role, Role::Gone) {
            return Standing::Gone;
        }
        if let Some(ballot) = self.leads(now) {
            return Standing::Leads { ballot };
        }
        let Some((leader, ballot)) = self.leader.filter(|(leader, _)| *leader != self.me) else {
            return Standing::Leaderless;
        };
        // A voter knows by the lease that it granted; others can only ask whether the leader seems to live.
        let led = if self.is_voter() {
            self.grant.is_some_and(|grant| grant.holder == leader && now < grant.until)
        } else {
            self.view.get(&leader).is_some_and(|peer| matches!(peer.state, PeerState::Alive | PeerState::Suspect))
        };
        if led { Standing::Follows { leader, ballot } } else { Standing::Leaderless }
    }

    /// The newest voter set that this node knows.
    pub fn voters(&self) -> &VoterSet {
        &self.disk.set
    }

    /// What this node has on disk.
    pub fn durable(&self) -> &Durable {
        &self.disk
    }

    /// This node as a voter.
    pub(super) fn self_voter(&self) -> Voter {
        Voter { key: self.me, seat: self.disk.seat }
    }

    /// Whether this node votes.
    pub fn is_voter(&self) -> bool {
        self.disk.set.contains(self.self_voter())
    }

    pub(super) fn may_stand(&self) -> bool {
        self.leaving.is_none() && self.is_voter()
    }

    /// A pause after a moment, different on each node, so that not all stand at once.
    /// Spread widely: those who stand within the time that a request travels take each other's votes.
    pub(super) fn some_time_after(&mut self, time: Time) -> Time {
        time + self.timing.round.mul_f64(self.rng.random_range(0.05..1.5))
    }

    pub(super) fn persist(&self, out: &mut Vec<Effect>) {
        out.push(Effect::Persist(self.disk.clone()));
    }

    pub(super) fn ask(&self, to: Voter, ask: Ask, charter: bool, out: &mut Vec<Effect>) {
        let charter = if charter { self.disk.charter.clone() } else { None };
        out.push(Effect::Ask { to: to.key, request: Request { seat: to.seat, ask, charter } });
    }

    /// Takes over a charter of a higher epoch. The login side gives one out only when it knows that no majority of the
    /// epoch before is left, but a lease of that epoch may still run: that is waited out.
    pub(super) fn adopt_charter(&mut self, now: Time, signed: &SignedCharter, out: &mut Vec<Effect>) {
        if self.disk.charter.as_ref() == Some(signed) {
            return;
        }
        let Some(Charter { epoch, voters }) = self.notary.check(signed) else { return };
        if epoch <= self.disk.promised.epoch {
            return;
        }
        let ballot = Ballot::of_epoch(epoch);
        self.disk.promised = ballot;
        self.disk.vote = None;
        self.disk.set = VoterSet { version: SetVersion { ballot, generation: 0 }, voters, old: Vec::new() };
        self.disk.charter = Some(signed.clone());
        if epoch > 1 && self.guards.wait_out {
            self.quiet_until = self.quiet_until.max(now + self.timing.lease + self.timing.drift);
        }
        self.role = Role::Follower;
        self.try_at = self.some_time_after(self.quiet_until.max(now));
        self.persist(out);
    }

    /// Takes over a newer set, whoever tells of it: a set is in force from the moment that it is written, and who knows
    /// it must no longer vote by an older one.
    pub(super) fn learn_set(&mut self, set: &VoterSet) -> bool {
        if set.version <= self.disk.set.version
            || set.version.ballot.epoch != self.disk.promised.epoch
            || !set.is_sound()
        {
            return false;
        }
        if set.version.ballot > self.disk.promised {
            self.disk.promised = set.version.ballot;
            self.disk.vote = None;
        }
        self.disk.set = set.clone();
        true
    }

    fn on_reply(&mut self, now: Time, from: NodeKey, reply: &Reply, out: &mut Vec<Effect>) {
        if let Some(signed) = &reply.charter {
            self.adopt_charter(now, signed, out);
        }
        // A leader or a candidate whose set is not the newest is behind the times.
        if let Some(set) = &reply.set
            && self.learn_set(set)
        {
            self.persist(out);
            self.give_up(now, None, out);
            self.follow(now);
        }
        match &self.role {
            Role::Candidate(_) => self.on_reply_to_candidate(now, from, reply, out),
            Role::Leader(_) => self.on_reply_to_leader(now, from, reply, out),
            Role::Follower | Role::Gone => {}
        }
    }

    /// No longer candidate or leader. The lease that this node granted, even to itself, runs on.
    pub(super) fn follow(&mut self, now: Time) {
        self.role = Role::Follower;
        self.try_at = self.some_time_after(now);
    }

    fn end_what_is_over(&mut self, now: Time, out: &mut Vec<Effect>) {
        if let Role::Leader(leading) = &self.role
            && now >= self.lease_until(leading)
        {
            self.follow(now);
            self.tell_standing(now, out);
        }
    }

    fn tick(&mut self, now: Time, out: &mut Vec<Effect>) {
        match &self.role {
            Role::Follower if now >= self.try_at && self.may_stand() => self.stand(now, out),
            Role::Candidate(campaign) if now >= campaign.ends => self.give_up(now, None, out),
            Role::Candidate(campaign) if now >= campaign.again => self.ask_the_silent(now, out),
            Role::Leader(leading) if now >= leading.next_renew => self.renew(now, out),
            _ => {}
        }
        if let Some(by) = self.leaving
            && !matches!(self.role, Role::Gone)
        {
            self.leave(now, by, out);
        }
    }

    fn leave(&mut self, now: Time, by: Time, out: &mut Vec<Effect>) {
        match self.role {
            Role::Leader(_) if now >= by || !self.has_heirs() => self.resign(out),
            Role::Candidate(_) => self.give_up(now, None, out),
            Role::Follower if now >= by || !self.is_voter() => self.role = Role::Gone,
            _ => {}
        }
    }

    fn tell_standing(&mut self, now: Time, out: &mut Vec<Effect>) {
        let standing = self.standing(now);
        if standing != self.standing {
            self.standing = standing;
            out.push(Effect::Standing(standing));
        }
    }
}
