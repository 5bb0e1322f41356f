//! The adapter over our own SSH client: one connection, many channels.
//!
//! ```text
//! run, open, tunnel --> link (waits for a connection) --> session slot --> channel --> command or tunnel
//!                         ^
//! keeper: connect, wait until it dies, pause, connect again
//! ```
//!
//! One task keeps the connection; everybody else watches what it has. A command goes through three states: waiting (nothing has
//! been sent: it may be taken to another connection), sent (its outcome is unknown if the connection dies), ended.

mod auth;
mod channel;
mod connect;
mod keeper;
mod keys;
mod stream;

use std::net::SocketAddr;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::{CancellationToken, DropGuard};

use self::channel::{Begin, Running};
use self::keeper::{Link, Shared};
use crate::{Command, Output, Pipe, Remote, Settings, SshError, State, bootstrap, resolve};

/// Runs commands over one SSH connection, which it keeps up until it is dropped.
#[derive(Debug)]
pub struct Russh {
    shared: Arc<Shared>,
    _stop: DropGuard,
}

impl Russh {
    /// Begins to connect; errors of the configuration are told at once, all others by what is asked of it later. Must be
    /// called within a tokio runtime.
    pub fn new(settings: Settings) -> Result<Self, SshError> {
        let config = resolve(&settings)?;
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared::new(settings, config));
        shared.tasks.spawn(keeper::keep(Arc::clone(&shared), stop.clone()));
        Ok(Self { shared, _stop: stop.drop_guard() })
    }

    fn host(&self) -> String {
        self.shared.settings.host.clone()
    }

    /// A login shell that waits for its line. Until this returns nothing of the command has been sent, so whatever goes wrong
    /// on the way is tried again until the deadline.
    async fn start(&self, command: &Command, deadline: Instant) -> Result<Running, SshError> {
        command.check()?;
        let late = |why: String| SshError::NotStarted {
            program: command.name(),
            host: self.host(),
            after: command.deadline,
            why,
        };
        let mut failures = 0;
        loop {
            let live = match timeout_at(deadline, self.shared.link()).await {
                Err(_) => return Err(late(self.shared.why_not())),
                Ok(Link::Refused { why, hint }) => return Err(SshError::Refused { host: self.host(), why, hint }),
                Ok(Link::Up(live)) => live,
            };
            let Ok(begun) = timeout_at(deadline, channel::begin(&self.shared, &live)).await else {
                return Err(late(live.why_waiting()));
            };
            let why = match begun {
                Begin::Ready(running) => return Ok(running),
                Begin::Shell(said) => return Err(SshError::Shell { host: self.host(), said }),
                Begin::Lost => continue,
                Begin::Full => "the server opens no more sessions (MaxSessions)".to_owned(),
            };
            // Sessions that were given up may still count at the server, and others may use the account's limit.
            failures += 1;
            let pause = self.shared.settings.retry.pause(failures).min(std::time::Duration::from_secs(1));
            if timeout_at(deadline, tokio::time::sleep(pause)).await.is_err() {
                return Err(late(why));
            }
        }
    }
}

#[async_trait]
impl Remote for Russh {
    async fn run(&self, command: Command) -> Result<Output, SshError> {
        let deadline = Instant::now() + command.deadline;
        let running = self.start(&command, deadline).await?;
        let input = [bootstrap::argument_line(&command), command.stdin.clone()];
        let (program, host) = (command.name(), self.host());
        match timeout_at(deadline, running.finish(&input, command.max_output)).await {
            Err(_) => Err(SshError::Deadline { program, host, after: command.deadline }),
            Ok(Ok(output)) => Ok(output),
            Ok(Err(channel::Broken::TooMuch)) => {
                Err(SshError::TooMuchOutput { program, host, limit: command.max_output })
            }
            Ok(Err(channel::Broken::Lost(why))) => Err(SshError::UnknownOutcome { program, host, why }),
        }
    }

    async fn open(&self, command: Command) -> Result<Pipe, SshError> {
        let deadline = Instant::now() + command.deadline;
        let running = self.start(&command, deadline).await?;
        let input = Bytes::from([bootstrap::argument_line(&command), command.stdin.clone()].concat());
        let (pipe, served) = Pipe::pair();
        let slow = self.shared.settings.slow_reader;
        self.shared.tasks.spawn(running.serve(input, served, slow));
        Ok(pipe)
    }

    async fn tunnel(&self, to: SocketAddr) -> Result<Pipe, SshError> {
        let patience = self.shared.settings.connect_timeout * 3;
        let deadline = Instant::now() + patience;
        let unreachable = |why: String| SshError::Tunnel { host: self.host(), to, why };
        loop {
            let live = match timeout_at(deadline, self.shared.link()).await {
                Err(_) => return Err(unreachable(self.shared.why_not())),
                Ok(Link::Refused { why, hint }) => return Err(SshError::Refused { host: self.host(), why, hint }),
                Ok(Link::Up(live)) => live,
            };
            if live.forwards() {
                let Ok(opened) = timeout_at(deadline, channel::forward(&self.shared, &live, to)).await else {
                    return Err(unreachable("the host has not answered".to_owned()));
                };
                match opened {
                    channel::Forward::Open(running) => {
                        let (pipe, served) = Pipe::pair();
                        self.shared.tasks.spawn(running.serve(Bytes::new(), served, self.shared.settings.slow_reader));
                        return Ok(pipe);
                    }
                    channel::Forward::Lost => continue,
                    channel::Forward::Failed(why) => return Err(unreachable(why)),
                    channel::Forward::Forbidden => live.forbid_forwarding(),
                }
            }
            let Some([program, args @ ..]) = self.shared.settings.bridge.as_deref() else {
                let hint =
                    "name a program there that connects its standard input and output to an address (`drover connect`)"
                        .to_owned();
                return Err(SshError::ForwardingRefused { host: self.host(), hint });
            };
            let left = deadline.saturating_duration_since(Instant::now());
            return self.open(Command::new(program).args(args).arg(to.to_string()).deadline(left)).await;
        }
    }

    fn state(&self) -> watch::Receiver<State> {
        self.shared.state.subscribe()
    }
}
