//! Real membership daemons in network namespaces: two regions with a slow and lossy link between them, and a leader.
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests fail by panicking")]

use std::time::{Duration, Instant};

use drover_e2e::bench::gossip;
use drover_e2e::gossip::nodes::{Contender, Nodes};
use drover_testkit::netns::{Lab, Wan, usable};
use drover_testkit::{skip, this_test};

const LINK: Wan = Wan { delay_ms: 100.0, jitter_ms: 5.0, loss_percent: 2.0, kbit_per_s: 0.0 };
/// Nodes of a region. The first four of the one and the first three of the other vote first.
const REGION: usize = 5;
const VOTERS: [usize; 7] = [0, 1, 2, 3, REGION, REGION + 1, REGION + 2];
const LIMIT: Duration = Duration::from_secs(10);

/// (epoch, term) and name of the leader whom a node names; `None` when it names none.
fn leader(nodes: &Nodes, index: usize) -> Option<((u64, u64), String)> {
    let said = nodes.leader(index).unwrap_or_else(|error| panic!("{} does not answer: {error:#}", nodes.name(index)));
    (!said.node_id.is_empty()).then_some(((said.epoch, said.term), said.node_id))
}

/// Waits until all of these name one leader of a later term, and tells which and how long it took.
fn agreed(nodes: &Nodes, who: &[usize], after: (u64, u64), since: Instant, limit: Duration) -> ((u64, u64), String) {
    loop {
        let said: Vec<_> = who.iter().map(|index| leader(nodes, *index)).collect();
        if let Some(Some(first)) = said.first()
            && first.0 > after
            && said.iter().all(|other| other.as_ref() == Some(first))
        {
            println!("{} leads in {:?} after {:.2} s", first.1, first.0, since.elapsed().as_secs_f64());
            return first.clone();
        }
        let tail = || who.iter().map(|index| nodes.program(*index).unwrap().tail(8)).collect::<String>();
        assert!(since.elapsed() < limit, "no common leader after {after:?} within {limit:?}: {said:?}\n{}", tail());
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn index_of(nodes: &Nodes, name: &str) -> usize {
    (0..nodes.len()).find(|index| nodes.name(*index) == name).unwrap()
}

#[test]
fn two_regions_and_one_leader() {
    if let Err(why) = usable(&["python3"]) {
        return skip(&this_test(), &why);
    }
    let mut lab = Lab::new(&[REGION, REGION]).unwrap();
    lab.connect(LINK).unwrap();
    let region = |side: usize| format!("  region: {}\n", ["east", "west"][side]);
    let mut nodes = Nodes::prepare_with(Contender::Ours, &lab, &[], |host| region(host.side)).unwrap();
    nodes.charter(1, &VOTERS).unwrap();
    let begun = Instant::now();
    nodes.start_all().unwrap();
    nodes.all_joined(Duration::from_secs(30)).unwrap();
    let all: Vec<usize> = (0..2 * REGION).collect();
    let (east, west) = all.split_at(REGION);
    let (mut term, mut name) = agreed(&nodes, &all, (0, 0), begun, Duration::from_secs(30));

    // The side with three of seven voters has no leader; the other has one, whoever led before.
    lab.cut().unwrap();
    let cut = Instant::now();
    if index_of(&nodes, &name) >= REGION {
        (term, name) = agreed(&nodes, &east[..4], term, cut, LIMIT);
    }
    while cut.elapsed() < Duration::from_secs(9) {
        // The last lease, and as much again for clocks that differ.
        if cut.elapsed() > Duration::from_secs(5) {
            for index in &west[..3] {
                assert_eq!(leader(&nodes, *index), None, "{} is in the minority", nodes.name(*index));
            }
        }
        std::thread::sleep(Duration::from_millis(300));
    }
    assert_eq!(leader(&nodes, east[0]), Some((term, name.clone())), "the majority goes on");
    lab.connect(LINK).unwrap();
    let healed = Instant::now();
    let before = (term.0, term.1 - 1);
    (term, name) = agreed(&nodes, &VOTERS, before, healed, LIMIT);

    // Its successor has a later term.
    let victim = index_of(&nodes, &name);
    let killed = nodes.kill(victim).unwrap();
    let left: Vec<usize> = VOTERS.into_iter().filter(|index| *index != victim).collect();
    agreed(&nodes, &left, term, killed, LIMIT);
    // Those of its own region miss it as fast as if there were no other.
    for index in all.iter().copied().filter(|index| *index != victim && index / REGION == victim / REGION) {
        let missed = nodes.knows_gone(index, victim, killed, LIMIT).unwrap();
        assert!(missed - killed < Duration::from_secs(7), "{} after {:?}", nodes.name(index), missed - killed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_benchmark_beside_serf() {
    if let Err(why) = usable(&gossip::TOOLS) {
        return skip(&this_test(), &why);
    }
    let figures = gossip::run(gossip::Plan::SHORT, gossip::Part::ALL).await.unwrap();
    print!("{}", drover_e2e::bench::figures::table(&figures));
    assert!(figures.iter().all(|figure| figure.ours.is_finite() && figure.ours >= 0.0), "{figures:?}");
    assert!(figures.iter().filter(|figure| figure.name.starts_with("false")).all(|figure| figure.ours == 0.0));
}
