//! Carries out one turn: every prompt in it, and every step that a prompt asks for.

use std::io::Read as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use drover_testkit::directive::{Say, Step, script};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::server::{Pause, Server};

/// How a turn ends before its script does.
enum Cut {
    Interrupted,
    Failed(String),
    /// Another prompt was added: the rest of this one is dropped, as the model would.
    Steered,
}

/// Runs the turn that was just begun, to its end.
pub(crate) fn run(server: &Server) {
    let Some((thread_id, turn_id)) =
        server.state().running.as_ref().map(|running| (running.thread_id.clone(), running.turn_id.clone()))
    else {
        return;
    };
    let turn = Turn { server, thread_id, id: turn_id };
    turn.tell("thread/status/changed", json!({"status": {"type": "active", "activeFlags": []}}));
    turn.tell("turn/started", json!({"turn": {"id": turn.id, "status": "inProgress"}}));
    let (status, error) = match turn.prompts() {
        Ok(()) | Err(Cut::Steered) => ("completed", Value::Null),
        Err(Cut::Interrupted) => ("interrupted", Value::Null),
        Err(Cut::Failed(message)) => ("failed", json!({"message": message, "codexErrorInfo": "other"})),
    };
    turn.tell("thread/status/changed", json!({"status": {"type": "idle"}}));
    turn.tell("turn/completed", json!({"turn": {"id": turn.id, "status": status, "error": error, "items": []}}));
}

struct Turn<'a> {
    server: &'a Server,
    thread_id: String,
    id: String,
}

impl Turn<'_> {
    fn tell(&self, method: &str, mut params: Value) {
        params["threadId"] = json!(self.thread_id);
        params["turnId"] = json!(self.id);
        self.server.tell(method, &params);
    }

    /// The prompt that the turn began with, and those that are added while it runs. The turn is no longer the running one
    /// when this returns, so that nothing can be added between the last look and the end.
    fn prompts(&self) -> Result<(), Cut> {
        loop {
            let next = {
                let mut state = self.server.state();
                let next = state
                    .running
                    .as_mut()
                    .and_then(|running| if running.interrupted { None } else { running.added.pop_front() });
                if next.is_none() {
                    let interrupted = state.running.take().is_some_and(|running| running.interrupted);
                    return if interrupted { Err(Cut::Interrupted) } else { Ok(()) };
                }
                next
            };
            let Some((name, prompt)) = next else { return Ok(()) };
            if let Err(error) = self.server.ledger(&self.thread_id, &self.id, &name, &prompt) {
                self.server.state().running = None;
                return Err(Cut::Failed(format!("cannot write the ledger: {error}")));
            }
            self.server.record(&self.thread_id, &json!({"prompt": prompt}));
            let item = json!({"type": "userMessage", "id": Uuid::now_v7(), "clientId": name,
                "content": [{"type": "text", "text": prompt}]});
            self.tell("item/started", json!({"item": item}));
            self.tell("item/completed", json!({"item": item}));
            match self.steps(&prompt) {
                Ok(()) | Err(Cut::Steered) => {}
                Err(cut) => {
                    self.server.state().running = None;
                    return Err(cut);
                }
            }
        }
    }

    fn steps(&self, prompt: &str) -> Result<(), Cut> {
        let mut output = String::new();
        for step in script(prompt) {
            match step {
                Step::Say(say) => self.say(&say, &output)?,
                Step::Run { command, escalate, workdir } => {
                    output = self.run(&command, escalate, workdir.as_deref())?;
                    self.server.charge(&self.thread_id, &self.id, (100, 20));
                }
                Step::Patch { file, text } => self.patch(&file, &text)?,
                Step::Http { status, .. } => return Err(Cut::Failed(format!("unexpected status {status}"))),
                Step::Break { .. } => return Err(Cut::Failed("stream disconnected before completion".into())),
                Step::Fail { code, message } => return Err(Cut::Failed(format!("{message} ({code})"))),
                Step::Incomplete { reason } => return Err(Cut::Failed(format!("incomplete response: {reason}"))),
                Step::Hang => loop {
                    self.wait(Duration::from_hours(1))?;
                },
                Step::Crash => std::process::abort(),
            }
        }
        Ok(())
    }

    fn wait(&self, length: Duration) -> Result<(), Cut> {
        match self.server.pause(length) {
            Pause::Over => Ok(()),
            Pause::Interrupted => Err(Cut::Interrupted),
            Pause::Added => Err(Cut::Steered),
        }
    }

    fn say(&self, say: &Say, output: &str) -> Result<(), Cut> {
        let text = say.text.replace("{output}", output.trim());
        let id = Uuid::now_v7();
        if let Some(reasoning) = &say.reasoning {
            let item = json!({"type": "reasoning", "id": Uuid::now_v7(), "summary": [reasoning], "content": []});
            self.tell("item/completed", json!({"item": item}));
        }
        let item = |text: &str| json!({"item": {"type": "agentMessage", "id": id, "text": text, "phase": null}});
        self.tell("item/started", item(""));
        for piece in (Say { text: text.clone(), ..say.clone() }).pieces() {
            self.wait(say.delay)?;
            self.tell("item/agentMessage/delta", json!({"itemId": id, "delta": piece}));
        }
        self.server.record(&self.thread_id, &json!({"answer": text}));
        self.tell("item/completed", item(&text));
        self.server.charge(&self.thread_id, &self.id, say.usage);
        Ok(())
    }

    fn run(&self, command: &str, escalate: bool, workdir: Option<&str>) -> Result<String, Cut> {
        let id = format!("call_{}", Uuid::now_v7());
        let cwd = workdir.map_or_else(|| std::env::current_dir().unwrap_or_default(), Into::into);
        let item = |status: &str, output: Option<&str>, code: Option<i32>| {
            json!({"item": {"type": "commandExecution", "id": id, "command": command, "cwd": cwd, "status": status,
                "aggregatedOutput": output, "exitCode": code, "durationMs": 0}})
        };
        self.tell("item/started", item("inProgress", None, None));
        if escalate {
            let params = json!({"kind": "command", "threadId": self.thread_id, "turnId": self.id, "itemId": id,
                "reason": "the prompt asks for it", "command": command, "cwd": cwd,
                "availableDecisions": ["accept", "cancel"]});
            let decision = self.server.ask("item/commandExecution/requestApproval", &params);
            match decision.as_ref().and_then(Value::as_str) {
                Some("accept" | "acceptForSession") => {}
                Some("decline") => {
                    self.tell("item/completed", item("declined", None, None));
                    return Ok("rejected by user".to_owned());
                }
                _ => {
                    self.tell("item/completed", item("declined", None, None));
                    return Err(Cut::Interrupted);
                }
            }
        }
        let spawned = Command::new("sh")
            .args(["-c", command])
            .current_dir(&cwd)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut child = spawned.map_err(|error| Cut::Failed(format!("cannot run a shell: {error}")))?;
        let stdout = child.stdout.take();
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            // What cannot be read counts as no output.
            stdout.map(|mut stdout| stdout.read_to_string(&mut text));
            text
        });
        let status = loop {
            if let Ok(Some(status)) = child.try_wait() {
                break status;
            }
            if let Err(cut) = self.wait(Duration::from_millis(5)) {
                // It lives on in the background, as with the real one.
                self.server.state().commands.push(child);
                return Err(cut);
            }
        };
        let output = reader.join().unwrap_or_default();
        self.tell("item/completed", item("completed", Some(&output), status.code()));
        Ok(output)
    }

    fn patch(&self, file: &str, text: &str) -> Result<(), Cut> {
        let id = format!("call_{}", Uuid::now_v7());
        let path = std::env::current_dir().unwrap_or_default().join(file);
        let item = |status: &str| {
            json!({"item": {"type": "fileChange", "id": id, "status": status,
                "changes": [{"path": path, "kind": {"type": "add"}, "diff": format!("{text}\n")}]}})
        };
        self.tell("item/started", item("inProgress"));
        std::fs::write(&path, format!("{text}\n")).map_err(|error| Cut::Failed(error.to_string()))?;
        self.tell("item/completed", item("completed"));
        Ok(())
    }
}
