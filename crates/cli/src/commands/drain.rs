//! `drover drain`: empties a node of its sessions.

use drover_proto::handoff as pb;
use serde_json::json;

use super::sessions::{node_of, router, short_node};
use crate::app::App;
use crate::args::Drain;
use crate::fault::{Exit, Fault};
use crate::render::words;

/// Sessions that are named when they cannot go.
const NAMED: usize = 5;

pub(super) async fn run(app: &App, args: &Drain) -> anyhow::Result<Exit> {
    let (mut client, mut door) = router(app).await?;
    let node = node_of(&mut client, &args.node).await?;
    let request = pb::DrainRequest { node_id: node.clone(), undo: args.undo, ..pb::DrainRequest::default() };
    let of_status = |status: tonic::Status| Fault::of_status(&status);
    let mut steps = door.client.drain(request).await.map_err(of_status)?.into_inner();
    let bar = app.screen.bar(0, "sessions moved");
    let mut last = pb::DrainResponse::default();
    loop {
        let step = tokio::select! {
            () = app.stop.cancelled() => {
                drop(bar);
                app.screen.note(
                    "the node goes on being emptied; the same command tells how far it is, and with --undo takes it back",
                );
                return Ok(Exit::Failed);
            }
            step = steps.message() => step.map_err(of_status)?,
        };
        let Some(step) = step else { break };
        if app.global.json {
            app.screen.out(&as_json(&node, &step, false).to_string())?;
        } else {
            bar.all(u64::from(step.moved + step.left));
            bar.at(u64::from(step.moved));
        }
        last = step;
    }
    drop(bar);
    verdict(app, args, &node, &last)
}

fn as_json(node: &str, step: &pb::DrainResponse, done: bool) -> serde_json::Value {
    json!({"node_id": node, "moved": step.moved, "left": step.left, "stuck": step.stuck, "done": done})
}

fn verdict(app: &App, args: &Drain, node: &str, last: &pb::DrainResponse) -> anyhow::Result<Exit> {
    if app.global.json {
        app.screen.out(&as_json(node, last, true).to_string())?;
    } else if args.undo {
        app.screen.out(&format!("node {} takes sessions again", short_node(node, 8)))?;
    } else {
        let moved = words::count(last.moved as usize, "session");
        app.screen.out(&format!("node {} is drained: {moved} moved, {} left", short_node(node, 8), last.left))?;
    }
    if args.undo || (last.left == 0 && last.stuck.is_empty()) {
        return Ok(Exit::Done);
    }
    let named: Vec<&str> = last.stuck.iter().take(NAMED).map(String::as_str).collect();
    let stuck = last.stuck.len().max(last.left as usize);
    let which = if named.is_empty() { String::new() } else { format!(": {}", named.join(", ")) };
    let more = if last.stuck.len() > NAMED { ", …" } else { "" };
    Err(Fault::failed(format!("no node took {}{which}{more}", words::count(stuck, "session")))
        .hint("`drover why SESSION` says why; `drover members` shows which nodes there are and how loaded each is")
        .into())
}
