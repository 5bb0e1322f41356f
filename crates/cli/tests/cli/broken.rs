//! Real daemons with something real broken under them: what `doctor` finds, and how `down` ends them.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use drover_testkit::{skip, this_test};
use rustix::process::Signal;
use serde_json::Value;

use crate::real::{Home, exit_code, is_alive, send, until};

/// What `doctor` says under a name; the program may exit with 1.
fn check(home: &Home, args: &[&str], name: &str) -> Value {
    let (_, out, err) = home.run(&[&["doctor", "--json"], args].concat());
    let document: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"));
    let checks = document["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == name).cloned().unwrap_or_else(|| panic!("no {name}: {document}"))
}

/// Waits until the check fails, and returns its hint.
fn fails(home: &Home, name: &str) -> String {
    let found = until(name, || Some(check(home, &["--no-start"], name)).filter(|check| check["level"] == "failed"));
    found["hint"].as_str().unwrap().to_owned()
}

#[test]
fn doctor_finds_daemons_that_died_or_hang_and_brings_them_back() {
    let home = Home::new();
    assert_eq!(home.run(&["list"]).0, Some(0));
    for (daemon, link) in [("slurm-allocator", "allocator link"), ("outbox-follower", "follower link")] {
        assert_eq!(check(&home, &[], link)["ok"], true);
        let pid = home.pid_of(daemon).unwrap();
        send(pid, Signal::KILL);
        until("its end", || (!is_alive(pid)).then_some(()));
        assert!(fails(&home, daemon).contains("--fix"));
        assert!(fails(&home, link).contains("kill -9"));
        assert!(check(&home, &["--no-start"], "leftovers")["detail"].as_str().unwrap().contains(daemon));
        let repaired = check(&home, &["--fix"], daemon);
        assert!(repaired["detail"].as_str().unwrap().contains("repaired"), "{repaired}");
        until("the link", || (check(&home, &[], link)["ok"] == true).then_some(()));
    }
    let router = home.pid_of("router").unwrap();
    send(router, Signal::STOP);
    let hint = fails(&home, "router answers");
    assert!(
        fails(&home, "router").contains(&format!("kill -9 {router}")) && hint.contains("nothing is lost"),
        "{hint}"
    );
    send(router, Signal::CONT);
    until("the router", || (check(&home, &[], "router answers")["ok"] == true).then_some(()));
}

/// A small file system over a directory; it goes away with its last user.
struct Disk<'a>(&'a Path);

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

#[test]
fn doctor_and_every_command_say_that_the_disk_is_full() {
    if !rustix::process::geteuid().is_root() {
        skip(&this_test(), "needs root to mount a small file system");
        return;
    }
    let home = Home::new();
    let state = home.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=80m,mode=0700", "tmpfs"]).arg(&state).status();
    assert!(mounted.unwrap().success());
    let _disk = Disk(&state);
    let launched = home.json(&["launch", "--nodes", "1", "--detach"])["swarm_id"].as_str().unwrap().to_owned();
    assert!(check(&home, &[], "event log")["ok"] == true && check(&home, &[], "free space")["ok"] == true);
    fill(&state.join("filler"));

    assert!(fails(&home, "state directory").contains("free some space"));
    assert!(fails(&home, "free space").contains("free some space"));
    // The log has noticed as soon as somebody wants something of it.
    let refused = until("a refusal", || {
        let large = "x".repeat(100_000);
        Some(home.run(&["inject", &launched, "--prompt", &large])).filter(|run| run.0 == Some(1))
    });
    assert!(refused.2.to_lowercase().contains("space") || refused.2.contains("full"), "{}", refused.2);
    assert!(fails(&home, "event log").contains("goes on by itself"));

    // Nothing can be started there, and the words say why: a log could not.
    assert_eq!(home.run(&["down"]).0, Some(0));
    // What the daemons gave back when they ended.
    fill(&state.join("filler2"));
    for args in [&["list"][..], &["up"][..]] {
        let (code, _, err) = home.run(args);
        assert_eq!(code, Some(1), "{err}");
        assert!(err.contains("No space left") && err.contains("free some space"), "{args:?}: {err}");
    }
    for file in ["filler", "filler2"] {
        std::fs::remove_file(state.join(file)).unwrap();
    }
    assert_eq!(home.run(&["terminate", &launched]).0, Some(0));
}

/// Leaves no byte free.
fn fill(path: &Path) {
    use std::io::Write as _;
    let mut file = std::fs::File::create(path).unwrap();
    let mut block = vec![0_u8; 1 << 20];
    while !block.is_empty() {
        match file.write(&block) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => block.truncate(block.len() / 2),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_read_only_state_directory_is_called_so_whatever_its_mode() {
    if !rustix::process::geteuid().is_root() {
        skip(&this_test(), "needs root to mount a read-only file system");
        return;
    }
    let home = Home::new();
    let state = home.path().join("state");
    std::fs::create_dir(&state).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "ro,mode=0777", "tmpfs"]).arg(&state).status();
    assert!(mounted.unwrap().success());
    let _disk = Disk(&state);
    let found = check(&home, &["--fix"], "state directory");
    assert!(found["ok"] == false && found["hint"].as_str().unwrap().contains("read-only"), "{found}");
    let (code, _, err) = home.run(&["list"]);
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("Read-only") && err.contains("DROVER_STATE_DIR"), "{err}");
}

#[test]
fn down_stops_the_daemons_and_not_the_swarms() {
    let home = Home::new();
    let nothing = home.run(&["down"]);
    assert!(nothing.0 == Some(0) && nothing.2.contains("no daemon runs here"), "{}", nothing.2);
    let launched = home.json(&["launch", "--nodes", "1", "--detach"])["swarm_id"].as_str().unwrap().to_owned();
    let worker = home.json(&["status", &launched])["nodes"][0]["pid"].clone();

    let began = Instant::now();
    let (code, out, err) = home.run(&["down"]);
    assert_eq!(code, Some(0), "{err}");
    assert!(began.elapsed() < Duration::from_secs(10), "in order, not by force");
    for daemon in ["router", "slurm-allocator", "outbox-follower"] {
        assert!(out.contains(&format!("{daemon} (pid ")) && home.pid_of(daemon).is_none(), "{daemon}: {out}");
    }
    assert!(err.contains("1 swarm goes on"), "{err}");
    assert_eq!(home.processes().len(), 1, "its worker");

    // An `up` is ended as a whole: it would start again what is ended behind its back.
    let mut up = home.spawn(&["up", "--nodes", "1"]);
    let lines = BufReader::new(up.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line.contains("it ends with this command")));
    assert_eq!(home.json(&["status", &launched])["nodes"][0]["pid"], worker);
    let stopped = home.json(&["down"]);
    assert_eq!((&stopped["stopped"][0]["name"], &stopped["swarms"]), (&Value::from("up"), &Value::from(1)));
    assert_eq!((exit_code(&mut up), home.processes().len()), (Some(0), 1), "its own swarm ended, the other goes on");
    assert_eq!(home.run(&["terminate", &launched, "--force"]).0, Some(0));
}
