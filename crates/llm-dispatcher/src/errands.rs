//! Work that is no model call, as jobs: searching the web and reading a page.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use async_trait::async_trait;
use drover_config::NodeScalingConfig;

use crate::call::{CallAnswer, CallError, Citation, FailureKind, Finish, Sink, Usage};
use crate::core::{Kind, Money, Price};
use crate::extract;
use crate::fetch::{FetchError, FetchSettings, Fetcher};
use crate::nodes::Nodes;
use crate::research::detail;
use crate::search::{self, Found, Query, SearchBackend, SearchError, SearchSettings};
use crate::shell::{Errand, Job};

/// Hits of a search task.
pub(crate) const HITS: usize = 10;

/// Makes jobs of what needs no model.
#[derive(Debug, Clone)]
pub(crate) struct Errands {
    fetcher: Arc<Fetcher>,
    /// The engine, or why there is none.
    engine: Result<Arc<dyn SearchBackend>, String>,
    limit: Duration,
    /// Who reads pages when they are there.
    nodes: Option<Nodes>,
}

impl Errands {
    /// As configured; `price` is that of the model which searches, when one does. An engine that cannot be set up is no reason not to start: model calls work without.
    pub(crate) fn new(
        scaling: &NodeScalingConfig,
        key_dir: Option<&Path>,
        price: impl Fn(&str, &str) -> Option<Price>,
    ) -> anyhow::Result<Self> {
        let fetcher =
            Fetcher::new(FetchSettings::from(&scaling.fetch)).context("failed to set up the reading of pages")?;
        let variables = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let engine = SearchSettings::with_keys_in(key_dir, scaling, variables)
            .and_then(|settings| search::backend(&settings.priced(price)));
        let engine = engine.map_err(|error| error.to_string());
        Ok(Self { fetcher: Arc::new(fetcher), engine, limit: scaling.limits.timeout.get(), nodes: None })
    }

    /// Has pages read on nodes, as long as any are there.
    #[must_use]
    pub(crate) fn on(self, nodes: Option<Nodes>) -> Self {
        Self { nodes, ..self }
    }

    /// Reads a page.
    pub(crate) fn fetch(&self, url: &str) -> Result<Job, String> {
        if url.is_empty() {
            return Err("a fetch task needs a url".to_owned());
        }
        Ok(self.page(Kind::Fetch, url))
    }

    /// Reads of a page what a model is to be asked about.
    pub(crate) fn extract(&self, url: &str) -> Job {
        self.page(Kind::Extract, url)
    }

    fn page(&self, kind: Kind, url: &str) -> Job {
        let errand = Fetch { fetcher: Arc::clone(&self.fetcher), kind, url: url.to_owned(), nodes: self.nodes.clone() };
        let job = Job::errand(Arc::new(errand), kind);
        // Work on nodes moves by itself when it does not get on; a second one at the same time would only be a second reader.
        Job { hedge: self.nodes.is_none(), ..job }
    }

    /// The word for who searches.
    pub(crate) fn engine_name(&self) -> &'static str {
        self.engine.as_ref().map_or("off", |engine| engine.name())
    }

    /// Most that one search costs; `None` when nobody knows.
    pub(crate) fn worst_case_pico_usd(&self) -> Option<u128> {
        self.engine.as_ref().map_or(Some(0), |engine| engine.worst_case_pico_usd())
    }

    /// Searches the web for so many hits.
    pub(crate) fn search(&self, query: &str, hits: usize) -> Result<Job, String> {
        if query.trim().is_empty() {
            return Err("a search task needs a prompt: what to search for".to_owned());
        }
        let engine = Arc::clone(self.engine.as_ref().map_err(Clone::clone)?);
        let query = Query { text: query.to_owned(), count: hits, limit: self.limit };
        let free = engine.worst_case_pico_usd() == Some(0);
        let job = Job::errand(Arc::new(Search { engine, query }), Kind::Search);
        // What is paid for is not asked twice at once.
        Ok(Job { hedge: free, ..job })
    }
}

#[derive(Debug)]
struct Fetch {
    fetcher: Arc<Fetcher>,
    kind: Kind,
    url: String,
    nodes: Option<Nodes>,
}

/// Reads a page for a task of this kind.
pub(crate) async fn read(fetcher: &Fetcher, kind: Kind, url: &str) -> Result<CallAnswer, CallError> {
    match fetcher.fetch(url).await {
        Ok(page) => {
            let detail = detail::of_page(&page);
            let answer = CallAnswer { structured: Some(detail), ..CallAnswer::of(page.text, Finish::Stop) };
            if kind == Kind::Extract { extract::cut(answer) } else { Ok(answer) }
        }
        Err(error) => {
            let kind = match &error {
                FetchError::Transport { .. } => FailureKind::Broken,
                FetchError::Timeout { .. } => FailureKind::Timeout,
                FetchError::Status { status } if *status >= 500 => FailureKind::Server,
                // What the guard refuses, and what is not there, stays so.
                _ => FailureKind::BadRequest,
            };
            Err(CallError { maybe_billed: false, ..CallError::new(kind, error.to_string()) })
        }
    }
}

#[async_trait]
impl Errand for Fetch {
    async fn run(&self, _: &mut dyn Sink) -> Result<CallAnswer, CallError> {
        if let Some(nodes) = &self.nodes
            && let Some(read) = nodes.read(self.kind, &self.url).await
        {
            return read;
        }
        read(&self.fetcher, self.kind, &self.url).await
    }
}

#[derive(Debug)]
struct Search {
    engine: Arc<dyn SearchBackend>,
    query: Query,
}

#[async_trait]
impl Errand for Search {
    fn worst_case(&self) -> Option<Money> {
        self.engine.worst_case_pico_usd().map(Money::from_pico)
    }

    async fn run(&self, _: &mut dyn Sink) -> Result<CallAnswer, CallError> {
        let result = self.engine.search(&self.query).await.map_err(|error| {
            let kind = match &error {
                SearchError::Limited { .. } => FailureKind::RateLimited,
                SearchError::Timeout { .. } => FailureKind::Timeout,
                error if error.is_passing() => FailureKind::Broken,
                _ => FailureKind::BadRequest,
            };
            // An answer that did not come, or cannot be read, may be on the bill.
            let maybe_billed = matches!(error, SearchError::Timeout { .. } | SearchError::Unreadable { .. });
            let message = format!("{error}; {}", error.hint());
            let mut failed = CallError { maybe_billed, ..CallError::new(kind, message) };
            if let SearchError::Limited { retry_after, .. } = error {
                failed.hints.retry_after = retry_after;
            }
            failed
        })?;
        // The lane of fees counts pico-dollars where others count tokens.
        let fee = u64::try_from(result.cost_pico_usd.unwrap_or(0)).unwrap_or(u64::MAX);
        let usage = Some(Usage { input_tokens: fee, ..Usage::default() });
        let detail = detail::of_search(&result);
        let answer = match result.found {
            Found::Hits(_) => CallAnswer::of(detail.to_string(), Finish::Stop),
            Found::Answer(answer) => {
                let cited = answer.citations.into_iter().map(|cited| Citation { url: cited.url, title: cited.title });
                CallAnswer { citations: cited.collect(), ..CallAnswer::of(answer.text, Finish::Stop) }
            }
        };
        Ok(CallAnswer { usage, structured: Some(detail), ..answer })
    }
}

#[cfg(test)]
mod tests {
    use drover_config::{FetchConfig, HumanDuration, HumanSize};

    use super::*;

    #[test]
    fn fetching_is_set_up_as_configured() {
        let fetch =
            FetchConfig { allow: vec!["wiki.lan".into()], max_bytes: HumanSize(5), timeout: HumanDuration::secs(7) };
        let settings = FetchSettings::from(&fetch);
        assert_eq!((settings.allow, settings.max_bytes, settings.total), (fetch.allow, 5, Duration::from_secs(7)));
    }

    #[test]
    fn tasks_that_cannot_be_errands_are_refused_with_a_reason() {
        let errands = Errands::new(&NodeScalingConfig::default(), None, |_, _| None).unwrap();
        assert!(errands.fetch("").unwrap_err().contains("url"));
        assert!(errands.search(" ", HITS).unwrap_err().contains("prompt"));
        let job = errands.fetch("http://127.0.0.1/").unwrap();
        assert_eq!(job.kind, Kind::Fetch);
    }
}
