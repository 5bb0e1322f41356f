//! One channel of the connection: a command or a tunnel, from its opening to its end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use russh::client::Msg;
use russh::{Channel, ChannelMsg, ChannelOpenFailure, ChannelReadHalf, ChannelWriteHalf, Sig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use super::keeper::{Live, Shared};
use crate::bootstrap::{self, Greeting};
use crate::command::Tail;
use crate::pipe::Served;
use crate::{Exit, Output};

/// How long a session that we gave up may still hold its slot: so long the server may count it.
const LINGER: Duration = Duration::from_secs(2);

/// What came of the attempt to start a command.
pub(super) enum Begin {
    /// The login shell waits for its line.
    Ready(Running),
    /// It ended without a word.
    Shell(String),
    /// The connection went away; nothing was sent.
    Lost,
    /// The server opens no more sessions now.
    Full,
}

/// What came of the attempt to open a tunnel.
pub(super) enum Forward {
    Open(Running),
    Forbidden,
    Failed(String),
    Lost,
}

pub(super) enum Broken {
    TooMuch,
    Lost(String),
}

/// A channel that is open. Dropping it ends what runs on it, as far as the server lets us.
pub(super) struct Running {
    read: ChannelReadHalf,
    after: Bytes,
    end: End,
}

/// The way to tell the server that we are done.
struct End {
    write: Option<Arc<ChannelWriteHalf<Msg>>>,
    slot: Option<OwnedSemaphorePermit>,
    live: Arc<Live>,
    tasks: TaskTracker,
    runtime: tokio::runtime::Handle,
    over: bool,
}

impl Drop for End {
    fn drop(&mut self) {
        let (write, slot, live) = (self.write.take(), self.slot.take(), Arc::clone(&self.live));
        if self.over {
            drop(slot);
            live.freed.notify_waiters();
            return;
        }
        let work = async move {
            if let Some(write) = write {
                let told = async {
                    // A tunnel has no process and ignores the signal.
                    if slot.is_some() {
                        let _ = write.signal(Sig::TERM).await;
                    }
                    let _ = write.close().await;
                };
                let _ = timeout(LINGER, told).await;
            }
            drop(slot);
            live.freed.notify_waiters();
        };
        self.tasks.spawn_on(work, &self.runtime);
    }
}

/// Opens a session and starts the login shell in it.
pub(super) async fn begin(shared: &Shared, live: &Arc<Live>) -> Begin {
    let waiting = Arc::clone(&live.sessions).acquire_owned();
    let slot = tokio::select! {
        slot = waiting => match slot { Ok(slot) => slot, Err(_) => return Begin::Lost },
        () = live.dead.cancelled() => return Begin::Lost,
    };
    let opening = Arc::clone(live);
    let channel = match open(shared, live, async move { opening.handle.channel_open_session().await }).await {
        Some(Ok(channel)) => channel,
        Some(Err(russh::Error::ChannelOpenFailure(_))) => return Begin::Full,
        Some(Err(_)) | None => {
            live.dead.cancel();
            return Begin::Lost;
        }
    };
    let (read, write) = channel.split();
    let mut running = running(shared, live, read, write, Some(slot));
    let word = bootstrap::word();
    let Some(write) = running.end.write.clone() else { return Begin::Lost };
    if write.exec(true, bootstrap::login_line(&word)).await.is_err() {
        return Begin::Lost;
    }
    let mut greeting = Greeting::new(&word);
    let mut complaint = Tail::default();
    loop {
        match running.read.wait().await {
            Some(ChannelMsg::Data { data }) => {
                if let Some(after) = greeting.hear(&data) {
                    running.after = after;
                    return Begin::Ready(running);
                }
            }
            Some(ChannelMsg::ExtendedData { data, .. }) => complaint.push(&data),
            Some(ChannelMsg::Failure) => return Begin::Shell("the server refuses to run commands".to_owned()),
            Some(ChannelMsg::Close) => {
                running.end.over = true;
                return Begin::Shell(format!("{} {}", greeting.said(), complaint.text()).trim().to_owned());
            }
            Some(_) => {}
            None => return Begin::Lost,
        }
    }
}

/// Opens a tunnel.
pub(super) async fn forward(shared: &Shared, live: &Arc<Live>, to: SocketAddr) -> Forward {
    let opening = Arc::clone(live);
    let opened = open(shared, live, async move {
        opening.handle.channel_open_direct_tcpip(to.ip().to_string(), to.port().into(), "127.0.0.1", 0).await
    });
    match opened.await {
        Some(Ok(channel)) => {
            let (read, write) = channel.split();
            Forward::Open(running(shared, live, read, write, None))
        }
        Some(Err(russh::Error::ChannelOpenFailure(ChannelOpenFailure::AdministrativelyProhibited))) => {
            Forward::Forbidden
        }
        Some(Err(russh::Error::ChannelOpenFailure(why))) => Forward::Failed(format!("the host says {why:?}")),
        Some(Err(_)) | None => {
            live.dead.cancel();
            Forward::Lost
        }
    }
}

/// Waits for a channel in a task of its own: when nobody wants it any more by the time it is open, it is closed again and
/// does not stay open at the server.
async fn open(
    shared: &Shared,
    live: &Arc<Live>,
    opening: impl Future<Output = Result<Channel<Msg>, russh::Error>> + Send + 'static,
) -> Option<Result<Channel<Msg>, russh::Error>> {
    let (sender, receiver) = oneshot::channel();
    let dead = live.dead.clone();
    shared.tasks.spawn(async move {
        let opened = tokio::select! {
            opened = opening => opened,
            () = dead.cancelled() => return,
        };
        if let Err(Ok(channel)) = sender.send(opened) {
            let _ = channel.close().await;
        }
    });
    receiver.await.ok()
}

fn running(
    shared: &Shared,
    live: &Arc<Live>,
    read: ChannelReadHalf,
    write: ChannelWriteHalf<Msg>,
    slot: Option<OwnedSemaphorePermit>,
) -> Running {
    let end = End {
        write: Some(Arc::new(write)),
        slot,
        live: Arc::clone(live),
        tasks: shared.tasks.clone(),
        runtime: tokio::runtime::Handle::current(),
        over: false,
    };
    Running { read, after: Bytes::new(), end }
}

impl Running {
    /// Sends the input and takes all of the output.
    pub(super) async fn finish(mut self, input: &[Bytes], max_output: usize) -> Result<Output, Broken> {
        let write = self.end.write.clone();
        let feed = async move {
            let Some(write) = write else { return };
            for bytes in input {
                if write.data_bytes(bytes.clone()).await.is_err() {
                    return;
                }
            }
            let _ = write.eof().await;
        };
        let collect = async {
            let mut stdout = BytesMut::from(std::mem::take(&mut self.after));
            let mut stderr = Tail::default();
            let mut exit = None;
            loop {
                if stdout.len() > max_output {
                    return Err(Broken::TooMuch);
                }
                match self.read.wait().await {
                    Some(ChannelMsg::Data { data }) => stdout.extend_from_slice(&data),
                    Some(ChannelMsg::ExtendedData { data, .. }) => stderr.push(&data),
                    Some(ChannelMsg::Close) => break,
                    Some(message) => exit = exit.or(ended(&message)),
                    None => return Err(Broken::Lost(self.end.live.why())),
                }
            }
            self.end.over = true;
            let exit = exit.ok_or_else(|| Broken::Lost("the server did not say how it ended".to_owned()))?;
            Ok(Output { exit, stdout: stdout.freeze(), stderr: stderr.bytes() })
        };
        tokio::pin!(collect);
        tokio::select! {
            output = &mut collect => output,
            // A program need not read its input to its end.
            () = feed => collect.await,
        }
    }

    /// Joins the channel with a pipe until either ends.
    pub(super) async fn serve(mut self, first: Bytes, served: Served, slow_reader: Duration) {
        let Served { stream, report, dropped } = served;
        let (mut from_user, mut to_user) = tokio::io::split(stream);
        let write = self.end.write.clone();
        let outbound = async move {
            let Some(write) = write else { return };
            if !first.is_empty() && write.data_bytes(first).await.is_err() {
                return std::future::pending().await;
            }
            let mut buffer = BytesMut::new();
            loop {
                buffer.reserve(32 << 10);
                match from_user.read_buf(&mut buffer).await {
                    Ok(0) | Err(_) => break,
                    Ok(_) => {
                        if write.data_bytes(buffer.split().freeze()).await.is_err() {
                            break;
                        }
                    }
                }
            }
            let _ = write.eof().await;
            std::future::pending::<()>().await;
        };
        let inbound = async {
            let mut data = std::mem::take(&mut self.after);
            loop {
                if !data.is_empty() {
                    match timeout(slow_reader, to_user.write_all(&data)).await {
                        Ok(Ok(())) => {}
                        Ok(Err(_)) => return,
                        Err(_) => return report.fail(format!("nobody has read for {slow_reader:?}")),
                    }
                }
                data = Bytes::new();
                match self.read.wait().await {
                    Some(ChannelMsg::Data { data: more }) => data = more,
                    Some(ChannelMsg::ExtendedData { data, .. }) => report.stderr(&data),
                    Some(ChannelMsg::Eof) => {
                        let _ = to_user.shutdown().await;
                    }
                    Some(ChannelMsg::Close) => {
                        self.end.over = true;
                        return;
                    }
                    Some(message) => {
                        if let Some(exit) = ended(&message) {
                            report.exit(exit);
                        }
                    }
                    None => {
                        self.end.over = true;
                        return report.fail(self.end.live.why());
                    }
                }
            }
        };
        tokio::select! {
            () = inbound => {}
            () = outbound => {}
            () = dropped.cancelled() => {}
        }
    }
}

fn ended(message: &ChannelMsg) -> Option<Exit> {
    match message {
        ChannelMsg::ExitStatus { exit_status } => Some(Exit::Code(*exit_status)),
        ChannelMsg::ExitSignal { signal_name, .. } => Some(Exit::Signal(match signal_name {
            Sig::Custom(name) => name.clone(),
            known => format!("{known:?}"),
        })),
        _ => None,
    }
}
