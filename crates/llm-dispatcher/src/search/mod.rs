//! Finding pages about a subject. One trait before several search engines; which one is the operator's choice, and without
//! one search is off and says so.
//!
//! There are two kinds of answers. Most engines return hits: places to read. Some models search by themselves and return an
//! answer with citations ([`GroundedAnswer`]); nothing is left to be fetched then.

mod brave;
mod gemini;
mod http;
mod searxng;
mod settings;
mod tavily;

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;

pub use brave::Brave;
pub use gemini::Gemini;
pub use searxng::Searxng;
pub use settings::{SearchSettings, SetupError, backend, worst_case_pico_usd};
pub use tavily::Tavily;

/// What is looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    /// The words.
    pub text: String,
    /// How many hits are wanted.
    pub count: usize,
    /// How long it may take.
    pub limit: Duration,
}

/// A page that might say something about it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hit {
    /// Its title, as the engine tells it.
    pub title: String,
    /// Where it is. Written by a stranger: only the fetcher's guard decides whether it is read.
    pub url: String,
    /// A few lines of it.
    pub snippet: String,
    /// Who found it.
    pub engine: String,
    /// From 1, the best first.
    pub rank: usize,
}

/// A source that an answer names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Citation {
    /// Where it is.
    pub url: String,
    /// What it is called.
    pub title: String,
    /// The parts of the answer that rest on it, when the engine says so.
    pub supports: Vec<String>,
}

/// An answer of a model that has searched by itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GroundedAnswer {
    /// What it says.
    pub text: String,
    /// On what it rests. Empty: on nothing that could be named.
    pub citations: Vec<Citation>,
    /// What it searched for.
    pub queries: Vec<String>,
    /// Tokens of its prompt and of its answer, when it tells.
    pub tokens: Option<(u64, u64)>,
}

/// What a search came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Places to read.
    Hits(Vec<Hit>),
    /// An answer with its sources.
    Answer(GroundedAnswer),
}

/// What a search came to, and what it cost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SearchResult {
    /// What was found.
    pub found: Found,
    /// Queries that the engine charges for.
    pub charged: u32,
    /// Their price in pico-USD; `None` when no price is known.
    pub cost_pico_usd: Option<u128>,
}

/// A search engine.
#[async_trait]
pub trait SearchBackend: Send + Sync + fmt::Debug {
    /// The word by which the configuration knows it.
    fn name(&self) -> &'static str;

    /// Most that one search can cost, in pico-USD; `None` when no price is known.
    fn worst_case_pico_usd(&self) -> Option<u128>;

    /// Searches once. Trying again is up to the caller.
    async fn search(&self, query: &Query) -> Result<SearchResult, SearchError>;
}

/// A search that came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SearchError {
    /// No engine is configured.
    #[error("search is off: no search engine is configured")]
    Off,
    /// The key is missing or wrong.
    #[error("{engine} does not accept the key (it answered {status})")]
    Key { engine: &'static str, status: u16 },
    /// A SearxNG whose operator has not switched its JSON on.
    #[error("the SearxNG at {base_url} answers 403 to requests for JSON")]
    NoJson { base_url: String },
    /// Too many requests.
    #[error("{engine} takes no more searches for now{}", retry_after.map(|wait| format!("; again in {} s", wait.as_secs_f64().ceil())).unwrap_or_default())]
    Limited { engine: &'static str, retry_after: Option<Duration> },
    /// Another answer than hits.
    #[error("{engine} answered {status}: {said}")]
    Refused { engine: &'static str, status: u16, said: String },
    /// An answer that cannot be read.
    #[error("the answer of {engine} cannot be read: {why}")]
    Unreadable { engine: &'static str, why: String },
    /// It could not be reached.
    #[error("{engine} cannot be reached: {why}")]
    Unreachable { engine: &'static str, why: String },
    /// It took too long.
    #[error("{engine} did not answer within {} s", limit.as_secs_f64())]
    Timeout { engine: &'static str, limit: Duration },
    /// The dispatcher, which was to search, did not; this is what it says. It has tried as often as makes sense.
    #[error("{0}")]
    Elsewhere(String),
}

impl SearchError {
    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Off => {
                "set node_scaling.search.backend to searxng (needs no key; base_url), brave, tavily or gemini (api_key_env); without it \
                 research answers from the model alone and marks that"
            }
            Self::Key { .. } => "look at node_scaling.search.api_key_env and at the variable it names",
            Self::NoJson { .. } => "add json to search.formats in the settings.yml of that SearxNG",
            Self::Limited { .. } => "search less at once, or use an engine with a higher limit",
            Self::Refused { .. } | Self::Unreadable { .. } => {
                "look at node_scaling.search.base_url; it may be another kind of engine"
            }
            Self::Unreachable { .. } | Self::Timeout { .. } => {
                "look whether it runs and whether this machine may reach it"
            }
            Self::Elsewhere(_) => "`drover doctor` looks at the search engine",
        }
    }

    /// Whether the same search may succeed a little later.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Limited { .. } | Self::Unreachable { .. } | Self::Timeout { .. } => true,
            Self::Refused { status, .. } => *status >= 500,
            Self::Off | Self::Key { .. } | Self::NoJson { .. } | Self::Unreadable { .. } | Self::Elsewhere(_) => false,
        }
    }
}

/// No engine at all.
#[derive(Debug, Clone, Copy, Default)]
pub struct Off;

#[async_trait]
impl SearchBackend for Off {
    fn name(&self) -> &'static str {
        "off"
    }

    fn worst_case_pico_usd(&self) -> Option<u128> {
        Some(0)
    }

    async fn search(&self, _query: &Query) -> Result<SearchResult, SearchError> {
        Err(SearchError::Off)
    }
}

/// Hits in the order of the engine, without those that lead nowhere or were there before.
fn ranked(hits: impl Iterator<Item = Hit>, count: usize) -> Vec<Hit> {
    let mut kept: Vec<Hit> = Vec::new();
    for mut hit in hits {
        let web = hit.url.starts_with("http://") || hit.url.starts_with("https://");
        if kept.len() < count && web && !kept.iter().any(|earlier| earlier.url == hit.url) {
            hit.rank = kept.len() + 1;
            kept.push(hit);
        }
    }
    kept
}
