//! The target's side of a handoff, until it claims: then it is a session of its own.

use std::time::Duration;

use bytes::Bytes;
use drover_types::{Epoch, SessionId};

use super::api::{Cause, Effect, Installed, OwnerRecord, Reserved};
use super::ids::{Digest, HandoffId, NodeId};
use super::message::{Message, Refusal, Rejection};
use super::session::{Base, Context, Session};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Reserving,
    Receiving,
    Installing,
    /// Only the outcome of the claim ends this.
    Claiming,
}

/// One session on its way in.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) id: HandoffId,
    pub(crate) session: SessionId,
    pub(crate) from: NodeId,
    pub(crate) epoch: Epoch,
    pub(crate) attempt: u32,
    step: Step,
    /// Bytes on disk, and those with what is being written.
    written: u64,
    writing: u64,
    offer: Option<(u64, Digest)>,
    lease: Duration,
}

/// How a handoff ended here; a late message gets the same answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Committed(Epoch),
    Rejected(Rejection),
    Refused(Refusal),
    /// The source gave it up.
    Aborted,
}

impl End {
    pub(crate) fn message(self, handoff: HandoffId) -> Message {
        match self {
            Self::Committed(epoch) => Message::Committed { handoff, epoch },
            Self::Rejected(why) => Message::Reject { handoff, why },
            Self::Refused(why) => Message::Refused { handoff, why },
            Self::Aborted => Message::Refused { handoff, why: Refusal::Unknown },
        }
    }
}

impl Incoming {
    #[expect(clippy::too_many_arguments, reason = "they are the fields of one message")]
    pub(crate) fn new(
        cx: &mut Context<'_>,
        id: HandoffId,
        from: NodeId,
        session: SessionId,
        epoch: Epoch,
        attempt: u32,
        len: u64,
        fresh: bool,
    ) -> Self {
        cx.out.push(Effect::Reserve { handoff: id, session: session.clone(), len, fresh });
        let lease = cx.now + cx.settings.lease;
        Self { id, session, from, epoch, attempt, step: Step::Reserving, written: 0, writing: 0, offer: None, lease }
    }

    /// It may still be dropped: no claim is out.
    pub(crate) fn is_free(&self) -> bool {
        self.step != Step::Claiming
    }

    pub(crate) fn deadline(&self) -> Duration {
        if self.is_free() { self.lease } else { Duration::MAX }
    }

    fn say(&self, cx: &mut Context<'_>, message: Message) {
        cx.out.push(Effect::Send { to: self.from.clone(), message });
    }

    fn heard(&mut self, cx: &Context<'_>) {
        self.lease = cx.now + cx.settings.lease;
    }

    /// The source asks again.
    pub(crate) fn asked_again(&mut self, cx: &mut Context<'_>) {
        self.heard(cx);
        if self.step != Step::Reserving {
            self.say(cx, Message::Accept { handoff: self.id, have: self.written, taken: Some(self.writing) });
        }
    }

    pub(crate) fn reserved(&mut self, cx: &mut Context<'_>, outcome: Reserved) -> Option<End> {
        if self.step != Step::Reserving {
            return None;
        }
        match outcome {
            Reserved::NoSpace => Some(End::Rejected(Rejection::NoSpace)),
            Reserved::Room(have) => {
                self.step = Step::Receiving;
                (self.written, self.writing) = (have, have);
                self.say(cx, Message::Accept { handoff: self.id, have, taken: Some(have) });
                None
            }
        }
    }

    pub(crate) fn chunk(&mut self, cx: &mut Context<'_>, offset: u64, bytes: Bytes) {
        self.heard(cx);
        if self.step != Step::Receiving {
            return;
        }
        // A source keeps to its window; of one that does not, no more waits for the disk than that.
        let room = self.writing - self.written + bytes.len() as u64 <= 2 * cx.settings.window;
        if offset == self.writing && !bytes.is_empty() && room {
            self.writing += bytes.len() as u64;
            let (handoff, session) = (self.id, self.session.clone());
            cx.out.push(Effect::Write { handoff, session, offset, bytes });
        } else {
            // One from before is there already; one from behind a gap is of no use until the gap is closed.
            let again = offset > self.writing || (offset == self.writing && !room);
            self.say(cx, Message::Received { handoff: self.id, len: self.written, again });
        }
    }

    /// A piece is on disk, or could not be brought there.
    pub(crate) fn wrote(&mut self, cx: &mut Context<'_>, len: Option<u64>) -> Option<End> {
        if self.step != Step::Receiving {
            return None;
        }
        let Some(len) = len else { return Some(End::Refused(Refusal::Disk)) };
        self.written = len;
        self.say(cx, Message::Received { handoff: self.id, len, again: false });
        self.install(cx)
    }

    /// The source lets this node claim.
    pub(crate) fn offered(&mut self, cx: &mut Context<'_>, epoch: Epoch, len: u64, digest: Digest) -> Option<End> {
        self.heard(cx);
        if epoch != self.epoch {
            return Some(End::Refused(Refusal::Unknown));
        }
        self.offer = Some((len, digest));
        self.install(cx)
    }

    fn install(&mut self, cx: &mut Context<'_>) -> Option<End> {
        let (len, digest) = self.offer?;
        if self.step != Step::Receiving || self.written != self.writing || self.written < len {
            return None;
        }
        if self.written > len {
            return Some(End::Refused(Refusal::Digest));
        }
        self.step = Step::Installing;
        let (session, cause) = (self.session.clone(), Cause::Moved { handoff: self.id });
        let record = Box::new(OwnerRecord { session, epoch: self.epoch.next(), owner: cx.me.clone(), cause });
        cx.out.push(Effect::Install { handoff: self.id, len, digest, record });
        None
    }

    /// An installation was begun and its outcome is to come.
    pub(crate) fn installs(&self) -> bool {
        self.step == Step::Installing
    }

    /// All that the session needs is on disk, or is not what was announced. Claims when it is, unless this node has the session already.
    pub(crate) fn installed(&mut self, cx: &mut Context<'_>, outcome: Installed, session: &mut Session) -> Option<End> {
        match outcome {
            Installed::Failed => Some(End::Refused(Refusal::Disk)),
            Installed::Differs => Some(End::Refused(Refusal::Digest)),
            Installed::Done(_) if session.is_held() => Some(End::Refused(Refusal::Lost)),
            Installed::Done(log) => {
                self.step = Step::Claiming;
                session.claim(cx, self.epoch.next(), Cause::Moved { handoff: self.id }, Base::Copy(log));
                None
            }
        }
    }
}
