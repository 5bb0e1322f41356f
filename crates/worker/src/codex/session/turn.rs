//! The life of a turn: its prompts, what is told in it, its interruption and its end.

use std::time::Instant;

use drover_types::{ErrorCode, InjectionId};
use serde_json::{Value, json};

use super::{
    Asked, Effect, Ending, INTERRUPT_LIMIT, LAST_WORDS, LEFT_TO_CODEX, LEFT_TO_US, LOOK_AGAIN, RETRY_TOLD_EVERY,
    Session, Stage, Steer, SteerStage, Turn,
};
use crate::agent::{AgentEvent, TurnOutcome, TurnStatus};
use crate::codex::approval::Question;
use crate::codex::rpc;
use crate::codex::translate::{Said, TurnError};

impl Session {
    pub(super) fn begin(&mut self, now: Instant, injection: InjectionId, prompt: &str) {
        if let Some(memory) = &mut self.memory
            && !memory.used
        {
            memory.used = true;
            self.out.push(Effect::Remember(memory.clone()));
        }
        self.translator.begin_turn();
        if let Some(message) = self.history_lost.take() {
            let data = json!({"message": message, "error_code": "history_lost", "will_retry": false});
            self.emit(AgentEvent::Event { injection: injection.clone(), kind: "agent_error".into(), data });
        }
        self.out.push(Effect::Baseline);
        let params = json!({
            "threadId": self.thread_id(),
            "input": [{"type": "text", "text": prompt}],
            "clientUserMessageId": injection,
        });
        self.turn = Some(Turn { injection, id: None, stage: Stage::Running, steers: Vec::new(), retries: None });
        self.call(now, Asked::StartTurn, &params);
    }

    pub(super) fn steer(&mut self, now: Instant, injection: InjectionId, into: &InjectionId, prompt: String) {
        match &mut self.turn {
            Some(turn) if turn.injection == *into && matches!(turn.stage, Stage::Running) && self.ending.is_none() => {
                turn.steers.push(Steer { injection, prompt, stage: SteerStage::Waiting });
                self.send_waiting(now);
            }
            _ => self.emit(AgentEvent::SteerRefused { injection, prompt }),
        }
    }

    pub(super) fn interrupt(&mut self, now: Instant, injection: &InjectionId) {
        if self.held.as_ref().is_some_and(|(held, _)| held == injection) {
            self.held = None;
            self.emit(AgentEvent::TurnEnded { injection: injection.clone(), outcome: TurnOutcome::interrupted("") });
        }
        if let Some(turn) = &mut self.turn
            && matches!(turn.stage, Stage::Running)
            && (turn.injection == *injection || turn.steers.iter().any(|steer| steer.injection == *injection))
        {
            turn.stage = Stage::Interrupting { until: now + INTERRUPT_LIMIT, again_at: None };
            self.send_waiting(now);
        }
    }

    /// Sends what had to wait for the turn's id.
    pub(super) fn send_waiting(&mut self, now: Instant) {
        let thread_id = self.thread_id();
        let Some(turn) = &mut self.turn else { return };
        let Some(turn_id) = turn.id.clone() else { return };
        match &mut turn.stage {
            Stage::Running => {
                let mut calls = Vec::new();
                for steer in turn.steers.iter_mut().filter(|steer| steer.stage == SteerStage::Waiting) {
                    steer.stage = SteerStage::Sent;
                    let params = json!({
                        "threadId": thread_id,
                        "expectedTurnId": turn_id,
                        "input": [{"type": "text", "text": steer.prompt}],
                        "clientUserMessageId": steer.injection,
                    });
                    calls.push((steer.injection.clone(), params));
                }
                for (injection, params) in calls {
                    self.call(now, Asked::Steer(injection), &params);
                }
            }
            Stage::Interrupting { again_at, .. } => {
                *again_at = None;
                if !self.calls.values().any(|call| call.what == Asked::Interrupt) {
                    self.call(now, Asked::Interrupt, &json!({"threadId": thread_id, "turnId": turn_id}));
                }
            }
            _ => {}
        }
    }

    pub(super) fn question(&mut self, id: &Value, method: &str, params: &Value) {
        let injection = self.turn.as_ref().map(|turn| &turn.injection);
        let Some(question) = Question::read(injection, id, method, params, &self.workspace, &self.translator) else {
            // Never left open: codex would wait for ever.
            let refusal = rpc::refusal(id, rpc::METHOD_NOT_FOUND, &format!("{method} is not served by this client"));
            self.out.push(Effect::Send(refusal));
            return;
        };
        match &self.turn {
            Some(turn) if matches!(turn.stage, Stage::Running) => {
                let event = AgentEvent::ApprovalWanted {
                    injection: turn.injection.clone(),
                    approval_id: question.approval_id.clone(),
                    call_id: question.call_id.clone(),
                    inside_workspace: question.inside_workspace,
                    data: question.data.clone(),
                };
                self.questions.push(question);
                self.emit(event);
            }
            _ => self.out.push(Effect::Send(rpc::answer(id, &question.result(false, None)))),
        }
    }

    pub(super) fn notification(&mut self, now: Instant, method: &str, params: &Value) {
        for said in self.translator.translate(method, params) {
            match said {
                Said::Event { kind, turn_id, mut data } => {
                    if self.turn.as_ref().is_some_and(|turn| self.is_current(turn, turn_id.as_deref()))
                        && let Some(turn) = &mut self.turn
                        && turn.tells(now, kind, &mut data)
                    {
                        let injection = turn.injection.clone();
                        self.emit(AgentEvent::Event { injection, kind: kind.to_owned(), data });
                    }
                }
                Said::TurnStarted { turn_id } => self.learn_turn_id(now, &turn_id),
                Said::TurnEnded { turn_id, status, error, text } => {
                    let current = self.turn.as_ref().is_some_and(|turn| self.is_current(turn, Some(&turn_id)));
                    if current {
                        let text = self.translator.text().map(str::to_owned).or(text).unwrap_or_default();
                        self.turn_ended(now, outcome_of(status, error, text));
                    }
                }
                Said::PromptTaken { client_id } => {
                    let found = self
                        .turn
                        .as_mut()
                        .and_then(|turn| turn.steers.iter_mut().find(|steer| steer.injection.as_str() == client_id));
                    if let Some(steer) = found {
                        steer.stage = SteerStage::Taken;
                    }
                }
                Said::QuestionClosed { request_id } => {
                    if let Some(found) = self.questions.iter().position(|question| question.rpc_id == request_id) {
                        let approval_id = self.questions.remove(found).approval_id;
                        self.emit(AgentEvent::ApprovalGone { approval_id });
                    }
                }
                Said::Notice { message } => tracing::debug!(message, "codex says"),
            }
        }
    }

    /// Late words about an earlier turn must not land in this one.
    pub(super) fn is_current(&self, turn: &Turn, turn_id: Option<&str>) -> bool {
        match (turn_id, turn.id.as_deref()) {
            (Some(said), Some(ours)) => said == ours,
            (Some(said), None) => self.last_turn_id.as_deref() != Some(said),
            (None, _) => true,
        }
    }

    pub(super) fn learn_turn_id(&mut self, now: Instant, turn_id: &str) {
        if self.last_turn_id.as_deref() == Some(turn_id) {
            return;
        }
        if let Some(turn) = &mut self.turn
            && turn.id.is_none()
        {
            turn.id = Some(turn_id.to_owned());
            self.send_waiting(now);
        }
    }

    // The end of a turn.

    pub(super) fn turn_ended(&mut self, now: Instant, outcome: TurnOutcome) {
        let Some(turn) = &mut self.turn else { return };
        match turn.stage {
            Stage::Running if outcome.status != TurnStatus::Interrupted => self.settle(outcome),
            Stage::Running | Stage::Interrupting { .. } => {
                turn.stage = Stage::Cleaning { outcome };
                let params = json!({"threadId": self.thread_id()});
                self.call(now, Asked::Clean, &params);
            }
            Stage::Cleaning { .. } | Stage::Looking { .. } | Stage::Settling { .. } => {}
        }
    }

    pub(super) fn look(&mut self, now: Instant) {
        if let Some(turn) = &mut self.turn
            && let Stage::Cleaning { outcome } = &turn.stage
        {
            turn.stage = Stage::Looking { outcome: outcome.clone(), since: now, look_at: None };
            self.out.push(Effect::Look);
        }
    }

    pub(super) fn stragglers(&mut self, now: Instant, count: usize) {
        let Some(turn) = &mut self.turn else { return };
        let Stage::Looking { outcome, since, look_at } = &mut turn.stage else { return };
        let waited = now.duration_since(*since);
        let silent = !self.translator.has_open_commands() || waited > LAST_WORDS;
        if count == 0 && silent {
            let outcome = outcome.clone();
            self.settle(outcome);
            return;
        }
        *look_at = Some(now + LOOK_AGAIN);
        if count > 0 && waited > LEFT_TO_CODEX + LEFT_TO_US {
            self.end(Ending::Stuck);
        } else if count > 0 && waited > LEFT_TO_CODEX {
            self.out.push(Effect::Kill);
        }
    }

    pub(super) fn settle(&mut self, outcome: TurnOutcome) {
        if let Some(turn) = &mut self.turn {
            turn.stage = Stage::Settling { outcome };
        }
        self.settle_when_known();
    }

    /// Ends the turn once codex has answered about every prompt that was added to it.
    pub(super) fn settle_when_known(&mut self) {
        let Some(turn) = &self.turn else { return };
        let Stage::Settling { outcome } = &turn.stage else { return };
        if turn.steers.iter().any(|steer| steer.stage == SteerStage::Sent) {
            return;
        }
        let outcome = outcome.clone();
        let Some(turn) = self.turn.take() else { return };
        if outcome.status == TurnStatus::Completed {
            self.restarts = 0;
        }
        self.close_questions();
        for steer in turn.steers.into_iter().filter(|steer| steer.stage != SteerStage::Taken) {
            self.emit(AgentEvent::SteerRefused { injection: steer.injection, prompt: steer.prompt });
        }
        self.last_turn_id = turn.id;
        self.emit(AgentEvent::TurnEnded { injection: turn.injection, outcome });
    }

    pub(super) fn steer_of(&mut self, injection: &InjectionId) -> Option<&mut Steer> {
        self.turn.as_mut()?.steers.iter_mut().find(|steer| steer.injection == *injection)
    }

    pub(super) fn refuse(&mut self, injection: &InjectionId) {
        let Some(turn) = &mut self.turn else { return };
        if let Some(at) = turn.steers.iter().position(|steer| steer.injection == *injection) {
            let steer = turn.steers.remove(at);
            self.emit(AgentEvent::SteerRefused { injection: steer.injection, prompt: steer.prompt });
        }
    }

    pub(super) fn close_questions(&mut self) {
        for question in std::mem::take(&mut self.questions) {
            self.emit(AgentEvent::ApprovalGone { approval_id: question.approval_id });
        }
    }
}

impl Turn {
    /// Whether this event is to be passed on. A retry is news when it is the first for a while; the next one that is
    /// told says how many were not.
    fn tells(&mut self, now: Instant, kind: &str, data: &mut Value) -> bool {
        if kind != "agent_error" || data["will_retry"] != true {
            return true;
        }
        match &mut self.retries {
            Some((told, silent)) if now.saturating_duration_since(*told) < RETRY_TOLD_EVERY => {
                *silent += 1;
                false
            }
            retries => {
                if let Some((_, silent)) = retries.filter(|(_, silent)| *silent > 0) {
                    data["retries_not_told"] = silent.into();
                }
                *retries = Some((now, 0));
                true
            }
        }
    }
}

/// What a turn's end means to the worker.
fn outcome_of(status: TurnStatus, error: Option<TurnError>, text: String) -> TurnOutcome {
    let info = error.as_ref().and_then(|error| error.info.clone());
    let message = error.map(|error| match error.info {
        Some(info) => format!("{} ({info})", error.message),
        None => error.message,
    });
    let code = match info.as_deref() {
        _ if status != TurnStatus::Failed => None,
        Some("unauthorized") => Some(ErrorCode::CodexNotLoggedIn),
        Some("badRequest" | "contextWindowExceeded" | "modelNotFound") => Some(ErrorCode::InvalidRequest),
        _ => Some(ErrorCode::ProviderUnavailable),
    };
    let error = match status {
        TurnStatus::Failed => Some(message.unwrap_or_else(|| "codex gave no reason".to_owned())),
        _ => message,
    };
    TurnOutcome { status, error, code, text }
}
