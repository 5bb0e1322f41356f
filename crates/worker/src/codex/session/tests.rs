//! Drives the state machine by hand: no process, no clock.

use std::path::Path;

use serde_json::json;

use super::*;
use crate::agent::TurnStatus;

const SECOND: Duration = Duration::from_secs(1);

struct Bench {
    session: Session,
    now: Instant,
}

impl Bench {
    fn new(memory: Option<ThreadMemory>) -> Self {
        let terms = Terms {
            cwd: "/ws".into(),
            approval_policy: "on-request".into(),
            sandbox_mode: "workspace-write".into(),
            max_restarts: 2,
        };
        Self { session: Session::new(terms, Workspace::new(Path::new("/ws")), memory), now: Instant::now() }
    }

    fn ready() -> Self {
        let mut bench = Self::new(None);
        bench.start();
        bench
    }

    fn start(&mut self) -> Vec<Effect> {
        let effects = self.input(Input::Started { pid: 7 });
        self.answer(id_of(&effects, "initialize"), json!({"userAgent": "test"}));
        let id = self.session.next_id - 1;
        self.answer(id, json!({"thread": {"id": "thread"}, "model": "m"}))
    }

    fn input(&mut self, input: Input) -> Vec<Effect> {
        self.session.handle(self.now, input)
    }

    fn answer(&mut self, id: u64, result: Value) -> Vec<Effect> {
        self.input(Input::Message(Message::Response { id, result: Ok(result) }))
    }

    fn refuse(&mut self, id: u64, message: &str) -> Vec<Effect> {
        let error = RpcError { code: -32600, message: message.into() };
        self.input(Input::Message(Message::Response { id, result: Err(error) }))
    }

    fn told(&mut self, method: &str, params: Value) -> Vec<Effect> {
        self.input(Input::Message(Message::Notification { method: method.into(), params }))
    }

    fn begin(&mut self, name: &str) -> Vec<Effect> {
        self.input(Input::Command(AgentCommand::Begin { injection: injection(name), prompt: name.into(), trace: None }))
    }

    /// A turn that runs under the id `t-NAME`.
    fn running(&mut self, name: &str) {
        let effects = self.begin(name);
        self.answer(id_of(&effects, "turn/start"), json!({"turn": {"id": format!("t-{name}")}}));
    }

    fn complete(&mut self, turn_id: &str, status: &str) -> Vec<Effect> {
        self.told(
            "turn/completed",
            json!({"threadId": "thread", "turn": {"id": turn_id, "status": status, "items": []}}),
        )
    }

    fn later(&mut self, by: Duration) -> Vec<Effect> {
        self.now += by;
        self.input(Input::Tick)
    }
}

fn injection(name: &str) -> InjectionId {
    name.parse().unwrap()
}

fn sent(effects: &[Effect]) -> Vec<Value> {
    let lines = effects.iter().filter_map(|effect| match effect {
        Effect::Send(bytes) => Some(serde_json::from_slice(bytes).unwrap()),
        _ => None,
    });
    lines.collect()
}

fn id_of(effects: &[Effect], method: &str) -> u64 {
    let sent = sent(effects);
    let request = sent.iter().find(|request| request["method"] == method);
    request.unwrap_or_else(|| panic!("no {method} in {effects:?}"))["id"].as_u64().unwrap()
}

fn events(effects: &[Effect]) -> Vec<&AgentEvent> {
    let events = effects.iter().filter_map(|effect| match effect {
        Effect::Emit(event) => Some(event),
        _ => None,
    });
    events.collect()
}

fn ended(effects: &[Effect]) -> Option<(&str, &TurnOutcome)> {
    events(effects).into_iter().find_map(|event| match event {
        AgentEvent::TurnEnded { injection, outcome } => Some((injection.as_str(), outcome)),
        _ => None,
    })
}

fn steer(name: &str, into: &str) -> Input {
    Input::Command(AgentCommand::Steer { injection: injection(name), into: injection(into), prompt: name.into() })
}

#[test]
fn a_thread_is_written_down_before_the_agent_is_ready_and_before_a_prompt() {
    let mut bench = Bench::new(None);
    let effects = bench.start();
    assert_eq!(effects[0], Effect::Remember(ThreadMemory { thread_id: "thread".into(), used: false }));
    assert!(matches!(&effects[1], Effect::Emit(AgentEvent::Ready { pid: Some(7), .. })), "{effects:?}");
    let effects = bench.begin("a");
    assert_eq!(effects[0], Effect::Remember(ThreadMemory { thread_id: "thread".into(), used: true }));
    assert!(matches!(effects[1], Effect::Baseline));
}

#[test]
fn notifications_may_come_before_the_response_and_late_ones_hit_nobody() {
    let mut bench = Bench::ready();
    let effects = bench.begin("a");
    let id = id_of(&effects, "turn/start");
    bench.told("turn/started", json!({"threadId": "thread", "turn": {"id": "t1"}}));
    let delta = |turn: &str| json!({"threadId": "thread", "turnId": turn, "itemId": "i", "delta": "x"});
    let effects = bench.told("item/agentMessage/delta", delta("t1"));
    assert!(matches!(events(&effects)[..], [AgentEvent::Event { .. }]));
    bench.answer(id, json!({"turn": {"id": "t1"}}));
    assert_eq!(ended(&bench.complete("t1", "completed")).unwrap().0, "a");

    bench.begin("b");
    assert_eq!(bench.told("item/agentMessage/delta", delta("t1")), [], "a word of turn a landed in turn b");
    assert_eq!(bench.complete("t1", "completed"), []);
    bench.told("turn/started", json!({"threadId": "thread", "turn": {"id": "t2"}}));
    assert_eq!(bench.told("item/agentMessage/delta", delta("t3")), []);
    assert_eq!(ended(&bench.complete("t2", "completed")).unwrap().0, "b");
}

#[test]
fn an_interrupt_waits_for_the_turn_id_and_then_for_the_processes() {
    let mut bench = Bench::ready();
    let effects = bench.begin("a");
    let start = id_of(&effects, "turn/start");
    assert_eq!(bench.input(Input::Command(AgentCommand::Interrupt { injection: injection("other") })), []);
    assert_eq!(bench.input(Input::Command(AgentCommand::Interrupt { injection: injection("a") })), []);
    let effects = bench.answer(start, json!({"turn": {"id": "t1"}}));
    let id = id_of(&effects, "turn/interrupt");
    // It came too early for codex: it is sent again.
    bench.refuse(id, "no active turn to interrupt");
    id_of(&bench.later(SECOND), "turn/interrupt");

    let effects = bench.complete("t1", "interrupted");
    assert!(ended(&effects).is_none(), "ended before its commands were looked for");
    let effects = bench.answer(id_of(&effects, "thread/backgroundTerminals/clean"), json!({}));
    assert_eq!(effects, [Effect::Look]);
    assert_eq!(bench.input(Input::Stragglers(1)), []);
    assert_eq!(bench.later(LOOK_AGAIN), [Effect::Look]);
    bench.now += LEFT_TO_CODEX;
    assert_eq!(bench.input(Input::Stragglers(1)), [Effect::Kill]);
    let effects = bench.input(Input::Stragglers(0));
    assert_eq!(ended(&effects).unwrap().1.status, TurnStatus::Interrupted);
}

#[test]
fn processes_that_do_not_go_take_codex_with_them() {
    let mut bench = Bench::ready();
    bench.running("a");
    bench.input(Input::Command(AgentCommand::Interrupt { injection: injection("a") }));
    let effects = bench.complete("t-a", "interrupted");
    bench.refuse(id_of(&effects, "thread/backgroundTerminals/clean"), "unknown variant");
    bench.now += LEFT_TO_CODEX + LEFT_TO_US + SECOND;
    assert_eq!(bench.input(Input::Stragglers(2)), [Effect::End { hard: true }]);
    let effects = bench.input(Input::Exited { reason: "killed".into() });
    assert_eq!(ended(&effects).unwrap().1.status, TurnStatus::Interrupted);
    assert_eq!(effects.last(), Some(&Effect::Start { after: Duration::ZERO }));
    assert_eq!(events(&effects).len(), 1, "our own restart is no crash: {effects:?}");
    let effects = bench.input(Input::Started { pid: 8 });
    bench.answer(id_of(&effects, "initialize"), json!({}));
    assert!(bench.session.calls.values().any(|call| call.what == Asked::ResumeThread));
}

#[test]
fn a_crash_loses_the_turn_aloud_and_too_many_end_it() {
    let mut bench = Bench::ready();
    bench.running("a");
    for round in 1..=3 {
        let effects = bench.input(Input::Exited { reason: "signal 9".into() });
        if round == 1 {
            let (_, outcome) = ended(&effects).unwrap();
            assert_eq!(outcome.code, Some(ErrorCode::TurnLost));
            assert!(outcome.error.as_ref().unwrap().contains("signal 9"));
        }
        if round <= 2 {
            assert!(matches!(effects.last(), Some(Effect::Start { .. })), "{effects:?}");
            assert!(
                events(&effects)
                    .iter()
                    .any(|e| matches!(e, AgentEvent::Crashed { restarts, .. } if *restarts == round))
            );
            bench.start();
        } else {
            assert!(matches!(events(&effects).last(), Some(AgentEvent::GaveUp { .. })), "{effects:?}");
            assert_eq!(effects.last(), Some(&Effect::Finish));
        }
    }

    // A completed turn shows that it is well again.
    let mut bench = Bench::ready();
    for round in 0..10 {
        bench.input(Input::Exited { reason: "signal 9".into() });
        bench.start();
        bench.running(&format!("r{round}"));
        assert!(ended(&bench.complete(&format!("t-r{round}"), "completed")).is_some());
    }
}

#[test]
fn a_prompt_that_comes_during_a_restart_waits_for_it() {
    let mut bench = Bench::ready();
    bench.input(Input::Exited { reason: "signal 9".into() });
    assert_eq!(bench.begin("a"), []);
    let effects = bench.start();
    id_of(&effects, "turn/start");

    let mut bench = Bench::ready();
    bench.input(Input::Exited { reason: "signal 9".into() });
    bench.begin("a");
    let effects = bench.input(Input::Command(AgentCommand::Stop));
    assert_eq!(ended(&effects).unwrap().1.code, Some(ErrorCode::ShuttingDown));
    assert_eq!(effects.last(), Some(&Effect::Finish));
}

#[test]
fn a_thread_with_another_writer_is_tried_again_and_a_lost_one_is_told() {
    let memory = ThreadMemory { thread_id: "old".into(), used: true };
    let mut bench = Bench::new(Some(memory.clone()));
    let effects = bench.input(Input::Started { pid: 7 });
    let effects = bench.answer(id_of(&effects, "initialize"), json!({}));
    let id = id_of(&effects, "thread/resume");
    assert_eq!(bench.refuse(id, "thread old already has an active writer"), []);
    assert!(bench.session.wake_at().is_some());
    let id = id_of(&bench.later(SECOND), "thread/resume");
    let id = id_of(&bench.refuse(id, "no rollout found for thread id old"), "thread/start");
    bench.answer(id, json!({"thread": {"id": "new"}}));
    let effects = bench.begin("a");
    let event = events(&effects)[0];
    assert!(
        matches!(event, AgentEvent::Event { kind, data, .. } if kind == "agent_error"
        && data["message"].as_str().unwrap().contains("lost")),
        "{event:?}"
    );

    // Held for ever, or not readable: a fault, but never a new thread in its place.
    let mut bench = Bench::new(Some(memory));
    let effects = bench.input(Input::Started { pid: 7 });
    let effects = bench.answer(id_of(&effects, "initialize"), json!({}));
    let effects = bench.refuse(id_of(&effects, "thread/resume"), "failed to load rollout: permission denied");
    assert_eq!(effects, [Effect::End { hard: true }]);
}

#[test]
fn a_steered_prompt_is_taken_or_given_back_but_never_both() {
    let mut bench = Bench::ready();
    let effects = bench.input(steer("s0", "a"));
    assert!(matches!(events(&effects)[..], [AgentEvent::SteerRefused { .. }]), "there is no turn");

    let effects = bench.begin("a");
    let start = id_of(&effects, "turn/start");
    assert_eq!(bench.input(steer("s1", "a")), [], "sent without a turn id");
    let effects = bench.answer(start, json!({"turn": {"id": "t1"}}));
    assert_eq!(sent(&effects)[0]["params"]["expectedTurnId"], "t1");
    bench.answer(id_of(&effects, "turn/steer"), json!({"turnId": "t1"}));
    let taken =
        json!({"threadId": "thread", "turnId": "t1", "item": {"type": "userMessage", "id": "u", "clientId": "s1"}});
    bench.told("item/started", taken);

    // The second one crosses with the end of the turn, which waits for the answer.
    let effects = bench.input(steer("s2", "a"));
    let id = id_of(&effects, "turn/steer");
    assert_eq!(bench.complete("t1", "completed"), []);
    let effects = bench.refuse(id, "no active turn to steer");
    let events = events(&effects);
    assert!(
        matches!(events[0], AgentEvent::SteerRefused { injection, .. } if injection.as_str() == "s2"),
        "{events:?}"
    );
    assert!(matches!(events[1], AgentEvent::TurnEnded { .. }), "{events:?}");
    assert_eq!(events.len(), 2, "s1 was taken: {events:?}");
}

#[test]
fn every_question_is_answered_once() {
    let mut bench = Bench::ready();
    let ask = |id: i64, method: &str| {
        let params =
            json!({"threadId": "thread", "turnId": "t-a", "itemId": format!("c{id}"), "command": "ls", "cwd": "/ws"});
        Input::Message(Message::Request { id: json!(id), method: method.into(), params })
    };
    let command = "item/commandExecution/requestApproval";
    // Nobody to ask.
    let effects = bench.input(ask(0, command));
    assert_eq!(sent(&effects), [json!({"id": 0, "result": {"decision": "decline"}})]);
    bench.running("a");
    let effects = bench.input(ask(1, "item/tool/requestUserInput"));
    assert_eq!(sent(&effects)[0]["error"]["code"], json!(-32601));

    let answer = |id: &str| {
        let (approval_id, call_id) = (id.to_owned(), String::new());
        Input::Command(AgentCommand::Answer { approval_id, call_id, approved: true, decision: None })
    };
    bench.input(ask(2, command));
    assert_eq!(sent(&bench.input(answer("a-2"))), [json!({"id": 2, "result": {"decision": "accept"}})]);
    assert_eq!(bench.input(answer("a-2")), []);
    // Codex closes one by itself, and the turn's end closes the rest.
    bench.input(ask(3, command));
    bench.input(ask(4, command));
    let effects = bench.told("serverRequest/resolved", json!({"threadId": "thread", "requestId": 3}));
    assert_eq!(events(&effects), [&AgentEvent::ApprovalGone { approval_id: "a-3".into() }]);
    let effects = bench.complete("t-a", "completed");
    assert_eq!(events(&effects)[0], &AgentEvent::ApprovalGone { approval_id: "a-4".into() });
}

#[test]
fn a_provider_that_is_away_is_told_once_and_then_rarely() {
    let mut bench = Bench::ready();
    bench.running("a");
    let error = |attempt: u32, will_retry: bool| {
        let message = format!("Reconnecting... {attempt}/9");
        json!({"error": {"message": message}, "willRetry": will_retry, "threadId": "thread", "turnId": "t-a"})
    };
    let mut told = Vec::new();
    // Two minutes of an attempt every second.
    for attempt in 0..120 {
        for event in events(&bench.told("error", error(attempt, true))) {
            if let AgentEvent::Event { kind, data, .. } = event {
                assert_eq!(kind, "agent_error");
                told.push((attempt, data["retries_not_told"].as_u64()));
            }
        }
        bench.later(SECOND);
    }
    assert_eq!(told, [(0, None), (60, Some(59))]);
    assert_eq!(events(&bench.told("error", error(9, false))).len(), 1, "that it is over is always told");
    bench.complete("t-a", "failed");
    bench.running("b");
    let next =
        json!({"error": {"message": "Reconnecting... 1/9"}, "willRetry": true, "threadId": "thread", "turnId": "t-b"});
    assert_eq!(events(&bench.told("error", next)).len(), 1, "another turn, another word");
}

#[test]
fn a_codex_that_does_not_answer_is_ended() {
    let mut bench = Bench::new(None);
    bench.input(Input::Started { pid: 7 });
    assert_eq!(bench.later(CALL_LIMIT), [Effect::End { hard: true }]);
    let effects = bench.input(Input::Exited { reason: "killed".into() });
    let reason = match events(&effects)[..] {
        [AgentEvent::Crashed { reason, .. }] => reason.clone(),
        ref other => panic!("{other:?}"),
    };
    assert!(reason.contains("initialize"), "{reason}");
}
