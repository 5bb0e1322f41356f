//! Emptying a node: its sessions go to the others one by one, evenly and no faster than allowed, and it takes no new ones.

use std::time::Duration;

use drover_proto::handoff::{DrainRequest, DrainResponse, GetStatusRequest};
use drover_proto::status_of;
use drover_types::{ErrorCode, Failure, SessionId};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::StreamExt as _;
use tonic::Status;
use tracing::{info, warn};

use super::Shell;
use super::ops::failed;
use super::sessions::peer;
use crate::core::{DrainPlan, Event, Input, NodeId, Share, State, Why};

/// Moves that begin in a second, and that are under way at a time to each of the others.
const PER_SECOND: u32 = 200;
/// How often it is looked whether the next may go.
const STEP: Duration = Duration::from_millis(5);
/// How often a watcher is told.
const TELL: Duration = Duration::from_millis(200);
/// Longest wait for another node's count of its sessions.
const COUNT: Duration = Duration::from_secs(2);
/// Words that may wait for a watcher.
const EARS: usize = 16;

type Ear = mpsc::Sender<Result<DrainResponse, Status>>;

/// Begins to empty a node, or undoes it; streams how far it is.
pub(crate) async fn begin(
    shell: &Shell,
    node: String,
    undo: bool,
) -> Result<mpsc::Receiver<Result<DrainResponse, Status>>, Status> {
    let (ear, told) = mpsc::channel(EARS);
    if !node.is_empty() && node != shell.me.node.as_str() {
        let mut client = peer(shell, &NodeId::new(&node)).map_err(failed)?;
        let mut request = tonic::Request::new(DrainRequest { node_id: node, undo });
        shell.links.sign(&mut request);
        let mut stream = client.drain(request).await?.into_inner();
        let stopping = shell.ctx.shutdown().clone();
        shell.ctx.spawn("drain elsewhere", async move {
            loop {
                let response = tokio::select! {
                    response = stream.next() => response,
                    () = stopping.cancelled() => None,
                };
                let Some(response) = response else { return };
                if ear.send(response).await.is_err() {
                    return;
                }
            }
        });
        return Ok(told);
    }
    shell.view.leaving(!undo);
    if undo {
        let _ = ear.send(Ok(DrainResponse::default())).await;
        return Ok(told);
    }
    let shell = shell.clone();
    shell.ctx.clone().spawn("drain", async move {
        if let Err(failure) = empty(&shell, &ear).await {
            let _ = ear.send(Err(status_of(&failure))).await;
        }
    });
    Ok(told)
}

/// Moves every session away from here.
async fn empty(shell: &Shell, ear: &Ear) -> Result<(), Failure> {
    let here = || {
        shell.jobs.with(|engine| {
            let held = engine.sessions().filter(|view| matches!(view.state, State::Active | State::Transferring));
            held.filter(|view| view.owner.as_ref() == Some(&engine.me().node))
                .map(|view| view.session)
                .collect::<Vec<SessionId>>()
        })
    };
    let sessions = here().await?;
    let shares = shares(shell).await;
    if sessions.is_empty() {
        tell(ear, 0, 0, &[]).await;
        return Ok(());
    }
    if shares.is_empty() {
        return Err(Failure::new(ErrorCode::HandoffFailed, "there is no node that could take this node's sessions")
            .hint("`drover members` lists the nodes"));
    }
    info!(sessions = sessions.len(), nodes = shares.len(), "this node is emptied");
    let total = sessions.len() as u32;
    // Each of the others takes so many at a time.
    let most = shell.settings.max_moves * shares.len();
    let mut plan = DrainPlan::new(sessions, shares, most, PER_SECOND);
    let (begun, mut events, mut moved, mut told) = (Instant::now(), shell.events.listen(), 0, Instant::now());
    while !plan.is_done() {
        while let Some(next) = plan.next(begun.elapsed()) {
            let (session, to) = (next.session, Some(next.to));
            shell.jobs.input(Input::Move { session, to, why: Why::Drain }).await;
        }
        tokio::select! {
            event = events.recv() => match event {
                Ok(Event::Completed { session, .. }) => {
                    moved += 1;
                    plan.ended(&session, true);
                }
                Ok(Event::Failed { session, .. } | Event::NotMoved { session, .. }) => plan.ended(&session, false),
                Ok(_) => {}
                Err(error) => warn!(%error, "a drain has lost sight of its moves"),
            },
            () = sleep(STEP) => {}
            () = shell.ctx.shutdown().cancelled() => return Ok(()),
        }
        if told.elapsed() >= TELL {
            told = Instant::now();
            if !tell(ear, moved, total.saturating_sub(moved), plan.stuck()).await {
                // Nobody watches any more; it goes on.
                told = begun + Duration::from_hours(24 * 365);
            }
        }
    }
    let left = here().await?.len() as u32;
    tell(ear, moved, left, plan.stuck()).await;
    info!(moved, left, took_ms = begun.elapsed().as_millis() as u64, "this node was emptied");
    Ok(())
}

async fn tell(ear: &Ear, moved: u32, left: u32, stuck: &[SessionId]) -> bool {
    let stuck = stuck.iter().map(ToString::to_string).collect();
    ear.send(Ok(DrainResponse { moved, left, stuck })).await.is_ok()
}

/// The others, and how many sessions each has.
async fn shares(shell: &Shell) -> Vec<Share> {
    let mut shares = Vec::new();
    for node in shell.view.able() {
        let Ok(mut client) = peer(shell, &node) else { continue };
        let mut request = tonic::Request::new(GetStatusRequest {});
        shell.links.sign(&mut request);
        match timeout(COUNT, client.get_status(request)).await {
            Ok(Ok(status)) if !status.get_ref().draining => {
                shares.push(Share { node, sessions: status.get_ref().held, weight: 1 });
            }
            Ok(Ok(_)) => {}
            _ => warn!(node = %node, "a node that could take sessions does not answer"),
        }
    }
    shares
}
