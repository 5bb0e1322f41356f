//! Tavily: an engine made for models; it wants a key.

use async_trait::async_trait;
use reqwest::{Client, Url};
use serde::Deserialize;
use serde_json::json;

use super::{Found, Hit, Query, SearchBackend, SearchError, SearchResult, http, ranked};
use crate::provider::Secret;

const ENGINE: &str = "tavily";
/// The most hits that it returns at once.
const MOST: usize = 20;

/// Tavily's search.
#[derive(Debug)]
pub struct Tavily {
    base: Url,
    key: Secret,
    client: Client,
    price: Option<u128>,
}

impl Tavily {
    pub(super) const BASE: &str = "https://api.tavily.com/";

    pub(super) fn new(base: Url, key: Secret, price: Option<u128>) -> Result<Self, reqwest::Error> {
        Ok(Self { base, key, client: http::client()?, price })
    }
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    results: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    title: Option<String>,
    url: Option<String>,
    content: Option<String>,
}

#[async_trait]
impl SearchBackend for Tavily {
    fn name(&self) -> &'static str {
        ENGINE
    }

    fn worst_case_pico_usd(&self) -> Option<u128> {
        self.price
    }

    async fn search(&self, query: &Query) -> Result<SearchResult, SearchError> {
        let mut url = self.base.clone();
        url.set_path(&format!("{}search", self.base.path()));
        // The basic depth costs one credit; others cost more.
        let body = json!({
            "query": query.text, "max_results": query.count.clamp(1, MOST), "search_depth": "basic", "include_answer": false,
            "include_raw_content": false, "include_images": false,
        });
        let token = self.key.header("Bearer ").ok_or(SearchError::Key { engine: ENGINE, status: 0 })?;
        let request = self.client.post(url).header("authorization", token).json(&body);
        let answer: Answer =
            http::ask(ENGINE, request, Some(&self.key), query.limit).await.map_err(|error| match error {
                // Its own numbers for a plan or a limit that is used up.
                SearchError::Refused { engine, status: 432 | 433, .. } => {
                    SearchError::Limited { engine, retry_after: None }
                }
                other => other,
            })?;
        let hits = answer.results.into_iter().map(|entry| Hit {
            title: entry.title.unwrap_or_default(),
            url: entry.url.unwrap_or_default(),
            snippet: entry.content.unwrap_or_default(),
            engine: ENGINE.to_owned(),
            rank: 0,
        });
        Ok(SearchResult { found: Found::Hits(ranked(hits, query.count)), charged: 1, cost_pico_usd: self.price })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::fetch::loopback::{Loopback, Said};
    use crate::search::{SearchSettings, backend};

    const RECORDED: &str = r#"{"query": "sheep", "follow_up_questions": null, "answer": null, "images": [], "results": [
        {"title": "Sheep", "url": "https://en.wikipedia.org/wiki/Sheep", "content": "Sheep are ruminants.", "score": 0.91, "raw_content": null},
        {"title": "Wool", "url": "https://wool.example/", "content": "Wool is shorn.", "score": 0.4}],
        "response_time": 1.09, "request_id": "a"}"#;

    #[tokio::test]
    async fn a_recorded_answer_is_read_and_errors_show_no_key() {
        let server = Loopback::serve(|asked| match asked.header("authorization") {
            Some("Bearer tvly-secret") => Said::json(200, RECORDED),
            Some("Bearer tvly-used-up") => {
                Said::json(432, r#"{"detail": {"error": "This request exceeds your plan's set usage limit."}}"#)
            }
            _ => Said::json(401, r#"{"detail": {"error": "Unauthorized: missing or invalid API key."}}"#),
        });
        let settings = |key: &str| SearchSettings {
            backend: Some(ENGINE.into()),
            base_url: Some(server.url("")),
            key: Secret::new(key),
            ..SearchSettings::default()
        };
        let query = Query { text: "sheep".into(), count: 1, limit: Duration::from_secs(20) };
        let found = backend(&settings("tvly-secret")).unwrap().search(&query).await.unwrap();
        let Found::Hits(hits) = &found.found else { panic!("no hits") };
        assert_eq!(
            (hits.len(), hits[0].url.as_str(), hits[0].snippet.as_str()),
            (1, "https://en.wikipedia.org/wiki/Sheep", "Sheep are ruminants.")
        );
        let error = backend(&settings("tvly-wrong")).unwrap().search(&query).await.unwrap_err();
        assert!(
            matches!(error, SearchError::Key { status: 401, .. }) && !format!("{error} {error:?}").contains("tvly"),
            "{error:?}"
        );
        let error = backend(&settings("tvly-used-up")).unwrap().search(&query).await.unwrap_err();
        assert!(matches!(error, SearchError::Limited { .. }), "{error:?}");
        let asked = &server.asked()[0];
        let body: serde_json::Value = serde_json::from_str(&asked.body).unwrap();
        assert_eq!((asked.method.as_str(), asked.path.as_str()), ("POST", "/search"));
        assert_eq!((&body["query"], &body["max_results"]), (&"sheep".into(), &1.into()));
        assert!(body.get("api_key").is_none());
    }
}
