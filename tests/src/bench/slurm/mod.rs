//! A real Slurm, used from a laptop that has SSH to its login host: what comes through that one connection, how long it takes, and
//! what the login host and Slurm's controller notice of it.
//!
//! Everything is the real program. Laptop, login host and compute hosts are one machine, so clocks agree and processors are shared.

mod calls;
mod codex;
mod idle;
mod launch;
mod link;
mod many;
mod waits;

use std::fmt::Write as _;
use std::fs;
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use drover_proto::common::{Cursor, OutboxRef};
use drover_proto::mailbox::mailbox_service_client::MailboxServiceClient;
use drover_proto::mailbox::{FollowFrom, FollowRequest, FollowResponse};
use drover_service::MAX_MESSAGE_BYTES;
use drover_testkit::lab::{Options, USER_ID, usable};
use futures::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::figures::{Figure, Latencies};
use crate::slurm::Site;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// From `launch` to the first word.
    Launch,
    /// Outboxes through the follower and the SSH connection, beside `ssh login cat`.
    Link,
    /// From a worker's record to its event at the laptop.
    Waits,
    /// What the follower costs the login host while nothing happens.
    Idle,
    /// What Slurm's controller is asked.
    Calls,
    /// Launch, inject and end of 64 nodes.
    Many,
    /// `drover doctor --fix` installs the real codex.
    Codex,
}

impl Part {
    /// All of them.
    pub const ALL: &[Self] = &[Self::Launch, Self::Link, Self::Waits, Self::Idle, Self::Calls, Self::Many, Self::Codex];
}

/// Measures these parts. Needs root, and Slurm.
pub async fn run(parts: &[Part], short: bool) -> anyhow::Result<Vec<Figure>> {
    let parts = parts.to_vec();
    // A laboratory has a network of its own, and so threads of its own.
    let measured = tokio::task::spawn_blocking(move || {
        usable(&Options::default()).map_err(anyhow::Error::msg)?;
        let mut figures = Vec::new();
        for part in parts {
            figures.extend(match part {
                Part::Launch => launch::run(short)?,
                Part::Link => link::run(short)?,
                Part::Waits => waits::run(short)?,
                Part::Idle => idle::run(short)?,
                Part::Calls => calls::run(short)?,
                Part::Many => many::run(if short { 8 } else { 64 })?,
                Part::Codex => codex::run()?,
            });
        }
        anyhow::Ok(figures)
    });
    measured.await.context("a measurement panicked")?
}

/// A swarm that nobody runs, with records of it in the mailbox of the cluster.
const SWARM: &str = "bench";

/// Makes this many outboxes with at least so many bytes of records each. Returns the bytes of one.
fn outboxes(site: &Site, nodes: u32, bytes: usize) -> anyhow::Result<u64> {
    let mut text = String::new();
    let mut seq = 0;
    while text.len() < bytes {
        seq += 1;
        let _ = writeln!(
            text,
            "{{\"v\":1,\"seq\":{seq},\"ts\":{},\"job_id\":\"1\",\"node_id\":0,\"gen\":1,\"type\":\"assistant_delta\",\
             \"data\":{{\"content\":\"{seq:0>300}\"}}}}",
            1_700_000_000_000_000_u64 + seq
        );
    }
    let root = site.base()?.join("mailbox");
    for node in 0..nodes {
        let dir = root.join(SWARM).join(format!("{node:02}/outbox/1"));
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("00000001.jsonl"), &text)?;
    }
    // As their workers would have left it.
    fs::write(root.join(SWARM).join("beacon"), "")?;
    let all = root.parent().context("the mailbox has no directory")?;
    let owned = std::process::Command::new("chown").arg("-R").arg(format!("{USER_ID}:{USER_ID}")).arg(all).status()?;
    ensure!(owned.success(), "chown");
    let mode = std::process::Command::new("chmod").args(["-R", "go="]).arg(all).status()?;
    ensure!(mode.success(), "chmod");
    Ok(text.len() as u64)
}

/// Follows them all from the start, as the router would.
async fn follow(
    site: &Site,
    nodes: u32,
) -> anyhow::Result<(tokio::sync::mpsc::Sender<FollowRequest>, Streaming<FollowResponse>)> {
    let mut client = MailboxServiceClient::new(site.follower()?)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let (sender, requests) = tokio::sync::mpsc::channel(4);
    let add = (0..nodes).map(|node_id| FollowFrom {
        outbox: Some(OutboxRef { swarm_id: SWARM.to_owned(), node_id, generation: 1 }),
        cursor: Some(Cursor { segment: 1, offset: 0, seq: 0 }),
    });
    sender.send(FollowRequest { add: add.collect(), ..Default::default() }).await?;
    let stream = client.follow(ReceiverStream::new(requests)).await?.into_inner();
    Ok((sender, stream))
}

/// Brings the connection and the follower up, so that none of that is measured.
async fn warm(site: &Site) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_mins(2);
    loop {
        match follow(site, 0).await {
            Ok(_) => return Ok(()),
            Err(error) => ensure!(Instant::now() < deadline, "the follower is not reached: {error:#}"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Takes bytes of records until there were so many. Returns how long that took.
async fn count(stream: &mut Streaming<FollowResponse>, wanted: u64, begun: Instant) -> anyhow::Result<Duration> {
    let mut seen = 0;
    while seen < wanted {
        let response = stream.next().await.context("the stream ended")??;
        ensure!(response.damage.is_empty(), "{}", response.damage);
        seen += response.lines.len() as u64;
    }
    Ok(begun.elapsed())
}

/// Round trips between the laptop and the login host.
fn round_trips(site: &Site) -> anyhow::Result<Latencies> {
    let mut latencies = Latencies::default();
    for _ in 0..20 {
        let begun = Instant::now();
        TcpStream::connect((site.lab.login_addr(), 22))?;
        latencies.add(begun.elapsed());
    }
    Ok(latencies)
}

/// Seconds of processor time that processes have used.
fn cpu_seconds(pids: &[u32]) -> anyhow::Result<f64> {
    let ticks_per_second = rustix::param::clock_ticks_per_second() as f64;
    let mut total = 0.0;
    for pid in pids {
        let stat = fs::read_to_string(PathBuf::from(format!("/proc/{pid}/stat")))?;
        let behind_name = &stat[stat.rfind(')').context("no name in stat")? + 1..];
        let fields: Vec<&str> = behind_name.split_ascii_whitespace().collect();
        let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
        total += (ticks(11) + ticks(12)) / ticks_per_second;
    }
    Ok(total)
}
