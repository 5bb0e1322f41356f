//! `drover terminate`: ends a swarm and waits for its end.

use drover_proto::router as pb;
use drover_proto::router::terminate_swarm_response::Step as TerminateStep;

use super::request_id;
use crate::app::App;
use crate::args::Terminate;
use crate::client::{Client, Rpc};
use crate::fault::Exit;
use crate::render::json;
use crate::watch::{self, Resumable, Step};

pub(super) async fn run(app: &App, args: &Terminate) -> anyhow::Result<Exit> {
    let mut client = Client::connect(app).await?;
    let swarm_id = client.find(&args.swarm).await?.swarm_id;
    let ending = terminate(app, &client, &swarm_id, args.force);
    let swarm = tokio::select! {
        swarm = ending => swarm?,
        () = app.stop.cancelled() => {
            app.screen.note(&format!("the termination goes on; look at it with: drover status {swarm_id}"));
            return Ok(Exit::Failed);
        }
    };
    if app.global.json {
        app.screen.out(&json::swarm(&swarm).to_string())?;
    } else {
        app.screen.out(&format!("swarm {swarm_id} terminated"))?;
    }
    Ok(Exit::Done)
}

/// Ends a swarm; repeats itself when the router restarts meanwhile.
pub(super) async fn terminate(app: &App, client: &Client, swarm_id: &str, force: bool) -> anyhow::Result<pb::Swarm> {
    let request = pb::TerminateSwarmRequest { request_id: request_id(), swarm_id: swarm_id.to_owned(), force };
    let mut steps: Resumable<pb::TerminateSwarmResponse> =
        watch::repeatable(app, client.rpc.clone(), move |mut rpc: Rpc| {
            let request = request.clone();
            Box::pin(async move { rpc.terminate_swarm(request).await })
        });
    let spinner = app.screen.spinner("terminating");
    loop {
        let Step::Item(answer) = steps.next().await? else {
            steps.cut_short().await?;
            continue;
        };
        match answer.step {
            Some(TerminateStep::Progress(progress)) => spinner.say(&progress.message),
            Some(TerminateStep::Terminated(swarm)) => return Ok(swarm),
            None => {}
        }
    }
}
