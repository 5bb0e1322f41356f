//! The talk with this node's membership: who else there is, how loaded everybody is, and what this node can do.

use std::collections::HashMap;
use std::time::Duration;

use drover_proto::membership::membership_service_client::MembershipServiceClient;
use drover_proto::membership::watch_members_response::Update;
use drover_proto::membership::{
    GetLeaderRequest, GetStatusRequest, ReportLoadRequest, SuspectRequest, UpdateMetadataRequest, WatchMembersRequest,
};
use drover_service::{MAX_MESSAGE_BYTES, Target, connect};
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::Channel;
use tonic::{Code, Status};
use tracing::{debug, info};

use super::Shell;
use super::view::{AGENTS, DRAINING, PORT, STORE};
use crate::core::{Input, NodeId};

/// Longest wait for an answer of the daemon, which is on this host.
const PATIENCE: Duration = Duration::from_secs(3);
/// Pause before the daemon is called again: at first, and at most.
const AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));
/// Changes that come so close together are one.
const BATCH: Duration = Duration::from_millis(20);
/// How often what this node says of itself is looked after.
const TEND: Duration = Duration::from_millis(500);
/// How long after joining everybody is known, and how long one who is alone waits for others.
const SETTLED: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(30));
/// By this name the membership counts our sessions beside the worker's.
const REPORTER: &str = "sessions";

type Client = MembershipServiceClient<Channel>;

/// What this node says of itself.
#[derive(Debug, Clone)]
pub(crate) struct Card {
    pub(crate) port: u16,
    pub(crate) store: String,
}

/// A client of this node's membership.
pub(crate) fn client(shell: &Shell, name: &str) -> Client {
    let target = Target::Daemon { state: shell.ctx.state().clone(), name: name.to_owned() };
    MembershipServiceClient::new(connect(target)).max_decoding_message_size(MAX_MESSAGE_BYTES)
}

/// Who leads, by the lease; nothing when nobody does or nobody knows.
pub(crate) async fn leader(client: &mut Client) -> Option<NodeId> {
    let asked = timeout(PATIENCE, client.get_leader(GetLeaderRequest {})).await.ok()?.ok()?.into_inner();
    (!asked.node_id.is_empty() && asked.remaining_ms > 0).then(|| NodeId::new(&asked.node_id))
}

/// Follows the membership daemon of this name until the shutdown, and passes on to the core what it says.
pub(crate) async fn follow(shell: Shell, name: String, card: Card) {
    let stopping = shell.ctx.shutdown().clone();
    shell.ctx.spawn("peers", pass_on(shell.clone()));
    let mut pause = AGAIN.0;
    loop {
        let begun = Instant::now();
        let mut client = client(&shell, &name);
        tokio::select! {
            ended = converse(&shell, &mut client, &card) => if let Err(status) = ended {
                debug!(error = status.message(), "the talk with membership broke off");
            },
            () = stopping.cancelled() => return,
        }
        if begun.elapsed() > AGAIN.1 {
            pause = AGAIN.0;
        }
        sleep(pause).await;
        pause = (pause * 2).min(AGAIN.1);
    }
}

/// Brings the view to the core when it has changed.
async fn pass_on(shell: Shell) {
    let (mut changed, stopping) = (shell.view.watch(), shell.ctx.shutdown().clone());
    loop {
        shell.jobs.input(Input::Peers(shell.view.peers())).await;
        shell.jobs.input(Input::Own(shell.view.own())).await;
        tokio::select! {
            _ = changed.changed() => {}
            () = stopping.cancelled() => return,
        }
        sleep(BATCH).await;
        changed.mark_unchanged();
    }
}

async fn within<T>(call: impl Future<Output = Result<tonic::Response<T>, Status>>) -> Result<T, Status> {
    let silent = |_| Status::unavailable("membership does not answer");
    timeout(PATIENCE, call).await.map_err(silent)?.map(tonic::Response::into_inner)
}

async fn converse(shell: &Shell, client: &mut Client, card: &Card) -> Result<(), Status> {
    let mut changes = within(client.watch_members(WatchMembersRequest::default())).await?;
    let mut tend = tokio::time::interval(TEND);
    tend.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut introduced, mut sessions, mut since) = (false, None, None::<(bool, Instant)>);
    let mut draining = None;
    loop {
        tokio::select! {
            update = changes.message() => match update?.and_then(|update| update.update) {
                None => return Ok(()),
                Some(Update::Snapshot(snapshot)) => shell.view.snapshot(&snapshot.members),
                Some(Update::Changed(member)) => shell.view.member(&member),
                Some(Update::Removed(id)) => shell.view.removed(&NodeId::new(&id)),
            },
            _ = tend.tick() => {
                if !introduced {
                    introduced = introduce(shell, client, card).await?;
                }
                let leaving = shell.view.own().leaving;
                if introduced && draining != Some(leaving) {
                    say_draining(client, leaving).await?;
                    draining = Some(leaving);
                }
                let held = shell.metrics.held.get().max(0) as u32;
                if sessions != Some(held) {
                    let report = ReportLoadRequest { sessions: held, max_sessions: 0, reporter: REPORTER.to_owned() };
                    within(client.report_load(report)).await?;
                    sessions = Some(held);
                }
                for node in shell.view.take_suspects() {
                    let request = SuspectRequest { node_id: node.to_string() };
                    if let Err(status) = within(client.suspect(request)).await {
                        debug!(node = %node, error = status.message(), "a suspicion is not taken");
                    }
                }
                settle(shell, client, &mut since).await?;
            }
        }
    }
}

/// Says whether this node is emptied, so that nobody thinks of it when sessions are placed, and people see it.
async fn say_draining(client: &mut Client, leaving: bool) -> Result<(), Status> {
    let request = if leaving {
        let set_capabilities = HashMap::from([(DRAINING.to_owned(), "yes".to_owned())]);
        UpdateMetadataRequest { set_capabilities, ..UpdateMetadataRequest::default() }
    } else {
        UpdateMetadataRequest { remove_capabilities: vec![DRAINING.to_owned()], ..UpdateMetadataRequest::default() }
    };
    match within(client.update_metadata(request)).await {
        Err(status) if status.code() == Code::Unavailable => Err(status),
        _ => Ok(()),
    }
}

/// Says what this node can do. False: the membership has no record of its own yet.
async fn introduce(shell: &Shell, client: &mut Client, card: &Card) -> Result<bool, Status> {
    let agents: Vec<&str> = shell.agents.names().collect();
    let set = HashMap::from([
        (PORT.to_owned(), card.port.to_string()),
        (AGENTS.to_owned(), agents.join(",")),
        (STORE.to_owned(), card.store.clone()),
    ]);
    match within(client.update_metadata(UpdateMetadataRequest { set_capabilities: set, ..Default::default() })).await {
        Ok(_) => {
            info!(port = card.port, "this node takes sessions");
            Ok(true)
        }
        Err(status) if status.code() == Code::Unavailable => Err(status),
        Err(_) => Ok(false),
    }
}

/// Finds out when the membership knows everybody.
async fn settle(shell: &Shell, client: &mut Client, since: &mut Option<(bool, Instant)>) -> Result<(), Status> {
    if shell.view.is_settled() {
        return Ok(());
    }
    let status = within(client.get_status(GetStatusRequest {})).await?;
    let joined = match status.state.as_str() {
        "joined" => true,
        "alone" => false,
        _ => {
            *since = None;
            return Ok(());
        }
    };
    let (before, at) = since.get_or_insert((joined, Instant::now()));
    if *before != joined {
        (*before, *at) = (joined, Instant::now());
    }
    if at.elapsed() >= if joined { SETTLED.0 } else { SETTLED.1 } {
        shell.view.settle();
    }
    Ok(())
}
