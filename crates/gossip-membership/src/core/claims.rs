//! What is believed: claims of nodes about themselves, accusations by others, and first-hand signs of life.

use std::sync::Arc;

use rand::Rng;

use super::effect::{Cause, Effect, Event, Note};
use super::engine::Core;
use super::member::{Member, State};
use super::message::{Accusation, Message, Rumor};
use super::record::{NodeKey, SignedRecord, Untrusted};
use super::suspicion::Suspicion;

impl Core {
    /// How many places along the ring nodes look for themselves when they hear of a suspicion.
    const CONFIRMING_NEIGHBOURS: usize = 2;
    /// Up to this many it costs little that each asks once more before it gives a node up.
    const FEW: usize = 64;

    /// Notes a first-hand sign of life. Says whether the node is a known one.
    pub(super) fn hear(&mut self, from: NodeKey, out: &mut Vec<Effect>) -> bool {
        let now = self.now;
        let again = self.settings.batch();
        let Some(member) = self.table.get_mut(from) else { return false };
        let last = member.heard.replace(now);
        let given_up = member.state == State::Dead;
        self.prober.answered(from);
        // It does not know that it was given up, or it would have answered that. Told once in a while, not at every word.
        if given_up && last.is_none_or(|last| now.since(last) > again) {
            let rumors = self.notice_for(from);
            out.push(Effect::Send { to: from, message: Message::Gossip { rumors } });
        }
        true
    }

    pub(super) fn take_rumors(&mut self, from: NodeKey, rumors: Vec<Rumor>, out: &mut Vec<Effect>) {
        for rumor in rumors {
            match rumor {
                Rumor::Alive { record, .. } => {
                    self.claim(record, true, out);
                }
                Rumor::Suspect(accusation) => self.accused(from, accusation, false, out),
                Rumor::Dead(accusation) => self.accused(from, accusation, true, out),
            }
        }
    }

    fn accused(&mut self, from: NodeKey, accusation: Accusation, dead: bool, out: &mut Vec<Effect>) {
        if accusation.key == self.me {
            self.refute(from, accusation, out);
        } else if !self.table.get(accusation.accuser).is_some_and(Member::is_up) && accusation.accuser != self.me {
            out.push(Effect::Note(Note::StrangerAccused { accuser: accusation.accuser }));
        } else if dead {
            self.give_up(accusation, out);
        } else {
            self.suspect(accusation, out);
        }
    }

    /// A node's claim about itself. Says whether it was news.
    pub(super) fn claim(&mut self, record: Arc<SignedRecord>, tell: bool, out: &mut Vec<Effect>) -> bool {
        let key = record.key;
        if key == self.me {
            self.claim_about_me(&record, out);
            return false;
        }
        let version = record.record.version();
        let known = self.table.get(key);
        let stale = known.is_some_and(|member| version <= member.version())
            || self.table.grave(self.now, key).is_some_and(|grave| version <= grave.record.record.version());
        if stale {
            return false;
        }
        let Some(record) = self.trusted(record, out) else { return false };
        let fresh_cert = self.table.get(key).is_some_and(|member| member.record.cert != record.cert);
        match self.table.get(key) {
            None if record.record.leaving => {
                // Never heard of; what is older than the good-bye must not bring it in.
                let until = self.now + self.settings.tombstone();
                self.table.bury(Arc::clone(&record), until, true);
            }
            None => {
                let came_back = self.table.grave(self.now, key).is_some();
                self.table.insert(Member::new(self.now, Arc::clone(&record), State::Alive), &mut self.rng);
                out.push(Effect::Learn(Arc::clone(&record)));
                Self::event(out, Event::Joined(Arc::clone(&record)));
                if came_back {
                    self.pull_soon(key);
                }
            }
            Some(_) => self.replace(&record, out),
        }
        self.members_changed();
        if tell {
            let known = !record.record.leaving && record.record.incarnation > 0 && !fresh_cert;
            let urgent = record.record.leaving || record.record.incarnation > 0;
            self.tell_alive(record, known, urgent);
        }
        true
    }

    fn replace(&mut self, record: &Arc<SignedRecord>, out: &mut Vec<Effect>) {
        let key = record.key;
        let Some(old) = self.table.get(key) else { return };
        let before = old.state;
        let old_record = Arc::clone(&old.record);
        let restarted = old_record.record.boot != record.record.boot;
        if let Some(suspicion) = &old.suspicion {
            self.suspicions.remove(&(suspicion.deadline, key));
        }
        self.table.replace(self.now, key, Arc::clone(record));
        out.push(Effect::Learn(Arc::clone(record)));
        if restarted {
            self.prober.answered(key);
        }
        if record.record.leaving {
            self.rumors.forget(key);
            self.prober.answered(key);
            if before.is_up() {
                Self::event(out, Event::Left { record: Arc::clone(record), cause: Cause::Left });
            }
        } else if !before.is_up() {
            Self::event(out, Event::Joined(Arc::clone(record)));
            if before == State::Dead {
                self.pull_soon(key);
            }
        } else if restarted {
            Self::event(out, Event::Left { record: old_record, cause: Cause::Restarted });
            Self::event(out, Event::Joined(Arc::clone(record)));
        } else {
            if before == State::Suspect {
                Self::event(out, Event::Alive(Arc::clone(record)));
            }
            if differs(&old_record, record) {
                Self::event(out, Event::Updated(Arc::clone(record)));
            }
        }
    }

    /// The record if it is the node's own. A certificate that was left out is taken from what is known of the node.
    fn trusted(&mut self, record: Arc<SignedRecord>, out: &mut Vec<Effect>) -> Option<Arc<SignedRecord>> {
        let bare = record.cert.is_empty();
        let record = if bare {
            let known = self.table.get(record.key).map(|member| &member.record);
            let known = known.or_else(|| self.table.grave(self.now, record.key).map(|grave| &grave.record));
            let Some(known) = known else {
                // It will come with its certificate by a pull.
                return None;
            };
            let cert = Arc::clone(&known.cert);
            Arc::new(SignedRecord { cert, ..SignedRecord::clone(&record) })
        } else {
            record
        };
        match self.verifier.check(&record) {
            Ok(()) => Some(record),
            // Its node may have another certificate by now; a pull brings it.
            Err(Untrusted::BadSignature) if bare => None,
            Err(reason) => {
                out.push(Effect::Note(Note::Untrusted { key: record.key, reason }));
                None
            }
        }
    }

    /// Another program of this node could not work with a member.
    pub(super) fn suspect_reported(&mut self, key: NodeKey, out: &mut Vec<Effect>) {
        let alive = self.table.get(key).filter(|member| member.state == State::Alive);
        if let Some((boot, incarnation)) = alive.map(Member::version) {
            self.suspect(Accusation { key, boot, incarnation, accuser: self.me, refused: false }, out);
        }
    }

    /// Somebody, perhaps this node, could not reach a node.
    pub(super) fn suspect(&mut self, accusation: Accusation, out: &mut Vec<Effect>) {
        let Accusation { key, boot, incarnation, accuser, refused } = accusation;
        let members = self.table.up() + 1;
        let Some(member) = self.table.get_mut(key) else { return };
        if member.version() != (boot, incarnation) {
            return;
        }
        let news = match member.state {
            State::Dead | State::Left => return,
            State::Alive => {
                let suspicion = Suspicion::new(self.now, &self.settings, members, accuser, refused);
                self.suspicions.insert((suspicion.deadline, key));
                member.suspicion = Some(Box::new(suspicion));
                let record = Arc::clone(&member.record);
                self.table.set_state(self.now, key, State::Suspect);
                Self::event(out, Event::Suspect(record));
                self.tell_accused(key, out);
                if accuser != self.me && self.table.is_near(self.me, key, Self::CONFIRMING_NEIGHBOURS) {
                    self.probe(key, out);
                }
                true
            }
            State::Suspect => {
                let Some(suspicion) = member.suspicion.as_mut() else { return };
                let before = suspicion.deadline;
                let confirmed = suspicion.confirm(accuser);
                let refused = refused && suspicion.refuse(self.now, &self.settings);
                if suspicion.deadline != before {
                    self.suspicions.remove(&(before, key));
                    self.suspicions.insert((suspicion.deadline, key));
                }
                confirmed || refused
            }
        };
        if news {
            self.tell(Rumor::Suspect(accusation), true);
        }
    }

    /// Whoever is accused hears of it at once from whoever accuses: nobody needs it more.
    fn tell_accused(&mut self, key: NodeKey, out: &mut Vec<Effect>) {
        let rumors = self.notice_for(key);
        out.push(Effect::Send { to: key, message: Message::Gossip { rumors } });
    }

    /// Somebody, perhaps this node, has given a node up.
    pub(super) fn give_up(&mut self, accusation: Accusation, out: &mut Vec<Effect>) {
        let Accusation { key, boot, incarnation, .. } = accusation;
        let Some(member) = self.table.get_mut(key) else { return };
        if member.version() != (boot, incarnation) || !member.is_up() {
            return;
        }
        if let Some(suspicion) = member.suspicion.take() {
            self.suspicions.remove(&(suspicion.deadline, key));
        }
        let record = Arc::clone(&member.record);
        self.table.set_state(self.now, key, State::Dead);
        self.prober.answered(key);
        Self::event(out, Event::Left { record, cause: Cause::Dead });
        self.members_changed();
        self.tell(Rumor::Dead(accusation), true);
        // One word to itself: if it runs after all, it comes back at once.
        self.tell_accused(key, out);
    }

    /// Parts with members whose certificates are not believed any more. Nobody else is told: each node has its own word for it
    /// from the login side.
    pub(super) fn recheck(&mut self, out: &mut Vec<Effect>) {
        let up: Vec<Arc<SignedRecord>> =
            self.table.iter().filter(|member| member.is_up()).map(|member| Arc::clone(&member.record)).collect();
        for record in up {
            let Err(reason) = self.verifier.check(&record) else { continue };
            let key = record.key;
            if let Some(suspicion) = self.table.get_mut(key).and_then(|member| member.suspicion.take()) {
                self.suspicions.remove(&(suspicion.deadline, key));
            }
            self.rumors.forget(key);
            self.table.set_state(self.now, key, State::Dead);
            self.prober.answered(key);
            out.push(Effect::Note(Note::Untrusted { key, reason }));
            Self::event(out, Event::Left { record, cause: Cause::Distrusted });
            self.members_changed();
        }
    }

    /// Gives up who has been suspect for long enough.
    pub(super) fn run_suspicions(&mut self, out: &mut Vec<Effect>) {
        if self.now < self.hold_until {
            return;
        }
        while let Some((deadline, key)) = self.suspicions.first().copied()
            && self.now >= deadline
        {
            self.suspicions.pop_first();
            let behind = self.is_behind();
            let few = self.table.up() < Self::FEW;
            let Some(member) = self.table.get_mut(key) else { continue };
            let (heard, (boot, incarnation)) = (member.heard, member.version());
            let Some(suspicion) = member.suspicion.as_mut() else { continue };
            // Heard since, by this node itself: it runs, and has only not got round to answering the suspicion.
            let spared = self.settings.period() * 3 / 2;
            if heard.is_some_and(|heard| heard > suspicion.started() && self.now.since(heard) < spared) {
                suspicion.deadline = self.now + self.settings.period();
                suspicion.asked = false;
                self.suspicions.insert((suspicion.deadline, key));
                self.probe_by_all_means(key, out);
                continue;
            }
            let refused = suspicion.refused;
            if !refused && !suspicion.asked && (behind || few || suspicion.is_alone()) {
                // Others see the cluster otherwise, or have not confirmed this, or they are so few that asking is cheap: an answer
                // may have got lost on the way here. Streams lose nothing.
                suspicion.asked = true;
                suspicion.deadline = self.now + self.settings.tick();
                self.suspicions.insert((suspicion.deadline, key));
                self.probe_by_all_means(key, out);
                self.pull_before_verdict(key, out);
                continue;
            }
            self.give_up(Accusation { key, boot, incarnation, accuser: self.me, refused }, out);
        }
    }

    /// Another node accuses this one: only a newer claim of its own answers that.
    pub(super) fn refute(&mut self, from: NodeKey, accusation: Accusation, out: &mut Vec<Effect>) {
        let (boot, incarnation) = self.local.record.version();
        if accusation.boot != boot || self.leaving.is_some() || !self.settings.guards.refute {
            return;
        }
        if accusation.incarnation >= incarnation {
            let renewed = self.renew(|record| record.incarnation = accusation.incarnation, out);
            if renewed.is_ok() {
                let incarnation = self.local.record.incarnation;
                out.push(Effect::Note(Note::Refuted { incarnation, accuser: accusation.accuser }));
                if self.health.worse(1) {
                    out.push(Effect::Note(Note::Health(self.health.score())));
                }
                self.answer(accusation.accuser, out);
            }
        }
        // Also when it was answered before: whoever still says so has missed the answer.
        if from != accusation.accuser {
            self.answer(from, out);
        } else if accusation.incarnation < incarnation {
            self.answer(accusation.accuser, out);
        }
    }

    fn answer(&mut self, to: NodeKey, out: &mut Vec<Effect>) {
        if self.table.get(to).is_some() || self.table.grave(self.now, to).is_some() {
            let rumors = vec![Rumor::Alive { record: Arc::clone(&self.local), bare: true }];
            out.push(Effect::Send { to, message: Message::Gossip { rumors } });
        }
    }

    /// A claim under this node's own name. A newer one is of a process that ran under a clock that was ahead, or of a second
    /// process under the same name; this node goes above it either way.
    fn claim_about_me(&mut self, record: &Arc<SignedRecord>, out: &mut Vec<Effect>) {
        let newer = record.record.version() > self.local.record.version();
        if !newer || self.leaving.is_some() || self.now < self.rival_at {
            return;
        }
        let full;
        let record = if record.cert.is_empty() {
            full = Arc::new(SignedRecord { cert: Arc::clone(&self.local.cert), ..SignedRecord::clone(record) });
            &full
        } else {
            record
        };
        if self.verifier.check(record).is_err() {
            return;
        }
        self.rival_at = self.now + self.settings.period();
        out.push(Effect::Note(Note::Rival { addr: record.record.addr }));
        // By a random step: two processes that go above the same boot must not meet at the same number.
        let boot = record.record.boot.saturating_add(self.rng.random_range(1..1 << 20));
        // Cannot fail: the only change is in a number of fixed width.
        let _ = self.renew(
            |record| {
                record.boot = boot;
                record.incarnation = 0;
            },
            out,
        );
    }

    /// The node at the other end of a hello has proved that it is there.
    pub(super) fn on_contact(&mut self, record: &Arc<SignedRecord>, out: &mut Vec<Effect>) {
        let key = record.key;
        if key == self.me {
            return;
        }
        // A joining node meets those who are known to all.
        let tell = self.join.is_done();
        self.claim(Arc::clone(record), tell, out);
        self.set_right(record, out);
        self.contacted(key, out);
    }
}

impl Core {
    /// Tells a node that is there what has to be answered: that it was given up, or that it comes under a boot that is lower than one
    /// known of it.
    fn set_right(&mut self, met: &Arc<SignedRecord>, out: &mut Vec<Effect>) {
        let key = met.key;
        let buried = self.table.grave(self.now, key).map(|grave| &grave.record);
        let Some(known) = self.table.get(key).map(|member| &member.record).or(buried) else { return };
        let (version, known_version) = (met.record.version(), known.record.version());
        if version < known_version {
            // Only its own signed word makes a node go above it: nobody else's number is believed.
            let rumors = vec![Rumor::Alive { record: Arc::clone(known), bare: false }];
            out.push(Effect::Learn(Arc::clone(met)));
            out.push(Effect::Send { to: key, message: Message::Gossip { rumors } });
        } else if self.table.get(key).is_some() {
            self.hear(key, out);
        } else {
            // It was removed, and only a newer claim of its own brings it back.
            let (boot, incarnation) = version;
            let accusation = Accusation { key, boot, incarnation, accuser: self.me, refused: false };
            out.push(Effect::Learn(Arc::clone(met)));
            out.push(Effect::Send { to: key, message: Message::Gossip { rumors: vec![Rumor::Dead(accusation)] } });
        }
    }
}

/// Whether something differs that a person or a program would want to hear of.
fn differs(old: &SignedRecord, new: &SignedRecord) -> bool {
    let (old, new) = (&old.record, &new.record);
    old.addr != new.addr
        || old.rpc_port != new.rpc_port
        || old.capabilities != new.capabilities
        || old.labels != new.labels
        || old.region != new.region
        || old.protocol != new.protocol
}
