//! The rules one by one, driven by hand.

use super::*;
use crate::agent::AgentCommand;

/// A core with a clock, and what it did last.
struct Rig {
    core: Core,
    now: Instant,
    seq: u64,
    last: Vec<Effect>,
}

fn policy() -> Policy {
    Policy {
        auto_approve: false,
        approval_timeout: Duration::from_mins(1),
        drain_grace: Duration::from_secs(10),
        max_queue: 2,
        hello: serde_json::Map::new(),
    }
}

fn id(text: &str) -> InjectionId {
    text.parse().unwrap()
}

impl Rig {
    fn new() -> Self {
        Self::with(policy())
    }

    fn with(policy: Policy) -> Self {
        let mut last = Vec::new();
        let core = Core::start(policy, Cursor::default(), 0, History::default(), Vec::new(), &mut last);
        let mut rig = Self { core, now: Instant::now(), seq: 0, last };
        rig.agent(AgentEvent::Ready { detail: json!({}), pid: Some(7) });
        rig
    }

    fn input(&mut self, input: Input) -> &mut Self {
        self.last.clear();
        self.core.handle(self.now, input, &mut self.last);
        self
    }

    fn agent(&mut self, event: AgentEvent) -> &mut Self {
        self.input(Input::Agent(event))
    }

    fn order(&mut self, seq: u64, injection: Option<&str>, order: Order) -> &mut Self {
        let place = |offset| Place { segment: 1, offset };
        let injection = injection.map(id);
        self.input(Input::Inbox(Delivery {
            start: place(seq * 10),
            end: place(seq * 10 + 10),
            seq,
            injection,
            trace: None,
            order,
        }))
    }

    fn next(&mut self, injection: Option<&str>, order: Order) -> &mut Self {
        self.seq += 1;
        self.order(self.seq, injection, order)
    }

    fn inject(&mut self, name: &str) -> &mut Self {
        self.next(Some(name), Order::Inject { content: format!("prompt {name}"), steer: false })
    }

    fn steer(&mut self, name: &str) -> &mut Self {
        self.next(Some(name), Order::Inject { content: format!("prompt {name}"), steer: true })
    }

    fn end(&mut self, name: &str) -> &mut Self {
        self.agent(AgentEvent::TurnEnded { injection: id(name), outcome: TurnOutcome::completed("done") })
    }

    fn want(&mut self, name: &str, approval: &str, inside: bool) -> &mut Self {
        self.agent(AgentEvent::ApprovalWanted {
            injection: id(name),
            approval_id: approval.into(),
            call_id: format!("call-{approval}"),
            inside_workspace: inside,
            data: json!({ "command": "ls" }),
        })
    }

    fn answer(&mut self, approval: &str, call: &str, approved: bool) -> &mut Self {
        let decision = None;
        let (approval_id, call_id) = (approval.to_owned(), call.to_owned());
        self.next(None, Order::Approval(ApprovalAnswer { approval_id, call_id, approved, decision }))
    }

    /// What was done last, one short word per effect.
    fn did(&self) -> String {
        self.last.iter().map(word).collect::<Vec<_>>().join(" ")
    }

    /// The data of the last record of this kind.
    fn data(&self, wanted: &str) -> &Value {
        let found = self.last.iter().rev().find_map(|effect| match effect {
            Effect::Write { kind, data, .. } if kind == wanted => Some(data),
            _ => None,
        });
        found.unwrap_or_else(|| panic!("no {wanted} in {:?}", self.last))
    }
}

fn word(effect: &Effect) -> String {
    let name = |id: &Option<InjectionId>| id.as_ref().map(|id| format!("({id})")).unwrap_or_default();
    match effect {
        Effect::Journal(Entry::Begun { injection, .. }) => format!("begun({injection})"),
        Effect::Journal(Entry::Ending { injection, .. }) => format!("ending({injection})"),
        Effect::Journal(Entry::Returned { injection }) => format!("returned({injection})"),
        Effect::Journal(Entry::Ended { injection, .. }) => format!("ended({injection})"),
        Effect::Journal(Entry::Mark { low, taken }) => format!("mark(low={},taken={taken})", low.seq),
        Effect::SyncJournal => "J!".into(),
        Effect::SyncOutbox => "O!".into(),
        Effect::Write { injection, kind, .. } => format!("{kind}{}", name(injection)),
        Effect::Agent(AgentCommand::Begin { injection, .. }) => format!(">begin({injection})"),
        Effect::Agent(AgentCommand::Steer { injection, into, .. }) => format!(">steer({injection},{into})"),
        Effect::Agent(AgentCommand::Interrupt { injection }) => format!(">interrupt({injection})"),
        Effect::Agent(AgentCommand::Leave { injection }) => format!(">leave({injection})"),
        Effect::Agent(AgentCommand::Answer { approval_id, approved, .. }) => {
            format!(">answer({approval_id},{approved})")
        }
        Effect::Agent(AgentCommand::Stop) => ">stop".into(),
        Effect::Keyring(ring) => format!("ring({ring})"),
        Effect::SetTimer(timer, _) => format!("set({timer:?})"),
        Effect::CancelTimer(timer) => format!("cancel({timer:?})"),
        Effect::Exit(Exit::Drained) => "exit".into(),
        Effect::Exit(Exit::Failed(_)) => "exit1".into(),
    }
}

#[test]
fn a_turn_is_journaled_before_it_begins_and_synced_before_it_counts_as_ended() {
    let mut rig = Rig::new();
    assert_eq!(rig.did(), "worker_hello O!");
    rig.inject("a");
    assert_eq!(rig.did(), "begun(a) J! thread_status(a) turn_started(a) O! >begin(a)");
    rig.inject("b");
    assert_eq!(rig.did(), "");
    rig.now += Duration::from_millis(1500);
    rig.end("a");
    assert_eq!(
        rig.did(),
        "assistant(a) turn_complete(a) thread_status(a) O! ended(a) mark(low=1,taken=0) \
         begun(b) J! thread_status(b) turn_started(b) O! >begin(b)"
    );
    assert_eq!(rig.data(kind::ASSISTANT), &json!({ "content": "done" }));
    assert_eq!(rig.data(kind::TURN_COMPLETE), &json!({ "status": "completed", "duration_ms": 1500 }));
    let failed = TurnOutcome::failed(ErrorCode::TurnLost, "gone");
    rig.now += Duration::from_millis(2);
    rig.agent(AgentEvent::TurnEnded { injection: id("b"), outcome: failed });
    assert_eq!(rig.did(), "assistant(b) turn_complete(b) thread_status(b) O! ended(b) mark(low=2,taken=0)");
    let told = json!({ "status": "failed", "error": "gone", "code": "turn_lost", "duration_ms": 2 });
    assert_eq!(rig.data(kind::TURN_COMPLETE), &told);
    assert_eq!(rig.core.status().state, "idle");
}

#[test]
fn what_was_taken_before_is_not_taken_again() {
    let mut rig = Rig::new();
    rig.inject("a").order(1, Some("x"), Order::Inject { content: "late".into(), steer: false });
    assert_eq!(rig.did(), "", "an old number");
    rig.inject("a");
    assert_eq!(rig.did(), "", "the running prompt under a new number");
    rig.end("a").inject("a");
    assert_eq!(rig.did(), "", "an ended prompt under a new number");
    assert_eq!(rig.core.counts().repeated, 3);
    rig.end("a");
    assert_eq!(rig.did(), "", "a turn ends once");
}

#[test]
fn prompts_wait_for_the_agent_and_for_the_disk() {
    let mut rig = Rig::new();
    rig.agent(AgentEvent::Crashed { reason: "signal 9".into(), restarts: 1 }).inject("a");
    assert_eq!(rig.did(), "");
    assert_eq!((rig.core.status().state, rig.core.status().agent_restarts), ("starting", 1));
    rig.input(Input::Store { writable: false }).agent(AgentEvent::Ready { detail: json!({}), pid: None });
    assert_eq!(rig.did(), "", "no second hello, and no begin on a full disk");
    rig.input(Input::Store { writable: true });
    assert!(rig.did().ends_with(">begin(a)"), "{}", rig.did());
}

#[test]
fn a_full_queue_refuses_with_a_reason_and_takes_no_place() {
    let mut rig = Rig::new();
    rig.inject("a").inject("b").inject("c").inject("d");
    assert_eq!(rig.did(), "ending(d) J! assistant(d) turn_complete(d) O! ended(d) mark(low=0,taken=0)");
    let data = rig.data(kind::TURN_COMPLETE);
    assert_eq!(data["code"], "delivery_failed");
    assert!(data["error"].as_str().unwrap().contains("worker.max_queue"), "{data}");
    rig.end("a");
    assert!(rig.did().ends_with(">begin(b)"));
    rig.inject("e");
    assert_eq!(rig.did(), "", "there is room again");
}

#[test]
fn an_interrupt_ends_the_running_turn_or_withdraws_a_waiting_prompt() {
    let mut rig = Rig::new();
    rig.inject("a").inject("b").next(Some("b"), Order::Interrupt);
    assert_eq!(
        rig.did(),
        "ending(b) J! assistant(b) turn_complete(b) O! ended(b) mark(low=0,taken=0) mark(low=0,taken=3) J!"
    );
    assert_eq!(rig.data(kind::TURN_COMPLETE)["status"], "interrupted");
    rig.next(Some("unknown"), Order::Interrupt);
    assert_eq!(rig.did(), "mark(low=0,taken=4) J!");
    rig.next(None, Order::Interrupt);
    assert_eq!(rig.did(), "mark(low=0,taken=5) J! >interrupt(a)");
    rig.next(Some("a"), Order::Interrupt);
    assert_eq!(rig.did(), "mark(low=0,taken=6) J!", "once is enough");
    rig.agent(AgentEvent::TurnEnded { injection: id("a"), outcome: TurnOutcome::interrupted("half") });
    assert_eq!(rig.data(kind::TURN_COMPLETE)["status"], "interrupted");
    assert_eq!(rig.data(kind::ASSISTANT)["content"], "half");
}

#[test]
fn a_steered_prompt_shares_the_running_turn() {
    let mut rig = Rig::new();
    rig.steer("a");
    assert!(rig.did().ends_with(">begin(a)"), "an idle node runs it as its own turn");
    rig.steer("b");
    assert_eq!(rig.did(), "begun(b) J! turn_started(b) O! >steer(b,a)");
    rig.now += STEER_SETTLE;
    rig.end("a");
    assert_eq!(
        rig.did(),
        "assistant(a) turn_complete(a) assistant(b) turn_complete(b) thread_status(a) O! ended(a) ended(b) mark(low=2,taken=0)"
    );
    assert_eq!(rig.data(kind::ASSISTANT)["content"], "");
}

#[test]
fn a_steer_that_came_too_late_becomes_a_turn_of_its_own() {
    let mut rig = Rig::new();
    rig.inject("a").inject("w").steer("b");
    rig.end("a");
    assert!(rig.did().contains("set(SteerSettle)") && !rig.did().contains("turn_complete(b)"), "{}", rig.did());
    rig.agent(AgentEvent::SteerRefused { injection: id("b"), prompt: "prompt b".into() });
    assert_eq!(rig.did(), "returned(b)");
    rig.end("w");
    assert!(rig.did().ends_with("begun(b) J! thread_status(b) O! >begin(b)"), "announced once: {}", rig.did());
    rig.end("b");
    assert!(rig.did().contains("turn_complete(b)"));

    rig.inject("c").steer("d").end("c");
    rig.now += STEER_SETTLE;
    rig.input(Input::Timer(Timer::SteerSettle));
    assert_eq!(rig.did(), "assistant(d) turn_complete(d) O! ended(d) mark(low=5,taken=0)", "it was not refused");
    rig.agent(AgentEvent::SteerRefused { injection: id("d"), prompt: "p".into() });
    assert_eq!(rig.did(), "", "its end stands");
}

#[test]
fn approvals_are_answered_once_by_whoever_is_first() {
    let mut rig = Rig::new();
    rig.inject("a").want("a", "p1", true);
    assert_eq!(rig.did(), "exec_approval_required(a) O! set(Approval(\"p1\"))");
    assert_eq!(
        rig.data(kind::APPROVAL_REQUIRED),
        &json!({ "command": "ls", "approval_id": "p1", "call_id": "call-p1" })
    );
    rig.answer("", "call-p1", true);
    assert_eq!(
        rig.did(),
        "mark(low=0,taken=2) J! cancel(Approval(\"p1\")) exec_approval_resolved(a) O! >answer(p1,true)"
    );
    assert_eq!(rig.data(kind::APPROVAL_RESOLVED)["source"], "router");
    rig.answer("p1", "call-p1", false);
    let late = rig.data(kind::APPROVAL_RESOLVED).clone();
    assert!(late["approved"] == true && late["idempotent"] == true && !rig.did().contains(">answer"), "{late}");

    rig.want("a", "p2", false).input(Input::Timer(Timer::Approval("p2".into())));
    assert_eq!(rig.did(), "exec_approval_resolved(a) O! >answer(p2,false)");
    assert_eq!(rig.data(kind::APPROVAL_RESOLVED)["source"], "timeout");

    rig.want("a", "p3", false).want("a", "p4", false).agent(AgentEvent::ApprovalGone { approval_id: "p3".into() });
    assert_eq!(rig.data(kind::APPROVAL_RESOLVED)["source"], "turn_end");
    rig.end("a");
    assert!(rig.did().starts_with("cancel(Approval(\"p4\")) exec_approval_resolved(a) assistant(a)"), "{}", rig.did());
    rig.answer("p4", "", true);
    assert_eq!(rig.data(kind::APPROVAL_RESOLVED)["idempotent"], true);
    rig.answer("never", "", true);
    assert_eq!(rig.data(kind::APPROVAL_RESOLVED)["approved"], false, "nobody asked: nothing was approved");
    rig.want("a", "p5", true);
    assert_eq!(rig.did(), ">answer(p5,false)", "outside of a turn nothing may act");
}

#[test]
fn policy_approves_only_what_stays_inside() {
    let mut rig = Rig::with(Policy { auto_approve: true, ..policy() });
    rig.inject("a").want("a", "p1", true);
    assert_eq!(rig.did(), "exec_approval_required(a) exec_approval_resolved(a) O! >answer(p1,true)");
    assert_eq!(rig.data(kind::APPROVAL_RESOLVED)["source"], "policy");
    rig.want("a", "p2", false);
    assert!(rig.did().ends_with("set(Approval(\"p2\"))"), "{}", rig.did());
}

#[test]
fn a_drain_gives_the_running_turn_its_grace_and_leaves_the_queue() {
    let mut rig = Rig::new();
    rig.inject("a").inject("b").input(Input::Drain { reason: "signal".into() });
    assert_eq!(rig.did(), "set(DrainGrace)");
    rig.inject("c").input(Input::Timer(Timer::DrainGrace));
    assert_eq!(rig.did(), ">leave(a) set(InterruptGrace)");
    rig.input(Input::Timer(Timer::InterruptGrace));
    assert_eq!(
        rig.did(),
        "assistant(a) turn_complete(a) thread_status(a) O! ended(a) mark(low=1,taken=0) cancel(DrainGrace) \
         cancel(InterruptGrace) mark(low=1,taken=0) J! worker_bye O! >stop exit"
    );
    assert_eq!(rig.data(kind::TURN_COMPLETE)["code"], "turn_lost");
    assert_eq!(rig.data(kind::WORKER_BYE), &json!({ "reason": "signal" }));
    assert_eq!(rig.inject("d").did(), "");
}

#[test]
fn a_shutdown_counts_as_taken_only_when_it_is_carried_out() {
    let mut rig = Rig::new();
    rig.inject("a").next(None, Order::Shutdown { reason: "moved".into(), ends_swarm: false });
    assert_eq!(rig.did(), "set(DrainGrace)");
    rig.end("a");
    assert!(
        rig.did().contains("mark(low=2,taken=0) cancel") && rig.did().contains("mark(low=2,taken=2) J! worker_bye")
    );
}

#[test]
fn the_end_of_the_swarm_fails_what_waits() {
    let mut rig = Rig::new();
    rig.inject("a").inject("b").next(None, Order::Shutdown { reason: "over".into(), ends_swarm: true }).inject("c");
    assert!(rig.did().contains("turn_complete(c)"));
    rig.end("a");
    assert!(rig.did().contains("turn_complete(b)") && rig.did().ends_with("exit"), "{}", rig.did());
    assert_eq!(rig.data(kind::TURN_COMPLETE)["code"], "swarm_over");
}

#[test]
fn an_agent_that_gives_up_fails_its_turn_and_leaves_the_queue() {
    let mut rig = Rig::new();
    let failure = Failure::new(ErrorCode::CodexMissing, "no codex").hint("use --agent echo");
    rig.inject("a").inject("b").agent(AgentEvent::GaveUp { failure });
    assert_eq!(
        rig.did(),
        "assistant(a) turn_complete(a) thread_status(a) O! ended(a) mark(low=1,taken=0) worker_error O! J! exit1"
    );
    assert_eq!(rig.data(kind::TURN_COMPLETE)["code"], "codex_missing");
    let error = json!({ "code": "codex_missing", "message": "no codex", "hint": "use --agent echo", "fatal": true });
    assert_eq!(rig.data(kind::WORKER_ERROR), &error);

    let mut rig = Rig::new();
    rig.input(Input::AgentGone);
    assert_eq!(rig.did(), "worker_error O! J! exit1");
}

#[test]
fn records_that_make_no_sense_are_skipped_and_said_once() {
    let mut rig = Rig::new();
    rig.order(0, None, Order::Unusable { why: "not a record".into() });
    assert_eq!(rig.did(), "worker_error");
    assert_eq!(rig.data(kind::WORKER_ERROR)["fatal"], false);
    rig.next(None, Order::Unusable { why: "type \"x\"".into() });
    assert_eq!(rig.did(), "");
    rig.next(Some("a"), Order::BadInject { why: "no content".into() });
    assert_eq!(rig.data(kind::TURN_COMPLETE)["code"], "invalid_request", "a prompt always ends");
    rig.inject("b");
    assert!(rig.did().ends_with(">begin(b)"));
    assert_eq!(rig.core.counts().unusable, 3);
}

#[test]
fn thread_status_is_said_once_and_in_the_order_clients_know() {
    let mut rig = Rig::new();
    let status = |status: Value| AgentEvent::Event {
        injection: id("a"),
        kind: kind::THREAD_STATUS.into(),
        data: json!({ "status": status }),
    };
    rig.inject("a").agent(status(json!({ "type": "active", "activeFlags": [] })));
    assert_eq!(rig.did(), "", "said already");
    rig.agent(status(json!({ "type": "active", "activeFlags": ["waitingOnApproval"] })));
    assert_eq!(rig.did(), "thread_status(a)");
    rig.agent(status(json!({ "type": "active" })));
    assert_eq!(rig.did(), "thread_status(a)");
    rig.agent(status(json!({ "type": "idle" })));
    assert_eq!(rig.did(), "", "comes after the end of the turn");
    let event =
        |kind: &str| AgentEvent::Event { injection: id("a"), kind: kind.into(), data: json!({ "content": "x" }) };
    rig.agent(event("turn_complete"));
    assert_eq!(rig.did(), "", "only the worker ends turns");
    rig.agent(event("assistant"));
    assert_eq!(rig.did(), "assistant(a)");
    rig.end("a");
    assert!(rig.did().starts_with("turn_complete(a) thread_status(a)"), "the answer is there already: {}", rig.did());
    rig.agent(event("assistant_delta"));
    assert_eq!(rig.did(), "", "too late");
}

#[test]
fn the_membership_beside_it_gets_the_ring_and_has_its_records_written() {
    let mut rig = Rig::new();
    let ring = || Order::Keyring { ring: "{}".into() };
    assert_eq!(rig.next(None, ring()).did(), "ring({})");
    assert_eq!(rig.order(1, None, ring()).did(), "", "a repeated record does nothing");
    let word = || Input::Word { kind: kind::MEMBERS, data: json!({ "members": [] }) };
    assert_eq!(rig.input(word()).did(), "members");
    rig.input(Input::Drain { reason: "test".into() });
    assert_eq!(rig.input(word()).did(), "", "the last word is the worker's own");
}

#[test]
fn a_successor_ends_what_was_lost_and_takes_over_the_rest() {
    let open = |name: &str, outcome| OpenTurn { injection: id(name), seq: 1, trace: None, outcome };
    let lost = |open, ended, answered, approvals| LostTurn { open, ended, answered, approvals };
    let mut history = History::default();
    history.ended(2, id("old"), 0);
    let mut last = Vec::new();
    let turns = vec![
        lost(open("a", None), false, false, vec![("p".to_owned(), "c".to_owned())]),
        lost(open("b", None), false, true, vec![]),
        lost(open("c", None), true, true, vec![]),
        lost(open("d", Some(TurnOutcome::interrupted(""))), false, false, vec![]),
    ];
    let core = Core::start(policy(), Cursor::default(), 5, history, turns, &mut last);
    let mut rig = Rig { core, now: Instant::now(), seq: 0, last };
    assert_eq!(
        rig.did(),
        "exec_approval_resolved(a) assistant(a) turn_complete(a) turn_complete(b) assistant(d) turn_complete(d) O! \
         ended(a) ended(b) ended(c) ended(d)"
    );
    assert_eq!(rig.data(kind::TURN_COMPLETE)["status"], "interrupted");
    rig.agent(AgentEvent::Ready { detail: json!({}), pid: None });
    assert_eq!(rig.data(kind::WORKER_HELLO)["inbox_seq"], 5);
    for name in ["a", "old"] {
        assert_eq!(rig.inject(name).did(), "", "never again");
    }
    rig.next(None, Order::Interrupt);
    assert_eq!(rig.did(), "", "carried out by the one before");
    assert!(rig.inject("new").did().ends_with(">begin(new)"));
}
