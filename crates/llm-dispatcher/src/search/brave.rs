//! Brave Search: an engine with its own index; it wants a key.

use async_trait::async_trait;
use reqwest::{Client, Url};
use serde::Deserialize;

use super::{Found, Hit, Query, SearchBackend, SearchError, SearchResult, http, ranked};
use crate::provider::Secret;

const ENGINE: &str = "brave";
/// The most hits that it returns at once.
const MOST: usize = 20;

/// Brave's web search.
#[derive(Debug)]
pub struct Brave {
    base: Url,
    key: Secret,
    client: Client,
    price: Option<u128>,
}

impl Brave {
    pub(super) const BASE: &str = "https://api.search.brave.com/";

    pub(super) fn new(base: Url, key: Secret, price: Option<u128>) -> Result<Self, reqwest::Error> {
        Ok(Self { base, key, client: http::client()?, price })
    }
}

#[derive(Deserialize)]
struct Answer {
    web: Option<Web>,
}

#[derive(Deserialize)]
struct Web {
    #[serde(default)]
    results: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    title: Option<String>,
    url: Option<String>,
    description: Option<String>,
}

#[async_trait]
impl SearchBackend for Brave {
    fn name(&self) -> &'static str {
        ENGINE
    }

    fn worst_case_pico_usd(&self) -> Option<u128> {
        self.price
    }

    async fn search(&self, query: &Query) -> Result<SearchResult, SearchError> {
        let mut url = self.base.clone();
        url.set_path(&format!("{}res/v1/web/search", self.base.path()));
        let count = query.count.clamp(1, MOST).to_string();
        url.query_pairs_mut().clear().append_pair("q", &query.text).append_pair("count", &count);
        let token = self.key.header("").ok_or(SearchError::Key { engine: ENGINE, status: 0 })?;
        let request = self.client.get(url).header("accept", "application/json").header("x-subscription-token", token);
        let answer: Answer = http::ask(ENGINE, request, Some(&self.key), query.limit).await?;
        let hits = answer.web.into_iter().flat_map(|web| web.results).map(|entry| Hit {
            title: plain(&entry.title.unwrap_or_default()),
            url: entry.url.unwrap_or_default(),
            snippet: plain(&entry.description.unwrap_or_default()),
            engine: ENGINE.to_owned(),
            rank: 0,
        });
        Ok(SearchResult { found: Found::Hits(ranked(hits, query.count)), charged: 1, cost_pico_usd: self.price })
    }
}

/// It marks the words that were looked for.
fn plain(text: &str) -> String {
    text.replace("<strong>", "").replace("</strong>", "")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::fetch::loopback::{Loopback, Said};
    use crate::search::{SearchSettings, backend};

    const RECORDED: &str = r#"{"type": "search", "query": {"original": "sheep", "more_results_available": true},
        "mixed": {"type": "mixed", "main": [{"type": "web", "index": 0, "all": false}]},
        "web": {"type": "search", "results": [
            {"title": "Sheep - Wikipedia", "url": "https://en.wikipedia.org/wiki/Sheep", "is_source_local": false, "language": "en",
             "description": "<strong>Sheep</strong> are domesticated ruminants.", "profile": {"name": "Wikipedia"}, "age": "2 days ago"},
            {"title": "More", "url": "https://sheep.example/"}], "family_friendly": true}}"#;

    #[tokio::test]
    async fn a_recorded_answer_is_read_and_the_key_goes_into_its_header_only() {
        let server = Loopback::serve(|asked| match asked.header("x-subscription-token") {
            Some("BSA-secret") => Said::json(200, RECORDED),
            _ => Said::json(
                422,
                r#"{"type": "ErrorResponse", "error": {"code": "SUBSCRIPTION_TOKEN_INVALID", "meta": "BSA-wrong"}}"#,
            ),
        });
        let settings = |key: &str| SearchSettings {
            backend: Some(ENGINE.into()),
            base_url: Some(server.url("")),
            key: Secret::new(key),
            price_pico_usd: Some(5_000_000_000),
            ..SearchSettings::default()
        };
        let query = Query { text: "sheep".into(), count: 50, limit: Duration::from_secs(20) };
        let found = backend(&settings("BSA-secret")).unwrap().search(&query).await.unwrap();
        let Found::Hits(hits) = found.found else { panic!("no hits") };
        assert_eq!((hits.len(), hits[0].snippet.as_str(), hits[1].rank), (2, "Sheep are domesticated ruminants.", 2));
        assert_eq!((found.charged, found.cost_pico_usd), (1, Some(5_000_000_000)));
        let error = backend(&settings("BSA-wrong")).unwrap().search(&query).await.unwrap_err();
        assert!(
            error.to_string().contains("SUBSCRIPTION_TOKEN_INVALID") && !error.to_string().contains("BSA"),
            "{error}"
        );
        assert_eq!(server.paths()[0], "/res/v1/web/search?q=sheep&count=20");
    }

    #[tokio::test]
    async fn an_answer_without_hits_is_none() {
        let server = Loopback::serve(|_| Said::json(200, r#"{"type": "search", "query": {"original": "x"}}"#));
        let settings = SearchSettings {
            backend: Some(ENGINE.into()),
            base_url: Some(server.url("/")),
            key: Secret::new("k"),
            ..SearchSettings::default()
        };
        let query = Query { text: "x".into(), count: 3, limit: Duration::from_secs(20) };
        let found = backend(&settings).unwrap().search(&query).await.unwrap();
        assert_eq!((found.found, found.cost_pico_usd), (Found::Hits(Vec::new()), None));
    }
}
