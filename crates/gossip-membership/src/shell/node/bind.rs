//! The socket, and the time until there is one.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Context as _;
use drover_service::{Context, now_us};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::settings::Settings;
use crate::shell::handle::{Handle, Job};
use crate::shell::socket::{BindError, Socket, address_towards};

/// A socket that cannot be bound is tried again after a pause of these bounds.
const BIND_AGAIN: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));

/// Tries until the socket is there. Meanwhile jobs are told that there is no node.
pub(super) async fn bind(
    settings: &Settings,
    handle: &Handle,
    jobs: &mut mpsc::Receiver<Job>,
    ctx: &Context,
) -> Option<Socket> {
    let default = drover_config::SwarmConfig::DEFAULT_BIND_PORT;
    let wanted = SocketAddr::new(settings.bind_addr, settings.bind_port.unwrap_or(default));
    let (mut pause, longest) = BIND_AGAIN;
    loop {
        let error = match Socket::bind(wanted, settings.bind_port.is_some(), &handle.shared.metrics) {
            Ok(socket) => {
                handle.shared.notes.over("cannot_bind");
                return Some(socket);
            }
            Err(error) => error,
        };
        let what = match error {
            BindError::Taken(addr) => format!("the gossip cannot bind UDP {addr}: another program has it"),
            BindError::Other(..) => format!("the gossip cannot bind: {error}"),
        };
        handle.shared.notes.holds(now_us(), "cannot_bind", what);
        let again = Instant::now() + pause;
        pause = (pause * 2).min(longest);
        if !jobs_without_node(Some(again), jobs, ctx).await {
            return None;
        }
    }
}

/// Answers jobs without a node until the daemon stops.
pub(crate) async fn without_node(jobs: &mut mpsc::Receiver<Job>, ctx: &Context) {
    jobs_without_node(None, jobs, ctx).await;
}

/// Answers jobs without a node, up to a moment or for ever; false when the daemon stops.
async fn jobs_without_node(end: Option<Instant>, jobs: &mut mpsc::Receiver<Job>, ctx: &Context) -> bool {
    loop {
        tokio::select! {
            () = ctx.shutdown().cancelled() => return false,
            () = until(end) => return true,
            job = jobs.recv() => match job {
                Some(job) => job(None),
                None => return false,
            },
        }
    }
}

/// The address that the others are told.
pub(super) fn advertised(settings: &Settings, socket: &Socket) -> anyhow::Result<IpAddr> {
    let bound = socket.addr().ip();
    if let Some(addr) = settings.advertise_addr {
        return Ok(addr);
    }
    if !bound.is_unspecified() {
        return Ok(bound);
    }
    let any: SocketAddr =
        if bound.is_ipv4() { ([192, 0, 2, 1], 9).into() } else { ([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1], 9).into() };
    let seed = settings.seeds.iter().find_map(|seed| seed.parse().ok()).unwrap_or(any);
    address_towards(seed).context("set swarm.advertise_addr: the address that others reach this node at is not clear")
}

pub(super) async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}
