//! What `drover doctor --cluster` looks at: each look is broken once, and only it complains.

use std::fs;
use std::time::Duration;

use drover_slurm_allocator::cluster::{Finding, Thresholds, Wishes, check};

use crate::site::Site;
use crate::support::{executable, set};

/// Programs of Slurm that answer as the real ones do where this test asks.
const SLURM: [(&str, &str); 4] = [
    (
        "sbatch",
        "#!/bin/sh\nif [ \"$1\" = --version ]; then echo 'slurm-wlm 22.05.8'; exit 0; fi\n\
         echo 'sbatch: Job 5 to start at 2026-11-21T12:00:00 using 1 processors on nodes n1 in partition mi2508x' >&2\n",
    ),
    ("squeue", "#!/bin/sh\necho 17\n"),
    ("sinfo", "#!/bin/sh\necho 'debug*|up|30:00|2|idle'\necho 'mi2508x|up|12:00:00|4|idle'\n"),
    // Runs what stands behind its own options, here.
    ("srun", "#!/bin/sh\nwhile [ \"${1#--}\" != \"$1\" ]; do shift; done\nexec \"$@\"\n"),
];

const PATH: &str = "SetEnv PATH=DIR/bin:/usr/bin:/bin";

fn site() -> Option<Site> {
    let site = Site::start(PATH)?;
    fs::create_dir(site.sshd.path("bin")).unwrap();
    for (name, text) in SLURM {
        executable(&site.sshd.path("bin").join(name), text);
    }
    report(&site, &[]);
    Some(site)
}

/// What the program on the site says of it, with some fields changed.
fn report(site: &Site, changes: &[(&str, serde_json::Value)]) {
    let mut report = serde_json::json!({
        "host": "n1", "version": drover_types::VERSION, "codex_found": true, "now_us": 0, "file_system": "nfs", "sees": true, "write_us": 900,
        "write_error": "", "codex": "/opt/codex", "codex_error": "", "codex_hint": "",
    });
    for (key, value) in changes {
        report[*key] = value.clone();
    }
    // The clock is read when it is asked, unless it is to be wrong.
    let path = site.dir.join("report");
    fs::write(&path, format!("{report}\n")).unwrap();
    let shift = changes.iter().find(|(key, _)| *key == "behind").map_or(0, |(_, value)| value.as_i64().unwrap());
    let program = format!(
        "#!/bin/bash\nif [ \"$2\" = codex ]; then shift 2; echo \"$@\" >> '{0}.asked'; cp '{0}.with' '{0}'\n\
         echo '{{\"path\":\"/there/codex\",\"version\":\"1.2.3\",\"installed\":true}}'; exit; fi\n\
         [ \"$2\" = probe ] || exit 64\nnow=$(($(date +%s%6N) - {shift}))\nsed \"s/\\\"now_us\\\":0/\\\"now_us\\\":$now/\" '{0}'\n",
        path.display()
    );
    executable(&site.settings.program, &program);
}

fn wishes() -> Wishes {
    Wishes {
        partition: Some("mi2508x".to_owned()),
        codex: true,
        codex_bin: None,
        codex_home: None,
        install_codex: None,
        thresholds: Thresholds { skew: Duration::from_mins(1), ..Thresholds::default() },
    }
}

async fn broken(site: &Site) -> Vec<(&'static str, String)> {
    broken_with(site, &wishes()).await
}

async fn broken_with(site: &Site, wishes: &Wishes) -> Vec<(&'static str, String)> {
    let findings = check(&site.settings, wishes).await;
    let bad = findings.into_iter().filter(|finding| !finding.ok);
    bad.map(|Finding { name, detail, hint, .. }| (name, format!("{detail} -> {hint}"))).collect()
}

/// Only this look complains, and with these words.
async fn only(site: &Site, name: &str, words: &str) {
    let broken = broken(site).await;
    assert!(broken.len() == 1 && broken[0].0 == name && broken[0].1.contains(words), "expected {name}: {broken:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_in_order_is_found_so_with_every_look_taken() {
    let Some(site) = site() else { return };
    let findings = check(&site.settings, &wishes()).await;
    assert!(findings.iter().all(|finding| finding.ok), "{findings:#?}");
    let names: Vec<_> = findings.iter().map(|finding| finding.name).collect();
    let all = [
        "cluster login",
        "cluster slurm",
        "cluster squeue",
        "cluster partition",
        "cluster --signal",
        "cluster program",
        "cluster clock",
        "cluster write",
        "shared directory",
    ];
    assert_eq!(names, [&all[..], &["cluster clock", "cluster write", "cluster codex"]].concat());
    let left = fs::read_dir(&site.settings.base).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(left.collect::<Vec<_>>(), ["bin"], "nothing is left behind but the program");
}

#[tokio::test(flavor = "multi_thread")]
async fn codex_is_installed_only_when_asked_for_and_only_where_there_is_none() {
    let Some(site) = site() else { return };
    fs::copy(site.dir.join("report"), site.dir.join("report.with")).unwrap();
    let none = [("codex", serde_json::Value::Null), ("codex_found", false.into()), ("codex_error", "not found".into())];
    let fix = Wishes { install_codex: Some("1.2.3".to_owned()), ..wishes() };
    report(&site, &none);
    only(&site, "cluster codex", "not found").await;
    let chosen = Wishes { codex_bin: Some("/my/codex".to_owned()), ..fix.clone() };
    assert_eq!(broken_with(&site, &chosen).await.len(), 1, "one that somebody chose is theirs to mend");
    // Another codex gives nobody credentials.
    report(&site, &[none[0].clone(), ("codex_error", "no login".into())]);
    assert_eq!(broken_with(&site, &fix).await.len(), 1);
    assert_eq!(site.count("report.asked"), 0);

    report(&site, &none);
    let findings = check(&site.settings, &fix).await;
    assert!(findings.iter().all(|finding| finding.ok), "{findings:#?}");
    let codex: Vec<_> = findings.iter().filter(|finding| finding.name == "cluster codex").collect();
    assert!(codex.len() == 2 && codex[0].detail.contains("/there/codex"), "{codex:#?}");
    let asked = fs::read_to_string(site.dir.join("report.asked")).unwrap();
    assert_eq!(asked, format!("--json --base {} --version 1.2.3\n", site.settings.base));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_of_another_version_is_told() {
    let Some(site) = site() else { return };
    report(&site, &[("version", "0.0.1".into())]);
    only(&site, "cluster program", "of version 0.0.1").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_login_is_looked_at_first() {
    let Some(mut site) = site() else { return };
    let mut settings = site.sshd.settings("drover-sh");
    set(&mut settings, "IdentityFile", "/dev/null");
    site.settings.way = drover_slurm_allocator::cluster::Way::Builtin(Box::new(settings));
    only(&site, "cluster login", "no connection to cluster").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_look_at_slurm_finds_what_is_wrong_there() {
    let Some(site) = site() else { return };
    let bin = |name: &str| site.sshd.path("bin").join(name);
    let again = |name: &str| {
        let (_, text) = SLURM.iter().find(|(known, _)| *known == name).unwrap();
        executable(&bin(name), text);
    };
    executable(&bin("sbatch"), "#!/bin/sh\necho slurm 17.11.2\n");
    only(&site, "cluster slurm", "older than 20.11").await;
    // As a shell says it; another one may be further back on the PATH of whoever runs this.
    executable(&bin("sbatch"), "#!/bin/sh\necho 'sh: sbatch: not found' >&2\nexit 127\n");
    only(&site, "cluster slurm", "PATH of a command").await;
    again("sbatch");

    executable(
        &bin("squeue"),
        "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n",
    );
    only(&site, "cluster squeue", "Unable to contact slurm controller").await;
    again("squeue");

    executable(&bin("sinfo"), "#!/bin/sh\necho 'debug*|up|30:00|2|idle'\n");
    only(&site, "cluster partition", "this cluster has: debug").await;
    again("sinfo");

    executable(
        &bin("sbatch"),
        "#!/bin/sh\n[ \"$1\" = --version ] && { echo slurm 22.05.8; exit 0; }\n\
         case \"$*\" in *--signal*) echo 'sbatch: error: Invalid --signal specification' >&2; exit 1;; esac\n",
    );
    only(&site, "cluster --signal", "Invalid --signal").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_look_at_the_hosts_finds_what_is_wrong_there() {
    let Some(site) = site() else { return };
    let srun = |text: &str| executable(&site.sshd.path("bin/srun"), text);
    let run = SLURM[3].1;

    // A compute host with a directory of its own in that place.
    let elsewhere = site.sshd.path("bin/elsewhere");
    let mount = format!("#!/bin/sh\nmount -t tmpfs tmpfs '{}' && exec \"$@\"\n", site.settings.base);
    executable(&elsewhere, &mount);
    srun(&run.replace("exec", &format!("exec unshare --mount '{}'", elsewhere.display())));
    only(&site, "shared directory", "cannot run what was placed").await;
    srun("#!/bin/sh\necho 'srun: error: Unable to allocate resources: Requested nodes are busy' >&2\nexit 1\n");
    only(&site, "shared directory", "idle node").await;
    srun(run);

    report(&site, &[("sees", false.into())]);
    only(&site, "shared directory", "does not see").await;
    report(&site, &[("codex", serde_json::Value::Null), ("codex_error", "codex was not found".into())]);
    only(&site, "cluster codex", "codex was not found").await;

    report(&site, &[("behind", 3_600_000_000_i64.into())]);
    let clocks = broken(&site).await;
    assert!(
        clocks.len() == 2 && clocks.iter().all(|(name, words)| *name == "cluster clock" && words.contains("behind")),
        "{clocks:#?}"
    );
    report(&site, &[("write_us", 4_000_000.into())]);
    let slow = broken(&site).await;
    assert!(
        slow.len() == 2 && slow.iter().all(|(name, words)| *name == "cluster write" && words.contains("4.0s")),
        "{slow:#?}"
    );
    report(&site, &[("write_us", serde_json::Value::Null), ("write_error", "Disk quota exceeded".into())]);
    only(&site, "cluster write", "Disk quota exceeded").await;

    executable(&site.settings.program, "#!/nowhere/interpreter\n");
    only(&site, "cluster program", "static build").await;
}
