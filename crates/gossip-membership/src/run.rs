//! From arguments and configuration to a serving daemon.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use drover_config::{Config, EventsConfig};
use drover_service::pki::{Follower, Identity, IdentityHandle};
use drover_service::{Context, Daemon, Server, now_us};
use tokio::time::{Instant, MissedTickBehavior};
use tracing::{debug, info};

use crate::events::Dispatcher;
use crate::grpc::Door;
use crate::load::{Machine, Monitor, Usage};
use crate::metrics::Metrics;
use crate::settings::{MembershipArgs, Settings};
use crate::shell::{self, Credentials, Dial, Handle, NodeDoor, Notes, Phase, Start};

/// The first look at the machine comes soon, so that a new node is known by more than its sessions.
const FIRST_SAMPLE: Duration = Duration::from_secs(1);

/// How often the identity's directory is looked at.
const LOOK: Duration = Duration::from_secs(5);

/// A certificate with fewer seconds left is worth a note; the login side renews it weeks before.
const ENDS_SOON: u64 = 12 * 3600;

/// When code that no longer runs and memory that is free are let go, each after the one before: when the node has joined, when the
/// connections of that time are closed.
const RELEASES: [Duration; 2] = [Duration::from_secs(3), Duration::from_secs(7)];
/// And from then on: what a rare exchange of everything needed is let go too. The code in use comes back in a fifth of a millisecond.
const RELEASE_EVERY: Duration = Duration::from_secs(20);

/// The daemon.
#[derive(Debug)]
pub struct Membership;

impl Daemon for Membership {
    const NAME: &'static str = "gossip-membership";
    const ABOUT: &'static str =
        "Finds the other nodes by gossip, and knows who is alive, how loaded and what each can do";
    const ONE_THREAD: bool = true;
    type Args = MembershipArgs;

    fn instance(args: &MembershipArgs) -> String {
        args.instance()
    }

    async fn run(config: Arc<Config>, args: MembershipArgs, ctx: Context) -> anyhow::Result<()> {
        let settings = Settings::new(&config, &args, ctx.state().path())?;
        let identity = match &settings.identity {
            Some(dir) => {
                let identity =
                    Identity::load(dir).with_context(|| format!("failed to load the identity in {}", dir.display()))?;
                let identity = IdentityHandle::new(identity);
                ctx.use_identity(identity.clone());
                Some(identity)
            }
            None => None,
        };
        let explicit = ctx.explicit_listen().or(settings.listen);
        let listener = ctx.bind("membership", explicit, settings.default_listen())?;
        let rpc_port = listener.local_addr().port();

        let metrics = Metrics::register(&ctx.registry());
        let notes = Notes::new(&metrics);
        let events = config.swarm.as_ref().map_or_else(EventsConfig::default, |swarm| swarm.events.clone());
        let events = Dispatcher::start(&events, &ctx, &metrics);
        let measured = settings.load_interval.is_some();
        let monitor = Monitor::new(settings.load.clone());
        let (handle, mut jobs) = Handle::new(notes.clone(), events, metrics, monitor, measured);
        let server = Server::new(&ctx).grpc(Door::service(&ctx, &handle));
        let nodes = NodeDoor::service(&handle, identity.is_some());
        // Without certificates nodes cannot be told from other programs of this user, and only those connect.
        let server = if identity.is_some() { server.grpc_nodes(nodes) } else { server.grpc(nodes) };
        server.serve(listener)?;

        if !settings.enabled {
            handle.set_phase(Phase::Disabled);
            notes.holds(
                now_us(),
                "disabled",
                "swarm.enabled is false: this node takes no part in the gossip".to_owned(),
            );
            shell::without_node(&mut jobs, &ctx).await;
            return Ok(());
        }
        let Some((node_id, credentials, dial)) = who(&settings, identity, &notes)? else {
            shell::without_node(&mut jobs, &ctx).await;
            return Ok(());
        };
        if let Some(interval) = settings.load_interval {
            ctx.spawn("load", measure(handle.clone(), interval, args.usage_file.clone(), ctx.clone()));
        }
        if let Credentials::Certified(identity) = &credentials {
            ctx.spawn("identity", follow_identity(identity.clone(), handle.clone(), notes.clone(), ctx.clone()));
        }
        ctx.spawn("memory", release_memory(ctx.clone()));
        let start = Start { node_id, settings, credentials, dial, rpc_port };
        shell::run(start, handle, jobs, ctx).await;
        Ok(())
    }
}

/// Who this node is and how it proves it; `None` when it has nothing to prove it by and must.
fn who(
    settings: &Settings,
    identity: Option<IdentityHandle>,
    notes: &Notes,
) -> anyhow::Result<Option<(String, Credentials, Dial)>> {
    if settings.plaintext {
        let message = "datagrams are not sealed: security.gossip_plaintext is set, whoever reaches the network can lie";
        notes.holds(now_us(), "plaintext", message.to_owned());
    }
    let Some(identity) = identity else {
        if settings.plaintext {
            let node_id = settings.node_id.clone().context("no node id: give --node-id, or set swarm.node_id")?;
            return Ok(Some((node_id, Credentials::Plain, Dial::new(None))));
        }
        notes.holds(now_us(), "no_identity", "this node has no identity, so nobody would believe it".to_owned());
        return Ok(None);
    };
    let proved = identity.current().node_id().to_owned();
    match &settings.node_id {
        Some(node_id) if *node_id != proved => {
            bail!(
                "this node is {node_id:?}, and its identity is for {proved:?}: give it its own, or leave the name out"
            );
        }
        _ => Ok(Some((proved, Credentials::Certified(identity.clone()), Dial::new(Some(identity))))),
    }
}

/// Puts a fresh certificate, other authorities and newly revoked certificates in force as soon as they lie in the identity's
/// directory, and says so when the own certificate is about to end.
async fn follow_identity(identity: IdentityHandle, handle: Handle, notes: Notes, ctx: Context) {
    let mut follower = Follower::new(identity.clone());
    let mut failures = 0;
    loop {
        say_when_it_ends(&identity.current(), &notes);
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            () = ctx.shutdown().cancelled() => return,
        }
        let looked = tokio::task::spawn_blocking(move || {
            let found = follower.look();
            (follower, found)
        });
        let Ok((back, found)) = looked.await else { return };
        follower = back;
        match found {
            Ok(found) => {
                if failures > 0 {
                    notes.over("identity");
                }
                failures = 0;
                if let Some(fresh) = found {
                    info!(expires = fresh.expires(), "another certificate, or other trust, is in force");
                    let _ = handle.with(move |node| node.renew_identity(&fresh)).await;
                }
            }
            // One look may fall between two files of a change.
            Err(error) => {
                failures += 1;
                if failures > 1 {
                    notes.holds(now_us(), "identity", format!("the identity cannot be read again: {error}"));
                }
            }
        }
    }
}

fn say_when_it_ends(identity: &Identity, notes: &Notes) {
    let left = identity.expires().saturating_sub(now_us() / 1_000_000);
    if left > ENDS_SOON {
        return notes.over("certificate_expired");
    }
    let message = match left {
        0 => "the certificate of this node has expired, or its clock is wrong: others will not believe it".to_owned(),
        left => format!("the certificate of this node expires in {} hours", left / 3600),
    };
    notes.holds(now_us(), "certificate_expired", message);
}

/// Lets go of the code and the memory that only the start, the joining of many, or something rare needed.
async fn release_memory(ctx: Context) {
    for pause in RELEASES.into_iter().chain(std::iter::repeat(RELEASE_EVERY)) {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = ctx.shutdown().cancelled() => return,
        }
        drover_memory::release_heap();
        if let Err(error) = drover_memory::release_code() {
            return debug!(%error, "memory of the start is not given back");
        }
    }
}

/// What a file says of the usage of processor and memory; nothing when it says nothing that makes sense.
fn told(file: &Path) -> Option<Usage> {
    let text = std::fs::read_to_string(file).ok()?;
    let mut words = text.split_ascii_whitespace().map(str::parse::<f64>);
    let (cpu, memory) = (words.next()?.ok()?, words.next()?.ok()?);
    [cpu, memory].iter().all(|share| (0.0..=1.0).contains(share)).then_some(Usage { cpu, memory })
}

/// Takes samples of the machine and passes the load on, until the daemon stops.
async fn measure(handle: Handle, interval: Duration, file: Option<PathBuf>, ctx: Context) {
    let mut machine = Machine::open();
    let begun = Instant::now();
    let mut ticks = tokio::time::interval_at(begun + interval.min(FIRST_SAMPLE), interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = ctx.shutdown().cancelled() => return,
        }
        let (usage, limits) = machine.read(begun.elapsed().as_micros() as u64);
        let usage = file.as_deref().and_then(told).unwrap_or(usage);
        handle.measured(usage, limits).await;
    }
}
