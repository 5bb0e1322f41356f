//! `drover launch`: starts a swarm, shows it coming up, then follows its first answers.

use std::time::Duration;

use drover_allocator::Rehearsal;
use drover_allocator::cluster::ClusterSettings;
use drover_proto::allocator::Provider;
use drover_proto::common::LaunchSpec;
use drover_proto::router as pb;
use drover_proto::router::launch_swarm_response::Step as LaunchStep;
use drover_types::Failure;
use serde_json::json;

use super::follow::{Teller, ends_swarm};
use super::inject::Turns;
use super::{carriable, request_id, text_or_stdin, traceparent};
use crate::app::App;
use crate::args::Launch;
use crate::client::{Client, Rpc, unary};
use crate::fault::{Exit, Fault};
use crate::render::screen::Live;
use crate::render::words;
use crate::watch::{self, Resumable, Step, Watch};
use crate::{bundle, render};

pub(super) async fn run(app: &App, args: Launch) -> anyhow::Result<Exit> {
    let (detach, dry_run) = (args.detach, args.dry_run);
    let spec = spec_of(args)?;
    let prompted = !spec.system_prompt.trim().is_empty();
    let mut client = Client::connect(app).await?;
    if dry_run {
        return show_plan(app, &mut client, &spec).await;
    }
    let before = client.info.last_seq;
    let Some(swarm) = launch(app, &mut client, spec).await? else { return Ok(Exit::Failed) };
    show_launched(app, &swarm)?;
    // A script reads one document, and goes on from there.
    if detach || !prompted || app.global.json {
        return Ok(Exit::Done);
    }
    app.screen.progress("waiting for its first answers; Ctrl-C leaves the swarm running");
    let mut watch = Watch::new(app, client.rpc, before, &swarm.swarm_id, true);
    let Some(turns) = first_answers(app, &mut watch, &swarm).await? else {
        app.screen.note(&format!("swarm {0} goes on; follow it with: drover attach {0}", swarm.swarm_id));
        return Ok(Exit::Done);
    };
    turns.verdict(&swarm.swarm_id)?;
    app.screen.progress(&format!("swarm {0} goes on; end it with: drover terminate {0}", swarm.swarm_id));
    Ok(Exit::Done)
}

/// Prints what the swarm says until each node has answered its first prompt. `None` when the person left before.
async fn first_answers(app: &App, watch: &mut Watch, swarm: &pb::Swarm) -> anyhow::Result<Option<Turns>> {
    let mut teller = Teller::new(app);
    let mut turns = Turns::new(swarm.node_count as usize);
    loop {
        let events = tokio::select! {
            () = app.stop.cancelled() => return Ok(None),
            events = watch.next() => events?.unwrap_or_default(),
        };
        for event in &events {
            if let (Some(node), false) = (event.node_id, event.injection_id.is_empty()) {
                // The first injection that a node of a new swarm has is that of the launch.
                turns.accept(node, &event.injection_id);
            }
            teller.tell(event)?;
            turns.event(event);
            if turns.all_over() {
                return Ok(Some(turns));
            }
            if ends_swarm(event) {
                let message = format!("swarm {} has ended before every node had answered", swarm.swarm_id);
                return Err(Fault::failed(message).hint(format!("drover why {}", swarm.swarm_id)).into());
            }
        }
    }
}

/// Reads everything that the launch takes from files and standard input.
fn spec_of(args: Launch) -> Result<LaunchSpec, Fault> {
    let bundle = args.agents_md.as_deref().map(bundle::read).transpose()?.unwrap_or_default();
    Ok(LaunchSpec {
        node_count: args.nodes,
        system_prompt: carriable(text_or_stdin(&args.prompt)?)?,
        agent: args.agent.unwrap_or_default(),
        provider: args.cluster.unwrap_or_default(),
        partition: args.partition.unwrap_or_default(),
        time: args.time.unwrap_or_default(),
        account: args.account.unwrap_or_default(),
        qos: args.qos.unwrap_or_default(),
        agents_md: bundle.agents_md,
        skills: bundle.skills,
        params: args.params.into_iter().collect(),
    })
}

/// Launches and waits until the swarm is up. `None` when the person left before.
pub(super) async fn launch(app: &App, client: &mut Client, spec: LaunchSpec) -> anyhow::Result<Option<pb::Swarm>> {
    let nodes = spec.node_count;
    let request = pb::LaunchSwarmRequest { request_id: request_id(), spec: Some(spec), traceparent: traceparent() };
    let mut steps: Resumable<pb::LaunchSwarmResponse> =
        watch::repeatable(app, client.rpc.clone(), move |mut rpc: Rpc| {
            let request = request.clone();
            Box::pin(async move { rpc.launch_swarm(request).await })
        });
    let bar = app.screen.bar(u64::from(nodes), "nodes up");
    let mut swarm_id = String::new();
    let mut last = (String::new(), String::new());
    let mut look = tokio::time::interval(Duration::from_millis(300));
    loop {
        let step = tokio::select! {
            () = app.stop.cancelled() => {
                drop(bar);
                let how = if swarm_id.is_empty() { "drover list".to_owned() } else { format!("drover status {swarm_id}") };
                app.screen.note(&format!("the launch goes on; look at it with: {how}"));
                return Ok(None);
            }
            step = steps.next() => step?,
            _ = look.tick(), if app.screen.is_live() && !swarm_id.is_empty() => {
                count_nodes(client, &swarm_id, &bar).await;
                continue;
            }
        };
        let Step::Item(answer) = step else {
            steps.cut_short().await?;
            continue;
        };
        match answer.step {
            Some(LaunchStep::Progress(progress)) => {
                swarm_id = progress.swarm_id;
                let said = (progress.stage, progress.message);
                if said != last {
                    app.screen.progress(&format!("{}: {}", said.0, said.1));
                    bar.say(&said.1);
                    last = said;
                }
            }
            Some(LaunchStep::Launched(swarm)) => return Ok(Some(swarm)),
            None => {}
        }
    }
}

async fn count_nodes(client: &mut Client, swarm_id: &str, bar: &Live) {
    // Only decoration: what fails here shows in the launch itself.
    if let Ok(swarm) = client.find(swarm_id).await {
        let up = swarm.nodes.iter().filter(|node| matches!(node.state.as_str(), "idle" | "busy")).count();
        bar.at(up as u64);
    }
}

fn show_launched(app: &App, swarm: &pb::Swarm) -> anyhow::Result<()> {
    if app.global.json {
        app.screen.out(&render::json::swarm(swarm).to_string())?;
    } else {
        super::status::show(app, swarm, "")?;
    }
    Ok(())
}

/// `--dry-run`: what would be launched, and where.
async fn show_plan(app: &App, client: &mut Client, spec: &LaunchSpec) -> anyhow::Result<Exit> {
    let catalogue = unary(client.rpc.list_providers(pb::ListProvidersRequest {})).await?.providers;
    let provider = choose(&catalogue, &spec.provider)?;
    let agent = if spec.agent.is_empty() { app.config.worker.agent.as_str() } else { &spec.agent };
    // A router elsewhere has another configuration, and its own way to its clusters.
    let there = provider.backend == "slurm" && !provider.disabled && app.global.router.is_none();
    let rehearsal = if there { Some(rehearse(app, &provider.id, spec).await?) } else { None };
    if app.global.json {
        let mut plan = plan_json(spec, agent, provider);
        plan["slurm"] = rehearsal.as_ref().map_or(serde_json::Value::Null, rehearsal_json);
        app.screen.out(&plan.to_string())?;
    } else {
        app.screen.out(&format!("{:<14}{}", "configuration", app.config_source))?;
        for (name, value) in plan_lines(spec, agent, provider) {
            app.screen.out(&format!("{name:<14}{value}"))?;
        }
        if let Some(rehearsal) = &rehearsal {
            for (name, value) in rehearsal_lines(rehearsal) {
                app.screen.out(&format!("{name:<14}{value}"))?;
            }
            app.screen.out(&format!("\n{}", rehearsal.script.trim_end()))?;
        }
        app.screen.note("nothing was launched");
    }
    if let Some(failure) = rehearsal.and_then(|it| it.unreachable.or_else(|| it.preflight.err())) {
        return Err(Fault::failed(failure.message).hint(failure.hint).into());
    }
    let most = app.config.allocator.max_local_nodes;
    if provider.backend == "local" && spec.node_count > most {
        return Err(Fault::failed(format!("{} nodes are more than the {most} that may run here", spec.node_count))
            .hint("ask for fewer, or raise allocator.max_local_nodes in the configuration")
            .into());
    }
    if provider.disabled {
        return Err(Fault::failed(format!("{} cannot be used: {}", provider.id, provider.disabled_reason))
            .hint(format!("the catalogue: {}", ids(&catalogue)))
            .into());
    }
    Ok(Exit::Done)
}

/// Asks the cluster what it would make of the launch, over a connection of this command.
async fn rehearse(app: &App, provider: &str, spec: &LaunchSpec) -> Result<Rehearsal, Fault> {
    let of = |failure: Failure| Fault::failed(failure.message).hint(failure.hint);
    let catalogue = app.config.providers();
    let entry = catalogue.iter().find(|entry| entry.id == provider).ok_or_else(|| {
        Fault::failed(format!("this configuration has no {provider}, the router's has"))
            .hint("give the same --config as when the daemons were started")
    })?;
    let mut settings = ClusterSettings::of(&app.config, entry).map_err(of)?;
    settings.ask_on_a_terminal();
    drover_allocator::rehearse(&app.config, entry, &settings, spec).await.map_err(of)
}

fn rehearsal_lines(rehearsal: &Rehearsal) -> Vec<(&'static str, String)> {
    let size = words::size(rehearsal.program_bytes);
    let program = match rehearsal.program_there {
        Some(true) => format!("{} ({size}, lies there already)", rehearsal.program),
        Some(false) => format!("{} ({size}, would be uploaded)", rehearsal.program),
        None => format!("{} ({size})", rehearsal.program),
    };
    let slurm = match (&rehearsal.unreachable, &rehearsal.preflight) {
        (Some(_), _) => "not asked: the login host cannot be reached".to_owned(),
        (None, Ok(words)) => words.clone(),
        (None, Err(failure)) => format!("{}; {}", failure.message, failure.hint),
    };
    let mut lines = vec![("login host", rehearsal.way.clone()), ("slurm", slurm), ("program", program)];
    lines.extend(rehearsal.files.iter().map(|(path, bytes)| ("file", format!("{path} ({})", words::size(*bytes)))));
    lines
}

fn rehearsal_json(rehearsal: &Rehearsal) -> serde_json::Value {
    let failure =
        |failure: &Failure| json!({"code": failure.code.as_str(), "message": failure.message, "hint": failure.hint});
    json!({
        "login_host": rehearsal.way,
        "unreachable": rehearsal.unreachable.as_ref().map(failure),
        "ok": rehearsal.unreachable.is_none() && rehearsal.preflight.is_ok(),
        "preflight": rehearsal.preflight.as_ref().ok(),
        "refused": rehearsal.preflight.as_ref().err().map(failure),
        "base": rehearsal.base,
        "program": {
            "path": rehearsal.program, "bytes": rehearsal.program_bytes, "there": rehearsal.program_there,
        },
        "files": rehearsal.files.iter().map(|(path, bytes)| json!({"path": path, "bytes": bytes})).collect::<Vec<_>>(),
        "script": rehearsal.script,
    })
}

fn choose<'a>(catalogue: &'a [Provider], wanted: &str) -> Result<&'a Provider, Fault> {
    let found = if wanted.is_empty() {
        catalogue.first()
    } else {
        catalogue.iter().find(|provider| provider.id == wanted || provider.cluster_profile == wanted)
    };
    found.ok_or_else(|| match wanted {
        "" => Fault::failed("there is nowhere to launch: the catalogue is empty")
            .hint("look at `cluster` in the configuration"),
        wanted => {
            Fault::failed(format!("there is no cluster {wanted:?}")).hint(format!("the catalogue: {}", ids(catalogue)))
        }
    })
}

fn ids(catalogue: &[Provider]) -> String {
    let ids: Vec<String> = catalogue
        .iter()
        .map(|provider| {
            if provider.disabled {
                format!("{} (not usable: {})", provider.id, provider.disabled_reason)
            } else {
                provider.id.clone()
            }
        })
        .collect();
    ids.join(", ")
}

fn plan_json(spec: &LaunchSpec, agent: &str, provider: &Provider) -> serde_json::Value {
    json!({
        "dry_run": true,
        "node_count": spec.node_count,
        "agent": agent,
        "system_prompt": spec.system_prompt,
        "partition": spec.partition,
        "time": spec.time,
        "account": spec.account,
        "qos": spec.qos,
        "params": spec.params,
        "agents_md_bytes": spec.agents_md.len(),
        "skills": spec.skills.iter().map(|skill| skill.path.as_str()).collect::<Vec<_>>(),
        "provider": {
            "id": provider.id,
            "label": provider.label,
            "backend": provider.backend,
            "defaults": provider.defaults,
            "disabled": provider.disabled,
            "disabled_reason": provider.disabled_reason,
        },
    })
}

fn plan_lines(spec: &LaunchSpec, agent: &str, provider: &Provider) -> Vec<(&'static str, String)> {
    let mut lines = vec![
        ("cluster", format!("{} ({}, {})", provider.id, provider.label, provider.backend)),
        ("nodes", spec.node_count.to_string()),
        ("agent", agent.to_owned()),
    ];
    let given = [
        ("partition", &spec.partition),
        ("time", &spec.time),
        ("account", &spec.account),
        ("qos", &spec.qos),
        ("prompt", &spec.system_prompt),
    ];
    lines.extend(given.into_iter().filter(|(_, value)| !value.is_empty()).map(|(name, value)| (name, value.clone())));
    let mut params: Vec<_> = provider.defaults.iter().filter(|(key, _)| !spec.params.contains_key(*key)).collect();
    params.extend(&spec.params);
    params.sort();
    lines.extend(params.into_iter().map(|(key, value)| ("param", format!("{key}={value}"))));
    if !spec.agents_md.is_empty() || !spec.skills.is_empty() {
        let skills = words::count(spec.skills.len(), "skill file");
        lines.push(("AGENTS.md", format!("{} bytes, {skills}", spec.agents_md.len())));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_names_the_place_and_every_parameter_once() {
        let provider = Provider {
            id: "hpc".into(),
            label: "The cluster".into(),
            backend: "slurm".into(),
            defaults: [("gpus".to_owned(), "1".to_owned()), ("mem".to_owned(), "4G".to_owned())].into(),
            ..Default::default()
        };
        let spec = LaunchSpec {
            node_count: 4,
            partition: "mi2508x".into(),
            params: [("mem".to_owned(), "8G".to_owned())].into(),
            ..Default::default()
        };
        let lines: Vec<String> =
            plan_lines(&spec, "codex", &provider).into_iter().map(|(name, value)| format!("{name}: {value}")).collect();
        insta::assert_snapshot!(lines.join("\n"), @r"
        cluster: hpc (The cluster, slurm)
        nodes: 4
        agent: codex
        partition: mi2508x
        param: gpus=1
        param: mem=8G
        ");
        let catalogue = [provider];
        assert!(choose(&catalogue, "").is_ok());
        let fault = choose(&catalogue, "hcp").unwrap_err();
        assert!(fault.message.contains("hcp") && fault.hint.contains("hpc"), "{fault:?}");
    }
}
