//! Real daemons with something real broken under them: what `doctor` finds, and how `down` ends them.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use drover_testkit::{skip, this_test};
use rustix::process::Signal;
use serde_json::Value;

use crate::fake::drover;
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
    assert_eq!(home.processes_but_companions().len(), 1, "its worker");

    // An `up` is ended as a whole: it would start again what is ended behind its back.
    let mut up = home.spawn(&["up", "--nodes", "1"]);
    let lines = BufReader::new(up.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line.contains("it ends with this command")));
    assert_eq!(home.json(&["status", &launched])["nodes"][0]["pid"], worker);
    let stopped = home.json(&["down"]);
    assert_eq!((&stopped["stopped"][0]["name"], &stopped["swarms"]), (&Value::from("up"), &Value::from(1)));
    assert_eq!(
        (exit_code(&mut up), home.processes_but_companions().len()),
        (Some(0), 1),
        "its own swarm ended, the other goes on"
    );
    assert_eq!(home.run(&["terminate", &launched, "--force"]).0, Some(0));
}

/// Where control groups with a memory limit are, with the name of the limit's file: version 1, or version 2.
const MEMORY_GROUPS: &[(&str, &str)] =
    &[("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")];

/// A control group with a memory limit; it goes away with its last user.
struct Group(PathBuf);

impl Group {
    fn new(limit: u64) -> Option<Self> {
        MEMORY_GROUPS.iter().find_map(|(root, file)| {
            let group = Path::new(root).join(format!("drover-test-{}", std::process::id()));
            std::fs::create_dir(&group).ok()?;
            let group = Self(group);
            // A file that is not there is a directory of another kind, in which this could only make a new file.
            let file = group.0.join(file);
            (file.exists() && std::fs::write(&file, limit.to_string()).is_ok()).then_some(group)
        })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn doctor_sees_the_memory_limit_of_the_job_that_it_runs_in() {
    if !rustix::process::geteuid().is_root() {
        skip(&this_test(), "needs root to limit the memory of a process");
        return;
    }
    let Some(group) = Group::new(96 << 20) else {
        skip(&this_test(), "no control group with a memory limit can be made here");
        return;
    };
    let home = Home::new();
    let join = format!("echo $$ > {}/cgroup.procs && exec \"$0\" \"$@\"", group.0.display());
    let found = |agent: &str| {
        let template = drover(home.path());
        let output = Command::new("sh")
            .args(["-c", &join])
            .arg(template.get_program())
            .args(["doctor", "--json", "--no-start"])
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("DROVER_STATE_DIR", home.path().join("state"))
            .env("DROVER_WORKER__AGENT", agent)
            .current_dir(home.path())
            .output()
            .unwrap();
        let document: Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
        let checks = document["checks"].as_array().unwrap();
        checks.iter().find(|check| check["name"] == "memory").cloned().unwrap()
    };
    let codex = found("codex");
    assert!(codex["ok"] == false && codex["detail"].as_str().unwrap().contains("about 0 codex nodes"), "{codex}");
    assert!(codex["hint"].as_str().unwrap().contains("other machines"), "{codex}");
    assert_eq!(found("echo")["ok"], true);
    assert_eq!(check(&home, &["--no-start"], "memory")["ok"], true, "outside of the group");
}

/// The least file system that the kernel takes for one in user space: an empty directory, served by this process.
struct Remote {
    at: PathBuf,
    server: Option<std::thread::JoinHandle<()>>,
}

impl Remote {
    const INIT: u32 = 26;
    const GETATTR: u32 = 3;
    const STATFS: u32 = 17;
    /// Forgetting and interrupting are not answered.
    const SILENT: [u32; 3] = [2, 36, 42];

    fn mount(at: &Path) -> Option<Self> {
        let device = std::fs::File::options().read(true).write(true).open("/dev/fuse").ok()?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", 0);
        // The program that mounts has the device as its standard input.
        let mounted = Command::new("mount")
            .args(["-i", "-t", "fuse", "-o", &options, "drover-test"])
            .arg(at)
            .stdin(device.try_clone().ok()?)
            .stderr(std::process::Stdio::null())
            .status();
        if !mounted.is_ok_and(|status| status.success()) {
            return None;
        }
        let server = std::thread::spawn(move || Self::serve(device));
        Some(Self { at: at.to_owned(), server: Some(server) })
    }

    /// Answers until the file system is unmounted.
    fn serve(mut device: std::fs::File) {
        use std::io::{Read as _, Write as _};
        let mut request = vec![0_u8; 1 << 17];
        while let Ok(length) = device.read(&mut request) {
            let Some(header) = request.get(..40).filter(|_| length >= 40) else { return };
            let opcode = u32::from_ne_bytes(header[4..8].try_into().unwrap());
            let (error, body): (i32, Vec<u8>) = match opcode {
                _ if Self::SILENT.contains(&opcode) => continue,
                Self::INIT => (
                    0,
                    [7_u32, 31, 0, 0, 0, 4096, 1, 0]
                        .iter()
                        .flat_map(|word| word.to_ne_bytes())
                        .chain([0; 32])
                        .collect(),
                ),
                // Node 1, a directory of mode 0700 that belongs to root.
                Self::GETATTR => {
                    let head = [0_u64, 0, 1, 0, 0, 0, 0, 0].iter().flat_map(|word| word.to_ne_bytes());
                    let tail = [0_u32, 0, 0, 0o40_700, 2, 0, 0, 0, 4096, 0];
                    (0, head.chain(tail.iter().flat_map(|word| word.to_ne_bytes())).collect())
                }
                Self::STATFS => (0, vec![0; 80]),
                1 => (-rustix::io::Errno::NOENT.raw_os_error(), Vec::new()),
                _ => (-rustix::io::Errno::NOSYS.raw_os_error(), Vec::new()),
            };
            let mut answer = (16 + body.len() as u32).to_ne_bytes().to_vec();
            answer.extend(error.to_ne_bytes());
            answer.extend(&header[8..16]);
            answer.extend(body);
            if device.write_all(&answer).is_err() {
                return;
            }
        }
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

#[test]
fn doctor_names_the_network_file_system_under_the_state_directory() {
    if !rustix::process::geteuid().is_root() {
        skip(&this_test(), "needs root to mount a file system");
        return;
    }
    let home = Home::new();
    let state = home.path().join("state");
    std::fs::create_dir(&state).unwrap();
    assert_eq!(check(&home, &["--no-start"], "file system")["hint"], "");
    let Some(_remote) = Remote::mount(&state) else {
        skip(&this_test(), "the kernel has no FUSE");
        return;
    };
    let found = check(&home, &["--no-start"], "file system");
    assert!(found["detail"].as_str().unwrap().contains("fuse, a network file system"), "{found}");
    assert!(found["hint"].as_str().unwrap().contains("set DROVER_STATE_DIR"), "{found}");
}
