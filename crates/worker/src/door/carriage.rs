//! How an exchange gets to the dispatcher and back: over TLS where that works, else through the mailbox.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use drover_dispatcher::pool::{Ask, Frame};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::info;

use super::Plan;
use super::exchange::Event;
use super::mailbox::Mail;
use super::tls::Tls;

/// How long TLS is left alone after it led nowhere and the mailbox did.
const LEFT_ALONE: Duration = Duration::from_mins(1);

/// How long things may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    /// A broken carriage is tried again for so long before the agent hears of it.
    pub(super) patience: Duration,
    /// Until the dispatcher has found a request in the mailbox.
    pub(super) found: Duration,
    /// So long nothing at all may come through the mailbox: the dispatcher says every few seconds that it is at work.
    pub(super) silent: Duration,
}

impl Default for Times {
    fn default() -> Self {
        let secs = Duration::from_secs;
        Self { patience: secs(20), found: secs(20), silent: secs(30) }
    }
}

/// Why an answer does not come any further this way, for now.
#[derive(Debug, Error)]
pub(super) enum Broken {
    /// Nothing of the request got there.
    #[error("the dispatcher cannot be reached: {0}")]
    Unreachable(String),
    /// It was under way.
    #[error("the way to the dispatcher broke: {0}")]
    Lost(String),
    /// It has no room.
    #[error("the dispatcher is busy: {0}")]
    Busy(String),
    /// The agent has gone away.
    #[error("nobody wants it any more")]
    Unwanted,
}

/// Both ways.
pub(super) struct Carriage {
    pub(super) node_id: String,
    pub(super) times: Times,
    tls: Option<Tls>,
    mail: Option<Mail>,
    no_tls_before: Mutex<Option<Instant>>,
}

impl Carriage {
    /// As configured. Blocks.
    pub(super) fn of(plan: &Plan) -> Result<Self, String> {
        let mail = (plan.way != "grpc").then(|| Mail::new(plan.mailbox.clone(), plan.times));
        let tls = match (&plan.identity, plan.way.as_str()) {
            (_, "mailbox") => None,
            (Some(dir), _) => match Tls::new(dir, plan.address.clone(), plan.mailbox.clone()) {
                Ok(tls) => Some(tls),
                Err(error) if mail.is_some() => {
                    info!(%error, "without an identity that can be used the pool is asked through the mailbox");
                    None
                }
                Err(error) => return Err(error.to_string()),
            },
            (None, "grpc") => return Err("this node has no identity to show to the dispatcher".to_owned()),
            (None, _) => None,
        };
        Ok(Self { node_id: plan.node_id.clone(), times: plan.times, tls, mail, no_tls_before: Mutex::default() })
    }

    fn tls(&self) -> Option<&Tls> {
        let before = *self.no_tls_before.lock().unwrap_or_else(PoisonError::into_inner);
        self.tls.as_ref().filter(|_| self.mail.is_none() || before.is_none_or(|before| Instant::now() >= before))
    }

    /// Carries the exchange on behind what has arrived, to its end or until the way breaks.
    pub(super) async fn carry(&self, ask: &Ask, progress: &mut Progress) -> Result<(), Broken> {
        if let Some(tls) = self.tls() {
            match tls.carry(ask, progress).await {
                Err(Broken::Unreachable(why)) if self.mail.is_some() => {
                    info!(why, "the pool is asked through the mailbox");
                    *self.no_tls_before.lock().unwrap_or_else(PoisonError::into_inner) =
                        Some(Instant::now() + LEFT_ALONE);
                }
                done => return done,
            }
        }
        match &self.mail {
            Some(mail) => mail.carry(ask, progress).await,
            None => Err(Broken::Unreachable("there is no way that may be used".to_owned())),
        }
    }

    /// Tells the dispatcher that the exchange is needed no longer.
    pub(super) async fn release(&self, id: &str, by_tls: &AtomicBool) {
        if let Some(mail) = &self.mail {
            mail.release(&self.node_id, id).await;
        }
        if let Some(tls) = self.tls.as_ref().filter(|_| by_tls.load(Ordering::Relaxed)) {
            tls.release(id).await;
        }
    }
}

/// How far an exchange has come.
pub(super) struct Progress {
    /// Frames that have arrived.
    pub(super) have: u64,
    pub(super) by_tls: std::sync::Arc<AtomicBool>,
    pub(super) out: mpsc::Sender<Event>,
}

impl Progress {
    /// Takes the next frame; true when it was the last.
    pub(super) async fn take(&mut self, frame: Frame) -> Result<bool, Broken> {
        let (event, last) = match frame {
            // The dispatcher will not go on with it, whatever way it is asked.
            Frame::End { error } if !error.is_empty() => (Event::Failed { why: error, again: false }, true),
            frame => {
                let last = matches!(frame, Frame::End { .. });
                (Event::Frame(frame), last)
            }
        };
        self.have += 1;
        self.out.send(event).await.map_err(|_| Broken::Unwanted)?;
        Ok(last)
    }
}
