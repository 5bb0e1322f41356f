//! One call, from its start to its end or until it is broken off.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::{mpsc, oneshot};
use tracing::Instrument as _;

use crate::call::{CallError, Delta, FailureKind, LimitHints, Sink};
use crate::core::AttemptId;
use crate::shell::client::{End, Message};
use crate::shell::{Lane, Work, spans};

/// Makes the call and says how it ended. It is broken off when `keep` is dropped: the future of the call goes, and with it the
/// connection.
pub(super) async fn make(
    attempt: AttemptId,
    work: Work,
    lane: Arc<Lane>,
    stream: Option<mpsc::Sender<Delta>>,
    keep: oneshot::Receiver<()>,
    tell: mpsc::Sender<Message>,
) -> (AttemptId, End) {
    let mut sink = Progress { attempt, tell, stream, begun: false };
    let called = async {
        match (&work, &lane.provider) {
            (Work::Call(request), Some(provider)) => provider.call(&lane.model, request, &mut sink).await,
            (Work::Errand(errand), _) => errand.run(&mut sink).await,
            (Work::Call(_), None) => {
                Err(CallError { maybe_billed: false, ..CallError::new(FailureKind::Unsupported, "no model is there") })
            }
        }
    };
    let span = spans::of(&work, &lane);
    let end = tokio::select! {
        biased;
        result = called.instrument(span.clone()) => {
            spans::ended(&span, &result);
            End::Called(Box::new(result))
        }
        _ = keep => End::Aborted,
    };
    (attempt, end)
}

/// Tells the driver how far a call is, and passes pieces of the answer on.
struct Progress {
    attempt: AttemptId,
    tell: mpsc::Sender<Message>,
    stream: Option<mpsc::Sender<Delta>>,
    begun: bool,
}

#[async_trait]
impl Sink for Progress {
    fn head(&mut self, hints: &LimitHints) {
        // The answer of a call that is not streamed comes with the same hints a moment later.
        if self.stream.is_some() && *hints != LimitHints::default() {
            // A full queue costs only the early word.
            let _ = self.tell.try_send(Message::Headers { attempt: self.attempt, hints: *hints });
        }
    }

    async fn delta(&mut self, delta: Delta) {
        let Some(stream) = &self.stream else { return };
        if !self.begun {
            self.begun = true;
            let _ = self.tell.send(Message::FirstByte { attempt: self.attempt }).await;
        }
        // A reader that went away is noticed by whoever waits for the end.
        let _ = stream.send(delta).await;
    }
}
