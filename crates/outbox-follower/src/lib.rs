//! The outbox follower: the only process that touches mailbox files on its side of the file system.
//!
//! It appends the router's records to inboxes and tails the workers' outboxes. It keeps no state: whoever follows says
//! where to start and remembers how far it came. It moves lines and does not know what they mean.
//!
//! ```text
//! Deliver --> grpc --> inboxes: 16 shards, each with its open writers --append, fdatasync--> <node>/inbox/*.jsonl
//!
//! Follow  --> session --commands--> lane (a thread with its own readers) <--read-- <node>/outbox/<gen>/*.jsonl
//! router  <-- at most a few MiB of whole lines wait here <-- lane
//!                                   ^ schedule: who is looked at next, and when (pure)
//!                                   ^ watch: inotify says which directory changed (local file systems only)
//!
//! Carry   --> carry: a call --> <node>/post/asks/*.call, and its answer <-- <node>/post/answers/*
//! ```
//!
//! An outbox is looked at when inotify tells of a change. Where the file system tells of nothing, the outboxes of nodes
//! at work are looked at often and the others seldom. No pass reads a directory, and no file has a timer of its own.

mod carry;
mod deliver;
mod follow;
mod grpc;
mod lane;
mod metrics;
mod refs;
mod run;
mod schedule;
mod settings;
mod usage;
mod watch;

pub use metrics::Metrics;
pub use run::Follower;
pub use settings::{FollowerArgs, Settings};
