//! The life of the program: handshake, thread, restarts, giving up.

use std::time::{Duration, Instant};

use drover_types::{ErrorCode, Failure};
use serde_json::{Value, json};

use super::{Asked, Effect, Ending, MAX_BACK_OFF, Phase, Session, Stage, SteerStage, WRITER_LIMIT};
use crate::agent::{AgentEvent, TurnOutcome};
use crate::codex::rpc::RpcError;

impl Session {
    pub(super) fn started(&mut self, now: Instant, pid: u32) {
        self.phase = Phase::Handshake;
        self.pid = pid;
        let client = json!({
            "clientInfo": {"name": "drover-worker", "title": "drover", "version": drover_types::VERSION},
            // Cleaning up background terminals is one of the gated methods.
            "capabilities": {"experimentalApi": true},
        });
        self.call(now, Asked::Initialize, &client);
    }

    pub(super) fn open_thread(&mut self, now: Instant) {
        let mut params = json!({
            "cwd": self.terms.cwd,
            "approvalPolicy": self.terms.approval_policy,
            "sandbox": self.terms.sandbox_mode,
        });
        match &self.memory {
            Some(memory) => {
                params["threadId"] = json!(memory.thread_id);
                params["excludeTurns"] = json!(true);
                self.call(now, Asked::ResumeThread, &params);
            }
            None => self.call(now, Asked::StartThread, &params),
        }
    }

    pub(super) fn ready(&mut self, now: Instant, result: &Value, resumed: bool) {
        let model = result["model"].as_str();
        self.translator.open_thread(&self.thread_id(), model, resumed);
        self.phase = Phase::Ready;
        self.writer = None;
        let detail = json!({
            "thread_id": self.thread_id(),
            "resumed": resumed,
            "history_lost": self.history_lost.is_some(),
            "model": model,
            "model_provider": result["modelProvider"],
            "user_agent": self.user_agent,
        });
        self.emit(AgentEvent::Ready { detail, pid: Some(self.pid) });
        if let Some((injection, prompt)) = self.held.take() {
            self.begin(now, injection, &prompt);
        }
    }

    pub(super) fn end(&mut self, ending: Ending) {
        let hard = !matches!(ending, Ending::Stop);
        if self.ending.is_none() {
            self.out.push(Effect::End { hard });
        }
        if hard || !matches!(self.ending, Some(Ending::Stop)) {
            // A stop wins over everything: there is no restart after it.
            if !matches!(self.ending, Some(Ending::Stop)) {
                self.ending = Some(ending);
            }
        }
        self.calls.clear();
    }

    pub(super) fn exited(&mut self, reason: String) {
        self.calls.clear();
        self.writer = None;
        self.phase = Phase::Down;
        let ending = self.ending.take();
        let reason = match &ending {
            Some(Ending::Fault(fault)) => fault.clone(),
            _ => reason,
        };

        if let Some(turn) = self.turn.take() {
            let text = self.translator.text().unwrap_or_default().to_owned();
            let outcome = match turn.stage {
                Stage::Cleaning { outcome } | Stage::Looking { outcome, .. } | Stage::Settling { outcome } => outcome,
                Stage::Interrupting { .. } => TurnOutcome::interrupted(text),
                Stage::Running if matches!(ending, Some(Ending::Stop)) => TurnOutcome {
                    error: Some("the agent was stopped while the turn ran".to_owned()),
                    ..TurnOutcome::interrupted(text)
                },
                Stage::Running => TurnOutcome {
                    text,
                    ..TurnOutcome::failed(ErrorCode::TurnLost, format!("codex ended while the turn ran: {reason}"))
                },
            };
            self.close_questions();
            // A prompt that never left cannot have been carried out; of the others nobody knows.
            for steer in turn.steers.into_iter().filter(|steer| steer.stage == SteerStage::Waiting) {
                self.emit(AgentEvent::SteerRefused { injection: steer.injection, prompt: steer.prompt });
            }
            self.last_turn_id = turn.id;
            self.emit(AgentEvent::TurnEnded { injection: turn.injection, outcome });
        }

        match ending {
            Some(Ending::Stop) => self.finish_for_good(),
            Some(Ending::Stuck) => self.out.push(Effect::Start { after: Duration::ZERO }),
            _ => self.crashed(reason),
        }
    }

    pub(super) fn crashed(&mut self, reason: String) {
        self.restarts += 1;
        if self.restarts > self.terms.max_restarts {
            let times = self.restarts;
            let failure = Failure::new(
                ErrorCode::BackendUnavailable,
                format!("codex ended {times} times without completing a turn, at last because of this: {reason}"),
            );
            self.give_up(failure.hint("see codex.stderr.log in the node's directory, or try `codex` there by hand"));
            return;
        }
        self.emit(AgentEvent::Crashed { reason, restarts: self.restarts });
        let after = Duration::from_millis(100) * 2_u32.saturating_pow(self.restarts - 1);
        self.out.push(Effect::Start { after: after.min(MAX_BACK_OFF) });
    }

    pub(super) fn give_up(&mut self, failure: Failure) {
        if let Some((injection, _)) = self.held.take() {
            let outcome = TurnOutcome::failed(failure.code, failure.message.clone());
            self.emit(AgentEvent::TurnEnded { injection, outcome });
        }
        self.emit(AgentEvent::GaveUp { failure });
        self.phase = Phase::Over;
        self.out.push(Effect::Finish);
    }

    pub(super) fn finish_for_good(&mut self) {
        if let Some((injection, _)) = self.held.take() {
            let outcome = TurnOutcome::failed(ErrorCode::ShuttingDown, "the agent was stopped before the turn began");
            self.emit(AgentEvent::TurnEnded { injection, outcome });
        }
        self.phase = Phase::Over;
        self.out.push(Effect::Finish);
    }

    pub(super) fn not_resumed(&mut self, now: Instant, error: &RpcError) {
        if error.message.contains("active writer") {
            let (since, tries, _) = self.writer.unwrap_or((now, 0, None));
            if now.duration_since(since) > WRITER_LIMIT {
                self.end(Ending::Fault(format!("another process keeps the thread: {error}")));
                return;
            }
            let pause = Duration::from_millis(50) * 2_u32.saturating_pow(tries.min(5));
            self.writer = Some((since, tries + 1, Some(now + pause)));
            return;
        }
        let unknown = ["no rollout found", "not found", "invalid session id"];
        if !unknown.iter().any(|text| error.message.contains(text)) {
            self.end(Ending::Fault(format!("codex did not resume the thread: {error}")));
            return;
        }
        if let Some(memory) = self.memory.take()
            && memory.used
        {
            let thread = memory.thread_id;
            self.history_lost =
                Some(format!("codex no longer has thread {thread}: the history of this node is lost ({error})"));
        }
        self.open_thread(now);
    }
}
