//! A launch without its effects: what Slurm says of it beforehand, what would be sent, and the script that would be submitted.

use drover_config::{Config, ProviderConfig};
use drover_proto::common::LaunchSpec;
use drover_ssh::Command;
use drover_types::Failure;

use super::ground::worker_config;
use super::tag::Tag;
use super::{Knobs, calls, plan_of};
use crate::cluster::{ClusterSettings, Program};
use crate::spec::Spec;

/// Stands for the id of the swarm, which only a launch gives.
const SWARM: &str = "SWARM";

/// What a launch would do.
#[derive(Debug, Clone)]
pub struct Rehearsal {
    /// How the login host is reached.
    pub way: String,
    /// What Slurm says of the partition, or why the launch could never run.
    pub preflight: Result<String, Failure>,
    /// Why the login host could not be asked, when it could not: then nothing is known of the cluster.
    pub unreachable: Option<Failure>,
    /// Where the program would be.
    pub program: String,
    /// Its size.
    pub program_bytes: u64,
    /// Whether it lies there already.
    pub program_there: Option<bool>,
    /// Our directory on the cluster.
    pub base: String,
    /// What is written for the swarm: path, and size in bytes. Of what each node gets, the path has `<NN>`.
    pub files: Vec<(String, u64)>,
    /// The script.
    pub script: String,
}

/// Goes through a launch on this entry of the catalogue. Nothing is written, sent or submitted.
pub async fn rehearse(
    config: &Config,
    provider: &ProviderConfig,
    settings: &ClusterSettings,
    asked: &LaunchSpec,
) -> Result<Rehearsal, Failure> {
    let spec = Spec::parse(asked, provider, config.worker.agent)?;
    let swarm = SWARM.parse().map_err(|_| settings.unavailable("the stand-in for a swarm's id is none"))?;
    let knobs = Knobs::of(config, provider.profile.as_deref());
    let ground = super::Ground::new(&settings.base, &settings.mailbox());
    let mut plan = plan_of(&ground, &knobs.local_dir, &swarm, &spec)?;
    let path = settings.program.clone();
    let program = tokio::task::spawn_blocking(move || Program::read(&path)).await;
    let program = program.unwrap_or_else(|error| Err(std::io::Error::other(error))).map_err(|error| {
        settings.unavailable(format!("the program to place, {}, cannot be read: {error}", settings.program.display()))
    })?;
    plan.places.program = program.place(&settings.base);
    let script = plan.script(&Tag { swarm, submission: 1 });
    let dir = &plan.places.dir;
    let node = format!("{}/{SWARM}/<NN>/bundle", plan.places.mailbox);
    let bundle = [("AGENTS.md".to_owned(), &spec.bundle.agents_md)].into_iter().filter(|(_, text)| !text.is_empty());
    let skills = spec.bundle.skills.iter().map(|skill| (format!(".agents/skills/{}", skill.path), &skill.content));
    let files = [(format!("{dir}/drover.yaml"), worker_config(config).len() as u64)]
        .into_iter()
        .chain(bundle.chain(skills).map(|(name, text)| (format!("{node}/{name}"), text.len() as u64)))
        .collect();
    let mut rehearsal = Rehearsal {
        way: settings.way.to_string(),
        preflight: Ok("not looked at".to_owned()),
        unreachable: None,
        program: plan.places.program.clone(),
        program_bytes: program.bytes,
        program_there: None,
        base: settings.base.clone(),
        files,
        script,
    };
    let remote = match settings.connect(&rehearsal.program) {
        Ok(remote) => remote,
        Err(error) => return Ok(Rehearsal { unreachable: Some(settings.of_ssh(&error)), ..rehearsal }),
    };
    // Also answers whether the host can be reached at all.
    match remote.run(Command::new("test").args(["-x", &rehearsal.program])).await {
        Ok(output) => rehearsal.program_there = Some(output.success()),
        Err(error) => return Ok(Rehearsal { unreachable: Some(settings.of_ssh(&error)), ..rehearsal }),
    }
    rehearsal.preflight = calls::preflight(&*remote, &plan).await;
    Ok(rehearsal)
}
