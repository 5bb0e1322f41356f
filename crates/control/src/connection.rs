//! One client's connection: reads commands, keeps any number of them under way, writes what its outbox holds.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use drover_service::{Caller, Context};
use drover_types::{ErrorCode, Failure};
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::ControlSettings;
use crate::desk::Desk;
use crate::line::{Inbound, LineDecoder, LineTooLong, RequestId, decode};
use crate::outbox::{Outbox, Written};

/// Requests that one client may have under way; further ones wait in its socket. Above an inject into every node of a
/// large swarm, which the CLI sends as one request per node.
const MAX_UNDER_WAY: usize = 4096;
/// Bytes read from a client before the others get their turn.
const READ_TURN: usize = 64 << 10;
/// After the word to stop, requests under way may still end by themselves for this long.
const DRAIN: Duration = Duration::from_millis(250);
/// How long the last lines may take to be read.
const FLUSH: Duration = Duration::from_secs(2);
/// How long to wait for the client to close its side, so that closing ours does not destroy what it has yet to read.
const LINGER: Duration = Duration::from_secs(1);

/// How long a client may take to send its token.
const PROOF: Duration = Duration::from_secs(10);
/// Bytes that are read from somebody who has not shown it.
const LONGEST_PROOF: usize = 64 << 10;

/// Serves one client to its end.
pub(crate) async fn serve_client(
    ctx: Context,
    stream: TcpStream,
    caller: Caller,
    desk: Arc<Desk>,
    settings: Arc<ControlSettings>,
) {
    let outbox = Arc::new(Outbox::new(settings.client_max_bytes));
    let mut decoder = LineDecoder::new(settings.max_line_bytes);
    // Before anything is told to anybody.
    let entered = tokio::select! {
        entered = enter(&stream, caller, &mut decoder, &settings) => entered,
        () = ctx.shutdown().cancelled() => None,
    };
    let caller = match entered {
        None => return,
        Some(Ok(caller)) => caller,
        Some(Err(failure)) => {
            desk.reject_failure_of(&outbox, &RequestId::none(), &failure);
            outbox.finish();
            if tokio::time::timeout(FLUSH, outbox.write_to(&stream)).await.is_ok() {
                let _ = tokio::time::timeout(LINGER, say_goodbye(stream)).await;
            }
            return;
        }
    };
    // A member from the first moment: the client must see the events of its own first request.
    let membership = desk.hub.join(Arc::clone(&outbox));
    let written = {
        let writing = outbox.write_to(&stream);
        tokio::pin!(writing);
        let client = Client { ctx: &ctx, stream: &stream, caller, desk: &desk, outbox: &outbox };
        tokio::select! {
            written = &mut writing => written,
            () = client.take_requests(decoder) => {
                drop(membership);
                outbox.finish();
                tokio::time::timeout(FLUSH, writing).await.unwrap_or(Written::Broken)
            }
        }
    };
    if written == Written::CutOff {
        debug!("client cut off");
        desk.hub.debug("a client was cut off");
    }
    if written != Written::Broken {
        let _ = tokio::time::timeout(LINGER, say_goodbye(stream)).await;
    }
}

struct Client<'a> {
    ctx: &'a Context,
    stream: &'a TcpStream,
    caller: Caller,
    desk: &'a Arc<Desk>,
    outbox: &'a Arc<Outbox>,
}

impl Client<'_> {
    /// Takes requests until the client has no more, and returns when the last one is answered.
    async fn take_requests(&self, mut decoder: LineDecoder) {
        let mut under_way = FuturesUnordered::new();
        let give_up = CancellationToken::new();
        let shutdown = self.ctx.shutdown().cancelled();
        let drained = async {
            self.ctx.shutdown().cancelled().await;
            tokio::time::sleep(DRAIN).await;
        };
        tokio::pin!(shutdown, drained);
        let mut patient = true;
        // The client may send more; we may begin more.
        let (mut reading, mut taking) = (true, true);
        loop {
            // A client that does not read its answers gets no further ones made, and no more requests read.
            let long = self.outbox.is_long();
            let blocked = long || under_way.len() >= MAX_UNDER_WAY;
            if taking && !blocked {
                match decoder.next_line() {
                    Ok(Some(line)) => {
                        if let Some(command) = self.read_line(line) {
                            let outbox = Arc::clone(self.outbox);
                            under_way.push(self.desk.carry_out(outbox, self.caller, command, give_up.clone()));
                        }
                        continue;
                    }
                    Ok(None) => taking = reading,
                    Err(error @ LineTooLong { .. }) => {
                        self.outbox.cut_off(error.to_string());
                        // The writer says so and ends the connection; what is under way goes with it.
                        return std::future::pending().await;
                    }
                }
            }
            if !taking && under_way.is_empty() {
                return;
            }
            tokio::select! {
                Some(()) = under_way.next(), if !(under_way.is_empty() || long && patient) => {}
                () = self.outbox.until_short(), if long && patient => {}
                more = read(self.stream, &mut decoder), if reading && !blocked => reading = more.unwrap_or(false),
                () = &mut shutdown, if taking => {
                    (reading, taking) = (false, false);
                    self.reject_unread(&mut decoder);
                }
                () = &mut drained, if patient => {
                    patient = false;
                    give_up.cancel();
                }
            }
        }
    }

    /// Commands that have come and will not be begun any more are answered all the same.
    fn reject_unread(&self, decoder: &mut LineDecoder) {
        while let Ok(Some(line)) = decoder.next_line() {
            if let Some(command) = self.read_line(line) {
                self.desk.reject(self.outbox, &command.request_id, "the router is shutting down; connect again");
            }
        }
    }

    fn read_line(&self, line: &[u8]) -> Option<crate::line::Command> {
        match decode(line) {
            Inbound::Command(command) => return Some(command),
            Inbound::Unusable { request_id, reason } => self.desk.reject(self.outbox, &request_id, &reason),
            // A client that always shows its token may, also where none is wanted.
            Inbound::Token(_) => {}
            Inbound::Ignored => {
                self.desk.hub.metrics.ignored_lines.inc();
            }
        }
        None
    }
}

/// Whether the client may come in. Its token is its first line, where one is wanted; `None` when it left without a word.
async fn enter(
    stream: &TcpStream,
    caller: Caller,
    decoder: &mut LineDecoder,
    settings: &ControlSettings,
) -> Option<Result<Caller, Failure>> {
    let entrance = &settings.entrance;
    if !entrance.wants_token() {
        return Some(entrance.admit(caller, None));
    }
    let deadline = tokio::time::Instant::now() + PROOF;
    loop {
        match decoder.next_line() {
            Ok(Some(line)) => {
                return Some(match decode(line) {
                    Inbound::Token(token) => entrance.admit(caller, Some(token.as_str())),
                    _ => entrance.admit(caller, None),
                });
            }
            Ok(None) => {}
            Err(LineTooLong { .. }) => break,
        }
        if decoder.pending_bytes() > LONGEST_PROOF {
            break;
        }
        match tokio::time::timeout_at(deadline, read(stream, decoder)).await {
            Ok(Ok(true)) => {}
            Ok(Ok(false) | Err(_)) => return None,
            Err(_) => break,
        }
    }
    Some(Err(Failure::new(ErrorCode::NotAllowed, "the first line of a connection must be the token of this router")))
}

/// Waits for bytes and takes what is there. False at the end of the client's side.
async fn read(stream: &TcpStream, decoder: &mut LineDecoder) -> io::Result<bool> {
    stream.readable().await?;
    let mut taken = 0;
    while taken < READ_TURN {
        match read_once(stream, decoder) {
            Ok(0) => return Ok(false),
            Ok(bytes) => taken += bytes,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    tokio::task::consume_budget().await;
    Ok(true)
}

/// The buffer lives only during the call: a connection that waits holds none.
fn read_once(stream: &TcpStream, decoder: &mut LineDecoder) -> io::Result<usize> {
    let mut buffer = [0; 16 << 10];
    let bytes = stream.try_read(&mut buffer)?;
    decoder.push(&buffer[..bytes]);
    Ok(bytes)
}

async fn say_goodbye(stream: TcpStream) {
    let Ok(stream) = stream.into_std() else { return };
    if stream.shutdown(std::net::Shutdown::Write).is_err() {
        return;
    }
    let Ok(stream) = TcpStream::from_std(stream) else { return };
    loop {
        if stream.readable().await.is_err() {
            return;
        }
        let mut buffer = [0; 4096];
        match stream.try_read(&mut buffer) {
            Ok(0) => return,
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return,
            _ => {}
        }
        tokio::task::consume_budget().await;
    }
}
