//! What is read, on what real Slurm of three versions was recorded to answer.

use bytes::Bytes;
use drover_ssh::{Exit, Output};
use drover_testkit::fake_slurm::fixture::{Fixture, recordings};

use super::{history, partitions, queue, show, submit};
use crate::slurm::calls::answer;
use crate::slurm::core::{Answer, Call};
use crate::slurm::state::Class;
use crate::slurm::tag::Tag;

const VERSIONS: [&str; 3] = ["20.11", "22.05", "24.11"];

fn recorded(version: &str, name: &str) -> Fixture {
    Fixture::read(&recordings().join(version).join(format!("{name}.txt"))).unwrap()
}

fn output(version: &str, name: &str) -> Output {
    let Fixture { status, stdout, stderr, .. } = recorded(version, name);
    Output { exit: Exit::Code(status as u32), stdout: Bytes::from(stdout), stderr: Bytes::from(stderr) }
}

#[test]
fn queues_are_read_whole_and_every_state_is_known() {
    for version in VERSIONS {
        let waiting = queue::read(&recorded(version, "drover-queue-waiting").stdout);
        assert!(waiting.whole, "{version}");
        let first = waiting.jobs.iter().find(|job| job.tag.is_some()).unwrap();
        assert_eq!(first.tag.as_ref().unwrap().comment(), "drover:first:1");
        assert_eq!((first.state.as_str(), first.hosts.as_str()), ("RUNNING", "n[1-4]"), "{version}");
        let reasons: Vec<&str> = waiting.jobs.iter().map(|job| job.reason.as_str()).collect();
        for reason in
            ["Resources", "Priority", "BeginTime", "Dependency", "JobHeldUser", "PartitionDown", "PartitionTimeLimit"]
        {
            assert!(reasons.contains(&reason), "{version}: {reason} in {reasons:?}");
        }
        let ended = queue::read(&recorded(version, "drover-queue-ended").stdout);
        assert!(ended.whole && ended.jobs.len() > 20, "{version}: {}", ended.jobs.len());
        for job in &ended.jobs {
            assert!(matches!(job.state.class(), Class::Over(_)), "{version}: {job:?}");
        }
        let down = answer(&Call::Queue, &output(version, "drover-queue-down"));
        assert!(matches!(&down, Answer::NotDone(why) if why.contains("connect failure")), "{version}: {down:?}");
    }
}

#[test]
fn histories_and_single_jobs_say_how_a_job_ended() {
    for version in VERSIONS {
        let rows = history::read(&recorded(version, "drover-history-ended").stdout);
        let states: Vec<&str> = rows.iter().map(|row| row.state.as_str()).collect();
        assert_eq!(states, ["CANCELLED", "FAILED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"], "{version}");
        assert_eq!(rows[1].exit, "3:0");
        assert_eq!(history::read(&recorded(version, "drover-history-none").stdout), []);
        let ask = Call::History { jobs: vec![1], names: Vec::new() };
        assert!(matches!(answer(&ask, &output(version, "sacct-disabled")), Answer::Unsupported(_)), "{version}");
        assert!(matches!(answer(&ask, &output(version, "sacct-unreachable")), Answer::NotDone(_)), "{version}");

        for (name, state, exit) in [
            ("running", "RUNNING", "0:0"),
            ("odd", "PENDING", "0:0"),
            ("newline", "PENDING", "0:0"),
            ("good", "COMPLETED", "0:0"),
            ("three", "FAILED", "3:0"),
            ("killed", "FAILED", "0:9"),
            ("timeout", "TIMEOUT", "0:15"),
            ("requeued", "PENDING", "0:0"),
            ("special-exit", "SPECIAL_EXIT", "0:0"),
            ("suspended", "SUSPENDED", "0:0"),
            ("node-fail", "NODE_FAIL", ""),
        ] {
            let text = recorded(version, &format!("job-{name}")).stdout;
            let id: u64 = text.split(['=', ' ']).nth(1).unwrap().parse().unwrap();
            let past = show::read(&text, id).unwrap();
            assert_eq!(past.state.as_str(), state, "{version}: {name}");
            assert!(exit.is_empty() || past.exit == exit, "{version}: {name}: {}", past.exit);
        }
        assert_eq!(answer(&Call::Show { job: 99_999 }, &output(version, "scontrol-unknown-job")), Answer::NoSuchJob);
    }
}

#[test]
fn submissions_are_taken_refused_or_put_off() {
    let ask = Call::Submit(Tag { swarm: "first".parse().unwrap(), submission: 1 });
    for version in VERSIONS {
        for name in ["sbatch-ok", "sbatch-ok-stdin"] {
            assert!(matches!(answer(&ask, &output(version, name)), Answer::Submitted { .. }), "{version}: {name}");
        }
        for (name, hint) in [
            ("partition", "--partition"),
            ("account", "--account"),
            ("qos", "--qos"),
            ("time", ""),
            ("constraint", "features"),
            ("gres", ""),
            ("signal", ""),
            ("nodes", ""),
        ] {
            let said = answer(&ask, &output(version, &format!("sbatch-bad-{name}")));
            assert!(matches!(&said, Answer::Rejected(why) if why.hint.contains(hint)), "{version}: {name}: {said:?}");
        }
        for name in ["sbatch-qos-wall", "sbatch-empty", "sbatch-dos", "sbatch-nul", "sbatch-no-shebang"] {
            assert!(matches!(answer(&ask, &output(version, name)), Answer::Rejected(_)), "{version}: {name}");
        }
        assert!(matches!(answer(&ask, &output(version, "down-sbatch")), Answer::NotDone(_)), "{version}");
        assert_eq!(submit::job_id(&recorded(version, "version-sbatch").stdout), None);
        // A job that is over, or never was, is silently taken for cancelled.
        let cancel = Call::Cancel { job: 7, kill: false };
        for name in ["scancel-ok", "scancel-again", "scancel-unknown-job", "scancel-kill"] {
            assert_eq!(answer(&cancel, &output(version, name)), Answer::Cancelled, "{version}: {name}");
        }
        assert!(matches!(answer(&cancel, &output(version, "down-scancel")), Answer::NotDone(_)), "{version}");
    }
}

#[test]
fn partitions_are_read_with_what_is_free() {
    for version in VERSIONS {
        let idle = |name: &str| {
            let known = partitions::read(&recorded(version, name).stdout);
            assert_eq!(known.len(), 3, "{version}");
            assert!(known["batch"].up && !known["off"].up, "{version}");
            assert_eq!(known["batch"].limit, Some(std::time::Duration::from_hours(12)));
            known["batch"].nodes.get("idle").copied().unwrap_or(0)
        };
        assert_eq!(
            ["idle", "busy", "down"].map(|when| idle(&format!("drover-partitions-{when}"))),
            [4, 0, 3],
            "{version}"
        );
    }
}
