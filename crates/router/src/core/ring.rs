//! The ring of gossip keys: brought to every node, and which nodes have said that they have it.

use std::collections::BTreeMap;
use std::sync::Arc;

use drover_types::SwarmId;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Core;
use super::delivery::queue_control;
use super::effects::Effects;
use super::model::SwarmKey;

/// The ring as it is sent to the nodes.
#[derive(Debug, Clone)]
pub(crate) struct Ring {
    /// Counts its changes.
    pub(crate) revision: u64,
    /// The ring as JSON. Secret: it goes into inboxes and nowhere else.
    pub(crate) json: Arc<str>,
}

/// What a node says of the ring that it has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RingSaid {
    pub(crate) ids: Vec<u8>,
    pub(crate) primary: u8,
}

/// What keeps a node's membership daemon from doing its work, as its worker reports it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct NoteWord {
    pub(crate) code: String,
    pub(crate) message: String,
    pub(crate) hint: String,
    pub(crate) count: u64,
    pub(crate) last_us: u64,
    pub(crate) current: bool,
}

impl Core {
    /// The ring is this one from now on: every node that was not sent it yet is.
    pub(super) fn ring_changed(&mut self, ring: Ring, fx: &mut Effects) {
        if self.book.ring.as_ref().is_some_and(|known| known.revision >= ring.revision) {
            return;
        }
        let sent: Value = serde_json::from_str(&ring.json).unwrap_or_default();
        let data = json!({ "ring": sent }).to_string();
        let keys: Vec<SwarmKey> =
            self.swarms.iter().filter(|(_, swarm)| !swarm.is_over()).map(|(&key, _)| key).collect();
        for key in keys {
            let Some(swarm) = self.swarms.get_mut(&key) else { continue };
            for index in 0..swarm.nodes.len() {
                if swarm.nodes[index].facts.ring_sent >= ring.revision {
                    continue;
                }
                swarm.nodes[index].facts.ring_sent = ring.revision;
                queue_control(&mut self.book, &mut swarm.nodes, key, index as u32, None, "keyring", &data);
            }
            self.pump_swarm(key, fx);
        }
        self.book.ring = Some(ring);
    }

    /// Which keys each node of a swarm that lives said that it has.
    pub(crate) fn rings_said(&self) -> BTreeMap<(SwarmId, u32), RingSaid> {
        let living = self.swarms.values().filter(|swarm| !swarm.is_over());
        let said = living.flat_map(|swarm| {
            let of_node = |node: &super::model::Node| {
                Some(((swarm.head.id.clone(), node.index.0), node.facts.ring_said.clone()?))
            };
            swarm.nodes.iter().filter_map(of_node)
        });
        said.collect()
    }

    /// A node says which keys it has.
    pub(super) fn ring_said(&mut self, key: SwarmKey, index: u32, said: RingSaid) {
        let Some(node) = self.swarms.get_mut(&key).and_then(|swarm| swarm.nodes.get_mut(index as usize)) else {
            return;
        };
        if node.facts.ring_said.as_ref() != Some(&said) {
            node.facts.ring_said = Some(said);
            self.book.dirty.rings_view = true;
            self.book.dirty.nodes.insert((key, index));
            self.book.dirty.views.insert(key);
        }
    }

    /// A worker says what is wrong with its membership daemon.
    pub(super) fn notes_said(&mut self, key: SwarmKey, index: u32, notes: Vec<NoteWord>) {
        let Some(node) = self.swarms.get_mut(&key).and_then(|swarm| swarm.nodes.get_mut(index as usize)) else {
            return;
        };
        if node.facts.notes != notes {
            node.facts.notes = notes;
            self.book.dirty.nodes.insert((key, index));
            self.book.dirty.views.insert(key);
        }
    }
}
