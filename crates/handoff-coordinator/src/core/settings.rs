//! Everything that can be set.

use std::time::Duration;

/// Settings of the core. The first seven are keys of the configuration; the others have one value that fits.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Move sessions away by itself when this node is overloaded. What a person asks for is done anyway.
    pub enabled: bool,
    /// Load from which this node is overloaded.
    pub load_threshold: f64,
    /// Longest time for one attempt.
    pub timeout: Duration,
    /// Attempts with one node after the first.
    pub max_retries: u32,
    /// Pause between attempts with one node.
    pub retry_delay: Duration,
    /// Longest silence of the other node within an attempt.
    pub rpc_timeout: Duration,
    /// Most sessions on this node.
    pub max_sessions: usize,
    /// Load below which an overloaded node is not any more.
    pub relief: f64,
    /// How long a session stays where it is before the load alone may move it again.
    pub residence: Duration,
    /// Most sessions that leave at a time, and most that come in at a time.
    pub max_moves: usize,
    /// Pause between two looks at the load.
    pub rebalance_interval: Duration,
    /// Nodes that one operation tries before the session stays.
    pub max_targets: usize,
    /// Bytes of one chunk.
    pub chunk: u64,
    /// Bytes that may be on their way.
    pub window: u64,
    /// Bytes that may be missing on the other side when this one stops serving.
    pub freeze_lag: u64,
    /// Pause until a message without an answer is sent again.
    pub resend: Duration,
    /// How long a target keeps a reservation without hearing of the source.
    pub lease: Duration,
    /// Pause until something that the shared file system did not answer is tried again.
    pub store_retry: Duration,
    /// How long turns that come to the new owner wait for those that had come to the old one.
    pub flush_wait: Duration,
    /// Most turns that wait while a session cannot serve.
    pub max_held: usize,
    /// How long they wait before their askers are told to come again.
    pub hold: Duration,
    /// How long a node remembers where a session is.
    pub memory: Duration,
    /// Most turns of one session.
    pub max_turns: u32,
    /// Most bytes of one session's records.
    pub max_bytes: u64,
    /// Most bytes of one prompt or answer.
    pub max_text: usize,
    /// Ended handoffs that are remembered, so that a late message gets the same answer.
    pub remembered: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            enabled: true,
            load_threshold: 0.8,
            timeout: Duration::from_secs(30),
            max_retries: 3,
            retry_delay: Duration::from_secs(5),
            rpc_timeout: Duration::from_secs(10),
            max_sessions: 10_000,
            relief: 0.65,
            residence: Duration::from_mins(1),
            max_moves: 4,
            rebalance_interval: Duration::from_secs(1),
            max_targets: 3,
            chunk: 256 << 10,
            window: 2 << 20,
            freeze_lag: 64 << 10,
            resend: Duration::from_secs(1),
            lease: Duration::from_secs(30),
            store_retry: Duration::from_millis(500),
            flush_wait: Duration::from_millis(500),
            max_held: 256,
            hold: Duration::from_secs(10),
            memory: Duration::from_secs(10),
            max_turns: 100_000,
            max_bytes: 256 << 20,
            max_text: 4 << 20,
            remembered: 1024,
        }
    }
}
