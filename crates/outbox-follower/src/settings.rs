//! What the follower is told, from the configuration, the command line and the machine.

use std::path::{Path, PathBuf};
use std::time::Duration;

use drover_config::{Config, HumanDuration};
use rustix::process::{Resource, getrlimit};

/// Flags of the follower's own.
#[derive(Debug, Default, clap::Args)]
pub struct FollowerArgs {
    /// Mailbox root; without it the one of the configured cluster, else `mailbox` in the state directory
    #[arg(long, value_name = "DIR")]
    pub mailbox: Option<PathBuf>,
    /// End when nobody has used it for so long, such as 30m; without it as follower.end_when_idle says
    #[arg(long, value_name = "DURATION")]
    pub end_when_idle: Option<HumanDuration>,
}

/// Everything a follower has to know.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Mailbox root.
    pub mailbox: PathBuf,
    /// How often the outbox of a node at work is looked at where the file system does not tell of changes.
    pub hot_poll: Duration,
    /// How often the outbox of a quiet node is looked at.
    pub cold_poll: Duration,
    /// Size at which an inbox segment is full.
    pub segment_bytes: u64,
    /// Let the system tell of changes where it can.
    pub watch: bool,
    /// Most inboxes, and most outboxes per stream, that are held open at a time.
    pub max_open: usize,
    /// It ends when nobody has used it for so long; never when absent.
    pub end_when_idle: Option<Duration>,
}

impl Settings {
    /// The settings of a daemon with this configuration and state directory.
    pub fn new(config: &Config, args: FollowerArgs, state: &Path) -> Self {
        Self {
            mailbox: args.mailbox.unwrap_or_else(|| config.mailbox_root(state)),
            hot_poll: config.follower.hot_poll.get(),
            cold_poll: config.follower.cold_poll.get(),
            segment_bytes: config.follower.segment_bytes.get(),
            watch: true,
            max_open: max_open(getrlimit(Resource::Nofile).current),
            end_when_idle: args.end_when_idle.or(config.follower.end_when_idle).map(HumanDuration::get),
        }
    }
}

/// Files are opened on demand, so a small limit costs opens and nothing else. Half of it is left to sockets.
fn max_open(limit: Option<u64>) -> usize {
    limit.map_or(1024, |limit| (limit / 4).clamp(16, 1024) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mailbox_is_the_flag_then_the_cluster_then_the_state_directory() {
        let state = Path::new("/state");
        let mut config = Config::default();
        let root = |config: &Config, flag: Option<&str>| {
            Settings::new(config, FollowerArgs { mailbox: flag.map(PathBuf::from), ..FollowerArgs::default() }, state)
                .mailbox
        };
        assert_eq!(root(&config, None), Path::new("/state/mailbox"));
        config.cluster.workspace_root = Some("/shared".to_owned());
        assert_eq!(root(&config, None), Path::new("/shared/mailbox"));
        config.cluster.cluster_subdir = Some("me".to_owned());
        assert_eq!(root(&config, None), Path::new("/shared/me/mailbox"));
        assert_eq!(root(&config, Some("/m")), Path::new("/m"));
    }

    #[test]
    fn files_held_open_stay_within_the_limit() {
        assert_eq!(max_open(Some(1024)), 256);
        assert_eq!(max_open(Some(20)), 16);
        assert_eq!(max_open(None), 1024);
    }
}
