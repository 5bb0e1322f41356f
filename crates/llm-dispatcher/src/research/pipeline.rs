//! The way of each subject, and many of them at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::future::BoxFuture;

use super::fence::{ABOUT_DATA, fence, flags};
use super::{Ask, Finding, Grounding, Miss, Model, Outcome, Pages, Request, SearchBackend, Source};
use crate::core::Kind;
use crate::fetch::sha256;
use crate::search::{Citation, Found, GroundedAnswer, Hit, Query, SearchError};

/// How research is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResearchSettings {
    /// Subjects on their way at once.
    pub width: usize,
    /// Hits that are asked for.
    pub hits: usize,
    /// Pages that are tried, the best hit first, until one can be read.
    pub pages: usize,
    /// Characters of a page that the model sees.
    pub page_chars: usize,
    /// A page with fewer says nothing; the next is tried.
    pub least_chars: usize,
    /// Longest time for one search.
    pub search_limit: Duration,
    /// Before a search that failed in passing is tried once more.
    pub search_pause: Duration,
    /// Most tokens of an answer.
    pub max_tokens: u32,
}

impl Default for ResearchSettings {
    fn default() -> Self {
        Self {
            width: 10,
            hits: 3,
            pages: 3,
            page_chars: 8000,
            least_chars: 80,
            search_limit: Duration::from_secs(20),
            search_pause: Duration::from_secs(1),
            max_tokens: 1024,
        }
    }
}

/// Finds things out, by means of those it is given.
#[derive(Clone)]
pub struct Researcher {
    search: Arc<dyn SearchBackend>,
    pages: Arc<dyn Pages>,
    model: Arc<dyn Model>,
    settings: ResearchSettings,
}

/// What is known about a subject before the model is asked.
#[derive(Debug, Default)]
struct Material {
    text: String,
    sources: Vec<Source>,
    grounding: Option<Grounding>,
}

impl Researcher {
    /// Puts the steps together.
    pub fn new(
        search: Arc<dyn SearchBackend>,
        pages: Arc<dyn Pages>,
        model: Arc<dyn Model>,
        settings: ResearchSettings,
    ) -> Self {
        Self { search, pages, model, settings }
    }

    /// Finds out about every subject. `found` hears of each as it is done, in whatever order; the list that comes back is in
    /// the order of the request, one finding for each subject.
    pub async fn run(&self, request: &Request, mut found: impl FnMut(&Finding)) -> Vec<Finding> {
        let began = Instant::now();
        let subjects = request.subjects.iter().enumerate();
        let ways: Vec<_> = subjects.map(|(index, subject)| self.way(index, subject, &request.topic, began)).collect();
        let mut done: Vec<Option<Finding>> = vec![None; request.subjects.len()];
        let mut under_way = futures::stream::iter(ways).buffer_unordered(self.settings.width.max(1));
        while let Some(finding) = under_way.next().await {
            found(&finding);
            let place = finding.id - 1;
            done[place] = Some(finding);
        }
        done.into_iter().flatten().collect()
    }

    /// The same with its times.
    fn way<'a>(&'a self, index: usize, subject: &'a str, topic: &'a str, began: Instant) -> BoxFuture<'a, Finding> {
        Box::pin(async move {
            let started = began.elapsed();
            let mut finding = self.one(index + 1, subject, topic).await;
            (finding.started, finding.ended) = (started, began.elapsed());
            finding
        })
    }

    /// The way of one subject. Everything it finds is its own: nothing is looked up by place in a shared list.
    async fn one(&self, id: usize, subject: &str, topic: &str) -> Finding {
        let mut finding = Finding {
            id,
            subject: subject.to_owned(),
            outcome: Outcome::default(),
            grounding: Grounding::None,
            sources: Vec::new(),
            misses: Vec::new(),
            provider: String::new(),
            model: String::new(),
            attempts: 0,
            cost_pico_usd: 0,
            unpriced: 0,
            simulated: false,
            started: Duration::ZERO,
            ended: Duration::ZERO,
        };
        let material = match self.look(subject, topic, &mut finding).await {
            Some(Found::Answer(answer)) => {
                answered(answer, &mut finding);
                return finding;
            }
            Some(Found::Hits(hits)) => self.read(&hits, &mut finding).await,
            None => Material::default(),
        };
        finding.grounding = material.grounding.unwrap_or(Grounding::None);
        finding.sources = material.sources;
        let told = self.model.ask(self.question(id, subject, topic, &material.text)).await;
        finding.cost_pico_usd = finding.cost_pico_usd.saturating_add(told.cost_pico_usd);
        (finding.outcome, finding.provider, finding.model) = (told.outcome, told.provider, told.model);
        (finding.attempts, finding.simulated) = (told.attempts, told.simulated);
        if finding.answer().is_none() {
            // There is nothing that could rest on them.
            finding.grounding = Grounding::None;
        }
        finding
    }

    /// Searches, once more when the engine failed in passing.
    async fn look(&self, subject: &str, topic: &str, finding: &mut Finding) -> Option<Found> {
        let settings = &self.settings;
        let text = if topic.is_empty() { subject.to_owned() } else { format!("{subject} {topic}") };
        let query = Query { text, count: settings.hits, limit: settings.search_limit };
        let mut again = true;
        loop {
            match self.search.search(&query).await {
                Ok(result) => {
                    match result.cost_pico_usd {
                        Some(cost) => finding.cost_pico_usd = finding.cost_pico_usd.saturating_add(cost),
                        None => finding.unpriced += result.charged,
                    }
                    return Some(result.found);
                }
                Err(error) => {
                    let pause = match &error {
                        SearchError::Limited { retry_after: Some(wait), .. } => *wait,
                        _ => settings.search_pause,
                    };
                    let retry = again && error.is_passing() && pause <= settings.search_limit;
                    finding.misses.push(Miss { step: Kind::Search, what: query.text.clone(), why: error.to_string() });
                    if !retry {
                        return None;
                    }
                    again = false;
                    if !pause.is_zero() {
                        tokio::time::sleep(pause).await;
                    }
                }
            }
        }
    }

    /// Reads the first hit that can be read; else what the engine showed of them has to do.
    async fn read(&self, hits: &[Hit], finding: &mut Finding) -> Material {
        if hits.is_empty() {
            let what = finding.subject.clone();
            finding.misses.push(Miss { step: Kind::Search, what, why: "no hits".to_owned() });
        }
        for hit in hits.iter().take(self.settings.pages) {
            let missed = |why: String| Miss { step: Kind::Fetch, what: hit.url.clone(), why };
            match self.pages.read(&hit.url).await {
                Ok(page) if page.text.chars().count() < self.settings.least_chars => {
                    finding.misses.push(missed("the page has hardly any text".to_owned()));
                }
                Ok(page) => {
                    let (text, cut) = beginning(&page.text, self.settings.page_chars);
                    let title = page.title.unwrap_or_else(|| hit.title.clone());
                    let source = source(&page.url, &title, text, cut || page.truncated);
                    let fenced = fence(&source.url, &source.title, text);
                    return Material { text: fenced, sources: vec![source], grounding: Some(Grounding::Page) };
                }
                Err(error) => finding.misses.push(missed(error.to_string())),
            }
        }
        let shown = hits.iter().filter(|hit| !hit.snippet.trim().is_empty());
        let mut material = Material::default();
        for hit in shown {
            let (text, cut) = beginning(&hit.snippet, 1000);
            let source = source(&hit.url, &hit.title, text, cut);
            material.text.push_str(&fence(&source.url, &source.title, text));
            material.text.push('\n');
            material.sources.push(source);
            material.grounding = Some(Grounding::Snippets);
        }
        material
    }

    fn question(&self, id: usize, subject: &str, topic: &str, material: &str) -> Ask {
        let about = if topic.is_empty() {
            "Give a short, factual overview of the subject."
        } else {
            "Answer for this subject only."
        };
        let topic = if topic.is_empty() { String::new() } else { format!("Topic: {topic}\n") };
        let (rules, data) = if material.is_empty() {
            (
                "No source could be read for this subject. Answer from what you know, begin with the word `Unverified:`, and claim \
                 nothing about recent events.",
                String::new(),
            )
        } else {
            (
                "Answer only from the data below. Where it does not say, say that it does not. Name the URL you rest on.",
                format!("\n{ABOUT_DATA}\n\n{material}\n"),
            )
        };
        Ask {
            id: format!("analyze-{id}"),
            kind: Kind::Analyze,
            system: format!("You are one of many research workers; each has one subject. {rules}"),
            prompt: format!("Subject: {subject}\n{topic}{about}\n{data}"),
            max_tokens: self.settings.max_tokens,
            schema: None,
        }
    }
}

/// An answer that came with its sources.
fn answered(answer: GroundedAnswer, finding: &mut Finding) {
    let named = answer.citations.into_iter().map(|Citation { url, title, supports }| Source {
        url,
        title,
        sha256: String::new(),
        chars: supports.iter().map(|text| text.chars().count()).sum(),
        truncated: false,
        flags: flags(&supports.join("\n")),
    });
    finding.sources = named.collect();
    finding.grounding = if finding.sources.is_empty() { Grounding::None } else { Grounding::Cited };
    finding.attempts = 1;
    finding.outcome = Outcome::Answered(answer.text);
}

fn source(url: &str, title: &str, text: &str, truncated: bool) -> Source {
    Source {
        url: url.to_owned(),
        title: title.to_owned(),
        sha256: sha256(text),
        chars: text.chars().count(),
        truncated,
        flags: flags(text),
    }
}

/// The first characters of a text, and whether there were more.
fn beginning(text: &str, chars: usize) -> (&str, bool) {
    match text.char_indices().nth(chars) {
        Some((end, _)) => (&text[..end], true),
        None => (text, false),
    }
}
