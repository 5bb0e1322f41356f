//! Arguments of the commands about swarms, their nodes and what they tell.

use std::path::PathBuf;

use clap::Args;
use drover_config::HumanDuration;

use super::values::{agents, key_value, node_index};

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Agent to show; without it codex when it is ready to use and answers in time, else echo
    #[arg(long, value_name = "AGENT", value_parser = agents())]
    pub(crate) agent: Option<String>,
    /// Number of nodes
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) nodes: u32,
    /// How long it may take on a slow machine, such as 2m; its steps get more too
    #[arg(long, value_name = "TIME")]
    pub(crate) limit: Option<HumanDuration>,
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    /// Also launch a local swarm of so many nodes; it ends with this command
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) nodes: Option<u32>,
    /// Agent of that swarm
    #[arg(long, value_name = "AGENT", value_parser = agents(), requires = "nodes")]
    pub(crate) agent: Option<String>,
    /// First prompt of that swarm
    #[arg(long, value_name = "P", requires = "nodes")]
    pub(crate) prompt: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Launch {
    /// Number of nodes
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) nodes: u32,
    /// First prompt, sent to every node; `-` reads it from standard input
    #[arg(long, value_name = "P", default_value = "", hide_default_value = true)]
    pub(crate) prompt: String,
    /// Slurm partition
    #[arg(long, value_name = "P")]
    pub(crate) partition: Option<String>,
    /// Slurm time limit, such as 00:10:00
    #[arg(long, value_name = "T")]
    pub(crate) time: Option<String>,
    /// Slurm account
    #[arg(long, value_name = "A")]
    pub(crate) account: Option<String>,
    /// Slurm quality of service
    #[arg(long, value_name = "Q")]
    pub(crate) qos: Option<String>,
    /// Where to launch: an id of the catalogue; without it the first
    #[arg(long, value_name = "C", alias = "provider")]
    pub(crate) cluster: Option<String>,
    /// Agent that the nodes run; without it worker.agent of the configuration
    #[arg(long, value_name = "AGENT", value_parser = agents())]
    pub(crate) agent: Option<String>,
    /// AGENTS.md for the nodes, or a directory with AGENTS.md and skills
    #[arg(long, value_name = "PATH")]
    pub(crate) agents_md: Option<PathBuf>,
    /// Further parameter of the backend
    #[arg(long = "param", value_name = "KEY=VALUE", value_parser = key_value, alias = "provider-param")]
    pub(crate) params: Vec<(String, String)>,
    /// Return when the swarm is up, without waiting for answers; implied by --json
    #[arg(long)]
    pub(crate) detach: bool,
    /// Print what would be launched and where, and launch nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct List {
    /// Only jobs on clusters that look like ours and are of no swarm of this instance
    #[arg(long)]
    pub(crate) orphans: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Inject {
    /// Swarm id, an unambiguous beginning of it, or `last`
    pub(crate) swarm: String,
    /// The prompt; `-` reads it from standard input
    #[arg(long, value_name = "P", required_unless_present = "prompt_file")]
    pub(crate) prompt: Option<String>,
    /// File that holds the prompt
    #[arg(long, value_name = "F", conflicts_with = "prompt")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// Index of a node, from 0; may be repeated. Without it every node
    #[arg(long = "node", value_name = "I", value_parser = node_index, allow_negative_numbers = true)]
    pub(crate) nodes: Vec<u32>,
    /// Add to the running turn instead of waiting for its end
    #[arg(long)]
    pub(crate) steer: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Swarm {
    /// Swarm id, an unambiguous beginning of it, or `last`
    pub(crate) swarm: String,
}

#[derive(Debug, Args)]
pub(crate) struct Attach {
    /// Swarm id, an unambiguous beginning of it, or `last`
    pub(crate) swarm: String,
    /// Begin behind this sequence number; 0 is the first. Without it begin now
    #[arg(long, value_name = "SEQ")]
    pub(crate) since: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct Terminate {
    /// Swarm id, an unambiguous beginning of it, or `last`
    pub(crate) swarm: String,
    /// Do not wait for running turns
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Begin behind this sequence number; 0 is the first. Without it: the first, or now with --follow
    #[arg(long, value_name = "SEQ")]
    pub(crate) since: Option<u64>,
    /// Stay and print events as they come
    #[arg(long)]
    pub(crate) follow: bool,
    /// Only events of this swarm
    #[arg(long, value_name = "SWARM")]
    pub(crate) swarm: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Approvals {
    /// Only of this swarm
    pub(crate) swarm: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Approve {
    /// Approval id, or an unambiguous beginning of it
    pub(crate) id: String,
    /// Say no
    #[arg(long, conflicts_with = "session")]
    pub(crate) decline: bool,
    /// Say yes, also to the same command later in the agent's session
    #[arg(long)]
    pub(crate) session: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Interrupt {
    /// Swarm id, an unambiguous beginning of it, or `last`
    pub(crate) swarm: String,
    /// Index of a node, from 0; may be repeated. Without it every node
    #[arg(long = "node", value_name = "I", value_parser = node_index, allow_negative_numbers = true)]
    pub(crate) nodes: Vec<u32>,
    /// Only this injection, running or waiting
    #[arg(long, value_name = "ID")]
    pub(crate) injection: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Why {
    /// SWARM, SWARM/INDEX, an injection id or a session; `last` is the swarm that was launched last
    #[arg(value_name = "SWARM|NODE|INJECTION|SESSION")]
    pub(crate) subject: String,
}

#[derive(Debug, Args)]
pub(crate) struct Members {
    /// Only of this swarm
    pub(crate) swarm: Option<String>,
    /// Stay and show changes as they come
    #[arg(long)]
    pub(crate) watch: bool,
}
