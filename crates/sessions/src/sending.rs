//! A turn under way: which door is asked, and what is done when it fails.

use std::collections::VecDeque;
use std::error::Error as _;
use std::sync::Arc;
use std::time::Duration;

use drover_proto::handoff as pb;
use drover_service::{in_trace, traceparent};
use drover_types::{ErrorCode, RequestId, SessionId};
use thiserror::Error;
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Status, Streaming};
use tracing::debug;

use crate::door::{Door, Doors, Opens};
use crate::ear::{Ear, Heard};

/// A door that says nothing for so long is left; asking the same at another one is safe.
const SILENCE: Duration = Duration::from_secs(30);
/// How long a door may take to begin to speak at all; one that passes on may have to find another that answers.
const FIRST_WORD: Duration = Duration::from_secs(30);
/// Pause before doors are tried again after all have failed; it doubles up to the longest.
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// What is asked.
#[derive(Debug, Clone)]
pub struct Ask {
    /// In which session.
    pub session: SessionId,
    /// The asker's name of the turn. The same name is the same turn, however often and wherever it is asked.
    pub request: RequestId,
    /// What is said.
    pub prompt: String,
    /// Opens the session when there is none.
    pub open: Option<pb::OpenSession>,
    /// How long no door may help before it is given up.
    pub patience: Duration,
}

/// There is no answer.
#[derive(Debug, Error)]
pub enum SendError {
    /// A door said no, and another one would say the same.
    #[error("the turn is refused: {}", .0.message())]
    Refused(Status),
    /// No door could be reached, or none went on.
    #[error("no door to the sessions answers: {why}")]
    Unreachable {
        /// The last reason.
        why: String,
    },
}

/// One turn, until its answer is whole.
pub struct Sending {
    ask: Ask,
    doors: Arc<dyn Doors>,
    ear: Ear,
    /// Doors that are still to be tried in this round.
    round: VecDeque<Door>,
    stream: Option<(Door, Streaming<pb::SendResponse>)>,
    /// The door that was to open the session has said that its node takes none.
    declined: bool,
    ready: VecDeque<Heard>,
    pause: Duration,
    since: Instant,
    why: String,
    over: bool,
}

impl Sending {
    /// Nothing is asked before the first [`Self::next`].
    pub fn new(ask: Ask, doors: Arc<dyn Doors>) -> Self {
        Self {
            ask,
            doors,
            ear: Ear::default(),
            round: VecDeque::new(),
            stream: None,
            declined: false,
            ready: VecDeque::new(),
            pause: PAUSE,
            since: Instant::now(),
            why: "there is none".to_owned(),
            over: false,
        }
    }

    /// The next thing that is heard; nothing after the answer.
    pub async fn next(&mut self) -> Result<Option<Heard>, SendError> {
        loop {
            if let Some(heard) = self.ready.pop_front() {
                return Ok(Some(heard));
            }
            if self.over {
                return Ok(None);
            }
            match self.stream.take() {
                Some((door, stream)) => self.listen(door, stream).await?,
                None => self.knock().await?,
            }
        }
    }

    /// Asks the next door.
    async fn knock(&mut self) -> Result<(), SendError> {
        let Some(mut door) = self.round.pop_front() else {
            if self.since.elapsed() >= self.ask.patience {
                return Err(SendError::Unreachable { why: std::mem::take(&mut self.why) });
            }
            if self.pause > PAUSE {
                sleep(self.pause).await;
            }
            self.pause = (self.pause * 2).min(LONGEST_PAUSE);
            self.round = self.doors.doors().await.into();
            return Ok(());
        };
        let request = pb::SendRequest {
            session_id: self.ask.session.to_string(),
            request_id: self.ask.request.to_string(),
            prompt: self.ask.prompt.clone(),
            open: self.ask.open.clone().filter(|_| self.may_open(&door)),
            offset: self.ear.offset(),
            known_epoch: self.ear.epoch(),
            redirect_only: false,
            placed: door.opens == Opens::Here,
        };
        let request = in_trace(request, &traceparent().unwrap_or_default());
        match timeout(FIRST_WORD, door.client.send(request)).await {
            Ok(Ok(stream)) => self.stream = Some((door, stream.into_inner())),
            Ok(Err(status)) => self.failed(&door, status)?,
            Err(_) => self.left(&door.name, "it does not answer"),
        }
        Ok(())
    }

    /// A session that is not there yet may be opened through this door.
    fn may_open(&self, door: &Door) -> bool {
        door.opens != Opens::Nothing || self.declined
    }

    async fn listen(&mut self, door: Door, mut stream: Streaming<pb::SendResponse>) -> Result<(), SendError> {
        match timeout(SILENCE, stream.message()).await {
            Ok(Ok(Some(pb::SendResponse { update: Some(update) }))) => {
                let Some(heard) = self.ear.hear(update) else {
                    self.ear.start_over();
                    self.left(&door.name, "a part of the answer is missing");
                    return Ok(());
                };
                self.over = heard.iter().any(|heard| matches!(heard, Heard::Answer(_)));
                self.ready.extend(heard);
                // Somebody goes on with it: patience begins anew.
                (self.since, self.pause) = (Instant::now(), PAUSE);
                if !self.over {
                    self.stream = Some((door, stream));
                }
            }
            Ok(Ok(Some(_))) => self.stream = Some((door, stream)),
            Ok(Ok(None)) => self.left(&door.name, "it ended without an answer"),
            Ok(Err(status)) => self.failed(&door, status)?,
            Err(_) => self.left(&door.name, "it says nothing any more"),
        }
        Ok(())
    }

    fn failed(&mut self, door: &Door, status: Status) -> Result<(), SendError> {
        // Only what the door itself has said has details.
        let code = (!status.details().is_empty()).then(|| drover_proto::failure_of(&status).code);
        self.declined |= door.opens == Opens::Here && code == Some(ErrorCode::BackendUnavailable);
        let awaited = code == Some(ErrorCode::UnknownSession) && self.ask.open.is_some() && !self.may_open(door);
        if !awaited && !may_help_elsewhere(&status) {
            return Err(SendError::Refused(status));
        }
        self.left(&door.name, &reason(&status));
        Ok(())
    }

    fn left(&mut self, door: &str, why: &str) {
        debug!(door, why, session_id = %self.ask.session, "the turn is asked elsewhere");
        self.why = format!("{door}: {why}");
        self.pause = self.pause.max(2 * PAUSE);
    }
}

/// Whether the same question may be answered by another door, or by the same one a little later.
fn may_help_elsewhere(status: &Status) -> bool {
    if !status.details().is_empty() {
        let code = drover_proto::failure_of(status).code;
        return matches!(code, ErrorCode::ShuttingDown | ErrorCode::BackendUnavailable);
    }
    status.source().is_some()
        || matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded | Code::Aborted)
}

/// The innermost reason of a failed call: the layers above it only say "transport error".
fn reason(status: &Status) -> String {
    let Some(mut reason) = status.source() else { return status.message().to_owned() };
    while let Some(next) = reason.source() {
        reason = next;
    }
    reason.to_string()
}

/// Has a turn end before it has its answer, by whichever door helps within that time; without a name the one that runs. Returns when the turn
/// is answered.
pub async fn interrupt(
    doors: &dyn Doors,
    session: &SessionId,
    request: Option<&RequestId>,
    patience: Duration,
) -> Result<pb::InterruptResponse, SendError> {
    let (begun, mut pause, mut why) = (Instant::now(), PAUSE, "there is none".to_owned());
    loop {
        for mut door in doors.doors().await {
            let session_id = session.to_string();
            let request_id = request.map(ToString::to_string).unwrap_or_default();
            match door.client.interrupt(pb::InterruptRequest { session_id, request_id }).await {
                Ok(ended) => return Ok(ended.into_inner()),
                Err(status) if may_help_elsewhere(&status) => why = format!("{}: {}", door.name, reason(&status)),
                Err(status) => return Err(SendError::Refused(status)),
            }
        }
        if begun.elapsed() >= patience {
            return Err(SendError::Unreachable { why });
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}
