//! The worker: one per node, runs one agent and speaks to the rest of drover only through the mailbox.

pub mod agent;
