//! The real program on a login host of its own: placed over SSH by a real sshd, its follower started there, reached, killed,
//! found again, and gone when nobody needs it.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]
#![expect(clippy::print_stdout, reason = "a test that fails shows the log of its server")]

#[path = "../../crates/ssh/tests/sshd/support.rs"]
#[expect(dead_code, reason = "the same server as for the tests of the connection itself; not all of it is needed here")]
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use drover_e2e::cli::{Ran, run};
use drover_proto::common::NodeRef;
use drover_proto::mailbox::mailbox_service_client::MailboxServiceClient;
use drover_proto::mailbox::{DeliverRequest, Delivery};
use drover_service::{Target, process};
use drover_ssh::{Command, Remote as _, Russh};
use drover_testkit::cluster::{Cluster, program};
use serde_json::Value;

use crate::support::{Sshd, executable, until};

const FAR: &str = "outbox-follower@hpc";

/// A laptop with a login host: configuration, home with an ssh configuration, and the program that is placed.
struct Laptop {
    sshd: Sshd,
    cluster: Cluster,
    home: PathBuf,
}

fn laptop(sshd: Sshd) -> Laptop {
    let cluster = Cluster::prepare("{}").unwrap();
    let home = cluster.dir().join("home");
    fs::create_dir_all(home.join(".ssh")).unwrap();
    let config = format!(
        "Host hpc\n  HostName 127.0.0.1\n  Port {}\n  User drover-sh\n  IdentityFile {}\n  IdentitiesOnly yes\n  UserKnownHostsFile {}\n",
        sshd.port,
        sshd.text("user"),
        sshd.text("known_hosts")
    );
    fs::write(home.join(".ssh/config"), config).unwrap();
    // What is placed for real is stripped too; half of what a build leaves is names for debuggers.
    let stripped = std::process::Command::new("strip")
        .arg("-o")
        .arg(cluster.dir().join("drover"))
        .arg(program("drover").unwrap())
        .status();
    assert!(stripped.is_ok_and(|status| status.success()), "strip");
    let laptop = Laptop { sshd, cluster, home };
    laptop.configure("30m");
    laptop
}

impl Laptop {
    fn configure(&self, idle: &str) {
        let config = format!(
            "worker: {{agent: echo}}\nfollower: {{end_when_idle: {idle}}}\n\
             launch_providers: [{{id: hpc, backend: slurm}}]\n\
             cluster:\n  slurm:\n    login_host: hpc\n    workspace_root: {}\n    cluster_subdir: me\n    partition: mi2508x\n    program: {}\n",
            self.sshd.text("home/shared"),
            self.cluster.dir().join("drover").display()
        );
        fs::write(self.cluster.dir().join("drover.yaml"), config).unwrap();
    }

    fn command(&self, args: &[&str]) -> std::process::Command {
        let mut command = self.cluster.command(args);
        command.env("HOME", &self.home).env_remove("SSH_AUTH_SOCK").env_remove("SSH_ASKPASS");
        command
    }

    fn allocator(&self) -> Allocator {
        let log = fs::File::create(self.cluster.dir().join("allocator.log")).unwrap();
        let mut command = self.command(&["daemon", "slurm-allocator", "--listen", "127.0.0.1:0"]);
        Allocator(command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap())
    }

    /// Delivers a record to the follower of the cluster as the router does, until it succeeds.
    async fn deliver(&self, record: &str) {
        let state = self.cluster.state().clone();
        let mut client =
            MailboxServiceClient::new(drover_service::connect(Target::Daemon { state, name: FAR.to_owned() }));
        let deadline = Instant::now() + Duration::from_mins(1);
        loop {
            let node = Some(NodeRef { swarm_id: "swarm-1".to_owned(), node_id: 0 });
            let deliveries = vec![Delivery { node, record: record.to_owned().into() }];
            match client.deliver(DeliverRequest { deliveries }).await {
                Ok(answer) if answer.get_ref().results[0].error.is_empty() => return,
                other => assert!(Instant::now() < deadline, "not delivered: {other:?}\n{}", self.log()),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.cluster.dir().join("allocator.log")).unwrap_or_default()
    }

    /// What was delivered. A delivery whose answer was lost is repeated, as the router does it, and a worker passes over the
    /// second of two.
    fn inbox(&self) -> Vec<String> {
        let path = self.sshd.path("home/shared/me/mailbox/swarm-1/00/inbox/00000001.jsonl");
        let mut lines: Vec<String> = fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect();
        lines.dedup();
        lines
    }

    /// The follower's own entry in the address book of its host; its pid is one of that host.
    fn entry(&self) -> Value {
        let path = self.sshd.path("home/shared/me/hosts").join(process::hostname()).join("run/outbox-follower.json");
        fs::read_to_string(path).ok().and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
    }
}

/// Ends in order when it is dropped.
struct Allocator(Child);

impl Drop for Allocator {
    fn drop(&mut self) {
        drover_testkit::cluster::end(&mut self.0, Duration::from_secs(20));
    }
}

async fn is_alive(remote: &Russh, pid: &Value) -> bool {
    remote.run(Command::new("kill").args(["-0", &pid.to_string()])).await.unwrap().success()
}

fn programs(dir: &Path) -> usize {
    fs::read_dir(dir.join("bin")).map(Iterator::count).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_on_a_login_host_outlives_the_laptop_and_ends_when_nobody_needs_it() {
    // A host has its own processes, so that the pids in its address book are those of its own.
    let Some(sshd) = Sshd::with("", "mount -t proc proc /proc") else { return };
    let laptop = laptop(sshd);
    let remote = laptop.sshd.russh();
    let before = laptop.sshd.logins();

    let allocator = laptop.allocator();
    laptop.deliver("{\"n\":1}").await;
    let first = laptop.entry()["pid"].clone();
    assert!(is_alive(&remote, &first).await, "{first}");
    let logins = laptop.sshd.logins();
    laptop.deliver("{\"n\":2}").await;
    assert_eq!(laptop.sshd.logins(), logins, "one connection serves all");
    assert!(logins <= before + 2, "one connection of the allocator, one of this test: {logins}");

    // The lid is closed, and opened again.
    drop(allocator);
    assert!(is_alive(&remote, &first).await, "it does not need the connection");
    let allocator = laptop.allocator();
    laptop.deliver("{\"n\":3}").await;
    assert_eq!(laptop.entry()["pid"], first, "the same follower is found again");
    assert!(!laptop.log().contains("program placed"), "the program is there already");

    // Killed, it is started again.
    remote.run(Command::new("kill").args(["-9", &first.to_string()])).await.unwrap();
    laptop.deliver("{\"n\":4}").await;
    let second = laptop.entry()["pid"].clone();
    assert_ne!(second, first);
    assert_eq!(laptop.inbox(), [1, 2, 3, 4].map(|n| format!("{{\"n\":{n}}}")));

    // Another build of the program takes its place, and the follower's too; this one ends when nobody uses it.
    drop(allocator);
    laptop.configure("3s");
    let mut build = fs::OpenOptions::new().append(true).open(laptop.cluster.dir().join("drover")).unwrap();
    std::io::Write::write_all(&mut build, b"a later build").unwrap();
    drop(build);
    let allocator = laptop.allocator();
    laptop.deliver("{\"n\":5}").await;
    let third = laptop.entry()["pid"].clone();
    assert_ne!(third, second);
    assert!(!is_alive(&remote, &second).await, "the earlier one was ended in order");
    assert_eq!(programs(&laptop.sshd.path("home/shared/me")), 2, "jobs of the earlier program keep it");
    drop(allocator);
    let deadline = Instant::now() + Duration::from_mins(1);
    while is_alive(&remote, &third).await {
        assert!(Instant::now() < deadline, "it runs on though nobody uses it");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_looks_at_the_cluster_and_forwarding_may_be_forbidden() {
    let forbid = "AllowTcpForwarding no\nSetEnv PATH=DIR/bin:/usr/bin:/bin";
    let Some(sshd) = Sshd::with(forbid, "mount -t proc proc /proc") else { return };
    fs::create_dir(sshd.path("bin")).unwrap();
    for (name, text) in [
        ("sbatch", "#!/bin/sh\n[ \"$1\" = --version ] && echo slurm 22.05.8\nexit 0\n"),
        ("squeue", "#!/bin/sh\n"),
        ("sinfo", "#!/bin/sh\necho 'mi2508x|up|12:00:00|4|idle'\n"),
        ("srun", "#!/bin/sh\nwhile [ \"${1#--}\" != \"$1\" ]; do shift; done\nexec \"$@\"\n"),
    ] {
        executable(&sshd.path("bin").join(name), text);
    }
    let laptop = laptop(sshd);
    let output = laptop.command(&["doctor", "--json", "--cluster", "hpc"]).stdin(Stdio::null()).output().unwrap();
    let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"));
    let checks = said["checks"].as_array().unwrap();
    let found = |name: &str| {
        let of_name: Vec<&Value> = checks.iter().filter(|check| check["name"] == name).collect();
        assert!(!of_name.is_empty() && of_name.iter().all(|check| check["ok"] == true), "{name}: {said:#}");
    };
    for name in [
        "cluster login",
        "cluster slurm",
        "cluster squeue",
        "cluster partition",
        "cluster --signal",
        "cluster program",
        "cluster clock",
        "cluster write",
        "shared directory",
    ] {
        found(name);
    }
    // Nothing may be forwarded, so `drover connect` there carries it.
    let _allocator = laptop.allocator();
    laptop.deliver("{\"n\":1}").await;
    assert_eq!(laptop.inbox(), ["{\"n\":1}"]);
    let Ran { code, stderr, .. } = run(&laptop.cluster, &["connect", "127.0.0.1:1"]).unwrap();
    assert!(code == 69 && stderr.contains("cannot connect to 127.0.0.1:1"), "{code}: {stderr}");
    until("the allocator to be up", || laptop.cluster.daemon("slurm-allocator").is_some()).await;
}
