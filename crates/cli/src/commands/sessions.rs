//! `drover sessions`: which conversations there are, where each lives, and what was said in one.

use drover_proto::handoff as pb;
use drover_service::{Target, connect};
use drover_sessions::Door;
use drover_types::ErrorCode;
use serde_json::{Value, json};

use crate::app::App;
use crate::args::Sessions;
use crate::client::{self, Client, unary};
use crate::daemons;
use crate::fault::{Exit, Fault};
use crate::render::colour::{self, Tone};
use crate::render::json::timestamp;
use crate::render::table::{Cell, Table};
use crate::render::words;

pub(super) async fn run(app: &App, args: &Sessions) -> anyhow::Result<Exit> {
    let (_, mut door) = router(app).await?;
    match &args.session {
        Some(session) if args.end => end(app, door, session).await,
        Some(session) if args.interrupt => {
            interrupt(app, door, session, args.request.as_deref().unwrap_or_default()).await
        }
        Some(session) => show(app, door, session).await,
        None => {
            let request = pb::ListSessionsRequest { all: true, closed: args.all };
            let sessions = unary(door.client.list_sessions(request)).await?.sessions;
            list(app, &sessions)?;
            Ok(Exit::Done)
        }
    }
}

/// The router, which is a door to all sessions.
pub(super) async fn router(app: &App) -> Result<(Client, Door), Fault> {
    let client = Client::connect(app).await?;
    let target = match &app.global.router {
        Some(addr) => Target::Address(addr.clone()),
        None => Target::Daemon { state: app.state()?, name: daemons::ROUTER.to_owned() },
    };
    let door = Door::with_token("the router", connect(target), client::token(&app.config)?);
    Ok((client, door))
}

/// The gossip id of a node that a person has named: the swarm may be shortened or `last`.
pub(super) async fn node_of(client: &mut Client, named: &str) -> Result<String, Fault> {
    let name = client.in_full(named.trim()).await?;
    match name.rsplit_once('/') {
        Some((swarm, index)) if index.parse::<u32>().is_ok() => match client.find(swarm).await {
            Ok(swarm) => Ok(format!("{}/{index}", swarm.swarm_id)),
            // A node outside the swarms has whatever name it was given.
            Err(fault) if fault.code == Some(ErrorCode::UnknownSwarm) => Ok(name),
            Err(fault) => Err(fault),
        },
        _ => Ok(name),
    }
}

/// A failed call about one session. The nodes have fixed words for an unknown one; a person wants to read which one it was.
pub(super) fn named(status: &tonic::Status, session: &str) -> Fault {
    let mut fault = Fault::of_status(status);
    if fault.message == "there is no such session" {
        fault.message = format!("there is no session {session}");
    }
    fault
}

/// A session as scripts read it.
pub(super) fn as_json(session: &pb::Session) -> Value {
    json!({
        "session_id": session.session_id,
        "epoch": session.epoch,
        "owner": session.owner,
        "state": state_of(session),
        "messages": session.messages,
        "agent": session.agent,
        "bytes": session.bytes,
    })
}

fn state_of(session: &pb::Session) -> &'static str {
    match session.state() {
        pb::SessionState::Active => "active",
        pb::SessionState::Unspecified | pb::SessionState::Transferring => "transferring",
        pb::SessionState::Migrated => "migrated",
        pb::SessionState::Closed => "closed",
    }
}

fn list(app: &App, sessions: &[pb::Session]) -> anyhow::Result<()> {
    if app.global.json {
        let all: Vec<Value> = sessions.iter().map(as_json).collect();
        app.screen.out(&serde_json::to_string(&all)?)?;
    } else if sessions.is_empty() {
        app.screen.note("no sessions; begin one: drover send NAME --prompt \"...\"");
    } else {
        app.screen.table(&table(sessions))?;
    }
    Ok(())
}

fn table(sessions: &[pb::Session]) -> Table {
    let swarms = sessions.iter().filter_map(|session| session.owner.rsplit_once('/')).map(|(swarm, _)| swarm);
    let length = words::telling_length(swarms);
    let mut table = Table::new(&["SESSION", "STATE", "NODE", ">MESSAGES", ">EPOCH", "AGENT"]);
    for session in sessions {
        table.row(vec![
            session.session_id.clone().into(),
            Cell::toned(state_of(session), colour::of_state(state_of(session))),
            short_node(&session.owner, length).into(),
            session.messages.to_string().into(),
            session.epoch.to_string().into(),
            words::dash(&session.agent).into(),
        ]);
    }
    table
}

/// A gossip id with the swarm's part of it shortened.
pub(super) fn short_node(node: &str, length: usize) -> String {
    match node.rsplit_once('/') {
        Some((swarm, index)) => format!("{}/{index}", words::short(swarm, length)),
        None => words::dash(node).to_owned(),
    }
}

async fn show(app: &App, mut door: Door, session: &str) -> anyhow::Result<Exit> {
    let request = pb::GetSessionRequest { session_id: session.to_owned(), last: 0 };
    let answer = door.client.get_session(request).await.map_err(|status| named(&status, session))?.into_inner();
    let described = answer.session.unwrap_or_default();
    if app.global.json {
        let said: Vec<Value> = answer
            .messages
            .iter()
            .map(|message| {
                json!({
                    "role": message.role, "turn": message.turn, "content": message.content,
                    "timestamp": timestamp(message.timestamp_us),
                })
            })
            .collect();
        let mut document = as_json(&described);
        // `messages` is how many there are, here as in the list.
        document["said"] = said.into();
        document["pending_calls"] = answer.pending_calls.into();
        document["metadata"] = json!(answer.opened.unwrap_or_default().metadata);
        app.screen.out(&document.to_string())?;
        return Ok(Exit::Done);
    }
    let paint = app.screen.paint();
    let state = paint.paint(colour::of_state(state_of(&described)), state_of(&described));
    let node = short_node(&described.owner, 8);
    app.screen.out(&format!("session {} is {state} on {node}, epoch {}", described.session_id, described.epoch))?;
    for message in &answer.messages {
        let tone = if message.role == "user" { Tone::Busy } else { Tone::Plain };
        app.screen.out(&format!(
            "{} {}",
            paint.paint(tone, &format!("{} |", message.role)),
            clean(&message.content)
        ))?;
    }
    Ok(Exit::Done)
}

async fn end(app: &App, mut door: Door, session: &str) -> anyhow::Result<Exit> {
    let closed = door.client.close(pb::CloseRequest { session_id: session.to_owned() }).await;
    closed.map_err(|status| named(&status, session))?;
    if app.global.json {
        app.screen.out(&json!({"session_id": session, "state": "closed"}).to_string())?;
    } else {
        app.screen.out(&format!("session {session} is over"))?;
    }
    Ok(Exit::Done)
}

async fn interrupt(app: &App, mut door: Door, session: &str, request: &str) -> anyhow::Result<Exit> {
    let spinner = app.screen.spinner("ending the turn");
    let wanted = pb::InterruptRequest { session_id: session.to_owned(), request_id: request.to_owned() };
    let ended = door.client.interrupt(wanted).await.map_err(|status| named(&status, session))?.into_inner();
    drop(spinner);
    if app.global.json {
        let document = json!({
            "session_id": session, "turn": ended.turn, "node_id": ended.node_id, "answered_before": ended.answered,
        });
        app.screen.out(&document.to_string())?;
    } else if ended.answered {
        app.screen.out(&format!("turn {} of session {session} was answered before", ended.turn))?;
    } else {
        app.screen.out(&format!("turn {} of session {session} is over", ended.turn))?;
    }
    Ok(Exit::Done)
}

/// Text as a terminal may show it: what an agent says must not move the cursor.
pub(super) fn clean(text: &str) -> String {
    text.chars().filter(|c| matches!(c, '\n' | '\t') || !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::colour::Paint;

    #[test]
    fn sessions_are_seen_at_a_glance() {
        let session = |id: &str, node: u32, state: pb::SessionState, messages| pb::Session {
            session_id: id.into(),
            epoch: u64::from(node) + 1,
            owner: format!("0199c7a2-7d58-7c4e-9a35-2f4f6a1c0b11/{node}"),
            state: state.into(),
            messages,
            bytes: 4096,
            agent: if node == 0 { String::new() } else { "codex".into() },
        };
        let all = [
            session("notes", 0, pb::SessionState::Active, 4),
            session("review-7", 11, pb::SessionState::Transferring, 128),
        ];
        insta::assert_snapshot!(table(&all).render(80, Paint::OFF), @r"
        SESSION   STATE         NODE         MESSAGES  EPOCH  AGENT
        notes     active        0199c7a2/0          4      1  -
        review-7  transferring  0199c7a2/11       128     12  codex
        ");
        let json = as_json(&all[0]);
        for (field, value) in [("state", json!("active")), ("messages", json!(4)), ("epoch", json!(1))] {
            assert_eq!(json[field], value, "{json}");
        }
        assert_eq!(clean("a\u{1b}[2J\tb\n"), "a[2J\tb\n");
    }
}
