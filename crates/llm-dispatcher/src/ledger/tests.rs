//! The ledger over real files: across crashes, which are copies of the file while it is open.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::call::Usage;

fn usd(text: &str) -> Money {
    Money::from_usd(text.parse().unwrap()).unwrap()
}

fn day(text: &str) -> Day {
    Day::parse(text).unwrap()
}

fn today() -> Day {
    day("2026-11-21")
}

fn charge(amount: Money) -> Charge {
    let usage = Usage { input_tokens: 10, output_tokens: 5, ..Usage::default() };
    Charge { day: today(), provider: "p".into(), model: "m".into(), calls: 1, amount, estimated: false, usage }
}

fn run(name: &str, began_ms: u64) -> Run {
    Run { name: name.into(), source: "f".into(), began_ms, ended_ms: None, answered: 0 }
}

/// What a crash leaves: the files as they are at this moment.
fn crashed(dir: &Path) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        // The index of the log is made anew from the log.
        if !path.to_str().unwrap().ends_with("-shm") {
            fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    copy
}

#[tokio::test]
async fn money_that_was_set_aside_counts_until_it_is_charged_or_given_back_and_after_a_crash_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let (ledger, closed) = Ledger::open(dir.path()).unwrap();
    let cap = usd("1");
    assert_eq!(ledger.set_aside(today(), usd("0.4"), cap).await.unwrap(), Granted::Yes);
    assert_eq!(ledger.set_aside(today(), usd("0.4"), cap).await.unwrap(), Granted::Yes);
    assert_eq!(ledger.set_aside(today(), usd("0.4"), cap).await.unwrap(), Granted::No { left: usd("0.2") });
    ledger.charge(charge(usd("0.3"))).await.unwrap();
    ledger.give_back(today(), usd("0.1")).await.unwrap();
    // 0.7 are set aside, of which 0.3 were charged.
    assert_eq!(ledger.counted(today()).await.unwrap(), usd("0.7"));
    assert_eq!(ledger.counted(day("2026-11-22")).await.unwrap(), Money::ZERO);

    let crash = crashed(dir.path());
    let (after, _closed) = Ledger::open(crash.path()).unwrap();
    assert_eq!(after.counted(today()).await.unwrap(), usd("0.7"), "nobody knows what was spent of it");
    assert_eq!(after.set_aside(today(), usd("0.3"), cap).await.unwrap(), Granted::Yes);
    after.settle().await.unwrap();
    assert_eq!(after.counted(today()).await.unwrap(), usd("0.7"), "only this start's own is free again");

    ledger.settle().await.unwrap();
    assert_eq!(ledger.counted(today()).await.unwrap(), usd("0.3"), "an orderly end leaves what was charged");
    let spent = ledger.spent(5).await.unwrap();
    assert_eq!((spent.len(), spent[0].day.as_str(), spent[0].set_aside), (1, "2026-11-21", Money::ZERO));
    assert_eq!((spent[0].spent[0].calls, spent[0].spent[0].input_tokens, spent[0].spent[0].cost), (1, 10, usd("0.3")));
    drop(ledger);
    closed.wait().await;
    let (again, _closed) = Ledger::open(dir.path()).unwrap();
    assert_eq!(again.counted(today()).await.unwrap(), usd("0.3"));
}

#[tokio::test]
async fn answers_are_found_by_position_and_by_what_was_asked() {
    let dir = tempfile::tempdir().unwrap();
    let (ledger, _closed) = Ledger::open(dir.path()).unwrap();
    let one = ledger.begin(run("one", 1)).await.unwrap();
    let two = ledger.begin(run("two", 2)).await.unwrap();
    let answer = |position: u32, of: u8| Answered { position, digest: [of; 16], body: vec![of].into() };
    ledger.keep(one, vec![answer(0, 1), answer(2, 2), answer(u32::MAX, 3)]).await.unwrap();
    ledger.keep(two, vec![answer(0, 9)]).await.unwrap();
    // The process dies without a word.
    let crash = crashed(dir.path());
    let (after, _closed) = Ledger::open(crash.path()).unwrap();
    let (one, found) = after.find("one".into()).await.unwrap();
    assert_eq!((found.answered, found.ended_ms), (3, None));
    assert_eq!(after.kept(one, 0, 3).await.unwrap(), [answer(0, 1), answer(2, 2)]);
    assert_eq!(after.kept(one, u32::MAX, 7).await.unwrap(), [answer(u32::MAX, 3)]);
    assert_eq!(after.kept_for(one, [2; 16]).await.unwrap().as_deref(), Some(&[2][..]));
    assert_eq!(after.kept_for(one, [9; 16]).await.unwrap(), None, "it is another run's");
    assert!(matches!(after.find("three".into()).await, Err(LedgerError::UnknownRun(name)) if name == "three"));
    assert!(matches!(after.begin(run("two", 3)).await, Err(LedgerError::RunExists(_))));
    after.end(one, 77).await.unwrap();
    assert_eq!(after.find("one".into()).await.unwrap().1.ended_ms, Some(77));

    // Runs of long ago are forgotten with their answers when another begins.
    let month_ms = 31 * 24 * 3600 * 1000;
    after.begin(run("later", month_ms)).await.unwrap();
    assert_eq!(after.runs(9).await.unwrap().into_iter().map(|run| run.name).collect::<Vec<_>>(), ["later"]);
    assert!(after.kept(one, 0, 3).await.unwrap().is_empty());
}

#[tokio::test]
async fn the_file_is_private_and_one_that_cannot_be_used_is_refused_with_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let (ledger, closed) = Ledger::open(dir.path()).unwrap();
    ledger.begin(run("one", 1)).await.unwrap();
    for entry in fs::read_dir(dir.path()).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{:?}", entry.path());
    }
    drop(ledger);
    closed.wait().await;

    let file = dir.path().join(FILE);
    let newer = rusqlite::Connection::open(&file).unwrap();
    newer.pragma_update(None, "user_version", 99).unwrap();
    drop(newer);
    assert!(matches!(Ledger::open(dir.path()), Err(LedgerError::Newer { found: 99, .. })));
    fs::write(&file, "this is no database, whatever its name says, and never was one").unwrap();
    let error = Ledger::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("ledger.sqlite") && error.starts_with("failed to open"), "{error}");
    let error = Ledger::open(Path::new("/proc/nowhere")).unwrap_err().to_string();
    assert!(error.contains("/proc/nowhere/ledger.sqlite"), "{error}");
}
