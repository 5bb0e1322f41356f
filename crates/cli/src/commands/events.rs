//! `drover events`: the log, event by event.

use drover_proto::router as pb;

use crate::app::App;
use crate::args::Events;
use crate::client::Client;
use crate::fault::{Exit, Fault};
use crate::render::colour::{Paint, Tone};
use crate::render::json;
use crate::render::table::{self, cut};
use crate::render::transcript::summary;
use crate::render::words;
use crate::watch::Watch;

pub(super) async fn run(app: &App, args: &Events) -> anyhow::Result<Exit> {
    let mut client = Client::connect(app).await?;
    let swarm = match &args.swarm {
        Some(id) => client.find(id).await?.swarm_id,
        None => String::new(),
    };
    let from = args.since.unwrap_or(if args.follow { client.info.last_seq } else { 0 });
    if from > client.info.last_seq {
        return Err(Fault::failed(format!("--since {from} lies beyond the last event, {}", client.info.last_seq))
            .hint("begin with --since 0: each state directory numbers its own events")
            .into());
    }
    let width = table::width();
    let mut watch = Watch::new(app, client.rpc, from, &swarm, args.follow);
    loop {
        let events = tokio::select! {
            () = app.stop.cancelled() => return Ok(Exit::Done),
            events = watch.next() => events?,
        };
        let Some(events) = events else { return Ok(Exit::Done) };
        for event in &events {
            let line =
                if app.global.json { json::event_line(event) } else { text_line(event, width, app.screen.paint()) };
            app.screen.out(&line)?;
        }
    }
}

/// One event for people: number, time of day (UTC), where, what.
fn text_line(event: &pb::Event, width: usize, paint: Paint) -> String {
    let at = json::timestamp(event.timestamp_us);
    let time = at.get(11..23).unwrap_or("-");
    let place = match (event.swarm_id.as_str(), event.node_id) {
        ("", _) => "-".to_owned(),
        (swarm, None) => words::short(swarm, 13).to_owned(),
        (swarm, Some(node)) => format!("{}/{node}", words::short(swarm, 13)),
    };
    let head = format!("{:>7} {time} {place:<16} {:<20}", event.seq, event.event);
    let room = width.saturating_sub(head.chars().count() + 1).max(16);
    let said = cut(&summary(event), room);
    format!("{} {said}", paint.paint(Tone::Dim, &head)).trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_of_the_terminal() {
        let event = pb::Event {
            seq: 41,
            timestamp_us: 1_772_063_938_123_456,
            stored_us: 0,
            event: "assistant".into(),
            swarm_id: "0199c7a2-7d58-7c4e-9a35-2f4f6a1c0b11".into(),
            node_id: Some(3),
            data: bytes::Bytes::from_static(br#"{"content":"first line\nsecond line that goes on"}"#),
            ..Default::default()
        };
        let line = text_line(&event, 80, Paint::OFF);
        insta::assert_snapshot!(line, @"     41 23:58:58.123 0199c7a2-7d58/3  assistant            first line second li…");
        assert!(line.chars().count() <= 80);
    }
}
