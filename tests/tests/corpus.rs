//! The short size of fuzzing: every file of the corpus, then mutations of it. `cargo fuzz` runs the same functions for as long
//! as one likes.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::any::Any;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

#[path = "../../fuzz/src/lib.rs"]
#[expect(unreachable_pub, reason = "a crate of its own where it is fuzzed")]
mod targets;

/// Long enough to see that a target still works, short enough for every change.
const BUDGET: Duration = Duration::from_secs(6);
/// The same for targets that are many and small.
const SMALL: Duration = Duration::from_secs(1);
/// What formats are made of; random bytes alone rarely get past the first brace.
const WORDS: &[&str] = &[
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    "\"",
    "\n",
    "\r\n",
    "\\",
    "\\u0000",
    "\\ud800",
    "null",
    "true",
    "-0",
    "1e999",
    "18446744073709551616",
    "\u{1e}",
    "\u{feff}",
    "\u{2028}",
    "{\"v\":1,\"rotate\":2}\n",
    "\"method\":\"",
    "\"id\":",
    "\"payload\":{}",
    "&a ",
    "*a",
    "<<: ",
    "!!str ",
    "? ",
    "- ",
    "  ",
    "\t",
    "# ",
    "---\n",
    "...\n",
    "|\n",
    ">-\n",
    "0x",
    ".nan",
    "~",
];

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name);
    let mut files: Vec<PathBuf> = fs::read_dir(&dir)
        .unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(files.len() >= 5, "the corpus of {name} is gone");
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

fn mutate(rng: &mut StdRng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = seeds.choose(rng).cloned().unwrap_or_default();
    for _ in 0..rng.random_range(1..6) {
        let at = rng.random_range(0..=bytes.len());
        let end = (at + rng.random_range(0..16_usize)).min(bytes.len());
        match rng.random_range(0..6) {
            0 if at < bytes.len() => bytes[at] = rng.random(),
            1 => drop(bytes.drain(at..end)),
            2 => {
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece.repeat(rng.random_range(1..4)));
            }
            3 => {
                let other = seeds.choose(rng).map_or(&[][..], Vec::as_slice);
                let from = rng.random_range(0..=other.len());
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
            _ => {
                let word = WORDS.choose(rng).copied().unwrap_or_default();
                bytes.splice(at..at, word.bytes());
            }
        }
    }
    bytes
}

/// Feeds one input; when it is a finding, keeps it and says where.
fn feed(name: &str, target: fn(&[u8]), bytes: &[u8], seed: u64) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| target(bytes))) {
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("finding-{name}-{seed}"));
        fs::write(&kept, bytes).unwrap();
        panic!("{name}, seed {seed}: {}; the input is in {}", text(&*panic), kept.display());
    }
}

fn text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked")
}

fn run(name: &str) {
    run_for(name, BUDGET);
}

#[expect(clippy::print_stderr, reason = "a seed that finds something must be seen")]
fn run_for(name: &str, budget: Duration) {
    let (_, target) = *targets::TARGETS.iter().find(|(known, _)| *known == name).unwrap();
    let seeds = corpus(name);
    for bytes in &seeds {
        feed(name, target, bytes, 0);
    }
    for seed in [1, rand::random()] {
        eprintln!("{name}: seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let began = Instant::now();
        for round in 0..20_000 {
            feed(name, target, &mutate(&mut rng, &seeds), seed);
            if round >= 100 && began.elapsed() > budget {
                break;
            }
        }
    }
}

#[test]
fn no_bytes_upset_the_json_line_decoder() {
    run("json_line");
}

#[test]
fn no_bytes_upset_the_mailbox_reader() {
    run("mailbox");
}

#[test]
fn no_bytes_upset_the_codex_decoder() {
    run("codex_rpc");
}

#[test]
fn no_bytes_upset_the_config_loader() {
    run("config");
}

#[test]
fn no_bytes_upset_the_gossip() {
    run("gossip");
}

#[test]
fn no_bytes_upset_the_records_of_a_session() {
    run_for("session", SMALL);
}

#[test]
fn no_bytes_upset_the_files_of_a_session() {
    run_for("bundle", SMALL);
}

#[test]
fn no_bytes_upset_the_moving_of_sessions() {
    run_for("transfer", SMALL);
}

#[test]
fn no_bytes_upset_the_reader_of_providers_answers() {
    run_for("http_answer", SMALL);
}

#[test]
fn no_bytes_upset_the_short_way_of_the_dispatcher() {
    run_for("http_request", SMALL);
}

#[test]
fn no_bytes_upset_the_reader_of_pages() {
    run_for("page", SMALL);
}

#[test]
fn no_bytes_upset_the_reader_of_chats() {
    run_for("telegram", SMALL);
}

#[test]
fn every_fuzz_target_has_a_corpus_and_a_test() {
    let manifest = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/Cargo.toml")).unwrap();
    let bins: Vec<&str> = manifest
        .lines()
        .filter_map(|line| line.strip_prefix("path = \"fuzz_targets/")?.strip_suffix(".rs\""))
        .collect();
    let known: Vec<&str> = targets::TARGETS.iter().map(|(name, _)| *name).collect();
    assert_eq!(bins, known);
}
