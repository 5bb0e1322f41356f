//! The codex agent on the fake app-server: what the chaos runs rely on when eight real ones are too heavy.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod codex_support;

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;

use codex_support::{Node, all, kill, running, wait_for};
use drover_testkit::{skip, this_test};
use drover_types::ErrorCode;
use drover_worker::agent::{AgentCommand, AgentEvent, TurnStatus};
use drover_worker::codex::{CodexSettings, preflight};
use serde_json::{Value, json};

/// The fake is a program of another crate: it lies beside this test's directory once the workspace is built.
fn fake() -> Option<PathBuf> {
    let exe = std::env::current_exe().unwrap();
    let path = exe.ancestors().nth(2).unwrap().join("fake-app-server");
    if !path.is_file() {
        skip(&this_test(), "the fake is not built: run `cargo build -p drover-testkit --bins` first");
        return None;
    }
    let output = Command::new(&path).arg("--version").output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("a fake"), "{output:?}");
    Some(path)
}

fn ledger(settings: &CodexSettings) -> HashMap<String, usize> {
    let text = std::fs::read_to_string(settings.codex_home.join("fake-ledger.jsonl")).unwrap_or_default();
    let mut counts = HashMap::new();
    for line in text.lines() {
        let entry: Value = serde_json::from_str(line).unwrap();
        *counts.entry(entry["injection_id"].as_str().unwrap().to_owned()).or_default() += 1;
    }
    counts
}

#[tokio::test]
async fn the_fake_does_what_the_real_one_does() {
    let Some(fake) = fake() else { return };
    let dir = tempfile::tempdir().unwrap();
    let settings = CodexSettings::for_node(fake, dir.path().to_owned());
    preflight(&settings).await.unwrap();
    let mut node = Node::start(settings.clone()).await;
    assert!(node.detail["user_agent"].as_str().unwrap().contains("a fake for tests"), "{}", node.detail);

    let (outcome, events) = node.turn("@mock run='echo hi; touch made' then='got {output}' usage=7,3").await;
    assert_eq!(outcome.text, "got hi");
    assert_eq!(all(&events, "usage").pop().unwrap()["last_total_tokens"], 130);
    assert!(node.file("made").exists());

    node.begin("@mock run='touch declined' escalate=true then=ok").await;
    let wanted = node.approval().await;
    node.answer(&wanted, false, None).await;
    assert_eq!(node.ended().await.0.text, "ok");
    assert!(!node.file("declined").exists());

    let into = node.begin("@mock say=slow delay=20s").await;
    node.event("thread_status").await;
    node.send(AgentCommand::Steer { injection: "added".parse().unwrap(), into, prompt: "rather this".into() }).await;
    let (outcome, events) = node.ended().await;
    assert_eq!(outcome.text, "echo: rather this");
    assert!(!events.iter().any(|event| matches!(event, AgentEvent::SteerRefused { .. })), "{events:?}");

    let seconds = format!("{}", 300_000 + std::process::id());
    let injection = node.begin(&format!("@mock run='sleep {seconds}'")).await;
    wait_for("the command", || !running(&seconds).is_empty()).await;
    node.send(AgentCommand::Interrupt { injection }).await;
    assert_eq!(node.ended().await.0.status, TurnStatus::Interrupted);
    assert_eq!(running(&seconds), [0_u32; 0]);

    let (outcome, _) = node.turn("@mock fail=quota message='no more'").await;
    assert!(outcome.status == TurnStatus::Failed && outcome.error.unwrap().contains("no more"));

    // Two kinds of sudden death; the command of the second one has to go as well.
    node.begin("@mock crash").await;
    assert_eq!(node.ended().await.0.code, Some(ErrorCode::TurnLost));
    node.ready().await;
    node.begin(&format!("again @mock run='sleep {seconds}'")).await;
    wait_for("the command", || !running(&seconds).is_empty()).await;
    kill(node.pid);
    assert_eq!(node.ended().await.0.code, Some(ErrorCode::TurnLost));
    assert_eq!(running(&seconds), [0_u32; 0]);
    node.ready().await;
    assert_eq!(node.detail["resumed"], json!(true));
    assert_eq!(node.turn("still there").await.0.text, "echo: still there");
    node.stop().await;
    let counts = ledger(&settings);
    assert_eq!(counts.len(), 9, "{counts:?}");
    assert!(counts.values().all(|count| *count == 1), "{counts:?}");
}
