//! The adapter that runs the system's `ssh`, one process for each command.
//!
//! For sites that ask for more than a key: one-time passwords, Kerberos, smart cards. There a person opens a shared connection
//! (`ControlMaster`) and this adapter rides on it. What it cannot tell apart: a program that ends with status 255, which is
//! also what `ssh` says of a lost connection; that counts as a lost connection.

use std::net::SocketAddr;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::io::AsyncReadExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::task::TaskTracker;
use tracing::debug;

use crate::bootstrap::{self, Greeting};
use crate::command::Tail;
use crate::process::{self, Broken, Program};
use crate::{Command, Exit, HostConfig, Output, Pipe, Remote, Settings, SshError, State, resolve};

/// What `ssh` exits with when it failed itself.
const OWN_FAILURE: i32 = 255;

/// Words of `ssh` after which trying again changes nothing.
const FINAL: [&str; 7] = [
    "Permission denied",
    "Host key verification failed",
    "HOST IDENTIFICATION HAS CHANGED",
    "Bad configuration option",
    "Too many authentication failures",
    "no matching host key type",
    "no matching key exchange method",
];

/// Runs commands through the system's `ssh`.
#[derive(Debug)]
pub struct System {
    settings: Settings,
    config: HostConfig,
    sessions: Arc<Semaphore>,
    state: watch::Sender<State>,
    tasks: TaskTracker,
}

/// A login shell that waits for its line.
struct Started {
    program: Program,
    after: Bytes,
    slot: OwnedSemaphorePermit,
}

impl System {
    /// Reads the configuration for what must be known here; `ssh` reads it again itself. Connects when there is something
    /// to do.
    pub fn new(settings: Settings) -> Result<Self, SshError> {
        let config = resolve(&settings)?;
        let sessions = Arc::new(Semaphore::new(settings.max_sessions.clamp(1, Semaphore::MAX_PERMITS)));
        let state = watch::Sender::new(State::Connecting { attempt: 0, why: None });
        Ok(Self { settings, config, sessions, state, tasks: TaskTracker::new() })
    }

    fn ssh(&self) -> tokio::process::Command {
        let settings = &self.settings;
        let mut ssh = tokio::process::Command::new("ssh");
        ssh.args(["-T", "-e", "none"]);
        if let Some(file) = &settings.config_file {
            ssh.arg("-F").arg(file);
        }
        let alive = self.config.alive_interval.unwrap_or(settings.keepalive).as_secs().max(1);
        let misses = self.config.alive_count.unwrap_or(settings.keepalive_misses);
        let patience = self.config.connect_timeout.unwrap_or(settings.connect_timeout).as_secs().max(1);
        // A host is never accepted silently, whatever the configuration says.
        let (batch, strict) = if settings.prompt.interactive() { ("no", "ask") } else { ("yes", "yes") };
        for option in [
            format!("BatchMode={batch}"),
            format!("StrictHostKeyChecking={strict}"),
            format!("ServerAliveInterval={alive}"),
            format!("ServerAliveCountMax={misses}"),
            format!("ConnectTimeout={patience}"),
            "LogLevel=ERROR".to_owned(),
            "ForwardAgent=no".to_owned(),
            "ForwardX11=no".to_owned(),
            "PermitLocalCommand=no".to_owned(),
            "RemoteCommand=none".to_owned(),
            "RequestTTY=no".to_owned(),
        ] {
            ssh.arg("-o").arg(option);
        }
        for (key, value) in &settings.options {
            ssh.arg("-o").arg(format!("{key}={value}"));
        }
        if let Some(agent) = &settings.agent {
            ssh.env("SSH_AUTH_SOCK", agent);
        }
        ssh.kill_on_drop(true);
        ssh
    }

    /// Starts `ssh` until the login shell has said its word; nothing of the command has been sent by then.
    async fn start(&self, command: &Command, deadline: Instant) -> Result<Started, SshError> {
        command.check()?;
        let host = self.settings.host.clone();
        let late = |why: String| SshError::NotStarted {
            program: command.name(),
            host: host.clone(),
            after: command.deadline,
            why,
        };
        let waiting = Arc::clone(&self.sessions).acquire_owned();
        let Ok(Ok(slot)) = timeout_at(deadline, waiting).await else {
            return Err(late(format!("all {} sessions are in use", self.settings.max_sessions)));
        };
        let mut failures = 0;
        loop {
            let word = bootstrap::word();
            let mut ssh = self.ssh();
            ssh.args(["--", &host, &bootstrap::login_line(&word)]);
            let mut program = Program::spawn(&mut ssh)?;
            let mut greeting = Greeting::new(&word);
            let Ok(greeted) = timeout_at(deadline, greet(&mut program, &mut greeting)).await else {
                return Err(late("the host has not answered".to_owned()));
            };
            if let Some(after) = greeted {
                self.up();
                return Ok(Started { program, after, slot });
            }
            let ended = timeout_at(deadline, program.finish(&[], Bytes::new(), usize::MAX)).await;
            let Ok(Ok((status, _, stderr))) = ended else { return Err(late("ssh does not end".to_owned())) };
            let said = format!("{} {}", greeting.said(), stderr.text()).trim().to_owned();
            if status.code() != Some(OWN_FAILURE) {
                return Err(SshError::Shell { host: self.settings.host.clone(), said });
            }
            failures += 1;
            self.down(&said, failures)?;
            let pause = self.settings.retry.pause(failures);
            debug!(host = %self.settings.host, failures, why = %said, "ssh failed, trying again");
            if Instant::now() + pause >= deadline {
                return Err(late(said));
            }
            sleep(pause).await;
        }
    }

    fn up(&self) {
        self.state.send_if_modified(|state| {
            let changed = !matches!(state, State::Up { .. });
            if changed {
                *state = State::Up { since: SystemTime::now() };
            }
            changed
        });
    }

    fn down(&self, said: &str, attempt: u32) -> Result<(), SshError> {
        let host = self.settings.host.clone();
        if !FINAL.iter().any(|sign| said.contains(sign)) {
            self.state.send_replace(State::Connecting { attempt, why: Some(said.to_owned()) });
            return Ok(());
        }
        let hint = format!(
            "`ssh {host} exit` must work without questions; where a site asks some, open a shared connection first (ControlMaster)"
        );
        self.state.send_replace(State::Refused { why: said.to_owned(), hint: hint.clone() });
        Err(SshError::Refused { host, why: said.to_owned(), hint })
    }
}

async fn greet(program: &mut Program, greeting: &mut Greeting) -> Option<Bytes> {
    let mut buffer = vec![0; 8 << 10];
    loop {
        match program.stdout.read(&mut buffer).await {
            Ok(0) | Err(_) => return None,
            Ok(read) => {
                if let Some(after) = greeting.hear(&buffer[..read]) {
                    return Some(after);
                }
            }
        }
    }
}

fn judge(status: ExitStatus, stderr: &Tail) -> Result<Exit, String> {
    if status.code() == Some(OWN_FAILURE) {
        return Err(format!("ssh ended with status 255: {}", stderr.text()));
    }
    Ok(process::exit(status))
}

#[async_trait]
impl Remote for System {
    async fn run(&self, command: Command) -> Result<Output, SshError> {
        let deadline = Instant::now() + command.deadline;
        let Started { program, after, slot } = self.start(&command, deadline).await?;
        let (name, host) = (command.name(), self.settings.host.clone());
        let input = [bootstrap::argument_line(&command), command.stdin.clone()];
        let ended = timeout_at(deadline, program.finish(&input, after, command.max_output)).await;
        drop(slot);
        match ended {
            Err(_) => Err(SshError::Deadline { program: name, host, after: command.deadline }),
            Ok(Err(Broken::TooMuch)) => Err(SshError::TooMuchOutput { program: name, host, limit: command.max_output }),
            Ok(Err(Broken::Wait(why))) => Err(SshError::UnknownOutcome { program: name, host, why }),
            Ok(Ok((status, stdout, stderr))) => match judge(status, &stderr) {
                Ok(exit) => Ok(Output { exit, stdout, stderr: stderr.bytes() }),
                Err(why) => Err(SshError::UnknownOutcome { program: name, host, why }),
            },
        }
    }

    async fn open(&self, command: Command) -> Result<Pipe, SshError> {
        let deadline = Instant::now() + command.deadline;
        let Started { mut program, after, slot } = self.start(&command, deadline).await?;
        let lost =
            |why: String| SshError::UnknownOutcome { program: command.name(), host: self.settings.host.clone(), why };
        for bytes in [bootstrap::argument_line(&command), command.stdin.clone()] {
            let sent = timeout_at(deadline, tokio::io::AsyncWriteExt::write_all(&mut program.stdin, &bytes)).await;
            sent.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
                .map_err(|error| lost(error.to_string()))?;
        }
        let (pipe, served) = Pipe::pair();
        self.tasks.spawn(async move {
            program.serve(served, after, judge).await;
            drop(slot);
        });
        Ok(pipe)
    }

    /// With a bridge that is what is used, because it tells whether it works. `ssh -W` does not: there a refusal shows when the
    /// tunnel is first read.
    async fn tunnel(&self, to: SocketAddr) -> Result<Pipe, SshError> {
        if let Some([program, args @ ..]) = self.settings.bridge.as_deref() {
            return self.open(Command::new(program).args(args).arg(to.to_string())).await;
        }
        let mut ssh = self.ssh();
        ssh.arg("-W").arg(to.to_string()).args(["--", &self.settings.host]);
        let program = Program::spawn(&mut ssh)?;
        let (pipe, served) = Pipe::pair();
        self.tasks.spawn(program.serve(served, Bytes::new(), judge));
        Ok(pipe)
    }

    fn state(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }
}
