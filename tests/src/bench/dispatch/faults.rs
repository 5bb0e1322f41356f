//! Providers that are slow or fail, and clients that ask for much beside those that ask for little.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use drover_testkit::mock_llm::Settings;
use serde_json::json;

use super::super::figures::{Figure, Goal};
use super::driver::{self, Caller, chat, flood};
use super::limits::stop;
use super::rig::{Cores, Rig};
use super::{Plan, figure, quantile};

/// How long an answer takes, and a slow one.
const LATENCY_MS: f64 = 200.0;
const SLOW_MS: f64 = 2000.0;

/// Batches of a hundred in which one call of twenty takes ten times as long, each of a seed of its own.
pub(super) fn slow(plan: &Plan) -> anyhow::Result<Vec<Figure>> {
    const BATCH: usize = 100;
    let settings = Settings { latency_ms: LATENCY_MS, slow_rate: 0.05, slow_ms: SLOW_MS, ..Settings::default() };
    let (mut walls, mut calls) = (Vec::new(), 0);
    // A dispatcher that has just started has yet to learn what is slow; so each batch has one of its own.
    for seed in 1..=plan.seeds {
        let mut rig = Rig::start(&settings, Cores::Any, BATCH as u32, "", "")?;
        rig.mock.change(&json!({"seed": seed}))?;
        rig.mock.reset()?;
        let file = rig.prompts("slow", BATCH)?;
        let ran = rig.dispatch(&[&file])?;
        ran.whole(BATCH)?;
        walls.push(ran.wall());
        calls += rig.mock.ledger()?.calls;
        if seed % 10 == 0 {
            super::progress(&format!("slow calls, seed {seed}: median {:.3} s so far", quantile(&walls, 0.5)));
        }
    }
    let extra = calls as f64 / (BATCH as f64 * f64::from(plan.seeds)) - 1.0;
    let name = format!("5 % of calls take 2 s and not 0.2, 100 at once, {} seeds", plan.seeds);
    Ok(vec![
        figure(format!("{name}: wall of a batch of 100, median"), quantile(&walls, 0.5), "s", Goal::Below(0.46)),
        figure(format!("{name}: p95"), quantile(&walls, 0.95), "s", Goal::Below(0.72)),
        figure(format!("{name}: extra calls"), extra * 100.0, "%", Goal::Below(6.0)),
    ])
}

/// Errors, resets, calls that never end, and garbage, all at once.
pub(super) fn faults(plan: &Plan) -> anyhow::Result<Vec<Figure>> {
    const WIDTH: u32 = 100;
    let settings = Settings {
        latency_ms: LATENCY_MS,
        error_rate: 0.10,
        reset_rate: 0.05,
        hang_rate: 0.02,
        garbage_rate: 0.01,
        ..Settings::default()
    };
    let mut rig = Rig::start(&settings, Cores::Any, WIDTH, "    max_attempts: 12\n", "")?;
    let file = rig.prompts("faults", plan.faulty)?;
    let ran = rig.dispatch(&[&file])?;
    let ledger = rig.mock.ledger()?;
    let mut numbers: Vec<u64> = ran.results.iter().filter_map(|result| result["number"].as_u64()).collect();
    let results = numbers.len();
    numbers.sort_unstable();
    numbers.dedup();
    let answered = ran.results.iter().filter(|result| result["status"] == "succeeded").count();
    let each = ledger.service_us as f64 / ledger.answered.max(1) as f64 / 1e6;
    let ideal = ledger.calls as f64 * each / f64::from(WIDTH);
    let tasks = plan.faulty;
    let name = format!("10 % errors, 5 % resets, 2 % hung, 1 % garbage, {tasks} tasks");
    let calls = ledger.calls;
    Ok(vec![
        figure(format!("{name}: tasks without an answer"), (tasks - answered.min(tasks)) as f64, "", Goal::Below(1.0)),
        figure(format!("{name}: results beyond one for each"), (results - numbers.len()) as f64, "", Goal::Below(1.0)),
        figure(
            format!("{name}: wall / ideal of the {calls} calls that were made"),
            ran.wall() / ideal,
            "",
            Goal::Below(1.15),
        ),
        figure(
            format!("{name}: prompts that the provider answered twice, because of hedges"),
            ledger.answered_again as f64,
            "",
            Goal::Shown,
        ),
    ])
}

/// Clients that share the front evenly, and connections of each.
const CLIENTS: usize = 50;
const EACH: usize = 4;

/// One who asks for one thing behind one who asks for ten thousand; and fifty who ask for as much as they get.
pub(super) fn fairness(plan: &Plan) -> anyhow::Result<Vec<Figure>> {
    let settings = Settings { latency_ms: LATENCY_MS, ..Settings::default() };
    let mut rig = Rig::start(&settings, Cores::Any, 50, "", "")?;
    let file = rig.prompts("many", plan.faulty)?;
    let under = rig.begin(&[&file])?;
    std::thread::sleep(Duration::from_secs(1));
    let (addr, headers) = rig.front()?;
    let asks = plan.lonely;
    let waits = driver::on_core(None, async move {
        let mut caller =
            Caller::connect(addr, "/v1/chat/completions", &format!("{headers}x-drover-client: one\r\n")).await?;
        let mut waits = Vec::new();
        for number in 0..asks {
            let began = Instant::now();
            caller.ask(&chat("auto", &format!("lonely question {number}"))).await?;
            waits.push(began.elapsed().as_secs_f64());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        anyhow::Ok(waits)
    })?;
    let ledger = rig.mock.ledger()?;
    let each = ledger.service_us as f64 / ledger.answered.max(1) as f64 / 1e6;
    stop(under);
    drop(rig);
    let worst = quantile(&waits, 1.0);

    let rig = Rig::start(&Settings { latency_ms: 50.0, ..settings }, Cores::Any, 20, "", "")?;
    let (addr, headers) = rig.front()?;
    let callers: Vec<String> =
        (0..CLIENTS * EACH).map(|n| format!("{headers}x-drover-client: c{}\r\n", n % CLIENTS)).collect();
    let time = plan.flood;
    let flooded =
        driver::on_core(None, async move { flood(addr, "/v1/chat/completions", "auto", &callers, time).await })?;
    let mut shares = vec![0.0; CLIENTS];
    for (number, answers) in flooded.each.iter().enumerate() {
        *shares.get_mut(number % CLIENTS).context("no such client")? += *answers as f64;
    }
    let name = format!("a client with one task behind one with {}", plan.faulty);
    Ok(vec![
        figure(
            format!("{name}, {asks} times: longest wait beyond its own call, in service times"),
            (worst - each) / each,
            "",
            Goal::Below(1.0),
        ),
        figure(
            format!("Jain's index over {CLIENTS} clients that ask for more than there is, {} s", time.as_secs()),
            jain(&shares),
            "",
            Goal::AtLeast(0.99),
        ),
    ])
}

/// 1 when all have the same, 1/n when one has all.
fn jain(shares: &[f64]) -> f64 {
    let sum: f64 = shares.iter().sum();
    let squares: f64 = shares.iter().map(|share| share * share).sum();
    sum * sum / (shares.len() as f64 * squares.max(f64::MIN_POSITIVE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jain_s_index_tells_equal_from_unequal() {
        assert!((jain(&[3.0; 7]) - 1.0).abs() < 1e-9);
        assert!((jain(&[1.0, 0.0, 0.0, 0.0]) - 0.25).abs() < 1e-9);
    }
}
