//! The simulated cluster in the size of CI, and proofs that its judge finds what is wrong when a part of the protocol is missing.
//!
//! What went wrong in another swarm's gossip, whose mission ours has, and where ours is seen to do better:
//!
//! | there | here |
//! | --- | --- |
//! | JSON without version or bounds in one datagram | `wire` and `seal` tests, fuzz target `gossip`: version, sizes, counts, truncation |
//! | nothing sends pings, no indirect probe | kills and stops in `every_figure_holds_with_a_fixed_seed`; one-way links in its trouble |
//! | every node sends its own record to all, nobody passes anything on | `what_a_node_sends_does_not_grow_with_the_cluster` |
//! | push-pull configured and not there | `what_no_news_told_is_known_within_one_exchange` |
//! | gossip is sent to the port of another protocol | `a_node_is_named_bound_and_told_of_as_configured` (daemons) |
//! | health by age, told to nobody, removal by nobody | `a_killed_node_is_suspect_then_left_then_forgotten` (daemons) |
//! | the sender's wall clock orders; a clock ahead wins for ever | `a_node_that_starts_again_is_the_newer_one_everywhere_whatever_its_clock_says` |
//! | a MAC that may be left out, over the name only, replayed | `seal` tests and `gossip_security`: forged, stripped, replayed, future, foreign |
//! | lowest id leads, no term, no quorum | `gossip_lease`, `gossip_nodes`: majorities, one leader in a term, none in a minority |
//! | "CPU" is a count of threads, trend with a wrong denominator | `load` tests, `load_is_measured_reported_and_seen_by_the_others` (daemons) |
//! | a buffer is handed on and reused at once | `a_burst_of_datagrams_is_taken_apart_one_by_one` (daemons) |
//! | two nodes pass with "at least 1 member", which is oneself | every test compares the whole set of members |

use std::sync::Arc;
use std::time::Duration;

use drover_e2e::gossip::chaos::{self, Episode};
use drover_e2e::gossip::network::Weather;
use drover_e2e::gossip::proof::{self, Size};
use drover_e2e::gossip::scenario::{calm, cluster};
use drover_e2e::gossip::world::{End, World};
use drover_membership::core::{Command, Guards, Input, Message, Rumor, Settings};

fn without(change: impl FnOnce(&mut Guards)) -> Settings {
    let mut settings = Settings::default();
    change(&mut settings.guards);
    settings
}

#[test]
fn every_figure_holds_with_a_fixed_seed() {
    println!("{}", proof::run(1, &Size::short()).unwrap());
}

#[test]
fn every_invariant_holds_with_a_fresh_seed() {
    let seed = rand::random::<u64>() >> 16;
    // A failure names the seed.
    for run in 0..6 {
        let report = chaos::run(Episode { seed: seed + run, nodes: 12, kills: 15 });
        let (broken, loss) = (&report.verdict.broken, report.loss);
        assert!(broken.is_empty(), "seed {}, loss {loss}: {broken:#?}", seed + run);
    }
}

#[test]
fn the_same_seed_is_the_same_run() {
    let episode = Episode { seed: 77, nodes: 20, kills: 10 };
    let (first, second) = (chaos::run(episode), chaos::run(episode));
    assert_eq!(first.trace, second.trace);
    assert_ne!(first.trace, chaos::run(Episode { seed: 78, ..episode }).trace);
}

#[test]
fn the_judge_sees_that_nobody_answers_a_suspicion() {
    let span = Duration::from_mins(1);
    let stopped = calm(1, 30, 0.0, 6, span, without(|guards| guards.refute = false));
    assert!(stopped.verdict.false_downs > 0);
}

#[test]
fn the_judge_sees_suspicions_that_are_too_short() {
    let span = Duration::from_mins(1);
    let stopped = calm(1, 30, 0.0, 6, span, without(|guards| guards.patience = false));
    assert!(stopped.verdict.false_downs > 0);
}

#[test]
fn the_judge_sees_a_stopped_node_that_takes_its_own_stop_for_the_silence_of_others() {
    let stop = |settings: Settings| {
        let mut world = cluster(5, 10, Weather::default(), settings);
        world.run_for(Duration::from_secs(5));
        // Everybody is stopped at the same time; whoever wakes first has overdue suspicions.
        for round in 0..20 {
            for node in 0..10 {
                world.pause(node, Duration::from_millis(2500 + 37 * ((node as u64 + round) % 7)));
            }
            world.run_for(Duration::from_secs(4));
        }
        let now = world.now;
        world.judge.finish(now).false_suspicions
    };
    let (with, without) = (stop(Settings::default()), stop(without(|guards| guards.own_pause = false)));
    assert!(without > 2 * with + 10, "{without} false suspicions without, {with} with");
}

/// Kills a node, waits until it is removed everywhere, and lets somebody hear an old rumour of it.
fn old_rumor(settings: Settings) -> World {
    let mut world = cluster(3, 10, Weather::default(), settings);
    world.run_for(Duration::from_secs(5));
    let old = world.local(4);
    world.kill(4, End::Process, Duration::from_secs(20));
    world.run_for(Duration::from_mins(1));
    let from = world.local(2).key;
    let rumors = vec![Rumor::Alive { record: Arc::clone(&old), bare: false }];
    world.inject(7, Input::Datagram { from, message: Message::Gossip { rumors } });
    world.run_for(Duration::from_secs(2));
    world
}

#[test]
fn an_old_rumor_does_not_bring_a_removed_node_back() {
    let world = old_rumor(Settings::default());
    assert_eq!(world.judge.verdict().broken, Vec::<String>::new());
    assert!(world.judge.agrees());
}

#[test]
fn the_judge_sees_a_removed_node_that_comes_back() {
    let world = old_rumor(without(|guards| guards.tombstones = false));
    assert!(world.judge.verdict().broken.iter().any(|text| text.contains("brings back 4")));
}

#[test]
fn a_node_that_starts_again_is_the_newer_one_everywhere_whatever_its_clock_says() {
    for (seed, clock, with_snapshot) in
        [(1, -3_600_000_000, true), (2, -3_600_000_000, false), (3, 3_600_000_000, false)]
    {
        let mut world = cluster(seed, 12, Weather::default(), Settings::default());
        world.run_for(Duration::from_secs(10));
        for _ in 0..3 {
            world.kill(5, End::Process, Duration::from_secs(20));
            world.run_for(Duration::from_millis(400));
            world.set_clock(5, clock);
            world.restart(5, with_snapshot, &[1]);
            let agreed =
                world.run_until(Duration::from_millis(50), Duration::from_secs(5), |world| world.judge.agrees());
            assert!(agreed.is_some(), "seed {seed}: {:?}", world.judge.disagreement());
            world.run_for(Duration::from_secs(12));
        }
        assert_eq!(world.judge.verdict().broken, Vec::<String>::new(), "seed {seed}");
    }
}

#[test]
fn a_good_bye_is_told_by_all_within_a_second_and_is_no_death() {
    let mut world = cluster(9, 30, Weather::default(), Settings::default());
    world.run_for(Duration::from_secs(5));
    world.leave(11);
    let told = world.run_until(Duration::from_millis(50), Duration::from_secs(1), |world| world.judge.agrees());
    assert!(told.is_some(), "{:?}", world.judge.disagreement());
    world.run_for(Duration::from_mins(1));
    assert_eq!(world.judge.verdict().broken, Vec::<String>::new());
}

#[test]
fn what_no_news_told_is_known_within_one_exchange() {
    let settings = Settings::default();
    let mut world = cluster(4, 12, Weather::default(), settings.clone());
    world.run_for(Duration::from_secs(5));
    // Too short to be given up, long enough for the news to have been told as often as it is.
    world.network.place(5, 1);
    let labels = [("rack".to_owned(), "r7".to_owned())].into();
    world.command(3, Command::Update { capabilities: None, labels: Some(labels) });
    world.run_for(Duration::from_millis(2500));
    let knows = |world: &World| world.known(5, 3).is_some_and(|record| record.record.labels.contains_key("rack"));
    assert!(!knows(&world));
    world.network.place(5, 0);
    let within = settings.push_pull_interval;
    let took = world.run_until(Duration::from_millis(100), within, knows);
    assert!(took.is_some(), "not within {within:?}");
}

#[test]
fn what_a_node_sends_does_not_grow_with_the_cluster() {
    let idle = |nodes| calm(6, nodes, 0.0, 0, Duration::from_secs(30), Settings::default()).bytes;
    let (few, many) = (idle(10), idle(100));
    assert!(few > 50.0 && many < few * 1.15, "{few} B/s of each of 10, {many} B/s of each of 100");
}
