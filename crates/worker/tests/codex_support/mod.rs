//! A codex agent on its own, driven through its channels, with the mock API behind it.
#![allow(dead_code, reason = "each test program uses a part of this")]
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use drover_testkit::mock_responses::{MockResponses, codex_config};
use drover_types::InjectionId;
use drover_worker::agent::{Agent as _, AgentCommand, AgentEvent, TurnOutcome};
use drover_worker::codex::{CodexAgent, CodexSettings};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

/// Far above everything seen; a machine under load must not fail a test.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// The model name that codex does not know.
pub(crate) const PLAIN: &str = "mock-model";
/// A model name that codex knows, so that it offers its patch tool.
pub(crate) const KNOWN: &str = "gpt-5.5";

/// One node's agent.
pub(crate) struct Node {
    pub(crate) settings: CodexSettings,
    pub(crate) pid: u32,
    pub(crate) detail: Value,
    commands: mpsc::Sender<AgentCommand>,
    events: mpsc::Receiver<AgentEvent>,
    task: JoinSet<()>,
    count: usize,
}

/// A codex home for the mock, and a working directory, below this directory.
pub(crate) fn settings(bin: &Path, dir: &Path, mock: &MockResponses, model: &str) -> CodexSettings {
    let settings = CodexSettings::for_node(bin.to_owned(), dir.join("node"));
    let settings = CodexSettings { cwd: dir.join("ws"), ..settings };
    std::fs::create_dir_all(&settings.cwd).unwrap();
    std::fs::create_dir_all(&settings.codex_home).unwrap();
    std::fs::write(settings.codex_home.join("config.toml"), codex_config(&mock.base_url(), model)).unwrap();
    settings
}

impl Node {
    /// Starts the agent and does not wait for it.
    pub(crate) fn launch(settings: CodexSettings) -> Self {
        let (commands, command_queue) = mpsc::channel(64);
        let (event_queue, events) = mpsc::channel(64);
        let mut task = JoinSet::new();
        task.spawn(Box::new(CodexAgent::new(settings.clone())).run(command_queue, event_queue));
        Self { settings, pid: 0, detail: Value::Null, commands, events, task, count: 0 }
    }

    /// Starts the agent and waits until it takes prompts.
    pub(crate) async fn start(settings: CodexSettings) -> Self {
        let mut node = Self::launch(settings);
        node.ready().await;
        node
    }

    pub(crate) async fn ready(&mut self) -> Vec<AgentEvent> {
        let events = self.until("ready", |event| matches!(event, AgentEvent::Ready { .. })).await;
        if let Some(AgentEvent::Ready { detail, pid }) = events.last() {
            self.pid = pid.unwrap();
            self.detail = detail.clone();
        }
        events
    }

    pub(crate) async fn send(&self, command: AgentCommand) {
        self.commands.send(command).await.unwrap();
    }

    pub(crate) async fn begin(&mut self, prompt: &str) -> InjectionId {
        self.count += 1;
        let injection: InjectionId = format!("inj-{}", self.count).parse().unwrap();
        self.send(AgentCommand::Begin { injection: injection.clone(), prompt: prompt.into(), trace: None }).await;
        injection
    }

    pub(crate) async fn answer(&self, wanted: &AgentEvent, approved: bool, decision: Option<Value>) {
        let AgentEvent::ApprovalWanted { approval_id, call_id, .. } = wanted else { panic!("no approval: {wanted:?}") };
        let (approval_id, call_id) = (approval_id.clone(), call_id.clone());
        self.send(AgentCommand::Answer { approval_id, call_id, approved, decision }).await;
    }

    /// Everything up to the first event of which this is true; that one is the last.
    pub(crate) async fn until(&mut self, what: &str, is_it: impl Fn(&AgentEvent) -> bool) -> Vec<AgentEvent> {
        let mut seen = Vec::new();
        loop {
            match timeout(LIMIT, self.events.recv()).await {
                Ok(Some(event)) => {
                    let found = is_it(&event);
                    seen.push(event);
                    if found {
                        return seen;
                    }
                }
                Ok(None) => panic!("the agent ended without {what}: {seen:#?}"),
                Err(late) => panic!("no {what} within {LIMIT:?} ({late}): {seen:#?}\n{}", self.stderr()),
            }
        }
    }

    pub(crate) async fn ended(&mut self) -> (TurnOutcome, Vec<AgentEvent>) {
        let mut events = self.until("end of the turn", |event| matches!(event, AgentEvent::TurnEnded { .. })).await;
        let Some(AgentEvent::TurnEnded { outcome, .. }) = events.pop() else { unreachable!() };
        (outcome, events)
    }

    /// Begins a turn and waits for its end.
    pub(crate) async fn turn(&mut self, prompt: &str) -> (TurnOutcome, Vec<AgentEvent>) {
        let injection = self.begin(prompt).await;
        let (outcome, events) = self.ended().await;
        for event in &events {
            if let AgentEvent::Event { injection: of, kind, .. } = event {
                assert_eq!(*of, injection, "{kind} belongs to another turn");
            }
        }
        (outcome, events)
    }

    pub(crate) async fn approval(&mut self) -> AgentEvent {
        let wanted = |event: &AgentEvent| matches!(event, AgentEvent::ApprovalWanted { .. });
        self.until("question", wanted).await.pop().unwrap()
    }

    pub(crate) async fn event(&mut self, kind: &str) -> Value {
        let is_it = |event: &AgentEvent| matches!(event, AgentEvent::Event { kind: k, .. } if k == kind);
        match self.until(kind, is_it).await.pop() {
            Some(AgentEvent::Event { data, .. }) => data,
            _ => unreachable!(),
        }
    }

    /// Stops the agent in order; its program and everything that it started must be gone.
    pub(crate) async fn stop(mut self) {
        self.send(AgentCommand::Stop).await;
        while timeout(LIMIT, self.events.recv()).await.expect("the agent did not stop").is_some() {}
        timeout(LIMIT, self.task.join_next()).await.expect("the agent did not return").unwrap().unwrap();
        assert!(!is_alive(self.pid), "codex outlived its agent");
    }

    pub(crate) fn stderr(&self) -> String {
        std::fs::read_to_string(self.settings.node_dir.join("codex.stderr.log")).unwrap_or_default()
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.settings.cwd.join(name)
    }
}

/// The data of all events of this kind.
pub(crate) fn all(events: &[AgentEvent], kind: &str) -> Vec<Value> {
    let data = events.iter().filter_map(|event| match event {
        AgentEvent::Event { kind: k, data, .. } if k == kind => Some(data.clone()),
        _ => None,
    });
    data.collect()
}

pub(crate) fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}

/// Pids of all processes that have this among their arguments.
pub(crate) fn running(argument: &str) -> Vec<u32> {
    let pids =
        std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let has = |pid: &u32| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|&byte| byte == 0).any(|word| word == argument.as_bytes())
    };
    pids.filter(|pid| has(pid) && is_alive(*pid)).collect()
}

pub(crate) async fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < until, "{what} did not happen within {LIMIT:?}");
        sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

/// At the end of every test: the agent has sent what it should, and executed nothing twice.
pub(crate) fn check(mock: &MockResponses) {
    assert_eq!(mock.violations(), Vec::<String>::new());
    for (prompt, count) in mock.ledger() {
        assert_eq!(count, 1, "executed {count} times: {prompt}");
    }
}
