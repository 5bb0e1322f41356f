//! How a worker begins: with what the journals of earlier generations say.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use drover_mailbox::Cursor;
use drover_types::{ErrorCode, InjectionId};
use serde_json::json;

use super::approvals::Approvals;
use super::history::History;
use super::messages::write;
use super::{Core, Counts, Effect, Entry, Phase, Place, Policy, kind};
use crate::agent::TurnOutcome;

/// A prompt that was begun, or whose end was decided, and of which the journal does not say that it ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct OpenTurn {
    pub(crate) injection: InjectionId,
    pub(crate) seq: u64,
    pub(crate) trace: Option<Arc<str>>,
    /// The end that was decided, for a prompt that the agent never saw.
    pub(crate) outcome: Option<TurnOutcome>,
}

/// An open turn, and what the outboxes of earlier generations hold of it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct LostTurn {
    pub(crate) open: OpenTurn,
    /// Its `turn_complete` is there.
    pub(crate) ended: bool,
    /// Its `assistant` is there.
    pub(crate) answered: bool,
    /// Approvals (id, call) that were asked for and not resolved.
    pub(crate) approvals: Vec<(String, String)>,
}

impl Core {
    /// A worker that takes over from earlier generations: `low` and `taken` as the journal's last mark says, `history`
    /// with every prompt that ended, `lost` what was under way. Every lost turn gets its end now, and is never run again.
    pub(crate) fn start(
        policy: Policy,
        low: Cursor,
        taken: u64,
        history: History,
        lost: Vec<LostTurn>,
        out: &mut Vec<Effect>,
    ) -> Self {
        let ended = history.ended_prompts().map(|(seq, _)| *seq).max().unwrap_or(0);
        let begun = lost.iter().map(|turn| turn.open.seq).max().unwrap_or(0);
        let mut core = Self {
            policy,
            last_seq: low.seq,
            position: Place { segment: low.segment, offset: low.offset },
            taken,
            shutdown_seq: 0,
            unfinished: BTreeMap::new(),
            history,
            waiting: VecDeque::new(),
            turn: None,
            settling: Vec::new(),
            approvals: Approvals::default(),
            phase: Phase::Serving,
            agent_ready: false,
            greeted: false,
            agent_pid: None,
            agent_restarts: 0,
            writable: true,
            inherited_seq: low.seq.max(taken).max(ended).max(begun),
            counts: Counts::default(),
            now: None,
        };
        for turn in &lost {
            core.end_lost(turn, out);
        }
        if !lost.is_empty() {
            out.push(Effect::SyncOutbox);
        }
        for LostTurn { open, .. } in lost {
            core.history.ended(open.seq, open.injection.clone(), low.seq);
            out.push(Effect::Journal(Entry::Ended { injection: open.injection, seq: open.seq }));
        }
        core
    }

    fn end_lost(&mut self, lost: &LostTurn, out: &mut Vec<Effect>) {
        if lost.ended {
            return;
        }
        let OpenTurn { injection, trace, outcome, .. } = &lost.open;
        for (approval_id, call_id) in &lost.approvals {
            let data = json!({
                "approval_id": approval_id, "call_id": call_id, "approved": false, "decision": "cancel", "source": "turn_end",
            });
            out.push(write(Some(injection), trace.as_ref(), kind::APPROVAL_RESOLVED, data));
        }
        let outcome = outcome.clone().unwrap_or_else(|| {
            TurnOutcome::failed(ErrorCode::TurnLost, "the worker ended while this turn ran; it is not run again")
        });
        let assistant = (!lost.answered).then_some("");
        self.write_end(injection, trace.as_ref(), assistant, &outcome, None, out);
    }
}
