//! The web backend's bridge and the openclaw client: long connections that react to what they see.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, interval, sleep, sleep_until};

use super::transport::Connection;
use super::{command, id_of};

/// The web backend: one connection, polls, a cache of swarms.
pub struct WebBackend {
    /// How long its second is; the original's is 1 s.
    pub second: Duration,
    /// Swarms it shows, with their status.
    pub swarms: BTreeMap<String, String>,
    /// Swarms it has taken off its list.
    pub dropped: BTreeSet<String>,
    /// Events it passed on to browsers, by name.
    pub passed_on: BTreeMap<String, usize>,
    /// Polls answered, by name of the answer.
    pub answers: BTreeMap<String, usize>,
    /// How often it connected.
    pub connects: usize,
    asked: BTreeMap<String, String>,
}

impl WebBackend {
    /// A backend whose clock runs fast.
    pub fn new(second: Duration) -> Self {
        Self {
            second,
            swarms: BTreeMap::new(),
            dropped: BTreeSet::new(),
            passed_on: BTreeMap::new(),
            answers: BTreeMap::new(),
            connects: 0,
            asked: BTreeMap::new(),
        }
    }

    fn ask(&mut self, name: &str) -> Value {
        let send = command(name, &json!({}));
        self.asked.insert(id_of(&send), name.to_owned());
        send
    }

    /// Takes one message.
    pub fn message(&mut self, message: &Value) {
        if message["type"] != "event" {
            return;
        }
        let name = message["event"].as_str().unwrap_or_default();
        let data = &message["data"];
        let asked = data["request_id"].as_str().and_then(|id| self.asked.remove(id));
        if asked.is_some() {
            *self.answers.entry(name.to_owned()).or_default() += 1;
        }
        let swarm = data["swarm_id"].as_str().unwrap_or_default().to_owned();
        match name {
            // Any list, also one that somebody else asked for, is the whole truth.
            "swarm_list" => {
                let listed = data["swarms"].as_object().cloned().unwrap_or_default();
                let gone: Vec<String> = self.swarms.keys().filter(|id| !listed.contains_key(*id)).cloned().collect();
                for id in gone {
                    self.swarms.remove(&id);
                    self.dropped.insert(id);
                }
                for (id, swarm) in &listed {
                    self.swarms.insert(id.clone(), swarm["status"].as_str().unwrap_or("unknown").to_owned());
                }
            }
            "swarm_launched" => {
                self.swarms.insert(swarm, "running".to_owned());
            }
            "swarm_status" => {
                if let (Some(known), Some(status)) = (self.swarms.get_mut(&swarm), data["status"].as_str()) {
                    status.clone_into(known);
                }
            }
            "swarm_removed" => {
                self.swarms.remove(&swarm);
                self.dropped.insert(swarm);
            }
            "command_rejected" if data["reason"] == "unknown swarm_id" => {
                self.swarms.remove(&swarm);
            }
            _ => {}
        }
        let browser_name = if name == "assistant_delta" { "delta" } else { name };
        *self.passed_on.entry(browser_name.to_owned()).or_default() += 1;
    }

    /// Lives until the deadline, or until `enough` holds; connects again two seconds after each close.
    pub async fn live(
        &mut self,
        addr: SocketAddr,
        patience: Duration,
        enough: impl Fn(&Self) -> bool,
    ) -> io::Result<()> {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline && !enough(self) {
            let Ok(mut connection) = Connection::open(addr).await else {
                sleep(self.second * 2).await;
                continue;
            };
            self.connects += 1;
            for name in ["swarm_list", "queue_list", "project_list", "approvals_list"] {
                let send = self.ask(name);
                connection.send(&send).await?;
            }
            let mut fast = interval(self.second);
            let mut slow = interval(self.second * 5);
            while !enough(self) {
                let polls: &[&str] = tokio::select! {
                    message = connection.next() => match message {
                        Ok(Some(message)) => { self.message(&message); &[] }
                        _ => break,
                    },
                    _ = fast.tick() => &["approvals_list"],
                    _ = slow.tick() => &["swarm_list", "queue_list", "project_list"],
                    () = sleep_until(deadline) => return Ok(()),
                };
                for name in polls {
                    let send = self.ask(name);
                    connection.send(&send).await?;
                }
            }
            assert!(connection.decoder.broken.is_empty(), "{:?}", connection.decoder.broken);
            if !enough(self) {
                sleep(self.second * 2).await;
            }
        }
        Ok(())
    }
}

/// The openclaw client: reacts to everything on the bus, whoever asked.
#[derive(Default)]
pub struct OpenClaw {
    /// Swarms that anybody launched.
    pub launched: Vec<String>,
    /// What anybody's agents said, by swarm and node: their pieces come in any order among each other.
    pub said: BTreeMap<(String, u64), String>,
    /// Turns that ended.
    pub turns: usize,
    /// Rejections seen.
    pub rejections: Vec<String>,
}

impl OpenClaw {
    /// Its way to launch: only the two fields, and a timestamp beside them.
    pub fn launch(nodes: u32, prompt: &str) -> Value {
        let mut send = command("swarm_launch", &json!({"nodes": nodes, "system_prompt": prompt}));
        send["timestamp"] = json!("2026-02-25T23:58:58.123Z");
        send
    }

    /// Its way to inject: always all nodes.
    pub fn inject(swarm_id: &str, prompt: &str) -> Value {
        let mut send = command("inject", &json!({"swarm_id": swarm_id, "nodes": "all", "content": prompt}));
        send["timestamp"] = json!("2026-02-25T23:58:58.123Z");
        send
    }

    /// Takes one message.
    pub fn message(&mut self, message: &Value) {
        let data = &message["data"];
        let text = |key: &str| data[key].as_str().unwrap_or_default().to_owned();
        match message["event"].as_str().unwrap_or_default() {
            "swarm_launched" => self.launched.push(text("swarm_id")),
            "assistant_delta" => {
                let node = (text("swarm_id"), data["node_id"].as_u64().unwrap_or_default());
                self.said.entry(node).or_default().push_str(&text("content"));
            }
            "turn_complete" => self.turns += 1,
            "command_rejected" => self.rejections.push(text("reason")),
            _ => {}
        }
    }
}
