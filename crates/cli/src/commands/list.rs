//! `drover list`: every swarm in a line.

use drover_proto::router as pb;

use super::now_ms;
use crate::app::App;
use crate::client::{Client, unary};
use crate::fault::Exit;
use crate::render::colour;
use crate::render::json;
use crate::render::table::{Cell, Table, cut, width};
use crate::render::words;

/// From here on a screen has room for whole ids.
const WIDE: usize = 100;

pub(super) async fn run(app: &App) -> anyhow::Result<Exit> {
    let mut client = Client::connect(app).await?;
    let swarms = unary(client.rpc.list_swarms(pb::ListSwarmsRequest {})).await?.swarms;
    if app.global.json {
        let all: Vec<_> = swarms.iter().map(json::swarm).collect();
        app.screen.out(&serde_json::to_string(&all)?)?;
    } else if swarms.is_empty() {
        app.screen.note("no swarms; launch one: drover launch --nodes 4 --agent echo");
    } else {
        app.screen.table(&table(&swarms, now_ms(), width()))?;
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
