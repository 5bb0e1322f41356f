//! `sbatch`

use std::fs;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use anyhow::Context as _;

use super::Context;
use crate::fake_slurm::answer::Answer;
use crate::fake_slurm::model::{Asked, EarlySignal, Held, Job, Phase};
use crate::fake_slurm::options::{Opt, Parsed, flag, may, parse, with};
use crate::fake_slurm::settings::Dialect;
use crate::fake_slurm::{processes, text, user};

const OPTIONS: &[Opt] = &[
    with("account", Some('A')),
    with("begin", Some('b')),
    with("chdir", Some('D')),
    with("comment", None),
    with("constraint", Some('C')),
    with("cpus-per-task", Some('c')),
    with("dependency", Some('d')),
    with("error", Some('e')),
    with("export", None),
    with("gpus", Some('G')),
    with("gpus-per-node", None),
    with("gres", None),
    with("input", Some('i')),
    with("job-name", Some('J')),
    with("mail-type", None),
    with("mail-user", None),
    with("mem", None),
    with("mem-per-cpu", None),
    with("nodelist", Some('w')),
    with("nodes", Some('N')),
    with("ntasks", Some('n')),
    with("ntasks-per-node", None),
    with("open-mode", None),
    with("output", Some('o')),
    with("partition", Some('p')),
    with("qos", Some('q')),
    with("reservation", None),
    with("signal", None),
    with("time", Some('t')),
    with("wrap", None),
    may("exclusive", None),
    flag("hold", Some('H')),
    flag("no-requeue", None),
    flag("parsable", None),
    flag("quiet", Some('Q')),
    flag("requeue", None),
    flag("test-only", None),
    flag("verbose", Some('v')),
    flag("version", Some('V')),
];

/// A script and what it asks for.
struct Script {
    text: Vec<u8>,
    path: String,
    options: Vec<String>,
}

pub(crate) fn run(on: &mut Context<'_>, args: &[String]) -> anyhow::Result<Answer> {
    let line = match parse("sbatch", OPTIONS, args, false) {
        Ok(line) => line,
        Err(error) => return Ok(usage(&error)),
    };
    if line.has("version") {
        return Ok(on.version());
    }
    let script = match script(&line)? {
        Ok(script) => script,
        Err(refused) => return Ok(refused),
    };
    let mut asked = match parse("sbatch", OPTIONS, &script.options, true) {
        Ok(asked) => asked,
        Err(error) => return Ok(usage(&error)),
    };
    let arguments: Vec<String> = line.rest.iter().skip(1).cloned().collect();
    let quiet = line.has("parsable");
    // The command line wins over the script.
    asked.options.extend(line.options);
    let (asked, begin) = match understood(on, &asked, &script) {
        Ok(understood) => understood,
        Err(why) => return Ok(Answer::fail(255, why)),
    };
    if let Err(why) = permitted(on, &asked) {
        return Ok(Answer::fail(1, why));
    }
    submit(on, asked, begin, &script, &arguments, quiet, &line_flags(&script, args))
}

/// What sbatch itself refuses ends it with -1.
fn usage(error: &str) -> Answer {
    Answer { status: 255, ..Answer::usage("sbatch", error) }
}

struct Flags {
    test_only: bool,
}

fn line_flags(script: &Script, args: &[String]) -> Flags {
    let all = script.options.iter().chain(args);
    Flags { test_only: all.into_iter().any(|arg| arg == "--test-only") }
}

/// Reads the script, and the options in its head.
fn script(line: &Parsed) -> anyhow::Result<Result<Script, Answer>> {
    let refuse = |why: &str| Ok(Err(Answer::fail(1, why)));
    let (text, path) = if let Some(command) = line.get("wrap") {
        (format!("#!/bin/sh\n# This script was created by sbatch --wrap.\n\n{command}\n").into_bytes(), String::new())
    } else if let Some(path) = line.rest.first() {
        match fs::read(path) {
            Ok(text) => (text, std::path::absolute(path)?.display().to_string()),
            Err(_) => return refuse(&format!("sbatch: error: Unable to open file {path}\n")),
        }
    } else {
        let mut text = Vec::new();
        std::io::stdin().read_to_end(&mut text).context("failed to read the script")?;
        (text, String::new())
    };
    if text.is_empty() {
        return refuse("sbatch: error: Batch script is empty!\n");
    }
    if text.trim_ascii().is_empty() {
        return refuse("sbatch: error: Batch script contains only whitespace!\n");
    }
    if !text.starts_with(b"#!") {
        return refuse(
            "sbatch: error: This does not look like a batch script.  The first\n\
             sbatch: error: line must start with #! followed by the path to an interpreter.\n\
             sbatch: error: For instance: #!/bin/sh\n",
        );
    }
    if text.contains(&0) {
        return refuse(
            "sbatch: error: The Slurm controller does not allow scripts that\n\
             sbatch: error: contain a NULL character '\\0'.\n",
        );
    }
    if text.windows(2).any(|pair| pair == b"\r\n") {
        return refuse(
            "sbatch: error: Batch script contains DOS line breaks (\\r\\n)\n\
             sbatch: error: instead of expected UNIX line breaks (\\n).\n",
        );
    }
    let mut options = Vec::new();
    for line in String::from_utf8_lossy(&text).lines() {
        if let Some(rest) = line.strip_prefix("#SBATCH") {
            options.extend(words(rest));
        } else if !line.starts_with('#') && !line.trim().is_empty() {
            break;
        }
    }
    Ok(Ok(Script { text, path, options }))
}

/// The words of an `#SBATCH` line: blanks part them, quotes keep them together, `#` ends the line.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(open), _) if c == open => quote = None,
            (None | Some('"'), '\\') => word.get_or_insert_default().extend(chars.next()),
            (None, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, '#') if word.is_none() => break,
            (None, _) if c.is_whitespace() => words.extend(word.take()),
            (_, _) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// What the options mean, and how long the job waits before it may start.
fn understood(on: &Context<'_>, options: &Parsed, script: &Script) -> Result<(Asked, i64), String> {
    let error = |why: String| format!("sbatch: error: {why}\n");
    let unnamed = || {
        let file = Path::new(&script.path).file_name().map(|name| name.to_string_lossy().into_owned());
        file.unwrap_or_else(|| if options.has("wrap") { "wrap".to_owned() } else { "sbatch".to_owned() })
    };
    let name = options.get("job-name").map_or_else(unnamed, str::to_owned);
    let default = on.cluster.partitions.iter().find(|partition| partition.default);
    let partition = options.get("partition").map(str::to_owned);
    let partition = partition.or_else(|| default.map(|default| default.name.clone())).unwrap_or_default();
    let limit = on.cluster.partition(&partition).and_then(|partition| partition.default_seconds);
    let seconds = match options.get("time") {
        None => limit,
        Some(time) => text::limit(time).ok_or_else(|| error("Invalid --time specification".to_owned()))?,
    };
    let count = |option: &str| -> Result<Option<u32>, String> {
        let Some(value) = options.get(option) else { return Ok(None) };
        let number = value.parse().ok().filter(|number| *number > 0);
        let why = || match option {
            "nodes" => format!("Invalid numeric value \"{value}\" for --nodes."),
            _ => format!("Invalid numeric value \"{value}\" for --{option}."),
        };
        number.map(Some).ok_or_else(|| error(why()))
    };
    let (tasks, tasks_per_node) = (count("ntasks")?, count("ntasks-per-node")?);
    let node_list = options.get("nodelist").map(text::expand).unwrap_or_default();
    let nodes = match options.get("nodes") {
        None => (node_list.len() as u32).max(1),
        Some(value) => value
            .split('-')
            .next()
            .and_then(|least| least.parse().ok())
            .filter(|nodes| *nodes > 0)
            .ok_or_else(|| error(format!("\"{value}\" is not a valid node count")))?,
    };
    let signal = options
        .get("signal")
        .map(|value| signal(value).ok_or_else(|| error("Invalid --signal specification".to_owned())));
    let after_ok = match options.get("dependency") {
        None => Vec::new(),
        Some(value) => value
            .strip_prefix("afterok:")
            .and_then(|jobs| super::ids(jobs.split(':')).ok())
            .ok_or_else(|| error("Batch job submission failed: Job dependency problem".to_owned()))?,
    };
    let begin = match options.get("begin") {
        None => 0,
        Some(value) => begin(value).ok_or_else(|| error(format!("Invalid time specification \"{value}\"")))?,
    };
    let comment = if on.settings.drop_comments { "" } else { options.get("comment").unwrap_or_default() };
    let directory = match options.get("chdir") {
        Some(directory) => std::path::absolute(directory),
        None => std::env::current_dir(),
    };
    let directory = directory.map_err(|why| error(why.to_string()))?;
    let requeue = options.options.iter().rev().find(|(name, _)| matches!(*name, "requeue" | "no-requeue"));
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let first = |named: Option<&str>, default: Option<&String>| {
        named.map(str::to_owned).or_else(|| default.cloned()).unwrap_or_default()
    };
    let asked = Asked {
        name,
        comment: comment.to_owned(),
        user: user::name(uid),
        uid,
        gid,
        account: first(options.get("account"), on.cluster.accounts.first()),
        qos: first(options.get("qos"), on.cluster.qos.first().map(|qos| &qos.name)),
        partition,
        nodes,
        tasks,
        tasks_per_node,
        seconds,
        signal: signal.transpose()?,
        requeue: requeue.is_none_or(|(name, _)| *name == "requeue"),
        hold: options.has("hold"),
        node_list,
        after_ok,
        gres: options.get("gres").map(str::to_owned),
        constraint: options.get("constraint").map(str::to_owned),
        export: options.get("export").map(str::to_owned),
        output: options.get("output").map(str::to_owned),
        error: options.get("error").map(str::to_owned),
        append: options.get("open-mode").is_some_and(|mode| mode.starts_with('a')),
        directory: directory.display().to_string(),
        command: script.path.clone(),
        from: (crate::fake_slurm::HOST.to_owned(), std::process::id()),
    };
    Ok((asked, begin))
}

fn signal(value: &str) -> Option<EarlySignal> {
    let (flags, rest) = value.split_once(':').map_or(("", value), |(flags, rest)| (flags, rest));
    let (name, seconds) = rest.split_once('@').map_or((rest, "60"), |(name, seconds)| (name, seconds));
    if !flags.chars().all(|flag| matches!(flag, 'B' | 'R')) {
        return None;
    }
    let number = processes::signal_number(name)?;
    Some(EarlySignal { batch: flags.contains('B'), number, seconds: seconds.parse().ok()? })
}

/// Seconds of `now+1hour` and its like; other forms are not understood.
fn begin(value: &str) -> Option<i64> {
    let rest = value.strip_prefix("now")?;
    if rest.is_empty() {
        return Some(0);
    }
    let rest = rest.strip_prefix('+')?;
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let count: i64 = rest[..digits].parse().ok()?;
    let unit = match rest[digits..].trim_end_matches('s') {
        "" | "second" => 1,
        "minute" => 60,
        "hour" => 3600,
        "day" => 86_400,
        _ => return None,
    };
    Some(count * unit)
}

/// What the controller says to it.
fn permitted(on: &Context<'_>, asked: &Asked) -> Result<(), String> {
    let failed = |why: &str| Err(format!("sbatch: error: Batch job submission failed: {why}\n"));
    if on.cluster.partition(&asked.partition).is_none() {
        return Err(format!(
            "sbatch: error: invalid partition specified: {}\n\
             sbatch: error: Batch job submission failed: Invalid partition name specified\n",
            asked.partition
        ));
    }
    if !on.cluster.accounts.is_empty() && !on.cluster.accounts.contains(&asked.account) {
        return failed("Invalid account or account/partition combination specified");
    }
    if on.dialect() == Dialect::V24 && asked.after_ok.iter().any(|id| !on.cluster.jobs.contains_key(id)) {
        return failed("Job dependency problem");
    }
    let qos = on.cluster.qos.iter().find(|qos| qos.name == asked.qos);
    if !on.cluster.qos.is_empty() && qos.is_none() {
        return failed("Invalid qos specification");
    }
    if asked.constraint.is_some() {
        return failed("Invalid feature specification");
    }
    if asked.gres.as_ref().is_some_and(|gres| !gres.starts_with("gpu")) {
        return match on.dialect() {
            Dialect::V20 => failed("Invalid generic resource (gres) specification"),
            _ => Err("sbatch: error: Invalid generic resource (gres) specification\n".to_owned()),
        };
    }
    if asked.node_list.iter().any(|name| on.cluster.node(name).is_none()) {
        return failed("Invalid node name specified");
    }
    let over = |most: u64| asked.seconds.is_none_or(|seconds| seconds > most);
    if qos.and_then(|qos| qos.max_seconds).is_some_and(over) {
        return Err("sbatch: error: QOSMaxWallDurationPerJobLimit\n\
                    sbatch: error: Batch job submission failed: Job violates accounting/QOS policy \
                    (job submit limit, user's size and/or time limits)\n"
            .to_owned());
    }
    Ok(())
}

fn submit(
    on: &mut Context<'_>,
    asked: Asked,
    begin: i64,
    script: &Script,
    arguments: &[String],
    parsable: bool,
    flags: &Flags,
) -> anyhow::Result<Answer> {
    if flags.test_only {
        let nodes =
            on.cluster.partition(&asked.partition).map(|partition| partition.nodes.as_slice()).unwrap_or_default();
        let nodes = text::compress(&nodes[..nodes.len().min(asked.nodes as usize)]);
        return Ok(Answer {
            stderr: format!(
                "sbatch: Job {} to start at {} using {} processors on nodes {nodes} in partition {}\n",
                on.cluster.next_job,
                text::moment(on.now),
                8 * asked.nodes,
                asked.partition
            ),
            ..Answer::default()
        });
    }
    let id = on.cluster.next_job;
    on.cluster.next_job += 1;
    // What the job needs is there before anybody hears of it. An id that was lost with a killed sbatch is given out again.
    let dir = on.dir.job(id);
    fs::create_dir_all(&dir)?;
    let mut text = script.text.clone();
    if !arguments.is_empty() {
        // The fake starts the script by its name alone, so its arguments are put into it.
        let quoted: Vec<String> = arguments.iter().map(|one| format!("'{}'", one.replace('\'', "'\\''"))).collect();
        let head = text.iter().position(|byte| *byte == b'\n').map_or(text.len(), |at| at + 1);
        text.splice(head..head, format!("set -- {}\n", quoted.join(" ")).into_bytes());
    }
    fs::write(dir.join("script"), &text)?;
    fs::set_permissions(dir.join("script"), fs::Permissions::from_mode(0o700))?;
    fs::write(dir.join("environment"), exported(asked.export.as_deref()))?;
    let eligible = on.now + begin * 1000;
    let held = asked.hold.then_some(Held::User);
    let reason = if held.is_some() { "JobHeldUser" } else { "None" };
    let phase = Phase::Waiting { reason: reason.to_owned(), held };
    let job = Job {
        id,
        asked,
        submitted: on.now,
        eligible,
        phase,
        restarts: 0,
        steps: Vec::new(),
        counted: false,
        earlier: Vec::new(),
        shown: None,
    };
    let never = on.dialect() == Dialect::V24
        && on.cluster.partition(&job.asked.partition).is_some_and(|one| job.asked.nodes as usize > one.nodes.len());
    on.cluster.jobs.insert(id, job);
    if never {
        // Refused, and yet there is a job, which fails as soon as the controller looks at it.
        let why = "Batch job submission failed: Requested node configuration is not available";
        return Ok(Answer::fail(1, format!("sbatch: error: {why}\n")));
    }
    Ok(Answer::says(if parsable { format!("{id}\n") } else { format!("Submitted batch job {id}\n") }))
}

/// The variables that a job takes along, ended by NUL each.
fn exported(export: Option<&str>) -> Vec<u8> {
    let all: Vec<(Vec<u8>, Vec<u8>)> = std::env::vars_os()
        .filter(|(name, _)| name != "FAKE_SLURM_DIR")
        .map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()))
        .collect();
    let mut kept = Vec::new();
    let mut keep = |name: &[u8], value: &[u8]| kept.extend([name, b"=", value, b"\0"].concat());
    let words: Vec<&str> = export.unwrap_or("ALL").split(',').collect();
    let everything = words.iter().any(|word| word.eq_ignore_ascii_case("ALL"));
    for (name, value) in &all {
        // Slurm's own variables always travel.
        if everything || name.starts_with(b"SLURM_") || words.iter().any(|word| word.as_bytes() == name) {
            keep(name, value);
        }
    }
    for word in words {
        if let Some((name, value)) = word.split_once('=') {
            keep(name.as_bytes(), value.as_bytes());
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_script_are_split_as_sbatch_does() {
        assert_eq!(
            words(r#" --comment="a b" -J 'c "d"' --nodes=2 # the rest"#),
            ["--comment=a b", "-J", "c \"d\"", "--nodes=2"]
        );
    }

    #[test]
    fn signals_are_read() {
        assert_eq!(signal("TERM@60"), Some(EarlySignal { batch: false, number: 15, seconds: 60 }));
        assert_eq!(signal("B:USR1@120"), Some(EarlySignal { batch: true, number: 10, seconds: 120 }));
        assert_eq!((signal("NOPE@60"), signal("X:TERM@60")), (None, None));
        assert_eq!((begin("now+1hour"), begin("now+90"), begin("noon")), (Some(3600), Some(90), None));
    }
}
