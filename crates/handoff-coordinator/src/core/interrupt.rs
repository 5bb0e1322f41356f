//! Turns that end before they have their answer because somebody wants it so.
//!
//! That one is to end is known to this process alone: what is durable is the turn's end. So whoever asks goes on asking, wherever the session
//! is by then, until the turn is answered.

use drover_types::{Epoch, RequestId};

use super::api::{Effect, Failure, Reply};
use super::ids::{ReplyTo, Turn};
use super::session::{Context, Phase, Session};
use crate::session::{Outcome, Record, TurnFault};

impl Session {
    /// A turn is to end; without a name the one that runs.
    pub(crate) fn interrupt(&mut self, cx: &mut Context<'_>, request: Option<&RequestId>, reply: ReplyTo) {
        let said = match &self.phase {
            Phase::Closed { .. } => Reply::Refused(Failure::SessionClosed),
            Phase::Migrated { record, .. } if record.epoch != Epoch(0) => Reply::Redirect(record.clone()),
            Phase::Active { epoch, .. } => {
                let epoch = *epoch;
                self.end_early(cx, epoch, request)
            }
            // It is about to be served, here or elsewhere.
            _ => Reply::Retry,
        };
        cx.out.push(Effect::Reply { to: reply, session: self.id.clone(), reply: said });
    }

    fn end_early(&mut self, cx: &mut Context<'_>, epoch: Epoch, request: Option<&RequestId>) -> Reply {
        let found = match request {
            Some(request) => self.outline.find(request).map(|(turn, _)| turn),
            None => self.outline.open,
        };
        let Some(turn) = found else {
            let waits = request.is_some_and(|request| self.held.iter().any(|held| held.request == *request));
            return if waits { Reply::Retry } else { Reply::Refused(Failure::UnknownTurn) };
        };
        let mark = &self.outline.turns[turn.0 as usize];
        match mark.ended {
            Some(seq) if seq <= self.journal.durable => return Reply::Answer { turn, epoch },
            // It ends as it is. One that is frozen ends where it goes.
            Some(_) => return Reply::Retry,
            None if self.frozen() => return Reply::Retry,
            None => {}
        }
        let request = mark.request.clone();
        self.interrupted.insert(turn);
        if self.outline.open == Some(turn) {
            cx.out.push(Effect::Interrupt { session: self.id.clone(), epoch, turn });
        }
        Reply::Interrupted { turn, request }
    }

    /// Has the agent run a turn, unless it is to end before it begins.
    pub(super) fn run(&mut self, cx: &mut Context<'_>, epoch: Epoch, turn: Turn, again: bool) {
        if !self.interrupted.remove(&turn) {
            cx.out.push(Effect::Run { session: self.id.clone(), epoch, turn, again });
            return;
        }
        let message = "the turn was interrupted before the agent had it".to_owned();
        let outcome = Outcome::Failed { fault: TurnFault::Interrupted, message };
        self.push(Record::Ended { turn, outcome, at_us: 0 });
    }
}
