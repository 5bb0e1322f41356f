//! Sessions whose node is gone: whoever leads has each of them taken over by the node that it belongs to now. Whoever is asked for one
//! of them before that takes it over at once; the claim decides.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::Shell;
use super::members::{client, leader};
use crate::core::{Input, NodeId};
use crate::ownership::Ownership as _;

/// When a gone node's sessions are looked for: one that leaves is given a moment to hand them over itself, and the later looks find what a leader that ended too left behind.
const LOOKS: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(6), Duration::from_secs(30)];

/// Looks after them until the shutdown.
pub(crate) async fn adopt_orphans(shell: Shell, membership: String) {
    let (mut changed, stopping) = (shell.view.watch(), shell.ctx.shutdown().clone());
    let mut client = client(&shell, &membership);
    // Since when each node is gone, and how many looks there were.
    let mut gone: BTreeMap<NodeId, (Instant, usize)> = BTreeMap::new();
    loop {
        let now_gone = shell.view.gone();
        gone.retain(|node, _| now_gone.contains(node));
        for node in now_gone {
            gone.entry(node).or_insert((Instant::now(), 0));
        }
        let due: Vec<NodeId> = gone
            .iter()
            .filter(|(_, (since, looks))| LOOKS.get(*looks).is_some_and(|after| since.elapsed() >= *after))
            .map(|(node, _)| node.clone())
            .collect();
        if !due.is_empty() {
            let leads = leader(&mut client).await.is_some_and(|leader| leader == shell.me.node);
            for node in due {
                if let Some((_, looks)) = gone.get_mut(&node) {
                    *looks += 1;
                }
                if leads {
                    adopt(&shell, node).await;
                }
            }
        }
        let next = gone.values().filter_map(|(since, looks)| LOOKS.get(*looks).map(|after| *since + *after)).min();
        tokio::select! {
            _ = changed.changed() => {}
            () = sleep_until(next.unwrap_or_else(|| Instant::now() + LOOKS[2])) => {}
            () = stopping.cancelled() => return,
        }
    }
}

async fn adopt(shell: &Shell, node: NodeId) {
    let (ownership, of) = (shell.disk.places().ownership.clone(), node.clone());
    let owned = tokio::task::spawn_blocking(move || ownership.owned_by(&of)).await;
    let owned = match owned {
        Ok(Ok(owned)) => owned,
        Ok(Err(error)) => return warn!(node = %node, %error, "the sessions of a node that is gone cannot be listed"),
        Err(_) => return,
    };
    let mut count = 0;
    for record in owned.into_iter().filter(|record| record.cause != crate::core::Cause::Closed) {
        let placed = shell.view.place(&record.session, &std::collections::BTreeSet::new(), 1.0);
        match placed.first() {
            Some(to) if *to != shell.me.node => shell.links.send_recover(to, &record.session),
            _ => shell.jobs.input(Input::Recover { session: record.session }).await,
        }
        count += 1;
    }
    if count > 0 {
        info!(node = %node, sessions = count, "a node is gone, and its sessions are taken over");
    }
}
