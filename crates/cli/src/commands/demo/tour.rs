//! The steps of the demo, each with what was expected and how long it took.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use drover_proto::common::LaunchSpec;
use drover_proto::router as pb;
use drover_service::process::{self, ProcessId};
use drover_service::{StateDir, address_book};
use drover_types::AgentKind;
use rustix::process::Signal;
use serde_json::{Value, json};

use super::{Chosen, Row, analyses};
use crate::app::App;
use crate::client::{Client, unary};
use crate::commands::follow::Teller;
use crate::commands::{inject, launch, members, status, terminate};
use crate::daemons::{DISPATCHER, LOGIN_SIDE, ROUTER};
use crate::dispatcher;
use crate::fault::Fault;
use crate::files::Lock;
use crate::render::json::data_of;
use crate::render::words;
use crate::start;
use crate::supervise::{Supervisor, signal};
use crate::watch::Watch;

/// Name of the first step.
const START: &str = "start";
/// The first answer of the built-in agent is there by then.
const FIRST_ANSWER: Duration = Duration::from_secs(5);
/// A model that answers has begun to by then; one that does not shall not use up the time of the built-in agent.
const FIRST_WORD: Duration = Duration::from_secs(8);
/// A killed worker is back by then.
const COMES_BACK: Duration = Duration::from_secs(15);
/// The nodes have found each other, and said so, by then.
const FIND_EACH_OTHER: Duration = Duration::from_secs(8);
/// A force-ended swarm is gone by then; after that its processes are killed one by one.
const FORCED_END: Duration = Duration::from_secs(5);

/// A demo under way.
pub(super) struct Tour {
    app: App,
    state: StateDir,
    nodes: u32,
    agent: &'static str,
    began: Instant,
    /// Another agent takes its place when this one is silent.
    may_fall_back: bool,
    /// Another agent was shown before and took its time.
    fell_back: bool,
    /// So many times as long as usual each step may take.
    slack: f64,
    rows: Vec<Row>,
    _lock: Lock,
    daemons: Option<Supervisor>,
    client: Option<Client>,
    swarm: Option<pb::Swarm>,
    /// The swarm that is shown, also when it has ended.
    swarm_id: String,
    /// Prompts that were accepted, by node; each must show up in the log as one turn.
    prompts: usize,
}

impl Tour {
    pub(super) fn new(
        app: &App,
        state: StateDir,
        nodes: u32,
        agent: &Chosen,
        began: Instant,
        slack: f64,
    ) -> anyhow::Result<Self> {
        let config = state.path().join("demo.json");
        std::fs::write(&config, settings(app).to_string()).context("cannot write the demo's configuration")?;
        let mut app = app.clone();
        app.own_state = Some(state.clone());
        app.config_path = Some(config);
        let lock = Lock::take(&state, start::UP_LOCK)?.context("the demo's own directory is in use")?;
        Ok(Self {
            app,
            state,
            nodes,
            agent: agent.name,
            began,
            may_fall_back: agent.may_fall_back,
            fell_back: false,
            slack,
            rows: Vec::new(),
            _lock: lock,
            daemons: None,
            client: None,
            swarm: None,
            swarm_id: String::new(),
            prompts: 0,
        })
    }

    /// The built-in agent, from the launch on; the daemons stay.
    pub(super) async fn use_echo(&mut self) {
        self.end_swarms().await;
        self.agent = AgentKind::Echo.as_str();
        self.may_fall_back = false;
        self.fell_back = true;
        self.rows.retain(|row| row.step == START);
        self.prompts = 0;
    }

    /// Ends what was launched, also a launch that was left in the middle.
    async fn end_swarms(&mut self) {
        self.swarm = None;
        let Some(mut client) = self.client.clone() else { return };
        let ending = async {
            let swarms = unary(client.rpc.list_swarms(pb::ListSwarmsRequest {})).await?.swarms;
            for swarm in swarms.iter().filter(|swarm| !matches!(swarm.status.as_str(), "terminated" | "failed")) {
                terminate::terminate(&self.app, &client, &swarm.swarm_id, true).await?;
            }
            anyhow::Ok(())
        };
        // What is left then is found by where it works.
        let _ = tokio::time::timeout(FORCED_END, ending).await;
    }

    pub(super) async fn play(&mut self) -> anyhow::Result<()> {
        if self.daemons.is_none() {
            self.start_daemons().await?;
        }
        self.launch().await?;
        self.inject().await?;
        self.show_status().await?;
        self.show_members().await?;
        self.move_a_session().await?;
        self.kill_a_worker().await?;
        self.kill_the_router().await?;
        self.terminate().await?;
        self.check_the_log().await?;
        self.analyse().await?;
        self.stop_daemons().await
    }

    /// Ends everything that still runs, without a word: this is not part of the tour.
    pub(super) async fn clean_up(&mut self) {
        self.end_swarms().await;
        if let Some(daemons) = self.daemons.take() {
            daemons.stop().await;
        }
    }

    pub(super) fn into_rows(mut self) -> Vec<Row> {
        let micros = self.began.elapsed().as_micros() as u64;
        self.rows.push(Row { step: "in all", seen: format!("{} agent", self.agent), micros, ok: true });
        std::mem::take(&mut self.rows)
    }

    pub(super) fn app(&self) -> &App {
        &self.app
    }

    pub(super) fn nodes(&self) -> u32 {
        self.nodes
    }

    pub(super) fn heading(&self, text: &str) -> io::Result<()> {
        if self.app.global.json { Ok(()) } else { self.app.screen.out(&format!("\n> {text}")) }
    }

    pub(super) fn saw(&mut self, step: &'static str, since: Instant, ok: bool, seen: impl Into<String>) {
        self.rows.push(Row { step, seen: seen.into(), micros: since.elapsed().as_micros() as u64, ok });
    }

    fn client(&self) -> anyhow::Result<Client> {
        self.client.clone().context("the demo has no router yet")
    }

    fn swarm(&self) -> anyhow::Result<pb::Swarm> {
        self.swarm.clone().context("the demo has no swarm yet")
    }

    async fn start_daemons(&mut self) -> anyhow::Result<()> {
        self.heading(&format!("starting {} in {}", LOGIN_SIDE.join(", "), self.state.path().display()))?;
        let since = Instant::now();
        start::settle_config(&self.app, &self.state)?;
        let daemons = Supervisor::start(&self.state, self.app.config_path.as_deref(), LOGIN_SIDE);
        self.daemons.insert(daemons).healthy(LOGIN_SIDE).await?;
        let mut client = Client::connect(&self.app).await?;
        let deadline = Instant::now() + Duration::from_secs(5).mul_f64(self.slack);
        loop {
            let info = unary(client.rpc.get_info(pb::GetInfoRequest {})).await?;
            if info.allocator_error.is_empty() && info.follower_error.is_empty() {
                break;
            }
            let why = [info.allocator_error, info.follower_error].join(" ");
            ensure!(Instant::now() < deadline, "the daemons do not find each other: {}", why.trim());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.client = Some(client);
        self.saw(START, since, true, format!("{} answer", words::count(LOGIN_SIDE.len(), "daemon")));
        Ok(())
    }

    async fn launch(&mut self) -> anyhow::Result<()> {
        let prompt = "You are a focused autonomous agent.";
        self.heading(&format!("drover launch --nodes {} --agent {} --prompt \"{prompt}\"", self.nodes, self.agent))?;
        let since = Instant::now();
        let mut client = self.client()?;
        let before = unary(client.rpc.get_info(pb::GetInfoRequest {})).await?.last_seq;
        let catalogue = unary(client.rpc.list_providers(pb::ListProvidersRequest {})).await?.providers;
        let local = catalogue.into_iter().find(|provider| provider.backend == "local");
        let spec = LaunchSpec {
            node_count: self.nodes,
            agent: self.agent.to_owned(),
            system_prompt: prompt.to_owned(),
            provider: local.context("the catalogue has no local provider")?.id,
            ..Default::default()
        };
        let swarm = launch::launch(&self.app, &mut client, spec).await?.context("the launch was left")?;
        let swarm_id = swarm.swarm_id.clone();
        let up = format!("{} {}, agent {}", words::count(swarm.node_count as usize, "node"), swarm.status, swarm.agent);
        self.saw("launch", since, swarm.status == "running", up);
        self.swarm = Some(swarm);
        self.swarm_id.clone_from(&swarm_id);

        let mut watch = Watch::new(&self.app, client.rpc.clone(), before, &swarm_id, true);
        let mut teller = Teller::new(&self.app);
        let mut first: Option<Instant> = None;
        let mut ended = 0;
        let (silent_since, patience) = (Instant::now(), FIRST_WORD.mul_f64(self.slack));
        while ended < self.nodes as usize {
            let left = match first {
                None if self.may_fall_back => patience.saturating_sub(silent_since.elapsed()),
                _ => Duration::MAX,
            };
            let Ok(heard) = tokio::time::timeout(left, watch.next()).await else {
                bail!("its model said nothing for {} s", patience.as_secs());
            };
            for event in &heard?.unwrap_or_default() {
                teller.tell(event)?;
                match event.event.as_str() {
                    "assistant_delta" | "assistant" => {
                        first.get_or_insert_with(Instant::now);
                    }
                    "turn_complete" => {
                        ensure_completed(event)?;
                        ended += 1;
                    }
                    _ => {}
                }
            }
        }
        self.prompts += ended;
        let took = first.map_or(Duration::MAX, |first| first - self.began);
        let in_time =
            took < FIRST_ANSWER.mul_f64(self.slack) || self.fell_back || self.agent != AgentKind::Echo.as_str();
        let micros = took.as_micros() as u64;
        self.rows.push(Row { step: "first answer", seen: "since the demo began".to_owned(), micros, ok: in_time });
        Ok(())
    }

    /// Sends a prompt to nodes and expects a completed turn of each.
    async fn ask(
        &mut self,
        nodes: Vec<u32>,
        prompt: &str,
        mut on_event: impl FnMut(&pb::Event),
    ) -> anyhow::Result<(usize, u64)> {
        let swarm = self.swarm()?;
        let mut client = self.client()?;
        client.info = unary(client.rpc.get_info(pb::GetInfoRequest {})).await?;
        let expected = if nodes.is_empty() { swarm.node_count as usize } else { nodes.len() };
        let mut teller = Teller::new(&self.app);
        let (mut last, mut repeated) = (0, 0_u64);
        let asked = inject::Asked { nodes, prompt: prompt.to_owned(), steer: false };
        let turns = inject::carry_out(&self.app, &client, &swarm, asked, |event| {
            repeated += u64::from(event.seq <= last);
            last = event.seq;
            on_event(event);
            teller.tell(event)
        })
        .await?;
        let inject::Carried::Out(turns) = turns else { bail!("the demo was stopped") };
        turns.verdict(&swarm.swarm_id)?;
        self.prompts += expected;
        Ok((turns.completed(), repeated))
    }

    async fn inject(&mut self) -> anyhow::Result<()> {
        let prompt = "Optimize GEMM tiling.";
        self.heading(&format!("drover inject {} --prompt \"{prompt}\"", words::short(&self.swarm()?.swarm_id, 13)))?;
        let since = Instant::now();
        let (completed, _) = self.ask(Vec::new(), prompt, |_| {}).await?;
        let nodes = self.nodes as usize;
        self.saw("inject", since, completed == nodes, format!("{completed} of {nodes} nodes answered"));
        Ok(())
    }

    async fn show_status(&mut self) -> anyhow::Result<()> {
        let id = self.swarm()?.swarm_id;
        self.heading(&format!("drover status {}", words::short(&id, 13)))?;
        let since = Instant::now();
        let swarm = self.client()?.find(&id).await?;
        if !self.app.global.json {
            status::show(&self.app, &swarm, "")?;
        }
        let ready = swarm.nodes.iter().filter(|node| node.state == "idle").count();
        let seen = format!("swarm {}, {ready} of {} nodes idle", swarm.status, swarm.nodes.len());
        self.saw("status", since, swarm.status == "running" && ready == self.nodes as usize, seen);
        Ok(())
    }

    async fn show_members(&mut self) -> anyhow::Result<()> {
        self.heading("drover members")?;
        let since = Instant::now();
        let mut client = self.client()?;
        let swarm_id = self.swarm()?.swarm_id;
        let answer = loop {
            let asked = pb::ListMembersRequest { swarm_id: swarm_id.clone() };
            let answer = unary(client.rpc.list_members(asked)).await?;
            if alive(&answer) == self.nodes as usize || since.elapsed() > FIND_EACH_OTHER.mul_f64(self.slack) {
                break answer;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        if !self.app.global.json {
            members::show(&self.app, &answer)?;
        }
        let alive = alive(&answer);
        let seen = format!("{alive} of {} nodes found each other, node {} leads", self.nodes, leader(&answer));
        self.saw("members", since, alive == self.nodes as usize, seen);
        Ok(())
    }

    async fn kill_a_worker(&mut self) -> anyhow::Result<()> {
        let id = self.swarm()?.swarm_id;
        let mut client = self.client()?;
        let node = client.find(&id).await?.nodes.pop().context("the swarm has no nodes")?;
        let worker = process::of(node.pid).context("the worker's process is not there")?;
        self.heading(&format!("kill -9 {} (the worker of node {}), then ask that node again", node.pid, node.node_id))?;
        let since = Instant::now();
        ensure!(signal(worker, Signal::KILL), "the worker could not be killed");
        let back = loop {
            let swarm = client.find(&id).await?;
            let now = swarm.nodes.into_iter().find(|now| now.node_id == node.node_id).context("the node is gone")?;
            if now.generation > node.generation && now.state == "idle" {
                break now;
            }
            ensure!(now.state != "failed", "node {} was given up: {}", node.node_id, now.reason);
            ensure!(
                since.elapsed() < COMES_BACK.mul_f64(self.slack),
                "node {} is not back but {}: {}",
                node.node_id,
                now.state,
                now.reason
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        self.saw("worker killed", since, true, format!("node {} came back as start {}", back.node_id, back.generation));
        let since = Instant::now();
        let (completed, _) = self.ask(vec![node.node_id], "Are you back?", |_| {}).await?;
        self.saw("it answers", since, completed == 1, format!("node {} answered after its restart", node.node_id));
        Ok(())
    }

    async fn kill_the_router(&mut self) -> anyhow::Result<()> {
        let entry = address_book::read(&self.state, ROUTER).context("the router is not in the address book")?;
        let router = ProcessId { pid: entry.pid, start_time: entry.start_time };
        self.heading(&format!("kill -9 {} (the router) in the middle of a turn", entry.pid))?;
        let since = Instant::now();
        // The built-in agent can be told to take its time, so that the kill hits a running turn.
        let slow = if self.agent == AgentKind::Echo.as_str() { "@echo delay=400ms\n" } else { "" };
        let prompt = format!("{slow}Are you still there?");
        let mut killed = false;
        let (completed, repeated) = self
            .ask(Vec::new(), &prompt, |event| {
                if event.event == "turn_started" && !killed {
                    killed = signal(router, Signal::KILL);
                }
            })
            .await?;
        // Where the answers were there before the kill it has yet to come back.
        let again = || address_book::read(&self.state, ROUTER).is_some_and(|entry| entry.pid != router.pid);
        while !again() && since.elapsed() < COMES_BACK.mul_f64(self.slack) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let nodes = self.nodes as usize;
        let ok = killed && completed == nodes && repeated == 0 && again();
        let seen = format!("{completed} of {nodes} answers, {repeated} events twice");
        self.saw("router killed", since, ok, seen);
        Ok(())
    }

    async fn terminate(&mut self) -> anyhow::Result<()> {
        let id = self.swarm()?.swarm_id;
        self.heading(&format!("drover terminate {}", words::short(&id, 13)))?;
        let since = Instant::now();
        let client = self.client()?;
        let swarm = terminate::terminate(&self.app, &client, &id, false).await?;
        self.swarm = None;
        self.saw("terminate", since, swarm.status == "terminated", format!("swarm {}", swarm.status));
        Ok(())
    }

    /// Has ten analyses done one after another, then side by side, by a provider that only pretends.
    async fn analyse(&mut self) -> anyhow::Result<()> {
        self.heading(&format!(
            "drover dispatch analyses.txt --provider sim (the same {}, both ways)",
            analyses::COUNT
        ))?;
        let since = Instant::now();
        let mut daemon = Supervisor::start(&self.state, self.app.config_path.as_deref(), &[DISPATCHER]);
        let seen = match daemon.healthy(&[DISPATCHER]).await {
            Ok(()) => analyses::both_ways(&mut dispatcher::rpc(&self.state)).await,
            Err(fault) => Err(fault.into()),
        };
        // It has nothing more to do, however that went.
        daemon.stop().await;
        let seen = seen?;
        // On a machine that needs more time for everything nothing is said of speed.
        self.saw("dispatch", since, seen.is_well() || self.slack > 1.0, seen.words());
        Ok(())
    }

    /// Reads the swarm's whole log again: every prompt one turn, every number once.
    async fn check_the_log(&mut self) -> anyhow::Result<()> {
        let since = Instant::now();
        let client = self.client()?;
        let mut watch = Watch::new(&self.app, client.rpc, 0, &self.swarm_id, false);
        let mut turns: BTreeMap<String, (u32, u32)> = BTreeMap::new();
        let mut events = 0_usize;
        while let Some(batch) = watch.next().await? {
            events += batch.len();
            for event in batch {
                let turn = turns.entry(event.injection_id).or_default();
                match event.event.as_str() {
                    "turn_started" => turn.0 += 1,
                    "turn_complete" => turn.1 += 1,
                    _ => {}
                }
            }
        }
        turns.retain(|_, turn| *turn != (0, 0));
        let once = turns.values().all(|turn| *turn == (1, 1));
        let seen = format!("{events} events, {} prompts, each carried out once", turns.len());
        let seen = if once { seen } else { format!("{events} events; not every prompt was carried out once") };
        self.saw("the log", since, once && turns.len() == self.prompts, seen);
        Ok(())
    }

    async fn stop_daemons(&mut self) -> anyhow::Result<()> {
        let since = Instant::now();
        let killed = match self.daemons.take() {
            Some(daemons) => daemons.stop().await,
            None => Vec::new(),
        };
        let seen =
            if killed.is_empty() { "in order".to_owned() } else { format!("{} had to be killed", killed.join(", ")) };
        self.saw("stop", since, killed.is_empty(), seen);
        Ok(())
    }
}

/// Local nodes and the user's own settings for the agent; ports and the rest stay out of the way of what runs already. The
/// nodes gossip five times as often as by default: who watches a tour does not wait for what is slow on purpose.
fn settings(app: &App) -> Value {
    let mut worker = serde_json::to_value(&app.config.worker).unwrap_or_default();
    worker["listen"] = Value::Null;
    let discovery = json!({"gossip_interval": "200ms", "node_timeout": "1s", "dead_node_timeout": "10s"});
    let count = analyses::COUNT;
    let scaling = json!({
        "limits": {"max_nodes": count, "max_concurrent_api": count},
        "sim": {"latency": analyses::LATENCY},
    });
    json!({
        "cluster": {"backend": "local"},
        "worker": worker,
        "swarm": {"discovery": discovery},
        "node_scaling": scaling,
    })
}

fn alive(answer: &pb::ListMembersResponse) -> usize {
    answer.members.iter().filter(|member| member.state == "alive").count()
}

/// The index of the node that reports.
fn leader(answer: &pb::ListMembersResponse) -> &str {
    answer.reporter.rsplit('/').next().unwrap_or_default()
}

fn ensure_completed(event: &pb::Event) -> Result<(), Fault> {
    let data = data_of(event);
    match data.get("status").and_then(Value::as_str) {
        None | Some("completed") => Ok(()),
        Some(status) => {
            let error = data.get("error").and_then(Value::as_str).unwrap_or_default();
            Err(Fault::failed(format!("a turn ended as {status}: {error}")))
        }
    }
}
