//! Who waits for what the core says.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use crate::core::{Reply, ReplyTo};

type Ears = Arc<Mutex<HashMap<ReplyTo, mpsc::UnboundedSender<Reply>>>>;

/// Everybody who waits. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Waiters {
    ears: Ears,
    next: Arc<AtomicU64>,
}

/// One who waits; forgotten when dropped. At most two replies come for each question, so they need no bound.
pub(crate) struct Waiter {
    pub(crate) to: ReplyTo,
    replies: mpsc::UnboundedReceiver<Reply>,
    ears: Ears,
}

impl Waiters {
    pub(crate) fn add(&self) -> Waiter {
        let to = ReplyTo(self.next.fetch_add(1, Ordering::Relaxed));
        let (ear, replies) = mpsc::unbounded_channel();
        self.ears.lock().unwrap_or_else(PoisonError::into_inner).insert(to, ear);
        Waiter { to, replies, ears: Arc::clone(&self.ears) }
    }

    pub(crate) fn tell(&self, to: ReplyTo, reply: Reply) {
        if let Some(ear) = self.ears.lock().unwrap_or_else(PoisonError::into_inner).get(&to) {
            let _ = ear.send(reply);
        }
    }
}

impl Waiter {
    /// The next reply.
    pub(crate) async fn reply(&mut self) -> Option<Reply> {
        self.replies.recv().await
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.ears.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.to);
    }
}
