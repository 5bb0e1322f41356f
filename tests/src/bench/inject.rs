//! One prompt to a thousand nodes, and what others feel of it.

use std::collections::HashSet;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use drover_testkit::cluster::scratch_dir;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use super::control::{Lines, latency, request_id};
use super::figures::{Figure, Goal};
use super::ideal;
use crate::stage::Stage;

/// Injects into this many played nodes, a few times.
pub async fn run(nodes: u32, rounds: usize) -> anyhow::Result<Vec<Figure>> {
    let stage = Stage::start().await?;
    let swarm = stage.launch(nodes).await?;
    let addr = stage.control_addr()?;
    let mut times = Vec::new();
    let time = Duration::from_secs(rounds as u64 * 2);
    let echo = ideal::tcp_echo().await?;
    let others = async { tokio::try_join!(latency(&addr, 200, time), latency(&echo, 200, time)) };
    let injecting = async {
        for round in 0..rounds {
            let begun = tokio::time::Instant::now();
            times.push(inject_all(&addr, &swarm, nodes, round).await?);
            answer_all(&stage, &swarm, nodes).await?;
            tokio::time::sleep_until(begun + Duration::from_secs(2)).await;
        }
        Ok::<_, anyhow::Error>(())
    };
    let ((others, echoed), ()) = tokio::try_join!(others, injecting)?;
    times.sort();
    let dir = scratch_dir("ideal-")?;
    let ideal = ideal::append_and_sync(dir.path(), nodes as usize, &[b'x'; 400])?;
    Ok(vec![
        Figure {
            name: format!("inject to {nodes} nodes until every inject_delivered, median of {rounds}"),
            ours: times[times.len() / 2].as_secs_f64() * 1000.0,
            ideal: Some(ideal.as_secs_f64() * 1000.0),
            unit: "ms",
            goal: Goal::Below(1000.0),
        },
        Figure {
            name: format!("swarm_list during the inject to {nodes} nodes, 200/s, p99"),
            ours: others.quantile_ms(0.99),
            ideal: Some(echoed.quantile_ms(0.99)),
            unit: "ms",
            goal: Goal::Below(5.0),
        },
    ])
}

async fn inject_all(addr: &str, swarm: &str, nodes: u32, round: usize) -> anyhow::Result<Duration> {
    let (reader, mut writer) = TcpStream::connect(addr).await?.into_split();
    let id = format!("inject-{round}");
    let command = format!(
        "{{\"protocol\":\"codeswarm.router.v1\",\"type\":\"command\",\"command\":\"inject\",\"request_id\":\"{id}\",\
         \"payload\":{{\"swarm_id\":\"{swarm}\",\"nodes\":\"all\",\"content\":\"round {round}\"}}}}\n"
    );
    let begun = Instant::now();
    writer.write_all(command.as_bytes()).await?;
    let mut lines = Lines::new(reader);
    let mut delivered = HashSet::new();
    while delivered.len() < nodes as usize {
        let mut failed = None;
        let more = lines.read(|line| {
            if request_id(line) != Some(&id) {
                return;
            }
            let event: serde_json::Value = serde_json::from_slice(line).unwrap_or_default();
            match event["event"].as_str() {
                Some("inject_delivered") => {
                    delivered.insert(event["data"]["node_id"].as_u64());
                }
                Some("inject_failed" | "command_rejected") => failed = Some(event.to_string()),
                _ => {}
            }
        });
        ensure!(more.await?, "the connection ended after {} deliveries", delivered.len());
        if let Some(failed) = failed {
            anyhow::bail!("{failed}");
        }
    }
    Ok(begun.elapsed())
}

/// Ends every turn, so that the next round finds idle nodes.
async fn answer_all(stage: &Stage, swarm: &str, nodes: u32) -> anyhow::Result<()> {
    let players = (0..nodes).map(|node| stage.player(swarm, node)).collect::<anyhow::Result<Vec<_>>>()?;
    let answering = tokio::task::spawn_blocking(move || {
        players.iter().try_for_each(|player| {
            let mut player = player.lock().unwrap_or_else(PoisonError::into_inner);
            let prompts = player.prompts()?;
            prompts.iter().try_for_each(|prompt| player.answer(prompt))
        })
    });
    answering.await.context("a player panicked")?
}
