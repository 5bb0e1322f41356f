//! A fake of Telegram's Bot API, as much of it as a bot needs that answers text. It is no Telegram and talks to none: what it is given to
//! deliver it keeps, and whoever plays the people of its chats writes into it.
//!
//! It keeps updates until they are confirmed, as the real one does, gives each message a number, and finds fault with what the real one
//! refuses: an empty text, one that is too long, an edit that changes nothing, two pollers at once.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Json, Response};
use axum::routing::post;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// Longest text of a message.
const LONGEST: usize = 4096;

/// The fake. It ends when this is dropped.
#[derive(Debug)]
pub struct FakeTelegram {
    addr: SocketAddr,
    token: String,
    shared: Shared,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

type Shared = Arc<Inner>;

#[derive(Debug, Default)]
struct Inner {
    memory: Mutex<Memory>,
    written: Notify,
}

/// A message that the bot wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BotMessage {
    /// In which chat.
    pub chat: i64,
    /// As it is now.
    pub text: String,
    /// How often it was changed.
    pub edits: u32,
}

#[derive(Debug, Default)]
struct Memory {
    token: String,
    /// Updates that are not confirmed.
    updates: BTreeMap<i64, Value>,
    last_update: i64,
    last_message: i64,
    messages: BTreeMap<i64, BotMessage>,
    polls: u32,
    failures: Vec<(u16, u64)>,
    refused: Vec<String>,
}

impl FakeTelegram {
    /// Starts on a free port, for a bot with this token.
    pub fn start(token: &str) -> anyhow::Result<Self> {
        Self::start_on(SocketAddr::from(([127, 0, 0, 1], 0)), token)
    }

    /// Starts on this address.
    pub fn start_on(listen: SocketAddr, token: &str) -> anyhow::Result<Self> {
        let shared = Shared::default();
        token.clone_into(&mut lock(&shared).token);
        // Telegram begins wherever it likes.
        lock(&shared).last_update = 731_000;
        let app = Router::new().route("/{bot}/{method}", post(call)).with_state(Arc::clone(&shared));
        let listener = std::net::TcpListener::bind(listen).with_context(|| format!("failed to listen on {listen}"))?;
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        let stop = CancellationToken::new();
        let stopped = stop.clone().cancelled_owned();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name("fake-telegram".into()).spawn(move || {
            runtime.block_on(async move {
                if let Ok(listener) = tokio::net::TcpListener::from_std(listener) {
                    let serving = std::future::IntoFuture::into_future(axum::serve(listener, app));
                    tokio::select! { _ = serving => {} () = stopped => {} }
                }
            });
            runtime.shutdown_background();
        })?;
        Ok(Self { addr, token: token.to_owned(), shared, stop, thread: Some(thread) })
    }

    /// What goes into `telegram.base_url`.
    pub fn base_url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// The bot's token.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// Somebody writes something.
    pub fn write(&self, chat: i64, text: &str) -> i64 {
        let mut memory = lock(&self.shared);
        memory.last_update += 1;
        memory.last_message += 1;
        let (update, message) = (memory.last_update, memory.last_message);
        let from = json!({"id": chat.unsigned_abs(), "is_bot": false, "first_name": "Somebody"});
        let message = json!({"message_id": message, "from": from, "chat": {"id": chat, "type": "private"}, "date": 0, "text": text});
        memory.updates.insert(update, json!({"update_id": update, "message": message}));
        drop(memory);
        self.shared.written.notify_waiters();
        update
    }

    /// What the bot has written in a chat, in its order.
    pub fn messages(&self, chat: i64) -> Vec<BotMessage> {
        lock(&self.shared).messages.values().filter(|message| message.chat == chat).cloned().collect()
    }

    /// The next calls that would change something fail with this status, so many times.
    pub fn fail_next(&self, status: u16, times: usize) {
        lock(&self.shared).failures.extend(std::iter::repeat_n((status, 1), times));
    }

    /// What the real one would have refused, in words.
    pub fn refused(&self) -> Vec<String> {
        lock(&self.shared).refused.clone()
    }

    /// Updates that nobody has confirmed.
    pub fn unconfirmed(&self) -> usize {
        lock(&self.shared).updates.len()
    }

    /// Serves until the process ends.
    pub fn join(mut self) {
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

impl Drop for FakeTelegram {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn lock(shared: &Inner) -> MutexGuard<'_, Memory> {
    shared.memory.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ok(result: &Value) -> Response {
    Json(json!({"ok": true, "result": result})).into_response()
}

fn no(status: u16, description: &str, parameters: Option<Value>) -> Response {
    let mut body = json!({"ok": false, "error_code": status, "description": description});
    if let Some(parameters) = parameters {
        body["parameters"] = parameters;
    }
    (StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST), Json(body)).into_response()
}

async fn call(
    State(shared): State<Shared>,
    Path((bot, method)): Path<(String, String)>,
    Json(body): Json<Value>,
) -> Response {
    if bot.strip_prefix("bot") != Some(lock(&shared).token.as_str()) {
        return no(401, "Unauthorized", None);
    }
    match method.as_str() {
        "getUpdates" => updates(&shared, &body).await,
        "sendMessage" | "editMessageText" => {
            let failure = lock(&shared).failures.pop();
            match failure {
                Some((429, wait)) => no(429, "Too Many Requests: retry later", Some(json!({"retry_after": wait}))),
                Some((status, _)) => no(status, "the fake was told to fail", None),
                None => text(&shared, &method, &body),
            }
        }
        _ => no(404, "Not Found", None),
    }
}

async fn updates(shared: &Shared, body: &Value) -> Response {
    let offset = body["offset"].as_i64().unwrap_or(0);
    let limit = body["limit"].as_u64().unwrap_or(100).clamp(1, 100) as usize;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(body["timeout"].as_u64().unwrap_or(0));
    lock(shared).polls += 1;
    // Whoever asks counts as one poller until it is answered, or goes away.
    let _poll = Poll(shared);
    if lock(shared).polls > 1 {
        return no(409, "Conflict: terminated by other getUpdates request", None);
    }
    loop {
        let written = shared.written.notified();
        {
            let mut memory = lock(shared);
            memory.updates = memory.updates.split_off(&offset);
            if !memory.updates.is_empty() {
                return ok(&memory.updates.values().take(limit).cloned().collect());
            }
        }
        if tokio::time::timeout_at(deadline, written).await.is_err() {
            return ok(&json!([]));
        }
    }
}

struct Poll<'a>(&'a Shared);

impl Drop for Poll<'_> {
    fn drop(&mut self) {
        lock(self.0).polls -= 1;
    }
}

fn text(shared: &Shared, method: &str, body: &Value) -> Response {
    let mut memory = lock(shared);
    let (chat, text) = (body["chat_id"].as_i64().unwrap_or(0), body["text"].as_str().unwrap_or_default().to_owned());
    let refuse = |memory: &mut Memory, description: &str| {
        memory.refused.push(format!("{method}: {description}"));
        no(400, description, None)
    };
    if text.trim().is_empty() {
        return refuse(&mut memory, "Bad Request: message text is empty");
    }
    if text.encode_utf16().count() > LONGEST {
        return refuse(&mut memory, "Bad Request: message is too long");
    }
    let id = if method == "sendMessage" {
        memory.last_message += 1;
        let id = memory.last_message;
        memory.messages.insert(id, BotMessage { chat, text: text.clone(), edits: 0 });
        id
    } else {
        let id = body["message_id"].as_i64().unwrap_or(0);
        let Some(message) = memory.messages.get_mut(&id).filter(|message| message.chat == chat) else {
            return refuse(&mut memory, "Bad Request: message to edit not found");
        };
        if message.text == text {
            return no(
                400,
                "Bad Request: message is not modified: specified new message content and reply markup are exactly the same",
                None,
            );
        }
        message.text.clone_from(&text);
        message.edits += 1;
        id
    };
    ok(&json!({"message_id": id, "chat": {"id": chat, "type": "private"}, "date": 0, "text": text}))
}
