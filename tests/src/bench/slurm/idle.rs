//! What the follower on the login host costs while a thousand outboxes are quiet.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use drover_testkit::lab::Options;

use super::super::figures::{Figure, Goal};
use super::{count, cpu_seconds, follow, outboxes, warm};
use crate::slurm::{Seat, with};

pub(super) fn run(short: bool) -> anyhow::Result<Vec<Figure>> {
    let mut figures = one(0, short)?;
    figures.extend(one(3, short)?);
    Ok(figures)
}

fn one(cache_seconds: u32, short: bool) -> anyhow::Result<Vec<Figure>> {
    let (nodes, time) = if short { (20, Duration::from_secs(4)) } else { (1000, Duration::from_secs(40)) };
    with(Options { nodes: 1, cache_seconds, ..Options::default() }, Seat::Laptop, "", async |site| {
        let one = outboxes(site, nodes, 300)?;
        warm(site).await?;
        let (_open, mut stream) = follow(site, nodes).await?;
        count(&mut stream, one * u64::from(nodes), Instant::now()).await?;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let follower = *site.followers()?.first().context("no follower")?;
        let before = cpu_seconds(&[follower])?;
        tokio::time::sleep(time).await;
        let used = cpu_seconds(&[follower])? - before;
        let how = if cache_seconds == 0 { "no caching".to_owned() } else { format!("{cache_seconds} s of caching") };
        let mut figures = vec![Figure {
            name: format!("idle CPU of the follower, {nodes} quiet outboxes, {how}"),
            ours: used / time.as_secs_f64() * 100.0,
            ideal: None,
            unit: "% of a core",
            goal: Goal::Below(1.0),
        }];
        if let Some(operations) = file_operations(follower, time) {
            figures.push(Figure {
                name: format!("file operations of the follower, {nodes} quiet outboxes, {how}"),
                ours: operations,
                ideal: None,
                unit: "/s",
                goal: Goal::Below(50.0),
            });
        }
        Ok(figures)
    })
}

/// System calls per second that have to do with files, as `strace` counts them; none where there is no strace.
fn file_operations(pid: u32, time: Duration) -> Option<f64> {
    let seconds = time.as_secs().to_string();
    let calls = "trace=%file,read,pread64,readv,write,pwrite64,writev,fstat,getdents64,lseek,fsync,fdatasync,close";
    // Reads and writes of sockets are none, so only descriptors of files count.
    let output = Command::new("timeout")
        .args(["--signal=INT", &seconds, "strace", "-f", "-y", "-e", calls, "-p", &pid.to_string()])
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !text.contains("attached") {
        return None;
    }
    let of_files = |line: &&str| {
        let call = line.split_once('(').map_or("", |(_, rest)| rest);
        !line.contains("resumed")
            && !["<socket:", "<TCP:", "<UNIX", "<anon_inode:", "<pipe:", "<UDP:"]
                .iter()
                .any(|other| call.contains(other))
    };
    let counted = text.lines().filter(|line| line.contains('(')).filter(of_files).count();
    Some(counted as f64 / time.as_secs_f64())
}
