//! Callers of streaming calls: who waits for what.

use std::collections::HashMap;

use drover_types::Failure;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;

use crate::core::effects::{Step, Token, Topic};

/// Where the steps of one call go.
pub(crate) type Steps = mpsc::Sender<Step>;

struct Waiter {
    steps: Steps,
    /// How many prompts still have to reach their node; others wait for the last step of their topic.
    expect: usize,
}

impl Waiter {
    /// Tells the caller, and says whether it goes on waiting. Nobody ever waits for a caller: one that does not read
    /// misses progress, and is let go when what matters does not fit either.
    fn tell(&mut self, step: &Step) -> bool {
        let progress = !step.is_last() && !matches!(step, Step::Inject(_));
        if progress && self.steps.capacity() <= 1 {
            return !self.steps.is_closed();
        }
        match self.steps.try_send(step.clone()) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Closed(_)) => return false,
        }
        if step.ends_delivery() {
            self.expect = self.expect.saturating_sub(1);
        }
        !step.is_last() && self.expect > 0
    }
}

/// Everybody who waits.
#[derive(Default)]
pub(crate) struct Waiters {
    topics: HashMap<Topic, Vec<Waiter>>,
}

impl Waiters {
    /// Tells a caller what was, and lets it wait for the rest.
    pub(crate) fn attach(&mut self, steps: Steps, topic: Topic, backlog: &[Step], expect: usize) {
        // `expect` is what is left behind the backlog.
        let done = backlog.iter().filter(|step| step.ends_delivery()).count();
        let mut waiter = Waiter { steps, expect: expect.saturating_add(done) };
        let mut goes_on = expect > 0;
        for step in backlog {
            goes_on = waiter.tell(step) && expect > 0;
        }
        if goes_on {
            self.topics.entry(topic).or_default().push(waiter);
        }
    }

    /// Tells everybody who waits for a topic.
    pub(crate) fn step(&mut self, topic: &Topic, step: &Step) {
        let Some(waiters) = self.topics.get_mut(topic) else { return };
        waiters.retain_mut(|waiter| waiter.tell(step));
        if waiters.is_empty() {
            self.topics.remove(topic);
        }
    }

    /// Forgets callers that have left.
    pub(crate) fn forget_gone(&mut self) {
        self.topics.retain(|_, waiters| {
            waiters.retain(|waiter| !waiter.steps.is_closed());
            !waiters.is_empty()
        });
    }

    /// Tells everybody the same failure, and waits for nothing any more.
    pub(crate) fn fail_all(&mut self, failure: &Failure) {
        for waiter in self.topics.drain().flat_map(|(_, waiters)| waiters) {
            let _ = waiter.steps.try_send(Step::Fail(failure.clone()));
        }
    }
}

/// Who made a call of the batch at hand.
pub(crate) struct Callers<T> {
    next: Token,
    waiting: HashMap<Token, T>,
}

impl<T> Default for Callers<T> {
    fn default() -> Self {
        Self { next: 0, waiting: HashMap::new() }
    }
}

impl<T> Callers<T> {
    pub(crate) fn add(&mut self, caller: T) -> Token {
        self.next += 1;
        self.waiting.insert(self.next, caller);
        self.next
    }

    pub(crate) fn take(&mut self, token: Token) -> Option<T> {
        self.waiting.remove(&token)
    }

    pub(crate) fn take_all(&mut self) -> Vec<T> {
        self.waiting.drain().map(|(_, caller)| caller).collect()
    }
}
