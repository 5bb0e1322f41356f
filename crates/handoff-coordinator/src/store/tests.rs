//! A crash at any byte, an owner that was overtaken, and what comes in by pieces.

use drover_types::AgentKind;
use proptest::prelude::*;

use super::*;
use crate::core::{Cause, NodeId, Owner, OwnerRecord, Turn};
use crate::ownership::SharedFiles;
use crate::session::{Opening, Outcome};

fn id() -> SessionId {
    "s1".parse().unwrap()
}

fn owner(boot: u64) -> Owner {
    Owner { node: NodeId::new(&format!("swarm/{boot}")), boot }
}

fn begins(epoch: u64, boot: u64, follows: u64) -> Record {
    let follows = Some(Epoch(follows)).filter(|last| *last != Epoch(0));
    Record::Epoch { epoch: Epoch(epoch), owner: owner(boot), follows }
}

fn opening() -> Opening {
    let (capabilities, metadata) = (std::collections::BTreeSet::new(), std::collections::BTreeMap::new());
    Opening { agent: AgentKind::Echo, replayable: true, capabilities, metadata, at_us: 0 }
}

fn turn(number: u32, text: &str) -> Vec<Record> {
    let turn = Turn(number);
    let (request, prompt) = (format!("r{number}").parse().unwrap(), text.to_owned());
    let outcome = Outcome::Answer(text.to_uppercase());
    vec![
        Record::Accepted { turn, request, prompt, at_us: 1 },
        Record::Begun { turn },
        Record::Ended { turn, outcome, at_us: 2 },
    ]
}

/// Two nodes, their disks, and what they share.
struct Place {
    dir: tempfile::TempDir,
    ownership: SharedFiles,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ownership = SharedFiles::new(dir.path().join("shared")).unwrap();
        Self { dir, ownership }
    }

    fn shared(&self) -> PathBuf {
        self.dir.path().join("shared")
    }

    fn log(&self, node: u64) -> PathBuf {
        self.dir.path().join(format!("node-{node}/s1/log.jsonl"))
    }

    fn claim(&self, epoch: u64, boot: u64) {
        let cause = Cause::TakenOver;
        let record = OwnerRecord { session: id(), epoch: Epoch(epoch), owner: owner(boot), cause };
        assert_eq!(self.ownership.claim(&record).unwrap(), crate::ownership::Claimed::Won);
    }

    /// Takes over as that node: claims, reads, and begins the epoch.
    fn take_over(&self, epoch: u64, boot: u64) -> SessionStore {
        let (mut store, first) = self.about_to(epoch, boot);
        self.keep(&mut store, &first);
        store
    }

    /// Claims and reads as that node. What it is to write first is still to be written.
    fn about_to(&self, epoch: u64, boot: u64) -> (SessionStore, Vec<Record>) {
        self.claim(epoch, boot);
        let journals = Journals::new(&self.shared(), id());
        let log = journals.read(Epoch(epoch), &self.log(boot)).unwrap();
        let (seq, last) = (log.sum().outline.seq(), log.sum().outline.epoch());
        let mut first = vec![begins(epoch, boot, last.0)];
        if seq == 0 {
            first.push(Record::Opened { opening: opening() });
        }
        (SessionStore::begin(log, journals, Epoch(epoch), 1 << 30), first)
    }

    fn keep(&self, store: &mut SessionStore, records: &[Record]) {
        let first = store.sum().outline.seq() + 1;
        let done = store.append(first, records, &self.ownership).unwrap();
        assert!(matches!(done, Appended::Done { .. }), "{done:?}");
    }
}

#[test]
fn a_new_owner_finds_all_that_was_said_and_an_overtaken_one_says_no_more() {
    let place = Place::new();
    let mut first = place.take_over(1, 1);
    place.keep(&mut first, &turn(0, "one"));
    let mut second = place.take_over(2, 2);
    assert_eq!(second.sum().outline.turns(), 1);
    // It writes, looks, and may not say it; nobody who comes later counts it.
    let late = first.append(6, &turn(1, "late"), &place.ownership).unwrap();
    assert!(matches!(late, Appended::Fenced(newest) if newest.owner == owner(2)));
    assert!(first.checkpoint().unwrap().is_none(), "and it is in no checkpoint");
    place.keep(&mut second, &turn(1, "two"));
    let third = place.take_over(3, 3);
    let all = records(third.log()).unwrap();
    assert!(all.contains(&turn(1, "two")[0]) && !all.contains(&turn(1, "late")[0]));
    assert_eq!(all.len(), 2 + 3 + 1 + 3 + 1);
}

#[test]
fn an_owner_that_begins_late_takes_nothing_from_one_that_has_read_before() {
    // Two kinds of lateness: it begins before the third has read the journals, and after that.
    for third_reads_first in [false, true] {
        let place = Place::new();
        let mut first = place.take_over(1, 1);
        place.keep(&mut first, &turn(0, "said"));
        // Has read what the first one said, and is stopped before it writes a word.
        let (mut second, mut word) = place.about_to(2, 2);
        word.extend(turn(1, "of the second"));
        let fenced = |store: &mut SessionStore, at: u64, records: &[Record]| {
            let done = store.append(at, records, &place.ownership).unwrap();
            assert!(matches!(done, Appended::Fenced(_)), "{done:?}");
        };
        // The first one does not know yet: what it writes is never said, but there it is, and whoever reads now counts it.
        fenced(&mut first, 6, &turn(1, "of the first"));
        let mut third = if third_reads_first {
            let third = place.take_over(3, 3);
            fenced(&mut second, 6, &word);
            third
        } else {
            place.claim(3, 9);
            fenced(&mut second, 6, &word);
            place.take_over(4, 3)
        };
        place.keep(&mut third, &turn(2, "of the third"));
        let said = records(third.log()).unwrap();
        let next = third.epoch().0 + 1;
        let read = records(place.take_over(next, 4).log()).unwrap();
        assert_eq!(read[..said.len()], said, "a word of the third is gone, third reads first: {third_reads_first}");
        let counted = if third_reads_first { "OF THE FIRST" } else { "OF THE SECOND" };
        assert!(format!("{read:?}").contains(counted));
    }
}

#[test]
fn the_end_of_a_write_without_its_beginning_counts_for_nothing() {
    let place = Place::new();
    let mut store = place.take_over(1, 1);
    place.keep(&mut store, &turn(0, "said"));
    let path = place.shared().join("s1/journal/00000000000000000001.jsonl");
    let said = std::fs::read(&path).unwrap();
    let before = store.sum().clone();
    place.keep(&mut store, &turn(1, &"cut off ".repeat(2000)));
    let whole = std::fs::read(&path).unwrap();
    // Pages of one write reach the disk in any order: the last one is there, those before it read as zeros.
    let mut torn = whole.clone();
    torn[said.len()..whole.len() - 300].fill(0);
    for begin in [&torn[..], &[&whole[..said.len() + 700], &torn[said.len() + 700..]].concat()] {
        std::fs::write(&path, begin).unwrap();
        let log = Journals::new(&place.shared(), id()).read(Epoch(2), &place.log(2)).unwrap();
        assert_eq!(*log.sum(), before);
    }
    assert_eq!(place.take_over(2, 2).sum().outline.turns(), 1);
}

#[test]
fn the_same_append_twice_is_one_append() {
    let place = Place::new();
    let mut store = place.take_over(1, 1);
    let one = turn(0, "one");
    for _ in 0..3 {
        assert!(matches!(store.append(3, &one, &place.ownership).unwrap(), Appended::Done { .. }));
    }
    assert_eq!(place.take_over(2, 2).sum().outline.seq(), 2 + 3 + 1);
}

#[test]
fn a_session_has_a_bound() {
    let place = Place::new();
    let mut store = place.take_over(1, 1);
    store.most = 1000;
    let error = store.append(3, &turn(0, &"x".repeat(2000)), &place.ownership).unwrap_err();
    assert!(matches!(error, StoreError::TooLarge { most: 1000, .. }));
    place.keep(&mut store, &turn(0, "small"));
}

#[test]
fn checkpoints_replace_journals_and_write_only_what_is_new() {
    let place = Place::new();
    let mut store = place.take_over(1, 1);
    // Three pieces and a bit.
    for number in 0..7 {
        place.keep(&mut store, &turn(number, &"a".repeat(250_000)));
    }
    let first = store.checkpoint().unwrap().unwrap().make().unwrap();
    assert_eq!(first.pieces.len(), (first.len as usize).div_ceil(pieces::PIECE));
    let mut second = place.take_over(2, 2);
    assert_eq!(second.digest().0, first.len + records_len(&[begins(2, 2, 1)], first.records + 1));
    place.keep(&mut second, &turn(7, "more"));
    let next = second.checkpoint().unwrap().unwrap().make().unwrap();
    assert_eq!(
        next.pieces[..next.pieces.len() - 1],
        first.pieces[..first.pieces.len() - 1],
        "full pieces are the same"
    );
    let dir = place.shared().join("s1");
    let count = |name: &str| std::fs::read_dir(dir.join(name)).unwrap().count();
    assert_eq!((count("journal"), count("checkpoints"), count("pieces")), (1, 1, next.pieces.len()));
    // An owner of long ago that comes to its checkpoint only now spoils nothing.
    store.said = true;
    store.checkpoint().unwrap().unwrap().make().unwrap();
    let third = place.take_over(3, 3);
    assert_eq!(third.sum().outline.turns(), 8);
    // A damaged piece is found, and named.
    let piece = dir.join("pieces").join(&next.pieces[0]);
    let mut content = std::fs::read(&piece).unwrap();
    content[5] ^= 1;
    std::fs::write(&piece, content).unwrap();
    let error = Journals::new(&place.shared(), id()).read(Epoch(9), &place.log(9)).unwrap_err();
    assert!(matches!(error, StoreError::Mismatch { path, .. } if path == piece));
}

#[test]
fn what_arrives_need_not_be_read_again_to_go_on_with_it() {
    let place = Place::new();
    let mut store = place.take_over(1, 1);
    (0..3).for_each(|number| place.keep(&mut store, &turn(number, "said")));
    let (turn, call) = (Turn(3), crate::core::Call { turn: Turn(3), n: 0 });
    let (request, prompt) = ("r3".parse().unwrap(), "asked".to_owned());
    let open = [
        Record::Files { manifest: "the files".to_owned() },
        Record::Accepted { turn, request, prompt, at_us: 1 },
        Record::Begun { turn },
        Record::Called { call, what: "a tool".to_owned() },
        Record::Returned { call, result: "its result".to_owned() },
    ];
    place.keep(&mut store, &open);
    let (len, digest) = store.digest();
    let mut copy = IncomingCopy::begin(&place.log(2).with_file_name("copy.jsonl"), true, len, 1 << 30).unwrap();
    while copy.len() < len {
        let piece = store.log().read_at(copy.len(), 100).unwrap();
        copy.write(copy.len(), &piece).unwrap();
    }
    assert!(copy.whole(len, digest).unwrap());
    let arrived = copy.adopt(&place.log(2)).unwrap();
    for log in [store.log(), &arrived, &SessionLog::open(&place.log(1)).unwrap()] {
        let recall = log.recall();
        assert_eq!(recall.prompt(turn).map(|prompt| prompt.text.as_str()), Some("asked"));
        assert_eq!((recall.call(call), recall.result(call)), (Some("a tool"), Some("its result")));
        assert_eq!(recall.answer(Turn(2)), Some(&Outcome::Answer("SAID".to_owned())));
        assert_eq!(recall.files(), Some("the files"));
    }
}

#[test]
fn a_checkpoint_is_of_the_moment_when_it_was_due() {
    let place = Place::new();
    let mut store = place.take_over(1, 1);
    place.keep(&mut store, &turn(0, "before"));
    let (due, was) = (store.checkpoint().unwrap().unwrap(), store.digest());
    // Made only after the session went on here, and then elsewhere, and its log here is gone.
    place.keep(&mut store, &turn(1, "after"));
    let mut second = place.take_over(2, 2);
    place.keep(&mut second, &turn(2, "elsewhere"));
    std::fs::remove_file(place.log(1)).unwrap();
    let made = due.make().unwrap();
    assert_eq!((made.len, made.digest, made.epoch), (was.0, was.1.to_string(), Epoch(1)));
    let mut all = records(second.log()).unwrap();
    all.push(begins(3, 3, 2));
    assert_eq!(records(place.take_over(3, 3).log()).unwrap(), all, "it takes nothing away");
}

fn records_len(records: &[Record], first: u64) -> u64 {
    let mut bytes = Vec::new();
    for (seq, record) in (first..).zip(records) {
        encode(seq, record, &mut bytes).unwrap();
    }
    bytes.len() as u64
}

/// Copies a directory as a crash at that moment would leave it.
fn snapshot(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            snapshot(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

type Step = Box<dyn Fn(&Path)>;

#[test]
fn a_checkpoint_that_is_cut_off_anywhere_loses_nothing() {
    // The steps of a checkpoint in their order, each undone from its end: what a crash between two of them leaves.
    let place = Place::new();
    let mut store = place.take_over(1, 1);
    (0..3).for_each(|number| place.keep(&mut store, &turn(number, &"b".repeat(300_000))));
    store.checkpoint().unwrap().unwrap().make().unwrap();
    let mut store = place.take_over(2, 2);
    (3..6).for_each(|number| place.keep(&mut store, &turn(number, &"c".repeat(300_000))));
    let before = tempfile::tempdir().unwrap();
    snapshot(&place.shared(), before.path());
    store.checkpoint().unwrap().unwrap().make().unwrap();
    let after = tempfile::tempdir().unwrap();
    snapshot(&place.shared(), after.path());
    let session = |root: &Path| root.join("s1");
    let list = |root: &Path, name: &str| -> Vec<PathBuf> {
        let mut all: Vec<PathBuf> =
            std::fs::read_dir(session(root).join(name)).unwrap().map(|entry| entry.unwrap().path()).collect();
        all.sort();
        all
    };
    // New pieces, then the checkpoint, then old pieces go, then the old checkpoint, then the old journals.
    let mut steps: Vec<Step> = Vec::new();
    for (name, removes) in
        [("pieces", false), ("checkpoints", false), ("pieces", true), ("checkpoints", true), ("journal", true)]
    {
        let (old, new) = (list(before.path(), name), list(after.path(), name));
        let named =
            |paths: &[PathBuf]| paths.iter().map(|path| path.file_name().unwrap().to_owned()).collect::<Vec<_>>();
        let (from, against) = if removes { (old, named(&new)) } else { (new, named(&old)) };
        for path in from.into_iter().filter(|path| !against.contains(&path.file_name().unwrap().to_owned())) {
            let target = Path::new("s1").join(name).join(path.file_name().unwrap());
            steps.push(Box::new(move |root: &Path| {
                if removes {
                    std::fs::remove_file(root.join(&target)).unwrap();
                } else {
                    std::fs::copy(&path, root.join(&target)).unwrap();
                }
            }));
        }
    }
    assert!(steps.len() >= 5, "{} steps", steps.len());
    for done in 0..=steps.len() {
        let crashed = tempfile::tempdir().unwrap();
        snapshot(before.path(), crashed.path());
        steps[..done].iter().for_each(|step| step(crashed.path()));
        let log = Journals::new(crashed.path(), id()).read(Epoch(3), &crashed.path().join("log")).unwrap();
        assert_eq!(log.sum().digest, store.sum().digest, "after {done} of {} steps", steps.len());
    }
}

#[test]
fn a_copy_comes_in_pieces_goes_on_after_a_crash_and_is_checked() {
    let place = Place::new();
    let mut store = place.take_over(1, 1);
    (0..20).for_each(|number| place.keep(&mut store, &turn(number, "some text")));
    let (len, digest) = store.digest();
    let path = place.dir.path().join("node-2/s1/copy.jsonl");
    let mut copy = IncomingCopy::begin(&path, false, 0, 1 << 20).unwrap();
    copy.write(0, &store.log().read_at(0, 1000).unwrap()).unwrap();
    assert!(!copy.whole(len, digest).unwrap());
    assert!(copy.write(999, b"x").is_err(), "a piece that does not follow is refused");
    drop(copy);
    // Whole lines are left of what had come.
    let mut copy = IncomingCopy::begin(&path, false, 0, 1 << 20).unwrap();
    assert!(copy.len() > 500 && copy.len() <= 1000);
    while copy.len() < len {
        let piece = store.log().read_at(copy.len(), 333).unwrap();
        copy.write(copy.len(), &piece).unwrap();
    }
    assert!(copy.whole(len, digest).unwrap());
    assert!(!copy.whole(len, Digest([1; 32])).unwrap());
    let log = copy.adopt(&place.log(2)).unwrap();
    assert_eq!(log.sum(), store.sum());
    // Too much is refused before it is written.
    let mut small = IncomingCopy::begin(&path, true, 0, 100).unwrap();
    assert!(small.is_empty() && small.write(0, &[b'x'; 101]).is_err());
    assert_eq!(SessionLog::open(&place.log(2)).unwrap().sum(), store.sum());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// A journal that ends at any byte, with anything behind it, gives the whole records before that byte.
    #[test]
    fn a_crash_at_any_byte_leaves_whole_records(cut in 0.0_f64..1.0, garbage in proptest::collection::vec(any::<u8>(), 0..40)) {
        let place = Place::new();
        let mut store = place.take_over(1, 1);
        place.keep(&mut store, &turn(0, "said"));
        let said = store.sum().len as usize;
        place.keep(&mut store, &turn(1, "cut off"));
        for path in [place.shared().join("s1/journal/00000000000000000001.jsonl"), place.log(1)] {
            let whole = std::fs::read(&path).unwrap();
            let end = said + ((whole.len() - said) as f64 * cut) as usize;
            let mut torn = whole[..end].to_vec();
            torn.extend(garbage.iter().filter(|byte| **byte != b'\n'));
            std::fs::write(&path, torn).unwrap();
        }
        let lines = |log: &SessionLog| records(log).unwrap().len();
        let local = SessionLog::open(&place.log(1)).unwrap();
        let taken = place.take_over(2, 2);
        prop_assert!((5..8).contains(&lines(&local)));
        prop_assert_eq!(lines(taken.log()), lines(&local) + 1);
        prop_assert_eq!(taken.sum().outline.find(&"r0".parse().unwrap()).map(|(turn, _)| turn), Some(Turn(0)));
    }
}
