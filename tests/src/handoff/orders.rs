//! What people order of nodes outlives whoever is killed meanwhile, and one who listens and does not read loses nothing.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use drover_proto::handoff::handoff_service_client::HandoffServiceClient;
use drover_proto::handoff::send_response::Update;
use drover_proto::handoff::{DrainRequest, OpenSession, SendRequest};
use drover_proto::{failure_of, handoff as pb};
use drover_types::ErrorCode;
use tokio::time::{sleep, timeout};
use tonic::transport::Endpoint;

use super::nodes::{LIMIT, Nodes, Plan};

/// Waits until something holds.
async fn until(what: &str, mut holds: impl AsyncFnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let deadline = Instant::now() + LIMIT;
    while !holds().await? {
        if Instant::now() >= deadline {
            bail!("waited {LIMIT:?} for {what}");
        }
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

fn ask(session: &str, request: &str, prompt: &str) -> SendRequest {
    SendRequest {
        session_id: session.to_owned(),
        request_id: request.to_owned(),
        prompt: prompt.to_owned(),
        open: Some(OpenSession { agent: "echo".to_owned(), ..OpenSession::default() }),
        ..SendRequest::default()
    }
}

/// Opens a session on this very node.
async fn open_at(nodes: &Nodes, node: usize, session: &str) -> anyhow::Result<()> {
    let open = async || -> anyhow::Result<bool> {
        let request = SendRequest { placed: true, ..ask(session, "r0", "hello") };
        let mut stream = nodes.door(node).send(request).await?.into_inner();
        while let Some(part) = stream.message().await? {
            if let Some(Update::Answer(answer)) = part.update {
                return Ok(answer.node_id == nodes.name(node));
            }
        }
        Ok(false)
    };
    until("a session to be opened", async || Ok(open().await.unwrap_or(false))).await
}

/// Orders it, and hears it to its end; asked again it tells of the same.
async fn ordered(nodes: &Nodes, door: usize, request: DrainRequest) -> anyhow::Result<()> {
    until("the end of a drain", async || {
        let hear = async || -> anyhow::Result<()> {
            let mut told = nodes.door(door).drain(request.clone()).await?.into_inner();
            while told.message().await?.is_some() {}
            Ok(())
        };
        Ok(timeout(LIMIT, hear()).await.is_ok_and(|heard| heard.is_ok()))
    })
    .await
}

/// A drain goes on when the door through which it was ordered, the leaseholder that planned it and the node itself are killed one after the
/// other, and stands until it is taken back.
pub async fn a_drain_outlives_everybody(sessions: usize) -> anyhow::Result<String> {
    let mut nodes = Nodes::start(Plan::led(4)).await?;
    let leader = nodes.leader(0).await?;
    let [node, door, other] = [1, 2, 3].map(|n| (leader + n) % 4);
    let names: Vec<String> = (0..sessions).map(|n| format!("kept-{n}")).collect();
    for batch in names.chunks(16) {
        futures::future::try_join_all(batch.iter().map(|name| open_at(&nodes, node, name))).await?;
    }
    // A turn that runs keeps its session where it is, so that the drain is not over before it is looked at.
    let mut held = nodes.door(node).send(ask(&names[0], "held", "@echo delay=3s\nheld")).await?.into_inner();
    held.message().await?;

    let name = nodes.name(node);
    let request = || DrainRequest { node_id: name.clone(), ..DrainRequest::default() };
    let told = nodes.door(door).drain(request()).await?;
    until("the first session to leave", async || {
        let drain = nodes.status(node).await.ok().and_then(|status| status.drain).unwrap_or_default();
        Ok(!drain.planned_by.is_empty() && drain.moved > 0)
    })
    .await?;
    drop(told);
    for victim in [door, leader, node] {
        nodes.kill(victim)?;
    }
    for victim in [door, leader, node] {
        nodes.start_sessions(victim)?;
    }
    until("the drain of a node that was started again", async || {
        Ok(nodes.status(node).await.is_ok_and(|status| status.draining))
    })
    .await?;
    // Asked through another door it tells of the same drain, until nothing is left.
    ordered(&nodes, other, request()).await?;
    until("an empty node", async || {
        Ok(names.iter().all(|name| nodes.owner(name).is_some_and(|(_, at, _)| at != node)))
    })
    .await?;
    for batch in names.chunks(16) {
        let answers = batch.iter().map(|name| nodes.say(other, name, "r1", "@echo recall"));
        for said in futures::future::try_join_all(answers).await? {
            ensure!(said.answer.text.contains("before: hello .. "), "{said:?}");
        }
    }
    // Whoever leads by now has planned it; on a machine that stalls that may be another one, and later than the node itself.
    until("the plan of a leaseholder", async || {
        Ok((0..4).any(|index| nodes.said(index).contains("the drain of a node is planned")))
    })
    .await?;
    // Nobody places a session there, and it is not forgotten by another start.
    for n in 0..8 {
        let said = nodes.say(other, &format!("new-{n}"), "r0", "hello").await?;
        ensure!(said.answer.node_id != name, "a session was opened on a node that is to be empty");
    }
    ordered(&nodes, other, DrainRequest { undo: true, ..request() }).await?;
    until("the end of the order", async || Ok(nodes.status(node).await.is_ok_and(|status| !status.draining))).await?;
    nodes.kill(node)?;
    nodes.start_sessions(node)?;
    until("its next start", async || Ok(nodes.status(node).await.is_ok_and(|status| !status.draining))).await?;
    let unknown = DrainRequest { node_id: "lab/77".to_owned(), ..DrainRequest::default() };
    let refused = nodes.door(other).drain(unknown).await.map(drop);
    ensure!(refused.as_ref().is_err_and(|status| failure_of(status).code == ErrorCode::InvalidRequest), "{refused:?}");
    Ok(format!("{sessions} sessions left {name} while its door, the leaseholder and the node were killed"))
}

/// One who listens to a long answer and reads nothing is cut off with a word that says so, and hears the rest when it asks again.
pub async fn a_listener_that_does_not_read() -> anyhow::Result<String> {
    let environment = vec![("DROVER_SESSION_PATIENCE".to_owned(), "1s".to_owned())];
    let nodes = Nodes::start(Plan { environment, ..Plan::fast(2) }).await?;
    nodes.say(0, "long", "r0", "hello").await?;
    let owner = nodes.owner("long").context("nobody owns it")?.1;
    let size = 2 << 20;
    let request = |offset: u64| SendRequest { offset, ..ask("long", "r1", &format!("@echo size={size}")) };
    // A window as small as those of most clients, so that what is not read waits at the node.
    let endpoint = Endpoint::from_shared(format!("http://{}", nodes.listens(owner)?))?;
    let channel = endpoint.initial_stream_window_size(65_535).initial_connection_window_size(65_535).connect().await?;
    let mut lazy = HandoffServiceClient::new(channel);
    let mut stream = timeout(LIMIT, lazy.send(request(0))).await??.into_inner();
    until("the node to give it up", async || Ok(nodes.said(owner).contains("a listener that reads nothing"))).await?;
    let (mut text, mut why) = (String::new(), None);
    loop {
        match timeout(LIMIT, stream.message()).await? {
            Ok(Some(pb::SendResponse { update: Some(Update::Text(part)) })) => {
                ensure!(part.offset as usize == text.len(), "a gap at {}", text.len());
                text += &part.text;
            }
            Ok(Some(part)) => ensure!(!matches!(part.update, Some(Update::Answer(_))), "it was not cut off"),
            Ok(None) => break,
            Err(status) => {
                why = Some(failure_of(&status));
                break;
            }
        }
    }
    let why = why.context("it was cut off without a word")?;
    ensure!(why.code == ErrorCode::BackendUnavailable && why.hint.contains("request_id"), "{why:?}");
    ensure!(!text.is_empty() && text.len() < size, "{} bytes of {size}", text.len());
    let heard = text.len();
    // Asked again it goes on behind what was heard; on a machine that stalls, more than once.
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        let Ok(stream) = timeout(LIMIT, nodes.door(owner).send(request(text.len() as u64))).await? else { continue };
        let mut stream = stream.into_inner();
        while let Ok(Some(part)) = timeout(LIMIT, stream.message()).await? {
            match part.update {
                Some(Update::Text(part)) => {
                    ensure!(part.offset as usize == text.len(), "a gap at {}", text.len());
                    text += &part.text;
                }
                Some(Update::Answer(answer)) => {
                    ensure!(answer.text.starts_with(&text), "what was heard is not the answer");
                    ensure!(answer.text.len() == size && answer.turn == 1, "{} bytes", answer.text.len());
                    return Ok(format!("cut off after {heard} of {size} bytes, and heard all of it in the end"));
                }
                _ => {}
            }
        }
    }
    bail!("no answer")
}
