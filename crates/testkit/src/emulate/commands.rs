//! The command line, command by command.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::{Client, Screen, Step, command, id_of, js_text, parts, reason};

const RULE: &str = "------------------------------------------------------------";

/// `list`, `status`, `providers` of the later generation.
pub struct OneShot {
    send: Value,
    answer: &'static str,
    id: String,
}

impl OneShot {
    /// `list`.
    pub fn list() -> Self {
        Self::new("swarm_list", &json!({}), "swarm_list")
    }

    /// `status ID`.
    pub fn status(swarm_id: &str) -> Self {
        Self::new("swarm_status", &json!({ "swarm_id": swarm_id }), "swarm_status")
    }

    /// `providers`.
    pub fn providers() -> Self {
        Self::new("providers_list", &json!({}), "providers_list")
    }

    fn new(name: &str, payload: &Value, answer: &'static str) -> Self {
        let send = command(name, payload);
        Self { id: id_of(&send), send, answer }
    }
}

impl Client for OneShot {
    fn begin(&mut self) -> Vec<Value> {
        vec![self.send.clone()]
    }

    fn event(&mut self, event: &Value, screen: &mut Screen) -> Step {
        let (name, data, mine) = parts(event, &self.id);
        if !mine {
            return Step::Wait;
        }
        match name {
            "command_rejected" => {
                screen.complain(&format!("Error: {}", reason(data)));
                Step::Exit(1)
            }
            _ if name == self.answer => {
                // Without the type the formatter prints nothing, and the command still ends well.
                if event["type"] == "event" {
                    print_answer(name, data, screen);
                }
                Step::Exit(0)
            }
            _ => {
                screen.complain(&format!("Unexpected response: {name}"));
                Step::Exit(1)
            }
        }
    }
}

fn print_answer(name: &str, data: &Value, screen: &mut Screen) {
    match name {
        "swarm_list" => {
            screen.say(&format!("\nAvailable Swarms:\n{RULE}"));
            for (id, swarm) in data["swarms"].as_object().into_iter().flatten() {
                let field = |key: &str| swarm.get(key).map_or("undefined".to_owned(), js_text);
                let (job, nodes, status) = (field("job_id"), field("node_count"), field("status"));
                screen.say(&format!("{id} | job {job} | nodes {nodes} | {status}"));
            }
            screen.say(&format!("{RULE}\n"));
        }
        "swarm_status" => {
            screen.say(&format!("\nSwarm Status:\n{RULE}"));
            for (key, value) in data.as_object().into_iter().flatten() {
                screen.say(&format!("{key}: {}", js_text(value)));
            }
            screen.say(&format!("{RULE}\n"));
        }
        "providers_list" => {
            for provider in data["providers"].as_array().into_iter().flatten() {
                screen.say(&format!("{} | backend={}", js_text(&provider["id"]), js_text(&provider["backend"])));
            }
        }
        _ => {}
    }
}

/// The lines of `attach` and of a launch that is followed.
#[derive(Default)]
struct ActivityLog {
    streaming: BTreeSet<i64>,
}

impl ActivityLog {
    fn print(&mut self, name: &str, data: &Value, screen: &mut Screen) {
        let Some(node) = data["node_id"].as_i64() else { return };
        match name {
            "turn_started" => screen.say(&format!("\n[INFO] node {node} turn started")),
            "assistant_delta" => {
                if self.streaming.insert(node) {
                    screen.write(&format!("\n[node {node}] assistant\n"));
                }
                screen.out.push_str(data["content"].as_str().unwrap_or_default());
            }
            "assistant" if !self.streaming.contains(&node) => {
                screen.write(&format!("\n[node {node}] assistant\n{}", js_text(&data["content"])));
            }
            "turn_complete" => {
                if self.streaming.remove(&node) {
                    screen.out.push('\n');
                }
                screen.say(&format!("[INFO] node {node} turn complete"));
            }
            "thread_status" => screen.say(&format!("[INFO] node {node} status={}", js_text(&data["status"]["type"]))),
            "usage" if data["total_tokens"].is_number() => {
                screen.say(&format!("[INFO] node {node} total tokens={}", data["total_tokens"]));
            }
            "agent_error" => {
                screen.complain(&format!("[ERROR] node {node} agent error: {}", js_text(&data["message"])));
            }
            _ => {}
        }
    }
}

/// `launch`.
pub struct Launch {
    send: Value,
    id: String,
    detach: bool,
    swarm: Option<String>,
    log: ActivityLog,
}

impl Launch {
    /// `launch --nodes N --prompt P`, with `--detach` or followed.
    pub fn new(nodes: u32, prompt: &str, detach: bool) -> Self {
        Self::with(&json!({ "nodes": nodes, "system_prompt": prompt }), detach)
    }

    /// A launch with any payload.
    pub fn with(payload: &Value, detach: bool) -> Self {
        let send = command("swarm_launch", payload);
        Self { id: id_of(&send), send, detach, swarm: None, log: ActivityLog::default() }
    }
}

impl Client for Launch {
    fn begin(&mut self) -> Vec<Value> {
        vec![self.send.clone()]
    }

    fn event(&mut self, event: &Value, screen: &mut Screen) -> Step {
        let (name, data, mine) = parts(event, &self.id);
        if self.swarm.as_deref().is_some_and(|swarm| data["swarm_id"] == swarm) {
            self.log.print(name, data, screen);
            return Step::Wait;
        }
        if !mine {
            return Step::Wait;
        }
        match name {
            "swarm_launch_progress" => {
                screen.say(&format!("[launch:{}] {}", js_text(&data["stage"]), js_text(&data["message"])));
                Step::Wait
            }
            "swarm_launched" => {
                screen.say("Swarm launched successfully:\n");
                for (key, value) in data.as_object().into_iter().flatten() {
                    screen.say(&format!("{key}: {}", js_text(value)));
                }
                self.swarm = data["swarm_id"].as_str().map(str::to_owned);
                if self.detach {
                    return Step::Exit(0);
                }
                if self.swarm.is_none() {
                    screen.complain("Launch succeeded but swarm_id was missing from the response.");
                    return Step::Exit(1);
                }
                Step::Wait
            }
            "command_rejected" => {
                screen.complain(&format!("Launch failed: {}", reason(data)));
                Step::Exit(1)
            }
            _ => {
                screen.complain(&format!("Unexpected response: {name}"));
                Step::Exit(1)
            }
        }
    }
}

/// `inject`.
pub struct Inject {
    swarm_id: String,
    node: Option<u32>,
    prompt: String,
    status_id: String,
    request_ids: BTreeSet<String>,
    targets: Vec<i64>,
    /// Delivered, answered, turn complete; made by the acknowledgement, not before.
    nodes: BTreeMap<i64, [bool; 3]>,
    texts: BTreeMap<String, String>,
}

impl Inject {
    /// Into all nodes, or one.
    pub fn new(swarm_id: &str, node: Option<u32>, prompt: &str) -> Self {
        Self {
            swarm_id: swarm_id.to_owned(),
            node,
            prompt: prompt.to_owned(),
            status_id: String::new(),
            request_ids: BTreeSet::new(),
            targets: Vec::new(),
            nodes: BTreeMap::new(),
            texts: BTreeMap::new(),
        }
    }

    fn inject_all(&mut self, node_count: i64) -> Vec<Value> {
        self.targets = match self.node {
            Some(node) => vec![node.into()],
            None => (0..node_count).collect(),
        };
        let commands: Vec<Value> = self
            .targets
            .iter()
            .map(|node| command("inject", &json!({"swarm_id": self.swarm_id, "nodes": node, "content": self.prompt})))
            .collect();
        self.request_ids = commands.iter().map(id_of).collect();
        commands
    }

    fn step(&self) -> Step {
        let done = |node: &i64| self.nodes.get(node).is_some_and(|state| state.iter().all(|&seen| seen));
        if self.targets.iter().all(done) { Step::Exit(0) } else { Step::Wait }
    }
}

impl Client for Inject {
    fn begin(&mut self) -> Vec<Value> {
        let status = command("swarm_status", &json!({ "swarm_id": self.swarm_id }));
        self.status_id = id_of(&status);
        vec![status]
    }

    fn event(&mut self, event: &Value, screen: &mut Screen) -> Step {
        let (name, data, answers_status) = parts(event, &self.status_id);
        if self.request_ids.is_empty() {
            return match (answers_status, name) {
                (true, "swarm_status") => match data["node_count"].as_i64() {
                    Some(count) if self.node.is_none_or(|node| i64::from(node) < count) => {
                        Step::Send(self.inject_all(count))
                    }
                    Some(_) => {
                        screen.complain("Invalid node index");
                        Step::Exit(1)
                    }
                    None => {
                        screen.complain("Unable to determine node count for swarm.");
                        Step::Exit(1)
                    }
                },
                (true, "command_rejected") => {
                    screen.complain(&format!("Error: {}", reason(data)));
                    Step::Exit(1)
                }
                _ => Step::Wait,
            };
        }
        let node = data["node_id"].as_i64();
        if data["request_id"].as_str().is_some_and(|id| self.request_ids.contains(id)) {
            match (name, node) {
                ("inject_ack", Some(node)) => {
                    self.nodes.insert(node, [false; 3]);
                    screen.say(&format!("Inject acknowledged (node {node})"));
                    return Step::Wait;
                }
                ("inject_failed", _) => {
                    screen.complain(&format!("Inject failed: {}", js_text(&data["error"])));
                    return Step::Exit(1);
                }
                ("inject_delivered", Some(node)) => {
                    if let Some(state) = self.nodes.get_mut(&node) {
                        state[0] = true;
                    }
                    return self.step();
                }
                // A rejection is overlooked.
                _ => {}
            }
        }
        let Some(node) = node.filter(|node| data["swarm_id"] == self.swarm_id && self.targets.contains(node)) else {
            return Step::Wait;
        };
        let injection = js_text(&data["injection_id"]);
        match name {
            "assistant_delta" => {
                self.texts.entry(injection).or_default().push_str(data["content"].as_str().unwrap_or_default());
            }
            "assistant" => {
                let text = self.texts.get(&injection).cloned().unwrap_or_else(|| js_text(&data["content"]));
                screen.say(&format!("\n[Swarm {} | Node {node}]\n{RULE}\n{text}", self.swarm_id));
            }
            "usage" if self.texts.contains_key(&injection) => {
                screen.say(&format!("\nTokens used: {}", data["total_tokens"]));
            }
            _ => {}
        }
        if let Some(state) = self.nodes.get_mut(&node) {
            state[1] |= name == "assistant";
            state[2] |= name == "turn_complete";
        }
        self.step()
    }
}

/// `terminate`.
pub struct Terminate {
    send: Value,
    id: String,
    swarm_id: String,
}

impl Terminate {
    /// `terminate ID`.
    pub fn new(swarm_id: &str) -> Self {
        let send = command("swarm_terminate", &json!({ "swarm_id": swarm_id }));
        Self { id: id_of(&send), send, swarm_id: swarm_id.to_owned() }
    }
}

impl Client for Terminate {
    fn begin(&mut self) -> Vec<Value> {
        vec![self.send.clone()]
    }

    fn event(&mut self, event: &Value, screen: &mut Screen) -> Step {
        let (name, data, mine) = parts(event, &self.id);
        if !mine {
            return Step::Wait;
        }
        match name {
            "swarm_status" | "swarm_terminate_progress" | "queue_updated" => Step::Wait,
            "swarm_terminated" => {
                screen.say(&format!("Swarm {} terminated.", self.swarm_id));
                Step::Exit(0)
            }
            "command_rejected" => {
                screen.complain(&format!("Terminate failed: {}", reason(data)));
                Step::Exit(1)
            }
            _ => {
                screen.complain(&format!("Unexpected response: {name}"));
                Step::Exit(1)
            }
        }
    }
}

/// `stop-all --keep-router`.
#[derive(Default)]
pub struct StopAll {
    list_id: String,
    waiting: Vec<(String, String)>,
    current: String,
    total: usize,
}

impl StopAll {
    fn next(&mut self, screen: &mut Screen) -> Step {
        if self.waiting.is_empty() {
            screen.say(&format!("Stopped {} swarm(s).", self.total));
            return Step::Exit(0);
        }
        let (swarm_id, label) = self.waiting.remove(0);
        screen.say(&format!("Stopping {label}..."));
        let send = command("swarm_terminate", &json!({ "swarm_id": swarm_id }));
        self.current = id_of(&send);
        Step::Send(vec![send])
    }
}

impl Client for StopAll {
    fn begin(&mut self) -> Vec<Value> {
        let send = command("swarm_list", &json!({}));
        self.list_id = id_of(&send);
        vec![send]
    }

    fn event(&mut self, event: &Value, screen: &mut Screen) -> Step {
        let (name, data, lists) = parts(event, &self.list_id);
        let (_, _, ends) = parts(event, &self.current);
        match name {
            "swarm_list" if lists => {
                let swarms = data["swarms"].as_object().into_iter().flatten();
                self.waiting =
                    swarms.map(|(id, one)| (id.clone(), format!("{id} ({})", js_text(&one["job_id"])))).collect();
                self.total = self.waiting.len();
                self.next(screen)
            }
            "swarm_terminated" if ends => self.next(screen),
            "command_rejected" if lists || ends => {
                screen.complain(&reason(data));
                Step::Exit(1)
            }
            _ => Step::Wait,
        }
    }
}

/// `attach`.
pub struct Attach {
    swarm_id: String,
    status_id: String,
    attached: bool,
    json: bool,
    log: ActivityLog,
}

impl Attach {
    /// `attach ID`, perhaps with `--json`.
    pub fn new(swarm_id: &str, json: bool) -> Self {
        let swarm_id = swarm_id.to_owned();
        Self { swarm_id, status_id: String::new(), attached: false, json, log: ActivityLog::default() }
    }
}

impl Client for Attach {
    fn begin(&mut self) -> Vec<Value> {
        let send = command("swarm_status", &json!({ "swarm_id": self.swarm_id }));
        self.status_id = id_of(&send);
        vec![send]
    }

    fn event(&mut self, event: &Value, screen: &mut Screen) -> Step {
        let (name, data, mine) = parts(event, &self.status_id);
        if !self.attached {
            match (mine, name) {
                (true, "command_rejected") => {
                    if self.json {
                        screen.say(&event.to_string());
                    } else {
                        screen.complain("Invalid swarm_id.");
                    }
                    return Step::Exit(1);
                }
                (true, "swarm_status") => {
                    self.attached = true;
                    if !self.json {
                        screen.say(&format!("Attached to swarm {}", self.swarm_id));
                    }
                }
                _ => {}
            }
            return Step::Wait;
        }
        if data["swarm_id"] == self.swarm_id {
            if self.json {
                screen.say(&event.to_string());
            } else {
                self.log.print(name, data, screen);
            }
        }
        Step::Wait
    }
}

/// `list`, `status`, `launch` of the seed: any event with its id is the answer.
pub struct SeedOneShot {
    send: Value,
    id: String,
}

impl SeedOneShot {
    /// `list`.
    pub fn list() -> Self {
        Self::new("swarm_list", &json!({}))
    }

    /// `status ID`.
    pub fn status(swarm_id: &str) -> Self {
        Self::new("swarm_status", &json!({ "swarm_id": swarm_id }))
    }

    /// `launch --nodes N --partition P --time T --prompt P`.
    pub fn launch(nodes: u32, partition: &str, time: &str, prompt: &str) -> Self {
        let payload = json!({"nodes": nodes, "partition": partition, "time": time, "system_prompt": prompt});
        Self::new("swarm_launch", &payload)
    }

    fn new(name: &str, payload: &Value) -> Self {
        let send = command(name, payload);
        Self { id: id_of(&send), send }
    }
}

impl Client for SeedOneShot {
    fn begin(&mut self) -> Vec<Value> {
        vec![self.send.clone()]
    }

    fn event(&mut self, event: &Value, screen: &mut Screen) -> Step {
        let (name, data, mine) = parts(event, &self.id);
        if !mine {
            return Step::Wait;
        }
        if self.send["command"] == "swarm_launch" {
            screen.say("Swarm launched successfully:\n");
            for (key, value) in data.as_object().into_iter().flatten() {
                screen.say(&format!("{key}: {}", js_text(value)));
            }
        } else {
            print_answer(name, data, screen);
        }
        Step::Exit(0)
    }
}

/// `inject` of the seed: never ends, prints what happens in every swarm.
pub struct SeedInject {
    send: Value,
    texts: BTreeMap<String, String>,
}

impl SeedInject {
    /// Into all nodes.
    pub fn new(swarm_id: &str, prompt: &str) -> Self {
        let payload = json!({"swarm_id": swarm_id, "nodes": "all", "content": prompt});
        Self { send: command("inject", &payload), texts: BTreeMap::new() }
    }
}

impl Client for SeedInject {
    fn begin(&mut self) -> Vec<Value> {
        vec![self.send.clone()]
    }

    fn event(&mut self, event: &Value, screen: &mut Screen) -> Step {
        let data = &event["data"];
        let injection = js_text(&data["injection_id"]);
        match event["event"].as_str().unwrap_or_default() {
            "assistant_delta" => {
                self.texts.entry(injection).or_default().push_str(data["content"].as_str().unwrap_or_default());
            }
            "assistant" => {
                if let Some(text) = self.texts.get(&injection) {
                    screen.say(&format!("\n[Swarm {} | Node {}]\n{text}", js_text(&data["swarm_id"]), data["node_id"]));
                }
            }
            "inject_ack" => screen.say(&format!("Inject acknowledged (node {})", data["node_id"])),
            "inject_failed" => screen.complain(&format!("Inject failed: {}", js_text(&data["error"]))),
            _ => {}
        }
        Step::Wait
    }
}
