//! `sacct`

use super::Context;
use crate::fake_slurm::answer::Answer;
use crate::fake_slurm::model::{Job, Moment, Phase, ms};
use crate::fake_slurm::options::{Opt, flag, parse, with};
use crate::fake_slurm::settings::{Accounting, Dialect};
use crate::fake_slurm::text::{self, column};
use crate::fake_slurm::user;

const OPTIONS: &[Opt] = &[
    with("accounts", Some('A')),
    with("endtime", Some('E')),
    with("format", Some('o')),
    with("jobs", Some('j')),
    with("name", None),
    with("partition", Some('r')),
    with("starttime", Some('S')),
    with("state", Some('s')),
    with("user", Some('u')),
    with("delimiter", None),
    flag("allocations", Some('X')),
    flag("allusers", Some('a')),
    flag("duplicates", Some('D')),
    flag("noheader", Some('n')),
    flag("parsable", Some('p')),
    flag("parsable2", Some('P')),
    flag("version", Some('V')),
];

/// Columns: name, width when it is not parsable.
const FIELDS: &[(&str, usize)] = &[
    ("JobID", 12),
    ("JobIDRaw", 12),
    ("JobName", 10),
    ("Partition", 10),
    ("Account", 10),
    ("AllocCPUS", 10),
    ("AllocNodes", 10),
    ("QOS", 10),
    ("State", 10),
    ("ExitCode", 8),
    ("DerivedExitCode", 15),
    ("Submit", 19),
    ("Eligible", 19),
    ("Start", 19),
    ("End", 19),
    ("Elapsed", 10),
    ("ElapsedRaw", 10),
    ("Timelimit", 10),
    ("TimelimitRaw", 12),
    ("NNodes", 8),
    ("NodeList", 15),
    ("User", 9),
    ("UID", 6),
    ("Cluster", 10),
    ("Reason", 22),
    ("Comment", 14),
    ("WorkDir", 20),
];

/// One line: the job, a step of it, or an earlier run of it.
struct Entry<'a> {
    job: &'a Job,
    step: Option<String>,
    state: String,
    started: Option<Moment>,
    ended: Option<Moment>,
    nodes: Vec<String>,
    code: (i32, i32),
}

pub(crate) fn run(on: &Context<'_>, args: &[String]) -> Answer {
    let asked = match parse("sacct", OPTIONS, args, true) {
        Ok(asked) => asked,
        Err(error) => return Answer::usage("sacct", &error),
    };
    if asked.has("version") {
        return on.version();
    }
    let lag = match on.settings.accounting {
        Accounting::Off => return Answer::fail(1, "Slurm accounting storage is disabled\n"),
        Accounting::Unreachable => {
            return Answer::fail(
                1,
                format!(
                    "sacct: error: {}: failed to open persistent connection to \
                     host:{}:6819: Connection refused\n\
                     sacct: error: Sending PersistInit msg: Connection refused\n\
                     sacct: error: Problem talking to the database: Connection refused\n",
                    if on.dialect() == Dialect::V24 {
                        "_open_persist_conn"
                    } else {
                        "slurm_persist_conn_open_without_init"
                    },
                    crate::fake_slurm::HOST
                ),
            );
        }
        Accounting::On { lag_s } => ms(lag_s),
    };
    let format = asked.get("format").unwrap_or("JobID,JobName,Partition,Account,AllocCPUS,State,ExitCode");
    let mut fields = Vec::new();
    for word in format.split(',').filter(|word| !word.is_empty()) {
        let (word, width) = word.split_once('%').map_or((word, None), |(word, width)| (word, Some(width)));
        match FIELDS.iter().find(|(name, _)| name.eq_ignore_ascii_case(word)) {
            Some((name, usual)) => fields.push((*name, width.and_then(|width| width.parse().ok()).unwrap_or(*usual))),
            None => return Answer::fail(1, format!("sacct: error: Invalid field requested: \"{word}\"\n")),
        }
    }
    // A step is asked for as JOB.STEP; all of the job is listed then.
    let jobs = asked
        .list("jobs")
        .map(|list| list.iter().filter_map(|id| id.split('.').next()?.parse::<u32>().ok()).collect::<Vec<_>>());
    let me = user::name(rustix::process::getuid().as_raw());
    let users = asked.list("user").or_else(|| (!asked.has("allusers") && jobs.is_none()).then(|| vec![me]));
    let (names, states) = (asked.list("name"), asked.list("state"));
    let from = asked.get("starttime").and_then(|text| moment(on.now, text));
    // What the database has not heard of yet is not there.
    let as_of = on.now - lag;
    let listed = |list: &Option<Vec<String>>, value: &str| {
        list.as_ref().is_none_or(|list| list.iter().any(|one| one.eq_ignore_ascii_case(value)))
    };
    let mut out = String::new();
    let mut add = |value: &dyn Fn(&str) -> String| {
        let cells = fields.iter().map(|(name, width)| (value(name), *width));
        let line: String = if asked.has("parsable2") || asked.has("parsable") {
            let between = asked.get("delimiter").unwrap_or("|");
            let line = cells.map(|(cell, _)| cell).collect::<Vec<_>>().join(between);
            if asked.has("parsable") { line + between } else { line }
        } else {
            let ids = fields.iter().map(|(name, _)| name.starts_with("JobID"));
            cells.zip(ids).map(|((cell, width), id)| fill(&cell, width, !id) + " ").collect()
        };
        out.push_str(&line);
        out.push('\n');
    };
    if !asked.has("noheader") {
        add(&|name| name.to_owned());
        if !asked.has("parsable2") && !asked.has("parsable") {
            add(&|name| "-".repeat(fields.iter().find(|(known, _)| *known == name).map_or(0, |(_, width)| *width)));
        }
    }
    for job in on.cluster.jobs.values() {
        let chosen = jobs.as_ref().is_none_or(|jobs| jobs.contains(&job.id))
            && listed(&users, &job.asked.user)
            && listed(&names, &job.asked.name)
            && job.counted
            && job.submitted <= as_of
            && from.is_none_or(|from| job.end().is_none_or(|end| end.at >= from));
        if !chosen {
            continue;
        }
        for entry in entries(job, as_of, asked.has("duplicates"), asked.has("allocations")) {
            if listed(&states, entry.state.split(' ').next().unwrap_or_default()) {
                add(&|name| cell(&entry, name, on.now));
            }
        }
    }
    Answer::says(out)
}

/// A value in its column; a `+` for what is cut.
fn fill(value: &str, width: usize, right: bool) -> String {
    if value.chars().count() > width {
        return column(value, width.saturating_sub(1), false) + "+";
    }
    column(value, width, right)
}

/// `now-2hours`, `YYYY-MM-DD` with or without a time.
fn moment(now: Moment, text: &str) -> Option<Moment> {
    if let Some(rest) = text.strip_prefix("now") {
        let rest = rest.strip_prefix('-').unwrap_or("0");
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let count: i64 = rest[..digits].parse().ok()?;
        let unit = match rest[digits..].trim_end_matches('s') {
            "" | "second" => 1,
            "minute" => 60,
            "hour" => 3600,
            "day" => 86_400,
            "week" => 604_800,
            _ => return None,
        };
        return Some(now - count * unit * 1000);
    }
    let text = if text.contains('T') { text.to_owned() } else { format!("{text}T00:00:00") };
    let civil: jiff::civil::DateTime = text.parse().ok()?;
    Some(civil.to_zoned(jiff::tz::TimeZone::system()).ok()?.timestamp().as_millisecond())
}

fn entries(job: &Job, as_of: Moment, earlier: bool, allocations: bool) -> Vec<Entry<'_>> {
    let mut entries = Vec::new();
    if earlier {
        for (run, until) in &job.earlier {
            entries.push(Entry {
                job,
                step: None,
                state: "REQUEUED".to_owned(),
                started: Some(run.started),
                ended: Some(*until),
                nodes: run.nodes.clone(),
                code: (0, 0),
            });
        }
    }
    let run = job.run().filter(|run| run.started <= as_of);
    let end = job.end().filter(|end| end.at <= as_of);
    let state = match (end, run) {
        (Some(end), _) => match end.by {
            Some(uid) if job.shown.is_none() => format!("CANCELLED by {uid}"),
            _ => job.shown.clone().unwrap_or_else(|| end.state.word().to_owned()),
        },
        (None, Some(_)) => job.shown.clone().unwrap_or_else(|| "RUNNING".to_owned()),
        (None, None) => match &job.phase {
            Phase::Waiting { held: Some(_), .. } if job.restarts > 0 => "REQUEUED".to_owned(),
            _ => "PENDING".to_owned(),
        },
    };
    let entry = |step: Option<String>, state: String, code| Entry {
        job,
        step,
        state,
        started: run.map(|run| run.started).or_else(|| end.filter(|_| job.restarts > 0).map(|end| end.at)),
        ended: end.map(|end| end.at),
        nodes: run.map(|run| run.nodes.clone()).unwrap_or_default(),
        code,
    };
    // A signal that ended a script is told of its step; a cancelled or timed out allocation has none.
    let code = end.map_or((0, 0), |end| (end.status, if end.state.word() == "FAILED" { end.signal } else { 0 }));
    entries.push(entry(None, state.clone(), code));
    if !allocations && run.is_some() {
        let inner = end.map_or((0, 0), |end| (end.status, end.signal));
        let state = if state.starts_with("CANCELLED") { "CANCELLED".to_owned() } else { state };
        entries.push(entry(Some("batch".to_owned()), state.clone(), inner));
        entries.extend((0..job.steps.len()).map(|step| entry(Some(step.to_string()), state.clone(), inner)));
    }
    entries
}

fn cell(entry: &Entry<'_>, name: &str, now: Moment) -> String {
    let job = entry.job;
    let asked = &job.asked;
    let whole = entry.step.is_none();
    let seconds = match (entry.started, entry.ended) {
        (Some(start), Some(end)) => u64::try_from((end - start) / 1000).unwrap_or(0),
        (Some(start), None) => u64::try_from((now - start) / 1000).unwrap_or(0),
        _ => 0,
    };
    let when = |at: Option<Moment>| at.map_or_else(|| "Unknown".to_owned(), text::moment);
    let only_whole = |text: String| if whole { text } else { String::new() };
    match name {
        "JobID" | "JobIDRaw" => match &entry.step {
            Some(step) => format!("{}.{step}", job.id),
            None => job.id.to_string(),
        },
        "JobName" => match entry.step.as_deref() {
            None => asked.name.clone(),
            Some("batch") => "batch".to_owned(),
            Some(step) => step.parse().ok().and_then(|step: usize| job.steps.get(step).cloned()).unwrap_or_default(),
        },
        "Partition" => only_whole(asked.partition.clone()),
        "Account" => asked.account.clone(),
        "QOS" => only_whole(asked.qos.clone()),
        "AllocCPUS" if entry.step.as_deref() == Some("batch") => "8".to_owned(),
        "AllocCPUS" => (entry.nodes.len() * 8).to_string(),
        "AllocNodes" => entry.nodes.len().to_string(),
        "State" => entry.state.clone(),
        "ExitCode" => format!("{}:{}", entry.code.0, entry.code.1),
        "DerivedExitCode" => only_whole("0:0".to_owned()),
        "Submit" => text::moment(job.submitted),
        "Eligible" => text::moment(job.eligible),
        "Start" if entry.started.is_none() && entry.ended.is_some() => "None".to_owned(),
        "Start" => when(entry.started),
        "End" => when(entry.ended),
        "Elapsed" => text::long_span(seconds),
        "ElapsedRaw" => seconds.to_string(),
        "Timelimit" => only_whole(asked.seconds.map_or_else(|| "UNLIMITED".to_owned(), text::long_span)),
        "TimelimitRaw" => only_whole(asked.seconds.map_or_else(|| "UNLIMITED".to_owned(), |s| (s / 60).to_string())),
        "NNodes" => match entry.step.as_deref() {
            Some("batch") => "1".to_owned(),
            _ if entry.nodes.is_empty() => asked.nodes.to_string(),
            _ => entry.nodes.len().to_string(),
        },
        "NodeList" if entry.nodes.is_empty() => "None assigned".to_owned(),
        "NodeList" => text::compress(&entry.nodes),
        "User" => only_whole(asked.user.clone()),
        "UID" => only_whole(asked.uid.to_string()),
        "Cluster" => crate::fake_slurm::CLUSTER.to_owned(),
        "Reason" => "None".to_owned(),
        "Comment" => only_whole(asked.comment.clone()),
        "WorkDir" => only_whole(asked.directory.clone()),
        _ => String::new(),
    }
}
