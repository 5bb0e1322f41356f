//! Runs programs in the root of the repository, and says so.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, bail};

/// The root of the repository.
pub(crate) fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(2).unwrap_or(manifest).to_owned()
}

/// Cargo's target directory.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |dir| root().join(dir))
}

/// With `CI=true` nothing may be left out.
pub(crate) fn in_ci() -> bool {
    std::env::var("CI").as_deref() == Ok("true")
}

/// True when the program can be run with these arguments.
pub(crate) fn has(program: &str, args: &[&str]) -> bool {
    let mut command = Command::new(program);
    command.args(args).current_dir(root()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Sees to it that a program is there, by installing the Debian package that has it when we are root.
pub(crate) fn installed(name: &str, package: &str) -> anyhow::Result<()> {
    if has("sh", &["-c", &format!("command -v {name}")]) {
        return Ok(());
    }
    if !has("sh", &["-c", "test $(id -u) = 0 && command -v apt-get"]) {
        bail!("{name} is missing, and only root with apt-get may install it: install {package}");
    }
    program("apt-get", &["update", "-qq"]).run()?;
    program("apt-get", &["install", "-y", "-qq", "--no-install-recommends", package])
        .env("DEBIAN_FRONTEND", "noninteractive")
        .run()
}

/// A program to run.
pub(crate) struct Call {
    command: Command,
    shown: String,
    quiet: bool,
}

/// The cargo that runs us.
pub(crate) fn cargo<S: AsRef<OsStr>>(args: &[S]) -> Call {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut call = program(&cargo, args);
    call.shown = format!("cargo{}", words(args));
    call
}

/// Any other program.
pub(crate) fn program<S: AsRef<OsStr>>(program: impl AsRef<OsStr>, args: &[S]) -> Call {
    let mut command = Command::new(program.as_ref());
    command.args(args).current_dir(root()).stdin(Stdio::null());
    Call { command, quiet: false, shown: format!("{}{}", program.as_ref().to_string_lossy(), words(args)) }
}

fn words<S: AsRef<OsStr>>(args: &[S]) -> String {
    let mut shown = String::new();
    for arg in args {
        shown.push(' ');
        shown += &arg.as_ref().to_string_lossy();
    }
    shown
}

impl Call {
    /// Sets a variable for it.
    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// One more argument.
    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.shown = format!("{} {}", self.shown, arg.as_ref().to_string_lossy());
        self.command.arg(arg);
        self
    }

    /// Says nothing when all is well.
    pub(crate) fn quiet(mut self) -> Self {
        self.quiet = true;
        self
    }

    /// Only these packages.
    pub(crate) fn packages(mut self, packages: &[&str]) -> Self {
        for package in packages {
            self.command.args(["--package", package]);
            self.shown = format!("{} --package {package}", self.shown);
        }
        self
    }

    /// Runs it somewhere else than in the root.
    pub(crate) fn within(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Runs it to its end; fails when it does.
    pub(crate) fn run(mut self) -> anyhow::Result<()> {
        if !self.quiet {
            eprintln!("xtask: {}", self.shown);
        }
        let began = Instant::now();
        let status = self.command.status().with_context(|| format!("cannot run {}", self.shown))?;
        if !status.success() {
            bail!("{} failed ({status})", self.shown);
        }
        if !self.quiet {
            eprintln!("xtask: done in {} s", began.elapsed().as_secs());
        }
        Ok(())
    }

    /// Runs it and gives what it printed.
    pub(crate) fn read(mut self) -> anyhow::Result<String> {
        let output =
            self.command.stderr(Stdio::inherit()).output().with_context(|| format!("cannot run {}", self.shown))?;
        if !output.status.success() {
            bail!("{} failed ({})", self.shown, output.status);
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}
