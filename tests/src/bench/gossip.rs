//! Membership beside Debian's serf: real processes, one network namespace each, in turn on the same machine and at the same nominal
//! timings. Both encrypt; ours carries load scores besides.

use std::io::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use drover_testkit::netns::{Lab, StopCycle, Wan, usable};
use rand::seq::IndexedRandom as _;

use super::figures::{Figure, Goal};
use crate::gossip::nodes::{Contender, Nodes};

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Nodes.
    pub nodes: usize,
    /// Joins of all nodes.
    pub joins: usize,
    /// Processes killed.
    pub kills: usize,
    /// How long traffic is counted while nothing happens.
    pub idle: Duration,
    /// How long false verdicts are counted under each fault.
    pub soak: Duration,
    /// Shares of UDP datagrams lost, in percent.
    pub losses: &'static [u32],
    /// Nodes that are stopped for 3 s of every 3.5 s.
    pub stopped: usize,
    /// Nodes of one region, and of the other.
    pub region: usize,
    /// Processes killed in each of a region alone and one beside another.
    pub region_kills: usize,
}

/// A part of the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Joins, kills, traffic and memory, in turn with serf.
    Speed,
    /// Joins and idle traffic of ours alone: what a change is tried with.
    Joins,
    /// False verdicts under loss and stops, beside serf.
    Verdicts,
    /// Detection inside a region beside another one, over a slow and lossy link.
    Regions,
}

impl Part {
    /// All of them, in the order in which they run.
    pub const ALL: &[Self] = &[Self::Speed, Self::Verdicts, Self::Regions];
}

impl Plan {
    /// What the figures of `docs/benchmarks.md` were measured with; it takes more than an hour.
    pub const FULL: Self = Self {
        nodes: 30,
        joins: 100,
        kills: 40,
        idle: Duration::from_mins(1),
        soak: Duration::from_mins(10),
        losses: &[10, 25, 40],
        stopped: 6,
        region: 10,
        // A mean of forty is off by four in a hundred, and that of the other as well.
        region_kills: 150,
    };
    /// To see that it works.
    pub const SHORT: Self = Self {
        nodes: 6,
        joins: 1,
        kills: 1,
        idle: Duration::from_secs(3),
        soak: Duration::from_secs(6),
        losses: &[25],
        stopped: 1,
        region: 3,
        region_kills: 1,
    };
}

/// Programs that the laboratory of this benchmark needs.
pub const TOOLS: [&str; 3] = ["nft", "serf", "python3"];

const BOTH: [Contender; 2] = [Contender::Ours, Contender::Serf];

/// How long serf may take for a join before it counts as that: it was seen to need a minute.
const JOIN_LIMIT: Duration = Duration::from_secs(90);

/// What lies between two regions.
const LINK: Wan = Wan { delay_ms: 100.0, jitter_ms: 5.0, loss_percent: 2.0, kbit_per_s: 0.0 };

/// Runs these parts of the plan.
pub async fn run(plan: Plan, parts: &'static [Part]) -> anyhow::Result<Vec<Figure>> {
    usable(&TOOLS).map_err(anyhow::Error::msg)?;
    let all = tokio::task::spawn_blocking(move || {
        let figures = parts.iter().map(|part| match part {
            Part::Speed => speed(plan),
            Part::Joins => joins(plan),
            Part::Verdicts => verdicts(plan),
            Part::Regions => regions(plan),
        });
        figures.collect::<anyhow::Result<Vec<_>>>()
    });
    Ok(all.await.context("the benchmark panicked")??.concat())
}

/// What one contender came to.
#[derive(Default)]
struct Seen {
    joins: Vec<f64>,
    kills: Vec<f64>,
    bytes: f64,
    packets: f64,
    resident: f64,
}

fn speed(plan: Plan) -> anyhow::Result<Vec<Figure>> {
    let mut seen = [Seen::default(), Seen::default()];
    let kills_each = 5.min(plan.kills);
    for round in 0..plan.joins.max(1) {
        for (contender, seen) in BOTH.into_iter().zip(&mut seen) {
            let lab = Lab::new(&[plan.nodes])?;
            let mut nodes = Nodes::prepare(contender, &lab)?;
            let last = nodes.start_all()?;
            let joined = nodes.all_joined(JOIN_LIMIT)?;
            let took = joined.saturating_duration_since(last).as_secs_f64();
            seen.joins.push(took);
            progress(&format!("join {} of {}, {contender:?}: {took:.2} s", round + 1, plan.joins));
            if round == 0 {
                idle(plan, &nodes, seen)?;
            }
            // Spread over the run, so that both meet the same moods of the machine.
            if seen.kills.len() < plan.kills * (round + 1) / plan.joins.max(1) {
                for _ in 0..kills_each {
                    kill(&mut nodes, seen)?;
                }
            }
        }
    }
    Ok(summary(plan, &seen))
}

fn joins(plan: Plan) -> anyhow::Result<Vec<Figure>> {
    let (mut seen, mut led, mut processor) = (Seen::default(), Seen::default(), Vec::new());
    for round in 0..plan.joins.max(1) {
        let lab = Lab::new(&[plan.nodes])?;
        let mut nodes = Nodes::prepare(Contender::Ours, &lab)?;
        let last = nodes.start_all()?;
        let took = nodes.all_joined(JOIN_LIMIT)?.saturating_duration_since(last).as_secs_f64();
        seen.joins.push(took);
        let spent = nodes.running().into_iter().map(|index| nodes.program(index)?.processor_ms());
        processor.push(spent.sum::<anyhow::Result<f64>>()? / plan.nodes as f64);
        progress(&format!("join {} of {}: {took:.2} s, {:.0} ms each", round + 1, plan.joins, mean(&processor)));
        if round + 1 == plan.joins.max(1) {
            idle(plan, &nodes, &mut seen)?;
            nodes.charter(1, &(0..plan.nodes.min(7)).collect::<Vec<_>>())?;
            std::thread::sleep(Duration::from_secs(15));
            idle(plan, &nodes, &mut led)?;
        }
    }
    let name = |what: &str| format!("join of {}, {} runs, ours alone: {what}", plan.nodes, seen.joins.len());
    let figure = |name, ours, unit, goal| Figure { name, ours, ideal: None, unit, goal };
    Ok(vec![
        figure(name("median"), quantile(&seen.joins, 0.5), "s", Goal::Below(0.5)),
        figure(name("p95"), quantile(&seen.joins, 0.95), "s", Goal::Shown),
        figure(name("worst"), quantile(&seen.joins, 1.0), "s", Goal::Below(2.0)),
        figure(name("processor time of each node"), mean(&processor), "ms", Goal::Shown),
        figure("idle traffic, all headers".to_owned(), seen.bytes, "B/node/s", Goal::Below(250.0)),
        figure("idle packets".to_owned(), seen.packets, "/node/s", Goal::Shown),
        figure("the same with a leader and its lease, of seven voters".to_owned(), led.bytes, "B/node/s", Goal::Shown),
        figure("resident memory, the largest of all nodes".to_owned(), seen.resident, "MiB", Goal::Below(8.0)),
    ])
}

fn verdicts(plan: Plan) -> anyhow::Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for loss in plan.losses {
        let name = format!("false verdicts in {} s at {loss} % loss of UDP", plan.soak.as_secs());
        figures.push(soak(plan, &name, |nodes| {
            (0..nodes.len()).try_for_each(|index| nodes.host(index).lose_udp(*loss))?;
            Ok(None)
        })?);
    }
    let name = format!(
        "false verdicts in {} s, {} of {} nodes stopped 3 s of every 3.5 s",
        plan.soak.as_secs(),
        plan.stopped,
        plan.nodes
    );
    figures.push(soak(plan, &name, |nodes| {
        let pids = nodes.pids(&(1..=plan.stopped).collect::<Vec<_>>());
        Ok(Some(StopCycle::start(pids, Duration::from_secs(3), Duration::from_millis(500))))
    })?);
    Ok(figures)
}

/// Kills in a region that is alone, and in one that has another at the far end of a slow link, by turns.
fn regions(plan: Plan) -> anyhow::Result<Vec<Figure>> {
    let one = Lab::new(&[plan.region])?;
    let mut two = Lab::new(&[plan.region, plan.region])?;
    two.connect(LINK)?;
    let mut both = Vec::new();
    for lab in [&one, &two] {
        let mut nodes = Nodes::prepare_with(Contender::Ours, lab, &[], |host| {
            format!("  region: {}\n", ["east", "west"][host.side])
        })?;
        nodes.start_all()?;
        nodes.all_joined(JOIN_LIMIT)?;
        both.push((nodes, Vec::new()));
    }
    for round in 0..plan.region_kills {
        for (nodes, times) in &mut both {
            times.push(kill_in(nodes, plan.region)?);
        }
        let [alone, beside] = [0, 1].map(|which: usize| both[which].1[round]);
        let of = plan.region_kills;
        progress(&format!("kill {} of {of} in a region: alone {alone:.2} s, beside another {beside:.2} s", round + 1));
    }
    let [(_, alone), (_, beside)] = &both[..] else { bail!("two clusters, not {}", both.len()) };
    let (alone, beside) = (mean(alone), mean(beside));
    let kill =
        format!("kill -9 of one of {} in a region, {} times, until its region knows", plan.region, plan.region_kills);
    Ok(vec![
        Figure {
            name: format!("{kill}: mean beside another region, ideal: alone"),
            ours: beside,
            ideal: Some(alone),
            unit: "s",
            goal: Goal::Shown,
        },
        Figure {
            name: "the one divided by the other".to_owned(),
            ours: beside / alone,
            ideal: None,
            unit: "",
            goal: Goal::Below(1.1),
        },
    ])
}

/// Kills one of the first region, measures until the others of it know, and brings it back.
fn kill_in(nodes: &mut Nodes, region: usize) -> anyhow::Result<f64> {
    let victim = rand::random_range(1..region);
    let when = nodes.kill(victim)?;
    let mut last = when;
    for index in (0..region).filter(|index| *index != victim) {
        last = last.max(nodes.knows_gone(index, victim, when, Duration::from_mins(1))?);
    }
    let back = nodes.start(victim, 0)?;
    nodes.all_see_back(victim, back, JOIN_LIMIT)?;
    std::thread::sleep(Duration::from_millis(rand::random_range(500..1500)));
    Ok((last - when).as_secs_f64())
}

/// Traffic and memory while nothing happens.
fn idle(plan: Plan, nodes: &Nodes, seen: &mut Seen) -> anyhow::Result<()> {
    // The news of the join has to die down first.
    std::thread::sleep(Duration::from_secs(5));
    let count = || -> anyhow::Result<(u64, u64)> {
        let mut sum = (0, 0);
        for index in 0..nodes.len() {
            let counters = nodes.host(index).counters()?;
            sum = (sum.0 + counters.tx_bytes, sum.1 + counters.tx_packets);
        }
        Ok(sum)
    };
    let (begun, before) = (Instant::now(), count()?);
    std::thread::sleep(plan.idle);
    let (after, node_seconds) = (count()?, begun.elapsed().as_secs_f64() * nodes.len() as f64);
    seen.bytes = (after.0 - before.0) as f64 / node_seconds;
    seen.packets = (after.1 - before.1) as f64 / node_seconds;
    for index in nodes.running() {
        seen.resident = seen.resident.max(nodes.program(index)?.resident_mib()?);
    }
    Ok(())
}

/// Kills one node, measures until all others know, and brings it back.
fn kill(nodes: &mut Nodes, seen: &mut Seen) -> anyhow::Result<()> {
    let choices: Vec<usize> = (1..nodes.len()).collect();
    let victim = *choices.choose(&mut rand::rng()).context("one node alone")?;
    let when = nodes.kill(victim)?;
    seen.kills.push(nodes.all_know_gone(victim, when, Duration::from_mins(1))?.as_secs_f64());
    let back = nodes.start(victim, 0)?;
    nodes.all_see_back(victim, back, JOIN_LIMIT)?;
    // Probes of the next victim's neighbours are to be at any phase.
    std::thread::sleep(Duration::from_millis(rand::random_range(500..1500)));
    Ok(())
}

/// Verdicts under a fault, of both at the same time.
fn soak(plan: Plan, name: &str, fault: impl Fn(&Nodes) -> anyhow::Result<Option<StopCycle>>) -> anyhow::Result<Figure> {
    let mut all = Vec::new();
    for contender in BOTH {
        all.push(whole_cluster(contender, plan.nodes)?);
    }
    std::thread::sleep(Duration::from_secs(2));
    progress(name);
    let since = Instant::now();
    let faults = all.iter().map(|(nodes, _)| fault(nodes)).collect::<anyhow::Result<Vec<_>>>()?;
    std::thread::sleep(plan.soak);
    let verdicts: Vec<usize> = all.iter().map(|(nodes, _)| nodes.verdicts(since)).collect();
    drop(faults);
    let [ours, serf] = verdicts[..] else { bail!("two contenders, not {}", verdicts.len()) };
    let name = format!("{name} (serf: {serf})");
    Ok(Figure { name, ours: ours as f64, ideal: None, unit: "", goal: Goal::Below(1.0) })
}

/// A cluster in which all know all. The rival has not always come to that in time, and may begin anew; ours may not.
fn whole_cluster(contender: Contender, count: usize) -> anyhow::Result<(Nodes, Lab)> {
    let mut tries = if contender == Contender::Serf { 4 } else { 1 };
    loop {
        tries -= 1;
        let lab = Lab::new(&[count])?;
        let mut nodes = Nodes::prepare(contender, &lab)?;
        nodes.start_all()?;
        match nodes.all_joined(JOIN_LIMIT) {
            Ok(_) => return Ok((nodes, lab)),
            Err(error) if tries == 0 => return Err(error),
            Err(_) => progress(&format!("{contender:?} did not join in {JOIN_LIMIT:?}; once more")),
        }
    }
}

/// An hour without a word looks like a program that hangs.
fn progress(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn summary(plan: Plan, seen: &[Seen; 2]) -> Vec<Figure> {
    let [ours, serf] = seen;
    let figure = |name: String, unit: &'static str, goal: Goal, of: &dyn Fn(&Seen) -> f64| Figure {
        name,
        ours: of(ours),
        ideal: Some(of(serf)),
        unit,
        goal,
    };
    let nodes = plan.nodes;
    let join = format!("join of {nodes}, {} runs, from the last start until all know all", ours.joins.len());
    let kill = format!("kill -9 of one of {nodes}, {} times, until all others know", ours.kills.len());
    vec![
        figure(format!("{join}: median"), "s", Goal::Below(0.5), &|seen| quantile(&seen.joins, 0.5)),
        figure(format!("{join}: p95"), "s", Goal::Shown, &|seen| quantile(&seen.joins, 0.95)),
        figure(format!("{join}: worst"), "s", Goal::Below(2.0), &|seen| quantile(&seen.joins, 1.0)),
        figure(format!("{kill}: mean"), "s", Goal::Below(4.5), &|seen| mean(&seen.kills)),
        figure(format!("{kill}: worst"), "s", Goal::Below(9.0), &|seen| quantile(&seen.kills, 1.0)),
        Figure {
            name: format!("kills that took more than 6 s (serf: {})", late(serf)),
            ours: late(ours) as f64,
            ideal: None,
            unit: "",
            goal: Goal::Below(4.5),
        },
        figure("idle traffic, all headers".to_owned(), "B/node/s", Goal::Below(250.0), &|seen| seen.bytes),
        figure("idle packets".to_owned(), "/node/s", Goal::Shown, &|seen| seen.packets),
        figure("resident memory, the largest of all nodes".to_owned(), "MiB", Goal::Below(8.0), &|seen| seen.resident),
    ]
}

fn late(seen: &Seen) -> usize {
    seen.kills.iter().filter(|time| **time > 6.0).count()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn quantile(values: &[f64], quantile: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let index = ((values.len() as f64 * quantile).ceil() as usize).clamp(1, values.len().max(1)) - 1;
    values.get(index).copied().unwrap_or(0.0)
}
