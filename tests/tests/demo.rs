//! The tour with the real Codex CLI: shown when it answers, given up for the built-in agent when it does not, and over
//! within 30 seconds either way.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use drover_testkit::cluster::{program, scratch_dir};
use drover_testkit::codex::codex_bin;
use drover_testkit::mock_responses::MockResponses;
use serde_json::Value;

/// How long the tour may take, whatever it shows.
const LIMIT: Duration = Duration::from_secs(30);

/// Runs `drover demo` for a user who has codex on the PATH, with this model behind it.
fn demo(home: &Path, codex: &Path, model: &str) -> (Value, String) {
    let bin = home.join("bin");
    std::fs::create_dir(&bin).unwrap();
    std::os::unix::fs::symlink(codex, bin.join("codex")).unwrap();
    let config = format!(
        "model = \"mock-model\"\nmodel_provider = \"mock\"\n[model_providers.mock]\nname = \"Mock\"\n\
         base_url = \"http://{model}/v1\"\nwire_api = \"responses\"\nrequest_max_retries = 0\nstream_max_retries = 0\n\
         supports_websockets = false\n[analytics]\nenabled = false\n"
    );
    std::fs::create_dir(home.join(".codex")).unwrap();
    std::fs::write(home.join(".codex/config.toml"), config).unwrap();
    let began = Instant::now();
    let output = Command::new(program("drover").unwrap())
        .args(["demo", "--json"])
        .env_clear()
        .env("HOME", home)
        .env("PATH", format!("{}:/usr/bin:/bin", bin.display()))
        .current_dir(home)
        .output()
        .unwrap();
    let took = began.elapsed();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr).into_owned());
    assert_eq!(output.status.code(), Some(0), "{out}\n{err}");
    assert!(took < LIMIT, "the demo took {took:?}\n{err}");
    let table: Value = serde_json::from_str(out.lines().last().unwrap_or_default()).unwrap();
    assert_eq!(table["ok"], true, "{table}");
    (table, err)
}

fn agent(table: &Value) -> &str {
    table["steps"].as_array().and_then(|steps| steps.last()).and_then(|step| step["seen"].as_str()).unwrap_or_default()
}

#[test]
fn the_tour_shows_codex_when_it_is_ready() {
    let Some(codex) = codex_bin() else { return };
    let mock = MockResponses::start().unwrap();
    let home = scratch_dir("demo-").unwrap();
    let (table, _) = demo(home.path(), &codex, &mock.addr().to_string());
    assert_eq!(agent(&table), "codex agent");
    assert_eq!(mock.violations(), Vec::<String>::new());
}

#[test]
fn a_model_that_does_not_answer_gives_way_to_the_built_in_agent() {
    let Some(codex) = codex_bin() else { return };
    let home = scratch_dir("demo-").unwrap();
    // It takes connections and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (table, err) = demo(home.path(), &codex, &silent.local_addr().unwrap().to_string());
    assert_eq!(agent(&table), "echo agent");
    assert!(err.contains("showing the built-in echo agent instead"), "{err}");
}
