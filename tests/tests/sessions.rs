//! Sessions as people use them: real nodes, real agents, a real load balancer.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helper functions")]

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use drover_e2e::cli::{json, json_lines, ok, run};
use drover_e2e::sure::{PATIENCE, must, wait_for};
use drover_service::address_book;
use drover_testkit::cluster::{self, Cluster, scratch_dir, signal};
use drover_testkit::codex::{codex_bin, repository_root};
use drover_testkit::fake_telegram::FakeTelegram;
use drover_testkit::mock_llm::{MockLlm, Settings as MockSettings};
use drover_testkit::mock_responses::{MockResponses, codex_config};
use drover_testkit::{skip, this_test};
use rustix::process::Signal;
use serde_json::Value;

/// Nodes that find each other as fast as they can.
const SWARM: &str = "swarm:\n  discovery: {gossip_interval: 200ms, node_timeout: 2s, dead_node_timeout: 10s}\n";

/// Launches nodes and waits until they know each other and take sessions.
fn launch(cluster: &Cluster, nodes: usize, agent: &str) -> String {
    launch_with(cluster, nodes, agent, &[])
}

fn launch_with(cluster: &Cluster, nodes: usize, agent: &str, more: &[&str]) -> String {
    let count = nodes.to_string();
    let mut args = vec!["launch", "--nodes", &count, "--agent", agent, "--detach", "--json"];
    args.extend(more);
    let launched = must(json(cluster, &args));
    let swarm = launched["swarm_id"].as_str().unwrap().to_owned();
    wait_for_doors(cluster, &swarm, nodes);
    swarm
}

fn wait_for_doors(cluster: &Cluster, swarm: &str, nodes: usize) {
    wait_for("nodes that take sessions", || {
        let members = must(json(cluster, &["members", swarm, "--json"]));
        let ready = |member: &&Value| member["state"] == "alive" && member["capabilities"]["handoff"].is_string();
        (members.as_array().unwrap().iter().filter(ready).count() == nodes).then_some(())
    });
}

/// A prompt that is answered with a word in each second, for five minutes.
fn endless() -> String {
    format!("@echo over=5m\n{}", "word ".repeat(300))
}

/// What `drover send --json` printed, put together.
struct Sent {
    text: String,
    answer: Value,
}

fn read(lines: &[Value]) -> Sent {
    let mut text = String::new();
    for line in lines {
        match line["event"].as_str() {
            Some("text") => text.push_str(line["content"].as_str().unwrap()),
            Some("again") => line["content"].as_str().unwrap().clone_into(&mut text),
            _ => {}
        }
    }
    let answer = lines.last().cloned().unwrap_or_default();
    assert_eq!(answer["event"], "answer", "{lines:?}");
    Sent { text, answer }
}

fn send(cluster: &Cluster, args: &[&str]) -> Sent {
    let mut all = vec!["send", "--json"];
    all.extend(args);
    read(&must(json_lines(cluster, &all)))
}

fn owner(cluster: &Cluster, session: &str) -> String {
    let sessions = must(json(cluster, &["sessions", "--json"]));
    let found = sessions.as_array().unwrap().iter().find(|one| one["session_id"] == session).cloned();
    found.unwrap_or_else(|| panic!("{session} is not in {sessions}"))["owner"].as_str().unwrap().to_owned()
}

/// A `drover send` that runs, read line by line.
struct Talking {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
    seen: Vec<Value>,
}

impl Talking {
    fn start(cluster: &Cluster, args: &[&str]) -> Self {
        let mut all = vec!["send", "--json"];
        all.extend(args);
        let mut child = cluster.command(&all).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines, seen: Vec::new() }
    }

    fn until(&mut self, event: &str) {
        for line in self.lines.by_ref() {
            let line: Value = serde_json::from_str(&line.unwrap()).unwrap();
            let found = line["event"] == event;
            self.seen.push(line);
            if found {
                return;
            }
        }
        panic!("no {event} in {:?}", self.seen);
    }

    fn finish(self) -> Sent {
        let (code, sent) = self.end();
        assert_eq!(code, 0, "{}", sent.answer);
        sent
    }

    /// The exit code, and what was said.
    fn end(mut self) -> (i32, Sent) {
        for line in self.lines {
            self.seen.push(serde_json::from_str(&line.unwrap()).unwrap());
        }
        (self.child.wait().unwrap().code().unwrap(), read(&self.seen))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_moves_while_it_talks_and_every_word_is_heard_once() {
    let cluster = must(Cluster::start(SWARM).await);
    let swarm = launch(&cluster, 3, "echo");

    // A person sees the answer and nothing else.
    let said = must(ok(&cluster, &["send", "notes", "--agent", "echo", "--prompt", "Remember the word heliotrope."]));
    assert_eq!(said.stdout, "Remember the word heliotrope.\n");
    let first = owner(&cluster, "notes");

    // It is told to go while it talks: it goes when the turn is over, and the one that waits is answered over there.
    let text = "one two three four five six seven eight nine ten";
    let mut talking = Talking::start(&cluster, &["notes", "--prompt", &format!("@echo over=2s\n{text}")]);
    talking.until("text");
    let mut waiting = Talking::start(&cluster, &["notes", "--prompt", "@echo recall"]);
    let target = format!("{swarm}/{}", (0..3).find(|node| first != format!("{swarm}/{node}")).unwrap());
    let short = format!("{}/{}", &swarm[..13], target.rsplit_once('/').unwrap().1);
    let moved = must(json(&cluster, &["handoff", "notes", "--to", &short, "--json"]));
    assert_eq!(
        (moved["from"].as_str(), moved["to"].as_str()),
        (Some(first.as_str()), Some(target.as_str())),
        "{moved}"
    );
    let talked = talking.finish();
    assert_eq!((talked.text.as_str(), talked.answer["content"].as_str()), (text, Some(text)));
    waiting.until("text");
    let recalled = waiting.finish();
    assert!(recalled.answer["content"].as_str().unwrap().contains("heliotrope"), "{}", recalled.answer);
    assert_eq!(owner(&cluster, "notes"), target);

    // The same name of a turn is the same turn, through any door.
    let again = |entry: &[&str]| {
        let mut args = vec!["notes", "--prompt", "once", "--request", "turn-7"];
        args.extend(entry);
        send(&cluster, &args).answer["turn"].as_u64().unwrap()
    };
    let turn = again(&[]);
    for (_, daemon) in drover_sessions::local(cluster.state()) {
        let door = address_book::read(cluster.state(), &daemon).unwrap().listen;
        assert_eq!(again(&["--entry", &door]), turn, "{daemon}");
    }
    let listed = must(json(&cluster, &["sessions", "notes", "--json"]));
    let said: Vec<&str> =
        listed["said"].as_array().unwrap().iter().map(|said| said["content"].as_str().unwrap()).collect();
    assert_eq!(said.iter().filter(|said| **said == "once").count(), 2, "asked and answered once: {said:?}");
    assert_eq!((listed["state"].as_str(), listed["messages"].as_u64()), (Some("active"), Some(8)), "{listed}");

    // Without the address book, as for nodes of other hosts, the router comes in over TLS.
    for (_, daemon) in drover_sessions::local(cluster.state()) {
        std::fs::remove_file(cluster.state().path().join("run").join(format!("{daemon}.json"))).unwrap();
    }
    assert_eq!(send(&cluster, &["notes", "--prompt", "from afar"]).text, "from afar");

    // A node is emptied, and says how far it is.
    for session in ["a", "b", "c", "d"] {
        send(&cluster, &[session, "--agent", "echo", "--prompt", session]);
    }
    let drained = must(json_lines(&cluster, &["drain", &short, "--json"]));
    let end = drained.last().unwrap();
    assert_eq!((end["done"].as_bool(), end["left"].as_u64()), (Some(true), Some(0)), "{end}");
    for session in ["notes", "a", "b", "c", "d"] {
        assert_ne!(owner(&cluster, session), target, "{session} is still there");
        let recalled = send(&cluster, &[session, "--prompt", "@echo recall"]);
        assert_eq!(recalled.text, recalled.answer["content"].as_str().unwrap());
    }
    must(ok(&cluster, &["drain", &short, "--undo"]));

    // Why it is where it is, and what cannot be.
    let why = must(json(&cluster, &["why", "notes", "--json"]));
    let causes: Vec<&str> =
        why["owners"].as_array().unwrap().iter().map(|owner| owner["cause"].as_str().unwrap()).collect();
    assert_eq!(
        (why["kind"].as_str(), causes[0], causes[causes.len() - 1]),
        (Some("session"), "opened", "moved"),
        "{why}"
    );
    assert!(causes.iter().filter(|cause| **cause == "moved").count() >= 2, "{why}");
    for (args, code, words) in [
        (&["handoff", "nosuch"][..], 1, "nosuch"),
        (&["handoff", "notes", "--to", "nowhere/9"][..], 1, "nowhere/9"),
        (&["send", "a/b", "--prompt", "x"][..], 2, "session id"),
        (&["send", "notes", "--prompt", " "][..], 2, "empty"),
    ] {
        let ran = must(run(&cluster, args));
        assert_eq!(ran.code, code, "{args:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(words) && ran.stderr.contains("hint:"), "{args:?}: {}", ran.stderr);
    }
    must(ok(&cluster, &["sessions", "a", "--end"]));
    let ended = must(run(&cluster, &["send", "a", "--prompt", "still there?"]));
    assert_eq!(ended.code, 1, "{}", ended.stdout);
    assert!(!must(ok(&cluster, &["sessions"])).stdout.lines().any(|line| line.starts_with("a ")));
}

/// Processes of Codex that work for sessions of this instance.
fn codex_processes(cluster: &Cluster) -> Vec<u32> {
    let of_codex = |pid: &u32| drover_service::process::program(*pid).is_some_and(|name| name.starts_with("codex"));
    let state = cluster.state().path().display().to_string();
    let processes = std::fs::read_dir("/proc").into_iter().flatten();
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(of_codex)
        .filter(|pid| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            String::from_utf8_lossy(&environment).contains(&state)
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_codex_conversation_moves_with_its_files_and_remembers_what_was_said() {
    let Some(codex) = codex_bin() else { return };
    let mock = must(MockResponses::start());
    let home = must(scratch_dir("codex-home-"));
    std::fs::write(home.path().join("config.toml"), codex_config(&mock.base_url(), "mock-model")).unwrap();
    // Git writes into its own directory, which the agent's sandbox keeps it from.
    let config = format!(
        "{SWARM}worker:\n  codex_bin: {}\n  codex_home: {}\n  sandbox_mode: danger-full-access\n  approval_policy: never\n",
        codex.display(),
        home.path().display()
    );
    let cluster = must(Cluster::start(&config).await);
    let rules = cluster.dir().join("rules.md");
    std::fs::write(&rules, "Whoever asks for the colour is told: zinnia.\n").unwrap();
    let swarm = launch_with(&cluster, 2, "echo", &["--agents-md", &rules.display().to_string()]);

    let make = "git init -q . && git config user.email a@b && git config user.name a && echo first > kept.txt && git add kept.txt \
                && git commit -q -m one && echo changed >> kept.txt && git add kept.txt && mkdir -p deep && echo loose > deep/loose.txt";
    let prompt = format!("remember the word heliotrope @mock run=\"{make}\" then='all is made: {{output}}'");
    let made = send(&cluster, &["work", "--agent", "codex", "--prompt", &prompt]);
    assert!(made.answer["content"].as_str().unwrap().contains("all is made"), "{}", made.answer);
    assert_eq!(made.text, made.answer["content"].as_str().unwrap());
    let first = owner(&cluster, "work");
    assert_eq!(codex_processes(&cluster), Vec::<u32>::new(), "nothing runs between turns");
    let asked = mock.requests().first().cloned().unwrap_or_default().to_string();
    assert!(asked.contains("zinnia"), "the model is told what the launch brought: {asked}");

    let target = format!("{swarm}/{}", u32::from(first.ends_with("/0")));
    must(ok(&cluster, &["handoff", "work", "--to", &target]));
    assert_eq!(owner(&cluster, "work"), target);
    let look = "git rev-list --count HEAD; git diff --cached --stat | tail -1; cat kept.txt deep/loose.txt AGENTS.md";
    let prompt = format!("what is there? @mock run=\"{look}\" then='seen: {{output}}'");
    let seen = send(&cluster, &["work", "--prompt", &prompt]);
    let content = seen.answer["content"].as_str().unwrap();
    for part in ["1", "1 insertion", "first", "changed", "loose", "zinnia"] {
        assert!(content.contains(part), "{part:?} is not in {content}");
    }
    assert_eq!(seen.answer["node_id"].as_str(), Some(target.as_str()));
    // The whole conversation went to the model again, and nothing in it is missing or doubled.
    let last = mock.requests().last().cloned().unwrap_or_default().to_string();
    assert!(last.contains("heliotrope") && last.contains("all is made"), "{last}");
    assert_eq!(mock.violations(), Vec::<String>::new());

    // And back, with what was done over there.
    must(ok(&cluster, &["handoff", "work", "--to", &first]));
    let back =
        send(&cluster, &["work", "--prompt", "once more @mock run='cat deep/loose.txt; ls' then='back: {output}'"]);
    assert!(back.answer["content"].as_str().unwrap().contains("loose"), "{}", back.answer);
    assert_eq!(mock.violations(), Vec::<String>::new());
    assert_eq!(codex_processes(&cluster), Vec::<u32>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_goes_on_with_its_history_on_another_node() {
    let mock = must(MockLlm::start(MockSettings::default()));
    let config = format!(
        "{SWARM}worker: {{agent: chat}}\nmodel_pricing: {{m: {{input_tokens_usd_per_m: 1.0, output_tokens_usd_per_m: 2.0}}}}\n\
         node_scaling:\n  provider: {{name: mock, model: m, base_url: \"{}\"}}\n",
        mock.base_url("openai")
    );
    let cluster = must(Cluster::start(&config).await);
    launch(&cluster, 2, "echo");
    let told = send(&cluster, &["talk", "--agent", "chat", "--prompt", "My word is heliotrope. [[say:noted]]"]);
    assert_eq!((told.text.as_str(), told.answer["content"].as_str()), ("noted", Some("noted")));
    must(ok(&cluster, &["handoff", "talk"]));
    let asked = send(&cluster, &["talk", "--prompt", "Which word? [[say:that one]]"]);
    assert_eq!(asked.text, "that one");
    let seen = must(json(&cluster, &["sessions", "talk", "--json"]));
    assert_eq!(seen["messages"], 4, "{seen}");
}

/// A file of the Debian package, installed or unpacked by `cargo xtask test`.
fn nginx(file: &str, package: &str) -> Option<PathBuf> {
    let system = Path::new("/").join(file);
    let unpacked = repository_root().join("target").join(package).join(file);
    let found = [system, unpacked].into_iter().find(|path| path.is_file());
    if found.is_none() {
        skip(&this_test(), &format!("no {file}: install {package}, or run `cargo xtask test`"));
    }
    found
}

struct Balancer {
    child: Child,
    addr: String,
}

impl Drop for Balancer {
    fn drop(&mut self) {
        cluster::end(&mut self.child, Duration::from_secs(5));
    }
}

/// A real load balancer in front of these doors, by TCP.
fn balancer(dir: &Path, program: &Path, module: &Path, doors: &[String]) -> Balancer {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let servers: String = doors
        .iter()
        .fold(String::new(), |list, door| list + "    server " + door.as_str() + " max_fails=1 fail_timeout=1s;\n");
    // As root it would serve as somebody else, whom the nodes do not let in.
    let user = if rustix::process::geteuid().is_root() { "user root;\n" } else { "" };
    let config = format!(
        "{user}load_module {};\ndaemon off;\nworker_processes 1;\npid {dir}/nginx.pid;\nerror_log {dir}/nginx.log;\nevents {{}}\n\
         stream {{\n  upstream doors {{\n{servers}  }}\n  server {{\n    listen 127.0.0.1:{port};\n    proxy_pass doors;\n    \
         proxy_connect_timeout 1s;\n  }}\n}}\n",
        module.display(),
        dir = dir.display()
    );
    let file = dir.join("nginx.conf");
    std::fs::write(&file, config).unwrap();
    let mut command = Command::new(program);
    command.arg("-p").arg(dir).arg("-c").arg(&file).arg("-e").arg(dir.join("nginx.log"));
    let child = command.stdin(Stdio::null()).spawn().unwrap();
    let balancer = Balancer { child, addr: format!("127.0.0.1:{port}") };
    wait_for("nginx", || std::net::TcpStream::connect(&balancer.addr).ok());
    balancer
}

#[tokio::test(flavor = "multi_thread")]
async fn several_entries_behind_a_load_balancer_are_one() {
    let Some(program) = nginx("usr/sbin/nginx", "nginx") else { return };
    let module = "usr/lib/nginx/modules/ngx_stream_module.so";
    let Some(module) = nginx(module, "libnginx-mod-stream") else { return };
    let cluster = must(Cluster::start(SWARM).await);
    launch(&cluster, 3, "echo");
    let daemons = drover_sessions::local(cluster.state());
    let doors: Vec<String> =
        daemons.iter().map(|(_, daemon)| address_book::read(cluster.state(), daemon).unwrap().listen).collect();
    let dir = must(scratch_dir("nginx-"));
    let balancer = balancer(dir.path(), &program, &module, &doors);
    let entry = ["--entry", balancer.addr.as_str()];

    // Whichever node a connection comes to, each session is one conversation.
    for turn in 0..4 {
        for session in ["x", "y", "z"] {
            let prompt = format!("{session}{turn}");
            let sent = send(&cluster, &[session, "--agent", "echo", "--prompt", &prompt, entry[0], entry[1]]);
            assert_eq!((sent.text.as_str(), sent.answer["turn"].as_u64()), (prompt.as_str(), Some(turn)));
        }
    }

    // The node that a client talks through dies in the middle of the answer: the client comes in through another.
    let text = "one two three four five six seven eight nine ten";
    let mut talking =
        Talking::start(&cluster, &["x", "--prompt", &format!("@echo over=3s\n{text}"), entry[0], entry[1]]);
    talking.until("text");
    let served = owner(&cluster, "x");
    // One that does not have the session, so that only the way breaks; all of them but one.
    for (node, daemon) in &daemons {
        if *node != served {
            let pid = address_book::read(cluster.state(), daemon).unwrap().pid;
            signal(pid, Signal::KILL).unwrap();
        }
    }
    let talked = talking.finish();
    assert_eq!((talked.text.as_str(), talked.answer["content"].as_str()), (text, Some(text)));
}

/// The gateway as a process.
struct Gateway {
    child: Child,
}

impl Gateway {
    fn start(cluster: &Cluster, token: &str, config: Option<&Path>) -> Self {
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(cluster.dir().join("gateway.log")).unwrap();
        let mut command = cluster.command(&["daemon", "telegram-gateway"]);
        command.envs(config.map(|config| ("DROVER_CONFIG", config)));
        command.env("BOT_TOKEN_OF_TEST", token).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Self { child: command.spawn().unwrap() }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        cluster::end(&mut self.child, Duration::from_secs(10));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_to_a_bot_are_answered_once_whatever_restarts() {
    let telegram = must(FakeTelegram::start("77:secret-of-the-bot"));
    let config = format!(
        "{SWARM}telegram:\n  token_env: BOT_TOKEN_OF_TEST\n  base_url: {}\n  allow_chats: [5, -9]\n  poll_timeout: 2s\n  agent: echo\n",
        telegram.base_url()
    );
    let cluster = must(Cluster::start(&config).await);
    launch(&cluster, 2, "echo");
    // Written before anybody listens.
    telegram.write(5, "Remember the word heliotrope.");
    telegram.write(6, "I am a stranger.");
    let gateway = Gateway::start(&cluster, telegram.token(), None);
    let texts = |chat| telegram.messages(chat).into_iter().map(|message| message.text).collect::<Vec<_>>();
    wait_for("the first answer", || (texts(5) == ["Remember the word heliotrope."]).then_some(()));

    // It is killed in the middle of an answer and started again; Telegram fails meanwhile.
    telegram.write(5, "@echo over=2s\none two three four five");
    telegram.write(-9, "in a group");
    // Once it has noted where the answers go. Before that a crash leaves an empty message behind, and answers in another.
    let book = cluster.state().path().join("telegram/book.json");
    let noted = || serde_json::from_slice::<Value>(&std::fs::read(&book).unwrap_or_default()).unwrap_or_default();
    let begun = |book: &Value, chat: i64| {
        let open = book["open"].as_object().cloned().unwrap_or_default();
        open.values().any(|open| open["chat"] == chat && open["places"][0].is_number())
    };
    wait_for("the beginning of the answers", || {
        let book = noted();
        (begun(&book, 5) && (begun(&book, -9) || texts(-9) == ["in a group"])).then_some(())
    });
    gateway.kill();
    telegram.fail_next(500, 1);
    telegram.fail_next(429, 1);
    telegram.write(5, "@echo recall");
    // It comes in through a node's own door now.
    let (_, daemon) = drover_sessions::local(cluster.state()).remove(0);
    let door = address_book::read(cluster.state(), &daemon).unwrap().listen;
    let other = cluster.dir().join("gateway.yaml");
    std::fs::write(&other, format!("{config}  entries: [\"127.0.0.1:1\", \"{door}\"]\n")).unwrap();
    let gateway = Gateway::start(&cluster, telegram.token(), Some(&other));
    wait_for("all answers", || {
        let all = texts(5);
        (all.len() >= 3 && !all.contains(&"…".to_owned()) && texts(-9) == ["in a group"]).then_some(())
    });
    let all = texts(5);
    assert_eq!(all[1], "one two three four five");
    assert!(all.len() == 3 && all[2].contains("heliotrope"), "{all:?}");
    assert_eq!(texts(6), Vec::<String>::new(), "a stranger was answered");
    wait_for("the last confirmation", || (telegram.unconfirmed() == 0).then_some(()));
    let said = must(json(&cluster, &["sessions", "telegram-5-0", "--json"]));
    assert_eq!(said["messages"], 6, "each message is one turn: {said}");

    // A new conversation knows nothing of the old one.
    telegram.write(5, "/new");
    telegram.write(5, "hello");
    wait_for("the new conversation", || (texts(5).last().is_some_and(|text| text == "hello")).then_some(()));
    assert_eq!(must(json(&cluster, &["sessions", "telegram-5-1", "--json"]))["messages"], 2);
    assert_eq!(telegram.refused(), Vec::<String>::new());
    drop(gateway);
    let log = std::fs::read_to_string(cluster.dir().join("gateway.log")).unwrap();
    assert!(!log.contains("secret-of-the-bot") && !log.contains("heliotrope"), "the log tells secrets");
    assert!(log.contains("chat=6"), "the log names the stranger: {log}");
}

/// A program on the JSON-line control plane.
struct Plane {
    stream: std::net::TcpStream,
    lines: std::io::Lines<BufReader<std::net::TcpStream>>,
}

impl Plane {
    fn connect(control: &str) -> Self {
        let stream = std::net::TcpStream::connect(control).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap()).lines();
        Self { stream, lines }
    }

    fn command(&mut self, kind: &str, payload: &Value) {
        let line = drover_testkit::emulate::command(kind, payload);
        std::io::Write::write_all(&mut self.stream, format!("{line}\n").as_bytes()).unwrap();
    }

    fn event(&mut self) -> Value {
        let event: Value = serde_json::from_str(&self.lines.next().unwrap().unwrap()).unwrap();
        assert!(!matches!(event["event"].as_str(), Some("inject_failed" | "command_rejected")), "{event}");
        event
    }

    /// Says something to a node. Its turn's name.
    fn inject(&mut self, swarm: &str, node: u64, prompt: &str) -> Value {
        self.command("inject", &serde_json::json!({"swarm_id": swarm, "nodes": [node], "content": prompt}));
        loop {
            let event = self.event();
            if event["event"] == "inject_ack" && event["data"]["swarm_id"] == swarm {
                return event["data"]["injection_id"].clone();
            }
        }
    }

    /// The next event of this kind of a turn.
    fn of(&mut self, injection: &Value, kind: &str) -> Value {
        loop {
            let event = self.event();
            if event["data"].get("injection_id") == Some(injection) && event["event"] == kind {
                return event["data"].clone();
            }
        }
    }

    /// What a node answers.
    fn say(&mut self, swarm: &str, node: u64, prompt: &str) -> String {
        let injection = self.inject(swarm, node, prompt);
        let said = self.of(&injection, "assistant")["content"].as_str().unwrap().to_owned();
        assert_eq!(self.of(&injection, "turn_complete")["status"], "completed");
        said
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_injected_into_a_node_is_said_in_its_own_session_which_moves() {
    let cluster = must(Cluster::start(&format!("{SWARM}worker: {{own_session: true}}\n")).await);
    let launched = must(json(&cluster, &["launch", "--nodes", "3", "--agent", "echo", "--detach", "--json"]));
    let swarm = launched["swarm_id"].as_str().unwrap().to_owned();
    let control = must(cluster.control_addr());
    let judged = tokio::task::spawn_blocking(move || own_sessions(&cluster, &swarm, &control));
    judged.await.unwrap();
}

fn own_sessions(cluster: &Cluster, swarm: &str, control: &str) {
    let mut plane = Plane::connect(control);
    // Each is opened where it belongs, also before the nodes know each other.
    for node in 0..3 {
        let prompt = format!("Remember the word heliotrope-{node}.");
        assert_eq!(plane.say(swarm, node, &prompt), prompt);
    }
    wait_for_doors(cluster, swarm, 3);
    for node in 0..3 {
        assert_eq!(owner(cluster, &format!("node-{swarm}-{node}")), format!("{swarm}/{node}"));
    }
    let session = format!("node-{swarm}-0");
    let target = format!("{swarm}/1");
    must(ok(cluster, &["handoff", &session, "--to", &target]));
    // The same node is asked, and its conversation goes on where it is now.
    let recalled = plane.say(swarm, 0, "@echo recall");
    assert!(recalled.contains("heliotrope-0"), "{recalled}");
    assert_eq!(owner(cluster, &session), target);
    // It is the same conversation for whoever comes through another entry.
    let sent = send(cluster, &[&session, "--prompt", "@echo recall"]);
    assert!(sent.text.starts_with("2 before: Remember the word heliotrope-0."), "{}", sent.text);

    // An interrupt ends the turn, also where the session is now, and not only the listening.
    let long = plane.inject(swarm, 0, &endless());
    plane.of(&long, "assistant_delta");
    must(ok(cluster, &["interrupt", swarm, "--node", "0"]));
    assert_eq!(plane.of(&long, "turn_complete")["status"], "interrupted");
    let recalled = plane.say(swarm, 0, "@echo recall");
    assert!(recalled.starts_with("4 before: Remember the word heliotrope-0."), "{recalled}");
    let (_, heard) = Talking::start(cluster, &[&session, "--prompt", "x", "--request", long.as_str().unwrap()]).end();
    assert_eq!((&heard.answer["status"], &heard.answer["fault"]), (&"failed".into(), &"interrupted".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_turn_of_any_session_can_be_ended_early_and_is_answered_so_once() {
    let cluster = must(Cluster::start(SWARM).await);
    let swarm = launch(&cluster, 2, "echo");
    send(&cluster, &["talk", "--agent", "echo", "--prompt", "hello"]);
    let none = must(run(&cluster, &["sessions", "talk", "--interrupt"]));
    assert!(none.code == 1 && none.stderr.contains("no such turn"), "{} {}", none.code, none.stderr);

    let begin =
        |request: &str, prompt: &str| Talking::start(&cluster, &["talk", "--request", request, "--prompt", prompt]);
    let mut running = begin("running", &endless());
    running.until("text");
    let mut waiting = begin("waiting", "@echo delay=5m");
    waiting.until("accepted");
    let mut last = begin("last", "the last word");
    last.until("accepted");
    // The one that waits is ended through a door that does not have the session.
    let away = (0..2).find(|node| owner(&cluster, "talk") != format!("{swarm}/{node}")).unwrap();
    let away = format!("handoff-coordinator-{swarm}+{away}");
    let mut door = drover_sessions::Door::of_daemon("away", cluster.state(), &away).client;
    let ask = |request: &str| drover_proto::handoff::InterruptRequest {
        session_id: "talk".into(),
        request_id: request.into(),
    };
    let mut waits = tokio::task::JoinSet::new();
    waits.spawn(async move { door.interrupt(ask("waiting")).await });
    let ended = must(json(&cluster, &["sessions", "talk", "--interrupt", "--json"]));
    assert_eq!((ended["turn"].as_u64(), ended["answered_before"].as_bool()), (Some(1), Some(false)), "{ended}");
    assert_eq!(waits.join_next().await.unwrap().unwrap().unwrap().into_inner().turn, 2);
    for (talking, text) in [(running, true), (waiting, false)] {
        let (code, sent) = talking.end();
        assert_eq!((code, &sent.answer["fault"]), (1, &Value::from("interrupted")), "{}", sent.answer);
        assert_eq!(!sent.text.is_empty(), text, "{:?}", sent.text);
    }
    assert_eq!(last.finish().text, "the last word");
    // It stays so, for whoever asks again, also when the session has moved.
    must(ok(&cluster, &["handoff", "talk"]));
    let again = must(json(&cluster, &["sessions", "talk", "--interrupt", "--request", "running", "--json"]));
    assert_eq!(again["answered_before"], true, "{again}");
    let (_, heard) = begin("running", "other words").end();
    assert_eq!((&heard.answer["fault"], &heard.answer["turn"]), (&Value::from("interrupted"), &Value::from(1)));
    assert_eq!(send(&cluster, &["talk", "--prompt", "@echo recall"]).answer["turn"], 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn codex_sessions_whose_model_is_the_dispatchers_move_and_remember() {
    let Some(codex) = codex_bin() else { return };
    let mock = must(MockLlm::start(MockSettings::default()));
    let config = format!(
        "{SWARM}worker:\n  codex_bin: {}\n  codex_provider: pool\n  pool_carriage: mailbox\n  \
         sandbox_mode: danger-full-access\n  approval_policy: never\n\
         model_pricing: {{m: {{input_tokens_usd_per_m: 1.0, output_tokens_usd_per_m: 2.0}}}}\n\
         node_scaling:\n  listen: 127.0.0.1:0\n  provider: {{name: mock, model: m, base_url: \"{}\"}}\n  \
         limits: {{hedge: false, max_attempts: 1}}\n",
        codex.display(),
        mock.base_url("openai")
    );
    let mut cluster = must(Cluster::prepare(&config));
    // Whatever this user has set up for codex is none of the test's business.
    cluster.set_env("CODEX_HOME", cluster.dir().join("no-codex-home"));
    must(cluster.up().await);
    launch(&cluster, 2, "echo");
    let told = send(&cluster, &["pooled", "--agent", "codex", "--prompt", "My word is heliotrope. [[say:noted]]"]);
    assert_eq!(told.text, "noted");
    must(ok(&cluster, &["handoff", "pooled"]));
    let asked = send(&cluster, &["pooled", "--prompt", "Which word? [[say:that one]]"]);
    assert_eq!(asked.text, "that one");
    let ledger = mock.ledger();
    assert_eq!((ledger.answered, ledger.refused), (2, 0), "each turn asked once");
    // A turn that hangs at the provider is ended, there too.
    let mut hanging = Talking::start(&cluster, &["pooled", "--prompt", "[[hang]]"]);
    hanging.until("accepted");
    wait_for("the call that hangs", || (mock.ledger().in_flight == 1).then_some(()));
    must(ok(&cluster, &["sessions", "pooled", "--interrupt"]));
    let (_, ended) = hanging.end();
    assert_eq!(ended.answer["fault"], "interrupted", "{}", ended.answer);
    wait_for("the end of the call at the provider", || (mock.ledger().in_flight == 0).then_some(()));
    assert_eq!(codex_processes(&cluster), Vec::<u32>::new());
    assert_eq!(send(&cluster, &["pooled", "--prompt", "And now? [[say:still there]]"]).text, "still there");
}
