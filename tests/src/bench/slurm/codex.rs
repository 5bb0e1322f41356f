//! `drover doctor --fix` installs the real codex at its pinned version with the site's own npm, and a swarm answers with it.
//!
//! The site has a mirror of npm's registry, as sites without a way to the internet have; it holds the package that the tests were
//! installed with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use drover_testkit::codex::repository_root;
use drover_testkit::lab::Options;
use serde_json::{Value, json};

use super::super::figures::{Figure, Goal};
use crate::slurm::{Seat, Site, codex, prepared};

const PORT: u16 = 4873;
const PACKAGE: &str = "@openai/codex";

pub(super) fn run() -> anyhow::Result<Vec<Figure>> {
    let agent = format!("worker: {{agent: codex, codex_home: {}}}\n", codex::settings());
    prepared(Options { nodes: 1, ..Options::default() }, Seat::Laptop, &agent, async |site| {
        let file = site.dir().join("drover.yaml");
        let text = fs::read_to_string(&file)?.replace("poll: 2s", "poll: 2s, partition: mi2508x, time_limit: '10'");
        fs::write(&file, text)?;
        let _mirror = Mirror::start(site)?;
        let _model = codex::play_model(site)?;
        let before = look(site, &["doctor", "--cluster", "lab", "--json"])?;
        ensure!(before["ok"] == false && text_of(&before, "detail").contains("no program named codex"), "{before:#}");

        let begun = Instant::now();
        let installed = look(site, &["doctor", "--cluster", "lab", "--fix", "--json"])?;
        let took = begun.elapsed();
        ensure!(installed["ok"] == true, "{installed:#}");
        let program = format!("{}/tools/bin/codex", site.base_there());
        let version = site.lab.run("n1", &[&program, "--version"])?;
        ensure!(version.contains(drover_worker_version()?.as_str()), "{version} is not the pinned one");
        let again = look(site, &["doctor", "--cluster", "lab", "--json"])?;
        ensure!(again["ok"] == true, "{again:#}");

        site.up().await?;
        let prompt = "Hello. @mock say='installed and at work' deltas=2";
        let launched = site.ok(&["launch", "--nodes", "1", "--prompt", prompt])?;
        ensure!(launched.stdout.contains("| installed and at work"), "{}{}", launched.stdout, launched.stderr);
        Ok(vec![Figure {
            name: format!(
                "`drover doctor --fix` installs {} with the site's npm, and looks at everything",
                version.trim()
            ),
            ours: took.as_secs_f64(),
            ideal: None,
            unit: "s",
            goal: Goal::Shown,
        }])
    })
}

/// The last thing that a doctor said of codex on the cluster.
fn look(site: &Site, args: &[&str]) -> anyhow::Result<Value> {
    let ran = site.run(args)?;
    let report: Value = serde_json::from_str(&ran.stdout).with_context(|| format!("{}{}", ran.stdout, ran.stderr))?;
    let checks = report["checks"].as_array().context("no checks")?;
    checks.iter().rfind(|check| check["name"] == "cluster codex").cloned().with_context(|| format!("{report:#}"))
}

fn text_of<'a>(check: &'a Value, key: &str) -> &'a str {
    check[key].as_str().unwrap_or_default()
}

/// The version in the lock file of the tests is the one that drover says it was tested with.
fn drover_worker_version() -> anyhow::Result<String> {
    let pinned = fs::read_to_string(repository_root().join("tests/codex/package.json"))?;
    let pinned: Value = serde_json::from_str(&pinned)?;
    pinned["dependencies"][PACKAGE].as_str().map(str::to_owned).context("no version is pinned")
}

/// A mirror of npm's registry on the login host, with one package.
struct Mirror {
    server: Child,
    dir: PathBuf,
}

impl Mirror {
    fn start(site: &Site) -> anyhow::Result<Self> {
        let modules = repository_root().join("target/codex/node_modules/@openai");
        let dir = site.dir().join("mirror");
        fs::create_dir_all(dir.join("@openai"))?;
        let login = site.lab.network("login");
        let base = format!("http://{}:{PORT}", login.addr);
        let mut versions = serde_json::Map::new();
        for package in fs::read_dir(&modules).with_context(|| format!("{}: run npm ci first", modules.display()))? {
            let package = package?.path();
            let described = fs::read_to_string(package.join("package.json"))?;
            let mut described: Value = serde_json::from_str(&described)?;
            let version = described["version"].as_str().context("a package without a version")?.to_owned();
            pack(&package, &dir.join(format!("{version}.tgz")))?;
            described["dist"] = json!({"tarball": format!("{base}/{version}.tgz")});
            versions.insert(version, described);
        }
        let newest = drover_worker_version()?;
        let document = json!({"name": PACKAGE, "dist-tags": {"latest": newest}, "versions": versions});
        fs::write(dir.join(PACKAGE), document.to_string())?;
        fs::write(site.lab.home()?.join(".npmrc"), format!("registry={base}/\n"))?;
        let mut server = login.command("python3");
        server.args(["-m", "http.server", &PORT.to_string(), "--bind", &login.addr.to_string(), "--directory"]);
        server.arg(&dir).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let server = Self { server: server.spawn()?, dir };
        site.wait("the mirror listens", || {
            let reached = login.within(|| std::net::TcpStream::connect((login.addr, PORT)).is_ok())?;
            Ok(reached.then_some(()))
        })?;
        Ok(server)
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// As npm packs: everything below `package/`.
fn pack(package: &Path, to: &Path) -> anyhow::Result<()> {
    let packed = Command::new("tar")
        .args(["--use-compress-program=gzip -1", "--transform=s,^[.],package,", "-cf"])
        .arg(to)
        .arg("-C")
        .arg(package)
        .arg(".")
        .status()?;
    ensure!(packed.success(), "tar");
    Ok(())
}
