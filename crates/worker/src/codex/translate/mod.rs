//! Translates what codex tells into the event names of the JSON-line control plane. Pure: messages in, events out.
//!
//! Two dialects are understood: `item/*` and `thread/*` of newer app-servers, and `codex/event/*` of older ones. Some
//! versions speak both at once, so each kind of thing is taken from the dialect that said it first in a turn.

mod old;

use std::collections::{HashMap, HashSet};

use serde_json::{Value, json};

use crate::agent::TurnStatus;

pub(super) use old::changes_of_map;

/// The longest output of one command, or diff of one file, that goes into an event. What is over is cut out of the middle.
const MAX_OUTPUT_BYTES: usize = 256 * 1024;

/// What one message of codex means.
#[derive(Debug, Clone, PartialEq)]
pub enum Said {
    /// Something that clients are told, under this name.
    Event {
        /// The event's name.
        kind: &'static str,
        /// The turn it belongs to, when codex names it.
        turn_id: Option<String>,
        /// The event's own fields.
        data: Value,
    },
    /// A turn has begun.
    TurnStarted {
        /// Codex's name for it.
        turn_id: String,
    },
    /// A turn is over.
    TurnEnded {
        /// Codex's name for it.
        turn_id: String,
        /// How it ended.
        status: TurnStatus,
        /// What went wrong.
        error: Option<TurnError>,
        /// The last answer, when codex repeats it here.
        text: Option<String>,
    },
    /// A prompt has become part of the conversation; this is the name that we gave it.
    PromptTaken {
        /// Our name for it.
        client_id: String,
    },
    /// Codex no longer waits for the answer to this question.
    QuestionClosed {
        /// The question's id.
        request_id: Value,
    },
    /// Something for the log only.
    Notice {
        /// The text.
        message: String,
    },
}

/// Why a turn failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TurnError {
    /// For people.
    pub message: String,
    /// Codex's own word for it, such as `rateLimitExceeded`.
    pub info: Option<String>,
}

/// Keeps what must be remembered between messages: which turn, and what was already said in it.
#[derive(Debug, Default)]
pub struct Translator {
    thread_id: Option<String>,
    model: Option<String>,
    total: Option<Usage>,
    turn: TurnView,
}

/// What was said in the running turn.
#[derive(Debug, Default)]
struct TurnView {
    turn_id: Option<String>,
    /// Which message each kind of delta is taken from.
    delta_source: HashMap<&'static str, String>,
    /// The last text of each kind and which dialect it came from.
    last: HashMap<&'static str, (Dialect, String)>,
    /// (event, call or item id) of what was told already.
    told: HashSet<(&'static str, String)>,
    open_commands: HashSet<String>,
    /// What the calls touch, for approvals that name only the call.
    changes: HashMap<String, Value>,
    text: Option<String>,
    usage_base: Option<Usage>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    Items,
    Events,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Usage {
    total: i64,
    input: i64,
    cached: i64,
    output: i64,
    reasoning: i64,
}

impl Translator {
    /// The thread whose messages count, and the model behind it. Usage starts anew unless the thread is a resumed one.
    pub fn open_thread(&mut self, thread_id: &str, model: Option<&str>, resumed: bool) {
        self.thread_id = Some(thread_id.to_owned());
        self.model = model.map(str::to_owned);
        if !resumed {
            self.total = Some(Usage::default());
        }
        self.turn = TurnView::default();
    }

    /// A turn is about to begin.
    pub fn begin_turn(&mut self) {
        self.turn = TurnView { usage_base: self.total, ..TurnView::default() };
    }

    /// The last whole answer of the running turn.
    pub fn text(&self) -> Option<&str> {
        self.turn.text.as_deref()
    }

    /// Whether a command of the running turn has begun and not ended.
    pub fn has_open_commands(&self) -> bool {
        !self.turn.open_commands.is_empty()
    }

    /// The changes of a file change that was announced in the running turn.
    pub fn changes_of(&self, call_id: &str) -> Option<&Value> {
        self.turn.changes.get(call_id)
    }

    /// Takes one notification.
    pub fn translate(&mut self, method: &str, params: &Value) -> Vec<Said> {
        let thread = params["threadId"].as_str().or_else(|| params["conversationId"].as_str());
        if let (Some(thread), Some(ours)) = (thread, self.thread_id.as_deref())
            && thread != ours
        {
            // Threads of sub-agents: their results come back through ours.
            return Vec::new();
        }
        if let Some(event) = method.strip_prefix("codex/event/") {
            return self.old_event(event, params);
        }
        let turn_id = text(&params["turnId"]);
        match method {
            "turn/started" => match text(&params["turn"]["id"]) {
                Some(turn_id) => {
                    self.turn.turn_id = Some(turn_id.clone());
                    vec![Said::TurnStarted { turn_id }]
                }
                None => Vec::new(),
            },
            "turn/completed" => turn_ended(&params["turn"]).into_iter().collect(),
            "item/agentMessage/delta" => self.delta("assistant_delta", method, turn_id, &params["delta"]),
            "item/reasoning/summaryTextDelta" | "item/reasoning/textDelta" => {
                self.delta("reasoning_delta", method, turn_id, &params["delta"])
            }
            "item/commandExecution/outputDelta" => {
                let data = json!({"turn_id": turn_id, "call_id": params["itemId"], "content": params["delta"]});
                vec![event("command_output_delta", turn_id, data)]
            }
            "item/started" => self.item(false, turn_id, &params["item"]),
            "item/completed" => self.item(true, turn_id, &params["item"]),
            "thread/tokenUsage/updated" => {
                let usage = &params["tokenUsage"];
                let read = |part: &Value| Usage {
                    total: count(&part["totalTokens"]),
                    input: count(&part["inputTokens"]),
                    cached: count(&part["cachedInputTokens"]),
                    output: count(&part["outputTokens"]),
                    reasoning: count(&part["reasoningOutputTokens"]),
                };
                self.usage(turn_id, read(&usage["total"]), read(&usage["last"]), &usage["modelContextWindow"])
            }
            "thread/status/changed" => vec![event("thread_status", turn_id, json!({"status": params["status"]}))],
            "error" => {
                let error = &params["error"];
                let retry = params["willRetry"].as_bool().unwrap_or(false);
                self.error(Dialect::Items, turn_id, error, &error["codexErrorInfo"], &error["additionalDetails"], retry)
            }
            "turn/plan/updated" => {
                let data = json!({"turn_id": turn_id, "explanation": params["explanation"], "plan": params["plan"]});
                vec![event("plan_updated", turn_id, data)]
            }
            "serverRequest/resolved" => vec![Said::QuestionClosed { request_id: params["requestId"].clone() }],
            "warning" | "guardianWarning" => notice(&params["message"]),
            "configWarning" | "deprecationNotice" => notice(&params["summary"]),
            _ => Vec::new(),
        }
    }

    fn item(&mut self, done: bool, turn_id: Option<String>, item: &Value) -> Vec<Said> {
        let id = text(&item["id"]).unwrap_or_default();
        match item["type"].as_str().unwrap_or_default() {
            "userMessage" => match text(&item["clientId"]) {
                Some(client_id) if !done => vec![Said::PromptTaken { client_id }],
                _ => Vec::new(),
            },
            "agentMessage" if done => {
                let text = text(&item["text"]).unwrap_or_else(|| joined(&item["content"]));
                self.assistant(Dialect::Items, turn_id, text, item["phase"] == "final_answer")
            }
            "reasoning" if done => {
                let summary = joined(&item["summary"]);
                let text = if summary.is_empty() { joined(&item["content"]) } else { summary };
                self.reasoning(Dialect::Items, turn_id, &text)
            }
            "agentMessage" | "reasoning" | "" => Vec::new(),
            "commandExecution" => {
                let command = json!({"command": item["command"], "cwd": item["cwd"]});
                if !done {
                    return self.command_started(turn_id, id, &command);
                }
                let output = json!({
                    "status": item["status"],
                    "stdout": shortened(&item["aggregatedOutput"]),
                    "stderr": "",
                    "exit_code": item["exitCode"],
                    "duration": duration_of_ms(&item["durationMs"]),
                });
                self.command_completed(turn_id, &id, &command, output)
            }
            "fileChange" => {
                let changes = short_changes(&item["changes"]);
                self.turn.changes.insert(id.clone(), changes.clone());
                self.file_change(done, turn_id, &id, json!({"status": item["status"], "changes": changes}))
            }
            // Whatever else codex does is passed through as it is.
            _ => {
                let kind = if done { "item_completed" } else { "item_started" };
                vec![event(kind, turn_id.clone(), json!({"turn_id": turn_id, "item": item}))]
            }
        }
    }

    fn delta(&mut self, kind: &'static str, method: &str, turn_id: Option<String>, delta: &Value) -> Vec<Said> {
        let Some(delta) = delta.as_str() else { return Vec::new() };
        let source = self.turn.delta_source.entry(kind).or_insert_with(|| method.to_owned());
        if source != method {
            return Vec::new();
        }
        vec![event(kind, turn_id, json!({"content": delta}))]
    }

    /// Whether the other dialect has just said the same.
    fn is_echo(&mut self, kind: &'static str, dialect: Dialect, text: &str) -> bool {
        if let Some((other, last)) = self.turn.last.get(kind)
            && *other != dialect
            && last == text
        {
            return true;
        }
        self.turn.last.insert(kind, (dialect, text.to_owned()));
        false
    }

    /// Whether this was told before; it is remembered.
    fn told(&mut self, kind: &'static str, id: &str) -> bool {
        !id.is_empty() && !self.turn.told.insert((kind, id.to_owned()))
    }

    fn assistant(&mut self, dialect: Dialect, turn_id: Option<String>, text: String, is_final: bool) -> Vec<Said> {
        if self.is_echo("assistant", dialect, &text) {
            return Vec::new();
        }
        let data = json!({"content": text, "final_answer": is_final});
        self.turn.text = Some(text);
        vec![event("assistant", turn_id, data)]
    }

    fn reasoning(&mut self, dialect: Dialect, turn_id: Option<String>, text: &str) -> Vec<Said> {
        if text.is_empty() || self.is_echo("reasoning", dialect, text) {
            return Vec::new();
        }
        vec![event("reasoning", turn_id, json!({"content": text}))]
    }

    fn command_started(&mut self, turn_id: Option<String>, call_id: String, command: &Value) -> Vec<Said> {
        if self.told("command_started", &call_id) {
            return Vec::new();
        }
        let data =
            json!({"turn_id": turn_id, "call_id": call_id, "command": command["command"], "cwd": command["cwd"]});
        self.turn.open_commands.insert(call_id);
        vec![event("command_started", turn_id, data)]
    }

    fn command_completed(
        &mut self,
        turn_id: Option<String>,
        call_id: &str,
        command: &Value,
        output: Value,
    ) -> Vec<Said> {
        self.turn.open_commands.remove(call_id);
        if self.told("command_completed", call_id) {
            return Vec::new();
        }
        let mut data =
            json!({"turn_id": turn_id, "call_id": call_id, "command": command["command"], "cwd": command["cwd"]});
        merge(&mut data, output);
        vec![event("command_completed", turn_id, data)]
    }

    fn file_change(&mut self, done: bool, turn_id: Option<String>, call_id: &str, fields: Value) -> Vec<Said> {
        let kind = if done { "filechange_completed" } else { "filechange_started" };
        if self.told(kind, call_id) {
            return Vec::new();
        }
        let mut data = json!({"turn_id": turn_id, "call_id": call_id});
        merge(&mut data, fields);
        vec![event(kind, turn_id, data)]
    }

    /// `total` counts the whole thread, so what this turn cost is the difference to what stood there when it began: a turn
    /// may ask the model many times, and codex's own `last` is only the last time.
    fn usage(&mut self, turn_id: Option<String>, total: Usage, last: Usage, window: &Value) -> Vec<Said> {
        if turn_id.is_some() && turn_id != self.turn.turn_id {
            // After a resume codex repeats where the thread stood, under the name of an earlier turn.
            self.total = Some(total);
            self.turn.usage_base = Some(total);
            return Vec::new();
        }
        if self.total == Some(total) {
            return Vec::new();
        }
        self.total = Some(total);
        let base = *self.turn.usage_base.get_or_insert(total - last);
        let own = total - base;
        vec![event(
            "usage",
            turn_id,
            json!({
                "total_tokens": total.total,
                "input_tokens": total.input,
                "cached_input_tokens": total.cached,
                "output_tokens": total.output,
                "reasoning_output_tokens": total.reasoning,
                "last_total_tokens": own.total,
                "last_input_tokens": own.input,
                "last_cached_input_tokens": own.cached,
                "last_output_tokens": own.output,
                "last_reasoning_output_tokens": own.reasoning,
                "model_context_window": window,
                "usage_source": "codex",
                "model_name": self.model,
            }),
        )]
    }

    fn error(
        &mut self,
        dialect: Dialect,
        turn_id: Option<String>,
        error: &Value,
        info: &Value,
        details: &Value,
        will_retry: bool,
    ) -> Vec<Said> {
        let message = text(&error["message"]).unwrap_or_else(|| "codex reported an error without a text".to_owned());
        if self.is_echo("agent_error", dialect, &message) {
            return Vec::new();
        }
        vec![event(
            "agent_error",
            turn_id,
            json!({
                "message": message,
                "error_code": error_word(info),
                "codex_error_info": info,
                "additional_details": details,
                "will_retry": will_retry,
            }),
        )]
    }
}

impl std::ops::Sub for Usage {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            total: self.total - other.total,
            input: self.input - other.input,
            cached: self.cached - other.cached,
            output: self.output - other.output,
            reasoning: self.reasoning - other.reasoning,
        }
    }
}

fn event(kind: &'static str, turn_id: Option<String>, data: Value) -> Said {
    Said::Event { kind, turn_id, data }
}

fn notice(message: &Value) -> Vec<Said> {
    text(message).map(|message| Said::Notice { message }).into_iter().collect()
}

fn turn_ended(turn: &Value) -> Option<Said> {
    let status = match turn["status"].as_str()? {
        "completed" => TurnStatus::Completed,
        "interrupted" => TurnStatus::Interrupted,
        _ => TurnStatus::Failed,
    };
    let error = turn["error"].is_object().then(|| TurnError {
        message: text(&turn["error"]["message"]).unwrap_or_else(|| "codex gave no reason".to_owned()),
        info: error_word(&turn["error"]["codexErrorInfo"]),
    });
    let answers = turn["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    let answer = answers.iter().rev().find(|item| item["type"] == "agentMessage");
    Some(Said::TurnEnded {
        turn_id: text(&turn["id"])?,
        status,
        error,
        text: answer.and_then(|item| text(&item["text"])),
    })
}

/// Codex names an error with a word, or with an object whose one key is the word.
fn error_word(info: &Value) -> Option<String> {
    match info {
        Value::String(word) => Some(word.clone()),
        Value::Object(fields) => fields.keys().next().cloned(),
        _ => None,
    }
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

fn count(value: &Value) -> i64 {
    value.as_i64().unwrap_or(0)
}

/// The texts of a list of strings or of content parts.
fn joined(parts: &Value) -> String {
    let parts = parts.as_array().map(Vec::as_slice).unwrap_or_default();
    let texts: Vec<&str> = parts.iter().filter_map(|part| part.as_str().or_else(|| part["text"].as_str())).collect();
    texts.join("\n")
}

fn merge(data: &mut Value, more: Value) {
    if let (Value::Object(data), Value::Object(more)) = (data, more) {
        data.extend(more);
    }
}

fn duration_of_ms(ms: &Value) -> Value {
    match ms.as_u64() {
        Some(ms) => json!({"secs": ms / 1000, "nanos": ms % 1000 * 1_000_000}),
        None => Value::Null,
    }
}

/// Cuts the middle out of a long text, between characters.
fn shortened(value: &Value) -> Value {
    let Some(text) = value.as_str() else { return json!("") };
    if text.len() <= MAX_OUTPUT_BYTES {
        return value.clone();
    }
    let head = text.floor_char_boundary(MAX_OUTPUT_BYTES / 2);
    let tail = text.ceil_char_boundary(text.len() - MAX_OUTPUT_BYTES / 2);
    json!(format!("{}\n[... {} bytes left out ...]\n{}", &text[..head], tail - head, &text[tail..]))
}

fn short_changes(changes: &Value) -> Value {
    let mut changes = changes.clone();
    for change in changes.as_array_mut().into_iter().flatten() {
        if change["diff"].is_string() {
            change["diff"] = shortened(&change["diff"]);
        }
    }
    changes
}
