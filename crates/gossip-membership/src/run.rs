//! From arguments and configuration to a serving daemon.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use drover_config::{Config, EventsConfig};
use drover_service::pki::{Identity, IdentityHandle};
use drover_service::{Context, Daemon, Server, now_us};
use tokio::time::{Instant, MissedTickBehavior};
use tracing::debug;

use crate::events::Dispatcher;
use crate::grpc::Door;
use crate::load::{Machine, Monitor};
use crate::metrics::Metrics;
use crate::settings::{MembershipArgs, Settings};
use crate::shell::{self, Credentials, Dial, Handle, NodeDoor, Notes, Phase, Start};

/// The first look at the machine comes soon, so that a new node is known by more than its sessions.
const FIRST_SAMPLE: Duration = Duration::from_secs(1);

/// When code that no longer runs is let go, each after the one before: when the node has joined, and when it has settled.
const RELEASES: [Duration; 2] = [Duration::from_secs(3), Duration::from_mins(1)];

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
            ctx.spawn("load", measure(handle.clone(), interval, ctx.clone()));
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
            return Ok(Some((node_id, Credentials::Plain, Dial::Plain)));
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
        _ => Ok(Some((proved, Credentials::Certified(identity.clone()), Dial::Certified(identity)))),
    }
}

/// Lets go of the code that only the start, and later the joining of many, needed.
async fn release_memory(ctx: Context) {
    for pause in RELEASES {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = ctx.shutdown().cancelled() => return,
        }
        if let Err(error) = drover_memory::release_code() {
            return debug!(%error, "memory of the start is not given back");
        }
    }
}

/// Takes samples of the machine and passes the load on, until the daemon stops.
async fn measure(handle: Handle, interval: Duration, ctx: Context) {
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
        handle.measured(usage, limits).await;
    }
}
