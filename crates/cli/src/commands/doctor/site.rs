//! Checks of a cluster that is reached over SSH: taken by the allocator's own code, told as checks of ours.

use std::io::IsTerminal as _;
use std::sync::Arc;

use drover_allocator::cluster::{ClusterSettings, Finding, Way, Wishes, check};
use drover_config::{Backend, Config};
use drover_types::AgentKind;

use super::Check;

/// Looks at the cluster of this entry of the catalogue, or of the first one. Nothing when that is no cluster.
pub(super) async fn cluster(config: &Config, asked: Option<&str>) -> Vec<Check> {
    let catalogue = config.providers();
    let entry = match asked {
        Some(id) => catalogue.iter().find(|entry| entry.id == id),
        None => catalogue.first(),
    };
    let Some(entry) = entry.filter(|entry| entry.backend == Backend::Slurm) else { return Vec::new() };
    let mut settings = match ClusterSettings::of(config, entry) {
        Ok(settings) => settings,
        Err(failure) => return vec![Check::wrong("cluster login", failure.message, failure.hint)],
    };
    // A person who sits here can say yes to a host that is not known yet; the daemons ask nobody.
    if let Way::Builtin(settings) | Way::System(settings) = &mut settings.way
        && std::io::stdin().is_terminal()
        && !settings.prompt.interactive()
    {
        settings.prompt = Arc::new(drover_allocator::cluster::Terminal);
    }
    let wishes = Wishes {
        partition: entry.defaults.get("partition").cloned(),
        codex: entry.agent.unwrap_or(config.worker.agent) == AgentKind::Codex,
        codex_bin: config.worker.codex_bin.as_ref().map(|path| path.display().to_string()),
        ..Wishes::default()
    };
    check(&settings, &wishes).await.into_iter().map(of).collect()
}

fn of(finding: Finding) -> Check {
    let Finding { name, ok, minor, detail, hint } = finding;
    Check { name, ok, minor, detail, hint }
}
