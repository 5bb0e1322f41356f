//! How to reach one host.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng as _;

use crate::prompt::{Askpass, Batch, Prompt};

/// How to reach one host. What is not here comes from the user's ssh configuration.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The host as the user would name it to `ssh`.
    pub host: String,
    /// Options that win over the configuration files, as `ssh -o KEY=VALUE` takes them.
    pub options: Vec<(String, String)>,
    /// The one configuration file to read; without it `~/.ssh/config` and then `/etc/ssh/ssh_config`.
    pub config_file: Option<PathBuf>,
    /// Where `~` is.
    pub home: PathBuf,
    /// Who is asked for when the configuration names no user.
    pub local_user: String,
    /// The socket of the ssh agent.
    pub agent: Option<PathBuf>,
    /// How long each step of making a connection may take, when nobody has to be asked.
    pub connect_timeout: Duration,
    /// How often a silent server is asked whether it is there, unless the configuration says it.
    pub keepalive: Duration,
    /// How many such questions may stay unanswered.
    pub keepalive_misses: usize,
    /// Most sessions at once on the connection; 10 is what a server allows when nothing is set there.
    pub max_sessions: usize,
    /// How connections are tried again.
    pub retry: Retry,
    /// How soon after a refusal a new command makes us try again.
    pub refused_pause: Duration,
    /// How long the reader of a pipe may leave its buffer full before the pipe is cut: all channels share one connection,
    /// and a reader that does not read holds up the others.
    pub slow_reader: Duration,
    /// A program of the host that connects its standard input and output to the address in its last argument. It stands
    /// in for port forwarding where a site forbids that.
    pub bridge: Option<Vec<OsString>>,
    /// Who is asked for passphrases and about unknown hosts.
    pub prompt: Arc<dyn Prompt>,
}

impl Settings {
    /// The settings that the environment of this process stands for. Nobody is asked anything, but for the passphrase of a
    /// key where `SSH_ASKPASS` names a program.
    pub fn from_env(host: impl Into<String>) -> Self {
        let var = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let name = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let prompt: Arc<dyn Prompt> = match var("SSH_ASKPASS") {
            Some(program) => Arc::new(Askpass(program.into())),
            None => Arc::new(Batch),
        };
        Self {
            host: host.into(),
            options: Vec::new(),
            config_file: None,
            home: std::env::home_dir().unwrap_or_else(|| PathBuf::from("/")),
            local_user: name("USER").or_else(|| name("LOGNAME")).unwrap_or_default(),
            agent: var("SSH_AUTH_SOCK").map(Into::into),
            connect_timeout: Duration::from_secs(10),
            keepalive: Duration::from_secs(5),
            keepalive_misses: 2,
            max_sessions: 10,
            retry: Retry::default(),
            refused_pause: Duration::from_secs(2),
            slow_reader: Duration::from_secs(10),
            bridge: None,
            prompt,
        }
    }
}

/// How long to wait before the next attempt.
#[derive(Debug, Clone, Copy)]
pub struct Retry {
    /// The pause after the first failure; it doubles with each that follows.
    pub first: Duration,
    /// The longest pause.
    pub ceiling: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self { first: Duration::from_millis(250), ceiling: Duration::from_secs(15) }
    }
}

impl Retry {
    /// The pause after so many failures in a row: anything between half of the step and all of it, so that many clients of
    /// one server do not come back together.
    pub(crate) fn pause(self, failures: u32) -> Duration {
        let step = self.first.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(self.ceiling);
        step.mul_f64(rand::rng().random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_ceiling_and_differ() {
        let retry = Retry { first: Duration::from_millis(100), ceiling: Duration::from_secs(2) };
        for (failures, most) in [(1, 100), (2, 200), (3, 400), (5, 1600), (6, 2000), (60, 2000), (u32::MAX, 2000)] {
            let pause = retry.pause(failures).as_millis();
            assert!((most / 2..=most).contains(&pause), "{failures}: {pause}");
        }
        let first = retry.pause(9);
        assert!((0..100).any(|_| retry.pause(9) != first));
    }
}
