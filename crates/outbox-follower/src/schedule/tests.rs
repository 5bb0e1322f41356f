use drover_types::{Generation, NodeIndex};

use super::*;

const HOT: Duration = Duration::from_millis(50);
const COLD: Duration = Duration::from_secs(20);

fn outbox(node: u32) -> OutboxId {
    OutboxId { swarm: "s".parse().unwrap(), node: NodeIndex(node), generation: Generation(1) }
}

fn node(node: u32) -> NodeKey {
    NodeKey::of(&outbox(node))
}

/// A schedule on a clock of its own, with every look and every wake written down.
struct Run {
    schedule: Schedule,
    now: Instant,
    looks: Vec<(Key, Why, Instant)>,
    wakes: usize,
}

impl Run {
    fn new() -> Self {
        let now = Instant::now();
        Self { schedule: Schedule::new(HOT, COLD, now), now, looks: Vec::new(), wakes: 0 }
    }

    /// Lets time pass; every look finds the same.
    fn pass(&mut self, time: Duration, covered: bool, found: Found) {
        let end = self.now + time;
        while let Some(at) = self.schedule.wake_at(self.now).filter(|at| *at <= end) {
            self.now = self.now.max(at);
            self.wakes += 1;
            while let Some((key, why)) = self.schedule.next(self.now) {
                self.looks.push((key, why, self.now));
                assert!(self.looks.len() < 1_000_000, "the schedule does not come to rest");
                self.schedule.looked(key, found, covered, self.now);
            }
        }
        self.now = end;
    }

    fn count(&self, why: Why) -> usize {
        self.looks.iter().filter(|look| look.1 == why).count()
    }
}

#[test]
fn only_hot_outboxes_are_polled_often() {
    let mut run = Run::new();
    let keys: Vec<Key> = (0..10).map(|n| run.schedule.add(&outbox(n), run.now)).collect();
    run.schedule.set_hot(&node(3), true);
    run.pass(Duration::from_secs(10), false, Found::Quiet);
    let hot: Vec<_> = run.looks.iter().filter(|look| look.1 == Why::Hot).collect();
    assert!(hot.iter().all(|look| look.0 == keys[3]));
    assert_eq!(hot.len(), 200);
    assert!(run.count(Why::Cold) <= 10);

    run.schedule.set_hot(&node(3), false);
    run.looks.clear();
    run.pass(COLD * 3, false, Found::Quiet);
    assert_eq!(run.count(Why::Hot), 0);
    assert_eq!(run.looks[0].0, keys[3], "a last look at once, for what the turn's end left");
}

#[test]
fn a_quiet_outbox_is_looked_at_within_every_cold_interval() {
    let mut run = Run::new();
    for n in 0..100 {
        run.schedule.add(&outbox(n), run.now);
        run.pass(Duration::from_millis(7 * u64::from(n)), true, Found::Quiet);
    }
    run.pass(COLD * 20, true, Found::Quiet);
    for key in 1..=100 {
        let times: Vec<Instant> = run.looks.iter().filter(|look| look.0 == key).map(|look| look.2).collect();
        assert!(times.len() >= 20);
        for pair in times.windows(2) {
            assert!(pair[1] - pair[0] <= COLD, "{:?}", pair[1] - pair[0]);
        }
    }
}

#[test]
fn a_thousand_quiet_outboxes_wake_the_process_a_few_times_a_second() {
    for covered in [true, false] {
        let mut run = Run::new();
        for n in 0..1000 {
            run.schedule.add(&outbox(n), run.now);
        }
        run.pass(COLD, covered, Found::Quiet);
        (run.wakes, run.looks) = (0, Vec::new());
        run.pass(COLD * 10, covered, Found::Quiet);
        assert!(run.wakes <= 200 * 2, "{} wakes in 200 s", run.wakes);
        assert!(run.looks.len() <= 1000 * 12, "{} looks", run.looks.len());
        // Nor all at once: on a network file system each look is a call to the server.
        let mut at_once = HashMap::new();
        for look in &run.looks {
            *at_once.entry(look.2).or_insert(0) += 1;
        }
        assert!(at_once.values().all(|looks| *looks <= 250), "{:?}", at_once.values().max());
    }
}

#[test]
fn a_covered_outbox_is_looked_at_on_word_only_and_in_batches() {
    let mut run = Run::new();
    let key = run.schedule.add(&outbox(0), run.now);
    run.schedule.set_hot(&node(0), true);
    run.pass(Duration::from_secs(1), true, Found::Quiet);
    assert_eq!(run.looks.len(), 1, "hot, but the system tells");

    run.schedule.told(key, run.now);
    run.schedule.told(key, run.now);
    run.pass(Duration::ZERO, true, Found::Quiet);
    assert_eq!(run.looks.len(), 2, "at once, and once");
    for _ in 0..1000 {
        run.schedule.told(key, run.now);
        run.pass(Duration::from_micros(10), true, Found::Quiet);
    }
    assert!(run.looks.len() <= 8, "10 ms of changes are {} looks", run.looks.len() - 2);
    run.pass(BATCHING, true, Found::Quiet);
    assert!(run.looks.last().unwrap().2 + BATCHING + BATCHING >= run.now, "the last change is looked at");
}

#[test]
fn outboxes_with_a_backlog_take_turns() {
    let mut run = Run::new();
    let keys: Vec<Key> = (0..3).map(|n| run.schedule.add(&outbox(n), run.now)).collect();
    let mut order = Vec::new();
    for _ in 0..9 {
        let (key, _) = run.schedule.next(run.now).unwrap();
        order.push(key);
        run.schedule.looked(key, Found::More, true, run.now);
    }
    assert_eq!(order, [&keys[..], &keys[..], &keys[..]].concat());
}

#[test]
fn one_that_does_not_exist_yet_is_looked_for_often_at_first() {
    let mut run = Run::new();
    run.schedule.add(&outbox(0), run.now);
    run.pass(Duration::from_secs(1), false, Found::Missing);
    assert!(run.count(Why::Waiting) >= 10, "{}", run.count(Why::Waiting));
    run.pass(Duration::from_hours(1), false, Found::Missing);
    run.looks.clear();
    run.pass(COLD * 10, false, Found::Missing);
    assert!(run.looks.len() <= 12, "a queued job costs nothing: {}", run.looks.len());
    // Its worker comes up: from here on its first word is waited for.
    run.looks.clear();
    run.pass(COLD + Duration::from_secs(2), false, Found::Empty);
    assert!(run.looks.len() >= 10, "{}", run.looks.len());
    run.pass(Duration::from_hours(1), false, Found::Empty);
    run.looks.clear();
    run.pass(COLD * 10, false, Found::Empty);
    assert!(run.looks.len() <= 12, "a worker that hangs costs nothing: {}", run.looks.len());
}

#[test]
fn a_failing_one_is_tried_less_and_less_and_a_removed_one_never() {
    let mut run = Run::new();
    run.schedule.add(&outbox(0), run.now);
    run.schedule.set_hot(&node(0), true);
    run.pass(Duration::from_mins(1), false, Found::Failed);
    assert!(run.looks.len() <= 8, "{}", run.looks.len());
    run.schedule.add(&outbox(1), run.now);
    assert!(run.schedule.remove(&outbox(0)).is_some());
    assert_eq!(run.schedule.forget(&"s".parse().unwrap()).len(), 1);
    run.looks.clear();
    run.schedule.told(1, run.now);
    run.pass(COLD * 2, false, Found::Quiet);
    assert_eq!(run.looks.len(), 0);
    assert_eq!(run.schedule.wake_at(run.now), None);
}

#[test]
fn an_outbox_that_is_added_again_is_looked_at_at_once() {
    let mut run = Run::new();
    let key = run.schedule.add(&outbox(0), run.now);
    run.pass(Duration::from_secs(1), true, Found::Quiet);
    assert_eq!(run.schedule.add(&outbox(0), run.now), key);
    run.pass(Duration::ZERO, true, Found::Quiet);
    assert_eq!(run.looks.len(), 2);
}
