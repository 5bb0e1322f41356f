//! `drover handoff`: moves a session to another node.

use drover_proto::handoff as pb;
use serde_json::json;

use super::sessions::{named, node_of, router, short_node};
use crate::app::App;
use crate::args::Handoff;
use crate::fault::Exit;
use crate::render::words;

pub(super) async fn run(app: &App, args: &Handoff) -> anyhow::Result<Exit> {
    let (mut client, mut door) = router(app).await?;
    let to = match &args.to {
        Some(node) => node_of(&mut client, node).await?,
        None => String::new(),
    };
    let spinner = app.screen.spinner("moving");
    // It takes as long as its attempts do; the nodes know when to give up.
    let request = pb::HandoffRequest { session_id: args.session.clone(), to };
    let answer = door.client.handoff(request).await.map_err(|status| named(&status, &args.session))?.into_inner();
    drop(spinner);
    if app.global.json {
        let document = json!({
            "handoff_id": answer.handoff_id, "session_id": args.session, "from": answer.from, "to": answer.to,
            "epoch": answer.epoch, "bytes": answer.bytes, "attempts": answer.attempts,
            "frozen_us": answer.frozen_us, "total_us": answer.total_us,
        });
        app.screen.out(&document.to_string())?;
        return Ok(Exit::Done);
    }
    app.screen.out(&format!(
        "session {} moved from {} to {} in {}; for {} of it no turn was taken",
        args.session,
        short_node(&answer.from, 8),
        short_node(&answer.to, 8),
        words::took(answer.total_us),
        words::took(answer.frozen_us),
    ))?;
    Ok(Exit::Done)
}
