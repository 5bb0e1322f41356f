//! Programs of users, played: many connections to the front, each asking for its next answer when it has the last one. Bytes
//! are prepared before, so that the driver costs little beside what it measures.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// One connection.
pub(super) struct Caller {
    stream: TcpStream,
    head: String,
    buffer: Vec<u8>,
}

impl Caller {
    /// Connects. `headers` are those beside the usual ones, each with its line end.
    pub(super) async fn connect(addr: SocketAddr, path: &str, headers: &str) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(addr).await.context("cannot connect to the front")?;
        stream.set_nodelay(true)?;
        let head = format!("POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n{headers}");
        Ok(Self { stream, head, buffer: Vec::with_capacity(4096) })
    }

    /// Asks once; gives the body of an answer whose status is 200.
    pub(super) async fn ask(&mut self, body: &str) -> anyhow::Result<String> {
        let request = format!("{}content-length: {}\r\n\r\n{body}", self.head, body.len());
        self.stream.write_all(request.as_bytes()).await?;
        self.buffer.clear();
        loop {
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                bail!("the front closed the connection");
            }
            let Some(end) = self.buffer.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
            let head = std::str::from_utf8(&self.buffer[..end]).context("the head of an answer is no text")?;
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
            });
            let length = length.with_context(|| format!("an answer without a length: {head}"))?;
            if self.buffer.len() >= end + 4 + length {
                let body = String::from_utf8_lossy(&self.buffer[end + 4..]).into_owned();
                ensure!(head.starts_with("HTTP/1.1 200"), "the front said: {head}\n{body}");
                return Ok(body);
            }
        }
    }
}

/// A chat request.
pub(super) fn chat(model: &str, prompt: &str) -> String {
    format!("{{\"model\":\"{model}\",\"messages\":[{{\"role\":\"user\",\"content\":\"{prompt}\"}}],\"max_tokens\":64}}")
}

/// What a flood came to.
#[derive(Debug, Clone)]
pub(super) struct Flood {
    /// Answers in the measured time.
    pub(super) answers: u64,
    /// That time.
    pub(super) time: Duration,
    /// Answers of each connection over the whole time.
    pub(super) each: Vec<u64>,
}

impl Flood {
    /// Answers a second.
    pub(super) fn rate(&self) -> f64 {
        self.answers as f64 / self.time.as_secs_f64()
    }
}

/// Asks as fast as answers come, over one connection for each of these headers; counts after a second of running in.
pub(super) async fn flood(
    addr: SocketAddr,
    path: &str,
    model: &str,
    headers: &[String],
    time: Duration,
) -> anyhow::Result<Flood> {
    const RUN_IN: Duration = Duration::from_secs(1);
    let count = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let mut callers = JoinSet::new();
    for (number, headers) in headers.iter().enumerate() {
        let mut caller = Caller::connect(addr, path, headers).await?;
        let (count, stop, model) = (Arc::clone(&count), Arc::clone(&stop), model.to_owned());
        callers.spawn(async move {
            let mut own = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                caller.ask(&chat(&model, &format!("caller {number} asks for the time number {own}"))).await?;
                own += 1;
                count.fetch_add(1, Ordering::Relaxed);
            }
            anyhow::Ok((number, own))
        });
    }
    tokio::time::sleep(RUN_IN).await;
    let (before, began) = (count.load(Ordering::Relaxed), Instant::now());
    tokio::time::sleep(time).await;
    let (answers, time) = (count.load(Ordering::Relaxed) - before, began.elapsed());
    stop.store(true, Ordering::Relaxed);
    let mut each = vec![0; headers.len()];
    while let Some(caller) = callers.join_next().await {
        let (number, own) = caller.context("a caller panicked")??;
        each[number] = own;
    }
    Ok(Flood { answers, time, each })
}

/// Runs this on a thread of its own that is pinned to a core, with a runtime of one thread.
pub(super) fn on_core<T: Send + 'static>(
    core: Option<&'static str>,
    work: impl Future<Output = anyhow::Result<T>> + Send + 'static,
) -> anyhow::Result<T> {
    let thread = std::thread::spawn(move || {
        if let Some(core) = core.filter(|_| super::rig::have_two_cores()) {
            pin_this_thread(core)?;
        }
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
    });
    thread.join().map_err(|_| anyhow::anyhow!("the driver panicked"))?
}

fn pin_this_thread(core: &str) -> anyhow::Result<()> {
    let link = std::fs::read_link("/proc/thread-self")?;
    let id = link.file_name().context("no thread of that name")?;
    let pinned = std::process::Command::new("taskset").args(["-cp", core]).arg(id).output()?;
    ensure!(pinned.status.success(), "cannot pin a thread: {}", String::from_utf8_lossy(&pinned.stderr));
    Ok(())
}
