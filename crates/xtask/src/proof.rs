//! The long proofs, by name. Each is one program with two sizes: CI runs the short one as a test, these run the long one.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::bail;

use crate::shell::{cargo, has, program, target};

/// Figures that exist: the name is the argument of the program `bench`.
const BENCHES: &[(&str, &str)] = &[
    ("control", "requests of the JSON-line control plane"),
    ("events", "records into the durable log and out to subscribers"),
    ("waits", "from a record to its event, told by the system and found by polling"),
    ("inject", "one prompt to a thousand nodes"),
    ("idle", "processor and memory of a swarm that does nothing"),
    ("handoff", "sessions: how long a move is felt, and a long history beside a plain stream over the same TLS"),
    (
        "gossip",
        "membership beside serf: join, detection, traffic, false verdicts; needs root and serf, takes two hours",
    ),
    ("gossip-speed", "its first part: joins, kills, traffic and memory"),
    ("gossip-joins", "joins, idle traffic and memory of ours alone, to try a change with"),
    ("gossip-verdicts", "its second part: false verdicts under loss and stops"),
    ("gossip-regions", "its third part: detection in one of two regions"),
    ("dispatch", "many model calls at once, beside the ideal of a mock provider's own stamps; ten minutes"),
    ("dispatch-speed", "of it: share of the ideal, processor time of a call"),
    ("dispatch-front", "of it: the HTTP front on one core"),
    ("dispatch-memory", "of it: tasks that wait, and a file of a million"),
    ("dispatch-table", "of it: the mission's table one after another and in parallel, with honest speed-ups"),
    ("dispatch-limits", "of it: strict, changing and unknown limits"),
    ("dispatch-faults", "of it: slow calls, errors, fairness"),
    ("dispatch-rivals", "of it: LiteLLM and TensorZero, which pip installs, against the same mock"),
    ("slurm", "a real Slurm from a laptop, all of what follows; needs root"),
    ("slurm-launch", "from launch to the first word, with echo and, where it is installed, codex"),
    ("slurm-link", "outboxes through follower and SSH beside `ssh login cat`"),
    ("slurm-waits", "from a worker's record to its event at the laptop"),
    ("slurm-idle", "what the follower costs the login host while nothing happens"),
    ("slurm-calls", "what Slurm's controller is asked with twenty swarms"),
    ("slurm-many", "64 hosts over one connection and one follower"),
    ("slurm-codex", "`drover doctor --fix` installs the real codex, a swarm answers with it"),
];

/// Kill proofs that exist: name, program, what it does.
const CHAOS: &[(&str, &str, &str)] = &[
    ("local", "chaos", "kills daemons, workers and agents of the local backend while prompts run"),
    (
        "rolling",
        "rolling",
        "ends every daemon in its turn and starts it from a replaced file while a thousand prompts run",
    ),
    (
        UPGRADE,
        "rolling",
        "the same once, from the programs of an earlier commit, which it builds, to those of this one; --from names it",
    ),
    (
        "dispatch",
        "dispatch-chaos",
        "kills the dispatcher a hundred times under a cap, and once in the middle of ten thousand tasks",
    ),
    (
        DISPATCH_CORE,
        "",
        "the dispatcher's core in simulated time: ten thousand histories with crashes, and all else in its whole size",
    ),
    ("dispatch-nodes", "task-nodes", "ten thousand pages read on eight nodes, three of them killed midway"),
    ("gossip", "gossip-sim", "thousands of kills in simulated clusters: joins, detection, false verdicts"),
    (
        "handoff-model",
        "handoff-model",
        "a million simulated handoffs with kills, stops, cuts and failing files at every step",
    ),
    (
        "handoff",
        "handoff-chaos",
        "real daemons of sessions, killed and stopped at every step of a move; --fault names one",
    ),
    (
        SLURM_HISTORIES,
        "",
        "200 random histories of the allocator and the fake Slurm's programs: no job twice, none lost, calls within the budget",
    ),
    (
        "slurm",
        "slurm-chaos",
        "breaks a real Slurm, its hosts and the way to it while prompts run; needs root, takes an hour, --fault names one",
    ),
];

/// From one version to another that is really another.
const UPGRADE: &str = "upgrade";
/// The tests of the dispatcher's core, which have a whole size too.
const DISPATCH_CORE: &str = "dispatch-core";
/// Random histories of the allocator with the fake Slurm; a test with a whole size.
const SLURM_HISTORIES: &str = "slurm-histories";

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
pub(crate) fn chaos(
    name: &str,
    rounds: Option<u32>,
    seed: Option<u64>,
    faults: &[String],
    from: Option<&str>,
) -> anyhow::Result<()> {
    let Some((_, program, _)) = CHAOS.iter().find(|(known, _, _)| *known == name) else {
        let list: Vec<(&str, &str)> = CHAOS.iter().map(|(name, _, about)| (*name, *about)).collect();
        return known("chaos", name, &list);
    };
    if name == DISPATCH_CORE {
        let tests = ["test", "--release", "--locked", "--package", "drover-llm-dispatcher", "--test", "core"];
        let mut tests = cargo(&[&tests[..], &["--", "--show-output"]].concat()).env("DROVER_SIM", "whole");
        if let Some(seed) = seed {
            tests = tests.env("DROVER_SEED", seed.to_string());
        }
        return tests.run();
    }
    if name == SLURM_HISTORIES {
        cargo(&["build", "--locked", "--package", "drover-testkit", "--bins"]).run()?;
        let tests = ["test", "--locked", "--package", "drover-slurm-allocator", "--test", "allocator"];
        let mut tests = cargo(&[&tests[..], &["histories", "--", "--show-output"]].concat()).env("DROVER_SIM", "whole");
        if let Some(seed) = seed {
            tests = tests.env("DROVER_SEED", seed.to_string());
        }
        return tests.run();
    }
    let mut args: Vec<OsString> = Vec::new();
    if name == UPGRADE {
        args.extend(["--from".into(), earlier(from)?.into()]);
    }
    if let Some(rounds) = rounds {
        args.extend(["--kills".into(), rounds.to_string().into()]);
    }
    if let Some(seed) = seed {
        args.extend(["--seed".into(), seed.to_string().into()]);
    }
    args.extend(faults.iter().flat_map(|fault| ["--fault".into(), fault.into()]));
    run(program, &args)
}

/// The program of an earlier commit, built in a work tree and a target directory of its own.
fn earlier(from: Option<&str>) -> anyhow::Result<PathBuf> {
    let commit = match from {
        Some(commit) => commit.to_owned(),
        // The last release; before there is one, whatever was before this commit.
        None if has("git", &["describe", "--tags", "--abbrev=0"]) => {
            program("git", &["describe", "--tags", "--abbrev=0"]).read()?.trim().to_owned()
        }
        None => "HEAD~1".to_owned(),
    };
    let place = target().join("upgrade");
    let (tree, built) = (place.join("tree"), place.join("target"));
    let drop_tree = || program("git", &["worktree", "remove", "--force"]).arg(&tree).run();
    if tree.exists() {
        drop_tree()?;
    }
    program("git", &["worktree", "add", "--quiet", "--detach"]).arg(&tree).arg(&commit).run()?;
    let outcome = cargo(&["build", "--release", "--locked", "--package", "drover-cli"])
        .env("CARGO_TARGET_DIR", &built)
        .within(&tree)
        .run();
    drop_tree()?;
    outcome?;
    Ok(built.join("release/drover"))
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
