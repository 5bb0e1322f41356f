//! From nothing to a provider that works: `setup`, `doctor`, the configuration of the founding document, the skill, traces.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::post;
use bytes::Bytes;
use drover_e2e::cli::{Ran, json, json_lines, ok, run};
use drover_e2e::sure::must;
use drover_testkit::cluster::{Cluster, program};
use drover_testkit::codex::{codex_bin, repository_root};
use drover_testkit::mock_llm::{MockLlm, Settings};
use drover_testkit::mock_responses::{MockResponses, codex_config};
use serde_json::Value;

const KEY: &str = "k-e-y-that-must-not-show";
const PATIENCE: Duration = Duration::from_mins(1);

/// An instance in a home of its own, without any configuration of a provider.
fn bare(config: &str) -> Cluster {
    let mut cluster = must(Cluster::prepare(config));
    let home = home(&cluster);
    fs::create_dir_all(&home).unwrap();
    cluster.set_env("HOME", home.clone());
    cluster.set_env("XDG_CONFIG_HOME", home.join(".config"));
    for variable in ["GEMINI_API_KEY", "GROQ_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"] {
        cluster.set_env(variable, "");
    }
    cluster
}

fn home(cluster: &Cluster) -> PathBuf {
    cluster.dir().join("home")
}

fn clawdbot(cluster: &Cluster) -> PathBuf {
    home(cluster).join(".config/clawdbot")
}

/// Runs a command with something on its standard input.
fn with_input(cluster: &Cluster, args: &[&str], input: &str) -> Ran {
    let mut command = cluster.command(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // One that refuses before it reads closes the pipe.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap().into()
}

fn prompts(cluster: &Cluster, count: usize) -> String {
    let path = cluster.dir().join("prompts.txt");
    let lines: Vec<String> = (1..=count).map(|number| format!("prompt number {number}")).collect();
    fs::write(&path, lines.join("\n")).unwrap();
    path.to_str().unwrap().to_owned()
}

fn check<'a>(doctor: &'a Value, name: &str) -> &'a Value {
    let checks = doctor["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no check {name}: {doctor}"))
}

#[test]
fn setup_leads_from_nothing_to_a_provider_that_works_and_shows_no_key() {
    let mock = must(MockLlm::start(Settings { api_key: Some(KEY.to_owned()), ..Settings::default() }));
    let cluster = bare("");
    let mut said = Vec::new();

    // Nothing is configured: that is said, and what to do about it.
    let file = prompts(&cluster, 2);
    let ran = must(ok(&cluster, &["dispatch", &file]));
    assert!(ran.stderr.contains("No configuration found") && ran.stderr.contains("drover setup"), "{}", ran.stderr);
    let doctor = must(json(&cluster, &["doctor", "--json"]));
    assert!(check(&doctor, "dispatching")["hint"].as_str().unwrap().contains("drover setup"), "{doctor}");
    must(ok(&cluster, &["down"]));

    let offered = must(json(&cluster, &["setup", "--list", "--json"]));
    let gemini = &offered["providers"][0];
    assert_eq!(gemini["key_page"], "https://aistudio.google.com/apikey", "{offered}");
    assert!(gemini["model"].is_string() && gemini["key_variable"] == "GEMINI_API_KEY", "{offered}");
    let ran = must(run(&cluster, &["setup", "--json"]));
    assert!(ran.code == 2 && ran.stderr.contains("--list"), "{}", ran.stderr);

    let url = mock.base_url("openai");
    let args = ["setup", "--provider", "openai", "--base-url", &url, "--json"];
    let ran = must(run(&cluster, &args));
    assert_eq!(ran.code, 1, "{}", ran.stdout);
    for part in ["OPENAI_API_KEY", "openai-key.txt", "https://platform.openai.com/api-keys"] {
        assert!(ran.stderr.contains(part), "{part}: {}", ran.stderr);
    }
    let with_key = [&args[..], &["--key-stdin"]].concat();
    let ran = with_input(&cluster, &with_key, "another-k-e-y\n");
    assert!(ran.code == 1 && ran.stderr.contains("nothing was written"), "{}", ran.stderr);
    assert!(!ran.stderr.contains("another-k-e-y"), "{}", ran.stderr);
    assert!(!clawdbot(&cluster).exists(), "nothing was written");

    let ran = with_input(&cluster, &with_key, &format!("{KEY}\n"));
    said.extend([ran.stdout.clone(), ran.stderr.clone()]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let told: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(
        (&told["ok"], &told["provider"], &told["check"]["done"]),
        (&true.into(), &"openai".into(), &true.into())
    );
    assert!((2..=50).contains(&told["limits"]["max_nodes"].as_u64().unwrap()), "{told}");
    assert_eq!(told["cost"]["max_daily_spend"], 5.0, "{told}");
    let config = clawdbot(&cluster).join("node-scaling.yaml");
    assert_eq!(told["config"].as_str(), config.to_str(), "{told}");
    let key_file = clawdbot(&cluster).join("openai-key.txt");
    assert_eq!(fs::metadata(&key_file).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!fs::read_to_string(&config).unwrap().contains(KEY));

    // It is what the dispatcher then works with.
    let results = must(json_lines(&cluster, &["dispatch", &file, "--json"]));
    assert!(results[..2].iter().all(|result| result["provider"] == "openai" && result["status"] == "succeeded"));
    let doctor = must(json(&cluster, &["doctor", "--json"]));
    let detail = |name: &str| check(&doctor, name)["detail"].as_str().unwrap().to_owned();
    assert!(detail("dispatching").contains("node-scaling.yaml"), "{doctor}");
    assert!(detail("provider key").contains("openai-key.txt") && detail("budget").contains("5 USD"), "{doctor}");
    assert!(detail("search").contains("off"), "{doctor}");
    said.push(doctor.to_string());

    // A key that others can read is refused, found by doctor, and closed by it.
    must(ok(&cluster, &["down"]));
    fs::set_permissions(&key_file, fs::Permissions::from_mode(0o644)).unwrap();
    let ran = must(run(&cluster, &["dispatch", &file]));
    said.extend([ran.stdout.clone(), ran.stderr.clone()]);
    assert!(ran.code != 0 && ran.stderr.contains("chmod 600"), "{}", ran.stderr);
    must(ok(&cluster, &["down"]));
    let ran = must(run(&cluster, &["doctor", "--json"]));
    assert!(ran.code == 1 && ran.stdout.contains("others can read"), "{}", ran.stdout);
    must(ok(&cluster, &["doctor", "--fix", "--json"]));
    assert_eq!(fs::metadata(&key_file).unwrap().permissions().mode() & 0o777, 0o600);
    must(ok(&cluster, &["dispatch", &file]));

    // Again it replaces its own file, and no other's without being told to.
    let ran = must(ok(&cluster, &["setup", "--provider", "sim", "--max-nodes", "3", "--json"]));
    assert!(
        ran.stdout.contains("\"simulated\":true") && ran.stdout.contains("\"restart_needed\":true"),
        "{}",
        ran.stdout
    );
    fs::write(&config, "node_scaling: {limits: {max_nodes: 4}}\n").unwrap();
    let ran = must(run(&cluster, &["setup", "--provider", "sim"]));
    assert!(ran.code == 1 && ran.stderr.contains("--force"), "{}", ran.stderr);
    must(ok(&cluster, &["setup", "--provider", "sim", "--force"]));
    assert!(fs::read_to_string(config.with_extension("yaml.bak")).unwrap().contains("max_nodes: 4"));

    let logs = cluster.logs();
    assert!(!said.concat().contains(KEY) && !logs.contains(KEY), "a key is shown");
}

/// The configuration of the founding document as it stands there, with the mock's address added and one line changed.
fn as_documented(mock: &MockLlm, from: &str, to: &str) -> Cluster {
    let text = fs::read_to_string(repository_root().join("configs/node-scaling.yaml")).unwrap();
    let name = "    name: gemini               # Your chosen provider\n";
    assert!(text.contains(name) && text.contains(from), "{text}");
    let text = text.replace(name, &format!("{name}    base_url: \"{}\"\n", mock.base_url("gemini")));
    let text = text.replace(from, to);
    let mut cluster = bare("");
    fs::create_dir_all(clawdbot(&cluster)).unwrap();
    fs::write(clawdbot(&cluster).join("node-scaling.yaml"), text).unwrap();
    cluster.set_env("GEMINI_API_KEY", KEY);
    cluster
}

/// Tasks of each try.
const TASKS: usize = 16;

#[test]
fn every_key_of_the_founding_documents_configuration_acts() {
    let settings = || Settings {
        api_key: Some(KEY.to_owned()),
        // Long enough that calls are seen beside each other on a machine that stalls.
        latency_ms: 300.0,
        output_tokens: Some(1000),
        input_price: 100_000,
        output_price: 400_000,
        ..Settings::default()
    };
    let try_with = |from: &str, to: &str| {
        let mock = must(MockLlm::start(settings()));
        let cluster = as_documented(&mock, from, to);
        let file = prompts(&cluster, TASKS);
        let ran = must(run(&cluster, &["dispatch", &file, "--json"]));
        let mut results: Vec<Value> = ran.stdout.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        results.pop();
        let answered = results.iter().filter(|result| result["status"] == "succeeded").count();
        (mock.ledger(), results, answered, ran.stderr)
    };
    // As it stands: gemini's format, its key, its model, five at once.
    let (ledger, results, answered, said) = try_with("enabled: true", "enabled: true");
    assert_eq!((answered, ledger.refused), (TASKS, 0), "{said}");
    assert!((4..=5).contains(&ledger.max_in_flight), "max_concurrent_api: {ledger:?}");
    assert_eq!((&results[0]["provider"], &results[0]["model"]), (&"gemini".into(), &"gemini-2.0-flash".into()));

    let (ledger, .., said) = try_with("enabled: true", "enabled: false");
    assert!(ledger.calls == 0 && said.contains("node_scaling.enabled"), "{said}");
    let (ledger, _, answered, _) = try_with("max_nodes: 10 ", "max_nodes: 2 ");
    assert!(answered == TASKS && ledger.max_in_flight <= 2, "max_nodes: {ledger:?}");
    let (ledger, _, answered, _) = try_with("max_concurrent_api: 5", "max_concurrent_api: 3");
    assert!(answered == TASKS && ledger.max_in_flight <= 3, "max_concurrent_api: {ledger:?}");
    let (_, results, ..) = try_with("model: gemini-2.0-flash", "model: gemini-2.5-flash");
    assert_eq!(results[0]["model"], "gemini-2.5-flash");
    let (ledger, .., said) = try_with("api_key_env: GEMINI_API_KEY", "api_key_env: ANOTHER_KEY");
    assert!(ledger.calls == 0 && said.contains("ANOTHER_KEY"), "{said}");
    // Twelve answers of a thousand tokens are in it.
    let (ledger, results, answered, said) = try_with("max_daily_spend: 5.00", "max_daily_spend: 0.005");
    assert!(ledger.spent_pico <= 5_000_000_000 && (1..TASKS).contains(&answered), "{ledger:?}");
    let refused = results.iter().filter(|result| result["status"] == "refused");
    assert!(refused.count() > 0 && said.contains("budget"), "{said}");
    // Another name is another provider, which has no such model at a price that is known.
    let (ledger, results, ..) = try_with("name: gemini  ", "name: anthropic  ");
    assert!(ledger.calls == 0 && results[0]["error"].as_str().unwrap().contains("price"), "{results:?}");
}

/// The commands of the fenced blocks of a page.
fn blocks(page: &str) -> Vec<String> {
    let parts: Vec<&str> = page.split("```").collect();
    let blocks = parts.chunks(2).filter_map(|pair| pair.get(1)?.strip_prefix("bash\n"));
    // Tests stay on this machine: the page is one that is refused.
    blocks.map(|block| block.replace("https://example.org/", "http://127.0.0.1:1/")).collect()
}

/// The skill as it was installed, and a PATH on which its program is.
fn installed_skill(cluster: &Cluster, to: &str) -> (String, String) {
    let told = must(json(cluster, &["skill", "install", "--to", to, "--json"]));
    let path = told["written"][0].as_str().unwrap().to_owned();
    assert!(path.ends_with("/drover/SKILL.md"), "{told}");
    let drover = must(program("drover"));
    let path_variable = format!("{}:/usr/local/bin:/usr/bin:/bin", drover.parent().unwrap().display());
    (fs::read_to_string(path).unwrap(), path_variable)
}

#[test]
fn every_command_of_the_skill_does_what_the_skill_says() {
    let cluster = bare("");
    let to = home(&cluster).join("skills");
    let (skill, path) = installed_skill(&cluster, to.to_str().unwrap());
    let blocks = blocks(&skill);
    assert!(blocks.len() >= 5, "{blocks:?}");
    let mut outputs = Vec::new();
    for (number, block) in blocks.iter().enumerate() {
        let script = cluster.dir().join(format!("block-{number}.sh"));
        fs::write(&script, format!("set -euo pipefail\n{block}")).unwrap();
        let mut command = cluster.command(&[]);
        let environment: Vec<_> =
            command.get_envs().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned()))).collect();
        command = Command::new("bash");
        command.arg(script).envs(environment).env("PATH", &path).current_dir(cluster.dir()).stdin(Stdio::null());
        let ran: Ran = command.output().unwrap().into();
        assert_eq!(ran.code, 0, "{block}\n{}{}\n{}", ran.stdout, ran.stderr, cluster.logs());
        for line in ran.stdout.lines() {
            serde_json::from_str::<Value>(line).unwrap_or_else(|error| panic!("{error}: {line}\nof {block}"));
        }
        outputs.push(ran.stdout);
    }
    let results = fs::read_to_string(cluster.dir().join("results.jsonl")).unwrap();
    let results: Vec<Value> = results.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(results.len(), 4);
    assert!(results[..3].iter().all(|result| result["status"] == "succeeded" && result["simulated"] == true));
    let shape: Value = serde_json::from_str(results[2]["output"].as_str().unwrap()).unwrap();
    assert!(shape["kilograms"].is_number(), "{shape}");
    // Fields that the page speaks of are there.
    let of = |command: &str| {
        let at = blocks.iter().position(|block| block.contains(command)).unwrap_or_else(|| panic!("no {command}"));
        outputs[at].clone()
    };
    for (command, field) in [
        ("drover doctor", "\"checks\":"),
        ("--resume", "\"resumed\":true"),
        ("drover research", "\"grounded\":false"),
        ("drover ask", "\"worst_case_usd\":"),
        ("drover ask", "\"answer\":"),
        ("drover fetch", "\"ok\":"),
        ("drover spend", "\"today\":"),
    ] {
        assert!(of(command).contains(field), "{command}: {}", of(command));
    }
}

/// The real Codex finds the skill where it was installed, and does what stands in it.
#[test]
fn a_real_agent_follows_the_skill() {
    let Some(codex) = codex_bin() else { return };
    let mock = must(MockResponses::start());
    let cluster = bare("");
    let codex_home = home(&cluster).join(".codex");
    fs::create_dir_all(&codex_home).unwrap();
    fs::write(codex_home.join("config.toml"), codex_config(&mock.base_url(), "mock-model")).unwrap();
    let to = codex_home.join("skills");
    let (skill, path) = installed_skill(&cluster, to.to_str().unwrap());
    // What the model would choose to do with the page, played by the mock: the blocks, one after another.
    let mut prompt = "Use the drover skill.".to_owned();
    let wanted = ["drover dispatch tasks.jsonl --provider sim", "--resume", "drover research", "drover spend"];
    let chosen: Vec<String> =
        blocks(&skill).into_iter().filter(|block| wanted.iter().any(|part| block.contains(part))).collect();
    assert_eq!(chosen.len(), wanted.len(), "{chosen:?}");
    for (number, block) in chosen.iter().enumerate() {
        let script = cluster.dir().join(format!("step-{number}.sh"));
        // A login shell may have set it back.
        let marked = format!("set -euo pipefail\nexport PATH='{path}'\n{block}\ntouch done-{number}\n");
        fs::write(&script, marked).unwrap();
        let _ = write!(prompt, "\n@mock run='bash {}'", script.display());
    }
    prompt.push_str("\n@mock say='all of it is done'");
    let mut command = cluster.command(&[]);
    let environment: Vec<_> =
        command.get_envs().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned()))).collect();
    command = Command::new(codex);
    command
        .args(["exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", &prompt])
        .envs(environment)
        .env("PATH", &path)
        .env("CODEX_HOME", &codex_home)
        .env("MOCK_API_KEY", "unused")
        .current_dir(cluster.dir())
        .stdin(Stdio::null());
    let ran: Ran = command.output().unwrap().into();
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
    for (number, block) in chosen.iter().enumerate() {
        let done = cluster.dir().join(format!("done-{number}"));
        assert!(done.is_file(), "{block}\n{}{}", ran.stdout, ran.stderr);
    }
    let results = fs::read_to_string(cluster.dir().join("results.jsonl")).unwrap();
    assert_eq!(results.lines().count(), 4, "{results}");
    // The agent was told of the skill by its own means: what it may use is in what it sends to the model.
    let description = skill.lines().find_map(|line| line.strip_prefix("description: ")).unwrap();
    let beginning: String = description.chars().take(40).collect();
    let told = mock.requests().iter().any(|request| request.to_string().contains(&beginning));
    assert!(told, "codex does not speak of the skill");
}

/// A collector of traces: keeps each export as it came over the wire.
fn collect_traces(dir: &std::path::Path) -> (drover_service::Context, String, tokio::sync::mpsc::Receiver<Bytes>) {
    let (exports_in, exports) = tokio::sync::mpsc::channel(64);
    let take = move |export: Bytes| {
        let exports = exports_in.clone();
        async move {
            let _ = exports.send(export).await;
            ([("content-type", "application/grpc"), ("grpc-status", "0")], "")
        }
    };
    let ctx = drover_service::Context::for_test("collector", dir);
    let any = "127.0.0.1:0".parse().unwrap();
    let listener = must(ctx.bind("the collector", Some(any), any));
    let routes = Router::new().route("/opentelemetry.proto.collector.trace.v1.TraceService/Export", post(take));
    let address = must(drover_service::Server::new(&ctx).http(routes).serve(listener));
    (ctx, address.to_string(), exports)
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_are_exported_by_the_names_of_the_convention_without_a_word_of_theirs() {
    let dir = tempfile::tempdir().unwrap();
    let (collector, endpoint, mut exports) = collect_traces(dir.path());
    let mock = must(MockLlm::start(Settings {
        api_key: Some(KEY.to_owned()),
        answer: Some("planted-answer".into()),
        ..Settings::default()
    }));
    let mut cluster = must(Cluster::prepare(&format!(
        "telemetry: {{otlp_endpoint: 'http://{endpoint}'}}\nnode_scaling:\n  listen: 127.0.0.1:0\n  \
         cost: {{allow_unknown_prices: true}}\n  provider: {{name: openai, model: planted-model, base_url: \"{}\"}}\n",
        mock.base_url("openai")
    )));
    cluster.set_env("OPENAI_API_KEY", KEY);
    let file = cluster.dir().join("one.txt");
    fs::write(&file, "planted-prompt\n").unwrap();
    must(ok(&cluster, &["dispatch", file.to_str().unwrap()]));
    let mut seen = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    let holds = |seen: &[u8], part: &str| seen.windows(part.len()).any(|window| window == part.as_bytes());
    while !holds(&seen, "gen_ai.usage.output_tokens") {
        let wait = deadline.saturating_duration_since(Instant::now());
        let export = tokio::time::timeout(wait, exports.recv()).await.ok().flatten();
        seen.extend_from_slice(&export.unwrap_or_else(|| panic!("no trace of the call came: {}", cluster.logs())));
    }
    for name in [
        "chat planted-model",
        "gen_ai.operation.name",
        "gen_ai.provider.name",
        "gen_ai.request.model",
        "gen_ai.request.max_tokens",
        "gen_ai.response.finish_reasons",
        "gen_ai.usage.input_tokens",
    ] {
        assert!(holds(&seen, name), "{name}");
    }
    for planted in ["planted-prompt", "planted-answer", KEY] {
        assert!(!holds(&seen, planted), "{planted} is exported");
    }
    collector.shutdown().cancel();
}
