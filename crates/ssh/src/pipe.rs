//! The two ends of something that lives long: a command's input and output, or a tunnel.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::Exit;
use crate::command::Tail;

/// Bytes that wait in each direction between us and the reader.
const BUFFER: usize = 512 << 10;

/// Reads what the far side says and writes what it hears. Dropping it ends the command or the tunnel.
///
/// Reading ends only when the far side has ended its output; a connection that is lost is an error, not an end.
pub struct Pipe {
    stream: DuplexStream,
    watch: PipeWatch,
    _drop: DropGuard,
}

impl std::fmt::Debug for Pipe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pipe").field("watch", &self.watch).finish_non_exhaustive()
    }
}

/// How a pipe ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// How the program ended; none for a tunnel, and none when it is not known.
    pub exit: Option<Exit>,
    /// What went wrong on the way.
    pub failure: Option<String>,
    /// The last part of what the program wrote to its standard error.
    pub stderr: String,
}

/// Tells how a pipe ended, also after it was handed to somebody else.
#[derive(Debug, Clone)]
pub struct PipeWatch {
    shared: Arc<Mutex<Shared>>,
    over: CancellationToken,
}

#[derive(Debug, Default)]
struct Shared {
    exit: Option<Exit>,
    failure: Option<String>,
    stderr: Tail,
}

impl PipeWatch {
    /// Waits for the end.
    pub async fn ended(&self) -> Ended {
        self.over.cancelled().await;
        self.so_far()
    }

    /// What is known now.
    pub fn so_far(&self) -> Ended {
        let shared = self.lock();
        Ended { exit: shared.exit.clone(), failure: shared.failure.clone(), stderr: shared.stderr.text() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failure(&self) -> Option<io::Error> {
        self.lock().failure.clone().map(|why| io::Error::new(io::ErrorKind::ConnectionReset, why))
    }
}

/// The side of a pipe that an adapter serves.
pub(crate) struct Served {
    pub(crate) stream: DuplexStream,
    pub(crate) report: Report,
    /// Cancelled when the user has dropped the pipe.
    pub(crate) dropped: CancellationToken,
}

/// What the adapter tells about the end; dropping it says that it is over.
pub(crate) struct Report(PipeWatch);

impl Report {
    pub(crate) fn stderr(&self, bytes: &[u8]) {
        self.0.lock().stderr.push(bytes);
    }

    pub(crate) fn exit(&self, exit: Exit) {
        self.0.lock().exit = Some(exit);
    }

    pub(crate) fn fail(&self, why: impl Into<String>) {
        self.0.lock().failure.get_or_insert(why.into());
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        self.0.over.cancel();
    }
}

impl Pipe {
    pub(crate) fn pair() -> (Self, Served) {
        let (ours, theirs) = tokio::io::duplex(BUFFER);
        let watch = PipeWatch { shared: Arc::default(), over: CancellationToken::new() };
        let dropped = CancellationToken::new();
        let served = Served { stream: theirs, report: Report(watch.clone()), dropped: dropped.clone() };
        (Self { stream: ours, watch, _drop: dropped.drop_guard() }, served)
    }

    /// Tells how this pipe ended.
    pub fn watch(&self) -> PipeWatch {
        self.watch.clone()
    }
}

impl AsyncRead for Pipe {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        match polled {
            Poll::Ready(Ok(())) if buf.filled().len() == before && buf.remaining() > 0 => {
                Poll::Ready(self.watch.failure().map_or(Ok(()), Err))
            }
            polled => polled,
        }
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, buf);
        polled.map_err(|error| self.watch.failure().unwrap_or(error))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
