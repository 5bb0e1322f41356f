//! The way to a cluster's files: by our own hands where the file system is mounted here, else by our program on the login host.

use std::time::Duration;

use drover_ssh::Command;
use drover_types::{ErrorCode, Failure};

use super::ground::{Answer, Ground, Request};
use crate::cluster::{Cluster, Way};

/// A swarm of many nodes on a slow file system takes its time to be furnished.
const MAKING: Duration = Duration::from_mins(2);
/// A look that takes longer is of no use.
const LOOKING: Duration = Duration::from_secs(20);

/// Our part of a cluster's shared file system, wherever that is. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Access {
    cluster: Cluster,
    ground: Ground,
}

impl Access {
    pub(super) fn new(cluster: &Cluster) -> Self {
        let settings = cluster.settings();
        Self { cluster: cluster.clone(), ground: Ground::new(&settings.base, &settings.mailbox()) }
    }

    /// Its paths, as they are on the cluster.
    pub(super) fn ground(&self) -> &Ground {
        &self.ground
    }

    /// Has something done there. Whatever it was, it may be asked for again.
    pub(super) async fn ask(&self, request: Request) -> Result<Answer, Failure> {
        if matches!(self.cluster.settings().way, Way::Here) {
            return self.here(request).await;
        }
        let deadline = if matches!(request, Request::Claims { .. }) { LOOKING } else { MAKING };
        let settings = self.cluster.settings();
        let question = serde_json::to_vec(&request)
            .map_err(|error| Failure::new(ErrorCode::Internal, format!("a request cannot be written: {error}")))?;
        let command = |program: &str| {
            Command::new(program)
                .args(["site", "ground", "--json", "--base", &settings.base])
                .stdin(question.clone())
                .deadline(deadline)
        };
        let answer = self.cluster.run_program(command).await?;
        // A prologue of the site may print something first.
        let text = String::from_utf8_lossy(&answer);
        let line = text.lines().rev().find(|line| line.starts_with('{')).unwrap_or_default();
        serde_json::from_str(line)
            .map_err(|error| settings.unavailable(format!("what our program answered makes no sense: {error}")))
    }

    async fn here(&self, request: Request) -> Result<Answer, Failure> {
        let ground = self.ground.clone();
        let answered = tokio::task::spawn_blocking(move || ground.answer(request)).await;
        answered.unwrap_or_else(|error| Err(std::io::Error::other(error))).map_err(|error| {
            let base = self.ground.base().display();
            Failure::new(ErrorCode::StoreUnavailable, format!("{base} cannot be used: {error}"))
                .hint("check workspace_root: the file system must be mounted, writable and not full")
        })
    }
}
