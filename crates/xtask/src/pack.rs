//! The tree that is shipped: everything where it will lie below the prefix, so that installing is copying.
//!
//! ```text
//! bin/                              drover and the daemons
//! lib/systemd/{system,user}/        units
//! etc/profile.d/drover.sh
//! share/man/man1/  share/bash-completion/  share/fish/  share/drover/completions/drover.zsh
//! share/drover/{prometheus,grafana}/
//! share/doc/drover/                 README, LICENSE, docs, configs, as they lie in the repository
//! install.sh  sbom.cdx.json  SHA256SUMS
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::sbom;
use crate::shell::{program, root};

/// How the daemons are shipped.
#[derive(Clone, Copy)]
pub(crate) enum Daemons<'a> {
    /// A program each.
    Files(&'a [&'a str]),
    /// Links to the one program that holds them all.
    Links(&'a [&'a str]),
}

/// A tree with its name.
pub(crate) struct Tree {
    /// The one directory that the archive unpacks to.
    pub(crate) name: String,
    /// Where it and its archive are made.
    pub(crate) out: PathBuf,
}

impl Tree {
    pub(crate) fn dir(&self) -> PathBuf {
        self.out.join(&self.name)
    }

    pub(crate) fn archive_name(&self) -> String {
        format!("{}.tar.gz", self.name)
    }

    /// Makes the tree anew out of built programs, and its archive beside it.
    pub(crate) fn pack(&self, built: &Path, daemons: Daemons<'_>, triple: &str) -> anyhow::Result<PathBuf> {
        let dir = self.dir();
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        copy(&built.join("drover"), &dir.join("bin/drover"))?;
        match daemons {
            Daemons::Files(names) => {
                for name in names {
                    copy(&built.join(name), &dir.join("bin").join(name))?;
                }
            }
            Daemons::Links(names) => {
                // Debug information is most of a program that was built for tests.
                program("strip", &["--strip-all"]).arg(dir.join("bin/drover")).run()?;
                for name in names {
                    std::os::unix::fs::symlink("drover", dir.join("bin").join(name))?;
                }
            }
        }
        words_of_the_program(&dir)?;
        let repository = root();
        for (from, to) in [
            ("deploy/systemd/system", "lib/systemd/system"),
            ("deploy/systemd/user", "lib/systemd/user"),
            ("deploy/prometheus", "share/drover/prometheus"),
            ("deploy/grafana", "share/drover/grafana"),
            ("docs", "share/doc/drover/docs"),
            ("configs", "share/doc/drover/configs"),
        ] {
            copy_all(&repository.join(from), &dir.join(to))?;
        }
        for (from, to) in [
            ("deploy/install/install.sh", "install.sh"),
            ("deploy/install/profile.sh", "etc/profile.d/drover.sh"),
            ("LICENSE", "share/doc/drover/LICENSE"),
            ("README.md", "share/doc/drover/README.md"),
        ] {
            copy(&repository.join(from), &dir.join(to))?;
        }
        fs::write(dir.join("sbom.cdx.json"), sbom::of_this(triple)?)?;

        let mut files = Vec::new();
        list(&dir, &dir, &mut files)?;
        files.sort();
        fs::write(dir.join("SHA256SUMS"), program("sha256sum", &files).within(&dir).read()?)?;
        let archive = self.archive_name();
        let owner = ["--owner=0", "--group=0", "--numeric-owner", "--sort=name", "--mode=u+rw,go=rX"];
        // What only a test unpacks need not be small.
        let gzip = if matches!(daemons, Daemons::Links(_)) { "gzip --fast" } else { "gzip --best" };
        program(
            "tar",
            &[&["--create", "--use-compress-program", gzip, "--file", &archive], &owner[..], &[&self.name]].concat(),
        )
        .within(&self.out)
        .run()?;
        sum(&self.out, &archive)?;
        Ok(self.out.join(archive))
    }
}

/// What `drover` writes about itself: completions and manual pages.
fn words_of_the_program(dir: &Path) -> anyhow::Result<()> {
    let drover = dir.join("bin/drover");
    program(&drover, &["manual"]).arg(dir.join("share/man/man1")).run()?;
    for (shell, to) in [
        ("bash", "share/bash-completion/completions/drover"),
        ("fish", "share/fish/vendor_completions.d/drover.fish"),
        ("zsh", "share/drover/completions/drover.zsh"),
    ] {
        let script = program(&drover, &["completions", shell]).read()?;
        let to = dir.join(to);
        fs::create_dir_all(to.parent().unwrap_or(dir))?;
        fs::write(to, script)?;
    }
    Ok(())
}

/// Debian wants manual pages compressed.
pub(crate) fn compress_manuals(dir: &Path) -> anyhow::Result<()> {
    for page in fs::read_dir(dir.join("share/man/man1"))? {
        let page = page?.path();
        if page.extension().is_some_and(|kind| kind == "1") {
            program("gzip", &["--best", "--no-name", "--force", "--keep"]).arg(&page).quiet().run()?;
        }
    }
    Ok(())
}

/// Writes the checksum of a file beside it.
pub(crate) fn sum(dir: &Path, name: &str) -> anyhow::Result<()> {
    let sum = program("sha256sum", &[name]).within(dir).read()?;
    Ok(fs::write(dir.join(format!("{name}.sha256")), sum)?)
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to.parent().unwrap_or(to))?;
    fs::copy(from, to).with_context(|| format!("cannot pack {}", from.display()))?;
    Ok(())
}

/// A folder with all that is in it.
fn copy_all(from: &Path, to: &Path) -> anyhow::Result<()> {
    for entry in fs::read_dir(from).with_context(|| format!("cannot pack {}", from.display()))? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() { copy_all(&entry.path(), &to)? } else { copy(&entry.path(), &to)? }
    }
    Ok(())
}

/// Every file below a folder, as `sha256sum` is to name it. Links have no content of their own.
fn list(root: &Path, dir: &Path, files: &mut Vec<String>) -> anyhow::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            list(root, &entry.path(), files)?;
        } else if kind.is_file() {
            let path = entry.path();
            let name = path.strip_prefix(root).context("a file outside of its own tree")?;
            files.push(name.to_str().context("a file name that is no text")?.to_owned());
        }
    }
    Ok(())
}
