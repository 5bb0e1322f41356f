//! Compares what was asked for, what the events said, what the workers wrote, and what the agents' own ledgers hold.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::bail;
use drover_proto::router::WatchEventsRequest;
use drover_testkit::cluster::{Cluster, DAEMONS};
use serde_json::Value;

use super::disk::{Appended, Written};
use super::killer::Kill;
use super::{KINDS, MAY_FAIL, Place, Plan, Report, Run, Sent};
use crate::subscriber::{Subscriber, View, note};

/// How long the survivors may take to be complete again and to have caught up.
const SETTLE: Duration = Duration::from_secs(30);
/// Events that the router passes on as the workers wrote them.
const PASSED_ON: [&str; 5] = ["turn_started", "assistant_delta", "assistant", "usage", "turn_complete"];

/// Everything that is known when it is over.
struct Facts<'a> {
    plan: &'a Plan,
    sent: &'a [Sent],
    kills: &'a [Kill],
    /// Sequence numbers as the subscriber that resumed saw them.
    subscriber: &'a [u64],
    resumed: u32,
    /// The whole log, read in one go.
    log: &'a View,
    /// What stands in the outboxes.
    written: &'a Written,
    /// How often each prompt was carried out, by the ledgers.
    executed: &'a HashMap<String, usize>,
}

#[derive(Debug, Default)]
struct Verdict {
    violations: Vec<String>,
    completed: usize,
    failed: Vec<String>,
}

pub(crate) async fn judge(
    plan: &Plan,
    run: &Run,
    subscriber: &Subscriber,
    sent: &[Sent],
    kills: &[Kill],
) -> anyhow::Result<Report> {
    let written = settled(run).await?;
    let log = whole_log(&run.cluster).await?;
    let executed = ledgers(&run.cluster)?;
    let (seen, resumed) = {
        let view = subscriber.view();
        (view.seqs.clone(), view.resumed)
    };
    let facts =
        Facts { plan, sent, kills, subscriber: &seen, resumed, log: &log, written: &written, executed: &executed };
    let Verdict { violations, completed, failed } = verdict(&facts);
    if !violations.is_empty() {
        bail!("{} violations\n{}", violations.len(), violations.join("\n"));
    }
    let mut by_kind = BTreeMap::new();
    for kill in kills {
        *by_kind.entry(kill.kind).or_default() += 1;
    }
    Ok(Report {
        kills: by_kind,
        gap_kills: gap_kills(kills),
        own_turn_kills: kills.iter().filter(|kill| kill.own_turn).count(),
        fewest_in_flight: kills.iter().map(|kill| kill.in_flight).min().unwrap_or(0),
        completed,
        failed,
        executed: executed.values().sum(),
        events: log.seqs.len(),
        resumed,
        unanswered: 0,
        took: Duration::ZERO,
    })
}

fn gap_kills(kills: &[Kill]) -> usize {
    kills.iter().filter(|kill| kill.uncommitted > 0).count()
}

fn verdict(facts: &Facts<'_>) -> Verdict {
    let mut verdict = Verdict::default();
    judge_kills(facts, &mut verdict.violations);
    judge_subscriber(facts, &mut verdict.violations);
    judge_prompts(facts, &mut verdict);
    judge_failures(facts, &mut verdict);
    verdict
}

/// Whether the kills were as hard as they were to be.
fn judge_kills(facts: &Facts<'_>, violations: &mut Vec<String>) {
    let Facts { plan, kills, .. } = facts;
    if kills.len() != plan.kills {
        violations.push(format!("{} kills, not {}", kills.len(), plan.kills));
    }
    let missed = kills.iter().filter(|kill| kill.in_flight == 0).count();
    if missed > 0 {
        violations.push(format!("{missed} kills hit without a turn in flight"));
    }
    if gap_kills(kills) < plan.gap_kills {
        violations.push(format!("only {} kills fell between append and commit", gap_kills(kills)));
    }
    for kind in KINDS.iter().filter(|kind| plan.kills >= 16 && kills.iter().all(|kill| kill.kind != **kind)) {
        violations.push(format!("no {kind} was killed"));
    }
}

/// Whether the subscriber saw each event of the log once and in order.
fn judge_subscriber(facts: &Facts<'_>, violations: &mut Vec<String>) {
    let (seen, log) = (facts.subscriber, &facts.log.seqs);
    for (who, seqs) in [("subscriber", seen), ("log", log)] {
        if let Some([one, next]) = seqs.array_windows().find(|[one, next]| one >= next) {
            violations.push(format!("the {who} has seq {one} and then {next}"));
        }
    }
    if log.get(..seen.len()) != Some(seen) {
        violations.push(format!(
            "the subscriber saw {} events, the log holds {} and they differ",
            seen.len(),
            log.len()
        ));
    }
    if facts.resumed == 0 && facts.kills.iter().any(|kill| kill.kind == "router") {
        violations.push("routers were killed and the subscriber never had to resume".to_owned());
    }
}

/// Whether each prompt ended once, ran at most once, and came out as its worker wrote it.
fn judge_prompts(facts: &Facts<'_>, verdict: &mut Verdict) {
    let violations = &mut verdict.violations;
    let mut known: HashMap<&str, &str> = HashMap::new();
    for prompt in facts.sent {
        let name = prompt.name.as_str();
        if let Some(other) = known.insert(&prompt.injection_id, name) {
            violations.push(format!("{name} and {other} are both {}", prompt.injection_id));
        }
        let Some(seen) = facts.log.injections.get(&prompt.injection_id) else {
            violations.push(format!("{name}: the log knows nothing of it"));
            continue;
        };
        let times = |event: &str| seen.counts.get(event).copied().unwrap_or(0);
        if times("inject_ack") != 1 || times("turn_started") > 1 || times("turn_complete") + times("inject_failed") != 1
        {
            violations.push(format!("{name}: {:?}", seen.counts));
        }
        if seen.acked_at > seen.first_other {
            violations.push(format!(
                "{name}: acknowledged at {} after its first event at {}",
                seen.acked_at, seen.first_other
            ));
        }
        for event in PASSED_ON {
            let key = (prompt.injection_id.clone(), event.to_owned());
            let written = facts.written.get(&key).copied().unwrap_or(0);
            if written != times(event) {
                violations.push(format!("{name}: {written} x {event} written, {} in the log", times(event)));
            }
        }
        let ran = facts.executed.get(name).copied().unwrap_or(0);
        match seen.outcome.as_deref() {
            Some("completed") if ran == 1 => verdict.completed += 1,
            Some("failed") if ran <= 1 => {
                if seen.error.is_empty() {
                    violations.push(format!("{name}: failed without a reason"));
                }
                verdict.failed.push(format!("{name}: {}", seen.error));
            }
            outcome => violations.push(format!("{name}: outcome {outcome:?}, carried out {ran} times")),
        }
    }
    let names: Vec<&str> = known.into_values().collect();
    for name in facts.executed.keys().filter(|name| !names.contains(&name.as_str())) {
        violations.push(format!("{name:?} was carried out and never sent"));
    }
}

/// Whether few enough failed, and only where somebody was killed.
fn judge_failures(facts: &Facts<'_>, verdict: &mut Verdict) {
    let mut by_place: HashMap<&Place, usize> = HashMap::new();
    let failed = |sent: &&Sent| {
        let seen = facts.log.injections.get(&sent.injection_id);
        seen.is_some_and(|seen| seen.outcome.as_deref() == Some("failed"))
    };
    for prompt in facts.sent.iter().filter(failed) {
        *by_place.entry(&prompt.place).or_default() += 1;
    }
    for (place, failures) in by_place {
        let killed = facts.kills.iter().filter(|kill| kill.node.as_ref() == Some(place)).count();
        if failures > killed {
            verdict.violations.push(format!("{place:?}: {failures} prompts failed, but only {killed} kills hit it"));
        }
    }
    if verdict.failed.len() as f64 > MAY_FAIL * facts.plan.injections as f64 {
        let (failed, all) = (verdict.failed.len(), facts.plan.injections);
        verdict.violations.push(format!("{failed} of {all} prompts failed: {:#?}", verdict.failed));
    }
}

/// Waits until everything that was killed runs again and every record is committed. What the workers wrote.
async fn settled(run: &Run) -> anyhow::Result<Written> {
    run.cluster.wait_ready(SETTLE).await?;
    let mut disk = run.disk()?;
    let deadline = Instant::now() + SETTLE;
    loop {
        let nodes = disk.look()?;
        let wanted: u32 = run.swarms.iter().map(|swarm| swarm.nodes).sum();
        let uncommitted = disk.uncommitted_since(&Appended::new());
        let dead: Vec<&str> = DAEMONS.into_iter().filter(|name| run.cluster.daemon(name).is_none()).collect();
        if nodes.len() == wanted as usize && dead.is_empty() && matches!(uncommitted, Ok(0)) {
            return Ok(disk.written());
        }
        if Instant::now() > deadline {
            bail!(
                "after {SETTLE:?} {} of {wanted} workers live, {dead:?} are missing, bytes not committed: {uncommitted:?}",
                nodes.len()
            );
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The log from its first event, read in one go.
pub(crate) async fn whole_log(cluster: &Cluster) -> anyhow::Result<View> {
    let mut stream = cluster.router().watch_events(WatchEventsRequest::default()).await?.into_inner();
    let mut view = View::default();
    while let Some(batch) = stream.message().await? {
        batch.events.iter().for_each(|event| note(&mut view, event));
    }
    Ok(view)
}

/// How often each prompt was carried out, by the first line of the prompt.
pub(crate) fn ledgers(cluster: &Cluster) -> anyhow::Result<HashMap<String, usize>> {
    let mut executed = HashMap::new();
    collect(&cluster.state().path().join("nodes"), &mut executed)?;
    Ok(executed)
}

fn collect(dir: &Path, executed: &mut HashMap<String, usize>) -> anyhow::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, executed)?;
        } else if path.file_name().is_some_and(|name| name.to_string_lossy().contains("ledger")) {
            for line in fs::read_to_string(&path)?.lines() {
                let entry: Value = serde_json::from_str(line)?;
                let prompt = entry["head"].as_str().unwrap_or_default();
                let name = prompt.lines().next().unwrap_or_default().to_owned();
                *executed.entry(name).or_default() += 1;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
