//! `scancel`

use super::{Context, ids};
use crate::fake_slurm::answer::Answer;
use crate::fake_slurm::model::{Cluster, End, Final, Job, Moment, Phase, Then};
use crate::fake_slurm::options::{Opt, flag, parse, with};
use crate::fake_slurm::scheduler::stop;
use crate::fake_slurm::settings::Dialect;
use crate::fake_slurm::{processes, user};

const OPTIONS: &[Opt] = &[
    with("account", Some('A')),
    with("name", Some('n')),
    with("jobname", None),
    with("partition", Some('p')),
    with("qos", Some('q')),
    with("signal", Some('s')),
    with("state", Some('t')),
    with("user", Some('u')),
    flag("batch", Some('b')),
    flag("full", Some('f')),
    flag("me", None),
    flag("quiet", Some('Q')),
    flag("verbose", Some('v')),
    flag("version", Some('V')),
];

pub(crate) fn run(on: &mut Context<'_>, args: &[String]) -> Answer {
    let asked = match parse("scancel", OPTIONS, args, true) {
        Ok(asked) => asked,
        Err(error) => return Answer::usage("scancel", &error),
    };
    if asked.has("me") && on.dialect() == Dialect::V20 {
        return Answer::usage("scancel", "scancel: unrecognized option '--me'");
    }
    if asked.has("version") {
        return on.version();
    }
    let listed = asked.rest.iter().flat_map(|arg| arg.split(','));
    let numbers = match ids(listed) {
        Ok(numbers) => numbers,
        Err(bad) => return Answer::fail(1, format!("scancel: error: Invalid job id {bad}\n")),
    };
    let filters = ["name", "jobname", "partition", "state", "user", "me"].iter().any(|filter| asked.has(filter));
    if numbers.is_empty() && !filters {
        return Answer::fail(1, "scancel: error: No job identification provided\n");
    }
    let signal = match asked.get("signal").map(processes::signal_number) {
        None => None,
        Some(Some(number)) => Some(number),
        Some(None) => return Answer::fail(1, "scancel: error: Unknown job signal\n"),
    };
    let me = user::name(rustix::process::getuid().as_raw());
    let user = if asked.has("me") { Some(me.as_str()) } else { asked.get("user") };
    let name = asked.get("name").or_else(|| asked.get("jobname"));
    let fits = |job: &Job| {
        name.is_none_or(|name| job.asked.name == name)
            && user.is_none_or(|user| job.asked.user == user)
            && asked.get("partition").is_none_or(|partition| job.asked.partition == partition)
            && asked.get("state").is_none_or(|state| job.state().eq_ignore_ascii_case(state))
    };
    let uid = rustix::process::getuid().as_raw();
    let mut chosen: Vec<u32> = Vec::new();
    if numbers.is_empty() {
        chosen.extend(on.cluster.jobs.values().filter(|job| !job.is_over() && fits(job)).map(|job| job.id));
    }
    for id in numbers {
        // A job that is over or was never there is silently taken for cancelled.
        let known = on.cluster.known(on.now, on.settings.min_job_age_s).find(|job| job.id == id);
        chosen.extend(known.filter(|job| fits(job)).map(|job| job.id));
    }
    for id in chosen {
        match signal {
            None => cancel(on.cluster, id, on.now, uid, false),
            Some(9) => cancel(on.cluster, id, on.now, uid, true),
            Some(number) => pass_on(on, id, number, asked.has("batch"), asked.has("full")),
        }
    }
    Answer::default()
}

/// Ends a job by somebody's order. The controller sends the signals.
fn cancel(cluster: &mut Cluster, id: u32, now: Moment, uid: u32, killed: bool) {
    let Some(job) = cluster.jobs.get_mut(&id) else { return };
    let signal = match job.run() {
        None => 0,
        Some(_) => 15,
    };
    let end = End { state: Final::Cancelled, reason: "None".to_owned(), status: 0, signal, at: now, by: Some(uid) };
    stop(job, Then::Over(end), now, killed);
}

/// Another signal than the one that ends a job. It goes to the steps, unless the script is asked for.
fn pass_on(on: &Context<'_>, id: u32, number: i32, batch: bool, full: bool) {
    let Some(job) = on.cluster.jobs.get(&id) else { return };
    let Phase::Running(run) = &job.phase else { return };
    let to = processes::living(on.dir, id, |run_number, recorded| {
        run_number == run.number && (full || batch == recorded.step.is_none())
    });
    for process in to {
        processes::signal(process, number);
    }
}
