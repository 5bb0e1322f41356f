//! Sends the prompts so that turns are in flight whenever somebody is to be killed, and so that they last as long as the
//! kills do.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use drover_proto::router::InjectRequest;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

use super::{Place, Plan, Run, Sent};
use crate::subscriber::{Subscriber, View};

/// Prompts per kill that are kept back for when there are too few turns in flight. Some of them are left over with most
/// kills and go to the later ones.
const KEPT_PER_KILL: usize = 2;
/// How long a router that runs may leave an inject without an answer before it is asked again.
const PATIENT: Duration = Duration::from_secs(20);
/// About how long an agent waits between two pieces of its answer.
const PIECE_MS: u64 = 30;

/// Sends them all, and waits until each has ended.
pub(crate) async fn drive(plan: Plan, run: &Run, subscriber: &Subscriber) -> anyhow::Result<Vec<Sent>> {
    let mut rng = StdRng::seed_from_u64(plan.seed ^ 0xD21E);
    let places: Vec<Place> = run.swarms.iter().flat_map(super::Swarm::places).collect();
    let mut sent: Vec<Sent> = Vec::new();
    let mut open: Vec<Sent> = Vec::new();
    // The kill that is waited for, and the prompts that are still to be sent for it whatever happens.
    let mut round = None;
    let mut free = 0;
    while sent.len() < plan.injections {
        let rest = plan.injections - sent.len();
        let kills = run.kills_done.load(Ordering::Relaxed);
        let kills_left = plan.kills.saturating_sub(kills).max(1);
        if round.replace(kills) != Some(kills) {
            free = rest.saturating_sub(KEPT_PER_KILL * kills_left) / kills_left;
        }
        open.retain(|sent| !ended(&subscriber.view(), sent));
        let (place, length) = if run.over.load(Ordering::Relaxed) {
            (places.choose(&mut rng).context("no nodes")?.clone(), rng.random_range(50..200))
        } else if free > 0 {
            free -= 1;
            (places.choose(&mut rng).context("no nodes")?.clone(), rng.random_range(50..900))
        } else if let Some(choice) = choice(run, &open, rest > kills_left, &mut rng) {
            choice
        } else {
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        };
        let name = format!("chaos-{}-{}", plan.seed, sent.len());
        let prompt = prompt(&name, length);
        let injection_id = inject(run, &place, &prompt, &name).await?;
        sent.push(Sent { injection_id, name, place });
        open.extend(sent.last().cloned());
    }
    let limit = Duration::from_mins(2);
    let all_ended = |view: &View| run.over.load(Ordering::Relaxed) && sent.iter().all(|sent| ended(view, sent));
    while !run.over.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    if !subscriber.wait(limit, all_ended).await {
        let view = subscriber.view();
        let open: Vec<_> = sent
            .iter()
            .filter(|sent| !ended(&view, sent))
            .map(|sent| format!("{sent:?}: {:?}", view.injections.get(&sent.injection_id)))
            .collect();
        bail!("{} prompts have not ended:\n{}", open.len(), open.join("\n"));
    }
    Ok(sent)
}

/// A node that should have a turn and has none, and how long in milliseconds that turn takes: half of each swarm's nodes are
/// to be at work while somebody is to be killed. When the prompts would not last for that, one of each swarm is, for longer.
fn choice(run: &Run, open: &[Sent], plenty: bool, rng: &mut StdRng) -> Option<(Place, u64)> {
    if !run.wanted.load(Ordering::Relaxed) {
        return None;
    }
    for swarm in &run.swarms {
        let quiet: Vec<Place> = swarm.places().filter(|place| open.iter().all(|sent| sent.place != *place)).collect();
        let at_work = swarm.nodes as usize - quiet.len();
        let target = if plenty { (swarm.nodes as usize).div_ceil(2) } else { 1 };
        if at_work < target {
            let length = if plenty { rng.random_range(1000..2000) } else { 5000 };
            return Some((quiet.choose(rng)?.clone(), length));
        }
    }
    None
}

/// A prompt that keeps either agent at work for about so long, with something new to say all the time.
fn prompt(name: &str, length_ms: u64) -> String {
    let pieces = (length_ms / PIECE_MS).max(2);
    let text = "x".repeat(usize::try_from(pieces).unwrap_or(1));
    format!(
        "{name}\n@echo deltas={pieces} over={length_ms}ms\n@mock say={text} deltas={pieces} delay={}ms",
        length_ms / pieces
    )
}

fn ended(view: &View, sent: &Sent) -> bool {
    view.injections.get(&sent.injection_id).is_some_and(|seen| seen.outcome.is_some())
}

/// Sends one prompt, again with the same request id until the router has taken it.
async fn inject(run: &Run, place: &Place, content: &str, request_id: &str) -> anyhow::Result<String> {
    let deadline = Instant::now() + Duration::from_mins(1);
    let mut router = run.cluster.router();
    let request = InjectRequest {
        request_id: request_id.to_owned(),
        swarm_id: place.swarm.clone(),
        nodes: vec![place.node],
        content: content.to_owned(),
        ..Default::default()
    };
    loop {
        let tried = async {
            let mut steps = router.inject(request.clone()).await?.into_inner();
            steps.message().await?.context("no answer").map_err(|error| tonic::Status::unavailable(error.to_string()))
        };
        let Ok(tried) = tokio::time::timeout(PATIENT, tried).await else {
            run.unanswered.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        match tried {
            Ok(step) => return Ok(step.injection_id),
            Err(status) if Instant::now() > deadline => bail!("{request_id} was not taken: {status}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}
