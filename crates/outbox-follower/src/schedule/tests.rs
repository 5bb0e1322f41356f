use std::time::SystemTime;

use drover_mailbox::Mailbox;
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
    /// What the beacon of the swarm says, and how often it was asked.
    said: Option<Flash>,
    asked: usize,
}

/// Flashes are told apart by the time of a file.
fn flash(second: u64) -> Flash {
    let dir = tempfile::tempdir().unwrap();
    let swarm = outbox(0).swarm;
    std::fs::create_dir(dir.path().join(swarm.as_str())).unwrap();
    let file = std::fs::File::create(dir.path().join(swarm.as_str()).join("beacon")).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(second)).unwrap();
    Mailbox::new(dir.path()).flashed(&swarm).unwrap().unwrap()
}

impl Run {
    fn new() -> Self {
        Self::with(false)
    }

    fn with(beacons: bool) -> Self {
        let now = Instant::now();
        let schedule = Schedule::new(HOT, COLD, beacons, now);
        Self { schedule, now, looks: Vec::new(), wakes: 0, said: None, asked: 0 }
    }

    /// Lets time pass; every look finds the same.
    fn pass(&mut self, time: Duration, cover: Cover, found: Found) {
        let end = self.now + time;
        while let Some(at) = self.schedule.wake_at(self.now).filter(|at| *at <= end) {
            self.now = self.now.max(at);
            self.wakes += 1;
            while let Some(swarm) = self.schedule.next_beacon(self.now) {
                self.asked += 1;
                self.schedule.beacon(&swarm, self.said, self.now);
            }
            while let Some((key, why)) = self.schedule.next(self.now) {
                self.looks.push((key, why, self.now));
                assert!(self.looks.len() < 1_000_000, "the schedule does not come to rest");
                self.schedule.looked(key, found, cover, self.now);
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
    run.pass(Duration::from_secs(10), Cover::None, Found::Quiet);
    let hot: Vec<_> = run.looks.iter().filter(|look| look.1 == Why::Hot).collect();
    assert!(hot.iter().all(|look| look.0 == keys[3]));
    assert_eq!(hot.len(), 200);
    assert!(run.count(Why::Cold) <= 10);

    run.schedule.set_hot(&node(3), false);
    run.looks.clear();
    run.pass(COLD * 3, Cover::None, Found::Quiet);
    assert_eq!(run.count(Why::Hot), 0);
    assert_eq!(run.looks[0].0, keys[3], "a last look at once, for what the turn's end left");
}

#[test]
fn a_quiet_outbox_is_looked_at_within_every_cold_interval() {
    for cover in [Cover::None, Cover::Partly] {
        let mut run = Run::new();
        for n in 0..100 {
            run.schedule.add(&outbox(n), run.now);
            run.pass(Duration::from_millis(7 * u64::from(n)), cover, Found::Quiet);
        }
        run.pass(COLD * 20, cover, Found::Quiet);
        for key in 1..=100 {
            let times: Vec<Instant> = run.looks.iter().filter(|look| look.0 == key).map(|look| look.2).collect();
            assert!(times.len() >= 20);
            for pair in times.windows(2) {
                assert!(pair[1] - pair[0] <= COLD, "{:?}", pair[1] - pair[0]);
            }
        }
    }
}

#[test]
fn of_whom_the_system_tells_everything_is_looked_at_rarely() {
    let mut run = Run::new();
    for n in 0..1000 {
        run.schedule.add(&outbox(n), run.now);
    }
    run.pass(COLD * 2, Cover::Whole, Found::Quiet);
    run.looks.clear();
    run.pass(COLD * NET * 3, Cover::Whole, Found::Quiet);
    assert!((3000..=3400).contains(&run.looks.len()), "{}", run.looks.len());
    run.schedule.told(7, run.now);
    run.looks.clear();
    run.pass(Duration::ZERO, Cover::Whole, Found::Quiet);
    assert_eq!(run.looks.len(), 1);
}

#[test]
fn a_beacon_speaks_for_all_quiet_outboxes_of_its_swarm() {
    let mut run = Run::with(true);
    for n in 0..1000 {
        run.schedule.add(&outbox(n), run.now);
    }
    // Without one, each is looked at.
    run.pass(COLD * 2, Cover::None, Found::Quiet);
    run.looks.clear();
    run.pass(COLD * 10, Cover::None, Found::Quiet);
    assert!(run.looks.len() >= 10_000, "{}", run.looks.len());

    // The first word of one is a reason to look, now and once more when its pause is over.
    run.said = Some(flash(1));
    run.pass(COLD * 3, Cover::None, Found::Quiet);
    (run.looks, run.asked) = (Vec::new(), 0);
    run.pass(COLD * 12, Cover::None, Found::Quiet);
    assert!(run.looks.len() <= 1000, "as good as nothing: {}", run.looks.len());
    assert!((12..=14).contains(&run.asked), "{}", run.asked);

    for second in 2..5 {
        run.looks.clear();
        run.said = Some(flash(second));
        run.pass(COLD, Cover::None, Found::Quiet);
        let seen = run.count(Why::Beacon);
        assert!((1000..=2000).contains(&seen), "{seen} of 1000 within one interval of the flash");
        run.pass(COLD, Cover::None, Found::Quiet);
        let seen = run.count(Why::Beacon);
        assert!(seen >= 2000, "and once more, for what was appended just after it: {seen}");
    }
    // One that can no longer be asked speaks for nobody.
    run.said = None;
    run.pass(COLD * 2, Cover::None, Found::Quiet);
    run.looks.clear();
    run.pass(COLD * 10, Cover::None, Found::Quiet);
    assert!(run.looks.len() >= 10_000, "{}", run.looks.len());
}

#[test]
fn a_short_interval_does_not_outrun_the_pause_between_flashes() {
    let cold = Duration::from_millis(500);
    let mut now = Instant::now();
    let mut schedule = Schedule::new(HOT, cold, true, now);
    let key = schedule.add(&outbox(0), now);
    let mut last = None;
    let (begun, said) = (now, Some(flash(1)));
    while now < begun + FLASH_PAUSE * 2 {
        while let Some(swarm) = schedule.next_beacon(now) {
            schedule.beacon(&swarm, said, now);
        }
        while let Some((_, why)) = schedule.next(now) {
            if why == Why::Beacon {
                last = Some(now);
            }
            schedule.looked(key, Found::Quiet, Cover::None, now);
        }
        now = schedule.wake_at(now).unwrap();
    }
    let last = last.unwrap() - begun;
    assert!(last >= FLASH_PAUSE && last <= FLASH_PAUSE + cold, "{last:?}");
}

#[test]
fn a_thousand_quiet_outboxes_wake_the_process_a_few_times_a_second() {
    for cover in [Cover::Partly, Cover::None] {
        let mut run = Run::new();
        for n in 0..1000 {
            run.schedule.add(&outbox(n), run.now);
        }
        run.pass(COLD, cover, Found::Quiet);
        (run.wakes, run.looks) = (0, Vec::new());
        run.pass(COLD * 10, cover, Found::Quiet);
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
    run.pass(Duration::from_secs(1), Cover::Partly, Found::Quiet);
    assert_eq!(run.looks.len(), 1, "hot, but the system tells");

    run.schedule.told(key, run.now);
    run.schedule.told(key, run.now);
    run.pass(Duration::ZERO, Cover::Partly, Found::Quiet);
    assert_eq!(run.looks.len(), 2, "at once, and once");
    for _ in 0..1000 {
        run.schedule.told(key, run.now);
        run.pass(Duration::from_micros(10), Cover::Partly, Found::Quiet);
    }
    assert!(run.looks.len() <= 8, "10 ms of changes are {} looks", run.looks.len() - 2);
    run.pass(BATCHING, Cover::Partly, Found::Quiet);
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
        run.schedule.looked(key, Found::More, Cover::Partly, run.now);
    }
    assert_eq!(order, [&keys[..], &keys[..], &keys[..]].concat());
}

#[test]
fn one_that_does_not_exist_yet_is_looked_for_often_at_first() {
    let mut run = Run::new();
    run.schedule.add(&outbox(0), run.now);
    run.pass(Duration::from_secs(1), Cover::None, Found::Missing);
    assert!(run.count(Why::Waiting) >= 10, "{}", run.count(Why::Waiting));
    run.pass(Duration::from_hours(1), Cover::None, Found::Missing);
    run.looks.clear();
    run.pass(COLD * 10, Cover::None, Found::Missing);
    assert!(run.looks.len() <= 12, "a queued job costs nothing: {}", run.looks.len());
    // Its worker comes up: from here on its first word is waited for.
    run.looks.clear();
    run.pass(COLD + Duration::from_secs(2), Cover::None, Found::Empty);
    assert!(run.looks.len() >= 10, "{}", run.looks.len());
    run.pass(Duration::from_hours(1), Cover::None, Found::Empty);
    run.looks.clear();
    run.pass(COLD * 10, Cover::None, Found::Empty);
    assert!(run.looks.len() <= 12, "a worker that hangs costs nothing: {}", run.looks.len());
}

#[test]
fn a_failing_one_is_tried_less_and_less_and_a_removed_one_never() {
    let mut run = Run::new();
    run.schedule.add(&outbox(0), run.now);
    run.schedule.set_hot(&node(0), true);
    run.pass(Duration::from_mins(1), Cover::None, Found::Failed);
    assert!(run.looks.len() <= 8, "{}", run.looks.len());
    run.schedule.add(&outbox(1), run.now);
    assert!(run.schedule.remove(&outbox(0)).is_some());
    assert_eq!(run.schedule.forget(&"s".parse().unwrap()).len(), 1);
    run.looks.clear();
    run.schedule.told(1, run.now);
    run.pass(COLD * 2, Cover::None, Found::Quiet);
    assert_eq!(run.looks.len(), 0);
    assert_eq!(run.schedule.wake_at(run.now), None);
}

#[test]
fn an_outbox_that_is_added_again_is_looked_at_at_once() {
    let mut run = Run::new();
    let key = run.schedule.add(&outbox(0), run.now);
    run.pass(Duration::from_secs(1), Cover::Partly, Found::Quiet);
    assert_eq!(run.schedule.add(&outbox(0), run.now), key);
    run.pass(Duration::ZERO, Cover::Partly, Found::Quiet);
    assert_eq!(run.looks.len(), 2);
}
