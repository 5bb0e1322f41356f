//! Case 10: source and target are cut off from each other in the middle of a move while people talk to both. Real daemons, each on a host of
//! its own, which is a network namespace; what all share is a directory.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use drover_proto::handoff::handoff_service_client::HandoffServiceClient;
use drover_proto::handoff::{GetSessionRequest, GetStatusRequest, HandoffRequest, OpenSession, SendRequest};
use drover_service::pki::Authority;
use drover_service::{MAX_MESSAGE_BYTES, Target, connect};
use drover_testkit::cluster::{program, scratch_dir};
use drover_testkit::netns::{self, Host, Lab, Program};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use tempfile::TempDir;
use tokio::time::timeout;

use super::nodes::{Door, LIMIT, Said, listen, newest_owner};

const GOSSIP: u16 = 7946;
const DOOR: u16 = 7947;
/// How long the two are apart: long enough that each gives the other up.
const APART: Duration = Duration::from_secs(6);
const SESSION: &str = "split";

/// Hosts with their daemons. Dropping it ends everything.
struct Hosts {
    // Programs end before the namespaces that they are in.
    programs: Vec<Program>,
    lab: Lab,
    dir: TempDir,
}

impl Hosts {
    fn start(count: usize) -> anyhow::Result<Self> {
        let lab = Lab::new(&[count])?;
        let dir = scratch_dir("split-")?;
        let authority = Authority::open_or_create_at(&dir.path().join("pki"))?;
        let mut hosts = Self { programs: Vec::new(), lab, dir };
        let seed = format!("{}:{GOSSIP}", hosts.host(0).addr);
        for index in 0..count {
            authority
                .issue(&name(index), Duration::from_hours(24))?
                .store(&hosts.path(&format!("{index}-identity")))?;
            let addr = hosts.host(index).addr;
            let config = format!(
                "swarm:\n  bind_addr: {addr}\n  bind_port: {GOSSIP}\n  listen: 0.0.0.0:7954\n  \
                 discovery: {{ gossip_interval: 200ms, node_timeout: 1s, dead_node_timeout: 60s, join_addrs: [\"{seed}\"] }}\n  \
                 handoff: {{ timeout: 20s, max_retries: 1, retry_delay: 200ms }}\n  rpc: {{ timeout: 2s }}\n  \
                 load_monitor: {{ enabled: false, max_sessions: 100000 }}\n"
            );
            fs::create_dir_all(hosts.path(&format!("{index}-state")))?;
            fs::write(hosts.path(&format!("{index}.yaml")), config)?;
        }
        for index in 0..count {
            for daemon in ["drover-gossip-membership", "drover-handoff-coordinator"] {
                let host = hosts.host(index);
                let mut command = host.command(program(daemon)?);
                command.arg("--config").arg(hosts.path(&format!("{index}.yaml")));
                if daemon == "drover-handoff-coordinator" {
                    command.arg("--listen").arg(format!("0.0.0.0:{DOOR}"));
                }
                command
                    .env("DROVER_IDENTITY", hosts.path(&format!("{index}-identity")))
                    .env("DROVER_STATE_DIR", hosts.path(&format!("{index}-state")))
                    .env("DROVER_SWARM_ID", "lab")
                    .env("DROVER_NODE_ID", index.to_string())
                    .env("DROVER_SESSIONS_DIR", hosts.disk(index))
                    .env("DROVER_SHARED_SESSIONS", hosts.shared())
                    .env("DROVER_LOG", "info,drover_handoff_coordinator=debug")
                    .env("NO_COLOR", "1");
                let program = host.spawn(command)?;
                hosts.programs.push(program);
            }
        }
        for index in 0..count {
            hosts.until(index, "its peers", async |mut door| {
                let status = door.get_status(GetStatusRequest {}).await.ok()?.into_inner();
                (status.peers as usize + 1 >= count).then_some(())
            })?;
        }
        Ok(hosts)
    }

    fn host(&self, index: usize) -> &Host {
        &self.lab.hosts()[index]
    }

    fn path(&self, what: &str) -> PathBuf {
        self.dir.path().join(what)
    }

    fn disk(&self, index: usize) -> PathBuf {
        self.path(&format!("{index}-disk"))
    }

    fn shared(&self) -> PathBuf {
        self.path("shared")
    }

    /// Does something with the door of a host, as a program that runs there.
    fn at<T: Send>(&self, index: usize, act: impl AsyncFnOnce(Door) -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        self.host(index).within(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let channel = connect(Target::Address(format!("127.0.0.1:{DOOR}")));
                act(HandoffServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES)).await
            })
        })?
    }

    fn until<T: Send>(
        &self,
        index: usize,
        what: &str,
        mut ask: impl AsyncFnMut(Door) -> Option<T> + Send,
    ) -> anyhow::Result<T> {
        let told = self.at(index, async |door| {
            let deadline = Instant::now() + LIMIT;
            loop {
                if let Ok(Some(found)) = timeout(Duration::from_secs(3), ask(door.clone())).await {
                    return Ok(found);
                }
                if Instant::now() >= deadline {
                    bail!("{} has not {what} within {LIMIT:?}", name(index));
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
        told.with_context(|| format!("it said last:\n{}", self.programs[2 * index + 1].tail(15)))
    }

    /// Says something at a host until it is answered, as a client does.
    fn say(&self, index: usize, request: &str, prompt: &str) -> anyhow::Result<Said> {
        let ask = SendRequest {
            session_id: SESSION.to_owned(),
            request_id: request.to_owned(),
            prompt: prompt.to_owned(),
            open: Some(OpenSession { agent: "echo".to_owned(), ..OpenSession::default() }),
            ..SendRequest::default()
        };
        self.at(index, async |mut door| {
            let (deadline, mut said) = (Instant::now() + 2 * LIMIT, Said::default());
            loop {
                match listen(&mut door, ask.clone(), &mut said).await {
                    Ok(()) => return Ok(said),
                    Err(error) if Instant::now() >= deadline => {
                        return Err(error.context(format!("{request} is not answered at {}", name(index))));
                    }
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            }
        })
    }

    fn owner(&self) -> anyhow::Result<(u64, usize)> {
        let (epoch, owner, _) = newest_owner(&self.shared(), SESSION).context("nobody owns it")?;
        let index = owner.rsplit_once('/').and_then(|(_, index)| index.parse().ok());
        Ok((epoch, index.context("an owner without an index")?))
    }
}

fn name(index: usize) -> String {
    format!("lab/{index}")
}

/// Why there is no laboratory here; nothing when there is one.
pub fn usable() -> Result<(), String> {
    netns::usable(&[])
}

/// Rounds of: a move begins, the two are cut off from each other at a moment that chance chooses, and meanwhile people talk to both, also
/// under the same name of a turn. Every turn is answered once, and within an epoch by one node.
pub async fn both_sides_reach_clients(seed: u64, rounds: usize) -> anyhow::Result<String> {
    if let Err(why) = usable() {
        return Ok(format!("left out: {why}"));
    }
    tokio::task::spawn_blocking(move || split(seed, rounds)).await?
}

fn split(seed: u64, rounds: usize) -> anyhow::Result<String> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let hosts = Hosts::start(2)?;
    hosts.say(0, "open", "hello")?;
    for n in 0..4 {
        hosts.say(0, &format!("grow{n}"), "@echo size=1048576")?;
    }
    let (mut turns, mut both, mut apart_answers) = (BTreeMap::<String, Said>::new(), 0, 0);
    for round in 0..rounds {
        let (before, from) = hosts.owner()?;
        let to = 1 - from;
        let copy = hosts.disk(to).join(SESSION).join("copy.jsonl");
        let (over, moment) = (AtomicBool::new(false), rng.random_range(0..4));
        let talk = |index: usize| {
            let (hosts, over) = (&hosts, &over);
            move || {
                let mut said = Vec::new();
                for n in 0.. {
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                    // Every third turn is asked at both under the same name.
                    let request =
                        if n % 3 == 2 { format!("both{round}-{n}") } else { format!("at{index}-{round}-{n}") };
                    let answered = hosts.say(index, &request, &request)?;
                    said.push((request, Instant::now(), answered));
                }
                anyhow::Ok(said)
            }
        };
        let order = || {
            let request = HandoffRequest { session_id: SESSION.to_owned(), to: name(to) };
            // Whether it arrives does not matter here.
            hosts.at(from, async |mut door| {
                let _ = timeout(LIMIT, door.handoff(request)).await;
                Ok(())
            })
        };
        let cut = || -> anyhow::Result<std::ops::Range<Instant>> {
            let deadline = Instant::now() + Duration::from_secs(5);
            let due = || match moment {
                0 => true,
                1 => fs::metadata(&copy).is_ok_and(|meta| meta.len() > 0),
                2 => fs::metadata(&copy).is_ok_and(|meta| meta.len() > 4 << 20),
                _ => hosts.owner().is_ok_and(|(epoch, _)| epoch > before),
            };
            while !due() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_micros(500));
            }
            hosts.host(to).plugged(false)?;
            let begun = Instant::now();
            std::thread::sleep(APART);
            hosts.host(to).plugged(true)?;
            Ok(begun..Instant::now())
        };
        let (told, apart) = std::thread::scope(|scope| {
            let talks = [scope.spawn(talk(0)), scope.spawn(talk(1))];
            let ordered = scope.spawn(order);
            let was_cut = cut();
            // Once they are together again a moment longer.
            std::thread::sleep(Duration::from_secs(1));
            over.store(true, Ordering::Relaxed);
            let told = talks.map(|talk| talk.join().map_err(|_| anyhow::anyhow!("a client panicked"))?);
            ordered.join().map_err(|_| anyhow::anyhow!("the order panicked"))??;
            anyhow::Ok((told, was_cut?))
        })?;
        for said in told {
            for (request, at, said) in said? {
                ensure!(said.answer.text == request, "seed {seed}: {request} is answered {:?}", said.answer);
                apart_answers += usize::from(apart.contains(&at));
                if let Some(other) = turns.insert(request.clone(), said.clone()) {
                    both += 1;
                    ensure!(
                        other.answer.turn == said.answer.turn,
                        "seed {seed}: {request} is turn {} and {}",
                        other.answer.turn,
                        said.answer.turn
                    );
                }
            }
        }
    }
    judge(&hosts, &turns).with_context(|| format!("seed {seed}"))?;
    let epochs = hosts.owner()?.0;
    Ok(format!(
        "{rounds} cuts, {} turns, {both} of them asked at both sides, {apart_answers} while they were apart; {epochs} epochs",
        turns.len()
    ))
}

/// Every turn is there once with its answer, and every epoch has one owner.
fn judge(hosts: &Hosts, turns: &BTreeMap<String, Said>) -> anyhow::Result<()> {
    for index in [0, 1] {
        hosts.say(index, &format!("end{index}"), &format!("end{index}"))?;
    }
    let request = GetSessionRequest { session_id: SESSION.to_owned(), last: 0 };
    let found = hosts.until(0, "the whole session", async |mut door| {
        door.get_session(request.clone()).await.ok().map(tonic::Response::into_inner)
    })?;
    let mut asked = BTreeMap::<&str, u32>::new();
    let mut answered = BTreeMap::<u32, u32>::new();
    for message in &found.messages {
        if message.role == "user" {
            *asked.entry(&message.content).or_default() += 1;
        } else {
            *answered.entry(message.turn).or_default() += 1;
        }
    }
    for (request, said) in turns {
        ensure!(asked.get(request.as_str()) == Some(&1), "{request} was asked {:?} times", asked.get(request.as_str()));
        let times = answered.get(&said.answer.turn);
        ensure!(times == Some(&1), "{request} is answered {times:?} times");
    }
    let mut names: Vec<String> = fs::read_dir(hosts.shared().join(SESSION).join("owners"))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    for (at, name) in names.iter().enumerate() {
        ensure!(*name == format!("{:020}.json", at + 1), "{name} stands at epoch {}", at + 1);
    }
    // Whoever answered in an epoch owned it.
    for (request, said) in turns {
        let epoch = said.answer.epoch;
        let path = hosts.shared().join(SESSION).join("owners").join(format!("{epoch:020}.json"));
        let record: serde_json::Value = serde_json::from_str(&fs::read_to_string(path)?)?;
        ensure!(record["owner"]["node"] == said.answer.node_id.as_str(), "{request} in epoch {epoch}: {record}");
    }
    Ok(())
}
