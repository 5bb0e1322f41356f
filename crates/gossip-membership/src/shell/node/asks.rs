//! What the node is asked to do, by its own daemon and by others.

use std::net::SocketAddr;

use drover_types::{ErrorCode, Failure};
use tokio::sync::oneshot;

use super::Node;
use crate::core::{Command, Engine as _, Input, Load, NodeKey, Record, Reply, Request, State};
use crate::load::Report;
use crate::shell::handle::{MetadataChange, Phase};

impl Node {
    pub(in crate::shell) fn join(&mut self, addrs: Vec<SocketAddr>) {
        let own = self.core.local().record.addr;
        let addrs: Vec<SocketAddr> = addrs.into_iter().filter(|addr| *addr != own).collect();
        if addrs.is_empty() {
            return;
        }
        for addr in &addrs {
            if !self.seeds.contains(addr) {
                self.seeds.push(*addr);
            }
        }
        self.handle.shared.phase.send_if_modified(|phase| {
            let alone = *phase == Phase::Alone;
            if alone {
                *phase = Phase::Joining;
            }
            alone
        });
        self.input(Input::Command(Command::Join(addrs)));
    }

    /// Begins to leave; gives how many others are told.
    pub(in crate::shell) fn leave(&mut self) -> u32 {
        let told = self.core.members().filter(|member| member.state.is_up()).count();
        self.input(Input::Command(Command::Leave));
        told as u32
    }

    pub(super) fn has_left(&self) -> bool {
        *self.handle.shared.phase.borrow() == Phase::Left
    }

    pub(in crate::shell) fn update_metadata(&mut self, change: MetadataChange) -> Result<u32, Failure> {
        let ours = |key: &&String| key.starts_with("drover.");
        let named = change.set_labels.keys().chain(change.set_capabilities.keys()).chain(&change.remove_labels);
        if let Some(key) = named.clone().find(ours) {
            let message =
                format!("{key:?} belongs to drover itself: choose a key that does not begin with \"drover.\"");
            return Err(Failure::new(ErrorCode::InvalidRequest, message));
        }
        let local = &self.core.local().record;
        let (mut labels, mut capabilities) = (local.labels.clone(), local.capabilities.clone());
        for (map, set, remove) in [
            (&mut labels, change.set_labels, change.remove_labels),
            (&mut capabilities, change.set_capabilities, change.remove_capabilities),
        ] {
            map.retain(|key, _| !remove.contains(key));
            map.extend(set);
        }
        // The core would refuse the same, and only note it.
        let candidate = Record { labels: labels.clone(), capabilities: capabilities.clone(), ..local.clone() };
        candidate.encode().map_err(|error| Failure::new(ErrorCode::InvalidRequest, error.to_string()))?;
        self.input(Input::Command(Command::Update { capabilities: Some(capabilities), labels: Some(labels) }));
        Ok(self.core.local().record.incarnation)
    }

    /// A member keeps failing. Says whether it was believed alive; nothing when there is no such member.
    pub(in crate::shell) fn suspect(&mut self, id: &str) -> Option<bool> {
        let key = NodeKey::of(id);
        let news = self.core.members().find(|member| member.record.key == key)?.state == State::Alive;
        self.input(Input::Command(Command::Suspect(key)));
        Some(news)
    }

    pub(in crate::shell) fn load(&mut self, report: &Report) {
        let load = Load { score: Load::score_of(report.score), overloaded: report.overloaded, seq: 0 };
        self.input(Input::Command(Command::Load(load)));
        self.tell_local(self.clock.now());
    }

    /// Another node asks over a connection; the answer comes through the receiver.
    pub(in crate::shell) fn asked(&mut self, from: NodeKey, request: Request) -> oneshot::Receiver<Reply> {
        let (tell, told) = oneshot::channel();
        self.next_reply += 1;
        let id = self.next_reply;
        self.replies.insert(id, tell);
        self.input(Input::StreamAsked { id, from, request });
        // Answered in the same call, or never.
        self.replies.remove(&id);
        told
    }
}
