//! What is known of a page or a search beside its text, as JSON: how the dispatcher hands it to those who research elsewhere.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::fetch::{Page, sha256};
use crate::search::{Citation, Found, GroundedAnswer, Hit, SearchResult};

/// Of a page, all but its text.
#[derive(Serialize, Deserialize)]
struct PageDetail {
    asked: String,
    url: String,
    #[serde(default)]
    redirects: Vec<String>,
    status: u16,
    content_type: String,
    charset: String,
    title: Option<String>,
    article: bool,
    bytes: usize,
    truncated: bool,
    elapsed_ms: u64,
}

/// Describes a page.
pub(crate) fn of_page(page: &Page) -> Value {
    let detail = PageDetail {
        asked: page.asked.clone(),
        url: page.url.clone(),
        redirects: page.redirects.clone(),
        status: page.status,
        content_type: page.content_type.clone(),
        charset: page.charset.clone(),
        title: page.title.clone(),
        article: page.article,
        bytes: page.bytes,
        truncated: page.truncated,
        elapsed_ms: page.elapsed.as_millis() as u64,
    };
    serde_json::to_value(detail).unwrap_or_default()
}

/// The page of a text and its description. Its hash is made of the text that is here, not of what was said.
pub(crate) fn page(text: String, detail: &Value) -> Option<Page> {
    let detail = PageDetail::deserialize(detail).ok()?;
    Some(Page {
        asked: detail.asked,
        url: detail.url,
        redirects: detail.redirects,
        status: detail.status,
        content_type: detail.content_type,
        charset: detail.charset,
        title: detail.title,
        article: detail.article,
        sha256: sha256(&text),
        text,
        bytes: detail.bytes,
        truncated: detail.truncated,
        elapsed: Duration::from_millis(detail.elapsed_ms),
    })
}

#[derive(Serialize, Deserialize)]
struct HitDetail {
    title: String,
    url: String,
    snippet: String,
    #[serde(default)]
    engine: String,
    rank: usize,
}

#[derive(Serialize, Deserialize)]
struct CitedDetail {
    url: String,
    title: String,
    #[serde(default)]
    supports: Vec<String>,
}

/// Of a search: hits, or an answer that came with its sources.
#[derive(Serialize, Deserialize)]
struct FoundDetail {
    #[serde(skip_serializing_if = "Option::is_none")]
    hits: Option<Vec<HitDetail>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    answer: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    citations: Vec<CitedDetail>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    queries: Vec<String>,
    charged: u32,
    /// The price of what was charged is known, and part of what the task cost.
    priced: bool,
}

/// Describes what a search came to.
pub(crate) fn of_search(result: &SearchResult) -> Value {
    let (charged, priced) = (result.charged, result.cost_pico_usd.is_some());
    let detail = match &result.found {
        Found::Hits(hits) => {
            let hits = hits.iter().map(|hit| HitDetail {
                title: hit.title.clone(),
                url: hit.url.clone(),
                snippet: hit.snippet.clone(),
                engine: hit.engine.clone(),
                rank: hit.rank,
            });
            let hits = Some(hits.collect());
            FoundDetail { hits, answer: None, citations: Vec::new(), queries: Vec::new(), charged, priced }
        }
        Found::Answer(answer) => {
            let cited = answer.citations.iter().map(|cited| CitedDetail {
                url: cited.url.clone(),
                title: cited.title.clone(),
                supports: cited.supports.clone(),
            });
            FoundDetail {
                hits: None,
                answer: Some(answer.text.clone()),
                citations: cited.collect(),
                queries: answer.queries.clone(),
                charged,
                priced,
            }
        }
    };
    serde_json::to_value(detail).unwrap_or_default()
}

/// What a search came to that was described so, and cost so much.
pub(crate) fn search(detail: &Value, cost_pico_usd: u128) -> Option<SearchResult> {
    let detail = FoundDetail::deserialize(detail).ok()?;
    let found = match (detail.hits, detail.answer) {
        (Some(hits), None) => Found::Hits(
            hits.into_iter()
                .map(|hit| Hit {
                    title: hit.title,
                    url: hit.url,
                    snippet: hit.snippet,
                    engine: hit.engine,
                    rank: hit.rank,
                })
                .collect(),
        ),
        (None, Some(text)) => Found::Answer(GroundedAnswer {
            text,
            citations: detail
                .citations
                .into_iter()
                .map(|cited| Citation { url: cited.url, title: cited.title, supports: cited.supports })
                .collect(),
            queries: detail.queries,
            tokens: None,
        }),
        _ => return None,
    };
    Some(SearchResult { found, charged: detail.charged, cost_pico_usd: detail.priced.then_some(cost_pico_usd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_described_comes_back_as_it_was() {
        let text = "All about sheep.".to_owned();
        let before = Page {
            asked: "http://x.example/".into(),
            url: "http://x.example/sheep".into(),
            redirects: vec!["http://x.example/sheep".into()],
            status: 200,
            content_type: "text/html".into(),
            charset: "UTF-8".into(),
            title: Some("Sheep".into()),
            sha256: sha256(&text),
            text: text.clone(),
            article: true,
            bytes: 99,
            truncated: true,
            elapsed: Duration::from_millis(7),
        };
        assert_eq!(page(text, &of_page(&before)), Some(before));
        assert_eq!(page(String::new(), &Value::Null), None);

        let hit = Hit { title: "t".into(), url: "u".into(), snippet: "s".into(), engine: "e".into(), rank: 1 };
        let hits = SearchResult { found: Found::Hits(vec![hit]), charged: 1, cost_pico_usd: Some(5) };
        assert_eq!(search(&of_search(&hits), 5), Some(hits));
        let cited = Citation { url: "u".into(), title: "t".into(), supports: vec!["x".into()] };
        let answer =
            GroundedAnswer { text: "a".into(), citations: vec![cited], queries: vec!["q".into()], tokens: None };
        let answer = SearchResult { found: Found::Answer(answer), charged: 1, cost_pico_usd: None };
        assert_eq!(search(&of_search(&answer), 5), Some(answer));
        assert_eq!(search(&Value::Null, 0), None);
    }
}
