//! The job of one swarm.

use std::time::Duration;

use drover_types::{ErrorCode, Failure};
use serde::{Deserialize, Serialize};

use super::{Claim, Micros, Past, Queued, SECOND, Settings};
use crate::slurm::state::{Class, Ending, JobState};
use crate::slurm::tag::Tag;
use crate::walltime;

/// A job that was told to end and has not is told again after this long.
pub(super) const CANCEL_AGAIN: Micros = 20 * SECOND;
/// One that is ending takes its time; one that must go at once gets less.
const CANCEL_ENDING_AGAIN: Micros = 120 * SECOND;
const KILL_AFTER: Micros = 3 * SECOND;
/// When the history is asked about a job that the queue no longer has: it lags a few seconds behind.
const HISTORY_AT: [Micros; 3] = [4 * SECOND, 12 * SECOND, 40 * SECOND];
/// Slurm tells workers of the end of their time a minute before it, or up to another minute earlier; and a look is late.
const TOLD_BEFORE: Micros = 150 * SECOND;
/// Pause after a submission that came to nothing.
const WANT_AGAIN: Micros = 5 * SECOND;
/// Pause before the controller is asked for one job again.
const SHOW_AGAIN: Micros = 30 * SECOND;

/// Where the job of a swarm is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
    /// To be submitted; `looked` when the queue was seen without it since.
    Wanted { since: Micros, looked: bool },
    /// `sbatch` runs.
    Submitting { begun: Micros },
    /// `sbatch` ended, and whether there is a job is not known. `denied` when the history has none.
    Unsure { begun: Micros, why: String, denied: bool, asked: Micros },
    /// There is a job.
    Held { since: Micros },
    /// There was a job, and the queue no longer has it.
    Missing { since: Micros, tries: u8, next: Micros },
    /// It is over.
    Over(Over),
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Over {
    pub(super) at_us: Micros,
    /// Slurm's word for it.
    pub(super) word: String,
    pub(super) reason: String,
    /// As asked, or by its own end; else something failed.
    pub(super) well: bool,
}

/// A job and what was last seen of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Job {
    pub(super) id: u64,
    pub(super) state: JobState,
    /// Since when it is in this state, as far as was seen.
    pub(super) since_us: Micros,
    /// When it was first seen to run, since it was last put back into the queue.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) began_us: Option<Micros>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) reason: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) hosts: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) starts: String,
    /// It ran at some time.
    #[serde(default)]
    pub(super) ran: bool,
    /// The queue had it at some time.
    #[serde(default)]
    pub(super) seen: bool,
}

/// The end, once asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Release {
    pub(super) force: bool,
    pub(super) since_us: Micros,
}

/// What a look at the queue came to for one swarm.
#[derive(Debug, Default)]
pub(super) struct News {
    pub(super) store: bool,
    pub(super) changed: bool,
    /// A job was found that nobody had told us of.
    pub(super) held: bool,
    /// Jobs of earlier submissions that live.
    pub(super) superseded: Vec<u64>,
    pub(super) progress: Vec<(&'static str, String)>,
}

#[derive(Debug, Clone)]
pub(super) struct Swarm {
    pub(super) nodes: u32,
    /// How long its job may run.
    pub(super) limit: Option<Micros>,
    /// Counts submissions, from 1.
    pub(super) submission: u32,
    pub(super) phase: Phase,
    pub(super) job: Option<Job>,
    pub(super) release: Option<Release>,
    pub(super) claims: Vec<Claim>,
    /// Those of the job's earlier run; it was put back into the queue since.
    earlier: Vec<Claim>,
    /// When the job was last told to end.
    told: Option<Micros>,
}

impl Swarm {
    pub(super) fn new(nodes: u32, limit: Option<Micros>, now: Micros) -> Self {
        Self {
            nodes,
            limit,
            submission: 1,
            phase: Phase::Wanted { since: now, looked: false },
            job: None,
            release: None,
            claims: Vec::new(),
            earlier: Vec::new(),
            told: None,
        }
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Over(_))
    }

    /// It ended by itself.
    pub(super) fn is_over_unasked(&self) -> bool {
        self.is_over() && self.release.is_none()
    }

    pub(super) fn is_old(&self, now: Micros, keep: Micros) -> bool {
        matches!(&self.phase, Phase::Over(over) if over.at_us + keep <= now)
    }

    pub(super) fn is_running(&self) -> bool {
        self.job.as_ref().is_some_and(|job| job.state.class() == Class::Running)
    }

    /// Something is expected soon.
    pub(super) fn is_hot(&self) -> bool {
        match &self.phase {
            Phase::Over(_) => false,
            Phase::Held { .. } => {
                let class = self.job.as_ref().map_or(Class::Unknown, |job| job.state.class());
                self.release.is_some() || matches!(class, Class::Waiting | Class::Preparing | Class::Ending)
            }
            _ => true,
        }
    }

    pub(super) fn job_id(&self) -> Option<u64> {
        self.job.as_ref().map(|job| job.id)
    }

    pub(super) fn has_job(&self, id: u64) -> bool {
        !self.is_over() && self.job_id() == Some(id)
    }

    /// Its submission, while it is not over.
    pub(super) fn submission(&self) -> Option<u32> {
        (!self.is_over()).then_some(self.submission)
    }

    pub(super) fn is_submitting(&self, submission: u32) -> bool {
        self.submission == submission && matches!(self.phase, Phase::Submitting { .. })
    }

    /// Begins the end. True when that is news.
    pub(super) fn release(&mut self, now: Micros, force: bool) -> bool {
        if self.is_over() {
            return false;
        }
        let known = self.release;
        let force = force || known.is_some_and(|known| known.force);
        let wanted = Release { force, since_us: known.map_or(now, |known| known.since_us) };
        self.release = Some(wanted);
        known != Some(wanted)
    }

    /// There is a job, and not every node has a worker of its present run.
    pub(super) fn expects_workers(&self) -> bool {
        let here = self.claims.iter().filter(|claim| !self.earlier.contains(claim)).count();
        !self.is_over() && self.job.is_some() && here < self.nodes as usize
    }

    /// True when somebody claimed a node who was not there before, or has ended since.
    pub(super) fn claimed(&mut self, claims: Vec<Claim>) -> bool {
        let news = self.claims != claims;
        self.claims = claims;
        news
    }

    /// A worker has ended although its job runs, as far as is known.
    pub(super) fn has_ends(&self) -> bool {
        self.claims.iter().any(|claim| claim.end.is_some())
    }

    /// A release comes before the submission: then there is nothing to end, once the queue was seen without it.
    pub(super) fn end_if_never_submitted(&mut self, now: Micros) -> bool {
        if self.release.is_some() && matches!(self.phase, Phase::Wanted { looked: true, .. }) {
            self.finish(now, "CANCELLED", "released before it was submitted".to_owned(), true);
            return true;
        }
        false
    }

    pub(super) fn submit_due(&self) -> Option<u32> {
        let due = self.release.is_none() && matches!(self.phase, Phase::Wanted { looked: true, .. });
        due.then_some(self.submission)
    }

    pub(super) fn submitting(&mut self, now: Micros) {
        self.phase = Phase::Submitting { begun: now };
    }

    pub(super) fn want_again(&mut self, now: Micros) {
        self.phase = Phase::Wanted { since: now + WANT_AGAIN, looked: false };
    }

    pub(super) fn unsure(&mut self, begun: Micros, why: String) {
        self.phase = Phase::Unsure { begun, why, denied: false, asked: 0 };
    }

    pub(super) fn refused(&mut self, now: Micros, failure: &Failure) {
        self.finish(now, "FAILED", failure.message.clone(), false);
    }

    pub(super) fn hold(&mut self, now: Micros, id: u64) {
        self.phase = Phase::Held { since: now };
        self.job = Some(Job {
            id,
            state: JobState::parse("PENDING"),
            since_us: now,
            began_us: None,
            reason: String::new(),
            hosts: String::new(),
            starts: String::new(),
            ran: false,
            seen: false,
        });
    }

    /// The job that is to be told to end now, and whether at once.
    pub(super) fn cancel_due(&self, now: Micros) -> Option<(u64, bool)> {
        let release = self.release?;
        if !matches!(self.phase, Phase::Held { .. }) {
            return None;
        }
        let job = self.job.as_ref()?;
        let due = self.told.is_none_or(|told| told + self.cancel_pause(release, job) <= now);
        // A job without nodes takes no signals, and the first word is always an orderly one.
        let kill = release.force && self.told.is_some() && !matches!(job.state.class(), Class::Waiting);
        due.then_some((job.id, kill))
    }

    fn cancel_pause(&self, release: Release, job: &Job) -> Micros {
        match job.state.class() {
            _ if release.force && self.told.is_some_and(|told| told < release.since_us + KILL_AFTER) => KILL_AFTER,
            Class::Ending => CANCEL_ENDING_AGAIN,
            _ => CANCEL_AGAIN,
        }
    }

    pub(super) fn cancelling(&mut self, now: Micros) {
        self.told = Some(now);
    }

    /// The job that the queue no longer has, when it is to be asked for elsewhere.
    pub(super) fn missing_due(&self, now: Micros) -> Option<u64> {
        match self.phase {
            Phase::Missing { next, .. } if next <= now => self.job_id(),
            _ => None,
        }
    }

    pub(super) fn history_is_exhausted(&self) -> bool {
        matches!(self.phase, Phase::Missing { tries, .. } if usize::from(tries) >= HISTORY_AT.len())
    }

    /// The submission that the history is to deny or to know.
    pub(super) fn denial_due(&self, now: Micros, settings: &Settings) -> Option<u32> {
        match self.phase {
            Phase::Unsure { begun, denied: false, asked, .. }
                if begun + settings.horizon <= now && asked + HISTORY_AT[1] <= now =>
            {
                Some(self.submission)
            }
            _ => None,
        }
    }

    pub(super) fn asking_history(&mut self, now: Micros) {
        match &mut self.phase {
            Phase::Missing { since, tries, next } if *next <= now => {
                *tries = tries.saturating_add(1);
                let pause = HISTORY_AT.get(usize::from(*tries)).copied().unwrap_or(HISTORY_AT[2] + SECOND);
                *next = (*since + pause).max(now + HISTORY_AT[0]);
            }
            Phase::Unsure { asked, .. } => *asked = now,
            _ => {}
        }
    }

    pub(super) fn ask_later(&mut self, now: Micros) {
        if let Phase::Missing { next, .. } = &mut self.phase {
            *next = now + SHOW_AGAIN;
        }
    }

    pub(super) fn deadline(&self, settings: &Settings, history_from: Micros) -> Option<Micros> {
        match &self.phase {
            Phase::Over(over) => Some(over.at_us + settings.keep_over),
            Phase::Missing { next, .. } => Some(*next),
            Phase::Unsure { begun, denied: false, asked, .. } => {
                Some((begun + settings.horizon).max(asked + HISTORY_AT[1]).max(history_from))
            }
            Phase::Held { .. } => {
                let (release, job) = (self.release?, self.job.as_ref()?);
                Some(self.told.map_or(release.since_us, |told| told + self.cancel_pause(release, job)))
            }
            _ => None,
        }
    }

    /// The queue was seen, by a look that began at `begun`. `ours` are the jobs in it that carry the swarm's mark.
    pub(super) fn looked(
        &mut self,
        now: Micros,
        begun: Micros,
        ours: &[(&Tag, &Queued)],
        whole: bool,
        settings: &Settings,
    ) -> News {
        let mut news = News::default();
        if self.is_over() || matches!(self.phase, Phase::Submitting { .. }) {
            // Over: a job of an earlier submission may still turn up. Submitting: the answer is on its way.
            if self.is_over() {
                news.superseded = living(ours).map(|(_, job)| job.id).collect();
            }
            return news;
        }
        let mine = match self.job_id() {
            // The same submission under another id is the same job: clusters of a federation pass jobs on.
            Some(id) => ours
                .iter()
                .find(|(_, job)| job.id == id)
                .or_else(|| living(ours).find(|(tag, _)| tag.submission == self.submission)),
            // The newest of them; of two with the same number, which cannot be, the first.
            None => ours.iter().max_by_key(|(tag, job)| (tag.submission, std::cmp::Reverse(job.id))),
        };
        news.superseded = living(ours)
            .filter(|(_, job)| mine.is_none_or(|(_, mine)| mine.id != job.id))
            .map(|(_, job)| job.id)
            .collect();
        match mine {
            Some((tag, job)) => self.found(now, tag, job, &mut news),
            None if whole => self.not_found(now, begun, settings, &mut news),
            None => {}
        }
        news
    }

    fn found(&mut self, now: Micros, tag: &Tag, seen: &Queued, news: &mut News) {
        if self.job.is_none() {
            self.hold(now, seen.id);
            self.submission = tag.submission;
            (news.held, news.store) = (true, true);
            news.progress.push(("slurm_setup", format!("job {} is in the queue", seen.id)));
        } else if matches!(self.phase, Phase::Missing { .. }) {
            self.phase = Phase::Held { since: now };
            news.changed = true;
        }
        let Some(job) = &mut self.job else { return };
        let before = job.clone();
        job.id = seen.id;
        if job.state != seen.state {
            if job.ran && seen.state.class() == Class::Waiting {
                self.earlier.clone_from(&self.claims);
            }
            job.state = seen.state.clone();
            job.since_us = now;
        }
        match seen.state.class() {
            Class::Waiting | Class::Preparing => job.began_us = None,
            Class::Running => _ = job.began_us.get_or_insert(now),
            _ => {}
        }
        job.reason.clone_from(&seen.reason);
        job.hosts.clone_from(&seen.hosts);
        job.starts.clone_from(&seen.starts);
        job.seen = true;
        if matches!(seen.state.class(), Class::Running | Class::Halted | Class::Ending) {
            if !job.ran && seen.state.class() == Class::Running {
                news.progress.push(("slurm_setup", format!("job {} runs on {}", job.id, job.hosts)));
            }
            job.ran = true;
        }
        // What a restarted allocator needs; the rest it sees by itself.
        news.store |=
            before.ran != job.ran || before.seen != job.seen || before.id != job.id || before.state != job.state;
        news.changed |= before != *job;
        if let Class::Over(ending) = seen.state.class() {
            let reason = job.reason.clone();
            self.ended(now, &seen.state, ending, &reason);
            news.store = true;
        }
    }

    fn not_found(&mut self, now: Micros, begun: Micros, settings: &Settings, news: &mut News) {
        match &mut self.phase {
            Phase::Wanted { since, looked } if begun >= *since => {
                *looked = true;
                news.changed = true;
            }
            Phase::Unsure { begun: submitted, denied, .. } => {
                let over = *submitted + settings.horizon;
                if (*denied && begun >= over) || begun >= over + settings.quiet {
                    // It surely came to nothing. A number is never used twice.
                    self.submission += 1;
                    self.want_again(now);
                    (news.store, news.changed) = (true, true);
                }
            }
            // A look that began before the acknowledgement may have been answered before it.
            Phase::Held { since } if begun >= *since => {
                if self.release.is_some() {
                    let word = JobState::parse("CANCELLED");
                    self.ended(now, &word, Ending::Cancelled, "");
                } else {
                    self.phase = Phase::Missing { since: now, tries: 0, next: now + HISTORY_AT[0] };
                }
                (news.store, news.changed) = (true, true);
            }
            _ => {}
        }
    }

    /// The history has something on the job. True when that changed something.
    pub(super) fn past(&mut self, now: Micros, past: &Past) -> bool {
        let Class::Over(ending) = past.state.class() else { return false };
        if !matches!(self.phase, Phase::Missing { .. }) {
            return false;
        }
        self.ended(now, &past.state, ending, &exit_words(&past.exit));
        true
    }

    /// The history knows the submission whose outcome is not known, or does not.
    pub(super) fn history_said(&mut self, now: Micros, begun: Micros, row: Option<&Past>, settings: &Settings) -> bool {
        let Phase::Unsure { begun: submitted, denied, .. } = &mut self.phase else { return false };
        match row {
            Some(row) => {
                self.hold(now, row.id);
                if let Class::Over(ending) = row.state.class() {
                    self.ended(now, &row.state, ending, &exit_words(&row.exit));
                }
                true
            }
            None if begun >= *submitted + settings.horizon => {
                *denied = true;
                true
            }
            None => false,
        }
    }

    /// The controller has something on the job, or nothing: then nobody knows how it ended.
    pub(super) fn shown(&mut self, now: Micros, past: Option<&Past>) {
        if !matches!(self.phase, Phase::Missing { .. }) {
            return;
        }
        match past.map(|past| (past, past.state.class())) {
            Some((past, Class::Over(ending))) => self.ended(now, &past.state, ending, &exit_words(&past.exit)),
            // It lives after all, under another name perhaps: so long nothing has ended.
            Some(_) => self.ask_later(now),
            None => {
                let id = self.job_id().unwrap_or_default();
                let reason = format!(
                    "lost: the queue no longer has job {id}, and neither sacct nor scontrol know how it ended; its workers' \
                     last words are in `drover events`"
                );
                self.finish(now, "UNKNOWN", reason, false);
            }
        }
    }

    fn ended(&mut self, now: Micros, state: &JobState, ending: Ending, more: &str) {
        let words = state.words();
        let why = match (words.is_empty(), more.is_empty() || more == "None") {
            (true, true) => String::new(),
            (true, false) => more.to_owned(),
            (false, true) => words,
            (false, false) => format!("{words} ({more})"),
        };
        let asked = self.release.is_some();
        let reason = match ending {
            Ending::Cancelled | Ending::Completed if asked => "released".to_owned(),
            _ if asked => format!("released; {why}"),
            // Workers that are told beforehand are gone in order, and then Slurm knows of no limit.
            Ending::Completed => match self.time_is_up(now) {
                Some(limit) => format!(
                    "its time limit of {limit} was reached: its workers had been told, and ended in order before it"
                ),
                None => "its workers have ended".to_owned(),
            },
            Ending::Failed if let Some(limit) = self.time_is_up(now) => {
                format!(
                    "its time limit of {limit} was near: its workers had been told, and not all ended in order; {why}"
                )
            }
            _ if why.is_empty() => "its job has ended".to_owned(),
            _ => why,
        };
        self.finish(now, state.as_str(), reason, asked || ending != Ending::Failed);
    }

    /// The time limit, when the job has run so long that its workers were told of its end, as far as was seen.
    fn time_is_up(&self, now: Micros) -> Option<String> {
        let (limit, began) = (self.limit?, self.job.as_ref()?.began_us?);
        (began + limit <= now + TOLD_BEFORE).then(|| walltime::words(Duration::from_micros(limit)))
    }

    fn finish(&mut self, now: Micros, word: &str, reason: String, well: bool) {
        if let Some(job) = &mut self.job {
            job.state = JobState::parse(word);
        }
        self.phase = Phase::Over(Over { at_us: now, word: word.to_owned(), reason, well });
    }
}

fn living<'a>(ours: &'a [(&'a Tag, &'a Queued)]) -> impl Iterator<Item = &'a (&'a Tag, &'a Queued)> {
    ours.iter().filter(|(_, job)| !matches!(job.state.class(), Class::Over(_) | Class::Ending))
}

fn exit_words(exit: &str) -> String {
    match exit.split_once(':') {
        Some(("0", "0")) | None => String::new(),
        Some((code, "0")) => format!("exit code {code}"),
        Some((_, signal)) => format!("signal {signal}"),
    }
}

/// What a refused submission says.
pub(crate) fn refusal(why: &str) -> Failure {
    Failure::new(ErrorCode::LaunchFailed, format!("Slurm refused the job: {why}"))
}
