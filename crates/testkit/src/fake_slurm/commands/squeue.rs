//! `squeue`

use super::{Context, ids};
use crate::fake_slurm::answer::Answer;
use crate::fake_slurm::model::{Job, Moment, Phase, ms};
use crate::fake_slurm::options::{Opt, flag, parse, with};
use crate::fake_slurm::settings::Dialect;
use crate::fake_slurm::text::{self, Piece, column};
use crate::fake_slurm::user;

const OPTIONS: &[Opt] = &[
    with("account", Some('A')),
    with("format", Some('o')),
    with("jobs", Some('j')),
    with("name", Some('n')),
    with("nodelist", Some('w')),
    with("partition", Some('p')),
    with("qos", Some('q')),
    with("sort", Some('S')),
    with("states", Some('t')),
    with("user", Some('u')),
    flag("all", Some('a')),
    flag("array", Some('r')),
    flag("long", Some('l')),
    flag("me", None),
    flag("noheader", Some('h')),
    flag("version", Some('V')),
];

const DEFAULT: &str = "%.18i %.9P %.8j %.8u %.2t %.10M %.6D %R";
const LONG: &str = "%.18i %.9P %.8j %.8u %.8T %.10M %.9l %.6D %R";

/// Long and short names of the states, in Slurm's order.
pub(crate) const STATES: &[(&str, &str)] = &[
    ("PENDING", "PD"),
    ("RUNNING", "R"),
    ("SUSPENDED", "S"),
    ("COMPLETED", "CD"),
    ("CANCELLED", "CA"),
    ("FAILED", "F"),
    ("TIMEOUT", "TO"),
    ("NODE_FAIL", "NF"),
    ("PREEMPTED", "PR"),
    ("BOOT_FAIL", "BF"),
    ("DEADLINE", "DL"),
    ("OUT_OF_MEMORY", "OOM"),
    ("COMPLETING", "CG"),
    ("CONFIGURING", "CF"),
    ("RESIZING", "RS"),
    ("RESV_DEL_HOLD", "RD"),
    ("REQUEUED", "RQ"),
    ("REQUEUE_FED", "RF"),
    ("REQUEUE_HOLD", "RH"),
    ("REVOKED", "RV"),
    ("SIGNALING", "SI"),
    ("SPECIAL_EXIT", "SE"),
    ("STAGE_OUT", "SO"),
    ("STOPPED", "ST"),
];

pub(crate) fn run(on: &Context<'_>, args: &[String]) -> Answer {
    let asked = match parse("squeue", OPTIONS, args, true) {
        Ok(asked) => asked,
        Err(error) => return Answer::usage("squeue", &error),
    };
    if asked.has("version") {
        return on.version();
    }
    if let Some(word) = asked.rest.first() {
        return Answer::fail(1, format!("squeue: error: Unrecognized option: {word}\n"));
    }
    let states = asked.list("states").unwrap_or_default();
    let every = states.iter().any(|state| state.eq_ignore_ascii_case("all"));
    for state in &states {
        if !every
            && !STATES.iter().any(|(long, short)| state.eq_ignore_ascii_case(long) || state.eq_ignore_ascii_case(short))
        {
            return Answer::fail(1, bad_state(on.dialect(), state));
        }
    }
    let jobs = match asked.list("jobs").map(|list| ids(list.iter().map(String::as_str))) {
        None => None,
        Some(Ok(jobs)) => Some(jobs),
        Some(Err(_)) => return Answer::fail(1, "squeue: error: Invalid job id specified\n"),
    };
    let known: Vec<&Job> = on.cluster.known(on.now, on.settings.min_job_age_s).collect();
    if let Some([one]) = jobs.as_deref()
        && !known.iter().any(|job| job.id == *one)
    {
        return Answer::fail(1, "slurm_load_jobs error: Invalid job id specified\n");
    }
    let users =
        if asked.has("me") { Some(vec![user::name(rustix::process::getuid().as_raw())]) } else { asked.list("user") };
    let (names, partitions) = (asked.list("name"), asked.list("partition"));
    let fits = |job: &Job| {
        let listed = |list: &Option<Vec<String>>, value: &str| {
            list.as_ref().is_none_or(|list| list.iter().any(|one| one == value))
        };
        let state = job.state();
        let short = short(state);
        // What has ended is listed only when it is asked for.
        let by_state = if states.is_empty() {
            !job.is_over()
        } else {
            every || states.iter().any(|one| one.eq_ignore_ascii_case(state) || one.eq_ignore_ascii_case(short))
        };
        by_state
            && jobs.as_ref().is_none_or(|jobs| jobs.contains(&job.id))
            && listed(&users, &job.asked.user)
            && listed(&names, &job.asked.name)
            && listed(&partitions, &job.asked.partition)
    };
    let mut chosen: Vec<&Job> = known.into_iter().filter(|job| fits(job)).collect();
    // Slurm's usual order: by partition and state, waiting ones before running ones.
    chosen.sort_by_key(|job| (job.asked.partition.clone(), order(job), std::cmp::Reverse(job.id)));
    if asked.get("sort") == Some("i") {
        chosen.sort_by_key(|job| job.id);
    }
    let format = asked.get("format").unwrap_or(if asked.has("long") { LONG } else { DEFAULT });
    let pieces = text::pieces(format);
    let mut out = String::new();
    if asked.has("long") && !asked.has("format") {
        out.push_str(&text::day(on.now));
    }
    if !asked.has("noheader") {
        match line(&pieces, |letter| header(letter).map(str::to_owned)) {
            Ok(header) => out.push_str(&header),
            Err(letter) => return unknown(letter),
        }
    }
    for job in chosen {
        match line(&pieces, |letter| field(on, job, letter)) {
            Ok(line) => out.push_str(&line),
            Err(letter) => return unknown(letter),
        }
    }
    Answer::says(out)
}

fn bad_state(dialect: Dialect, state: &str) -> String {
    // The oldest one did not name them all.
    let unnamed = ["RESV_DEL_HOLD", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SIGNALING", "STAGE_OUT", "STOPPED"];
    let named = STATES.iter().map(|(long, _)| *long).filter(|long| dialect > Dialect::V20 || !unnamed.contains(long));
    let mut known = named.collect::<Vec<_>>().join(",");
    if dialect == Dialect::V24 {
        known.make_ascii_lowercase();
    }
    format!("squeue: error: Invalid job state specified: {state}\nsqueue: error: Valid job states include: {known}\n\n")
}

fn unknown(letter: char) -> Answer {
    // Slurm has more columns than this fake; what it cannot answer it must not invent.
    Answer::fail(1, format!("squeue: error: Invalid job format specification: {letter}\n"))
}

fn order(job: &Job) -> usize {
    STATES.iter().position(|(long, _)| *long == job.state()).unwrap_or(STATES.len())
}

/// The short name of a state.
pub(crate) fn short(state: &str) -> &str {
    STATES.iter().find(|(long, _)| *long == state).map_or(state, |(_, short)| *short)
}

/// One line of a format.
pub(crate) fn line(pieces: &[Piece], value: impl Fn(char) -> Option<String>) -> Result<String, char> {
    let mut line = String::new();
    for piece in pieces {
        match piece {
            Piece::Text(text) => line.push_str(text),
            Piece::Field { letter, width, right } => {
                let value = value(*letter).ok_or(*letter)?;
                // Spans of time are never cut.
                let width = if *width > 0 && "lLM".contains(*letter) && value.starts_with(|c: char| c.is_ascii_digit())
                {
                    value.len().max(*width)
                } else {
                    *width
                };
                line.push_str(&column(&value, width, *right));
            }
        }
    }
    line.push('\n');
    Ok(line)
}

fn header(letter: char) -> Option<&'static str> {
    Some(match letter {
        'a' => "ACCOUNT",
        'A' | 'i' => "JOBID",
        'B' => "EXEC_HOST",
        'C' => "CPUS",
        'D' => "NODES",
        'e' => "END_TIME",
        'E' => "DEPENDENCY",
        'f' => "FEATURES",
        'j' => "NAME",
        'k' => "COMMENT",
        'l' => "TIME_LIMIT",
        'L' => "TIME_LEFT",
        'M' => "TIME",
        'n' => "REQ_NODES",
        'N' => "NODELIST",
        'o' => "COMMAND",
        'P' => "PARTITION",
        'q' => "QOS",
        'r' => "REASON",
        'R' => "NODELIST(REASON)",
        'S' => "START_TIME",
        't' => "ST",
        'T' => "STATE",
        'u' | 'U' => "USER",
        'V' => "SUBMIT_TIME",
        'Z' => "WORK_DIR",
        _ => return None,
    })
}

fn field(on: &Context<'_>, job: &Job, letter: char) -> Option<String> {
    let nodes = || job.run().map(|run| text::compress(&run.nodes)).unwrap_or_default();
    let or_null = |text: &str| if text.is_empty() { "(null)".to_owned() } else { text.to_owned() };
    let waits = matches!(job.phase, Phase::Waiting { .. });
    Some(match letter {
        'a' => or_null(&job.asked.account),
        'A' | 'i' => job.id.to_string(),
        'B' => {
            let before = job.earlier.last().filter(|_| on.dialect() == Dialect::V20).map(|(run, _)| run);
            let run = job.run().or(before);
            run.and_then(|run| run.nodes.first().cloned()).unwrap_or_else(|| "n/a".to_owned())
        }
        'C' => (job.asked.nodes * if waits { 1 } else { 8 }).to_string(),
        'D' => job.asked.nodes.to_string(),
        'e' => ends(on, job).map_or_else(|| "N/A".to_owned(), text::moment),
        'E' if job.asked.after_ok.is_empty() || !waits => "(null)".to_owned(),
        'E' => job.asked.after_ok.iter().map(|id| format!("afterok:{id}(unfulfilled)")).collect::<Vec<_>>().join(","),
        'f' => or_null(job.asked.constraint.as_deref().unwrap_or_default()),
        'j' => job.asked.name.clone(),
        'k' => or_null(&job.asked.comment),
        'l' => job.asked.seconds.map_or_else(|| "UNLIMITED".to_owned(), text::span),
        'L' => match job.asked.seconds {
            None => "UNLIMITED".to_owned(),
            Some(seconds) => {
                let left = seconds.checked_sub(job.ran(on.now));
                left.map_or_else(|| "INVALID".to_owned(), text::span)
            }
        },
        'M' => text::span(job.ran(on.now)),
        'n' => text::compress(&job.asked.node_list),
        'o' => or_null(&job.asked.command),
        'P' => job.asked.partition.clone(),
        'q' => or_null(&job.asked.qos),
        'r' => job.reason().to_owned(),
        'R' if waits || job.is_over() && job.run().is_none() => format!("({})", job.reason()),
        'R' if job.is_over() && job.state() != "COMPLETED" => format!("({})", job.reason()),
        'N' | 'R' => nodes(),
        'S' => starts(on, job).map_or_else(|| "N/A".to_owned(), text::moment),
        't' => short(job.state()).to_owned(),
        'T' => job.state().to_owned(),
        'u' => job.asked.user.clone(),
        'U' => job.asked.uid.to_string(),
        'V' => text::moment(job.submitted),
        'Z' => job.asked.directory.clone(),
        _ => return None,
    })
}

/// When a job started or, as far as that is known, will.
pub(crate) fn starts(on: &Context<'_>, job: &Job) -> Option<Moment> {
    match &job.phase {
        Phase::Waiting { held: None, reason } if matches!(reason.as_str(), "Resources" | "Priority") => {
            // When the last of those that run must be over.
            on.cluster.jobs.values().filter(|job| matches!(job.phase, Phase::Running(_))).filter_map(Job::limit).max()
        }
        Phase::Waiting { .. } => (job.eligible > job.submitted).then_some(job.eligible),
        Phase::Over { run: None, end } => Some(end.at),
        _ => job.run().map(|run| run.started),
    }
}

/// When a job ended or must end.
pub(crate) fn ends(on: &Context<'_>, job: &Job) -> Option<Moment> {
    let must = || Some(starts(on, job)? + ms(job.asked.seconds?));
    job.end().map(|end| end.at).or_else(must)
}
