//! What keeps the daemon from its work, in words, for the log, the metrics and whoever asks.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::warn;

use crate::metrics::Metrics;

/// A note that was not repeated for so long, and of which nobody said that it is over, counts as over.
const STALE_US: u64 = 60_000_000;
/// The log repeats a note at most so often.
const LOG_AGAIN_US: u64 = 60_000_000;

/// One thing that is or was wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Note {
    /// Stable name.
    pub(crate) code: &'static str,
    /// What is wrong.
    pub(crate) message: String,
    /// What to do about it.
    pub(crate) hint: &'static str,
    /// How often it was noticed.
    pub(crate) count: u64,
    /// When last, in microseconds of Unix time.
    pub(crate) last_us: u64,
    /// It still holds, as far as we can tell.
    pub(crate) current: bool,
}

#[derive(Debug, Default)]
struct Kept {
    note: Option<Note>,
    logged_us: u64,
    /// Holds until it is taken back, however long that takes.
    lasting: bool,
}

/// All notes. Clones are the same ones.
#[derive(Debug, Clone)]
pub(crate) struct Notes {
    kept: Arc<Mutex<BTreeMap<&'static str, Kept>>>,
    metrics: Metrics,
}

/// What can be wrong, each with what to do about it.
const HINTS: &[(&str, &str)] = &[
    ("cannot_bind", "stop the other program, or set swarm.bind_addr and swarm.bind_port"),
    ("seed_unreachable", "check that a node runs there, that UDP passes, and swarm.discovery.join_addrs"),
    ("wrong_key", "give all nodes the same key ring: `drover keys list` on each shows which differ"),
    (
        "wrong_cluster",
        "the other node belongs to another drover instance: check the seeds, or launch it with this instance",
    ),
    ("clock_off", "set the clocks: certificates count as not yet valid or expired while they differ"),
    ("bad_certificate", "launch the other node again, so that it gets a certificate of this instance"),
    ("certificate_expired", "launch the node again, so that it gets a new certificate"),
    ("identity", "mend the files of the identity directory, or launch the node again; the certificate in force stays"),
    ("plaintext", "give the nodes identities and remove security.gossip_plaintext"),
    ("plaintext_peer", "give all nodes identities, or none and security.gossip_plaintext"),
    ("election", "free the disk or mend the file; other nodes elect without this one until it is started again"),
    ("ring", "check that the identity directory can be written: after a restart this node would have the old ring"),
    (
        "no_identity",
        "start through a launch, give --identity DIR, or set security.gossip_plaintext for a closed network",
    ),
    ("disabled", "set swarm.enabled to true"),
    ("snapshot", "check that the directory can be written: without it a restart needs a seed"),
    ("name_taken", "two nodes use one node id: give each its own"),
    ("stream_unreachable", "the node answers datagrams but not connections: check that TCP to its gRPC port passes"),
];

impl Notes {
    pub(crate) fn new(metrics: &Metrics) -> Self {
        Self { kept: Arc::default(), metrics: metrics.clone() }
    }

    fn kept(&self) -> MutexGuard<'_, BTreeMap<&'static str, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something was noticed, once more or for the first time.
    pub(crate) fn notice(&self, now_us: u64, code: &'static str, message: String) {
        self.put(now_us, code, message, false);
    }

    /// Something holds until [`Notes::over`] says that it does not.
    pub(crate) fn holds(&self, now_us: u64, code: &'static str, message: String) {
        self.put(now_us, code, message, true);
    }

    fn put(&self, now_us: u64, code: &'static str, message: String, lasting: bool) {
        let hint = HINTS.iter().find(|(known, _)| *known == code).map_or("", |(_, hint)| *hint);
        let mut all = self.kept();
        let kept = all.entry(code).or_default();
        let count = kept.note.as_ref().map_or(0, |note| note.count) + 1;
        let fresh = kept.note.as_ref().is_none_or(|note| !note.current);
        if fresh || now_us.saturating_sub(kept.logged_us) >= LOG_AGAIN_US {
            kept.logged_us = now_us;
            warn!(code, count, hint, "{message}");
        }
        kept.lasting = lasting;
        kept.note = Some(Note { code, message, hint, count, last_us: now_us, current: true });
        drop(all);
        self.metrics.note(code, true);
    }

    /// It holds no longer.
    pub(crate) fn over(&self, code: &'static str) {
        if let Some(note) = self.kept().get_mut(code).and_then(|kept| kept.note.as_mut()) {
            note.current = false;
            self.metrics.note(code, false);
        }
    }

    /// Every note, those that hold first.
    pub(crate) fn list(&self, now_us: u64) -> Vec<Note> {
        let mut all = self.kept();
        for (code, kept) in all.iter_mut() {
            let Some(note) = &mut kept.note else { continue };
            if note.current && !kept.lasting && now_us.saturating_sub(note.last_us) > STALE_US {
                note.current = false;
                self.metrics.note(code, false);
            }
        }
        let mut notes: Vec<Note> = all.values().filter_map(|kept| kept.note.clone()).collect();
        notes.sort_by_key(|note| (!note.current, note.code));
        notes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_ends_when_it_is_over_or_was_not_repeated() {
        let notes = Notes::new(&Metrics::default());
        notes.holds(1, "cannot_bind", "UDP 127.0.0.1:1 is in use".to_owned());
        notes.notice(1, "wrong_key", "a".to_owned());
        notes.notice(2, "wrong_key", "b".to_owned());
        let now = 2 + STALE_US;
        let held =
            |now| -> Vec<_> { notes.list(now).into_iter().map(|note| (note.code, note.count, note.current)).collect() };
        assert_eq!(held(now), [("cannot_bind", 1, true), ("wrong_key", 2, true)]);
        assert_eq!(held(now + 1), [("cannot_bind", 1, true), ("wrong_key", 2, false)]);
        notes.over("cannot_bind");
        assert!(notes.list(now).iter().all(|note| !note.current && !note.hint.is_empty()));
    }
}
