//! A suspicion runs from its longest to its shortest time as others confirm it.

use std::time::Duration;

use super::record::NodeKey;
use super::settings::Settings;
use super::time::Time;

#[derive(Debug)]
pub(super) struct Suspicion {
    start: Time,
    shortest: Duration,
    longest: Duration,
    /// How many others have to confirm it for it to be as short as it gets.
    wanted: usize,
    /// Nobody counts twice; the first is who raised it.
    accusers: Vec<NodeKey>,
    /// When it ends, as it stands.
    pub(super) deadline: Time,
    /// The host refuses connections.
    pub(super) refused: bool,
    /// Others have been asked whether they know better.
    pub(super) asked: bool,
}

impl Suspicion {
    pub(super) fn new(now: Time, settings: &Settings, members: usize, accuser: NodeKey, refused: bool) -> Self {
        let (shortest, longest) = settings.silent_suspicion(members);
        // Among two nobody is left to confirm.
        let wanted = members.saturating_sub(2).min(Settings::CONFIRMATIONS);
        let longest = if wanted == 0 { shortest * 3 / 2 } else { longest };
        let mut suspicion = Self {
            start: now,
            wanted,
            shortest,
            longest,
            accusers: vec![accuser],
            deadline: now + longest,
            refused: false,
            asked: false,
        };
        if refused {
            suspicion.refuse(now, settings);
        }
        suspicion
    }

    /// Another member could not reach it either. Says whether that counts.
    pub(super) fn confirm(&mut self, accuser: NodeKey) -> bool {
        if self.accusers.len() > self.wanted || self.accusers.contains(&accuser) {
            return false;
        }
        self.accusers.push(accuser);
        let confirmations = (self.accusers.len() - 1) as f64;
        let share = (confirmations + 1.0).ln() / (self.wanted as f64 + 1.0).ln();
        let span = self.longest.saturating_sub(self.longest.saturating_sub(self.shortest).mul_f64(share.min(1.0)));
        self.deadline = self.deadline.min(self.start + span.max(self.shortest));
        true
    }

    /// The host refuses connections. Says whether that is new.
    pub(super) fn refuse(&mut self, now: Time, settings: &Settings) -> bool {
        let new = !self.refused;
        self.refused = true;
        if new {
            self.deadline = self.deadline.min(now + settings.refused_suspicion());
        }
        new
    }

    /// This node has not been running: what it did not hear meanwhile was not silence.
    pub(super) fn shift(&mut self, lag: Duration) {
        self.start = self.start + lag;
        self.deadline = self.deadline + lag;
    }

    /// Nobody has confirmed it.
    pub(super) fn is_alone(&self) -> bool {
        self.accusers.len() < 2
    }

    pub(super) fn started(&self) -> Time {
        self.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn confirmations_shorten_it_down_to_the_shortest_and_nobody_counts_twice() {
        let settings = Settings::default();
        let mut suspicion = Suspicion::new(Time::ZERO, &settings, 30, NodeKey(1), false);
        let (shortest, longest) = settings.silent_suspicion(30);
        assert_eq!(suspicion.deadline, Time::ZERO + longest);
        assert!(!suspicion.confirm(NodeKey(1)));
        let mut last = suspicion.deadline;
        for key in 2..=4 {
            assert!(suspicion.confirm(NodeKey(key)));
            assert!(suspicion.deadline < last);
            last = suspicion.deadline;
        }
        assert_eq!(last, Time::ZERO + shortest);
        assert!(!suspicion.confirm(NodeKey(5)));
        assert!(shortest > Duration::from_millis(3100), "a process stopped for three periods could not answer");
    }
}
