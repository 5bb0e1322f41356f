//! Other users of the machine at the router's doors: what each role opens, the token beside it, and what is written down of those
//! who came in. Needs root, to become somebody else.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helper functions")]

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use drover_e2e::cli::{Ran, json, json_lines, ok, run};
use drover_e2e::sure::must;
use drover_service::address_book;
use drover_testkit::cluster::{Cluster, program, signal};
use drover_testkit::emulate::{command, id_of};
use drover_testkit::{skip, this_test};
use rustix::process::Signal;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);
/// Users that nobody is: one for each role, one for two of them, one for none.
const READER: u32 = 61_001;
const INJECTOR: u32 = 61_002;
const LAUNCHER: u32 = 61_003;
const TERMINATOR: u32 = 61_004;
const APPROVER: u32 = 61_005;
const COLLEAGUE: u32 = 61_006;
const STRANGER: u32 = 61_007;
const SPENDER: u32 = 61_008;
const PROMPT: &str = "the-prompt-that-no-audit-tells";
const TOKEN: &str = "token-of-the-test-0123456789";

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip(&this_test(), "becoming another user needs root");
    }
    root
}

fn config(more: &str) -> String {
    format!(
        "worker: {{agent: echo}}\nsecurity:\n  roles:\n    read: [{READER}, {COLLEAGUE}]\n    inject: [{INJECTOR}, {COLLEAGUE}]\n    \
         launch: [{LAUNCHER}]\n    terminate: [{TERMINATOR}]\n    approve: [{APPROVER}]\n    dispatch: [{SPENDER}]\n{more}"
    )
}

/// A shell of another user.
fn as_user(uid: u32, script: &str, input: &str) -> Output {
    let mut program = Command::new("setpriv");
    program.args([
        "--reuid",
        &uid.to_string(),
        "--regid",
        &uid.to_string(),
        "--clear-groups",
        "--",
        "/bin/bash",
        "-c",
        script,
    ]);
    let mut child =
        program.current_dir("/").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A shell that is refused may be gone before it reads.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

/// All methods but AddKey, whose empty call would make a key.
const METHODS: [&str; 17] = [
    "GetInfo",
    "LaunchSwarm",
    "Inject",
    "ListSwarms",
    "GetSwarm",
    "TerminateSwarm",
    "Interrupt",
    "WatchEvents",
    "ListApprovals",
    "ResolveApproval",
    "ListProviders",
    "Explain",
    "ListMembers",
    "WatchMembers",
    "ListKeys",
    "UseKey",
    "RemoveKey",
];
/// Those that only look at what there is.
const READ: [&str; 6] = ["ListSwarms", "GetSwarm", "WatchEvents", "Explain", "ListMembers", "WatchMembers"];
/// What a caller is told who may not.
const PERMISSION_DENIED: Option<u32> = Some(7);

/// Codes of calls with an empty message by this user, none for a stream that goes on. An empty call that may come in fails
/// for another reason, or not at all.
fn codes(uid: u32, router: &str, header: &str, methods: &[&'static str]) -> Vec<(&'static str, Option<u32>)> {
    codes_of(uid, &format!("{router}/drover.router.v1.RouterService"), header, methods)
}

/// The same at this service.
fn codes_of(uid: u32, at: &str, header: &str, methods: &[&'static str]) -> Vec<(&'static str, Option<u32>)> {
    let script = format!(
        r#"call() {{ printf '\0\0\0\0\0' | curl -s -N -m "$2" --http2-prior-knowledge -X POST -D - -o /dev/null \
            -H 'content-type: application/grpc' -H 'te: trailers' {header} --data-binary @- \
            "http://{at}/$1" | tr -d '\r' | sed -n 's/^grpc-status: //p' | head -1; }}
        for method in {}; do
            case $method in WatchMembers) most=3;; *) most=30;; esac
            echo "$method $(call $method $most)"
        done"#,
        methods.join(" ")
    );
    let output = as_user(uid, &script, "");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let code = |method: &str| {
        let line = said.lines().find_map(|line| line.strip_prefix(method)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{method}: {said} {output:?}")).parse().ok()
    };
    methods.iter().map(|method| (*method, code(method))).collect()
}

/// What a user who sends these lines to the JSON-line plane reads up to the line with the last one's id, or to the end.
fn lines(uid: u32, control: &str, lines: &[Value]) -> Vec<Value> {
    let id = lines.last().map(id_of).unwrap();
    let (host, port) = control.rsplit_once(':').unwrap();
    let script = format!(
        r#"trap '' PIPE; exec 3<>/dev/tcp/{host}/{port} || exit 7; cat >&3 2>/dev/null
        while read -r -t 30 line <&3; do echo "$line"; case "$line" in *{id}*) exit 0;; esac; done; true"#
    );
    let input = lines.iter().fold(String::new(), |all, line| all + &line.to_string() + "\n");
    let output = as_user(uid, &script, &input);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn reason(line: &Value) -> &str {
    assert_eq!(line["event"], "command_rejected", "{line}");
    line["data"]["reason"].as_str().unwrap()
}

/// A drover that every user may run, with a home for one of them.
struct Elsewhere {
    dir: tempfile::TempDir,
    drover: PathBuf,
}

impl Elsewhere {
    fn new(uid: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let drover = dir.path().join("drover");
        fs::copy(must(program("drover")), &drover).unwrap();
        let home = dir.path().join("home");
        fs::create_dir(&home).unwrap();
        std::os::unix::fs::chown(&home, Some(uid), Some(uid)).unwrap();
        Self { dir, drover }
    }

    fn run(&self, uid: u32, router: &str, args: &str) -> Ran {
        let home = self.dir.path().join("home");
        let script = format!(
            "cd {0} && env -i HOME={0} PATH=/usr/bin:/bin {1} --router {router} {args}",
            home.display(),
            self.drover.display()
        );
        as_user(uid, &script, "").into()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_role_opens_what_it_names_and_nothing_else() {
    if !is_root() {
        return;
    }
    let mut cluster = must(Cluster::start(&config("")).await);
    let launched = must(json(&cluster, &["launch", "--nodes", "1", "--prompt", PROMPT, "--detach", "--json"]));
    let swarm = launched["swarm_id"].as_str().unwrap().to_owned();
    let entry = address_book::read(cluster.state(), "router").unwrap();
    let (router, control) = (entry.listen.clone(), entry.control.clone().unwrap());

    // Method by method, as the kernel names the caller.
    let anybody = ["GetInfo", "ListProviders"];
    let table = [
        (READER, [&READ[..], &["ListApprovals"], &anybody].concat()),
        (INJECTOR, [&["Inject", "Interrupt"][..], &anybody].concat()),
        (LAUNCHER, [&["LaunchSwarm"][..], &anybody].concat()),
        (TERMINATOR, [&["TerminateSwarm"][..], &anybody].concat()),
        (APPROVER, [&["ListApprovals", "ResolveApproval"][..], &anybody].concat()),
        (COLLEAGUE, [&READ[..], &["ListApprovals", "Inject", "Interrupt"], &anybody].concat()),
        (0, METHODS.to_vec()),
    ];
    std::thread::scope(|scope| {
        for (uid, may) in &table {
            let router = &router;
            scope.spawn(move || {
                for (method, code) in codes(*uid, router, "", &METHODS) {
                    assert_eq!(code == PERMISSION_DENIED, !may.contains(&method), "user {uid}, {method}: {code:?}");
                }
            });
        }
    });
    let told = codes(STRANGER, &router, "", &["GetInfo", "ListSwarms"]);
    assert!(told.iter().all(|(_, code)| code.is_none()), "a stranger is not even refused: {told:?}");
    // The dispatcher has a role of its own, and one log of who used it. Whoever has others is a stranger there, as the spender is here.
    fs::write(cluster.dir().join("prompts.txt"), format!("{PROMPT}\n")).unwrap();
    must(ok(&cluster, &["dispatch", "prompts.txt", "--provider", "sim"]));
    let dispatcher = address_book::read(cluster.state(), "llm-dispatcher").unwrap().listen;
    let service = format!("{dispatcher}/drover.dispatch.v1.DispatchService");
    let spending = ["Dispatch", "GetStatus", "GetSpend", "ListRuns", "Cancel"];
    for (uid, may) in [(0, true), (SPENDER, true), (COLLEAGUE, false), (STRANGER, false)] {
        for (method, code) in codes_of(uid, &service, "", &spending) {
            assert_eq!(code.is_some_and(|code| Some(code) != PERMISSION_DENIED), may, "user {uid}, {method}: {code:?}");
        }
    }
    assert!(codes(SPENDER, &router, "", &["GetInfo"])[0].1.is_none());
    // Other daemons know no roles.
    let allocator = address_book::read(cluster.state(), "slurm-allocator").unwrap().listen;
    let metrics = |uid| as_user(uid, &format!("curl -s -m 5 http://{allocator}/metrics"), "").stdout.len();
    assert!(metrics(0) > 1000 && metrics(COLLEAGUE) == 0);

    // A person with a command line.
    let elsewhere = Elsewhere::new(COLLEAGUE);
    let ran = elsewhere.run(COLLEAGUE, &router, &format!("inject {swarm} --prompt {PROMPT}-again"));
    assert!(ran.code == 0 && ran.stdout.contains(&format!("{PROMPT}-again")), "{}{}", ran.stdout, ran.stderr);
    let ran = elsewhere.run(COLLEAGUE, &router, &format!("terminate {swarm}"));
    assert!(ran.code == 1 && ran.stderr.contains("lacks the role terminate"), "{}{}", ran.stdout, ran.stderr);
    assert!(ran.stderr.contains("security.roles.terminate"), "it says who can help: {}", ran.stderr);

    // The JSON-line plane, which tells everybody everything.
    let list = command("swarm_list", &serde_json::json!({}));
    assert_eq!(lines(READER, &control, std::slice::from_ref(&list)).last().unwrap()["event"], "swarm_list");
    let refused = lines(INJECTOR, &control, std::slice::from_ref(&list));
    assert!(refused.len() == 1 && reason(&refused[0]).contains("lacks the role read"), "{refused:?}");
    assert_eq!(lines(STRANGER, &control, std::slice::from_ref(&list)), Vec::<Value>::new());
    let end = command("swarm_terminate", &serde_json::json!({"swarm_id": swarm}));
    let refused = lines(COLLEAGUE, &control, std::slice::from_ref(&end));
    assert!(reason(refused.last().unwrap()).contains("lacks the role terminate"), "{refused:?}");
    let inject = command(
        "inject",
        &serde_json::json!({"swarm_id": swarm, "nodes": [0], "content": format!("{PROMPT}-by-line")}),
    );
    let answers = lines(COLLEAGUE, &control, std::slice::from_ref(&inject));
    assert!(answers.iter().any(|line| line["event"] == "inject_ack"), "{answers:?}");

    // The outcome is written behind the answer, and is what is waited for here.
    let deadline = Instant::now() + PATIENCE;
    while must(json_lines(&cluster, &["audit", "--all", "--json"])).iter().any(|row| row["result"] == "unknown") {
        assert!(Instant::now() < deadline, "outcomes are missing");
        std::thread::sleep(Duration::from_millis(50));
    }
    // Killed, the router has lost nothing of what it wrote down.
    signal(entry.pid, Signal::KILL).unwrap();
    must(cluster.wait_ready(PATIENCE).await);
    must(ok(&cluster, &["terminate", &swarm]));
    assert!(cluster.down().unwrap().success());
    let rows = must(json_lines(&cluster, &["audit", "--all", "--json"]));
    let of = |uid: u32, door: &str, name: &str| -> Vec<&Value> {
        rows.iter().filter(|row| row["uid"] == uid && row["door"] == door && row["command"] == name).collect()
    };
    let launches = of(0, "grpc", "launch");
    assert_eq!(
        (launches[0]["told"]["swarm_id"].as_str(), &launches[0]["result"]),
        (Some(swarm.as_str()), &serde_json::json!("ok"))
    );
    assert_eq!(launches[0]["asked"]["prompt_bytes"], PROMPT.len());
    for (door, bytes) in [("grpc", "-again"), ("json-line", "-by-line")] {
        let done = of(COLLEAGUE, door, "inject");
        let done = done.iter().find(|row| row["asked"]["swarm_id"] == swarm).unwrap_or_else(|| panic!("{rows:#?}"));
        assert_eq!(
            (&done["result"], &done["asked"]["prompt_bytes"]),
            (&serde_json::json!("ok"), &serde_json::json!(PROMPT.len() + bytes.len()))
        );
        assert!(
            done["told"]["injection_id"].is_string() && done["at"].as_str() <= done["answered_at"].as_str(),
            "{done}"
        );
    }
    // What was refused is there too, with why; and nothing else came of it.
    for (uid, door, name) in [
        (COLLEAGUE, "grpc", "terminate"),
        (COLLEAGUE, "json-line", "terminate"),
        (READER, "grpc", "launch"),
        (LAUNCHER, "grpc", "list_swarms"),
        (INJECTOR, "json-line", "connect"),
    ] {
        let refused = of(uid, door, name);
        let is_refusal = |row: &&Value| row["result"] == "not_allowed" && row["refused"] == "role";
        assert!(!refused.is_empty() && refused.iter().all(is_refusal), "{uid} {door} {name}: {refused:?}");
    }
    let dispatched = of(0, "grpc", "dispatch");
    let done = dispatched.iter().find(|row| row["result"] == "ok").unwrap_or_else(|| panic!("{dispatched:?}"));
    assert_eq!(
        (&done["told"]["tasks"], &done["asked"]["provider"]),
        (&serde_json::json!(1), &serde_json::json!("sim"))
    );
    assert_eq!(of(0, "grpc", "terminate").iter().filter(|row| row["result"] == "ok").count(), 1, "{rows:#?}");
    // What makes no sense is written down with what became of it, too.
    assert!(of(INJECTOR, "grpc", "inject").iter().all(|row| row["result"] == "unknown_swarm"), "{rows:#?}");
    let audit = cluster.state().path().join("audit/audit.jsonl");
    assert_eq!(fs::metadata(&audit).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!fs::read_to_string(&audit).unwrap().contains(PROMPT), "a prompt is in the audit log");
    let shown = must(run(&cluster, &["audit", "--user", &COLLEAGUE.to_string()]));
    assert!(
        shown.code == 0 && shown.stdout.lines().count() > 3 && shown.stdout.contains("json-line"),
        "{}",
        shown.stdout
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_wanted_at_both_doors_when_there_is_one() {
    if !is_root() {
        return;
    }
    let mut cluster = must(Cluster::prepare("worker: {agent: echo}\n"));
    let token = cluster.dir().join("token");
    fs::write(&token, format!("{TOKEN}\n")).unwrap();
    fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();
    let with_token = config(&format!("  token_file: {}\n", token.display()));
    fs::write(cluster.dir().join("drover.yaml"), &with_token).unwrap();
    // The programs of the configuration know it, and so does the dispatcher.
    must(start(&mut cluster));
    let launched = must(ok(&cluster, &["launch", "--nodes", "1", "--prompt", "hello"]));
    assert!(launched.stdout.contains("hello"));
    let entry = address_book::read(cluster.state(), "router").unwrap();
    let (router, control) = (entry.listen.clone(), entry.control.clone().unwrap());

    // Another configuration does not, not even its owner's.
    let mut without = cluster.command(&["--router", &router, "list"]);
    let ran: Ran = without.env_remove("DROVER_CONFIG").output().unwrap().into();
    assert!(ran.code == 1 && ran.stderr.contains("token"), "{}{}", ran.stdout, ran.stderr);
    let show = |token: &str| format!("-H 'authorization: Bearer {token}'");
    for (uid, header, may) in [
        (0, String::new(), false),
        (0, show("token-of-the-test-012345678"), false),
        (0, show(TOKEN), true),
        (READER, String::new(), false),
        (READER, show(TOKEN), true),
    ] {
        for (method, code) in codes(uid, &router, &header, &["GetInfo", "ListSwarms", "WatchEvents"]) {
            assert_eq!(code != PERMISSION_DENIED, may, "user {uid} with {header:?}, {method}: {code:?}");
        }
    }

    let list = command("swarm_list", &serde_json::json!({}));
    let shown = |token: &str| serde_json::json!({"protocol": "codeswarm.router.v1", "type": "token", "token": token});
    for uid in [0, READER] {
        for first in [None, Some(shown("wrong")), Some(serde_json::json!({"nonsense": true}))] {
            let sent: Vec<Value> = first.into_iter().chain([list.clone()]).collect();
            let refused = lines(uid, &control, &sent);
            assert!(refused.len() == 1 && reason(&refused[0]).contains("token"), "{refused:?}");
        }
        let answers = lines(uid, &control, &[shown(TOKEN), list.clone()]);
        assert_eq!(answers.last().unwrap()["event"], "swarm_list", "{answers:?}");
    }
    // Nobody is told anything before: a connection that says nothing hears nothing.
    let (host, port) = control.rsplit_once(':').unwrap();
    let silent = Command::new("bash")
        .args(["-c", &format!("exec 3<>/dev/tcp/{host}/{port}; timeout 3 cat <&3")])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    must(ok(&cluster, &["inject", "last", "--prompt", "who listens"]));
    assert_eq!(String::from_utf8_lossy(&silent.wait_with_output().unwrap().stdout), "");
    must(ok(&cluster, &["terminate", "last"]));
    must(ok(&cluster, &["down"]));

    // It is never shown, and a file that others may read is none.
    let mut all = String::new();
    let dump = cluster.command(&["daemon", "router", "--dump-config"]).output().unwrap();
    all.push_str(&String::from_utf8_lossy(&dump.stdout));
    for entry in fs::read_dir(cluster.state().path().join("logs")).unwrap().flatten() {
        all.push_str(&fs::read_to_string(entry.path()).unwrap());
    }
    assert!(all.contains("refused a call") && !all.contains(TOKEN), "{all}");
    fs::set_permissions(&token, fs::Permissions::from_mode(0o644)).unwrap();
    let ran = must(run(&cluster, &["list"]));
    assert!(ran.code != 0 && ran.stderr.contains("chmod 600"), "{}{}", ran.stdout, ran.stderr);
}

/// Lets a first command start the daemons, and waits until they answer it.
fn start(cluster: &mut Cluster) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let ran = run(cluster, &["list"])?;
        if ran.code == 0 {
            return Ok(());
        }
        anyhow::ensure!(Instant::now() < deadline, "{}{}", ran.stdout, ran.stderr);
        std::thread::sleep(Duration::from_millis(100));
    }
}
