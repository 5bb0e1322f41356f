//! The archive that is shipped, made of the programs of this build: installed without root as its users install it, brought up
//! to date under a daemon that runs, and removed until nothing is left.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, also in its helper functions")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use drover_e2e::packed::archive;
use drover_testkit::cluster::{processes_of, signal};
use rustix::process::Signal;
use tempfile::TempDir;

/// A user of this machine with an empty home; not root where this test runs as root.
struct Person {
    dir: TempDir,
    uid: Option<u32>,
}

/// Nobody has this number, so nothing on the machine is theirs.
const STRANGER: u32 = 61_234;

impl Person {
    fn new() -> Self {
        // Not below the build directory: another user may not be able to get there.
        let dir = tempfile::Builder::new().prefix("drover-packaging-").tempdir_in("/var/tmp").unwrap();
        let uid = rustix::process::geteuid().is_root().then_some(STRANGER);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let person = Self { dir, uid };
        fs::create_dir(person.home()).unwrap();
        if uid.is_some() {
            std::os::unix::fs::chown(person.home(), uid, uid).unwrap();
        }
        person
    }

    fn home(&self) -> PathBuf {
        // Some have.
        self.dir.path().join("a home with spaces")
    }

    /// A line of shell, as this person types it.
    fn types(&self, line: &str) -> Output {
        let home = self.home();
        let mut command = Command::new(if self.uid.is_some() { "setpriv" } else { "sh" });
        if let Some(uid) = self.uid {
            let uid = uid.to_string();
            command.args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "sh"]);
        }
        command.args(["-c", line]);
        command.env_clear().env("HOME", &home).env("PATH", format!("{}/.local/bin:/usr/bin:/bin", home.display()));
        command.env("STAGE", self.dir.path()).current_dir(&home).stdin(Stdio::null()).output().unwrap()
    }

    fn must(&self, line: &str) -> String {
        let output = self.types(line);
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "`{line}` failed:\n{said}");
        said
    }

    fn must_not(&self, line: &str) -> String {
        let output = self.types(line);
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(!output.status.success(), "`{line}` went well:\n{said}");
        said
    }

    fn files(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut waiting = vec![self.home()];
        while let Some(dir) = waiting.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let entry = entry.unwrap();
                found.push(entry.path());
                if entry.file_type().unwrap().is_dir() {
                    waiting.push(entry.path());
                }
            }
        }
        found.sort();
        found
    }
}

impl Drop for Person {
    fn drop(&mut self) {
        for pid in processes_of(&self.home().join(".local/state/drover")) {
            let _ = signal(pid, Signal::KILL);
        }
    }
}

/// Unpacks an archive, lets something be changed, and packs it again under the name of another version.
fn changed(archive: &Path, to: &Path, change: impl FnOnce(&Path)) {
    let work = tempfile::tempdir().unwrap();
    let run = |program: &str, args: &[&str], dir: &Path| {
        let output = Command::new(program).args(args).current_dir(dir).output().unwrap();
        assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    run("tar", &["-xzf", archive.to_str().unwrap()], work.path());
    let tree = fs::read_dir(work.path()).unwrap().next().unwrap().unwrap().path();
    change(&tree);
    let list = "find . -type f ! -name SHA256SUMS | sed 's|^./||' | sort | xargs sha256sum > SHA256SUMS";
    run("sh", &["-c", list], &tree);
    run(
        "tar",
        &[
            "--use-compress-program",
            "gzip --fast",
            "-cf",
            to.to_str().unwrap(),
            tree.file_name().unwrap().to_str().unwrap(),
        ],
        work.path(),
    );
    let sum = run("sha256sum", &[to.file_name().unwrap().to_str().unwrap()], to.parent().unwrap());
    fs::write(format!("{}.sha256", to.display()), sum).unwrap();
}

#[test]
fn the_archive_is_installed_updated_and_removed_without_root() {
    let person = Person::new();
    let stage = person.dir.path();
    let packed = archive(stage);
    let name = packed.file_name().unwrap().to_str().unwrap().to_owned();
    let newer = stage.join("newer.tar.gz");
    changed(&packed, &newer, |tree| {
        fs::remove_file(tree.join("share/doc/drover/configs/hpcfund.json")).unwrap();
        fs::write(tree.join("share/doc/drover/new.md"), "new\n").unwrap();
    });
    fs::write(person.home().join("mine.txt"), "").unwrap();
    let before = person.files();

    // What came over the network damaged changes nothing.
    let damaged = stage.join("damaged.tar.gz");
    let mut bytes = fs::read(&packed).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&damaged, bytes).unwrap();
    let sum = fs::read_to_string(stage.join(format!("{name}.sha256"))).unwrap();
    fs::write(stage.join("damaged.tar.gz.sha256"), sum.replace(&name, "damaged.tar.gz")).unwrap();
    let pipe = |archive: &str| {
        format!("curl -fsSL \"file://$STAGE/install.sh\" | sh -s -- --archive \"file://$STAGE/{archive}\"")
    };
    let said = person.must_not(&pipe("damaged.tar.gz"));
    assert!(said.contains("damaged"), "{said}");
    let said = person.must_not("sh $STAGE/install.sh");
    assert!(said.contains("--archive"), "{said}");
    // Nor does one that would replace what somebody else put there.
    person.must("mkdir -p .local/bin && echo mine >.local/bin/drover-worker");
    let said = person.must_not(&pipe(&name));
    assert!(said.contains(".local/bin/drover-worker is there"), "{said}");
    assert_eq!(person.must("cat .local/bin/drover-worker && rm -r .local").trim(), "mine");
    assert_eq!(person.files(), before, "nothing is touched");

    let said = person.must(&pipe(&name));
    assert!(said.contains("is installed in") && said.contains("--uninstall"), "{said}");
    let local = person.home().join(".local");
    let unit = fs::read_to_string(local.join("share/systemd/user/drover-router.service")).unwrap();
    assert!(unit.contains(&format!("ExecStart=\"{}/bin/drover-router\"\n", local.display())), "{unit}");
    for file in [
        "share/bash-completion/completions/drover",
        "share/man/man1/drover-launch.1",
        "share/man/man1/drover-pki-issue.1",
        "share/man/man1/drover-worker.1",
        "share/doc/drover/configs/hpcfund.json",
        "share/doc/drover/docs/USER_GUIDE.md",
        "share/doc/drover/sbom.cdx.json",
        "share/drover/prometheus/alerts.yml",
        "share/drover/grafana/drover.json",
    ] {
        assert!(local.join(file).is_file(), "{file} is missing");
    }
    assert!(!local.join("etc").exists() && !local.join("lib/systemd").exists(), "those are for root");
    for daemon in ["router", "slurm-allocator", "outbox-follower", "worker", "gossip-membership", "llm-dispatcher"] {
        let said = person.must(&format!("drover-{daemon} --version"));
        assert!(said.contains(&format!("drover-{daemon} {}", drover_types::VERSION)), "{said}");
    }
    let bill: serde_json::Value =
        serde_json::from_slice(&fs::read(local.join("share/doc/drover/sbom.cdx.json")).unwrap()).unwrap();
    let billed = |name: &str| bill["components"].as_array().unwrap().iter().any(|one| one["name"] == name);
    assert!(billed("rustls") && billed("tonic") && billed("drover-router"), "what is compiled in is billed");
    assert!(!billed("proptest") && !billed("drover-testkit"), "what only tests is not");

    // How fast it is on a machine that does nothing else is judged elsewhere.
    // The barest of containers has no list of authorities.
    let said = person.must("SSL_CERT_FILE=/dev/null drover demo --agent echo --limit 3m");
    assert!(said.contains("each carried out once"), "{said}");
    // Neither the tour nor what it was installed for leaves a trace, also when nothing is to be purged.
    person.must("sh ~/.local/share/drover/install.sh --uninstall");
    assert_eq!(person.files(), before, "nothing is left");
    person.must(&pipe(&name));

    // A swarm and its daemons go on while the files below them are replaced.
    person.must("drover launch --nodes 1 --agent echo --prompt one --detach");
    let said = person.must(&pipe("newer.tar.gz"));
    assert!(said.contains("is updated in"), "{said}");
    assert!(local.join("share/doc/drover/new.md").is_file());
    assert!(!local.join("share/doc/drover/configs/hpcfund.json").exists(), "what the new version lacks is gone");
    let said = person.must("drover inject last --prompt two");
    assert!(said.contains("node 0 | two"), "{said}");

    // Whoever wants nothing of it to be kept wants no swarm of it to go on.
    let said = person.must("sh ~/.local/share/drover/install.sh --uninstall --purge");
    assert!(said.contains("drover is removed"), "{said}");
    assert_eq!(person.files(), before, "nothing is left");
    let begun = Instant::now();
    while !processes_of(&local.join("state/drover")).is_empty() && begun.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(processes_of(&local.join("state/drover")), Vec::<u32>::new(), "nothing runs on");
    let said = person.must_not("sh $STAGE/install.sh --uninstall");
    assert!(said.contains("there is no drover"), "{said}");
}
