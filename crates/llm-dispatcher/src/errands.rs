//! Work that is no model call, as jobs: searching the web and reading a page.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use async_trait::async_trait;
use drover_config::NodeScalingConfig;
use serde_json::json;

use crate::call::{CallAnswer, CallError, Citation, FailureKind, Finish, Sink};
use crate::core::Kind;
use crate::fetch::{FetchError, FetchSettings, Fetcher};
use crate::search::{self, Found, Query, SearchBackend, SearchError, SearchSettings};
use crate::shell::{Errand, Job};

/// Hits of a search task.
const HITS: usize = 10;

/// Makes jobs of what needs no model.
#[derive(Debug, Clone)]
pub(crate) struct Errands {
    fetcher: Arc<Fetcher>,
    /// The engine, or why there is none.
    engine: Result<Arc<dyn SearchBackend>, String>,
    limit: Duration,
}

impl Errands {
    /// As configured. An engine that cannot be set up is no reason not to start: model calls work without.
    pub(crate) fn new(scaling: &NodeScalingConfig) -> anyhow::Result<Self> {
        let fetcher =
            Fetcher::new(FetchSettings::from(&scaling.fetch)).context("failed to set up the reading of pages")?;
        let variables = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let engine = SearchSettings::of(scaling, variables).and_then(|settings| search::backend(&settings));
        let engine = engine.map_err(|error| error.to_string());
        Ok(Self { fetcher: Arc::new(fetcher), engine, limit: scaling.limits.timeout.get() })
    }

    /// Reads a page.
    pub(crate) fn fetch(&self, url: &str) -> Result<Job, String> {
        if url.is_empty() {
            return Err("a fetch task needs a url".to_owned());
        }
        let errand = Fetch { fetcher: Arc::clone(&self.fetcher), url: url.to_owned() };
        Ok(Job::errand(Arc::new(errand), Kind::Fetch))
    }

    /// Searches the web.
    pub(crate) fn search(&self, query: &str) -> Result<Job, String> {
        if query.trim().is_empty() {
            return Err("a search task needs a prompt: what to search for".to_owned());
        }
        let engine = Arc::clone(self.engine.as_ref().map_err(Clone::clone)?);
        let query = Query { text: query.to_owned(), count: HITS, limit: self.limit };
        Ok(Job::errand(Arc::new(Search { engine, query }), Kind::Search))
    }
}

#[derive(Debug)]
struct Fetch {
    fetcher: Arc<Fetcher>,
    url: String,
}

#[async_trait]
impl Errand for Fetch {
    async fn run(&self, _: &mut dyn Sink) -> Result<CallAnswer, CallError> {
        match self.fetcher.fetch(&self.url).await {
            Ok(page) => Ok(CallAnswer::of(page.text, Finish::Stop)),
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
}

#[derive(Debug)]
struct Search {
    engine: Arc<dyn SearchBackend>,
    query: Query,
}

#[async_trait]
impl Errand for Search {
    async fn run(&self, _: &mut dyn Sink) -> Result<CallAnswer, CallError> {
        let found = self.engine.search(&self.query).await.map_err(|error| {
            let kind = match &error {
                SearchError::Limited { .. } => FailureKind::RateLimited,
                SearchError::Timeout { .. } => FailureKind::Timeout,
                error if error.is_passing() => FailureKind::Broken,
                _ => FailureKind::BadRequest,
            };
            let message = format!("{error}; {}", error.hint());
            let mut failed = CallError { maybe_billed: false, ..CallError::new(kind, message) };
            if let SearchError::Limited { retry_after, .. } = error {
                failed.hints.retry_after = retry_after;
            }
            failed
        })?;
        Ok(match found.found {
            Found::Hits(hits) => {
                let hits: Vec<_> = hits
                    .into_iter()
                    .map(|hit| json!({"title": hit.title, "url": hit.url, "snippet": hit.snippet, "rank": hit.rank}))
                    .collect();
                CallAnswer::of(json!({"hits": hits}).to_string(), Finish::Stop)
            }
            Found::Answer(answer) => {
                let cited = answer.citations.into_iter().map(|cited| Citation { url: cited.url, title: cited.title });
                CallAnswer { citations: cited.collect(), ..CallAnswer::of(answer.text, Finish::Stop) }
            }
        })
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
        let errands = Errands::new(&NodeScalingConfig::default()).unwrap();
        assert!(errands.fetch("").unwrap_err().contains("url"));
        assert!(errands.search(" ").unwrap_err().contains("prompt"));
        let job = errands.fetch("http://127.0.0.1/").unwrap();
        assert_eq!(job.kind, Kind::Fetch);
    }
}
