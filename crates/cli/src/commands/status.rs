//! `drover status`: one swarm and its nodes.

use drover_proto::allocator::Orphan;
use drover_proto::router as pb;
use drover_types::ErrorCode;
use serde_json::json;

use super::members::load;
use super::now_ms;
use crate::app::App;
use crate::args::Swarm;
use crate::client::{Client, unary};
use crate::fault::{Exit, Fault};
use crate::render::colour::{self, Tone};
use crate::render::json as shown;
use crate::render::table::{self, Cell, Table, cut, one_line};
use crate::render::words;

pub(super) async fn run(app: &App, args: &Swarm) -> anyhow::Result<Exit> {
    let mut client = Client::connect(app).await?;
    let answer = match client.swarm(&args.swarm).await {
        Ok(answer) => answer,
        Err(fault) if fault.code == Some(ErrorCode::UnknownSwarm) => {
            return orphan(app, &mut client, args.swarm.trim(), fault).await;
        }
        Err(fault) => return Err(fault.into()),
    };
    let swarm = answer.swarm.ok_or_else(|| Fault::failed("the router said nothing about the swarm"))?;
    if app.global.json {
        let mut document = shown::swarm(&swarm);
        if !answer.backend_error.is_empty() {
            document["backend_error"] = answer.backend_error.into();
        }
        app.screen.out(&document.to_string())?;
    } else {
        show(app, &swarm, &answer.backend_error)?;
    }
    Ok(Exit::Done)
}

/// A swarm that nobody here has: a cluster may have a job with its name all the same.
async fn orphan(app: &App, client: &mut Client, id: &str, unknown: Fault) -> anyhow::Result<Exit> {
    let Ok(answer) = unary(client.rpc.list_providers(pb::ListProvidersRequest {})).await else {
        return Err(unknown.into());
    };
    let jobs: Vec<(&str, &Orphan)> = answer
        .providers
        .iter()
        .flat_map(|provider| provider.orphans.iter().map(|orphan| (provider.id.as_str(), orphan)))
        .filter(|(_, orphan)| orphan.swarm_id == id)
        .collect();
    let Some((provider, orphan)) = jobs.first() else { return Err(unknown.into()) };
    let reason = "a job of this swarm is on the cluster, and this instance does not have the swarm";
    let hint = format!("`scancel {}` there ends the job if nobody else needs it", orphan.job_id);
    if app.global.json {
        let document = json!({
            "swarm_id": orphan.swarm_id, "status": "orphan", "reason": reason, "job_id": orphan.job_id,
            "slurm_state": orphan.backend_state, "provider_id": provider,
            "jobs": jobs.iter().map(|(_, orphan)| &orphan.job_id).collect::<Vec<_>>(),
        });
        app.screen.out(&document.to_string())?;
        return Ok(Exit::Done);
    }
    let paint = app.screen.paint();
    let mut facts = vec![("swarm", orphan.swarm_id.clone()), ("status", format!("orphan: {reason}"))];
    facts.extend(jobs.iter().map(|(provider, orphan)| {
        ("job", format!("{} on {provider} ({})", orphan.job_id, words::dash(&orphan.backend_state)))
    }));
    for (name, value) in facts {
        app.screen.out(&format!("{}{}", paint.paint(Tone::Dim, &format!("{name:<11}")), one_line(&value)))?;
    }
    app.screen.note(&hint);
    Ok(Exit::Done)
}

/// A swarm for people.
pub(super) fn show(app: &App, swarm: &pb::Swarm, backend_error: &str) -> std::io::Result<()> {
    let paint = app.screen.paint();
    let room = table::width().saturating_sub(11);
    for (name, value, tone) in facts(swarm, backend_error, now_ms()) {
        // Of a prompt the beginning will do; why a swarm is where it is must be read to the end.
        let value = if name == "prompt" { cut(&value, room) } else { value };
        let name = paint.paint(Tone::Dim, &format!("{name:<11}"));
        app.screen.out(&format!("{name}{}", paint.paint(tone, &value)))?;
    }
    app.screen.table(&nodes(swarm, table::width()))
}

fn facts(swarm: &pb::Swarm, backend_error: &str, now_ms: u64) -> Vec<(&'static str, String, Tone)> {
    let mut status = swarm.status.clone();
    if !swarm.reason.is_empty() {
        status = format!("{status}: {}", one_line(&swarm.reason));
    }
    let backend = match (swarm.provider.as_str(), swarm.slurm_state.as_str()) {
        (provider, "") => words::dash(provider).to_owned(),
        (provider, state) => format!("{} ({state})", words::dash(provider)),
    };
    let job = match (swarm.job_id.as_str(), swarm.provider.as_str()) {
        ("", "") => "none".to_owned(),
        (job, _) => format!("{} on {backend}", words::dash(job)),
    };
    let mut facts = vec![
        ("swarm", swarm.swarm_id.clone(), Tone::Bold),
        ("status", status, colour::of_state(&swarm.status)),
        ("job", job, Tone::Plain),
        ("agent", words::dash(&swarm.agent).to_owned(), Tone::Plain),
    ];
    let limits: Vec<String> = [("partition", &swarm.partition), ("time", &swarm.time)]
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    if !limits.is_empty() {
        facts.push(("limits", limits.join(", "), Tone::Plain));
    }
    facts.push(("age", words::age(now_ms, swarm.created_ms), Tone::Plain));
    if !swarm.system_prompt.is_empty() {
        facts.push(("prompt", one_line(&swarm.system_prompt), Tone::Plain));
    }
    if !backend_error.is_empty() {
        facts.push(("note", format!("may be out of date: {}", one_line(backend_error)), Tone::Warn));
    }
    facts
}

fn nodes(swarm: &pb::Swarm, width: usize) -> Table {
    let host_room = if width < 100 { 20 } else { width };
    // Only of use where there is a membership at all.
    let members = swarm.nodes.iter().any(|node| !node.membership.is_empty());
    let mut table = if members {
        Table::new(&[">NODE", "STATE", "MEMBER", ">LOAD", "HOST", ">PID", ">START", ">WAITING", "REASON"])
    } else {
        Table::new(&[">NODE", "STATE", "HOST", ">PID", ">START", ">WAITING", "REASON"])
    };
    for node in &swarm.nodes {
        let pid = if node.pid == 0 { "-".to_owned() } else { node.pid.to_string() };
        let mut row =
            vec![node.node_id.to_string().into(), Cell::toned(node.state.clone(), colour::of_state(&node.state))];
        if members {
            let load = load(node.load_score);
            row.push(Cell::toned(words::dash(&node.membership), colour::of_state(&node.membership)));
            row.push(Cell::toned(load, if node.overloaded { Tone::Warn } else { Tone::Plain }));
        }
        row.extend([
            cut(words::dash(&node.host), host_room).into(),
            pid.into(),
            node.generation.to_string().into(),
            node.outstanding.to_string().into(),
            reason(node).into(),
        ]);
        table.row(row);
    }
    table
}

/// Why the node is as it is; else what stands out about it as a member.
fn reason(node: &pb::Node) -> String {
    if !node.reason.is_empty() {
        return node.reason.clone();
    }
    if let Some(note) = node.membership_notes.iter().find(|note| note.current) {
        return note.message.clone();
    }
    match (node.overloaded, node.overload_reason.as_str()) {
        (false, _) => String::new(),
        (true, "") => "overloaded".to_owned(),
        (true, why) => format!("overloaded: {why}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::colour::Paint;

    #[test]
    fn a_swarm_reads_well_on_eighty_columns() {
        let node = |node_id, state: &str, reason: &str| pb::Node {
            node_id,
            host: "compute-17.cluster.example.org".into(),
            state: state.into(),
            reason: reason.into(),
            generation: 2,
            outstanding: 1,
            pid: 4242,
            running_injection: String::new(),
            ..pb::Node::default()
        };
        let swarm = pb::Swarm {
            swarm_id: "0199c7a2-7d58-7c4e-9a35-2f4f6a1c0b11".into(),
            job_id: "4242".into(),
            node_count: 2,
            system_prompt: "You are a focused\nautonomous agent.".into(),
            status: "degraded".into(),
            reason: "node 1 was given up".into(),
            slurm_state: "RUNNING".into(),
            partition: "mi2508x".into(),
            provider: "slurm".into(),
            agent: "codex".into(),
            created_ms: 1_000,
            nodes: vec![node(0, "idle", ""), node(1, "failed", "the worker ended 5 times, last with exit code 1")],
            ..Default::default()
        };
        let facts = facts(&swarm, "squeue: timed out", 61_000);
        let mut text = facts.iter().map(|(name, value, _)| format!("{name:<11}{value}")).collect::<Vec<_>>().join("\n");
        text.push('\n');
        text.push_str(&nodes(&swarm, 80).render(80, Paint::OFF));
        insta::assert_snapshot!(text, @r"
        swarm      0199c7a2-7d58-7c4e-9a35-2f4f6a1c0b11
        status     degraded: node 1 was given up
        job        4242 on slurm (RUNNING)
        agent      codex
        limits     partition mi2508x
        age        1m
        prompt     You are a focused autonomous agent.
        note       may be out of date: squeue: timed out
        NODE  STATE   HOST                   PID  START  WAITING  REASON
           0  idle    compute-17.cluster.…  4242      2        1
           1  failed  compute-17.cluster.…  4242      2        1  the worker ended 5 ti…
        ");
    }
}
