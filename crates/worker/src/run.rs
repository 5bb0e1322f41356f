//! From arguments and configuration to a serving worker.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use drover_config::{Config, WorkerConfig};
use drover_mailbox::Mailbox;
use drover_service::{Context, Daemon, ExitWith, Server};
use drover_types::{Generation, JobId, NodeIndex, SwarmId};
use tokio::sync::watch;

use crate::grpc::Door;
use crate::metrics::Metrics;
use crate::node::{Identity, TakenOver};
use crate::slurm;
use crate::static_host::{self, HostName, StaticHost};

const DEFAULT_LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 7953);

/// Who the worker is and where. Whatever starts workers sets the environment; people may use the flags.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct WorkerArgs {
    /// Swarm that the node belongs to
    #[arg(long, value_name = "ID", env = "DROVER_SWARM_ID")]
    pub(crate) swarm_id: Option<SwarmId>,
    /// Index of the node in its swarm, from 0
    #[arg(long, value_name = "INDEX", env = "DROVER_NODE_ID")]
    pub(crate) node_id: Option<NodeIndex>,
    /// Incarnation of the node's worker, from 1; without it the next that is free
    #[arg(long, value_name = "N", env = "DROVER_GENERATION")]
    pub(crate) generation: Option<Generation>,
    /// The backend's name of the allocation
    #[arg(long, value_name = "ID", env = "DROVER_JOB_ID")]
    pub(crate) job_id: Option<JobId>,
    /// Root of the mailbox
    #[arg(long, value_name = "DIR", env = "DROVER_MAILBOX")]
    pub(crate) mailbox: Option<PathBuf>,
    /// Directory of the node, on local disk; with --static that of all nodes [default: nodes/ of the state directory]
    #[arg(long, value_name = "DIR", env = "DROVER_NODE_DIR")]
    pub(crate) node_dir: Option<PathBuf>,
    /// Agent to run: codex or echo; without it worker.agent of the configuration
    #[arg(long, value_name = "NAME", env = "DROVER_AGENT")]
    pub(crate) agent: Option<String>,
    /// Directory of the node's key and certificate; without it the node takes no part in the gossip
    #[arg(long, value_name = "DIR", env = "DROVER_IDENTITY")]
    pub(crate) identity: Option<PathBuf>,
    /// Serve whatever node the static backend assigns to this host, one after another, until told to end
    #[arg(long = "static")]
    pub(crate) static_host: bool,
    /// This is a task of a Slurm job: node, job and directory are what Slurm's environment says. A worker is started, and another
    /// when it dies
    #[arg(long, conflicts_with = "static_host")]
    pub(crate) slurm: bool,
    /// Name of this host in cluster.hosts [default: the system's]
    #[arg(long, value_name = "NAME", requires = "static_host")]
    pub(crate) host: Option<HostName>,
}

impl Identity {
    fn of(args: WorkerArgs, config: &WorkerConfig, state: &Path) -> anyhow::Result<Self> {
        let args = if args.slurm { slurm::fill(args, |name| std::env::var(name).ok(), state)? } else { args };
        let dir = |path: PathBuf| std::path::absolute(path).context("a directory name that cannot be used");
        let agent = match args.agent.as_deref().filter(|name| !name.is_empty()) {
            Some(name) => name.parse().map_err(|error| usage(format!("--agent: {error}")))?,
            None => config.agent,
        };
        Ok(Self {
            swarm: needed(args.swarm_id, "--swarm-id", "DROVER_SWARM_ID")?,
            node: needed(args.node_id, "--node-id", "DROVER_NODE_ID")?,
            generation: args.generation,
            job: needed(args.job_id, "--job-id", "DROVER_JOB_ID")?,
            mailbox: Mailbox::new(dir(needed(args.mailbox, "--mailbox", "DROVER_MAILBOX")?)?),
            node_dir: dir(needed(args.node_dir, "--node-dir", "DROVER_NODE_DIR")?)?,
            agent,
            proof: args.identity.filter(|dir| !dir.as_os_str().is_empty()).map(dir).transpose()?,
        })
    }
}

fn needed<T>(value: Option<T>, flag: &str, variable: &str) -> Result<T, ExitWith> {
    value.ok_or_else(|| usage(format!("{flag} is missing: give it, or set {variable}")))
}

fn usage(message: String) -> ExitWith {
    ExitWith { code: 64, message }
}

/// The daemon.
#[derive(Debug)]
pub struct Worker;

impl Daemon for Worker {
    const NAME: &'static str = "worker";
    const ABOUT: &'static str = "Runs one agent on one node and speaks to the rest of drover through the mailbox";
    type Args = WorkerArgs;

    fn instance(args: &WorkerArgs) -> String {
        let task = slurm::node(|name| std::env::var(name).ok()).filter(|_| args.slurm);
        match (&args.swarm_id, args.node_id.or(task)) {
            _ if args.static_host => format!("worker-static-{}", HostName::or_this(args.host.clone())),
            // The parent of the worker, which has its name. A job that was put back may come to a host where its last run is still ending.
            (Some(swarm), Some(node)) if args.slurm => {
                let run = std::env::var("SLURM_RESTART_COUNT").ok().and_then(|count| count.parse::<u32>().ok());
                format!("slurm-task-{swarm}-{node}-{}", run.unwrap_or(0))
            }
            (Some(swarm), Some(node)) => format!("worker-{swarm}-{node}"),
            _ => Self::NAME.to_owned(),
        }
    }

    fn grace(config: &Config) -> Duration {
        config.worker.longest_end()
    }

    async fn run(config: Arc<Config>, args: WorkerArgs, ctx: Context) -> anyhow::Result<()> {
        let explicit = ctx.explicit_listen().or(config.worker.listen);
        if args.static_host {
            let host = StaticHost::of(args.host, args.mailbox, args.node_dir, &config, &ctx)?;
            let listener = ctx.bind("the worker", explicit, DEFAULT_LISTEN)?;
            return static_host::serve(host, &ctx, listener).await;
        }
        let in_slurm = args.slurm;
        let identity = Identity::of(args, &config.worker, ctx.state().path())?;
        if in_slurm {
            let variable = |name: &str| std::env::var(name).ok();
            let dir = std::env::var_os(slurm::DIR).map(PathBuf::from);
            let parent = slurm::Parent::new(identity, dir.as_deref());
            return parent.keep(&config.worker, &slurm::addresses(&config, variable), &ctx).await;
        }
        let listener = ctx.bind("the worker", explicit, DEFAULT_LISTEN)?;
        let settings = config.worker.clone();
        let taken = tokio::task::spawn_blocking(move || TakenOver::take(identity, &settings)).await??;
        let agent = taken.agent(&config.worker, &ctx);
        let (seat_in, seat) = watch::channel(None);
        let metrics = Metrics::register(&ctx.registry());
        let opened = || Server::new(&ctx).grpc(Door { seat }.service()).serve(listener).map(drop);
        taken.serve(&ctx, &config, agent, metrics, &seat_in, opened).await
    }
}
