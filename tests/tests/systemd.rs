//! The units: understood and judged by systemd's own tools, and run by a real systemd that was booted for the purpose, on a copy
//! of this machine's root in which everything that is changed is thrown away.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helper functions")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use drover_e2e::packed::archive;
use drover_testkit::cluster::{scratch_dir, signal};
use drover_testkit::codex::repository_root;
use drover_testkit::{skip, this_test};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

/// Most exposure that a unit may have, in tenths, as `systemd-analyze security` counts it.
const EXPOSURE: u32 = 30;
/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_mins(1);

fn has(program: &str) -> bool {
    Command::new("sh")
        .args(["-c", &format!("command -v {program}")])
        .output()
        .is_ok_and(|output| output.status.success())
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", text(&output));
    text(&output)
}

fn units(kind: &str) -> Vec<PathBuf> {
    let dir = repository_root().join("deploy/systemd").join(kind);
    let mut units: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    units.sort();
    assert!(units.len() > 5, "{units:?}");
    units
}

#[test]
fn units_are_understood_and_hardened() {
    if !has("systemd-analyze") {
        skip(&this_test(), "there is no systemd-analyze: install systemd");
        return;
    }
    let scratch = scratch_dir("units-").unwrap();
    // Their programs are where this machine has none; any other will do.
    let standing = |kind: &str| {
        let dir = scratch.path().join(kind);
        fs::create_dir(&dir).unwrap();
        for unit in units(kind) {
            let unit_text = fs::read_to_string(&unit).unwrap();
            let lines = unit_text.lines().map(|line| {
                let program = line.strip_prefix("ExecStart=/usr/bin/drover-");
                program.map_or_else(|| line.to_owned(), |_| "ExecStart=/bin/true".to_owned())
            });
            fs::write(dir.join(unit.file_name().unwrap()), lines.collect::<Vec<_>>().join("\n")).unwrap();
        }
        dir
    };
    for kind in ["system", "user"] {
        let dir = standing(kind);
        let instances: Vec<String> = units(kind)
            .iter()
            .map(|unit| dir.join(unit.file_name().unwrap()).to_str().unwrap().replace("@.", "@root."))
            .collect();
        // An instance of a template is a file of its own here: verify takes paths.
        for instance in &instances {
            if instance.contains("@root.") {
                fs::copy(instance.replace("@root.", "@."), instance).unwrap();
            }
        }
        let verify = |files: &[String]| {
            let mut command = Command::new("systemd-analyze");
            command.args(["verify", "--man=no"]).args(if kind == "user" { &["--user"][..] } else { &[] });
            command.args(files).env("SYSTEMD_UNIT_PATH", format!("{}:", dir.display()));
            command.env("XDG_RUNTIME_DIR", scratch.path()).output().unwrap()
        };
        let output = verify(&instances);
        let complaints: Vec<String> =
            text(&output).lines().filter(|line| line.contains("drover")).map(str::to_owned).collect();
        assert!(output.status.success() && complaints.is_empty(), "{kind}: {complaints:?}\n{}", text(&output));
        // The judge is judged: a key that nobody knows is found.
        let broken = dir.join("drover-broken.service");
        fs::write(&broken, "[Service]\nExecStart=/bin/true\nNoNewPriviledges=yes\n").unwrap();
        let said = text(&verify(&[broken.to_str().unwrap().to_owned()]));
        assert!(said.contains("NoNewPriviledges"), "{said}");
    }
    for unit in units("system").iter().filter(|unit| unit.extension().is_some_and(|kind| kind == "service")) {
        let name = unit.file_name().unwrap().to_str().unwrap();
        let judge = |limit: u32| {
            let limit = format!("--threshold={limit}");
            Command::new("systemd-analyze")
                .args(["security", "--offline=true", "--no-pager", &limit])
                .arg(unit)
                .output()
                .unwrap()
        };
        let output = judge(EXPOSURE);
        assert!(output.status.success(), "{name} is more exposed than {EXPOSURE} tenths:\n{}", text(&output));
        assert!(!text(&output).contains("ignoring"), "{name}: {}", text(&output));
        assert!(!judge(5).status.success(), "the threshold is not looked at");
    }
}

/// A machine of its own: this one's root, with changes that are thrown away, and systemd as its first process.
struct Machine {
    root: PathBuf,
    scratch: TempDir,
    nspawn: Option<Child>,
    init: u32,
}

impl Machine {
    /// Mounts the root; nothing runs yet.
    fn mount() -> Self {
        let scratch = scratch_dir("systemd-").unwrap();
        let (disk, root) = (scratch.path().join("disk"), scratch.path().join("root"));
        for dir in [&disk, &root] {
            fs::create_dir(dir).unwrap();
        }
        // From here on dropping it takes everything down again.
        let machine = Self { root, scratch, nspawn: None, init: 0 };
        run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=1g,mode=0755", "tmpfs"]).arg(&disk));
        for dir in ["upper", "work"] {
            fs::create_dir(disk.join(dir)).unwrap();
        }
        let layers = format!("lowerdir=/,upperdir={0}/upper,workdir={0}/work", disk.display());
        run(Command::new("mount").args(["-t", "overlay", "overlay", "-o", &layers]).arg(&machine.root));
        // A machine with an identity of its own, and none of the services of this one.
        fs::write(machine.root.join("etc/machine-id"), "").unwrap();
        let _ = fs::remove_file(machine.root.join("etc/fstab"));
        for entry in fs::read_dir(machine.root.join("etc/systemd/system")).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|kind| kind == "wants" || kind == "requires") {
                fs::remove_dir_all(path).unwrap();
            }
        }
        machine
    }

    /// Runs something in it before it is booted.
    fn chroot(&self, args: &[&str]) -> String {
        run(Command::new("chroot").arg(&self.root).args(args).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"))
    }

    fn boot(&mut self) {
        let log = fs::File::create(self.scratch.path().join("boot.log")).unwrap();
        let child = Command::new("systemd-nspawn")
            .args(["--quiet", "--register=no", "--keep-unit", "--private-network", "--boot", "--console=pipe"])
            .arg(format!("--directory={}", self.root.display()))
            .args(["--", "systemd.unit=multi-user.target"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let pid = child.id();
        self.nspawn = Some(child);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
            if let Some(init) = children.split_ascii_whitespace().next().and_then(|pid| pid.parse().ok()) {
                self.init = init;
                if ["running", "degraded"].contains(&text(&self.tell(&["systemctl", "is-system-running"])).trim()) {
                    return;
                }
            }
            assert!(Instant::now() < deadline, "it does not boot:\n{}", self.boot_log());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn boot_log(&self) -> String {
        fs::read_to_string(self.scratch.path().join("boot.log")).unwrap_or_default()
    }

    /// Runs something in it, as root.
    fn tell(&self, args: &[&str]) -> Output {
        let mut command = Command::new("nsenter");
        command.args(["--all", "--target", &self.init.to_string(), "--"]).args(args);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").stdin(Stdio::null()).output().unwrap()
    }

    fn must(&self, args: &[&str]) -> String {
        let output = self.tell(args);
        assert!(output.status.success(), "{args:?}: {}\n{}", text(&output), self.journal());
        text(&output)
    }

    /// As a user types it, with what the profile sets.
    fn types(&self, user: &str, line: &str) -> String {
        self.must(&["runuser", "-l", user, "-c", line])
    }

    fn journal(&self) -> String {
        text(&self.tell(&["journalctl", "--no-pager", "--lines=60", "--output=cat"]))
    }

    fn show(&self, unit: &str, what: &str) -> String {
        self.must(&["systemctl", "show", "--value", "--property", what, unit]).trim().to_owned()
    }

    fn until(&self, what: &str, mut is: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !is() {
            assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}\n{}", self.journal());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until a unit runs as another process than before, and says that it is ready.
    fn runs_again(&self, unit: &str, before: &str) {
        self.until(&format!("{unit} is started again"), || {
            let pid = self.show(unit, "MainPID");
            pid != "0" && pid != before && self.show(unit, "ActiveState") == "active"
        });
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(mut nspawn) = self.nspawn.take() {
            // Its first process gone, the whole machine is.
            if self.init != 0 {
                let _ = signal(self.init, Signal::KILL);
            }
            let deadline = Instant::now() + Duration::from_secs(10);
            while matches!(nspawn.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = nspawn.kill();
            let _ = nspawn.wait();
        }
        for dir in [self.root.clone(), self.scratch.path().join("disk")] {
            let _ = Command::new("umount").arg("--lazy").arg(dir).stderr(Stdio::null()).status();
        }
    }
}

/// What this machine lacks for a machine of its own.
fn lacks() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("only root can boot a machine of its own".to_owned());
    }
    let missing = ["systemd-nspawn", "nsenter", "runuser", "useradd"].into_iter().find(|program| !has(program));
    if let Some(program) = missing {
        return Some(format!("{program} is missing: install systemd-container, util-linux, passwd"));
    }
    if !Path::new("/lib/systemd/systemd").exists() {
        return Some("there is no systemd on this machine".to_owned());
    }
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let overlay = filesystems.lines().any(|line| line.trim_start_matches("nodev").trim() == "overlay");
    (!overlay).then(|| "the kernel has no overlay file system".to_owned())
}

#[test]
fn a_booted_systemd_keeps_the_daemons_of_a_user() {
    if let Some(why) = lacks() {
        skip(&this_test(), &why);
        return;
    }
    let mut machine = Machine::mount();
    let stage = machine.root.join("srv");
    let name = archive(&stage).file_name().unwrap().to_str().unwrap().to_owned();
    let _ = fs::remove_file(machine.root.join("usr/sbin/policy-rc.d"));
    machine.chroot(&["useradd", "--create-home", "--shell", "/bin/bash", "alice"]);
    let root = machine.root.clone();
    let ours = move || {
        let mut find = Command::new("find");
        find.args([
            "usr",
            "etc",
            "var/lib",
            "-xdev",
            "-path",
            "var/lib/docker",
            "-prune",
            "-o",
            "-name",
            "*drover*",
            "-print",
        ]);
        let found = run(find.current_dir(&root));
        let mut found: Vec<String> =
            found.lines().filter(|path| !path.contains(".service.d")).map(str::to_owned).collect();
        found.sort();
        found
    };
    let before = ours();
    let said = machine.chroot(&["sh", "/srv/install.sh", "--archive", &format!("/srv/{name}")]);
    assert!(said.contains("is installed in /usr"), "{said}");
    // A key that only root can read.
    let keys = machine.root.join("etc/drover/keys");
    assert_eq!(fs::metadata(&keys).unwrap().permissions().mode() & 0o777, 0o700);
    fs::write(keys.join("openai"), "planted-key\n").unwrap();
    let quick = machine.root.join("etc/systemd/system/drover-outbox-follower@.service.d");
    fs::create_dir_all(&quick).unwrap();
    fs::write(quick.join("quick.conf"), "[Service]\nWatchdogSec=8\n").unwrap();
    machine.boot();

    let (router, allocator, follower) =
        ("drover-router@alice.service", "drover-slurm-allocator@alice.service", "drover-outbox-follower@alice.service");
    machine.must(&["systemctl", "enable", "drover@alice.target"]);
    machine.must(&["systemctl", "start", "drover@alice.target", router]);
    for unit in [router, allocator, follower] {
        machine.until(unit, || machine.show(unit, "ActiveState") == "active");
        assert!(machine.show(unit, "StatusText").starts_with("listening on 127.0.0.1:"), "{unit} is not ready");
    }
    assert_eq!(machine.must(&["stat", "-c", "%a %U", "/var/lib/drover/alice"]).trim(), "700 alice");

    // The user's commands find them, and work.
    let said = machine.types("alice", "drover launch --nodes 1 --agent echo --prompt hello --no-start");
    assert!(said.contains("node 0 | hello"), "{said}");

    let node = || {
        let told = machine.types("alice", "drover status last --json --no-start");
        let line = told.lines().find(|line| line.starts_with('{')).unwrap_or_default();
        let status: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {told}"));
        (status["nodes"][0]["pid"].as_u64(), status["nodes"][0]["generation"].as_u64())
    };
    let worker_before = node();
    assert!(worker_before.0.is_some(), "{worker_before:?}");

    // Killed, hung, restarted: nothing of a mailbox is lost, and the node goes on.
    let pid = machine.show(router, "MainPID");
    machine.must(&["kill", "-KILL", &pid]);
    machine.runs_again(router, &pid);
    let pid = machine.show(follower, "MainPID");
    machine.must(&["kill", "-STOP", &pid]);
    machine.runs_again(follower, &pid);
    let said = text(&machine.tell(&["journalctl", "--no-pager", "--output=cat", "--unit", follower]));
    assert!(said.contains("Watchdog timeout"), "what hung was ended by somebody else: {said}");
    machine.must(&["systemctl", "restart", allocator]);
    let said = machine.types("alice", "drover inject last --prompt again --no-start");
    assert!(said.contains("node 0 | again"), "{said}");
    let events = machine.types("alice", "drover events --since 0 --json --no-start");
    let turns = events.lines().filter(|line| line.contains("\"turn_complete\"")).count();
    assert_eq!(turns, 2, "each prompt was carried out once: {events}");
    assert_eq!(node(), worker_before, "the worker outlives the allocator, and is the same process");

    // Keys come as credentials: the daemon has them, its environment and command line do not.
    let dispatcher = "drover-llm-dispatcher@alice.service";
    machine.must(&["systemctl", "start", dispatcher]);
    let pid = machine.show(dispatcher, "MainPID");
    let directory = machine.must(&["sh", "-c", &format!("tr '\\0' '\\n' </proc/{pid}/environ | grep CREDENTIALS")]);
    assert_eq!(directory.trim(), format!("CREDENTIALS_DIRECTORY=/run/credentials/{dispatcher}"));
    let key = format!("/proc/{pid}/root/run/credentials/{dispatcher}/keys_openai");
    assert_eq!(machine.must(&["runuser", "-u", "alice", "--", "cat", &key]).trim(), "planted-key");
    machine.must(&["sh", "-c", &format!("! grep -q planted-key /proc/{pid}/environ /proc/{pid}/cmdline")]);
    assert!(!machine.tell(&["runuser", "-u", "alice", "--", "cat", "/etc/drover/keys/openai"]).status.success());

    // Nodes outside of Slurm: a worker, and membership once there is an identity, here that of the swarm's node.
    let (worker, membership) = ("drover-worker@alice.service", "drover-gossip-membership@alice.service");
    machine.must(&["systemctl", "start", worker, membership]);
    assert_eq!(machine.show(worker, "ActiveState"), "active");
    assert_eq!(
        (machine.show(membership, "ActiveState"), machine.show(membership, "ConditionResult")),
        ("inactive".into(), "no".into())
    );
    machine.types("alice", "cp -r $DROVER_STATE_DIR/nodes/*/00/identity $DROVER_STATE_DIR/identity");
    machine.types("alice", "drover terminate last --no-start");
    machine.must(&["systemctl", "start", membership]);
    assert_eq!(machine.show(membership, "ActiveState"), "active");
    machine.must(&["systemctl", "stop", worker, membership]);

    // They end in order.
    machine.must(&["systemctl", "stop", "drover@alice.target", dispatcher]);
    for unit in [router, allocator, follower] {
        machine.until(unit, || machine.show(unit, "ActiveState") == "inactive");
        assert_eq!(machine.show(unit, "Result"), "success", "{unit} did not end in order\n{}", machine.journal());
    }
    // Without root: the user's own manager keeps them, in the user's own state directory.
    machine.must(&["loginctl", "enable-linger", "alice"]);
    let uid = machine.must(&["id", "-u", "alice"]).trim().to_owned();
    machine.until("the user's manager runs", || {
        machine.tell(&["test", "-S", &format!("/run/user/{uid}/bus")]).status.success()
    });
    let own = |line: &str| machine.types("alice", &format!("export XDG_RUNTIME_DIR=/run/user/{uid}; {line}"));
    own("systemctl --user start drover.target drover-router.service");
    machine.until("the user's own router", || {
        own("systemctl --user is-active drover-router.service || true").trim() == "active"
    });
    let said =
        own("DROVER_STATE_DIR=$HOME/.local/state/drover drover launch --nodes 1 --agent echo --prompt mine --no-start");
    assert!(said.contains("node 0 | mine"), "{said}");
    own("DROVER_STATE_DIR=$HOME/.local/state/drover drover terminate last --no-start");
    own("systemctl --user stop drover.target");

    // A configuration that cannot be used is not tried again and again.
    machine.must(&["sh", "-c", "echo 'router: {nonsense: 1}' >/etc/drover/drover.yaml"]);
    assert!(!machine.tell(&["systemctl", "start", router]).status.success());
    assert_eq!(machine.show(router, "ExecMainStatus"), "78");
    assert_eq!(machine.show(router, "ActiveState"), "failed", "it is not started again");
    let said = machine.journal();
    assert!(said.contains("drover.yaml") && said.contains("nonsense"), "{said}");

    machine.must(&["sh", "/usr/share/drover/install.sh", "--uninstall", "--purge"]);
    assert_eq!(ours(), before, "nothing is left");
}
