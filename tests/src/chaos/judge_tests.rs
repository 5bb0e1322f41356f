//! The judge can say no: each thing that must not happen is made up once, and it must be found.

use super::*;

/// A run in which all is well: forty prompts on two nodes, one of them lost with its worker.
struct Story {
    plan: Plan,
    sent: Vec<Sent>,
    kills: Vec<Kill>,
    subscriber: Vec<u64>,
    resumed: u32,
    log: View,
    written: Written,
    executed: HashMap<String, usize>,
}

impl Story {
    fn good() -> Self {
        let place = |node| Place { swarm: "s".to_owned(), node };
        let kill = |kind, node, uncommitted| Kill { kind, node, in_flight: 1, uncommitted, own_turn: false };
        let mut story = Self {
            plan: Plan { seed: 0, kills: 2, injections: 40, nodes: 2, gap_kills: 1, forget: false },
            sent: Vec::new(),
            kills: vec![kill("router", None, 9), kill("worker", Some(place(1)), 0)],
            subscriber: Vec::new(),
            resumed: 1,
            log: View::default(),
            written: Written::new(),
            executed: HashMap::new(),
        };
        for index in 0..40_u64 {
            let (injection_id, name) = (format!("i{index}"), format!("chaos-0-{index}"));
            let lost = index == 39;
            let seen = story.log.injections.entry(injection_id.clone()).or_default();
            seen.acked_at = 10 * index + 1;
            seen.first_other = 10 * index + 2;
            seen.outcome = Some(if lost { "failed" } else { "completed" }.to_owned());
            seen.error = if lost { "the worker ended" } else { "" }.to_owned();
            for (event, count) in [("inject_ack", 1), ("turn_started", 1), ("assistant_delta", 3), ("turn_complete", 1)]
            {
                seen.counts.insert(event.to_owned(), count);
                if event != "inject_ack" {
                    story.written.insert((injection_id.clone(), event.to_owned()), count);
                }
            }
            story.log.seqs.extend([10 * index + 1, 10 * index + 2]);
            story.executed.insert(name.clone(), 1);
            story.sent.push(Sent { injection_id, name, place: place(u32::from(lost)) });
        }
        story.subscriber.clone_from(&story.log.seqs);
        story
    }

    fn seen(&mut self, index: u32) -> &mut crate::subscriber::Seen {
        self.log.injections.get_mut(&format!("i{index}")).unwrap()
    }

    fn count(&mut self, index: u32, event: &str, count: u32) {
        self.seen(index).counts.insert(event.to_owned(), count);
    }

    fn verdict(&self) -> Verdict {
        verdict(&Facts {
            plan: &self.plan,
            sent: &self.sent,
            kills: &self.kills,
            subscriber: &self.subscriber,
            resumed: self.resumed,
            log: &self.log,
            written: &self.written,
            executed: &self.executed,
        })
    }
}

#[test]
fn a_good_run_is_let_pass() {
    let verdict = Story::good().verdict();
    assert_eq!(verdict.violations, [""; 0]);
    assert_eq!((verdict.completed, verdict.failed.len()), (39, 1));
}

#[test]
fn whatever_must_not_happen_is_found() {
    type Spoil = fn(&mut Story);
    let cases: &[(&str, Spoil)] = &[
        ("carried out 2 times", |s| _ = s.executed.insert("chaos-0-3".into(), 2)),
        ("carried out 2 times", |s| _ = s.executed.insert("chaos-0-39".into(), 2)),
        ("carried out 0 times", |s| _ = s.executed.remove("chaos-0-3")),
        ("was carried out and never sent", |s| _ = s.executed.insert("chaos-0-99".into(), 1)),
        ("outcome None", |s| s.seen(3).outcome = None),
        ("outcome Some(\"interrupted\")", |s| s.seen(3).outcome = Some("interrupted".into())),
        ("failed without a reason", |s| s.seen(39).error.clear()),
        ("the log knows nothing of it", |s| _ = s.log.injections.remove("i3")),
        ("are both i4", |s| s.sent[3].injection_id = "i4".into()),
        ("\"turn_complete\": 2", |s| s.count(3, "turn_complete", 2)),
        ("\"turn_started\": 2", |s| s.count(3, "turn_started", 2)),
        ("\"inject_ack\": 2", |s| s.count(3, "inject_ack", 2)),
        ("\"inject_failed\": 1", |s| s.count(3, "inject_failed", 1)),
        ("3 x assistant_delta written, 2 in the log", |s| s.count(3, "assistant_delta", 2)),
        ("3 x assistant_delta written, 4 in the log", |s| s.count(3, "assistant_delta", 4)),
        ("after its first event", |s| s.seen(3).acked_at = 1000),
        ("the subscriber has seq 2 and then 2", |s| s.subscriber.insert(2, 2)),
        ("the subscriber has seq 11 and then 2", |s| s.subscriber.swap(1, 2)),
        ("and they differ", |s| _ = s.subscriber.remove(7)),
        ("the log has seq", |s| s.log.seqs.swap(1, 2)),
        ("never had to resume", |s| s.resumed = 0),
        ("1 prompts failed, but only 0 kills hit it", |s| s.kills[1].node = None),
        ("2 of 40 prompts failed", |s| {
            // Both on the node that was killed, twice: too many all the same.
            s.sent[38].place.node = 1;
            s.seen(38).outcome = Some("failed".into());
            s.seen(38).error = "the worker ended".into();
            s.kills[0].node = Some(s.sent[38].place.clone());
        }),
        ("1 kills hit without a turn in flight", |s| s.kills[0].in_flight = 0),
        ("only 0 kills fell between append and commit", |s| s.kills[0].uncommitted = 0),
        ("1 kills, not 2", |s| _ = s.kills.pop()),
        ("no codex was killed", |s| {
            s.plan.kills = 16;
            s.kills.resize(16, s.kills[0].clone());
        }),
    ];
    for (expected, spoil) in cases {
        let mut story = Story::good();
        spoil(&mut story);
        let violations = story.verdict().violations;
        assert!(violations.iter().any(|found| found.contains(expected)), "{expected}: {violations:?}");
    }
}
