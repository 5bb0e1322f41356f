//! Arguments of the commands about a machine and its programs: daemons, checks, what a cluster is asked, manuals.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Subcommand};

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Repair what can be repaired without harm
    #[arg(long)]
    pub(crate) fix: bool,
    /// Look at this entry of the catalogue; without it at the first, which launches use
    #[arg(long, value_name = "C", alias = "provider")]
    pub(crate) cluster: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct DaemonArgs {
    /// Which one
    pub(crate) name: String,
    /// Its own arguments; `drover daemon NAME --help` explains them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    pub(crate) args: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct Connect {
    /// Where to
    pub(crate) addr: std::net::SocketAddr,
}

#[derive(Debug, Args)]
pub(crate) struct Site {
    #[command(subcommand)]
    pub(crate) action: SiteAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SiteAction {
    /// See to it that an outbox follower runs on this host, and print where; its settings come as JSON on standard input
    Follower(SiteFollower),
    /// Print what this host is like, as JSON
    Probe(SiteProbe),
    /// Do something to the files of swarms on this host's shared file system: what, comes as JSON on standard input
    Ground(SiteFollower),
    /// Install codex into the shared file system, and print where
    Codex(SiteCodex),
}

#[derive(Debug, Args)]
pub(crate) struct SiteFollower {
    /// Directory on the shared file system that is drover's
    #[arg(long, value_name = "DIR")]
    pub(crate) base: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct SiteCodex {
    /// Directory on the shared file system that is drover's
    #[arg(long, value_name = "DIR")]
    pub(crate) base: PathBuf,
    /// Version
    #[arg(long, value_name = "V")]
    pub(crate) version: String,
    /// Archive of npm's directory to take it from; without it npm fetches it
    #[arg(long, value_name = "FILE")]
    pub(crate) from: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct SiteProbe {
    /// Directory to look at
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// File below it that is to be seen
    #[arg(long, value_name = "NAME")]
    pub(crate) sees: Option<String>,
    /// Look for codex too
    #[arg(long)]
    pub(crate) codex: bool,
    /// Where codex is; without it where workers find it by themselves
    #[arg(long, value_name = "FILE", requires = "codex")]
    pub(crate) codex_bin: Option<PathBuf>,
    /// Where its settings and credentials are; without it where workers find them by themselves
    #[arg(long, value_name = "DIR", requires = "codex")]
    pub(crate) codex_home: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Manual {
    /// Where to
    pub(crate) dir: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// Which shell
    #[arg(value_enum)]
    pub(crate) shell: Shell,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum Shell {
    Bash,
    Zsh,
    Fish,
}
