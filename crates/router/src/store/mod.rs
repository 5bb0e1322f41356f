//! The one writer: a thread of its own that owns the database and the core.
//!
//! It takes what has happened in batches, lets the core decide, writes the events, the cursors and the changed rows in
//! one transaction, and only then lets anything leave the process. When the transaction fails, the core's memory is
//! built again from what is on disk, callers are told, and outbox records are read again later.

mod events;
mod queue;
mod readers;
mod retention;
mod rows;
mod schema;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod waiters;
mod writer;

pub(crate) use events::Wanted;
pub(crate) use queue::{Call, Command, StoreHandle, stopping};
pub(crate) use readers::{Past, UNUSED};
pub(crate) use schema::place;
pub(crate) use writer::{Orders, Retention, StoreSettings, Writer};
