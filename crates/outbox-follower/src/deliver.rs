//! Appends records to inboxes and syncs them.
//!
//! Nodes are spread over shards. A shard does one thing after the other, so that the records of a node keep their order;
//! shards work beside each other, because a sync is mostly waiting for the disk.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;

use drover_mailbox::{MAX_LINE_BYTES, Mailbox, StreamWriter};
use drover_proto::mailbox::{Delivery, DeliveryResult};
use drover_service::Context;
use drover_types::SwarmId;
use rustix::io::Errno;
use serde::de::IgnoredAny;
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, warn};

use crate::metrics::Metrics;
use crate::refs::{self, NodeKey};
use crate::settings::Settings;

/// More than the disk has use for, few enough threads.
const SHARDS: usize = 16;
/// Jobs that may wait for a shard; then callers wait.
const MAX_JOBS: usize = 64;

/// The inboxes of all nodes.
#[derive(Clone)]
pub(crate) struct Inboxes {
    shards: Vec<mpsc::Sender<Job>>,
    metrics: Metrics,
}

enum Job {
    Append(Vec<Append>, oneshot::Sender<Vec<(usize, DeliveryResult)>>),
    Close(SwarmId, oneshot::Sender<()>),
    CloseNode(NodeKey),
    CloseAll,
}

/// One record, and its place in the request.
struct Append {
    index: usize,
    node: NodeKey,
    /// The record and its line end.
    line: Vec<u8>,
}

impl Inboxes {
    pub(crate) fn start(settings: &Settings, ctx: &Context, metrics: &Metrics) -> Self {
        let shards = (0..SHARDS)
            .map(|_| {
                let (jobs, queue) = mpsc::channel(MAX_JOBS);
                let shard = Shard {
                    mailbox: Mailbox::new(&settings.mailbox),
                    segment_bytes: settings.segment_bytes,
                    max_open: (settings.max_open / SHARDS).max(1),
                    writers: HashMap::new(),
                    order: BTreeMap::new(),
                    uses: 0,
                    metrics: metrics.clone(),
                };
                run_shard(ctx, shard, queue);
                jobs
            })
            .collect();
        Self { shards, metrics: metrics.clone() }
    }

    /// Appends and syncs; one result per delivery, in order.
    pub(crate) async fn deliver(&self, deliveries: Vec<Delivery>) -> Vec<DeliveryResult> {
        let timer = std::time::Instant::now();
        // What no shard answers for (it ended, or we are shutting down) may have been written all the same.
        let unanswered = || unsure("the follower ended before the record was synced; deliver it again".to_owned());
        let mut results: Vec<DeliveryResult> = deliveries.iter().map(|_| unanswered()).collect();
        let mut shares: Vec<Vec<Append>> = self.shards.iter().map(|_| Vec::new()).collect();
        let mut spoiled = HashSet::new();
        for (index, delivery) in deliveries.into_iter().enumerate() {
            match parse(&delivery) {
                Ok((node, _)) if spoiled.contains(&node) => results[index] = refused(BEHIND_A_REFUSED.to_owned()),
                Ok((node, line)) => shares[node.place(SHARDS)].push(Append { index, node, line }),
                Err((node, why)) => {
                    results[index] = refused(why);
                    spoiled.extend(node);
                }
            }
        }
        let mut answers = Vec::new();
        for (shard, share) in self.shards.iter().zip(shares) {
            if share.is_empty() {
                continue;
            }
            let (answer, answered) = oneshot::channel();
            if let Err(mpsc::error::SendError(job)) = shard.send(Job::Append(share, answer)).await {
                if let Job::Append(share, _) = job {
                    for append in share {
                        results[append.index] = refused("the follower is shutting down".to_owned());
                    }
                }
                continue;
            }
            answers.push(answered);
        }
        for answer in answers {
            for (index, result) in answer.await.unwrap_or_default() {
                results[index] = result;
            }
        }
        for result in &results {
            self.metrics.deliveries.get_or_create(&[("result", outcome(result))]).inc();
        }
        self.metrics.deliver_seconds.observe(timer.elapsed().as_secs_f64());
        results
    }

    /// Closes what is open of a swarm, behind everything that was to be delivered to it.
    pub(crate) async fn close(&self, swarm: &SwarmId) {
        let mut answers = Vec::new();
        for shard in &self.shards {
            let (answer, answered) = oneshot::channel();
            if shard.send(Job::Close(swarm.clone(), answer)).await.is_ok() {
                answers.push(answered);
            }
        }
        for answer in answers {
            // A shard that is gone has closed everything.
            let _ = answer.await;
        }
    }

    /// Closes the inbox of a node that is followed no longer: it has ended, or another generation begins. When the shard has
    /// too much to do for that, the file stays open until it is the least used one or its swarm is removed.
    pub(crate) fn close_node(&self, node: NodeKey) {
        if let Some(shard) = self.shards.get(node.place(SHARDS)) {
            let _ = shard.try_send(Job::CloseNode(node));
        }
    }

    /// Closes every inbox: nobody is here who would deliver, and whoever does next may do it through another follower. One that
    /// goes on with a file that the other has added to would write into the midst of it.
    pub(crate) async fn close_all(&self) {
        for shard in &self.shards {
            // A shard that is gone has closed everything.
            let _ = shard.send(Job::CloseAll).await;
        }
    }
}

const BEHIND_A_REFUSED: &str = "an earlier record of this node was not written; deliver both again, in order";

fn outcome(result: &DeliveryResult) -> &'static str {
    match (result.error.is_empty(), result.refused) {
        (true, _) => "synced",
        (false, true) => "refused",
        (false, false) => "unsure",
    }
}

fn refused(error: String) -> DeliveryResult {
    DeliveryResult { error, refused: true }
}

fn unsure(error: String) -> DeliveryResult {
    DeliveryResult { error, refused: false }
}

/// Checks a delivery before anything is written. The error has the node when that much was right.
fn parse(delivery: &Delivery) -> Result<(NodeKey, Vec<u8>), (Option<NodeKey>, String)> {
    let node = refs::node(delivery.node.as_ref()).map_err(|failure| (None, failure.message))?;
    match check_record(&delivery.record) {
        Ok(()) => {
            let mut line = Vec::with_capacity(delivery.record.len() + 1);
            line.extend_from_slice(&delivery.record);
            line.push(b'\n');
            Ok((node, line))
        }
        Err(why) => Err((Some(node), why)),
    }
}

/// A record is one line with one JSON object.
fn check_record(record: &[u8]) -> Result<(), String> {
    if record.len() >= MAX_LINE_BYTES {
        return Err(format!("record of {} bytes is longer than {}", record.len(), MAX_LINE_BYTES - 1));
    }
    let text = std::str::from_utf8(record).map_err(|error| format!("record is not UTF-8: {error}"))?;
    if text.contains('\n') {
        return Err("record is more than one line".to_owned());
    }
    if !text.trim_start().starts_with('{') {
        return Err("record is not a JSON object".to_owned());
    }
    match serde_json::from_str::<IgnoredAny>(text) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("record is not JSON: {error}")),
    }
}

/// The state of one shard; moves between its task and the thread that works.
struct Shard {
    mailbox: Mailbox,
    segment_bytes: u64,
    max_open: usize,
    writers: HashMap<NodeKey, (u64, StreamWriter)>,
    /// Nodes by last use of their writer.
    order: BTreeMap<u64, NodeKey>,
    uses: u64,
    metrics: Metrics,
}

fn run_shard(ctx: &Context, mut shard: Shard, mut jobs: mpsc::Receiver<Job>) {
    let failing = ctx.clone();
    let stopping = ctx.shutdown().clone();
    ctx.spawn("inbox shard", async move {
        loop {
            // At the end, what was accepted is still carried out; what comes later finds the queue closed.
            let job = tokio::select! {
                biased;
                job = jobs.recv() => job,
                () = stopping.cancelled() => {
                    jobs.close();
                    jobs.recv().await
                }
            };
            let Some(job) = job else { return };
            let worked = tokio::task::spawn_blocking(move || {
                shard.work(job);
                shard
            });
            match worked.await {
                Ok(back) => shard = back,
                Err(_) => return failing.fail(anyhow::anyhow!("a thread that writes inboxes panicked")),
            }
        }
    });
}

impl Shard {
    fn work(&mut self, job: Job) {
        // Nobody waits for an answer any more when its receiver is gone; the records are written all the same.
        match job {
            Job::Append(appends, answer) => {
                let _ = answer.send(self.append(appends));
            }
            Job::Close(swarm, answer) => {
                let nodes: Vec<NodeKey> = self.writers.keys().filter(|node| node.swarm == swarm).cloned().collect();
                for node in &nodes {
                    self.close(node);
                }
                let _ = answer.send(());
            }
            Job::CloseNode(node) => self.close(&node),
            Job::CloseAll => self.close_down_to(0),
        }
    }

    fn append(&mut self, appends: Vec<Append>) -> Vec<(usize, DeliveryResult)> {
        let mut results = Vec::with_capacity(appends.len());
        let mut share = appends.into_iter().peekable();
        // As many nodes at a time as may be open, all appended before the first sync.
        while share.peek().is_some() {
            let mut written: HashMap<NodeKey, Vec<(usize, usize)>> = HashMap::new();
            let mut failed: HashSet<NodeKey> = HashSet::new();
            while let Some(next) =
                share.next_if(|next| written.len() < self.max_open || written.contains_key(&next.node))
            {
                let Append { index, node, line } = next;
                if failed.contains(&node) {
                    results.push((index, refused(BEHIND_A_REFUSED.to_owned())));
                    continue;
                }
                match self.append_one(&node, &line) {
                    Ok(()) => written.entry(node).or_default().push((index, line.len())),
                    Err(result) => {
                        results.push((index, result));
                        failed.insert(node);
                    }
                }
            }
            for (node, lines) in written {
                results.extend(self.sync(&node, &lines));
            }
            // The failed nodes' later records must not overtake: the whole rest of the share sees them.
            if !failed.is_empty() {
                let (behind, rest): (Vec<Append>, Vec<Append>) = share.partition(|next| failed.contains(&next.node));
                results.extend(behind.into_iter().map(|next| (next.index, refused(BEHIND_A_REFUSED.to_owned()))));
                share = rest.into_iter().peekable();
            }
        }
        results
    }

    fn append_one(&mut self, node: &NodeKey, line: &[u8]) -> Result<(), DeliveryResult> {
        let writer = match self.writer(node) {
            Ok(writer) => writer,
            // Nothing was written: the inbox could not even be opened.
            Err(error) => return Err(refused(self.complaint(node, "open", &error))),
        };
        match writer.append(line) {
            Ok(()) => Ok(()),
            Err(error) => {
                let why = self.complaint(node, "append to", &error);
                // After any other error a server may have carried out what it did not confirm.
                Err(if is_certain(&error) { refused(why) } else { unsure(why) })
            }
        }
    }

    fn sync(&mut self, node: &NodeKey, lines: &[(usize, usize)]) -> Vec<(usize, DeliveryResult)> {
        let synced = match self.writers.get_mut(node) {
            Some((_, writer)) => writer.sync(),
            None => Err(io::Error::other("the inbox was closed before its sync")),
        };
        match synced {
            Ok(()) => {
                self.metrics.delivered_bytes.inc_by(lines.iter().map(|(_, len)| *len as u64).sum());
                lines.iter().map(|(index, _)| (*index, DeliveryResult::default())).collect()
            }
            Err(error) => {
                let why = self.complaint(node, "sync", &error);
                lines.iter().map(|(index, _)| (*index, unsure(why.clone()))).collect()
            }
        }
    }

    /// The writer of a node, opened when it is not.
    fn writer(&mut self, node: &NodeKey) -> io::Result<&mut StreamWriter> {
        self.uses += 1;
        let uses = self.uses;
        if let Some((used, _)) = self.writers.get_mut(node) {
            self.order.remove(used);
            *used = uses;
        } else {
            self.close_down_to(self.max_open.saturating_sub(1));
            let dir = self.mailbox.inbox_dir(&node.swarm, node.node);
            let writer = StreamWriter::open(dir, self.segment_bytes)?;
            self.writers.insert(node.clone(), (uses, writer));
            self.metrics.open_files.inc();
        }
        self.order.insert(uses, node.clone());
        self.writers.get_mut(node).map(|(_, writer)| writer).ok_or_else(|| io::Error::other("the inbox was closed"))
    }

    fn close_down_to(&mut self, most: usize) {
        while self.writers.len() > most
            && let Some((_, node)) = self.order.first_key_value()
        {
            let node = node.clone();
            self.close(&node);
        }
    }

    fn close(&mut self, node: &NodeKey) {
        if let Some((used, _)) = self.writers.remove(node) {
            self.order.remove(&used);
            self.metrics.open_files.dec();
            debug!(swarm_id = %node.swarm, node_id = %node.node, "inbox closed");
        }
    }

    fn complaint(&self, node: &NodeKey, verb: &str, error: &io::Error) -> String {
        let dir = self.mailbox.inbox_dir(&node.swarm, node.node);
        warn!(swarm_id = %node.swarm, node_id = %node.node, doing = verb, %error, "inbox not written");
        format!("cannot {verb} {}: {error}{}", dir.display(), advice(error))
    }
}

fn advice(error: &io::Error) -> &'static str {
    match Errno::from_io_error(error) {
        Some(Errno::NOSPC | Errno::DQUOT) => "; free some space there",
        Some(Errno::ROFS) => "; mount it writable",
        Some(Errno::ACCESS | Errno::PERM) => "; check who owns it",
        _ => "",
    }
}

/// The system refused the write as a whole, or the part that it took was taken back or can never become a line.
fn is_certain(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    let refusals =
        [Errno::NOSPC, Errno::DQUOT, Errno::FBIG, Errno::ROFS, Errno::ACCESS, Errno::PERM, Errno::MFILE, Errno::NFILE];
    errno.is_some_and(|errno| refusals.contains(&errno)) || error.kind() == io::ErrorKind::InvalidInput
}
