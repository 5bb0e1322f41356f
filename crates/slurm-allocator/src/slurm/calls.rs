//! From a call to a command on the login host, and from what that said to an answer.

use std::time::Duration;

use drover_ssh::{Command, Exit, Outcome, Output, Remote, SshError};
use drover_types::{ErrorCode, Failure};

use super::core::{Answer, Call, Past, refusal};
use super::parse::{history, is_shown, partitions, queue, show, submit};
use super::script::Plan;

/// A controller that does not answer keeps Slurm's programs waiting for about 15 s.
const LOOK: Duration = Duration::from_secs(25);
/// `sbatch` ends itself on the login host after so many seconds, also when nobody hears it any more.
const SUBMIT_SECONDS: u32 = 40;
/// And is killed so many later.
const SUBMIT_KILL_SECONDS: u32 = 5;
const SUBMIT: Duration = Duration::from_secs(50);
/// After this long an `sbatch` is surely gone, whatever we heard of it: its own end, and time for a login host that is slow.
pub(super) const SUBMIT_HORIZON: Duration = Duration::from_mins(1);
/// The queue of one user is far smaller.
const MOST_OUTPUT: usize = 16 << 20;
/// Exit statuses of `timeout`, of `env` and of shells.
const TIMED_OUT: [u32; 2] = [124, 137];
const NO_PROGRAM: [u32; 2] = [126, 127];
/// Requests that the controller gets by [`preflight`]: the partitions, the nodes.
pub(super) const PREFLIGHT: u32 = 2;
/// What of an account's environment would hide jobs from a look.
const HIDES_JOBS: [&str; 9] = [
    "SQUEUE_ACCOUNT",
    "SQUEUE_FEDERATION",
    "SQUEUE_LICENSES",
    "SQUEUE_LOCAL",
    "SQUEUE_NAMES",
    "SQUEUE_PARTITION",
    "SQUEUE_QOS",
    "SQUEUE_STATES",
    "SQUEUE_USERS",
];

/// A program of Slurm's, without the variables that would hide jobs from it, and with times and numbers in one form.
fn slurm(program: &str) -> Command {
    let unset = HIDES_JOBS.into_iter().flat_map(|name| ["-u", name]);
    Command::new("env").args(unset).args(["LC_ALL=C", program]).deadline(LOOK).max_output(MOST_OUTPUT)
}

/// The command of a call. `plan` is that of the swarm that is submitted.
fn command(call: &Call, plan: Option<&Plan>) -> Option<Command> {
    Some(match call {
        Call::Queue => slurm("squeue").args(["--me", "--states=all", "--format"]).arg(queue::FORMAT),
        Call::Submit(tag) => {
            let plan = plan?;
            Command::new("timeout")
                .args(["-k".to_owned(), SUBMIT_KILL_SECONDS.to_string(), SUBMIT_SECONDS.to_string()])
                .args(["sbatch", "--parsable"])
                .args(plan.options(tag))
                .stdin(plan.script(tag))
                .deadline(SUBMIT)
        }
        Call::Cancel { job, kill } => {
            let how: &[&str] = if *kill { &["--full", "--signal=KILL"] } else { &[] };
            slurm("scancel").args(how.iter().copied()).arg(job.to_string())
        }
        Call::History { names, .. } => past(names),
        Call::Show { job } => slurm("scontrol").args(["--oneliner", "show", "job"]).arg(job.to_string()),
    })
}

/// What became of jobs with these names.
fn past(names: &[String]) -> Command {
    slurm("sacct")
        .args(["--noheader", "--allocations", "--parsable2", "--starttime=now-7days", "--format", history::FORMAT])
        .arg(format!("--name={}", names.join(",")))
}

/// Makes a call.
pub(super) async fn make(remote: &dyn Remote, call: &Call, plan: Option<&Plan>) -> Answer {
    let Some(command) = command(call, plan) else {
        return Answer::NotDone("what is to be submitted is not known any more".to_owned());
    };
    let said = match remote.run(command).await {
        Ok(output) => answer(call, &output),
        Err(error) => failed(call, &error),
    };
    match (call, said) {
        (Call::History { names, .. }, Answer::Unsupported(why)) => {
            match remote.run(past(names).arg("--completion")).await {
                Ok(output) => completions(names, &output).map_or(Answer::Unsupported(why), Answer::History),
                Err(_) => Answer::Unsupported(why),
            }
        }
        (_, said) => said,
    }
}

/// What a cluster without accounting notes of jobs that have ended, where its users may read that. It denies nothing: whoever is not in it
/// may be in another file, or not yet.
fn completions(names: &[String], output: &Output) -> Option<Vec<Past>> {
    let rows = history::read(&String::from_utf8_lossy(&output.stdout));
    let known: Vec<Past> =
        rows.into_iter().filter(|row| row.tag.as_ref().is_some_and(|tag| names.contains(&tag.name()))).collect();
    (output.success() && !known.is_empty()).then_some(known)
}

fn failed(call: &Call, error: &SshError) -> Answer {
    match (call, error.outcome()) {
        (Call::Submit(_), Outcome::Unknown) => Answer::Unsure(error.to_string()),
        _ => Answer::NotDone(error.to_string()),
    }
}

/// What the output of a call means.
pub(super) fn answer(call: &Call, output: &Output) -> Answer {
    let text = String::from_utf8_lossy(&output.stdout);
    let complaint = output.complaint();
    if let Exit::Code(code) = output.exit
        && NO_PROGRAM.contains(&code)
    {
        let program = program(call);
        return match call {
            Call::Submit(_) => Answer::Rejected(missing(program)),
            Call::History { .. } => Answer::Unsupported(format!("{program} is not installed on the login host")),
            _ => Answer::NotDone(missing(program).message),
        };
    }
    match call {
        Call::Queue if output.success() => Answer::Queue(queue::read(&text)),
        Call::Submit(_) if output.success() => match submit::job_id(&text) {
            Some(job) => Answer::Submitted { job },
            None => Answer::Unsure(format!("sbatch did not name a job, it said {:?}", brief(&text))),
        },
        Call::Submit(_) => submit_failed(output, &complaint),
        Call::Cancel { .. } if show::is_unknown_job(&complaint) => Answer::NoSuchJob,
        Call::Cancel { .. } if output.success() => Answer::Cancelled,
        Call::History { .. } if history::is_switched_off(&complaint) => Answer::Unsupported(brief(&complaint)),
        Call::History { .. } if output.success() => Answer::History(history::read(&text)),
        Call::Show { job } if output.success() => Answer::Shown(show::read(&text, *job)),
        Call::Show { .. } if show::is_unknown_job(&complaint) => Answer::NoSuchJob,
        _ => {
            let said = if complaint.is_empty() { output.exit.to_string() } else { brief(&complaint) };
            Answer::NotDone(format!("{} failed: {said}", program(call)))
        }
    }
}

fn submit_failed(output: &Output, complaint: &str) -> Answer {
    if let Exit::Code(code) = output.exit
        && TIMED_OUT.contains(&code)
    {
        return Answer::Unsure(format!("sbatch did not end within {SUBMIT_SECONDS} s"));
    }
    if let Exit::Signal(signal) = &output.exit {
        return Answer::Unsure(format!("sbatch ended with signal {signal}"));
    }
    match submit::complaint(complaint) {
        submit::Complaint::Refused(why) => Answer::Rejected(refusal(&why).hint(submit::hint(&why))),
        submit::Complaint::NotNow(why) => Answer::NotDone(format!("sbatch failed: {why}")),
        submit::Complaint::Unclear(why) => Answer::Unsure(format!("sbatch failed: {why}")),
    }
}

fn program(call: &Call) -> &'static str {
    match call {
        Call::Queue => "squeue",
        Call::Submit(_) => "sbatch",
        Call::Cancel { .. } => "scancel",
        Call::History { .. } => "sacct",
        Call::Show { .. } => "scontrol",
    }
}

fn missing(program: &str) -> Failure {
    Failure::new(ErrorCode::ProviderUnavailable, format!("there is no {program} on the PATH of the login host"))
        .hint("Slurm's programs must be on the PATH of a shell that nobody logs into; ask the site, or set PATH in ~/.ssh/environment")
}

/// Asks which partitions there are, and checks a launch against them: a line for people, or why it cannot run at all.
pub(super) async fn preflight(remote: &dyn Remote, plan: &Plan) -> Result<String, Failure> {
    let command = slurm("sinfo").args(["--noheader", "--format", partitions::FORMAT]);
    let output = match remote.run(command).await {
        Ok(output) => output,
        Err(SshError::Refused { host, why, hint }) => {
            let message = format!("no connection to {host}: {why}");
            return Err(Failure::new(ErrorCode::ProviderUnavailable, message).hint(hint));
        }
        Err(error @ (SshError::Settings { .. } | SshError::Shell { .. } | SshError::Invalid { .. })) => {
            return Err(Failure::new(ErrorCode::ProviderUnavailable, error.to_string())
                .hint("correct login_host or ~/.ssh/config; `drover doctor` looks at it more closely"));
        }
        Err(error) if error.outcome() == Outcome::NotStarted => {
            return Err(Failure::new(ErrorCode::BackendUnavailable, error.to_string()).hint("repeat the launch"));
        }
        Err(error) => return Ok(format!("not checked beforehand: {error}")),
    };
    if let Exit::Code(code) = output.exit
        && NO_PROGRAM.contains(&code)
    {
        return Err(missing("sinfo"));
    }
    if !output.success() {
        // Slurm itself will say what it thinks of the launch.
        return Ok(format!("not checked beforehand: sinfo failed: {}", brief(&output.complaint())));
    }
    let known = partitions::read(&String::from_utf8_lossy(&output.stdout));
    let order = &plan.order;
    partitions::check(&known, &order.partition, order.nodes, order.seconds.map(Duration::from_secs))
}

fn brief(text: &str) -> String {
    let line = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
    line.chars().filter(|c| is_shown(*c)).take(300).collect()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::slurm::tag::Tag;

    fn output(code: u32, stdout: &str, stderr: &str) -> Output {
        let bytes = |text: &str| Bytes::from(text.to_owned());
        Output { exit: Exit::Code(code), stdout: bytes(stdout), stderr: bytes(stderr) }
    }

    fn submit() -> Call {
        Call::Submit(Tag { swarm: "s".parse().unwrap(), submission: 1 })
    }

    #[test]
    fn what_programs_say_becomes_what_it_means() {
        let down = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)";
        assert!(matches!(answer(&Call::Queue, &output(0, "JOBID|STATE\n", "")), Answer::Queue(list) if list.whole));
        assert!(
            matches!(answer(&Call::Queue, &output(1, "", down)), Answer::NotDone(why) if why.contains("connect failure"))
        );
        assert!(matches!(answer(&Call::Queue, &output(127, "", "")), Answer::NotDone(why) if why.contains("squeue")));
        assert_eq!(answer(&submit(), &output(0, "7\n", "")), Answer::Submitted { job: 7 });
        assert!(matches!(answer(&submit(), &output(0, "ok\n", "")), Answer::Unsure(_)));
        assert!(matches!(answer(&submit(), &output(124, "", "")), Answer::Unsure(_)));
        assert!(
            matches!(answer(&submit(), &output(127, "", "")), Answer::Rejected(failure) if failure.message.contains("sbatch"))
        );
        let refused = "sbatch: error: Batch job submission failed: Invalid partition name specified";
        assert!(matches!(answer(&submit(), &output(1, "", refused)), Answer::Rejected(failure)
            if failure.message.contains("Invalid partition") && failure.hint.contains("sinfo")));
        let cancel = Call::Cancel { job: 7, kill: false };
        assert_eq!(
            answer(&cancel, &output(1, "", "scancel: error: Kill job error on job id 7: Invalid job id specified")),
            Answer::NoSuchJob
        );
        assert_eq!(answer(&cancel, &output(0, "", "")), Answer::Cancelled);
        let past = Call::History { jobs: vec![7], names: vec!["drover-s.1".into()] };
        let off = "Slurm accounting storage is disabled";
        assert!(matches!(answer(&past, &output(1, "", off)), Answer::Unsupported(_)));
        assert!(matches!(answer(&past, &output(127, "", "")), Answer::Unsupported(_)));
        assert!(
            matches!(answer(&past, &output(0, "7|FAILED|1:0|drover-s.1\n", "")), Answer::History(rows) if rows.len() == 1)
        );
        assert_eq!(
            answer(&Call::Show { job: 7 }, &output(1, "", "slurm_load_jobs error: Invalid job id specified")),
            Answer::NoSuchJob
        );
    }

    #[test]
    fn notes_of_ended_jobs_say_how_these_ended_and_deny_nothing() {
        // As sacct 22.05 prints them with --completion, where the site lets users read them.
        let notes = "2||0:0|drover-y\n1|FAILED|3:0|drover-x.1\n";
        let names = |name: &str| vec![name.to_owned()];
        let rows = completions(&names("drover-x.1"), &output(0, notes, "sacct: error: Unknown type z|w.1 JobState"));
        let rows = rows.unwrap();
        assert_eq!((rows.len(), rows[0].id, rows[0].state.as_str(), rows[0].exit.as_str()), (1, 1, "FAILED", "3:0"));
        assert_eq!(completions(&names("drover-z.1"), &output(0, notes, "")), None);
        assert_eq!(completions(&names("drover-x.1"), &output(1, "", "sacct: fatal: open /var/log/jobcomp")), None);
    }

    #[test]
    fn an_unknown_outcome_is_unknown_only_for_what_changes_something() {
        let lost = SshError::UnknownOutcome { program: "x".into(), host: "h".into(), why: "cut".into() };
        assert!(matches!(failed(&submit(), &lost), Answer::Unsure(_)));
        assert!(matches!(failed(&Call::Queue, &lost), Answer::NotDone(_)));
        let never = SshError::Refused { host: "h".into(), why: "w".into(), hint: "i".into() };
        assert!(matches!(failed(&submit(), &never), Answer::NotDone(_)));
        let own_end = u64::from(SUBMIT_SECONDS + SUBMIT_KILL_SECONDS);
        assert!(own_end < SUBMIT.as_secs() && SUBMIT < SUBMIT_HORIZON);
    }
}
