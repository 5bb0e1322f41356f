//! The command line without a router: help, usage errors, exit codes, and what `doctor` and `up` say of this machine.

use std::io::Write as _;
use std::path::Path;

use crate::fake::drover;
use serde_json::Value;

fn run(home: &Path, args: &[&str]) -> (Option<i32>, String, String) {
    let output = drover(home).args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn help_reads_well() {
    let home = tempfile::tempdir().unwrap();
    let (code, top, _) = run(home.path(), &["--help"]);
    assert_eq!(code, Some(0));
    insta::assert_snapshot!("help", top);
    let commands = [
        "demo",
        "up",
        "down",
        "launch",
        "inject",
        "list",
        "status",
        "attach",
        "terminate",
        "events",
        "approvals",
        "approve",
        "interrupt",
        "why",
        "members",
        "sessions",
        "send",
        "handoff",
        "drain",
        "keys",
        "dispatch",
        "research",
        "ask",
        "fetch",
        "spend",
        "setup",
        "skill",
        "doctor",
        "daemon",
        "completions",
    ];
    let mut all = String::new();
    for command in commands {
        let (code, text, _) = run(home.path(), &[command, "--help"]);
        assert_eq!(code, Some(0), "{command}");
        // What every command takes stands in the help of the program already.
        let (before, rest) = text.split_once("Everywhere:\n").unwrap();
        let (_, after) = rest.split_once("\n\n").unwrap();
        // The daemons describe themselves; that is not ours to keep the same.
        let after = after.split("Daemons:\n").next().unwrap();
        all.extend(["===== drover ", command, " --help\n", before, after, "\n"]);
    }
    insta::assert_snapshot!("help_of_commands", all);
}

#[test]
fn usage_errors_exit_with_2_and_name_what_is_wrong() {
    let home = tempfile::tempdir().unwrap();
    let wrong: &[(&[&str], &str)] = &[
        (&[], "Usage: drover"),
        (&["lunch"], "launch"),
        (&["launch", "--nodse", "4"], "--nodes"),
        (&["launch", "--nodes", "0"], "0 is not in 1.."),
        (&["launch", "--agent", "gpt"], "codex, echo"),
        (&["inject", "x"], "--prompt"),
        (&["inject", "x", "--prompt", "p", "--node", "-1"], "numbered from 0"),
        (&["interrupt", "x", "--node", "one"], "numbered from 0"),
        (&["list", "--router", "7950"], "HOST:PORT"),
        (&["daemon", "nosuch"], "router"),
        (&["up", "--router", "127.0.0.1:1"], "--router"),
        (&["demo", "--router", "127.0.0.1:1"], "--router"),
        (&["down", "--router", "127.0.0.1:1"], "--router"),
    ];
    for (args, expected) in wrong {
        let (code, _, err) = run(home.path(), args);
        assert_eq!(code, Some(2), "{args:?}: {err}");
        assert!(err.contains(expected), "{args:?}: {err}");
    }
}

#[test]
fn a_script_gets_a_usage_error_as_a_document() {
    let home = tempfile::tempdir().unwrap();
    let wrong: &[(&[&str], &str)] = &[
        (&["--json", "lunch"], "unrecognized subcommand 'lunch'"),
        (&["launch", "--nodes", "x", "--json"], "invalid value 'x' for '--nodes <N>'"),
        (&["inject", "x", "--json"], "--prompt"),
        (&["--json"], "requires a subcommand"),
    ];
    for (args, expected) in wrong {
        let (code, out, err) = run(home.path(), args);
        assert_eq!((code, out.as_str()), (Some(2), ""), "{args:?}");
        let error =
            &serde_json::from_str::<Value>(&err).unwrap_or_else(|error| panic!("{args:?}: {error}: {err}"))["error"];
        assert!(error["message"].as_str().unwrap().contains(expected), "{args:?}: {error}");
        assert!(error["hint"].as_str().unwrap().contains("--help"), "{error}");
    }
    let (code, out, _) = run(home.path(), &["list", "--json", "--help"]);
    assert!(code == Some(0) && out.contains("Usage: drover list"), "{out}");
}

#[test]
fn a_daemon_refuses_words_about_its_log_that_it_does_not_know() {
    let home = tempfile::tempdir().unwrap();
    for (variable, value, expected) in
        [("DROVER_LOG_FORMAT", "xml", "write text or json"), ("DROVER_LOG", "a=b=c", "such as info")]
    {
        let output = drover(home.path()).env(variable, value).args(["daemon", "router"]).output().unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(78), "{err}");
        assert!(err.contains(variable) && err.contains(value) && err.contains(expected), "{err}");
    }
}

#[test]
fn a_router_that_is_not_there_is_waited_for_and_then_exits_with_69() {
    let home = tempfile::tempdir().unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let began = std::time::Instant::now();
    let (code, _, err) = run(home.path(), &["list", "--router", &free]);
    assert_eq!(code, Some(69), "{err}");
    assert!(began.elapsed().as_secs() >= 4, "it gave up too early");
    assert!(err.contains(&free) && err.contains("drover doctor") && err.contains("refused"), "{err}");

    let (code, _, err) = run(home.path(), &["list", "--no-start"]);
    assert_eq!(code, Some(69), "{err}");
    assert!(err.contains("drover up") && err.contains("router is not running"), "{err}");
}

#[test]
fn a_broken_configuration_exits_with_78_and_says_where() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("bad.yaml");
    std::fs::write(&path, "router:\n  lissten: 127.0.0.1:1\n").unwrap();
    let (code, _, err) = run(home.path(), &["list", "--config", path.to_str().unwrap()]);
    assert_eq!(code, Some(78), "{err}");
    assert!(err.contains("bad.yaml") && err.contains("lissten") && err.contains("--check-config"), "{err}");
    // All of it at once, each where it stands.
    let text = "router:\n  lissten: x\n  keep_events_for: 3 parsecs\nworker:\n  max_restarts: -1\n  agent: frob\n";
    std::fs::write(&path, text).unwrap();
    let (code, _, err) = run(home.path(), &["daemon", "router", "--check-config", "--config", "bad.yaml"]);
    let told: Vec<&str> = err.lines().map(|line| line.split(": ").next().unwrap()).collect();
    assert_eq!(code, Some(78));
    assert_eq!(told, ["bad.yaml:2:3", "bad.yaml:3:20", "bad.yaml:5:17", "bad.yaml:6:10"], "{err}");
    let (code, _, err) = run(home.path(), &["list", "--config", "nosuch.yaml"]);
    assert_eq!(code, Some(78), "{err}");
    assert!(err.contains("nosuch.yaml"), "{err}");
}

#[test]
fn a_second_up_names_the_first() {
    let home = tempfile::tempdir().unwrap();
    let run_dir = home.path().join("state/run");
    std::fs::create_dir_all(&run_dir).unwrap();
    let mut lock = std::fs::File::create(run_dir.join("up.lock")).unwrap();
    writeln!(lock, "{}", std::process::id()).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let (code, _, err) = run(home.path(), &["up"]);
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains(&format!("pid {}", std::process::id())) && err.contains("drover down"), "{err}");
}

/// The check of this name, as a script reads it.
fn check<'a>(document: &'a Value, name: &str) -> &'a Value {
    let checks = document["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no check {name} in {document}"))
}

#[test]
fn doctor_finds_a_missing_codex_and_an_open_state_directory_and_repairs_the_latter() {
    use std::os::unix::fs::PermissionsExt as _;
    let home = tempfile::tempdir().unwrap();
    let state = home.path().join("state");
    std::fs::create_dir(&state).unwrap();
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o755)).unwrap();
    let (code, out, _) = run(home.path(), &["doctor", "--json"]);
    let document: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, document["ok"].as_bool()), (Some(1), Some(false)));
    for check in document["checks"].as_array().unwrap() {
        for field in ["name", "ok", "detail", "hint"] {
            assert!(check.get(field).is_some(), "{field} is missing in {check}");
        }
        assert!(check["ok"] == true || check["hint"] != "", "a failed check says what to do: {check}");
    }
    let open = check(&document, "state directory");
    assert!(open["ok"] == false && open["hint"].as_str().unwrap().contains("chmod 700"), "{open}");
    let codex = check(&document, "codex");
    assert!(codex["ok"] == false && codex["hint"].as_str().unwrap().contains("--agent echo"), "{codex}");
    assert_eq!((&codex["level"], &open["level"]), (&Value::from("warning"), &Value::from("failed")));

    std::fs::write(home.path().join("echo.yaml"), "worker:\n  agent: echo\n").unwrap();
    let (_, out, _) = run(home.path(), &["doctor", "--json", "--config", "echo.yaml", "--fix", "--no-start"]);
    let document: Value = serde_json::from_str(&out).unwrap();
    assert!(check(&document, "state directory")["detail"].as_str().unwrap().contains("repaired"), "{document}");
    assert!(check(&document, "codex")["detail"].as_str().unwrap().contains("not needed"), "{document}");
}

/// A program that speaks as much of codex's protocol as `doctor` asks for, without credentials.
const CODEX_WITHOUT_LOGIN: &str = r#"#!/bin/sh
[ "$1" = --version ] && { echo "codex-cli 0.169.0"; exit 0; }
while read -r line; do
    case "$line" in
        *'"initialize"'*) echo '{"id":1,"result":{}}' ;;
        *account/read*) echo '{"id":2,"result":{"requiresOpenaiAuth":true,"account":null}}' ;;
        *config/read*) echo '{"id":3,"result":{"config":{}}}' ;;
    esac
done
"#;

#[test]
fn doctor_asks_codex_itself_whether_it_is_logged_in() {
    use std::os::unix::fs::PermissionsExt as _;
    let home = tempfile::tempdir().unwrap();
    let codex = home.path().join("codex");
    std::fs::write(&codex, CODEX_WITHOUT_LOGIN).unwrap();
    std::fs::set_permissions(&codex, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::write(home.path().join("x.yaml"), format!("worker:\n  codex_bin: {}\n", codex.display())).unwrap();
    let (code, out, _) = run(home.path(), &["doctor", "--json", "--config", "x.yaml"]);
    let document: Value = serde_json::from_str(&out).unwrap();
    // Everything but launches of codex works: a warning.
    assert_eq!((code, document["ok"].as_bool()), (Some(0), Some(true)), "{document}");
    assert_eq!(check(&document, "codex")["ok"], true, "{document}");
    let login = check(&document, "codex login");
    let hint = login["hint"].as_str().unwrap();
    assert!(login["level"] == "warning" && hint.contains("codex login") && hint.contains("--agent echo"), "{login}");
}

#[test]
fn doctor_on_a_fresh_machine_without_codex_is_content() {
    let home = tempfile::tempdir().unwrap();
    let (code, out, _) = run(home.path(), &["doctor"]);
    assert_eq!(code, Some(0), "{out}");
    assert!(out.contains("warn  codex") && out.contains("--agent echo") && out.contains("1 warning"), "{out}");
    assert!(!home.path().join("state").exists(), "looking changes nothing");
}

#[test]
fn doctor_looks_at_the_cluster_that_is_asked_about() {
    let home = tempfile::tempdir().unwrap();
    let (code, out, _) = run(home.path(), &["doctor", "--json", "--cluster", "nosuch"]);
    let document: Value = serde_json::from_str(&out).unwrap();
    let cluster = check(&document, "cluster");
    assert_eq!(code, Some(1), "{out}");
    assert!(cluster["detail"].as_str().unwrap().contains("nosuch"), "{cluster}");
    assert!(cluster["hint"].as_str().unwrap().contains("local"), "{cluster}");
}

#[test]
fn a_prompt_that_no_request_can_carry_is_refused_at_once() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("huge.txt");
    std::fs::write(&path, vec![b'x'; (32 << 20) + 1]).unwrap();
    let (code, _, err) = run(home.path(), &["inject", "x", "--prompt-file", path.to_str().unwrap()]);
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("33554433 bytes") && err.contains("files of the nodes"), "{err}");
    std::fs::write(&path, b"\xff\xfe").unwrap();
    let (code, _, err) = run(home.path(), &["inject", "x", "--prompt-file", path.to_str().unwrap()]);
    assert!(code == Some(1) && err.contains("huge.txt") && err.contains("UTF-8"), "{err}");
}

#[test]
fn what_listens_in_the_routers_place_is_named() {
    let home = tempfile::tempdir().unwrap();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = silent.local_addr().unwrap().to_string();
    let (code, _, err) = run(home.path(), &["list", "--router", &addr]);
    assert_eq!(code, Some(69), "{err}");
    assert!(
        err.contains(&format!("pid {}", std::process::id())) && err.contains("does not answer as a router"),
        "{err}"
    );
}

#[test]
fn doctor_goes_on_with_the_default_when_the_configuration_is_broken() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("bad.yaml"), "router: [").unwrap();
    let (code, out, _) = run(home.path(), &["doctor", "--config", "bad.yaml"]);
    assert_eq!(code, Some(1));
    assert!(out.contains("FAIL  configuration") && out.contains("ports"), "{out}");
}

#[test]
fn a_router_on_another_host_is_named_with_its_host() {
    let home = tempfile::tempdir().unwrap();
    let run_dir = home.path().join("state/run");
    std::fs::create_dir_all(&run_dir).unwrap();
    for name in ["router", "slurm-allocator", "outbox-follower"] {
        let entry = serde_json::json!({
            "name": name, "pid": 77, "start_time": 1, "host": "login2.example.org", "version": drover_types::VERSION,
            "listen": "127.0.0.1:7950", "uid": 0,
        });
        std::fs::write(run_dir.join(format!("{name}.json")), entry.to_string()).unwrap();
    }
    let (code, _, err) = run(home.path(), &["list"]);
    assert_eq!(code, Some(69), "{err}");
    assert!(err.contains("login2.example.org") && err.contains("ssh -L 7950:127.0.0.1:7950"), "{err}");
}
