//! What was written to the bot and is not answered yet. No clock, no files and no network in here.

use std::collections::{BTreeMap, BTreeSet};

use drover_types::{RequestId, SessionId};
use serde::{Deserialize, Serialize};

use crate::api::Update;

/// Most messages that wait; when there are so many, Telegram keeps the others.
pub(crate) const MOST_OPEN: usize = 200;
/// Begins a new session in a chat.
const NEW: &str = "/new";

/// A message that is to be answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Open {
    pub(crate) chat: i64,
    /// Its number in the chat.
    pub(crate) message: i64,
    /// Which of the chat's sessions it is for.
    pub(crate) session: u32,
    pub(crate) text: String,
    /// Messages of ours that the answer is written into, in their order.
    #[serde(default)]
    pub(crate) places: Vec<i64>,
}

/// Everything that has to survive.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Book {
    /// The number behind that of the last update that is here.
    pub(crate) next: i64,
    /// By the number of the update.
    pub(crate) open: BTreeMap<i64, Open>,
    /// Which session each chat is in, where it is not the first.
    pub(crate) sessions: BTreeMap<i64, u32>,
}

/// What became of updates.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Taken {
    /// Chats that are not allowed.
    pub(crate) strangers: BTreeSet<i64>,
    /// So many are to be answered.
    pub(crate) open: usize,
}

impl Book {
    /// Takes updates over. One that was taken before changes nothing.
    pub(crate) fn take(&mut self, updates: Vec<Update>, allowed: &BTreeSet<i64>) -> Taken {
        let mut taken = Taken::default();
        for update in updates {
            if update.update_id < self.next {
                continue;
            }
            self.next = update.update_id + 1;
            let Some(message) = update.message else { continue };
            let chat = message.chat.id;
            if !allowed.contains(&chat) {
                taken.strangers.insert(chat);
                continue;
            }
            let text = message.text.unwrap_or_default();
            let text = for_us(text.trim()).to_owned();
            if text == NEW {
                *self.sessions.entry(chat).or_insert(0) += 1;
            }
            let session = self.sessions.get(&chat).copied().unwrap_or(0);
            let open = Open { chat, message: message.id, session, text, places: Vec::new() };
            self.open.insert(update.update_id, open);
            taken.open += 1;
        }
        taken
    }

    /// How many more there may be.
    pub(crate) fn room(&self) -> usize {
        MOST_OPEN.saturating_sub(self.open.len())
    }

    /// The first message of each chat in which nothing is under way.
    pub(crate) fn due(&self, busy: &BTreeSet<i64>) -> Vec<(i64, Open)> {
        let mut seen = busy.clone();
        let first = self.open.iter().filter(|(_, open)| seen.insert(open.chat));
        first.map(|(id, open)| (*id, open.clone())).collect()
    }

    /// A message of ours stands ready for a part of an answer.
    pub(crate) fn placed(&mut self, update: i64, message: i64) {
        if let Some(open) = self.open.get_mut(&update) {
            open.places.push(message);
        }
    }

    /// It is answered.
    pub(crate) fn done(&mut self, update: i64) {
        self.open.remove(&update);
    }
}

/// What is to be done about a message.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Say this in the session.
    Say(String),
    /// Answer this by itself.
    Tell(&'static str),
}

/// What was written, without the name that a command has in a group: `/new@the_bot`.
fn for_us(text: &str) -> &str {
    match text.split_once('@') {
        Some((command @ ("/new" | "/start" | "/help"), name)) if !name.contains(char::is_whitespace) => command,
        _ => text,
    }
}

impl Open {
    pub(crate) fn wish(&self) -> Wish {
        match self.text.as_str() {
            "" => Wish::Tell("Only text is understood here."),
            "/start" | "/help" => Wish::Tell("Write, and it is answered. /new begins a new conversation."),
            NEW => Wish::Tell("A new conversation begins."),
            text => Wish::Say(text.to_owned()),
        }
    }

    /// The session of its chat. `None` never happens: the name has only harmless letters.
    pub(crate) fn session(&self) -> Option<SessionId> {
        let sign = if self.chat < 0 { "m" } else { "" };
        format!("telegram-{sign}{}-{}", self.chat.unsigned_abs(), self.session).parse().ok()
    }

    /// The name of its turn.
    pub(crate) fn request(&self, update: i64) -> Option<RequestId> {
        format!("telegram-{update}-{}", self.message).parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Chat, Message};

    fn update(update_id: i64, chat: i64, text: Option<&str>) -> Update {
        let message = Message { id: update_id * 10, chat: Chat { id: chat }, text: text.map(str::to_owned) };
        Update { update_id, message: Some(message) }
    }

    #[test]
    fn a_message_is_taken_once_and_answered_in_the_order_of_its_chat() {
        let allowed = BTreeSet::from([1, -5]);
        let mut book = Book::default();
        let first = vec![update(7, 1, Some("one")), update(8, 2, Some("stranger")), update(9, 1, Some("two"))];
        assert_eq!(book.take(first.clone(), &allowed), Taken { strangers: BTreeSet::from([2]), open: 2 });
        assert_eq!(book.take(first, &allowed), Taken::default(), "sent again after a crash");
        book.take(vec![update(10, -5, None)], &allowed);
        assert_eq!(book.next, 11);

        let due = |book: &Book, busy: &[i64]| {
            book.due(&busy.iter().copied().collect()).iter().map(|(id, _)| *id).collect::<Vec<_>>()
        };
        assert_eq!(due(&book, &[]), [7, 10], "one of each chat");
        assert_eq!(due(&book, &[1]), [10]);
        book.placed(7, 100);
        book.done(7);
        assert_eq!(due(&book, &[]), [9, 10]);
        assert_eq!(book.open[&10].wish(), Wish::Tell("Only text is understood here."));
        assert_eq!(book.open[&10].session().unwrap().to_string(), "telegram-m5-0");
    }

    #[test]
    fn a_new_conversation_is_another_session() {
        let allowed = BTreeSet::from([1]);
        let mut book = Book::default();
        book.take(vec![update(1, 1, Some("a")), update(2, 1, Some("/new@bot")), update(3, 1, Some("b"))], &allowed);
        assert_eq!(book.open[&2].wish(), Wish::Tell("A new conversation begins."));
        assert_eq!(for_us("/new@bot for all"), "/new@bot for all");
        let sessions: Vec<String> = book.open.values().map(|open| open.session().unwrap().to_string()).collect();
        assert_eq!(sessions, ["telegram-1-0", "telegram-1-1", "telegram-1-1"]);
        assert_eq!(book.open[&3].request(3).unwrap().to_string(), "telegram-3-30");
        let kept: Book = serde_json::from_str(&serde_json::to_string(&book).unwrap()).unwrap();
        assert_eq!(kept, book);
    }
}
