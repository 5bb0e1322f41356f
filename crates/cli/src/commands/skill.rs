//! `drover skill`: what agents are told about drover, where agents look for such things.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::app::App;
use crate::args::{Skill, SkillAction};
use crate::fault::{Exit, Fault};

/// The skill, as it ships with this very program.
const TEXT: &str = include_str!("../../../../deploy/skills/drover/SKILL.md");
/// Its directory below that of an agent's skills.
const NAME: &str = "drover";

pub(super) fn run(app: &App, args: &Skill) -> anyhow::Result<Exit> {
    match &args.action {
        SkillAction::Show => {
            app.screen.out(TEXT.trim_end())?;
            Ok(Exit::Done)
        }
        SkillAction::Install(install) => {
            let directories = match &install.to {
                Some(to) => vec![std::path::absolute(to)?],
                None => found(|name| std::env::var_os(name).map(PathBuf::from)),
            };
            if directories.is_empty() {
                return Err(Fault::failed(
                    "no agent is set up here: there is no ~/clawd, ~/.clawdbot, ~/.openclaw or ~/.codex",
                )
                .hint("name the directory of the agent's skills: drover skill install --to DIR")
                .into());
            }
            let mut written = Vec::new();
            for directory in &directories {
                written.push(install_in(directory).map_err(|error| {
                    Fault::failed(format!("cannot write the skill below {}: {error}", directory.display()))
                        .hint("name another directory with --to DIR")
                })?);
            }
            tell(app, &written)?;
            Ok(Exit::Done)
        }
    }
}

/// Directories of skills of the agents that are set up here.
fn found(variable: impl Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    let home = variable("HOME");
    let below = |name: &str| home.as_ref().map(|home| home.join(name));
    let homes = [
        variable("CLAWDBOT_HOME").or_else(|| below("clawd")),
        below(".clawdbot"),
        variable("OPENCLAW_HOME").or_else(|| below(".openclaw")),
        variable("CODEX_HOME").or_else(|| below(".codex")),
    ];
    let mut found: Vec<PathBuf> =
        homes.into_iter().flatten().filter(|home| home.is_dir()).map(|home| home.join("skills")).collect();
    found.dedup();
    found
}

/// Writes the skill, whole or not at all; gives where.
fn install_in(directory: &Path) -> std::io::Result<PathBuf> {
    let own = directory.join(NAME);
    fs::create_dir_all(&own)?;
    let mut file = tempfile::NamedTempFile::new_in(&own)?;
    file.write_all(TEXT.as_bytes())?;
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    file.as_file().set_permissions(readable)?;
    let path = own.join("SKILL.md");
    file.persist(&path).map_err(|error| error.error)?;
    Ok(path)
}

fn tell(app: &App, written: &[PathBuf]) -> std::io::Result<()> {
    if app.global.json {
        return app.screen.out(&json!({"skill": NAME, "written": written}).to_string());
    }
    for path in written {
        app.screen.out(&path.display().to_string())?;
    }
    app.screen.note("the agent finds it at its next start; `drover setup` gives it a provider to work with");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_where_agents_are_and_replaces_an_older_one() {
        let home = tempfile::tempdir().unwrap();
        let variable = |name: &str| (name == "HOME").then(|| home.path().to_owned());
        assert!(found(variable).is_empty());
        for name in [".codex", "clawd"] {
            fs::create_dir(home.path().join(name)).unwrap();
        }
        let directories = found(variable);
        assert_eq!(directories, [home.path().join("clawd/skills"), home.path().join(".codex/skills")]);
        let path = install_in(&directories[0]).unwrap();
        fs::write(&path, "older").unwrap();
        assert_eq!(install_in(&directories[0]).unwrap(), path);
        assert_eq!(fs::read_to_string(&path).unwrap(), TEXT);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing else is left there");
    }

    #[test]
    fn the_skill_begins_as_agents_expect() {
        let head = TEXT.strip_prefix("---\n").and_then(|rest| rest.split_once("\n---\n")).unwrap().0;
        assert!(head.lines().any(|line| line == "name: drover"), "{head}");
        let described = head.lines().find_map(|line| line.strip_prefix("description: ")).unwrap();
        assert!((60..1024).contains(&described.len()), "{}", described.len());
    }
}
