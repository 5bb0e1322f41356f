//! One who listens to a turn. What waits for it is bounded: one that reads nothing for long is cut off with a word that says so, and loses
//! nothing by it, because it asks again under the same name of the turn, with how much of the answer it has.

use std::time::Duration;

use drover_proto::handoff::SendResponse;
use drover_proto::status_of;
use drover_types::{ErrorCode, Failure};
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

/// Parts of an answer that may wait for a slow reader, of up to 64 KiB each.
const WAITING: usize = 16;

/// The side that speaks.
pub(crate) struct Ear {
    parts: mpsc::Sender<Result<SendResponse, Status>>,
    /// What it hears when it has read all that waited for it.
    last: Option<oneshot::Sender<Status>>,
    /// How long it may read nothing.
    patience: Duration,
}

impl Ear {
    /// An ear, and what it hears.
    pub(crate) fn new(patience: Duration) -> (Self, BoxStream<'static, Result<SendResponse, Status>>) {
        let (parts, told) = mpsc::channel(WAITING);
        let (last, word) = oneshot::channel();
        let end = stream::once(word).filter_map(|word| std::future::ready(word.ok().map(Err)));
        (Self { parts, last: Some(last), patience }, Box::pin(ReceiverStream::new(told).chain(end)))
    }

    /// Nobody listens any more.
    pub(crate) async fn closed(&self) {
        self.parts.closed().await;
    }

    /// Says something. False: there is no use in saying more.
    pub(crate) async fn say(&mut self, part: Result<SendResponse, Status>) -> bool {
        if self.last.is_none() {
            return false;
        }
        if let Ok(said) = timeout(self.patience, self.parts.send(part)).await {
            return said.is_ok();
        }
        tracing::debug!(after_ms = self.patience.as_millis() as u64, "a listener that reads nothing is cut off");
        if let Some(last) = self.last.take() {
            let _ = last.send(cut_off(self.patience));
        }
        false
    }
}

fn cut_off(patience: Duration) -> Status {
    let message = format!("nothing of this answer was read for {} s", patience.as_secs_f64());
    let failure = Failure::new(ErrorCode::BackendUnavailable, message);
    status_of(
        &failure.hint("the turn goes on; ask again under the same request_id, with `offset` as far as it was read"),
    )
}

#[cfg(test)]
mod tests {
    use drover_proto::handoff::send_response::Update;
    use drover_proto::handoff::{SendResponse, Text};

    use super::*;

    fn part(offset: u64) -> SendResponse {
        SendResponse { update: Some(Update::Text(Text { offset, text: "x".to_owned() })) }
    }

    #[tokio::test(start_paused = true)]
    async fn one_who_reads_nothing_is_cut_off_and_knows_how_far_it_came() {
        let (mut ear, mut heard) = Ear::new(Duration::from_secs(30));
        let mut said = 0;
        while ear.say(Ok(part(said))).await {
            said += 1;
        }
        assert_eq!(said as usize, WAITING);
        assert!(!ear.say(Ok(part(said))).await, "nothing comes behind the gap");
        drop(ear);
        for offset in 0..said {
            let update = heard.next().await.unwrap().unwrap().update;
            assert_eq!(update, part(offset).update);
        }
        let status = heard.next().await.unwrap().unwrap_err();
        let failure = drover_proto::failure_of(&status);
        assert_eq!(failure.code, ErrorCode::BackendUnavailable, "a client asks again after it");
        assert!(failure.hint.contains("offset"), "{failure:?}");
        assert!(heard.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn one_who_reads_slowly_hears_all() {
        let (mut ear, mut heard) = Ear::new(Duration::from_secs(30));
        let speaks = async {
            for offset in 0..100 {
                assert!(ear.say(Ok(part(offset))).await);
            }
            drop(ear);
        };
        let hears = async {
            let mut count = 0;
            while let Some(part) = heard.next().await {
                part.unwrap();
                count += 1;
                tokio::time::sleep(Duration::from_secs(20)).await;
            }
            count
        };
        assert_eq!(tokio::join!(speaks, hears).1, 100);
    }
}
