//! `drover interrupt`: ends running turns, or withdraws a waiting prompt.

use drover_proto::router as pb;
use serde_json::json;

use super::{nodes_of, request_id};
use crate::app::App;
use crate::args::Interrupt;
use crate::client::{Client, unary};
use crate::fault::Exit;
use crate::render::words;

pub(super) async fn run(app: &App, args: &Interrupt) -> anyhow::Result<Exit> {
    let mut client = Client::connect(app).await?;
    let swarm = client.find(&args.swarm).await?;
    let request = pb::InterruptRequest {
        request_id: request_id(),
        swarm_id: swarm.swarm_id.clone(),
        nodes: nodes_of(&swarm, &args.nodes)?,
        injection_id: args.injection.clone().unwrap_or_default(),
    };
    let told = unary(client.rpc.interrupt(request)).await?.nodes;
    if app.global.json {
        app.screen.out(&json!({"swarm_id": swarm.swarm_id, "nodes": told}).to_string())?;
    } else {
        let nodes = words::count(told as usize, "node");
        app.screen.out(&format!("{nodes} told to interrupt; `drover attach {}` shows the outcome", swarm.swarm_id))?;
    }
    Ok(Exit::Done)
}
