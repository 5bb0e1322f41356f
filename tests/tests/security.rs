//! Secrets that were planted are looked for everywhere that somebody else may read, or that people pass on: command lines, logs,
//! events, errors, dumps, metrics, databases. The search itself is tried out: what is to be there, it finds.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helper functions")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use drover_e2e::cli::run;
use drover_service::address_book;
use drover_testkit::cluster::{Cluster, processes_of};

/// A provider's key, and another one that only the agents' environment has.
const KEY: &str = "sk-planted-7f3a91c4e2";
const AGENT_KEY: &str = "sk-agent-55d0c1b7a9";
/// What no log may say at info.
const PROMPT: &str = "the-planted-prompt-b81e";

/// A provider that refuses every call and repeats the whole question in its error, key included.
struct Telltale {
    addr: SocketAddr,
    asked: Arc<AtomicUsize>,
}

impl Telltale {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        std::thread::spawn(move || {
            for stream in listener.incoming().filter_map(Result::ok) {
                let count = Arc::clone(&count);
                std::thread::spawn(move || {
                    if let Some(head) = refuse(stream) {
                        count.fetch_add(usize::from(head.contains(KEY)), Ordering::Relaxed);
                    }
                });
            }
        });
        Self { addr, asked }
    }
}

fn refuse(mut stream: TcpStream) -> Option<String> {
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && head.len() < 65_536 {
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let told =
        serde_json::json!({"error": {"message": format!("your key is wrong: {head}"), "code": "invalid_api_key"}});
    let body = told.to_string();
    let answer = format!(
        "HTTP/1.1 401 Unauthorized\r\nContent-Type: application/json\r\nWWW-Authenticate: Bearer {KEY}\r\n\
         Connection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(answer.as_bytes()).ok()?;
    Some(head)
}

/// Every file below a directory.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok) {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => waiting.push(entry.path()),
                Ok(kind) if kind.is_file() => found.push(entry.path()),
                _ => {}
            }
        }
    }
    found
}

fn holds(bytes: &[u8], planted: &str) -> bool {
    bytes.windows(planted.len()).any(|window| window == planted.as_bytes())
}

fn get(addr: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(addr).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Runs an instance with secrets in it, and gives all that can be read of it afterwards: name and content.
fn everything(filter: &str) -> (Vec<(String, Vec<u8>)>, PathBuf, tempfile::TempDir) {
    let provider = Telltale::start();
    let secrets = tempfile::tempdir().unwrap();
    let key_file = secrets.path().join("key");
    fs::write(&key_file, format!("{KEY}\n")).unwrap();
    fs::set_permissions(&key_file, fs::Permissions::from_mode(0o600)).unwrap();
    let config = format!(
        "worker: {{agent: echo, agent_env: [OPENAI_API_KEY]}}\n\
         node_scaling:\n  listen: 127.0.0.1:0\n  provider: {{name: planted, model: m, base_url: \"http://{}/v1\", \
         api_key_file: {}}}\n",
        provider.addr,
        key_file.display()
    );
    let mut cluster = Cluster::prepare(&config).unwrap();
    cluster.set_env("OPENAI_API_KEY", AGENT_KEY);
    cluster.set_env("DROVER_LOG", filter);
    fs::write(cluster.dir().join("prompts.txt"), "one\n").unwrap();

    let mut all = Vec::new();
    let mut typed = |args: &[&str], well: bool| {
        let ran = run(&cluster, args).unwrap();
        assert_eq!(ran.code == 0, well, "{args:?}: {}{}", ran.stdout, ran.stderr);
        all.push((args.join(" "), [ran.stdout, ran.stderr].concat().into_bytes()));
    };
    typed(&["launch", "--nodes", "1", "--prompt", "hello"], true);
    fs::write(cluster.dir().join("secret.txt"), PROMPT).unwrap();
    typed(&["inject", "last", "--prompt-file", "secret.txt"], true);
    typed(&["dispatch", "prompts.txt"], false);
    typed(&["dispatch", "prompts.txt", "--json"], false);
    typed(&["events", "--since", "0", "--json"], true);
    typed(&["status", "last", "--json"], true);
    typed(&["spend", "--json"], true);
    typed(&["why", "last"], true);
    let mut shown = cluster.command(&["daemon", "llm-dispatcher", "--dump-config"]).output().unwrap();
    shown.stdout.extend(shown.stderr);
    all.push(("--dump-config".to_owned(), shown.stdout));
    let doctor = run(&cluster, &["doctor", "--json"]).unwrap();
    all.push(("doctor".to_owned(), [doctor.stdout, doctor.stderr].concat().into_bytes()));
    assert!(provider.asked.load(Ordering::Relaxed) > 0, "the provider was never shown its key");

    for entry in address_book::list(cluster.state()) {
        all.push((format!("metrics of {}", entry.name), get(&entry.listen, "/metrics").into_bytes()));
    }
    let processes = processes_of(cluster.state().path());
    assert!(processes.len() >= 5, "{processes:?}");
    for pid in processes {
        for file in ["cmdline", "comm"] {
            all.push((format!("{file} of {pid}"), fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default()));
        }
    }
    run(&cluster, &["terminate", "last"]).unwrap();
    run(&cluster, &["down"]).unwrap();
    for path in files(cluster.dir()).into_iter().filter(|path| !path.ends_with("secret.txt")) {
        let content = fs::read(&path).unwrap_or_default();
        all.push((path.display().to_string(), content));
    }
    (all, key_file, secrets)
}

#[test]
fn planted_secrets_are_nowhere_to_be_read() {
    for filter in ["info", "debug"] {
        let (all, key_file, _secrets) = everything(filter);
        // What is to be there is found: the search can find.
        assert!(holds(&fs::read(key_file).unwrap(), KEY));
        assert!(all.iter().any(|(name, content)| name.contains("/mailbox/") && holds(content, PROMPT)));
        assert!(all.iter().any(|(name, content)| name.starts_with("events") && holds(content, PROMPT)));
        assert!(all.iter().any(|(_, content)| holds(content, "your key is wrong")), "the provider's words are told");

        for (name, content) in &all {
            for planted in [KEY, AGENT_KEY] {
                assert!(!holds(content, planted), "with DROVER_LOG={filter}, {planted} is in {name}");
            }
            if filter == "info" && name.contains("/logs/") {
                assert!(!holds(content, PROMPT), "a prompt is in the log {name}");
            }
            if name.starts_with("cmdline") || name.starts_with("metrics") {
                assert!(!holds(content, PROMPT), "a prompt is in {name}");
            }
        }
        assert!(
            all.iter().any(|(name, content)| name.contains("/logs/router") && !content.is_empty()),
            "no logs were read"
        );
    }
}
