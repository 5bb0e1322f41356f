//! What is wrong with the node's membership, brought together from the daemon's own words and from how it fares.

use drover_proto::membership::Note;
use serde_json::{Value, json};

/// The daemon cannot be kept running.
const NOT_RUNNING: &str = "not_running";

/// Knows what was written last.
#[derive(Debug, Default)]
pub(super) struct Notes {
    daemon: Vec<Note>,
    own: Option<Note>,
    told: Vec<(String, String, bool)>,
}

impl Notes {
    /// What the daemon says of itself.
    pub(super) fn daemon(&mut self, notes: Vec<Note>) {
        self.daemon = notes;
    }

    /// The daemon ended, so many times in a row.
    pub(super) fn ended(&mut self, now_us: u64, times: u32, why: &str) {
        let count = self.own.as_ref().map_or(0, |note| note.count) + 1;
        self.own = Some(Note {
            code: NOT_RUNNING.to_owned(),
            message: format!(
                "the membership daemon ended {times} times in a row and is tried again; the agent goes on without it: {why}"
            ),
            hint: "look at membership.log in the node's directory, and at swarm.bind_addr, swarm.bind_port and swarm.listen"
                .to_owned(),
            count,
            last_us: now_us,
            current: true,
        });
    }

    /// The daemon runs.
    pub(super) fn runs(&mut self) {
        if let Some(note) = &mut self.own {
            note.current = false;
        }
    }

    /// The data of a `membership_notes` record, when it would say something new.
    pub(super) fn take(&mut self) -> Option<Value> {
        // Of a daemon that does not run nothing holds any more but that.
        let down = self.own.as_ref().is_some_and(|note| note.current);
        let all: Vec<Note> = self
            .own
            .iter()
            .cloned()
            .chain(self.daemon.iter().cloned().map(|note| Note { current: note.current && !down, ..note }))
            .collect();
        // How often something failed so far stands in the words; that alone is no news.
        let plain = |note: &Note| note.message.chars().filter(|c| !c.is_ascii_digit()).collect::<String>();
        let said: Vec<_> = all.iter().map(|note| (note.code.clone(), plain(note), note.current)).collect();
        if said == self.told {
            return None;
        }
        self.told = said;
        let notes: Vec<Value> = all
            .iter()
            .map(|note| {
                json!({
                    "code": note.code, "message": note.message, "hint": note.hint, "count": note.count,
                    "last_us": note.last_us, "current": note.current,
                })
            })
            .collect();
        Some(json!({ "notes": notes }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_told_when_they_change() {
        let mut notes = Notes::default();
        assert_eq!(notes.take(), None, "nothing is wrong");
        notes.ended(1, 3, "cannot listen");
        let told = notes.take().unwrap();
        assert_eq!((&told["notes"][0]["code"], &told["notes"][0]["current"]), (&json!(NOT_RUNNING), &json!(true)));
        notes.ended(2, 4, "cannot listen");
        assert_eq!(notes.take(), None);
        notes.runs();
        let seed = |attempts: u32| Note {
            code: "seed_unreachable".to_owned(),
            message: format!("tried {attempts} times"),
            current: true,
            ..Note::default()
        };
        notes.daemon(vec![seed(8)]);
        let told = notes.take().unwrap();
        let current: Vec<_> = told["notes"].as_array().unwrap().iter().map(|note| note["current"].clone()).collect();
        assert_eq!(current, [false, true]);
        notes.daemon(vec![seed(16)]);
        assert_eq!(notes.take(), None);
    }
}
