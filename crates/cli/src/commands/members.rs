//! `drover members`: who is there, as the nodes themselves see it.

use std::collections::BTreeMap;
use std::time::Duration;

use drover_proto::router as pb;
use drover_proto::router::watch_members_response::Update;

use super::now_ms;
use crate::app::App;
use crate::args::Members;
use crate::client::{Client, Rpc, unary};
use crate::fault::Exit;
use crate::render::colour::{self, Tone};
use crate::render::json;
use crate::render::table::{Cell, Table, cut, width};
use crate::render::words;
use crate::watch::{Step, repeatable};

/// A leader says something at least every five minutes; when it has not for longer than this, there is none, or its word does
/// not arrive.
const QUIET: Duration = Duration::from_mins(6);
/// A load that changed by less is the same load to a person.
const SAME_LOAD: f64 = 0.05;

pub(super) async fn run(app: &App, args: &Members) -> anyhow::Result<Exit> {
    let mut client = Client::connect(app).await?;
    let swarm_id = match &args.swarm {
        Some(id) => client.find(id).await?.swarm_id,
        None => String::new(),
    };
    if args.watch {
        return watch(app, client.rpc, swarm_id).await;
    }
    let answer = unary(client.rpc.list_members(pb::ListMembersRequest { swarm_id })).await?;
    if app.global.json {
        let all: Vec<_> = answer.members.iter().map(json::member).collect();
        app.screen.out(&serde_json::to_string(&all)?)?;
    } else {
        show(app, &answer)?;
    }
    Ok(Exit::Done)
}

/// The table of members, and what a person has to know beside it.
pub(super) fn show(app: &App, answer: &pb::ListMembersResponse) -> std::io::Result<()> {
    if !answer.members.is_empty() {
        app.screen.table(&table(&answer.members, now_ms(), width()))?;
    }
    for line in remarks(answer, now_ms()) {
        app.screen.note(&line);
    }
    Ok(())
}

/// What a person has to know beside the table.
fn remarks(answer: &pb::ListMembersResponse, now_ms: u64) -> Vec<String> {
    if answer.members.is_empty() {
        return vec![if answer.heard_us == 0 {
            "no members yet: nodes report a few seconds after their swarm came up, unless swarm.enabled is false; \
             `drover doctor` looks for what is wrong"
                .to_owned()
        } else {
            "no members: every swarm has ended".to_owned()
        }];
    }
    let mut remarks = vec![summary(answer, now_ms)];
    let quiet = now_ms.saturating_sub(answer.heard_us / 1000);
    if quiet > QUIET.as_millis() as u64 {
        remarks.push(format!(
            "nobody has reported for {}: the nodes may have no leader, or their mailbox is not read; `drover doctor`",
            words::age(now_ms, answer.heard_us / 1000)
        ));
    }
    remarks
}

/// "3 alive, 1 suspect; reported 4s ago by 0199c7a2/0".
fn summary(answer: &pb::ListMembersResponse, now_ms: u64) -> String {
    let counts: Vec<String> = ["alive", "suspect", "dead", "left"]
        .into_iter()
        .map(|state| (state, answer.members.iter().filter(|member| member.state == state).count()))
        .filter(|(_, count)| *count > 0)
        .map(|(state, count)| format!("{count} {state}"))
        .collect();
    let length = telling(&answer.members);
    let by = match answer.reporter.as_str() {
        "" => String::new(),
        reporter => format!(" by {}", shown(reporter, length)),
    };
    format!("{}; reported {} ago{by}", counts.join(", "), words::age(now_ms, answer.heard_us / 1000))
}

fn table(members: &[pb::Member], now_ms: u64, width: usize) -> Table {
    let length = telling(members);
    let host_room = if width < 100 { 20 } else { width };
    let mut table = Table::new(&["MEMBER", "STATE", ">FOR", ">LOAD", "HOST", "ADDRESS", "REMARK"]);
    for member in members {
        table.row(vec![
            shown(&member.node_id, length).into(),
            Cell::toned(member.state.clone(), colour::of_state(&member.state)),
            words::age(now_ms, member.since_us / 1000).into(),
            Cell::toned(load(member.load_score), if member.overloaded { Tone::Warn } else { Tone::Plain }),
            cut(words::dash(&member.host), host_room).into(),
            address(member).into(),
            remark(member).into(),
        ]);
    }
    table
}

fn telling(members: &[pb::Member]) -> usize {
    words::telling_length(members.iter().map(|member| member.swarm_id.as_str()).filter(|id| !id.is_empty()))
}

/// A gossip id with the swarm's part of it shortened.
fn shown(node_id: &str, length: usize) -> String {
    match node_id.rsplit_once('/') {
        Some((swarm, index)) => format!("{}/{index}", words::short(swarm, length)),
        None => node_id.to_owned(),
    }
}

pub(super) fn load(load: Option<f64>) -> String {
    load.map_or_else(|| "-".to_owned(), |load| format!("{load:.2}"))
}

fn address(member: &pb::Member) -> String {
    match member.addr.as_str() {
        "" => "-".to_owned(),
        addr if addr.contains(':') => format!("[{addr}]:{}", member.port),
        addr => format!("{addr}:{}", member.port),
    }
}

/// Capabilities by which daemons find each other and that tell a person nothing: a port, the mark of a file system. `--json`
/// has them.
const FOR_DAEMONS: [&str; 2] = ["handoff", "sessions"];

/// What stands out about a member, the most telling first.
fn remark(member: &pb::Member) -> String {
    let mut remarks = Vec::new();
    if !member.cause.is_empty() && member.state != "alive" {
        remarks.push(member.cause.clone());
    }
    if member.overloaded {
        remarks.push(match member.overload_reason.as_str() {
            "" => "overloaded".to_owned(),
            why => format!("overloaded: {why}"),
        });
    }
    let telling = |(key, value): &(&String, &String)| match key.as_str() {
        "agents" => member.capabilities.get("agent") != Some(*value),
        key => !FOR_DAEMONS.contains(&key),
    };
    let can = member.capabilities.iter().filter(telling);
    let mut can: Vec<String> = can.map(|(key, value)| format!("{key} {value}")).collect();
    can.sort_unstable();
    remarks.extend(can);
    if !matches!(member.region.as_str(), "" | "default") {
        remarks.push(format!("region {}", member.region));
    }
    remarks.join(", ")
}

async fn watch(app: &App, rpc: Rpc, swarm_id: String) -> anyhow::Result<Exit> {
    let mut updates = repeatable(app, rpc, move |mut rpc: Rpc| {
        let request = pb::WatchMembersRequest { swarm_id: swarm_id.clone() };
        Box::pin(async move { rpc.watch_members(request).await })
    });
    let mut known: Option<BTreeMap<String, pb::Member>> = None;
    loop {
        let step = tokio::select! {
            () = app.stop.cancelled() => return Ok(Exit::Done),
            step = updates.next() => step?,
        };
        let update = match step {
            Step::Item(answer) => answer.update,
            Step::End => {
                updates.cut_short().await?;
                continue;
            }
        };
        let Some(update) = update else { continue };
        if let (None, Update::Snapshot(first), false) = (&known, &update, app.global.json) {
            show(app, first)?;
            known = Some(first.members.iter().map(|member| (member.node_id.clone(), member.clone())).collect());
            continue;
        }
        let seen = known.get_or_insert_with(BTreeMap::new);
        for change in changes(seen, update) {
            if app.global.json {
                app.screen.out(&change.json())?;
            } else if let Some(line) = change.line(now_ms()) {
                app.screen.out(&line)?;
            }
        }
    }
}

/// One member before and after.
struct Change {
    before: Option<pb::Member>,
    now: Option<pb::Member>,
}

/// What an update changes. After a lost connection the first update is a snapshot again, and only what differs is told.
fn changes(known: &mut BTreeMap<String, pb::Member>, update: Update) -> Vec<Change> {
    let put = |known: &mut BTreeMap<String, pb::Member>, member: pb::Member| Change {
        before: known.insert(member.node_id.clone(), member.clone()),
        now: Some(member),
    };
    let told = match update {
        Update::Changed(member) => vec![put(known, member)],
        Update::Removed(id) => {
            known.remove(&id).map(|before| Change { before: Some(before), now: None }).into_iter().collect()
        }
        Update::Snapshot(snapshot) => {
            let gone: Vec<String> = known
                .keys()
                .filter(|id| !snapshot.members.iter().any(|member| member.node_id == **id))
                .cloned()
                .collect();
            let gone: Vec<Change> = gone
                .iter()
                .filter_map(|id| known.remove(id))
                .map(|before| Change { before: Some(before), now: None })
                .collect();
            gone.into_iter().chain(snapshot.members.into_iter().map(|member| put(known, member))).collect()
        }
    };
    told.into_iter().filter(|change| change.before != change.now).collect()
}

impl Change {
    /// The member as scripts read it; one that is forgotten comes once more, marked.
    fn json(&self) -> String {
        let mut value = self.now.as_ref().or(self.before.as_ref()).map(json::member).unwrap_or_default();
        if self.now.is_none() {
            value["removed"] = true.into();
        }
        value.to_string()
    }

    /// A line for people, when a person would care.
    fn line(&self, now_ms: u64) -> Option<String> {
        let said = match (&self.before, &self.now) {
            (None, Some(now)) => format!("{} is {}", now.node_id, now.state),
            (Some(before), None) => format!("{} is forgotten", before.node_id),
            (Some(before), Some(now)) if before.state != now.state => {
                let why = if now.cause.is_empty() { String::new() } else { format!(" ({})", now.cause) };
                format!("{} is {}{why}, was {}", now.node_id, now.state, before.state)
            }
            (Some(before), Some(now)) if before.boot != now.boot => format!("{} has started again", now.node_id),
            (Some(before), Some(now)) if before.overloaded != now.overloaded => {
                let what = if now.overloaded { "is overloaded" } else { "is no longer overloaded" };
                let why =
                    if now.overload_reason.is_empty() { String::new() } else { format!(": {}", now.overload_reason) };
                format!("{} {what}, load {}{why}", now.node_id, load(now.load_score))
            }
            (Some(before), Some(now)) => {
                let moved = (before.load_score.unwrap_or(0.0) - now.load_score.unwrap_or(0.0)).abs() >= SAME_LOAD;
                if !moved {
                    return None;
                }
                format!("{} has load {}", now.node_id, load(now.load_score))
            }
            (None, None) => return None,
        };
        let at = json::timestamp(now_ms * 1000);
        Some(format!("{} {said}", at.get(11..19).unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::colour::Paint;

    const SWARM: &str = "0199c7a2-7d58-7c4e-9a35-2f4f6a1c0b11";

    fn member(index: u32, state: &str) -> pb::Member {
        pb::Member {
            node_id: format!("{SWARM}/{index}"),
            swarm_id: SWARM.into(),
            node_index: Some(index),
            addr: "10.0.0.7".into(),
            port: 7946 + index,
            state: state.into(),
            load_score: Some(0.4),
            boot: 7,
            host: "compute-17.cluster.example.org".into(),
            since_us: 1_000_000,
            capabilities: [
                ("agent", "codex"),
                ("agents", "codex"),
                ("handoff", "7947"),
                ("sessions", "18eca4c7567934d0"),
            ]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
            ..pb::Member::default()
        }
    }

    #[test]
    fn who_is_there_is_seen_at_a_glance_on_ninety_columns() {
        let dead = pb::Member { cause: "silent".into(), load_score: None, ..member(2, "dead") };
        let overloaded = pb::Member {
            overloaded: true,
            overload_reason: "cpu 98 %".into(),
            load_score: Some(0.93),
            ..member(1, "suspect")
        };
        let answer = pb::ListMembersResponse {
            members: vec![member(0, "alive"), overloaded, dead],
            reporter: format!("{SWARM}/0"),
            heard_us: 57_000_000,
            ..pb::ListMembersResponse::default()
        };
        let mut text = table(&answer.members, 61_000, 90).render(90, Paint::OFF);
        text.push_str(&remarks(&answer, 61_000).join("\n"));
        insta::assert_snapshot!(text, @r"
        MEMBER      STATE    FOR  LOAD  HOST                  ADDRESS        REMARK
        0199c7a2/0  alive     1m  0.40  compute-17.cluster.…  10.0.0.7:7946  agent codex
        0199c7a2/1  suspect   1m  0.93  compute-17.cluster.…  10.0.0.7:7947  overloaded: cpu 98 %…
        0199c7a2/2  dead      1m     -  compute-17.cluster.…  10.0.0.7:7948  silent, agent codex
        1 alive, 1 suspect, 1 dead; reported 4s ago by 0199c7a2/0
        ");
        let later = remarks(&answer, 57_000 + 7 * 60_000);
        assert!(later[1].contains("nobody has reported for 7m") && later[1].contains("drover doctor"), "{later:?}");
        let none = remarks(&pb::ListMembersResponse::default(), 1);
        assert!(none[0].contains("swarm.enabled") && none.len() == 1, "{none:?}");
    }

    #[test]
    fn a_watch_tells_what_a_person_would_care_about_and_nothing_twice() {
        let mut known = BTreeMap::new();
        let snapshot =
            |members: Vec<pb::Member>| Update::Snapshot(pb::ListMembersResponse { members, ..Default::default() });
        let mut told = |update: Update| -> Vec<String> {
            let lines = changes(&mut known, update).iter().filter_map(|change| change.line(0)).collect::<Vec<_>>();
            lines.iter().map(|line| line.replace(SWARM, "s").split_off(9)).collect()
        };
        assert_eq!(told(snapshot(vec![member(0, "alive"), member(1, "alive")])), ["s/0 is alive", "s/1 is alive"]);
        // Connected again: what is as it was is not told once more.
        assert_eq!(told(snapshot(vec![member(0, "alive")])), ["s/1 is forgotten"]);
        let silent = pb::Member { cause: "silent".into(), ..member(0, "dead") };
        assert_eq!(told(Update::Changed(silent)), ["s/0 is dead (silent), was alive"]);
        let back = pb::Member { boot: 8, ..member(0, "alive") };
        assert_eq!(told(Update::Changed(back.clone())), ["s/0 is alive, was dead"]);
        let busier = pb::Member { load_score: Some(0.42), ..back.clone() };
        assert!(told(Update::Changed(busier)).is_empty(), "a little more load is no news");
        let full =
            pb::Member { load_score: Some(0.9), overloaded: true, overload_reason: "sessions 8 of 8".into(), ..back };
        assert_eq!(told(Update::Changed(full)), ["s/0 is overloaded, load 0.90: sessions 8 of 8"]);
        assert_eq!(told(Update::Removed(format!("{SWARM}/0"))), ["s/0 is forgotten"]);
    }
}
