//! Answers that come in pieces: reading them from events, handing pieces out, and putting the whole together.

use std::time::Duration;

use serde_json::Value;

use super::failure;
use super::keys::Secret;
use super::sse::{SseDecoder, SseEvent};
use super::transport::{Begun, Transport};
use crate::call::{CallAnswer, CallError, CallRequest, Citation, Delta, FailureKind, Finish, Sink, ToolCall, Usage};

/// Largest single event.
const MAX_EVENT_BYTES: usize = 4 << 20;
/// How long the end of the connection's answer is waited for after the answer itself has ended.
const LINGER: Duration = Duration::from_millis(50);

/// What is known of an answer so far.
#[derive(Debug, Default)]
pub(super) struct Assembly {
    pub(super) text: String,
    pub(super) tool_calls: Vec<ToolCall>,
    pub(super) finish: Option<Finish>,
    pub(super) usage: Option<Usage>,
    pub(super) model: Option<String>,
    pub(super) response_id: Option<String>,
    pub(super) citations: Vec<Citation>,
    pub(super) searches: Vec<String>,
    /// Pieces that have not been handed out yet.
    pub(super) deltas: Vec<Delta>,
    /// The provider has said that this was all.
    pub(super) ended: bool,
}

impl Assembly {
    pub(super) fn add_text(&mut self, text: &str) {
        if !text.is_empty() {
            self.text.push_str(text);
            self.deltas.push(Delta::Text(text.to_owned()));
        }
    }

    pub(super) fn add_call(&mut self, call: ToolCall) {
        let index = self.tool_calls.len();
        self.deltas.push(Delta::ToolCall { index, id: call.id.clone(), name: call.name.clone() });
        if !call.arguments.is_empty() {
            self.deltas.push(Delta::Arguments { index, text: call.arguments.clone() });
        }
        self.tool_calls.push(call);
    }

    pub(super) fn add_arguments(&mut self, index: usize, text: &str) {
        if let Some(call) = self.tool_calls.get_mut(index).filter(|_| !text.is_empty()) {
            call.arguments.push_str(text);
            self.deltas.push(Delta::Arguments { index, text: text.to_owned() });
        }
    }

    /// The answer, checked against the shape that was asked for.
    pub(super) fn answer(self, request: &CallRequest) -> Result<CallAnswer, CallError> {
        let finish = match self.finish {
            Some(finish) => finish,
            None if self.tool_calls.is_empty() => Finish::Stop,
            None => Finish::ToolCalls,
        };
        let mut answer = CallAnswer {
            text: self.text,
            tool_calls: self.tool_calls,
            finish,
            usage: self.usage,
            structured: None,
            model: self.model,
            response_id: self.response_id,
            citations: self.citations,
            searches: self.searches,
            hints: crate::call::LimitHints::default(),
        };
        // What was withheld or cut short is told by `finish`; to call it misshapen would have it bought again.
        let whole = matches!(answer.finish, Finish::Stop | Finish::Other(_));
        if let Some(schema) = request.schema.as_ref().filter(|_| whole) {
            match schema.check(&answer.text) {
                Ok(value) => answer.structured = Some(value),
                Err(why) => {
                    let message = format!("the answer is not of the shape that was asked for: {why}");
                    return Err(CallError { usage: answer.usage, ..CallError::new(FailureKind::Schema, message) });
                }
            }
        }
        Ok(answer)
    }
}

/// How one family puts an answer into events.
pub(super) trait Format {
    /// Takes in an event.
    fn event(&mut self, event: &SseEvent, into: &mut Assembly) -> Result<(), CallError>;
}

/// Reads a stream to its end and hands out its pieces.
pub(super) async fn read(
    transport: &Transport,
    begun: Begun,
    format: &mut (dyn Format + Send),
    sink: &mut dyn Sink,
) -> Result<Assembly, CallError> {
    let mut assembly = Assembly::default();
    let mut streamed = false;
    match pump(transport, begun, format, sink, &mut assembly, &mut streamed).await {
        Ok(()) => Ok(assembly),
        Err(error) => Err(CallError { streamed, usage: assembly.usage, maybe_billed: true, ..error }),
    }
}

async fn pump(
    transport: &Transport,
    begun: Begun,
    format: &mut (dyn Format + Send),
    sink: &mut dyn Sink,
    assembly: &mut Assembly,
    streamed: &mut bool,
) -> Result<(), CallError> {
    let mut answer = begun.answer;
    let mut decoder = SseDecoder::new(MAX_EVENT_BYTES);
    let mut received = 0;
    let mut open = true;
    while open && !assembly.ended {
        match answer.chunk().await.map_err(|error| failure::of_http(&error))? {
            Some(piece) => {
                received += piece.len();
                if received > transport.max_answer_bytes {
                    return Err(failure::malformed(format_args!(
                        "it is larger than {} bytes",
                        transport.max_answer_bytes
                    )));
                }
                decoder.push(&piece);
            }
            None => open = false,
        }
        loop {
            let event = match decoder.next_event().map_err(failure::malformed)? {
                Some(event) => event,
                None if open => break,
                None => match decoder.finish() {
                    Some(event) => event,
                    None => break,
                },
            };
            format.event(&event, assembly)?;
            for delta in assembly.deltas.drain(..) {
                *streamed = true;
                sink.delta(delta).await;
            }
            if assembly.ended {
                break;
            }
        }
    }
    if open {
        // The answer is whole. Its connection can be used again if the end comes at once; else it is closed.
        let _ = tokio::time::timeout(LINGER, answer.chunk()).await;
    }
    if assembly.ended || assembly.finish.is_some() {
        Ok(())
    } else {
        Err(CallError::new(FailureKind::Broken, "the stream ended before the answer did"))
    }
}

/// An event that is an error, whichever the family.
pub(super) fn error_event(value: &Value, text: &str, secret: Option<&Secret>) -> Option<CallError> {
    value.get("error").filter(|error| !error.is_null())?;
    Some(failure::in_stream(text.as_bytes(), secret))
}
