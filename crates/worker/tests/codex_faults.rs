//! The real Codex CLI under interrupts, kills and bad surroundings.

mod codex_support;

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use codex_support::{Node, PLAIN, all, check, is_alive, kill, running, settings, wait_for};
use drover_config::WorkerConfig;
use drover_testkit::codex::{codex_bin, installed_below, repository_root};
use drover_testkit::mock_responses::MockResponses;
use drover_types::ErrorCode;
use drover_worker::agent::{AgentCommand, AgentEvent, TurnStatus};
use drover_worker::codex::{CodexSettings, find_binary, preflight};
use serde_json::json;

#[tokio::test]
async fn an_interrupt_ends_whatever_the_turn_is_doing() {
    let Some(bin) = codex_bin() else { return };
    let mock = MockResponses::start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::start(settings(&bin, dir.path(), &mock, PLAIN)).await;

    let injection = node.begin("@mock hang").await;
    node.event("assistant_delta").await;
    node.send(AgentCommand::Interrupt { injection }).await;
    assert_eq!(node.ended().await.0.status, TurnStatus::Interrupted);

    let injection = node.begin("@mock run='touch asked' escalate=true").await;
    node.approval().await;
    node.send(AgentCommand::Interrupt { injection }).await;
    let (outcome, events) = node.ended().await;
    assert_eq!(outcome.status, TurnStatus::Interrupted);
    assert_eq!(events.iter().filter(|event| matches!(event, AgentEvent::ApprovalGone { .. })).count(), 1);
    assert!(!node.file("asked").exists());

    // At once, before codex has said anything about the turn.
    let injection = node.begin("@mock say=quick delay=200ms").await;
    node.send(AgentCommand::Interrupt { injection }).await;
    assert_eq!(node.ended().await.0.status, TurnStatus::Interrupted);

    // The command of an interrupted turn would live on as a background terminal.
    let seconds = format!("{}", 100_000 + std::process::id());
    let injection = node.begin(&format!("@mock run='sleep {seconds}'")).await;
    node.event("command_started").await;
    wait_for("the command", || !running(&seconds).is_empty()).await;
    node.send(AgentCommand::Interrupt { injection }).await;
    let (outcome, events) = node.ended().await;
    assert_eq!(running(&seconds), [0_u32; 0], "the command outlived its turn");
    assert_eq!(outcome.status, TurnStatus::Interrupted);
    assert_eq!(all(&events, "command_completed").len(), 1, "no last word about the command: {events:#?}");

    let pid = node.pid;
    assert_eq!(node.turn("still there").await.0.text, "echo: still there");
    assert_eq!(pid, node.pid);
    assert!(is_alive(pid), "codex was restarted for nothing");
    node.stop().await;
    check(&mock);
}

#[tokio::test]
async fn a_command_that_hides_from_codex_is_found() {
    let Some(bin) = codex_bin() else { return };
    let mock = MockResponses::start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let settings = CodexSettings {
        sandbox_mode: "danger-full-access".into(),
        approval_policy: "never".into(),
        ..settings(&bin, dir.path(), &mock, PLAIN)
    };
    let mut node = Node::start(settings).await;
    let seconds = format!("{}", 200_000 + std::process::id());
    // In a session of its own and with no parent left: nothing that codex keeps leads to it.
    let command = format!("(setsid sleep {seconds} >/dev/null 2>&1 &); sleep {seconds}");
    let injection = node.begin(&format!("@mock run=\"{command}\"")).await;
    wait_for("both commands", || running(&seconds).len() >= 2).await;
    node.send(AgentCommand::Interrupt { injection }).await;
    assert_eq!(node.ended().await.0.status, TurnStatus::Interrupted);
    assert_eq!(running(&seconds), [0_u32; 0]);

    // And so is one that is there when codex is killed.
    node.begin(&format!("again @mock run=\"{command}\"")).await;
    wait_for("both commands again", || running(&seconds).len() >= 2).await;
    kill(node.pid);
    mock.forgive();
    assert_eq!(node.ended().await.0.code, Some(ErrorCode::TurnLost));
    assert_eq!(running(&seconds), [0_u32; 0]);
    node.stop().await;
    check(&mock);
}

#[tokio::test]
async fn a_killed_codex_comes_back_with_its_history() {
    let Some(bin) = codex_bin() else { return };
    let mock = MockResponses::start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::start(settings(&bin, dir.path(), &mock, PLAIN)).await;
    let thread = node.detail["thread_id"].clone();
    node.turn("remember the number 17").await;

    node.begin("@mock say='never to its end' delay=500ms deltas=50").await;
    node.event("assistant_delta").await;
    let first = node.pid;
    kill(first);
    mock.forgive();
    let (outcome, _) = node.ended().await;
    assert_eq!((outcome.status, outcome.code), (TurnStatus::Failed, Some(ErrorCode::TurnLost)));
    let events = node.ready().await;
    assert!(events.iter().any(|event| matches!(event, AgentEvent::Crashed { restarts: 1, .. })), "{events:?}");
    assert_ne!(node.pid, first);
    assert_eq!((&node.detail["resumed"], &node.detail["thread_id"]), (&json!(true), &thread));
    let (outcome, events) = node.turn("what was the number?").await;
    assert_eq!(outcome.status, TurnStatus::Completed);
    assert!(all(&events, "agent_error").is_empty(), "{events:?}");
    assert_eq!(all(&events, "usage").pop().unwrap()["last_total_tokens"], 120, "usage counts only its own turn");
    let request = mock.requests().pop().unwrap().to_string();
    assert!(request.contains("remember the number 17") && request.contains("echo: remember"), "{request}");

    // A new worker on the same node goes on with the same thread.
    let settings = node.settings.clone();
    node.stop().await;
    let mut node = Node::start(settings).await;
    assert_eq!((&node.detail["resumed"], &node.detail["thread_id"]), (&json!(true), &thread));
    let (_, events) = node.turn("and once more").await;
    assert_eq!(all(&events, "usage").pop().unwrap()["last_total_tokens"], 120);
    assert!(mock.requests().pop().unwrap().to_string().contains("what was the number?"));
    node.stop().await;
    check(&mock);
}

#[tokio::test]
async fn a_lost_history_is_said_aloud() {
    let Some(bin) = codex_bin() else { return };
    let mock = MockResponses::start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(&bin, dir.path(), &mock, PLAIN);
    let node = Node::start(settings.clone()).await;
    node.stop().await;
    // Nothing was said in that thread: a new one loses nothing.
    let mut node = Node::start(settings.clone()).await;
    assert_eq!(node.detail["history_lost"], false);
    node.turn("hello").await;
    node.stop().await;

    std::fs::remove_dir_all(settings.codex_home.join("sessions")).unwrap();
    for state in std::fs::read_dir(&settings.codex_home).unwrap().flatten() {
        if state.file_name().to_string_lossy().contains("sqlite") {
            std::fs::remove_file(state.path()).unwrap();
        }
    }
    let mut node = Node::start(settings).await;
    assert_eq!((&node.detail["resumed"], &node.detail["history_lost"]), (&json!(false), &json!(true)));
    let (outcome, events) = node.turn("hello again").await;
    assert_eq!(outcome.status, TurnStatus::Completed);
    assert!(all(&events, "agent_error")[0]["message"].as_str().unwrap().contains("history of this node is lost"));
    node.stop().await;
    check(&mock);
}

#[tokio::test]
async fn one_thread_has_one_writer() {
    let Some(bin) = codex_bin() else { return };
    let mock = MockResponses::start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let first = settings(&bin, dir.path(), &mock, PLAIN);
    let mut holder = Node::start(first.clone()).await;
    holder.turn("hello").await;

    // Another node directory, so that nobody takes the holder for its own orphan; the same home and thread.
    let second = CodexSettings {
        node_dir: dir.path().join("other"),
        thread_file: dir.path().join("other-thread.json"),
        ..first.clone()
    };
    std::fs::copy(&first.thread_file, &second.thread_file).unwrap();
    let mut waiter = Node::launch(second);
    wait_for("the refusal", || waiter.stderr().contains("already has an active writer")).await;
    holder.stop().await;
    waiter.ready().await;
    assert_eq!(waiter.detail["resumed"], true);
    assert_eq!(waiter.turn("my turn").await.0.text, "echo: my turn");
    waiter.stop().await;
    check(&mock);
}

#[tokio::test]
async fn what_cannot_work_is_given_up_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    let gave_up = |event: &AgentEvent| matches!(event, AgentEvent::GaveUp { .. });

    let mut node = Node::launch(CodexSettings::for_node("/nowhere/codex".into(), dir.path().join("a")));
    let events = node.until("giving up", gave_up).await;
    let Some(AgentEvent::GaveUp { failure }) = events.last() else { unreachable!() };
    assert_eq!(failure.code, ErrorCode::CodexMissing);
    assert!(failure.hint.contains("--agent echo"), "{}", failure.hint);

    let program = dir.path().join("broken");
    let mut file = std::fs::File::create(&program).unwrap();
    write!(file, "#!/bin/sh\necho 'no such thing' >&2\nexit 3\n").unwrap();
    std::os::unix::fs::PermissionsExt::set_mode(&mut file.metadata().unwrap().permissions(), 0o755);
    drop(file);
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let settings = CodexSettings { max_restarts: 2, ..CodexSettings::for_node(program, dir.path().join("b")) };
    let failure = preflight(&settings).await.unwrap_err();
    assert_eq!(failure.code, ErrorCode::CodexMissing);
    let mut node = Node::launch(settings);
    let events = node.until("giving up", gave_up).await;
    assert_eq!(events.iter().filter(|event| matches!(event, AgentEvent::Crashed { .. })).count(), 2, "{events:?}");
    let Some(AgentEvent::GaveUp { failure }) = events.last() else { unreachable!() };
    assert!(failure.message.contains("no such thing"), "{failure}");
}

#[tokio::test]
async fn credentials_are_checked_before_the_first_prompt() {
    let Some(bin) = codex_bin() else { return };
    let mock = MockResponses::start().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let good = settings(&bin, dir.path(), &mock, PLAIN);
    preflight(&good).await.unwrap();

    let with_key = CodexSettings {
        args: vec!["-c".into(), "model_providers.mock.env_key=\"DROVER_TEST_NO_SUCH_KEY\"".into()],
        ..good.clone()
    };
    let failure = preflight(&with_key).await.unwrap_err();
    assert_eq!(failure.code, ErrorCode::CodexNotLoggedIn);
    assert!(failure.message.contains("DROVER_TEST_NO_SUCH_KEY"), "{failure}");

    let empty = CodexSettings::for_node(bin.clone(), dir.path().join("empty"));
    std::fs::create_dir_all(&empty.node_dir).unwrap();
    let failure = preflight(&empty).await.unwrap_err();
    assert_eq!(failure.code, ErrorCode::CodexNotLoggedIn);
    assert!(failure.hint.contains("codex login"), "{}", failure.hint);

    // What the user's own home holds is taken over.
    let source = dir.path().join("user");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("auth.json"), json!({"OPENAI_API_KEY": "sk-test"}).to_string()).unwrap();
    preflight(&CodexSettings { home_source: Some(source), ..empty }).await.unwrap();
}

#[test]
fn the_native_binary_is_found_behind_the_shim() {
    let Some(bin) = codex_bin() else { return };
    let prefix = repository_root().join("target/codex");
    let Some(native) = installed_below(&prefix) else { return assert!(bin.is_file()) };
    let shim = prefix.join("node_modules/.bin/codex");
    let config = WorkerConfig { codex_bin: Some(shim), ..WorkerConfig::default() };
    assert_eq!(find_binary(&config).unwrap(), std::fs::canonicalize(native).unwrap());
}

/// Not a test of its own: the parent that the next test kills.
#[tokio::test]
#[ignore = "a program that another test starts"]
async fn a_worker_to_be_killed() {
    let dir = std::env::var("DROVER_TEST_DIR").unwrap();
    let mock = MockResponses::start().unwrap();
    let mut node = Node::start(settings(&codex_bin().unwrap(), Path::new(&dir), &mock, PLAIN)).await;
    node.begin("@mock hang").await;
    node.event("assistant_delta").await;
    std::fs::write(Path::new(&dir).join("pid"), node.pid.to_string()).unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn codex_dies_with_its_worker() {
    if codex_bin().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut parent = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_worker_to_be_killed", "--ignored", "--nocapture"])
        .env("DROVER_TEST_DIR", dir.path())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let pid_file = dir.path().join("pid");
    let mut pid = 0;
    wait_for("a turn under way", || {
        pid = std::fs::read_to_string(&pid_file).ok().and_then(|text| text.parse().ok()).unwrap_or(0);
        pid != 0
    })
    .await;
    assert!(is_alive(pid));
    kill(parent.id());
    parent.wait().unwrap();
    wait_for("the end of codex", || !is_alive(pid)).await;
}
