//! Real processes compete for the epochs of one session and are killed in the middle: each epoch has exactly one owner.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use drover_handoff_coordinator::core::{Cause, NodeId, Owner, OwnerRecord};
use drover_handoff_coordinator::ownership::{Claimed, Ownership, SharedFiles};
use drover_types::{Epoch, SessionId};

const DIR: &str = "DROVER_TEST_CLAIMS_DIR";
const NUMBER: &str = "DROVER_TEST_CLAIMS_NUMBER";

fn session() -> SessionId {
    "contested".parse().expect("a harmless name")
}

/// The competing process: this test's own program again. Without its environment it is a test of nothing.
#[test]
fn competitor() {
    let (Ok(dir), Ok(number)) = (std::env::var(DIR), std::env::var(NUMBER)) else { return };
    let dir = PathBuf::from(dir);
    let files = SharedFiles::new(dir.join("shared")).unwrap();
    let boot = u64::from(std::process::id());
    let owner = Owner { node: NodeId::new(&format!("swarm/{number}")), boot };
    let mut won = std::fs::File::create(dir.join(format!("won-{number}-{boot}"))).unwrap();
    loop {
        let newest = files.newest(&session()).unwrap().map_or(Epoch(0), |newest| newest.epoch);
        let record =
            OwnerRecord { session: session(), epoch: newest.next(), owner: owner.clone(), cause: Cause::TakenOver };
        if files.claim(&record).is_ok_and(|claimed| claimed == Claimed::Won) {
            writeln!(won, "{}", record.epoch).unwrap();
        }
    }
}

struct Competitor(Child);

impl Competitor {
    fn start(dir: &Path, number: usize) -> Self {
        let child = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "competitor", "--nocapture"])
            .env(DIR, dir)
            .env(NUMBER, number.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("this program starts again");
        Self(child)
    }
}

impl Drop for Competitor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn of_many_processes_that_are_killed_exactly_one_wins_each_epoch() {
    let dir = tempfile::tempdir().unwrap();
    let files = SharedFiles::new(dir.path().join("shared")).unwrap();
    let mut competitors: Vec<Competitor> = (0..6).map(|number| Competitor::start(dir.path(), number)).collect();
    // Each is killed again and again, a different while after its start, until there are enough epochs.
    let (start, mut kills) = (Instant::now(), 0);
    loop {
        std::thread::sleep(Duration::from_millis(7 + (kills * 13) % 40));
        let number = kills as usize % competitors.len();
        competitors[number] = Competitor::start(dir.path(), number);
        kills += 1;
        let newest = files.newest(&session()).unwrap().map_or(0, |newest| newest.epoch.0);
        if newest >= 200 && kills >= 60 {
            break;
        }
        assert!(start.elapsed() < Duration::from_mins(2), "{newest} epochs and {kills} kills in two minutes");
    }
    drop(competitors);

    let newest = files.newest(&session()).unwrap().unwrap().epoch;
    let mut owners = BTreeMap::new();
    for epoch in 1..=newest.0 {
        let path = dir.path().join(format!("shared/contested/owners/{epoch:020}.json"));
        let record: OwnerRecord = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert_eq!(record.epoch, Epoch(epoch));
        owners.insert(epoch, record.owner);
    }
    let nodes: BTreeSet<&NodeId> = owners.values().map(|owner| &owner.node).collect();
    assert!(nodes.len() >= 2, "several of them owned it at some time");
    let mut told = BTreeMap::new();
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let Some(who) = name.strip_prefix("won-") else { continue };
        let (number, boot) = who.split_once('-').unwrap();
        let owner = Owner { node: NodeId::new(&format!("swarm/{number}")), boot: boot.parse().unwrap() };
        let text = std::fs::read_to_string(entry.path()).unwrap();
        // The last line may be cut off by the kill.
        for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            let epoch: u64 = line.parse().unwrap();
            let before = told.insert(epoch, owner.clone());
            assert_eq!(before, None, "epoch {epoch} was won by two");
            assert_eq!(owners.get(&epoch), Some(&owner), "epoch {epoch} has another owner than the one who won it");
        }
    }
    // Who was overtaken before it looked was not told that it had won.
    assert!(!told.is_empty(), "somebody was told that it had won");
}
