//! The static backend from outside, at the level of files: the test plays the workers.

use std::process::{Command, Stdio};

use crate::bench::{Bench, echo, until};
use drover_mailbox::{Mailbox, Owner};
use drover_proto::allocator::{AllocationState, ListProvidersRequest, WorkerState};
use drover_proto::common::LaunchSpec;
use drover_service::process;
use drover_types::{ErrorCode, Generation, NodeIndex, OutboxId};
use serde_json::{Value, json};

fn config(bench_root: &str) -> String {
    format!(
        "cluster: {{backend: static, hosts: [n1, n2, n3], workspace_root: {bench_root}, cluster_subdir: work}}\n\
         worker: {{drain_grace: 0s}}\n"
    )
}

fn claim(mailbox: &Mailbox, node: u32, generation: u32, owner: &Owner) {
    let (swarm, node) = ("s".parse().unwrap(), NodeIndex(node));
    mailbox.claim(&OutboxId { swarm, node, generation: Generation(generation) }, owner).unwrap();
}

#[tokio::test]
async fn hosts_are_assigned_taken_released_and_free_again() {
    let shared = tempfile::tempdir().unwrap();
    let mut bench = Bench::start(&config(shared.path().to_str().unwrap())).await;
    let root = shared.path().join("work/mailbox");
    let assignment = |host: &str| -> Value {
        let text = std::fs::read(root.join(format!("static/{host}.json"))).unwrap();
        serde_json::from_slice::<Value>(&text).unwrap()["assignment"].clone()
    };
    let listed = bench.client().await.list_providers(ListProvidersRequest {}).await.unwrap().into_inner().providers;
    assert_eq!((listed[0].id.as_str(), listed[0].backend.as_str(), listed[0].disabled), ("static", "static", false));

    let spec = LaunchSpec { agents_md: "rules".into(), ..echo(2) };
    let allocation = bench.ensure("s", spec).await.unwrap();
    assert_eq!(allocation.state(), AllocationState::Pending);
    assert!(allocation.nodes[0].reason.contains("n1"), "{}", allocation.nodes[0].reason);
    let first = assignment("n1");
    assert_eq!(
        (&first["swarm_id"], &first["node_id"], &first["job_id"], &first["release"]),
        (&json!("s"), &json!(0), &json!(allocation.job_id), &Value::Null)
    );
    assert_eq!(assignment("n2")["node_id"], 1);
    assert!(root.join("s/01/bundle/AGENTS.md").is_file() && root.join("s/01/inbox").is_dir());

    let failure = bench.ensure("t", echo(2)).await.unwrap_err();
    assert_eq!(failure.code, ErrorCode::LaunchFailed);
    assert!(failure.message.contains("n1 (swarm s)") && failure.message.contains("1 are free: n3"), "{failure:?}");

    // One worker elsewhere, one on this host, which can be seen to live and to die.
    let mailbox = Mailbox::new(&root);
    let mut worker = Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
    let id = process::of(worker.id()).unwrap();
    let here = Owner { host: process::hostname(), pid: id.pid, start_time: id.start_time };
    claim(&mailbox, 0, 1, &Owner { host: "n1.cluster".into(), pid: 77, start_time: 1 });
    claim(&mailbox, 1, 1, &here);
    let allocation =
        bench.wait("s", "both taken", |a| a.state() == AllocationState::Running && a.nodes[1].pid != 0).await;
    let node = &allocation.nodes[0];
    assert_eq!(
        (node.host.as_str(), node.pid, node.generation, node.state()),
        ("n1.cluster", 77, 1, WorkerState::Running)
    );

    bench.kill_allocator();
    claim(&mailbox, 1, 2, &here);
    bench.up().await;
    let allocation = bench.get("s").await.unwrap();
    assert_eq!((allocation.state(), allocation.nodes[1].generation), (AllocationState::Running, 2));
    assert_eq!(bench.ensure("t", echo(2)).await.unwrap_err().code, ErrorCode::LaunchFailed);

    assert!(bench.release("s", false).await.unwrap());
    until("the order is in both files", || {
        let told = |host| assignment(host)["release"] == json!({"force": false});
        (told("n1") && told("n2")).then_some(())
    })
    .await;
    assert!(bench.release("s", true).await.unwrap());
    assert_eq!(assignment("n2")["release"], json!({"force": true}));
    worker.kill().unwrap();
    worker.wait().unwrap();
    // The one elsewhere cannot be seen; it says so itself, once it knows of the newest assignment.
    let text = std::fs::read(root.join("static/n1.json")).unwrap();
    let revision = serde_json::from_slice::<Value>(&text).unwrap()["revision"].clone();
    let said = json!({
        "v": 1, "host": "n1", "machine": "n1.cluster", "pid": 77, "start_time": 1, "revision": revision, "serving": null,
    });
    std::fs::write(root.join("static/workers/n1.json"), said.to_string()).unwrap();
    let done = bench.wait("s", "over", |a| a.state() == AllocationState::Completed).await;
    assert!(done.nodes.iter().all(|node| node.state() == WorkerState::Exited));
    assert_eq!((assignment("n1"), assignment("n2")), (Value::Null, Value::Null));
    until("the hosts are free", || (assignment("n1") == Value::Null).then_some(())).await;
    assert_eq!(bench.ensure("t", echo(3)).await.unwrap().nodes.len(), 3);
}
