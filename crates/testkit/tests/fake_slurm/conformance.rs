//! The same script of commands that was run against real Slurm is run against the fake, and the answers are compared: their
//! wording, columns and exit statuses; not numbers and times.

use std::collections::BTreeSet;
use std::process::Command;

use drover_testkit::fake_slurm::fixture::{Fixture, recordings, shape};
use drover_testkit::fake_slurm::{Dialect, Plan, Settings};

use super::Fake;

/// Recorded answers that the fake does not imitate, and why.
const DIFFERENT: &[(&str, &str)] = &[
    ("restart-count", "the fake says nothing into the output of a job"),
    ("squeue-cancelling", "whether the job is still being ended is chance"),
    ("scontrol-node", "abridged: nobody asks the fake for it"),
    ("scontrol-node-down", "abridged: nobody asks the fake for it"),
    ("scontrol-partition", "abridged: nobody asks the fake for it"),
];

/// How an answer looks: status, and the shapes of both outputs. Lists are sorted, because Slurm leaves open in which order
/// equals stand.
fn looks(name: &str, fixture: &Fixture, words: &[(&str, &str)]) -> String {
    let mut stdout = shape(&fixture.stdout, words);
    // Chance is which of two schedulers started a job, by how much a limit was passed, and which of two signals came first.
    for (chance, word) in
        [("Scheduler=Backfill", "Scheduler=Main"), ("|INVALID|", "|<span>|"), ("ExitCode=<span>", "ExitCode=#:#")]
    {
        stdout = stdout.replace(chance, word);
    }
    if name.starts_with("sacct") {
        // Whether a job that never ran has a start is chance too, and whether a step heard of its end.
        stdout = stdout.replace("|None|<time>", "|<time>|<time>").replace("|#:#|<span>|", "|#:#|#:#|");
    }
    // Columns are as wide as the numbers in them, and one list has the day above it.
    if ["squeue-default", "squeue-long", "sacct-default"].contains(&name) {
        let lines = stdout.lines().skip(usize::from(name == "squeue-long"));
        stdout = lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ") + "\n").collect();
    }
    let lists = ["squeue", "sinfo", "sacct", "drover"].iter().any(|list| name.starts_with(list));
    if lists {
        let mut lines: Vec<&str> = stdout.lines().collect();
        lines.sort_unstable();
        stdout = lines.join("\n") + "\n";
    }
    format!("exit {}\n{stdout}--- stderr\n{}", fixture.status, shape(&fixture.stderr, words))
}

/// What only one of them has.
fn difference(real: &str, fake: &str) -> String {
    let only = |one: &str, other: &str| {
        let mut others: Vec<&str> = other.split_whitespace().collect();
        let mut left = Vec::new();
        for word in one.split_whitespace() {
            match others.iter().position(|other| *other == word) {
                Some(at) => drop(others.swap_remove(at)),
                None => left.push(word),
            }
        }
        left.join(" ")
    };
    match (only(real, fake), only(fake, real)) {
        (real, fake) if real.is_empty() && fake.is_empty() => "  in the order, or in blanks".to_owned(),
        (real, fake) => format!("  real: {real}\n  fake: {fake}"),
    }
}

fn conforms(dialect: Dialect) {
    let fake = Fake::start(&Plan {
        speed: 30.0,
        settings: Settings { dialect, min_job_age_s: 1_000_000, requeue_delay_s: 100_000, ..Settings::default() },
        ..Plan::default()
    });
    let admin = fake.dir.path().join("admin");
    let state = fake.slurm.dir().root().display().to_string();
    let program = env!("CARGO_BIN_EXE_fake-slurm");
    let text = format!(
        "#!/bin/sh\nfake() {{ '{program}' --state '{state}' \"$@\"; }}\ncase $1 in\n\
         node-down) fake node \"$2\" lost ;;\nnode-up) fake node \"$2\" fine ;;\n\
         suspend | resume) fake scontrol \"$1\" \"$2\" ;;\nbegin-now) fake begin-now \"$2\" ;;\n\
         ctl-stop) fake unreachable on ;;\nctl-start) fake unreachable off ;;\n\
         accounting-*) fake accounting \"${{1#accounting-}}\" ;;\nesac\n"
    );
    std::fs::write(&admin, text).unwrap();
    Command::new("chmod").arg("755").arg(&admin).status().unwrap();
    let out = fake.dir.path().join("out");
    let status = Command::new("bash")
        .arg(recordings().join("record.sh"))
        .args([&out, &fake.work()])
        .env("PATH", fake.slurm.path().unwrap())
        .env("ADMIN", &admin)
        .env("PACE", "0.05")
        .status()
        .unwrap();
    assert!(status.success());

    let user = String::from_utf8(Command::new("id").arg("-un").output().unwrap().stdout).unwrap();
    let group = String::from_utf8(Command::new("id").arg("-gn").output().unwrap().stdout).unwrap();
    let work = std::fs::canonicalize(fake.work()).unwrap().display().to_string();
    let mine = [(work.as_str(), "DIR"), ("login", "HOST"), (user.trim(), "USER"), (group.trim(), "USER")];
    let theirs = [("/scratch", "DIR"), ("localhost", "HOST"), ("login", "HOST"), ("anna", "USER")];
    let mut wrong = Vec::new();
    let real = Fixture::read_all(&recordings().join(dialect.name())).unwrap();
    let fakes: BTreeSet<String> = Fixture::read_all(&out).unwrap().into_iter().map(|(name, _)| name).collect();
    assert_eq!(fakes, real.iter().map(|(name, _)| name.clone()).collect(), "the same cases were recorded");
    for (name, real) in real {
        if DIFFERENT.iter().any(|(different, _)| *different == name) {
            continue;
        }
        let fake = Fixture::read(&out.join(format!("{name}.txt"))).unwrap();
        let (expected, found) = (looks(&name, &real, &theirs), looks(&name, &fake, &mine));
        if name.starts_with("environment") {
            // Real jobs see more; what ours see is the same.
            let known: BTreeSet<&str> = expected.lines().collect();
            let other: Vec<&str> = found.lines().filter(|line| !known.contains(line)).collect();
            if !other.is_empty() {
                wrong.push(format!("{name}: {other:#?}"));
            }
            continue;
        }
        if expected != found {
            wrong.push(format!("{name}: {}\n{}", real.command, difference(&expected, &found)));
        }
    }
    assert!(wrong.is_empty(), "{} answers differ from Slurm {}:\n{}", wrong.len(), dialect.name(), wrong.join("\n\n"));
}

#[test]
fn answers_are_those_of_slurm_20_11() {
    conforms(Dialect::V20);
}

#[test]
fn answers_are_those_of_slurm_22_05() {
    conforms(Dialect::V22);
}

#[test]
fn answers_are_those_of_slurm_24_11() {
    conforms(Dialect::V24);
}
