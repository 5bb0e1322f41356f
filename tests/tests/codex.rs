//! The real Codex CLI through the whole of drover, against a mock of the Responses API that checks every request.

use std::time::Duration;

use drover_e2e::cli::{json, json_lines, ok, run};
use drover_e2e::sure::{must, wait_for};
use drover_testkit::cluster::{Cluster, scratch_dir, signal};
use drover_testkit::codex::codex_bin;
use drover_testkit::mock_responses::{MockResponses, codex_config};
use rustix::process::Signal;
use serde_json::Value;

/// A settings directory that has codex talk to the mock.
fn codex_home(mock: &MockResponses) -> tempfile::TempDir {
    let home = must(scratch_dir("codex-home-"));
    must(
        std::fs::write(home.path().join("config.toml"), codex_config(&mock.base_url(), "mock-model"))
            .map_err(Into::into),
    );
    home
}

fn children_named(name: &str) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    processes
        .filter(|pid: &u32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).replace('\0', " ").contains(name)
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swarm_of_real_codex_agents() {
    let Some(codex) = codex_bin() else { return };
    let mock = must(MockResponses::start());
    let home = codex_home(&mock);
    let config = format!(
        "worker:\n  codex_bin: {}\n  codex_home: {}\n  approval_policy: on-request\n",
        codex.display(),
        home.path().display()
    );
    let cluster = must(Cluster::start(&config).await);
    let launched = must(json(&cluster, &["launch", "--nodes", "2", "--detach", "--json"]));
    let swarm = launched["swarm_id"].as_str().unwrap().to_owned();
    let events =
        |cluster: &Cluster| must(json_lines(cluster, &["events", "--since", "0", "--swarm", &swarm, "--json"]));
    let named = |events: &[Value], name: &str| events.iter().filter(|event| event["event"] == name).count();

    // Streamed deltas and usage, from every node.
    let said = must(ok(
        &cluster,
        &["inject", &swarm, "--prompt", "remember the word heliotrope @mock say='noted well and good' deltas=4"],
    ));
    assert_eq!(said.stdout.matches("noted well and good").count(), 2, "{}", said.stdout);
    let so_far = events(&cluster);
    assert!(named(&so_far, "assistant_delta") >= 8, "deltas were streamed");
    let usage = so_far.iter().rfind(|event| event["event"] == "usage").expect("usage is reported");
    assert!(usage["data"]["total_tokens"].as_u64().unwrap() > 0, "{usage}");

    // A command that asks first: once it is accepted, once declined.
    for (decision, file, runs) in [(vec![], "accepted.txt", true), (vec!["--decline"], "declined.txt", false)] {
        let target = cluster.dir().join(file);
        let prompt = format!("run it @mock run='echo hi > {}' escalate=true then=done", target.display());
        let mut asking = cluster.command(&["inject", &swarm, "--node", "0", "--prompt", &prompt]).spawn().unwrap();
        let approval = wait_for("an approval", || {
            let id = first_approval(&cluster, &swarm);
            assert!(id.is_some() || asking.try_wait().unwrap().is_none(), "the turn ended without asking");
            id
        });
        let mut args = vec!["approve", &approval];
        args.extend(&decision);
        must(ok(&cluster, &args));
        assert!(asking.wait().unwrap().success(), "the turn ends either way");
        assert_eq!(target.exists(), runs, "{file}");
    }

    // An interrupt ends the turn and the command that it runs.
    let marker = format!("sleep 4{}", std::process::id());
    let prompt = format!("wait @mock run='{marker}' escalate=true then=done");
    let mut waiting = cluster.command(&["inject", &swarm, "--node", "1", "--prompt", &prompt]).spawn().unwrap();
    let approval = wait_for("an approval", || first_approval(&cluster, &swarm));
    must(ok(&cluster, &["approve", &approval]));
    let me = std::process::id();
    let running = || children_named(&marker).into_iter().any(|pid| pid != me && !is_drover(pid));
    wait_for("the command", || running().then_some(()));
    must(ok(&cluster, &["interrupt", &swarm, "--node", "1"]));
    assert!(!waiting.wait().unwrap().success(), "an interrupted turn is no success");
    wait_for("the end of the command", || (!running()).then_some(()));

    // A crash of codex: its turn is lost with a reason, the next one remembers what was said.
    let agent = wait_for("codex below worker 1", || agent_pid(&cluster, &swarm, 1));
    let mut hanging =
        cluster.command(&["inject", &swarm, "--node", "1", "--prompt", "now @mock hang"]).spawn().unwrap();
    wait_for("the turn", || {
        let status = must(json(&cluster, &["status", &swarm, "--json"]));
        (status["nodes"][1]["state"] == "busy").then_some(())
    });
    std::thread::sleep(Duration::from_millis(300)); // Long enough for the request to be under way; not needed to pass.
    mock.forgive();
    signal(agent, Signal::KILL).unwrap();
    assert_eq!(hanging.wait().unwrap().code(), Some(1));
    let after = must(run(&cluster, &["inject", &swarm, "--node", "1", "--prompt", "go on @mock say='here again'"]));
    assert_eq!(after.code, 0, "{}{}", after.stdout, after.stderr);
    let lost =
        events(&cluster).into_iter().find(|event| event["data"]["code"] == "turn_lost").expect("the loss is said");
    assert!(!lost["data"]["error"].as_str().unwrap().is_empty());
    assert_eq!(mock.violations(), Vec::<String>::new(), "history complete, every tool output present");
}

fn first_approval(cluster: &Cluster, swarm: &str) -> Option<String> {
    let waiting = must(json(cluster, &["approvals", swarm, "--json"]));
    waiting["approvals"].as_array()?.first()?["approval_id"].as_str().map(str::to_owned)
}

/// `drover inject` carries the prompt, and with it the marker, on its command line.
fn is_drover(pid: u32) -> bool {
    drover_service::process::program(pid).is_none_or(|name| name.starts_with("drover"))
}

fn agent_pid(cluster: &Cluster, swarm: &str, node: usize) -> Option<u32> {
    let status = must(json(cluster, &["status", swarm, "--json"]));
    let worker = status["nodes"][node]["pid"].as_u64()?;
    let children: Vec<u32> = std::fs::read_dir(format!("/proc/{worker}/task"))
        .ok()?
        .filter_map(Result::ok)
        .flat_map(|task| {
            let listed = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
            listed.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>()
        })
        .collect();
    children
        .into_iter()
        .find(|&pid| drover_service::process::program(pid).is_some_and(|name| name.starts_with("codex")))
}
