//! Programs of this host, and what goes in and out of them.

use std::process::{ExitStatus, Stdio};

use bytes::{Bytes, BytesMut};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout};

use crate::command::Tail;
use crate::pipe::Served;
use crate::{Exit, SshError};

/// A program in a process group of its own. Dropping it before it has ended ends it with all that it started.
pub(crate) struct Program {
    pub(crate) child: Child,
    pub(crate) stdin: ChildStdin,
    pub(crate) stdout: ChildStdout,
    pub(crate) stderr: ChildStderr,
    pub(crate) group: Group,
}

pub(crate) struct Group(Option<Pid>);

impl Group {
    pub(crate) fn of(child: &Child) -> Self {
        Self(child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw))
    }

    /// The leader was waited for: its number may soon be somebody else's.
    pub(crate) fn ended(&mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            // It may have ended by itself meanwhile.
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

impl Program {
    pub(crate) fn spawn(command: &mut tokio::process::Command) -> Result<Self, SshError> {
        let name = command.as_std().get_program().to_string_lossy().into_owned();
        let fail = |why: String| SshError::Spawn { program: name.clone(), why };
        let spawned =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).spawn();
        let mut child = spawned.map_err(|error| fail(error.to_string()))?;
        let group = Group::of(&child);
        match (child.stdin.take(), child.stdout.take(), child.stderr.take()) {
            (Some(stdin), Some(stdout), Some(stderr)) => Ok(Self { child, stdin, stdout, stderr, group }),
            _ => Err(fail("it has no standard streams".to_owned())),
        }
    }

    /// Gives the program its input and takes all of its output.
    pub(crate) async fn finish(
        self,
        input: &[Bytes],
        already: Bytes,
        max_output: usize,
    ) -> Result<(ExitStatus, Bytes, Tail), Broken> {
        let Self { mut child, mut stdin, mut stdout, mut stderr, mut group } = self;
        let feed = async move {
            for bytes in input {
                // A program need not read its input.
                if stdin.write_all(bytes).await.is_err() {
                    return;
                }
            }
        };
        let collect = async {
            let mut all = BytesMut::from(already);
            loop {
                if all.len() > max_output {
                    return Err(Broken::TooMuch);
                }
                if stdout.read_buf(&mut all).await.unwrap_or(0) == 0 {
                    return Ok(all.freeze());
                }
            }
        };
        let complain = async {
            let mut tail = Tail::default();
            drain(&mut stderr, |bytes| tail.push(bytes)).await;
            Ok(tail)
        };
        let output = async { tokio::try_join!(collect, complain) };
        let fed_or_not = async {
            tokio::pin!(output);
            tokio::select! {
                output = &mut output => output,
                () = feed => output.await,
            }
        };
        let (stdout, tail) = fed_or_not.await?;
        let status = child.wait().await.map_err(|error| Broken::Wait(error.to_string()))?;
        group.ended();
        Ok((status, stdout, tail))
    }

    /// Joins the program with a pipe until either ends. `judge` says what an exit means and may make it a failure.
    pub(crate) async fn serve(
        self,
        served: Served,
        already: Bytes,
        judge: impl Fn(ExitStatus, &Tail) -> Result<Exit, String>,
    ) {
        let Self { mut child, mut stdin, mut stdout, mut stderr, mut group } = self;
        let Served { stream, report, dropped } = served;
        let (mut from_user, mut to_user) = tokio::io::split(stream);
        let inbound = async {
            to_user.write_all(&already).await?;
            tokio::io::copy(&mut stdout, &mut to_user).await
        };
        let outbound = async {
            let _ = tokio::io::copy(&mut from_user, &mut stdin).await;
            drop(stdin);
            std::future::pending::<()>().await;
        };
        let complain = async {
            let mut tail = Tail::default();
            drain(&mut stderr, |bytes| {
                tail.push(bytes);
                report.stderr(bytes);
            })
            .await;
            tail
        };
        let all = async {
            let (_, tail) = tokio::join!(inbound, complain);
            (child.wait().await, tail)
        };
        let ended = tokio::select! {
            ended = all => ended,
            () = outbound => return,
            () = dropped.cancelled() => return,
        };
        group.ended();
        match ended {
            (Ok(status), tail) => match judge(status, &tail) {
                Ok(exit) => report.exit(exit),
                Err(why) => report.fail(why),
            },
            (Err(error), _) => report.fail(error.to_string()),
        }
    }
}

pub(crate) enum Broken {
    TooMuch,
    Wait(String),
}

async fn drain(stream: &mut (impl AsyncRead + Unpin), mut take: impl FnMut(&[u8])) {
    let mut buffer = vec![0; 8 << 10];
    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
        take(&buffer[..read]);
    }
}

pub(crate) fn exit(status: ExitStatus) -> Exit {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code.unsigned_abs()),
        (None, Some(signal)) => Exit::Signal(signal_name(signal)),
        (None, None) => Exit::Code(1),
    }
}

fn signal_name(signal: i32) -> String {
    // The names that SSH has for them, so that adapters agree.
    let name = match signal {
        1 => "HUP",
        2 => "INT",
        3 => "QUIT",
        4 => "ILL",
        6 => "ABRT",
        8 => "FPE",
        9 => "KILL",
        10 => "USR1",
        11 => "SEGV",
        13 => "PIPE",
        14 => "ALRM",
        15 => "TERM",
        other => return other.to_string(),
    };
    name.to_owned()
}
