//! A mock of model providers, fast enough to measure the dispatcher with: the formats of `OpenAI` and Groq, Anthropic and
//! Gemini, streamed and not, with a latency, strict limits and faults on request. No model is behind it, and every answer says
//! so in the header `x-mock`.
//!
//! It keeps a ledger of its own: calls, money, stamps, and which prompts were answered more than once. That ledger is the judge
//! of the dispatcher's. `GET /__mock/ledger`, `GET /__mock/calls`, `GET` and `PATCH /__mock/settings`, `POST /__mock/reset`.
//!
//! A prompt may hold directives, each in double brackets: `say:TEXT`, `status:500`, `tool:NAME {JSON}`, `blocked`,
//! `blocked-prompt`, `hang`, `reset`, `garbage`, `torn`, `huge:BYTES`, `no-usage`, `ms:LATENCY`.

mod bucket;
mod io;
mod ledger;
mod reply;
mod request;
mod serve;
mod settings;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::Context as _;
use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use tokio_util::sync::CancellationToken;

pub use ledger::{Call, Ledger};
pub use settings::Settings;

/// Connections that may wait to be taken.
const BACKLOG: i32 = 4096;

/// A running mock. It ends when this is dropped.
#[derive(Debug)]
pub struct MockLlm {
    addr: SocketAddr,
    shared: Arc<Shared>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

/// What all connections share.
#[derive(Debug)]
struct Shared {
    started: Instant,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    settings: Arc<Settings>,
    book: ledger::Book,
    buckets: bucket::Buckets,
    rng: SmallRng,
}

impl State {
    fn new(settings: Settings) -> Self {
        let rng = SmallRng::seed_from_u64(settings.seed);
        Self { settings: Arc::new(settings), book: ledger::Book::default(), buckets: bucket::Buckets::default(), rng }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }
}

impl MockLlm {
    /// Starts on a free port.
    pub fn start(settings: Settings) -> anyhow::Result<Self> {
        Self::start_on(SocketAddr::from(([127, 0, 0, 1], 0)), settings)
    }

    /// Starts on this address.
    pub fn start_on(listen: SocketAddr, settings: Settings) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared { started: Instant::now(), state: Mutex::new(State::new(settings)) });
        let listener = std::net::TcpListener::bind(listen).with_context(|| format!("failed to listen on {listen}"))?;
        // A thousand callers at once are no reason for any of them to knock twice, which would take a second.
        rustix::net::listen(&listener, BACKLOG)?;
        raise_file_limit();
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        // A thread with a runtime of its own: it keeps its time whatever the test does, and takes one core at most.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let serving = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("mock-llm".into()).spawn(move || {
            runtime.block_on(async move {
                if let Ok(listener) = tokio::net::TcpListener::from_std(listener) {
                    tokio::select! { () = serve::accept(listener, serving) => {} () = stopped.cancelled() => {} }
                }
            });
            runtime.shutdown_background();
        })?;
        Ok(Self { addr, shared, stop, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The base address for a kind of provider: `openai`, `groq`, `anthropic` or `gemini`.
    pub fn base_url(&self, kind: &str) -> String {
        match kind {
            "groq" | "anthropic" | "gemini" => format!("http://{}", self.addr),
            _ => format!("http://{}/v1", self.addr),
        }
    }

    /// What happened so far.
    pub fn ledger(&self) -> Ledger {
        self.shared.lock().book.ledger.clone()
    }

    /// Every answered call.
    pub fn calls(&self) -> Vec<Call> {
        self.shared.lock().book.calls.clone()
    }

    /// How often this prompt was answered well.
    pub fn answers_to(&self, prompt: &str) -> u32 {
        self.shared.lock().book.answers_to(request::number(prompt))
    }

    /// Changes how it behaves from now on.
    pub fn change(&self, change: impl FnOnce(&mut Settings)) {
        let mut state = self.shared.lock();
        let mut settings = (*state.settings).clone();
        change(&mut settings);
        state.settings = Arc::new(settings);
    }

    /// Serves until the process ends.
    pub fn join(mut self) {
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// As many connections as the system lets this process have.
fn raise_file_limit() {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    // Where it is refused, the usual number has to do.
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit);
}

impl Drop for MockLlm {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}
