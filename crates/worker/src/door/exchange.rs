//! One exchange from the agent's side: kept going over breaks of the carriage, for a while.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use drover_dispatcher::pool::{Ask, Frame};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::carriage::{Broken, Carriage, Progress};

/// The first pause before it is tried again; it doubles up to the longest.
const AGAIN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// What becomes of an exchange.
#[derive(Debug)]
pub(super) enum Event {
    /// The next part of the answer.
    Frame(Frame),
    /// There will be no more.
    Failed {
        /// Why.
        why: String,
        /// Its answer may still be there to be asked for.
        again: bool,
    },
}

/// Carries an exchange to its end, to the end of patience, or until nobody listens.
pub(super) async fn run(carriage: Arc<Carriage>, ask: Ask, by_tls: Arc<AtomicBool>, out: mpsc::Sender<Event>) {
    let mut progress = Progress { have: 0, by_tls, out };
    let mut deadline = Instant::now() + carriage.times.patience;
    let mut pause = AGAIN.0;
    loop {
        let had = progress.have;
        let gone = progress.out.clone();
        let carried = tokio::select! {
            carried = carriage.carry(&ask, &mut progress) => carried,
            () = gone.closed() => return,
        };
        let broken = match carried {
            Ok(()) | Err(Broken::Unwanted) => return,
            Err(broken) => broken,
        };
        if progress.have > had {
            deadline = Instant::now() + carriage.times.patience;
            pause = AGAIN.0;
        }
        if Instant::now() >= deadline {
            warn!(error = %broken, have = progress.have, "a request of the agent is given up for now");
            let _ = progress.out.send(Event::Failed { why: broken.to_string(), again: true }).await;
            return;
        }
        debug!(error = %broken, have = progress.have, "a request of the agent is carried on");
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(AGAIN.1),
            () = gone.closed() => return,
        }
    }
}
