//! Arguments of the commands about who may do what: the audit log, keys and certificates.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::values::key_id;

#[derive(Debug, Args)]
pub(crate) struct Audit {
    /// How many of the last commands
    #[arg(long, value_name = "N", default_value_t = 50, conflicts_with = "all")]
    pub(crate) last: usize,
    /// All that were ever written down
    #[arg(long)]
    pub(crate) all: bool,
    /// Only of this user, by id
    #[arg(long, value_name = "UID")]
    pub(crate) user: Option<u32>,
    /// Only of this swarm, by its id or a beginning of it
    #[arg(long, value_name = "SWARM")]
    pub(crate) swarm: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Keys {
    #[command(subcommand)]
    pub(crate) action: KeyAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeyAction {
    /// List the keys, and how many nodes have each
    #[command(after_help = "Example:\n  drover keys list --json")]
    List,
    /// Add a key that nodes can read with from now on
    #[command(after_help = "Example:\n  drover keys add")]
    Add(KeyAdd),
    /// Let all nodes seal with a key; refused while a node that is alive does not have it
    #[command(after_help = "Example:\n  drover keys use 5e")]
    Use(KeyNamed),
    /// Let all nodes forget a key; refused while one of them seals with it
    #[command(after_help = "Example:\n  drover keys remove a1")]
    Remove(KeyNamed),
}

#[derive(Debug, Args)]
pub(crate) struct Pki {
    #[command(subcommand)]
    pub(crate) action: PkiAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PkiAction {
    /// Make the authority of this instance, unless there is one: the first launch does so too
    #[command(after_help = "Example:\n  drover pki init")]
    Init,
    /// Issue an identity: a directory with key, certificate and whom to trust
    #[command(after_help = "Example:\n  drover pki issue spare/0 --to identity")]
    Issue(PkiIssue),
    /// List every certificate that was issued, and whether it is still good
    #[command(after_help = "Example:\n  drover pki list --json")]
    List,
    /// Put a fresh key and certificate into identities; daemons that run show them at their next connection
    #[command(after_help = "Examples:\n  drover pki rotate\n  drover pki rotate identity --revoke")]
    Rotate(PkiRotate),
    /// Revoke certificates for good: by node, by serial number
    #[command(after_help = "Example:\n  drover pki revoke spare/0")]
    Revoke(PkiRevoke),
}

#[derive(Debug, Args)]
pub(crate) struct PkiIssue {
    /// Whose it is: `SWARM/INDEX`, or any name for a host outside of swarms
    #[arg(value_name = "NODE")]
    pub(crate) node: String,
    /// The directory to make
    #[arg(long, value_name = "DIR")]
    pub(crate) to: PathBuf,
    /// How long it is good
    #[arg(long, value_name = "DAYS", default_value_t = 90, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub(crate) days: u32,
}

#[derive(Debug, Args)]
pub(crate) struct PkiRotate {
    /// Identity directories; without any: those of all nodes whose files this host has
    #[arg(value_name = "DIR")]
    pub(crate) dirs: Vec<PathBuf>,
    /// Also revoke what these nodes had before
    #[arg(long)]
    pub(crate) revoke: bool,
    /// How long the new ones are good
    #[arg(long, value_name = "DAYS", default_value_t = 90, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub(crate) days: u32,
}

#[derive(Debug, Args)]
pub(crate) struct PkiRevoke {
    /// Nodes, or serial numbers of `drover pki list`
    #[arg(value_name = "NODE|SERIAL", required = true)]
    pub(crate) names: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct KeyAdd {
    /// File with the key: 64 hexadecimal digits. Without it a fresh one is made
    #[arg(long, value_name = "FILE")]
    pub(crate) key_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct KeyNamed {
    /// Id of the key: two hexadecimal digits of `drover keys list`
    #[arg(value_parser = key_id)]
    pub(crate) id: u8,
    /// Also when nodes are cut off by it until they have caught up
    #[arg(long)]
    pub(crate) force: bool,
}
