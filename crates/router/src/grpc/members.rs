//! ListMembers and WatchMembers: the picture of the members, and how it changes.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use drover_proto::router as pb;
use drover_proto::router::watch_members_response::Update;
use drover_proto::status_of;
use drover_types::Failure;
use futures::Stream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::Service;
use crate::core::find_by_name;
use crate::registry::{Registry, Shared};
use crate::store::stopping;

type Members = BTreeMap<String, Arc<pb::Member>>;

/// The members that a caller asked for.
pub(super) fn list(registry: &Registry, name: &str) -> Result<pb::ListMembersResponse, Failure> {
    let swarm = full_id(registry, name)?;
    Ok(response(registry, &swarm))
}

fn response(registry: &Registry, swarm: &str) -> pb::ListMembersResponse {
    let wanted = registry.members.values().filter(|member| of_swarm(member, swarm));
    let view = &registry.members_view;
    pb::ListMembersResponse {
        members: wanted.map(|member| pb::Member::clone(member)).collect(),
        reporter: view.reporter.clone(),
        epoch: view.ballot.epoch,
        term: view.ballot.term,
        heard_us: view.heard,
    }
}

/// The whole id of the swarm that is meant; empty for all.
fn full_id(registry: &Registry, name: &str) -> Result<String, Failure> {
    if name.is_empty() {
        return Ok(String::new());
    }
    find_by_name(&registry.swarms, name).map(|view| view.swarm.swarm_id.clone())
}

fn of_swarm(member: &pb::Member, swarm: &str) -> bool {
    swarm.is_empty() || member.swarm_id == swarm
}

/// One reader of changes. It compares pictures, so one that is slow skips what lies between two of them.
pub(super) struct MemberWatcher {
    shared: Arc<Shared>,
    bell: watch::Receiver<()>,
    shutdown: CancellationToken,
    swarm: String,
    seen: Option<Arc<Members>>,
    ready: VecDeque<Update>,
    over: bool,
}

impl MemberWatcher {
    pub(super) fn new(service: &Service, name: &str) -> Result<Self, Failure> {
        Ok(Self {
            bell: service.shared.members_bell.subscribe(),
            swarm: full_id(&service.shared.registry.load(), name)?,
            shared: Arc::clone(&service.shared),
            shutdown: service.ctx.shutdown().clone(),
            seen: None,
            ready: VecDeque::new(),
            over: false,
        })
    }

    /// The answers.
    pub(super) fn stream(self) -> impl Stream<Item = Result<pb::WatchMembersResponse, Status>> + Send {
        futures::stream::unfold(self, |mut watcher| async move {
            let next = watcher.next().await?;
            Some((next, watcher))
        })
    }

    async fn next(&mut self) -> Option<Result<pb::WatchMembersResponse, Status>> {
        loop {
            if self.over {
                return None;
            }
            if let Some(update) = self.ready.pop_front() {
                return Some(Ok(pb::WatchMembersResponse { update: Some(update) }));
            }
            if self.seen.is_some() {
                tokio::select! {
                    changed = self.bell.changed() => if changed.is_err() { return None },
                    () = self.shutdown.cancelled() => {
                        self.over = true;
                        return Some(Err(status_of(&stopping())));
                    }
                }
            }
            self.look();
        }
    }

    fn look(&mut self) {
        let registry = self.shared.registry.load();
        match &self.seen {
            None => self.ready.push_back(Update::Snapshot(response(&registry, &self.swarm))),
            Some(seen) => self.ready.extend(changes(seen, &registry.members, &self.swarm)),
        }
        self.seen = Some(Arc::clone(&registry.members));
    }
}

/// What leads from one picture to the next.
fn changes(before: &Members, now: &Members, swarm: &str) -> Vec<Update> {
    let gone = before
        .iter()
        .filter(|(id, member)| of_swarm(member, swarm) && !now.contains_key(*id))
        .map(|(id, _)| Update::Removed(id.clone()));
    let changed = now
        .iter()
        .filter(|(id, member)| {
            of_swarm(member, swarm)
                && before.get(*id).is_none_or(|known| !Arc::ptr_eq(known, member) && known != *member)
        })
        .map(|(_, member)| Update::Changed(pb::Member::clone(member)));
    gone.chain(changed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(members: &[(&str, &str, &str)]) -> Members {
        let member = |(id, swarm, state): &(&str, &str, &str)| {
            let member = pb::Member {
                node_id: (*id).into(),
                swarm_id: (*swarm).into(),
                state: (*state).into(),
                ..pb::Member::default()
            };
            ((*id).to_owned(), Arc::new(member))
        };
        members.iter().map(member).collect()
    }

    #[test]
    fn two_pictures_differ_by_what_changed_and_what_is_gone_of_the_swarm_that_is_watched() {
        let before =
            picture(&[("s/0", "s", "alive"), ("s/1", "s", "alive"), ("s/2", "s", "alive"), ("t/0", "t", "alive")]);
        let now =
            picture(&[("s/0", "s", "alive"), ("s/1", "s", "suspect"), ("s/3", "s", "alive"), ("t/0", "t", "dead")]);
        let told = |swarm: &str| -> Vec<String> {
            let name = |update| match update {
                Update::Removed(id) => format!("-{id}"),
                Update::Changed(member) => format!("{} {}", member.node_id, member.state),
                Update::Snapshot(_) => panic!("a snapshot"),
            };
            changes(&before, &now, swarm).into_iter().map(name).collect()
        };
        assert_eq!(told("s"), ["-s/2", "s/1 suspect", "s/3 alive"]);
        assert_eq!(told(""), ["-s/2", "s/1 suspect", "s/3 alive", "t/0 dead"]);
    }
}
