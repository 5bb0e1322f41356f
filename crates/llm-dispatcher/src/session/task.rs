//! A task as it came, as a job, and as a result.

use std::sync::Arc;
use std::time::{Duration, Instant};

use drover_proto::dispatch as pb;
use serde_json::Value;

use crate::call::{CallRequest, Finish};
use crate::core::{Kind, Priority, Status};
use crate::errands::{Errands, HITS};
use crate::extract;
use crate::ledger::Digest;
use crate::provider::OutputSchema;
use crate::shell::{Chain, Done, Job, status_name};

/// A task that was read.
#[derive(Debug)]
pub(super) struct Asked {
    /// Its number in the input, from 0.
    pub(super) position: u32,
    pub(super) digest: Digest,
    /// About what it takes in memory beside its place in the queue.
    pub(super) bytes: usize,
    task: pb::Task,
    /// When its first step was handed in.
    since: Option<Instant>,
    /// What the model is to be asked about a page that is being read.
    question: Option<Box<CallRequest>>,
    /// The answer is to follow a schema.
    shaped: bool,
    page: Option<Box<Read>>,
}

/// The page that an extract task has read.
#[derive(Debug)]
struct Read {
    detail: Value,
    started_us: u64,
    busy: Duration,
}

impl Asked {
    pub(super) fn new(position: u32, digest: Digest, task: pb::Task) -> Self {
        let shaped = !task.schema.is_empty();
        let bytes = task.prompt.len() + task.system.len() + task.schema.len() + task.url.len();
        Self { position, digest, bytes, task, since: None, question: None, shaped, page: None }
    }

    /// Makes a job of it. The words move there; what is left is enough for its result.
    pub(super) fn job(&mut self, chain: &Chain, errands: &Errands) -> Result<Job, String> {
        let task = &mut self.task;
        if !task.unreadable.is_empty() {
            return Err(std::mem::take(&mut task.unreadable));
        }
        let kind = kind_of(&task.kind)?;
        let two_steps = extract::reads_a_page(task);
        let mut job = match kind {
            Kind::Extract if two_steps => {
                task.prompt = extract::prompt(task)?;
                self.question = Some(Box::new(request_of(task, chain)?));
                errands.extract(&task.url)
            }
            Kind::Fetch => errands.fetch(&task.url)?,
            Kind::Search => errands.search(&task.prompt, HITS)?,
            Kind::Analyze | Kind::Extract | Kind::Synthesize => Job::call(request_of(task, chain)?, chain.clone()),
        };
        self.since = Some(Instant::now());
        self.told(&mut job, kind)?;
        Ok(job)
    }

    /// The second step of a task whose page is read: what the model is asked about it. `None` for all others.
    pub(super) fn next(&mut self, done: &mut Done, chain: &Chain) -> Option<Job> {
        if done.status != Status::Answered {
            return None;
        }
        let mut request = *self.question.take()?;
        let page = done.answer.take()?;
        self.bytes += page.text.len();
        let detail = extract::about(&mut request, page);
        self.page = Some(Box::new(Read { detail, started_us: done.started_us, busy: done.busy }));
        let mut job = Job::call(request, chain.clone());
        // It was understood when the first step was handed in.
        self.told(&mut job, Kind::Extract).ok()?;
        let gone = self.since.map_or(Duration::ZERO, |since| since.elapsed());
        job.within = job.within.map(|within| within.saturating_sub(gone));
        Some(job)
    }

    /// Puts into a job what the task says of how it is to be done.
    fn told(&self, job: &mut Job, kind: Kind) -> Result<(), String> {
        let task = &self.task;
        job.kind = kind;
        job.priority = match task.priority.as_str() {
            "" | "normal" => Priority::Normal,
            "low" => Priority::Low,
            "high" => Priority::High,
            other => return Err(format!("unknown priority {other:?}, expected low, normal or high")),
        };
        job.within = (task.deadline_ms > 0).then(|| Duration::from_millis(task.deadline_ms));
        job.hedge &= !task.no_hedge;
        job.cache = !task.no_cache;
        Ok(())
    }

    /// Counts the first step in, when there were two.
    pub(super) fn count_in(&self, done: &mut Done) {
        if let Some(page) = &self.page {
            done.started_us = page.started_us;
            done.busy += page.busy;
        }
    }

    fn id(&self) -> String {
        if self.task.id.is_empty() { (u64::from(self.position) + 1).to_string() } else { self.task.id.clone() }
    }

    /// What came of it.
    pub(super) fn result(&self, done: &Done, began_us: u64) -> pb::TaskResult {
        let since = |at_us: u64| at_us.saturating_sub(began_us) / 1000;
        let answer = done.answer.as_ref();
        let truncated = answer.is_some_and(|answer| answer.finish == Finish::Length);
        // What was cut has no shape. To ask again would cut it again, so it was not.
        let shapeless = truncated && self.shaped && answer.is_some_and(|answer| answer.structured.is_none());
        let error = match answer.map(|answer| &answer.finish) {
            Some(Finish::Blocked(why)) => format!("the provider withholds the answer: {why}"),
            _ if shapeless => {
                "the answer was cut at max_tokens and does not follow its schema: raise max_tokens".to_owned()
            }
            _ => done.error.clone(),
        };
        let errand = matches!(kind_of(&self.task.kind), Ok(Kind::Fetch | Kind::Search));
        // Of an errand the count is no count of tokens.
        let usage = answer.and_then(|answer| answer.usage).filter(|_| !errand);
        let of_errand = answer.and_then(|answer| answer.structured.as_ref()).filter(|_| errand);
        let detail = self.page.as_ref().map(|page| &page.detail).or(of_errand);
        let output = answer.map_or_else(String::new, |answer| match &answer.structured {
            Some(value) if answer.text.is_empty() => value.to_string(),
            _ => answer.text.clone(),
        });
        pb::TaskResult {
            id: self.id(),
            status: if shapeless { "failed" } else { status_name(done.status) }.to_owned(),
            output,
            error,
            attempts: done.attempts,
            provider: done.lane.as_ref().map(|lane| lane.name.clone()).unwrap_or_default(),
            model: done.lane.as_ref().map(|lane| lane.model.clone()).unwrap_or_default(),
            cost_pico_usd: u64::try_from(done.cost.pico()).unwrap_or(u64::MAX),
            started_ms: since(done.started_us),
            ended_ms: since(done.ended_us),
            resumed: false,
            simulated: done.lane.as_ref().is_some_and(|lane| lane.simulated()),
            input_tokens: usage.map(|usage| usage.input_tokens),
            output_tokens: usage.map(|usage| usage.output_tokens),
            number: u64::from(self.position) + 1,
            detail: detail.map(Value::to_string).unwrap_or_default(),
            cached: done.cached,
            truncated,
        }
    }

    /// The result of one that cannot be begun.
    pub(super) fn refused(&self, why: String, since: Duration) -> pb::TaskResult {
        let at = since.as_millis() as u64;
        pb::TaskResult {
            id: self.id(),
            status: "refused".to_owned(),
            error: why,
            started_ms: at,
            ended_ms: at,
            number: u64::from(self.position) + 1,
            ..pb::TaskResult::default()
        }
    }
}

fn kind_of(word: &str) -> Result<Kind, String> {
    if word.is_empty() {
        return Ok(Kind::Analyze);
    }
    Kind::ALL
        .into_iter()
        .find(|kind| kind.as_str() == word)
        .ok_or_else(|| format!("unknown kind {word:?}, expected one of {}", Kind::ALL.map(Kind::as_str).join(", ")))
}

fn request_of(task: &mut pb::Task, chain: &Chain) -> Result<CallRequest, String> {
    if task.prompt.trim().is_empty() {
        return Err("the prompt is empty".to_owned());
    }
    let usual = chain.first().map_or(1024, |lane| lane.max_tokens);
    let mut request = CallRequest::prompt(
        std::mem::take(&mut task.prompt),
        if task.max_tokens == 0 { usual } else { task.max_tokens },
    );
    if !task.system.is_empty() {
        request = request.with_system(std::mem::take(&mut task.system));
    }
    if let Some(temperature) = task.temperature {
        if !(0.0..=2.0).contains(&temperature) {
            return Err(format!("temperature must be from 0 to 2, is {temperature}"));
        }
        request.temperature = Some(temperature as f32);
    }
    if !task.schema.is_empty() {
        let schema: Value =
            serde_json::from_str(&task.schema).map_err(|error| format!("the schema is not JSON: {error}"))?;
        let schema = OutputSchema::new("answer", schema).map_err(|error| format!("the schema is none: {error}"))?;
        request = request.with_schema(Arc::new(schema));
    }
    Ok(request)
}

/// Everything that decides what the task asks for. A name that was not given, and how soon and how often it is asked, do not.
pub(super) fn digest_of(task: &pb::Task, asked_for: &str) -> Digest {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    let numbers = format!("{}\0{:?}", task.max_tokens, task.temperature);
    for part in [asked_for, &task.id, &task.prompt, &task.system, &task.kind, &task.url, &task.schema, &numbers] {
        // With its length, so that no two lists of parts look the same.
        context.update(&(part.len() as u64).to_le_bytes());
        context.update(part.as_bytes());
    }
    let mut digest = Digest::default();
    digest.copy_from_slice(&context.finish().as_ref()[..16]);
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(id: &str, prompt: &str) -> pb::Task {
        pb::Task { id: id.to_owned(), prompt: prompt.to_owned(), ..pb::Task::default() }
    }

    #[test]
    fn equal_tasks_are_one_and_any_change_makes_another() {
        let one = digest_of(&task("", "Hi"), "\0");
        assert_eq!(one, digest_of(&pb::Task { deadline_ms: 5, no_hedge: true, ..task("", "Hi") }, "\0"));
        let others = [
            digest_of(&task("a", "Hi"), "\0"),
            digest_of(&task("", "Hi "), "\0"),
            digest_of(&task("", "Hi"), "gemini\0"),
            digest_of(&task("H", "i"), "\0"),
            digest_of(&pb::Task { max_tokens: 5, ..task("", "Hi") }, "\0"),
            digest_of(&pb::Task { temperature: Some(0.0), ..task("", "Hi") }, "\0"),
            digest_of(&pb::Task { schema: "{}".to_owned(), ..task("", "Hi") }, "\0"),
        ];
        for (index, other) in others.iter().enumerate() {
            assert!(*other != one && !others[..index].contains(other), "{index}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_a_reason() {
        let chain = Chain::of([]);
        let why = |mut task: pb::Task| request_of(&mut task, &chain).err().unwrap_or_default();
        assert!(why(task("", "  ")).contains("empty"));
        assert!(why(pb::Task { temperature: Some(7.0), ..task("", "x") }).contains("temperature"));
        assert!(why(pb::Task { schema: "{".to_owned(), ..task("", "x") }).contains("schema"));
        assert_eq!(why(task("", "x")), "");
        assert!(kind_of("dream").unwrap_err().contains("synthesize"));
    }
}
