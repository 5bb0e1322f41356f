//! The shell around the session: performs its effects and feeds back what comes of them.

use std::ffi::OsString;
use std::future::pending;
use std::io;
use std::time::Instant;

use drover_types::{ErrorCode, Failure};
use tokio::sync::mpsc;

use super::memory::ThreadMemory;
use super::process::{self, Family, Output, Process, Seen, sleep_until};
use super::session::{Effect, Input, Session, Terms};
use super::workspace::Workspace;
use super::{CodexSettings, home};
use crate::agent::{AgentCommand, AgentEvent};

/// Runs the agent to its end.
pub(super) async fn run(
    mut settings: CodexSettings,
    mut commands: mpsc::Receiver<AgentCommand>,
    events: mpsc::Sender<AgentEvent>,
) {
    let memory = match prepare(&settings) {
        Ok(memory) => memory,
        Err(error) => {
            let failure = Failure::new(ErrorCode::StoreUnavailable, format!("cannot set up codex's home: {error}"))
                .hint(format!("check that {} can be written", settings.node_dir.display()));
            // The worker is gone when nobody listens.
            drop(events.send(AgentEvent::GaveUp { failure }).await);
            return;
        }
    };
    // Codex cannot set up its sandbox on a path that leads through a symbolic link, and then every command fails.
    for path in [&mut settings.cwd, &mut settings.codex_home] {
        if let Ok(real) = std::fs::canonicalize(&path) {
            *path = real;
        }
    }
    let mark = home::mark(&settings);
    let left = process::sweep(&mark).await;
    if left > 0 {
        tracing::info!(left, "ended processes that an earlier agent of this node had left");
    }

    let terms = Terms {
        cwd: settings.cwd.display().to_string(),
        approval_policy: settings.approval_policy.clone(),
        sandbox_mode: settings.sandbox_mode.clone(),
        max_restarts: settings.max_restarts,
    };
    let session = Session::new(terms, Workspace::new(&settings.cwd), memory);
    let mut shell = Shell {
        settings,
        session,
        events,
        mark,
        process: None,
        start_at: Some(tokio::time::Instant::now()),
        baseline: Family::default(),
        stragglers: Vec::new(),
        finished: false,
    };

    let mut listening = true;
    while !shell.finished {
        let wake_at = shell.session.wake_at().map(tokio::time::Instant::from_std);
        let input = tokio::select! {
            biased;
            command = commands.recv(), if listening => {
                listening = command.is_some();
                // Without a worker there is nobody to work for.
                Input::Command(command.unwrap_or(AgentCommand::Stop))
            }
            output = next_output(&mut shell.process) => match output {
                Output::Message(message) => Input::Message(message),
                Output::Exited(reason) => shell.bury(reason).await,
            },
            () = sleep_until(shell.start_at) => shell.start(),
            () = sleep_until(wake_at) => Input::Tick,
        };
        shell.perform(input).await;
    }
    // Only when the session gave up on a codex that still runs.
    if let Some(process) = shell.process.take() {
        drop(process);
        process::sweep(&shell.mark).await;
    }
}

fn prepare(settings: &CodexSettings) -> io::Result<Option<ThreadMemory>> {
    std::fs::create_dir_all(&settings.node_dir)?;
    home::prepare(settings)?;
    ThreadMemory::load(&settings.thread_file)
}

async fn next_output(process: &mut Option<Process>) -> Output {
    match process {
        Some(process) => process.next().await,
        None => pending().await,
    }
}

struct Shell {
    settings: CodexSettings,
    session: Session,
    events: mpsc::Sender<AgentEvent>,
    mark: OsString,
    process: Option<Process>,
    start_at: Option<tokio::time::Instant>,
    baseline: Family,
    stragglers: Vec<Seen>,
    finished: bool,
}

impl Shell {
    /// Feeds the session until it has nothing more to do.
    async fn perform(&mut self, input: Input) {
        let mut inputs = vec![input];
        while let Some(input) = inputs.pop() {
            for effect in self.session.handle(Instant::now(), input) {
                match effect {
                    Effect::Send(bytes) => {
                        if let Some(process) = &mut self.process {
                            process.send(&bytes);
                        }
                    }
                    Effect::Emit(event) => {
                        if self.events.send(event).await.is_err() {
                            tracing::debug!("nobody listens to the agent any more");
                        }
                    }
                    Effect::Remember(memory) => {
                        if let Err(error) = memory.save(&self.settings.thread_file) {
                            let path = self.settings.thread_file.display();
                            tracing::error!(%error, %path, "cannot remember the thread; a restart will lose the history");
                        }
                    }
                    Effect::Baseline => self.baseline = self.family().await,
                    Effect::Look => {
                        self.stragglers = self.family().await.since(&self.baseline);
                        inputs.push(Input::Stragglers(self.stragglers.len()));
                    }
                    Effect::Kill => process::kill(&self.stragglers),
                    Effect::End { hard } => {
                        if let Some(process) = &mut self.process {
                            process.end(hard);
                        }
                    }
                    Effect::Start { after } => self.start_at = Some(tokio::time::Instant::now() + after),
                    Effect::Finish => self.finished = true,
                }
            }
        }
    }

    /// Reading `/proc` blocks, and on a large node it is large.
    async fn family(&self) -> Family {
        let codex = self.process.as_ref().map(Process::pid);
        let mark = self.mark.clone();
        tokio::task::spawn_blocking(move || Family::look(codex, &mark)).await.unwrap_or_default()
    }

    fn start(&mut self) -> Input {
        self.start_at = None;
        match Process::spawn(&self.settings) {
            Ok(process) => {
                let pid = process.pid();
                tracing::debug!(pid, "codex started");
                self.process = Some(process);
                Input::Started { pid }
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied) => {
                let bin = self.settings.bin.display();
                let failure = Failure::new(ErrorCode::CodexMissing, format!("cannot start {bin}: {error}"));
                Input::CannotStart(failure.hint("set worker.codex_bin, or launch with `--agent echo`"))
            }
            Err(error) => Input::Exited { reason: format!("it could not be started: {error}") },
        }
    }

    /// Codex is gone: nothing that it started may live on.
    async fn bury(&mut self, reason: String) -> Input {
        if let Some(process) = self.process.take() {
            let faults = process.faults();
            if faults.total() > 0 {
                tracing::warn!(?faults, "codex wrote lines that could not be used");
            }
        }
        process::sweep(&self.mark).await;
        Input::Exited { reason }
    }
}
