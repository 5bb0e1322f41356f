//! What a configuration says of a cluster comes to a shell on its login host, to sbatch and to paths. Whatever is written there
//! is refused in a few words or stays a value.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use drover_config::Config;
use drover_proto::common::LaunchSpec;
use drover_testkit::fake_slurm::{FakeSlurm, Plan};
use serde_json::{Value, json};

use super::bench::{Bench, echo};

/// A shell that takes a value for a command leaves a file of this name.
const CANARY: &str = "pwned";

fn values(touch: &str) -> Vec<String> {
    vec![
        format!("$({touch})"),
        format!("'; {touch}; '"),
        format!("x\n#SBATCH --wrap=`{touch}`\n"),
        "a\0b\u{1b}[2J".to_owned(),
        format!("../../{CANARY}"),
        "x".repeat(100_000),
    ]
}

/// What one key of the cluster is set to; a path also below a directory that exists.
fn settings(dir: &str) -> Vec<(&'static str, String)> {
    let touch = format!("touch {dir}/{CANARY}");
    let mut all = Vec::new();
    for value in values(&touch) {
        for key in ["partition", "time_limit", "account", "qos", "approval_policy", "ssh", "cluster_subdir"] {
            all.push((key, value.clone()));
        }
        for key in ["workspace_root", "local_dir", "program"] {
            all.push((key, value.clone()));
            // Whoever writes a whole path with `..` in it means the place it leads to.
            if !value.starts_with("..") {
                all.push((key, format!("{dir}/shared/{value}")));
            }
        }
    }
    all
}

fn config(dir: &str, profiles: &Value) -> Value {
    let names: Vec<&String> = profiles.as_object().unwrap().keys().collect();
    let providers: Vec<Value> =
        names.iter().map(|name| json!({"id": name, "backend": "slurm", "cluster_profile": name})).collect();
    json!({
        "worker": {"agent": "echo"},
        "cluster": {"slurm": {
            "ssh": "none", "workspace_root": format!("{dir}/shared"), "cluster_subdir": "c",
            "local_dir": format!("{dir}/local"), "program": format!("{dir}/program"), "partition": "batch",
            "time_limit": "10", "poll": "1s", "calls_per_minute": 6000, "profiles": profiles,
        }},
        "launch_providers": providers,
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_configured_of_a_cluster_is_refused_or_stays_a_value() {
    let mut bench = Bench::new("");
    let root = bench.dir.path().to_owned();
    let dir = root.to_str().unwrap().to_owned();
    let at = |name: &str| root.join(name);
    let slurm = FakeSlurm::start(&at("fake"), &Plan { nodes: 64, ..Plan::default() }).unwrap();
    for dir in ["shared", "local"] {
        fs::create_dir(at(dir)).unwrap();
    }
    fs::write(at("program"), "#!/bin/sh\nexec sleep 1000\n").unwrap();
    fs::set_permissions(at("program"), fs::Permissions::from_mode(0o755)).unwrap();

    // Those that load come into force together, each for a cluster of its own.
    let (mut profiles, mut refused) = (json!({"good": {}}), 0);
    let mut said = Vec::new();
    for (number, (key, value)) in settings(&dir).into_iter().enumerate() {
        let name = format!("p{number}");
        let alone = config(&dir, &json!({ &name: { key: value } })).to_string();
        match Config::from_text("drover.yaml", &alone, &std::collections::BTreeMap::new()) {
            Err(error) => {
                said.push((format!("{key} {value:.60}"), error.to_string()));
                refused += 1;
            }
            Ok(_) => profiles[&name] = json!({ key: value }),
        }
    }
    fs::write(at("config.yaml"), config(&dir, &profiles).to_string()).unwrap();
    bench.path = Some(slurm.path().unwrap());
    bench.up().await;

    let launch = |name: String| {
        let bench = &bench;
        async move {
            let ended = bench.ensure(&name, LaunchSpec { provider: name.clone(), ..echo(1) }).await;
            (name, ended)
        }
    };
    let names: Vec<String> = profiles.as_object().unwrap().keys().cloned().collect();
    let mut taken = Vec::new();
    for some in names.chunks(16) {
        for (name, ended) in futures::future::join_all(some.iter().cloned().map(launch)).await {
            let what = profiles[&name].to_string();
            match ended {
                Ok(_) => taken.push(name),
                Err(failure) => {
                    said.push((what.chars().take(80).collect(), failure.message));
                    refused += 1;
                }
            }
        }
    }
    for (what, words) in &said {
        assert!((1..2000).contains(&words.len()), "{what}: {} bytes: {words:.300}", words.len());
        assert!(!words.contains(['\u{1b}', '\0']), "{what}: {words:?}");
    }
    assert!(taken.contains(&"good".to_owned()) && refused > 30, "{taken:?}, {refused} refused: {said:#?}");
    let over = taken.iter().map(async |name| {
        bench.wait(name, "it runs or is over", |seen| !seen.job_id.is_empty() || !seen.reason.is_empty()).await;
        let _ = bench.release(name, true).await;
        let ends = ["CANCELLED", "COMPLETED", "FAILED"];
        bench.wait(name, "it is over", |seen| ends.contains(&seen.backend_state.as_str())).await;
    });
    futures::future::join_all(over).await;
    for place in [at(CANARY), root.with_file_name(CANARY), format!("/{CANARY}").into()] {
        assert!(!place.exists(), "a value was taken for a command or led outside: {}", place.display());
    }
    let log = fs::read_to_string(at("allocator.log")).unwrap();
    let longest = log.lines().map(str::len).max().unwrap_or_default();
    assert!((1..2000).contains(&longest), "a line of {longest} bytes in its log");
    slurm.stop().unwrap();
}
