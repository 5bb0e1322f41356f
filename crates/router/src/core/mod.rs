//! The router's decisions: swarms, nodes, injections, approvals and how far each outbox has been read.
//!
//! A state machine without clock, files, threads or network. Inputs come in one at a time; effects are events for the log
//! and orders for the shell. Nothing of an effect may leave the process before the batch it belongs to is on disk; when
//! that fails, this memory is thrown away and built again from what is on disk.

mod approvals;
mod delivery;
pub(crate) mod effects;
mod explain;
mod inject;
pub(crate) mod input;
mod launch;
pub(crate) mod members;
pub(crate) mod model;
mod nodes;
mod records;
mod restore;
pub(crate) mod ring;
mod status;
mod terminate;
mod view;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use drover_types::{ErrorCode, Failure, InjectionId, SwarmId};
use serde_json::{Value, json};

pub(crate) use delivery::inject_data;
pub(crate) use explain::describe_ended;
pub(crate) use restore::{Restored, StoredControl};
pub(crate) use view::approval_view;

use effects::{Effects, Event, Micros, Word};
use input::Input;
use members::MembersView;
use model::{Book, Dirty, Followers, Head, Link, Settings, Swarm, SwarmKey};

/// One second, in our unit of time.
pub(crate) const SECOND: Micros = 1_000_000;

/// Everything the router knows.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) swarms: BTreeMap<SwarmKey, Swarm>,
    pub(crate) by_id: BTreeMap<SwarmId, SwarmKey>,
    pub(crate) book: Book,
}

impl Core {
    /// A core that knows nothing yet; `seq` is the last number ever given to an event.
    pub(crate) fn new(settings: Settings, seq: u64, next_key: i64) -> Self {
        Self {
            swarms: BTreeMap::new(),
            by_id: BTreeMap::new(),
            book: Book {
                settings,
                seq,
                next_key,
                injections: HashMap::new(),
                ended: Vec::new(),
                requests: HashMap::new(),
                approvals: BTreeMap::new(),
                approvals_version: seq,
                leftovers: BTreeMap::new(),
                members: BTreeMap::new(),
                members_view: MembersView::default(),
                ring: None,
                dirty: Dirty::default(),
                allocator: Link::not_yet(),
                followers: Followers::not_yet(),
            },
        }
    }

    /// Takes in one thing that happened.
    pub(crate) fn handle(&mut self, now: Micros, input: Input, fx: &mut Effects) {
        // Wall clocks step back; deadlines only ever compare with the latest time seen.
        fx.now = fx.now.max(now);
        match input {
            Input::Launch(token, order) => self.launch(token, *order, fx),
            Input::Inject(token, order) => self.inject(token, *order, fx),
            Input::Terminate(token, order) => self.terminate(token, order, fx),
            Input::Interrupt(token, order) => self.interrupt(token, &order, fx),
            Input::Resolve(token, order) => self.resolve_approval(token, &order, fx),
            Input::MailboxRemoved(swarm) => {
                self.book.leftovers.remove(&swarm);
                self.book.dirty.leftovers_gone.push(swarm);
            }
            Input::FollowerUp(side) => self.follower_up(&side, fx),
            Input::FollowerDown(side, error) => self.follower_down(&side, &error, fx),
            Input::Records(chunk) => self.records(chunk, fx),
            Input::Delivered(report) => self.delivered(report, fx),
            Input::AllocatorSnapshot { begun_at, allocations } => self.snapshot(begun_at, allocations, fx),
            Input::AllocationChanged(allocation) => self.allocation_changed(&allocation, fx),
            Input::AllocatorProgress { swarm, stage, message } => self.launch_progress(&swarm, &stage, &message, fx),
            Input::AllocatorDown(error) => self.allocator_down(&error, fx),
            Input::Ensured(swarm, result) => self.ensured(&swarm, result, fx),
            Input::Released(swarm, result) => self.released(&swarm, result, fx),
            Input::Ring(ring) => self.ring_changed(ring, fx),
            Input::Tick => self.tick(fx),
        }
    }

    /// The batch is on disk: what ended in it need not be remembered.
    pub(crate) fn committed(&mut self) {
        for id in self.book.ended.drain(..) {
            self.book.injections.remove(&id);
        }
        self.book.requests.clear();
        let written = std::mem::take(&mut self.book.dirty);
        for id in &written.injections {
            if let Some(injection) = self.book.injections.get_mut(id) {
                injection.fresh = false;
            }
        }
        for key in &written.swarms {
            if let Some(swarm) = self.swarms.get_mut(key) {
                swarm.fresh = false;
            }
        }
        self.forget_old_approvals();
    }

    /// The swarm that a caller means: its id, or an unambiguous beginning of it.
    pub(crate) fn find(&self, name: &str) -> Result<SwarmKey, Failure> {
        find_by_name(&self.by_id, name).copied()
    }

    /// What must be done now and then, and what was put off.
    fn tick(&mut self, fx: &mut Effects) {
        self.tick_swarms(fx);
        self.tick_nodes(fx);
        self.forget_old_swarms(fx);
        self.leave_unwanted_sides(fx);
    }
}

/// What is kept under a swarm's id, or under an unambiguous beginning of it.
pub(crate) fn find_by_name<'a, V>(by_id: &'a BTreeMap<SwarmId, V>, name: &str) -> Result<&'a V, Failure> {
    let unknown =
        || Failure::new(ErrorCode::UnknownSwarm, "unknown swarm_id").hint("`drover list` shows the swarms there are");
    let id: SwarmId = name.parse().map_err(|_| unknown())?;
    if let Some(found) = by_id.get(&id) {
        return Ok(found);
    }
    let mut matching = by_id
        .range((Bound::Included(id), Bound::Unbounded))
        .take_while(|(candidate, _)| candidate.as_str().starts_with(name));
    match (matching.next(), matching.next()) {
        (Some((_, found)), None) => Ok(found),
        (None, _) => Err(unknown()),
        (Some((first, _)), Some((second, _))) => Err(Failure::new(
            ErrorCode::InvalidRequest,
            format!("swarm id {name} is ambiguous: {first} and {second} both begin so"),
        )
        .hint("give more of the id")),
    }
}

impl Book {
    /// Appends an event of a swarm to the log and returns its number.
    pub(crate) fn say(&mut self, fx: &mut Effects, head: &Head, what: Saying<'_>) -> u64 {
        self.append(fx, Some(head.id.clone()), Arc::clone(&head.job), what)
    }

    /// Appends an event of no swarm.
    pub(crate) fn say_of_none(&mut self, fx: &mut Effects, what: Saying<'_>) -> u64 {
        self.append(fx, None, "".into(), what)
    }

    fn append(&mut self, fx: &mut Effects, swarm: Option<SwarmId>, job: Arc<str>, what: Saying<'_>) -> u64 {
        self.seq += 1;
        fx.events.push(Event {
            seq: self.seq,
            at: fx.now,
            happened: what.happened.unwrap_or(fx.now),
            name: what.name,
            swarm,
            job,
            node: what.node,
            injection: what.injection.cloned(),
            data: what.data,
        });
        self.seq
    }

    pub(crate) fn key(&mut self) -> i64 {
        self.next_key += 1;
        self.next_key
    }
}

/// An event that is about to be said.
pub(crate) struct Saying<'a> {
    name: Word,
    node: Option<u32>,
    injection: Option<&'a InjectionId>,
    /// When, if that was not now.
    happened: Option<Micros>,
    data: Bytes,
}

/// An event of a swarm as a whole.
pub(crate) fn of_swarm(name: &'static str, data: &Value) -> Saying<'static> {
    Saying { name: Word::Known(name), node: None, injection: None, happened: None, data: data.to_string().into() }
}

/// An event of a node.
pub(crate) fn of_node<'a>(
    name: &'static str,
    node: u32,
    injection: Option<&'a InjectionId>,
    data: &Value,
) -> Saying<'a> {
    Saying { name: Word::Known(name), node: Some(node), injection, happened: None, data: data.to_string().into() }
}

/// Adds fields to an object, for the few events that carry more than they came with.
pub(crate) fn with_fields(object: &[u8], more: &Value) -> Bytes {
    let mut value: Value = serde_json::from_slice(object).unwrap_or_else(|_| json!({}));
    if let (Some(fields), Some(more)) = (value.as_object_mut(), more.as_object()) {
        fields.extend(more.clone());
    }
    value.to_string().into()
}
