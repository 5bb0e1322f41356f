//! Two clusters in one configuration: this host is the login host of one, the other is reached over SSH. Both are fake Slurms that
//! run jobs as processes. One view shows both, and one that does not answer holds up nobody else.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]
#![expect(clippy::print_stdout, reason = "a test that fails shows the log of its server")]

#[path = "../../crates/ssh/tests/sshd/support.rs"]
#[expect(dead_code, reason = "the same server as for the tests of the connection itself; not all of it is needed here")]
mod support;

use std::fs;
use std::process::Stdio;

use drover_e2e::cli::{json, json_lines, ok};
use drover_e2e::sure::{must, wait_for};
use drover_ssh::{Command, Remote as _};
use drover_testkit::cluster::{Cluster, program, scratch_dir};
use drover_testkit::fake_slurm::{FakeSlurm, Plan};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{Sshd, signal};

/// An instance that uses both. The fields end in this order: the instance first.
struct Sites {
    cluster: Cluster,
    near: FakeSlurm,
    far: Sshd,
    _dir: TempDir,
}

impl Sites {
    async fn start() -> Option<Self> {
        // The far host has processes of its own, and its Slurm is started there: what it says of pids is true of them.
        let far = Sshd::with("SetEnv PATH=DIR/fake/bin:/usr/bin:/bin", "mount -t proc proc /proc")?;
        let fake = program("fake-slurm").unwrap();
        let made = Command::new(fake.display().to_string()).args(["new", &far.text("fake")]);
        let made = far.russh().run(made).await.unwrap();
        assert!(made.success(), "{made:?}");

        let dir = must(scratch_dir("two-"));
        let path = |name: &str| dir.path().join(name).display().to_string();
        for made in ["shared", "local", "home", "home/.ssh"] {
            fs::create_dir(path(made)).unwrap();
        }
        let near = must(FakeSlurm::start(dir.path().join("fake").as_path(), &Plan::default()));
        let ssh = format!(
            "Host far\n  HostName 127.0.0.1\n  Port {}\n  User drover-sh\n  IdentityFile {}\n  IdentitiesOnly yes\n  \
             UserKnownHostsFile {}\n",
            far.port,
            far.text("user"),
            far.text("known_hosts")
        );
        fs::write(path("home/.ssh/config"), ssh).unwrap();
        // Half of what a build leaves is names for debuggers, and all of it would be sent.
        let stripped = path("drover");
        let strip = std::process::Command::new("strip").arg("-o").arg(&stripped).arg(must(program("drover"))).status();
        assert!(strip.is_ok_and(|status| status.success()), "strip");
        let config = format!(
            "worker: {{agent: echo, drain_grace: 1s}}\n\
             launch_providers:\n  - {{id: near, backend: slurm, cluster_profile: near}}\n  - {{id: far, backend: slurm, cluster_profile: far}}\n\
             cluster:\n  slurm:\n    cluster_subdir: me\n    partition: batch\n    time_limit: '00:10:00'\n    poll: 2s\n    profiles:\n      \
             near: {{ssh: none, workspace_root: {near}, local_dir: {local}}}\n      \
             far: {{login_host: far, workspace_root: {far}, local_dir: {far_local}, program: {stripped}}}\n",
            near = path("shared"),
            local = path("local"),
            far = far.text("home/shared"),
            far_local = far.text("home/local"),
        );
        for made in ["home/shared", "home/local"] {
            fs::create_dir(far.path(made)).unwrap();
        }
        let mut cluster = must(Cluster::prepare(&config));
        cluster.set_env("PATH", must(near.path()));
        cluster.set_env("HOME", path("home"));
        cluster.set_env("SSH_AUTH_SOCK", "");
        must(cluster.up().await);
        Some(Self { cluster, near, far, _dir: dir })
    }

    fn launch(&self, site: &str) -> String {
        let args = ["launch", "--cluster", site, "--nodes", "2", "--prompt", "begin", "--detach", "--json"];
        text(&must(json(&self.cluster, &args)), "swarm_id").to_owned()
    }

    /// Waits until the swarm runs, and gives its job.
    fn running(&self, swarm: &str) -> String {
        wait_for("the swarm runs", || {
            let status = must(json(&self.cluster, &["status", swarm, "--json"]));
            (text(&status, "status") == "running").then(|| text(&status, "job_id").to_owned())
        })
    }

    /// The jobs that the far cluster knows.
    async fn far_jobs(&self) -> usize {
        let asked = Command::new("squeue").args(["--noheader", "--states=all"]);
        let answer = self.far.russh().run(asked).await.unwrap();
        String::from_utf8_lossy(&answer.stdout).lines().count()
    }

    fn answers(&self, swarm: &str, prompt: &str) -> usize {
        let events = must(json_lines(&self.cluster, &["events", "--since", "0", "--swarm", swarm, "--json"]));
        events
            .iter()
            .filter(|event| event["event"] == "assistant" && event["data"]["content"].as_str() == Some(prompt))
            .count()
    }

    /// Stops every process of the far SSH server, or lets it go on: connections stand and nobody answers.
    fn freeze(&self, how: Signal) {
        let servers: Vec<u32> = self
            .far
            .sessions()
            .into_iter()
            .filter(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.starts_with("sshd")))
            .collect();
        assert!(!servers.is_empty(), "somebody is logged in");
        signal(&servers, how);
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_clusters_are_one_view_and_neither_waits_for_the_other() {
    let Some(sites) = Sites::start().await else { return };
    let cluster = &sites.cluster;
    let (near, far) = (sites.launch("near"), sites.launch("far"));
    let jobs = (sites.running(&near), sites.running(&far));
    assert_eq!((must(sites.near.cluster()).jobs.len(), sites.far_jobs().await), (1, 1), "each has its own: {jobs:?}");

    let listed = must(json(cluster, &["list", "--json"]));
    let ids: Vec<&str> = listed.as_array().unwrap().iter().map(|swarm| text(swarm, "swarm_id")).collect();
    assert!(ids.contains(&near.as_str()) && ids.contains(&far.as_str()), "{listed}");
    for swarm in [&near, &far] {
        let said = must(ok(cluster, &["inject", swarm, "--prompt", "here"]));
        assert_eq!(said.stdout.matches("here").count(), 2, "{}", said.stdout);
    }
    let events = must(json_lines(cluster, &["events", "--since", "0", "--json"]));
    let both = |swarm: &str| events.iter().any(|event| event["swarm_id"] == swarm && event["event"] == "assistant");
    assert!(both(&near) && both(&far), "one log has both");

    // The far login host freezes: its prompt waits, and the near one's does not.
    sites.freeze(Signal::STOP);
    let mut waits = cluster.command(&["inject", &far, "--prompt", "for later"]).stdout(Stdio::piped()).spawn().unwrap();
    let said = must(ok(cluster, &["inject", &near, "--prompt", "meanwhile"]));
    assert_eq!(said.stdout.matches("meanwhile").count(), 2, "{}", said.stdout);
    wait_for("it is said that the far one does not answer", || {
        let why = must(ok(cluster, &["why", &far]));
        why.stdout.contains("stopped answering").then_some(())
    });
    assert!(waits.try_wait().unwrap().is_none() && sites.answers(&far, "for later") == 0);
    sites.freeze(Signal::CONT);
    let waited = waits.wait_with_output().unwrap();
    assert!(waited.status.success(), "{waited:?}\n{}", cluster.logs());
    assert_eq!(sites.answers(&far, "for later"), 2);

    for swarm in [&near, &far] {
        must(ok(cluster, &["terminate", swarm]));
    }
    for swarm in [&near, &far] {
        wait_for("both end", || {
            let status = must(json(cluster, &["status", swarm, "--json"]));
            (text(&status, "status") == "terminated").then_some(())
        });
    }
    assert_eq!((must(sites.near.cluster()).jobs.len(), sites.far_jobs().await), (1, 1), "nothing was submitted again");
}
