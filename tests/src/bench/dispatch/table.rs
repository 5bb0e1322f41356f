//! The benchmark table of the mission, replayed: the same prompts one after another and in parallel, the latencies of its sequential
//! column at a tenth, at its widths, and with the limits that are shipped. Beside each speed-up stands what any scheduler could
//! have reached; one above the width is refused, because it would say something about the measurement only.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use drover_testkit::mock_llm::{Call, Settings};
use tokio::task::JoinSet;

use super::super::figures::{Figure, Goal};
use super::driver::{self, Caller, chat};
use super::rig::{Cores, Rig, Width};
use super::{Plan, figure, median};

/// One row: so many subjects, each of which goes through these phases in their order, and something at the end of all.
struct Row {
    name: &'static str,
    subjects: usize,
    /// Latency of each phase, in milliseconds.
    phases: &'static [f64],
    last: Option<f64>,
    width: u32,
}

/// Tenths of the mission's figures: a subject's share of the sequential column, spread evenly over its phases.
const ROWS: &[Row] = &[
    Row { name: "5 web searches", subjects: 5, phases: &[124.0], last: None, width: 5 },
    Row { name: "10 summaries", subjects: 10, phases: &[74.0], last: None, width: 10 },
    Row { name: "5 company research", subjects: 5, phases: &[119.3, 119.3, 119.4], last: None, width: 15 },
    Row { name: "10 tech analyses", subjects: 10, phases: &[1660.0], last: None, width: 10 },
    Row { name: "15-subject research", subjects: 15, phases: &[108.9, 108.9, 108.9], last: None, width: 45 },
    Row { name: "24 s -> 6 s: 5 companies", subjects: 5, phases: &[120.0, 40.0, 300.0], last: Some(100.0), width: 5 },
];

/// What is shipped: `max_nodes` and `max_concurrent_api`.
const SHIPPED: Width = Width(10, 5);

/// One way of doing a row.
struct Done {
    wall: f64,
    spent_pico: u128,
    /// What each phase, and the end, took by the provider's own stamps, on average.
    phases: Vec<f64>,
}

/// All rows; prints a table of its own, and gives the efficiencies.
pub(super) fn run(plan: &Plan) -> anyhow::Result<Vec<Figure>> {
    let mut text = String::from(
        "| task (latencies at a tenth) | width | sequential | parallel | speed-up | ideal | efficiency | cost | shipped limits | \
         speed-up | efficiency |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    let mut figures = Vec::new();
    for row in &ROWS[..plan.rows] {
        let Measured { one, parallel, shipped, gain, gain_shipped } = measured(plan, row)?;
        let cost = equal_cost(&one, &[&parallel, &shipped])?;
        let (could, could_shipped) = (row.ideal(&parallel.phases, row.width), row.ideal(&shipped.phases, SHIPPED.1));
        let (share, share_shipped) = (could / parallel.wall, could_shipped / shipped.wall);
        let _ = writeln!(
            text,
            "| {} | {} | {:.3} s | {:.3} s | {gain:.2} | {:.2} | {share:.3} | equal, {cost} | {:.3} s | {gain_shipped:.2} | \
             {share_shipped:.3} |",
            row.name,
            row.width,
            one.wall,
            parallel.wall,
            row.ideal(&parallel.phases, 1) / could,
            shipped.wall
        );
        let name = format!("{}: ideal of list scheduling / wall", row.name);
        figures.push(figure(format!("{name}, width {}", row.width), share, "", Goal::AtLeast(0.95)));
        figures.push(figure(format!("{name}, shipped limits"), share_shipped, "", Goal::AtLeast(0.95)));
        super::progress(&format!("{}: {gain:.2} times as fast, {share:.3} of the ideal", row.name));
    }
    super::progress(&text);
    Ok(figures)
}

/// A row, all three ways.
struct Measured {
    one: Done,
    parallel: Done,
    shipped: Done,
    gain: f64,
    gain_shipped: f64,
}

/// Measures a row. A machine that had something else to do during one side only can make a speed-up look larger than the width;
/// so what is refused is measured again, and refused for good the third time.
fn measured(plan: &Plan, row: &Row) -> anyhow::Result<Measured> {
    let mut tries = 0;
    loop {
        tries += 1;
        let wide = rig(row.width)?;
        let one = once(&wide, row, 1)?;
        let parallel = several(&wide, row, row.width, plan.repeats)?;
        drop(wide);
        let shipped = several(&rig(SHIPPED)?, row, SHIPPED.1, plan.repeats)?;
        let gains = (speedup(one.wall, parallel.wall, row.width), speedup(one.wall, shipped.wall, SHIPPED.1));
        match gains {
            (Ok(gain), Ok(gain_shipped)) => return Ok(Measured { one, parallel, shipped, gain, gain_shipped }),
            (Err(why), _) | (_, Err(why)) if tries == 3 => return Err(why.context(row.name)),
            (Err(why), _) | (_, Err(why)) => super::progress(&format!("{}: {why}; once more", row.name)),
        }
    }
}

fn rig(width: impl Into<Width>) -> anyhow::Result<Rig> {
    // A hedge would make the parallel side dearer.
    Rig::start(&Settings::default(), Cores::Any, width, "    hedge: false\n", "")
}

/// The median of several times.
fn several(rig: &Rig, row: &Row, width: u32, times: usize) -> anyhow::Result<Done> {
    let mut all = (0..times).map(|_| once(rig, row, width.max(2))).collect::<anyhow::Result<Vec<_>>>()?;
    all.sort_by(|one, other| one.wall.total_cmp(&other.wall));
    let walls: Vec<f64> = all.iter().map(|done| done.wall).collect();
    let middle = all.swap_remove(all.len() / 2);
    Ok(Done { wall: median(&walls), ..middle })
}

/// Does a row once: one call at a time, or every subject on its own, phase after phase.
fn once(rig: &Rig, row: &Row, width: u32) -> anyhow::Result<Done> {
    rig.mock.reset()?;
    let (addr, headers) = rig.front()?;
    let subjects: Vec<Vec<String>> = (0..row.subjects).map(|subject| row.prompts(subject)).collect();
    let last = row.last.map(|latency| format!("[[ms:{latency}]] all of them, {}", row.name));
    let wall = driver::on_core(None, async move { carry_out(addr, &headers, subjects, last, width == 1).await })?;
    let calls = rig.mock.calls()?;
    let wanted = row.subjects * row.phases.len() + usize::from(row.last.is_some());
    ensure!(calls.len() == wanted, "{} calls for {wanted}", calls.len());
    Ok(Done { wall, spent_pico: rig.mock.ledger()?.spent_pico, phases: row.stamped(&calls) })
}

async fn carry_out(
    addr: SocketAddr,
    headers: &str,
    subjects: Vec<Vec<String>>,
    last: Option<String>,
    one_by_one: bool,
) -> anyhow::Result<f64> {
    const PATH: &str = "/v1/chat/completions";
    // Connections are there before the clock starts, on both sides of the comparison.
    let mut callers = Vec::new();
    for _ in 0..subjects.len() {
        callers.push(Caller::connect(addr, PATH, headers).await?);
    }
    let mut end = Caller::connect(addr, PATH, headers).await?;
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for (mut caller, prompts) in callers.into_iter().zip(subjects) {
        let work = async move {
            for prompt in prompts {
                caller.ask(&chat("auto", &prompt)).await?;
            }
            anyhow::Ok(())
        };
        if one_by_one {
            work.await?;
        } else {
            tasks.spawn(work);
        }
    }
    while let Some(task) = tasks.join_next().await {
        task.context("a caller panicked")??;
    }
    if let Some(prompt) = last {
        end.ask(&chat("auto", &prompt)).await?;
    }
    Ok(began.elapsed().as_secs_f64())
}

impl Row {
    fn prompts(&self, subject: usize) -> Vec<String> {
        let prompt = |(phase, latency)| format!("[[ms:{latency}]] {}, subject {subject}, phase {phase}", self.name);
        self.phases.iter().enumerate().map(prompt).collect()
    }

    /// Mean service time of each phase, and of the end. A call belongs to the phase whose latency is nearest.
    fn stamped(&self, calls: &[Call]) -> Vec<f64> {
        let nominal: Vec<f64> = self.phases.iter().copied().chain(self.last).collect();
        let times: Vec<f64> = calls.iter().map(|call| (call.ended_us - call.began_us) as f64 / 1000.0).collect();
        let nearest = |time: f64| nominal.iter().map(|phase| (phase - time).abs()).fold(f64::INFINITY, f64::min);
        let mean = |phase: f64| {
            let own = times.iter().filter(|&&time| ((phase - time).abs() - nearest(time)).abs() < 0.2);
            let own: Vec<f64> = own.copied().collect();
            if own.is_empty() { phase / 1000.0 } else { own.iter().sum::<f64>() / own.len() as f64 / 1000.0 }
        };
        nominal.iter().map(|&phase| mean(phase)).collect()
    }

    /// What list scheduling makes of it: whenever there is room, the next phase of the subject that is ready begins.
    fn ideal(&self, times: &[f64], width: u32) -> f64 {
        let phases = &times[..self.phases.len()];
        let mut ready: Vec<(f64, usize)> = vec![(0.0, 0); self.subjects];
        let mut rooms = vec![0.0_f64; width as usize];
        let mut end = 0.0_f64;
        while !ready.is_empty() {
            let earliest = |list: &[f64]| {
                list.iter().enumerate().min_by(|one, other| one.1.total_cmp(other.1)).map_or(0, |(index, _)| index)
            };
            let next = earliest(&ready.iter().map(|(at, _)| *at).collect::<Vec<_>>());
            let room = earliest(&rooms);
            let (at, phase) = ready.swap_remove(next);
            let over = at.max(rooms[room]) + phases[phase];
            rooms[room] = over;
            end = end.max(over);
            if phase + 1 < phases.len() {
                ready.push((over, phase + 1));
            }
        }
        end + self.last.and(times.last()).copied().unwrap_or(0.0)
    }
}

/// Two measurements of the same work differ by so much.
const NOISE: f64 = 0.005;

/// How many times as fast: never more than the width, and refused when it is more than that and noise can explain.
fn speedup(sequential: f64, parallel: f64, width: u32) -> anyhow::Result<f64> {
    let (gain, width) = (sequential / parallel, f64::from(width));
    ensure!(
        gain <= width * (1.0 + NOISE),
        "{gain:.3} times as fast with {width} at once: the two sides did not do the same work, and no figure is printed"
    );
    Ok(gain.min(width))
}

/// The same prompts cost the same whichever way.
fn equal_cost(one: &Done, others: &[&Done]) -> anyhow::Result<String> {
    for other in others {
        ensure!(
            other.spent_pico == one.spent_pico,
            "the provider earned {} and {} pico-dollars for the same work",
            one.spent_pico,
            other.spent_pico
        );
    }
    Ok(format!("{:.6} USD", one.spent_pico as f64 / 1e12))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ideal_is_that_of_list_scheduling() {
        let row = Row { name: "", subjects: 5, phases: &[100.0, 100.0], last: Some(50.0), width: 5 };
        let times = [0.1, 0.1, 0.05];
        assert!((row.ideal(&times, 5) - 0.25).abs() < 1e-9);
        assert!((row.ideal(&times, 50) - 0.25).abs() < 1e-9, "more room than work");
        assert!((row.ideal(&times, 2) - 0.55).abs() < 1e-9);
        assert!((row.ideal(&times, 1) - 1.05).abs() < 1e-9);
    }

    #[test]
    fn a_speedup_above_the_width_is_not_printed() {
        assert!((speedup(1.0, 0.25, 4).unwrap() - 4.0).abs() < 1e-9);
        assert!((speedup(1.004, 0.25, 4).unwrap() - 4.0).abs() < 1e-9, "noise is not printed");
        assert!(speedup(1.006, 0.25, 4).is_err());
        let refused = speedup(16.6, 0.915, 10).unwrap_err().to_string();
        assert!(refused.contains("18.142 times") && refused.contains("no figure"), "{refused}");
    }
}
