//! Prompts: from accepted to their end, and the way of inbox records to their file.

use std::collections::BTreeSet;
use std::sync::Arc;

use drover_proto::router as pb;
use drover_types::{ErrorCode, Failure, InjectionId, InjectionState, NodeIndex};
use serde_json::json;

use super::delivery::queue_control;
use super::effects::{Answer, Effects, InboxBody, Out, Step, Token, Topic};
use super::input::{InjectOrder, InterruptOrder, Prior};
use super::launch::{check_request_id, reused};
use super::model::{Book, Injection, Pending, Request, SwarmKey};
use super::{Core, of_node};

/// A longer prompt is not repeated in its acknowledgement.
const MOST_ECHOED: usize = 4096;
/// A longer prompt fits no line of the JSON-line control plane either.
const MOST_CONTENT: usize = 16 << 20;

/// A request, the steps of its prompts so far, and how many of them have not reached their node.
type Taken = (Arc<str>, Vec<Step>, usize);

impl Core {
    /// Takes prompts.
    pub(super) fn inject(&mut self, token: Token, order: InjectOrder, fx: &mut Effects) {
        match self.begin_inject(order, fx) {
            Ok((request, backlog, expect)) => {
                fx.out.push(Out::Attach { token, topic: Topic::Inject(Arc::clone(&request)), backlog, expect });
            }
            Err(failure) => fx.out.push(Out::Refuse(token, failure)),
        }
    }

    fn begin_inject(&mut self, order: InjectOrder, fx: &mut Effects) -> Result<Taken, Failure> {
        check_request_id(&order.request_id)?;
        let key = self.find(&order.swarm)?;
        let swarm = self.swarms.get(&key).ok_or_else(gone)?;
        let nodes = choose_nodes(&order.nodes, swarm.nodes.len(), swarm.head.id.as_str())?;
        if order.injection_id.is_some() && nodes.len() != 1 {
            return Err(Failure::new(ErrorCode::InvalidRequest, "an injection id names one prompt for one node")
                .hint("name exactly one node, or leave the injection id out"));
        }
        if let Some(answer) = self.repeated(key, &nodes, &order)? {
            return Ok(answer);
        }
        if order.content.is_empty() {
            return Err(Failure::new(ErrorCode::InvalidRequest, "the prompt is empty"));
        }
        if order.content.len() > MOST_CONTENT {
            let message = format!("the prompt has {} bytes, more than {MOST_CONTENT}", order.content.len());
            return Err(Failure::new(ErrorCode::InvalidRequest, message)
                .hint("put large texts into files of the nodes' working directory"));
        }
        if !swarm.facts.status.takes_prompts() || swarm.facts.over_since != 0 {
            return Err(Failure::new(ErrorCode::SwarmOver, "swarm is terminating or terminated")
                .hint("`drover list` shows the swarms that take prompts"));
        }
        let id = if order.request_id.is_empty() { fx.id().to_string() } else { order.request_id };
        let request = Arc::new(Request {
            key: self.book.key(),
            id: id.as_str().into(),
            launch: false,
            swarm: key,
            content: order.content.into(),
            steer: order.steer,
            trace: order.trace,
            created: fx.now,
        });
        self.book.dirty.requests.push(Arc::clone(&request));
        let chosen = order.injection_id;
        let made = self.accept(key, &request, &nodes, chosen.as_ref(), fx);
        let backlog: Vec<Step> = made.iter().flat_map(|id| self.book.steps_of(id)).collect();
        let answer = waiting_for(&request.id, backlog, made.len());
        self.book.requests.insert(Arc::clone(&request.id), (Arc::clone(&request), made));
        self.pump_swarm(key, fx);
        Ok(answer)
    }

    /// The answer to a request that was taken before; refuses one that says something else now.
    fn repeated(&self, key: SwarmKey, nodes: &BTreeSet<u32>, order: &InjectOrder) -> Result<Option<Taken>, Failure> {
        let same = |request: &Request| {
            !request.launch
                && request.swarm == key
                && *request.content == *order.content
                && request.steer == order.steer
        };
        let fresh = self.book.requests.get(order.request_id.as_str());
        if let Some((request, ids)) = fresh {
            let known: BTreeSet<u32> =
                ids.iter().filter_map(|id| self.book.injections.get(id)).map(|injection| injection.node.0).collect();
            let id_fits = order.injection_id.as_ref().is_none_or(|id| ids.contains(id));
            if !same(request) || known != *nodes || !id_fits {
                return Err(reused(&order.request_id));
            }
            let steps: Vec<Step> = ids.iter().flat_map(|id| self.book.steps_of(id)).collect();
            return Ok(Some(waiting_for(&request.id, steps, ids.len())));
        }
        if let Some(prior) = &order.prior {
            let known: BTreeSet<u32> = prior.injections.iter().map(|injection| injection.node.0).collect();
            let id_fits = order
                .injection_id
                .as_ref()
                .is_none_or(|id| prior.injections.iter().any(|injection| injection.id == *id));
            if !same(&prior.request) || known != *nodes || !id_fits {
                return Err(reused(&order.request_id));
            }
            return Ok(Some(self.answer_prior(prior)));
        }
        let Some(id) = &order.injection_id else { return Ok(None) };
        let node = nodes.first().copied().unwrap_or(0);
        let refused = || {
            Failure::new(ErrorCode::RequestReused, format!("injection id {id} was used before for something else"))
                .hint("choose a new injection id, or repeat the earlier prompt unchanged")
        };
        if let Some(injection) = self.book.injections.get(id) {
            if !same(&injection.request) || injection.node.0 != node {
                return Err(refused());
            }
            return Ok(Some(waiting_for(&injection.request.id, self.book.steps_of(id), 1)));
        }
        if let Some(prior) = &order.prior_injection {
            if !same(&prior.request) || prior.injections.first().is_none_or(|injection| injection.node.0 != node) {
                return Err(refused());
            }
            return Ok(Some(self.answer_prior(prior)));
        }
        Ok(None)
    }

    /// What the store knows, brought up to date with what has happened in this batch.
    fn answer_prior(&self, prior: &Prior) -> Taken {
        let mut steps = Vec::new();
        for stored in &prior.injections {
            if self.book.injections.contains_key(&stored.id) {
                steps.extend(self.book.steps_of(&stored.id));
                continue;
            }
            let step = |state, seq, error: &str| inject_step(stored.node, &stored.id, state, error, seq);
            steps.push(step(InjectionState::Accepted, stored.ack_seq, ""));
            if stored.delivered_seq != 0 {
                steps.push(step(InjectionState::Delivered, stored.delivered_seq, ""));
            } else if stored.state.is_over() {
                steps.push(step(stored.state, stored.end_seq, &stored.error));
            }
        }
        waiting_for(&prior.request.id, steps, prior.injections.len())
    }

    /// Makes one injection per node, says so, and puts each in its node's queue.
    fn accept(
        &mut self,
        key: SwarmKey,
        request: &Arc<Request>,
        nodes: &BTreeSet<u32>,
        chosen: Option<&InjectionId>,
        fx: &mut Effects,
    ) -> Vec<InjectionId> {
        let Some(swarm) = self.swarms.get_mut(&key) else { return Vec::new() };
        let echoed = if request.content.len() <= MOST_ECHOED {
            json!({ "request_id": &*request.id, "prompt": &*request.content })
        } else {
            json!({ "request_id": &*request.id })
        };
        let mut made = Vec::with_capacity(nodes.len());
        let mut hopeless = Vec::new();
        for &index in nodes {
            let Some(node) = swarm.nodes.get_mut(index as usize) else { continue };
            let id = chosen.cloned().unwrap_or_else(|| InjectionId::from(fx.id()));
            let ack_seq = self.book.say(fx, &swarm.head, of_node("inject_ack", index, Some(&id), &echoed));
            node.facts.inbox_seq += 1;
            let seq = node.facts.inbox_seq;
            node.queue.push_back(Pending {
                seq,
                injection: Some(id.clone()),
                body: InboxBody::Inject(Arc::clone(request)),
                maybe_written: false,
                refused_since: 0,
            });
            node.open.insert(seq, id.clone());
            self.book.injections.insert(
                id.clone(),
                Injection {
                    swarm: key,
                    node: node.index,
                    request: Arc::clone(request),
                    state: InjectionState::Accepted,
                    inbox_seq: seq,
                    spoken: 0,
                    ack_seq,
                    delivered_seq: 0,
                    end_seq: 0,
                    error: String::new(),
                    assistant_seen: false,
                    last_usage: None,
                    created: fx.now,
                    since: fx.now,
                    fresh: true,
                },
            );
            self.book.dirty.injections.insert(id.clone());
            self.book.dirty.nodes.insert((key, index));
            if node.facts.failed_since != 0 {
                hopeless.push((id.clone(), format!("node {index} was given up: {}", node.reason())));
            }
            made.push(id);
        }
        self.book.dirty.views.insert(key);
        for (id, error) in hopeless {
            self.close_injection(&id, &error, ErrorCode::DeliveryFailed, fx);
        }
        made
    }

    /// The first prompt of a swarm that came up, under the id of the launch.
    pub(super) fn inject_system_prompt(&mut self, key: SwarmKey, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get(&key) else { return };
        if swarm.spec.system_prompt.trim().is_empty() {
            return;
        }
        let request = Arc::clone(&swarm.request);
        let nodes: BTreeSet<u32> = (0..swarm.nodes.len() as u32).collect();
        self.accept(key, &request, &nodes, None, fx);
        self.pump_swarm(key, fx);
    }

    /// Ends an injection that will not end by itself, so that whoever waits for it is told.
    pub(super) fn close_injection(&mut self, id: &InjectionId, why: &str, code: ErrorCode, fx: &mut Effects) {
        let Some(injection) = self.book.injections.get(id) else { return };
        if injection.state.is_over() {
            return;
        }
        let (key, index) = (injection.swarm, injection.node);
        let Some(swarm) = self.swarms.get_mut(&key) else { return };
        let Some(node) = swarm.nodes.get_mut(index.0 as usize) else { return };
        let begun = injection.state != InjectionState::Accepted;
        let silent = !injection.assistant_seen;
        if let Some(place) = node.queue.iter().position(|pending| pending.injection.as_ref() == Some(id)) {
            // A delivery that is under way stays so: its report finds no such record and changes nothing.
            node.queue.remove(place);
        }
        if begun {
            if silent {
                let data = json!({ "content": "", "synthesized": true });
                self.book.say(fx, &swarm.head, of_node("assistant", index.0, Some(id), &data));
            }
            let data = json!({ "status": "failed", "error": why, "code": code.as_str(), "synthesized": true });
            let seq = self.book.say(fx, &swarm.head, of_node("turn_complete", index.0, Some(id), &data));
            self.end_injection(id, false, why, seq, fx);
        } else {
            let request_id = Arc::clone(&injection.request.id);
            let data = json!({ "request_id": &*request_id, "error": why, "code": code.as_str() });
            let seq = self.book.say(fx, &swarm.head, of_node("inject_failed", index.0, Some(id), &data));
            self.end_injection(id, false, why, seq, fx);
            let step = inject_step(index, id, InjectionState::Failed, why, seq);
            fx.step(Topic::Inject(request_id), step);
        }
    }

    /// The last word on an injection has been said.
    pub(super) fn end_injection(&mut self, id: &InjectionId, well: bool, error: &str, seq: u64, fx: &mut Effects) {
        let Some(injection) = self.book.injections.get_mut(id) else { return };
        injection.state = if well { InjectionState::Completed } else { InjectionState::Failed };
        injection.since = fx.now;
        error.clone_into(&mut injection.error);
        injection.end_seq = seq;
        let (key, index, inbox_seq) = (injection.swarm, injection.node, injection.inbox_seq);
        self.book.dirty.injections.insert(id.clone());
        self.book.dirty.views.insert(key);
        self.book.ended.push(id.clone());
        if let Some(node) = self.swarms.get_mut(&key).and_then(|swarm| swarm.nodes.get_mut(index.0 as usize)) {
            node.open.remove(&inbox_seq);
            if node.running.as_ref() == Some(id) {
                node.running = None;
            }
        }
        self.settle_approvals_of(id, fx);
        self.warm(key, index.0, fx);
    }

    /// Ends everything that is open on a node.
    pub(super) fn close_node_injections(
        &mut self,
        key: SwarmKey,
        index: u32,
        why: &str,
        code: ErrorCode,
        fx: &mut Effects,
    ) {
        let node = self.swarms.get(&key).and_then(|swarm| swarm.nodes.get(index as usize));
        let open: Vec<InjectionId> = node.map(|node| node.open.values().cloned().collect()).unwrap_or_default();
        for id in open {
            self.close_injection(&id, why, code, fx);
        }
    }

    /// Ends everything that is open in a swarm.
    pub(super) fn close_swarm_injections(&mut self, key: SwarmKey, why: &str, code: ErrorCode, fx: &mut Effects) {
        let count = self.swarms.get(&key).map_or(0, |swarm| swarm.nodes.len());
        for index in 0..count {
            self.close_node_injections(key, index as u32, why, code, fx);
        }
    }

    /// Interrupts turns; a prompt that never left the router is withdrawn at once.
    pub(super) fn interrupt(&mut self, token: Token, order: &InterruptOrder, fx: &mut Effects) {
        let told = self.begin_interrupt(order, fx);
        let answer = told.map(|nodes| Answer::Interrupted(pb::InterruptResponse { nodes }));
        fx.out.push(Out::Answer(token, answer));
    }

    fn begin_interrupt(&mut self, order: &InterruptOrder, fx: &mut Effects) -> Result<u32, Failure> {
        let key = self.find(&order.swarm)?;
        let swarm = self.swarms.get_mut(&key).ok_or_else(gone)?;
        if swarm.is_over() {
            return Err(Failure::new(ErrorCode::SwarmOver, "swarm is terminating or terminated"));
        }
        let mut nodes = choose_nodes(&order.nodes, swarm.nodes.len(), swarm.head.id.as_str())?;
        if let Some(id) = &order.injection {
            let injection = self.book.injections.get(id).filter(|injection| {
                injection.swarm == key && !injection.state.is_over() && nodes.contains(&injection.node.0)
            });
            let Some(injection) = injection else {
                return Err(Failure::new(
                    ErrorCode::UnknownInjection,
                    format!("no prompt {id} is waiting or running in this swarm"),
                )
                .hint(format!("`drover why {id}` says what became of it")));
            };
            let index = injection.node.0;
            nodes = BTreeSet::from([index]);
            if let Some(node) = swarm.nodes.get(index as usize) {
                let waits = node.queue.iter().position(|pending| pending.injection.as_ref() == Some(id));
                if waits.is_some_and(|place| place >= node.in_flight && !node.queue[place].maybe_written) {
                    self.close_injection(id, "withdrawn before it was delivered", ErrorCode::DeliveryFailed, fx);
                    return Ok(1);
                }
            }
        }
        let mut told = 0;
        for index in nodes {
            let idle = swarm.nodes.get(index as usize).is_none_or(|node| node.open.is_empty());
            if idle {
                continue; // An interrupt that comes late must not hit the next turn.
            }
            queue_control(&mut self.book, &mut swarm.nodes, key, index, order.injection.clone(), "interrupt", "{}");
            told += 1;
        }
        self.pump_swarm(key, fx);
        Ok(told)
    }
}

impl Book {
    /// The steps of an injection so far.
    fn steps_of(&self, id: &InjectionId) -> Vec<Step> {
        let Some(injection) = self.injections.get(id) else { return Vec::new() };
        let mut steps = vec![inject_step(injection.node, id, InjectionState::Accepted, "", injection.ack_seq)];
        if injection.delivered_seq != 0 {
            steps.push(inject_step(injection.node, id, InjectionState::Delivered, "", injection.delivered_seq));
        } else if injection.state.is_over() {
            steps.push(inject_step(injection.node, id, injection.state, &injection.error, injection.end_seq));
        }
        steps
    }
}

fn waiting_for(request: &Arc<str>, steps: Vec<Step>, injections: usize) -> Taken {
    let done = steps.iter().filter(|step| step.ends_delivery()).count();
    (Arc::clone(request), steps, injections - done.min(injections))
}

/// One step of one injection.
pub(super) fn inject_step(node: NodeIndex, id: &InjectionId, state: InjectionState, error: &str, seq: u64) -> Step {
    let state = match state {
        InjectionState::Accepted => pb::InjectionState::Accepted,
        InjectionState::Delivered => pb::InjectionState::Delivered,
        InjectionState::Started => pb::InjectionState::Started,
        InjectionState::Completed => pb::InjectionState::Completed,
        InjectionState::Failed => pb::InjectionState::Failed,
    };
    Step::Inject(pb::InjectResponse {
        node_id: node.0,
        injection_id: id.to_string(),
        state: state as i32,
        error: error.to_owned(),
        seq,
    })
}

/// The nodes that a caller means; none named means all.
pub(super) fn choose_nodes(named: &[u32], count: usize, swarm: &str) -> Result<BTreeSet<u32>, Failure> {
    if named.is_empty() {
        return Ok((0..count as u32).collect());
    }
    match named.iter().find(|&&index| index as usize >= count) {
        Some(index) => Err(Failure::new(ErrorCode::NodeOutOfRange, format!("node {index} is out of range"))
            .hint(format!("swarm {swarm} has {count} nodes, from 0 to {}", count.saturating_sub(1)))),
        None => Ok(named.iter().copied().collect()),
    }
}

pub(super) fn gone() -> Failure {
    Failure::new(ErrorCode::UnknownSwarm, "unknown swarm_id")
}
