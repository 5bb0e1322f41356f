//! Printing events of one swarm as they come: lanes and lines for people, JSON Lines for scripts.

use std::io;

use drover_proto::router as pb;

use crate::app::App;
use crate::fault::Fault;
use crate::render::json;
use crate::render::lanes::Lanes;
use crate::render::screen::Screen;
use crate::render::transcript::Transcript;
use crate::watch::Watch;

/// Prints the events of one swarm.
pub(super) struct Teller {
    screen: Screen,
    json: bool,
    transcript: Transcript,
    lanes: Lanes,
}

impl Teller {
    pub(super) fn new(app: &App) -> Self {
        Self {
            screen: app.screen.clone(),
            json: app.global.json,
            transcript: Transcript::default(),
            lanes: Lanes::new(&app.screen),
        }
    }

    pub(super) fn tell(&mut self, event: &pb::Event) -> io::Result<()> {
        if self.json {
            return self.screen.out(&json::event_line(event));
        }
        for line in self.transcript.take(event) {
            self.screen.line(&line)?;
        }
        if let Some(node) = event.node_id {
            self.lanes.member(node, &event.event, &crate::render::json::data_of(event));
            self.lanes.show(node, &self.transcript);
        }
        Ok(())
    }
}

/// The event after which nothing more comes from the swarm.
pub(super) fn ends_swarm(event: &pb::Event) -> bool {
    match event.event.as_str() {
        "swarm_terminated" | "swarm_removed" | "swarm_launch_failed" => true,
        "swarm_state" => {
            let status = json::data_of(event);
            matches!(status.get("status").and_then(serde_json::Value::as_str), Some("terminated" | "failed"))
        }
        _ => false,
    }
}

/// How following ended.
pub(super) enum Ended {
    /// The swarm is over.
    Swarm,
    /// The person has seen enough.
    Asked,
}

/// Prints everything a swarm says until it ends or the person stops it.
pub(super) async fn swarm(app: &App, watch: &mut Watch) -> anyhow::Result<Ended> {
    let mut teller = Teller::new(app);
    loop {
        let events = tokio::select! {
            () = app.stop.cancelled() => return Ok(Ended::Asked),
            events = watch.next() => events?,
        };
        for event in &events.ok_or_else(|| Fault::failed("the router ended the stream"))? {
            teller.tell(event)?;
            if ends_swarm(event) {
                return Ok(Ended::Swarm);
            }
        }
    }
}
