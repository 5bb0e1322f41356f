//! The long proofs, by name. Each is one program with two sizes: CI runs the short one as a test, these run the long one.

use std::ffi::OsString;

use anyhow::bail;

use crate::shell::{cargo, program, target};

/// Figures that exist: the name is the argument of the program `bench`.
const BENCHES: &[(&str, &str)] = &[
    ("control", "requests of the JSON-line control plane"),
    ("events", "records into the durable log and out to subscribers"),
    ("waits", "from a record to its event, told by the system and found by polling"),
    ("inject", "one prompt to a thousand nodes"),
    ("idle", "processor and memory of a swarm that does nothing"),
    (
        "gossip",
        "membership beside serf: join, detection, traffic, false verdicts; needs root and serf, takes two hours",
    ),
    ("gossip-speed", "its first part: joins, kills, traffic and memory"),
    ("gossip-verdicts", "its second part: false verdicts under loss and stops"),
    ("gossip-regions", "its third part: detection in one of two regions"),
];

/// Kill proofs that exist: name, program, what it does.
const CHAOS: &[(&str, &str, &str)] = &[
    ("local", "chaos", "kills daemons, workers and agents of the local backend while prompts run"),
    ("gossip", "gossip-sim", "thousands of kills in simulated clusters: joins, detection, false verdicts"),
];

/// Long runs that exist.
const SOAKS: &[(&str, &str)] =
    &[("local", "swarms at full rate for ten minutes: what grows, and whether every event comes out")];

/// Runs the named figures, or all.
pub(crate) fn bench(names: &[String], short: bool) -> anyhow::Result<()> {
    for name in names {
        known("bench", name, BENCHES)?;
    }
    let mut args: Vec<OsString> = names.iter().map(OsString::from).collect();
    if short {
        args.push("--short".into());
    }
    run("bench", &args)
}

/// Runs a kill proof.
pub(crate) fn chaos(name: &str, rounds: Option<u32>, seed: Option<u64>) -> anyhow::Result<()> {
    let Some((_, program, _)) = CHAOS.iter().find(|(known, _, _)| *known == name) else {
        let list: Vec<(&str, &str)> = CHAOS.iter().map(|(name, _, about)| (*name, *about)).collect();
        return known("chaos", name, &list);
    };
    let mut args: Vec<OsString> = Vec::new();
    if let Some(rounds) = rounds {
        args.extend(["--kills".into(), rounds.to_string().into()]);
    }
    if let Some(seed) = seed {
        args.extend(["--seed".into(), seed.to_string().into()]);
    }
    run(program, &args)
}

/// Runs a long run.
pub(crate) fn soak(name: &str) -> anyhow::Result<()> {
    known("soak", name, SOAKS)?;
    run("soak", &[name.into()])
}

fn known(chore: &str, name: &str, list: &[(&str, &str)]) -> anyhow::Result<()> {
    if list.iter().any(|(known, _)| *known == name) {
        return Ok(());
    }
    if list.is_empty() {
        bail!("there is no {chore} {name:?}; there is none at all yet");
    }
    let lines: Vec<String> = list.iter().map(|(name, about)| format!("  {name:<16} {about}")).collect();
    bail!("there is no {chore} {name:?}; there are:\n{}", lines.join("\n"))
}

/// Builds the programs as they are shipped, once, and runs the proof beside them.
fn run(proof: &str, args: &[OsString]) -> anyhow::Result<()> {
    cargo(&["build", "--release", "--locked", "--bins"])
        .packages(&["drover-cli", "drover-e2e", "drover-testkit", "drover-gossip-membership"])
        .run()?;
    program(target().join("release").join(proof), args).run()
}
