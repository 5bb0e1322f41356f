//! Commands on the JSON-line control plane: latency at a fixed rate, and requests per second.

use std::collections::HashSet;
use std::io::{BufRead as _, Write as _};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::figures::{Figure, Goal, Latencies};
use super::ideal;
use crate::stage::Stage;

/// `swarm_list` on a router that knows a few swarms.
pub async fn run(seconds: u64) -> anyhow::Result<Vec<Figure>> {
    let stage = Stage::start().await?;
    for _ in 0..3 {
        stage.launch(4).await?;
    }
    let (ours, echo) = (stage.control_addr()?, ideal::tcp_echo().await?);
    let time = Duration::from_secs(seconds);
    let mut figures = Vec::new();

    let (our_latency, echo_latency) = (latency(&ours, 500, time).await?, latency(&echo, 500, time).await?);
    for (name, quantile, goal) in [("median", 0.5, Goal::Below(1.0)), ("p99", 0.99, Goal::Shown)] {
        figures.push(Figure {
            name: format!("swarm_list over one connection, 500/s, {name}"),
            ours: our_latency.quantile_ms(quantile),
            ideal: Some(echo_latency.quantile_ms(quantile)),
            unit: "ms",
            goal,
        });
    }
    figures.push(Figure {
        name: "swarm_list, 16 connections x 32 in flight".to_owned(),
        ours: requests_per_second(&ours, 16, 32, time).await?,
        ideal: Some(requests_per_second(&echo, 16, 32, time).await?),
        unit: "requests/s",
        goal: Goal::AtLeast(20_000.0),
    });
    Ok(figures)
}

pub(crate) fn command(id: &str) -> String {
    format!(
        "{{\"protocol\":\"codeswarm.router.v1\",\"type\":\"command\",\"command\":\"swarm_list\",\"request_id\":\"{id}\",\"payload\":{{}}}}\n"
    )
}

/// The request id in a line, without reading the rest of it.
pub(crate) fn request_id(line: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(line).ok()?;
    let behind = &text[text.find("\"request_id\":")? + "\"request_id\":".len()..];
    behind.trim_start().strip_prefix('"')?.split('"').next()
}

/// Whole lines out of a socket.
pub(crate) struct Lines<R> {
    reader: R,
    buffer: Vec<u8>,
    used: usize,
}

impl<R: tokio::io::AsyncRead + Unpin> Lines<R> {
    pub(crate) fn new(reader: R) -> Self {
        Self { reader, buffer: Vec::new(), used: 0 }
    }

    /// Calls `each` for every whole line that one read brings; false at the end of the stream.
    pub(crate) async fn read(&mut self, mut each: impl FnMut(&[u8])) -> anyhow::Result<bool> {
        self.buffer.resize(self.used + (256 << 10), 0);
        let read = self.reader.read(&mut self.buffer[self.used..]).await?;
        if read == 0 {
            return Ok(false);
        }
        let end = self.used + read;
        let mut start = 0;
        while let Some(length) = self.buffer[start..end].iter().position(|&byte| byte == b'\n') {
            each(&self.buffer[start..start + length]);
            start += length + 1;
        }
        self.buffer.copy_within(start..end, 0);
        self.used = end - start;
        Ok(true)
    }
}

/// Latency from the intended send time, at a fixed rate on one connection.
///
/// Threads of their own and their sleep: the runtime's timer has steps of a millisecond, which is more than what is
/// measured.
pub(crate) async fn latency(addr: &str, rate: u64, time: Duration) -> anyhow::Result<Latencies> {
    let addr = addr.to_owned();
    tokio::task::spawn_blocking(move || latency_on_threads(&addr, rate, time)).await.context("a thread panicked")?
}

fn latency_on_threads(addr: &str, rate: u64, time: Duration) -> anyhow::Result<Latencies> {
    let mut writer = std::net::TcpStream::connect(addr)?;
    writer.set_nodelay(true)?;
    let reader = writer.try_clone()?;
    reader.set_read_timeout(Some(Duration::from_secs(30)))?;
    let count = rate * time.as_secs().max(1);
    let begun = Instant::now();
    let intended = |index: u64| begun + Duration::from_micros(index * 1_000_000 / rate);
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            (0..count).try_for_each(|index| {
                std::thread::sleep(intended(index).saturating_duration_since(Instant::now()));
                writer.write_all(command(&format!("bench-{index}")).as_bytes())
            })
        });
        let mut latencies = Latencies::default();
        let mut open: HashSet<u64> = (0..count).collect();
        let mut reader = std::io::BufReader::new(reader);
        let mut line = Vec::new();
        while !open.is_empty() {
            line.clear();
            let read = reader.read_until(b'\n', &mut line).context("answers are missing")?;
            ensure!(read > 0, "the connection ended with {} answers missing", open.len());
            let index = request_id(&line).and_then(|id| id.strip_prefix("bench-")).and_then(|n| n.parse().ok());
            if let Some(index) = index.filter(|index| open.remove(index)) {
                latencies.add(intended(index).elapsed());
            }
        }
        sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        Ok(latencies)
    })
}

/// Requests per second with a fixed number in flight on each connection; every answer is checked by its id.
async fn requests_per_second(addr: &str, connections: usize, in_flight: usize, time: Duration) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let all = (0..connections).map(|connection| one_connection(addr, connection, in_flight, begun + time));
    let counts = futures::future::try_join_all(all).await?;
    Ok(counts.iter().sum::<u64>() as f64 / begun.elapsed().as_secs_f64())
}

async fn one_connection(addr: &str, connection: usize, in_flight: usize, until: Instant) -> anyhow::Result<u64> {
    let stream = TcpStream::connect(addr).await?;
    stream.set_nodelay(true)?;
    let (reader, mut writer) = stream.into_split();
    let mut lines = Lines::new(reader);
    let mut open = HashSet::new();
    let (mut next, mut answered) = (0_u64, 0_u64);
    let mut wrong = None;
    loop {
        let mut batch = String::new();
        while open.len() < in_flight && Instant::now() < until {
            let id = format!("c{connection}-{next}");
            batch.push_str(&command(&id));
            open.insert(id);
            next += 1;
        }
        writer.write_all(batch.as_bytes()).await?;
        if open.is_empty() {
            return Ok(answered);
        }
        let more = lines.read(|line| match request_id(line) {
            Some(id) if open.remove(id) => answered += 1,
            other => wrong = Some(other.unwrap_or("an answer without an id").to_owned()),
        });
        ensure!(more.await?, "the connection ended with {} answers missing", open.len());
        if let Some(wrong) = wrong {
            bail!("an answer that nobody waits for: {wrong}");
        }
    }
}
