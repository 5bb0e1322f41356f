//! What goes wrong between a command and its answer.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt as _;

use drover_testkit::fake_slurm::{Accounting, Fault, Kind};

use super::Fake;

const SCRIPT: &str = "sleep 1000";

#[test]
fn an_answer_that_fails_may_or_may_not_mean_a_job() {
    let fake = Fake::fast();
    let script = fake.work().join("job.sh");
    std::fs::write(&script, format!("#!/bin/sh\n{SCRIPT}\n")).unwrap();
    let named = |name: &str| {
        let cluster = fake.slurm.cluster().unwrap();
        cluster.jobs.values().filter(|job| job.asked.name == name).count()
    };
    let cases = [
        ("timeout-done", Kind::Timeout { done: true }, 1),
        ("timeout", Kind::Timeout { done: false }, 0),
        ("dies-done", Kind::Dies { done: true }, 1),
        ("dies", Kind::Dies { done: false }, 0),
        ("dies-writing", Kind::DiesWriting, 0),
        ("unreachable", Kind::Unreachable { after_ms: 1 }, 0),
        ("truncated", Kind::Truncated { bytes: 0 }, 1),
    ];
    for (name, kind, jobs) in cases {
        fake.slurm.fault("sbatch", kind.clone(), Some(1)).unwrap();
        let output = fake.call(&["sbatch", "--parsable", "--job-name", name, script.to_str().unwrap()]);
        assert_eq!(named(name), jobs, "{name}: {output:?}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{name}");
        match kind {
            Kind::Dies { .. } | Kind::DiesWriting => assert_eq!(output.status.signal(), Some(9)),
            Kind::Truncated { .. } => assert!(output.status.success()),
            _ => assert!(String::from_utf8_lossy(&output.stderr).starts_with("sbatch: error: "), "{output:?}"),
        }
        // The next call is unharmed, and its id is nobody else's.
        let id: u32 = fake.says(&["sbatch", "--parsable", script.to_str().unwrap()]).trim().parse().unwrap();
        assert_eq!(fake.slurm.job(id).unwrap().asked.name, "job.sh");
    }
    let calls = fake.slurm.calls().unwrap();
    assert_eq!(calls.iter().filter(|call| call.command == "sbatch").count(), 2 * 7, "every call is counted");
    assert_eq!(calls.iter().filter(|call| call.fault.is_some()).count(), 7);
}

#[test]
fn it_says_that_it_is_a_fake() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_fake-slurm")).arg("--version").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("a fake for tests, not Slurm"), "{output:?}");
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_fake-slurm")).arg("sbatch").output().unwrap();
    assert!(!output.status.success(), "without a cluster it answers nothing: {output:?}");
}

#[test]
fn many_submit_at_once() {
    let fake = Fake::fast();
    fake.slurm.set(|settings| settings.blocked = Some("Licenses".to_owned())).unwrap();
    let script = fake.work().join("job.sh");
    std::fs::write(&script, format!("#!/bin/sh\n{SCRIPT}\n")).unwrap();
    let ids: BTreeSet<u32> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..12)
            .map(|number| {
                let (fake, script) = (&fake, &script);
                scope.spawn(move || {
                    let name = format!("--job-name=job-{number}");
                    fake.says(&["sbatch", "--parsable", &name, script.to_str().unwrap()]).trim().parse().unwrap()
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(ids, (1..=12).collect());
    let names: BTreeSet<String> =
        fake.slurm.cluster().unwrap().jobs.values().map(|job| job.asked.name.clone()).collect();
    assert_eq!(names.len(), 12);
    fake.says(&["squeue"]);
    super::until(
        "the reason is shown",
        || fake.says(&["squeue", "-h", "-o", "%r"]).lines().all(|reason| reason == "Licenses"),
        || fake.says(&["squeue"]),
    );
}

#[test]
fn the_database_is_late_missing_or_silent_and_comments_are_dropped() {
    let fake = Fake::fast();
    fake.slurm.set(|settings| settings.drop_comments = true).unwrap();
    let job = fake.submit(&["--comment=drover:x:1", "--time=600"], "true").to_string();
    fake.reaches(job.parse().unwrap(), "COMPLETED");
    assert_eq!(fake.says(&["squeue", "-h", "--states=all", "-o", "%T|%k"]), "COMPLETED|(null)\n");
    let sacct = ["sacct", "-XPn", "-j", &job, "-o", "State"];
    assert_eq!(fake.says(&sacct), "COMPLETED\n");
    fake.slurm.set(|settings| settings.accounting = Accounting::On { lag_s: 100_000 }).unwrap();
    assert_eq!(fake.says(&sacct), "");
    for (accounting, words) in [(Accounting::Off, "disabled"), (Accounting::Unreachable, "Connection refused")] {
        fake.slurm.set(|settings| settings.accounting = accounting).unwrap();
        let output = fake.call(&sacct);
        assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains(words), "{output:?}");
    }
    // A state that nobody has heard of, and a job that is forgotten after a while.
    fake.slurm
        .change(|cluster| cluster.jobs.values_mut().for_each(|job| job.shown = Some("HIBERNATING".to_owned())))
        .unwrap();
    assert_eq!(fake.says(&["squeue", "-h", "-j", &job, "--states=all", "-o", "%T"]), "HIBERNATING\n");
    fake.slurm.set(|settings| settings.min_job_age_s = 0).unwrap();
    assert!(!fake.call(&["squeue", "-h", "-j", &job]).status.success());
    assert_eq!(fake.says(&["squeue", "-h", "--states=all"]), "");
    let second = Fault {
        command: "squeue".to_owned(),
        kind: Kind::Banner { text: "welcome\n".to_owned() },
        after: 1,
        times: None,
    };
    fake.slurm.set(|settings| settings.faults.push(second)).unwrap();
    assert_eq!(fake.says(&["squeue", "-h"]), "");
    assert_eq!(fake.says(&["squeue", "-h"]), "welcome\n");
}
