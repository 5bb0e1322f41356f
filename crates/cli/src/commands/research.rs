//! `drover research`: the same question about many subjects at once, each answered from what was found about it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use drover_dispatcher::Configured;
use drover_dispatcher::core::Money;
use drover_dispatcher::research::{
    Finding, Grounding, Listener, Miss, Outcome, Phase, Remote, Request, ResearchSettings, Researcher, Source, usual,
};
use drover_dispatcher::search::{Off, SearchBackend};
use drover_proto::dispatch as pb;
use serde_json::{Value, json};

use super::dispatch::progress::words;
use crate::app::App;
use crate::args::{Research, WhoseModel};
use crate::dispatcher;
use crate::fault::{Exit, Fault};
use crate::render::screen::Live;

/// More at once are rather a file for `drover dispatch`.
const MOST_SUBJECTS: usize = 1000;
const LONGEST_SUBJECT: usize = 500;

pub(super) async fn run(app: &App, args: &Research) -> anyhow::Result<Exit> {
    let mut phases = usual();
    if args.barrier {
        hold(&mut phases);
    }
    let topic = args.topic.clone().unwrap_or_default();
    let request = Request { subjects: checked(&args.subjects)?, topic, phases };
    let tools = Tools::of(app)?;
    let run = RunName::of(args.resume.as_deref());
    let (remote, listener) = tools.open(app, "drover research", &args.whose, &run).await?;
    run.tell(app);
    tools.remark(app);
    let researcher = tools.researcher(&remote);
    let began = Instant::now();
    let bar = app.screen.bar(request.subjects.len() as u64, "research");
    let mut shown = InOrder::new(app);
    let mut cost = 0.0;
    let work = async {
        let findings = researcher
            .run(&request, |finding| {
                shown.add(finding);
                cost += Money::from_pico(finding.cost_pico_usd).usd();
                tell(&bar, shown.count(), request.subjects.len(), began, cost);
            })
            .await;
        remote.close();
        (findings, began.elapsed())
    };
    let ((findings, wall), heard) = tokio::join!(work, listener.listen(|response| note(app, &response)));
    drop(bar);
    shown.result?;
    let summary = Summary::of(&findings, wall, Duration::ZERO, tools.settings.width);
    summary.show(app, &run)?;
    heard.map_err(|status| Fault::of_status(&status))?;
    Ok(if summary.failed == 0 { Exit::Done } else { Exit::Failed })
}

/// How far it is, at what rate, how long it will still take, and what it has cost.
pub(super) fn tell(bar: &Live, done: u64, all: usize, began: Instant, cost: f64) {
    bar.at(done);
    bar.say(&words(done, done, Some(all as u64), began.elapsed(), cost, 0));
}

/// Puts a barrier before every phase.
pub(super) fn hold(phases: &mut [Phase]) {
    for phase in phases {
        phase.barrier = true;
    }
}

/// Subjects that can be asked about.
fn checked(subjects: &[String]) -> Result<Vec<String>, Fault> {
    if subjects.len() > MOST_SUBJECTS {
        return Err(Fault::usage(format!("{} subjects are more than {MOST_SUBJECTS}", subjects.len()))
            .hint("write prompts into a file and use `drover dispatch FILE`"));
    }
    let clean = |subject: &String| subject.split_whitespace().collect::<Vec<_>>().join(" ");
    let subjects: Vec<String> = subjects.iter().map(clean).collect();
    match subjects.iter().position(|subject| subject.is_empty() || subject.chars().count() > LONGEST_SUBJECT) {
        Some(nth) => {
            Err(Fault::usage(format!("subject {} is empty or longer than {LONGEST_SUBJECT} characters", nth + 1))
                .hint("name things briefly, and say with --topic what is to be found out about them"))
        }
        None => Ok(subjects),
    }
}

/// The run that research is kept under.
pub(super) struct RunName {
    pub(super) name: String,
    resumed: bool,
}

impl RunName {
    /// That of an earlier run, or a fresh one.
    pub(super) fn of(resume: Option<&str>) -> Self {
        let fresh = || uuid::Uuid::new_v4().simple().to_string()[..8].to_owned();
        Self { name: resume.map_or_else(fresh, str::to_owned), resumed: resume.is_some() }
    }

    /// The one beside it, in which its coordinator thinks.
    pub(super) fn of_coordinator(&self) -> Self {
        Self { name: format!("{}-plan", self.name), resumed: self.resumed }
    }

    /// Says how to go on, should it be stopped.
    pub(super) fn tell(&self, app: &App) {
        app.screen
            .note(&format!("run {}: should it be stopped, the same with --resume {} goes on", self.name, self.name));
    }
}

/// What research is done with.
pub(super) struct Tools {
    pub(super) configured: Configured,
    pub(super) settings: ResearchSettings,
}

impl Tools {
    /// The tools that the configuration names.
    pub(super) fn of(app: &App) -> Result<Self, Fault> {
        let configured = dispatcher::configured(app)?;
        let width = configured.scaling.limits.max_nodes.max(1) as usize;
        Ok(Self { configured, settings: ResearchSettings { width, ..ResearchSettings::default() } })
    }

    /// Whether there is an engine to search with.
    pub(super) fn searching(&self) -> bool {
        self.configured.scaling.search.backend != "off"
    }

    pub(super) fn researcher(&self, remote: &Arc<Remote>) -> Researcher {
        let search: Arc<dyn SearchBackend> = if self.searching() { Arc::clone(remote) as _ } else { Arc::new(Off) };
        Researcher::new(search, Arc::clone(remote) as _, Arc::clone(remote) as _, self.settings.clone())
    }

    /// Opens a run of the dispatcher.
    pub(super) async fn open(
        &self,
        app: &App,
        source: &str,
        whose: &WhoseModel,
        run: &RunName,
    ) -> Result<(Arc<Remote>, Listener), Fault> {
        let client = dispatcher::connect(app).await?;
        let open = pb::OpenRun {
            source: source.to_owned(),
            run_id: run.name.clone(),
            resume: run.resumed,
            provider: whose.provider.clone().unwrap_or_default(),
            model: whose.model.clone().unwrap_or_default(),
            ..pb::OpenRun::default()
        };
        Remote::open(client, open).await.map_err(|status| Fault::of_status(&status))
    }

    /// What a person has to know before reading answers.
    pub(super) fn remark(&self, app: &App) {
        if !self.searching() {
            app.screen.note(
                "search is off: answers come from the model alone and are marked as ungrounded; set \
                 node_scaling.search.backend to searxng (needs no key), brave, tavily or gemini",
            );
        }
    }
}

/// A word of the dispatcher while a run goes on.
pub(super) fn note(app: &App, response: &pb::dispatch_response::Response) {
    match response {
        pb::dispatch_response::Response::Opened(opened) if opened.simulated => {
            app.screen.note("answers are simulated: no provider is configured, or `sim` is");
        }
        pb::dispatch_response::Response::Note(note) => app.screen.note(&format!("{}: {}", note.message, note.hint)),
        _ => {}
    }
}

/// Shows findings in the order of the subjects, each as soon as those before it are there.
pub(super) struct InOrder<'a> {
    app: &'a App,
    next: usize,
    early: std::collections::BTreeMap<usize, Finding>,
    count: u64,
    pub(super) result: std::io::Result<()>,
}

impl<'a> InOrder<'a> {
    pub(super) fn new(app: &'a App) -> Self {
        Self { app, next: 1, early: std::collections::BTreeMap::new(), count: 0, result: Ok(()) }
    }

    pub(super) fn count(&self) -> u64 {
        self.count
    }

    pub(super) fn add(&mut self, finding: &Finding) {
        self.count += 1;
        self.early.insert(finding.id, finding.clone());
        while let Some(finding) = self.early.remove(&self.next) {
            self.next += 1;
            if self.result.is_ok() {
                self.result = show(self.app, &finding);
            }
        }
    }
}

fn show(app: &App, finding: &Finding) -> std::io::Result<()> {
    if app.global.json {
        return app.screen.out(&document(finding).to_string());
    }
    app.screen.out(&format!("== {} ==", finding.subject))?;
    match &finding.outcome {
        Outcome::Answered(text) => app.screen.out(text.trim_end())?,
        Outcome::Blocked(why) => app.screen.out(&format!("[blocked: {why}]"))?,
        Outcome::Failed(why) => app.screen.out(&format!("[no answer: {why}]"))?,
    }
    for line in beneath(finding) {
        app.screen.out(&line)?;
    }
    app.screen.out("")
}

/// What stands beneath an answer: what it rests on, and what came to nothing.
fn beneath(finding: &Finding) -> Vec<String> {
    let mut lines = Vec::new();
    if finding.answer().is_some() {
        match finding.grounding {
            Grounding::None => {
                let why =
                    finding.misses.last().map_or_else(|| "no source was named".to_owned(), |miss| miss.why.clone());
                lines.push(format!("[ungrounded: {why}]"));
            }
            Grounding::Snippets => {
                lines.push("[rests on the lines that the search engine shows, not on the pages]".to_owned());
            }
            Grounding::Page | Grounding::Cited => {}
        }
        for source in &finding.sources {
            let hash = source.sha256.get(..12).map_or_else(String::new, |hash| format!("  sha256 {hash}"));
            lines.push(format!("[source {}{hash}]", source.url));
            if !source.flags.is_empty() {
                lines.push(format!("[the source reads like orders to a model: {}]", source.flags.join(", ")));
            }
        }
    }
    lines
}

fn document(finding: &Finding) -> Value {
    let source = |source: &Source| {
        json!({
            "url": source.url, "title": source.title, "sha256": source.sha256, "chars": source.chars,
            "truncated": source.truncated, "flags": source.flags,
        })
    };
    let miss = |miss: &Miss| json!({ "step": miss.step.as_str(), "what": miss.what, "why": miss.why });
    let error = match &finding.outcome {
        Outcome::Answered(_) => None,
        Outcome::Blocked(why) | Outcome::Failed(why) => Some(why),
    };
    json!({
        "id": finding.id.to_string(),
        "subject": finding.subject,
        "status": finding.status(),
        "output": finding.answer(),
        "error": error,
        "grounded": finding.is_grounded(),
        "grounding": finding.grounding.as_str(),
        "sources": finding.sources.iter().map(source).collect::<Vec<_>>(),
        "misses": finding.misses.iter().map(miss).collect::<Vec<_>>(),
        "attempts": finding.attempts,
        "provider": finding.provider,
        "model": finding.model,
        "simulated": finding.simulated,
        "cost_usd": Money::from_pico(finding.cost_pico_usd).usd(),
        "unpriced_searches": finding.unpriced,
        "started_ms": finding.started.as_millis() as u64,
        "ended_ms": finding.ended.as_millis() as u64,
    })
}

/// What came of all of it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Summary {
    tasks: usize,
    succeeded: usize,
    pub(super) failed: usize,
    grounded: usize,
    wall: Duration,
    speedup: f64,
    pub(super) cost: Money,
    unpriced: u32,
}

impl Summary {
    /// `alone` is the part of the time in which nothing went on at once.
    pub(super) fn of(findings: &[Finding], wall: Duration, alone: Duration, width: usize) -> Self {
        let succeeded = findings.iter().filter(|finding| finding.answer().is_some()).count();
        // What waited for its turn would not have waited one after another, and is not counted.
        let busy: Duration = findings.iter().map(|finding| finding.busy).sum();
        // Never more than went on at once: clocks are read a moment apart.
        let most = width.min(findings.len()).max(1) as f64;
        let speedup = if wall.is_zero() { 0.0 } else { ((busy + alone).as_secs_f64() / wall.as_secs_f64()).min(most) };
        Self {
            tasks: findings.len(),
            succeeded,
            failed: findings.len() - succeeded,
            grounded: findings.iter().filter(|finding| finding.is_grounded()).count(),
            wall,
            speedup,
            cost: Money::from_pico(findings.iter().map(|finding| finding.cost_pico_usd).fold(0, u128::saturating_add)),
            unpriced: findings.iter().map(|finding| finding.unpriced).sum(),
        }
    }

    pub(super) fn show(&self, app: &App, run: &RunName) -> std::io::Result<()> {
        if app.global.json {
            return app.screen.out(&self.document(run).to_string());
        }
        let unpriced = match self.unpriced {
            0 => String::new(),
            count => format!(", and {count} searches whose price is not known"),
        };
        app.screen.note(&format!(
            "{} of {} answered, {} of them grounded, in {:.1} s ({:.1} times faster than one after another), {} USD{unpriced}",
            self.succeeded,
            self.tasks,
            self.grounded,
            self.wall.as_secs_f64(),
            self.speedup,
            self.cost,
        ));
        Ok(())
    }

    fn document(&self, run: &RunName) -> Value {
        json!({"summary": {
            "run_id": run.name, "tasks": self.tasks, "succeeded": self.succeeded, "failed": self.failed, "grounded": self.grounded,
            "wall_ms": self.wall.as_millis() as u64, "speedup": self.speedup, "cost_usd": self.cost.usd(),
            "unpriced_searches": self.unpriced,
        }})
    }
}
