//! What the daemon is told, by flags, environment and configuration, brought together.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use drover_config::{Config, HumanDuration};
use drover_membership::MembershipArgs;
use drover_service::ExitWith;
use drover_types::SwarmId;

use crate::core;

/// Port of sessions unless another is configured.
const DEFAULT_PORT: u16 = 7947;
/// Bytes of sessions that leave this node in a second, at most: a mass drain is to leave room for turns.
const BYTES_PER_SECOND: u64 = 512 << 20;
/// How long one who listens may read nothing.
const PATIENCE: Duration = Duration::from_secs(30);

/// Which node this is and where its files are. Whatever starts it sets the environment; people may use the flags.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct HandoffArgs {
    /// Directory with this node's key and certificate; without it sessions stay on this host
    #[arg(long, value_name = "DIR", env = "DROVER_IDENTITY")]
    pub identity: Option<PathBuf>,
    /// Name of this node in the gossip [default: swarm.node_id, else <swarm id>/<node index>, else that of the identity]
    #[arg(long, value_name = "ID", env = "DROVER_GOSSIP_ID")]
    pub node_id: Option<String>,
    /// Swarm that this node belongs to
    #[arg(long, value_name = "ID", env = "DROVER_SWARM_ID")]
    pub swarm_id: Option<SwarmId>,
    /// Index of this node in its swarm
    #[arg(long, value_name = "INDEX", env = "DROVER_NODE_ID")]
    pub node_index: Option<u32>,
    /// Directory for this node's copies of its sessions [default: sessions/ of the state directory]
    #[arg(long, value_name = "DIR", env = "DROVER_SESSIONS_DIR")]
    pub dir: Option<PathBuf>,
    /// Directory that all nodes share; who owns which session stands there [default: shared-sessions/ of the state directory]
    #[arg(long, value_name = "DIR", env = "DROVER_SHARED_SESSIONS")]
    pub shared: Option<PathBuf>,
    /// Directory into which calls for this node are put where nobody reaches it over the network; without it none are looked for
    #[arg(long, value_name = "DIR", env = "DROVER_POST_DIR")]
    pub post: Option<PathBuf>,
    /// Most turns that run at a time; the others wait [default: 64]
    #[arg(long, value_name = "N", env = "DROVER_SESSION_TURNS")]
    pub turns: Option<usize>,
    /// How long a session stays where it is before the load alone may move it again [default: 1m]
    #[arg(long, value_name = "TIME", env = "DROVER_SESSION_RESIDENCE")]
    pub residence: Option<HumanDuration>,
    /// How long one who listens to an answer may read nothing before it is cut off; it asks again from where it was [default: 30s]
    #[arg(long, value_name = "TIME", env = "DROVER_SESSION_PATIENCE")]
    pub patience: Option<HumanDuration>,
}

impl HandoffArgs {
    fn as_member(&self) -> MembershipArgs {
        MembershipArgs {
            node_id: self.node_id.clone(),
            swarm_id: self.swarm_id.clone(),
            node_index: self.node_index,
            ..MembershipArgs::default()
        }
    }

    /// Name of the node's membership in the address book.
    pub fn membership(&self) -> String {
        self.as_member().instance()
    }

    /// Name of this daemon in the address book: one state directory may hold several nodes.
    pub fn instance(&self) -> String {
        self.membership().replacen("gossip-membership", "handoff-coordinator", 1)
    }
}

/// Everything the daemon has to know.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// The gossip id; `None` when only the identity can tell.
    pub(crate) node_id: Option<String>,
    pub(crate) identity: Option<PathBuf>,
    pub(crate) dir: PathBuf,
    pub(crate) shared: PathBuf,
    pub(crate) core: core::Settings,
    pub(crate) turns: usize,
    pub(crate) patience: Duration,
    pub(crate) bytes_per_second: u64,
    /// Where it listens, when that is configured.
    pub(crate) listen: Option<SocketAddr>,
    /// Where it listens else.
    pub(crate) default_listen: SocketAddr,
}

impl Settings {
    /// Brings flags and configuration together.
    pub(crate) fn new(config: &Config, args: &HandoffArgs, state: &Path) -> anyhow::Result<Self> {
        let swarm = config.swarm.clone().unwrap_or_default();
        let of_swarm = || Some(format!("{}/{}", args.swarm_id.as_ref()?, args.node_index?));
        let named = args.node_id.clone().filter(|id| !id.is_empty());
        let identity = args.identity.clone().filter(|dir| !dir.as_os_str().is_empty());
        // Without an identity connections are not encrypted, and then they must not leave the machine.
        let bind = swarm.bind_addr.parse().context("swarm.bind_addr")?;
        let ip = if identity.is_some() { bind } else { Ipv4Addr::LOCALHOST.into() };
        let defaults = core::Settings::default();
        let turns = args.turns.unwrap_or(64);
        if turns == 0 {
            let message = "--turns must be at least 1".to_owned();
            anyhow::bail!(ExitWith { code: 64, message });
        }
        Ok(Self {
            node_id: named.or_else(of_swarm).or_else(|| swarm.node_id.clone()),
            identity,
            dir: args.dir.clone().unwrap_or_else(|| state.join("sessions").join(args.instance())),
            shared: args.shared.clone().unwrap_or_else(|| state.join("shared-sessions")),
            core: core::Settings {
                enabled: swarm.handoff.enabled,
                load_threshold: swarm.handoff.load_threshold,
                timeout: swarm.handoff.timeout.get(),
                max_retries: swarm.handoff.max_retries,
                retry_delay: swarm.handoff.retry_delay.get(),
                rpc_timeout: swarm.rpc.timeout.get(),
                resend: (swarm.rpc.timeout.get() / 10).clamp(Duration::from_millis(50), Duration::from_secs(1)),
                residence: args.residence.map_or(defaults.residence, HumanDuration::get),
                ..defaults
            },
            turns,
            patience: args.patience.map_or(PATIENCE, HumanDuration::get),
            bytes_per_second: BYTES_PER_SECOND,
            listen: (swarm.rpc.port != DEFAULT_PORT).then(|| SocketAddr::new(ip, swarm.rpc.port)),
            default_listen: SocketAddr::new(ip, DEFAULT_PORT),
        })
    }
}

#[cfg(test)]
mod tests {
    use drover_config::SwarmConfig;

    use super::*;

    #[test]
    fn every_key_of_handoff_and_rpc_acts() {
        let mut swarm = SwarmConfig::default();
        let settings = |swarm: &SwarmConfig| {
            let config = Config { swarm: Some(swarm.clone()), ..Config::default() };
            Settings::new(&config, &HandoffArgs::default(), Path::new("/s")).unwrap()
        };
        assert_eq!(settings(&swarm).core, core::Settings::default());
        assert_eq!((settings(&swarm).listen, settings(&swarm).default_listen.port()), (None, 7947));
        swarm.handoff.enabled = false;
        swarm.handoff.load_threshold = 0.5;
        swarm.handoff.timeout = HumanDuration::secs(7);
        swarm.handoff.max_retries = 9;
        swarm.handoff.retry_delay = HumanDuration::secs(2);
        swarm.rpc.timeout = HumanDuration::secs(3);
        swarm.rpc.port = 9000;
        let changed = settings(&swarm);
        let seconds = Duration::from_secs;
        assert_eq!((changed.core.enabled, changed.core.load_threshold, changed.core.max_retries), (false, 0.5, 9));
        assert_eq!((changed.core.timeout, changed.core.retry_delay), (seconds(7), seconds(2)));
        assert_eq!((changed.core.rpc_timeout, changed.listen.unwrap().port()), (seconds(3), 9000));
    }

    #[test]
    fn its_names_follow_the_membership() {
        let args = HandoffArgs { node_id: Some("s/3".to_owned()), ..HandoffArgs::default() };
        assert_eq!(args.instance(), "handoff-coordinator-s+3");
        assert_eq!(args.membership(), "gossip-membership-s+3");
        assert_eq!(HandoffArgs::default().instance(), "handoff-coordinator");
    }
}
