//! `drover why`: why something is where it is, as the router explains it or, of a session, the nodes.

use drover_proto::handoff;
use drover_proto::router as pb;
use drover_types::ErrorCode;
use serde_json::json;

use super::sessions::{as_json, router};
use crate::app::App;
use crate::args::Why;
use crate::client::unary;
use crate::fault::{Exit, Fault};
use crate::render::colour;
use crate::render::json::timestamp;
use crate::render::table::tame;

pub(super) async fn run(app: &App, args: &Why) -> anyhow::Result<Exit> {
    let (mut client, mut door) = router(app).await?;
    let subject = client.in_full(&args.subject).await?;
    let explained = unary(client.rpc.explain(pb::ExplainRequest { subject: subject.clone() })).await;
    let answer = match explained {
        Ok(answer) => answer,
        // Nothing of the router's own: it may be a session, which the nodes know.
        Err(fault) if is_unknown(&fault) => {
            return match unary(door.client.explain(handoff::ExplainRequest { session_id: subject })).await {
                Ok(answer) => session(app, &answer),
                Err(of_session) => Err(neither(fault, of_session, &args.subject).into()),
            };
        }
        Err(fault) => return Err(fault.into()),
    };
    if app.global.json {
        let document = json!({
            "kind": answer.kind, "id": answer.id, "state": answer.state, "because": answer.because, "next": answer.next,
        });
        app.screen.out(&document.to_string())?;
        return Ok(Exit::Done);
    }
    let paint = app.screen.paint();
    let state = paint.paint(colour::of_state(&answer.state), &answer.state);
    app.screen.out(&format!("{} {} is {state}", answer.kind, answer.id))?;
    for reason in &answer.because {
        app.screen.out(&format!("  because  {}", tame(reason)))?;
    }
    for advice in &answer.next {
        app.screen.out(&format!("  next     {}", tame(advice)))?;
    }
    Ok(Exit::Done)
}

/// The router does not know it, and the nodes do not answer for a session of that name.
fn neither(fault: Fault, of_session: Fault, subject: &str) -> Fault {
    match of_session.code {
        Some(ErrorCode::UnknownSession) => unknown(fault, subject),
        // No swarm is up, or the name is none that a session can have.
        Some(ErrorCode::UnknownSwarm | ErrorCode::InvalidRequest) => {
            let mut fault = unknown(fault, subject);
            fault.message = format!("{}; sessions were not looked for: {}", fault.message, of_session.message);
            fault
        }
        // Whether there is such a session nobody could say.
        _ => Fault {
            message: format!(
                "no swarm, node or injection is called {subject}, and whether a session is cannot be found out: {}",
                of_session.message
            ),
            ..of_session
        },
    }
}

fn unknown(mut fault: Fault, subject: &str) -> Fault {
    if fault.message.contains("nothing is called") {
        fault.message = format!("nothing is called {subject}: no swarm, node, injection or session");
        "`drover list` shows the swarms, `drover sessions` the sessions".clone_into(&mut fault.hint);
    }
    fault
}

fn is_unknown(fault: &Fault) -> bool {
    matches!(
        fault.code,
        Some(
            ErrorCode::UnknownSwarm
                | ErrorCode::UnknownInjection
                | ErrorCode::NodeOutOfRange
                | ErrorCode::InvalidRequest
        )
    )
}

fn session(app: &App, answer: &handoff::ExplainResponse) -> anyhow::Result<Exit> {
    let session = answer.session.clone().unwrap_or_default();
    let described = as_json(&session);
    let state = described["state"].as_str().unwrap_or_default().to_owned();
    if app.global.json {
        let owners: Vec<_> = answer
            .owners
            .iter()
            .map(|owner| {
                json!({
                    "epoch": owner.epoch, "node_id": owner.node_id, "boot": owner.boot, "cause": owner.cause,
                    "handoff_id": owner.handoff_id,
                })
            })
            .collect();
        let events: Vec<_> = answer
            .events
            .iter()
            .map(|event| json!({"timestamp": timestamp(event.timestamp_us), "text": event.text}))
            .collect();
        let document = json!({
            "kind": "session", "id": session.session_id, "state": state, "because": answer.lines, "next": [],
            "owners": owners, "events": events, "session": described,
        });
        app.screen.out(&document.to_string())?;
        return Ok(Exit::Done);
    }
    let paint = app.screen.paint();
    let state = paint.paint(colour::of_state(&state), &state);
    app.screen.out(&format!("session {} is {state} on {}", session.session_id, session.owner))?;
    for line in &answer.lines {
        app.screen.out(&format!("  because  {line}"))?;
    }
    for event in &answer.events {
        let at = timestamp(event.timestamp_us);
        app.screen.out(&format!("  {}  {}", at.get(11..19).unwrap_or_default(), event.text))?;
    }
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use drover_types::Failure;

    use super::*;

    #[test]
    fn what_the_nodes_said_is_not_hidden_behind_what_the_router_does_not_know() {
        let router =
            || Fault::of_failure(Failure::new(ErrorCode::UnknownInjection, "nothing is called talk".to_owned()));
        let nodes = |code, message: &str| Fault::of_failure(Failure::new(code, message.to_owned()).hint("wait"));
        let said = neither(router(), nodes(ErrorCode::UnknownSession, "there is no session talk"), "talk");
        assert_eq!(said.message, "nothing is called talk: no swarm, node, injection or session");
        assert!(said.hint.contains("drover sessions"), "{said:?}");
        let asked = "no node takes what is said to sessions; 1 node asked: a/0: connection refused";
        let said = neither(router(), nodes(ErrorCode::BackendUnavailable, asked), "talk");
        assert!(said.message.contains("called talk") && said.message.ends_with(asked), "{said:?}");
        assert_eq!((said.code, said.hint.as_str()), (Some(ErrorCode::BackendUnavailable), "wait"));
        let said = neither(router(), nodes(ErrorCode::UnknownSwarm, "no swarm is up"), "talk");
        assert!(said.message.starts_with("nothing is called talk") && said.message.ends_with("no swarm is up"));
        let said = neither(router(), Fault::unreachable("gone"), "talk");
        assert!(said.message.ends_with("gone") && said.exit == Exit::Unreachable, "{said:?}");
    }
}
