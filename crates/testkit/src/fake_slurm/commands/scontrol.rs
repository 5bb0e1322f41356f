//! `scontrol`

use super::Context;
use super::show;
use crate::fake_slurm::answer::Answer;
use crate::fake_slurm::model::{Admin, Held, Job, Phase, Then, Truth};
use crate::fake_slurm::options::{Opt, flag, parse};
use crate::fake_slurm::scheduler::stop;
use crate::fake_slurm::text;

const OPTIONS: &[Opt] =
    &[flag("all", Some('a')), flag("oneliner", Some('o')), flag("quiet", Some('Q')), flag("version", Some('V'))];

pub(crate) fn run(on: &mut Context<'_>, args: &[String]) -> Answer {
    let asked = match parse("scontrol", OPTIONS, args, true) {
        Ok(asked) => asked,
        Err(error) => return Answer::usage("scontrol", &error),
    };
    if asked.has("version") {
        return on.version();
    }
    let words: Vec<&str> = asked.rest.iter().map(String::as_str).collect();
    let one_line = asked.has("oneliner");
    match words.as_slice() {
        ["ping"] => Answer::says(format!("Slurmctld(primary) at {} is UP\n", crate::fake_slurm::HOST)),
        ["version"] => on.version(),
        ["show", "hostnames" | "hostname", list] => {
            Answer::says(text::expand(list).into_iter().map(|name| name + "\n").collect::<String>())
        }
        ["show", "hostlist", list] => Answer::says(text::compress(&text::expand(list)) + "\n"),
        ["show", "job" | "jobs", rest @ ..] => jobs(on, rest.first().copied(), one_line),
        ["show", "partition" | "partitions", rest @ ..] => partitions(on, rest.first().copied(), one_line),
        ["show", "node" | "nodes", rest @ ..] => nodes(on, rest.first().copied(), one_line),
        ["requeue", jobs] => each(on, jobs, |job, now| again(job, now, None)),
        ["requeuehold", "State=SpecialExit" | "state=SpecialExit", jobs] => {
            each(on, jobs, |job, now| again(job, now, Some(Held::Special)))
        }
        ["requeuehold", jobs] => each(on, jobs, |job, now| again(job, now, Some(Held::Requeued))),
        ["hold" | "uhold", jobs] => each(on, jobs, |job, _| {
            if let Phase::Waiting { reason, held } = &mut job.phase {
                "JobHeldUser".clone_into(reason);
                *held = Some(Held::User);
            }
            Ok(())
        }),
        ["release", jobs] => each(on, jobs, |job, _| {
            if let Phase::Waiting { reason, held } = &mut job.phase {
                "None".clone_into(reason);
                *held = None;
            }
            Ok(())
        }),
        ["suspend", jobs] => each(on, jobs, |job, now| match &mut job.phase {
            Phase::Running(run) => {
                run.suspended = Some(now);
                Ok(())
            }
            _ => Err("Job is pending execution"),
        }),
        ["resume", jobs] => each(on, jobs, |job, _| match &mut job.phase {
            Phase::Running(run) => {
                run.suspended = None;
                Ok(())
            }
            _ => Err("Job is pending execution"),
        }),
        ["update", rest @ ..] => update(on, rest),
        _ => Answer::fail(1, format!("scontrol: fake-slurm does not know: {}\n", words.join(" "))),
    }
}

fn jobs(on: &Context<'_>, id: Option<&str>, one_line: bool) -> Answer {
    let known = || on.cluster.known(on.now, on.settings.min_job_age_s);
    let Some(id) = id else {
        let all: String = known().map(|job| show::record(&show::job(on, job), one_line)).collect();
        return Answer::says(if all.is_empty() { "No jobs in the system\n".to_owned() } else { all });
    };
    let job = id.parse().ok().and_then(|id: u32| known().find(|job| job.id == id));
    match job {
        Some(job) => Answer::says(show::record(&show::job(on, job), one_line)),
        None => Answer::fail(1, "slurm_load_jobs error: Invalid job id specified\n"),
    }
}

fn partitions(on: &Context<'_>, name: Option<&str>, one_line: bool) -> Answer {
    let chosen: Vec<_> =
        on.cluster.partitions.iter().filter(|partition| name.is_none_or(|name| partition.name == name)).collect();
    match (chosen.as_slice(), name) {
        ([], Some(name)) => {
            Answer { stdout: format!("Partition {name} not found\n"), stderr: String::new(), status: 1 }
        }
        (all, _) => {
            Answer::says(all.iter().map(|one| show::record(&show::partition(one), one_line)).collect::<String>())
        }
    }
}

fn nodes(on: &Context<'_>, name: Option<&str>, one_line: bool) -> Answer {
    let chosen: Vec<_> = on.cluster.nodes.iter().filter(|node| name.is_none_or(|name| node.name == name)).collect();
    match (chosen.as_slice(), name) {
        ([], Some(name)) => Answer { stdout: format!("Node {name} not found\n"), stderr: String::new(), status: 1 },
        (all, _) => {
            Answer::says(all.iter().map(|one| show::record(&show::node(on, one), one_line)).collect::<String>())
        }
    }
}

/// Does something to each job of a list. Slurm names the job that it fails on.
fn each(on: &mut Context<'_>, list: &str, mut act: impl FnMut(&mut Job, i64) -> Result<(), &'static str>) -> Answer {
    let (now, age) = (on.now, on.settings.min_job_age_s);
    let mut answer = Answer::default();
    for word in list.split(',') {
        let known = word.parse::<u32>().ok().filter(|id| on.cluster.known(now, age).any(|job| job.id == *id));
        let done = match known.and_then(|id| on.cluster.jobs.get_mut(&id)) {
            None => Err("Invalid job id specified"),
            Some(job) => act(job, now),
        };
        if let Err(problem) = done {
            answer.stderr.extend([problem, " for job ", word, "\n"]);
            answer.status = 1;
        }
    }
    answer
}

fn again(job: &mut Job, now: i64, held: Option<Held>) -> Result<(), &'static str> {
    if !job.asked.requeue {
        return Err("Requested operation is presently disabled");
    }
    match &job.phase {
        Phase::Running(_) => stop(job, Then::Again(held), now, true),
        Phase::Over { run: Some(run), .. } => {
            let run = run.clone();
            job.earlier.push((run, now));
            job.restarts += 1;
            job.steps.clear();
            (job.submitted, job.eligible) = (now, now);
            job.phase = Phase::Waiting { reason: "BeginTime".to_owned(), held };
        }
        Phase::Waiting { .. } if held.is_some() => {
            job.phase = Phase::Waiting { reason: "JobHeldUser".to_owned(), held };
        }
        _ => return Err("Job is pending execution"),
    }
    Ok(())
}

fn update(on: &mut Context<'_>, words: &[&str]) -> Answer {
    let pairs: Vec<(String, &str)> =
        words.iter().filter_map(|word| word.split_once('=')).map(|(key, value)| (key.to_lowercase(), value)).collect();
    let get = |key: &str| pairs.iter().find(|(known, _)| known == key).map(|(_, value)| *value);
    if let Some(id) = get("jobid") {
        let limit = get("timelimit").map(text::limit);
        return match limit {
            Some(Some(seconds)) => each(on, id, |job, _| {
                job.asked.seconds = seconds;
                Ok(())
            }),
            _ => Answer::fail(1, "Invalid update specification\n"),
        };
    }
    let (Some(names), Some(state)) = (get("nodename"), get("state")) else {
        return Answer::fail(1, "No valid entity in update command\n");
    };
    let why = get("reason").unwrap_or("none").to_owned();
    for name in text::expand(names) {
        let Some(node) = on.cluster.nodes.iter_mut().find(|node| node.name == name) else {
            return Answer::fail(1, "slurm_update error: Invalid node name specified\n");
        };
        match state.to_lowercase().as_str() {
            "drain" => node.admin = Some((Admin::Drain, why.clone())),
            "down" => node.admin = Some((Admin::Down, why.clone())),
            "resume" | "idle" => {
                node.admin = None;
                node.down &= node.truth != Truth::Fine;
            }
            _ => return Answer::fail(1, "Invalid input\n"),
        }
    }
    Answer::default()
}
