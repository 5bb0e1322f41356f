//! What can be seen of the node and of those it knows.

use std::collections::BTreeMap;
use std::sync::Arc;

use drover_proto::membership::{GetStatusResponse, Member};

use super::Node;
use crate::core::placement::{Item, Slot, rank};
use crate::core::{Engine as _, Load, NodeKey, SignedRecord, State, Time};
use crate::shell::handle::Change;
use crate::shell::streams::Peer;
use crate::shell::view::{self, Seen};

impl Node {
    pub(super) fn seen(&self, key: NodeKey) -> Option<Seen> {
        if key == self.core.local().key {
            return Some(self.seen_local());
        }
        // The core has no look-up by key beside the record; a change is rare enough to go through all.
        self.core.members().find(|member| member.record.key == key).map(|member| Seen {
            state: member.state,
            since: member.since,
            load: member.heard.map(|_| member.load),
            local: false,
        })
    }

    pub(super) fn seen_local(&self) -> Seen {
        let report = &self.handle.load().report;
        let load = Load { score: Load::score_of(report.score), overloaded: report.overloaded, seq: 0 };
        let state = if self.core.local().record.leaving { State::Left } else { State::Alive };
        Seen { state, since: Time::ZERO, load: Some(load), local: true }
    }

    pub(super) fn tell(&self, change: impl FnOnce() -> Change) {
        let changes = &self.handle.shared.changes;
        if changes.receiver_count() > 0 {
            let _ = changes.send(Arc::new(change()));
        }
    }

    pub(super) fn tell_local(&self, now: Time) {
        self.tell(|| Change::Changed(Box::new(view::member(&self.core.local().record, self.seen_local(), now))));
    }

    fn counts(&self) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        let states = self.core.members().map(|member| member.state).chain([self.seen_local().state]);
        for state in states {
            let name = match state {
                State::Alive => "alive",
                State::Suspect => "suspect",
                State::Dead => "dead",
                State::Left => "left",
            };
            *counts.entry(name).or_default() += 1;
        }
        counts
    }

    pub(super) fn count(&self) {
        self.metrics().members(&self.counts());
    }

    pub(in crate::shell) fn key(&self) -> NodeKey {
        self.core.local().key
    }

    pub(in crate::shell) fn status(&self) -> GetStatusResponse {
        let counts = self.counts();
        let count = |state| counts.get(state).copied().unwrap_or_default() as u32;
        GetStatusResponse {
            node_id: self.core.local().record.node_id.clone(),
            gossip_addr: self.socket.addr().to_string(),
            advertised_addr: self.core.local().record.addr.to_string(),
            cluster: self.credentials.cluster(),
            alive: count("alive"),
            suspect: count("suspect"),
            dead: count("dead"),
            left: count("left"),
            refused: self.refused.iter().map(|(reason, count)| ((*reason).to_owned(), *count)).collect(),
            sealed: self.link.sealer().is_some(),
            local_health: u32::from(self.core.inner().health()),
            own_pauses: self.pauses,
            ..GetStatusResponse::default()
        }
    }

    pub(in crate::shell) fn members(&self) -> Vec<Member> {
        let now = self.clock.now();
        let mut members = vec![view::member(&self.core.local().record, self.seen_local(), now)];
        members.extend(self.core.members().map(|member| {
            let seen = Seen {
                state: member.state,
                since: member.since,
                load: member.heard.map(|_| member.load),
                local: false,
            };
            view::member(&member.record.record, seen, now)
        }));
        members.sort_by(|a, b| a.node_id.cmp(&b.node_id));
        members
    }

    pub(in crate::shell) fn peer(&self, key: NodeKey) -> Option<Peer> {
        Some(Peer { record: Arc::clone(self.peers.get(&key)?), own: self.core.local().key })
    }

    pub(in crate::shell) fn place(&self, key: &str, count: usize, swarm: &str) -> Vec<String> {
        let local = self.core.local();
        let others = self.core.members().filter(|member| member.state == State::Alive).map(|member| member.record);
        let here = (!local.record.leaving).then(|| Arc::clone(local));
        let fitting: BTreeMap<NodeKey, Arc<SignedRecord>> = others
            .chain(here)
            .filter(|record| swarm.is_empty() || record.record.labels.get("swarm_id").is_some_and(|id| id == swarm))
            .map(|record| (record.key, record))
            .collect();
        let ranked = rank(Item::new("key", key), fitting.keys().copied().map(Slot::even));
        ranked.iter().take(count).filter_map(|key| Some(fitting.get(key)?.record.node_id.clone())).collect()
    }
}
