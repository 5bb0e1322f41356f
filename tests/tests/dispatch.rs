//! The dispatcher as its user meets it: nothing lost, nothing paid twice, never above the cap. The judge of money is the mock
//! provider's own ledger.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use drover_e2e::cli::{json, json_lines, ok, run};
use drover_e2e::sure::must;
use drover_service::address_book;
use drover_service::process::{self, ProcessId};
use drover_testkit::cluster::{Cluster, signal};
use drover_testkit::mock_llm::{MockLlm, Settings};
use rustix::process::Signal;
use serde_json::Value;

/// How long anything may take before a test gives up.
const PATIENCE: Duration = Duration::from_mins(1);
const DISPATCHER: &str = "llm-dispatcher";

/// Asks until there is an answer.
fn until<T>(what: &str, mut ask: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match ask() {
            Ok(answer) => return answer,
            Err(instead) => assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}, but {instead}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// An instance whose dispatcher asks this mock. `more` is further YAML of `node_scaling`.
fn asking(mock: &MockLlm, width: u32, more: &str) -> Cluster {
    let url = mock.base_url("openai");
    let config = format!(
        "model_pricing: {{m: {{input_tokens_usd_per_m: 1.0, output_tokens_usd_per_m: 2.0}}}}\n\
         node_scaling:\n  listen: 127.0.0.1:0\n  provider: {{name: mock, model: m, base_url: \"{url}\", max_tokens: 64}}\n  \
         limits:\n    max_nodes: {width}\n    max_concurrent_api: {width}\n{more}"
    );
    must(Cluster::prepare(&config))
}

/// A mock with the prices of [`asking`].
fn mock(settings: Settings) -> MockLlm {
    must(MockLlm::start(Settings { input_price: 1_000_000, output_price: 2_000_000, ..settings }))
}

/// A file of so many different prompts; gives its path.
fn prompts(cluster: &Cluster, count: usize) -> String {
    let mut text = String::new();
    for number in 1..=count {
        let _ = writeln!(text, "prompt number {number}");
    }
    let path = cluster.dir().join("prompts.txt");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A command whose output goes into files, so that it can be killed around.
struct Running {
    child: Child,
    out: std::path::PathBuf,
    err: std::path::PathBuf,
}

impl Running {
    fn start(cluster: &Cluster, args: &[&str]) -> Self {
        let (out, err) = (cluster.dir().join("out"), cluster.dir().join("err"));
        let mut command = cluster.command(args);
        command.stdin(Stdio::null()).stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
        Self { child: command.spawn().unwrap(), out, err }
    }

    /// Waits for its end; gives its exit code.
    fn wait(&mut self) -> i32 {
        until("the command ends", || match self.child.try_wait().unwrap() {
            Some(status) => Ok(status.code().unwrap_or(-1)),
            None => Err("it runs".to_owned()),
        })
    }

    fn stderr(&self) -> String {
        fs::read_to_string(&self.err).unwrap()
    }

    fn lines(&self) -> Vec<Value> {
        let text = fs::read_to_string(&self.out).unwrap();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}

/// Kills the dispatcher as a crash would.
fn crash(cluster: &Cluster) {
    let id: ProcessId =
        until("the dispatcher runs", || cluster.daemon(DISPATCHER).ok_or_else(|| "not there".to_owned()));
    signal(id.pid, Signal::KILL).unwrap();
    until("it is gone", || if process::is_alive(&id) { Err("it lives".to_owned()) } else { Ok(()) });
}

/// Results without the summary, and the summary.
fn split(mut lines: Vec<Value>) -> (Vec<Value>, Value) {
    let last = lines.pop().unwrap_or_default();
    (lines, last["summary"].clone())
}

fn ids(results: &[Value]) -> Vec<String> {
    results.iter().map(|result| result["id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn without_a_configuration_answers_are_simulated_labelled_and_in_order() {
    let cluster = must(Cluster::prepare(""));
    let file = cluster.dir().join("tasks.jsonl");
    let mut text = String::new();
    for number in 1..=9 {
        let _ = writeln!(text, "{{\"id\": \"t{number}\", \"prompt\": \"task {number}\", \"of_no_use\": [1]}}");
    }
    text.push_str("a plain prompt\n{\"prompt\": 7}\n");
    fs::write(&file, text).unwrap();

    let ran = must(run(&cluster, &["dispatch", file.to_str().unwrap(), "--json"]));
    assert_eq!(ran.code, 1, "one line is no task: {}", ran.stderr);
    assert!(ran.stderr.contains("No configuration found") && ran.stderr.contains("node_scaling"), "{}", ran.stderr);
    let lines: Vec<Value> = ran.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (results, summary) = split(lines);
    let expected: Vec<String> = (1..=9).map(|n| format!("t{n}")).chain(["10".into(), "11".into()]).collect();
    assert_eq!(ids(&results), expected);
    for result in &results[..10] {
        assert_eq!((&result["status"], &result["provider"]), (&"succeeded".into(), &"sim".into()), "{result}");
        assert!(result["output"].as_str().unwrap().contains("[simulated]") && result["simulated"] == true, "{result}");
        assert!(result["started_ms"].as_u64().unwrap() <= result["ended_ms"].as_u64().unwrap(), "{result}");
        assert_eq!((&result["attempts"], result["cost_usd"].as_f64()), (&1.into(), Some(0.0)), "{result}");
    }
    assert_eq!(results[10]["status"], "refused");
    assert!(results[10]["error"].as_str().unwrap().starts_with("line 11 "), "{}", results[10]);
    let count = |key: &str| summary[key].as_u64().unwrap();
    assert_eq!((count("tasks"), count("succeeded"), count("failed"), count("calls")), (11, 10, 1, 10));
    let (speedup, widest) = (summary["speedup"].as_f64().unwrap(), count("widest"));
    assert!(widest <= 5 && speedup > 1.0 && speedup <= widest as f64, "{summary}");

    let ran = must(run(&cluster, &["dispatch", file.to_str().unwrap(), "--provider", "gemini"]));
    assert!(
        ran.code == 1 && ran.stderr.contains("not configured") && ran.stderr.contains("node_scaling"),
        "{}",
        ran.stderr
    );
}

#[test]
fn after_a_crash_a_resumed_run_pays_for_no_finished_task_again() {
    const TASKS: usize = 2000;
    const WIDTH: u32 = 32;
    let mock = mock(Settings { latency_ms: 10.0, jitter: 0.5, ..Settings::default() });
    // A hedge that comes second is a second answer too, and not what is judged here.
    let cluster = asking(&mock, WIDTH, "    hedge: false\n");
    let file = prompts(&cluster, TASKS);

    let mut first = Running::start(&cluster, &["dispatch", &file, "--run", "big", "--unordered", "--json"]);
    until("a third is answered", || match mock.ledger().answered {
        answered if answered > TASKS as u64 / 3 => Ok(()),
        answered => Err(format!("{answered} are; {}", first.stderr())),
    });
    crash(&cluster);
    assert_eq!(first.wait(), 69, "{}", first.stderr());
    assert!(first.stderr().contains("--resume big"), "{}", first.stderr());
    let seen: BTreeSet<String> = ids(&first.lines()).into_iter().collect();
    assert!(seen.len() > 50 && seen.len() < TASKS, "{} results came before the crash", seen.len());
    let answered_before = until("its calls are gone", || match mock.ledger() {
        ledger if ledger.in_flight == 0 => Ok(ledger.answered),
        ledger => Err(format!("{ledger:?}")),
    });

    let (results, summary) = split(must(json_lines(&cluster, &["dispatch", "--resume", "big", "--json"])));
    let expected: Vec<String> = (1..=TASKS).map(|number| number.to_string()).collect();
    assert_eq!(ids(&results), expected, "every task has one result, in order");
    assert!(results.iter().all(|result| result["status"] == "succeeded"), "{summary}");
    let resumed = results.iter().filter(|result| result["resumed"] == true);
    let resumed: BTreeSet<String> = resumed.map(|result| result["id"].as_str().unwrap().to_owned()).collect();
    assert!(seen.is_subset(&resumed), "a result that was seen was paid for again");
    assert_eq!(summary["resumed"].as_u64(), Some(resumed.len() as u64));

    // What had been kept was answered once; only answers on their way to be kept, which are no more than are handed in at a
    // time, were made again.
    let ledger = mock.ledger();
    for number in &resumed {
        assert_eq!(mock.answers_to(&format!("prompt number {number}")), 1, "task {number} was finished");
    }
    let unkept = answered_before - resumed.len() as u64;
    assert!(ledger.answered_again <= unkept && unkept <= 8 * u64::from(WIDTH), "{unkept} not kept, {ledger:?}");
    assert_eq!(ledger.answered, TASKS as u64 + ledger.answered_again, "{ledger:?}");
    // A whole run costs nothing at all when it is resumed once more.
    let again = must(json_lines(&cluster, &["dispatch", &file, "--resume", "big", "--json"]));
    assert_eq!(again.len(), TASKS + 1);
    assert_eq!(mock.ledger().calls, ledger.calls);
}

#[test]
fn spending_never_goes_above_max_daily_spend_over_crashes_and_nearly_all_of_it_can_be_used() {
    let mock = mock(Settings { latency_ms: 5.0, output_tokens: Some(20), ..Settings::default() });
    let cap = 0.05;
    let cluster = asking(&mock, 6, "  cost: {max_daily_spend: 0.05, warn_at: 0.5}\n");
    let file = prompts(&cluster, 5000);
    let spent = || mock.ledger().spent_pico as f64 / 1e12;

    for round in 1..=3 {
        let mark = cap * 0.15 * f64::from(round);
        let run = format!("round-{round}");
        let mut running = Running::start(&cluster, &["dispatch", &file, "--run", &run, "--json"]);
        until("some money is spent", || {
            if spent() > mark { Ok(()) } else { Err(format!("{} {}", spent(), running.stderr())) }
        });
        crash(&cluster);
        assert_eq!(running.wait(), 69);
        assert!(spent() <= cap, "{} of {cap}", spent());
    }
    let ran = must(run(&cluster, &["dispatch", &file, "--run", "last", "--json"]));
    assert_eq!(ran.code, 1, "{}", ran.stderr);
    assert!(spent() <= cap, "{} of {cap}", spent());
    // Three crashes, and hedges that are counted at their worst case though answers are short: how much of a cap one crash
    // leaves is judged in `dispatch_chaos`, with answers as long as they may be.
    assert!(spent() >= cap * 0.6, "only {} of {cap} could be used", spent());
    assert!(ran.stdout.contains("max_daily_spend") && ran.stderr.contains("budget"), "{}", ran.stderr);

    let told = must(json(&cluster, &["spend", "--json"]));
    let counted = told["counted_usd"].as_f64().unwrap();
    assert!(counted >= spent() - 1e-9 && counted <= cap + 1e-9, "{told} but {}", spent());
    assert!((told["cap_usd"].as_f64().unwrap() - cap).abs() < 1e-9, "{told}");
    let notes = must(run(&cluster, &["spend"]));
    assert!(notes.stdout.contains("mock") && notes.stdout.contains("of 0.05 USD count"), "{}", notes.stdout);
}

#[test]
fn of_tasks_that_meet_errors_none_is_lost_and_none_answered_twice() {
    const TASKS: usize = 600;
    let mock = mock(Settings {
        latency_ms: 10.0,
        error_rate: 0.1,
        reset_rate: 0.05,
        garbage_rate: 0.01,
        ..Settings::default()
    });
    let cluster = asking(&mock, 32, "");
    let file = prompts(&cluster, TASKS);
    let (results, summary) = split(must(json_lines(&cluster, &["dispatch", &file, "--unordered", "--json"])));
    let all: BTreeSet<String> = ids(&results).into_iter().collect();
    assert_eq!((results.len(), all.len()), (TASKS, TASKS), "{summary}");
    assert!(results.iter().all(|result| result["status"] == "succeeded"), "{summary}");
    assert!(mock.ledger().errors > 0 && mock.ledger().resets > 0, "{:?}", mock.ledger());
    assert!(results.iter().any(|result| result["attempts"].as_u64() > Some(1)), "{summary}");
}

#[test]
fn ctrl_c_reaches_the_calls_and_says_how_to_go_on() {
    let mock = mock(Settings { latency_ms: 600_000.0, ..Settings::default() });
    let cluster = asking(&mock, 8, "    timeout: 10m\n");
    let file = prompts(&cluster, 100);
    let mut running = Running::start(&cluster, &["dispatch", &file, "--concurrency", "3"]);
    until("calls are under way, and the run's name is told", || match mock.ledger().in_flight {
        3 if running.stderr().contains("at once") => Ok(()),
        other => Err(format!("{other} are; {}", running.stderr())),
    });
    signal(running.child.id(), Signal::INT).unwrap();
    assert_eq!(running.wait(), 1);
    let said = running.stderr();
    assert!(said.contains("--resume "), "{said}");
    until("the calls are ended at the provider too", || match mock.ledger() {
        ledger if ledger.in_flight == 0 && ledger.aborted == 3 => Ok(()),
        ledger => Err(format!("{ledger:?}")),
    });
}

#[test]
fn a_provider_that_refuses_for_the_number_of_calls_is_adapted_to_and_the_setting_is_named() {
    let mock = mock(Settings { latency_ms: 20.0, max_in_flight: Some(3), ..Settings::default() });
    let cluster = asking(&mock, 20, "");
    let file = prompts(&cluster, 300);
    let ran = must(ok(&cluster, &["dispatch", &file, "--json"]));
    assert!(ran.stderr.contains("API rate limit") && ran.stderr.contains("max_concurrent_api"), "{}", ran.stderr);
    let ledger = mock.ledger();
    assert_eq!(ledger.answered, 300);
    assert!(ledger.rejected_in_flight < 100, "it went on as before: {ledger:?}");
}

#[test]
fn a_ledger_that_cannot_be_read_means_that_nothing_is_spent() {
    let mock = mock(Settings::default());
    let cluster = asking(&mock, 4, "");
    let dir = cluster.state().join("dispatcher").unwrap();
    fs::write(dir.join("ledger.sqlite"), "this was a ledger before somebody edited it, and is none any more").unwrap();
    let file = prompts(&cluster, 3);
    let ran = must(run(&cluster, &["dispatch", &file]));
    assert_eq!(ran.code, 69, "{}", ran.stderr);
    assert!(ran.stderr.contains("failed to open the ledger") && ran.stderr.contains("ledger.sqlite"), "{}", ran.stderr);
    assert_eq!(mock.ledger().calls, 0);
}

#[test]
fn a_million_tasks_are_read_only_as_room_becomes_free() {
    let cluster = must(Cluster::prepare("node_scaling: {sim: {latency: 10m}, limits: {timeout: 20m}}"));
    let file = prompts(&cluster, 1_000_000);
    let mut running = Running::start(&cluster, &["dispatch", &file, "--concurrency", "5"]);
    let runs = || must(json(&cluster, &["dispatch", "--runs", "--json"]));
    until(
        "the run is open",
        || if runs()["runs"].as_array().unwrap().is_empty() { Err(String::new()) } else { Ok(()) },
    );
    // What it reads beyond this second it would have read within it.
    std::thread::sleep(Duration::from_secs(1));
    let resident = |pid: u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap().to_owned();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
    };
    let dispatcher = cluster.daemon(DISPATCHER).unwrap();
    let (daemon, command) = (resident(dispatcher.pid), resident(running.child.id()));
    assert!(daemon < 100 && command < 100, "{daemon} MiB and {command} MiB");
    signal(running.child.id(), Signal::INT).unwrap();
    running.wait();
}

/// Asks once, and gives what came of it and what was said.
fn ask(cluster: &Cluster, prompt: &str, more: &[&str]) -> (Value, String) {
    let file = cluster.dir().join("one.jsonl");
    fs::write(&file, format!("{}\n", serde_json::json!({"prompt": prompt}))).unwrap();
    let mut args = vec!["dispatch", file.to_str().unwrap(), "--json"];
    args.extend(more);
    let ran = must(run(cluster, &args));
    let first = ran.stdout.lines().next().unwrap_or("null");
    (serde_json::from_str(first).unwrap(), ran.stderr)
}

#[test]
fn every_setting_of_a_provider_acts() {
    let mock = mock(Settings { api_key: Some("k-e-y".to_owned()), output_tokens: Some(1000), ..Settings::default() });
    let url = mock.base_url("openai");
    let provider = |more: &str| {
        let config = format!(
            "node_scaling:\n  listen: 127.0.0.1:0\n  cost: {{allow_unknown_prices: true}}\n  \
             provider: {{name: mock, model: m1, base_url: \"{url}\", max_tokens: 7{more}}}\n"
        );
        must(Cluster::prepare(&config))
    };
    let with_variable = |cluster: &Cluster, args: &[&str]| {
        let output = cluster.command(args).env("MOCK_KEY", "k-e-y").output().unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };

    // api_key_env: not set, the provider cannot be used, and that is said before anything is asked.
    let cluster = provider(", api_key_env: MOCK_KEY");
    let (_, said) = ask(&cluster, "x", &[]);
    assert!(said.contains("MOCK_KEY") && said.contains("--provider sim"), "{said}");
    let doctor = must(run(&cluster, &["doctor"])).stdout;
    assert!(doctor.contains("MOCK_KEY"), "{doctor}");
    let (simulated, _) = ask(&cluster, "x", &["--provider", "sim"]);
    assert_eq!(simulated["provider"], "sim");
    must(ok(&cluster, &["down"]));
    let file = prompts(&cluster, 1);
    let (code, out, said) = with_variable(&cluster, &["dispatch", &file, "--json"]);
    assert_eq!(code, Some(0), "{out}{said}");
    let result: Value = serde_json::from_str(out.lines().next().unwrap()).unwrap();
    // name, model and max_tokens are those of the file.
    assert_eq!(
        (&result["provider"], &result["model"], &result["output_tokens"]),
        (&"mock".into(), &"m1".into(), &7.into())
    );
    assert!(!cluster.logs().contains("k-e-y") && !said.contains("k-e-y"), "a key is shown");

    // api_key_file: only when nobody else can read it.
    let key = cluster.dir().join("key");
    fs::write(&key, "k-e-y\n").unwrap();
    let cluster = provider(&format!(", api_key_file: \"{}\"", key.display()));
    fs::set_permissions(&key, Permissions::from_mode(0o644)).unwrap();
    let (_, said) = ask(&cluster, "x", &[]);
    assert!(said.contains("chmod 600"), "{said}");
    must(ok(&cluster, &["down"]));
    fs::set_permissions(&key, Permissions::from_mode(0o600)).unwrap();
    let (result, said) = ask(&cluster, "x", &[]);
    assert_eq!(result["status"], "succeeded", "{said}");
}

#[test]
fn when_a_provider_fails_the_fallback_answers_and_enabled_and_limits_hold() {
    let (broken, works) = (mock(Settings { outage: true, ..Settings::default() }), mock(Settings::default()));
    let config = |enabled: bool, attempts: u32| {
        let provider = |name: &str, mock: &MockLlm| {
            format!("{{name: {name}, model: m, base_url: \"{}\"}}", mock.base_url("openai"))
        };
        let text = format!(
            "model_pricing: {{m: {{output_tokens_usd_per_m: 1.0}}}}\nnode_scaling:\n  enabled: {enabled}\n  listen: 127.0.0.2:0\n  \
             limits: {{max_attempts: {attempts}}}\n  provider: {}\n  fallback: [{}]\n",
            provider("first", &broken),
            provider("second", &works)
        );
        must(Cluster::prepare(&text))
    };
    let cluster = config(true, 5);
    let (result, said) = ask(&cluster, "x", &[]);
    assert_eq!((&result["status"], &result["provider"]), (&"succeeded".into(), &"second".into()), "{result} {said}");
    let entry = address_book::read(cluster.state(), DISPATCHER).unwrap();
    assert!(entry.listen.starts_with("127.0.0.2:"), "{entry:?}");
    let (result, _) = ask(&config(true, 2), "x", &["--provider", "first"]);
    assert_eq!((&result["status"], &result["attempts"]), (&"failed".into(), &2.into()), "max_attempts: {result}");
    let calls = broken.ledger().calls + works.ledger().calls;
    let (_, said) = ask(&config(false, 5), "x", &[]);
    assert!(said.contains("switched off") && said.contains("node_scaling.enabled"), "{said}");
    assert_eq!(broken.ledger().calls + works.ledger().calls, calls);
}
