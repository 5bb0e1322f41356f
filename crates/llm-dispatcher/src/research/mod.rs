//! Finding something out about many subjects at once: search, fetch, analyze, or the phases that a plan names.
//!
//! Each subject goes its own way through the phases and waits for no other, unless a phase has a barrier; `width` steps are under
//! way at a time. What may run when is decided by [`crate::core::Graph`].
//! Whatever is found travels with its subject from the query to the answer, so a search that fails leaves a hole where it
//! failed and shifts nothing. An answer that rests on no source is an answer all the same, and is marked.
//!
//! ```text
//! subject 1   search ── fetch ── analyze ─> Finding 1 (sources: url, hash of the text; or: ungrounded, and why)
//! subject 2   search ── fetch ── analyze ─> Finding 2
//! ```
//!
//! The steps are traits ([`SearchBackend`], [`Pages`], [`Model`]); who stands behind them is decided elsewhere.

pub(crate) mod detail;
mod fence;
mod phases;
mod pipeline;
mod pooled;
mod remote;
#[cfg(test)]
mod truth;

use std::time::Duration;

use async_trait::async_trait;

use crate::core::Kind;
use crate::fetch::{FetchError, Fetcher, Page};
use crate::search::SearchBackend;

pub(crate) use fence::{ABOUT_DATA, beginning};
pub use fence::{fence, flags};
pub(crate) use phases::check;
#[cfg(test)]
pub(crate) use phases::{LONGEST_PROMPT, MOST_PHASES};
pub use phases::{Phase, Step, usual};
pub use pipeline::{ResearchSettings, Researcher};
pub(crate) use pooled::Pooled;
pub use remote::{Listener, Remote};

/// What is to be found out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// About whom or what, each on its own.
    pub subjects: Vec<String>,
    /// What about them; empty for an overview.
    pub topic: String,
    /// What becomes of each; none for the usual ones.
    pub phases: Vec<Phase>,
}

/// Reading a page.
#[async_trait]
pub trait Pages: Send + Sync {
    /// The page as text.
    async fn read(&self, url: &str) -> Result<Page, FetchError>;
}

#[async_trait]
impl Pages for Fetcher {
    async fn read(&self, url: &str) -> Result<Page, FetchError> {
        self.fetch(url).await
    }
}

/// What a model is asked on behalf of a subject.
#[derive(Clone, PartialEq, Eq)]
pub struct Ask {
    /// Name of the task, for logs and for the run it becomes part of.
    pub id: String,
    /// What kind of work it is.
    pub kind: Kind,
    /// Instructions beside the prompt.
    pub system: String,
    /// The prompt.
    pub prompt: String,
    /// Most tokens of the answer.
    pub max_tokens: u32,
    /// JSON Schema that the answer has to follow, as text.
    pub schema: Option<String>,
}

impl std::fmt::Debug for Ask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ask")
            .field("id", &self.id)
            .field("kind", &self.kind)
            .field("prompt_bytes", &self.prompt.len())
            .finish_non_exhaustive()
    }
}

/// What came of asking a model, whether it answered or not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Told {
    /// The answer, or why there is none.
    pub outcome: Outcome,
    /// Who answered, or was asked last.
    pub provider: String,
    /// Its model.
    pub model: String,
    /// What all calls for it cost, in pico-USD.
    pub cost_pico_usd: u128,
    /// Calls that were made.
    pub attempts: u32,
    /// The answer is made up.
    pub simulated: bool,
    /// How long it took, waiting for its turn not counted.
    pub busy: Duration,
}

/// How asking a model ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It said this.
    Answered(String),
    /// The provider withholds the answer: asking again does not help.
    Blocked(String),
    /// There is none.
    Failed(String),
}

impl Default for Outcome {
    fn default() -> Self {
        Self::Failed("nobody was asked".to_owned())
    }
}

/// Asking a model. Limits, retries and money are its affair.
#[async_trait]
pub trait Model: Send + Sync {
    /// Asks once; comes back when there is an answer or will be none.
    async fn ask(&self, ask: Ask) -> Told;
}

/// A text that an answer rests on, and where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Where it was found in the end.
    pub url: String,
    /// Its title.
    pub title: String,
    /// SHA-256 of the text as the model saw it, in hexadecimal digits. Empty when the text never passed through here.
    pub sha256: String,
    /// Its characters.
    pub chars: usize,
    /// The model saw its beginning only.
    pub truncated: bool,
    /// Passages that look like orders to the model rather than like text.
    pub flags: Vec<&'static str>,
}

/// What an answer rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grounding {
    /// A page that was read.
    Page,
    /// The few lines that a search engine shows of pages, none of which could be read.
    Snippets,
    /// Sources that the answering model found by itself.
    Cited,
    /// Nothing that could be named.
    None,
}

impl Grounding {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Page => "page",
            Self::Snippets => "snippets",
            Self::Cited => "cited",
            Self::None => "none",
        }
    }
}

/// A step that came to nothing on the way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Miss {
    /// Which step.
    pub step: Kind,
    /// What of: a query or a URL.
    pub what: String,
    /// Why.
    pub why: String,
}

/// What was found out about one subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Place of the subject in the request, from 1.
    pub id: usize,
    /// The subject.
    pub subject: String,
    /// The answer, or why there is none.
    pub outcome: Outcome,
    /// What it rests on.
    pub grounding: Grounding,
    /// The sources themselves.
    pub sources: Vec<Source>,
    /// What came to nothing on the way.
    pub misses: Vec<Miss>,
    /// Who answered.
    pub provider: String,
    /// Its model.
    pub model: String,
    /// Calls to the model.
    pub attempts: u32,
    /// What it cost, in pico-USD, as far as prices are known.
    pub cost_pico_usd: u128,
    /// Searches whose price is not known.
    pub unpriced: u32,
    /// The answer is made up.
    pub simulated: bool,
    /// When its first step began, since the beginning of all.
    pub started: Duration,
    /// When it was done, likewise.
    pub ended: Duration,
    /// What its steps took, one after another, without waiting for their turn.
    pub busy: Duration,
}

impl Finding {
    /// The answer, when there is one.
    pub fn answer(&self) -> Option<&str> {
        match &self.outcome {
            Outcome::Answered(text) => Some(text),
            Outcome::Blocked(_) | Outcome::Failed(_) => None,
        }
    }

    /// The word for how it ended.
    pub fn status(&self) -> &'static str {
        match self.outcome {
            Outcome::Answered(_) => "succeeded",
            Outcome::Blocked(_) => "blocked",
            Outcome::Failed(_) => "failed",
        }
    }

    /// Whether it rests on a source that is named.
    pub fn is_grounded(&self) -> bool {
        self.grounding != Grounding::None
    }
}
