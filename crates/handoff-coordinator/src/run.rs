//! From arguments and configuration to a serving daemon.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use drover_config::Config;
use drover_service::pki::{Follower, Identity, IdentityHandle};
use drover_service::{Context, Daemon, Server, now_us};
use drover_types::{NodeIndex, SessionId};
use tracing::{info, warn};

use crate::agent::{Agents, Around};
use crate::core::{Input, NodeId, Owner};
use crate::files;
use crate::metrics::Metrics;
use crate::ownership::{Ownership as _, SharedFiles};
use crate::settings::{HandoffArgs, Settings};
use crate::shell::{self, Card, Door, NodeDoor, Parts, Places, Shell};

/// How often the identity's directory is looked at.
const LOOK: Duration = Duration::from_secs(5);
/// Largest bytes that the file with the number of starts may have.
const BOOT_BYTES: u64 = 64;

/// The daemon.
#[derive(Debug)]
pub struct Coordinator;

impl Daemon for Coordinator {
    const NAME: &'static str = "handoff-coordinator";
    const ABOUT: &'static str = "Keeps this node's sessions: runs their turns, and moves them to other nodes when it has too much to do or leaves";
    const ONE_THREAD: bool = true;
    type Args = HandoffArgs;

    fn instance(args: &HandoffArgs) -> String {
        args.instance()
    }

    async fn run(config: Arc<Config>, args: HandoffArgs, ctx: Context) -> anyhow::Result<()> {
        let settings = Settings::new(&config, &args, ctx.state().path())?;
        allow_open_files();
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
        let node = node_id(&settings, identity.as_ref())?;
        files::make_dir(&settings.dir).with_context(|| format!("failed to make {}", settings.dir.display()))?;
        let ownership = SharedFiles::new(&settings.shared)?;
        let store = ownership.name()?;
        let boot = next_boot(&settings.dir).context("failed to count the starts of this node")?;
        let listener = ctx.bind("handoff", ctx.explicit_listen().or(settings.listen), settings.default_listen)?;
        let port = listener.local_addr().port();

        let place = args.swarm_id.clone().zip(args.node_index).zip(settings.shared.parent());
        let agents = Agents::installed(&Around {
            config: Arc::clone(&config),
            ctx: ctx.clone(),
            place: place.map(|((swarm, index), mailbox)| (swarm, NodeIndex(index), mailbox.to_owned())),
            identity: settings.identity.clone(),
        });
        let places = Places {
            node: settings.dir.clone(),
            shared: settings.shared.clone(),
            ownership: ownership.clone(),
            // An answer may come on top of a session that is as large as it may be.
            most: settings.core.max_bytes * 2,
        };
        let me = Owner { node: NodeId::new(&node), boot };
        let parts = Parts {
            me: me.clone(),
            settings: settings.core.clone(),
            places,
            agents,
            default_agent: config.worker.agent,
            turns: settings.turns,
            patience: settings.patience,
            membership: args.membership(),
            bytes_per_second: settings.bytes_per_second,
            identity: identity.clone(),
            metrics: Metrics::register(&ctx.registry()),
        };
        let shell = Shell::start(parts, &ctx);
        shell.view.begin(store.clone(), shell.agents.names());
        // A node that is to be empty opens no session from its first moment on.
        shell.drains.go_on(&shell).await;
        shell.jobs.input(Input::Own(shell.view.own())).await;
        info!(node_id = %node, boot, agents = ?shell.agents.names().collect::<Vec<_>>(), "sessions of this node");
        let server = Server::new(&ctx).grpc(Door::service(&shell));
        let nodes = NodeDoor::service(&shell);
        // Without certificates nodes cannot be told from other programs of this user, and only those connect.
        let server = match identity {
            Some(_) => server.grpc_nodes(Door::service(&shell)).grpc_nodes(nodes),
            None => server.grpc(nodes),
        };
        server.serve(listener)?;

        if let Some(identity) = identity {
            ctx.spawn("identity", follow_identity(identity, ctx.clone()));
        }
        ctx.spawn("membership", shell::follow_members(shell.clone(), args.membership(), Card { port, store }));
        if let Some(dir) = &args.post {
            ctx.spawn("post", shell::serve_post(Door::service(&shell), dir.clone(), ctx.clone()));
        }
        ctx.spawn("orphans", shell::adopt_orphans(shell.clone(), args.membership()));
        ctx.spawn("plan", shell::plan(shell.clone()));
        recover(&shell, ownership, me.node).await;
        ctx.shutdown().cancelled().await;
        Ok(())
    }
}

/// Each session that is served here has two files open; the default limit of many systems is meant for programs that open few.
fn allow_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        warn!(%error, "the limit of open files cannot be raised");
    }
}

fn node_id(settings: &Settings, identity: Option<&IdentityHandle>) -> anyhow::Result<String> {
    let proved = identity.map(|identity| identity.current().node_id().to_owned());
    match (settings.node_id.clone(), proved) {
        (Some(named), Some(proved)) if named != proved => {
            bail!("this node is {named:?}, and its identity is for {proved:?}: give it its own, or leave the name out")
        }
        (_, Some(proved)) => Ok(proved),
        (Some(named), None) => Ok(named),
        (None, None) => bail!("no node id: give --node-id, or set swarm.node_id"),
    }
}

/// A number for this start that no earlier one of this node had, whatever the clock says.
fn next_boot(dir: &Path) -> std::io::Result<u64> {
    let before = files::read_small(&dir.join(".boot"), BOOT_BYTES)?;
    let before = before.and_then(|bytes| String::from_utf8(bytes).ok()?.trim().parse::<u64>().ok()).unwrap_or(0);
    let boot = now_us().max(before + 1);
    files::replace(dir, ".boot", format!("{boot}\n").as_bytes())?;
    Ok(boot)
}

/// Goes on with what earlier starts of this node had.
async fn recover(shell: &Shell, ownership: SharedFiles, node: NodeId) {
    let owned = tokio::task::spawn_blocking(move || ownership.owned_by(&node)).await;
    match owned {
        Ok(Ok(owned)) => {
            remove_others(shell, &owned.iter().map(|record| record.session.clone()).collect());
            let owned = owned.into_iter().filter(|record| record.cause != crate::core::Cause::Closed);
            for record in owned {
                shell.jobs.input(Input::Recover { session: record.session }).await;
            }
        }
        // Whoever is asked for one of them finds it.
        Ok(Err(error)) => warn!(%error, "the sessions that this node had cannot be listed"),
        Err(error) => warn!(%error, "the sessions that this node had cannot be listed"),
    }
}

/// Removes what is left here of sessions that went elsewhere while this node was down: all of it is on the shared file system.
fn remove_others(shell: &Shell, owned: &BTreeSet<SessionId>) {
    let entries = std::fs::read_dir(&shell.disk.places().node).into_iter().flatten();
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    for session in names.filter_map(|name| name.parse::<SessionId>().ok()).filter(|session| !owned.contains(session)) {
        shell.disk.push(&session, |state, places| {
            state.remove_unused(places);
            None
        });
    }
}

/// Puts a fresh certificate, other authorities and newly revoked certificates in force as soon as they lie in the identity's
/// directory.
async fn follow_identity(identity: IdentityHandle, ctx: Context) {
    let mut follower = Follower::new(identity);
    loop {
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
            Ok(Some(_)) => info!("another certificate, or other trust, is in force"),
            Ok(None) => {}
            // One look may fall between two files of a change.
            Err(error) => tracing::debug!(%error, "the identity cannot be read again"),
        }
    }
}
