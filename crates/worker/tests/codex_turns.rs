//! Turns of the real Codex CLI against the mock API: what a prompt gives, approvals, steering, failures.

mod codex_support;

use std::time::Duration;

use codex_support::{KNOWN, Node, PLAIN, all, check, settings};
use drover_testkit::codex::codex_bin;
use drover_testkit::mock_responses::MockResponses;
use drover_types::ErrorCode;
use drover_worker::agent::{AgentCommand, AgentEvent, TurnStatus};
use drover_worker::codex::CodexSettings;
use serde_json::json;

#[tokio::test]
async fn prompts_are_answered_in_order_with_deltas_and_usage() {
    let Some(bin) = codex_bin() else { return };
    let mock = MockResponses::start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::start(settings(&bin, dir.path(), &mock, PLAIN)).await;
    assert_eq!(node.detail["resumed"], false);
    assert!(node.detail["user_agent"].as_str().unwrap().starts_with("drover-worker/"), "{}", node.detail);
    // The native binary runs, not the shim around it, in a group of its own and without our environment.
    assert_eq!(std::fs::read_link(format!("/proc/{}/exe", node.pid)).unwrap(), std::fs::canonicalize(&bin).unwrap());
    let environment = std::fs::read_to_string(format!("/proc/{}/environ", node.pid)).unwrap();
    assert!(!environment.contains("CARGO_PKG_NAME="), "{environment}");

    let (outcome, events) = node.turn("@mock say='the answer is 42' deltas=4 reasoning='let me think'").await;
    assert_eq!(outcome.status, TurnStatus::Completed);
    assert_eq!(outcome.text, "the answer is 42");
    let deltas = all(&events, "assistant_delta");
    assert_eq!(deltas.len(), 4);
    let whole: String = deltas.iter().map(|delta| delta["content"].as_str().unwrap()).collect();
    assert_eq!(whole, "the answer is 42");
    assert_eq!(all(&events, "assistant"), [json!({"content": "the answer is 42", "final_answer": false})]);
    assert_eq!(all(&events, "reasoning"), [json!({"content": "let me think"})]);
    assert_eq!(all(&events, "usage")[0]["last_total_tokens"], 120);

    // Two calls of the model in one turn: the total goes on, the turn's own share is the sum of both.
    let (outcome, events) = node.turn("@mock run='echo one > a.txt; cat a.txt' then='got {output}'").await;
    assert!(outcome.text.ends_with("one"), "{}", outcome.text);
    let usage = all(&events, "usage").pop().unwrap();
    assert_eq!((&usage["total_tokens"], &usage["last_total_tokens"]), (&json!(360), &json!(240)));
    assert_eq!((&usage["last_input_tokens"], &usage["last_cached_input_tokens"]), (&json!(200), &json!(6)));
    assert_eq!((&usage["last_output_tokens"], &usage["last_reasoning_output_tokens"]), (&json!(40), &json!(4)));
    assert_eq!(usage["model_name"], PLAIN);
    let command = all(&events, "command_completed").pop().unwrap();
    assert_eq!(command["exit_code"], 0);
    // The shell's own start-up may print into it.
    assert!(command["stdout"].as_str().unwrap().ends_with("one\n"), "{command}");
    assert!(command["duration"]["secs"].is_u64() && command["turn_id"].is_string(), "{command}");
    assert_eq!(all(&events, "command_started")[0]["call_id"], command["call_id"]);

    for n in 0..5 {
        assert_eq!(node.turn(&format!("prompt {n}")).await.0.text, format!("echo: prompt {n}"));
    }
    node.stop().await;
    check(&mock);
    assert_eq!(mock.ledger().len(), 7);
}

#[tokio::test]
async fn a_command_runs_only_when_it_is_approved() {
    let Some(bin) = codex_bin() else { return };
    let mock = MockResponses::start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::start(settings(&bin, dir.path(), &mock, PLAIN)).await;
    let ask = |file: &str| format!("@mock run='touch {file}' escalate=true then='done with {file}'");

    node.begin(&ask("accepted")).await;
    let wanted = node.approval().await;
    let AgentEvent::ApprovalWanted { inside_workspace, data, .. } = &wanted else { unreachable!() };
    assert!(inside_workspace, "{data}");
    assert!(data["command"].as_str().unwrap().contains("touch accepted"), "{data}");
    assert_eq!(data["reason"], "the prompt asks for it");
    assert!(!node.file("accepted").exists());
    node.answer(&wanted, true, None).await;
    let (outcome, events) = node.ended().await;
    assert_eq!(outcome.text, "done with accepted");
    assert!(node.file("accepted").exists());
    assert!(!events.iter().any(|event| matches!(event, AgentEvent::ApprovalGone { .. })), "it was answered");

    node.begin(&ask("declined")).await;
    let wanted = node.approval().await;
    node.answer(&wanted, false, None).await;
    let (outcome, events) = node.ended().await;
    assert_eq!((outcome.status, outcome.text.as_str()), (TurnStatus::Completed, "done with declined"));
    assert_eq!(all(&events, "command_completed")[0]["status"], "declined");
    assert!(!node.file("declined").exists());

    node.begin(&ask("cancelled")).await;
    let wanted = node.approval().await;
    node.answer(&wanted, false, Some(json!("cancel"))).await;
    let (outcome, _) = node.ended().await;
    assert_eq!(outcome.status, TurnStatus::Interrupted);
    assert!(!node.file("cancelled").exists());

    // Once for the session: the same command does not ask again.
    node.begin(&ask("session")).await;
    let wanted = node.approval().await;
    node.answer(&wanted, true, Some(json!("acceptForSession"))).await;
    node.ended().await;
    std::fs::remove_file(node.file("session")).unwrap();
    let (_, events) = node.turn(&format!("again: {}", ask("session"))).await;
    assert!(!events.iter().any(|event| matches!(event, AgentEvent::ApprovalWanted { .. })), "{events:?}");
    assert!(node.file("session").exists());

    node.begin(&ask("/etc/drover-test-outside")).await;
    let wanted = node.approval().await;
    assert!(matches!(wanted, AgentEvent::ApprovalWanted { inside_workspace: false, .. }), "{wanted:?}");
    node.answer(&wanted, false, None).await;
    node.ended().await;
    node.stop().await;
    check(&mock);
}

#[tokio::test]
async fn a_patch_is_applied_only_when_it_is_approved() {
    let Some(bin) = codex_bin() else { return };
    let mock = MockResponses::start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let settings = CodexSettings { sandbox_mode: "read-only".into(), ..settings(&bin, dir.path(), &mock, KNOWN) };
    let mut node = Node::start(settings).await;

    node.begin("@mock patch=yes.txt text=hello then=ok").await;
    let wanted = node.approval().await;
    let AgentEvent::ApprovalWanted { inside_workspace, data, .. } = &wanted else { unreachable!() };
    assert!(inside_workspace, "{data}");
    assert!(data["changes"][0]["path"].as_str().unwrap().ends_with("yes.txt"), "{data}");
    node.answer(&wanted, true, None).await;
    let (outcome, events) = node.ended().await;
    assert_eq!(outcome.status, TurnStatus::Completed);
    assert_eq!(std::fs::read_to_string(node.file("yes.txt")).unwrap(), "hello\n");
    assert_eq!(all(&events, "filechange_completed")[0]["status"], "completed");

    node.begin("@mock patch=no.txt then=ok").await;
    let wanted = node.approval().await;
    node.answer(&wanted, false, None).await;
    node.ended().await;
    assert!(!node.file("no.txt").exists());
    node.stop().await;
    check(&mock);
}

#[tokio::test]
async fn a_prompt_can_be_added_to_the_running_turn() {
    let Some(bin) = codex_bin() else { return };
    let mock = MockResponses::start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::start(settings(&bin, dir.path(), &mock, PLAIN)).await;
    let steered = "steered".parse().unwrap();
    let into = node.begin("@mock say='a slow answer' deltas=8 delay=250ms").await;
    node.event("assistant_delta").await;
    node.send(AgentCommand::Steer { injection: steered, into: into.clone(), prompt: "rather this".into() }).await;
    let (outcome, events) = node.ended().await;
    assert_eq!(outcome.text, "echo: rather this");
    assert!(!events.iter().any(|event| matches!(event, AgentEvent::SteerRefused { .. })), "{events:?}");

    let late = "late".parse().unwrap();
    node.send(AgentCommand::Steer { injection: late, into, prompt: "too late".into() }).await;
    node.until("refusal", |event| matches!(event, AgentEvent::SteerRefused { prompt, .. } if prompt == "too late"))
        .await;
    node.stop().await;
    check(&mock);
    assert_eq!(mock.ledger().len(), 2);
}

#[tokio::test]
async fn a_failed_turn_says_why_and_the_next_one_works() {
    let Some(bin) = codex_bin() else { return };
    let mock = MockResponses::start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::start(settings(&bin, dir.path(), &mock, PLAIN)).await;
    for (prompt, reason) in [
        ("@mock http=500", "internalServerError"),
        ("@mock http=429", "responseTooManyFailedAttempts"),
        ("@mock http=400", "400 Bad Request"),
        ("@mock break", "stream disconnected"),
        ("@mock fail=rate_limit_exceeded message='slow down'", "rateLimitExceeded"),
        ("@mock incomplete=max_output_tokens", "max_output_tokens"),
    ] {
        let (outcome, events) = node.turn(prompt).await;
        assert_eq!(outcome.status, TurnStatus::Failed, "{prompt}: {outcome:?}");
        assert_eq!(outcome.code, Some(ErrorCode::ProviderUnavailable), "{prompt}");
        assert!(outcome.error.as_ref().unwrap().contains(reason), "{prompt}: {outcome:?}");
        let last = all(&events, "agent_error").pop().unwrap();
        assert_eq!(last["will_retry"], false, "{prompt}: {last}");
        let (outcome, _) = node.turn(&format!("after {} all is well @mock say=fine", &prompt[6..])).await;
        assert_eq!(outcome.text, "fine", "{prompt}");
    }
    // A retry is told and is not the end.
    let (outcome, events) = node.turn("@mock break times=1 @mock say=recovered").await;
    assert_eq!((outcome.status, outcome.text.as_str()), (TurnStatus::Completed, "recovered"));
    let told = all(&events, "agent_error");
    assert!(told.len() == 1 && told[0]["will_retry"] == true, "{told:?}");
    node.stop().await;
    check(&mock);
}

#[tokio::test]
async fn the_sandbox_works_wherever_the_home_lies() {
    let Some(bin) = codex_bin() else { return };
    let mock = MockResponses::start().unwrap();
    let temp = tempfile::tempdir().unwrap();
    let target = drover_testkit::codex::repository_root().join("target");
    let elsewhere = tempfile::tempdir_in(target).unwrap();
    for dir in [temp.path(), elsewhere.path()] {
        let mut node = Node::start(settings(&bin, dir, &mock, PLAIN)).await;
        let prompt =
            format!("in {} @mock run='touch in.txt; touch /etc/drover-test-escaped; id -u' then=ok", dir.display());
        let (_, events) = node.turn(&prompt).await;
        let command = all(&events, "command_completed").pop().unwrap_or_else(|| {
            panic!(
                "no command: {:?}\n{}",
                mock.requests().pop().unwrap()["input"].as_array().unwrap().last(),
                node.stderr()
            )
        });
        assert_eq!(command["exit_code"], 0, "{command}\n{}", node.stderr());
        assert!(node.file("in.txt").exists());
        assert!(!std::path::Path::new("/etc/drover-test-escaped").exists());
        assert!(!node.stderr().contains("Refusing to create helper binaries"), "{}", node.stderr());
        node.stop().await;
    }
    check(&mock);
}

#[tokio::test]
async fn an_unanswered_question_does_not_block_the_stop() {
    let Some(bin) = codex_bin() else { return };
    let mock = MockResponses::start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let settings = CodexSettings { approval_policy: "untrusted".into(), ..settings(&bin, dir.path(), &mock, PLAIN) };
    let mut node = Node::start(settings).await;
    node.begin("@mock run='touch never'").await;
    node.approval().await;
    let file = node.file("never");
    let started = std::time::Instant::now();
    node.stop().await;
    assert!(started.elapsed() < Duration::from_secs(5));
    assert!(!file.exists());
    check(&mock);
}

#[tokio::test]
async fn a_working_directory_behind_a_link_works() {
    let Some(bin) = codex_bin() else { return };
    let mock = MockResponses::start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("real")).unwrap();
    std::os::unix::fs::symlink("real", dir.path().join("link")).unwrap();
    let mut node = Node::start(settings(&bin, &dir.path().join("link"), &mock, PLAIN)).await;
    let (_, events) = node.turn("@mock run='touch made.txt' then='{output}'").await;
    assert_eq!(all(&events, "command_completed").len(), 1, "{events:?}");
    assert!(node.file("made.txt").exists());
    node.stop().await;
    check(&mock);
}
