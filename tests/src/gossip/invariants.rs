//! What must hold, judged from outside: from what was done to the nodes and from the events that they told. The judge never looks
//! into a node, so that a node that believes one thing and tells another is found out.

use std::collections::BTreeMap;
use std::time::Duration;

use drover_membership::core::{Cause, Event, NodeKey, Time};

/// What an observer has told of a subject so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Told {
    #[default]
    Nothing,
    Up,
    Suspect,
    Gone,
}

/// A subject's process, as it really is.
#[derive(Debug, Default)]
struct Truth {
    /// Boots in the order of their starts; an observer's word is kept as an index into it.
    boots: Vec<u64>,
    running: bool,
    /// When the present boot started.
    started: Time,
    /// When it was killed or said good-bye.
    ended: Time,
    left: bool,
    /// Start of the present stop, and the time until which a longer stop than the promised one excuses a verdict.
    stopped: Option<Time>,
    excused_until: Time,
    /// The last stop: its start and its end. Stops with hardly a breath between them count as one.
    last_stop: Option<(Time, Time)>,
    /// Boots that said good-bye.
    farewells: Vec<u64>,
}

/// One kill and who has told of it.
#[derive(Debug)]
struct Kill {
    subject: usize,
    at: Time,
    /// Observers that have not told yet.
    waiting: Vec<usize>,
    first: Option<Time>,
    last: Time,
    /// Longest time allowed.
    bound: Duration,
}

/// What came of the kills.
#[derive(Debug, Default, Clone)]
pub struct Verdict {
    /// Time from each kill until the first and until the last survivor told of it.
    pub detected: Vec<(Duration, Duration)>,
    /// Dead verdicts on processes that ran.
    pub false_downs: u64,
    /// Suspicions of processes that ran.
    pub false_suspicions: u64,
    /// Everything that must not be, in words.
    pub broken: Vec<String>,
}

/// Keeps what was done and what was told.
#[derive(Debug)]
pub struct Judge {
    index: BTreeMap<NodeKey, usize>,
    truth: Vec<Truth>,
    /// By observer and subject: what was told, of which boot.
    told: Vec<Vec<(Told, u8)>>,
    kills: Vec<Kill>,
    /// Nodes were cut off from each other until then: verdicts are not wrong before.
    cut_until: Time,
    verdict: Verdict,
}

/// Longest stop after which a node must still not have been given up.
const PROMISED_STOP: Duration = Duration::from_millis(3050);
/// A node that comes up or answers late may be spoken of as it was for so long.
const GRACE: Duration = Duration::from_secs(8);
/// A process has to run for so long between two stops for them to be two.
const BREATH: Duration = Duration::from_millis(450);
/// A node that ended so long ago has been removed everywhere.
const REMOVED: Duration = Duration::from_secs(45);

impl Judge {
    /// Nobody yet.
    pub fn new() -> Self {
        Self {
            index: BTreeMap::new(),
            truth: Vec::new(),
            told: Vec::new(),
            kills: Vec::new(),
            cut_until: Time::ZERO,
            verdict: Verdict::default(),
        }
    }

    /// A node has been started, for the first time or again.
    pub fn started(&mut self, now: Time, node: usize, key: NodeKey, boot: u64) {
        while self.truth.len() <= node {
            self.truth.push(Truth::default());
            self.told.push(Vec::new());
        }
        self.index.insert(key, node);
        let truth = &mut self.truth[node];
        truth.boots.push(boot);
        truth.running = true;
        truth.left = false;
        truth.started = now;
        truth.stopped = None;
        truth.last_stop = None;
        // A new process knows nobody.
        self.told[node].clear();
        // Who never told of the kill tells of the restart instead.
        for kill in &mut self.kills {
            if kill.subject == node {
                kill.waiting.clear();
            }
            kill.waiting.retain(|observer| *observer != node);
        }
    }

    /// The process went above a boot that it found under its own name.
    pub fn reboot(&mut self, node: usize, boot: u64) {
        if self.truth[node].boots.last() != Some(&boot) {
            self.truth[node].boots.push(boot);
        }
    }

    /// A node has been killed; every observer that knew it must tell so within `bound`.
    pub fn killed(&mut self, now: Time, node: usize, bound: Duration) {
        self.end(now, node);
        let waiting = (0..self.truth.len())
            .filter(|observer| {
                let truth = &self.truth[*observer];
                truth.running
                    && truth.stopped.is_none()
                    && matches!(self.heard(*observer, node).0, Told::Up | Told::Suspect)
            })
            .collect();
        self.kills.push(Kill { subject: node, at: now, waiting, first: None, last: now, bound });
    }

    /// A node says good-bye.
    pub fn leaving(&mut self, now: Time, node: usize) {
        let truth = &mut self.truth[node];
        truth.left = true;
        truth.ended = now;
        truth.farewells.extend(truth.boots.last());
    }

    /// A node's process has ended.
    pub fn end(&mut self, now: Time, node: usize) {
        self.truth[node].running = false;
        self.truth[node].ended = now;
        for kill in &mut self.kills {
            kill.waiting.retain(|observer| *observer != node);
        }
    }

    /// A process has been stopped. It cannot tell anything meanwhile.
    pub fn stopped(&mut self, now: Time, node: usize) {
        let truth = &mut self.truth[node];
        let since = truth.last_stop.filter(|(_, end)| now.since(*end) < BREATH).map_or(now, |(start, _)| start);
        truth.stopped = Some(since);
        for kill in &mut self.kills {
            kill.waiting.retain(|observer| *observer != node);
        }
    }

    /// A stopped process runs again.
    pub fn resumed(&mut self, now: Time, node: usize) {
        let truth = &mut self.truth[node];
        if let Some(since) = truth.stopped.take() {
            truth.last_stop = Some((since, now));
            if now.since(since) > PROMISED_STOP {
                truth.excused_until = now + GRACE;
            }
        }
    }

    /// Nodes cannot reach each other until then.
    pub fn cut(&mut self, until: Time) {
        self.cut_until = self.cut_until.max(until + GRACE);
    }

    fn heard(&self, observer: usize, subject: usize) -> (Told, u8) {
        self.told[observer].get(subject).copied().unwrap_or_default()
    }

    fn say(&mut self, what: String) {
        if self.verdict.broken.len() < 50 {
            self.verdict.broken.push(what);
        }
    }

    /// An observer has told of something.
    pub fn event(&mut self, now: Time, observer: usize, event: &Event) {
        let (record, next) = match event {
            Event::Joined(record) | Event::Alive(record) | Event::Updated(record) => (record, Told::Up),
            Event::Suspect(record) => (record, Told::Suspect),
            Event::Left { record, .. } => (record, Told::Gone),
            Event::Load { .. } => return,
        };
        let Some(subject) = self.index.get(&record.key).copied() else {
            self.say(format!("{now:?}: {observer} tells of {record:?}, which never was"));
            return;
        };
        let boot = record.record.boot;
        let Some(generation) = self.truth[subject].boots.iter().position(|known| *known == boot) else {
            self.say(format!("{now:?}: {observer} tells of a boot {boot} of {subject} that never was"));
            return;
        };
        let (before, last) = self.heard(observer, subject);
        let sane = match event {
            Event::Joined(_) => matches!(before, Told::Nothing | Told::Gone),
            Event::Alive(_) => before == Told::Suspect,
            Event::Suspect(_) => before == Told::Up,
            Event::Updated(_) | Event::Left { .. } => matches!(before, Told::Up | Told::Suspect),
            Event::Load { .. } => true,
        };
        // A node that comes up under a clock that was set back is known by an older process until it has gone above it.
        let settled = now.since(self.truth[subject].started) > GRACE;
        let backwards = before != Told::Nothing && generation < usize::from(last) && settled;
        if !sane || backwards {
            self.say(format!("{now:?}: {observer} tells {event:?} of {subject} after {before:?} of generation {last}"));
        }
        if self.told[observer].len() < self.truth.len() {
            let nodes = self.truth.len();
            self.told[observer].resize(nodes, (Told::Nothing, 0));
        }
        let updated = matches!(event, Event::Updated(_)) && before == Told::Suspect;
        self.told[observer][subject] = (if updated { before } else { next }, generation as u8);
        match event {
            Event::Joined(_) => self.judge_join(now, observer, subject, generation, before),
            Event::Suspect(_) if self.is_well(now, subject, generation) => self.verdict.false_suspicions += 1,
            Event::Left { cause, .. } => self.judge_left(now, observer, subject, generation, *cause),
            _ => {}
        }
    }

    /// Runs, and nothing excuses a verdict against it.
    fn is_well(&self, now: Time, subject: usize, generation: usize) -> bool {
        let truth = &self.truth[subject];
        truth.running
            && !truth.left
            && generation + 1 == truth.boots.len()
            && now > self.cut_until
            && now > truth.excused_until
            && truth.stopped.is_none_or(|since| now.since(since) <= PROMISED_STOP)
    }

    fn judge_join(&mut self, now: Time, observer: usize, subject: usize, generation: usize, before: Told) {
        let truth = &self.truth[subject];
        let over = !truth.running || generation + 1 < truth.boots.len();
        let long = now.since(truth.ended.max(truth.started)) > REMOVED;
        if over && before == Told::Gone && long && now > self.cut_until {
            self.say(format!("{now:?}: {observer} brings back {subject}, which ended at {:?}", truth.ended));
        }
    }

    fn judge_left(&mut self, now: Time, observer: usize, subject: usize, generation: usize, cause: Cause) {
        let boot = self.truth[subject].boots.get(generation);
        if cause == Cause::Left && !boot.is_some_and(|boot| self.truth[subject].farewells.contains(boot)) {
            self.say(format!("{now:?}: {observer} tells that {subject} left, and it did not"));
        }
        if cause == Cause::Dead && self.is_well(now, subject, generation) {
            self.verdict.false_downs += 1;
            let truth = &self.truth[subject];
            let text = format!("{now:?}: {observer} gives up {subject}, which runs (stopped {:?})", truth.stopped);
            self.say(text);
        }
        for kill in self.kills.iter_mut().filter(|kill| kill.subject == subject) {
            if let Some(at) = kill.waiting.iter().position(|waiting| *waiting == observer) {
                kill.waiting.swap_remove(at);
                kill.first.get_or_insert(now);
                kill.last = now;
            }
        }
        self.settle(now);
    }

    /// Closes kills that all have told of, and those that are over time.
    pub fn settle(&mut self, now: Time) {
        let mut at = 0;
        while let Some(kill) = self.kills.get(at) {
            if kill.waiting.is_empty() {
                if let Some(first) = kill.first {
                    self.verdict.detected.push((first.since(kill.at), kill.last.since(kill.at)));
                }
                self.kills.swap_remove(at);
            } else if now.since(kill.at) > kill.bound {
                let text =
                    format!("{now:?}: {:?} have not told of {} killed at {:?}", kill.waiting, kill.subject, kill.at);
                self.kills.swap_remove(at);
                self.say(text);
            } else {
                at += 1;
            }
        }
    }

    /// Whether every running node has told that exactly the running ones are there, in their newest boot.
    pub fn agrees(&self) -> bool {
        self.disagreement().is_none()
    }

    /// The first pair that speaks against [`Judge::agrees`].
    pub fn disagreement(&self) -> Option<String> {
        let there = |node: &usize| self.truth[*node].running && !self.truth[*node].left;
        for observer in (0..self.truth.len()).filter(there) {
            for subject in (0..self.truth.len()).filter(|subject| *subject != observer) {
                let (told, generation) = self.heard(observer, subject);
                let truth = &self.truth[subject];
                let newest = usize::from(generation) + 1 == truth.boots.len();
                let right = if there(&subject) {
                    told == Told::Up && newest
                } else {
                    matches!(told, Told::Nothing | Told::Gone)
                };
                if !right {
                    return Some(format!("{observer} says {told:?} of generation {generation} of {subject}"));
                }
            }
        }
        None
    }

    /// Ends the case.
    pub fn finish(mut self, now: Time) -> Verdict {
        self.settle(now);
        self.verdict
    }

    /// How the case stands.
    pub fn verdict(&self) -> &Verdict {
        &self.verdict
    }

    /// Who an observer has told to be there.
    pub fn view(&self, observer: usize) -> Vec<usize> {
        (0..self.truth.len())
            .filter(|subject| matches!(self.heard(observer, *subject).0, Told::Up | Told::Suspect))
            .collect()
    }
}

impl Default for Judge {
    fn default() -> Self {
        Self::new()
    }
}
