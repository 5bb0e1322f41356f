//! The shared file system, as a node sees it: what is asked of it happens later, in part, or without anybody learning of it.

use std::sync::Arc;

use drover_handoff::core::{Appended, Cause, ClaimOutcome, Digest, HandoffId, Input, Installed, Looked, OwnerRecord};
use drover_handoff::session::{LogSum, Record};
use drover_types::{Epoch, SessionId};
use rand::Rng as _;

use super::super::shared::{Missing, lines};
use super::World;
use super::parts::{Happening, Local, Op, Process};

impl World {
    pub(super) fn operation(&mut self, node: usize, op: Op) {
        let start = self.nodes[node].start;
        let late = self.weather.late > 0.0 && self.rng.random_bool(self.weather.late);
        let after = if late { self.span(3_000..4_000_000) } else { self.span(100..3_000) };
        self.schedule(after, Happening::Op { node, start, op });
    }

    pub(super) fn operate(&mut self, node: usize, start: u32, op: Op) {
        let alive = self.nodes[node].start == start && self.nodes[node].process != Process::Killed;
        // What a killed process had asked for happens, or does not.
        if !alive && self.rng.random_bool(0.5) {
            return;
        }
        let unreachable = self.unreachable.contains(&node);
        let missing = self.missing;
        match op {
            Op::Look(_) | Op::Load(..) if !alive => {}
            Op::Look(session) => {
                let outcome = match self.shared.sessions.get(&session) {
                    _ if unreachable => Looked::Unknown,
                    Some(files) => files.look(),
                    None => Looked::Nobody,
                };
                self.later(node, 50..500, Input::Looked { session, outcome });
            }
            Op::Claim(record) => {
                let (session, epoch) = (record.session.clone(), record.epoch);
                let files = self.shared.sessions.entry(session.clone()).or_default();
                let outcome = if unreachable { ClaimOutcome::Unknown } else { files.claim(&record, missing) };
                if alive {
                    self.later(node, 50..500, Input::Claimed { session, epoch, outcome });
                }
            }
            Op::Load(session, epoch) => {
                let early = self.nodes[node].early.remove(&session).filter(|_| missing.is_some() && !unreachable);
                let files = self.shared.sessions.get(&session).filter(|_| !unreachable);
                let found = early.or_else(|| files.map(|files| files.read(epoch, missing)));
                let log = match found {
                    None if unreachable => None,
                    None => Some(Box::default()),
                    Some(Ok((sum, bytes, records))) => {
                        let local = Local::of(sum.clone(), bytes, &records);
                        self.nodes[node].local.insert(session.clone(), local);
                        Some(Box::new(sum))
                    }
                    Some(Err(why)) => {
                        self.judge.lost(&session, &why);
                        None
                    }
                };
                self.later(node, 50..500, Input::Loaded { session, epoch, log });
            }
            Op::Append { session, epoch, first, records, offset, looked: false, unknown } => {
                let unknown = unknown || unreachable;
                if !unreachable {
                    let bytes = lines(first, &records);
                    let mut part = 0..bytes.len();
                    if !alive {
                        part.end = self.rng.random_range(0..=bytes.len());
                        if self.rng.random_bool(0.2) {
                            part.start = self.rng.random_range(0..=part.end);
                        }
                    }
                    self.shared.sessions.entry(session.clone()).or_default().write(epoch, offset, &bytes, part);
                }
                if unknown && self.rng.random_bool(0.3) {
                    // It comes to the disk once more, when its owner is long behind it.
                    let op = Op::Append {
                        session: session.clone(),
                        epoch,
                        first,
                        records: Arc::clone(&records),
                        offset,
                        looked: false,
                        unknown: false,
                    };
                    let late = self.span(0..4_000_000);
                    self.schedule(late, Happening::Op { node, start: u32::MAX, op });
                }
                if alive {
                    let op = Op::Append { session, epoch, first, records, offset, looked: true, unknown };
                    let after = self.span(50..3_000);
                    self.schedule(after, Happening::Op { node, start, op });
                }
            }
            Op::Append { session, epoch, first, records, unknown, .. } => {
                let newest = self.shared.sessions.get(&session).and_then(|files| files.newest());
                let outcome = newest.filter(|newest| newest.epoch > epoch).cloned();
                let outcome = if missing == Some(Missing::LookAfterWriting) { None } else { outcome };
                let unknown = unknown || unreachable;
                let after = self.span(50..500);
                self.schedule(after, Happening::Kept { node, start, session, epoch, first, records, outcome, unknown });
            }
            Op::Checkpoint { session, epoch, log, written } if !unreachable => {
                let files = self.shared.sessions.entry(session.clone()).or_default();
                if written {
                    files.let_go(epoch);
                } else {
                    files.checkpoint(epoch, Arc::clone(&log));
                    if alive {
                        self.operation(node, Op::Checkpoint { session, epoch, log, written: true });
                    }
                }
            }
            Op::Checkpoint { .. } => {}
            Op::Tool { session, epoch, call } => {
                if let Some(result) = self.shared.tool.call(&session, epoch, call, missing)
                    && alive
                {
                    self.later(node, 50..2_000, Input::Returned { session, epoch, call, result });
                }
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "they are the fields of one outcome")]
    pub(super) fn kept(
        &mut self,
        node: usize,
        session: SessionId,
        epoch: Epoch,
        first: u64,
        records: &Arc<Vec<Record>>,
        outcome: Option<OwnerRecord>,
        unknown: bool,
    ) {
        let outcome = match outcome {
            _ if unknown => Appended::Unknown,
            Some(newest) => Appended::Fenced(newest),
            None => {
                let bytes = lines(first, records);
                let now_and_then = self.rng.random_bool(0.01);
                let local = self.nodes[node].local.entry(session.clone()).or_default();
                local.journal.1 += bytes.len();
                bytes.split_inclusive(|byte| *byte == b'\n').for_each(|line| local.sum.add(line));
                local.bytes.extend_from_slice(&bytes);
                local.read(records);
                let done = Appended::Done { len: local.sum.len, digest: local.sum.digest };
                if now_and_then {
                    let log = Arc::new(local.bytes.clone());
                    self.operation(node, Op::Checkpoint { session: session.clone(), epoch, log, written: false });
                }
                done
            }
        };
        self.feed(node, Input::Appended { session, epoch, first, outcome });
    }

    /// A claim is won: what is on the disk is what the session goes on from.
    pub(super) fn adopt(&mut self, node: usize, session: &SessionId, epoch: Epoch) {
        let newest = self.shared.sessions.get(session).and_then(|files| files.newest());
        let slot = &mut self.nodes[node];
        let whole = slot.whole.remove(session);
        let moved = newest.is_some_and(|newest| newest.epoch == epoch && matches!(newest.cause, Cause::Moved { .. }));
        if let Some(local) = whole.filter(|_| moved) {
            slot.local.insert(session.clone(), local);
            slot.copies.remove(session);
        }
        if epoch == Epoch(1) {
            slot.local.insert(session.clone(), Local::default());
        }
    }

    pub(super) fn install(&mut self, node: usize, handoff: HandoffId, session: &SessionId, len: u64, digest: Digest) {
        let copy = self.nodes[node].copies.get(session).cloned().unwrap_or_default();
        let (mut sum, mut records) = (LogSum::default(), Vec::new());
        let good = copy.split_inclusive(|byte| *byte == b'\n').all(|line| match sum.line(line) {
            Ok(record) => {
                records.push(record);
                true
            }
            Err(_) => false,
        });
        let outcome = if good && (sum.len, sum.digest) == (len, digest) {
            self.nodes[node].whole.insert(session.clone(), Local::of(sum.clone(), copy, &records));
            Installed::Done(Box::new(sum))
        } else {
            Installed::Differs
        };
        self.later(node, 100..3_000, Input::Installed { handoff, outcome });
    }
}
