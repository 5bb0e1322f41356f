//! Real daemons on loopback: what people and other programs see of them.

mod lab;

use std::collections::HashMap;
use std::net::UdpSocket;
use std::time::{Duration, Instant};

use drover_proto::membership::{
    AddKeyRequest, GetStatusRequest, JoinRequest, LeaveRequest, MemberState, PlaceRequest, RemoveKeyRequest,
    ReportLoadRequest, UpdateMetadataRequest, UseKeyRequest, WatchEventsRequest, WatchMembersRequest,
    watch_members_response,
};
use drover_service::pki::KeyRing;
use lab::{FAST, Lab, Node, Options, until};
use serde_json::json;

fn alive(node: &str) -> (String, MemberState) {
    (node.to_owned(), MemberState::Alive)
}

#[tokio::test]
async fn three_nodes_find_each_other_through_one_seed() {
    let lab = Lab::new();
    let seed = Node::start(&lab, "s/0", FAST, json!({})).await;
    let join = json!({ "discovery": { "join_addrs": [seed.gossip().await] } });
    let one = Node::start(&lab, "s/1", FAST, join.clone()).await;
    let two = Node::start(&lab, "s/2", FAST, join).await;
    let all = [alive("s/0"), alive("s/1"), alive("s/2")];
    for node in [&seed, &one, &two] {
        node.sees(&all).await;
        assert_eq!(node.status().await.state, "joined");
    }
    // What one says of itself the others read.
    let mut changes = two.client().watch_members(WatchMembersRequest::default()).await.unwrap().into_inner();
    let first = changes.message().await.unwrap().unwrap().update.unwrap();
    assert!(matches!(first, watch_members_response::Update::Snapshot(all) if all.members.len() == 3));
    let set = |key: &str, value: &str| HashMap::from([(key.to_owned(), value.to_owned())]);
    let change = UpdateMetadataRequest {
        set_labels: set("rack", "r7"),
        set_capabilities: set("model", "m1"),
        ..UpdateMetadataRequest::default()
    };
    let incarnation = one.client().update_metadata(change).await.unwrap().into_inner().incarnation;
    let seen = tokio::time::timeout(Duration::from_secs(5), async {
        loop {
            let update = changes.message().await.unwrap().unwrap().update.unwrap();
            let watch_members_response::Update::Changed(member) = update else { continue };
            if member.node_id == "s/1" && member.labels.contains_key("rack") {
                return member;
            }
        }
    });
    let seen = seen.await.unwrap();
    assert_eq!((seen.swarm_id.as_str(), seen.node_index, seen.incarnation), ("s", Some(1), incarnation));
    assert_eq!((seen.labels["rack"].as_str(), seen.capabilities["model"].as_str()), ("r7", "m1"));
    assert_eq!((seen.addr.as_str(), seen.version.as_str()), ("127.0.0.1", "1"));
    let too_long = UpdateMetadataRequest { set_labels: set("x", &"y".repeat(300)), ..UpdateMetadataRequest::default() };
    let refused = one.client().update_metadata(too_long).await.unwrap_err();
    assert!(refused.message().contains("longer than allowed"), "{refused:?}");

    // All place a key alike, and only on members that live.
    let ask = || PlaceRequest { key: "session 1".to_owned(), count: 2, swarm_id: "s".to_owned() };
    let placed = seed.client().place(ask()).await.unwrap().into_inner().node_ids;
    assert_eq!(placed.len(), 2);
    assert_eq!(two.client().place(ask()).await.unwrap().into_inner().node_ids, placed);
}

#[tokio::test]
async fn load_is_measured_reported_and_seen_by_the_others() {
    let lab = Lab::new();
    // Without measuring, only sessions make the load.
    let monitor = json!({ "enabled": false, "max_sessions": 4 });
    let quiet = Node::start(&lab, "s/0", FAST, json!({ "load_monitor": monitor })).await;
    let join = json!([quiet.gossip().await]);
    let config = json!({ "discovery": { "join_addrs": join }, "load_monitor": { "interval": "100ms" } });
    let measuring = Node::start(&lab, "s/1", FAST, config).await;
    quiet.sees(&[alive("s/0"), alive("s/1")]).await;

    let report = quiet.client().report_load(ReportLoadRequest { sessions: 2, ..Default::default() }).await;
    let load = report.unwrap().into_inner().load.unwrap();
    assert_eq!((load.score, load.sessions, load.max_sessions, load.measured), (0.2, 0.5, 4, false));
    until("the load of s/0 to be seen", async || {
        let member = measuring.member("s/0").await?;
        (member.load_score == Some(0.2)).then_some(())
    })
    .await;
    let full = ReportLoadRequest { sessions: 100, max_sessions: 100, ..Default::default() };
    measuring.client().report_load(full).await.unwrap();
    let load = until("a measured load", async || {
        let load = measuring.status().await.load?;
        (load.measured && load.memory > 0.0 && load.cpu_limit > 0.0 && load.score > 0.4).then_some(load)
    })
    .await;
    assert!(load.score < 1.0 && load.memory_limit_bytes > 1 << 20, "{load:?}");
    until("the load of s/1 to be seen", async || {
        let member = quiet.member("s/1").await?;
        member.load_score.filter(|score| *score > 0.4)
    })
    .await;
    let metrics = measuring.http("/metrics").await;
    assert!(
        metrics.contains("drover_membership_load_score")
            && metrics.contains("drover_membership_members{state=\"alive\"} 2"),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_killed_node_is_suspect_then_left_then_forgotten() {
    let lab = Lab::new();
    let dir = tempfile::tempdir().unwrap();
    let notes = dir.path().join("notes");
    let script = format!("echo \"$DROVER_EVENT $DROVER_EVENT_NODE_ID\" >> '{}'", notes.display());
    let handlers = json!([
        { "command": ["sh", "-c", "sleep 600"], "timeout": "1h" },
        { "on": ["NodeSuspect", "NodeLeft"], "command": ["sh", "-c", script] },
    ]);
    let config = json!({ "events": { "handlers": handlers }, "discovery": { "dead_node_timeout": "2s" } });
    let seed = Node::start(&lab, "s/0", FAST, config).await;
    let join = json!({ "discovery": { "join_addrs": [seed.gossip().await] } });
    let one = Node::start(&lab, "s/1", FAST, join.clone()).await;
    let mut two = Node::start(&lab, "s/2", FAST, join).await;
    seed.sees(&[alive("s/0"), alive("s/1"), alive("s/2")]).await;
    one.sees(&[alive("s/0"), alive("s/1"), alive("s/2")]).await;
    let killed = Instant::now();
    two.kill();
    let mut events = seed.client().watch_events(WatchEventsRequest { since: 0 }).await.unwrap().into_inner();
    let mut seen = Vec::new();
    while seen.last() != Some(&("NodeLeft".to_owned(), "s/2".to_owned())) {
        let event = tokio::time::timeout(Duration::from_secs(10), events.message()).await.unwrap().unwrap().unwrap();
        let id = match event.payload.unwrap() {
            drover_proto::membership::watch_events_response::Payload::NodeInfo(info) => info.id,
            drover_proto::membership::watch_events_response::Payload::NodeId(id) => id.id,
        };
        seen.push((event.event, id));
    }
    // 9 s at the default period; the tests run five times as fast.
    assert!(killed.elapsed() < Duration::from_millis(1800) * lab::SLACK, "took {:?}", killed.elapsed());
    let of_two: Vec<&str> = seen.iter().filter(|(_, id)| id == "s/2").map(|(event, _)| event.as_str()).collect();
    assert_eq!(of_two, ["NodeJoined", "NodeSuspect", "NodeLeft"]);
    until("the handler to have noted both, beside one that hangs", async || {
        let text = std::fs::read_to_string(&notes).ok()?;
        (text == "NodeSuspect s/2\nNodeLeft s/2\n").then_some(())
    })
    .await;
    one.sees(&[alive("s/0"), alive("s/1"), ("s/2".to_owned(), MemberState::Dead)]).await;
    seed.sees(&[alive("s/0"), alive("s/1")]).await;
    assert!(killed.elapsed() > Duration::from_secs(2), "dead_node_timeout is 2 s");
}

#[tokio::test]
async fn a_node_that_leaves_is_left_and_one_that_comes_back_needs_no_seed() {
    let lab = Lab::new();
    let seed = Node::start(&lab, "s/0", FAST, json!({})).await;
    let join = json!({ "discovery": { "join_addrs": [seed.gossip().await] } });
    let mut one = Node::start(&lab, "s/1", FAST, join.clone()).await;
    let mut two = Node::start(&lab, "s/2", FAST, join).await;
    let all = [alive("s/0"), alive("s/1"), alive("s/2")];
    seed.sees(&all).await;
    one.sees(&all).await;
    let told = one.client().leave(LeaveRequest { reason: "test".to_owned() }).await.unwrap().into_inner().told;
    assert_eq!((told, one.status().await.state.as_str()), (2, "left"));
    seed.sees(&[alive("s/0"), ("s/1".to_owned(), MemberState::Left), alive("s/2")]).await;
    // Being told to stop is a good-bye too.
    assert_eq!(two.stop().await, Some(0));
    seed.sees(&[alive("s/0"), ("s/1".to_owned(), MemberState::Left), ("s/2".to_owned(), MemberState::Left)]).await;
    one.stop().await;

    let boot = |members: Vec<drover_proto::membership::Member>, id: &str| {
        members.into_iter().find(|member| member.node_id == id).map(|member| member.boot)
    };
    let before = boot(seed.members().await, "s/1").unwrap();
    one.restart(json!({})).await;
    until("s/1 to be back", async || {
        let member = seed.member("s/1").await?;
        (member.state() == MemberState::Alive && member.boot > before).then_some(())
    })
    .await;
    two.restart(json!({})).await;
    seed.sees(&all).await;
    one.sees(&all).await;
    two.sees(&all).await;
}

#[tokio::test]
async fn in_the_clear_only_when_asked_for_and_said_at_every_start() {
    let lab = Lab::new();
    let clear = Node::start(&lab, "s/0", Options { plaintext: true, identity: false, ..FAST }, json!({})).await;
    let status = clear.status().await;
    assert!(!status.sealed);
    assert!(status.notes.iter().any(|note| note.code == "plaintext" && note.current), "{:?}", status.notes);
    assert!(clear.log().contains("security.gossip_plaintext is set"), "{}", clear.log());
    let closed = Node::start(&lab, "s/1", Options { identity: false, ..FAST }, json!({})).await;
    let status = closed.status().await;
    assert_eq!((status.state.as_str(), status.gossip_addr.as_str()), ("unbound", ""));
    assert!(
        status.notes.iter().any(|note| note.code == "no_identity" && note.hint.contains("--identity")),
        "{status:?}"
    );
    let metrics = closed.http("/metrics").await;
    assert!(metrics.contains("drover_membership_notes{code=\"no_identity\"} 1"), "{metrics}");
}

#[tokio::test]
async fn a_node_that_takes_no_part_binds_nothing_and_says_so() {
    let lab = Lab::new();
    let node = Node::start(&lab, "s/0", FAST, json!({ "enabled": false })).await;
    let status = node.status().await;
    assert_eq!((status.state.as_str(), status.gossip_addr.as_str()), ("disabled", ""));
    assert!(status.notes.iter().any(|note| note.code == "disabled"), "{status:?}");
    assert!(node.members().await.is_empty());
    let refused = node.client().join(JoinRequest { addrs: vec!["127.0.0.1:1".to_owned()] }).await.unwrap_err();
    assert!(refused.message().contains("swarm.enabled is false"), "{refused:?}");
    assert!(node.http("/healthz").await.contains("ok"));
}

#[tokio::test]
async fn a_node_is_named_bound_and_told_of_as_configured() {
    let lab = Lab::new();
    let held = UdpSocket::bind("127.0.0.2:0").unwrap();
    let port = held.local_addr().unwrap().port();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let config = json!({
        "node_id": "my node", "bind_addr": "127.0.0.2", "bind_port": port, "listen": free.to_string(),
        "advertise_addr": "127.0.0.3", "region": "west",
    });
    let options = Options { named: false, free_port: false, plaintext: true, identity: false };
    let node = Node::start(&lab, "s/0", options, config).await;
    // A port that is configured and taken is waited for; everything else works meanwhile, and says why.
    let note = until("the daemon to say that it cannot bind", async || {
        let status = node.status().await;
        let note = status.notes.into_iter().find(|note| note.code == "cannot_bind")?;
        (status.state == "unbound").then_some(note)
    })
    .await;
    assert!(note.message.contains(&format!("127.0.0.2:{port}")), "{note:?}");
    assert!(node.http("/metrics").await.contains("drover_membership_notes{code=\"cannot_bind\"} 1"));
    drop(held);
    let status =
        until("the daemon to bind", async || Some(node.status().await).filter(|status| !status.gossip_addr.is_empty()))
            .await;
    assert_eq!(status.gossip_addr, format!("127.0.0.2:{port}"));
    assert_eq!(status.advertised_addr, format!("127.0.0.3:{port}"));
    assert!(status.notes.iter().all(|note| note.code != "cannot_bind" || !note.current), "{status:?}");
    assert_eq!(node.listen(), free);
    let own = node.members().await.remove(0);
    assert_eq!((own.node_id.as_str(), own.region.as_str(), own.addr.as_str()), ("my node", "west", "127.0.0.3"));
    assert_eq!((own.port, own.rpc_port), (u32::from(port), u32::from(free.port())));
    assert_eq!((own.swarm_id.as_str(), own.node_index), ("", None));
}

#[tokio::test]
async fn the_paces_of_the_gossip_are_those_configured() {
    let lab = Lab::new();
    // Two pairs that differ only in their paces.
    let pair = async |discovery: serde_json::Value| {
        let mut config = json!({ "discovery": discovery });
        let seed = Node::start(&lab, "s/0", FAST, config.clone()).await;
        config["discovery"]["join_addrs"] = json!([seed.gossip().await]);
        let other = Node::start(&lab, "s/1", FAST, config).await;
        seed.sees(&[alive("s/0"), alive("s/1")]).await;
        (seed, other)
    };
    let counted = async |node: &Node, name: &str| -> u64 {
        let text = node.http("/metrics").await;
        let line = text.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0)
    };
    let (often, _a) =
        pair(json!({ "gossip_interval": "50ms", "push_pull_interval": "100ms", "node_timeout": "5s" })).await;
    let (seldom, _b) = pair(json!({ "gossip_interval": "1s", "push_pull_interval": "1h", "node_timeout": "5s" })).await;
    // A short node_timeout makes probes as frequent as it needs them, whatever gossip_interval is.
    let (strict, _c) =
        pair(json!({ "gossip_interval": "1s", "push_pull_interval": "1h", "node_timeout": "1100ms" })).await;
    // Views that were seen to agree since the last exchange need none: this is about a pace faster than the probes.
    let (pulling, _d) =
        pair(json!({ "gossip_interval": "1s", "push_pull_interval": "100ms", "node_timeout": "5s" })).await;
    let datagrams = "drover_membership_datagrams_out_total";
    let pulls = "drover_membership_streams_total{outcome=\"pull\"}";
    let mut before = Vec::new();
    for node in [&often, &seldom, &strict, &pulling] {
        before.push((counted(node, datagrams).await, counted(node, pulls).await));
    }
    let start = Instant::now();
    until("three seconds of gossip", async || (start.elapsed() > Duration::from_secs(3)).then_some(())).await;
    let mut rates = Vec::new();
    for (node, (sent, pulled)) in [&often, &seldom, &strict, &pulling].into_iter().zip(before) {
        rates.push((counted(node, datagrams).await - sent, counted(node, pulls).await - pulled));
    }
    assert!(rates[0].0 > 2 * rates[1].0, "gossip_interval: {rates:?}");
    assert!(rates[3].1 >= rates[1].1 + 5, "push_pull_interval: {rates:?}");
    assert!(2 * rates[2].0 > 3 * rates[1].0, "node_timeout: {rates:?}");
}

#[tokio::test]
async fn a_seed_that_does_not_answer_is_named() {
    let lab = Lab::new();
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let addr = silent.local_addr().unwrap().to_string();
    let node =
        Node::start(&lab, "s/0", FAST, json!({ "discovery": { "join_addrs": [addr, "no-such-host.invalid:1"] } }))
            .await;
    let note = until("a word about the seed", async || {
        let status = node.client().get_status(GetStatusRequest {}).await.unwrap().into_inner();
        assert_eq!(status.state, "joining");
        status.notes.into_iter().find(|note| note.code == "seed_unreachable" && note.message.contains(&addr))
    })
    .await;
    assert!(note.current && note.hint.contains("join_addrs"), "{note:?}");
    assert!(node.log().contains("no-such-host.invalid"), "{}", node.log());
    assert!(node.http("/metrics").await.contains("drover_membership_notes{code=\"seed_unreachable\"} 1"));
}

#[tokio::test]
async fn keys_are_changed_on_all_nodes_while_they_run() {
    let lab = Lab::new();
    let mut seed = Node::start(&lab, "s/0", FAST, json!({})).await;
    let join = json!({ "discovery": { "join_addrs": [seed.gossip().await] } });
    let one = Node::start(&lab, "s/1", FAST, join.clone()).await;
    let two = Node::start(&lab, "s/2", FAST, join).await;
    let all = [alive("s/0"), alive("s/1"), alive("s/2")];
    for node in [&seed, &one, &two] {
        node.sees(&all).await;
        assert!(node.status().await.sealed);
    }
    let old = one.keys().await;
    assert_eq!((old.len(), old[0].1), (1, true));
    let added = one.client().add_key(AddKeyRequest::default()).await.unwrap().into_inner();
    let fresh = added.key_id;
    for node in [&seed, &one, &two] {
        until("the key to be everywhere", async || (node.keys().await.len() == 2).then_some(())).await;
    }
    let in_use = |id: u32| vec![(id, true)];
    let refused = one.client().remove_key(RemoveKeyRequest { key_id: old[0].0, force: false }).await.unwrap_err();
    assert!(refused.message().contains("in use"), "{refused:?}");
    until("the key to be usable", async || {
        two.client().use_key(UseKeyRequest { key_id: fresh, force: false }).await.ok()
    })
    .await;
    until("the old key to be removable", async || {
        seed.client().remove_key(RemoveKeyRequest { key_id: old[0].0, force: false }).await.ok()
    })
    .await;
    for node in [&seed, &one, &two] {
        until("the new ring to be everywhere", async || (node.keys().await == in_use(fresh)).then_some(())).await;
        node.sees(&all).await;
    }
    let mut events = one.client().watch_events(WatchEventsRequest { since: 0 }).await.unwrap().into_inner();
    let mut names = Vec::new();
    while let Ok(Ok(Some(event))) = tokio::time::timeout(Duration::from_millis(300), events.message()).await {
        names.push(event.event);
    }
    assert!(
        names.iter().all(|name| name == "NodeJoined"),
        "a change of keys is no reason to suspect anybody: {names:?}"
    );
    // The ring outlives the process.
    seed.kill();
    seed.restart(json!({})).await;
    seed.sees(&all).await;
    assert_eq!(seed.keys().await, in_use(fresh));
}

#[tokio::test]
async fn whoever_does_not_belong_here_is_told_why() {
    let lab = Lab::new();
    let seed = Node::start(&lab, "s/0", FAST, json!({})).await;
    let addr = seed.gossip().await;
    let join = json!({ "discovery": { "join_addrs": [addr] } });
    let says = async |node: &Node, code: &str| {
        until(&format!("a note {code}"), async || {
            let status = node.status().await;
            let note = status.notes.into_iter().find(|note| note.code == code && note.current)?;
            assert!(!note.hint.is_empty() && node.log().contains(&note.message), "{note:?}");
            let metric = format!("drover_membership_notes{{code=\"{code}\"}} 1");
            node.http("/metrics").await.contains(&metric).then_some(note.message)
        })
        .await
    };
    // Another ring key.
    let identity = lab.identity("s/1");
    let identity = identity.with_ring(&KeyRing::generate().unwrap());
    let stranger = Node::start_with(&lab, "s/1", FAST, join.clone(), &identity).await;
    says(&seed, "wrong_key").await;
    let message = says(&stranger, "wrong_key").await;
    assert!(message.contains(&addr), "{message}");
    // Another instance that has the ring key.
    let other = Lab::new();
    let identity = other.identity("s/2").with_ring(&lab.identity("s/2").ring());
    let foreign = Node::start_with(&lab, "s/2", FAST, join.clone(), &identity).await;
    says(&seed, "wrong_cluster").await;
    says(&foreign, "wrong_cluster").await;
    // A clock that is an hour off: the certificate is valid only from an hour from now on.
    let early = lab.identity_from("s/3", 3600);
    let early = Node::start_with(&lab, "s/3", FAST, join, &early).await;
    says(&seed, "clock_off").await;
    says(&early, "clock_off").await;
    seed.sees(&[alive("s/0")]).await;
    let refused = seed.status().await.refused;
    assert!(refused["unknown_key"] > 0 && refused["wrong_cluster"] > 0 && refused["expired_cert"] > 0, "{refused:?}");
}

#[tokio::test]
async fn a_fresh_certificate_and_other_trust_are_in_force_without_a_restart() {
    let lab = Lab::new();
    // Who is given up stays to be seen.
    let slow = json!({ "discovery": { "dead_node_timeout": "60s" } });
    let seed = Node::start(&lab, "s/0", FAST, slow).await;
    let join = json!({ "discovery": { "join_addrs": [seed.gossip().await] } });
    let one = Node::start(&lab, "s/1", FAST, join.clone()).await;
    let all = [alive("s/0"), alive("s/1")];
    seed.sees(&all).await;
    one.sees(&all).await;
    let before = one.member("s/1").await.unwrap();
    let old = one.shown(&lab).await.unwrap();

    // The login side lays a fresh certificate: the node shows it to whoever connects, and in its record to whoever joins.
    let fresh = lab.identity("s/1");
    one.lay(&fresh);
    until("the fresh certificate to be shown", async || one.shown(&lab).await.filter(|cert| *cert != old)).await;
    until("the record to be signed anew", async || {
        let seen = seed.member("s/1").await?;
        (seen.incarnation > before.incarnation && seen.boot == before.boot).then_some(())
    })
    .await;
    assert_eq!(seed.status().await.refused.get("untrusted"), None, "nobody took it for a forgery");

    // The one that it had is revoked, and so is that of a node that never gets another one.
    let two = Node::start(&lab, "s/2", FAST, join.clone()).await;
    let three = [alive("s/0"), alive("s/1"), alive("s/2")];
    one.sees(&three).await;
    let revoked = lab.revoke(&["s/1", "s/2"], &[&fresh]);
    for node in [&seed, &one] {
        node.add_file("revoked.crl", &revoked);
    }
    let gone = [alive("s/0"), alive("s/1"), ("s/2".to_owned(), MemberState::Dead)];
    seed.sees(&gone).await;
    until("the certificate of s/2 to be refused", async || lab.refused_by(&seed, &two).await.then_some(())).await;
    let late = Node::start_with(&lab, "s/3", FAST, join, &lab.identity("s/3")).await;
    until("the newcomer to know s/1", async || late.member("s/1").await).await;
    assert!(late.member("s/2").await.is_none(), "nobody who came later believes it");
    // Files that make no sense change nothing, and that is said.
    one.add_file("node.crt", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    let note = until("the note", async || {
        one.status().await.notes.into_iter().find(|note| note.code == "identity" && note.current)
    })
    .await;
    assert!(note.message.contains("cannot be read again"), "{note:?}");
    assert!(seed.member("s/1").await.is_some_and(|member| member.state() == MemberState::Alive));
}

/// Many datagrams that wait at once are told apart: none changes what another said.
#[tokio::test]
async fn a_burst_of_datagrams_is_taken_apart_one_by_one() {
    let lab = Lab::new();
    let seed = Node::start(&lab, "s/0", FAST, json!({})).await;
    let addr = seed.gossip().await;
    let join = json!({ "discovery": { "join_addrs": [addr] } });
    let one = Node::start(&lab, "s/1", FAST, join).await;
    seed.sees(&[alive("s/0"), alive("s/1")]).await;
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    // Each is wrong in a way of its own: too short, of no version that there is, in the clear, too long.
    let kinds: [(&str, Vec<u8>); 4] = [
        ("truncated", vec![1, 0]),
        ("unknown_version", vec![0xee; 64]),
        ("plaintext", vec![0xd7; 64]),
        ("oversized", vec![1; 1600]),
    ];
    let rounds = 50;
    for _ in 0..rounds {
        for (_, datagram) in &kinds {
            stranger.send_to(datagram, &addr).unwrap();
        }
    }
    until("each to be counted as what it is", async || {
        let refused = seed.status().await.refused;
        kinds.iter().all(|(kind, _)| refused.get(*kind) == Some(&rounds)).then_some(())
    })
    .await;
    for node in [&seed, &one] {
        node.sees(&[alive("s/0"), alive("s/1")]).await;
    }
}
