//! What `drover doctor --cluster` looks at, broken one by one on a real cluster: the login, the queue, the partition, the directory, the
//! clocks, the disks, codex. Each is broken as it breaks at a site, and only the looks that have to do with it complain.
//!
//! A host whose clock is wrong, or whose disk is slow, is one on which drover is given another clock and another disk: a laboratory
//! shares both with the machine.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use drover_e2e::slurm::{Seat, Site, codex, prepared};
use drover_testkit::codex::codex_bin;
use drover_testkit::lab::{Options, usable};
use drover_testkit::{skip, this_test};
use serde_json::Value;

/// Another clock and another disk, for hosts that a file names: its lines are the host, seconds of the clock's lead, milliseconds that a
/// record takes longer to be durable.
const OTHER_HOST: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
extern char *program_invocation_short_name;
static void ill(long *lead, long *slow) {
  char here[65] = "", name[65]; long a, b;
  *lead = *slow = 0;
  if (strcmp(program_invocation_short_name, "drover")) return;
  gethostname(here, 64);
  FILE *file = fopen("/etc/ill-hosts", "r");
  if (!file) return;
  while (fscanf(file, "%64s %ld %ld", name, &a, &b) == 3) if (!strcmp(name, here)) *lead = a, *slow = b;
  fclose(file);
}
int clock_gettime(clockid_t clock, struct timespec *at) {
  static int (*real)(clockid_t, struct timespec *);
  long lead, slow;
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "clock_gettime");
  int status = real(clock, at);
  if (!status && clock == CLOCK_REALTIME) { ill(&lead, &slow); at->tv_sec += lead; }
  return status;
}
int fdatasync(int file) {
  static int (*real)(int);
  long lead, slow;
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "fdatasync");
  ill(&lead, &slow);
  usleep(slow * 1000);
  return real(file);
}
"#;

/// What complains, in the order of the looks: name, and what was seen with what to do.
fn complaints(site: &Site) -> anyhow::Result<Vec<(String, String)>> {
    let ran = site.run(&["doctor", "--cluster", "lab", "--json"])?;
    let report: Value = serde_json::from_str(&ran.stdout).with_context(|| format!("{}{}", ran.stdout, ran.stderr))?;
    let text = |check: &Value, key: &str| check[key].as_str().unwrap_or_default().to_owned();
    let of_the_cluster = |name: &str| name.starts_with("cluster ") || name == "shared directory";
    let checks = report["checks"].as_array().context("no checks")?.iter();
    let mine = checks.filter(|check| of_the_cluster(check["name"].as_str().unwrap_or_default()));
    let wrong = mine.filter(|check| check["ok"] != true);
    Ok(wrong.map(|check| (text(check, "name"), text(check, "detail") + " -> " + &text(check, "hint"))).collect())
}

/// These and no others complain, in these words.
fn only(site: &Site, what: &str, expected: &[(&str, &str)]) -> anyhow::Result<()> {
    let seen = complaints(site)?;
    let fits = seen.len() == expected.len()
        && seen.iter().zip(expected).all(|((name, said), (wanted, words))| name == wanted && said.contains(words));
    ensure!(fits, "{what}: expected {expected:?}, seen {seen:#?}");
    Ok(())
}

/// Runs something as root on a host.
fn root(site: &Site, host: &str, argv: &[&str]) -> anyhow::Result<()> {
    let output = site.lab.root(host, argv[0]).args(&argv[1..]).output()?;
    ensure!(output.status.success(), "{argv:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Gives every drover that is started from now on other clocks and disks.
fn make_ill(site: &Site, hosts: &str) -> anyhow::Result<()> {
    let etc = site.lab.dir().join("etc");
    fs::write(etc.join("ill-hosts"), hosts)?;
    let library = etc.join("ill.so");
    if !library.exists() {
        let source = etc.join("ill.c");
        fs::write(&source, OTHER_HOST)?;
        let compiled = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .arg(&library)
            .arg(&source)
            .arg("-ldl")
            .status()?;
        ensure!(compiled.success(), "cc");
    }
    Ok(fs::write(etc.join("ld.so.preload"), "/etc/ill.so\n")?)
}

fn make_well(site: &Site) -> anyhow::Result<()> {
    Ok(fs::remove_file(site.lab.dir().join("etc/ld.so.preload"))?)
}

fn swap(one: &Path, other: &Path) -> anyhow::Result<()> {
    Ok(fs::rename(one, other)?)
}

#[test]
fn each_look_of_the_doctor_finds_what_is_broken_there() {
    let Some(program) = codex_bin() else { return };
    let options = Options { nodes: 1, ..Options::default() };
    if let Err(why) = usable(&options) {
        return skip(&this_test(), &why);
    }
    let agent =
        format!("worker: {{agent: codex, codex_bin: {}, codex_home: {}}}\n", codex::program(), codex::settings());
    let done = prepared(options, Seat::Laptop, &agent, async |site| {
        // The partition of launches that name none.
        let file = site.dir().join("drover.yaml");
        let text = fs::read_to_string(&file)?.replace("poll: 2s", "poll: 2s, partition: mi2508x");
        fs::write(&file, text)?;
        only(site, "codex was never installed", &[("cluster codex", "codex")])?;
        let _mock = codex::install(site, &program)?;
        let (home, lab) = (site.lab.home()?, site.lab.dir().to_owned());

        let keys = home.join(".ssh/authorized_keys");
        swap(&keys, &home.join("keys"))?;
        only(site, "the key is not taken", &[("cluster login", "no connection to login")])?;
        swap(&home.join("keys"), &keys)?;

        let conf = lab.join("etc/slurm/slurm.conf");
        swap(&conf, &lab.join("slurm.conf"))?;
        only(site, "Slurm is not configured on the login host", &[("cluster slurm", "sbatch does not work")])?;
        swap(&lab.join("slurm.conf"), &conf)?;

        let munge = lab.join("munge/munge.socket.2");
        swap(&munge, &lab.join("munge.socket"))?;
        only(site, "nobody there can prove who he is", &[("cluster squeue", "squeue works on the login host")])?;
        swap(&lab.join("munge.socket"), &munge)?;

        root(site, "ctl", &["scontrol", "update", "PartitionName=mi2508x", "State=DOWN"])?;
        only(site, "the partition is closed", &[("cluster partition", "is not up")])?;
        root(site, "ctl", &["scontrol", "update", "PartitionName=mi2508x", "State=UP"])?;

        root(site, "login", &["mount", "-o", "remount,bind,noexec", "/home"])?;
        only(site, "nothing may run from the directory", &[("cluster program", "noexec")])?;
        root(site, "login", &["mount", "-o", "remount,bind,exec,ro", "/home"])?;
        only(site, "the directory cannot be written", &[("cluster write", "Read-only file system")])?;
        root(site, "login", &["mount", "-o", "remount,bind,rw", "/home"])?;

        root(site, "n1", &["mount", "-t", "tmpfs", "-o", "mode=777", "other", "/home"])?;
        only(site, "the compute host has another directory there", &[("shared directory", "workspace_root must lie")])?;
        root(site, "n1", &["umount", "/home"])?;

        let settings = home.join("settings/config.toml");
        swap(&settings, &home.join("config.toml"))?;
        make_ill(site, "login 7200 900\nn1 -3600 900\n")?;
        let ill = [
            ("cluster clock", "ahead of this machine's clock"),
            ("cluster write", "login host login: a record takes"),
            ("cluster clock", "compute host n1: at least"),
            ("cluster write", "compute host n1: a record takes"),
            ("cluster codex", "codex has no credentials"),
        ];
        only(site, "wrong clocks, slow disks, and nobody has logged in to codex", &ill)?;
        make_well(site)?;
        swap(&home.join("config.toml"), &settings)?;
        only(site, "all is mended", &[])
    });
    done.unwrap_or_else(|error: anyhow::Error| panic!("{error:#}"));
}
