//! Values with quotes, newlines, `$()`, `../`, NUL and a mebibyte in every field that somebody can fill: configuration, launches,
//! prompts, names. Each is refused in a few words or stays what it is; none reaches a shell or chooses a path. What Slurm makes of
//! them is tried where there is a real one.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helper functions")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use drover_e2e::cli::{ok, run};
use drover_e2e::sure::must;
use drover_proto::common::{LaunchSpec, SkillFile};
use drover_proto::failure_of;
use drover_proto::router::launch_swarm_response::Step;
use drover_proto::router::{
    ExplainRequest, GetSwarmRequest, InjectRequest, InterruptRequest, LaunchSwarmRequest, ResolveApprovalRequest,
    TerminateSwarmRequest, WatchEventsRequest,
};
use drover_testkit::cluster::Cluster;
use drover_testkit::emulate::{Connection, command, id_of};
use drover_types::ErrorCode;
use serde_json::{Map, Value, json};

const PATIENCE: Duration = Duration::from_secs(30);
/// A file of this name is what a shell would leave behind.
const CANARY: &str = "pwned";

/// What a shell or we ourselves could take for something else than a value.
fn hostile(dir: &Path) -> Vec<String> {
    let touch = format!("touch {}", dir.join(CANARY).display());
    let mut values = vec![
        format!("$({touch})"),
        format!("`{touch}`"),
        format!("'; {touch}; '"),
        format!("\"; {touch}; \""),
        format!("x\n{touch}\n"),
        format!("x\r\n{touch} &"),
        format!("| {touch}"),
        "a'b\"c\\d".to_owned(),
        "a\0b".to_owned(),
        "-rf".to_owned(),
        "--config=/dev/null".to_owned(),
        format!("../../../{CANARY}"),
        format!("/{CANARY}"),
        "..".to_owned(),
        "%s%n{}${HOME}".to_owned(),
        "\u{1b}[31m\u{202e}".to_owned(),
        "{\"type\":\"shutdown\"}".to_owned(),
    ];
    values.push("x".repeat(1 << 20));
    values
}

/// Everything below a directory.
fn below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        found.push(entry.path());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(below(&entry.path()));
        }
    }
    found
}

#[track_caller]
fn nothing_ran(cluster: &Cluster) {
    let all = below(cluster.dir());
    assert!(all.len() > 20, "{all:?}");
    let left: Vec<&PathBuf> = all.iter().filter(|path| path.to_string_lossy().contains(CANARY)).collect();
    assert!(left.is_empty(), "{left:?}");
    for outside in ["/", "/tmp", "/root"].map(|dir| Path::new(dir).join(CANARY)) {
        assert!(!outside.exists(), "{}", outside.display());
    }
}

/// A file with one key set. `[]` stands for an entry of a list, `<name>` for a name that its writer chooses.
fn with_key(path: &str, value: Value) -> Value {
    let mut inner = value;
    for part in path.rsplit('.') {
        let (name, list) = part.strip_suffix("[]").map_or((part, false), |name| (name, true));
        if list {
            inner = Value::Array(vec![inner]);
        }
        let name = if name == "<name>" { "named" } else { name };
        inner = Value::Object(Map::from_iter([(name.to_owned(), inner)]));
    }
    inner
}

fn merge(into: &mut Value, other: Value) {
    match (into, other) {
        (Value::Object(into), Value::Object(other)) => {
            for (key, value) in other {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (Value::Array(into), Value::Array(other)) if into.len() == 1 && other.len() == 1 && into[0].is_object() => {
            for value in other {
                merge(&mut into[0], value);
            }
        }
        (into, other) => *into = other,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_of_the_configuration_is_refused_or_stays_a_value() {
    let mut cluster = must(Cluster::prepare(""));
    let file = cluster.dir().join("drover.yaml");
    // One key after the other, with every value; those that are taken come into force together.
    let (mut taken, mut refused, mut all) = (0, 0, json!({}));
    let texts = drover_config::schema().into_iter().filter(|key| key.kind.contains("text"));
    for key in texts {
        for value in hostile(cluster.dir()) {
            let set = match key.kind.as_str() {
                "list of text" => json!([value]),
                kind if kind.starts_with("map") => json!({ "named": value }),
                _ => json!(value),
            };
            let one = with_key(&key.path, set);
            fs::write(&file, one.to_string()).unwrap();
            if let Err(error) = drover_config::load(Some(&file)) {
                let said = error.to_string();
                let length = said.len();
                assert!(length < 2000 && said.contains("drover.yaml"), "{}: {length} bytes: {said:.300}", key.path);
                refused += 1;
                continue;
            }
            taken += 1;
            // A file of many mebibytes takes its time, and shows nothing more.
            if value.len() > 10_000 {
                continue;
            }
            // Together they must still be a file that loads: the last value that does is the one that stays.
            let mut both = all.clone();
            merge(&mut both, one);
            fs::write(&file, both.to_string()).unwrap();
            if drover_config::load(Some(&file)).is_ok() {
                all = both;
            }
        }
    }
    assert!(taken > 100 && refused > 100, "{taken} taken, {refused} refused");
    // Two that say where swarms run and which agent they have, or nothing would run at all.
    merge(&mut all, json!({"worker": {"agent": "echo"}}));
    for section in ["cluster", "launch_providers", "ssh", "slurm"] {
        all.as_object_mut().unwrap().remove(section);
    }
    fs::write(&file, all.to_string()).unwrap();
    let checked = must(run(&cluster, &["daemon", "router", "--check-config"]));
    assert_eq!(checked.code, 0, "{}{}", checked.stdout, checked.stderr);
    must(cluster.up().await);
    let said = must(ok(&cluster, &["launch", "--nodes", "2", "--prompt", "all the same"]));
    assert!(said.stdout.contains("all the same"), "{}", said.stdout);
    // Joins and ends call the handlers that the configuration names.
    must(ok(&cluster, &["members"]));
    must(ok(&cluster, &["terminate", "last"]));
    must(run(&cluster, &["doctor"]));
    fs::write(cluster.dir().join("prompts.txt"), "one\n").unwrap();
    must(run(&cluster, &["dispatch", "prompts.txt", "--provider", "sim"]));
    assert!(cluster.down().unwrap().success());
    nothing_ran(&cluster);
}

async fn launch(cluster: &Cluster, spec: LaunchSpec, request_id: &str) -> Result<String, ErrorCode> {
    let request = LaunchSwarmRequest { request_id: request_id.to_owned(), spec: Some(spec), ..Default::default() };
    let mut steps = match cluster.router().launch_swarm(request).await {
        Ok(steps) => steps.into_inner(),
        Err(status) => return Err(short(&status)),
    };
    loop {
        match steps.message().await {
            Ok(Some(step)) => {
                if let Some(Step::Launched(swarm)) = step.step {
                    return Ok(swarm.swarm_id);
                }
            }
            Ok(None) => panic!("a launch without an end"),
            Err(status) => return Err(short(&status)),
        }
    }
}

/// The code of a refusal, which does not repeat a mebibyte.
#[track_caller]
fn short(status: &tonic::Status) -> ErrorCode {
    let failure = failure_of(status);
    assert!((1..2000).contains(&failure.message.len()), "{} bytes: {:.300}", failure.message.len(), failure.message);
    failure.code
}

fn shown(value: &str) -> String {
    value.chars().take(60).collect()
}

type Set = fn(&mut LaunchSpec, String);

#[tokio::test(flavor = "multi_thread")]
async fn a_field_of_a_launch_or_a_prompt_is_refused_or_stays_what_it_is() {
    let cluster = must(Cluster::start("worker: {agent: echo}\n").await);
    let values = hostile(cluster.dir());
    let good = || LaunchSpec { node_count: 1, agent: "echo".to_owned(), ..Default::default() };

    // What chooses something is refused when it is nothing that can be chosen.
    let fields: [(&str, Set); 5] = [
        ("agent", |spec, value| spec.agent = value),
        ("provider", |spec, value| spec.provider = value),
        ("skill path", |spec, value| {
            spec.skills = vec![SkillFile { path: format!("{value}/../../{CANARY}"), content: "x".to_owned() }];
        }),
        ("sandbox mode", |spec, value| _ = spec.params.insert("sandbox_mode".to_owned(), value)),
        ("approval policy", |spec, value| _ = spec.params.insert("approval_policy".to_owned(), value)),
    ];
    for (field, set) in fields {
        for value in &values {
            let mut spec = good();
            set(&mut spec, value.clone());
            let refused = launch(&cluster, spec, "").await.expect_err(&format!("{field} {:?}", shown(value)));
            let expected = [ErrorCode::InvalidRequest, ErrorCode::UnknownProvider];
            assert!(expected.contains(&refused), "{field} {:?}: {refused}", shown(value));
        }
    }

    // What is text stays text, whatever it says: all of it at once, and the long one on its own.
    let (long, short_ones) = values.split_last().unwrap();
    for text in [short_ones.join(" and "), long.clone()] {
        let spec = LaunchSpec {
            system_prompt: text.clone(),
            agents_md: text.clone(),
            skills: vec![SkillFile { path: "one/SKILL.md".to_owned(), content: text.clone() }],
            ..good()
        };
        let request_id: String = text.chars().filter(|c| *c != '\0').take(100).collect();
        let swarm =
            launch(&cluster, spec, &request_id).await.unwrap_or_else(|code| panic!("{:?}: {code}", shown(&text)));
        let of_node = below(&cluster.state().path().join("nodes").join(&swarm));
        for name in ["AGENTS.md", "one/SKILL.md"] {
            let file =
                of_node.iter().find(|path| path.ends_with(name)).unwrap_or_else(|| panic!("no {name}: {of_node:?}"));
            assert_eq!(fs::read_to_string(file).unwrap(), text, "{name} of {:?}", shown(&text));
        }
        let request = TerminateSwarmRequest { swarm_id: swarm, force: true, ..Default::default() };
        let mut steps = cluster.router().terminate_swarm(request).await.unwrap().into_inner();
        while steps.message().await.unwrap().is_some() {}
    }

    let swarm = launch(&cluster, good(), "").await.unwrap();
    for value in &values {
        let request = InjectRequest { swarm_id: swarm.clone(), content: value.clone(), ..Default::default() };
        let mut steps = cluster.router().inject(request).await.unwrap().into_inner();
        while steps.message().await.unwrap().is_some() {}
    }
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let answers = loop {
        let request = WatchEventsRequest { swarm_id: swarm.clone(), ..Default::default() };
        let mut stream = cluster.router().watch_events(request).await.unwrap().into_inner();
        let mut answers = Vec::new();
        while let Some(batch) = stream.message().await.unwrap() {
            for event in batch.events.iter().filter(|event| event.event == "assistant") {
                let data: Value = serde_json::from_slice(&event.data).unwrap();
                answers.push(data["content"].as_str().unwrap().to_owned());
            }
        }
        if answers.len() >= values.len() {
            break answers;
        }
        assert!(tokio::time::Instant::now() < deadline, "{} of {} answers", answers.len(), values.len());
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    for (value, answer) in values.iter().zip(&answers) {
        // The agent answers line by line; what ends its lines is a newline.
        assert!(
            answer.trim() == value.trim().replace("\r\n", "\n"),
            "{:?} was answered with {:?}",
            shown(value),
            shown(answer)
        );
    }

    names_that_are_none(&cluster, &swarm, &values).await;
    nothing_ran(&cluster);
    must(ok(&cluster, &["inject", &swarm, "--prompt", "still there"]));
}

/// Hostile names of swarms, injections, approvals and subjects, at every door.
async fn names_that_are_none(cluster: &Cluster, swarm: &str, values: &[String]) {
    let mut router = cluster.router();
    let control = must(cluster.control_addr()).parse().unwrap();
    let mut line = Connection::open(control).await.unwrap();
    for value in values {
        let name = || value.clone();
        let said = router.get_swarm(GetSwarmRequest { swarm_id: name() }).await.unwrap_err();
        assert_eq!(short(&said), ErrorCode::UnknownSwarm, "{:?}", shown(value));
        let request = InjectRequest { swarm_id: name(), content: "x".to_owned(), ..Default::default() };
        assert_eq!(short(&router.inject(request).await.unwrap_err()), ErrorCode::UnknownSwarm);
        let request = InjectRequest {
            swarm_id: swarm.to_owned(),
            nodes: vec![0],
            content: "x".to_owned(),
            injection_id: name(),
            ..Default::default()
        };
        assert_eq!(short(&router.inject(request).await.unwrap_err()), ErrorCode::InvalidRequest, "{:?}", shown(value));
        let request = InterruptRequest { swarm_id: swarm.to_owned(), injection_id: name(), ..Default::default() };
        short(&router.interrupt(request).await.unwrap_err());
        let request = ResolveApprovalRequest { approval_id: name(), decision: name(), ..Default::default() };
        short(&router.resolve_approval(request).await.unwrap_err());
        short(&router.explain(ExplainRequest { subject: name() }).await.unwrap_err());

        for (what, payload) in [
            ("swarm_status", json!({"swarm_id": value})),
            ("swarm_terminate", json!({"swarm_id": value})),
            ("inject", json!({"swarm_id": value, "nodes": 0, "content": "x"})),
            ("inject", json!({"swarm_id": swarm, "nodes": value, "content": "x"})),
            ("approve_execution", json!({"call_id": value, "job_id": value, "approved": true, "decision": value})),
            ("swarm_launch", json!({"nodes": value, "provider": value, "provider_params": {"agent": value}})),
            (value.as_str(), json!({})),
        ] {
            let sent = command(what, &payload);
            line.send(&sent).await.unwrap();
            let id = id_of(&sent);
            let answer = tokio::time::timeout(
                PATIENCE,
                line.find(|event| event["data"]["request_id"] == id && event["event"] == "command_rejected"),
            );
            let answer = answer.await.unwrap_or_else(|_| panic!("{:?}: no answer", shown(what))).unwrap().unwrap();
            assert!(answer["data"]["reason"].as_str().unwrap().len() < 2000, "{:?}", shown(what));
        }
        // The command line, which cannot be given a NUL or a mebibyte.
        if !value.contains('\0') && value.len() < 10_000 {
            let ran = must(run(cluster, &["status", "--", value]));
            assert!(ran.code == 1 || ran.code == 2, "{:?}: {}{}", shown(value), ran.stdout, ran.stderr);
            assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
        }
    }
}
