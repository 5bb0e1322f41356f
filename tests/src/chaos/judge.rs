//! Compares what was asked for, what the events said, and what the agents' own ledgers hold.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{bail, ensure};
use drover_proto::router::WatchEventsRequest;
use serde_json::Value;

use super::killer::Kills;
use super::{Plan, Report, Run, Sent};
use crate::subscriber::{Subscriber, View, note};

/// At most this share of the prompts may fail.
const MAY_FAIL: f64 = 0.03;

pub(crate) async fn judge(
    plan: Plan,
    run: &Run,
    subscriber: &Subscriber,
    sent: &[Sent],
    kills: Kills,
) -> anyhow::Result<Report> {
    let log = whole_log(run).await?;
    let view = subscriber.view();
    let mut violations = Vec::new();

    if let Some(at) = view.seqs.windows(2).position(|pair| pair[0] >= pair[1]) {
        violations.push(format!("the subscriber saw seq {} and then {}", view.seqs[at], view.seqs[at + 1]));
    }
    let seen = view.seqs.len();
    if log.seqs.get(..seen) != Some(&view.seqs[..]) {
        violations.push(format!("the subscriber saw {seen} events, the log holds {} and they differ", log.seqs.len()));
    }

    let executed = ledgers(run)?;
    let mut completed = 0;
    let mut failed = Vec::new();
    let mut failed_by_node: HashMap<(String, u32), usize> = HashMap::new();
    for prompt in sent {
        let name = prompt.prompt.lines().next().unwrap_or_default();
        let Some(seen) = log.injections.get(&prompt.injection_id) else {
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
        let ran = executed.get(name).copied().unwrap_or(0);
        match seen.outcome.as_deref() {
            Some("completed") if ran == 1 => completed += 1,
            Some("failed") if ran <= 1 => {
                if seen.error.is_empty() {
                    violations.push(format!("{name}: failed without a reason"));
                }
                failed.push(format!("{name}: {}", seen.error));
                *failed_by_node.entry((prompt.swarm.clone(), prompt.node)).or_default() += 1;
            }
            outcome => violations.push(format!("{name}: outcome {outcome:?}, carried out {ran} times")),
        }
    }
    for (node, failures) in failed_by_node {
        let killed = kills.by_node.get(&node).copied().unwrap_or(0);
        if failures > killed {
            violations.push(format!("{node:?}: {failures} prompts failed, but only {killed} kills hit it"));
        }
    }
    if failed.len() as f64 > MAY_FAIL * plan.injections as f64 {
        violations.push(format!("{} of {} prompts failed: {failed:#?}", failed.len(), plan.injections));
    }
    if !violations.is_empty() {
        bail!("{} violations\n{}", violations.len(), violations.join("\n"));
    }
    ensure!(completed + failed.len() == plan.injections, "the sums do not match");
    Ok(Report {
        kills: kills.by_kind,
        gap_kills: kills.between_append_and_commit,
        completed,
        failed,
        executed: executed.values().sum(),
        events: log.seqs.len(),
        resumed: view.resumed,
        unanswered: 0,
        took: std::time::Duration::ZERO,
    })
}

/// The log from its first event, read in one go.
async fn whole_log(run: &Run) -> anyhow::Result<View> {
    let mut stream = run.cluster.router().watch_events(WatchEventsRequest::default()).await?.into_inner();
    let mut view = View::default();
    while let Some(batch) = stream.message().await? {
        batch.events.iter().for_each(|event| note(&mut view, event));
    }
    Ok(view)
}

/// How often each prompt was carried out, by the first line of the prompt.
fn ledgers(run: &Run) -> anyhow::Result<HashMap<String, usize>> {
    let mut executed = HashMap::new();
    collect(&run.cluster.state().path().join("nodes"), &mut executed)?;
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
