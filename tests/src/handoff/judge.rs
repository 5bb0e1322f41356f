//! What must hold, judged from outside: from the effects that nodes perform, from what they say to clients, and from the journals
//! at the end. The judge never looks into a node.

use std::collections::BTreeMap;
use std::time::Duration;

use drover_handoff::core::{Event, HandoffId, Owner, Turn};
use drover_handoff::session::{Outcome, Record, TurnFault};
use drover_types::{Epoch, RequestId, SessionId};

/// What came of it all.
#[derive(Debug, Clone, Default)]
pub struct Verdict {
    /// Sessions that set out, and what became of them.
    pub started: u64,
    /// Arrived.
    pub completed: u64,
    /// Stayed, or went to somebody else.
    pub failed: u64,
    /// Their source was killed on the way.
    pub orphaned: u64,
    /// Turns that were acknowledged.
    pub acknowledged: u64,
    /// Turns that were answered.
    pub answered: u64,
    /// Turns that were cut off by a crash and may not be run twice.
    pub cut_off: u64,
    /// Turns that ended early because somebody wanted it.
    pub interrupted: u64,
    /// Epochs in which somebody acted.
    pub epochs: u64,
    /// Calls of owners that were not the newest any more, refused by the tool.
    pub late_calls: u64,
    /// The longest time from a beginning to its end.
    pub longest: Duration,
    /// Everything that must not be, in words.
    pub broken: Vec<String>,
}

impl Verdict {
    /// Adds another.
    pub fn add(&mut self, other: Self) {
        self.started += other.started;
        self.completed += other.completed;
        self.failed += other.failed;
        self.orphaned += other.orphaned;
        self.acknowledged += other.acknowledged;
        self.answered += other.answered;
        self.cut_off += other.cut_off;
        self.interrupted += other.interrupted;
        self.epochs += other.epochs;
        self.late_calls += other.late_calls;
        self.longest = self.longest.max(other.longest);
        self.broken.extend(other.broken);
    }
}

/// Keeps what was done and said.
#[derive(Debug, Default)]
pub struct Judge {
    acted: BTreeMap<(SessionId, Epoch), Owner>,
    acknowledged: BTreeMap<(SessionId, RequestId), Turn>,
    answered: BTreeMap<(SessionId, RequestId), Outcome>,
    under_way: BTreeMap<HandoffId, (Owner, Duration)>,
    verdict: Verdict,
}

impl Judge {
    fn broken(&mut self, text: String) {
        if self.verdict.broken.len() < 20 {
            self.verdict.broken.push(text);
        }
    }

    /// There is no end of effects.
    pub fn storm(&mut self) {
        self.broken("nodes keep each other busy without end".into());
    }

    /// What was kept of a session cannot be read any more.
    pub fn lost(&mut self, session: &SessionId, why: &str) {
        self.broken(format!("{session} is lost: {why}"));
    }

    /// The shipped core came upon something that it holds to be impossible.
    pub fn panicked(&mut self, what: &str) {
        self.broken(format!("a node panicked: {what}"));
    }

    /// Whether anything is wrong so far.
    pub fn is_broken(&self) -> bool {
        !self.verdict.broken.is_empty()
    }

    /// Somebody does something as the owner of an epoch.
    pub fn acts(&mut self, session: &SessionId, epoch: Epoch, owner: &Owner) {
        match self.acted.get(&(session.clone(), epoch)) {
            None => {
                self.acted.insert((session.clone(), epoch), owner.clone());
            }
            Some(first) if first == owner => {}
            Some(first) => {
                let text = format!("{session}: {first} and {owner} both act in epoch {epoch}");
                self.broken(text);
            }
        }
    }

    /// A client is told that its turn will be answered.
    pub fn acknowledges(&mut self, session: &SessionId, request: &RequestId, turn: Turn) {
        let before = self.acknowledged.insert((session.clone(), request.clone()), turn);
        if let Some(before) = before.filter(|before| *before != turn) {
            self.broken(format!("{session}: {request} was acknowledged as turn {} and as {}", before.0, turn.0));
        }
    }

    /// A client is told the answer.
    pub fn answers(&mut self, session: &SessionId, request: &RequestId, turn: Turn, outcome: &Outcome) {
        self.acknowledges(session, request, turn);
        let before = self.answered.insert((session.clone(), request.clone()), outcome.clone());
        if let Some(before) = before.filter(|before| before != outcome) {
            self.broken(format!("{session}: {request} was answered with {before:?} and with {outcome:?}"));
        }
    }

    /// A node tells of a handoff.
    pub fn event(&mut self, now: Duration, by: &Owner, event: &Event) {
        match event {
            Event::Started { handoff, .. } => {
                self.verdict.started += 1;
                if self.under_way.insert(*handoff, (by.clone(), now)).is_some() {
                    self.broken(format!("handoff {handoff} begins twice"));
                }
            }
            Event::Completed { handoff, .. } => {
                self.verdict.completed += 1;
                self.ended(now, *handoff);
            }
            Event::Failed { handoff, .. } => {
                self.verdict.failed += 1;
                self.ended(now, *handoff);
            }
            Event::NotMoved { .. } | Event::Serving { .. } => {}
        }
    }

    fn ended(&mut self, now: Duration, handoff: HandoffId) {
        match self.under_way.remove(&handoff) {
            Some((_, began)) => self.verdict.longest = self.verdict.longest.max(now.saturating_sub(began)),
            None => self.broken(format!("handoff {handoff} ends without having begun, or twice")),
        }
    }

    /// A process is killed; what it had set out to do ends with it.
    pub fn killed(&mut self, owner: &Owner) {
        let before = self.under_way.len();
        self.under_way.retain(|_, (by, _)| by != owner);
        self.verdict.orphaned += (before - self.under_way.len()) as u64;
    }

    /// Handoffs that began and did not end.
    pub fn under_way(&self) -> usize {
        self.under_way.len()
    }

    /// Holds what was said against what the journals say at the end.
    #[must_use]
    pub fn finish(mut self, session: &SessionId, records: &[Record], carried_out: impl Iterator<Item = u32>) -> Self {
        let mut accepted: BTreeMap<&RequestId, Turn> = BTreeMap::new();
        let mut outcomes: BTreeMap<Turn, &Outcome> = BTreeMap::new();
        let mut wrong = Vec::new();
        for record in records {
            match record {
                Record::Accepted { turn, request, .. } if accepted.insert(request, *turn).is_some() => {
                    wrong.push(format!("{session}: {request} is in the journals twice"));
                }
                Record::Ended { turn, outcome, .. } => {
                    if outcomes.insert(*turn, outcome).is_some() {
                        wrong.push(format!("{session}: turn {} ends twice", turn.0));
                    }
                    match outcome {
                        Outcome::Failed { fault: TurnFault::TurnLost, .. } => self.verdict.cut_off += 1,
                        Outcome::Failed { fault: TurnFault::Interrupted, .. } => self.verdict.interrupted += 1,
                        Outcome::Answer(_) | Outcome::Failed { .. } => {}
                    }
                }
                _ => {}
            }
        }
        for ((_, request), turn) in self.acknowledged.iter().filter(|((of, _), _)| of == session) {
            self.verdict.acknowledged += 1;
            match accepted.get(request) {
                None => wrong.push(format!("{session}: {request} was acknowledged and is lost")),
                Some(found) if found != turn => {
                    wrong.push(format!("{session}: {request} was acknowledged as turn {} and is {}", turn.0, found.0));
                }
                Some(_) => {}
            }
            match (self.answered.get(&(session.clone(), request.clone())), outcomes.get(turn)) {
                (Some(said), Some(kept)) if said == *kept => self.verdict.answered += 1,
                (Some(_), _) => {
                    wrong.push(format!("{session}: the answer to {request} is not the one in the journals"));
                }
                (None, _) => wrong.push(format!("{session}: {request} was acknowledged and not answered")),
            }
        }
        if let Some(times) = carried_out.filter(|times| *times > 1).max() {
            wrong.push(format!("{session}: a call of a tool was carried out {times} times"));
        }
        for text in wrong {
            self.broken(text);
        }
        self
    }

    /// All that was found.
    pub fn verdict(mut self, late_calls: u64) -> Verdict {
        self.verdict.epochs = self.acted.len() as u64;
        self.verdict.late_calls = late_calls;
        self.verdict
    }
}
