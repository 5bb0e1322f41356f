//! Checks of a cluster that is reached over SSH: taken by the allocator's own code, told as checks of ours.

use drover_allocator::cluster::{ClusterSettings, Finding, Wishes, check};
use drover_config::{Backend, Config};
use drover_types::AgentKind;

use super::Check;

/// Looks at the cluster of this entry of the catalogue, or of the first one. Nothing when that is no cluster.
pub(super) async fn cluster(config: &Config, asked: Option<&str>, fix: bool) -> Vec<Check> {
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
    settings.ask_on_a_terminal();
    let wishes = Wishes {
        partition: entry.defaults.get("partition").cloned(),
        codex: entry.agent.unwrap_or(config.worker.agent) == AgentKind::Codex,
        codex_bin: config.worker.codex_bin.as_ref().map(|path| path.display().to_string()),
        codex_home: config.worker.codex_home.as_ref().map(|path| path.display().to_string()),
        install_codex: fix.then(|| drover_worker::codex::TESTED_VERSION.to_owned()),
        ..Wishes::default()
    };
    check(&settings, &wishes).await.into_iter().map(of).collect()
}

fn of(finding: Finding) -> Check {
    let Finding { name, ok, minor, detail, hint } = finding;
    Check { name, ok, minor, detail, hint }
}
