//! What the controller decides, as a function of the stored state, the time and what it sees of the processes. It does nothing
//! itself: what has to be done to processes is returned.

use std::collections::BTreeMap;

use super::model::{Admin, Asked, Cluster, End, Final, Held, Job, Moment, Phase, Run, Then, Truth, ms};
use super::settings::{Dialect, Settings};

/// What is seen of a job that is on nodes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Seen {
    /// How its script ended: status and signal.
    pub(crate) script: Option<(i32, i32)>,
    /// What waits for the script is gone without a word.
    pub(crate) deserted: bool,
    /// Living processes of the present run on nodes that answer.
    pub(crate) alive: bool,
}

/// What has to be done to processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Start the script of a job on its first node.
    Start(u32),
    /// Signal what a job's present run has on nodes that answer.
    Signal { job: u32, who: Who, number: i32 },
    /// Kill everything on a node, and with `keep` spare what this run of a job has there.
    Clear { node: String, keep: Option<(u32, u32)> },
}

/// Which processes of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    /// The script only.
    Script,
    /// The tasks of its steps only.
    Steps,
    /// Both.
    All,
}

const TERM: i32 = 15;
const KILL: i32 = 9;

/// Brings the cluster up to date.
pub(crate) fn advance(
    cluster: &mut Cluster,
    settings: &Settings,
    now: Moment,
    seen: &BTreeMap<u32, Seen>,
) -> Vec<Action> {
    let mut actions = Vec::new();
    nodes(cluster, settings, now, &mut actions);
    for job in cluster.jobs.values_mut() {
        one(job, settings, now, seen.get(&job.id).copied().unwrap_or_default(), &mut actions);
    }
    start(cluster, settings, now, &mut actions);
    actions
}

/// Whether a node answers the controller.
pub(crate) fn answers(cluster: &Cluster, name: &str) -> bool {
    cluster.node(name).is_some_and(|node| node.truth == Truth::Fine)
}

fn nodes(cluster: &mut Cluster, settings: &Settings, now: Moment, actions: &mut Vec<Action>) {
    let mut lost = Vec::new();
    for node in &mut cluster.nodes {
        let age = now - node.since;
        let was_down = node.down;
        node.down = match node.truth {
            Truth::Fine => false,
            Truth::Lost | Truth::Cut => was_down || age >= ms(settings.slurmd_timeout_s),
        };
        if node.down && !was_down {
            lost.push(node.name.clone());
        }
        if node.truth == Truth::Lost {
            actions.push(Action::Clear { node: node.name.clone(), keep: None });
        }
    }
    for job in cluster.jobs.values_mut() {
        let Phase::Running(run) = &job.phase else { continue };
        if !run.nodes.iter().any(|name| lost.contains(name)) {
            continue;
        }
        let then = if job.asked.requeue {
            Then::Again(None)
        } else {
            Then::Over(End {
                state: Final::NodeFail,
                reason: "NodeDown".to_owned(),
                status: 0,
                signal: 0,
                at: now,
                by: None,
            })
        };
        stop(job, then, now, true);
    }
    // What a node still runs of jobs that have left it is ended some time after it is back.
    for node in &cluster.nodes {
        if node.truth == Truth::Fine && now - node.since >= ms(settings.stray_s) && node.since > cluster.clock.made_ms {
            let keep = cluster.on_node(&node.name).and_then(|job| Some((job.id, job.run()?.number)));
            actions.push(Action::Clear { node: node.name.clone(), keep });
        }
    }
}

fn one(job: &mut Job, settings: &Settings, now: Moment, seen: Seen, actions: &mut Vec<Action>) {
    let (id, limit, early) = (job.id, job.limit(), job.asked.signal);
    match &mut job.phase {
        Phase::Running(run) => {
            if let Some((status, signal)) = seen.script.or(seen.deserted.then_some((0, KILL))) {
                let good = status == 0 && signal == 0;
                let end = End {
                    state: if good { Final::Completed } else { Final::Failed },
                    reason: match (good, signal) {
                        (true, _) => "None".to_owned(),
                        (false, 0) => "NonZeroExitCode".to_owned(),
                        (false, signal) => raised(settings.dialect, signal),
                    },
                    status,
                    signal,
                    at: now,
                    by: None,
                };
                stop(job, Then::Over(end), now, true);
            } else if limit.is_some_and(|limit| now >= limit) {
                let end = End {
                    state: Final::Timeout,
                    reason: "TimeLimit".to_owned(),
                    status: 0,
                    signal: TERM,
                    at: now,
                    by: None,
                };
                stop(job, Then::Over(end), now, false);
            } else if let (false, Some(early), Some(limit)) = (run.warned, early, limit)
                && now >= limit - ms(early.seconds)
            {
                run.warned = true;
                let who = if early.batch { Who::Script } else { Who::Steps };
                actions.push(Action::Signal { job: id, who, number: early.number });
            }
        }
        Phase::Ending { then, since, told, killed, run } => {
            if seen.alive {
                *killed |= now - *since >= ms(settings.kill_wait_s);
                if *killed {
                    // Again and again: there may be new ones.
                    actions.push(Action::Signal { job: id, who: Who::All, number: KILL });
                } else if !*told {
                    actions.push(Action::Signal { job: id, who: Who::All, number: TERM });
                }
                *told = true;
                return;
            }
            let run = run.clone();
            job.phase = match then.clone() {
                Then::Over(end) => Phase::Over { run: Some(run), end },
                Then::Again(held) => {
                    job.earlier.push((run, now));
                    job.restarts += 1;
                    job.steps.clear();
                    job.submitted = now;
                    job.eligible = now + ms(settings.requeue_delay_s);
                    let reason = match held {
                        None => "BeginTime",
                        Some(Held::User) => "JobHeldUser",
                        Some(Held::Requeued | Held::Special) => "job requeued in held state",
                    };
                    Phase::Waiting { reason: reason.to_owned(), held }
                }
            };
        }
        Phase::Waiting { .. } | Phase::Over { .. } => {}
    }
}

/// The reason of a job whose script a signal has ended.
fn raised(dialect: Dialect, signal: i32) -> String {
    let name = if signal == KILL { "Killed" } else { "Terminated" };
    match dialect {
        Dialect::V24 => format!("RaisedSignal:{signal}({name})"),
        Dialect::V20 | Dialect::V22 if signal == KILL => "JobLaunchFailure".to_owned(),
        Dialect::V20 | Dialect::V22 => "NonZeroExitCode".to_owned(),
    }
}

/// Begins the end of what a job has on nodes, with SIGTERM first unless it is to be killed. One that waits is over at once.
/// Does nothing to one that is over; one that is being ended to wait again may still become over.
pub(crate) fn stop(job: &mut Job, then: Then, now: Moment, killed: bool) {
    match &mut job.phase {
        Phase::Running(run) => {
            job.phase = Phase::Ending { run: run.clone(), then, since: now, told: false, killed };
        }
        Phase::Waiting { reason, .. } => {
            if let Then::Over(end) = then {
                // Why it waited stays to be seen.
                job.phase = Phase::Over { run: None, end: End { reason: reason.clone(), ..end } };
            }
        }
        Phase::Ending { then: before @ Then::Again(_), .. } => *before = then,
        Phase::Ending { .. } | Phase::Over { .. } => {}
    }
}

fn start(cluster: &mut Cluster, settings: &Settings, now: Moment, actions: &mut Vec<Action>) {
    if cluster.stopped {
        return;
    }
    let mut blocked: Vec<String> = Vec::new();
    let waiting: Vec<u32> =
        cluster.jobs.values().filter(|job| matches!(job.phase, Phase::Waiting { .. })).map(|job| job.id).collect();
    for id in waiting {
        let verdict = verdict(cluster, settings, now, id);
        let Some(job) = cluster.jobs.get_mut(&id) else { continue };
        let unheard = matches!(verdict, Err("JobHeldUser" | "BeginTime" | "Dependency" | "DependencyNeverSatisfied"));
        job.counted |= !unheard;
        let reason = match verdict {
            Ok(nodes) => {
                let run = Run { number: job.restarts, started: now, nodes, warned: false, suspended: None };
                job.phase = Phase::Running(run);
                actions.push(Action::Start(id));
                continue;
            }
            Err("Resources") if blocked.contains(&job.asked.partition) => "Priority",
            Err("Resources") => {
                blocked.push(job.asked.partition.clone());
                "Resources"
            }
            Err("PartitionConfig") if settings.dialect == Dialect::V24 => {
                let reason = "BadConstraints".to_owned();
                let end = End { state: Final::Failed, reason, status: 1, signal: 0, at: now, by: None };
                job.phase = Phase::Over { run: None, end };
                continue;
            }
            Err(reason) => reason,
        };
        let shown = match reason {
            "ReqNodeNotAvail" => format!("ReqNodeNotAvail, UnavailableNodes:{}", job.asked.node_list.join(",")),
            "Blocked" => settings.blocked.clone().unwrap_or_default(),
            other => other.to_owned(),
        };
        if let Phase::Waiting { reason, held: None } = &mut job.phase {
            *reason = shown;
        }
    }
}

/// The nodes that a waiting job may start on, or why it does not start.
fn verdict(cluster: &Cluster, settings: &Settings, now: Moment, id: u32) -> Result<Vec<String>, &'static str> {
    let job = cluster.jobs.get(&id).ok_or("None")?;
    if let Phase::Waiting { held: Some(_), .. } = job.phase {
        return Err("JobHeldUser");
    }
    if now < job.eligible {
        return Err("BeginTime");
    }
    for other in &job.asked.after_ok {
        match cluster.jobs.get(other).and_then(Job::end).map(|end| end.state) {
            Some(Final::Completed) => {}
            None if !cluster.jobs.contains_key(other) => {}
            None => return Err("Dependency"),
            Some(_) => return Err("DependencyNeverSatisfied"),
        }
    }
    let partition = cluster.partition(&job.asked.partition).ok_or("PartitionDown")?;
    if !partition.up {
        return Err("PartitionDown");
    }
    if partition.max_seconds.is_some_and(|most| job.asked.seconds.is_none_or(|seconds| seconds > most)) {
        return Err("PartitionTimeLimit");
    }
    if job.asked.nodes as usize > partition.nodes.len() {
        return Err("PartitionConfig");
    }
    if settings.blocked.is_some() {
        return Err("Blocked");
    }
    if !settings.queue_over(job, now) {
        return Err("Priority");
    }
    let qos = cluster.qos.iter().find(|qos| qos.name == job.asked.qos);
    if qos.and_then(|qos| qos.max_jobs).is_some_and(|most| running(cluster, &job.asked) >= most) {
        return Err("QOSMaxJobsPerUserLimit");
    }
    let usable = |name: &&String| {
        cluster.node(name).is_some_and(|node| node.truth == Truth::Fine && !node.down && node.admin.is_none())
    };
    if job.asked.node_list.iter().any(|name| !usable(&name)) {
        return Err("ReqNodeNotAvail");
    }
    let free = |name: &&String| usable(name) && cluster.on_node(name).is_none();
    let mut nodes: Vec<String> = job.asked.node_list.iter().filter(free).cloned().collect();
    if nodes.len() < job.asked.node_list.len() {
        return Err("Resources");
    }
    let others = partition.nodes.iter().filter(|name| !job.asked.node_list.contains(name)).filter(free);
    nodes.extend(others.take((job.asked.nodes as usize).saturating_sub(nodes.len())).cloned());
    if nodes.len() < job.asked.nodes as usize { Err("Resources") } else { Ok(nodes) }
}

fn running(cluster: &Cluster, asked: &Asked) -> usize {
    let same = |job: &&Job| job.asked.qos == asked.qos && job.asked.uid == asked.uid;
    cluster
        .jobs
        .values()
        .filter(same)
        .filter(|job| matches!(job.phase, Phase::Running(_) | Phase::Ending { .. }))
        .count()
}

impl Settings {
    fn queue_over(&self, job: &Job, now: Moment) -> bool {
        now >= job.submitted + ms(self.queue_s)
    }
}

/// The state of a node as sinfo shows it, in small letters, with `*` when it does not answer.
pub(crate) fn node_state(cluster: &Cluster, name: &str, settings: &Settings, now: Moment) -> String {
    let Some(node) = cluster.node(name) else { return "unknown".to_owned() };
    let busy = cluster.on_node(name);
    let base = match (&node.admin, busy) {
        _ if node.down => "down",
        (Some((Admin::Down, _)), _) => "down",
        (Some((Admin::Drain, _)), Some(_)) => "draining",
        (Some((Admin::Drain, _)), None) => "drained",
        (None, Some(job)) if matches!(job.phase, Phase::Ending { .. }) => "completing",
        (None, Some(_)) => "allocated",
        (None, None) => "idle",
    };
    let silent = node.truth != Truth::Fine && now - node.since >= ms(settings.slurmd_timeout_s) / 2;
    if silent { format!("{base}*") } else { base.to_owned() }
}
