//! `drover why`: the router's explanation of where something is.

use drover_proto::router as pb;
use serde_json::json;

use crate::app::App;
use crate::args::Why;
use crate::client::{Client, unary};
use crate::fault::Exit;
use crate::render::colour;

pub(super) async fn run(app: &App, args: &Why) -> anyhow::Result<Exit> {
    let mut client = Client::connect(app).await?;
    let subject = client.in_full(&args.subject).await?;
    let answer = unary(client.rpc.explain(pb::ExplainRequest { subject })).await?;
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
        app.screen.out(&format!("  because  {reason}"))?;
    }
    for advice in &answer.next {
        app.screen.out(&format!("  next     {advice}"))?;
    }
    Ok(Exit::Done)
}
