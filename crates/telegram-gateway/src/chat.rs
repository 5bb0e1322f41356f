//! One message: its turn, and its answer in the chat.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use drover_proto::handoff::OpenSession;
use drover_sessions::{Ask, Doors, Heard, SendError, Sending};
use drover_types::ErrorCode;
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use crate::api::{ApiError, Bot};
use crate::book::{Open, Wish};
use crate::keeper::Keeper;

/// Most characters of one message: Telegram takes 4096, counted otherwise than we do.
const LONGEST: usize = 2000;
/// Pause between two changes of a message while the answer comes.
const SHOW_EVERY: Duration = Duration::from_millis(1500);
/// What stands in a message before its answer does.
const EMPTY: &str = "…";
/// How long doors are tried before the log says that none helps; then they are tried again.
const PATIENCE: Duration = Duration::from_mins(5);

/// What it takes to answer messages.
#[derive(Clone)]
pub(crate) struct Desk {
    pub(crate) bot: Bot,
    pub(crate) keeper: Arc<Mutex<Keeper>>,
    pub(crate) doors: Arc<dyn Doors>,
    /// Agent of new sessions; empty for the one that nodes are configured with.
    pub(crate) agent: String,
}

impl Desk {
    /// Changes the book on disk. A failure is tried again for as long as it takes: nothing may go on without.
    pub(crate) async fn note<T: Send + 'static>(
        &self,
        change: impl Fn(&mut crate::book::Book) -> T + Send + Sync + 'static,
    ) -> T {
        let change = Arc::new(change);
        loop {
            let (keeper, change) = (Arc::clone(&self.keeper), Arc::clone(&change));
            let written = tokio::task::spawn_blocking(move || {
                keeper.lock().unwrap_or_else(PoisonError::into_inner).change(|book| change(book))
            });
            match written.await {
                Ok(Ok(result)) => return result,
                Ok(Err(error)) => warn!(%error, "what was written to the bot cannot be kept; tried again"),
                Err(error) => warn!(%error, "what was written to the bot cannot be kept; tried again"),
            }
            sleep(Duration::from_secs(1)).await;
        }
    }

    /// Answers one message. It is out of the book when this returns; dropped before, it is answered after the next start.
    pub(crate) async fn answer(self, update: i64, mut open: Open) {
        if let Err(error) = self.try_answer(update, &mut open).await {
            // Blocked, thrown out, or a chat that is no more: nobody is there to be answered.
            warn!(chat = open.chat, update, %error, "a message cannot be answered");
        }
        self.note(move |book| book.done(update)).await;
    }

    async fn try_answer(&self, update: i64, open: &mut Open) -> Result<(), ApiError> {
        let answer = match open.wish() {
            Wish::Tell(text) => text.to_owned(),
            Wish::Say(prompt) => {
                self.place(update, open, 0).await?;
                self.turn(update, open, prompt).await?
            }
        };
        for (at, part) in parts(&answer).into_iter().enumerate() {
            let place = self.place(update, open, at).await?;
            if !retried(|| self.bot.edit(open.chat, place, part)).await? {
                // Somebody has deleted it.
                retried(|| self.bot.send(open.chat, part, None)).await?;
            }
        }
        info!(chat = open.chat, update, "answered");
        Ok(())
    }

    /// The message for the part of an answer at this place; it is in the book before anything is written into it.
    async fn place(&self, update: i64, open: &mut Open, at: usize) -> Result<i64, ApiError> {
        while open.places.len() <= at {
            let answers = open.places.is_empty().then_some(open.message);
            let message = retried(|| self.bot.send(open.chat, EMPTY, answers)).await?;
            self.note(move |book| book.placed(update, message)).await;
            open.places.push(message);
        }
        Ok(open.places[at])
    }

    /// Says it in the session and shows the answer as it comes. Gives back what is to stand there in the end.
    async fn turn(&self, update: i64, open: &Open, prompt: String) -> Result<String, ApiError> {
        let (Some(session), Some(request)) = (open.session(), open.request(update)) else {
            return Ok("This chat has no usable name.".to_owned());
        };
        let metadata = [("entry".to_owned(), "telegram".to_owned()), ("chat".to_owned(), open.chat.to_string())];
        let opening = OpenSession { agent: self.agent.clone(), metadata: metadata.into(), ..OpenSession::default() };
        let ask = Ask { session, request, prompt, open: Some(opening), patience: PATIENCE };
        let mut sending = Sending::new(ask.clone(), Arc::clone(&self.doors));
        let (mut text, mut shown, mut show_at) = (String::new(), 0, Instant::now() + SHOW_EVERY);
        loop {
            match sending.next().await {
                Ok(Some(Heard::Text(piece))) => text.push_str(&piece),
                Ok(Some(Heard::Again(whole))) => text = whole,
                Ok(Some(Heard::Answer(answer))) if answer.fault.is_empty() => {
                    return Ok(if answer.text.trim().is_empty() { "(nothing)".to_owned() } else { answer.text });
                }
                Ok(Some(Heard::Answer(answer))) => return Ok(format!("No answer: {}", answer.message)),
                Ok(Some(Heard::Accepted(_) | Heard::Moved(_))) => {}
                Ok(None) => return Ok("No answer.".to_owned()),
                Err(SendError::Refused(status)) => {
                    let failure = drover_proto::failure_of(&status);
                    if failure.code == ErrorCode::SessionOver {
                        return Ok("This conversation has ended. /new begins another.".to_owned());
                    }
                    return Ok(format!("No answer: {}", failure.message));
                }
                Err(error @ SendError::Unreachable { .. }) => {
                    warn!(%error, chat = open.chat, "a message waits");
                    sending = Sending::new(ask.clone(), Arc::clone(&self.doors));
                }
            }
            let first = parts(&text).first().copied().unwrap_or_default();
            if Instant::now() >= show_at && first.len() != shown && !first.trim().is_empty() {
                // Only a preview: what fails here is made good by the end.
                let _ = self.bot.edit(open.chat, open.places[0], first).await;
                shown = first.len();
                show_at = Instant::now() + SHOW_EVERY;
            }
        }
    }
}

/// Tries a call for as long as it may work.
pub(crate) async fn retried<T, F: Future<Output = Result<T, ApiError>>>(call: impl Fn() -> F) -> Result<T, ApiError> {
    loop {
        match call().await {
            Err(error) => match error.again_in() {
                Some(pause) => {
                    tracing::debug!(%error, "tried again");
                    sleep(pause).await;
                }
                None => return Err(error),
            },
            done => return done,
        }
    }
}

/// An answer in messages, cut at line ends where there are any.
fn parts(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some((end, _)) = rest.char_indices().nth(LONGEST) {
        let cut = rest[..end].rfind('\n').filter(|at| *at > end / 2).map_or(end, |at| at + 1);
        parts.push(&rest[..cut]);
        rest = &rest[cut..];
    }
    if !rest.is_empty() || parts.is_empty() {
        parts.push(rest);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_answer_is_cut_into_messages_and_nothing_of_it_is_missing() {
        assert_eq!(parts("short"), ["short"]);
        let long = "eine Zeile mit Ümlauten\n".repeat(400);
        let cut = parts(&long);
        assert_eq!(cut.concat(), long);
        assert!(cut.len() > 4 && cut.iter().all(|part| part.chars().count() <= LONGEST && part.ends_with('\n')));
        assert_eq!(parts(&"ä".repeat(LONGEST * 2)).len(), 2);
    }
}
