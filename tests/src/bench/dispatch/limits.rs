//! Providers that count: a strict bucket, one whose limit changes, and one that does not say how many calls it takes at once.

use std::time::{Duration, Instant};

use drover_testkit::mock_llm::{Call, Settings};
use serde_json::json;

use super::super::figures::{Figure, Goal};
use super::rig::{Cores, Rig, Under};
use super::{Plan, figure};

/// Calls a minute of the strict bucket.
const PER_MINUTE: f64 = 6000.0;
/// How long an answer takes.
const LATENCY: f64 = 0.2;
/// So long after a change the rate is looked at.
const SETTLED: Duration = Duration::from_secs(5);

fn strict() -> Settings {
    Settings {
        latency_ms: LATENCY * 1000.0,
        requests_per_minute: Some(PER_MINUTE),
        burst: 10,
        limit_headers: true,
        ..Settings::default()
    }
}

/// All of them.
pub(super) fn run(plan: &Plan) -> anyhow::Result<Vec<Figure>> {
    let mut figures = bucket(plan)?;
    for (headers, name) in [(true, "with x-ratelimit headers"), (false, "with Retry-After only")] {
        figures.extend(changes(plan, headers, name)?);
    }
    figures.extend(unknown(plan)?);
    Ok(figures)
}

/// Calls a minute that were taken between two moments of the mock's clock.
fn rate(calls: &[Call], from_us: u64, to_us: u64) -> f64 {
    let taken = calls.iter().filter(|call| call.status == 200 && (from_us..to_us).contains(&call.began_us)).count();
    taken as f64 * 60e6 / to_us.saturating_sub(from_us).max(1) as f64
}

fn bucket(plan: &Plan) -> anyhow::Result<Vec<Figure>> {
    let limit = format!("    requests_per_minute: {PER_MINUTE}\n");
    let mut rig = Rig::start(&strict(), Cores::Any, 100, &limit, "")?;
    let tasks = (plan.paced.as_secs_f64() * PER_MINUTE / 60.0) as usize;
    let file = rig.prompts("paced", tasks)?;
    let ran = rig.dispatch(&[&file])?;
    ran.whole(tasks)?;
    let (ledger, calls) = (rig.mock.ledger()?, rig.mock.calls()?);
    let began = calls.iter().filter(|call| call.status == 200).map(|call| call.began_us);
    let (first, last) = (began.clone().min().unwrap_or(0), began.max().unwrap_or(0));
    let reached = ledger.answered.saturating_sub(1) as f64 * 60e6 / last.saturating_sub(first).max(1) as f64;
    let name = format!("strict bucket of {PER_MINUTE:.0} a minute, {tasks} tasks");
    Ok(vec![
        figure(format!("{name}: refusals (429)"), ledger.rejected_rate as f64, "", Goal::Below(1.0)),
        figure(format!("{name}: share of the allowed rate"), reached / PER_MINUTE, "", Goal::AtLeast(0.98)),
    ])
}

/// The limit is halved while a run is under way, and given back.
fn changes(plan: &Plan, headers: bool, name: &str) -> anyhow::Result<Vec<Figure>> {
    let limit = format!("    requests_per_minute: {PER_MINUTE}\n");
    let settings = Settings { limit_headers: headers, ..strict() };
    let mut rig = Rig::start(&settings, Cores::Any, 100, &limit, "")?;
    let file = rig.prompts("changed", 100_000)?;
    let under = rig.begin(&[&file])?;
    std::thread::sleep(Duration::from_secs(3));
    let mut figures = Vec::new();
    for (to, said) in [(PER_MINUTE / 2.0, "halved"), (PER_MINUTE, "given back")] {
        let before = rig.mock.ledger()?;
        rig.mock.change(&json!({"requests_per_minute": to}))?;
        // The mock's own clock, from a call that is under way at this moment.
        let changed = latest(&rig.mock.calls()?);
        std::thread::sleep(SETTLED + plan.settled);
        let (after, calls) = (rig.mock.ledger()?, rig.mock.calls()?);
        let from = changed + SETTLED.as_micros() as u64;
        let share = rate(&calls, from, from + plan.settled.as_micros() as u64 - 300_000) / to;
        let refused = after.rejected_rate - before.rejected_rate;
        let what = format!("strict limit {said} during a run, {name}");
        figures.push(figure(format!("{what}: refusals"), refused as f64, "", Goal::Below(3.5)));
        figures.push(figure(format!("{what}: share of the new rate from 5 s on"), share, "", Goal::AtLeast(0.95)));
    }
    stop(under);
    Ok(figures)
}

fn latest(calls: &[Call]) -> u64 {
    calls.iter().map(|call| call.ended_us).max().unwrap_or(0)
}

/// How many calls the provider takes at once changes, and nobody says so.
fn unknown(plan: &Plan) -> anyhow::Result<Vec<Figure>> {
    let settings = Settings {
        latency_ms: LATENCY * 1000.0,
        max_in_flight: Some(plan.widths[0]),
        answer: Some("noon".to_owned()),
        ..Settings::default()
    };
    let mut rig = Rig::start(&settings, Cores::Any, 500, "", "")?;
    let file = rig.prompts("unknown", 400_000)?;
    let under = rig.begin(&[&file])?;
    let (mut oracle, mut answered, mut refused, mut calls) = (0.0, 0.0, 0.0, 0.0);
    while rig.mock.ledger()?.calls == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    for &width in plan.widths {
        let (before, began) = (rig.mock.ledger()?, Instant::now());
        rig.mock.change(&json!({"max_in_flight": width}))?;
        std::thread::sleep(plan.phase);
        let (after, time) = (rig.mock.ledger()?, began.elapsed().as_secs_f64());
        let ended = (after.answered - before.answered) as f64;
        let each = (after.service_us - before.service_us) as f64 / 1e6 / ended.max(1.0);
        let could = f64::from(width) * time / each;
        super::progress(&format!(
            "unknown width {width}: {:.3} of an oracle, {} refusals",
            ended / could,
            after.rejected_in_flight - before.rejected_in_flight
        ));
        oracle += could;
        answered += ended;
        refused += (after.rejected_in_flight - before.rejected_in_flight) as f64;
        calls += (after.calls - before.calls) as f64;
    }
    stop(under);
    let name = format!("unknown width {:?}, {} s each", plan.widths, plan.phase.as_secs());
    Ok(vec![
        figure(format!("{name}: answers beside an oracle's"), answered / oracle, "", Goal::AtLeast(0.92)),
        figure(format!("{name}: share of calls refused"), refused / f64::max(calls, 1.0), "", Goal::Shown),
    ])
}

/// Ends a run that has more tasks than time.
pub(super) fn stop(under: Under) {
    let _ = drover_testkit::cluster::signal(under.pid(), rustix::process::Signal::INT);
    let _ = under.wait();
}
