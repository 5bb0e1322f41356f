//! What `scontrol show` prints of a job, a partition and a node: pairs in Slurm's order, which differs by version.

use super::Context;
use super::squeue::{ends, starts};
use crate::fake_slurm::model::{Job, Node, Partition, Phase};
use crate::fake_slurm::settings::Dialect;
use crate::fake_slurm::{launch, scheduler, text, user};

/// Pairs of a record.
pub(crate) type Pairs = Vec<(&'static str, String)>;

/// A record as it is printed.
pub(crate) fn record(pairs: &Pairs, one_line: bool) -> String {
    let mut out = String::new();
    for (index, (key, value)) in pairs.iter().enumerate() {
        if index > 0 {
            out.push_str(if one_line { " " } else { "\n   " });
        }
        out.push_str(key);
        out.push('=');
        out.push_str(value);
    }
    out.push_str(if one_line { "\n" } else { "\n\n" });
    out
}

pub(crate) fn job(on: &Context<'_>, job: &Job) -> Pairs {
    let asked = &job.asked;
    let dialect = on.settings.dialect;
    let waits = matches!(job.phase, Phase::Waiting { .. });
    let or_null = |text: &str| if text.is_empty() { "(null)".to_owned() } else { text.to_owned() };
    let when = |at: Option<i64>| at.map_or_else(|| "Unknown".to_owned(), text::moment);
    let nodes = job.run().map(|run| run.nodes.clone()).unwrap_or_default();
    let first = nodes.first().cloned().unwrap_or_default();
    let (status, signal) = job.end().map_or((0, 0), |end| (end.status, end.signal));
    let path = |pattern: Option<&String>| {
        let pattern = pattern.map_or("slurm-%j.out", String::as_str);
        launch::output_path(job, pattern, std::path::Path::new(&asked.directory), &first).display().to_string()
    };
    // What has not started counts one processor on each node, and the memory of the nodes.
    let cpus = if nodes.is_empty() { asked.nodes } else { asked.nodes * 8 };
    let memory = if nodes.is_empty() && dialect > Dialect::V20 { mem(asked.nodes) } else { String::new() };
    let tres = format!("cpu={cpus},{memory}node={},billing={cpus}", asked.nodes);
    let asked_tres = format!("cpu={0},{1}node={0},billing={0}", asked.nodes, mem(asked.nodes));
    let unheard = !job.counted;
    let begins_later = match &job.phase {
        Phase::Waiting { held, reason } => held.is_some() || reason == "BeginTime",
        _ => false,
    };
    let suspended = job.run().and_then(|run| run.suspended);
    let mut pairs: Pairs = vec![
        ("JobId", job.id.to_string()),
        ("JobName", asked.name.clone()),
        ("UserId", format!("{}({})", asked.user, asked.uid)),
        ("GroupId", format!("{}({})", user::group(asked.gid), asked.gid)),
        ("MCS_label", "N/A".to_owned()),
        (
            "Priority",
            if job.reason() == "JobHeldUser" { "0".to_owned() } else { (u32::MAX - 800 - job.id).to_string() },
        ),
        ("Nice", "0".to_owned()),
        ("Account", or_null(&asked.account)),
        ("QOS", or_null(&asked.qos)),
        ("JobState", job.state().to_owned()),
        ("Reason", job.reason().replace(' ', "_")),
        (
            "Dependency",
            match (waits, asked.after_ok.as_slice()) {
                (true, [_, ..]) => {
                    asked.after_ok.iter().map(|id| format!("afterok:{id}(unfulfilled)")).collect::<Vec<_>>().join(",")
                }
                _ => "(null)".to_owned(),
            },
        ),
        ("Requeue", u8::from(asked.requeue).to_string()),
        ("Restarts", job.restarts.to_string()),
        ("BatchFlag", "1".to_owned()),
        ("Reboot", "0".to_owned()),
        ("ExitCode", format!("{status}:{signal}")),
        ("RunTime", text::long_span(job.ran(on.now))),
        ("TimeLimit", asked.seconds.map_or_else(|| "UNLIMITED".to_owned(), text::long_span)),
        ("TimeMin", "N/A".to_owned()),
        ("SubmitTime", text::moment(job.submitted)),
        ("EligibleTime", when((!unheard).then_some(job.eligible))),
        ("AccrueTime", when((!unheard && !begins_later).then_some(job.eligible))),
        ("StartTime", when(starts(on, job))),
        ("EndTime", when(ends(on, job))),
        ("Deadline", "N/A".to_owned()),
        ("SuspendTime", suspended.map_or_else(|| "None".to_owned(), text::moment)),
        ("SecsPreSuspend", "0".to_owned()),
        ("LastSchedEval", text::moment(on.now)),
    ];
    if dialect == Dialect::V24
        && job.state() == "NODE_FAIL"
        && let Some(at) = pairs.iter().position(|(key, _)| *key == "Dependency")
    {
        let failed = nodes.iter().find(|name| on.cluster.node(name).is_some_and(|node| node.down));
        pairs.insert(at, ("FailedNode", failed.cloned().unwrap_or_default()));
    }
    if dialect > Dialect::V20 {
        pairs.push(("Scheduler", "Main".to_owned()));
    }
    pairs.extend([
        ("Partition", asked.partition.clone()),
        ("AllocNode:Sid", format!("{}:{}", asked.from.0, asked.from.1)),
        ("ReqNodeList", or_null(&text::compress(&asked.node_list))),
        ("ExcNodeList", "(null)".to_owned()),
        (
            "NodeList",
            if nodes.is_empty() && dialect == Dialect::V20 { "(null)".to_owned() } else { text::compress(&nodes) },
        ),
    ]);
    let before = job.earlier.last().filter(|_| dialect == Dialect::V20).and_then(|(run, _)| run.nodes.first());
    if let Some(host) = nodes.first().or(before) {
        pairs.push(("BatchHost", host.clone()));
    }
    pairs.extend([
        (
            "NumNodes",
            match dialect {
                // A range, until it has had its nodes.
                Dialect::V24 if waits && job.restarts == 0 => format!("{0}-{0}", asked.nodes),
                _ => asked.nodes.to_string(),
            },
        ),
        ("NumCPUs", cpus.to_string()),
        (
            "NumTasks",
            if unheard && job.is_over() && dialect > Dialect::V20 { "N/A".to_owned() } else { job.tasks().to_string() },
        ),
        ("CPUs/Task", "1".to_owned()),
        ("ReqB:S:C:T", "0:0:*:*".to_owned()),
    ]);
    if dialect == Dialect::V24 {
        pairs.extend([
            ("ReqTRES", asked_tres),
            ("AllocTRES", if nodes.is_empty() { "(null)".to_owned() } else { tres }),
        ]);
    } else {
        pairs.push(("TRES", tres));
    }
    pairs.extend([
        ("Socks/Node", "*".to_owned()),
        ("NtasksPerN:B:S:C", format!("{}:0:*:*", asked.tasks_per_node.unwrap_or(0))),
        ("CoreSpec", "*".to_owned()),
        ("MinCPUsNode", asked.tasks_per_node.unwrap_or(1).to_string()),
        ("MinMemoryNode", "0".to_owned()),
        ("MinTmpDiskNode", "0".to_owned()),
        ("Features", or_null(asked.constraint.as_deref().unwrap_or_default())),
        ("DelayBoot", "00:00:00".to_owned()),
        ("OverSubscribe", "NO".to_owned()),
        ("Contiguous", "0".to_owned()),
        ("Licenses", "(null)".to_owned()),
        ("Network", "(null)".to_owned()),
        ("Command", or_null(&asked.command)),
        ("WorkDir", asked.directory.clone()),
    ]);
    if !asked.comment.is_empty() {
        // With a blank behind it, as Slurm prints it.
        pairs.push(("Comment", format!("{} ", asked.comment)));
    }
    pairs.extend([
        ("StdErr", path(asked.error.as_ref().or(asked.output.as_ref()))),
        ("StdIn", "/dev/null".to_owned()),
        ("StdOut", path(asked.output.as_ref())),
    ]);
    match dialect {
        // A blank behind the last one, but where it is no pair.
        Dialect::V20 => pairs.push(("Power", " NtasksPerTRES:0".to_owned())),
        Dialect::V22 => pairs.push(("Power", " ".to_owned())),
        Dialect::V24 => pairs.iter_mut().last().into_iter().for_each(|(_, value)| value.push(' ')),
    }
    pairs
}

/// The memory of so many nodes, in the unit that Slurm chooses.
fn mem(nodes: u32) -> String {
    match nodes {
        1 => "mem=16000M,".to_owned(),
        more => format!("mem={:.2}G,", f64::from(more) * 16_000.0 / 1024.0),
    }
}

pub(crate) fn partition(partition: &Partition) -> Pairs {
    let limit = |seconds: Option<u64>| seconds.map_or_else(|| "UNLIMITED".to_owned(), text::long_span);
    vec![
        ("PartitionName", partition.name.clone()),
        ("AllowGroups", "ALL".to_owned()),
        ("AllowAccounts", "ALL".to_owned()),
        ("AllowQos", "ALL".to_owned()),
        ("Default", if partition.default { "YES" } else { "NO" }.to_owned()),
        ("DefaultTime", partition.default_seconds.map_or_else(|| "NONE".to_owned(), text::long_span)),
        ("MaxNodes", "UNLIMITED".to_owned()),
        ("MaxTime", limit(partition.max_seconds)),
        ("MinNodes", "0".to_owned()),
        ("Nodes", text::compress(&partition.nodes)),
        ("OverSubscribe", "EXCLUSIVE".to_owned()),
        ("State", if partition.up { "UP" } else { "DOWN" }.to_owned()),
        ("TotalCPUs", (partition.nodes.len() * 8).to_string()),
        ("TotalNodes", partition.nodes.len().to_string()),
    ]
}

pub(crate) fn node(on: &Context<'_>, node: &Node) -> Pairs {
    let state = scheduler::node_state(on.cluster, &node.name, on.settings, on.now).to_uppercase();
    vec![
        ("NodeName", node.name.clone()),
        ("CPUTot", "8".to_owned()),
        ("Gres", "gpu:8".to_owned()),
        ("NodeAddr", node.name.clone()),
        ("NodeHostName", node.name.clone()),
        ("RealMemory", "16000".to_owned()),
        ("State", state),
    ]
}
