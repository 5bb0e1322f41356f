//! Table tests of the core, by hand.

use drover_types::{ErrorCode, Generation, NodeIndex, SwarmId};

use super::{Answer, Call, CallId, Claim, Core, Input, Past, QueueList, Queued, SECOND, Settings, Step, refusal};
use crate::allocation::{AllocationState, WorkerState};
use crate::slurm::state::JobState;
use crate::slurm::tag::Tag;

struct Rig {
    core: Core,
    now: u64,
    last: Step,
}

fn id() -> SwarmId {
    "s".parse().unwrap()
}

fn tag(submission: u32) -> Tag {
    Tag { swarm: id(), submission }
}

fn queued(job: u64, submission: u32, state: &str, reason: &str) -> Queued {
    Queued {
        id: job,
        tag: Some(tag(submission)),
        state: JobState::parse(state),
        reason: reason.into(),
        hosts: "n[1-2]".into(),
        starts: String::new(),
    }
}

fn list(jobs: Vec<Queued>) -> Answer {
    Answer::Queue(QueueList { jobs, whole: true })
}

impl Rig {
    fn new() -> Self {
        let settings = Settings {
            poll: 30 * SECOND,
            calls_per_minute: 60,
            keep_over: 3600 * SECOND,
            horizon: 60 * SECOND,
            quiet: 60 * SECOND,
        };
        let now = 1_795_262_400 * SECOND;
        Self { core: Core::new(settings, now), now, last: Step::default() }
    }

    fn launched() -> Self {
        let mut rig = Self::new();
        rig.core.apply(rig.now, Input::Launch { swarm: id(), nodes: 2, limit: None });
        rig
    }

    /// A swarm with job 7 in the queue.
    fn held() -> Self {
        let mut rig = Self::launched();
        let look = rig.call();
        rig.answer(look.0, list(vec![]));
        let submit = rig.call();
        assert_eq!(submit.1, Call::Submit(tag(1)));
        rig.answer(submit.0, Answer::Submitted { job: 7 });
        rig
    }

    /// The next call, as soon as there is one.
    fn call(&mut self) -> (CallId, Call) {
        for _ in 0..1000 {
            self.last = self.core.advance(self.now);
            assert!(self.last.calls.len() < 2, "{:?}", self.last.calls);
            if let Some(call) = self.last.calls.pop() {
                return call;
            }
            self.now = self.core.next_deadline().expect("something is due").max(self.now);
        }
        panic!("no call is ever made");
    }

    fn answer(&mut self, call: CallId, answer: Answer) {
        self.now += SECOND / 10;
        self.core.apply(self.now, Input::Answered { call, answer });
    }

    /// Answers looks with this until another call is made.
    fn call_but_looks(&mut self, jobs: &[Queued]) -> (CallId, Call) {
        loop {
            match self.call() {
                (call, Call::Queue) => self.answer(call, list(jobs.to_vec())),
                other => return other,
            }
        }
    }

    fn look(&mut self, jobs: Vec<Queued>) {
        let (call, what) = self.call();
        assert_eq!(what, Call::Queue);
        self.answer(call, list(jobs));
        self.last = self.core.advance(self.now);
    }

    fn seen(&self) -> (AllocationState, String, String) {
        let view = self.core.view(&id()).unwrap();
        (view.state, view.word, view.reason)
    }
}

#[test]
fn a_launch_looks_submits_and_tells_why_it_waits_and_where_it_runs() {
    let mut rig = Rig::held();
    rig.look(vec![queued(7, 1, "PENDING", "Resources")]);
    let (state, word, reason) = rig.seen();
    assert_eq!((state, word.as_str()), (AllocationState::Pending, "PENDING"));
    assert!(reason.contains("waits since 2026-") && reason.contains("Resources: waits for nodes"), "{reason}");
    let claim = Claim { node: NodeIndex(1), generation: Generation(1), host: "n2.local".into(), pid: 9, end: None };
    rig.core.apply(rig.now, Input::Claims { swarm: id(), claims: vec![claim] });
    let asked_at = rig.now;
    rig.look(vec![queued(7, 1, "RUNNING", "None")]);
    assert!(rig.now < asked_at + SECOND, "a worker's word is looked up at once");
    let view = rig.core.view(&id()).unwrap();
    assert_eq!((view.state, view.job), (AllocationState::Running, Some(7)));
    let nodes: Vec<_> =
        view.nodes.iter().map(|node| (node.host.as_str(), node.state, node.generation.0, node.pid)).collect();
    assert_eq!(nodes, [("n1", WorkerState::Pending, 0, 0), ("n2.local", WorkerState::Running, 1, 9)]);
    // Put back: the same job waits again.
    rig.look(vec![queued(7, 1, "PENDING", "BeginTime")]);
    let view = rig.core.view(&id()).unwrap();
    assert_eq!((view.state, view.nodes[1].state), (AllocationState::Pending, WorkerState::Restarting));
    assert!(view.reason.contains("put back"), "{}", view.reason);
    let why = &view.nodes[1].reason;
    assert!(why.contains("put back into the queue: waits since 2026-") && why.contains("BeginTime"), "{why}");
    // What is odd about a job that has run is told of each node.
    for (state, words) in [("SUSPENDED", "it is suspended"), ("RUNNING", "")] {
        rig.look(vec![queued(7, 1, state, "None")]);
        let view = rig.core.view(&id()).unwrap();
        assert!(
            view.nodes[1].reason.starts_with(words) && view.nodes[1].reason.is_empty() == words.is_empty(),
            "{view:?}"
        );
    }
    rig.look(vec![]);
    let view = rig.core.view(&id()).unwrap();
    assert_eq!((view.state, view.word.as_str()), (AllocationState::Running, "RUNNING"));
    assert!(view.nodes[1].reason.starts_with("the queue no longer has job 7 since 2026-"), "{view:?}");
}

#[test]
fn a_job_that_is_there_already_is_taken_and_nothing_is_submitted() {
    let mut rig = Rig::launched();
    rig.look(vec![queued(9, 1, "RUNNING", "None")]);
    assert_eq!(rig.core.view(&id()).unwrap().job, Some(9));
    assert_eq!(rig.last.settled, [(id(), Ok(()))]);
    for _ in 0..5 {
        rig.look(vec![queued(9, 1, "RUNNING", "None")]);
    }
}

#[test]
fn a_refusal_ends_the_launch_with_its_reason() {
    let mut rig = Rig::launched();
    let look = rig.call();
    rig.answer(look.0, list(vec![]));
    let submit = rig.call();
    rig.answer(submit.0, Answer::Rejected(refusal("Invalid account")));
    let step = rig.core.advance(rig.now);
    let (_, outcome) = &step.settled[0];
    assert_eq!(outcome.as_ref().unwrap_err().code, ErrorCode::LaunchFailed);
    assert_eq!(rig.seen().0, AllocationState::Failed);
}

#[test]
fn after_an_unknown_outcome_nothing_is_submitted_before_everybody_has_denied_the_job() {
    for history in [true, false] {
        let mut rig = Rig::launched();
        let look = rig.call();
        rig.answer(look.0, list(vec![]));
        let submit = rig.call();
        let begun = rig.now;
        rig.answer(submit.0, Answer::Unsure("cut".into()));
        let (call, what) = rig.call_but_looks(&[]);
        assert!(rig.now >= begun + 60 * SECOND, "sbatch may still be at work");
        assert_eq!(what, Call::History { jobs: vec![], names: vec![tag(1).name()] });
        rig.answer(call, if history { Answer::History(vec![]) } else { Answer::Unsupported("off".into()) });
        let (_, what) = rig.call_but_looks(&[]);
        assert_eq!(what, Call::Submit(tag(2)), "a number is never used twice");
        assert!(history || rig.now >= begun + 120 * SECOND);

        // The first one turns up all the same: it is the swarm's, so it goes.
        let second = rig.core.under_way.keys().next().copied().unwrap();
        rig.answer(second, Answer::Submitted { job: 8 });
        let (_, what) = rig.call_but_looks(&[queued(8, 2, "RUNNING", ""), queued(5, 1, "RUNNING", "")]);
        assert_eq!(what, Call::Cancel { job: 5, kill: false });
    }
    // And one that turns up in the queue is the swarm's job.
    let mut rig = Rig::launched();
    let look = rig.call();
    rig.answer(look.0, list(vec![]));
    let submit = rig.call();
    rig.answer(submit.0, Answer::Unsure("cut".into()));
    rig.look(vec![queued(7, 1, "PENDING", "Priority")]);
    assert_eq!(rig.core.view(&id()).unwrap().job, Some(7));
}

#[test]
fn a_job_that_left_the_queue_has_ended_and_the_history_says_how() {
    let past = |state: &str, name: u32| Past {
        id: 7,
        tag: Some(tag(name)),
        state: JobState::parse(state),
        exit: "3:0".into(),
    };
    let mut rig = Rig::held();
    rig.look(vec![queued(7, 1, "RUNNING", "None")]);
    let (call, what) = rig.call_but_looks(&[]);
    assert_eq!(what, Call::History { jobs: vec![7], names: vec![tag(1).name()] });
    // It lags, or has an old job of that number: asked again.
    rig.answer(call, Answer::History(vec![past("RUNNING", 1), past("FAILED", 9)]));
    let (call, _) = rig.call_but_looks(&[]);
    rig.answer(call, Answer::History(vec![past("FAILED", 1)]));
    assert_eq!(rig.seen(), (AllocationState::Failed, "FAILED".into(), "it failed (exit code 3)".into()));

    // Without a history the controller is asked, and then nobody knows.
    for (answer, word, state) in [
        (Answer::Shown(Some(past("TIMEOUT", 1))), "TIMEOUT", AllocationState::Completed),
        (Answer::NoSuchJob, "UNKNOWN", AllocationState::Failed),
    ] {
        let mut rig = Rig::held();
        rig.look(vec![queued(7, 1, "RUNNING", "None")]);
        let (call, _) = rig.call_but_looks(&[]);
        rig.answer(call, Answer::Unsupported("off".into()));
        let (call, what) = rig.call_but_looks(&[]);
        assert_eq!(what, Call::Show { job: 7 });
        rig.answer(call, answer);
        let seen = rig.seen();
        assert_eq!((seen.0, seen.1.as_str()), (state, word), "{}", seen.2);
        assert!(!seen.2.is_empty());
    }
}

#[test]
fn workers_that_end_in_order_when_their_time_is_up_are_said_to_have_reached_it() {
    let ended = |after: u64, put_back: bool, word: &str| {
        let mut rig = Rig::new();
        rig.core.apply(rig.now, Input::Launch { swarm: id(), nodes: 2, limit: Some(600 * SECOND) });
        rig.look(vec![queued(7, 1, "RUNNING", "None")]);
        let began = rig.now;
        if put_back {
            rig.now += 300 * SECOND;
            rig.look(vec![queued(7, 1, "PENDING", "BeginTime")]);
            rig.look(vec![queued(7, 1, "RUNNING", "None")]);
        }
        rig.now = began + after * SECOND;
        // An allocator that was started again knows it too.
        let record = serde_json::to_string(&rig.core.record(&id()).unwrap()).unwrap();
        rig.core = Rig::new().core;
        rig.core.restore(id(), &serde_json::from_str(&record).unwrap(), rig.now);
        rig.look(vec![queued(7, 1, word, if word == "FAILED" { "NonZeroExitCode" } else { "None" })]);
        let (state, seen, reason) = rig.seen();
        assert_eq!((state == AllocationState::Completed, seen.as_str()), (word == "COMPLETED", word));
        reason
    };
    for (after, put_back, near) in
        [(535, false, true), (700, false, true), (300, false, false), (535, true, false), (845, true, true)]
    {
        let reason = ended(after, put_back, "COMPLETED");
        assert_eq!(reason.contains("its time limit of 00:10:00 was reached"), near, "{after} {put_back}: {reason}");
        let reason = ended(after, put_back, "FAILED");
        assert_eq!(reason.contains("its time limit of 00:10:00 was near"), near, "{after} {put_back}: {reason}");
        assert!(reason.contains("NonZeroExitCode"), "{reason}");
    }
}

#[test]
fn what_was_not_understood_ends_nothing() {
    let mut rig = Rig::held();
    rig.look(vec![queued(7, 1, "RUNNING", "None")]);
    for _ in 0..10 {
        let (call, what) = rig.call();
        assert_eq!(what, Call::Queue);
        rig.answer(call, Answer::Queue(QueueList { jobs: vec![], whole: false }));
    }
    assert_eq!(rig.seen().0, AllocationState::Running);
    rig.look(vec![queued(7, 1, "HIBERNATING", "None")]);
    let (state, word, reason) = rig.seen();
    assert_eq!((state, word.as_str()), (AllocationState::Running, "HIBERNATING"));
    assert!(reason.contains("does not know"), "{reason}");
}

#[test]
fn a_controller_that_cannot_be_reached_changes_no_state_and_is_asked_less_and_less() {
    let mut rig = Rig::held();
    rig.look(vec![queued(7, 1, "RUNNING", "None")]);
    let begun = rig.now;
    let mut calls = 0;
    while rig.now < begun + 600 * SECOND {
        let (call, what) = rig.call();
        assert_eq!(what, Call::Queue);
        rig.answer(call, Answer::NotDone("connect failure".into()));
        calls += 1;
    }
    assert!((10..20).contains(&calls), "{calls}");
    let (state, word, reason) = rig.seen();
    assert_eq!((state, word.as_str()), (AllocationState::Running, "RUNNING"));
    assert!(reason.contains("cannot be reached since 2026-") && reason.contains("connect failure"), "{reason}");
    assert!(rig.core.controller().down.is_some());
    rig.look(vec![queued(7, 1, "RUNNING", "None")]);
    assert_eq!(rig.seen().2, "");
    assert!(rig.core.controller().down.is_none());
}

#[test]
fn a_cancel_is_repeated_until_the_queue_confirms_it() {
    let mut rig = Rig::held();
    rig.look(vec![queued(7, 1, "RUNNING", "None")]);
    rig.core.apply(rig.now, Input::Release { swarm: id(), force: false });
    let running = [queued(7, 1, "RUNNING", "None")];
    let (call, what) = rig.call_but_looks(&running);
    assert_eq!(what, Call::Cancel { job: 7, kill: false });
    rig.answer(call, Answer::NotDone("connect failure".into()));
    assert_eq!(rig.seen().0, AllocationState::Completing);
    let first = rig.now;
    let (call, what) = rig.call_but_looks(&running);
    assert_eq!(what, Call::Cancel { job: 7, kill: false });
    assert!(rig.now >= first + 15 * SECOND);
    rig.answer(call, Answer::Cancelled);
    rig.look(vec![queued(7, 1, "COMPLETING", "None")]);
    rig.look(vec![]);
    assert_eq!(rig.seen(), (AllocationState::Completed, "CANCELLED".into(), "released".into()));

    // At once: told once in order, then killed.
    let mut rig = Rig::held();
    rig.look(vec![queued(7, 1, "RUNNING", "None")]);
    rig.core.apply(rig.now, Input::Release { swarm: id(), force: true });
    let (call, what) = rig.call_but_looks(&running);
    assert_eq!(what, Call::Cancel { job: 7, kill: false });
    rig.answer(call, Answer::Cancelled);
    assert_eq!(rig.call_but_looks(&running).1, Call::Cancel { job: 7, kill: true });
}

#[test]
fn what_an_earlier_allocator_was_doing_is_looked_at_before_anything_is_done() {
    let mut rig = Rig::launched();
    let look = rig.call();
    rig.answer(look.0, list(vec![]));
    let submit = rig.call();
    assert!(rig.last.store.contains(&id()), "stored before it is submitted");
    let record = rig.core.record(&id()).unwrap();
    let text = serde_json::to_string(&record).unwrap();
    assert_eq!(text, r#"{"nodes":2,"submission":1,"phase":"submitting"}"#);
    drop(submit);
    let mut rig = Rig { core: Rig::new().core, ..rig };
    rig.core.restore(id(), &serde_json::from_str(&text).unwrap(), rig.now);
    rig.look(vec![queued(7, 1, "RUNNING", "None")]);
    let view = rig.core.view(&id()).unwrap();
    assert_eq!((view.job, view.state), (Some(7), AllocationState::Running));
    let record = rig.core.record(&id()).unwrap();
    assert_eq!(serde_json::from_str::<super::JobRecord>(&serde_json::to_string(&record).unwrap()).unwrap(), record);
}

#[test]
fn orphans_are_shown_and_left_alone_and_superseded_jobs_of_a_living_swarm_are_not() {
    let mut rig = Rig::held();
    let stranger =
        Queued { tag: Some(Tag { swarm: "t".parse().unwrap(), submission: 1 }), ..queued(3, 1, "RUNNING", "") };
    for _ in 0..5 {
        rig.look(vec![queued(7, 1, "RUNNING", ""), stranger.clone()]);
    }
    assert_eq!(rig.core.orphans().keys().copied().collect::<Vec<_>>(), [3]);
    // The swarm that it belongs to is asked for: then it is no orphan, and nothing is submitted.
    rig.core.apply(rig.now, Input::Launch { swarm: "t".parse().unwrap(), nodes: 1, limit: None });
    rig.look(vec![queued(7, 1, "RUNNING", ""), stranger]);
    assert!(rig.core.orphans().is_empty());
    assert_eq!(rig.core.view(&"t".parse().unwrap()).unwrap().job, Some(3));
}

#[test]
fn twenty_swarms_stay_within_the_budget() {
    let mut rig = Rig::new();
    let swarms: Vec<SwarmId> = (0..20).map(|n| format!("s{n}").parse().unwrap()).collect();
    for swarm in &swarms {
        rig.core.apply(rig.now, Input::Launch { swarm: swarm.clone(), nodes: 1, limit: None });
    }
    let (mut begun, mut jobs, mut released) = (Vec::new(), Vec::<Queued>::new(), false);
    let start = rig.now;
    while rig.now < start + 900 * SECOND {
        let step = rig.core.advance(rig.now);
        for (call, what) in step.calls {
            begun.extend(std::iter::repeat_n(rig.now, what.requests() as usize));
            let answer = match what {
                Call::Queue => list(jobs.clone()),
                Call::Submit(tag) => {
                    let job = 100 + jobs.len() as u64;
                    jobs.push(Queued { tag: Some(tag), ..queued(job, 1, "RUNNING", "") });
                    Answer::Submitted { job }
                }
                Call::Cancel { job, .. } => {
                    jobs.retain(|other| other.id != job);
                    Answer::Cancelled
                }
                other => panic!("{other:?}"),
            };
            rig.core.apply(rig.now, Input::Answered { call, answer });
        }
        if jobs.len() == 20 && !released {
            released = true;
            for swarm in &swarms {
                rig.core.apply(rig.now, Input::Release { swarm: swarm.clone(), force: false });
            }
        }
        rig.now = rig.core.next_deadline().unwrap_or(u64::MAX).clamp(rig.now + 1, rig.now + 10 * SECOND);
    }
    assert!(begun.windows(61).all(|many| many[60] - many[0] >= 60 * SECOND), "more than 60 requests in a minute");
    assert!(released && swarms.iter().all(|swarm| rig.core.view(swarm).unwrap().over));
}
