//! What a swarm has on the shared file system before its job is submitted, and what its workers leave there. Blocks.
//!
//! ```text
//! <base>/swarms/<swarm>/drover.yaml    what the workers are configured with
//! <base>/swarms/<swarm>/job-<id>.log   what the job and its workers say
//! <base>/mailbox/<swarm>/<NN>/…        as everywhere
//! ```

use std::io;
use std::path::{Path, PathBuf};

use drover_config::Config;
use drover_mailbox::Mailbox;
use drover_types::{NodeIndex, OutboxId, SwarmId};

use super::core::Claim;
use crate::files;
use crate::local::prepare_mailbox;
use crate::spec::Spec;

/// Our part of a shared file system that is mounted on this host.
#[derive(Debug, Clone)]
pub(super) struct Ground {
    base: PathBuf,
    mailbox: Mailbox,
}

impl Ground {
    pub(super) fn new(base: &str, mailbox: &str) -> Self {
        Self { base: PathBuf::from(base), mailbox: Mailbox::new(mailbox) }
    }

    pub(super) fn base(&self) -> &Path {
        &self.base
    }

    pub(super) fn mailbox(&self) -> &Path {
        self.mailbox.root()
    }

    /// Directory of a swarm.
    pub(super) fn dir(&self, swarm: &SwarmId) -> PathBuf {
        self.base.join("swarms").join(swarm.as_str())
    }

    /// Makes everything that the workers expect to find.
    pub(super) fn prepare(&self, swarm: &SwarmId, spec: &Spec, config: &str) -> io::Result<()> {
        let dir = self.dir(swarm);
        files::make_dir(&dir)?;
        files::replace(&dir, "drover.yaml", ".drover.yaml.new", config.as_bytes())?;
        files::make_dir(self.mailbox.root())?;
        prepare_mailbox(&self.mailbox, swarm, spec)
    }

    /// Who has claimed the nodes of a swarm.
    pub(super) fn claims(&self, swarm: &SwarmId, nodes: u32) -> io::Result<Vec<Claim>> {
        let mut claims = Vec::new();
        for node in (0..nodes).map(NodeIndex) {
            let Some(generation) = self.mailbox.generations(swarm, node)?.last().copied() else { continue };
            let outbox = OutboxId { swarm: swarm.clone(), node, generation };
            if let Some(owner) = self.mailbox.owner(&outbox)? {
                claims.push(Claim { node, generation, host: owner.host, pid: owner.pid });
            }
        }
        Ok(claims)
    }

    /// Takes away what only a living swarm needs. Its mailbox is the router's to remove.
    pub(super) fn forget(&self, swarm: &SwarmId) -> io::Result<()> {
        match std::fs::remove_dir_all(self.dir(swarm)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// What of our configuration is the workers' too.
pub(super) fn worker_config(config: &Config) -> String {
    let theirs = Config {
        worker: config.worker.clone(),
        telemetry: config.telemetry.clone(),
        swarm: config.swarm.clone(),
        security: config.security.clone(),
        ..Config::default()
    };
    theirs.dump()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn workers_get_their_part_of_the_configuration() {
        let text = "worker: {agent: echo, drain_grace: 3s}\nrouter: {keep_events: 5}\nswarm: {enabled: false}";
        let config = Config::from_text("test.yaml", text, &BTreeMap::new()).unwrap().0;
        let theirs = Config::from_text("worker.yaml", &worker_config(&config), &BTreeMap::new()).unwrap().0;
        assert_eq!((&theirs.worker, &theirs.swarm), (&config.worker, &config.swarm));
        assert_eq!(theirs.router, Config::default().router);
        assert_eq!(theirs.validate(), []);
    }
}
