//! Finds out what became of a node's worker, from the record, the mailbox and the process table.
//!
//! A start is stored before it is carried out, so after a crash of the allocator there may be a worker of the stored
//! generation that the record does not name. It is looked for in two places: a worker that came far enough has claimed
//! its outbox and said there who it is; before that only its environment tells.

use std::io;

use drover_mailbox::{Mailbox, Owner};
use drover_types::{Generation, JobId, NodeIndex, OutboxId, SwarmId};

use super::process;
use crate::core::{Input, NodeRecord, PhaseRecord, Process};

/// Whose nodes are looked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Search<'a> {
    pub(super) mailbox: &'a Mailbox,
    pub(super) host: &'a str,
    pub(super) swarm: &'a SwarmId,
    pub(super) job: &'a JobId,
    /// False when the host was started anew or is another: then no process of the record can live.
    pub(super) same_boot: bool,
}

impl Search<'_> {
    /// What is there of one node.
    pub(super) fn look(&self, node: NodeIndex, stored: Option<&NodeRecord>) -> io::Result<Input> {
        let claimed = self.mailbox.generations(self.swarm, node)?.last().copied().unwrap_or_default();
        let generation = stored.map_or(Generation(0), |stored| stored.generation).max(claimed);
        let mut process = None;
        if self.same_boot && generation > Generation(0) {
            let current = stored.filter(|stored| stored.generation == generation);
            let remembered = current.and_then(|stored| stored.process);
            process = match remembered.filter(|&remembered| process::is_alive(remembered)) {
                Some(remembered) => Some(remembered),
                None => match self.claim(node, generation)? {
                    Some(owner) => self.living(&owner),
                    None if current.is_some_and(|stored| stored.phase == PhaseRecord::Starting) => {
                        self.by_environment(node, generation)
                    }
                    None => None,
                },
            };
        }
        Ok(Input::Found { node, generation, process })
    }

    /// Who claimed a generation.
    fn claim(&self, node: NodeIndex, generation: Generation) -> io::Result<Option<Owner>> {
        self.mailbox.owner(&OutboxId { swarm: self.swarm.clone(), node, generation })
    }

    /// The process of a claim, when it lives and is of this host.
    fn living(&self, owner: &Owner) -> Option<Process> {
        let process = Process { pid: owner.pid, start_time: owner.start_time };
        (owner.host == self.host && process::is_alive(process)).then_some(process)
    }

    fn by_environment(&self, node: NodeIndex, generation: Generation) -> Option<Process> {
        process::by_environment(&[
            ("DROVER_JOB_ID", self.job.to_string()),
            ("DROVER_NODE_ID", node.to_string()),
            ("DROVER_GENERATION", generation.to_string()),
        ])
    }

    /// Kills a worker of an earlier generation that still holds the node, and says so. The new one could not start
    /// because of it, and nobody supervises it.
    pub(super) fn evict(&self, node: NodeIndex, current: Generation) -> io::Result<Option<String>> {
        for generation in self.mailbox.generations(self.swarm, node)?.into_iter().rev() {
            if generation < current
                && let Some(stale) = self.claim(node, generation)?.and_then(|owner| self.living(&owner))
            {
                process::kill_tree(stale)?;
                return Ok(Some(format!("the one of generation {generation}, pid {}, was killed", stale.pid)));
            }
        }
        Ok(None)
    }
}
