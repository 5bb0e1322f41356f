//! All jobs of one cluster as a state machine: no clock, no processes, no files.
//!
//! ```text
//! Wanted ── the queue has no job of this name ──> Submitting ── acknowledged ──> Held ── final state seen ──> Over
//!   ^  └──── it has one ──────────────────────────────┼───────────────────────────^ │ ^                        ^
//!   │                                  lost answer    v                             │ └── seen again           │
//!   └── surely came to nothing: next submission ── Unsure ── seen in the queue ─────┘ └── Missing ── sacct, scontrol ──┘
//! ```
//!
//! The shell reports what happened with [`Core::apply`] and then calls [`Core::advance`]: what has to be on disk first, and which
//! calls to make. Three rules make two jobs of one submission impossible:
//!
//! 1. That a job is about to be submitted is on disk before `sbatch` runs.
//! 2. Nothing is submitted before the queue was looked at and has no job of the swarm.
//! 3. After an unknown outcome nothing is submitted before the longest time that `sbatch` may live is over, and the queue and the
//!    history, or the queue and a quiet time, have denied the job; and then under a new number.
//!
//! Every call is counted before it is made ([`budget`]). What the controller does not answer changes no job's state: that it
//! cannot be reached is a state of its own, beside theirs.

mod budget;
mod record;
#[cfg(test)]
mod sim;
mod swarm;
#[cfg(test)]
mod tests;
mod view;
mod words;

use std::collections::{BTreeMap, BTreeSet};

use drover_types::SwarmId;

use super::state::Class;
use super::tag::Tag;
pub(crate) use budget::Begun;
use budget::{Budget, Purpose};
pub(crate) use record::JobRecord;
pub(crate) use swarm::refusal;
use swarm::{Phase, Swarm};
pub(crate) use view::View;
pub(crate) use words::{Answer, Call, CallId, Controller, Input, Orphan, Past, QueueList, Queued, Settings, Step};
pub use words::{Claim, WorkerEnd};

/// Microseconds of Unix time.
pub(crate) type Micros = u64;
pub(crate) const SECOND: Micros = 1_000_000;

/// Pause before the queue is looked at again after something was done; it doubles up to the pace of [`Settings::poll`].
const HOT: Micros = SECOND;
/// Pause after the first look that failed; it doubles too.
const AFTER_FAILURE: Micros = 5 * SECOND;
const LONGEST_AFTER_FAILURE: Micros = 60 * SECOND;
/// A history that is switched off is asked again after this long.
const HISTORY_AGAIN: Micros = 600 * SECOND;
/// Pause between two steps in which nothing happens.
const AT_LEAST: Micros = SECOND / 10;
/// Who wants to know what is in the queue is content with a look that was made so long ago.
const SEEN_LATELY: Micros = 5 * SECOND;
/// Calls at the same time. The controller is shared by many.
const AT_ONCE: usize = 3;

/// All jobs of one cluster.
#[derive(Debug)]
pub(crate) struct Core {
    settings: Settings,
    swarms: BTreeMap<SwarmId, Swarm>,
    controller: Controller,
    budget: Budget,
    under_way: BTreeMap<CallId, (Call, Micros)>,
    next_call: u64,
    /// When the queue is looked at next.
    look_at: Micros,
    /// Doublings of the pause between looks.
    cooled: u32,
    /// The queue is to be looked at once, whether or not there are swarms.
    asked: bool,
    /// When it was last seen.
    seen: Option<Micros>,
    /// There is no history before this time.
    no_history_before: Micros,
    /// Jobs of earlier submissions that turned up although a later one was made, and when they were last told to end.
    superseded: BTreeMap<u64, Micros>,
    orphans: BTreeMap<u64, Orphan>,
    /// The budget has no room for looks, and for all else, before these times.
    looks_from: Option<Micros>,
    others_from: Option<Micros>,
    advanced: Micros,
    step: Step,
}

impl Core {
    pub(crate) fn new(settings: Settings, now: Micros) -> Self {
        Self {
            budget: Budget::new(settings.calls_per_minute),
            settings,
            swarms: BTreeMap::new(),
            controller: Controller::default(),
            under_way: BTreeMap::new(),
            next_call: 0,
            look_at: now,
            cooled: 0,
            asked: false,
            seen: None,
            no_history_before: 0,
            superseded: BTreeMap::new(),
            orphans: BTreeMap::new(),
            looks_from: None,
            others_from: None,
            advanced: 0,
            step: Step::default(),
        }
    }

    /// Takes up the budget of an earlier allocator: when it made its last calls.
    pub(crate) fn restore_budget(&mut self, now: Micros, begun: &[Begun]) {
        self.budget.restore(now, begun);
    }

    /// When the calls were made that still count.
    pub(crate) fn calls_begun(&self) -> Vec<Begun> {
        self.budget.begun()
    }

    /// Takes up a swarm of an earlier allocator.
    pub(crate) fn restore(&mut self, swarm: SwarmId, record: &JobRecord, now: Micros) {
        self.step.changed.insert(swarm.clone());
        self.swarms.insert(swarm, Swarm::restore(record, now));
        self.look_soon(now);
    }

    /// What is to be remembered of a swarm.
    pub(crate) fn record(&self, swarm: &SwarmId) -> Option<JobRecord> {
        self.swarms.get(swarm).map(Swarm::record)
    }

    /// How a swarm is seen from outside.
    pub(crate) fn view(&self, swarm: &SwarmId) -> Option<View> {
        self.swarms.get(swarm).map(|found| found.view(&self.controller))
    }

    /// Swarms whose workers have not all come up, and whether their jobs are known to run.
    pub(crate) fn expected(&self) -> BTreeMap<SwarmId, bool> {
        let expected = self.swarms.iter().filter(|(_, swarm)| swarm.expects_workers());
        expected.map(|(id, swarm)| (id.clone(), swarm.is_running())).collect()
    }

    /// Jobs with our mark that belong to no swarm of ours.
    pub(crate) fn orphans(&self) -> &BTreeMap<u64, Orphan> {
        &self.orphans
    }

    /// Why nobody knows how the jobs fare, and since when.
    pub(crate) fn trouble(&self) -> Option<String> {
        let (since, why) = self.controller.down.as_ref()?;
        Some(format!("Slurm cannot be reached since {}: {why}", view::utc(*since)))
    }

    /// How it stands with the controller.
    pub(crate) fn controller(&self) -> &Controller {
        &self.controller
    }

    /// Takes note of what happened.
    pub(crate) fn apply(&mut self, now: Micros, input: Input) {
        match input {
            Input::Launch { swarm, nodes, limit } => {
                if !self.swarms.contains_key(&swarm) {
                    self.orphans.retain(|_, orphan| orphan.tag.swarm != swarm);
                    self.step.store.insert(swarm.clone());
                    self.step.changed.insert(swarm.clone());
                    self.swarms.insert(swarm, Swarm::new(nodes, limit, now));
                    self.look_now(now);
                }
            }
            Input::Release { swarm, force } => {
                if let Some(found) = self.swarms.get_mut(&swarm)
                    && found.release(now, force)
                {
                    self.step.store.insert(swarm.clone());
                    self.step.changed.insert(swarm);
                    self.look_soon(now);
                }
            }
            Input::Claims { swarm, claims } => {
                if let Some(found) = self.swarms.get_mut(&swarm)
                    && found.claimed(claims)
                {
                    // A worker is faster than the queue: what it says by being there, or by its end, is looked up at once.
                    let told = found.is_running() && !found.has_ends();
                    self.step.changed.insert(swarm);
                    if !told {
                        self.look_now(now);
                    }
                }
            }
            Input::Look => {
                if self.seen.is_none_or(|seen| seen + SEEN_LATELY <= now) {
                    self.asked = true;
                    self.look_at = self.look_at.min(now);
                }
            }
            Input::Answered { call, answer } => {
                if let Some((call, begun)) = self.under_way.remove(&call) {
                    self.answered(now, &call, begun, answer);
                }
            }
        }
    }

    /// Takes back a call that was not made.
    pub(crate) fn not_made(&mut self, now: Micros, call: CallId, why: &str) {
        self.apply(now, Input::Answered { call, answer: Answer::NotDone(why.to_owned()) });
    }

    /// Decides everything that is due.
    pub(crate) fn advance(&mut self, now: Micros) -> Step {
        (self.looks_from, self.others_from) = (None, None);
        self.advanced = now;
        for (id, swarm) in &mut self.swarms {
            if swarm.end_if_never_submitted(now) {
                self.step.store.insert(id.clone());
                self.step.changed.insert(id.clone());
                self.step.settled.push((id.clone(), Ok(())));
            }
        }
        self.make_calls(now);
        let keep = self.settings.keep_over;
        let old: Vec<SwarmId> =
            self.swarms.iter().filter(|(_, swarm)| swarm.is_old(now, keep)).map(|(id, _)| id.clone()).collect();
        for id in old {
            self.swarms.remove(&id);
            self.step.forget.push(id);
        }
        std::mem::take(&mut self.step)
    }

    /// Forgets a swarm whose launch came to nothing.
    pub(crate) fn discard(&mut self, swarm: &SwarmId) {
        self.swarms.remove(swarm);
        for set in [&mut self.step.store, &mut self.step.changed] {
            set.remove(swarm);
        }
    }

    /// Takes a call of another kind from the budget, which makes so many requests, if there is room.
    pub(crate) fn take_call(&mut self, now: Micros, requests: u32) -> bool {
        self.budget.take(now, Purpose::Other, requests).is_ok()
    }

    /// When [`Self::advance`] has something to do even if nothing happens.
    pub(crate) fn next_deadline(&self) -> Option<Micros> {
        let look =
            (self.is_looking_worthwhile() && !self.has_under_way(|call| *call == Call::Queue)).then_some(self.look_at);
        // Before there is room nothing that is due can be done.
        let look = look.map(|at| self.looks_from.map_or(at, |from| at.max(from)));
        let history_from = self.no_history_before;
        let swarms = self.swarms.values().filter_map(|swarm| swarm.deadline(&self.settings, history_from));
        let superseded = self.superseded.values().map(|&told| told + swarm::CANCEL_AGAIN);
        let others = swarms.chain(superseded).map(|at| self.others_from.map_or(at, |from| at.max(from)));
        let due = others.chain(self.others_from).chain(look).min()?;
        // What is due and waits for an answer, not for the time, must not make the shell spin.
        Some(due.max(self.advanced + AT_LEAST))
    }

    fn is_looking_worthwhile(&self) -> bool {
        self.asked || !self.superseded.is_empty() || self.swarms.values().any(|swarm| !swarm.is_over())
    }

    fn has_under_way(&self, is: impl Fn(&Call) -> bool) -> bool {
        self.under_way.values().any(|(call, _)| is(call))
    }

    fn look_now(&mut self, now: Micros) {
        self.cooled = 0;
        self.look_at = self.look_at.min(now);
    }

    fn look_soon(&mut self, now: Micros) {
        self.cooled = 0;
        self.look_at = self.look_at.min(now + HOT);
    }

    fn history_is_there(&self, now: Micros) -> bool {
        now >= self.no_history_before
    }

    /// Makes the calls that are due, the most urgent first, as far as the budget goes.
    fn make_calls(&mut self, now: Micros) {
        for call in self.due_calls(now) {
            if self.under_way.len() >= AT_ONCE {
                return;
            }
            let purpose = if call == Call::Queue { Purpose::Look } else { Purpose::Other };
            if let Err(again) = self.budget.take(now, purpose, call.requests()) {
                let from = if purpose == Purpose::Look { &mut self.looks_from } else { &mut self.others_from };
                *from = Some(again);
                continue;
            }
            self.begin(now, call);
        }
    }

    fn begin(&mut self, now: Micros, call: Call) {
        match &call {
            Call::Submit(tag) => {
                if let Some(swarm) = self.swarms.get_mut(&tag.swarm) {
                    swarm.submitting(now);
                    self.step.store.insert(tag.swarm.clone());
                    self.step.changed.insert(tag.swarm.clone());
                }
            }
            Call::Cancel { job, .. } => {
                if let Some(told) = self.superseded.get_mut(job) {
                    *told = now;
                }
                for swarm in self.swarms.values_mut().filter(|swarm| swarm.has_job(*job)) {
                    swarm.cancelling(now);
                }
            }
            Call::History { .. } => self.swarms.values_mut().for_each(|swarm| swarm.asking_history(now)),
            Call::Show { job } => {
                for swarm in self.swarms.values_mut().filter(|swarm| swarm.has_job(*job)) {
                    swarm.ask_later(now);
                }
            }
            Call::Queue => {}
        }
        self.next_call += 1;
        let id = CallId(self.next_call);
        self.under_way.insert(id, (call.clone(), now));
        self.step.calls.push((id, call));
    }

    fn due_calls(&self, now: Micros) -> Vec<Call> {
        let mut due = Vec::new();
        for swarm in self.swarms.values() {
            if let Some((job, kill)) = swarm.cancel_due(now) {
                due.push(Call::Cancel { job, kill });
            }
        }
        for (&job, &told) in &self.superseded {
            if told + swarm::CANCEL_AGAIN <= now {
                due.push(Call::Cancel { job, kill: false });
            }
        }
        due.retain(|call| {
            let Call::Cancel { job, .. } = call else { return true };
            !self.has_under_way(|other| matches!(other, Call::Cancel { job: other, .. } if other == job))
        });
        if self.look_at <= now && self.is_looking_worthwhile() && !self.has_under_way(|call| *call == Call::Queue) {
            due.push(Call::Queue);
        }
        for (id, swarm) in &self.swarms {
            if let Some(submission) = swarm.submit_due() {
                due.push(Call::Submit(Tag { swarm: id.clone(), submission }));
            }
        }
        self.past_due(now, &mut due);
        due
    }

    /// Calls about jobs that the queue no longer has, or never had.
    fn past_due(&self, now: Micros, due: &mut Vec<Call>) {
        let history = self.history_is_there(now);
        let asked = self.has_under_way(|call| matches!(call, Call::History { .. }));
        let (mut jobs, mut names) = (Vec::new(), Vec::new());
        for (id, swarm) in &self.swarms {
            if let Some(job) = swarm.missing_due(now) {
                if history && !swarm.history_is_exhausted() {
                    jobs.push(job);
                    let submission = swarm.submission;
                    names.push(Tag { swarm: id.clone(), submission }.name());
                } else if !self.has_under_way(|call| matches!(call, Call::Show { job: other } if *other == job)) {
                    due.push(Call::Show { job });
                }
            }
            if let (true, Some(submission)) = (history, swarm.denial_due(now, &self.settings)) {
                names.push(Tag { swarm: id.clone(), submission }.name());
            }
        }
        if !asked && !names.is_empty() {
            due.push(Call::History { jobs, names });
        }
    }

    fn answered(&mut self, now: Micros, call: &Call, begun: Micros, answer: Answer) {
        match (call, answer) {
            (Call::Queue, Answer::Queue(list)) => {
                (self.asked, self.seen) = (false, Some(now));
                self.looked(now, begun, &list);
            }
            (Call::Queue, other) => {
                self.asked = false;
                self.unreachable(now, &words(other));
            }
            (Call::Submit(tag), answer) => self.submitted(now, tag, begun, answer),
            (Call::Cancel { job, .. }, answer) => {
                if answer == Answer::NoSuchJob {
                    self.superseded.remove(job);
                }
                self.look_soon(now);
            }
            (Call::History { jobs, names }, answer) => self.told_by_history(now, begun, jobs, names, answer),
            (Call::Show { job }, answer) => {
                let past = match answer {
                    Answer::Shown(past) => past,
                    Answer::NoSuchJob => None,
                    // It says nothing; asked again after a while.
                    _ => return self.for_job(*job, |swarm| swarm.ask_later(now)),
                };
                let past = past.filter(|past| past.id == *job);
                self.for_job(*job, |swarm| swarm.shown(now, past.as_ref()));
            }
        }
    }

    fn for_job(&mut self, job: u64, act: impl FnOnce(&mut Swarm)) {
        if let Some((id, swarm)) = self.swarms.iter_mut().find(|(_, swarm)| swarm.has_job(job)) {
            act(swarm);
            self.step.store.insert(id.clone());
            self.step.changed.insert(id.clone());
        }
    }

    /// The queue was seen.
    fn looked(&mut self, now: Micros, begun: Micros, list: &QueueList) {
        if self.controller.down.take().is_some() {
            self.step.changed.extend(self.swarms.keys().cloned());
        }
        self.controller.failures = 0;
        let mut ours: BTreeMap<&SwarmId, Vec<(&Tag, &Queued)>> = BTreeMap::new();
        for job in &list.jobs {
            if let Some(tag) = &job.tag {
                ours.entry(&tag.swarm).or_default().push((tag, job));
            }
        }
        for (id, swarm) in &mut self.swarms {
            if swarm.is_over_unasked() {
                // Somebody put its job back into the queue: shown as what it is, and left alone.
                continue;
            }
            let seen = ours.remove(id).unwrap_or_default();
            let news = swarm.looked(now, begun, &seen, list.whole, &self.settings);
            for job in news.superseded {
                self.superseded.entry(job).or_insert(0);
            }
            if news.store {
                self.step.store.insert(id.clone());
            }
            if news.changed || news.store {
                self.step.changed.insert(id.clone());
            }
            if news.held {
                self.step.settled.push((id.clone(), Ok(())));
            }
            self.step.progress.extend(news.progress.into_iter().map(|(stage, words)| (id.clone(), stage, words)));
        }
        // Also of earlier submissions: what has ended needs no end.
        let living: BTreeSet<u64> =
            list.jobs.iter().filter(|job| !matches!(job.state.class(), Class::Over(_))).map(|job| job.id).collect();
        if list.whole {
            self.superseded.retain(|job, _| living.contains(job));
        }
        self.find_orphans(&ours);
        let hot = self.swarms.values().any(Swarm::is_hot) || !self.superseded.is_empty();
        let pause = if hot { (HOT << self.cooled.min(16)).min(self.settings.poll) } else { self.settings.poll };
        self.cooled += 1;
        self.look_at = now + pause;
    }

    fn find_orphans(&mut self, ours: &BTreeMap<&SwarmId, Vec<(&Tag, &Queued)>>) {
        let living = ours.values().flatten().filter(|(_, job)| !matches!(job.state.class(), Class::Over(_)));
        self.orphans =
            living.map(|(tag, job)| (job.id, Orphan { tag: (*tag).clone(), state: job.state.clone() })).collect();
    }

    /// The queue could not be seen. No job's state changes by that.
    fn unreachable(&mut self, now: Micros, why: &str) {
        let since = self.controller.down.as_ref().map_or(now, |(since, _)| *since);
        let before = self.controller.down.replace((since, why.to_owned()));
        if before.is_none_or(|(_, before)| before != why) {
            self.step
                .changed
                .extend(self.swarms.iter().filter(|(_, swarm)| !swarm.is_over()).map(|(id, _)| id.clone()));
        }
        // Whoever waits for a launch is told that it takes longer.
        let waiting = self.swarms.iter().filter(|(_, swarm)| matches!(swarm.phase, Phase::Wanted { .. }));
        self.step.settled.extend(waiting.map(|(id, _)| (id.clone(), Ok(()))));
        let pause = (AFTER_FAILURE << self.controller.failures.min(8)).min(LONGEST_AFTER_FAILURE);
        self.controller.failures += 1;
        self.look_at = now + pause;
    }

    fn submitted(&mut self, now: Micros, tag: &Tag, begun: Micros, answer: Answer) {
        let Some(swarm) = self.swarms.get_mut(&tag.swarm) else { return };
        if !swarm.is_submitting(tag.submission) {
            return;
        }
        let outcome = match answer {
            Answer::Submitted { job } => {
                swarm.hold(now, job);
                let words = format!("job {job} is in the queue");
                self.step.progress.push((tag.swarm.clone(), "slurm_setup", words));
                Ok(())
            }
            Answer::Rejected(failure) => {
                swarm.refused(now, &failure);
                Err(failure)
            }
            Answer::NotDone(_) => {
                swarm.want_again(now);
                Ok(())
            }
            other => {
                swarm.unsure(begun, words(other));
                Ok(())
            }
        };
        self.step.settled.push((tag.swarm.clone(), outcome));
        self.step.store.insert(tag.swarm.clone());
        self.step.changed.insert(tag.swarm.clone());
        self.look_soon(now);
    }

    fn told_by_history(&mut self, now: Micros, begun: Micros, jobs: &[u64], names: &[String], answer: Answer) {
        let rows = match answer {
            Answer::History(rows) => rows,
            Answer::Unsupported(_) => {
                self.no_history_before = now + HISTORY_AGAIN;
                return;
            }
            _ => return,
        };
        for (id, swarm) in &mut self.swarms {
            let Some(submission) = swarm.submission() else { continue };
            let tag = Tag { swarm: id.clone(), submission };
            let changed = match swarm.job_id() {
                Some(job) if jobs.contains(&job) => {
                    // An old job may have had this number, when the cluster began to count anew.
                    let row = rows.iter().find(|row| row.id == job && row.tag.as_ref() == Some(&tag));
                    row.is_some_and(|row| swarm.past(now, row))
                }
                None if names.contains(&tag.name()) => {
                    let row = rows.iter().find(|row| row.tag.as_ref() == Some(&tag));
                    swarm.history_said(now, begun, row, &self.settings)
                }
                _ => false,
            };
            if changed {
                self.step.store.insert(id.clone());
                self.step.changed.insert(id.clone());
                self.look_at = self.look_at.min(now);
            }
        }
    }
}

/// An answer that does not fit its call, in words.
fn words(answer: Answer) -> String {
    match answer {
        Answer::NotDone(why) | Answer::Unsure(why) | Answer::Unsupported(why) => why,
        Answer::Rejected(failure) => failure.message,
        other => format!("an answer that does not fit: {other:?}"),
    }
}
