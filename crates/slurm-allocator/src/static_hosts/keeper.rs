//! The task of one swarm on static hosts: watches who has claimed its nodes, and sees to its end.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use drover_mailbox::Owner;
use drover_service::Context;
use drover_service::process::{ProcessId, is_alive};
use drover_types::{ErrorCode, Failure, Generation, NodeIndex, OutboxId};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{info, warn};

use super::Shared;
use super::file::{Assigned, Files, ReleaseOrder};
use crate::allocation::{AllocatedNode, Allocation, AllocationState, LaunchProgress, WorkerState};
use crate::core::{PhaseRecord, ReleaseRecord};
use crate::membership::Membership;
use crate::store::Record;

/// How often the mailbox is looked at while something is expected, and otherwise.
const HOT: Duration = Duration::from_millis(500);
const COLD: Duration = Duration::from_secs(20);
/// Many hosts speak at the same time; so much of it is taken together.
const TOGETHER: Duration = Duration::from_millis(100);
/// How long an allocation that is over stays listed.
const KEEP_OVER_US: u64 = 3600 * 1_000_000;

/// Waits for a word of any worker; for ever, where the file system does not tell of any.
async fn rung(said: &mut watch::Receiver<()>) {
    if said.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

#[derive(Debug)]
pub(super) enum Command {
    Release { force: bool, answer: oneshot::Sender<Result<(), Failure>> },
}

pub(super) struct Keeper {
    ctx: Context,
    shared: Arc<Shared>,
    record: Record,
    commands: mpsc::Receiver<Command>,
    owners: BTreeMap<NodeIndex, Owner>,
    announced: bool,
}

impl Keeper {
    pub(super) fn new(ctx: &Context, shared: &Arc<Shared>, record: Record, commands: mpsc::Receiver<Command>) -> Self {
        let announced = record.swarm.nodes.iter().all(|node| node.ran);
        Self { ctx: ctx.clone(), shared: Arc::clone(shared), record, commands, owners: BTreeMap::new(), announced }
    }

    pub(super) fn is_over(&self) -> bool {
        self.record.swarm.over_us.is_some()
    }

    pub(super) fn hosts(&self) -> &[String] {
        &self.record.hosts
    }

    /// Runs until the swarm is forgotten or the daemon ends; the workers go on either way.
    pub(super) async fn run(mut self, on_over: impl FnOnce() + Send) {
        let mut on_over = Some(on_over);
        let mut said = self.shared.said.clone();
        loop {
            let all_claimed = self.record.swarm.nodes.iter().all(|node| node.ran);
            let hot = !self.is_over() && (!all_claimed || self.record.swarm.release.is_some());
            tokio::select! {
                () = self.ctx.shutdown().cancelled() => return,
                () = tokio::time::sleep(if hot { HOT } else { COLD }) => {}
                () = rung(&mut said) => {
                    tokio::time::sleep(TOGETHER).await;
                    said.mark_unchanged();
                }
                command = self.commands.recv() => match command {
                    Some(Command::Release { force, answer }) => {
                        let _ = answer.send(self.release(force).await);
                    }
                    None => return,
                },
            }
            if let Err(error) = self.look().await {
                // The file system is away; what was known stays true until it is back.
                warn!(swarm_id = %self.record.swarm_id, %error, "the mailbox cannot be read");
                continue;
            }
            if self.is_over() {
                if let Some(on_over) = on_over.take() {
                    on_over();
                }
                if self.is_old() {
                    self.forget().await;
                    return;
                }
            }
        }
    }

    /// Reads who has claimed the nodes, sees whether a released swarm is gone, and tells everybody.
    pub(super) async fn look(&mut self) -> io::Result<()> {
        if !self.is_over() {
            let shared = Arc::clone(&self.shared);
            let (swarm, count) = (self.record.swarm_id.clone(), self.record.hosts.len() as u32);
            let looked = tokio::task::spawn_blocking(move || {
                let claim = |node| {
                    let Some(generation) = shared.mailbox.generations(&swarm, node)?.last().copied() else {
                        return Ok(None);
                    };
                    let outbox = OutboxId { swarm: swarm.clone(), node, generation };
                    Ok(shared.mailbox.owner(&outbox)?.map(|owner| (node, generation, owner)))
                };
                (0..count).map(NodeIndex).filter_map(|node| claim(node).transpose()).collect::<io::Result<Vec<_>>>()
            });
            let claims = looked.await.map_err(io::Error::other)??;
            self.take_claims(claims).await;
            self.end_if_gone().await;
        }
        self.publish();
        Ok(())
    }

    async fn take_claims(&mut self, claims: Vec<(NodeIndex, Generation, Owner)>) {
        let mut changed = false;
        for (node, generation, owner) in claims {
            let Some(known) = self.record.swarm.nodes.get_mut(node.0 as usize) else { continue };
            self.owners.insert(node, owner);
            if generation > known.generation {
                changed = true;
                known.restarts = generation.0.saturating_sub(1);
                known.generation = generation;
                known.ran = true;
                known.phase = PhaseRecord::Running;
            }
        }
        if changed {
            self.save().await;
        }
        if !self.announced && self.record.swarm.nodes.iter().all(|node| node.ran) {
            self.announced = true;
            let count = self.record.hosts.len();
            self.shared.board.progress(LaunchProgress {
                swarm: self.record.swarm_id.clone(),
                stage: "ready",
                message: format!("{count} of {count} hosts have taken their node"),
            });
        }
    }

    /// Workers say themselves that they are gone, and one of this host can be seen to be; others have their time.
    async fn end_if_gone(&mut self) {
        let Some(release) = self.record.swarm.release else { return };
        let (shared, swarm, hosts) =
            (Arc::clone(&self.shared), self.record.swarm_id.clone(), self.record.hosts.clone());
        let said = tokio::task::spawn_blocking(move || {
            // A file that cannot be read says nothing.
            hosts.iter().map(|host| shared.files.says_gone(host, &swarm).unwrap_or(false)).collect::<Vec<_>>()
        });
        let said = said.await.unwrap_or_default();
        let seen_gone = |node: &NodeIndex| {
            self.owners.get(node).is_some_and(|owner| {
                owner.host == self.shared.host && !is_alive(&ProcessId { pid: owner.pid, start_time: owner.start_time })
            })
        };
        let says_gone = |node: &NodeIndex| said.get(node.0 as usize).copied().unwrap_or(false);
        let mut nodes = (0..self.record.hosts.len() as u32).map(NodeIndex);
        let all_gone = nodes.all(|node| says_gone(&node) || seen_gone(&node));
        if !all_gone && drover_service::now_us() < release.kill_at_us {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let hosts = self.record.hosts.clone();
        let freed = tokio::task::spawn_blocking(move || {
            hosts.iter().try_for_each(|host| {
                shared.files.write(host, None)?;
                Membership::withdraw(&shared.mailbox.root().join(Files::identity(host)));
                Ok(())
            })
        });
        match freed.await.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok(()) => {
                info!(swarm_id = %self.record.swarm_id, "static hosts are free again");
                self.record.swarm.over_us = Some(drover_service::now_us());
                for node in &mut self.record.swarm.nodes {
                    node.phase = PhaseRecord::Exited;
                }
                self.save().await;
            }
            Err(error) => warn!(swarm_id = %self.record.swarm_id, %error, "hosts cannot be freed, trying again"),
        }
    }

    async fn release(&mut self, force: bool) -> Result<(), Failure> {
        if self.is_over() {
            return Ok(());
        }
        let known = self.record.swarm.release;
        let kill_at_us =
            known.map_or_else(|| drover_service::now_us() + self.shared.end_after.as_micros() as u64, |r| r.kill_at_us);
        let force = force || known.is_some_and(|release| release.force);
        let mut record = self.record.clone();
        record.swarm.release = Some(ReleaseRecord { force, kill_at_us });
        let shared = Arc::clone(&self.shared);
        let written = tokio::task::spawn_blocking(move || {
            shared.store.save(&record).map_err(|error| error.failure())?;
            for (node, host) in record.hosts.iter().enumerate() {
                let assigned = Assigned {
                    identity: shared.identity_there(host),
                    ..Assigned::of(&record, node, Some(ReleaseOrder { force }))
                };
                shared.files.write(host, Some(&assigned)).map_err(|error| super::unusable(&error))?;
            }
            Ok(record)
        });
        self.record =
            written.await.unwrap_or_else(|error| Err(Failure::new(ErrorCode::Internal, error.to_string())))?;
        info!(swarm_id = %self.record.swarm_id, force, "releasing static hosts");
        Ok(())
    }

    async fn save(&self) {
        let shared = Arc::clone(&self.shared);
        let record = self.record.clone();
        let saved = tokio::task::spawn_blocking(move || shared.store.save(&record)).await;
        if let Ok(Err(error)) = saved {
            // Nothing is lost: claims and files tell the same once more after a restart.
            warn!(swarm_id = %self.record.swarm_id, error = error.failure().message, "cannot store");
        }
    }

    fn is_old(&self) -> bool {
        let now = drover_service::now_us();
        self.record.swarm.over_us.is_some_and(|over| now.saturating_sub(over) > KEEP_OVER_US)
    }

    async fn forget(&self) {
        let shared = Arc::clone(&self.shared);
        let swarm = self.record.swarm_id.clone();
        let _ = tokio::task::spawn_blocking(move || shared.store.remove(&swarm)).await;
        self.shared.board.forget(&self.record.swarm_id);
    }

    fn publish(&self) {
        let nodes: Vec<AllocatedNode> =
            (0..).map(NodeIndex).zip(&self.record.hosts).map(|(n, h)| self.node(n, h)).collect();
        let any_ran = self.record.swarm.nodes.iter().any(|node| node.ran);
        let (state, reason) = match (self.record.swarm.over_us, self.record.swarm.release) {
            (Some(_), _) => (AllocationState::Completed, "released"),
            (None, Some(release)) if release.force => (AllocationState::Completing, "workers were told to end at once"),
            (None, Some(_)) => (AllocationState::Completing, "workers are draining"),
            (None, None) if any_ran => (AllocationState::Running, ""),
            (None, None) => (AllocationState::Pending, "no worker has taken its node yet"),
        };
        self.shared.board.put(Allocation {
            swarm: self.record.swarm_id.clone(),
            job: self.record.job_id.clone(),
            state,
            backend_state: state.word().to_owned(),
            reason: reason.to_owned(),
            nodes,
            backend: self.record.backend,
            provider: self.record.provider.clone(),
        });
    }

    fn node(&self, node: NodeIndex, assigned: &str) -> AllocatedNode {
        let known = self.record.swarm.nodes.get(node.0 as usize);
        let owner = self.owners.get(&node);
        let (state, reason) = match known.map(|known| known.phase) {
            Some(PhaseRecord::Running) => (WorkerState::Running, String::new()),
            Some(PhaseRecord::Exited) => (WorkerState::Exited, String::new()),
            _ => (WorkerState::Pending, format!("waits for drover-worker --static on {assigned}")),
        };
        AllocatedNode {
            node,
            host: owner.map_or_else(|| assigned.to_owned(), |owner| owner.host.clone()),
            generation: known.map_or(Generation(0), |known| known.generation),
            pid: if state == WorkerState::Running { owner.map_or(0, |owner| owner.pid) } else { 0 },
            state,
            reason,
            restarts: known.map_or(0, |known| known.restarts),
        }
    }
}
