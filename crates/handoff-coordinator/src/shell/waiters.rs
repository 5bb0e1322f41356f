//! Who waits for what the core says.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;

use crate::core::{Reply, ReplyTo};

/// Replies that may wait for one who does not read. A question is acknowledged and answered, and once more after each move.
const REPLIES: usize = 8;

type Ears = Arc<Mutex<HashMap<ReplyTo, mpsc::Sender<Reply>>>>;

/// Everybody who waits. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Waiters {
    ears: Ears,
    next: Arc<AtomicU64>,
}

/// One who waits; forgotten when dropped, and when it does not read: then its replies end after those that it has, and it asks again
/// under the same name of the turn, which is answered from the session's records.
pub(crate) struct Waiter {
    pub(crate) to: ReplyTo,
    replies: mpsc::Receiver<Reply>,
    ears: Ears,
}

impl Waiters {
    pub(crate) fn add(&self) -> Waiter {
        let to = ReplyTo(self.next.fetch_add(1, Ordering::Relaxed));
        let (ear, replies) = mpsc::channel(REPLIES);
        self.ears.lock().unwrap_or_else(PoisonError::into_inner).insert(to, ear);
        Waiter { to, replies, ears: Arc::clone(&self.ears) }
    }

    /// Tells one who waits, without waiting for it.
    pub(crate) fn tell(&self, to: ReplyTo, reply: Reply) {
        let mut ears = self.ears.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ear) = ears.get(&to)
            && ear.try_send(reply).is_err()
        {
            ears.remove(&to);
        }
    }
}

impl Waiter {
    /// The next reply; nothing when there will be none, and the question is to be asked again.
    pub(crate) async fn reply(&mut self) -> Option<Reply> {
        self.replies.recv().await
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.ears.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.to);
    }
}

#[cfg(test)]
mod tests {
    use drover_types::Epoch;

    use super::*;
    use crate::core::Turn;

    #[tokio::test]
    async fn one_who_does_not_read_is_cut_off_and_nobody_else_is() {
        let waiters = Waiters::default();
        let (mut idle, mut other) = (waiters.add(), waiters.add());
        let accepted = |turn| Reply::Accepted { turn: Turn(turn), epoch: Epoch(1) };
        for turn in 0..1000 {
            waiters.tell(idle.to, accepted(turn));
        }
        waiters.tell(other.to, accepted(7));
        assert_eq!(other.reply().await, Some(accepted(7)));
        for turn in 0..REPLIES as u32 {
            assert_eq!(idle.reply().await, Some(accepted(turn)));
        }
        assert_eq!(idle.reply().await, None, "it asks again instead of missing what came behind");
        assert_eq!(waiters.ears.lock().unwrap().len(), 1);
        drop(other);
        assert!(waiters.ears.lock().unwrap().is_empty());
    }
}
