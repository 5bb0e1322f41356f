//! A mock of the OpenAI Responses API: what stands in for the model when the real Codex CLI is tested.
//!
//! It answers as the [directives](crate::directive) in the prompt say and checks each request on the way: the whole
//! history must be there, and an output for each tool call. Whatever is wrong is kept in `GET /violations`, which a test
//! wants empty at its end. `GET /ledger` counts how often each prompt was executed. After a test has killed the agent it
//! says `POST /forgive`: the exchange under way may then be missing from the next request, but nothing before it.

mod history;
mod reply;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use futures::stream;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::directive::{Step, script};
use history::{Conversation, Item};
use reply::Piece;

/// How many request bodies are kept for tests to look at.
const KEPT_REQUESTS: usize = 32;

/// A running mock. It ends when this is dropped.
#[derive(Debug)]
pub struct MockResponses {
    addr: SocketAddr,
    shared: Shared,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

type Shared = Arc<Mutex<Memory>>;

/// Everything the mock remembers.
#[derive(Debug, Default)]
struct Memory {
    api_key: Option<String>,
    conversations: HashMap<String, Conversation>,
    /// (conversation, turn, prompt) of everything executed.
    executed: HashSet<(String, String, String)>,
    /// How often a step that fails only some times has failed.
    failures: HashMap<(String, usize), u32>,
    violations: Vec<String>,
    requests: Vec<Value>,
    served: u64,
}

impl MockResponses {
    /// Starts on a free port.
    pub fn start() -> anyhow::Result<Self> {
        Self::start_on(SocketAddr::from(([127, 0, 0, 1], 0)), None)
    }

    /// Starts on this address; requests must carry the key when one is given.
    pub fn start_on(listen: SocketAddr, api_key: Option<String>) -> anyhow::Result<Self> {
        let shared = Shared::default();
        lock(&shared).api_key = api_key;
        let app = Router::new()
            .route("/v1/responses", post(respond))
            .route(
                "/violations",
                get(async |State(shared): State<Shared>| Json(json!({"violations": lock(&shared).violations}))),
            )
            .route("/ledger", get(async |State(shared): State<Shared>| Json(lock(&shared).ledger())))
            .route("/forgive", post(async |State(shared): State<Shared>| lock(&shared).forgive()))
            .with_state(Arc::clone(&shared));

        let listener = std::net::TcpListener::bind(listen).with_context(|| format!("failed to listen on {listen}"))?;
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        let stop = CancellationToken::new();
        let stopped = stop.clone().cancelled_owned();
        // A thread with a runtime of its own, so that a test that blocks its own runtime does not stop the mock.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name("mock-responses".into()).spawn(move || {
            runtime.block_on(async move {
                if let Ok(listener) = tokio::net::TcpListener::from_std(listener) {
                    let serving = std::future::IntoFuture::into_future(axum::serve(listener, app));
                    tokio::select! { _ = serving => {} () = stopped => {} }
                }
            });
            // Open streams are cut, not waited for.
            runtime.shutdown_background();
        })?;
        Ok(Self { addr, shared, stop, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The `base_url` of a provider entry.
    pub fn base_url(&self) -> String {
        format!("http://{}/v1", self.addr)
    }

    /// What the requests had wrong so far.
    pub fn violations(&self) -> Vec<String> {
        lock(&self.shared).violations.clone()
    }

    /// How often each prompt was executed.
    pub fn ledger(&self) -> BTreeMap<String, usize> {
        lock(&self.shared).counts()
    }

    /// The last requests, oldest first.
    pub fn requests(&self) -> Vec<Value> {
        lock(&self.shared).requests.clone()
    }

    /// The agent was killed: see the module's text.
    pub fn forgive(&self) {
        lock(&self.shared).forgive();
    }

    /// Serves until the process ends.
    pub fn join(mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic of the server thread has been printed already.
            drop(thread.join());
        }
    }
}

impl Drop for MockResponses {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// A `config.toml` that makes codex ask this mock. With a model that codex knows, such as `gpt-5.5`, it offers its patch tool.
pub fn codex_config(base_url: &str, model: &str) -> String {
    format!(
        r#"model = "{model}"
model_provider = "mock"
check_for_update_on_startup = false

[model_providers.mock]
name = "Mock"
base_url = "{base_url}"
wire_api = "responses"
request_max_retries = 1
stream_max_retries = 1
stream_idle_timeout_ms = 60000
supports_websockets = false

[analytics]
enabled = false
"#
    )
}

/// The memory stays usable when a panic poisoned it: it is only counters and lists.
fn lock(shared: &Shared) -> MutexGuard<'_, Memory> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Memory {
    fn forgive(&mut self) {
        self.conversations.values_mut().for_each(Conversation::forgive);
    }

    fn counts(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for (_, _, prompt) in &self.executed {
            *counts.entry(prompt.clone()).or_default() += 1;
        }
        counts
    }

    fn ledger(&self) -> Value {
        json!({"prompts": self.counts(), "requests": self.served})
    }

    /// Takes a request in and says what to answer it with.
    fn take(&mut self, headers: &HeaderMap, body: Value) -> Plan {
        self.served += 1;
        let id = format!("{}", self.served);
        let conversation = body["prompt_cache_key"].as_str().unwrap_or("none").to_owned();
        let turn = turn_of(headers, &body);
        let input: Vec<Value> = body["input"].as_array().cloned().unwrap_or_default();
        let items = history::items(&input);
        if body["stream"] != json!(true) {
            self.violations.push(format!("request {id} does not ask for a stream"));
        }

        let (old, wrong) = self.conversations.entry(conversation.clone()).or_default().request(&items);
        self.violations.extend(wrong.into_iter().map(|what| format!("request {id}, turn {turn}: {what}")));
        for item in &items[old..] {
            if let Item::User(prompt) = item {
                self.executed.insert((conversation.clone(), turn.clone(), prompt.clone()));
            }
        }

        let prompt_at = items.iter().rposition(|item| matches!(item, Item::User(_)));
        let prompt = match prompt_at.map(|at| &items[at]) {
            Some(Item::User(prompt)) => prompt.clone(),
            _ => String::new(),
        };
        let outputs = items[prompt_at.unwrap_or(0)..].iter().filter(|item| matches!(item, Item::Output(_))).count();
        let pieces = self.answer(&id, &format!("{conversation}/{turn}/{prompt}"), &prompt, outputs, &input, &body);

        self.requests.push(body);
        if self.requests.len() > KEPT_REQUESTS {
            self.requests.remove(0);
        }
        Plan { conversation, pieces }
    }

    fn answer(
        &mut self,
        id: &str,
        key: &str,
        prompt: &str,
        outputs: usize,
        input: &[Value],
        body: &Value,
    ) -> Result<Vec<Piece>, StatusCode> {
        let steps = script(prompt);
        // Each output ends one step; a step that has failed often enough makes way for the next.
        let mut at = outputs;
        for (index, step) in steps.iter().enumerate() {
            let (Step::Http { times, .. } | Step::Break { times }) = step else { continue };
            let failed = self.failures.entry((key.to_owned(), index)).or_default();
            if index == at && *failed >= *times {
                at += 1;
            } else if index == at {
                *failed += 1;
            }
        }
        let Some(step) = steps.get(at) else {
            return Ok(reply::say(id, &crate::directive::Say::new("done")));
        };
        Ok(match step {
            Step::Say(say) => {
                let mut say = say.clone();
                if say.text.contains("{output}") {
                    let output =
                        input.iter().rev().find(|item| item["type"].as_str().is_some_and(|t| t.ends_with("_output")));
                    let text = output.map(|item| history::text_of(&item["output"])).unwrap_or_default();
                    say.text = say.text.replace("{output}", text.trim());
                }
                reply::say(id, &say)
            }
            Step::Run { command, escalate, workdir } => {
                self.offered(id, body, "exec_command");
                reply::run(id, command, *escalate, workdir.as_deref())
            }
            Step::Patch { file, text } => {
                self.offered(id, body, "apply_patch");
                reply::patch(id, file, text)
            }
            Step::Http { status, .. } => {
                return Err(StatusCode::from_u16(*status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR));
            }
            Step::Break { .. } => reply::cut(id, Piece::Break),
            Step::Hang | Step::Crash => reply::cut(id, Piece::Hang),
            Step::Fail { code, message } => reply::failed(id, code, message),
            Step::Incomplete { reason } => reply::incomplete(id, reason),
        })
    }

    /// Calling a tool that was not offered would test nothing.
    fn offered(&mut self, id: &str, body: &Value, tool: &str) {
        let tools = body["tools"].as_array().map(Vec::as_slice).unwrap_or_default();
        if !tools.iter().any(|offer| offer["name"] == tool) {
            self.violations.push(format!("request {id} does not offer the tool {tool}, which its prompt needs"));
        }
    }
}

/// What to answer a request with: pieces of a stream, or a bare status.
struct Plan {
    conversation: String,
    pieces: Result<Vec<Piece>, StatusCode>,
}

/// The turn that a request belongs to, from whichever place names it.
fn turn_of(headers: &HeaderMap, body: &Value) -> String {
    let header = headers.get("x-codex-turn-metadata").and_then(|value| value.to_str().ok());
    let member = body["client_metadata"]["x-codex-turn-metadata"].as_str();
    let metadata = header.or(member).and_then(|text| serde_json::from_str::<Value>(text).ok()).unwrap_or_default();
    metadata["turn_id"].as_str().unwrap_or("unknown").to_owned()
}

async fn respond(State(shared): State<Shared>, headers: HeaderMap, body: Bytes) -> Response {
    let wanted = lock(&shared).api_key.as_ref().map(|key| format!("Bearer {key}"));
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    if wanted.is_some() && wanted.as_deref() != given {
        return error(StatusCode::UNAUTHORIZED);
    }
    let Ok(body) = serde_json::from_slice::<Value>(&body) else {
        lock(&shared).violations.push("a request that is not JSON".to_owned());
        return error(StatusCode::BAD_REQUEST);
    };
    let plan = lock(&shared).take(&headers, body);
    let pieces = match plan.pieces {
        Ok(pieces) => pieces,
        Err(status) => return error(status),
    };
    let body =
        stream::unfold((pieces.into_iter(), shared, plan.conversation), |(mut pieces, shared, conversation)| async {
            let item = loop {
                match pieces.next()? {
                    Piece::Bytes(pause, text) => {
                        if !pause.is_zero() {
                            tokio::time::sleep(pause).await;
                        }
                        break Ok(Bytes::from(text));
                    }
                    Piece::Complete(items) => {
                        if let Some(talk) = lock(&shared).conversations.get_mut(&conversation) {
                            talk.answered(items);
                        }
                    }
                    Piece::Break => {
                        // What was written before must reach the other side first.
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        break Err(std::io::Error::other("cut on purpose"));
                    }
                    Piece::Hang => std::future::pending().await,
                }
            };
            Some((item, (pieces, shared, conversation)))
        });
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(body)).into_response()
}

fn error(status: StatusCode) -> Response {
    let body = json!({"error": {"message": format!("the mock was told to answer {status}"), "type": "mock", "code": status.as_u16()}});
    (status, Json(body)).into_response()
}
