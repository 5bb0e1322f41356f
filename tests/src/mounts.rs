//! File systems that tests need: one on a loop device, which can be broken like a real disk, and one behind FUSE, which
//! caches attributes like a network file system. Both need root.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

/// Runs a program and fails with what it said.
fn run(program: &str, args: &[&str], path: &Path) -> anyhow::Result<()> {
    let output =
        Command::new(program).args(args).arg(path).output().with_context(|| format!("cannot run {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {} {}: {}", args.join(" "), path.display(), said.trim());
    Ok(())
}

fn unmount(path: &Path) {
    let _ = Command::new("umount").arg("-l").arg(path).output();
}

/// An ext4 on a loop device. Unmounted when dropped.
pub struct LoopDisk {
    image: PathBuf,
    path: PathBuf,
}

impl LoopDisk {
    /// Makes one of this many MiB in `image` and mounts it on `path`.
    pub fn mount(image: &Path, path: &Path, mib: u64) -> anyhow::Result<Self> {
        std::fs::File::create(image)?.set_len(mib << 20)?;
        run("mkfs.ext4", &["-q", "-F"], image)?;
        let disk = Self { image: image.to_owned(), path: path.to_owned() };
        disk.mount_again()?;
        run("chmod", &["0700"], path)?;
        Ok(disk)
    }

    /// Forbids every change of what is there, also through files that are open; or allows it again.
    pub fn immutable(&self, immutable: bool) -> anyhow::Result<()> {
        run("chattr", &["-R", "-f", if immutable { "+i" } else { "-i" }], &self.path)
    }

    /// What ext4 does when its disk fails: from now on nothing can be written, until it is repaired and mounted anew.
    pub fn fail(&self) -> anyhow::Result<()> {
        run("mount", &["-o", "remount,abort"], &self.path)
    }

    /// Repairs it. Nobody may use it meanwhile.
    pub fn repair(&self) -> anyhow::Result<()> {
        // Whoever was killed a moment ago may hold it a little longer.
        let deadline = Instant::now() + Duration::from_secs(10);
        while let Err(error) = run("umount", &[], &self.path) {
            ensure!(Instant::now() < deadline, "{error:#}");
            std::thread::sleep(Duration::from_millis(50));
        }
        // 1: errors were corrected.
        let status = Command::new("e2fsck").args(["-f", "-y"]).arg(&self.image).output()?.status;
        ensure!(matches!(status.code(), Some(0 | 1)), "e2fsck: {status}");
        self.mount_again()
    }

    fn mount_again(&self) -> anyhow::Result<()> {
        let image = self.image.to_str().context("the path is no text")?;
        run("mount", &["-o", "loop", image], &self.path)
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        let _ = Command::new("chattr").args(["-R", "-f", "-i"]).arg(&self.path).output();
        unmount(&self.path);
    }
}

/// A directory seen through FUSE. Unmounted when dropped.
pub struct FuseMount(PathBuf);

impl FuseMount {
    /// Shows `source` on `path`, with attributes that may be this many seconds old.
    pub fn mount(source: &Path, path: &Path, attribute_seconds: u32) -> anyhow::Result<Self> {
        let options = format!("attr_timeout={attribute_seconds},entry_timeout={attribute_seconds}");
        let source = source.to_str().context("the path is no text")?;
        run("bindfs", &["-o", &options, source], path)?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for FuseMount {
    fn drop(&mut self) {
        unmount(&self.0);
    }
}

/// Whether FUSE can be used here, with bindfs installed when it is missing; else why not.
pub fn fuse() -> Result<(), String> {
    static INSTALLING: Mutex<()> = Mutex::new(());
    let _one = INSTALLING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if !rustix::process::geteuid().is_root() {
        return Err("needs root to mount a FUSE file system".to_owned());
    }
    if !Path::new("/dev/fuse").exists() {
        return Err("this kernel has no /dev/fuse".to_owned());
    }
    let there = || Command::new("bindfs").arg("--version").output().is_ok_and(|output| output.status.success());
    if there() {
        return Ok(());
    }
    let apt = |args: &[&str]| {
        Command::new("apt-get")
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .output()
            .map_err(|error| error.to_string())
    };
    apt(&["update", "-qq"])?;
    let installed = apt(&["install", "-y", "-qq", "--no-install-recommends", "bindfs"])?;
    if there() {
        return Ok(());
    }
    Err(format!(
        "bindfs is missing and apt-get cannot install it: {}",
        String::from_utf8_lossy(&installed.stderr).trim()
    ))
}
