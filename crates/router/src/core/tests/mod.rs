//! The core played by hand: a world of one follower, one allocator and workers that are a few lines each.

mod histories;
mod invariants;
mod launching;
mod membership;
mod prompts;
mod races;
mod sides;
mod terminating;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use drover_proto::allocator::{AllocationState, WorkerState};
use drover_proto::common::LaunchSpec;
use drover_types::{ErrorCode, Failure, Generation, InjectionId, NodeIndex, OutboxId, SwarmId};
use serde_json::{Value, json};
use uuid::Uuid;

use super::effects::{Answer, DeliveryOrder, Effects, Event, InboxBody, Micros, Out, Step, Token, Word};
use super::input::{
    AllocatedNode, Allocation, DeliveryReport, InjectOrder, Input, InterruptOrder, LaunchOrder, OutRecord, Outcome,
    RecordBody, RecordChunk, ResolveOrder, TerminateOrder,
};
use super::members::{Ballot, MembersWord};
use super::model::{Cursor, Settings, Side};
use super::{Core, SECOND};
use crate::store::testing::Disk;

pub(super) const MINUTE: Micros = 60 * SECOND;

fn settings() -> Settings {
    Settings {
        default_agent: "echo".into(),
        soft_timeout: MINUTE,
        hard_timeout: 3 * MINUTE,
        graceful: 20 * SECOND,
        keep_ended: 60 * MINUTE,
    }
}

/// One record of an outbox: what the router sees of it.
#[derive(Clone)]
struct Written {
    ts: Micros,
    injection: Option<InjectionId>,
    name: &'static str,
    data: Value,
}

/// The core with a disk under it and a world around it. An effect leaves only with a commit.
struct World {
    now: Micros,
    core: Core,
    fx: Effects,
    disk: Disk,
    /// Committed events.
    events: Vec<Event>,
    /// Orders that have left, not yet carried out.
    deliveries: VecDeque<DeliveryOrder>,
    ensures: Vec<(SwarmId, Arc<LaunchSpec>)>,
    releases: Vec<(SwarmId, bool)>,
    removed: Vec<SwarmId>,
    hot: BTreeSet<(SwarmId, u32)>,
    following: BTreeMap<OutboxId, Cursor>,
    /// Followers of clusters that are talked to.
    reached: BTreeSet<Side>,
    outboxes: BTreeMap<OutboxId, Vec<Written>>,
    answers: BTreeMap<Token, Vec<Step>>,
    plain: BTreeMap<Token, Result<Answer, Failure>>,
    next_token: Token,
}

impl World {
    fn new() -> Self {
        let disk = Disk::new();
        let core = Core::restore(settings(), disk.read());
        let mut counter = 0_u128;
        let ids = move || {
            counter += 1;
            Uuid::from_u128(counter << 64 | 0x4000_8000_0000_0000_0000)
        };
        let mut world = Self {
            now: 1_000 * SECOND,
            core,
            fx: Effects::new(Box::new(ids)),
            disk,
            events: Vec::new(),
            deliveries: VecDeque::new(),
            ensures: Vec::new(),
            releases: Vec::new(),
            removed: Vec::new(),
            hot: BTreeSet::new(),
            following: BTreeMap::new(),
            reached: BTreeSet::new(),
            outboxes: BTreeMap::new(),
            answers: BTreeMap::new(),
            plain: BTreeMap::new(),
            next_token: 0,
        };
        world.happen(Input::FollowerUp("".into()));
        world.happen(Input::AllocatorSnapshot { begun_at: world.now, allocations: Vec::new() });
        world
    }

    /// Something happens and is committed.
    fn happen(&mut self, input: Input) {
        self.take(input);
        self.commit();
    }

    /// Something happens and is not committed yet.
    fn take(&mut self, input: Input) {
        self.now += 1;
        self.core.handle(self.now, input, &mut self.fx);
    }

    fn commit(&mut self) {
        self.disk.write(&self.fx.events, &self.core);
        self.core.committed();
        self.events.append(&mut self.fx.events);
        for out in std::mem::take(&mut self.fx.out) {
            self.let_out(out);
        }
    }

    fn let_out(&mut self, out: Out) {
        if let Out::Follow(side, ..) | Out::Unfollow(side, ..) | Out::Hot(side, ..) | Out::RemoveMailbox(side, _) = &out
        {
            assert!(side.is_empty() || self.reached.contains(side), "nobody is there who could be asked: {out:?}");
        }
        match out {
            Out::Answer(token, answer) => drop(self.plain.insert(token, answer)),
            Out::Refuse(token, failure) => self.answers.entry(token).or_default().push(Step::Fail(failure)),
            Out::Attach { token, backlog, .. } => self.answers.entry(token).or_default().extend(backlog),
            Out::Step(..) => {}
            Out::Deliver(order) => {
                assert!(order.side.is_empty() || self.reached.contains(&order.side), "nobody would deliver {order:?}");
                self.deliveries.push_back(order);
            }
            Out::Follow(_, outbox, cursor) => drop(self.following.insert(outbox, cursor)),
            Out::Unfollow(_, outbox) => drop(self.following.remove(&outbox)),
            Out::Hot(_, swarm, node, true) => drop(self.hot.insert((swarm, node.0))),
            Out::Hot(_, swarm, node, false) => drop(self.hot.remove(&(swarm, node.0))),
            Out::Reach(side, true) => drop(self.reached.insert(side)),
            Out::Reach(side, false) => assert!(self.reached.remove(&side), "{side} was not talked to"),
            Out::Ensure(swarm, spec, _) => self.ensures.push((swarm, spec)),
            Out::Release(swarm, force) => self.releases.push((swarm, force)),
            Out::RemoveMailbox(_, swarm) => self.removed.push(swarm),
        }
    }

    /// The process dies: what was not committed never happened, what had left is still on its way.
    fn crash(&mut self) {
        self.fx.clear();
        self.core = Core::restore(settings(), self.disk.read());
        self.following.clear();
        self.hot.clear();
        self.reached.clear();
        self.core.resume(self.now, &mut self.fx);
        self.commit();
        self.happen(Input::FollowerUp("".into()));
    }

    fn token(&mut self) -> Token {
        self.next_token += 1;
        self.next_token
    }

    fn pass(&mut self, time: Micros) {
        let end = self.now + time;
        while self.now < end {
            self.now = (self.now + SECOND / 5).min(end);
            self.happen(Input::Tick);
        }
    }

    // Callers.

    fn launch(&mut self, request_id: &str, spec: LaunchSpec) -> Token {
        let token = self.token();
        let prior = self.disk.prior_request(request_id);
        let order = LaunchOrder { request_id: request_id.into(), spec, trace: String::new(), place: None, prior };
        self.happen(Input::Launch(token, Box::new(order)));
        token
    }

    fn inject_order(&self, request_id: &str, swarm: &SwarmId, nodes: &[u32], content: &str) -> InjectOrder {
        InjectOrder {
            request_id: request_id.into(),
            swarm: swarm.to_string(),
            nodes: nodes.to_vec(),
            content: content.into(),
            injection_id: None,
            steer: false,
            trace: String::new(),
            prior: self.disk.prior_request(request_id),
            prior_injection: None,
        }
    }

    fn inject(&mut self, request_id: &str, swarm: &SwarmId, nodes: &[u32], content: &str) -> Token {
        let token = self.token();
        let order = self.inject_order(request_id, swarm, nodes, content);
        self.happen(Input::Inject(token, Box::new(order)));
        token
    }

    fn terminate(&mut self, request_id: &str, swarm: &SwarmId, force: bool) -> Token {
        let token = self.token();
        let order = TerminateOrder { request_id: request_id.into(), swarm: swarm.to_string(), force };
        self.happen(Input::Terminate(token, order));
        token
    }

    fn failure(&self, token: Token) -> Failure {
        match self.answers.get(&token).map(Vec::as_slice) {
            Some([Step::Fail(failure)]) => failure.clone(),
            other => panic!("not refused: {other:?}"),
        }
    }

    // The allocator.

    fn allocation(swarm: &SwarmId, nodes: u32) -> Allocation {
        let node = |index| AllocatedNode {
            index: NodeIndex(index),
            host: "here".into(),
            generation: 1,
            state: WorkerState::Running,
            reason: String::new(),
            pid: 100 + index,
            restarts: 0,
        };
        Allocation {
            swarm: swarm.clone(),
            job: "job-1".into(),
            state: AllocationState::Running,
            backend_state: "RUNNING".into(),
            reason: String::new(),
            backend: "local".into(),
            provider: "here".into(),
            follower: String::new(),
            nodes: (0..nodes).map(node).collect(),
        }
    }

    // Workers.

    fn outbox(swarm: &SwarmId, node: u32, generation: u32) -> OutboxId {
        OutboxId { swarm: swarm.clone(), node: NodeIndex(node), generation: Generation(generation) }
    }

    /// A worker writes a record; nobody has read it yet.
    fn write(&mut self, outbox: &OutboxId, name: &'static str, injection: Option<&InjectionId>, data: Value) {
        let written = Written { ts: 0, injection: injection.cloned(), name, data };
        self.outboxes.entry(outbox.clone()).or_default().push(written);
    }

    /// The follower ships up to `count` records of an outbox from a place on, which need not be where the router is.
    fn ship_from(&mut self, outbox: &OutboxId, place: u64, count: usize) -> Option<RecordChunk> {
        let written = self.outboxes.get(outbox)?;
        let from = place as usize;
        let records: Vec<OutRecord> = written
            .iter()
            .enumerate()
            .skip(from)
            .take(count)
            .map(|(index, written)| OutRecord {
                seq: index as u64 + 1,
                ts: written.ts,
                injection: written.injection.clone(),
                name: Word::Known(written.name),
                data: written.data.to_string().into(),
                body: body(written),
            })
            .collect();
        (!records.is_empty()).then(|| RecordChunk {
            outbox: outbox.clone(),
            segment: 1,
            start_offset: place,
            next_segment: 1,
            next_offset: place + records.len() as u64,
            records,
            damage: String::new(),
        })
    }

    /// The follower ships what follows where the router asked for.
    fn ship(&mut self, outbox: &OutboxId, count: usize) -> bool {
        let Some(cursor) = self.following.get(outbox).copied() else { return false };
        let Some(chunk) = self.ship_from(outbox, cursor.offset, count) else { return false };
        let next = Cursor { segment: 1, offset: chunk.next_offset, seq: chunk.next_offset };
        self.following.insert(outbox.clone(), next);
        self.happen(Input::Records(chunk));
        true
    }

    /// A worker writes a record and the follower ships it.
    fn says(&mut self, outbox: &OutboxId, name: &'static str, injection: Option<&InjectionId>, data: Value) {
        self.write(outbox, name, injection, data);
        while self.ship(outbox, 100) {}
    }

    /// The same, with the time by the worker's clock.
    fn says_at(&mut self, ts: Micros, outbox: &OutboxId, name: &'static str, injection: Option<&InjectionId>) {
        let data = if name == "turn_complete" { json!({"status": "completed"}) } else { json!({}) };
        let written = Written { ts, injection: injection.cloned(), name, data };
        self.outboxes.entry(outbox.clone()).or_default().push(written);
        while self.ship(outbox, 100) {}
    }

    /// Every order that has left is carried out, as told.
    fn deliver_all(&mut self, outcome: &Outcome) -> Vec<DeliveryOrder> {
        let mut done = Vec::new();
        while let Some(order) = self.deliveries.pop_front() {
            let results = order.records.iter().map(|record| (record.seq, outcome.clone())).collect();
            let report = DeliveryReport { swarm: order.swarm.clone(), node: order.node, results };
            done.push(order);
            self.happen(Input::Delivered(report));
        }
        done
    }

    /// A swarm that is up, with its first generation's outboxes.
    fn running(&mut self, nodes: u32) -> SwarmId {
        let name = format!("launch-{}", self.next_token);
        self.launch(&name, LaunchSpec { node_count: nodes, ..LaunchSpec::default() });
        let (swarm, _) = self.ensures.pop().unwrap();
        self.happen(Input::Ensured(swarm.clone(), Ok(Self::allocation(&swarm, nodes))));
        for node in 0..nodes {
            self.says(&Self::outbox(&swarm, node, 1), "worker_hello", None, json!({"host": "here", "pid": 100 + node}));
        }
        assert_eq!(self.status(&swarm), "running");
        swarm
    }

    // What is seen.

    fn status(&self, swarm: &SwarmId) -> String {
        self.core.swarms[&self.core.by_id[swarm]].facts.status.to_string()
    }

    fn node_state(&self, swarm: &SwarmId, node: usize) -> String {
        self.core.swarms[&self.core.by_id[swarm]].nodes[node].state().to_string()
    }

    fn names(&self) -> Vec<&str> {
        self.events.iter().map(|event| &*event.name).collect()
    }

    fn last(&self, name: &str) -> (&Event, Value) {
        let event = self.events.iter().rev().find(|event| *event.name == *name);
        let event = event.unwrap_or_else(|| panic!("no {name} in {:?}", self.names()));
        (event, serde_json::from_slice(&event.data).unwrap())
    }

    fn count(&self, name: &str) -> usize {
        self.events.iter().filter(|event| *event.name == *name).count()
    }

    fn injections(&self, token: Token) -> Vec<InjectionId> {
        self.answers[&token]
            .iter()
            .filter_map(|step| match step {
                Step::Inject(step) if step.state == 1 => step.injection_id.parse().ok(),
                _ => None,
            })
            .collect()
    }
}

fn body(written: &Written) -> RecordBody {
    let text = |key: &str| written.data[key].as_str().unwrap_or_default().to_owned();
    match written.name {
        "worker_hello" => RecordBody::Hello { host: text("host"), pid: 7 },
        "worker_bye" => RecordBody::Bye,
        "worker_error" => RecordBody::Error {
            failure: Failure::new(ErrorCode::from_name(&text("code")).unwrap(), text("message")).hint(text("hint")),
            fatal: written.data["fatal"].as_bool().unwrap(),
        },
        "turn_started" => RecordBody::TurnStarted,
        "turn_complete" => RecordBody::TurnComplete { status: text("status"), error: text("error") },
        "assistant" => RecordBody::Assistant,
        "usage" => RecordBody::Usage(written.data["total_tokens"].as_u64()),
        "exec_approval_required" => {
            RecordBody::ApprovalRequired { approval_id: text("approval_id"), call_id: text("call_id") }
        }
        "exec_approval_resolved" => {
            RecordBody::ApprovalResolved { approval_id: text("approval_id"), call_id: text("call_id") }
        }
        "members" => {
            let number = |key: &str| written.data[key].as_u64().unwrap_or_default();
            RecordBody::Members(Box::new(MembersWord {
                complete: written.data["complete"].as_bool().unwrap(),
                ballot: Ballot { epoch: number("epoch"), term: number("term") },
                members: serde_json::from_value(written.data["members"].clone()).unwrap(),
            }))
        }
        "keyring_state" => RecordBody::RingSaid(serde_json::from_value(written.data.clone()).unwrap()),
        "membership_notes" => RecordBody::Notes(serde_json::from_value(written.data["notes"].clone()).unwrap()),
        _ => RecordBody::Other,
    }
}
