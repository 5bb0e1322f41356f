//! The way of inbox records to their file: in order, one delivery per node at a time, again until the outcome is known.

use std::sync::Arc;

use drover_types::{ErrorCode, InjectionId, InjectionState};
use serde_json::{Value, json};

use super::effects::{DeliveryOrder, Effects, InboxBody, InboxRecord, Micros, Out, Topic};
use super::inject::inject_step;
use super::input::{DeliveryReport, Outcome};
use super::model::{Book, Head, Node, Pending, Request, Side, SwarmKey};
use super::{Core, SECOND, of_node};

/// Most records of one delivery to one node.
const MOST_RECORDS: usize = 256;
/// Most bytes of one delivery to one node, unless a single record is larger.
const MOST_BYTES: usize = 1 << 20;
/// A record that was certainly refused for this long is given up, unless it may have got through before.
const REFUSED_FOR_GOOD: Micros = 60 * SECOND;

impl Core {
    /// Sends what waits in the nodes' queues, where nothing is on its way.
    pub(super) fn pump_swarm(&mut self, key: SwarmKey, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        if !self.book.followers.is_up(&swarm.facts.side) {
            return;
        }
        // Before there is a job nobody can say whom a record is for; afterwards nobody reads it.
        if swarm.head.job.is_empty() || swarm.is_over() {
            return;
        }
        for node in &mut swarm.nodes {
            pump(&swarm.head, &swarm.facts.side, node, fx);
        }
    }

    /// What became of a delivery.
    pub(super) fn delivered(&mut self, report: DeliveryReport, fx: &mut Effects) {
        let Some(&key) = self.by_id.get(&report.swarm) else { return };
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        let Some(node) = swarm.nodes.get_mut(report.node.0 as usize) else { return };
        node.in_flight = 0;
        let mut written = Vec::new();
        let mut refused = Vec::new();
        let mut trouble = None;
        for (seq, outcome) in report.results {
            let Some(place) = node.queue.iter().position(|pending| pending.seq == seq) else { continue };
            match outcome {
                Outcome::Written => {
                    if let Some(pending) = node.queue.remove(place) {
                        match pending.injection {
                            Some(id) if matches!(pending.body, InboxBody::Inject(_)) => written.push(id),
                            _ => self.book.dirty.controls_done.push((key, node.index.0, seq)),
                        }
                    }
                }
                // Behind the first that was not written everything is refused, which says nothing about the rest.
                Outcome::Refused(_) if trouble.is_some() => {}
                Outcome::Refused(error) => {
                    let pending = &mut node.queue[place];
                    if pending.refused_since == 0 {
                        pending.refused_since = fx.now.max(1);
                    }
                    let refused_for = fx.now.saturating_sub(pending.refused_since);
                    if refused_for >= REFUSED_FOR_GOOD
                        && !pending.maybe_written
                        && let Some(pending) = node.queue.remove(place)
                    {
                        match pending.injection {
                            Some(id) if matches!(pending.body, InboxBody::Inject(_)) => {
                                refused.push((id, error.clone()));
                            }
                            _ => self.book.dirty.controls_done.push((key, node.index.0, seq)),
                        }
                    }
                    trouble = Some(error);
                }
                Outcome::Uncertain(error) => {
                    node.queue[place].maybe_written = true;
                    trouble = Some(error);
                }
            }
        }
        match trouble {
            Some(error) => node.delivery.failed(fx.now, SECOND / 10, 5 * SECOND, &error),
            None => node.delivery.succeeded(),
        }
        for id in written {
            self.book.mark_delivered(&swarm.head, &id, fx);
        }
        pump_if_up(&self.book, &swarm.head, &swarm.facts.side, node, fx);
        for (id, error) in refused {
            self.close_injection(&id, &error, ErrorCode::DeliveryFailed, fx);
        }
        self.warm(key, report.node.0, fx);
    }
}

impl Book {
    /// Says once that a prompt is in the inbox, also when only its effects show that it is.
    pub(super) fn mark_delivered(&mut self, head: &Head, id: &InjectionId, fx: &mut Effects) {
        let Some(injection) = self.injections.get_mut(id) else { return };
        if injection.state != InjectionState::Accepted {
            return;
        }
        injection.state = InjectionState::Delivered;
        injection.since = fx.now;
        let (index, request_id) = (injection.node, Arc::clone(&injection.request.id));
        self.dirty.injections.insert(id.clone());
        let data = json!({ "request_id": &*request_id });
        let seq = self.say(fx, head, of_node("inject_delivered", index.0, Some(id), &data));
        if let Some(injection) = self.injections.get_mut(id) {
            injection.delivered_seq = seq;
        }
        fx.step(Topic::Inject(request_id), inject_step(index, id, InjectionState::Delivered, "", seq));
    }
}

/// Puts a record other than a prompt into a node's queue.
pub(super) fn queue_control(
    book: &mut Book,
    nodes: &mut [Node],
    key: SwarmKey,
    index: u32,
    injection: Option<InjectionId>,
    kind: &'static str,
    data: &str,
) {
    let Some(node) = nodes.get_mut(index as usize) else { return };
    node.facts.inbox_seq += 1;
    let seq = node.facts.inbox_seq;
    node.queue.push_back(Pending {
        seq,
        injection,
        body: InboxBody::Control { kind, data: data.into() },
        maybe_written: false,
        refused_since: 0,
    });
    book.dirty.nodes.insert((key, index));
    book.dirty.controls.push((key, index, seq));
}

fn pump_if_up(book: &Book, head: &Head, side: &Side, node: &mut Node, fx: &mut Effects) {
    if book.followers.is_up(side) && !head.job.is_empty() {
        pump(head, side, node, fx);
    }
}

/// Sends the front of a node's queue, unless something is on its way already.
fn pump(head: &Head, side: &Side, node: &mut Node, fx: &mut Effects) {
    if node.in_flight > 0 || node.queue.is_empty() || !node.delivery.due(fx.now) {
        return;
    }
    let mut bytes = 0;
    let mut records = Vec::new();
    for pending in &node.queue {
        bytes += pending.body.bytes();
        if !records.is_empty() && (records.len() >= MOST_RECORDS || bytes > MOST_BYTES) {
            break;
        }
        records.push(InboxRecord {
            seq: pending.seq,
            injection: pending.injection.clone(),
            body: pending.body.clone(),
        });
    }
    node.in_flight = records.len();
    fx.out.push(Out::Deliver(DeliveryOrder {
        side: Arc::clone(side),
        swarm: head.id.clone(),
        node: node.index,
        generation: node.facts.generation,
        job: Arc::clone(&head.job),
        records,
    }));
}

/// An object with the fields of an inbox record of type `inject`.
pub(crate) fn inject_data(request: &Request) -> Value {
    json!({ "content": &*request.content, "steer": request.steer })
}
