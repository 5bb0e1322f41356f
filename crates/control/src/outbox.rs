//! What waits to be written to one client: a queue limited in bytes, and the loop that writes it.
//!
//! Whoever has something for a client puts it here and never waits. A client that does not read is cut off when the limit
//! is reached: it still gets the line under way, then one that says why, then the end of the connection.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use tokio::net::TcpStream;
use tokio::sync::Notify;

use crate::envelope::line;

/// How long a client that was cut off may take to read its last line.
const LAST_WORD: Duration = Duration::from_secs(5);
/// Most buffers handed to the kernel in one call.
const MAX_SLICES: usize = 64;

/// A piece of output. Whole lines, or consecutive parts of one line that were queued together.
#[derive(Debug, Clone)]
pub(crate) struct Chunk {
    bytes: Bytes,
    ends_line: bool,
    /// Sequence number of the last event in it, when it has events.
    last_seq: Option<u64>,
}

impl Chunk {
    /// Whole lines of events.
    pub(crate) fn events(bytes: Bytes, last_seq: u64) -> Self {
        Self { bytes, ends_line: true, last_seq: Some(last_seq) }
    }
}

/// How the writing ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Written {
    /// Everything was written.
    All,
    /// The client was cut off.
    CutOff,
    /// The connection is gone.
    Broken,
}

/// The queue of one client.
#[derive(Debug)]
pub(crate) struct Outbox {
    state: Mutex<State>,
    limit: usize,
    /// Something happened that the writer has to look at.
    work: Notify,
    /// The queue has become short enough to take requests again.
    room: Notify,
}

#[derive(Debug)]
struct State {
    queued: VecDeque<Chunk>,
    /// Bytes queued or in the writer's hand.
    bytes: usize,
    ending: Option<Ending>,
    /// The last event that the client was sent whole.
    last_seq: u64,
}

#[derive(Debug, Clone)]
enum Ending {
    Finish,
    CutOff(String),
}

impl Outbox {
    pub(crate) fn new(limit: usize) -> Self {
        let state = State { queued: VecDeque::new(), bytes: 0, ending: None, last_seq: 0 };
        Self { state: Mutex::new(state), limit, work: Notify::new(), room: Notify::new() }
    }

    /// Events up to this one came before the client.
    pub(crate) fn start_after(&self, seq: u64) {
        self.state().last_seq = seq;
    }

    /// Queues one line.
    pub(crate) fn push_line(&self, line: Bytes) {
        self.push([Chunk { bytes: line, ends_line: true, last_seq: None }]);
    }

    /// Queues one line that is made of parts.
    pub(crate) fn push_parts<const N: usize>(&self, parts: [Bytes; N]) {
        let mut index = 0;
        self.push(parts.map(|bytes| {
            index += 1;
            Chunk { bytes, ends_line: index == N, last_seq: None }
        }));
    }

    /// Queues lines of events. False when the client is cut off by them.
    pub(crate) fn push_events(&self, chunks: &[Chunk]) -> bool {
        self.push(chunks.iter().cloned())
    }

    fn push(&self, chunks: impl IntoIterator<Item = Chunk>) -> bool {
        let mut state = self.state();
        if state.ending.is_some() {
            return true;
        }
        for chunk in chunks {
            state.bytes += chunk.bytes.len();
            state.queued.push_back(chunk);
        }
        let within = state.bytes <= self.limit;
        if !within {
            let reason = format!("more than {} bytes were waiting to be read", self.limit);
            state.cut_off(reason);
        }
        drop(state);
        self.work.notify_one();
        within
    }

    /// Takes nothing more, and lets the writer end once all is written.
    pub(crate) fn finish(&self) {
        self.state().ending.get_or_insert(Ending::Finish);
        self.work.notify_one();
    }

    /// Drops what waits, and ends the connection with a word on why.
    pub(crate) fn cut_off(&self, reason: String) {
        self.state().cut_off(reason);
        self.work.notify_one();
    }

    /// So much waits that nothing should be added that can be held back.
    pub(crate) fn is_long(&self) -> bool {
        self.state().bytes > self.limit / 4
    }

    /// Returns when the queue is short again.
    pub(crate) async fn until_short(&self) {
        loop {
            let room = self.room.notified();
            if !self.is_long() {
                return;
            }
            room.await;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, hand: &mut VecDeque<Chunk>) -> Option<Ending> {
        let mut state = self.state();
        hand.append(&mut state.queued);
        state.ending.clone()
    }

    fn written(&self, bytes: usize, last_seq: Option<u64>) {
        let mut state = self.state();
        let was_long = state.bytes > self.limit / 4;
        state.bytes -= bytes;
        if let Some(seq) = last_seq {
            state.last_seq = seq;
        }
        let now_short = state.bytes <= self.limit / 4;
        drop(state);
        if was_long && now_short {
            self.room.notify_waiters();
        }
    }

    /// Writes until [`Outbox::finish`], or until the client is cut off or gone.
    pub(crate) async fn write_to(&self, stream: &TcpStream) -> Written {
        let mut hand = Hand::default();
        loop {
            let ending = self.take(&mut hand.chunks);
            if let Some(Ending::CutOff(reason)) = ending {
                return self.say_last_word(stream, hand, &reason).await;
            }
            if hand.chunks.is_empty() {
                if ending.is_some() {
                    return Written::All;
                }
                hand.chunks.shrink_to(8);
                self.work.notified().await;
                continue;
            }
            match hand.write_some(stream) {
                Ok((bytes, last_seq)) => self.written(bytes, last_seq),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    tokio::select! {
                        ready = stream.writable() => if ready.is_err() { return Written::Broken },
                        () = self.work.notified() => {}
                    }
                }
                Err(_) => return Written::Broken,
            }
            // A client that reads as fast as we write must not keep the others from their turn.
            tokio::task::consume_budget().await;
        }
    }

    async fn say_last_word(&self, stream: &TcpStream, mut hand: Hand, reason: &str) -> Written {
        hand.keep_only_what_was_begun();
        let last_seq = hand.chunks.iter().filter_map(|chunk| chunk.last_seq).next_back();
        let last_seq = last_seq.unwrap_or_else(|| self.state().last_seq);
        let bytes = line("subscription_ended", |data| {
            data.text("reason", reason);
            data.number("last_seq", i64::try_from(last_seq).unwrap_or(i64::MAX));
        });
        hand.chunks.push_back(Chunk { bytes, ends_line: true, last_seq: None });
        let write = async {
            while !hand.chunks.is_empty() {
                match hand.write_some(stream) {
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        };
        let _ = tokio::time::timeout(LAST_WORD, write).await;
        Written::CutOff
    }
}

impl State {
    fn cut_off(&mut self, reason: String) {
        if !matches!(self.ending, Some(Ending::CutOff(_))) {
            self.queued = VecDeque::new();
            self.ending = Some(Ending::CutOff(reason));
        }
    }
}

/// What the writer has taken from the queue.
#[derive(Default)]
struct Hand {
    chunks: VecDeque<Chunk>,
    /// Some bytes of the chunk in front, or of the line it belongs to, are with the client already.
    begun: bool,
}

impl Hand {
    /// Writes what the kernel takes: how many bytes, and the last event that is now out whole.
    fn write_some(&mut self, stream: &TcpStream) -> io::Result<(usize, Option<u64>)> {
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        let mut count = 0;
        for (slice, chunk) in slices.iter_mut().zip(&self.chunks) {
            *slice = IoSlice::new(&chunk.bytes);
            count += 1;
        }
        let written = stream.try_write_vectored(&slices[..count])?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok((written, self.advance(written)))
    }

    fn advance(&mut self, mut bytes: usize) -> Option<u64> {
        let mut last_seq = None;
        while let Some(front) = self.chunks.front_mut() {
            if bytes < front.bytes.len() {
                front.bytes.advance(bytes);
                self.begun |= bytes > 0;
                break;
            }
            bytes -= front.bytes.len();
            last_seq = front.last_seq.or(last_seq);
            self.begun = !front.ends_line;
            self.chunks.pop_front();
        }
        last_seq
    }

    fn keep_only_what_was_begun(&mut self) {
        let keep = if self.begun {
            self.chunks.iter().position(|chunk| chunk.ends_line).map_or(self.chunks.len(), |last| last + 1)
        } else {
            0
        };
        self.chunks.truncate(keep);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(text: &'static str, ends_line: bool, last_seq: Option<u64>) -> Chunk {
        Chunk { bytes: Bytes::from_static(text.as_bytes()), ends_line, last_seq }
    }

    fn rest(hand: &Hand) -> String {
        hand.chunks.iter().map(|chunk| String::from_utf8_lossy(&chunk.bytes).into_owned()).collect()
    }

    #[test]
    fn a_cut_keeps_the_begun_line_whole_and_knows_the_last_event() {
        let chunks = [
            chunk("one\ntwo\n", true, Some(2)),
            chunk("head ", false, None),
            chunk("body ", false, None),
            chunk("tail\n", true, None),
            chunk("three\n", true, Some(3)),
        ];
        let whole = "one\ntwo\nhead body tail\nthree\n";
        for written in 0..whole.len() {
            let mut hand = Hand { chunks: chunks.clone().into(), begun: false };
            let seq = hand.advance(written);
            assert_eq!(seq, (written >= 8).then_some(2), "{written}");
            hand.keep_only_what_was_begun();
            let end = match written {
                0 | 8 | 23 => written,
                1..8 => 8,
                9..23 => 23,
                _ => whole.len(),
            };
            assert_eq!(rest(&hand), whole[written..end], "{written}");
        }
    }

    #[test]
    fn over_the_limit_the_queue_is_dropped_and_stays_empty() {
        let outbox = Outbox::new(10);
        assert!(outbox.push_events(&[chunk("0123456789", true, Some(1))]));
        assert!(outbox.is_long());
        assert!(!outbox.push_events(&[chunk("\n", true, Some(2))]));
        outbox.push_line(Bytes::from_static(b"late\n"));
        let mut hand = VecDeque::new();
        assert!(matches!(outbox.take(&mut hand), Some(Ending::CutOff(_))));
        assert!(hand.is_empty());
    }
}
