//! What goes on beside the swarms that come and go: sessions of a node that stands, and model calls.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use drover_proto::dispatch::dispatch_service_client::DispatchServiceClient;
use drover_proto::dispatch::{DispatchRequest, OpenRun, Task, TaskBatch, dispatch_request, dispatch_response};
use drover_proto::handoff::handoff_service_client::HandoffServiceClient;
use drover_proto::handoff::send_response::Update;
use drover_proto::handoff::{CloseRequest, OpenSession, SendRequest};
use drover_service::{StateDir, Target, connect, why};
use drover_testkit::cluster::Cluster;
use tonic::transport::Channel;

use super::Plan;
use super::progress::Progress;

/// Daemons of which a node has one.
pub(super) const OF_NODE: [&str; 3] = ["worker", "gossip-membership", "handoff-coordinator"];
/// Model calls of one run.
const CALLS: usize = 100;
/// How long the daemons of a node may take to come up.
const PATIENCE: Duration = Duration::from_mins(1);

/// Name in the address book of a daemon of the only node of a swarm.
pub(super) fn name_of(daemon: &str, swarm: &str) -> String {
    let between = if daemon == "worker" { '-' } else { '+' };
    format!("{daemon}-{swarm}{between}0")
}

/// Waits until every daemon of the node runs and takes sessions.
pub(super) async fn ready(cluster: &Cluster, swarm: &str) -> anyhow::Result<()> {
    let begun = Instant::now();
    let missing =
        || OF_NODE.map(|daemon| name_of(daemon, swarm)).into_iter().find(|name| cluster.daemon(name).is_none());
    while let Some(name) = missing() {
        ensure!(begun.elapsed() < PATIENCE, "{name} does not come up");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    say(&mut door(cluster.state()), "opening", 0).await
}

fn door(state: &StateDir) -> HandoffServiceClient<Channel> {
    HandoffServiceClient::new(connect(Target::Daemon { state: state.clone(), name: "router".to_owned() }))
}

/// One turn after the other, in one session after the other. Returns how many turns, and sessions.
pub(super) async fn talk(state: &StateDir, plan: Plan, progress: &Progress) -> anyhow::Result<(usize, usize)> {
    let mut door = door(state);
    let (mut turns, mut sessions) = (0, 0);
    while !progress.is_over() {
        let session = format!("soak-{sessions}");
        let end = Instant::now() + plan.swarm_time;
        let before = turns;
        while turns == before || turns - before < plan.session_turns && Instant::now() < end && !progress.is_over() {
            say(&mut door, &session, turns - before).await?;
            turns += 1;
        }
        door.close(CloseRequest { session_id: session }).await?;
        sessions += 1;
        progress.session();
    }
    Ok((turns, sessions))
}

/// A turn until its answer. Nodes come and go: whoever is told that one does asks again, under the same name.
async fn say(door: &mut HandoffServiceClient<Channel>, session: &str, turn: usize) -> anyhow::Result<()> {
    let begun = Instant::now();
    while let Err(error) = ask(door, session, turn).await {
        ensure!(begun.elapsed() < PATIENCE, "{error:#}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

async fn ask(door: &mut HandoffServiceClient<Channel>, session: &str, turn: usize) -> anyhow::Result<()> {
    let prompt = format!("turn {turn} of {session}");
    let request = SendRequest {
        session_id: session.to_owned(),
        request_id: format!("turn-{turn}"),
        prompt: prompt.clone(),
        open: Some(OpenSession { agent: "echo".to_owned(), ..OpenSession::default() }),
        ..SendRequest::default()
    };
    let failed = |status: tonic::Status| anyhow::anyhow!("{prompt}: {}", why(&status));
    let mut updates = door.send(request).await.map_err(failed)?.into_inner();
    while let Some(response) = updates.message().await.map_err(failed)? {
        if let Some(Update::Answer(answer)) = response.update {
            ensure!(answer.text == prompt, "{prompt} is answered {:?}", answer.text);
            return Ok(());
        }
    }
    bail!("{prompt} has no answer")
}

/// One run of model calls after the other. Returns how many calls.
pub(super) async fn dispatch(state: &StateDir, progress: &Progress) -> anyhow::Result<u64> {
    let target = Target::Daemon { state: state.clone(), name: "llm-dispatcher".to_owned() };
    let mut client = DispatchServiceClient::new(connect(target));
    let mut calls = 0;
    while !progress.is_over() {
        // A slow call that is hedged would be answered twice, and that is no fault.
        let task = |number| Task { prompt: format!("call {number}"), no_hedge: true, ..Task::default() };
        let tasks = (calls..calls + CALLS as u64).map(task).collect();
        let open = dispatch_request::Request::Open(OpenRun::default());
        let requests = [open, dispatch_request::Request::Tasks(TaskBatch { tasks })];
        let requests = requests.map(|request| DispatchRequest { request: Some(request) });
        let mut responses = client.dispatch(tokio_stream::iter(requests)).await?.into_inner();
        let mut summary = None;
        while let Some(response) = responses.message().await? {
            if let Some(dispatch_response::Response::Summary(said)) = response.response {
                summary = Some(said);
            }
        }
        let summary = summary.context("a run without a summary")?;
        ensure!(summary.succeeded == CALLS as u64, "of {CALLS} calls {} succeeded", summary.succeeded);
        calls += CALLS as u64;
        progress.calls(calls);
    }
    Ok(calls)
}
