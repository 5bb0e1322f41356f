//! Clients of the JSON-line control plane as they exist, played by us: the command line of both generations, the web
//! backend, the openclaw client. What each waits for, which event ends it and with what exit code, how it decodes, and how
//! it comes to a router.
//!
//! Shares no code with the control plane. Each command is a state machine without sockets ([`Client`]); [`run`] gives it a
//! connection. So one table can show that the emulators do what the originals do, and one that the server satisfies them.

mod commands;
mod spawn;
mod transport;
mod web;

pub use commands::{Attach, Inject, Launch, OneShot, SeedInject, SeedOneShot, StopAll, Terminate};
pub use spawn::{AutoSpawn, Found};
pub use transport::{Connection, Ended, probe, run, run_until};
pub use web::{OpenClaw, WebBackend};

use serde_json::{Value, json};

/// What a client does after an event.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Waits on.
    Wait,
    /// Sends commands and waits on.
    Send(Vec<Value>),
    /// Ends the process.
    Exit(i32),
}

/// What a client has printed.
#[derive(Debug, Clone, Default)]
pub struct Screen {
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Screen {
    /// Prints text as it is.
    pub fn write(&mut self, text: &str) {
        self.out.push_str(text);
    }

    /// Prints a line.
    pub fn say(&mut self, text: &str) {
        self.out.push_str(text);
        self.out.push('\n');
    }

    /// Prints a line on standard error.
    pub fn complain(&mut self, text: &str) {
        self.err.push_str(text);
        self.err.push('\n');
    }
}

/// A client without its socket.
pub trait Client {
    /// What it sends when it is connected.
    fn begin(&mut self) -> Vec<Value>;
    /// What it does on an event.
    fn event(&mut self, event: &Value, screen: &mut Screen) -> Step;
}

/// A command as every client frames it.
pub fn command(name: &str, payload: &Value) -> Value {
    json!({
        "protocol": "codeswarm.router.v1", "type": "command", "command": name,
        "request_id": uuid::Uuid::new_v4().to_string(), "payload": payload,
    })
}

/// The id of a command.
pub fn id_of(command: &Value) -> String {
    command["request_id"].as_str().unwrap_or_default().to_owned()
}

/// The event's name, its data, and whether it bears the id.
fn parts<'a>(event: &'a Value, request_id: &str) -> (&'a str, &'a Value, bool) {
    let data = &event["data"];
    (event["event"].as_str().unwrap_or_default(), data, data["request_id"] == request_id && !request_id.is_empty())
}

/// A value as JavaScript prints it in a template string.
fn js_text(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::String(text) => text.clone(),
        Value::Object(_) => "[object Object]".to_owned(),
        Value::Array(items) => items.iter().map(js_text).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// A reason, or what stands for a missing one.
fn reason(data: &Value) -> String {
    data["reason"].as_str().unwrap_or("Command rejected").to_owned()
}
