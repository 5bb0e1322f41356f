//! Gemini with Google Search: a model that searches by itself and answers with its sources. It is charged by the query, and how
//! many it asks is its own choice.

use async_trait::async_trait;
use reqwest::{Client, Url};
use serde::Deserialize;
use serde_json::json;

use super::{Citation, Found, GroundedAnswer, Query, SearchBackend, SearchError, SearchResult, http};
use crate::call::CallRequest;
use crate::core::Price;
use crate::provider::Secret;

const ENGINE: &str = "gemini";
/// So many queries of one answer are reckoned with. It cannot be told to ask fewer; more have not been heard of.
pub(super) const MOST_QUERIES: u32 = 10;
/// Most tokens of its answer, thinking included.
pub(super) const MOST_TOKENS: u32 = 2048;
/// Longest query, in bytes; no byte is more than a token.
const LONGEST_QUERY: usize = 4096;

/// Gemini, grounded by Google Search.
#[derive(Debug)]
pub struct Gemini {
    base: Url,
    model: String,
    key: Secret,
    client: Client,
    price: Option<u128>,
    tokens: Option<Price>,
}

impl Gemini {
    pub(super) const BASE: &str = "https://generativelanguage.googleapis.com/";

    pub(super) fn new(
        base: Url,
        model: &str,
        key: Secret,
        price: Option<u128>,
        tokens: Option<Price>,
    ) -> Result<Self, reqwest::Error> {
        Ok(Self { base, model: model.to_owned(), key, client: http::client()?, price, tokens })
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Answer {
    candidates: Vec<Candidate>,
    prompt_feedback: Option<Feedback>,
    usage_metadata: Option<Usage>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Feedback {
    block_reason: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Candidate {
    content: Content,
    finish_reason: Option<String>,
    grounding_metadata: Grounding,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Content {
    parts: Vec<Part>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Part {
    text: Option<String>,
    thought: bool,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Grounding {
    #[serde(rename = "webSearchQueries")]
    queries: Vec<String>,
    #[serde(rename = "groundingChunks")]
    chunks: Vec<Chunk>,
    #[serde(rename = "groundingSupports")]
    supports: Vec<Support>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Chunk {
    web: Option<Web>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Web {
    uri: String,
    title: String,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Support {
    segment: Segment,
    grounding_chunk_indices: Vec<usize>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Segment {
    text: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Usage {
    #[serde(rename = "promptTokenCount")]
    prompt: u64,
    #[serde(rename = "candidatesTokenCount")]
    candidates: u64,
    #[serde(rename = "thoughtsTokenCount")]
    thoughts: u64,
}

#[async_trait]
impl SearchBackend for Gemini {
    fn name(&self) -> &'static str {
        ENGINE
    }

    fn worst_case_pico_usd(&self) -> Option<u128> {
        let longest = CallRequest::prompt("x".repeat(LONGEST_QUERY), MOST_TOKENS).input_upper_bound();
        let tokens = self.tokens?.worst(longest, u64::from(MOST_TOKENS)).pico();
        self.price.map(|price| price.saturating_mul(u128::from(MOST_QUERIES)).saturating_add(tokens))
    }

    async fn search(&self, query: &Query) -> Result<SearchResult, SearchError> {
        let mut url = self.base.clone();
        url.set_path(&format!("{}v1beta/models/{}:generateContent", self.base.path(), self.model));
        let body = json!({
            "contents": [{"role": "user", "parts": [{"text": query.text}]}],
            "tools": [{"google_search": {}}],
            "generationConfig": {"maxOutputTokens": MOST_TOKENS},
        });
        if query.text.len() > LONGEST_QUERY {
            let said = format!("a query has at most {LONGEST_QUERY} bytes");
            return Err(SearchError::Refused { engine: ENGINE, status: 400, said });
        }
        let token = self.key.header("").ok_or(SearchError::Key { engine: ENGINE, status: 0 })?;
        let request = self.client.post(url).header("x-goog-api-key", token).json(&body);
        let answer: Answer = http::ask(ENGINE, request, Some(&self.key), query.limit).await?;
        let usage = answer.usage_metadata;
        let Some(candidate) = answer.candidates.into_iter().next() else {
            let why = answer.prompt_feedback.and_then(|feedback| feedback.block_reason);
            let said = why.map_or_else(|| "no answer".to_owned(), |why| format!("the prompt was blocked ({why})"));
            return Err(SearchError::Refused { engine: ENGINE, status: 200, said });
        };
        let text: String =
            candidate.content.parts.into_iter().filter(|part| !part.thought).filter_map(|part| part.text).collect();
        if text.trim().is_empty() {
            let said = format!("no text ({})", candidate.finish_reason.as_deref().unwrap_or("no reason"));
            return Err(SearchError::Refused { engine: ENGINE, status: 200, said });
        }
        let Grounding { queries, chunks, supports: told } = candidate.grounding_metadata;
        let supports = |nth: usize| {
            let named = told.iter().filter(move |support| support.grounding_chunk_indices.contains(&nth));
            named.map(|support| support.segment.text.clone()).collect()
        };
        let citations = chunks.into_iter().enumerate().filter_map(|(nth, chunk)| {
            let web = chunk.web.filter(|web| !web.uri.is_empty())?;
            Some(Citation { url: web.uri, title: web.title, supports: supports(nth) })
        });
        let citations = citations.collect();
        let charged = queries.len() as u32;
        let spent = match (self.tokens, &usage) {
            (Some(price), Some(usage)) => {
                let (input_tokens, output_tokens) = (usage.prompt, usage.candidates + usage.thoughts);
                Some(price.of(&crate::call::Usage { input_tokens, output_tokens, ..Default::default() }).pico())
            }
            // Who does not say how much it was is paid for the most that it can have been.
            (Some(price), None) => Some(price.worst(LONGEST_QUERY as u64, u64::from(MOST_TOKENS)).pico()),
            (None, _) => None,
        };
        let tokens = usage.map(|usage| (usage.prompt, usage.candidates + usage.thoughts));
        Ok(SearchResult {
            found: Found::Answer(GroundedAnswer { text, citations, queries, tokens }),
            charged,
            cost_pico_usd: self
                .price
                .and_then(|price| Some(price.saturating_mul(u128::from(charged)).saturating_add(spent?))),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::fetch::loopback::{Loopback, Said};
    use crate::search::{SearchSettings, backend};

    const RECORDED: &str = r#"{"candidates": [{"content": {"role": "model", "parts": [{"text": "thinking", "thought": true},
        {"text": "Merinos give "}, {"text": "fine wool."}]}, "finishReason": "STOP", "index": 0,
        "groundingMetadata": {"webSearchQueries": ["merino wool", "sheep breeds"], "searchEntryPoint": {"renderedContent": "<div>"},
            "groundingChunks": [{"web": {"uri": "https://vertexaisearch.cloud.google.com/grounding-api-redirect/AbC", "title": "wool.example"}},
                {"retrievedContext": {"uri": "x"}}, {"web": {"uri": "https://sheep.example/", "title": "sheep"}}],
            "groundingSupports": [{"segment": {"startIndex": 0, "endIndex": 24, "text": "Merinos give fine wool."},
                "groundingChunkIndices": [0], "confidenceScores": [0.9]}]}}],
        "usageMetadata": {"promptTokenCount": 7, "candidatesTokenCount": 5, "thoughtsTokenCount": 3, "totalTokenCount": 15}, "modelVersion": "m"}"#;

    async fn search(said: Said) -> (Loopback, Result<SearchResult, SearchError>) {
        let server = Loopback::serve(move |_| said.clone());
        let settings = SearchSettings {
            backend: Some(ENGINE.into()),
            base_url: Some(server.url("")),
            key: Secret::new("AIza-secret"),
            model: Some("gemini-x".into()),
            price_pico_usd: Some(35_000_000_000),
            tokens: Some(Price { input: 1000, output: 10, ..Price::default() }),
        };
        let query = Query { text: "sheep".into(), count: 3, limit: Duration::from_secs(20) };
        let found = backend(&settings).unwrap().search(&query).await;
        (server, found)
    }

    #[tokio::test]
    async fn an_answer_keeps_its_sources_and_is_charged_by_the_query() {
        let (server, found) = search(Said::json(200, RECORDED)).await;
        let found = found.unwrap();
        assert_eq!((found.charged, found.cost_pico_usd), (2, Some(70_000_000_000 + 7 * 1000 + 8 * 10)));
        let Found::Answer(answer) = found.found else { panic!("no answer") };
        assert_eq!((answer.text.as_str(), answer.tokens), ("Merinos give fine wool.", Some((7, 8))));
        assert_eq!(answer.queries, ["merino wool", "sheep breeds"]);
        assert_eq!(answer.citations.len(), 2);
        assert_eq!(answer.citations[0].supports, ["Merinos give fine wool."]);
        assert_eq!(
            (answer.citations[1].url.as_str(), answer.citations[1].supports.len()),
            ("https://sheep.example/", 0)
        );
        let asked = &server.asked()[0];
        assert_eq!(asked.path, "/v1beta/models/gemini-x:generateContent");
        assert_eq!(asked.header("x-goog-api-key"), Some("AIza-secret"));
        let body: serde_json::Value = serde_json::from_str(&asked.body).unwrap();
        assert_eq!(body["tools"][0]["google_search"], json!({}));
    }

    #[tokio::test]
    async fn an_answer_from_memory_names_no_source_and_a_blocked_one_is_none() {
        let bare = r#"{"candidates": [{"content": {"parts": [{"text": "From memory."}]}, "finishReason": "STOP"}]}"#;
        let found = search(Said::json(200, bare)).await.1.unwrap();
        assert_eq!((found.charged, found.cost_pico_usd), (0, Some(4096 * 1000 + 2048 * 10)), "it did not say");
        assert!(matches!(found.found, Found::Answer(answer) if answer.citations.is_empty() && answer.tokens.is_none()));
        for (said, expected) in [
            (r#"{"promptFeedback": {"blockReason": "SAFETY"}}"#, "blocked (SAFETY)"),
            (r#"{"candidates": [{"finishReason": "RECITATION"}]}"#, "no text (RECITATION)"),
        ] {
            let error = search(Said::json(200, said)).await.1.unwrap_err();
            assert!(error.to_string().contains(expected) && !error.is_passing(), "{error}");
        }
    }
}
