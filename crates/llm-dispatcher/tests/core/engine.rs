//! The engine as a whole: nothing is lost, nothing leaks, and it costs little.

use std::time::{Duration, Instant};

use crate::provider::{Bucket, Says, SimLane};
use crate::sim::{Sim, ms, rounds, seconds, seeds, task, wide};
use drover_llm_dispatcher::call::{FailureKind, LimitHints, Usage};
use drover_llm_dispatcher::core::{
    AttemptId, Charge, ClientId, Effect, Engine, Input, Kind, LaneId, LaneSettings, Money, Outcome, Price, Priority,
    Reason, Refusal, Settings, Status, TaskId,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Anything at any time, over lanes that do anything: each task gets one verdict, and in the end nothing is left.
#[test]
fn whatever_happens_every_task_gets_one_verdict_and_nothing_is_left() {
    let base = seeds(0)[0] * 7919;
    for round in 0..rounds(80, 5000) {
        let seed = base + round;
        let mut rng = SmallRng::seed_from_u64(seed);
        let lanes: Vec<SimLane> = (0..3)
            .map(|_| {
                let mut lane = SimLane {
                    errors: rng.random_range(0.0..0.3),
                    resets: rng.random_range(0.0..0.2),
                    hung: rng.random_range(0.0..0.05),
                    slow_share: rng.random_range(0.0..0.2),
                    sigma: 0.5,
                    says: [Says::Nothing, Says::RetryAfter, Says::LimitInRefusal, Says::Always][rng.random_range(0..4)],
                    ..SimLane::default()
                };
                if rng.random_bool(0.5) {
                    lane.width = Some(rng.random_range(1..20));
                }
                if rng.random_bool(0.5) {
                    lane.requests = Some(Bucket::new(rng.random_range(60.0..6000.0), 10.0));
                }
                if rng.random_bool(0.5) {
                    lane.settings.requests_per_minute = Some(rng.random_range(60.0..6000.0));
                }
                lane.settings.price = Some(Price { input: 100, output: 1000, cached_input: None, per_call: 5 });
                lane.settings.timeout = Duration::from_secs(rng.random_range(1..20));
                lane
            })
            .collect();
        let cap = rng.random_bool(0.5).then(|| Money::from_pico(rng.random_range(1_000_000..100_000_000)));
        let settings = Settings {
            max_daily_spend: cap,
            max_queued: rng.random_range(10..200),
            max_concurrent_api: rng.random_range(1..20),
            ..wide(rng.random_range(1..30))
        };
        let mut sim = Sim::new(settings, lanes, seed);
        let tasks = rng.random_range(1..150);
        for id in 0..tasks {
            let mut spec = task(id);
            spec.lanes = (0..rng.random_range(1..4)).map(|_| LaneId(rng.random_range(0..3))).collect();
            spec.kind = Kind::ALL[rng.random_range(0..5)];
            spec.priority = [Priority::Low, Priority::Normal, Priority::High][rng.random_range(0..3)];
            spec.hedge = rng.random_bool(0.7);
            spec.streaming = rng.random_bool(0.2);
            let at = ms(rng.random_range(0..3000));
            if rng.random_bool(0.3) {
                spec.deadline = Some(at + ms(rng.random_range(1..5000)));
            }
            if rng.random_bool(0.1) {
                sim.cancel_at(at + ms(rng.random_range(0..3000)), spec.id);
            }
            sim.submit_at(at, rng.random_range(0..5), spec);
        }
        for lane in 0..3 {
            let at = rng.random_range(0.0..5.0);
            sim.change_at(seconds(at), lane, |lane, _| lane.down = true, 0.0);
            sim.change_at(seconds(at + rng.random_range(0.0..20.0)), lane, |lane, _| lane.down = false, 0.0);
        }
        sim.run();
        let stats = sim.engine.stats();
        let left = (sim.open.len(), stats.tasks, stats.queued, stats.calls, stats.busy);
        assert_eq!(left, (0, 0, 0, 0, 0), "seed {seed}: {stats:?}");
        assert_eq!(sim.ended.len() as u64, tasks, "seed {seed}");
        assert!(stats.reserved.is_zero(), "seed {seed}: {stats:?}");
        if let Some(cap) = cap {
            assert!(sim.provider_charged() <= cap, "seed {seed}");
        }
        // Whatever was set aside and not spent went back.
        if cap.is_some() {
            assert_eq!(sim.ledger.counted.get(&1).copied().unwrap_or_default(), sim.charged, "seed {seed}");
        }
    }
}

fn one_lane() -> Engine {
    Engine::new(Settings { lanes: vec![LaneSettings::default()], ..wide(10) }, 1)
}

fn handle(engine: &mut Engine, at: u64, input: Input) -> Vec<Effect> {
    let mut out = Vec::new();
    engine.handle(ms(at), input, &mut out);
    out
}

fn started(effects: &[Effect]) -> Vec<AttemptId> {
    let start = |effect: &Effect| match effect {
        Effect::Start { attempt, .. } => Some(*attempt),
        _ => None,
    };
    effects.iter().filter_map(start).collect()
}

fn status(effects: &[Effect]) -> Option<Status> {
    effects.iter().find_map(|effect| match effect {
        Effect::Done { verdict, .. } => Some(verdict.status),
        _ => None,
    })
}

fn failed(attempt: AttemptId, kind: FailureKind) -> Input {
    let outcome = Outcome::Failed { kind, charge: Charge::Nothing, hints: LimitHints::default() };
    Input::Finished { attempt, outcome }
}

#[test]
fn cancelling_reaches_the_call() {
    let mut engine = one_lane();
    let effects = handle(&mut engine, 0, Input::Submit { client: ClientId(1), task: task(1) });
    let attempt = started(&effects)[0];
    let effects = handle(&mut engine, 10, Input::Cancel { task: TaskId(1) });
    assert_eq!(effects[0], Effect::Abort { attempt });
    assert_eq!(status(&effects), Some(Status::Cancelled));
    assert_eq!(engine.stats().calls, 1, "its permit is held until it is gone");
    handle(&mut engine, 11, Input::Finished { attempt, outcome: Outcome::Aborted { charge: Charge::Unknown } });
    assert_eq!((engine.stats().calls, engine.stats().busy), (0, 0));
    assert_eq!(handle(&mut engine, 12, Input::Cancel { task: TaskId(1) }), []);
}

#[test]
fn after_the_first_words_nothing_is_tried_again() {
    for (streaming, again) in [(true, false), (false, true)] {
        let mut engine = one_lane();
        let mut spec = task(1);
        spec.streaming = streaming;
        let attempt = started(&handle(&mut engine, 0, Input::Submit { client: ClientId(1), task: spec }))[0];
        handle(&mut engine, 5, Input::FirstByte { attempt });
        let effects = handle(&mut engine, 10, failed(attempt, FailureKind::Broken));
        let expected = (!again).then_some(Status::Failed(Reason::Call(FailureKind::Broken)));
        assert_eq!(status(&effects), expected);
        let wake = engine.next_wake();
        assert_eq!(wake.is_some(), again);
        if let Some(wake) = wake {
            assert_eq!(started(&handle(&mut engine, wake.as_millis() as u64 + 1, Input::Tick)).len(), 1);
        }
    }
}

#[test]
fn a_permit_is_held_to_the_end_of_the_stream() {
    let mut engine = Engine::new(Settings { lanes: vec![LaneSettings::default()], ..wide(1) }, 1);
    let mut spec = task(1);
    spec.streaming = true;
    let attempt = started(&handle(&mut engine, 0, Input::Submit { client: ClientId(1), task: spec }))[0];
    assert_eq!(started(&handle(&mut engine, 1, Input::Submit { client: ClientId(1), task: task(2) })), []);
    assert_eq!(started(&handle(&mut engine, 2, Input::FirstByte { attempt })), []);
    assert_eq!(started(&handle(&mut engine, 50_000, Input::Tick)), []);
    let outcome = Outcome::Answered { usage: Some(Usage::default()), hints: LimitHints::default() };
    let effects = handle(&mut engine, 60_000, Input::Finished { attempt, outcome });
    assert_eq!(started(&effects).len(), 1);
}

#[test]
fn each_kind_of_failure_is_met_as_it_deserves() {
    let two = || Engine::new(Settings { lanes: vec![LaneSettings::default(); 2], ..wide(10) }, 1);
    let submit = |engine: &mut Engine| {
        let mut spec = task(1);
        spec.lanes = vec![LaneId(0), LaneId(1)];
        started(&handle(engine, 0, Input::Submit { client: ClientId(1), task: spec }))[0]
    };
    let next_lane = |effects: &[Effect]| {
        effects.iter().find_map(|effect| match effect {
            Effect::Start { lane, .. } => Some(lane.0),
            _ => None,
        })
    };
    // The task itself is wrong: no other lane would do better.
    let mut engine = two();
    let attempt = submit(&mut engine);
    let effects = handle(&mut engine, 1, failed(attempt, FailureKind::BadRequest));
    assert_eq!(status(&effects), Some(Status::Failed(Reason::Call(FailureKind::BadRequest))));
    // The lane does not fit, or cannot work: the next one, at once.
    for kind in [FailureKind::TooLarge, FailureKind::Auth, FailureKind::NotFound, FailureKind::QuotaExhausted] {
        let mut engine = two();
        let attempt = submit(&mut engine);
        assert_eq!(next_lane(&handle(&mut engine, 1, failed(attempt, kind))), Some(1), "{kind:?}");
    }
    // Withheld content is a result.
    let mut engine = two();
    let attempt = submit(&mut engine);
    let outcome = Outcome::Blocked { usage: None };
    let effects = handle(&mut engine, 1, Input::Finished { attempt, outcome });
    assert_eq!((status(&effects), started(&effects)), (Some(Status::Blocked), vec![]));
    // A wait that the provider asks for is kept.
    let mut engine = one_lane();
    let attempt = started(&handle(&mut engine, 0, Input::Submit { client: ClientId(1), task: task(1) }))[0];
    let hints = LimitHints { retry_after: Some(Duration::from_secs(7)), ..LimitHints::default() };
    let outcome = Outcome::Failed { kind: FailureKind::RateLimited, charge: Charge::Nothing, hints };
    assert_eq!(started(&handle(&mut engine, 100, Input::Finished { attempt, outcome })), []);
    assert_eq!(engine.next_wake(), Some(ms(7100)));
    assert_eq!(started(&handle(&mut engine, 7099, Input::Tick)), []);
    assert_eq!(started(&handle(&mut engine, 7100, Input::Tick)).len(), 1);
}

#[test]
fn a_key_that_is_wrong_fails_all_at_once() {
    let mut engine = one_lane();
    let mut first = None;
    for id in 0..1000 {
        let effects = handle(&mut engine, 0, Input::Submit { client: ClientId(1), task: task(id) });
        first = first.or(started(&effects).first().copied());
    }
    let effects = handle(&mut engine, 10, failed(first.unwrap(), FailureKind::Auth));
    let ended = effects.iter().filter(|effect| matches!(effect, Effect::Done { .. })).count();
    assert_eq!(ended, 991, "all but the nine whose calls are under way");
    assert_eq!(started(&effects), []);
}

#[test]
fn what_cannot_be_queued_is_refused_with_a_reason() {
    let mut engine = Engine::new(Settings { lanes: vec![LaneSettings::default()], max_queued: 2, ..wide(1) }, 1);
    let refusal = |effects: &[Effect]| match status(effects) {
        Some(Status::Refused(refusal)) => Some(refusal),
        _ => None,
    };
    let submit = |engine: &mut Engine, spec| handle(engine, 5, Input::Submit { client: ClientId(1), task: spec });
    assert_eq!(refusal(&submit(&mut engine, task(1))), None);
    assert_eq!(refusal(&submit(&mut engine, task(1))), Some(Refusal::Duplicate));
    let mut nowhere = task(2);
    nowhere.lanes = vec![LaneId(9)];
    assert_eq!(refusal(&submit(&mut engine, nowhere)), Some(Refusal::NoLane));
    let mut late = task(3);
    late.deadline = Some(ms(5));
    assert!(matches!(refusal(&submit(&mut engine, late)), Some(Refusal::Deadline { .. })));
    for id in 4..6 {
        assert_eq!(refusal(&submit(&mut engine, task(id))), None);
    }
    assert_eq!(refusal(&submit(&mut engine, task(7))), Some(Refusal::QueueFull { limit: 2 }));
}

/// Bytes of memory that this process has in use.
fn resident() -> Option<usize> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    Some(statm.split_whitespace().nth(1)?.parse::<usize>().ok()? * 4096)
}

#[test]
fn a_queued_task_takes_less_than_a_kilobyte_and_microseconds() {
    let mut engine = Engine::new(Settings { lanes: vec![LaneSettings::default()], ..wide(100) }, 1);
    let before = resident();
    let mut out = Vec::new();
    let count = 20_000;
    for id in 0..count {
        let mut spec = task(id);
        spec.deadline = (id % 4 == 0).then(|| Duration::from_secs(100_000 + id));
        engine.handle(Duration::ZERO, Input::Submit { client: ClientId(id % 500), task: spec }, &mut out);
    }
    if let (Some(before), Some(after)) = (before, resident()) {
        let each = after.saturating_sub(before) / count as usize;
        println!("{each} bytes for each task");
        assert!(each <= 1024, "{each} bytes for each of {count} tasks");
    }
    let began = Instant::now();
    let mut ended = 0;
    let mut now = Duration::ZERO;
    let mut under_way: std::collections::VecDeque<AttemptId> = started(&out).into();
    while let Some(attempt) = under_way.pop_front() {
        now += Duration::from_micros(50);
        out.clear();
        let outcome = Outcome::Answered { usage: Some(Usage::default()), hints: LimitHints::default() };
        engine.handle(now, Input::Finished { attempt, outcome }, &mut out);
        ended += out.iter().filter(|effect| matches!(effect, Effect::Done { .. })).count();
        under_way.extend(started(&out));
    }
    let each = began.elapsed() / count as u32;
    println!("{each:?} for each task, in this build");
    assert_eq!(ended as u64, count);
}

#[test]
fn simulated_time_goes_on_evenly_at_full_width() {
    // The dispatcher's own share of the wall time is none here; what is left is what the queue and the permits cost.
    for (tasks, width, bar) in [(100, 10, 0.995), (1000, 10, 0.995), (1000, 100, 0.97)] {
        let lane = SimLane { spread: 0.0, network: (ms(0), ms(0)), ..SimLane::default() };
        let mut sim = Sim::new(wide(width), vec![lane], 1);
        for id in 0..tasks {
            sim.submit(id % 3, task(id));
        }
        let wall = sim.run_tasks().as_secs_f64();
        let ideal = tasks.div_ceil(u64::from(width)) as f64 * 0.2;
        assert!(ideal / wall >= bar, "{tasks} tasks, {width} wide: {:.4}", ideal / wall);
    }
}
