//! How the rest of the router reaches the writer.

use std::time::Duration;

use drover_proto::router as pb;
use drover_types::{ErrorCode, Failure};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};

use super::events::{Page, Wanted};
use super::waiters::Steps;
use crate::core::effects::{Answer, Step};
use crate::core::input::{InjectOrder, Input, InterruptOrder, LaunchOrder, RecordChunk, ResolveOrder, TerminateOrder};

/// Where an answer goes.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, Failure>>;

/// A call that changes something.
#[derive(Debug)]
pub(crate) enum Call {
    Launch(Box<LaunchOrder>, Steps),
    Inject(Box<InjectOrder>, Steps),
    Terminate(TerminateOrder, Steps),
    Interrupt(InterruptOrder, Reply<Answer>),
    Resolve(ResolveOrder, Reply<Answer>),
}

/// What the writer is asked to do.
#[derive(Debug)]
pub(crate) enum Command {
    Call(Call),
    /// Something happened; nobody waits for an answer.
    Happened(Input),
    /// Outbox records; the permit bounds how many wait.
    Records(RecordChunk, OwnedSemaphorePermit),
    Explain(String, Reply<pb::ExplainResponse>),
    /// Past events, where nobody else can read the file.
    Read(Wanted, Reply<Page>),
    Stop,
}

/// How many commands may wait for the writer.
const QUEUE: usize = 4096;
/// How long a caller waits for a place in the queue before it is told that the router is too busy.
const PATIENCE: Duration = Duration::from_secs(10);

/// Reaches the writer.
#[derive(Debug, Clone)]
pub(crate) struct StoreHandle {
    commands: mpsc::Sender<Command>,
}

impl StoreHandle {
    pub(crate) fn new() -> (Self, mpsc::Receiver<Command>) {
        let (commands, receiver) = mpsc::channel(QUEUE);
        (Self { commands }, receiver)
    }

    /// Sends something that somebody waits for.
    async fn call(&self, command: Command) -> Result<(), Failure> {
        match self.commands.send_timeout(command, PATIENCE).await {
            Ok(()) => Ok(()),
            Err(mpsc::error::SendTimeoutError::Closed(_)) => Err(stopping()),
            Err(mpsc::error::SendTimeoutError::Timeout(_)) => {
                Err(Failure::new(ErrorCode::StoreUnavailable, "the event log does not keep up: its disk is too slow")
                    .hint("try again; `drover doctor` measures the disk of the state directory"))
            }
        }
    }

    /// Starts a streaming call; its steps arrive at the receiver.
    pub(crate) async fn stream(
        &self,
        room: usize,
        call: impl FnOnce(Steps) -> Call,
    ) -> Result<mpsc::Receiver<Step>, Failure> {
        let (steps, receiver) = mpsc::channel(room);
        self.call(Command::Call(call(steps))).await?;
        Ok(receiver)
    }

    /// Makes a call that has one answer.
    pub(crate) async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Failure> {
        let (reply, answer) = oneshot::channel();
        self.call(command(reply)).await?;
        answer.await.unwrap_or_else(|_| Err(stopping()))
    }

    /// Tells the writer; waits for a place in its queue. Nothing is told any more when the router is stopping.
    pub(crate) async fn tell(&self, command: Command) {
        let _ = self.commands.send(command).await;
    }
}

pub(crate) fn stopping() -> Failure {
    Failure::new(ErrorCode::ShuttingDown, "the router is shutting down").hint("repeat the request when it is back")
}
