//! Puts in place what a worker expects to find: its directories, and the bundle of the launch.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use drover_mailbox::Mailbox;
use drover_types::{NodeIndex, SwarmId};

use super::launcher::Launcher;
use crate::files::make_dir;
use crate::spec::{Bundle, Spec};

/// Makes the working directory, the mailbox and the bundle of every node. The bundle is synced, since nobody could write it
/// once more after a crash; the directories are made again where they are missed.
pub(super) fn prepare_nodes(launcher: &Launcher, swarm: &SwarmId, spec: &Spec) -> io::Result<()> {
    for node in (0..spec.node_count).map(NodeIndex) {
        make_dir(&launcher.node_dir(swarm, node))?;
    }
    prepare_mailbox(launcher.mailbox(), swarm, spec.node_count, &spec.bundle)
}

/// Makes the mailbox and the bundle of every node. An inbox is there before its worker, so that a prompt can be delivered
/// to a node that is still starting.
pub(crate) fn prepare_mailbox(mailbox: &Mailbox, swarm: &SwarmId, nodes: u32, bundle: &Bundle) -> io::Result<()> {
    for node in (0..nodes).map(NodeIndex) {
        let dir = mailbox.node_dir(swarm, node);
        for part in ["outbox", "journal"] {
            make_dir(&dir.join(part))?;
        }
        make_dir(&mailbox.inbox_dir(swarm, node))?;
        write_bundle(&mailbox.bundle_dir(swarm, node), bundle)?;
    }
    Ok(())
}

/// The bundle has the shape of the working directory that it is copied over: `AGENTS.md` and `.agents/skills/…`.
fn write_bundle(dir: &Path, bundle: &Bundle) -> io::Result<()> {
    // What an earlier, interrupted launch of the same swarm left must not mix with this one.
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => make_dir(dir)?,
    }
    if !bundle.agents_md.is_empty() {
        write_file(&dir.join("AGENTS.md"), &bundle.agents_md)?;
    }
    for skill in &bundle.skills {
        let path = dir.join(".agents/skills").join(&skill.path);
        if let Some(parent) = path.parent() {
            make_dir(parent)?;
        }
        write_file(&path, &skill.content)?;
    }
    sync_dirs(dir)
}

fn write_file(path: &Path, content: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(path)?;
    file.write_all(content.as_bytes())?;
    file.sync_all()
}

fn sync_dirs(dir: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_dirs(&entry.path())?;
        }
    }
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Skill;
    use std::fs;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn a_repeated_launch_leaves_only_its_own_bundle_and_all_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let mailbox = Mailbox::new(dir.path().join("mailbox"));
        let swarm: SwarmId = "s".parse().unwrap();
        let skill = |path: &str| Skill { path: path.into(), content: "how".into() };
        let mut bundle = Bundle { agents_md: "rules".into(), skills: vec![skill("old/SKILL.md")] };
        prepare_mailbox(&mailbox, &swarm, 2, &bundle).unwrap();
        bundle.skills = vec![skill("fmt/SKILL.md"), skill("fmt/deep/x.txt")];
        prepare_mailbox(&mailbox, &swarm, 2, &bundle).unwrap();
        for node in [NodeIndex(0), NodeIndex(1)] {
            let bundle = mailbox.bundle_dir(&swarm, node);
            assert_eq!(fs::read_to_string(bundle.join("AGENTS.md")).unwrap(), "rules");
            assert_eq!(fs::read_to_string(bundle.join(".agents/skills/fmt/deep/x.txt")).unwrap(), "how");
            assert!(!bundle.join(".agents/skills/old").exists());
            assert!(mailbox.inbox_dir(&swarm, node).is_dir());
            assert_eq!(fs::metadata(bundle.join("AGENTS.md")).unwrap().mode() & 0o777, 0o600);
            assert_eq!(fs::metadata(&bundle).unwrap().mode() & 0o777, 0o700);
        }
        assert_eq!(fs::metadata(mailbox.root()).unwrap().mode() & 0o777, 0o700);
    }
}
