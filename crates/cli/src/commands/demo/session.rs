//! The step in which a conversation moves to another node while it talks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use drover_proto::handoff as pb;
use drover_sessions::{Ask, Door, Fixed, Heard, Sending};
use tokio::sync::oneshot;

use super::tour::Tour;
use crate::app::App;
use crate::commands::request_id;
use crate::commands::sessions::router;
use crate::render::colour::Tone;
use crate::render::words;

/// The session of the demo.
const NAME: &str = "notes";
const FIRST: &str = "Remember the word heliotrope.";
/// What it says while it moves.
const LONG: &str =
    "@echo over=1200ms\nWhile I say this, somebody asks for another node to have me; whoever listens does not notice.";
const RECALL: &str = "@echo recall";
/// Doors open a moment after their nodes came up.
const PATIENCE: Duration = Duration::from_secs(10);

/// One turn of the session.
struct Said {
    text: String,
    /// What was heard on the way, put together.
    heard: String,
    node: String,
}

impl Tour {
    pub(super) async fn move_a_session(&mut self) -> anyhow::Result<()> {
        if self.nodes() < 2 {
            return Ok(());
        }
        self.heading(&format!("drover send {NAME} --prompt \"...\", and while it talks: drover handoff {NAME}"))?;
        let since = Instant::now();
        let app = self.app().clone();
        let (_, door) = router(&app).await?;
        say(&app, &door, FIRST, None).await?;
        let (talks, begun) = oneshot::channel();
        let (talked, moved) = tokio::try_join!(say(&app, &door, LONG, Some(talks)), hand_off(&door, begun))?;
        if !app.global.json {
            let line = format!(
                "[{NAME} moved from {} to {} in {}; for {} of it no turn was taken]",
                short(&moved.from),
                short(&moved.to),
                words::took(moved.total_us),
                words::took(moved.frozen_us)
            );
            app.screen.out(&app.screen.paint().paint(Tone::Good, &line))?;
        }
        let recalled = say(&app, &door, RECALL, None).await?;
        let whole = talked.heard == talked.text && !talked.text.is_empty();
        let remembers = recalled.text.contains("heliotrope");
        let elsewhere = moved.from != moved.to && recalled.node == moved.to;
        let seen = match (whole, remembers, elsewhere) {
            (true, true, true) => format!(
                "it moved from {} to {} while it talked, and remembers what was said",
                short(&moved.from),
                short(&moved.to)
            ),
            (false, ..) => "a part of the answer was missing".to_owned(),
            (_, false, _) => format!("it does not remember: {}", recalled.text),
            (.., false) => format!("it is on {} and should be on {}", recalled.node, moved.to),
        };
        self.saw("session", since, whole && remembers && elsewhere, seen);
        Ok(())
    }
}

async fn hand_off(door: &Door, begun: oneshot::Receiver<()>) -> anyhow::Result<pb::HandoffResponse> {
    begun.await.context("the session did not talk")?;
    let mut client = door.client.clone();
    let request = pb::HandoffRequest { session_id: NAME.to_owned(), to: String::new() };
    let moved = client.handoff(request).await.map_err(|status| crate::fault::Fault::of_status(&status))?;
    Ok(moved.into_inner())
}

/// Says something in the session and shows the answer as it comes. `talks` hears of its first word.
async fn say(app: &App, door: &Door, prompt: &str, mut talks: Option<oneshot::Sender<()>>) -> anyhow::Result<Said> {
    let ask = Ask {
        session: NAME.parse()?,
        request: request_id().parse()?,
        prompt: prompt.to_owned(),
        open: Some(pb::OpenSession { agent: "echo".to_owned(), ..pb::OpenSession::default() }),
        patience: PATIENCE,
    };
    let mut sending = Sending::new(ask, Arc::new(Fixed(vec![door.clone()])));
    let (mut heard, mut node) = (String::new(), String::new());
    let show = |text: &str| if app.global.json { Ok(()) } else { app.screen.text(text) };
    loop {
        match sending.next().await.map_err(|error| anyhow::anyhow!("{error}"))? {
            Some(Heard::Accepted(accepted)) if node.is_empty() => {
                node.clone_from(&accepted.node_id);
                show(&format!("{} ", app.screen.paint().paint(Tone::Dim, &format!("{} |", short(&node)))))?;
            }
            Some(Heard::Text(text)) => {
                show(&text)?;
                heard.push_str(&text);
                if let Some(talks) = talks.take() {
                    let _ = talks.send(());
                }
            }
            Some(Heard::Again(text)) => heard = text,
            Some(Heard::Answer(answer)) => {
                show("\n")?;
                ensure!(answer.fault.is_empty(), "the session did not answer: {}", answer.message);
                return Ok(Said { text: answer.text, heard, node: answer.node_id });
            }
            Some(Heard::Accepted(_) | Heard::Moved(_)) => {}
            None => anyhow::bail!("the session ended without an answer"),
        }
    }
}

/// "node 2" of a gossip id.
fn short(node: &str) -> String {
    match node.rsplit_once('/') {
        Some((_, index)) => format!("node {index}"),
        None => node.to_owned(),
    }
}
