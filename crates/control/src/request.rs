//! What a command asks for: reads payloads of both generations of clients.
//!
//! Pure. A payload that makes no sense gives a reason in plain words, which goes back to the asker.

use std::collections::BTreeMap;

use drover_proto::common::{LaunchSpec, SkillFile};
use serde_json::{Map, Value};

type Payload = Map<String, Value>;

/// A command that was understood.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Request {
    List,
    Providers,
    Approvals,
    Queue,
    Projects,
    Status { swarm_id: String },
    Launch(Box<LaunchSpec>),
    Inject(Inject),
    Terminate { swarm_id: String, force: bool },
    Approve(Approve),
}

/// A prompt for nodes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Inject {
    pub(crate) swarm_id: String,
    pub(crate) targets: Targets,
    pub(crate) content: String,
}

/// Which nodes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Targets {
    All,
    /// As the asker wrote them, each once; perhaps not nodes at all.
    Nodes(Vec<i64>),
}

/// A word on an approval.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Approve {
    pub(crate) approval_id: String,
    pub(crate) job_id: String,
    pub(crate) call_id: String,
    pub(crate) node_id: Option<u32>,
    pub(crate) approved: bool,
    /// JSON, or empty.
    pub(crate) decision: String,
}

/// A command that was not understood.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Refusal {
    pub(crate) reason: String,
    /// Set for an inject: the nodes that were named, for clients that wait for `inject_failed`.
    pub(crate) inject: Option<(String, Vec<i64>)>,
}

impl From<String> for Refusal {
    fn from(reason: String) -> Self {
        Self { reason, inject: None }
    }
}

impl From<&str> for Refusal {
    fn from(reason: &str) -> Self {
        reason.to_owned().into()
    }
}

/// Reads a command.
pub(crate) fn read(name: &str, payload: &Payload) -> Result<Request, Refusal> {
    match name {
        "swarm_list" => Ok(Request::List),
        "providers_list" => Ok(Request::Providers),
        "approvals_list" => Ok(Request::Approvals),
        "queue_list" => Ok(Request::Queue),
        "project_list" => Ok(Request::Projects),
        "swarm_status" => Ok(Request::Status { swarm_id: swarm_id(payload)? }),
        "swarm_launch" => Ok(Request::Launch(Box::new(launch(payload)?))),
        "inject" => inject(payload).map(Request::Inject).map_err(|reason| Refusal {
            reason,
            inject: Some((
                payload.get("swarm_id").and_then(Value::as_str).unwrap_or_default().to_owned(),
                targets(payload.get("nodes")).map_or_else(|_| vec![0], Targets::named),
            )),
        }),
        "swarm_terminate" => Ok(Request::Terminate {
            swarm_id: swarm_id(payload)?,
            force: payload
                .get("terminate_params")
                .and_then(|params| params.get("force"))
                .and_then(Value::as_bool)
                .unwrap_or(false),
        }),
        "approve_execution" => Ok(Request::Approve(approve(payload)?)),
        "enqueue_inject" => {
            Err("this router keeps no queue between swarms; send the prompt to the target swarm with inject".into())
        }
        _ if name.starts_with("project_") => {
            Err("this router runs no projects; launch swarms and inject prompts".into())
        }
        _ => Err(format!("unknown command: {}", shortened(name)).into()),
    }
}

impl Targets {
    /// The nodes to name in a failure; node 0 stands for "all".
    pub(crate) fn named(self) -> Vec<i64> {
        match self {
            Targets::All => vec![0],
            Targets::Nodes(nodes) => nodes,
        }
    }
}

fn inject(payload: &Payload) -> Result<Inject, String> {
    let targets = targets(payload.get("nodes"))?;
    let content = required_text(payload, "content")?;
    Ok(Inject { swarm_id: swarm_id(payload)?, targets, content })
}

fn targets(nodes: Option<&Value>) -> Result<Targets, String> {
    let wrong = || "nodes must be \"all\", a node index, or a list of node indices".to_owned();
    let nodes = match nodes {
        None => return Ok(Targets::All),
        Some(Value::String(text)) if text.trim() == "all" => return Ok(Targets::All),
        Some(Value::Array(list)) if list.is_empty() => {
            return Err("nodes is an empty list: name at least one".to_owned());
        }
        Some(Value::Array(list)) => list.iter().map(whole).collect::<Option<Vec<_>>>().ok_or_else(wrong)?,
        Some(one) => vec![whole(one).ok_or_else(wrong)?],
    };
    let mut once = Vec::with_capacity(nodes.len());
    let mut seen = std::collections::BTreeSet::new();
    once.extend(nodes.into_iter().filter(|node| seen.insert(*node)));
    Ok(Targets::Nodes(once))
}

fn launch(payload: &Payload) -> Result<LaunchSpec, String> {
    let node_count = match payload.get("nodes") {
        None | Some(Value::Null) => 1,
        Some(nodes) => whole(nodes)
            .and_then(|count| u32::try_from(count).ok())
            .filter(|&count| count >= 1)
            .ok_or("nodes must be a whole number of at least 1")?,
    };
    let mut params = provider_params(payload)?;
    // The seed names these at the top of the payload, later clients among the parameters; the latter are more specific.
    let mut take = |names: &[&str]| -> Result<String, String> {
        let from_params: Vec<String> = names.iter().filter_map(|name| params.remove(*name)).collect();
        match from_params.into_iter().find(|value| !value.is_empty()) {
            Some(value) => Ok(value),
            None => names.iter().try_fold(String::new(), |found, name| {
                Ok(if found.is_empty() { scalar(payload, name)?.unwrap_or_default() } else { found })
            }),
        }
    };
    let partition = take(&["partition"])?;
    let time = take(&["time_limit", "time"])?;
    let account = take(&["account"])?;
    let qos = take(&["qos"])?;
    let agent = take(&["agent_runtime", "worker_mode", "agent"])?;
    let (agents_md, skills) = agents(payload)?;
    Ok(LaunchSpec {
        node_count,
        system_prompt: optional_text(payload, "system_prompt")?,
        agent,
        provider: optional_text(payload, "provider")?,
        partition,
        time,
        account,
        qos,
        agents_md,
        skills,
        params: params.into_iter().collect(),
    })
}

fn provider_params(payload: &Payload) -> Result<BTreeMap<String, String>, String> {
    let given = match payload.get("provider_params") {
        None | Some(Value::Null) => return Ok(BTreeMap::new()),
        Some(Value::Object(given)) => given,
        Some(_) => return Err("provider_params must be an object".to_owned()),
    };
    let mut params = BTreeMap::new();
    for name in given.keys() {
        let value = scalar(given, name).map_err(|reason| format!("provider_params.{reason}"))?;
        params.extend(value.map(|value| (name.clone(), value)));
    }
    Ok(params)
}

fn agents(payload: &Payload) -> Result<(String, Vec<SkillFile>), String> {
    let alone = optional_text(payload, "agents_md_content")?;
    let bundle = match payload.get("agents_bundle") {
        None | Some(Value::Null) => return Ok((alone, Vec::new())),
        Some(Value::Object(bundle)) => bundle,
        Some(_) => return Err("agents_bundle must be an object".to_owned()),
    };
    let inside = optional_text(bundle, "agents_md_content").map_err(|reason| format!("agents_bundle.{reason}"))?;
    let agents_md = if inside.is_empty() { alone } else { inside };
    // Any other mode means a single file.
    if bundle.get("mode").and_then(Value::as_str) != Some("directory") {
        return Ok((agents_md, Vec::new()));
    }
    let files = match bundle.get("skills_files") {
        None | Some(Value::Null) => return Ok((agents_md, Vec::new())),
        Some(Value::Array(files)) => files,
        Some(_) => return Err("agents_bundle.skills_files must be a list".to_owned()),
    };
    let skills = files.iter().map(skill).collect::<Result<_, _>>()?;
    Ok((agents_md, skills))
}

fn skill(file: &Value) -> Result<SkillFile, String> {
    let text = |key: &str| file.get(key).and_then(Value::as_str);
    let (Some(path), Some(content)) = (text("path"), text("content")) else {
        return Err("each of agents_bundle.skills_files must have a path and a content, both text".to_owned());
    };
    Ok(SkillFile { path: path.to_owned(), content: content.to_owned() })
}

fn approve(payload: &Payload) -> Result<Approve, String> {
    let approval_id = optional_text(payload, "approval_id")?;
    let call_id = optional_text(payload, "call_id")?;
    if approval_id.is_empty() && call_id.is_empty() {
        return Err("call_id is missing".to_owned());
    }
    let node_id = match payload.get("node_id") {
        None | Some(Value::Null) => None,
        Some(node) => {
            Some(whole(node).and_then(|node| u32::try_from(node).ok()).ok_or("node_id must be a node index")?)
        }
    };
    let approved = payload.get("approved").and_then(Value::as_bool).ok_or("approved must be true or false")?;
    let decision = match payload.get("decision") {
        None | Some(Value::Null) => String::new(),
        Some(decision @ (Value::String(_) | Value::Object(_))) => decision.to_string(),
        Some(_) => return Err("decision must be text or an object".to_owned()),
    };
    let job_id = scalar(payload, "job_id")?.unwrap_or_default();
    Ok(Approve { approval_id, job_id, call_id, node_id, approved, decision })
}

/// The router takes the beginning of an id; nothing is the beginning of every id, and is none here.
fn swarm_id(payload: &Payload) -> Result<String, String> {
    let swarm_id = required_text(payload, "swarm_id")?;
    if swarm_id.is_empty() { Err("unknown swarm_id".to_owned()) } else { Ok(swarm_id) }
}

fn required_text(payload: &Payload, key: &str) -> Result<String, String> {
    match payload.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(format!("{key} must be text")),
        None => Err(format!("{key} is missing")),
    }
}

fn optional_text(payload: &Payload, key: &str) -> Result<String, String> {
    match payload.get(key) {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(_) => Err(format!("{key} must be text")),
    }
}

/// Text, a number or a boolean, as text.
fn scalar(payload: &Payload, key: &str) -> Result<Option<String>, String> {
    match payload.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(value @ (Value::Number(_) | Value::Bool(_))) => Ok(Some(value.to_string())),
        Some(_) => Err(format!("{} must be text, a number or a boolean", shortened(key))),
    }
}

/// A whole number, also one that a browser form sent as text.
fn whole(value: &Value) -> Option<i64> {
    match value {
        Value::String(text) => text.trim().parse().ok(),
        // 2.0 is a whole number as well; anything a node index can be is exact in a float.
        other => other
            .as_i64()
            .or_else(|| other.as_f64().filter(|number| number.fract() == 0.0 && number.abs() < 1e15).map(|n| n as i64)),
    }
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn request(name: &str, payload: Value) -> Result<Request, Refusal> {
        let Value::Object(payload) = payload else { panic!() };
        read(name, &payload)
    }

    fn spec(payload: Value) -> LaunchSpec {
        match request("swarm_launch", payload) {
            Ok(Request::Launch(spec)) => *spec,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn both_launch_shapes_mean_the_same() {
        let seed = spec(json!({"nodes":4,"partition":"mi2508x","time":"00:10:00","system_prompt":"You are",
            "account":"proj1","qos":"normal"}));
        let head = spec(json!({"nodes":4,"system_prompt":"You are","provider_params":{"partition":"mi2508x",
            "time_limit":"00:10:00","qos":"normal","account":"proj1"}}));
        assert_eq!(seed, head);
        assert_eq!((seed.node_count, seed.time.as_str(), seed.account.as_str()), (4, "00:10:00", "proj1"));
        assert!(seed.params.is_empty());
        assert_eq!(spec(json!({})), LaunchSpec { node_count: 1, ..LaunchSpec::default() });
    }

    #[test]
    fn parameters_stay_as_the_asker_wrote_them() {
        let spec = spec(json!({"nodes":"2","provider":"slurm-default","partition":"top","provider_params":{
            "partition":"inner","approval_policy":"never","fresh_thread_per_injection":true,"n":1.5,"gone":null,
            "agent_runtime":"echo"}}));
        assert_eq!((spec.node_count, spec.partition.as_str(), spec.agent.as_str()), (2, "inner", "echo"));
        let params: BTreeMap<_, _> = spec.params.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(
            params,
            BTreeMap::from([("approval_policy", "never"), ("fresh_thread_per_injection", "true"), ("n", "1.5")])
        );
    }

    #[test]
    fn bundles() {
        let skills = json!([{"path":"fmt/SKILL.md","content":"…"}]);
        let directory = spec(json!({"agents_md_content":"# A","agents_bundle":{"mode":"directory",
            "agents_md_content":"# B","skills_files":skills}}));
        assert_eq!((directory.agents_md.as_str(), directory.skills.len()), ("# B", 1));
        let file = spec(json!({"agents_md_content":"# A","agents_bundle":{"mode":"zip","skills_files":skills}}));
        assert_eq!((file.agents_md.as_str(), file.skills.len()), ("# A", 0));
        assert_eq!(spec(json!({"agents_bundle":{}})).agents_md, "");
        let pathless = json!({"agents_bundle":{"mode":"directory","skills_files":[{"content":""}]}});
        assert!(request("swarm_launch", pathless).unwrap_err().reason.contains("a path and a content"));
    }

    #[test]
    fn nodes_of_an_inject() {
        let targets = |nodes: Value| match request("inject", json!({"swarm_id":"s","content":"c","nodes":nodes})) {
            Ok(Request::Inject(inject)) => inject.targets,
            other => panic!("{other:?}"),
        };
        assert_eq!(targets(json!("all")), Targets::All);
        assert_eq!(targets(json!(3)), Targets::Nodes(vec![3]));
        assert_eq!(targets(json!("3")), Targets::Nodes(vec![3]));
        assert_eq!(targets(json!([2, 0, 2, -1])), Targets::Nodes(vec![2, 0, -1]));
        for nodes in [json!([]), json!("some"), json!([1, "x"]), json!(1.5), json!({}), json!(null)] {
            let refusal = request("inject", json!({"swarm_id":"s","content":"c","nodes":nodes})).unwrap_err();
            assert_eq!(refusal.inject, Some(("s".to_owned(), vec![0])), "{refusal:?}");
        }
        let refusal = request("inject", json!({"swarm_id":"s","nodes":[4,5]})).unwrap_err();
        assert_eq!(refusal.inject, Some(("s".to_owned(), vec![4, 5])));
    }

    #[test]
    fn nonsense_is_refused_in_plain_words() {
        for (name, payload, reason) in [
            ("swarm_launch", json!({"nodes":0}), "nodes must be a whole number of at least 1"),
            ("swarm_launch", json!({"nodes":1.5}), "nodes must be"),
            ("swarm_launch", json!({"system_prompt":7}), "system_prompt must be text"),
            ("swarm_launch", json!({"provider_params":{"a":[]}}), "provider_params.a must be"),
            ("swarm_launch", json!({"partition":{}}), "partition must be"),
            ("swarm_status", json!({}), "swarm_id is missing"),
            ("swarm_terminate", json!({"swarm_id":3}), "swarm_id must be text"),
            ("swarm_terminate", json!({"swarm_id":""}), "unknown swarm_id"),
            ("approve_execution", json!({"call_id":"c"}), "approved must be"),
            ("approve_execution", json!({"approved":true}), "call_id is missing"),
            ("approve_execution", json!({"call_id":"c","approved":true,"decision":7}), "decision must be"),
            ("enqueue_inject", json!({}), "inject"),
            ("project_create", json!({}), "no projects"),
            ("make_coffee", json!({}), "unknown command: make_coffee"),
        ] {
            let refusal = request(name, payload).unwrap_err();
            assert!(refusal.reason.contains(reason), "{name}: {}", refusal.reason);
        }
    }

    #[test]
    fn approvals_and_terminations() {
        let approve = request(
            "approve_execution",
            json!({"job_id":272_900,"call_id":"c","node_id":1,"approved":true,"decision":"acceptForSession"}),
        );
        let expected = Approve {
            approval_id: String::new(),
            job_id: "272900".to_owned(),
            call_id: "c".to_owned(),
            node_id: Some(1),
            approved: true,
            decision: "\"acceptForSession\"".to_owned(),
        };
        assert_eq!(approve, Ok(Request::Approve(expected)));
        let force = request("swarm_terminate", json!({"swarm_id":"s","terminate_params":{"force":true}}));
        assert_eq!(force, Ok(Request::Terminate { swarm_id: "s".to_owned(), force: true }));
    }
}
