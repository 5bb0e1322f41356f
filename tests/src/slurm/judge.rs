//! Compares what was sent, what the events said, what the agents' ledgers on the compute hosts hold, and what Slurm says.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use drover_proto::router::WatchEventsRequest;
use drover_testkit::lab::USER;
use serde_json::Value;

use super::chaos::{Outcome, Sent};
use super::faults::{Fault, Harm};
use super::{PATIENCE, Seat, Site};
use crate::subscriber::{Subscriber, View, note};

/// Everything that is known of a fault when it is over.
pub(super) struct Round<'a> {
    pub(super) fault: Fault,
    pub(super) swarm: &'a str,
    pub(super) sent: &'a [Sent],
    pub(super) refused: &'a [String],
    /// What `status` said before.
    pub(super) before: &'a Value,
    /// And after.
    pub(super) after: &'a Value,
}

pub(super) fn judge(site: &Site, view: &View, round: &Round<'_>) -> anyhow::Result<Outcome> {
    let executed = ledgers(site, round.swarm)?;
    let mut violations = Vec::new();
    let (completed, failed) = prompts(round, view, &executed, &mut violations);
    states(round, &mut violations);
    if site.seat == Seat::Laptop {
        let connections = site.lab.ssh_connections()?;
        if connections > 1 {
            violations.push(format!("{connections} SSH connections"));
        }
    }
    let followers = site.followers()?;
    if followers.len() != 1 {
        violations.push(format!("{} followers on the login host", followers.len()));
    }
    if !violations.is_empty() {
        let after = round.after;
        bail!("{} violations\n{}\n{after:#}", violations.len(), violations.join("\n"));
    }
    Ok(Outcome {
        fault: round.fault,
        completed,
        failed,
        refused: round.refused.len(),
        generation: generations(round.after).into_iter().max().unwrap_or(0),
        state: String::new(),
        settled: Duration::ZERO,
        took: Duration::ZERO,
    })
}

/// Whether each prompt ended once and ran at most once, and whether only those failed that could.
fn prompts(
    round: &Round<'_>,
    view: &View,
    executed: &HashMap<String, usize>,
    violations: &mut Vec<String>,
) -> (usize, usize) {
    let (mut completed, mut failed) = (0, Vec::new());
    for Sent { injection_id, name } in round.sent {
        let Some(seen) = view.injections.get(injection_id) else {
            violations.push(format!("{name}: the log knows nothing of it"));
            continue;
        };
        let times = |event: &str| seen.counts.get(event).copied().unwrap_or(0);
        if times("inject_ack") != 1 || times("turn_started") > 1 || times("turn_complete") + times("inject_failed") != 1
        {
            violations.push(format!("{name}: {:?}", seen.counts));
        }
        let ran = executed.get(name).copied().unwrap_or(0);
        match seen.outcome.as_deref() {
            Some("completed") if ran == 1 => completed += 1,
            Some("failed") if ran <= 1 && !seen.error.is_empty() => failed.push(format!("{name}: {}", seen.error)),
            outcome => {
                violations.push(format!("{name}: outcome {outcome:?} {:?}, carried out {ran} times", seen.error));
            }
        }
    }
    let sent: Vec<&str> = round.sent.iter().map(|sent| sent.name.as_str()).collect();
    for name in executed.keys().filter(|name| !sent.contains(&name.as_str())) {
        violations.push(format!("{name:?} was carried out and never sent"));
    }
    // A worker that dies can lose no more than the turn that it was at.
    let may_fail = match round.fault.harm() {
        Harm::None => 0,
        Harm::Workers => generations(round.after).len(),
        Harm::Job(_) => usize::MAX,
    };
    if failed.len() > may_fail {
        violations.push(format!("{} prompts failed, {may_fail} may: {:#?}", failed.len(), failed));
    }
    if !round.refused.is_empty() && !matches!(round.fault.harm(), Harm::Job(_)) {
        violations.push(format!("{} prompts were refused: {}", round.refused.len(), round.refused[0]));
    }
    (completed, failed.len())
}

/// Whether the swarm is what Slurm makes of it.
fn states(round: &Round<'_>, violations: &mut Vec<String>) {
    let (before, after) = (round.before, round.after);
    if before["job_id"] != after["job_id"] {
        violations.push(format!("the job was {} and is {}", before["job_id"], after["job_id"]));
    }
    let (first, last) = (generations(before), generations(after));
    let right = match round.fault.harm() {
        Harm::None => first == last,
        Harm::Workers => first.iter().zip(&last).all(|(first, last)| last > first),
        Harm::Job(_) => true,
    };
    if !right {
        violations.push(format!("generations {first:?} became {last:?}"));
    }
}

fn generations(status: &Value) -> Vec<u64> {
    let nodes = status["nodes"].as_array().map_or(&[][..], Vec::as_slice);
    nodes.iter().map(|node| node["generation"].as_u64().unwrap_or(0)).collect()
}

/// How often each prompt of a swarm was carried out, by its first line, on whatever host.
fn ledgers(site: &Site, swarm: &str) -> anyhow::Result<HashMap<String, usize>> {
    let uid = drover_testkit::lab::USER_ID;
    let mut executed = HashMap::new();
    for host in site.lab.nodes() {
        let dir = site.disk(&host).join(format!("drover-{uid}/nodes")).join(swarm);
        let nodes = fs::read_dir(&dir).into_iter().flatten().flatten();
        for node in nodes {
            read_ledger(&node.path().join("echo-ledger.jsonl"), &mut executed)?;
        }
    }
    ensure!(!executed.is_empty(), "no ledger of {swarm} on any host, as {USER} would have written it");
    Ok(executed)
}

fn read_ledger(path: &Path, executed: &mut HashMap<String, usize>) -> anyhow::Result<()> {
    let Ok(text) = fs::read_to_string(path) else { return Ok(()) };
    for line in text.lines() {
        // A host that lost its power may have written half a line: that prompt never began.
        let Ok(entry) = serde_json::from_str::<Value>(line) else { continue };
        let head = entry["head"].as_str().context("a ledger without heads")?;
        *executed.entry(head.lines().next().unwrap_or_default().to_owned()).or_default() += 1;
    }
    Ok(())
}

/// Whether somebody who followed all the while saw what the log holds, each event once and in order.
pub(super) async fn log(site: &Site, subscriber: &Subscriber) -> anyhow::Result<()> {
    let mut stream = site.router().watch_events(WatchEventsRequest::default()).await?.into_inner();
    let mut log = View::default();
    while let Some(batch) = stream.message().await? {
        batch.events.iter().for_each(|event| note(&mut log, event));
    }
    let caught_up = subscriber.wait(PATIENCE, |view| view.seqs.len() >= log.seqs.len()).await;
    ensure!(caught_up, "the subscriber saw {} of {} events", subscriber.view().seqs.len(), log.seqs.len());
    let seen = subscriber.view();
    for (who, seqs) in [("subscriber", &seen.seqs), ("log", &log.seqs)] {
        if let Some([one, next]) = seqs.array_windows().find(|[one, next]| one >= next) {
            bail!("the {who} has seq {one} and then {next}");
        }
    }
    ensure!(seen.seqs.starts_with(&log.seqs), "the subscriber saw other events than the log holds");
    Ok(())
}
