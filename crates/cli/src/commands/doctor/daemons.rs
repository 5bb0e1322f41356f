//! Checks of the daemons: do they answer, do they fit, do they find each other, who holds their ports.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use drover_config::Config;
use drover_proto::dispatch as pb_dispatch;
use drover_proto::router as pb;
use drover_service::address_book::{self, Entry};
use drover_service::{StateDir, Target, Token, process, who_listens};

use super::Check;
use crate::app::App;
use crate::daemons::{DISPATCHER, LOGIN_SIDE, ROUTER};
use crate::fault;
use crate::render::words;
use crate::{client, files, probe, start};

/// How long the router may take to say how it is.
const PATIENCE: Duration = Duration::from_secs(3);

/// A router that was started a moment ago may not have found the others yet, which is nothing to speak of.
const SETTLING: Duration = Duration::from_millis(1500);

/// The daemons of a state directory on this host.
pub(super) async fn local(app: &App, config: &Config, source: &str, state: &StateDir, fix: bool) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut stale = leftovers(state);
    if !stale.ok && fix && remove_leftovers(state) {
        stale = leftovers(state).repaired();
    }
    checks.push(stale);
    let missing = start::missing(state);
    let started = fix && app.may_start() && !missing.is_empty() && start::ensure(app, state).await.is_ok();
    let some_run = LOGIN_SIDE.iter().any(|name| address_book::read(state, name).is_some());
    for &name in LOGIN_SIDE {
        let check = daemon(state, name, some_run).await;
        checks.push(if started && missing.contains(&name) { check.repaired() } else { check });
    }
    if let Some(router) = address_book::read(state, ROUTER) {
        let target = Target::Daemon { state: state.clone(), name: ROUTER.to_owned() };
        checks.extend(router_view(target, client::token(config).unwrap_or_default(), &router.listen).await);
    }
    checks.extend(dispatcher(config, source, state, fix).await);
    let ours: Vec<String> = address_book::list(state)
        .into_iter()
        .filter(Entry::is_alive)
        .flat_map(|entry| [Some(entry.listen), entry.control])
        .flatten()
        .collect();
    checks.push(ports(config, &ours));
    checks
}

/// A router somewhere else.
pub(super) async fn remote(config: &Config, addr: &str) -> Vec<Check> {
    router_view(Target::Address(addr.to_owned()), client::token(config).unwrap_or_default(), addr).await
}

/// One daemon of the login side.
async fn daemon(state: &StateDir, name: &'static str, some_run: bool) -> Check {
    let Some(entry) = address_book::read(state, name) else {
        if some_run {
            let log = files::log_path(state, name);
            let detail = format!("not running, although others are; its log is {}", log.display());
            return Check::wrong(name, detail, "the next command starts it, as does drover doctor --fix");
        }
        return Check::ok(name, "not running").hint("the next command starts it, or `drover up`");
    };
    let place = format!("pid {}, {}", entry.pid, entry.listen);
    if entry.host != process::hostname() {
        let detail = format!("runs on {}, not on this host ({})", entry.host, process::hostname());
        return Check::wrong(
            name,
            detail,
            format!("work on {}, or choose another state directory with DROVER_STATE_DIR", entry.host),
        );
    }
    if !client::fits(&entry.version) {
        let detail = format!("{place} is version {}, this program is {}", entry.version, drover_types::VERSION);
        return Check::wrong(name, detail, "drover down; the next command starts this version, swarms go on meanwhile");
    }
    match probe::healthz(&entry.listen).await {
        Ok(()) => Check::ok(name, format!("{place}, version {}", entry.version)),
        Err(why) => {
            let hint = format!("kill -9 {}; the next command starts it again and nothing is lost", entry.pid);
            Check::wrong(name, format!("{place} runs but does not answer: {why}"), hint)
        }
    }
}

/// The dispatcher, which runs once a command has needed it, and the providers that it would ask.
async fn dispatcher(config: &Config, source: &str, state: &StateDir, fix: bool) -> Vec<Check> {
    const PROVIDER: &str = "model provider";
    let mut checks = vec![daemon(state, DISPATCHER, false).await];
    if address_book::read(state, DISPATCHER).is_some() && checks[0].ok {
        match crate::dispatcher::rpc(state).get_status(pb_dispatch::GetStatusRequest {}).await {
            Ok(status) => checks.extend(lanes(&status.into_inner())),
            Err(status) => checks.push(Check::wrong(PROVIDER, fault::deepest(&status), "look at the dispatcher's log")),
        }
    }
    checks.extend(super::scaling::checks(config, source, state, fix).await);
    checks
}

/// The providers of a running dispatcher, and what it complains about.
fn lanes(status: &pb_dispatch::GetStatusResponse) -> Vec<Check> {
    let named = |lane: &pb_dispatch::Lane| format!("{}/{}", lane.provider, lane.model);
    // `sim` stands beside what is configured, and is always well.
    let lanes: Vec<_> = status.lanes.iter().filter(|lane| !lane.simulated || status.lanes.len() == 1).collect();
    let mut checks = Vec::new();
    for lane in lanes {
        let name = "model provider";
        checks.push(if !lane.unusable.is_empty() {
            let hint =
                "set the key where daemons are started, then `drover down`; the next command starts the dispatcher";
            Check::warning(name, format!("{}: {}", named(lane), lane.unusable), hint)
        } else if lane.breaker != "closed" {
            Check::warning(
                name,
                format!("{} fails and is left alone for now", named(lane)),
                "look at `drover dispatch` errors, or name another in node_scaling.fallback",
            )
        } else if !lane.priced {
            Check::warning(
                name,
                format!("{}: its price is not known, so no cap can hold", named(lane)),
                "add the model to model_pricing",
            )
        } else {
            Check::ok(name, format!("{}, {} at once", named(lane), lane.width))
        });
    }
    checks.extend(
        status
            .notes
            .last()
            .map(|note| Check::ok("dispatcher's last word", note.message.clone()).hint(note.hint.clone())),
    );
    checks
}

fn misses_something(info: &pb::GetInfoResponse) -> bool {
    [&info.allocator_error, &info.follower_error, &info.store_error].into_iter().any(|error| !error.is_empty())
}

/// How the router sees itself and the others.
async fn router_view(target: Target, token: Token, addr: &str) -> Vec<Check> {
    let mut rpc = client::rpc(target, token);
    let settled = Instant::now() + SETTLING;
    let asked = loop {
        let asked = tokio::time::timeout(PATIENCE, rpc.get_info(pb::GetInfoRequest {})).await;
        match &asked {
            Ok(Ok(info)) if misses_something(info.get_ref()) && Instant::now() < settled => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            _ => break asked,
        }
    };
    let info = match asked {
        Ok(Ok(info)) => info.into_inner(),
        Ok(Err(status)) => {
            let why = match status.code() {
                tonic::Code::Unimplemented => "it answers, but not as a router of this version does".to_owned(),
                _ if fault::lost(&status) => fault::deepest(&status),
                _ => status.message().to_owned(),
            };
            let hint = "look whether a router of this version listens there; 8765 is the JSON-line port, not this one";
            return vec![Check::wrong("router answers", format!("{addr}: {why}"), hint)];
        }
        Err(_) => {
            let hint = "look at its log; kill it when it hangs, nothing is lost";
            return vec![Check::wrong(
                "router answers",
                format!("{addr}: no answer within {} s", PATIENCE.as_secs()),
                hint,
            )];
        }
    };
    let mut checks = Vec::new();
    if client::fits(&info.version) {
        let control = if info.control_addr.is_empty() { "none" } else { &info.control_addr };
        checks.push(Check::ok("router answers", format!("{addr}, version {}, JSON-line port {control}", info.version)));
    } else {
        let detail = format!("version {}, this program is {}", info.version, drover_types::VERSION);
        let hint = format!(
            "`drover down` on {}; the next command there starts this version, swarms go on meanwhile",
            info.host
        );
        checks.push(Check::wrong("router answers", detail, hint));
    }
    checks.push(seen(
        "allocator link",
        "the router reaches it",
        &info.allocator_error,
        "look at its log; `kill -9` it when it hangs, swarms go on",
    ));
    checks.push(seen(
        "follower link",
        "the router reaches it",
        &info.follower_error,
        "look at its log; `kill -9` it when it hangs, nothing is lost",
    ));
    checks.push(seen(
        "event log",
        "the router writes it",
        &info.store_error,
        "free space in the state directory, or make it writable; the router goes on by itself",
    ));
    checks.extend(membership(&mut rpc).await);
    checks
}

/// How the nodes of living swarms see each other, and what their membership daemons complain about. A swarm works without:
/// nothing here makes `doctor` fail.
async fn membership(rpc: &mut client::Rpc) -> Option<Check> {
    let asked = async {
        let swarms = client::unary(rpc.list_swarms(pb::ListSwarmsRequest {})).await?.swarms;
        let members = client::unary(rpc.list_members(pb::ListMembersRequest::default())).await?;
        Ok::<_, fault::Fault>((swarms, members))
    };
    // A router that does not know members has nothing to say of them.
    let (swarms, members) = tokio::time::timeout(PATIENCE, asked).await.ok()?.ok()?;
    Some(members_check(&swarms, &members))
}

fn members_check(swarms: &[pb::Swarm], answer: &pb::ListMembersResponse) -> Check {
    const NAME: &str = "membership";
    let living = swarms.iter().filter(|swarm| !matches!(swarm.status.as_str(), "terminated" | "failed"));
    let notes = living.clone().flat_map(|swarm| {
        swarm.nodes.iter().flat_map(move |node| {
            let current = node.membership_notes.iter().filter(|note| note.current);
            current.map(move |note| (format!("{}/{}", words::short(&swarm.swarm_id, 8), node.node_id), note))
        })
    });
    // One cause shows on many nodes: each is told once, with where.
    let mut causes: BTreeMap<&str, (Vec<String>, &pb::MembershipNote)> = BTreeMap::new();
    for (node, note) in notes {
        causes.entry(&note.code).or_insert_with(|| (Vec::new(), note)).0.push(node);
    }
    let count = |state: &str| answer.members.iter().filter(|member| member.state == state).count();
    let counts = format!("{} alive, {} suspect, {} dead", count("alive"), count("suspect"), count("dead"));
    if !causes.is_empty() {
        let told: Vec<String> = causes
            .values()
            .map(|(nodes, note)| {
                let more = if nodes.len() > 2 { format!(" and {} more", nodes.len() - 2) } else { String::new() };
                format!("{}{more}: {}", nodes.iter().take(2).cloned().collect::<Vec<_>>().join(", "), note.message)
            })
            .collect();
        let hints: Vec<&str> =
            causes.values().map(|(_, note)| note.hint.as_str()).filter(|hint| !hint.is_empty()).collect();
        return Check::warning(NAME, format!("{counts}; {}", told.join("; ")), hints.join("; "));
    }
    if count("suspect") + count("dead") > 0 {
        return Check::warning(
            NAME,
            counts,
            "`drover members` shows which, and `drover why SWARM/INDEX` what is known of one",
        );
    }
    match living.count() {
        0 => Check::ok(NAME, "no swarm lives"),
        _ if answer.members.is_empty() => Check::ok(NAME, "no members")
            .hint("nodes report a few seconds after their start, unless swarm.enabled is false"),
        _ => Check::ok(NAME, counts),
    }
}

fn seen(name: &'static str, well: &str, error: &str, hint: &str) -> Check {
    if error.is_empty() { Check::ok(name, well) } else { Check::wrong(name, error, hint) }
}

/// Who holds the ports that people and older clients know by heart.
pub(super) fn ports(config: &Config, ours: &[String]) -> Check {
    let wanted = [
        ("router", config.router.listen, 7950),
        ("JSON-line control plane", config.router.control_listen, 8765),
        ("allocator", config.allocator.listen, 7951),
        ("follower", config.follower.listen, 7952),
        ("dispatcher", config.node_scaling.as_ref().and_then(|scaling| scaling.listen), 7955),
    ];
    let mut taken = Vec::new();
    let mut hints = Vec::new();
    let mut ok = true;
    for (what, explicit, default) in wanted {
        let addr = explicit.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], default)));
        if addr.port() == 0 || ours.iter().any(|listen| *listen == addr.to_string()) {
            continue;
        }
        let Some(holder) = who_listens(addr) else { continue };
        taken.push(format!("{addr} ({what}) is held by {holder}"));
        if explicit.is_some() {
            ok = false;
            hints.push(format!("stop {holder} or change the configured address {addr}"));
        } else if default == 8765 {
            hints.push(
                "older clients look only at 8765 and would find that program; ours find our router by themselves"
                    .to_owned(),
            );
        }
    }
    let detail = if taken.is_empty() { "free or ours".to_owned() } else { taken.join("; ") };
    if !taken.is_empty() && hints.is_empty() {
        hints.push("no harm: our daemons take free ports and find each other".to_owned());
    }
    let check = if ok { Check::ok("ports", detail) } else { Check::wrong("ports", detail, "") };
    check.hint(hints.join("; "))
}

fn dead(state: &StateDir) -> Vec<Entry> {
    address_book::list(state).into_iter().filter(|entry| !entry.is_alive()).collect()
}

/// Entries of the address book whose process is gone.
fn leftovers(state: &StateDir) -> Check {
    const SHOWN: usize = 4;
    let dead = dead(state);
    if dead.is_empty() {
        return Check::ok("leftovers", "none");
    }
    let mut names: Vec<String> =
        dead.iter().take(SHOWN).map(|entry| format!("{} (pid {})", entry.name, entry.pid)).collect();
    if dead.len() > SHOWN {
        names.push(format!("and {} more", dead.len() - SHOWN));
    }
    let detail = format!("the address book still names {}, which died without a word", names.join(", "));
    // Nobody believes an entry whose process is gone, so it does no harm.
    Check::warning("leftovers", detail, "drover doctor --fix removes the entries; the logs may say why they died")
}

fn remove_leftovers(state: &StateDir) -> bool {
    dead(state)
        .iter()
        .all(|entry| std::fs::remove_file(state.path().join("run").join(format!("{}.json", entry.name))).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> (tempfile::TempDir, StateDir) {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        state.join("run").unwrap();
        (dir, state)
    }

    fn enter(state: &StateDir, name: &str, change: impl FnOnce(&mut Entry)) {
        let me = process::ProcessId::current();
        let mut entry = Entry {
            name: name.into(),
            pid: me.pid,
            start_time: me.start_time,
            host: process::hostname(),
            version: drover_types::VERSION.into(),
            listen: "127.0.0.1:1".into(),
            control: None,
            uid: 0,
        };
        change(&mut entry);
        let path = state.path().join("run").join(format!("{name}.json"));
        std::fs::write(path, serde_json::to_vec(&entry).unwrap()).unwrap();
    }

    #[tokio::test]
    async fn a_daemon_that_hangs_is_named_with_its_pid() {
        let (_dir, state) = state();
        // It listens and never answers, like a process that is stopped.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = silent.local_addr().unwrap().to_string();
        enter(&state, "router", |entry| entry.listen.clone_from(&addr));
        let check = daemon(&state, "router", true).await;
        assert!(!check.ok && check.detail.contains("does not answer"), "{check:?}");
        assert!(check.hint.contains(&format!("kill -9 {}", std::process::id())), "{check:?}");
        let view = router_view(Target::Address(addr), Token::default(), "there").await;
        assert!(!view[0].ok && !view[0].hint.is_empty(), "{view:?}");
    }

    #[tokio::test]
    async fn a_daemon_that_is_missing_among_others_is_wrong_and_alone_is_not() {
        let (_dir, state) = state();
        assert!(daemon(&state, "router", false).await.ok);
        let check = daemon(&state, "router", true).await;
        assert!(!check.ok && check.hint.contains("--fix"), "{check:?}");
    }

    #[tokio::test]
    async fn a_daemon_of_another_version_or_host_is_named() {
        let (_dir, state) = state();
        enter(&state, "router", |entry| entry.version = "99.1.0".into());
        let check = daemon(&state, "router", true).await;
        assert!(!check.ok && check.detail.contains("99.1.0") && check.hint.contains("drover down"), "{check:?}");
        enter(&state, "router", |entry| entry.host = "login2".into());
        let check = daemon(&state, "router", true).await;
        assert!(!check.ok && check.detail.contains("login2") && check.hint.contains("DROVER_STATE_DIR"), "{check:?}");
    }

    #[test]
    fn a_stale_entry_is_found_and_removed() {
        let (_dir, state) = state();
        enter(&state, "router", |entry| entry.start_time += 1);
        let check = leftovers(&state);
        assert!(!check.ok && check.detail.contains("router") && check.hint.contains("--fix"), "{check:?}");
        assert!(remove_leftovers(&state));
        assert!(leftovers(&state).ok);
    }

    #[test]
    fn a_taken_port_is_named_with_its_holder_and_matters_when_it_was_configured() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = socket.local_addr().unwrap();
        let mut config = Config::default();
        config.router.listen = Some(addr);
        let check = ports(&config, &[]);
        let me = format!("pid {}", std::process::id());
        assert!(!check.ok && check.detail.contains(&me) && check.hint.contains(&addr.to_string()), "{check:?}");
        assert!(ports(&config, &[addr.to_string()]).ok, "our own daemon is no stranger");
    }

    #[test]
    fn what_membership_daemons_complain_about_is_told_once_with_where_and_fails_nothing() {
        let note = |code: &str, current| pb::MembershipNote {
            code: code.into(),
            message: format!("{code} happened"),
            hint: format!("mend {code}"),
            current,
            ..Default::default()
        };
        let node = |node_id, notes| pb::Node { node_id, membership_notes: notes, ..Default::default() };
        let swarm = |status: &str, nodes| pb::Swarm {
            swarm_id: "0199c7a2-7d58".into(),
            status: status.into(),
            nodes,
            ..Default::default()
        };
        let member = |state: &str| pb::Member { state: state.into(), ..Default::default() };
        let seen = pb::ListMembersResponse { members: vec![member("alive"), member("suspect")], ..Default::default() };
        for code in ["cannot_bind", "seed_unreachable", "wrong_key", "wrong_cluster", "clock_off"] {
            let nodes = (0..4).map(|index| node(index, vec![note(code, true), note("over", false)])).collect();
            let check = members_check(&[swarm("running", nodes)], &seen);
            assert!(!check.ok && check.minor, "{check:?}");
            let told = format!("1 alive, 1 suspect, 0 dead; 0199c7a2/0, 0199c7a2/1 and 2 more: {code} happened");
            assert_eq!((check.detail.as_str(), check.hint.as_str()), (told.as_str(), format!("mend {code}").as_str()));
            let ended = swarm("terminated", vec![node(0, vec![note(code, true)])]);
            assert!(members_check(&[ended], &pb::ListMembersResponse::default()).ok);
        }
        let check = members_check(&[swarm("running", vec![node(0, Vec::new())])], &seen);
        assert!(!check.ok && check.minor && check.hint.contains("drover members"), "{check:?}");
    }

    #[test]
    fn what_the_router_misses_is_passed_on() {
        for name in ["allocator link", "follower link", "event log"] {
            let check = seen(name, "well", "disk full", "do this");
            assert!(!check.ok && check.detail == "disk full" && check.hint == "do this");
            let check = seen(name, "well", "", "do this");
            assert!(check.ok && check.detail == "well" && check.hint.is_empty());
        }
    }
}
