//! The adapter for a login host that is this host.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use crate::process::{self, Broken, Program};
use crate::{Command, Exit, Output, Pipe, Remote, SshError, State};

const HERE: &str = "this host";
const CONNECT: Duration = Duration::from_secs(10);

/// Runs commands on this host.
#[derive(Debug)]
pub struct Local {
    state: watch::Sender<State>,
    tasks: TaskTracker,
}

impl Default for Local {
    fn default() -> Self {
        Self::new()
    }
}

impl Local {
    /// This host is always there.
    pub fn new() -> Self {
        Self { state: watch::Sender::new(State::Up { since: SystemTime::now() }), tasks: TaskTracker::new() }
    }
}

/// The program, or how a shell would have answered for it.
fn start(command: &Command) -> Result<Result<Program, Output>, SshError> {
    command.check()?;
    let mut process = tokio::process::Command::new(&command.program);
    process.args(&command.args).envs(command.env.iter().map(|(name, value)| (name, value))).kill_on_drop(true);
    let missing = |code, why: &str| {
        let stderr = Bytes::from(format!("{}: {why}\n", command.name()));
        Ok(Err(Output { exit: Exit::Code(code), stdout: Bytes::new(), stderr }))
    };
    match Program::spawn(&mut process) {
        Ok(program) => Ok(Ok(program)),
        Err(SshError::Spawn { why, .. }) if why == std::io::Error::from_raw_os_error(2).to_string() => {
            missing(127, "not found")
        }
        Err(SshError::Spawn { why, .. }) if why == std::io::Error::from_raw_os_error(13).to_string() => {
            missing(126, "permission denied")
        }
        Err(error) => Err(error),
    }
}

#[async_trait]
impl Remote for Local {
    async fn run(&self, command: Command) -> Result<Output, SshError> {
        let program = match start(&command)? {
            Ok(program) => program,
            Err(output) => return Ok(output),
        };
        let (name, host) = (command.name(), HERE.to_owned());
        let input = [command.stdin.clone()];
        match timeout(command.deadline, program.finish(&input, Bytes::new(), command.max_output)).await {
            Err(_) => Err(SshError::Deadline { program: name, host, after: command.deadline }),
            Ok(Err(Broken::TooMuch)) => Err(SshError::TooMuchOutput { program: name, host, limit: command.max_output }),
            Ok(Err(Broken::Wait(why))) => Err(SshError::UnknownOutcome { program: name, host, why }),
            Ok(Ok((status, stdout, stderr))) => {
                Ok(Output { exit: process::exit(status), stdout, stderr: stderr.bytes() })
            }
        }
    }

    async fn open(&self, command: Command) -> Result<Pipe, SshError> {
        let (pipe, served) = Pipe::pair();
        match start(&command)? {
            Ok(program) => {
                self.tasks.spawn(program.serve(served, Bytes::new(), |status, _| Ok(process::exit(status))));
            }
            Err(output) => {
                served.report.stderr(&output.stderr);
                served.report.exit(output.exit);
            }
        }
        Ok(pipe)
    }

    async fn tunnel(&self, to: SocketAddr) -> Result<Pipe, SshError> {
        let connected = timeout(CONNECT, TcpStream::connect(to)).await;
        let mut stream = connected
            .unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))
            .map_err(|error| SshError::Tunnel { host: HERE.to_owned(), to, why: error.to_string() })?;
        let (pipe, mut served) = Pipe::pair();
        self.tasks.spawn(async move {
            let joined = tokio::io::copy_bidirectional(&mut served.stream, &mut stream);
            tokio::select! {
                result = joined => if let Err(error) = result { served.report.fail(error.to_string()) },
                () = served.dropped.cancelled() => {}
            }
        });
        Ok(pipe)
    }

    fn state(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }
}
