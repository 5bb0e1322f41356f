//! `drover attach`: follows a swarm.

use super::follow::{self, Ended};
use crate::app::App;
use crate::args::Attach;
use crate::client::Client;
use crate::fault::Exit;
use crate::watch::Watch;

pub(super) async fn run(app: &App, args: &Attach) -> anyhow::Result<Exit> {
    let mut client = Client::connect(app).await?;
    let swarm = client.find(&args.swarm).await?;
    let over = matches!(swarm.status.as_str(), "terminated" | "failed");
    let from = args.since.unwrap_or(client.info.last_seq);
    let mut watch = Watch::new(app, client.rpc, from, &swarm.swarm_id, !over);
    if over {
        app.screen.note(&format!("swarm {} is {} and says nothing more", swarm.swarm_id, swarm.status));
        let mut teller = follow::Teller::new(app);
        while let Some(events) = watch.next().await? {
            for event in &events {
                teller.tell(event)?;
            }
        }
        return Ok(Exit::Done);
    }
    app.screen.progress(&format!("attached to swarm {} ({}); Ctrl-C detaches", swarm.swarm_id, swarm.status));
    if let Ended::Swarm = follow::swarm(app, &mut watch).await? {
        app.screen.progress("the swarm has ended");
    }
    Ok(Exit::Done)
}
