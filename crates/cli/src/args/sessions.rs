//! Arguments of the commands about sessions: conversations that move between nodes.

use std::path::PathBuf;

use clap::Args;

use super::values::{agents, host_port, key_value};

#[derive(Debug, Args)]
pub(crate) struct Sessions {
    /// Show what was said in this one
    pub(crate) session: Option<String>,
    /// Those that are over, too
    #[arg(long)]
    pub(crate) all: bool,
    /// End the session once its turns are answered
    #[arg(long, requires = "session")]
    pub(crate) end: bool,
    /// End the turn that runs before it has its answer; the session goes on
    #[arg(long, requires = "session", conflicts_with = "end")]
    pub(crate) interrupt: bool,
    /// With --interrupt: only this turn, running or waiting, by the name that `drover send` gave it
    #[arg(long, value_name = "ID", requires = "interrupt")]
    pub(crate) request: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct SendArgs {
    /// Session: letters, digits, `-`, `_` and `.`
    pub(crate) session: String,
    /// What is said; `-` reads it from standard input
    #[arg(long, value_name = "P", required_unless_present = "prompt_file")]
    pub(crate) prompt: Option<String>,
    /// File that holds what is said
    #[arg(long, value_name = "F", conflicts_with = "prompt")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// Agent of a new session; without it the one that nodes are configured with
    #[arg(long, value_name = "AGENT", value_parser = agents())]
    pub(crate) agent: Option<String>,
    /// What a node of a new session must be able to do, as `drover members` shows it; may be repeated
    #[arg(long = "needs", value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) needs: Vec<(String, String)>,
    /// Something to be known of a new session; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) labels: Vec<(String, String)>,
    /// A node's own door instead of the router; may be repeated, and the next is taken when one fails
    #[arg(long = "entry", value_name = "HOST:PORT", value_parser = host_port)]
    pub(crate) entries: Vec<String>,
    /// Name of this turn; said again under the same name it is the same turn. Without it a fresh one
    #[arg(long, value_name = "ID")]
    pub(crate) request: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Handoff {
    /// Session
    pub(crate) session: String,
    /// Node that is to have it, such as 6c1f/2; without it the one that suits best
    #[arg(long, value_name = "NODE")]
    pub(crate) to: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Drain {
    /// Node, as `drover members` shows it, such as 6c1f/0
    pub(crate) node: String,
    /// Let it take sessions again
    #[arg(long)]
    pub(crate) undo: bool,
}
