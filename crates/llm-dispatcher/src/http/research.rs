//! `/research` of the older daemon: many subjects, each searched, read about and answered; a line for each as it is done.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;
use axum::http::HeaderMap;
use axum::response::Response;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::daemon::{line, lines};
use super::error::Refusal;
use super::{Front, inbound};
use crate::core::Money;
use crate::research::{Finding, Outcome, Pooled, Request, ResearchSettings, Researcher};

/// Most subjects of one request.
const MOST_SUBJECTS: usize = 1000;
const LONGEST_SUBJECT: usize = 500;
/// Lines that may wait for the reader.
const AHEAD: usize = 64;
/// Searching, reading, answering: each subject goes through them by itself.
const STEPS: usize = 3;

#[derive(Debug, Deserialize)]
pub(super) struct ResearchRequest {
    subjects: Vec<String>,
    #[serde(default)]
    topic: Option<String>,
    #[serde(default)]
    options: Options,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Options {
    model: Option<String>,
    max_tokens: Option<u64>,
}

/// Finds something out about every subject.
pub(super) async fn research(
    State(front): State<Arc<Front>>,
    headers: HeaderMap,
    body: Result<Json<ResearchRequest>, JsonRejection>,
) -> Result<Response, Refusal> {
    let Json(body) = body?;
    if body.subjects.len() > MOST_SUBJECTS {
        return Err(Refusal::bad(format!("at most {MOST_SUBJECTS} subjects at once")));
    }
    let wrong = |subject: &String| subject.trim().is_empty() || subject.chars().count() > LONGEST_SUBJECT;
    if body.subjects.iter().any(wrong) {
        return Err(Refusal::bad(format!("a subject is empty or longer than {LONGEST_SUBJECT} characters")));
    }
    let chain = inbound::chain(&front, body.options.model.as_deref().unwrap_or_default())?;
    let mut settings = ResearchSettings { width: body.subjects.len().clamp(1, 256), ..ResearchSettings::default() };
    if body.options.max_tokens.is_some() {
        settings.max_tokens = inbound::max_tokens(&chain, body.options.max_tokens)?;
    }
    let simulated = chain.first().is_some_and(|lane| lane.simulated());
    // A client of its own: another request's subjects neither wait behind these nor show up in its lines.
    let pooled = Arc::new(Pooled {
        client: front.pool.client(1),
        chain,
        errands: front.errands.clone(),
        priority: super::clients::priority(&headers),
    });
    let researcher = Researcher::new(Arc::clone(&pooled) as _, Arc::clone(&pooled) as _, pooled as _, settings);
    let request = Request { subjects: body.subjects, topic: body.topic.unwrap_or_default(), phases: Vec::new() };
    let (to, written) = mpsc::channel(AHEAD);
    Ok(lines(work(researcher, request, simulated, to), written))
}

async fn work(researcher: Researcher, request: Request, simulated: bool, to: mpsc::Sender<Bytes>) {
    let began = Instant::now();
    let total = request.subjects.len();
    let start = json!({"event": "start", "timestamp": drover_service::now_us() / 1000, "subjects": request.subjects,
        "topic": request.topic, "tasks": total});
    let _ = to.send(line(&start)).await;
    // What is found is told by whoever finds it, and must not hold that up: there is room for all of it.
    let (tell, mut told) = mpsc::channel::<Bytes>(total.max(1));
    let mut completed = 0;
    let mut running = Box::pin(researcher.run(&request, |finding| {
        completed += 1;
        let _ = tell.try_send(line(&task_line(finding, completed, total)));
    }));
    let findings = loop {
        tokio::select! {
            biased;
            Some(line) = told.recv() => {
                let _ = to.send(line).await;
            }
            findings = &mut running => break findings,
        }
    };
    drop(running);
    while let Ok(line) = told.try_recv() {
        let _ = to.send(line).await;
    }
    let successful = findings.iter().filter(|finding| finding.answer().is_some()).count();
    let cost = findings.iter().map(|finding| finding.cost_pico_usd).fold(0_u128, u128::saturating_add);
    let complete = json!({
        "event": "complete", "duration": began.elapsed().as_millis() as u64, "subjects": request.subjects,
        "topic": request.topic, "analyses": findings.iter().map(analysis).collect::<Vec<_>>(),
        "stats": {"phases": STEPS, "totalTasks": total * STEPS, "successful": successful, "failed": total - successful},
        "cost": {"usd": Money::from_pico(cost).usd()}, "simulated": simulated,
    });
    let _ = to.send(line(&complete)).await;
}

fn why(finding: &Finding) -> Option<&str> {
    match &finding.outcome {
        Outcome::Answered(_) => None,
        Outcome::Blocked(why) | Outcome::Failed(why) => Some(why),
    }
}

fn task_line(finding: &Finding, completed: usize, total: usize) -> Value {
    json!({"event": "task", "index": finding.id - 1, "label": finding.subject, "success": finding.answer().is_some(),
        "completed": completed, "total": total, "grounded": finding.is_grounded(),
        "durationMs": finding.ended.saturating_sub(finding.started).as_millis() as u64, "error": why(finding)})
}

/// One for each subject, at its place, whether there is an answer or not: none can slip to another's.
fn analysis(finding: &Finding) -> Value {
    let sources = finding.sources.iter().map(|source| {
        json!({"url": source.url, "title": source.title, "sha256": source.sha256, "truncated": source.truncated,
            "flags": source.flags})
    });
    json!({"subject": finding.subject, "analysis": finding.answer(), "status": finding.status(), "error": why(finding),
        "grounded": finding.is_grounded(), "grounding": finding.grounding.as_str(),
        "sources": sources.collect::<Vec<_>>(), "provider": finding.provider, "model": finding.model,
        "misses": finding.misses.iter().map(|miss| json!({"step": miss.step.as_str(), "what": miss.what, "why": miss.why}))
            .collect::<Vec<_>>()})
}
