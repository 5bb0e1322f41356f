//! What was heard so far, and what a further word adds to it. No clock and no network in here.

use drover_proto::handoff as pb;
use drover_proto::handoff::send_response::Update;

/// What a word adds.
#[derive(Debug, Clone, PartialEq)]
pub enum Heard {
    /// The turn is kept and will be answered, once.
    Accepted(pb::Accepted),
    /// More of the answer.
    Text(String),
    /// The turn was run again and says something else: what was heard of the answer does not count, this is its beginning.
    Again(String),
    /// The session is on another node now.
    Moved(pb::Moved),
    /// The turn is over. Before it all of the answer was heard as text.
    Answer(pb::Answer),
}

/// Puts an answer together that comes in pieces, through several doors, some of it more than once.
#[derive(Debug, Clone, Default)]
pub struct Ear {
    /// What was passed on.
    told: String,
    /// What the side that speaks has said; a part of it may have been passed on before, under an earlier owner.
    said: String,
    epoch: u64,
}

impl Ear {
    /// From here on a door is to speak.
    pub fn offset(&self) -> u64 {
        self.said.len() as u64
    }

    /// The newest epoch that was heard of.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// All that was passed on.
    pub fn text(&self) -> &str {
        &self.told
    }

    /// Takes a word. `None`: something before it is missing, and is to be asked for again.
    pub fn hear(&mut self, update: Update) -> Option<Vec<Heard>> {
        Some(match update {
            Update::Accepted(accepted) => {
                self.epoch = self.epoch.max(accepted.epoch);
                vec![Heard::Accepted(accepted)]
            }
            Update::Moved(moved) => {
                self.epoch = self.epoch.max(moved.epoch);
                vec![Heard::Moved(moved)]
            }
            Update::Text(pb::Text { offset, text }) => {
                let offset = usize::try_from(offset).ok()?;
                if !self.said.is_char_boundary(offset) {
                    // Behind the end of what is known, or inside a letter of something that is another text by now.
                    return None;
                }
                self.said.truncate(offset);
                self.said.push_str(&text);
                self.catch_up(false).into_iter().collect()
            }
            Update::Answer(answer) => {
                self.epoch = self.epoch.max(answer.epoch);
                let mut heard = Vec::new();
                if answer.fault.is_empty() {
                    self.said.clone_from(&answer.text);
                    heard.extend(self.catch_up(true));
                }
                heard.push(Heard::Answer(answer));
                heard
            }
        })
    }

    /// Forgets what the last door said beyond what counts, so that the next one begins at the beginning.
    pub fn start_over(&mut self) {
        self.said.clear();
    }

    /// What of the words said was not passed on.
    fn catch_up(&mut self, whole: bool) -> Option<Heard> {
        if let Some(rest) = self.said.strip_prefix(self.told.as_str()) {
            let rest = (!rest.is_empty()).then(|| rest.to_owned())?;
            self.told.push_str(&rest);
            return Some(Heard::Text(rest));
        }
        if !whole && self.told.starts_with(&self.said) {
            // Said again what was passed on already.
            return None;
        }
        self.told.clone_from(&self.said);
        Some(Heard::Again(self.told.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(offset: u64, text: &str) -> Update {
        Update::Text(pb::Text { offset, text: text.to_owned() })
    }

    fn answer(text: &str) -> Update {
        Update::Answer(pb::Answer { text: text.to_owned(), epoch: 3, ..pb::Answer::default() })
    }

    fn told(ear: &mut Ear, updates: Vec<Update>) -> Vec<String> {
        let heard = updates.into_iter().flat_map(|update| ear.hear(update).unwrap());
        heard
            .map(|heard| match heard {
                Heard::Text(text) => format!("+{text}"),
                Heard::Again(text) => format!("!{text}"),
                Heard::Accepted(_) => "accepted".to_owned(),
                Heard::Moved(_) => "moved".to_owned(),
                Heard::Answer(_) => "answer".to_owned(),
            })
            .collect()
    }

    #[test]
    fn an_answer_is_heard_once_whatever_is_repeated() {
        let mut ear = Ear::default();
        // The turn runs again on another node and says the same: nobody hears it twice, and nothing is missing.
        let updates =
            vec![text(0, "one "), text(4, "two "), text(0, "one t"), text(5, "wo three"), answer("one two three.")];
        assert_eq!(told(&mut ear, updates), ["+one ", "+two ", "+three", "+.", "answer"]);
        assert_eq!((ear.text(), ear.epoch()), ("one two three.", 3));
    }

    #[test]
    fn a_turn_that_says_something_else_the_second_time_is_told_anew() {
        let mut ear = Ear::default();
        let updates = vec![text(0, "red "), text(4, "green"), text(0, "red "), text(4, "blue"), answer("red blue")];
        assert_eq!(told(&mut ear, updates), ["+red ", "+green", "!red blue", "answer"]);
        // An answer that is shorter than what was said on the way.
        let mut ear = Ear::default();
        assert_eq!(
            told(&mut ear, vec![text(0, "much too much"), answer("much")]),
            ["+much too much", "!much", "answer"]
        );
    }

    #[test]
    fn what_is_missing_is_asked_for_again() {
        let mut ear = Ear::default();
        assert_eq!(told(&mut ear, vec![text(0, "aä")]), ["+aä"]);
        assert_eq!(ear.hear(text(4, "x")), None, "a piece is missing");
        assert_eq!(ear.hear(text(2, "x")), None, "the middle of a letter");
        assert_eq!(ear.offset(), 3);
        ear.start_over();
        assert_eq!(
            (ear.offset(), told(&mut ear, vec![text(0, "aäb"), answer("aäb")])),
            (0, vec!["+b".into(), "answer".into()])
        );
    }

    #[test]
    fn a_turn_without_an_answer_takes_nothing_back() {
        let mut ear = Ear::default();
        let lost = Update::Answer(pb::Answer { fault: "turn_lost".into(), ..pb::Answer::default() });
        assert_eq!(told(&mut ear, vec![text(0, "half"), lost]), ["+half", "answer"]);
    }
}
