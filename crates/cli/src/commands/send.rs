//! `drover send`: says something in a session and streams the answer, wherever the session is or goes meanwhile.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use drover_proto::handoff as pb;
use drover_sessions::{Ask, Door, Fixed, Heard, SendError, Sending};
use drover_types::{ErrorCode, IdError, RequestId, SessionId};
use serde_json::{Value, json};

use super::sessions::{clean, router, short_node};
use super::{carriable, request_id, text_or_stdin};
use crate::app::App;
use crate::args::SendArgs;
use crate::fault::{Exit, Fault};

/// How long no door may help before a person is told.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) async fn run(app: &App, args: SendArgs) -> anyhow::Result<Exit> {
    let ask = ask_of(&args)?;
    let doors = if args.entries.is_empty() {
        vec![router(app).await?.1]
    } else {
        args.entries.iter().map(|entry| Door::at(entry)).collect()
    };
    let (session, request) = (ask.session.to_string(), ask.request.to_string());
    let mut sending = Sending::new(ask, Arc::new(Fixed(doors)));
    let mut teller = Teller { app, session: &session, request: &request, open_line: false };
    loop {
        let heard = tokio::select! {
            () = app.stop.cancelled() => {
                teller.end_line()?;
                app.screen.note(&format!(
                    "the turn goes on; to hear its answer repeat the command with --request {request}; to end it: drover sessions {session} --interrupt --request {request}"
                ));
                return Ok(Exit::Failed);
            }
            heard = sending.next() => heard,
        };
        let heard = match heard {
            Ok(heard) => heard,
            Err(error) => {
                teller.end_line()?;
                return Err(fault_of(&error, &request).into());
            }
        };
        match heard {
            None => return Err(Fault::failed("the turn ended without an answer").into()),
            Some(Heard::Answer(answer)) => {
                teller.answer(&answer)?;
                return if answer.fault.is_empty() { Ok(Exit::Done) } else { Err(lost(&answer).into()) };
            }
            Some(heard) => teller.tell(&heard)?,
        }
    }
}

fn ask_of(args: &SendArgs) -> Result<Ask, Fault> {
    let bad = |error: IdError| {
        let mut fault = Fault::usage(error.to_string()).hint("take a name such as notes or review-7");
        fault.code = Some(ErrorCode::InvalidRequest);
        fault
    };
    let session: SessionId = args.session.parse().map_err(bad)?;
    let request: RequestId = args.request.clone().unwrap_or_else(request_id).parse().map_err(bad)?;
    let prompt = match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => text_or_stdin(text)?,
        (None, Some(path)) => std::fs::read_to_string(path).map_err(|error| {
            Fault::failed(format!("cannot read the prompt from {}: {error}", path.display()))
                .hint("--prompt-file wants a file of UTF-8 text")
        })?,
        (None, None) => String::new(),
    };
    if prompt.trim().is_empty() {
        return Err(
            Fault::usage("the prompt is empty").hint("give it with --prompt TEXT, --prompt - or --prompt-file FILE")
        );
    }
    let open = pb::OpenSession {
        agent: args.agent.clone().unwrap_or_default(),
        capabilities: args.needs.iter().map(|(key, value)| format!("{key}={value}")).collect(),
        metadata: args.labels.iter().cloned().collect(),
    };
    Ok(Ask { session, request, prompt: carriable(prompt)?, open: Some(open), patience: PATIENCE })
}

fn fault_of(error: &SendError, request: &str) -> Fault {
    match error {
        SendError::Refused(status) => Fault::of_status(status),
        SendError::Unreachable { why } => {
            Fault::new(Exit::Unreachable, format!("no door to the sessions answers: {why}")).hint(format!(
                "`drover members` shows the nodes; repeat the command with --request {request}: what was heard already is done once only"
            ))
        }
    }
}

fn lost(answer: &pb::Answer) -> Fault {
    let mut fault =
        Fault::failed(if answer.message.is_empty() { answer.fault.clone() } else { answer.message.clone() });
    fault.code = (answer.fault == "turn_lost").then_some(ErrorCode::TurnLost);
    fault.hint(match answer.fault.as_str() {
        "turn_lost" => "say it again when it is safe to repeat",
        "interrupted" => "somebody ended it, or its node; the session goes on: say it again, or something else",
        _ => "`drover why SESSION` says more",
    })
}

/// Prints what is heard: the text alone, as it comes, or JSON Lines.
struct Teller<'a> {
    app: &'a App,
    session: &'a str,
    request: &'a str,
    /// The last thing printed was text without a line's end.
    open_line: bool,
}

impl Teller<'_> {
    fn tell(&mut self, heard: &Heard) -> io::Result<()> {
        if self.app.global.json {
            return self.line(&match heard {
                Heard::Accepted(accepted) => json!({
                    "event": "accepted", "turn": accepted.turn, "epoch": accepted.epoch, "node_id": accepted.node_id,
                }),
                Heard::Text(text) => json!({"event": "text", "content": text}),
                Heard::Again(text) => json!({"event": "again", "content": text}),
                Heard::Moved(moved) => {
                    json!({"event": "moved", "epoch": moved.epoch, "node_id": moved.node_id})
                }
                Heard::Answer(_) => return Ok(()),
            });
        }
        match heard {
            Heard::Text(text) => self.text(text),
            Heard::Again(text) => {
                self.end_line()?;
                self.app.screen.note("the turn was run again; this is its answer from the beginning:");
                self.text(text)
            }
            Heard::Moved(moved) => {
                self.app.screen.progress(&format!("[the session has moved to {}]", short_node(&moved.node_id, 8)));
                Ok(())
            }
            Heard::Accepted(_) | Heard::Answer(_) => Ok(()),
        }
    }

    fn text(&mut self, text: &str) -> io::Result<()> {
        let text = clean(text);
        if let Some(last) = text.chars().next_back() {
            self.open_line = last != '\n';
        }
        self.app.screen.text(&text)
    }

    fn answer(&mut self, answer: &pb::Answer) -> io::Result<()> {
        if !self.app.global.json {
            return self.end_line();
        }
        let status = if answer.fault.is_empty() { "completed" } else { "failed" };
        self.line(&json!({
            "event": "answer", "status": status, "turn": answer.turn, "epoch": answer.epoch, "node_id": answer.node_id,
            "content": answer.text, "fault": answer.fault, "error": answer.message,
        }))
    }

    fn line(&self, line: &Value) -> io::Result<()> {
        let mut line = line.clone();
        line["session_id"] = self.session.into();
        line["request_id"] = self.request.into();
        self.app.screen.out(&line.to_string())
    }

    fn end_line(&mut self) -> io::Result<()> {
        if std::mem::take(&mut self.open_line) { self.app.screen.text("\n") } else { Ok(()) }
    }
}
