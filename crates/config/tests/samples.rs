//! Good files load and mean one thing; wrong ones are refused with the place and the reason.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use drover_config::{Config, Env, ProviderConfig, Source};

fn here(part: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(part)
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    files
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

fn read(path: &Path) -> Result<(Config, Vec<String>), String> {
    let text = fs::read_to_string(path).unwrap();
    Config::from_text(&name(path), &text, &BTreeMap::new()).map_err(|error| error.to_string())
}

#[test]
fn every_shipped_file_loads() {
    let shipped = here("../../configs");
    for wanted in ["local.yaml", "hpcfund.json", "swarm.json", "node-scaling.yaml"] {
        assert!(shipped.join(wanted).exists(), "configs/{wanted} is missing");
    }
    for file in files(&shipped) {
        read(&file).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn the_swarm_example_is_read_as_written() {
    let (config, warnings) = read(&here("../../configs/swarm.json")).unwrap();
    let swarm = config.swarm.unwrap();
    assert!(swarm.enabled);
    assert_eq!(swarm.node_id.as_deref(), Some("picoclaw-node-1"));
    assert_eq!(swarm.discovery.join_addrs, ["127.0.0.1:7946"]);
    assert_eq!(swarm.discovery.push_pull_interval.get().as_secs(), 30, "a bare number is seconds");
    assert_eq!((swarm.handoff.max_retries, swarm.rpc.port, swarm.load_monitor.sample_size), (3, 7947, 60));
    assert_eq!(warnings, [""; 0]);
}

#[test]
fn the_node_scaling_example_is_read_as_written() {
    let (config, warnings) = read(&here("../../configs/node-scaling.yaml")).unwrap();
    let scaling = config.node_scaling.unwrap();
    assert_eq!((scaling.limits.max_nodes, scaling.limits.max_concurrent_api), (10, 5));
    assert_eq!(scaling.provider.api_key_env.as_deref(), Some("GEMINI_API_KEY"));
    assert_eq!(scaling.cost.max_daily_spend, Some(5.0));
    assert_eq!(warnings, [""; 0]);
}

/// Keys that its own program wrote into the file and never read. Here they are not passed over in silence.
#[test]
fn keys_of_the_older_setup_that_do_nothing_are_named() {
    let text = "node_scaling:\n  limits: {max_nodes: 7}\n  routing:\n    auto_scale_threshold: 3\n    \
                enabled_task_types: [research]\n    pro_model: x\n  web_search: {enabled: true, parallel_default: false}\n";
    let (config, warnings) = Config::from_text("node-scaling.yaml", text, &BTreeMap::new()).unwrap();
    assert_eq!(config.node_scaling.unwrap().limits.max_nodes, 7);
    for key in ["node_scaling.routing", "node_scaling.web_search"] {
        let told = warnings.iter().any(|warning| warning.contains(&format!("{key} has no effect")));
        assert!(told, "{key}: {warnings:?}");
    }
}

#[test]
fn existing_files_load_unchanged_and_mean_one_thing() {
    let mut seen = String::new();
    for file in files(&here("tests/samples/good")) {
        let (config, warnings) = read(&file).unwrap_or_else(|error| panic!("{error}"));
        let _ = writeln!(seen, "==== {}", name(&file));
        for warning in warnings {
            let _ = writeln!(seen, "{warning}");
        }
        for provider in config.providers() {
            let ProviderConfig { id, label, provider_ref, defaults, login_host, hosts, disabled_reason, .. } =
                &provider;
            let (mailbox, agent) = (provider.mailbox_root(Path::new("/state")), provider.agent);
            let fields: Vec<String> =
                provider.launch_fields.iter().map(|field| format!("{}={}", field.key, field.default)).collect();
            let _ =
                writeln!(seen, "- {id} ({label}): {provider_ref} agent={agent:?} login={login_host:?} hosts={hosts:?}");
            let _ = writeln!(seen, "  disabled={disabled_reason:?} mailbox={}", mailbox.display());
            let _ = writeln!(seen, "  defaults={defaults:?}\n  form={fields:?}");
        }
    }
    insta::assert_snapshot!("good", seen);
}

#[test]
fn wrong_files_are_refused_with_place_and_reason() {
    let mut seen = String::new();
    for file in files(&here("tests/samples/bad")) {
        match read(&file) {
            Ok(_) => panic!("{} was accepted", file.display()),
            Err(message) => {
                for line in message.lines() {
                    assert!(line.starts_with(&format!("{}:", name(&file))), "no place: {line}");
                    let _ = writeln!(seen, "{line}");
                }
            }
        }
    }
    insta::assert_snapshot!("bad", seen);
}

#[test]
fn everything_that_is_wrong_is_told_at_once() {
    let places = |text: &str| -> Vec<(u64, u64)> {
        let error = Config::from_text("f.yaml", text, &BTreeMap::new()).unwrap_err();
        error.faults.iter().filter_map(|fault| fault.position).collect()
    };
    // A section that is a word, a list for a word, a word of two that is none, a rule that only whole values can break.
    let text =
        "router: yes\nworker:\n  agent: [a, b]\n  max_restarts: many\nfollower:\n  segment_bytes: 1\nnosuch: 1\n";
    assert_eq!(places(text), [(1, 9), (3, 10), (4, 17), (6, 3), (7, 1)]);
    // What cannot be read is not said to be missing as well.
    assert_eq!(places("cluster:\n  hosts: [n1]\n  workspace_root: [x]\n"), [(3, 19)]);
    // The first key of a section stands where the section does.
    assert_eq!(places("worker:\n  codex_bin:\n    a: 1\n    b: 2\n  max_restarts: x\n"), [(3, 5), (5, 17)]);
    let many: String = (0..1000).fold(String::new(), |text, n| text + &format!("key{n}: 1\n"));
    assert_eq!(places(&many).len(), 32);
}

#[test]
fn what_is_shown_loads_again_and_is_the_same() {
    for file in files(&here("tests/samples/good")).into_iter().chain(files(&here("../../configs"))) {
        let (config, _) = read(&file).unwrap();
        let shown = config.dump();
        let (again, warnings) = Config::from_text("shown", &shown, &BTreeMap::new())
            .unwrap_or_else(|error| panic!("{}: {error}\n{shown}", file.display()));
        assert_eq!(again, config, "{}", file.display());
        assert!(warnings.iter().all(|line| line.contains("section ")), "{warnings:?}");
    }
}

#[test]
fn secrets_are_not_shown() {
    let text = "worker:\n  codex_args: [-c, 'model_providers.x.api_key=sk-inline']\n\
                launch_providers:\n- {backend: local, defaults: {github_token: ghp-inline}}\n\
                telemetry: {otlp_endpoint: 'http://me:pw-inline@127.0.0.1:4317'}\n";
    let (config, _) = Config::from_text("x", text, &BTreeMap::new()).unwrap();
    let shown = config.dump();
    assert!(!shown.contains("inline"), "{shown}");
    assert!(shown.contains("OPENAI_API_KEY"), "names of variables are no secrets: {shown}");
}

struct Home {
    dir: tempfile::TempDir,
    env: Env,
}

/// A user with nothing in it: current directory, home and system directory below one temporary directory.
fn home() -> Home {
    let dir = tempfile::tempdir().unwrap();
    for part in ["cwd", "home/.config/drover", "xdg/drover", "etc/drover"] {
        fs::create_dir_all(dir.path().join(part)).unwrap();
    }
    let mut env = Env::of_process();
    env.cwd = dir.path().join("cwd");
    env.system = dir.path().join("etc");
    env.vars = BTreeMap::from([("HOME".to_owned(), dir.path().join("home").to_str().unwrap().to_owned())]);
    Home { dir, env }
}

impl Home {
    fn write(&self, path: &str, keep_events: u64) -> PathBuf {
        let path = self.dir.path().join(path);
        fs::write(&path, format!("router: {{keep_events: {keep_events}}}\n")).unwrap();
        path
    }

    fn loads(&self, explicit: Option<&Path>) -> (u64, Source) {
        let loaded = Config::load(explicit, &self.env).unwrap();
        (loaded.config.router.keep_events, loaded.source)
    }
}

#[test]
fn the_nearest_file_wins() {
    let mut home = home();
    let default = Config::default().router.keep_events;
    assert_eq!(home.loads(None), (default, Source::BuiltIn));
    let system = home.write("etc/drover/drover.yaml", 1);
    assert_eq!(home.loads(None), (1, Source::File(system)));
    let user = home.write("home/.config/drover/drover.yaml", 2);
    assert_eq!(home.loads(None), (2, Source::File(user)));
    let xdg = home.write("xdg/drover/drover.yaml", 3);
    home.env.vars.insert("XDG_CONFIG_HOME".into(), home.dir.path().join("xdg").to_str().unwrap().into());
    assert_eq!(home.loads(None), (3, Source::File(xdg)));
    let near = home.write("cwd/drover.yaml", 4);
    assert_eq!(home.loads(None), (4, Source::File(near)));
    let given = home.write("cwd/given.yaml", 5);
    assert_eq!(home.loads(Some(Path::new("given.yaml"))), (5, Source::File(given)));
    let error = Config::load(Some(Path::new("missing.yaml")), &home.env).unwrap_err().to_string();
    assert!(error.starts_with("missing.yaml: no such file"), "{error}");
}

#[test]
fn a_drover_yaml_of_another_user_is_refused() {
    let mut home = home();
    let path = home.write("cwd/drover.yaml", 4);
    let owner = home.env.uid;
    home.env.uid = owner + 1;
    let error = Config::load(None, &home.env).unwrap_err().to_string();
    let expected = format!("./drover.yaml: belongs to user {owner}, not to you ({}); ", owner + 1);
    assert!(error.starts_with(&expected), "{error}");
    assert_eq!(home.loads(Some(&path)).0, 4, "named on the command line it is trusted");
}

#[test]
fn what_is_no_text_is_refused_in_one_line() {
    let home = home();
    let path = home.dir.path().join("cwd/bad.yaml");
    fs::write(&path, b"router:\n  \xff\n").unwrap();
    let error = Config::load(Some(Path::new("bad.yaml")), &home.env).unwrap_err().to_string();
    assert_eq!(error, "bad.yaml:2:3: is not UTF-8 text");
    let error = Config::load(Some(Path::new("/dev/zero")), &home.env).unwrap_err().to_string();
    assert_eq!(error, "/dev/zero: is longer than 4 MiB and cannot be a configuration");
    let error = Config::load(Some(Path::new(".")), &home.env).unwrap_err().to_string();
    assert!(error.starts_with(".: cannot be read: "), "{error}");
}

fn with_env(text: &str, vars: &[(&str, &str)]) -> Result<Config, String> {
    let vars = vars.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Config::from_text("file.yaml", text, &vars).map(|(config, _)| config).map_err(|error| error.to_string())
}

#[test]
fn the_environment_wins_over_the_file() {
    let config = with_env(
        "router: {listen: '127.0.0.1:1', keep_events: 7}\nworker: {codex_args: [a]}\n",
        &[
            ("DROVER_ROUTER__LISTEN", "127.0.0.1:0"),
            ("DROVER_ROUTER__LAUNCH_SOFT_TIMEOUT", "2"),
            ("DROVER_WORKER__AGENT", "echo"),
            ("DROVER_WORKER__AUTO_APPROVE", "true"),
            ("DROVER_WORKER__CODEX_ARGS", "-c, model=\"o5\""),
            ("DROVER_WORKER__AGENT_ENV", "[A, B]"),
            ("DROVER_SECURITY__ALLOW_UIDS", "1001,1002"),
            ("DROVER_CLUSTER__SLURM__ACCOUNT", "007"),
            ("DROVER_CLUSTER__SLURM__PROFILES__GPU__LOGIN_HOST", "login9"),
            ("DROVER_CLUSTER__BACKEND", "local"),
            ("DROVER_TELEMETRY__OTLP_ENDPOINT", ""),
            ("DROVER_LOG", "debug"),
            ("DROVER_STATE_DIR", "/x"),
            ("UNRELATED__LISTEN", "x"),
        ],
    )
    .unwrap();
    assert_eq!(config.router.listen.unwrap().port(), 0);
    assert_eq!((config.router.keep_events, config.router.launch_soft_timeout.get().as_secs()), (7, 2));
    assert_eq!(config.worker.agent.as_str(), "echo");
    assert!(config.worker.auto_approve);
    assert_eq!(config.worker.codex_args, ["-c", "model=\"o5\""]);
    assert_eq!(config.worker.agent_env, ["A", "B"]);
    assert_eq!(config.security.allow_uids, [1001, 1002]);
    assert_eq!(config.cluster.slurm.account.as_deref(), Some("007"));
    assert_eq!(config.cluster.slurm.profiles.0["gpu"].login_host.as_deref(), Some("login9"));
    assert_eq!(config.telemetry.otlp_endpoint, None);
}

#[test]
fn a_wrong_variable_is_named() {
    for (variable, value, expected) in [
        ("DROVER_ROUTER__LISTEN", "here", "invalid address \"here\", expected one such as 127.0.0.1:7950"),
        ("DROVER_ROUTER__LISTN", "x", "unknown field \"listn\""),
        ("DROVER_ROTER__LISTEN", "x", "unknown field \"roter\""),
        ("DROVER_ROUTER__KEEP_EVENTS", "many", "expected a whole number from 0, got \"many\""),
        ("DROVER_ROUTER__KEEP_EVENTS", "0", "router.keep_events must be at least 1"),
        ("DROVER_ROUTER__LISTEN__PORT", "1", "a part of this key is no section of the file"),
        ("DROVER_SECURITY__ALLOW_UIDS", "1,x", "expected a whole number from 0, got \"x\""),
    ] {
        let error = with_env("router: {listen: '127.0.0.1:1'}", &[(variable, value)]).unwrap_err();
        assert!(error.starts_with(&format!("{variable}: {expected}")), "{error}");
    }
}
