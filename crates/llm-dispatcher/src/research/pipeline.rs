//! The way of each subject, and many of them at once.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;

use super::fence::{ABOUT_DATA, beginning, fence, flags};
use super::phases::{Phase, Step, usual};
use super::{Ask, Finding, Grounding, Miss, Model, Outcome, Pages, Request, SearchBackend, Source};
use crate::core::{Graph, Kind, NodeId, PhaseSpec, TaskId, Yield, pipeline};
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

/// The way of one subject. Everything it finds travels with it: nothing is looked up by place in a shared list.
#[derive(Debug)]
struct Way {
    finding: Finding,
    hits: Vec<Hit>,
    material: Material,
    /// What a model has taken from the material.
    notes: Option<String>,
    /// The engine answered by itself; there is nothing left to do.
    answered: bool,
}

/// A step that is over.
struct Over {
    task: TaskId,
    way: Box<Way>,
    came: Yield,
    last: bool,
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
        let usual = usual();
        let phases = if request.phases.is_empty() { &usual } else { &request.phases };
        let specs: Vec<PhaseSpec> = phases.iter().map(Phase::spec).collect();
        let count = u32::try_from(request.subjects.len()).unwrap_or(u32::MAX);
        let mut ways: Vec<Option<Box<Way>>> = request
            .subjects
            .iter()
            .enumerate()
            .map(|(index, subject)| Some(Box::new(Way::new(index + 1, subject))))
            .collect();
        let mut graph = match Graph::new(pipeline(count, &specs, false)) {
            Ok(graph) => graph,
            Err(error) => {
                let failed = |way: Box<Way>| Finding { outcome: Outcome::Failed(error.to_string()), ..way.finding };
                return ways.into_iter().flatten().map(failed).collect();
            }
        };
        let mut done: Vec<Option<Finding>> = vec![None; request.subjects.len()];
        // Who has come furthest goes first, so that answers come as early as they can.
        let mut ready: BTreeSet<(Reverse<u16>, u32, NodeId)> = BTreeSet::new();
        let mut under_way = FuturesUnordered::new();
        loop {
            while let Some(node) = graph.next_ready() {
                let place = graph.spec(node).and_then(|spec| Some((Reverse(spec.phase), spec.subject?, node)));
                ready.extend(place);
            }
            while under_way.len() < self.settings.width.max(1)
                && let Some((Reverse(phase), subject, node)) = ready.pop_first()
            {
                let task = TaskId(node.0.into());
                graph.started(node, task);
                // Each way is at one place at a time.
                let Some(way) = ways[subject as usize].take() else { continue };
                under_way.push(self.step(task, way, phases, usize::from(phase), &request.topic, began));
            }
            let Some(Over { task, way, came, last }) = under_way.next().await else { break };
            graph.finished(task, came);
            let place = way.finding.id - 1;
            if last {
                found(&way.finding);
                done[place] = Some(way.finding);
            } else {
                ways[place] = Some(way);
            }
        }
        done.into_iter().flatten().collect()
    }

    /// One phase of one subject, with its times.
    fn step<'a>(
        &'a self,
        task: TaskId,
        mut way: Box<Way>,
        phases: &'a [Phase],
        at: usize,
        topic: &'a str,
        began: Instant,
    ) -> BoxFuture<'a, Over> {
        Box::pin(async move {
            if at == 0 {
                way.finding.started = began.elapsed();
            }
            let last = at + 1 == phases.len();
            let phase = &phases[at];
            let came = match phase.kind {
                _ if way.answered => Yield::Result,
                Step::Search => self.look(&mut way, phase, topic).await,
                Step::Fetch => self.read(&mut way).await,
                Step::Extract | Step::Analyze if last => self.judge(&mut way, phase, topic).await,
                Step::Extract | Step::Analyze => self.note(&mut way, phase, at, topic).await,
            };
            if last {
                way.finding.ended = began.elapsed();
            }
            Over { task, way, came, last }
        })
    }

    /// Searches, once more when the engine failed in passing.
    async fn look(&self, way: &mut Way, phase: &Phase, topic: &str) -> Yield {
        let (settings, finding) = (&self.settings, &mut way.finding);
        let about = if phase.prompt.is_empty() { topic } else { phase.prompt.as_str() };
        let subject = &finding.subject;
        let text = if about.is_empty() { subject.clone() } else { format!("{subject} {about}") };
        let began = Instant::now();
        let query = Query { text, count: settings.hits, limit: settings.search_limit };
        let mut again = true;
        loop {
            match self.search.search(&query).await {
                Ok(result) => {
                    finding.busy += began.elapsed();
                    match result.cost_pico_usd {
                        Some(cost) => finding.cost_pico_usd = finding.cost_pico_usd.saturating_add(cost),
                        None => finding.unpriced += result.charged,
                    }
                    match result.found {
                        Found::Answer(answer) => {
                            answered(answer, finding);
                            way.answered = true;
                        }
                        Found::Hits(hits) if hits.is_empty() => {
                            let what = finding.subject.clone();
                            finding.misses.push(Miss { step: Kind::Search, what, why: "no hits".to_owned() });
                            return Yield::Nothing;
                        }
                        Found::Hits(hits) => way.hits = hits,
                    }
                    return Yield::Result;
                }
                Err(error) => {
                    let pause = match &error {
                        SearchError::Limited { retry_after: Some(wait), .. } => *wait,
                        _ => settings.search_pause,
                    };
                    let retry = again && error.is_passing() && pause <= settings.search_limit;
                    finding.misses.push(Miss { step: Kind::Search, what: query.text.clone(), why: error.to_string() });
                    if !retry {
                        finding.busy += began.elapsed();
                        return Yield::Failed;
                    }
                    again = false;
                    if !pause.is_zero() {
                        tokio::time::sleep(pause).await;
                    }
                }
            }
        }
    }

    /// Reads the first hit that can be read.
    async fn read(&self, way: &mut Way) -> Yield {
        if way.hits.is_empty() {
            return Yield::Nothing;
        }
        for hit in way.hits.iter().take(self.settings.pages) {
            let missed = |why: String| Miss { step: Kind::Fetch, what: hit.url.clone(), why };
            let began = Instant::now();
            let read = self.pages.read(&hit.url).await;
            // A page says itself how long it took, wherever it was read.
            way.finding.busy += read.as_ref().map_or_else(|_| began.elapsed(), |page| page.elapsed);
            match read {
                Ok(page) if page.text.chars().count() < self.settings.least_chars => {
                    way.finding.misses.push(missed("the page has hardly any text".to_owned()));
                }
                Ok(page) => {
                    let (text, cut) = beginning(&page.text, self.settings.page_chars);
                    let title = page.title.unwrap_or_else(|| hit.title.clone());
                    let source = source(&page.url, &title, text, cut || page.truncated);
                    let text = fence(&source.url, &source.title, text);
                    way.material = Material { text, sources: vec![source], grounding: Some(Grounding::Page) };
                    return Yield::Result;
                }
                Err(error) => way.finding.misses.push(missed(error.to_string())),
            }
        }
        Yield::Failed
    }

    /// Has a model take what the next phase needs. When it cannot, the next one works on what there is.
    async fn note(&self, way: &mut Way, phase: &Phase, at: usize, topic: &str) -> Yield {
        let id = format!("{}-{}-{}", phase.kind.kind().as_str(), way.finding.id, at + 1);
        match self.ask(way, phase, topic, id).await {
            Outcome::Answered(text) => {
                way.notes = Some(beginning(&text, self.settings.page_chars).0.to_owned());
                Yield::Result
            }
            Outcome::Blocked(why) | Outcome::Failed(why) => {
                let what = way.finding.subject.clone();
                way.finding.misses.push(Miss { step: phase.kind.kind(), what, why });
                Yield::Failed
            }
        }
    }

    /// Has a model give the answer.
    async fn judge(&self, way: &mut Way, phase: &Phase, topic: &str) -> Yield {
        let id = format!("{}-{}", phase.kind.kind().as_str(), way.finding.id);
        way.finding.outcome = self.ask(way, phase, topic, id).await;
        way.finding.sources = std::mem::take(&mut way.material.sources);
        // Without an answer there is nothing that could rest on them.
        let answer = way.finding.answer().is_some();
        way.finding.grounding = way.material.grounding.filter(|_| answer).unwrap_or(Grounding::None);
        if answer { Yield::Result } else { Yield::Failed }
    }

    async fn ask(&self, way: &mut Way, phase: &Phase, topic: &str, id: String) -> Outcome {
        if way.material.grounding.is_none() {
            // What the engine showed of the pages has to do.
            way.material = of_snippets(&way.hits);
        }
        let urls: Vec<&str> = way.material.sources.iter().map(|source| source.url.as_str()).collect();
        let notes = way.notes.as_ref().filter(|_| way.material.grounding.is_some());
        let notes = notes.map(|notes| fence(&urls.join(" "), "notes on the sources", notes));
        let material = notes.as_ref().unwrap_or(&way.material.text);
        let told = self.model.ask(self.question(id, &way.finding.subject, phase, topic, material)).await;
        let finding = &mut way.finding;
        finding.cost_pico_usd = finding.cost_pico_usd.saturating_add(told.cost_pico_usd);
        (finding.provider, finding.model) = (told.provider, told.model);
        finding.attempts += told.attempts;
        finding.simulated |= told.simulated;
        finding.busy += told.busy;
        told.outcome
    }

    fn question(&self, id: String, subject: &str, phase: &Phase, topic: &str, material: &str) -> Ask {
        let about = match (phase.prompt.as_str(), phase.kind, topic.is_empty()) {
            ("", Step::Extract, _) => "List what the data says about it: facts only, in short sentences.",
            ("", _, true) => "Give a short, factual overview of the subject.",
            ("", _, false) => "Answer for this subject only.",
            (asked, ..) => asked,
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
            id,
            kind: phase.kind.kind(),
            system: format!("You are one of many research workers; each has one subject. {rules}"),
            prompt: format!("Subject: {subject}\n{topic}{about}\n{data}"),
            max_tokens: self.settings.max_tokens,
            schema: None,
        }
    }
}

impl Way {
    fn new(id: usize, subject: &str) -> Self {
        let finding = Finding {
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
            busy: Duration::ZERO,
        };
        Self { finding, hits: Vec::new(), material: Material::default(), notes: None, answered: false }
    }
}

/// What an engine shows of pages.
fn of_snippets(hits: &[Hit]) -> Material {
    let mut material = Material::default();
    for hit in hits.iter().filter(|hit| !hit.snippet.trim().is_empty()) {
        let (text, cut) = beginning(&hit.snippet, 1000);
        let source = source(&hit.url, &hit.title, text, cut);
        material.text.push_str(&fence(&source.url, &source.title, text));
        material.text.push('\n');
        material.sources.push(source);
        material.grounding = Some(Grounding::Snippets);
    }
    material
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
