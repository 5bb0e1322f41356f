//! Results on their way out, in the order of the input or as they come.

use std::collections::{BTreeMap, HashMap};

use drover_proto::dispatch::{self as pb, dispatch_response};

use super::Answers;
use super::task::Asked;

/// Results, and bytes of them, that go out in one message.
const TOGETHER: usize = 256;
const TOGETHER_BYTES: usize = 1 << 20;

pub(super) struct Outgoing {
    to: Answers,
    unordered: bool,
    /// Tasks that were handed in, by position.
    expected: HashMap<u64, Asked>,
    /// Results whose turn has not come.
    early: BTreeMap<u32, pb::TaskResult>,
    /// Position of the next result to go out, when in order.
    next: u32,
    ready: Vec<pb::TaskResult>,
    ready_bytes: usize,
    gone: usize,
}

impl Outgoing {
    pub(super) fn new(to: Answers, unordered: bool) -> Self {
        Self {
            to,
            unordered,
            expected: HashMap::new(),
            early: BTreeMap::new(),
            next: 0,
            ready: Vec::new(),
            ready_bytes: 0,
            gone: 0,
        }
    }

    /// Results that have gone out.
    pub(super) fn gone(&self) -> usize {
        self.gone
    }

    /// Remembers a task until its end; gives its tag.
    pub(super) fn expect(&mut self, asked: Asked) -> u64 {
        let tag = u64::from(asked.position);
        self.expected.insert(tag, asked);
        tag
    }

    /// The task of a tag, whose end has come.
    pub(super) fn expected(&mut self, tag: u64) -> Option<Asked> {
        self.expected.remove(&tag)
    }

    /// Takes a result. Gives how many bytes went out because of it.
    pub(super) async fn give(&mut self, position: u32, result: pb::TaskResult) -> usize {
        if self.unordered {
            return self.pass(result).await;
        }
        self.early.insert(position, result);
        let mut bytes = 0;
        while let Some(result) = self.early.remove(&self.next) {
            self.next += 1;
            bytes += self.pass(result).await;
        }
        bytes
    }

    async fn pass(&mut self, result: pb::TaskResult) -> usize {
        let bytes = result.output.len();
        self.ready_bytes += bytes;
        self.ready.push(result);
        self.gone += 1;
        if self.ready.len() >= TOGETHER || self.ready_bytes >= TOGETHER_BYTES {
            self.flush(0).await;
        }
        bytes
    }

    /// Sends what is ready.
    pub(super) async fn flush(&mut self, open_tasks: u32) {
        if self.ready.is_empty() {
            return;
        }
        self.ready_bytes = 0;
        let results = std::mem::take(&mut self.ready);
        self.send(dispatch_response::Response::Results(pb::ResultBatch { results, open_tasks })).await;
    }

    /// Sends something. Waits while the caller does not read; one that has gone away is noticed elsewhere.
    pub(super) async fn send(&self, response: dispatch_response::Response) {
        let _ = self.to.send(Ok(pb::DispatchResponse { response: Some(response) })).await;
    }

    /// Resolves when the caller has gone away.
    pub(super) async fn closed(&self) {
        self.to.closed().await;
    }
}
