//! The ends of a worker: in order, because somebody asked for it, or because its agent is gone for good.

use std::time::Instant;

use drover_types::{ErrorCode, Failure};
use serde_json::json;

use super::messages::{error_data, write};
use super::{Core, Effect, Exit, Phase, Timer, kind};
use crate::agent::{AgentCommand, TurnOutcome};

impl Core {
    /// Begins no more prompts; ends when the running turn has ended, or its grace is over.
    pub(super) fn drain(&mut self, now: Instant, reason: String, ends_swarm: bool, out: &mut Vec<Effect>) {
        match &mut self.phase {
            Phase::Serving => {
                self.phase = Phase::Draining { reason, ends_swarm };
                if self.turn.is_some() {
                    out.push(Effect::SetTimer(Timer::DrainGrace, now + self.policy.drain_grace));
                }
            }
            // The first reason counts, but that nobody will come back may be learnt late.
            Phase::Draining { ends_swarm: known, .. } => *known |= ends_swarm,
            Phase::Over => return,
        }
        self.finish_drain(out);
    }

    pub(super) fn finish_drain(&mut self, out: &mut Vec<Effect>) {
        let Phase::Draining { reason, ends_swarm } = &self.phase else { return };
        if self.turn.is_some() {
            return;
        }
        let (reason, ends_swarm) = (reason.clone(), *ends_swarm);
        self.settle_steered(None, out);
        if ends_swarm {
            for prompt in std::mem::take(&mut self.waiting) {
                self.refuse(prompt.id, prompt.seq, prompt.trace.as_ref(), &swarm_over(), out);
            }
        }
        self.taken = self.taken.max(self.shutdown_seq);
        out.push(self.mark());
        out.push(Effect::SyncJournal);
        out.push(write(None, None, kind::WORKER_BYE, json!({ "reason": reason })));
        out.push(Effect::SyncOutbox);
        out.push(Effect::Agent(AgentCommand::Stop));
        out.push(Effect::Exit(Exit::Drained));
        self.phase = Phase::Over;
    }

    /// The agent will not come back: the running turn fails, what waits is left for a next generation.
    pub(super) fn give_up(&mut self, failure: Failure, out: &mut Vec<Effect>) {
        let draining = matches!(self.phase, Phase::Draining { .. });
        if let Some(turn) = self.turn.take() {
            let outcome = TurnOutcome::failed(failure.code, failure.message.clone());
            self.close_turn(turn, &outcome, None, out);
        }
        if draining {
            self.finish_drain(out);
            return;
        }
        self.settle_steered(None, out);
        out.push(write(None, None, kind::WORKER_ERROR, error_data(&failure, true)));
        out.push(Effect::SyncOutbox);
        out.push(Effect::SyncJournal);
        out.push(Effect::Exit(Exit::Failed(failure)));
        self.phase = Phase::Over;
    }
}

pub(super) fn swarm_over() -> TurnOutcome {
    TurnOutcome::failed(ErrorCode::SwarmOver, "the swarm ended before this prompt had its turn")
}
