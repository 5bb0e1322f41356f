//! What workers say. Every record is taken once; a word of a worker that was replaced is kept and changes nothing that a
//! later one said.

use std::sync::Arc;

use bytes::Bytes;
use drover_types::{Generation, InjectionState, OutboxId};
use serde_json::json;
use tracing::warn;

use super::effects::{Effects, Micros, Out};
use super::input::{OutRecord, RecordBody, RecordChunk};
use super::members::Source;
use super::model::{Cursor, SwarmKey, Trouble};
use super::nodes::ASK_AGAIN;
use super::{Core, Saying, of_node};

impl Core {
    /// Takes whole lines of one outbox, as far as they are new.
    pub(super) fn records(&mut self, chunk: RecordChunk, fx: &mut Effects) {
        let Some(&key) = self.by_id.get(&chunk.outbox.swarm) else { return };
        let index = chunk.outbox.node.0;
        let generation = chunk.outbox.generation.0;
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        let Some(node) = swarm.nodes.get_mut(index as usize) else { return };
        let Some(stream) = node.streams.get_mut(&generation).filter(|stream| !stream.closed) else { return };
        let end = (chunk.next_segment, chunk.next_offset);
        if end <= stream.cursor.place() {
            return; // Read before.
        }
        if (chunk.segment, chunk.start_offset) > stream.cursor.place() {
            // What lies between was dropped when it could not be stored. Read it again from where we are.
            if stream.asked_again == 0 || fx.now.saturating_sub(stream.asked_again) >= ASK_AGAIN {
                stream.asked_again = fx.now.max(1);
                fx.out.push(Out::Follow(Arc::clone(&swarm.facts.side), chunk.outbox, stream.cursor));
            }
            return;
        }
        stream.asked_again = 0;
        let mut seq = stream.cursor.seq;
        self.book.dirty.streams.insert((key, index, generation));
        if !chunk.damage.is_empty() {
            warn!(swarm_id = %swarm.head.id, node_id = index, generation, damage = chunk.damage, "outbox is damaged");
            let data = json!({ "generation": generation, "damage": chunk.damage });
            self.book.say(fx, &swarm.head, of_node("mailbox_damage", index, None, &data));
        }
        for record in chunk.records {
            if record.seq <= seq {
                continue;
            }
            seq = record.seq;
            self.record(key, index, generation, record, fx);
        }
        if let Some(stream) = self.stream_mut(key, index, generation) {
            stream.cursor = Cursor { segment: end.0, offset: end.1, seq };
        }
        // What a termination or an end waited for may be among what was just read.
        match self.swarms.get(&key) {
            Some(swarm) if swarm.facts.over_since != 0 => self.finish_when_settled(key, fx),
            Some(swarm) if swarm.facts.ending.is_some() => self.advance_ending(key, fx),
            _ => {}
        }
    }

    fn stream_mut(&mut self, key: SwarmKey, index: u32, generation: u32) -> Option<&mut super::model::Stream> {
        self.swarms.get_mut(&key)?.nodes.get_mut(index as usize)?.streams.get_mut(&generation)
    }

    /// Takes one record.
    fn record(&mut self, key: SwarmKey, index: u32, generation: u32, record: OutRecord, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        let over = swarm.is_over();
        let Some(node) = swarm.nodes.get_mut(index as usize) else { return };
        let replaced = generation < node.facts.hello;
        // An injection that is open, of this node, and of which no later worker has spoken.
        let mine = record.injection.as_ref().filter(|id| {
            self.book.injections.get(*id).is_some_and(|injection| {
                injection.swarm == key
                    && injection.node.0 == index
                    && !injection.state.is_over()
                    && injection.spoken <= generation
            })
        });
        let fenced = replaced && mine.is_none();
        if let Some(id) = mine {
            if let Some(injection) = self.book.injections.get_mut(id)
                && injection.spoken != generation
            {
                injection.spoken = generation;
                self.book.dirty.injections.insert(id.clone());
            }
            // Whoever speaks of a prompt has it, whatever became of our call.
            if self.book.injections.get(id).is_some_and(|injection| injection.state == InjectionState::Accepted) {
                let place = node.queue.iter().position(|pending| pending.injection.as_ref() == Some(id));
                if let Some(place) = place.filter(|&place| place >= node.in_flight) {
                    node.queue.remove(place);
                }
                self.book.mark_delivered(&swarm.head, id, fx);
            }
        }
        let mine = mine.cloned();
        match &record.body {
            RecordBody::TurnComplete { status, error } => {
                // The first last word counts; a second one would end somebody else's turn at the clients.
                if let Some(id) = mine {
                    let well = status == "completed";
                    let error = match (well, error.is_empty()) {
                        (true, _) => String::new(),
                        (false, true) => status.clone(),
                        (false, false) => error.clone(),
                    };
                    if self.book.injections.get(&id).is_some_and(|injection| !injection.assistant_seen) {
                        let data = json!({ "content": "", "synthesized": true });
                        self.book.say(fx, &swarm.head, of_node("assistant", index, Some(&id), &data));
                    }
                    let seq = self.pass_on(key, index, &record, false, fx);
                    self.end_injection(&id, well, &error, seq, fx);
                }
                return;
            }
            RecordBody::Usage(total) => {
                if let (Some(id), Some(total)) = (&mine, total)
                    && let Some(injection) = self.book.injections.get_mut(id)
                {
                    if injection.last_usage == Some(*total) {
                        return;
                    }
                    injection.last_usage = Some(*total);
                    self.book.dirty.injections.insert(id.clone());
                }
            }
            RecordBody::Members(said) => {
                let happened = time_of(&record, swarm.facts.created, fx.now);
                let source = Source { key, node: index, late: replaced || over, happened };
                self.members_said(source, said, fx);
                return;
            }
            RecordBody::RingSaid(said) => {
                if !fenced && !over {
                    self.ring_said(key, index, said.clone());
                }
                return;
            }
            RecordBody::Notes(notes) => {
                if !fenced && !over {
                    self.notes_said(key, index, notes.clone());
                }
                return;
            }
            RecordBody::Assistant => {
                if let Some(injection) = mine.as_ref().and_then(|id| self.book.injections.get_mut(id)) {
                    injection.assistant_seen = true;
                }
            }
            RecordBody::TurnStarted => {
                if let Some(id) = &mine
                    && let Some(injection) = self.book.injections.get_mut(id)
                {
                    injection.state = InjectionState::Started;
                    injection.since = time_of(&record, swarm.facts.created, fx.now);
                    self.book.dirty.injections.insert(id.clone());
                    if generation >= node.facts.generation {
                        node.running = Some(id.clone());
                        self.book.dirty.views.insert(key);
                    }
                }
            }
            RecordBody::ApprovalRequired { approval_id, call_id } if !fenced && !over => {
                let (approval_id, call_id) = (approval_id.clone(), call_id.clone());
                self.approval_required(key, index, generation, &record, &approval_id, &call_id, mine, fx);
                return;
            }
            RecordBody::ApprovalResolved { approval_id, call_id } => {
                let (approval_id, call_id) = (approval_id.clone(), call_id.clone());
                self.approval_resolved(key, index, generation, &record, &approval_id, &call_id, fenced, fx);
                return;
            }
            _ => {}
        }
        self.pass_on(key, index, &record, fenced, fx);
        if fenced || over {
            return;
        }
        match record.body {
            RecordBody::Hello { host, pid } => self.hello(key, index, generation, &host, pid, fx),
            RecordBody::Bye => self.bye(key, index, generation, fx),
            RecordBody::Error { failure, fatal: true } => {
                if let Some(node) = self.swarms.get_mut(&key).and_then(|swarm| swarm.nodes.get_mut(index as usize)) {
                    node.facts.gave_up = generation;
                    node.facts.trouble = Some(Trouble::from(&failure));
                    self.book.dirty.nodes.insert((key, index));
                    self.book.dirty.views.insert(key);
                }
                self.evaluate(key, fx);
            }
            _ => {}
        }
    }

    /// Says a record in the log, with its own name and data.
    pub(super) fn pass_on(
        &mut self,
        key: SwarmKey,
        index: u32,
        record: &OutRecord,
        fenced: bool,
        fx: &mut Effects,
    ) -> u64 {
        let data = if fenced { fence(&record.data) } else { record.data.clone() };
        let Some(swarm) = self.swarms.get(&key) else { return 0 };
        let what = Saying {
            name: record.name.clone(),
            node: Some(index),
            injection: record.injection.as_ref(),
            happened: Some(time_of(record, swarm.facts.created, fx.now)),
            data,
        };
        self.book.say(fx, &swarm.head, what)
    }

    /// A worker is ready.
    fn hello(&mut self, key: SwarmKey, index: u32, generation: u32, host: &str, pid: u32, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        let side = &swarm.facts.side;
        let reachable = self.book.followers.is_up(side);
        let Some(node) = swarm.nodes.get_mut(index as usize) else { return };
        if generation < node.facts.hello {
            return;
        }
        node.facts.hello = generation;
        if generation >= node.facts.generation {
            host.clone_into(&mut node.facts.host);
            node.facts.pid = pid;
            node.facts.trouble = None;
            node.facts.notes.clear();
            node.running = None;
        }
        for (&earlier, stream) in node.streams.range_mut(..generation) {
            if stream.superseded == 0 {
                stream.superseded = fx.now.max(1);
                self.book.dirty.streams.insert((key, index, earlier));
                if reachable && !stream.closed {
                    // What is left there is to be read soon, not at the next quiet look.
                    let outbox =
                        OutboxId { swarm: swarm.head.id.clone(), node: node.index, generation: Generation(earlier) };
                    fx.out.push(Out::Follow(Arc::clone(side), outbox, stream.cursor));
                }
            }
        }
        self.book.dirty.nodes.insert((key, index));
        self.book.dirty.views.insert(key);
        self.evaluate(key, fx);
        self.warm(key, index, fx);
    }

    /// A worker has said its last word.
    fn bye(&mut self, key: SwarmKey, index: u32, generation: u32, fx: &mut Effects) {
        let Some(node) = self.swarms.get_mut(&key).and_then(|swarm| swarm.nodes.get_mut(index as usize)) else {
            return;
        };
        node.facts.bye = node.facts.bye.max(generation);
        node.running = None;
        self.book.dirty.nodes.insert((key, index));
        self.book.dirty.views.insert(key);
        self.evaluate(key, fx);
    }
}

/// When a record was written, as far as its worker's clock can be believed. One that is ahead of ours, or that has not
/// reached the swarm's beginning yet, says nothing; then it is the time at which the record arrived.
fn time_of(record: &OutRecord, created: Micros, now: Micros) -> Micros {
    if (created..=now).contains(&record.ts) { record.ts } else { now }
}

/// Marks the data of an event as a late word.
fn fence(data: &Bytes) -> Bytes {
    let rest = data.strip_prefix(b"{").map_or(&[][..], <[u8]>::trim_ascii_start);
    let mut marked = Vec::with_capacity(data.len() + 16);
    marked.extend_from_slice(b"{\"fenced\":true");
    match rest {
        b"" | b"}" => marked.push(b'}'),
        rest => {
            marked.push(b',');
            marked.extend_from_slice(rest);
        }
    }
    marked.into()
}
