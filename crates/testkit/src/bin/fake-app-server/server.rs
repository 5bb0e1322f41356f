//! Requests and answers, threads on disk, and what a turn and the reader of the input share.

use std::collections::{HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::Child;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::turn;

/// One running fake.
pub(crate) struct Server {
    home: PathBuf,
    out: Mutex<io::Stdout>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
pub(crate) struct State {
    initialized: bool,
    /// Open threads, each with the file whose lock makes us its one writer.
    threads: HashMap<String, Thread>,
    pub(crate) running: Option<Running>,
    /// Answers to our questions, by question.
    pub(crate) answers: HashMap<u64, Value>,
    next_question: u64,
    pub(crate) commands: Vec<Child>,
}

struct Thread {
    file: File,
    tokens: u64,
}

/// The running turn.
pub(crate) struct Running {
    pub(crate) thread_id: String,
    pub(crate) turn_id: String,
    pub(crate) interrupted: bool,
    /// Prompts that were added to it: our client's name for each, and the text.
    pub(crate) added: VecDeque<(Value, String)>,
}

/// Why a pause ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pause {
    Over,
    Interrupted,
    Added,
}

type Answer = Result<Value, String>;

impl Server {
    pub(crate) fn new(home: PathBuf) -> Arc<Self> {
        Arc::new(Self { home, out: Mutex::new(io::stdout()), state: Mutex::default(), changed: Condvar::new() })
    }

    /// A panic of a turn's thread leaves nothing behind that could not be used.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, value: &Value) {
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        // Without a reader there is nobody to speak to; the end of the input will end us.
        drop(writeln!(out, "{value}").and_then(|()| out.flush()));
    }

    pub(crate) fn tell(&self, method: &str, params: &Value) {
        self.write(&json!({"method": method, "params": params, "emittedAtMs": now_us() / 1000}));
    }

    /// Asks the client and waits for its decision; none when the turn was interrupted meanwhile.
    pub(crate) fn ask(&self, method: &str, params: &Value) -> Option<Value> {
        let id = {
            let mut state = self.state();
            state.next_question += 1;
            state.next_question - 1
        };
        self.write(&json!({"method": method, "id": id, "params": params}));
        let mut state = self.state();
        let answer = loop {
            if let Some(answer) = state.answers.remove(&id) {
                break Some(answer);
            }
            if state.running.as_ref().is_none_or(|running| running.interrupted) {
                break None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        self.tell("serverRequest/resolved", &json!({"threadId": params["threadId"], "requestId": id}));
        answer
    }

    /// Waits this long, or until the turn is interrupted or steered.
    pub(crate) fn pause(&self, length: Duration) -> Pause {
        let until = Instant::now() + length;
        let mut state = self.state();
        loop {
            match &state.running {
                Some(running) if running.interrupted => return Pause::Interrupted,
                Some(running) if !running.added.is_empty() => return Pause::Added,
                Some(_) => {}
                None => return Pause::Interrupted,
            }
            let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) else {
                return Pause::Over;
            };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes one line of the client.
    pub(crate) fn take(self: &Arc<Self>, line: &str) {
        let Ok(message) = serde_json::from_str::<Value>(line) else { return };
        let id = &message["id"];
        match message["method"].as_str() {
            Some(method) if !id.is_null() => {
                let answer = match self.call(method, &message["params"]) {
                    Ok(result) => json!({"id": id, "result": result}),
                    Err(text) => json!({"error": {"code": -32600, "message": text}, "id": id}),
                };
                self.write(&answer);
            }
            Some(_) => {}
            None => {
                if let Some(question) = id.as_u64() {
                    let decision = message["result"]["decision"].clone();
                    self.state().answers.insert(question, decision);
                    self.changed.notify_all();
                }
            }
        }
    }

    fn call(self: &Arc<Self>, method: &str, params: &Value) -> Answer {
        if method == "initialize" {
            let mut state = self.state();
            if std::mem::replace(&mut state.initialized, true) {
                return Err("Already initialized".into());
            }
            let client = params["clientInfo"]["name"].as_str().unwrap_or("client");
            return Ok(json!({
                "userAgent": format!("{client}/{} ({}; a fake for tests)", env!("CARGO_PKG_VERSION"), crate::NAME),
                "codexHome": self.home, "platformFamily": "unix", "platformOs": "linux",
            }));
        }
        if !self.state().initialized {
            return Err("Not initialized".into());
        }
        match method {
            "account/read" => Ok(json!({"account": null, "requiresOpenaiAuth": false})),
            "config/read" => Ok(json!({"config": {}})),
            "thread/start" => {
                let id = Uuid::now_v7().to_string();
                self.open(&id, true)?;
                Ok(thread(&id))
            }
            "thread/resume" => {
                let id = params["threadId"].as_str().ok_or("Invalid request: missing field `threadId`")?;
                self.open(id, false)?;
                Ok(thread(id))
            }
            "turn/start" => self.start_turn(params),
            "turn/steer" => {
                let mut state = self.state();
                let running = state.running.as_mut().ok_or("no active turn to steer")?;
                if params["expectedTurnId"] != running.turn_id.as_str() {
                    return Err(format!("the active turn is {}", running.turn_id));
                }
                running.added.push_back((params["clientUserMessageId"].clone(), prompt_of(params)));
                let turn_id = running.turn_id.clone();
                self.changed.notify_all();
                Ok(json!({"turnId": turn_id}))
            }
            "turn/interrupt" => {
                let mut state = self.state();
                let running = state.running.as_mut().ok_or("no active turn to interrupt")?;
                running.interrupted = true;
                self.changed.notify_all();
                Ok(json!({}))
            }
            "thread/backgroundTerminals/clean" => {
                self.kill_commands();
                Ok(json!({}))
            }
            other => Err(format!("Invalid request: unknown variant `{other}`")),
        }
    }

    fn start_turn(self: &Arc<Self>, params: &Value) -> Answer {
        let thread_id = params["threadId"].as_str().unwrap_or_default().to_owned();
        let name = params["clientUserMessageId"].clone();
        let mut state = self.state();
        if !state.threads.contains_key(&thread_id) {
            return Err(format!("thread not found: {thread_id}"));
        }
        let turn_id = if let Some(running) = &mut state.running {
            running.added.push_back((name, prompt_of(params)));
            self.changed.notify_all();
            running.turn_id.clone()
        } else {
            let turn_id = Uuid::now_v7().to_string();
            let added = VecDeque::from([(name, prompt_of(params))]);
            state.running = Some(Running { thread_id, turn_id: turn_id.clone(), interrupted: false, added });
            let server = Arc::clone(self);
            std::thread::spawn(move || turn::run(&server));
            turn_id
        };
        Ok(json!({"turn": {"id": turn_id, "status": "inProgress", "items": [], "error": null}}))
    }

    fn open(&self, id: &str, new: bool) -> Result<(), String> {
        if id.parse::<Uuid>().is_err() {
            return Err(format!("invalid session id: {id}"));
        }
        let dir = self.home.join("fake-threads");
        std::fs::create_dir_all(&dir).map_err(|error| error.to_string())?;
        let path = dir.join(format!("{id}.jsonl"));
        if !new && !path.exists() {
            return Err(format!("no rollout found for thread id {id}"));
        }
        let file = OpenOptions::new().append(true).create(true).open(&path).map_err(|error| error.to_string())?;
        let mut state = self.state();
        if state.threads.contains_key(id) {
            return Ok(());
        }
        flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| format!("thread {id} already has an active writer"))?;
        let history = std::fs::read_to_string(&path).map_err(|error| error.to_string())?;
        let items = history.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let tokens = items.rev().find_map(|item| item["tokens"].as_u64()).unwrap_or(0);
        state.threads.insert(id.to_owned(), Thread { file, tokens });
        Ok(())
    }

    /// Adds to a thread's history. The real one may lose its last words in a crash, too.
    pub(crate) fn record(&self, thread_id: &str, item: &Value) {
        if let Some(thread) = self.state().threads.get_mut(thread_id) {
            drop(writeln!(thread.file, "{item}"));
        }
    }

    /// Counts what an answer has cost and says so.
    pub(crate) fn charge(&self, thread_id: &str, turn_id: &str, (input, output): (u64, u64)) {
        let total = {
            let mut state = self.state();
            let Some(thread) = state.threads.get_mut(thread_id) else { return };
            thread.tokens += input + output;
            thread.tokens
        };
        self.record(thread_id, &json!({"tokens": total}));
        let usage = json!({"total": {"totalTokens": total}, "last": {"totalTokens": input + output}, "modelContextWindow": null});
        self.tell("thread/tokenUsage/updated", &json!({"threadId": thread_id, "turnId": turn_id, "tokenUsage": usage}));
    }

    /// Writes down that a prompt is carried out now; it is on disk when this returns.
    pub(crate) fn ledger(&self, thread_id: &str, turn_id: &str, name: &Value, prompt: &str) -> io::Result<()> {
        let head: String = prompt.chars().take(80).collect();
        let line = json!({"injection_id": name, "ts": now_us(), "length": prompt.len(), "head": head,
            "thread_id": thread_id, "turn_id": turn_id});
        let mut file = OpenOptions::new().append(true).create(true).open(self.home.join("fake-ledger.jsonl"))?;
        file.write_all(format!("{line}\n").as_bytes())?;
        file.sync_data()
    }

    /// Ends every command that was ever started and still runs.
    pub(crate) fn kill_commands(&self) {
        for mut child in std::mem::take(&mut self.state().commands) {
            // Both fail only for a command that has ended by itself.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

fn thread(id: &str) -> Value {
    json!({"thread": {"id": id, "turns": []}, "model": "fake", "modelProvider": "fake"})
}

fn prompt_of(params: &Value) -> String {
    params["input"].as_array().into_iter().flatten().filter_map(|part| part["text"].as_str()).collect()
}

fn now_us() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
