//! AGENTS.md and skills for the nodes of a swarm, read from where the person keeps them.

use std::fs;
use std::path::{Component, Path};

use drover_proto::common::SkillFile;

use crate::fault::Fault;

/// What goes with a launch.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Bundle {
    pub(crate) agents_md: String,
    pub(crate) skills: Vec<SkillFile>,
}

/// More than this is no set of instructions any more, and every node would get it.
const MOST_BYTES: u64 = 8 << 20;
const MOST_FILES: usize = 2000;
/// Where a directory may keep its skills.
const SKILL_DIRS: [&str; 2] = [".agents/skills", "skills"];

/// Reads a file, or a directory with AGENTS.md and skills.
pub(crate) fn read(path: &Path) -> Result<Bundle, Fault> {
    let meta = fs::metadata(path).map_err(|error| cannot(path, &error.to_string()))?;
    let mut budget = Budget { bytes: MOST_BYTES, files: MOST_FILES };
    if !meta.is_dir() {
        return Ok(Bundle { agents_md: budget.text(path)?, skills: Vec::new() });
    }
    let mut bundle = Bundle::default();
    let agents_md = path.join("AGENTS.md");
    if agents_md.exists() {
        bundle.agents_md = budget.text(&agents_md)?;
    }
    for dir in SKILL_DIRS {
        let root = path.join(dir);
        if root.is_dir() {
            budget.collect(&root, &root, &mut bundle.skills)?;
        }
    }
    bundle.skills.sort_by(|a, b| a.path.cmp(&b.path));
    if let Some(pair) = bundle.skills.windows(2).find(|pair| pair[0].path == pair[1].path) {
        return Err(cannot(path, &format!("skill file {} is there twice", pair[0].path)));
    }
    if bundle == Bundle::default() {
        return Err(Fault::failed(format!("{} has neither AGENTS.md nor skills", path.display()))
            .hint(format!("give a file, or a directory with AGENTS.md and {}/<name>/SKILL.md", SKILL_DIRS[1])));
    }
    Ok(bundle)
}

fn cannot(path: &Path, why: &str) -> Fault {
    Fault::failed(format!("cannot read {} for --agents-md: {why}", path.display()))
        .hint("give a readable file of UTF-8 text, or a directory with AGENTS.md and skills")
}

struct Budget {
    bytes: u64,
    files: usize,
}

impl Budget {
    fn text(&mut self, path: &Path) -> Result<String, Fault> {
        let length = fs::metadata(path).map_err(|error| cannot(path, &error.to_string()))?.len();
        self.bytes = self
            .bytes
            .checked_sub(length)
            .ok_or_else(|| cannot(path, &format!("with it the bundle is larger than {} MiB", MOST_BYTES >> 20)))?;
        self.files = self
            .files
            .checked_sub(1)
            .ok_or_else(|| cannot(path, &format!("the bundle has more than {MOST_FILES} files")))?;
        let bytes = fs::read(path).map_err(|error| cannot(path, &error.to_string()))?;
        String::from_utf8(bytes).map_err(|_| cannot(path, "it is not UTF-8 text"))
    }

    fn collect(&mut self, root: &Path, dir: &Path, skills: &mut Vec<SkillFile>) -> Result<(), Fault> {
        let entries = fs::read_dir(dir).map_err(|error| cannot(dir, &error.to_string()))?;
        for entry in entries {
            let entry = entry.map_err(|error| cannot(dir, &error.to_string()))?;
            let path = entry.path();
            let kind = entry.file_type().map_err(|error| cannot(&path, &error.to_string()))?;
            if entry.file_name().to_string_lossy().starts_with('.') {
                continue;
            }
            if kind.is_dir() {
                self.collect(root, &path, skills)?;
            } else if kind.is_file() {
                skills.push(SkillFile { path: relative(root, &path)?, content: self.text(&path)? });
            } else {
                // A link could lead anywhere, into a home directory or around in a circle.
                return Err(cannot(&path, "it is neither a file nor a directory; put a copy in its place"));
            }
        }
        Ok(())
    }
}

fn relative(root: &Path, path: &Path) -> Result<String, Fault> {
    let inside = path.strip_prefix(root).map_err(|_| cannot(path, "it lies outside"))?;
    let parts: Option<Vec<&str>> = inside
        .components()
        .map(|part| match part {
            Component::Normal(name) => name.to_str(),
            _ => None,
        })
        .collect();
    parts.map(|parts| parts.join("/")).ok_or_else(|| cannot(path, "its name is not UTF-8 text"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_gives_its_rules_and_skills() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &[u8]| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let empty = read(dir.path()).unwrap_err();
        assert!(empty.message.contains("neither AGENTS.md nor skills"), "{empty:?}");

        write("AGENTS.md", b"be brief");
        write("skills/fmt/SKILL.md", b"format");
        write(".agents/skills/test/run/SKILL.md", b"test");
        write("skills/.git/config", b"\xff");
        let bundle = read(dir.path()).unwrap();
        assert_eq!(bundle.agents_md, "be brief");
        let paths: Vec<&str> = bundle.skills.iter().map(|skill| skill.path.as_str()).collect();
        assert_eq!(paths, ["fmt/SKILL.md", "test/run/SKILL.md"]);
        assert_eq!(read(&dir.path().join("AGENTS.md")).unwrap().agents_md, "be brief");

        write(".agents/skills/fmt/SKILL.md", b"again");
        assert!(read(dir.path()).unwrap_err().message.contains("fmt/SKILL.md is there twice"));
        fs::remove_dir_all(dir.path().join(".agents")).unwrap();
        write("skills/bin/x", b"\xff\xfe");
        assert!(read(dir.path()).unwrap_err().message.contains("not UTF-8"));
        fs::remove_dir_all(dir.path().join("skills/bin")).unwrap();
        std::os::unix::fs::symlink("/etc", dir.path().join("skills/etc")).unwrap();
        assert!(read(dir.path()).unwrap_err().message.contains("put a copy in its place"));
    }

    #[test]
    fn too_much_is_refused_before_it_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("AGENTS.md");
        fs::File::create(&path).unwrap().set_len(MOST_BYTES + 1).unwrap();
        assert!(read(&path).unwrap_err().message.contains("larger than 8 MiB"));
    }
}
