//! From workers' appends to clients: how many per second into the log, and out of it to many.

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use drover_proto::router::WatchEventsRequest;
use drover_testkit::cluster::scratch_dir;
use futures::future::try_join_all;
use tokio::net::TcpStream;

use super::control::Lines;
use super::figures::{Figure, Goal};
use super::ideal;
use crate::stage::Stage;

/// Bytes of text in one delta.
const DELTA: usize = 300;
const SUBSCRIBERS: usize = 16;
/// Events that may be under way: a subscriber further behind than the router's byte limit is cut off, as it should be.
const AHEAD: usize = 20_000;

/// Both, with so many events into the log.
pub async fn run(events: usize) -> anyhow::Result<Vec<Figure>> {
    Ok(vec![into_the_log(events).await?, deliveries(events / 4).await?])
}

fn delta(index: usize) -> String {
    format!("{{\"content\":\"{index:0>DELTA$}\"}}")
}

/// Has every player of the swarm append its share, as fast as it can, but no further ahead of the slowest reader than
/// [`AHEAD`] where there are readers to wait for.
async fn play(
    stage: &Stage,
    swarm: &str,
    nodes: u32,
    events: usize,
    readers: &[Arc<AtomicUsize>],
) -> anyhow::Result<()> {
    let players = (0..nodes).map(|node| stage.player(swarm, node)).collect::<anyhow::Result<Vec<_>>>()?;
    let share = events / players.len();
    let writing = players.into_iter().map(|player| {
        let readers = readers.to_vec();
        tokio::task::spawn_blocking(move || {
            let mut player = player.lock().unwrap_or_else(PoisonError::into_inner);
            for index in 0..share {
                player.queue("assistant_delta", None, &delta(index))?;
                if index % 200 == 199 {
                    player.flush()?;
                    let too_far = |reader: &Arc<AtomicUsize>| reader.load(Relaxed) + AHEAD < index * nodes as usize;
                    while readers.iter().any(too_far) {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
            }
            player.flush()
        })
    });
    for written in try_join_all(writing).await? {
        written?;
    }
    Ok(())
}

async fn into_the_log(events: usize) -> anyhow::Result<Figure> {
    let stage = Stage::start().await?;
    let swarm = stage.launch(4).await?;
    let request = WatchEventsRequest { from_now: true, follow: true, ..Default::default() };
    let mut stream = stage.router().watch_events(request).await?.into_inner();
    while !stream.message().await?.context("the stream ended")?.live {}

    let wanted = events / 4 * 4;
    let begun = Instant::now();
    let receive = async {
        let (mut seen, mut last) = (0, 0);
        while seen < wanted {
            for event in stream.message().await?.context("the stream ended")?.events {
                ensure!(event.seq > last, "seq {} after {last}", event.seq);
                last = event.seq;
                seen += usize::from(event.event == "assistant_delta");
            }
        }
        Ok(begun.elapsed())
    };
    let ((), took) = tokio::try_join!(play(&stage, &swarm, 4, events, &[]), receive)?;

    let dir = scratch_dir("ideal-")?;
    let ideal = ideal::sqlite_insert(&dir.path().join("ideal.sqlite"), wanted, &delta(0))?;
    Ok(Figure {
        name: "events from 4 outboxes into the log and to one subscriber".to_owned(),
        ours: wanted as f64 / took.as_secs_f64(),
        ideal: Some(ideal),
        unit: "events/s",
        goal: Goal::AtLeast(100_000.0),
    })
}

/// Reads lines until `wanted` of them carry a delta.
async fn count_deltas(addr: String, wanted: usize, progress: Arc<AtomicUsize>) -> anyhow::Result<usize> {
    let mut lines = Lines::new(TcpStream::connect(addr).await?);
    let mut seen = 0;
    while seen < wanted {
        progress.store(seen, Relaxed);
        let more = lines.read(|line| {
            let head = &line[..line.len().min(200)];
            seen += usize::from(head.windows(17).any(|part| part == b"\"assistant_delta\""));
        });
        ensure!(more.await?, "the connection ended after {seen} of {wanted} events");
    }
    Ok(seen)
}

async fn deliveries(events: usize) -> anyhow::Result<Figure> {
    let stage = Stage::start().await?;
    let swarm = stage.launch(4).await?;
    let wanted = events / 4 * 4;
    let addr = stage.control_addr()?;
    let ours = {
        let progress: Vec<Arc<AtomicUsize>> = (0..SUBSCRIBERS).map(|_| Arc::default()).collect();
        let readers = progress.iter().map(|progress| count_deltas(addr.clone(), wanted, Arc::clone(progress)));
        let readers = try_join_all(readers);
        let begun = Instant::now();
        let begin = async {
            // The connections are counted from their first byte on, so they must all be there.
            tokio::time::sleep(Duration::from_millis(300)).await;
            let begun = Instant::now();
            play(&stage, &swarm, 4, events, &progress).await?;
            Ok(begun)
        };
        let (counts, begun_writing) = tokio::try_join!(readers, begin)?;
        ensure!(begun <= begun_writing, "the clock went back");
        counts.iter().sum::<usize>() as f64 / begun_writing.elapsed().as_secs_f64()
    };
    let line = format!(
        "{{\"protocol\":\"codeswarm.router.v1\",\"type\":\"event\",\"timestamp\":\"2026-02-25T23:58:58.123456+00:00\",\
         \"event\":\"assistant_delta\",\"data\":{{\"swarm_id\":\"{swarm}\",\"job_id\":\"played\",\"node_id\":0,\
         \"injection_id\":null,\"content\":\"{:0>DELTA$}\"}}}}\n",
        0
    );
    let copy = ideal::socket_copy(line.into_bytes(), wanted, SUBSCRIBERS).await?;
    let begun = Instant::now();
    let copied = try_join_all((0..SUBSCRIBERS).map(|_| count_deltas(copy.clone(), wanted, Arc::default()))).await?;
    Ok(Figure {
        name: format!("deliveries to {SUBSCRIBERS} JSON-line subscribers"),
        ours,
        ideal: Some(copied.iter().sum::<usize>() as f64 / begun.elapsed().as_secs_f64()),
        unit: "deliveries/s",
        goal: Goal::AtLeast(200_000.0),
    })
}
