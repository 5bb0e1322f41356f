//! Sessions on real daemons while these are killed and stopped at every step of a move.
//!
//! The judge reads the session as it stands at the end, and the records of its owners: every turn that was asked is there once, in one order,
//! with its answer; every epoch has one owner; and the session is served.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use drover_proto::handoff::{DrainRequest, GetSessionRequest, HandoffRequest};
use drover_proto::transfer::tell_request::Message as Wire;
use drover_proto::transfer::{self as pb, TellRequest};
use drover_testkit::cluster::signal;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use rustix::process::Signal;
use tokio::time::{sleep, timeout};

use super::nodes::{LIMIT, Nodes, Plan};

/// Pause between two looks at something that takes milliseconds.
const LOOK: Duration = Duration::from_millis(1);

/// One session under test, with everything that was asked in it.
pub struct Story {
    /// Its name.
    pub session: String,
    asked: Vec<(String, String)>,
}

impl Story {
    /// A session of that name, not opened yet.
    pub fn new(session: &str) -> Self {
        Self { session: session.to_owned(), asked: Vec::new() }
    }

    /// Says something through a door and checks the answer.
    pub async fn say(&mut self, nodes: &Nodes, door: usize) -> anyhow::Result<()> {
        let n = self.asked.len();
        let (request, prompt) = (format!("r{n}"), format!("words number {n}"));
        self.asked.push((request.clone(), prompt.clone()));
        let said = nodes.say(door, &self.session, &request, &prompt).await?;
        ensure!(said.answer.text == prompt, "{request} is answered {:?}", said.answer);
        ensure!(said.text == prompt || said.text.is_empty(), "{request} was streamed as {:?}", said.text);
        Ok(())
    }

    /// Lets the session have so many MiB.
    pub async fn grow(&mut self, nodes: &Nodes, door: usize, mib: usize) -> anyhow::Result<()> {
        for _ in 0..mib {
            let n = self.asked.len();
            let (request, prompt) = (format!("r{n}"), "@echo size=1048576".to_owned());
            self.asked.push((request.clone(), prompt.clone()));
            let said = nodes.say(door, &self.session, &request, &prompt).await?;
            ensure!(said.answer.text.len() == 1 << 20, "{} bytes", said.answer.text.len());
        }
        Ok(())
    }

    /// Node that owns it.
    pub fn owner(&self, nodes: &Nodes) -> anyhow::Result<usize> {
        Ok(nodes.owner(&self.session).context("nobody owns the session")?.1)
    }

    /// Judges the session: goes on through every door, and looks at everything that was said.
    pub async fn judge(&mut self, nodes: &Nodes, doors: &[usize]) -> anyhow::Result<()> {
        for door in doors {
            self.say(nodes, *door).await.with_context(|| format!("after the fault, through {}", nodes.name(*door)))?;
        }
        let request = GetSessionRequest { session_id: self.session.clone(), last: 0 };
        let door = doors.first().context("no door is left")?;
        let found = timeout(LIMIT, nodes.door(*door).get_session(request)).await??.into_inner();
        let mut turns: Vec<(&str, Option<&str>)> = Vec::new();
        for message in &found.messages {
            if message.role == "user" {
                ensure!(message.turn as usize == turns.len(), "turn {} stands at {}", message.turn, turns.len());
                turns.push((&message.content, None));
            } else {
                let turn = turns.get_mut(message.turn as usize).context("an answer without its turn")?;
                ensure!(turn.1.replace(&message.content).is_none(), "turn {} is answered twice", message.turn);
            }
        }
        let mut prompts: Vec<&str> = turns.iter().map(|(prompt, _)| *prompt).collect();
        let mut asked: Vec<&str> = self.asked.iter().map(|(_, prompt)| prompt.as_str()).collect();
        prompts.sort_unstable();
        asked.sort_unstable();
        ensure!(prompts == asked, "{} turns were asked, {} are there", asked.len(), prompts.len());
        if let Some((prompt, _)) = turns.iter().find(|(_, answer)| answer.is_none()) {
            bail!("{prompt:?} has no answer");
        }
        self.judge_owners(nodes)
    }

    /// Epochs have no gap, and each has one owner who was let or found the one before gone.
    fn judge_owners(&self, nodes: &Nodes) -> anyhow::Result<()> {
        let dir = nodes.shared().join(&self.session).join("owners");
        let mut names: Vec<String> = fs::read_dir(&dir)?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| !name.starts_with('.'))
            .collect();
        names.sort();
        for (at, name) in names.iter().enumerate() {
            ensure!(*name == format!("{:020}.json", at + 1), "{name} stands at epoch {}", at + 1);
        }
        Ok(())
    }
}

/// What a node has of a session that is on its way to it.
fn copy_of(nodes: &Nodes, index: usize, session: &str) -> PathBuf {
    nodes.disk(index).join(session).join("copy.jsonl")
}

fn bytes(path: &PathBuf) -> u64 {
    fs::metadata(path).map_or(0, |meta| meta.len())
}

/// Orders a move and does not wait for it.
#[expect(clippy::disallowed_methods, reason = "a test program has no tracked tasks; the handle is waited for")]
fn order(nodes: &Nodes, door: usize, session: &str, to: &str) -> tokio::task::JoinHandle<Result<(), tonic::Status>> {
    let (mut door, request) = (nodes.door(door), HandoffRequest { session_id: session.to_owned(), to: to.to_owned() });
    tokio::spawn(async move { door.handoff(request).await.map(drop) })
}

/// Waits for something.
async fn until(what: &str, mut holds: impl FnMut() -> bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        if Instant::now() >= deadline {
            bail!("waited {LIMIT:?} for {what}");
        }
        sleep(LOOK).await;
    }
    Ok(())
}

/// Case 1: the source is killed before its request is answered.
pub async fn source_killed_before_the_answer() -> anyhow::Result<String> {
    let mut nodes = Nodes::start(Plan::fast(2)).await?;
    let mut story = Story::new("one");
    story.say(&nodes, 0).await?;
    let from = story.owner(&nodes)?;
    let to = 1 - from;
    nodes.signal(to, Signal::STOP)?;
    let ordered = order(&nodes, from, "one", &nodes.name(to));
    sleep(Duration::from_millis(200)).await;
    nodes.kill(from)?;
    nodes.signal(to, Signal::CONT)?;
    let _ = ordered.await;
    nodes.start_sessions(from)?;
    story.judge(&nodes, &[from, to]).await?;
    ensure!(!copy_of(&nodes, to, "one").exists() || story.owner(&nodes)? == from, "half a session is left");
    Ok(format!("owner {:?}", nodes.owner("one")))
}

/// Cases 2 and 5: source or target is killed while the bytes go over, once this share of them is there.
pub async fn killed_while_copying(target: bool, mib: usize, share: f64) -> anyhow::Result<String> {
    let mut nodes = Nodes::start(Plan::fast(2)).await?;
    let mut story = Story::new("copy");
    story.say(&nodes, 0).await?;
    story.grow(&nodes, 0, mib).await?;
    let from = story.owner(&nodes)?;
    let to = 1 - from;
    let copy = copy_of(&nodes, to, "copy");
    let whole = bytes(&nodes.disk(from).join("copy/log.jsonl"));
    let enough = ((whole as f64 * share) as u64).clamp(1, whole);
    let ordered = order(&nodes, from, "copy", &nodes.name(to));
    // Seen too late it is its log already, and the last look tells how far it was before.
    let mut at = 0;
    until("so many bytes on the other node", || {
        at = at.max(bytes(&copy));
        at >= enough || bytes(&nodes.disk(to).join("copy/log.jsonl")) > 0
    })
    .await?;
    nodes.kill(if target { to } else { from })?;
    at = at.max(bytes(&copy));
    let moved = nodes.owner("copy").is_some_and(|(epoch, ..)| epoch > 1);
    let _ = ordered.await;
    nodes.start_sessions(if target { to } else { from })?;
    story.judge(&nodes, &[from, to]).await?;
    Ok(format!("killed at {at} of {whole} bytes, moved by then: {moved}"))
}

/// Cases 3, 4, 6, 7 and the moments between: one side is stopped at a moment that chance chooses, looked at, and killed or let go on.
pub async fn struck_at_any_step(seed: u64, rounds: usize) -> anyhow::Result<String> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut nodes = Nodes::start(Plan::fast(2)).await?;
    let mut story = Story::new("any");
    story.say(&nodes, 0).await?;
    let (mut before, mut after, mut idle) = (0, 0, 0);
    for round in 0..rounds {
        let (epoch, from, _) = nodes.owner("any").context("nobody owns the session")?;
        let to = 1 - from;
        let victim = if rng.random_bool(0.5) { from } else { to };
        let ordered = order(&nodes, from, "any", &nodes.name(to));
        if rng.random_bool(0.5) {
            // Right behind the claim: the target syncs it and looks before it says so, and the source cannot know.
            let deadline = Instant::now() + Duration::from_secs(1);
            while nodes.owner("any").is_some_and(|(now, ..)| now == epoch) && Instant::now() < deadline {
                sleep(Duration::from_micros(200)).await;
            }
        } else {
            // A whole move takes some tens of milliseconds here, most of them syncs.
            sleep(Duration::from_micros(rng.random_range(0..40_000))).await;
        }
        nodes.signal(victim, Signal::STOP)?;
        // What the other one does meanwhile.
        sleep(Duration::from_millis(30)).await;
        let claimed =
            nodes.owner("any").is_some_and(|(now, owner, cause)| now > epoch && owner == to && cause == "moved");
        match (claimed, ordered.is_finished()) {
            (true, false) => after += 1,
            (false, _) => before += 1,
            (true, true) => idle += 1,
        }
        if rng.random_bool(0.7) {
            nodes.kill(victim)?;
            nodes.start_sessions(victim)?;
        } else {
            nodes.signal(victim, Signal::CONT)?;
        }
        story.say(&nodes, round % 2).await.with_context(|| format!("seed {seed}, round {round}"))?;
        ordered.abort();
        nodes.wait_for_peers(0, 1).await?;
        nodes.wait_for_peers(1, 1).await?;
    }
    story.judge(&nodes, &[0, 1]).await.with_context(|| format!("seed {seed}"))?;
    Ok(format!(
        "{rounds} strikes: {before} before the claim, {after} after it and unknown to the source, {idle} too late"
    ))
}

/// Case 7 with a host that stays away: its sessions are taken over from what all nodes share.
pub async fn host_gone_after_the_claim() -> anyhow::Result<String> {
    let mut nodes = Nodes::start(Plan::fast(3)).await?;
    let mut story = Story::new("gone");
    for door in 0..3 {
        story.say(&nodes, door).await?;
    }
    let from = story.owner(&nodes)?;
    let to = (from + 1) % 3;
    let ordered = order(&nodes, from, "gone", &nodes.name(to));
    until("the claim", || nodes.owner("gone").is_some_and(|(epoch, ..)| epoch == 2)).await?;
    let begun = Instant::now();
    nodes.kill_host(to)?;
    let _ = ordered.await;
    let others = [from, (from + 2) % 3];
    story.judge(&nodes, &others).await?;
    let (epoch, owner, cause) = nodes.owner("gone").context("nobody owns the session")?;
    ensure!(epoch >= 3 && others.contains(&owner), "epoch {epoch} of {owner} by {cause}");
    Ok(format!("served again {:.1} s after its host was gone, epoch {epoch} {cause}", begun.elapsed().as_secs_f64()))
}

/// Case 8: the directory of the owners does not answer while a claim is due.
pub async fn owners_cannot_be_reached() -> anyhow::Result<String> {
    let nodes = Nodes::start(Plan::fast(2)).await?;
    let mut story = Story::new("store");
    story.say(&nodes, 0).await?;
    let from = story.owner(&nodes)?;
    let to = 1 - from;
    let owners = nodes.shared().join("store/owners");
    let away = nodes.shared().join("store/owners.away");
    let ordered = order(&nodes, from, "store", &nodes.name(to));
    fs::rename(&owners, &away)?;
    fs::write(&owners, b"not a directory")?;
    sleep(Duration::from_secs(2)).await;
    fs::remove_file(&owners)?;
    fs::rename(&away, &owners)?;
    story.judge(&nodes, &[from, to]).await?;
    let _ = timeout(LIMIT, ordered).await?;
    Ok(format!("{:?}", nodes.owner("store")))
}

/// Case 11: a whole host stops for a while in the middle of a move, and wakes.
pub async fn source_stopped_for(pause: Duration) -> anyhow::Result<String> {
    let nodes = Nodes::start(Plan::fast(2)).await?;
    let mut story = Story::new("stop");
    story.say(&nodes, 0).await?;
    story.grow(&nodes, 0, 4).await?;
    let from = story.owner(&nodes)?;
    let to = 1 - from;
    let copy = copy_of(&nodes, to, "stop");
    let ordered = order(&nodes, from, "stop", &nodes.name(to));
    until("the first bytes on the other node", || {
        bytes(&copy) > 0 || nodes.owner("stop").is_some_and(|(epoch, ..)| epoch > 1)
    })
    .await?;
    nodes.signal(from, Signal::STOP)?;
    let moved = nodes.owner("stop").is_some_and(|(epoch, ..)| epoch > 1);
    sleep(pause).await;
    nodes.signal(from, Signal::CONT)?;
    story.judge(&nodes, &[to, from]).await?;
    let _ = timeout(LIMIT, ordered).await?;
    Ok(format!("stopped {pause:?}, moved by then: {moved}, {:?}", nodes.owner("stop")))
}

/// Case 12: a session is ordered to several places at once.
pub async fn ordered_to_several_places() -> anyhow::Result<String> {
    let nodes = Nodes::start(Plan::fast(3)).await?;
    let mut story = Story::new("both");
    story.say(&nodes, 0).await?;
    let (mut arrived, mut refused) = (0, 0);
    for round in 0..5 {
        let orders = [0, 1, 2].map(|to| order(&nodes, (to + round) % 3, "both", &nodes.name(to)));
        for ordered in orders {
            match timeout(LIMIT, ordered).await?? {
                Ok(()) => arrived += 1,
                Err(_) => refused += 1,
            }
        }
        story.say(&nodes, round % 3).await?;
    }
    story.judge(&nodes, &[0, 1, 2]).await?;
    let epoch = nodes.owner("both").context("nobody owns the session")?.0;
    ensure!(epoch as usize <= 1 + 2 * (arrived + refused), "{epoch} epochs");
    Ok(format!("{arrived} arrived, {refused} refused, {epoch} epochs"))
}

/// Case 14: a tool is at work when the session moves; its result comes to the new owner, and it was called once.
pub async fn tool_in_flight() -> anyhow::Result<String> {
    let nodes = Nodes::start(Plan::fast(2)).await?;
    nodes.say(0, "tool", "r0", "hello").await?;
    let from = nodes.owner("tool").context("nobody owns the session")?.1;
    let to = 1 - from;
    let turn = nodes.say(from, "tool", "r1", "@echo slow=2s tool=once");
    let moved = async {
        let made = nodes.disk(from).join("tool/log.jsonl");
        until("the call", || fs::read_to_string(&made).is_ok_and(|log| log.contains("\"called\""))).await?;
        nodes.hand_over(from, "tool", to).await
    };
    let (said, moved) = tokio::join!(turn, moved);
    let (said, moved) = (said?, moved?);
    ensure!(said.answer.text == "kept once" && said.answer.node_id == nodes.name(to), "{said:?}");
    let made = fs::read_dir(nodes.shared().join("tool/tools"))?.count();
    ensure!(made == 1, "{made} calls");
    Ok(format!("frozen for {} ms", moved.frozen_us / 1000))
}

/// Case 16: turns come in at every door while the session moves to and fro.
pub async fn turns_during_moves(moves: usize) -> anyhow::Result<String> {
    let nodes = Nodes::start(Plan::fast(3)).await?;
    let mut story = Story::new("turns");
    story.say(&nodes, 0).await?;
    let over = std::sync::atomic::AtomicBool::new(false);
    let speak = |door: usize| {
        let (nodes, over) = (&nodes, &over);
        async move {
            let (mut told, mut longest) = (Vec::new(), Duration::ZERO);
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                let (request, prompt) = (format!("d{door}-{}", told.len()), format!("door {door} says {}", told.len()));
                let begun = Instant::now();
                let said = nodes.say(door, "turns", &request, &prompt).await?;
                longest = longest.max(begun.elapsed());
                ensure!(said.answer.text == prompt, "{request}: {said:?}");
                told.push((request, prompt));
            }
            Ok::<_, anyhow::Error>((told, longest))
        }
    };
    let travel = async {
        let mut frozen = Vec::new();
        for _ in 0..moves {
            let from = nodes.owner("turns").context("nobody owns the session")?.1;
            if let Ok(moved) = nodes.hand_over(from, "turns", (from + 1) % 3).await {
                frozen.push(moved.frozen_us);
            }
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        frozen.sort_unstable();
        Ok::<_, anyhow::Error>(frozen)
    };
    let (frozen, zero, one, two) = tokio::join!(travel, speak(0), speak(1), speak(2));
    let mut longest = Duration::ZERO;
    for told in [zero?, one?, two?] {
        longest = longest.max(told.1);
        story.asked.extend(told.0);
    }
    let frozen = frozen?;
    ensure!(frozen.len() * 2 >= moves, "only {} of {moves} moves arrived", frozen.len());
    let turns = story.asked.len();
    story.judge(&nodes, &[0, 1, 2]).await?;
    let half = frozen.get(frozen.len() / 2).copied().unwrap_or_default();
    Ok(format!(
        "{turns} turns during {} moves; frozen {} ms at most, {} ms in half of them; the slowest turn took {longest:?}",
        frozen.len(),
        frozen.last().copied().unwrap_or_default() / 1000,
        half / 1000
    ))
}

/// Case 17: a node is emptied.
pub async fn emptied(sessions: usize) -> anyhow::Result<String> {
    let nodes = Nodes::start(Plan::fast(4)).await?;
    let names: Vec<String> = (0..sessions).map(|n| format!("mass-{n}")).collect();
    for batch in names.chunks(16) {
        let opened = batch.iter().map(|name| nodes.say(0, name, "r0", "hello"));
        futures::future::try_join_all(opened).await?;
    }
    // All on one node, which takes four at a time.
    for batch in names.chunks(4) {
        let moved = batch.iter().map(|name| async {
            let owner = nodes.owner(name).map(|(_, owner, _)| owner);
            if owner != Some(0) {
                nodes.hand_over(0, name, 0).await?;
            }
            Ok::<_, anyhow::Error>(())
        });
        futures::future::try_join_all(moved).await?;
    }
    let begun = Instant::now();
    let mut told =
        nodes.door(1).drain(DrainRequest { node_id: nodes.name(0), ..DrainRequest::default() }).await?.into_inner();
    let mut last = None;
    while let Some(step) = timeout(LIMIT * 4, told.message()).await?? {
        last = Some(step);
    }
    let took = begun.elapsed();
    let last = last.context("the drain said nothing")?;
    let mut held = [0_usize; 4];
    for name in &names {
        held[nodes.owner(name).context("a session is lost")?.1] += 1;
    }
    ensure!(held[0] == 0, "{held:?} after {last:?}");
    let even = sessions as f64 / 3.0;
    for count in &held[1..] {
        ensure!((*count as f64 - even).abs() <= even * 0.1 + 1.0, "spread {held:?}");
    }
    for batch in names.chunks(16) {
        let answers = batch.iter().map(|name| nodes.say(2, name, "r1", "@echo recall"));
        for said in futures::future::try_join_all(answers).await? {
            ensure!(said.answer.text == "1 before: hello .. hello", "{said:?}");
        }
    }
    Ok(format!("{sessions} sessions in {:.1} s, spread {:?}", took.as_secs_f64(), &held[1..]))
}

/// Cases 9 and 13: requests of long ago, pieces that are damaged, missing or too many, and digests that do not fit.
pub async fn a_node_that_follows_no_rule() -> anyhow::Result<String> {
    let nodes = Nodes::start(Plan::fast(2)).await?;
    let mut story = Story::new("real");
    story.say(&nodes, 0).await?;
    let owner = story.owner(&nodes)?;
    let tell = |handoff: u64, message: Wire| TellRequest { handoff, message: Some(message) };
    let prepare = |session: &str, epoch: u64, attempt: u32| {
        let session_id = session.to_owned();
        Wire::Prepare(pb::Prepare { session_id, epoch, attempt, len: 1000, ..pb::Prepare::default() })
    };
    let damaged =
        |offset: u64| Wire::Chunk(pb::Chunk { offset, data: vec![b'x'; 500].into(), sha256: vec![0; 32].into() });
    let digest = || vec![7; 32].into();
    // A session of which nobody ever heard: its pieces are damaged, and in the end it is not what was announced.
    nodes.tell_as_stranger(owner, vec![tell(1, prepare("forged", 1, 1)), tell(1, prepare("forged", 1, 1))]).await?;
    until("a place for it", || copy_of(&nodes, owner, "forged").exists()).await?;
    let mut said = Vec::new();
    said.extend((0..4).map(|n| tell(1, damaged(n * 500))));
    said.push(tell(1, Wire::Offer(pb::Offer { epoch: 1, len: 0, digest: digest() })));
    // One that it owns itself, asked for as if by an earlier owner; answers to nothing; and the end of nothing.
    said.extend([tell(2, prepare("real", 0, 9)), tell(2, damaged(0)), tell(2, prepare("real", 7, 1))]);
    said.extend([
        tell(3, Wire::Committed(pb::Committed { epoch: 9 })),
        tell(3, Wire::Accept(pb::Accept { have: 1 << 60, taken: Some(1 << 60) })),
        tell(3, Wire::Offer(pb::Offer { epoch: 1, len: u64::MAX, digest: digest() })),
        tell(3, Wire::Abort(pb::Abort {})),
        tell(
            4,
            Wire::Prepare(pb::Prepare {
                session_id: "huge".to_owned(),
                epoch: 1,
                len: u64::MAX,
                ..pb::Prepare::default()
            }),
        ),
    ]);
    nodes.tell_as_stranger(owner, said).await?;
    // What makes no sense at all ends the call, and nothing else.
    let nonsense = tell(5, Wire::Recover(pb::Recover { session_id: "../../x".to_owned() }));
    ensure!(nodes.tell_as_stranger(owner, vec![nonsense]).await.is_err(), "nonsense was taken");
    story.judge(&nodes, &[0, 1]).await?;
    let deadline = Instant::now() + LIMIT;
    while nodes.status(owner).await?.arriving > 0 {
        ensure!(Instant::now() < deadline, "a place is kept for a session that cannot come");
        sleep(Duration::from_millis(20)).await;
    }
    for ghost in ["forged", "huge"] {
        ensure!(nodes.owner(ghost).is_none(), "{ghost} has an owner");
        ensure!(!copy_of(&nodes, owner, ghost).exists(), "something of {ghost} is left");
    }
    ensure!(nodes.owner("real") == Some((1, owner, "opened".to_owned())), "{:?}", nodes.owner("real"));
    nodes.hand_over(0, "real", 1 - owner).await?;
    story.judge(&nodes, &[1, 0]).await?;
    Ok("nothing of it has any effect".to_owned())
}

/// Case 15: the target leaves, or is wrongly suspected, while the bytes go over.
pub async fn target_in_doubt_while_copying(suspected: bool, mib: usize) -> anyhow::Result<String> {
    let nodes = Nodes::start(Plan::fast(2)).await?;
    let mut story = Story::new("doubt");
    story.say(&nodes, 0).await?;
    story.grow(&nodes, 0, mib).await?;
    let from = story.owner(&nodes)?;
    let to = 1 - from;
    let copy = copy_of(&nodes, to, "doubt");
    let ordered = order(&nodes, from, "doubt", &nodes.name(to));
    until("the first bytes on the other node", || bytes(&copy) > 0).await?;
    if suspected {
        signal(nodes.membership_pid(to)?, Signal::STOP)?;
    } else {
        let request = DrainRequest { node_id: nodes.name(to), ..DrainRequest::default() };
        let mut told = nodes.door(to).drain(request).await?.into_inner();
        while let Ok(Ok(Some(_))) = timeout(LIMIT, told.message()).await {}
    }
    story.say(&nodes, from).await?;
    let outcome = timeout(LIMIT, ordered).await?;
    if suspected {
        sleep(Duration::from_secs(5)).await;
        story.say(&nodes, from).await?;
        signal(nodes.membership_pid(to)?, Signal::CONT)?;
    }
    story.judge(&nodes, &[from, to]).await?;
    let how = if matches!(outcome, Ok(Ok(()))) { "it had arrived by then" } else { "it stayed" };
    Ok(format!("{how}, {:?}", nodes.owner("doubt")))
}

/// Case 13: a long history moves, in bounded memory.
pub async fn large_history(mib: usize) -> anyhow::Result<String> {
    let nodes = Nodes::start(Plan::fast(2)).await?;
    let mut story = Story::new("large");
    story.say(&nodes, 0).await?;
    story.grow(&nodes, 0, mib).await?;
    let from = story.owner(&nodes)?;
    let to = 1 - from;
    let before = [most_memory(nodes.pid(from)?)?, most_memory(nodes.pid(to)?)?];
    let moved = nodes.hand_over(from, "large", to).await?;
    let after = [most_memory(nodes.pid(from)?)?, most_memory(nodes.pid(to)?)?];
    ensure!(moved.bytes >= (mib as u64) << 20, "{moved:?}");
    let extra = [after[0] - before[0], after[1] - before[1]];
    ensure!(extra.iter().all(|kib| *kib <= 32 << 10), "{extra:?} KiB more memory at the source and at the target");
    let said = nodes.say(to, "large", "last", "@echo recall").await?;
    ensure!(said.answer.node_id == nodes.name(to), "{said:?}");
    let seconds = moved.total_us as f64 / 1e6;
    Ok(format!(
        "{mib} MiB in {seconds:.2} s ({:.0} MiB/s), frozen {} ms, {} and {} KiB more memory",
        mib as f64 / seconds,
        moved.frozen_us / 1000,
        extra[0],
        extra[1]
    ))
}

/// The most memory that a process ever had, in KiB.
pub(super) fn most_memory(pid: u32) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).context("no VmHWM")?;
    Ok(line.split_whitespace().nth(1).context("no figure")?.parse()?)
}
