//! The cap holds, whatever happens; judged by the provider's own count.

use crate::provider::SimLane;
use crate::sim::{Sim, ms, rounds, seconds, seeds, task, wide};
use drover_llm_dispatcher::core::{LaneId, Money, Price, Reason, Refusal, Settings, Status, TaskSpec, Warning};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const PRICE: Price = Price { input: 300, output: 2500, cached_input: None, per_call: 0 };

fn priced() -> SimLane {
    let mut lane = SimLane { hung: 0.02, resets: 0.05, errors: 0.05, slow_share: 0.05, ..SimLane::default() };
    lane.settings.price = Some(PRICE);
    lane
}

/// One history: tasks that cost more than the cap in all, hedges, faults, cancellations, and crashes anywhere.
struct History {
    cap: Money,
    /// What the provider billed, and what the core believes.
    spent: Money,
    charged: Money,
    /// Worst cases of the calls that were under way when a process died.
    lost: Money,
    answered: usize,
    unpaid: usize,
    crashes: u32,
}

fn history(seed: u64, lane: SimLane, concurrency: u32, tasks: u64, cap: Money, crashes: u32) -> History {
    let mut rng = SmallRng::seed_from_u64(seed);
    let settings = Settings { max_daily_spend: Some(cap), ..wide(concurrency) };
    let mut sim = Sim::new(settings.clone(), vec![lane], seed);
    let specs: Vec<TaskSpec> = (0..tasks)
        .map(|id| {
            let mut spec = task(id);
            spec.input_upper = rng.random_range(10..4000);
            spec.max_tokens = rng.random_range(10..1000);
            spec
        })
        .collect();
    for spec in &specs {
        sim.submit(spec.id.0 % 3, spec.clone());
    }
    for _ in 0..tasks / 50 {
        let at = ms(rng.random_range(1..3000));
        sim.cancel_at(at, specs[rng.random_range(0..specs.len())].id);
    }
    let mut crashed = 0;
    // A crash between any two events: each of them may have been the last that reached the disk.
    let events = tasks * 4;
    let mut crash_at: Vec<u64> = (0..crashes).map(|_| rng.random_range(1..events)).collect();
    crash_at.sort_unstable();
    let mut event = 0;
    while !sim.open.is_empty() && sim.step(seconds(1e7)) {
        event += 1;
        if crash_at.first().is_some_and(|&at| event >= at) {
            crash_at.remove(0);
            crashed += 1;
            for spec in sim.crash(settings.clone(), seed + u64::from(crashed)) {
                sim.submit(spec.id.0 % 3, spec);
            }
        }
        let counted = sim.ledger.counted.get(&1).copied().unwrap_or_default();
        assert!(counted <= cap, "seed {seed}: {counted} set aside of {cap}");
    }
    assert!(sim.open.is_empty(), "seed {seed}: {} tasks are stuck: {:?}", sim.open.len(), sim.engine.stats());
    sim.run_until(sim.now + seconds(10.0));
    let unpaid = |status: Status| {
        matches!(status, Status::Refused(Refusal::Budget { .. }) | Status::Failed(Reason::Budget { .. }))
    };
    History {
        cap,
        spent: sim.provider_charged(),
        charged: sim.charged,
        lost: sim.lost,
        answered: sim.answered(),
        unpaid: sim.ended.values().filter(|ended| unpaid(ended.verdict.status)).count(),
        crashes: crashed,
    }
}

#[test]
fn no_history_overspends() {
    let (mut crashes, mut unpaid, mut answered) = (0, 0, 0);
    let base = seeds(0)[0] * 1_000_003;
    for round in 0..rounds(300, 10_000) {
        let seed = base + round;
        let mut rng = SmallRng::seed_from_u64(seed);
        let concurrency = if round % 50 == 0 { 500 } else { rng.random_range(1..40) };
        let tasks = if round % 50 == 0 { 700 } else { rng.random_range(5..60) };
        let cap = Money::from_pico(rng.random_range(1_000_000..40_000_000)).times(tasks / 10 + 1);
        let found = history(seed, priced(), concurrency, tasks, cap, rng.random_range(0..4));
        assert!(found.spent <= found.cap, "seed {seed}: {} spent of {}", found.spent, found.cap);
        crashes += found.crashes;
        unpaid += found.unpaid;
        answered += found.answered;
    }
    assert!(crashes > 150 && unpaid > 500 && answered > 500, "{crashes} crashes, {unpaid} unpaid, {answered} answered");
}

#[test]
fn almost_all_of_the_cap_can_be_used() {
    for seed in seeds(rounds(0, 50)) {
        for (concurrency, crashes) in [(10, 0), (100, 0), (500, 0), (10, 1), (100, 1)] {
            let cap = Money::from_micro_usd(1_000);
            let mut healthy = SimLane::default();
            healthy.settings.price = Some(PRICE);
            let found = history(seed, healthy, concurrency, 2500, cap, crashes);
            assert!(found.unpaid > 0, "seed {seed}: there was enough to do");
            assert!(found.spent <= cap);
            // Of calls that were under way in a crash nobody knows what they cost, so they count in full.
            let used = (found.spent + found.lost).pico() as f64 / cap.pico() as f64;
            assert!(used >= 0.97, "seed {seed}, {concurrency} wide, {crashes} crashes: {used:.4} of the cap");
            // Hedges and calls that broke may have been billed, so they use the cap up too.
            let found = history(seed, priced(), concurrency, 2500, cap, crashes);
            let used = (found.charged + found.lost).pico() as f64 / cap.pico() as f64;
            assert!(
                used >= 0.97,
                "seed {seed}, {concurrency} wide, {crashes} crashes: {used:.4} of the cap accounted for"
            );
        }
    }
}

#[test]
fn without_faults_what_was_charged_is_what_the_provider_billed() {
    let mut lane = SimLane { slow_share: 0.0, ..SimLane::default() };
    lane.settings.price = Some(PRICE);
    let mut sim = Sim::new(Settings { warn_at: Some(Money::from_micro_usd(40)), ..wide(50) }, vec![lane], 4);
    for id in 0..1000 {
        sim.submit(1, task(id));
    }
    sim.run_tasks();
    assert_eq!(sim.charged, sim.provider_charged());
    let costs: Money = sim.ended.values().map(|ended| ended.verdict.cost).sum();
    assert_eq!(costs, sim.charged);
    let warned = sim.warnings.iter().filter(|(_, warning)| matches!(warning, Warning::SpendReached { .. })).count();
    assert_eq!(warned, 1, "said once");
}

#[test]
fn hedges_and_calls_that_were_broken_off_are_charged() {
    for seed in seeds(5) {
        let mut lane = SimLane { slow_share: 0.1, hung: 0.05, ..SimLane::default() };
        lane.settings.price = Some(PRICE);
        let mut sim = Sim::new(wide(50), vec![lane], seed);
        for id in 0..500 {
            sim.submit(1, task(id));
        }
        sim.run_tasks();
        sim.run_until(sim.now + seconds(5.0));
        assert!(sim.hedges > 0);
        assert!(sim.charged >= sim.provider_charged(), "seed {seed}: {} of {}", sim.charged, sim.provider_charged());
    }
}

#[test]
fn a_new_day_has_its_own_cap_to_the_call() {
    let mut lane = SimLane { uses: (1.0, 1.0), ..SimLane::default() };
    lane.settings.price = Some(PRICE);
    let one = PRICE.worst(1000, 250);
    let cap = one.times(200);
    let mut sim = Sim::new(Settings { max_daily_spend: Some(cap), ..wide(10) }, vec![lane], 1);
    sim.day_at(seconds(100.0), 2);
    for id in 0..1000 {
        sim.submit_at(seconds(if id < 500 { 1.0 } else { 100.5 }), 1, task(id));
    }
    // Ten calls begin before midnight and end after it.
    sim.run_until(seconds(99.0));
    assert_eq!((sim.answered(), sim.provider_charged()), (200, cap));
    sim.run_until(seconds(99.9));
    sim.run_until(seconds(200.0));
    assert_eq!((sim.answered(), sim.provider_charged()), (400, cap.times(2)));
    let today = sim.ledger.counted[&2];
    assert!(today <= cap);
    assert!(sim.warnings.iter().filter(|(_, warning)| matches!(warning, Warning::BudgetExhausted { .. })).count() == 2);
}

#[test]
fn a_cheaper_lane_of_the_chain_is_taken_when_the_money_ends() {
    let mut dear = SimLane::default();
    dear.settings.price = Some(PRICE);
    let free = SimLane::default();
    let cap = PRICE.worst(1000, 250).times(20);
    let mut sim = Sim::new(Settings { max_daily_spend: Some(cap), ..wide(5) }, vec![dear, free], 1);
    for id in 0..200 {
        let mut spec = task(id);
        spec.lanes = vec![LaneId(0), LaneId(1)];
        sim.submit(1, spec);
    }
    sim.run_tasks();
    assert_eq!(sim.answered(), 200);
    assert!(sim.lanes[0].accepted.len() >= 20 && sim.lanes[1].accepted.len() >= 100);
}

#[test]
fn what_has_no_price_is_refused_under_a_cap_unless_that_is_allowed() {
    for (allow, answered) in [(false, 0), (true, 3)] {
        let mut lane = SimLane::default();
        lane.settings.price = None;
        let settings =
            Settings { max_daily_spend: Some(Money::from_micro_usd(1)), allow_unknown_price: allow, ..wide(5) };
        let mut sim = Sim::new(settings, vec![lane], 1);
        for id in 0..3 {
            sim.submit(1, task(id));
        }
        sim.run_tasks();
        assert_eq!(sim.answered(), answered);
        let unknown = |status| status == Status::Refused(Refusal::UnknownPrice);
        assert_eq!(sim.ended.values().filter(|ended| unknown(ended.verdict.status)).count(), 3 - answered);
    }
}

#[test]
fn free_money_goes_back_when_nothing_is_to_do() {
    let mut lane = SimLane::default();
    lane.settings.price = Some(PRICE);
    let cap = Money::from_micro_usd(1_000_000);
    let mut sim = Sim::new(Settings { max_daily_spend: Some(cap), ..wide(5) }, vec![lane], 1);
    for id in 0..20 {
        sim.submit(1, task(id));
    }
    sim.run_tasks();
    assert!(sim.ledger.counted[&1] > sim.charged);
    sim.run();
    assert_eq!(sim.ledger.counted[&1], sim.charged, "after a while");
}
