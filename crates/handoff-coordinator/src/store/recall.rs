//! What a node that serves a session has at hand of its texts: what turns that have not ended ask, what tools of the open turn have
//! answered, the last answers, and which files go with it. It is kept while lines are read or written, so that a session that arrives need
//! not be read again from its beginning while somebody waits for it.

use std::collections::{BTreeMap, VecDeque};

use drover_types::RequestId;

use crate::core::{Call, Turn};
use crate::session::{Outcome, Record};

/// Answers at hand, and their bytes; the newest is there whatever its size.
const ANSWERS: usize = 64;
const ANSWER_BYTES: usize = 1 << 20;

/// A turn that is accepted and not ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// What its asker calls it.
    pub request: RequestId,
    /// What is asked.
    pub text: String,
}

/// What is at hand of one log.
#[derive(Debug, Default)]
pub struct Recall {
    prompts: BTreeMap<Turn, Prompt>,
    calls: BTreeMap<Call, (String, Option<String>)>,
    answers: VecDeque<(Turn, Outcome)>,
    answer_bytes: usize,
    files: Option<String>,
}

impl Recall {
    /// Takes the next record.
    pub(super) fn take(&mut self, record: Record) {
        match record {
            Record::Accepted { turn, request, prompt, .. } => {
                self.prompts.insert(turn, Prompt { request, text: prompt });
            }
            Record::Called { call, what } => {
                self.calls.insert(call, (what, None));
            }
            Record::Returned { call, result } => {
                if let Some((_, kept)) = self.calls.get_mut(&call) {
                    *kept = Some(result);
                }
            }
            Record::Ended { turn, outcome, .. } => {
                self.prompts.remove(&turn);
                self.calls.clear();
                self.answer_bytes += bytes(&outcome);
                self.answers.push_back((turn, outcome));
                while self.answers.len() > ANSWERS || (self.answers.len() > 1 && self.answer_bytes > ANSWER_BYTES) {
                    let Some((_, oldest)) = self.answers.pop_front() else { break };
                    self.answer_bytes -= bytes(&oldest);
                }
            }
            Record::Files { manifest } => self.files = Some(manifest),
            _ => {}
        }
    }

    /// What a turn asks that has not ended.
    pub fn prompt(&self, turn: Turn) -> Option<&Prompt> {
        self.prompts.get(&turn)
    }

    /// What a call of the open turn is to do.
    pub fn call(&self, call: Call) -> Option<&str> {
        self.calls.get(&call).map(|(what, _)| what.as_str())
    }

    /// What a call of the open turn has answered.
    pub fn result(&self, call: Call) -> Option<&str> {
        self.calls.get(&call).and_then(|(_, result)| result.as_deref())
    }

    /// How a turn ended, when it is one of the last.
    pub fn answer(&self, turn: Turn) -> Option<&Outcome> {
        self.answers.iter().rev().find(|(of, _)| *of == turn).map(|(_, outcome)| outcome)
    }

    /// The manifest of the working directory after the last turn.
    pub fn files(&self) -> Option<&str> {
        self.files.as_deref()
    }
}

fn bytes(outcome: &Outcome) -> usize {
    match outcome {
        Outcome::Answer(text) => text.len(),
        Outcome::Failed { message, .. } => message.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(number: u32, answer: &str) -> [Record; 2] {
        let (turn, request) = (Turn(number), format!("r{number}").parse().unwrap());
        [
            Record::Accepted { turn, request, prompt: format!("prompt {number}"), at_us: 0 },
            Record::Ended { turn, outcome: Outcome::Answer(answer.to_owned()), at_us: 0 },
        ]
    }

    #[test]
    fn what_waits_is_at_hand_and_what_is_answered_is_for_a_while() {
        let mut recall = Recall::default();
        for number in 0..200 {
            let [asked, answered] = turn(number, "short");
            recall.take(asked);
            assert_eq!(recall.prompt(Turn(number)).unwrap().text, format!("prompt {number}"));
            let call = Call { turn: Turn(number), n: 0 };
            recall.take(Record::Called { call, what: "tool".to_owned() });
            assert_eq!((recall.call(call), recall.result(call)), (Some("tool"), None));
            recall.take(Record::Returned { call, result: "done".to_owned() });
            assert_eq!(recall.result(call), Some("done"));
            recall.take(answered);
            assert_eq!((recall.prompt(Turn(number)), recall.call(call)), (None, None));
        }
        assert!(recall.answer(Turn(199)).is_some() && recall.answer(Turn(136)).is_some());
        assert_eq!(recall.answer(Turn(135)), None);
        // Long ones are fewer, and one that is too long alone is there as long as it is the last.
        let said = |recall: &mut Recall, number, bytes| {
            for record in turn(number, &"x".repeat(bytes)) {
                recall.take(record);
            }
        };
        for number in 200..204 {
            said(&mut recall, number, ANSWER_BYTES / 2);
        }
        assert_eq!((recall.answers.len(), recall.answer_bytes), (2, ANSWER_BYTES));
        said(&mut recall, 204, 2 * ANSWER_BYTES);
        assert_eq!(recall.answers.len(), 1);
        assert!(recall.answer(Turn(204)).is_some());
        said(&mut recall, 205, 0);
        assert_eq!((recall.answers.len(), recall.answer_bytes), (1, 0));
    }
}
