//! An entry to the sessions for people who write to a Telegram bot. Each chat that is allowed is a session; what is written in it is said
//! there, and the answer appears in the chat as it comes.
//!
//! ```text
//! Telegram ── getUpdates, long polling ──> book ──> one turn at a time for each chat ──> a door to the sessions
//!          <── sendMessage, then edits ───  (disk)  <──────────── the answer as it comes ─┘
//! ```
//!
//! **Nothing is lost and nothing answered twice.** A message is on disk here before Telegram is told that it was taken. Its turn has a name
//! made of its number, so that asked again after a crash it is the same turn. And an answer is not sent but written into a
//! message that was sent before, empty: whoever repeats that changes nothing.
//!
//! It knows no session and no node: it is one more client of `drover-sessions`.

mod api;
mod book;
mod chat;
mod keeper;
mod run;

pub use api::updates_in;
pub use run::TelegramGateway;
