//! Program files of several versions, one of which is in place.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use drover_types::VERSION;

/// The file that runs, and what takes its place.
pub(super) struct Programs {
    /// Where every daemon is started from.
    pub(super) drover: PathBuf,
    /// The versions that were in place; the last one is.
    pub(super) versions: Vec<String>,
    /// The program that was built.
    built: PathBuf,
    /// It comes in place as it is, because another one did first.
    as_it_is: bool,
}

impl Programs {
    /// Puts the first program in place: the one that is given, else the one that was built.
    pub(super) fn new(dir: &Path, from: Option<&Path>, built: &Path) -> anyhow::Result<Self> {
        let drover = dir.join("drover");
        let first = from.unwrap_or(built);
        // Without what only a debugger reads a file is copied in no time.
        let small = dir.join("built");
        let stripped = Command::new("strip").arg("--strip-debug").arg("-o").arg(&small).arg(built).status();
        if !stripped.is_ok_and(|status| status.success()) {
            fs::copy(built, &small)?;
        }
        fs::copy(if from.is_some() { first } else { &small }, &drover)?;
        let version = version_of(&drover)?;
        Ok(Self { drover, versions: vec![version], built: small, as_it_is: from.is_some() })
    }

    /// The version that is in place.
    pub(super) fn version(&self) -> &str {
        self.versions.last().map_or("", String::as_str)
    }

    /// The file that is in place.
    pub(super) fn inode(&self) -> anyhow::Result<u64> {
        Ok(fs::metadata(&self.drover)?.ino())
    }

    /// As an upgrade does it: a new file takes the name of the old one, which goes on as long as somebody runs it.
    pub(super) fn replace(&mut self) -> anyhow::Result<()> {
        let fresh = self.drover.with_extension("fresh");
        let wanted = if self.as_it_is { VERSION.to_owned() } else { later(self.versions.len())? };
        if self.as_it_is {
            fs::copy(&self.built, &fresh)?;
        } else {
            rewritten(&self.built, &fresh, &wanted)?;
        }
        let version = version_of(&fresh)?;
        ensure!(version == wanted, "the new program says that it is {version}, not {wanted}");
        fs::rename(&fresh, &self.drover)?;
        self.versions.push(version);
        Ok(())
    }
}

/// A version of as many characters that fits ours.
fn later(by: usize) -> anyhow::Result<String> {
    let (minor, patch) = VERSION.rsplit_once('.').context("a version without dots")?;
    let later = (patch.parse::<usize>()? + by) % 10;
    ensure!(patch.len() == 1, "{VERSION} is too long for this");
    Ok(format!("{minor}.{later}"))
}

/// The same program, except that it says another version wherever it says one. A file that was built twice would be more than
/// a test has time for; what really changed between two versions is for `cargo xtask chaos upgrade`.
fn rewritten(from: &Path, to: &Path, version: &str) -> anyhow::Result<()> {
    let pattern = format!("s/{}/{version}/g", VERSION.replace('.', "\\."));
    let sed = Command::new("sed")
        .arg(pattern)
        .env("LC_ALL", "C")
        .stdin(fs::File::open(from)?)
        .stdout(fs::File::create(to)?)
        .status()?;
    ensure!(sed.success(), "sed failed");
    fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

fn version_of(program: &Path) -> anyhow::Result<String> {
    let said = Command::new(program).arg("--version").stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    Ok(said.split_whitespace().last().with_context(|| format!("{} says no version", program.display()))?.to_owned())
}
