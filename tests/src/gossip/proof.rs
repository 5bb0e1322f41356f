//! The figures: the same scenarios in two sizes. CI runs the short one, `cargo xtask chaos gossip` the long one.

use std::fmt::{self, Display};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use drover_membership::core::Settings;

use super::chaos::{self, Episode};
use super::invariants::Verdict;
use super::network::Weather;
use super::scenario::{calm, cut, kills, mass_join};
use super::world::{End, World};

/// How much of everything.
#[derive(Debug, Clone)]
pub struct Size {
    /// Runs of the join of 30.
    pub joins: u64,
    /// Nodes of the mass joins, and the goal for each in virtual seconds.
    pub masses: Vec<(usize, u64)>,
    /// Kills at 30 nodes, of processes and as many of hosts.
    pub kills: usize,
    /// Virtual time without any end of a node, at 30 nodes.
    pub calm: Duration,
    /// Nodes of a cluster that is only let run for ten virtual minutes.
    pub large: Option<usize>,
    /// Kills in all sorts of trouble: nodes, kills in one episode, episodes.
    pub chaos: Vec<(usize, usize, u64)>,
}

impl Size {
    /// For CI: up to 300 nodes.
    pub fn short() -> Self {
        Self {
            joins: 20,
            masses: vec![(100, 2)],
            kills: 20,
            calm: Duration::from_mins(1),
            large: None,
            chaos: vec![(3, 20, 4), (5, 20, 4), (10, 20, 4), (30, 20, 2), (300, 4, 1)],
        }
    }

    /// The one whose figures stand in `docs/benchmarks.md`; `kills` in all sorts of trouble.
    pub fn long(kills: usize) -> Self {
        // In hundredths: small clusters are cheap, and the rare things need many tries.
        let share = |percent: usize, each: usize| ((kills * percent).div_ceil(100 * each)) as u64;
        Self {
            joins: 100,
            masses: vec![(500, 5), (1000, 8)],
            kills: 200,
            calm: Duration::from_mins(10),
            large: Some(1000),
            chaos: vec![
                (3, 50, share(20, 50)),
                (5, 50, share(20, 50)),
                (10, 50, share(20, 50)),
                (30, 50, share(25, 50)),
                (100, 50, share(12, 50)),
                (300, 50, share(2, 50)),
                (1000, 50, share(1, 50)),
            ],
        }
    }
}

/// One line of the table.
#[derive(Debug, Clone)]
pub struct Figure {
    /// What was measured.
    pub name: String,
    /// What came out.
    pub ours: String,
    /// What was wanted.
    pub goal: String,
}

/// All lines.
#[derive(Debug, Clone, Default)]
pub struct Figures(pub Vec<Figure>);

impl Figures {
    fn add(&mut self, name: impl Into<String>, ours: impl Into<String>, goal: impl Into<String>) {
        self.0.push(Figure { name: name.into(), ours: ours.into(), goal: goal.into() });
    }
}

impl Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| figure | ours | goal |\n| --- | --- | --- |")?;
        for Figure { name, ours, goal } in &self.0 {
            writeln!(f, "| {name} | {ours} | {goal} |")?;
        }
        Ok(())
    }
}

/// Runs everything in one size. An error names the seed that shows it.
pub fn run(seed: u64, size: &Size) -> anyhow::Result<Figures> {
    let mut figures = Figures::default();
    joins(seed, size, &mut figures)?;
    masses(seed, size, &mut figures)?;
    detection(seed, size, &mut figures)?;
    accuracy(seed, size, &mut figures)?;
    healing(seed, &mut figures)?;
    large(seed, size, &mut figures)?;
    trouble(seed, size, &mut figures)?;
    Ok(figures)
}

fn sound(what: &str, seed: u64, verdict: &Verdict) -> anyhow::Result<()> {
    if let Some(first) = verdict.broken.first() {
        bail!("{what}, seed {seed}: {} broken, the first: {first}", verdict.broken.len());
    }
    ensure!(verdict.false_downs == 0, "{what}, seed {seed}: {} false downs", verdict.false_downs);
    Ok(())
}

fn join(seed: u64, nodes: usize) -> anyhow::Result<Duration> {
    let mut world = World::new(seed, Weather::default(), Settings::default());
    // What every node told of every other is worth its memory up to here.
    world.judged = nodes <= 2000;
    let Some(span) = mass_join(&mut world, nodes) else { bail!("join of {nodes}, seed {seed}: not done in a minute") };
    sound("join", seed, world.judge.verdict())?;
    Ok(span)
}

fn joins(seed: u64, size: &Size, figures: &mut Figures) -> anyhow::Result<()> {
    let mut spans: Vec<Duration> = (0..size.joins).map(|run| join(seed + run, 30)).collect::<Result<_, _>>()?;
    spans.sort();
    let (median, worst) = (spans[spans.len() / 2], spans[spans.len() - 1]);
    figures.add(
        format!("join of 30 until all see all, {} runs, median / worst", size.joins),
        format!("{:.2} / {:.2} s", median.as_secs_f64(), worst.as_secs_f64()),
        "<= 0.5 / 2.0 s",
    );
    ensure!(median <= Duration::from_millis(500), "join of 30: median {median:?}");
    ensure!(worst <= Duration::from_secs(2), "join of 30: worst {worst:?}");
    Ok(())
}

fn masses(seed: u64, size: &Size, figures: &mut Figures) -> anyhow::Result<()> {
    for (nodes, goal) in &size.masses {
        let span = join(seed, *nodes)?;
        figures.add(format!("join of {nodes} at once"), format!("{:.1} s", span.as_secs_f64()), format!("<= {goal} s"));
        ensure!(span <= Duration::from_secs(*goal), "join of {nodes}, seed {seed}: {span:?}");
    }
    Ok(())
}

fn detection(seed: u64, size: &Size, figures: &mut Figures) -> anyhow::Result<()> {
    for (end, name) in [(End::Process, "process"), (End::Host, "host")] {
        let mut detected = Vec::new();
        for run in 0..size.kills.div_ceil(10) as u64 {
            let verdict = kills(seed + run, 30, end, 10);
            sound("kills", seed + run, &verdict)?;
            detected.extend(verdict.detected);
        }
        let lasts: Vec<f64> = detected.iter().map(|(_, last)| last.as_secs_f64()).collect();
        let mean = lasts.iter().sum::<f64>() / lasts.len() as f64;
        let worst = lasts.iter().copied().fold(0.0, f64::max);
        let spread = detected.iter().map(|(first, last)| last.saturating_sub(*first).as_secs_f64()).fold(0.0, f64::max);
        let goal = if end == End::Process { "mean <= 4.5 s, none above 6 s, spread <= 1 s" } else { "spread <= 1 s" };
        figures.add(
            format!("{name} killed, 30 nodes, {} kills: all survivors know, mean / worst / spread", lasts.len()),
            format!("{mean:.2} / {worst:.2} / {spread:.2} s"),
            goal,
        );
        ensure!(spread <= 1.0, "{name} killed: told over {spread:.2} s");
        if end == End::Process {
            ensure!(mean <= 4.5 && worst <= 6.0, "{name} killed: mean {mean:.2} s, worst {worst:.2} s");
        }
    }
    Ok(())
}

fn accuracy(seed: u64, size: &Size, figures: &mut Figures) -> anyhow::Result<()> {
    let idle = calm(seed, 30, 0.0, 0, size.calm, Settings::default());
    sound("idle", seed, &idle.verdict)?;
    figures.add(
        "idle, 30 nodes, sealed, with loads and all headers",
        format!("{:.0} B/node/s", idle.bytes),
        "<= 250 B/node/s",
    );
    ensure!(idle.bytes <= 250.0, "idle traffic is {:.0} B/node/s", idle.bytes);
    for (loss, stopped) in [(0.1, 0), (0.25, 0), (0.4, 0), (0.0, 6), (0.25, 6), (0.4, 6)] {
        let calm = calm(seed, 30, loss, stopped, size.calm, Settings::default());
        sound("loss and stops", seed, &calm.verdict)?;
        figures.add(
            format!(
                "false downs, 30 nodes, {:.0} % loss, {stopped} stopped 3 s of every 3.5 s, {} s",
                loss * 100.0,
                size.calm.as_secs()
            ),
            calm.verdict.false_downs.to_string(),
            "0",
        );
    }
    Ok(())
}

fn healing(seed: u64, figures: &mut Figures) -> anyhow::Result<()> {
    for seconds in [4, 20, 90] {
        let (healed, verdict) = cut(seed, 30, Duration::from_secs(seconds));
        sound("cut", seed, &verdict)?;
        let Some(healed) = healed else { bail!("cut for {seconds} s, seed {seed}: no agreement a minute after") };
        figures.add(
            format!("30 nodes cut in two for {seconds} s: all see all after the healing"),
            format!("{:.1} s", healed.as_secs_f64()),
            "<= 10 s",
        );
        ensure!(healed <= Duration::from_secs(10), "cut for {seconds} s, seed {seed}: healed after {healed:?}");
    }
    Ok(())
}

fn large(seed: u64, size: &Size, figures: &mut Figures) -> anyhow::Result<()> {
    let Some(nodes) = size.large else { return Ok(()) };
    let start = Instant::now();
    let calm = calm(seed, nodes, 0.0, 0, Duration::from_mins(10), Settings::default());
    let wall = start.elapsed();
    sound("large", seed, &calm.verdict)?;
    figures.add(
        format!("{nodes} nodes, ten virtual minutes: false downs; wall time"),
        format!("{}; {:.0} s", calm.verdict.false_downs, wall.as_secs_f64()),
        "0; <= 60 s",
    );
    Ok(())
}

fn trouble(seed: u64, size: &Size, figures: &mut Figures) -> anyhow::Result<()> {
    let mut all = 0;
    for (nodes, kills, episodes) in &size.chaos {
        let (mut made, mut suspicions) = (0, 0);
        for run in 0..*episodes {
            let seed = seed + run;
            let report = chaos::run(Episode { seed, nodes: *nodes, kills: *kills });
            sound(&format!("trouble with {nodes} nodes and {:.0} % loss", report.loss * 100.0), seed, &report.verdict)?;
            made += report.kills;
            suspicions += report.verdict.false_suspicions;
        }
        all += made;
        figures.add(
            format!("trouble, {nodes} nodes, {made} kills: false downs (suspicions that were answered)"),
            format!("0 ({suspicions})"),
            "0",
        );
    }
    figures.add("kills in trouble in all", all.to_string(), "10,000 in the long size");
    Ok(())
}
