//! SearxNG: an engine that people run themselves. It asks others and needs no key.

use async_trait::async_trait;
use reqwest::{Client, Url};
use serde::Deserialize;

use super::{Found, Hit, Query, SearchBackend, SearchError, SearchResult, http, ranked};

const ENGINE: &str = "searxng";

/// An instance of SearxNG.
#[derive(Debug)]
pub struct Searxng {
    base: Url,
    client: Client,
    price: u128,
}

impl Searxng {
    pub(super) fn new(base: Url, price: Option<u128>) -> Result<Self, reqwest::Error> {
        Ok(Self { base, client: http::client()?, price: price.unwrap_or(0) })
    }
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    results: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    url: Option<String>,
    title: Option<String>,
    content: Option<String>,
    engine: Option<String>,
}

#[async_trait]
impl SearchBackend for Searxng {
    fn name(&self) -> &'static str {
        ENGINE
    }

    fn worst_case_pico_usd(&self) -> Option<u128> {
        Some(self.price)
    }

    async fn search(&self, query: &Query) -> Result<SearchResult, SearchError> {
        let mut url = self.base.clone();
        url.set_path(&format!("{}search", self.base.path()));
        url.query_pairs_mut().clear().append_pair("q", &query.text).append_pair("format", "json");
        let request = self.client.get(url).header("accept", "application/json");
        let answer: Answer = http::ask(ENGINE, request, None, query.limit).await.map_err(|error| match error {
            // It has no keys; this is how it says that its formats do not contain JSON.
            SearchError::Key { status: 403, .. } => SearchError::NoJson { base_url: self.base.to_string() },
            other => other,
        })?;
        let hits = answer.results.into_iter().map(|entry| Hit {
            title: entry.title.unwrap_or_default(),
            url: entry.url.unwrap_or_default(),
            snippet: entry.content.unwrap_or_default(),
            engine: entry.engine.unwrap_or_else(|| ENGINE.to_owned()),
            rank: 0,
        });
        // It has no parameter for the number of hits.
        Ok(SearchResult { found: Found::Hits(ranked(hits, query.count)), charged: 1, cost_pico_usd: Some(self.price) })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::fetch::loopback::{Loopback, Said};
    use crate::search::{SearchSettings, backend};

    /// The shape of an answer of SearxNG 2026, shortened.
    const RECORDED: &str = r#"{"query": "sheep breeds", "number_of_results": 0, "results": [
        {"template": "default.html", "url": "https://en.wikipedia.org/wiki/List_of_sheep_breeds", "title": "List of sheep breeds - Wikipedia",
         "content": "This is a list of domestic sheep breeds.", "publishedDate": null, "thumbnail": "", "engine": "duckduckgo",
         "parsed_url": ["https", "en.wikipedia.org", "/wiki/List_of_sheep_breeds", "", "", ""], "img_src": "", "priority": "",
         "engines": ["duckduckgo", "brave"], "positions": [1, 2], "score": 4.0, "category": "general"},
        {"url": "https://en.wikipedia.org/wiki/List_of_sheep_breeds", "title": "again", "content": "", "engine": "brave"},
        {"url": "magnet:?xt=urn:btih:0", "title": "no page", "engine": "piratebay"},
        {"url": "https://sheep.example/", "title": "Sheep", "content": null, "engine": "brave"},
        {"url": "https://third.example/", "title": "Third", "content": "x"}],
        "answers": [], "corrections": [], "infoboxes": [], "suggestions": ["rare breeds"], "unresponsive_engines": [["google", "timeout"]]}"#;

    fn query(count: usize) -> Query {
        Query { text: "sheep & goats ümlaut".into(), count, limit: Duration::from_secs(20) }
    }

    fn searxng(server: &Loopback) -> std::sync::Arc<dyn SearchBackend> {
        let settings = SearchSettings {
            backend: Some(ENGINE.into()),
            base_url: Some(server.url("/searx")),
            ..SearchSettings::default()
        };
        backend(&settings).unwrap()
    }

    #[tokio::test]
    async fn a_recorded_answer_is_read_and_the_request_is_the_documented_one() {
        let server = Loopback::serve(|_| Said::json(200, RECORDED));
        let found = searxng(&server).search(&query(2)).await.unwrap();
        let Found::Hits(hits) = found.found else { panic!("no hits") };
        let brief: Vec<_> =
            hits.iter().map(|hit| (hit.rank, hit.url.as_str(), hit.engine.as_str(), hit.snippet.as_str())).collect();
        assert_eq!(
            brief,
            [
                (
                    1,
                    "https://en.wikipedia.org/wiki/List_of_sheep_breeds",
                    "duckduckgo",
                    "This is a list of domestic sheep breeds."
                ),
                (2, "https://sheep.example/", "brave", ""),
            ]
        );
        assert_eq!((found.charged, found.cost_pico_usd), (1, Some(0)));
        assert_eq!(server.paths(), ["/searx/search?q=sheep+%26+goats+%C3%BCmlaut&format=json"]);
    }

    #[tokio::test]
    async fn what_goes_wrong_is_told_apart() {
        for (said, expected, passing) in [
            (Said::new(403, "text/html", "<h1>Forbidden</h1>"), "403 to requests for JSON", false),
            (Said::new(429, "text/plain", "Rate limit").with("retry-after", "7"), "again in 7 s", true),
            (
                Said::new(500, "text/html", "<h1>Internal\n Server Error</h1>"),
                "answered 500: <h1>Internal Server",
                true,
            ),
            (Said::new(200, "text/html", "<html>"), "cannot be read", false),
            (Said::json(200, RECORDED).broken(), "cannot be reached", true),
            (Said::moved(302, "http://127.0.0.1:1/"), "answered 302", false),
        ] {
            let server = Loopback::serve(move |_| said.clone());
            let error = searxng(&server).search(&query(3)).await.unwrap_err();
            assert!(error.to_string().contains(expected), "{expected}: {error}");
            assert_eq!((error.is_passing(), error.hint().is_empty()), (passing, false), "{error:?}");
        }
        let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let settings = SearchSettings {
            backend: Some(ENGINE.into()),
            base_url: Some(format!("http://{nobody}")),
            ..SearchSettings::default()
        };
        let error = backend(&settings).unwrap().search(&query(3)).await.unwrap_err();
        assert!(matches!(error, SearchError::Unreachable { .. }), "{error:?}");
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let settings =
            SearchSettings { base_url: Some(format!("http://{}", silent.local_addr().unwrap())), ..settings };
        let brief = Query { limit: Duration::from_millis(50), ..query(3) };
        assert!(matches!(backend(&settings).unwrap().search(&brief).await, Err(SearchError::Timeout { .. })));
    }
}
