//! `drover list`: every swarm in a line, and the jobs of clusters that look like ours and are nobody's.

use std::collections::BTreeSet;

use drover_proto::allocator::Provider;
use drover_proto::router as pb;

use super::now_ms;
use crate::app::App;
use crate::args::List;
use crate::client::{Client, unary};
use crate::fault::Exit;
use crate::render::colour;
use crate::render::json;
use crate::render::table::{Cell, Table, cut, tame, width};
use crate::render::words;

/// From here on a screen has room for whole ids.
const WIDE: usize = 100;
/// What the state of a job is called that Slurm no longer knows, and nobody else.
const LOST: &str = "UNKNOWN";

pub(super) async fn run(app: &App, args: &List) -> anyhow::Result<Exit> {
    let mut client = Client::connect(app).await?;
    if args.orphans {
        return orphans(app, &mut client).await;
    }
    let swarms = unary(client.rpc.list_swarms(pb::ListSwarmsRequest {})).await?.swarms;
    if app.global.json {
        let all: Vec<_> = swarms.iter().map(json::swarm).collect();
        app.screen.out(&serde_json::to_string(&all)?)?;
    } else if swarms.is_empty() {
        app.screen.note("no swarms; launch one: drover launch --nodes 4 --agent echo");
    } else {
        app.screen.table(&table(&swarms, now_ms(), width()))?;
    }
    // Beside the list, never instead of it: an allocator that is away is told by whoever needs it.
    if let Ok(answer) = unary(client.rpc.list_providers(pb::ListProvidersRequest {})).await {
        for line in notes(&answer.providers) {
            app.screen.note(&line);
        }
    }
    for line in swarms.iter().filter_map(without_job) {
        app.screen.note(&line);
    }
    Ok(Exit::Done)
}

/// What is to be known of a swarm whose job is gone, and nobody can say how.
fn without_job(swarm: &pb::Swarm) -> Option<String> {
    let lost = swarm.slurm_state == LOST;
    lost.then(|| format!("{}: swarm {} has no job any more; {}", swarm.provider_id, swarm.swarm_id, swarm.reason))
}

/// What is to be known of clusters that the list of swarms does not show. Entries that share a cluster say the same: once is enough.
fn notes(providers: &[Provider]) -> Vec<String> {
    let mut lines = Vec::new();
    let mut told = BTreeSet::new();
    for provider in providers {
        if !provider.trouble.is_empty() && told.insert(provider.trouble.clone()) {
            lines.push(format!("{}: {}", provider.id, provider.trouble));
        }
        for orphan in provider.orphans.iter().filter(|orphan| told.insert(format!("{orphan:?}"))) {
            lines.push(format!(
                "{}: job {} ({}) is of swarm {}, which this instance does not have; `scancel {}` there ends it if nobody else needs it",
                provider.id, orphan.job_id, orphan.backend_state, orphan.swarm_id, orphan.job_id
            ));
        }
    }
    lines
}

async fn orphans(app: &App, client: &mut Client) -> anyhow::Result<Exit> {
    let providers = unary(client.rpc.list_providers(pb::ListProvidersRequest {})).await?.providers;
    let swarms = unary(client.rpc.list_swarms(pb::ListSwarmsRequest {})).await?.swarms;
    if app.global.json {
        let orphans = providers.iter().flat_map(|provider| {
            provider.orphans.iter().map(|orphan| {
                serde_json::json!({
                    "provider_id": provider.id, "job_id": orphan.job_id, "swarm_id": orphan.swarm_id,
                    "slurm_state": orphan.backend_state,
                })
            })
        });
        let lost = swarms.iter().filter(|swarm| swarm.slurm_state == LOST).map(|swarm| {
            serde_json::json!({
                "provider_id": swarm.provider_id, "job_id": swarm.job_id, "swarm_id": swarm.swarm_id,
                "slurm_state": swarm.slurm_state, "reason": swarm.reason,
            })
        });
        app.screen.out(&orphans.chain(lost).collect::<serde_json::Value>().to_string())?;
        return Ok(Exit::Done);
    }
    let lines: Vec<String> = notes(&providers).into_iter().chain(swarms.iter().filter_map(without_job)).collect();
    for line in &lines {
        app.screen.out(&tame(line))?;
    }
    if lines.is_empty() {
        app.screen.note("every job of ours on the clusters in use is of a swarm here, and no swarm has lost its job");
    }
    Ok(Exit::Done)
}

fn table(swarms: &[pb::Swarm], now_ms: u64, width: usize) -> Table {
    // A job's id is what a person takes along to the scheduler; only a narrow screen cuts it.
    let job_room = if width < WIDE { 14 } else { width };
    let length = words::telling_length(swarms.iter().map(|swarm| swarm.swarm_id.as_str()));
    let mut table = Table::new(&["SWARM", "STATUS", ">NODES", "AGENT", "JOB", ">AGE", "PROMPT"]);
    for swarm in swarms {
        table.row(vec![
            words::short(&swarm.swarm_id, length).into(),
            Cell::toned(swarm.status.clone(), colour::of_state(&swarm.status)),
            swarm.node_count.to_string().into(),
            words::dash(&swarm.agent).into(),
            cut(words::dash(&swarm.job_id), job_room).into(),
            words::age(now_ms, swarm.created_ms).into(),
            swarm.system_prompt.clone().into(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::colour::Paint;

    #[test]
    fn a_job_of_nobody_is_told_once_with_what_to_do() {
        let orphan = |job: &str| drover_proto::allocator::Orphan {
            job_id: job.into(),
            swarm_id: "s-1".into(),
            backend_state: "RUNNING".into(),
        };
        let provider = |id: &str| Provider {
            id: id.into(),
            trouble: "Slurm cannot be reached since noon".into(),
            orphans: vec![orphan("7"), orphan("8")],
            ..Default::default()
        };
        let lines = notes(&[provider("a"), provider("b"), Provider::default()]);
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert_eq!(lines[0], "a: Slurm cannot be reached since noon");
        assert!(lines[1].contains("job 7 (RUNNING)") && lines[1].contains("`scancel 7`"), "{lines:?}");
    }

    #[test]
    fn swarms_fit_in_eighty_columns_and_keep_apart() {
        let swarm = |id: &str, status: &str, job: &str| pb::Swarm {
            swarm_id: id.into(),
            status: status.into(),
            job_id: job.into(),
            node_count: 1000,
            agent: "echo".into(),
            created_ms: 5_000,
            system_prompt: "You are a focused autonomous agent that talks a lot about tiling.".into(),
            ..Default::default()
        };
        let swarms = [
            swarm("0199c7a2-7d58-7c4e-9a35-2f4f6a1c0b11", "running", "local-0199c7a2-7d58"),
            swarm("0199c7a2-7d59-7c4e-9a35-2f4f6a1c0b11", "launching", ""),
        ];
        let text = table(&swarms, 7_205_000, 80).render(80, Paint::OFF);
        insta::assert_snapshot!(text, @r"
        SWARM          STATUS     NODES  AGENT  JOB             AGE  PROMPT
        0199c7a2-7d58  running     1000  echo   local-0199c7a…   2h  You are a focused …
        0199c7a2-7d59  launching   1000  echo   -                2h  You are a focused …
        ");
        assert!(text.lines().all(|line| line.chars().count() <= 80));
        let wide = table(&swarms, 7_205_000, 2000).render(2000, Paint::OFF);
        assert!(wide.contains("local-0199c7a2-7d58  ") && wide.contains("a lot about tiling."), "{wide}");
    }
}
