//! A long history moves beside a plain gRPC stream over the same TLS, which is written to the same disk and synced.

use std::fmt;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use drover_proto::transfer::tell_request::Message as Wire;
use drover_proto::transfer::transfer_service_client::TransferServiceClient;
use drover_proto::transfer::transfer_service_server::{TransferService, TransferServiceServer};
use drover_proto::transfer::{Chunk, TellRequest, TellResponse};
use drover_service::pki::{Authority, Identity, IdentityHandle};
use drover_service::{Context, MAX_MESSAGE_BYTES, Server, connect_node};
use drover_testkit::cluster::scratch_dir;
use tokio_stream::StreamExt as _;
use tonic::{Request, Response, Status, Streaming};

use super::faults::{Story, most_memory};
use super::nodes::{LIMIT, Nodes, Plan};

/// Bytes of one message, as the handoff has them.
const CHUNK: usize = 256 << 10;

/// What came of it.
#[derive(Debug, Clone, Copy)]
pub struct Moved {
    /// How much.
    pub mib: usize,
    /// In a second, as a session that moves: from the order until the other node serves it.
    pub ours: f64,
    /// In a second, as a plain stream.
    pub plain: f64,
    /// More memory at most, in MiB, of the source and of the target.
    pub extra: [f64; 2],
}

impl fmt::Display for Moved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mib, ours, plain, extra: [source, target] } = self;
        let share = 100.0 * ours / plain;
        write!(
            f,
            "{mib} MiB: {ours:.0} MiB/s as a session, {plain:.0} MiB/s as a plain stream, {share:.0} %; {source:.1} and \
             {target:.1} MiB more memory"
        )
    }
}

/// Moves a session of so many MiB to and fro, and sends as many bytes over a plain stream in between. The best of three of each.
pub async fn beside_a_stream(mib: usize) -> anyhow::Result<Moved> {
    let nodes = Nodes::start(Plan::fast(2)).await?;
    let mut story = Story::new("large");
    story.say(&nodes, 0).await?;
    story.grow(&nodes, 0, mib).await?;
    let from = story.owner(&nodes)?;
    let sink = Sink::start()?;
    let (mut ours, mut plain, mut extra) = (0.0_f64, 0.0_f64, [0.0; 2]);
    for round in 0..3 {
        let (source, target) = if round % 2 == 0 { (from, 1 - from) } else { (1 - from, from) };
        let before = [most_memory(nodes.pid(source)?)?, most_memory(nodes.pid(target)?)?];
        let moved = nodes.hand_over(source, "large", target).await?;
        ensure!(moved.bytes >= (mib as u64) << 20, "{moved:?}");
        let after = [most_memory(nodes.pid(source)?)?, most_memory(nodes.pid(target)?)?];
        if round == 0 {
            extra = [0, 1].map(|side| (after[side] - before[side]) as f64 / 1024.0);
        }
        ours = ours.max(moved.bytes as f64 / f64::from(1 << 20) / (moved.total_us as f64 / 1e6));
        plain = plain.max(sink.send(mib).await?);
    }
    Ok(Moved { mib, ours, plain, extra })
}

/// A server that writes what it is told and syncs it, and nothing else.
struct Sink {
    ctx: Context,
    dir: tempfile::TempDir,
    client: TransferServiceClient<tonic::transport::Channel>,
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.ctx.shutdown().cancel();
    }
}

impl Sink {
    fn start() -> anyhow::Result<Self> {
        let dir = scratch_dir("stream-")?;
        let authority = Authority::open_or_create_at(&dir.path().join("pki"))?;
        let identity = |name: &str| -> anyhow::Result<IdentityHandle> {
            let at = dir.path().join(name);
            authority.issue(&format!("lab/{name}"), Duration::from_hours(1))?.store(&at)?;
            Ok(IdentityHandle::new(Identity::load(&at)?))
        };
        let (server, client) = (identity("0")?, identity("1")?);
        let ctx = Context::for_test("stream", &dir.path().join("state"));
        ctx.use_identity(server);
        let listener = ctx.bind("stream", None, "127.0.0.1:0".parse()?)?;
        let addr = listener.local_addr();
        let keep = Keep { file: dir.path().join("kept") };
        let service = TransferServiceServer::new(keep).max_decoding_message_size(MAX_MESSAGE_BYTES);
        Server::new(&ctx).grpc_nodes(service).serve(listener)?;
        let client = TransferServiceClient::new(connect_node(&client, addr, "lab/0"));
        Ok(Self { ctx, dir, client })
    }

    /// Sends so many MiB and waits until they are on the disk; MiB in a second.
    async fn send(&self, mib: usize) -> anyhow::Result<f64> {
        let data = bytes::Bytes::from(vec![b'x'; CHUNK]);
        let (count, begun) = ((mib << 20) / CHUNK, Instant::now());
        let chunks = (0..count).map(move |n| {
            let chunk = Chunk { offset: (n * CHUNK) as u64, data: data.clone(), sha256: bytes::Bytes::new() };
            TellRequest { handoff: 0, message: Some(Wire::Chunk(chunk)) }
        });
        let mut client = self.client.clone();
        tokio::time::timeout(LIMIT, client.tell(tokio_stream::iter(chunks))).await??;
        let took = begun.elapsed();
        let kept = std::fs::metadata(self.dir.path().join("kept"))?.len();
        ensure!(kept == (count * CHUNK) as u64, "{kept} bytes are there");
        Ok(mib as f64 / took.as_secs_f64())
    }
}

struct Keep {
    file: PathBuf,
}

fn write_all(path: &Path, mut chunks: tokio::sync::mpsc::Receiver<bytes::Bytes>) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    while let Some(chunk) = chunks.blocking_recv() {
        file.write_all(&chunk)?;
    }
    file.sync_all()
}

#[tonic::async_trait]
impl TransferService for Keep {
    async fn tell(&self, request: Request<Streaming<TellRequest>>) -> Result<Response<TellResponse>, Status> {
        let (write, chunks) = tokio::sync::mpsc::channel(4);
        let file = self.file.clone();
        let written = tokio::task::spawn_blocking(move || write_all(&file, chunks));
        let mut messages = request.into_inner();
        while let Some(message) = messages.next().await {
            if let Some(Wire::Chunk(chunk)) = message?.message {
                // Without a writer the disk has failed, which is said below.
                let _ = write.send(chunk.data).await;
            }
        }
        drop(write);
        let written = written.await.map_err(|error| Status::internal(error.to_string()))?;
        written.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(TellResponse {}))
    }
}

/// The figures of `cargo xtask bench handoff`.
pub async fn figures(short: bool) -> anyhow::Result<Vec<crate::bench::figures::Figure>> {
    use crate::bench::figures::{Figure, Goal};
    let mib = if short { 8 } else { 100 };
    let moved = beside_a_stream(mib).await.context("the long history did not move")?;
    let goal = if short { Goal::Shown } else { Goal::AtLeast(moved.plain / 2.0) };
    let name = format!("a session of {mib} MiB moves");
    let speed = Figure { name, ours: moved.ours, ideal: Some(moved.plain), unit: "MiB/s", goal };
    let most = moved.extra[0].max(moved.extra[1]);
    let name = "more memory of source or target".to_owned();
    let memory = Figure { name, ours: most, ideal: None, unit: "MiB", goal: Goal::Below(32.0) };
    let mut all = vec![speed, memory];
    for (mib, limit) in [(1, 50.0), (10, 100.0)] {
        let felt = super::figures::felt(mib, if short { 5 } else { 200 }).await?;
        let goal = if short { Goal::Shown } else { Goal::Below(limit) };
        let name = format!("longest wait of a turn in a move, {mib} MiB, p99");
        all.push(Figure { name, ours: felt.longest_ms, ideal: Some(felt.calm_ms), unit: "ms", goal });
    }
    Ok(all)
}
