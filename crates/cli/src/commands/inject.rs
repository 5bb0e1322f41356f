//! `drover inject`: sends a prompt, streams the answers, ends when every node's turn has ended.

use std::collections::BTreeMap;
use std::time::Duration;

use drover_proto::router as pb;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::follow::{Teller, ends_swarm};
use super::{carriable, nodes_of, request_id, text_or_stdin, traceparent};
use crate::app::App;
use crate::args::Inject;
use crate::client::{Client, Rpc};
use crate::fault::{Exit, Fault};
use crate::render::json::data_of;
use crate::render::words;
use crate::watch::{self, Resumable, Step, Watch};

pub(super) async fn run(app: &App, args: Inject) -> anyhow::Result<Exit> {
    let prompt = prompt_of(&args)?;
    let mut client = Client::connect(app).await?;
    let swarm = client.find(&args.swarm).await?;
    let nodes = nodes_of(&swarm, &args.nodes)?;
    let mut teller = Teller::new(app);
    let asked = Asked { nodes, prompt, steer: args.steer };
    let turns = match carry_out(app, &client, &swarm, asked, |event| teller.tell(event)).await? {
        Carried::Out(turns) => turns,
        Carried::Left { accepted } => {
            let id = &swarm.swarm_id;
            app.screen.note(&if accepted {
                format!("the prompt is carried out all the same; follow it: drover attach {id}; end it: drover interrupt {id}")
            } else {
                format!("the router has not confirmed the prompt, which may have reached it: drover status {id} tells")
            });
            return Ok(Exit::Failed);
        }
    };
    drop(teller);
    if app.global.json {
        app.screen.out(&turns.summary().to_string())?;
    }
    turns.verdict(&swarm.swarm_id).map(|()| Exit::Done).map_err(Into::into)
}

fn prompt_of(args: &Inject) -> Result<String, Fault> {
    let prompt = match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => text_or_stdin(text)?,
        (None, Some(path)) => std::fs::read_to_string(path).map_err(|error| {
            Fault::failed(format!("cannot read the prompt from {}: {error}", path.display()))
                .hint("--prompt-file wants a file of UTF-8 text")
        })?,
        (None, None) => String::new(),
    };
    if prompt.trim().is_empty() {
        return Err(
            Fault::usage("the prompt is empty").hint("give it with --prompt TEXT, --prompt - or --prompt-file FILE")
        );
    }
    carriable(prompt)
}

/// What is asked of which nodes; no nodes means all.
pub(super) struct Asked {
    pub(super) nodes: Vec<u32>,
    pub(super) prompt: String,
    pub(super) steer: bool,
}

/// Where the prompt is on each node.
#[derive(Debug)]
pub(super) struct Turns {
    /// How many nodes were asked.
    expected: usize,
    turns: BTreeMap<u32, Turn>,
}

#[derive(Debug)]
pub(super) struct Turn {
    injection_id: String,
    end: Option<Result<(), String>>,
}

impl Turns {
    pub(super) fn new(expected: usize) -> Self {
        Self { expected, turns: BTreeMap::new() }
    }

    /// The node has this injection, unless another of it is known.
    pub(super) fn accept(&mut self, node: u32, injection_id: &str) -> &mut Turn {
        self.turns.entry(node).or_insert_with(|| Turn { injection_id: injection_id.to_owned(), end: None })
    }

    /// The injection ids of all nodes are known.
    fn all_accepted(&self) -> bool {
        self.turns.len() >= self.expected
    }

    pub(super) fn all_over(&self) -> bool {
        self.all_accepted() && self.turns.values().all(|turn| turn.end.is_some())
    }

    /// How many turns ended well.
    pub(super) fn completed(&self) -> usize {
        self.turns.values().filter(|turn| turn.end == Some(Ok(()))).count()
    }

    /// The router's word on one node.
    fn step(&mut self, step: &pb::InjectResponse) {
        let turn = self.accept(step.node_id, &step.injection_id);
        // A completed turn is told by its event too, behind its answer; to end it here would cut the answer off.
        if step.state() == pb::InjectionState::Failed {
            turn.finish(Err(step.error.clone()));
        }
    }

    /// Takes note of an event; false when it has nothing to do with this prompt.
    pub(super) fn event(&mut self, event: &pb::Event) -> bool {
        let Some(turn) = event.node_id.and_then(|node| self.turns.get_mut(&node)) else { return false };
        if event.injection_id.is_empty() {
            return true; // About the node as such: that it restarts, for example.
        }
        if event.injection_id != turn.injection_id {
            return false;
        }
        let data = data_of(event);
        let text = |key: &str| data.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        match event.event.as_str() {
            "turn_complete" => match (text("status").as_str(), text("error")) {
                ("completed" | "", _) => turn.finish(Ok(())),
                (status, error) if error.is_empty() => turn.finish(Err(status.to_owned())),
                (_, error) => turn.finish(Err(error)),
            },
            "inject_failed" => turn.finish(Err(text("error"))),
            _ => {}
        }
        true
    }

    /// Nothing more will come.
    fn give_up(&mut self, why: &str) {
        for turn in self.turns.values_mut() {
            turn.finish(Err(why.to_owned()));
        }
    }

    fn summary(&self) -> Value {
        let injections: Vec<Value> = self
            .turns
            .iter()
            .map(|(node, turn)| {
                let (status, error) = match &turn.end {
                    Some(Ok(())) => ("completed", None),
                    Some(Err(error)) => ("failed", Some(error)),
                    None => ("running", None),
                };
                json!({"node_id": node, "injection_id": turn.injection_id, "status": status, "error": error})
            })
            .collect();
        let completed = self.completed();
        let failed = self.turns.len() - completed;
        json!({"summary": {"nodes": self.turns.len(), "completed": completed, "failed": failed, "injections": injections}})
    }

    /// Fails when any node did.
    pub(super) fn verdict(&self, swarm_id: &str) -> Result<(), Fault> {
        const SHOWN: usize = 5;
        let failed: Vec<(u32, &str, &str)> = self
            .turns
            .iter()
            .filter_map(|(node, turn)| match &turn.end {
                Some(Err(error)) => Some((*node, turn.injection_id.as_str(), error.as_str())),
                _ => None,
            })
            .collect();
        let Some((node, injection, _)) = failed.first() else { return Ok(()) };
        let mut reasons: Vec<String> =
            failed.iter().take(SHOWN).map(|(node, _, error)| format!("node {node}: {}", words::dash(error))).collect();
        if failed.len() > SHOWN {
            reasons.push(format!("and {} more", failed.len() - SHOWN));
        }
        let of = words::count(self.turns.len(), "node");
        let subject = if injection.is_empty() { format!("{swarm_id}/{node}") } else { (*injection).to_owned() };
        Err(Fault::failed(format!("the prompt failed on {} of {of}: {}", failed.len(), reasons.join("; ")))
            .hint(format!("drover why {subject}")))
    }
}

impl Turn {
    /// The first end counts.
    fn finish(&mut self, end: Result<(), String>) {
        self.end.get_or_insert(end);
    }
}

/// How long after the end of a swarm its last turns may still be told.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// How the sending of a prompt ended.
#[derive(Debug)]
pub(super) enum Carried {
    /// Every turn is over.
    Out(Turns),
    /// The person left before.
    Left {
        /// The router has taken the prompt for every node.
        accepted: bool,
    },
}

/// Sends the prompt and passes on every event that belongs to it, until all turns are over or the person leaves.
pub(super) async fn carry_out(
    app: &App,
    client: &Client,
    swarm: &pb::Swarm,
    asked: Asked,
    mut tell: impl FnMut(&pb::Event) -> std::io::Result<()>,
) -> anyhow::Result<Carried> {
    let expected = if asked.nodes.is_empty() { swarm.node_count as usize } else { asked.nodes.len() };
    let request = pb::InjectRequest {
        request_id: request_id(),
        swarm_id: swarm.swarm_id.clone(),
        nodes: asked.nodes,
        content: asked.prompt,
        injection_id: String::new(),
        steer: asked.steer,
        traceparent: traceparent(),
    };
    let mut steps: Resumable<pb::InjectResponse> = watch::repeatable(app, client.rpc.clone(), move |mut rpc: Rpc| {
        let request = request.clone();
        Box::pin(async move { rpc.inject(request).await })
    });
    // Every event of this prompt comes after what the log held when we connected.
    let mut watch = Watch::new(app, client.rpc.clone(), client.info.last_seq, &swarm.swarm_id, true);
    let mut turns = Turns::new(expected);
    let mut early = Vec::new();
    let mut delivering = true;
    let mut last_words: Option<Instant> = None;
    while !turns.all_over() {
        let events = tokio::select! {
            () = app.stop.cancelled() => return Ok(Carried::Left { accepted: turns.all_accepted() }),
            step = steps.next(), if delivering => {
                match step? {
                    Step::Item(step) => turns.step(&step),
                    Step::End if turns.all_accepted() => delivering = false,
                    Step::End => steps.cut_short().await?,
                }
                if !turns.all_accepted() {
                    continue;
                }
                std::mem::take(&mut early)
            }
            events = watch.next() => events?.unwrap_or_default(),
            () = until(last_words) => {
                turns.give_up("the swarm has ended");
                continue;
            }
        };
        if !turns.all_accepted() {
            // Whose events these are is known when every node has its injection id.
            early.extend(events);
            continue;
        }
        for event in &events {
            if turns.event(event) {
                tell(event)?;
            }
            if ends_swarm(event) {
                last_words.get_or_insert(Instant::now() + LAST_WORDS);
            }
        }
    }
    Ok(Carried::Out(turns))
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accepted(node_id: u32, injection: &str) -> pb::InjectResponse {
        pb::InjectResponse {
            node_id,
            injection_id: injection.into(),
            state: pb::InjectionState::Accepted.into(),
            ..Default::default()
        }
    }

    fn event(node: u32, injection: &str, name: &str, data: &str) -> pb::Event {
        pb::Event {
            event: name.into(),
            node_id: Some(node),
            injection_id: injection.into(),
            data: data.to_owned().into(),
            ..Default::default()
        }
    }

    #[test]
    fn it_ends_when_every_turn_has_ended_and_not_with_somebody_elses() {
        let mut turns = Turns::new(2);
        turns.step(&accepted(0, "a"));
        assert!(!turns.all_accepted());
        turns.step(&accepted(1, "b"));
        turns.step(&accepted(1, "b")); // The same word again after a reconnect.
        assert!(!turns.event(&event(0, "other", "turn_complete", "{}")), "another prompt's turn on the same node");
        assert!(!turns.event(&event(7, "a", "turn_complete", "{}")));
        assert!(turns.event(&event(0, "a", "turn_complete", r#"{"status":"completed"}"#)));
        assert!(!turns.all_over());
        assert!(turns.event(&event(1, "b", "turn_complete", r#"{"status":"failed","error":"the worker died"}"#)));
        assert!(turns.all_over());
        let fault = turns.verdict("s").unwrap_err();
        assert_eq!(fault.message, "the prompt failed on 1 of 2 nodes: node 1: the worker died");
        assert_eq!(fault.hint, "drover why b");
        assert_eq!(turns.summary()["summary"]["completed"], 1);
    }

    #[test]
    fn a_node_that_never_took_the_prompt_fails_it_with_the_reason() {
        let mut turns = Turns::new(1);
        turns.step(&pb::InjectResponse {
            state: pb::InjectionState::Failed.into(),
            error: "the node was given up".into(),
            ..accepted(0, "a")
        });
        assert!(turns.all_over());
        assert!(turns.verdict("s").unwrap_err().message.contains("the node was given up"));
    }

    #[test]
    fn the_first_end_of_a_turn_counts() {
        let mut turns = Turns::new(1);
        turns.step(&accepted(0, "a"));
        turns.event(&event(0, "a", "turn_complete", "{}"));
        turns.give_up("the swarm has ended");
        assert!(turns.verdict("s").is_ok());
    }
}
