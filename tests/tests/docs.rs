//! The console blocks of the README, the user guide, the quick start and the operators' page, typed as they stand.
//!
//! Each page is one shell in a directory of its own, with a fresh state directory. A line behind `$ ` is a command and
//! must exit 0; the lines below it are what it prints: each must be found in its output, in any order, with `…` for
//! anything. What cannot be typed as it stands is marked `text` in the page, which says why.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use drover_testkit::cluster::{processes_of, program, scratch_dir, signal};
use drover_testkit::codex::repository_root;
use drover_testkit::{skip, this_test};
use rustix::process::Signal;

/// A command and the lines that it is said to print.
#[derive(Debug, Default, PartialEq, Eq)]
struct Typed {
    command: String,
    expected: Vec<String>,
}

/// The commands of every console block, in order.
fn typed(page: &str) -> Vec<Typed> {
    let mut all = Vec::new();
    let mut inside = false;
    for line in page.lines() {
        if line.starts_with("```") {
            inside = line == "```console";
        } else if !inside {
        } else if let Some(command) = line.strip_prefix("$ ") {
            all.push(Typed { command: command.to_owned(), expected: Vec::new() });
        } else if let (Some(last), false) = (all.last_mut(), line == "…") {
            last.expected.push(line.to_owned());
        }
    }
    all
}

/// Whether a printed line is what the page says. Runs of spaces count as one: columns are as wide as what stands in them.
fn fits(expected: &str, line: &str) -> bool {
    let plain = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let (expected, line) = (plain(expected), plain(line));
    let mut rest = line.as_str();
    let parts: Vec<&str> = expected.split('…').map(str::trim).collect();
    for (at, part) in parts.iter().enumerate() {
        let Some(found) = rest.find(part) else { return false };
        if at == 0 && found != 0 {
            return false;
        }
        rest = &rest[found + part.len()..];
    }
    parts.last().is_some_and(|last| last.is_empty()) || rest.is_empty()
}

/// Ends whatever the page has left running.
struct Instance<'a>(&'a Path);

impl Drop for Instance<'_> {
    fn drop(&mut self) {
        for pid in processes_of(self.0) {
            let _ = signal(pid, Signal::KILL);
        }
    }
}

/// One shell for the whole page, so that variables, directories and jobs last from block to block.
fn script(commands: &[Typed]) -> String {
    let mut script = "exec 2>&1\n".to_owned();
    for (number, typed) in commands.iter().enumerate() {
        let lines = ["echo '### begin ", &number.to_string(), "'\n", &typed.command];
        script.extend(lines);
        script.extend(["\necho \"### end ", &number.to_string(), " $?\"\n"]);
    }
    script
}

fn play(page: &str) {
    play_with(page, None);
}

/// Types a page, with the programs of one more directory at hand.
fn play_with(page: &str, tools: Option<&Path>) {
    let text = std::fs::read_to_string(repository_root().join(page)).unwrap();
    let commands = typed(&text);
    assert!(commands.len() > 4, "{page} has hardly any commands: {commands:?}");
    let dir = scratch_dir("docs-").unwrap();
    let state = dir.path().join("state");
    let _instance = Instance(&state);
    let bin = program("drover").unwrap();
    let bin = bin.parent().unwrap();
    let output = dir.path().join("output.txt");
    let mut shell = Command::new("bash")
        .args(["-c", &script(&commands)])
        .env_clear()
        .env(
            "PATH",
            format!(
                "{}:{}/usr/bin:/bin",
                bin.display(),
                tools.map_or_else(String::new, |dir| format!("{}:", dir.display()))
            ),
        )
        .env("HOME", dir.path())
        .env("DROVER_STATE_DIR", &state)
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(&output).unwrap())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(90);
    let ended = loop {
        if let Some(status) = shell.try_wait().unwrap() {
            break Some(status);
        }
        if Instant::now() >= deadline {
            shell.kill().unwrap();
            shell.wait().unwrap();
            break None;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let printed = std::fs::read_to_string(&output).unwrap();
    assert!(ended.is_some(), "{page}: a command does not end by itself:\n{printed}");
    for (number, typed) in commands.iter().enumerate() {
        let section = printed.split(&format!("### begin {number}\n")).nth(1).unwrap_or_default();
        let (said, end) = section.split_once(&format!("### end {number} ")).unwrap_or((section, "(never)"));
        let code = end.lines().next().unwrap_or_default();
        assert_eq!(code, "0", "{page}: `{}` failed:\n{said}", typed.command);
        for expected in &typed.expected {
            assert!(
                said.lines().any(|line| fits(expected, line)),
                "{page}: `{}` does not print {expected:?}:\n{said}",
                typed.command
            );
        }
    }
}

#[test]
fn the_readme_works_as_typed() {
    play("README.md");
}

#[test]
fn the_user_guide_works_as_typed() {
    play("docs/USER_GUIDE.md");
}

#[test]
fn the_quick_start_works_as_typed() {
    play("docs/quick-start.md");
}

/// A block that is marked as typed is typed, on whatever page it stands.
#[test]
fn every_page_with_console_blocks_is_typed_by_a_test() {
    let root = repository_root();
    let mine = std::fs::read_to_string(root.join("tests/tests/docs.rs")).unwrap();
    let docs = std::fs::read_dir(root.join("docs")).unwrap().flatten().map(|entry| entry.path());
    let pages = docs.chain([root.join("README.md"), root.join("CONTRIBUTING.md")]);
    let mut typed_pages = 0;
    for page in pages.filter(|page| page.extension().is_some_and(|end| end == "md")) {
        if typed(&std::fs::read_to_string(&page).unwrap()).is_empty() {
            continue;
        }
        let name = page.strip_prefix(&root).unwrap().display().to_string();
        assert!(mine.contains(&format!("\"{name}\"")), "nobody types {name}");
        typed_pages += 1;
    }
    assert!(typed_pages >= 4, "{typed_pages} pages");
}

/// With `buf curl`, because grpcurl comes in no package that can be pinned; what it asks, anything can ask.
#[test]
fn the_operators_page_works_as_typed() {
    let buf = repository_root().join("target/buf/node_modules/@bufbuild/buf-linux-x64/bin");
    if !buf.join("buf").is_file() {
        skip(&this_test(), "buf is not installed: cargo xtask test installs it");
        return;
    }
    play_with("docs/operators.md", Some(&buf));
}

#[test]
fn a_page_that_says_something_else_than_the_program_fails() {
    let page = "text\n```console\n$ one\nout …\n…\n$ two\n```\n```text\n$ three\n```\n";
    let one = Typed { command: "one".into(), expected: vec!["out …".into()] };
    assert_eq!(typed(page), [one, Typed { command: "two".into(), expected: vec![] }]);
    assert!(fits("swarm … is running", "swarm 0199 is   running") && fits("…/1 is idle", "node 7/1 is idle"));
    assert!(!fits("swarm … is running", "swarm 0199 is running now") && !fits("running", "is running"));
    assert!(!fits("router (pid …) stopped", "router (pid 7) did not end"));
}
