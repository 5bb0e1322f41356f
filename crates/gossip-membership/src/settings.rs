//! What the daemon is told, by flags, environment and configuration, brought together.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use drover_config::{Config, SwarmConfig};
use drover_service::ExitWith;
use drover_types::SwarmId;

use crate::load;

/// Most bytes of a gossip id.
pub(crate) const MAX_NODE_ID: usize = 128;
/// Port of gRPC unless another is configured.
const DEFAULT_RPC_PORT: u16 = 7954;

/// Who this node is and whom it asks first. Whatever starts it sets the environment; people may use the flags.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct MembershipArgs {
    /// Directory with this node's key and certificate; without it gossip runs only when security.gossip_plaintext is set
    #[arg(long, value_name = "DIR", env = "DROVER_IDENTITY")]
    pub identity: Option<PathBuf>,
    /// Who votes first, signed by the login side [default: charter.json in the directory of the identity]
    #[arg(long, value_name = "FILE", env = "DROVER_CHARTER")]
    pub charter: Option<PathBuf>,
    /// Name of this node in the gossip [default: swarm.node_id, else <swarm id>/<node index>, else that of the identity]
    #[arg(long, value_name = "ID", env = "DROVER_GOSSIP_ID")]
    pub node_id: Option<String>,
    /// Swarm that this node belongs to
    #[arg(long, value_name = "ID", env = "DROVER_SWARM_ID")]
    pub swarm_id: Option<SwarmId>,
    /// Index of this node in its swarm
    #[arg(long, value_name = "INDEX", env = "DROVER_NODE_ID")]
    pub node_index: Option<u32>,
    /// Nodes to ask first, as host:port,...; beside swarm.discovery.join_addrs
    #[arg(long, value_name = "ADDRS", env = "DROVER_SEEDS", value_delimiter = ',')]
    pub seeds: Vec<String>,
    /// Label of this node, as key=value; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", env = "DROVER_LABELS", value_delimiter = ',')]
    pub labels: Vec<String>,
    /// What this node can do, as key=value; may be repeated
    #[arg(long = "capability", value_name = "KEY=VALUE", env = "DROVER_CAPABILITIES", value_delimiter = ',')]
    pub capabilities: Vec<String>,
    /// Directory for what is to outlive a restart [default: membership/ of the state directory]
    #[arg(long, value_name = "DIR", env = "DROVER_MEMBERSHIP_DIR")]
    pub dir: Option<PathBuf>,
    /// File with the usage of processor and memory, two numbers from 0 to 1, that counts instead of what is measured: for a node of which the
    /// machine's own figures tell nothing
    #[arg(long, value_name = "FILE", env = "DROVER_USAGE_FILE")]
    pub usage_file: Option<PathBuf>,
}

impl MembershipArgs {
    /// The gossip id that flags and environment give.
    fn own_name(&self) -> Option<String> {
        let of_swarm = || Some(format!("{}/{}", self.swarm_id.as_ref()?, self.node_index?));
        self.node_id.clone().filter(|id| !id.is_empty()).or_else(of_swarm)
    }

    /// Name of this daemon in the address book: one state directory may hold several nodes.
    pub fn instance(&self) -> String {
        match self.own_name() {
            Some(id) => format!("gossip-membership-{}", file_name_of(&id)),
            None => "gossip-membership".to_owned(),
        }
    }
}

/// A gossip id as a part of a file name, readable where that is possible and never the same for two ids.
fn file_name_of(id: &str) -> String {
    let harmless = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    let mut name = String::new();
    for byte in id.bytes() {
        match byte {
            b'/' => name.push('+'),
            byte if harmless(byte) => name.push(char::from(byte)),
            byte => {
                let _ = write!(name, "%{byte:02x}");
            }
        }
    }
    name
}

/// Everything the daemon has to know.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Take part at all.
    pub(crate) enabled: bool,
    /// The gossip id; `None` when only the identity can tell.
    pub(crate) node_id: Option<String>,
    /// Region.
    pub(crate) region: String,
    /// Labels, with `swarm_id` and `node_index` among them.
    pub(crate) labels: BTreeMap<String, String>,
    /// What the node can do.
    pub(crate) capabilities: BTreeMap<String, String>,
    /// Address of the gossip socket.
    pub(crate) bind_addr: IpAddr,
    /// Its port, when it is configured.
    pub(crate) bind_port: Option<u16>,
    /// Address that the others are told, when it is configured.
    pub(crate) advertise_addr: Option<IpAddr>,
    /// Address of gRPC, when it is configured.
    pub(crate) listen: Option<SocketAddr>,
    /// Nodes to ask first, as `host:port`.
    pub(crate) seeds: Vec<String>,
    /// Probe period.
    pub(crate) gossip_interval: Duration,
    /// Pause between full exchanges.
    pub(crate) push_pull_interval: Duration,
    /// Longest silence until a node is suspect.
    pub(crate) node_timeout: Duration,
    /// How long a dead node stays listed.
    pub(crate) dead_node_timeout: Duration,
    /// Measure the machine; `None` when that is switched off.
    pub(crate) load_interval: Option<Duration>,
    /// What makes the score.
    pub(crate) load: load::Settings,
    /// Gossip in the clear.
    pub(crate) plaintext: bool,
    /// This node's key and certificate.
    pub(crate) identity: Option<PathBuf>,
    /// Who votes first, when that stands elsewhere than beside the identity.
    pub(crate) charter: Option<PathBuf>,
    /// Directory of what outlives a restart.
    pub(crate) dir: PathBuf,
}

impl Settings {
    /// Brings flags and configuration together.
    pub(crate) fn new(config: &Config, args: &MembershipArgs, state: &Path) -> anyhow::Result<Self> {
        let swarm = config.swarm.clone().unwrap_or_default();
        let node_id = args.own_name().or_else(|| swarm.node_id.clone());
        if let Some(id) = &node_id {
            check_name(id).map_err(usage)?;
        }
        let mut labels = pairs(&args.labels, "--label")?;
        if let Some(id) = &args.swarm_id {
            labels.insert("swarm_id".to_owned(), id.to_string());
        }
        if let Some(index) = args.node_index {
            labels.insert("node_index".to_owned(), index.to_string());
        }
        let bind_addr = swarm.bind_addr.parse().context("swarm.bind_addr")?;
        let SwarmConfig { discovery, load_monitor, .. } = &swarm;
        let seeds = discovery.join_addrs.iter().chain(&args.seeds).filter(|seed| !seed.is_empty());
        Ok(Self {
            enabled: swarm.enabled,
            node_id,
            region: swarm.region.clone(),
            labels,
            capabilities: pairs(&args.capabilities, "--capability")?,
            bind_addr,
            bind_port: swarm.bind_port,
            advertise_addr: swarm
                .advertise_addr
                .as_deref()
                .map(str::parse)
                .transpose()
                .context("swarm.advertise_addr")?,
            listen: swarm.listen,
            seeds: seeds.cloned().collect(),
            gossip_interval: discovery.gossip_interval.get(),
            push_pull_interval: discovery.push_pull_interval.get(),
            node_timeout: discovery.node_timeout.get(),
            dead_node_timeout: discovery.dead_node_timeout.get(),
            load_interval: load_monitor.enabled.then(|| load_monitor.interval.get()),
            load: load::Settings {
                cpu_weight: load_monitor.cpu_weight,
                memory_weight: load_monitor.memory_weight,
                session_weight: load_monitor.session_weight,
                threshold: swarm.handoff.load_threshold,
                sample_size: load_monitor.sample_size as usize,
                max_sessions: load_monitor.max_sessions,
            },
            plaintext: config.security.gossip_plaintext,
            identity: args.identity.clone().filter(|dir| !dir.as_os_str().is_empty()),
            charter: args.charter.clone().filter(|file| !file.as_os_str().is_empty()),
            dir: args.dir.clone().unwrap_or_else(|| state.join("membership").join(args.instance())),
        })
    }

    /// Where gRPC listens unless another address is configured.
    pub(crate) fn default_listen(&self) -> SocketAddr {
        // Without an identity connections are not encrypted, and then they must not leave the machine.
        let ip = if self.identity.is_some() { self.bind_addr } else { Ipv4Addr::LOCALHOST.into() };
        SocketAddr::new(ip, DEFAULT_RPC_PORT)
    }
}

/// Refuses a gossip id that cannot be one.
pub(crate) fn check_name(id: &str) -> Result<(), String> {
    if id.is_empty() || id.len() > MAX_NODE_ID || id.chars().any(char::is_control) {
        return Err(format!("node id {id:?} must have from 1 to {MAX_NODE_ID} bytes and no control characters"));
    }
    Ok(())
}

fn pairs(texts: &[String], flag: &str) -> anyhow::Result<BTreeMap<String, String>> {
    let mut pairs = BTreeMap::new();
    for text in texts.iter().filter(|text| !text.is_empty()) {
        let Some((key, value)) = text.split_once('=').filter(|(key, _)| !key.is_empty()) else {
            bail!(usage(format!("{flag} {text:?} is not of the form key=value")));
        };
        pairs.insert(key.to_owned(), value.to_owned());
    }
    Ok(pairs)
}

fn usage(message: String) -> ExitWith {
    ExitWith { code: 64, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_named_by_flag_then_swarm_and_index_then_configuration() {
        let mut args = MembershipArgs::default();
        let mut config = Config::default();
        let name =
            |config: &Config, args: &MembershipArgs| Settings::new(config, args, Path::new("/s")).unwrap().node_id;
        assert_eq!(name(&config, &args), None);
        config.swarm = Some(SwarmConfig { node_id: Some("configured".to_owned()), ..SwarmConfig::default() });
        assert_eq!(name(&config, &args).as_deref(), Some("configured"));
        args.swarm_id = Some("s".parse().unwrap());
        args.node_index = Some(3);
        assert_eq!(name(&config, &args).as_deref(), Some("s/3"));
        assert_eq!(args.instance(), "gossip-membership-s+3");
        args.node_id = Some("s+3 é".to_owned());
        assert_eq!(name(&config, &args).as_deref(), Some("s+3 é"));
        assert_eq!(args.instance(), "gossip-membership-s%2b3%20%c3%a9");
        let labels = Settings::new(&config, &args, Path::new("/s")).unwrap().labels;
        assert_eq!(labels.get("node_index").map(String::as_str), Some("3"));
        args.node_id = Some("x".repeat(200));
        let error = Settings::new(&config, &args, Path::new("/s")).unwrap_err();
        assert_eq!(error.downcast_ref::<ExitWith>().map(|exit| exit.code), Some(64));
    }
}
