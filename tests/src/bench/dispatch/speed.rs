//! How near the ideal, at what cost in processor and memory.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use drover_testkit::mock_llm::Settings;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::super::figures::{Figure, Goal};
use super::Plan;
use super::driver::{self, Caller, chat, flood};
use super::limits::stop;
use super::rig::{Cores, Rig, THEIRS, cpu, http};
use super::{best, figure, median};
use crate::soak::resident_mib;

/// How long an answer of the mock takes.
const LATENCY_MS: f64 = 200.0;

fn slow() -> Settings {
    Settings { latency_ms: LATENCY_MS, ..Settings::default() }
}

/// Ideal and wall of batches of equal calls, and the processor time of a call.
pub(super) fn makespan(plan: &Plan) -> anyhow::Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for &(tasks, width, goal) in plan.batches {
        let mut rig = Rig::start(&slow(), Cores::Any, width, "", "")?;
        let file = rig.prompts("batch", tasks)?;
        let (mut shares, mut spent) = (Vec::new(), Vec::new());
        for _ in 0..plan.repeats {
            rig.mock.reset()?;
            let pid = rig.pid()?;
            let before = cpu(pid)?;
            let ran = rig.dispatch(&[&file])?;
            spent.push((cpu(pid)? - before) / tasks as f64 * 1e6);
            ran.whole(tasks)?;
            let ledger = rig.mock.ledger()?;
            ensure!(ledger.answered >= tasks as u64, "the mock answered {} calls", ledger.answered);
            // The provider's own stamps: what its answers took on average, one wave after the other.
            let each = ledger.service_us as f64 / ledger.answered as f64 / 1e6;
            shares.push(each * tasks as f64 / f64::from(width) / ran.wall());
            super::progress(&format!(
                "{tasks} x {width}: {:.4} of the ideal, {:.1} us of processor a call, {} calls",
                shares.last().unwrap_or(&0.0),
                spent.last().unwrap_or(&0.0),
                ledger.calls
            ));
        }
        let name = format!("{tasks} tasks, {width} at once, 200 ms");
        let tried = format!("best of {}", plan.repeats);
        figures.push(figure(format!("ideal / wall, {name}, {tried}"), best(&shares), "", Goal::AtLeast(goal)));
        figures.push(figure(format!("ideal / wall, {name}, median"), median(&shares), "", Goal::Shown));
        if (tasks, width) == plan.costed {
            let name = format!("processor time of a call, `drover dispatch`, {tasks} x {width}");
            figures.push(figure(format!("{name}, {tried}"), least(&spent), "us", Goal::Below(60.0)));
            figures.push(figure(format!("{name}, median"), median(&spent), "us", Goal::Shown));
        }
    }
    Ok(figures)
}

fn least(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

/// The front: processor time of a call at the same load, and how many calls one core takes.
pub(super) fn front(plan: &Plan) -> anyhow::Result<Vec<Figure>> {
    let (tasks, width) = plan.costed;
    let rig = Rig::start(&slow(), Cores::Apart, width, "", "")?;
    let (addr, headers) = rig.front()?;
    let pid = rig.pid()?;
    let mut spent = Vec::new();
    for _ in 0..plan.repeats {
        rig.mock.reset()?;
        let headers = headers.clone();
        let before = cpu(pid)?;
        driver::on_core(Some(THEIRS), async move { waves(addr, &headers, tasks, width).await })?;
        spent.push((cpu(pid)? - before) / tasks as f64 * 1e6);
        super::progress(&format!("front, {tasks} x {width}: {:.1} us a call", spent.last().unwrap_or(&0.0)));
    }
    drop(rig);
    let name = format!("processor time of a call, HTTP front, {tasks} x {width}, 200 ms");
    let mut figures = vec![
        figure(format!("{name}, best of {}", plan.repeats), least(&spent), "us", Goal::Below(60.0)),
        figure(format!("{name}, median"), median(&spent), "us", Goal::Shown),
    ];
    let (mut rates, mut spent) = (Vec::new(), Vec::new());
    for _ in 0..plan.repeats.min(3) {
        let (rate, each) = flooded(plan.flood)?;
        super::progress(&format!("front: {rate:.0} calls/s on one core, {each:.1} us of processor a call"));
        rates.push(rate);
        spent.push(each);
    }
    let name = "calls a second through the front on one core, 64 connections, the mock and the driver on the other";
    figures.push(figure(format!("{name}, best of {}", rates.len()), best(&rates), "/s", Goal::AtLeast(15_000.0)));
    figures.push(figure("processor time of a call at that load", least(&spent), "us", Goal::Shown));
    Ok(figures)
}

/// Calls a second through the front, which has one core, and processor time of a call at that load, in microseconds.
pub(super) fn flooded(time: Duration) -> anyhow::Result<(f64, f64)> {
    let rig =
        Rig::start(&Settings { answer: Some("noon".to_owned()), ..Settings::default() }, Cores::Apart, 128, "", "")?;
    let (addr, headers) = rig.front()?;
    let callers = vec![headers; 64];
    let pid = rig.pid()?;
    let before = cpu(pid)?;
    let flood =
        driver::on_core(
            Some(THEIRS),
            async move { flood(addr, "/v1/chat/completions", "auto", &callers, time).await },
        )?;
    let calls: u64 = flood.each.iter().sum();
    Ok((flood.rate(), (cpu(pid)? - before) * 1e6 / calls.max(1) as f64))
}

/// So many calls over so many connections, each of which asks again when it is answered.
async fn waves(addr: std::net::SocketAddr, headers: &str, tasks: usize, width: u32) -> anyhow::Result<()> {
    let width = width as usize;
    let mut callers = JoinSet::new();
    for caller in 0..width {
        let mut connection = Caller::connect(addr, "/v1/chat/completions", headers).await?;
        callers.spawn(async move {
            for number in 0..tasks / width {
                connection.ask(&chat("auto", &format!("caller {caller}, question {number}"))).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(caller) = callers.join_next().await {
        caller.context("a caller panicked")??;
    }
    Ok(())
}

/// What ten thousand tasks that wait take of memory, and a file of a million.
pub(super) fn memory(plan: &Plan) -> anyhow::Result<Vec<Figure>> {
    let hour = Settings { latency_ms: 3_600_000.0, ..Settings::default() };
    let rig = Rig::start(&hour_but_first(&hour), Cores::Any, 5, "    timeout: 2h\n", "")?;
    rig.mock.change(&json!({"latency_ms": hour.latency_ms}))?;
    let (addr, headers) = rig.front()?;
    let pid = rig.pid()?;
    let idle = resident_mib(pid)?;
    // Each request hands in up to 256 prompts at a time, so that many of them are needed until all wait in the core.
    let each = 250.min(plan.queued);
    let waiting: Vec<_> = (0..plan.queued / each)
        .map(|request| {
            let prompts: Vec<String> = (0..each).map(|n| format!("request {request}, prompt number {n}")).collect();
            let body = json!({"prompts": prompts}).to_string();
            let headers = headers.clone();
            std::thread::spawn(move || drop(http(addr, "POST", "/parallel", &headers, &body)))
        })
        .collect();
    let deadline = Instant::now() + Duration::from_mins(1);
    let mut queued = 0;
    while queued + 5 < plan.queued as u64 {
        ensure!(Instant::now() < deadline, "only {queued} tasks wait");
        std::thread::sleep(Duration::from_millis(50));
        let (_, status) = http(addr, "GET", "/status", &headers, "")?;
        queued = serde_json::from_str::<Value>(&status)?["queued"].as_u64().unwrap_or(0);
    }
    std::thread::sleep(plan.rest);
    let full = resident_mib(pid)?;
    let mut figures = vec![
        figure(
            format!("resident memory with {} tasks queued, {} s later", plan.queued, plan.rest.as_secs()),
            full,
            "MiB",
            Goal::Below(25.0),
        ),
        figure("of the same dispatcher when it had just started", idle, "MiB", Goal::Shown),
    ];
    drop(rig);
    for request in waiting {
        let _ = request.join();
    }
    figures.extend(from_a_file(plan)?);
    Ok(figures)
}

/// The first answer comes at once, so that the dispatcher can be started.
fn hour_but_first(settings: &Settings) -> Settings {
    Settings { latency_ms: 0.0, ..settings.clone() }
}

/// A file that is far larger than what is kept of it.
fn from_a_file(plan: &Plan) -> anyhow::Result<Vec<Figure>> {
    let mut rig =
        Rig::start(&Settings { answer: Some("noon".to_owned()), ..Settings::default() }, Cores::Any, 200, "", "")?;
    let file = rig.prompts("million", plan.from_file)?;
    let size = fs::metadata(&file)?.len() as f64 / f64::from(1 << 20);
    let pid = rig.pid()?;
    let began = Instant::now();
    let under = rig.begin(&[&file])?;
    let (mut daemon, mut command) = (0.0_f64, 0.0_f64);
    let mut answered = 0;
    while began.elapsed() < plan.reading {
        std::thread::sleep(Duration::from_millis(200));
        daemon = daemon.max(resident_mib(pid)?);
        // It may have ended by now.
        let Ok(resident) = resident_mib(under.pid()) else { break };
        command = command.max(resident);
        answered = rig.mock.ledger()?.answered;
    }
    let rate = answered as f64 / began.elapsed().as_secs_f64();
    let name = format!("most resident memory during a run of {} tasks from a file of {size:.0} MiB", plan.from_file);
    let told = format!("{answered} answered by then, {rate:.0} a second");
    stop(under);
    Ok(vec![
        figure(format!("{name}: the dispatcher ({told})"), daemon, "MiB", Goal::Below(100.0)),
        figure(format!("{name}: the command"), command, "MiB", Goal::Below(100.0)),
    ])
}
