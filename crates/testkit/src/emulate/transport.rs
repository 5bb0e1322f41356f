//! How these clients connect, read and end.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout_at};

use super::{Client, Screen, Step};

/// Decodes as Node does: every chunk to text on its own, then lines, trimmed, empty ones skipped.
#[derive(Default)]
pub struct NodeDecoder {
    buffer: String,
    /// Lines that were not JSON.
    pub broken: Vec<String>,
}

impl NodeDecoder {
    /// Takes a chunk and gives out the messages that are now whole.
    pub fn push(&mut self, chunk: &[u8]) -> Vec<Value> {
        self.buffer.push_str(&String::from_utf8_lossy(chunk));
        let mut messages = Vec::new();
        let mut start = 0;
        while let Some(length) = self.buffer[start..].find('\n') {
            let line = self.buffer[start..start + length].trim();
            start += length + 1;
            if line.is_empty() {
                continue;
            }
            match serde_json::from_str(line) {
                Ok(message) => messages.push(message),
                Err(_) => self.broken.push(line.to_owned()),
            }
        }
        self.buffer.drain(..start);
        messages
    }
}

/// A connection with its decoder.
pub struct Connection {
    /// The socket.
    pub stream: TcpStream,
    /// What it has received so far.
    pub decoder: NodeDecoder,
    /// Bytes taken in one chunk; small ones cut characters in the middle.
    pub chunk: usize,
    ready: std::collections::VecDeque<Value>,
}

impl Connection {
    /// Connects.
    pub async fn open(addr: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(addr).await?;
        Ok(Self { stream, decoder: NodeDecoder::default(), chunk: 64 << 10, ready: std::collections::VecDeque::new() })
    }

    /// Sends one line.
    pub async fn send(&mut self, message: &Value) -> io::Result<()> {
        self.stream.write_all(format!("{message}\n").as_bytes()).await
    }

    /// The next message; `None` at the end of the connection.
    pub async fn next(&mut self) -> io::Result<Option<Value>> {
        let mut buffer = vec![0; self.chunk];
        while self.ready.is_empty() {
            let bytes = self.stream.read(&mut buffer).await?;
            if bytes == 0 {
                return Ok(None);
            }
            self.ready.extend(self.decoder.push(&buffer[..bytes]));
        }
        Ok(self.ready.pop_front())
    }

    /// The next message for which `wanted` holds, others skipped.
    pub async fn find(&mut self, mut wanted: impl FnMut(&Value) -> bool) -> io::Result<Option<Value>> {
        while let Some(message) = self.next().await? {
            if wanted(&message) {
                return Ok(Some(message));
            }
        }
        Ok(None)
    }
}

/// The bare connect-and-close that precedes each command.
pub async fn probe(addr: SocketAddr) -> bool {
    matches!(tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(addr)).await, Ok(Ok(_)))
}

/// The later command line: a probe, then a connection, tried again every 250 ms for a minute.
async fn connect_as_head(addr: SocketAddr) -> io::Result<Connection> {
    let _running = probe(addr).await;
    let deadline = Instant::now() + Duration::from_mins(1);
    loop {
        match Connection::open(addr).await {
            Ok(connection) => return Ok(connection),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => sleep(Duration::from_millis(250)).await,
        }
    }
}

/// How a client ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code; `None` when it still waited at the deadline.
    pub exit: Option<i32>,
    /// The server closed the connection (the client then runs out of work and exits 0 without a word).
    pub closed: bool,
    /// What it printed.
    pub screen: Screen,
    /// Every event it received.
    pub events: Vec<Value>,
    /// Lines that were not JSON.
    pub broken: Vec<String>,
}

impl Ended {
    /// Names of the events that bear the field with this value.
    pub fn names_with(&self, key: &str, value: &str) -> Vec<&str> {
        let of = self.events.iter().filter(|event| event["data"][key] == value);
        of.map(|event| event["event"].as_str().unwrap_or_default()).collect()
    }
}

/// Runs a client until it ends, or to the deadline.
pub async fn run(addr: SocketAddr, client: &mut dyn Client, patience: Duration) -> io::Result<Ended> {
    run_until(addr, client, patience, |_| false).await
}

/// Runs a client until it ends, until `enough` holds for what it printed, or to the deadline.
pub async fn run_until(
    addr: SocketAddr,
    client: &mut dyn Client,
    patience: Duration,
    enough: impl Fn(&Screen) -> bool,
) -> io::Result<Ended> {
    let deadline = Instant::now() + patience;
    let mut connection = connect_as_head(addr).await?;
    // Odd and small, so that characters and lines are cut everywhere.
    connection.chunk = 61;
    let mut ended =
        Ended { exit: None, closed: false, screen: Screen::default(), events: Vec::new(), broken: Vec::new() };
    for command in client.begin() {
        connection.send(&command).await?;
    }
    while let Ok(message) = timeout_at(deadline, connection.next()).await {
        let Some(message) = message? else {
            ended.closed = true;
            ended.exit = Some(0);
            break;
        };
        let step = client.event(&message, &mut ended.screen);
        ended.events.push(message);
        match step {
            Step::Wait => {}
            Step::Send(commands) => {
                for command in commands {
                    connection.send(&command).await?;
                }
            }
            Step::Exit(code) => {
                ended.exit = Some(code);
                break;
            }
        }
        if enough(&ended.screen) {
            break;
        }
    }
    ended.broken = connection.decoder.broken;
    Ok(ended)
}
