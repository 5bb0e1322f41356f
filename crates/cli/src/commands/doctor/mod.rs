//! `drover doctor`: looks at everything that drover stands on, and says what to do about what is wrong.

mod daemons;
mod machine;
mod scaling;
mod site;

pub(super) use machine::free_memory;

use std::path::PathBuf;

use drover_config::Config;
use drover_service::StateDir;
use serde_json::json;

use crate::app::App;
use crate::args::Doctor;
use crate::codex;
use crate::fault::Exit;
use crate::render::colour::Tone;
use crate::render::table::tame;
use crate::render::words;

/// What one look found.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Check {
    name: &'static str,
    ok: bool,
    /// When it is not in order: drover works all the same, only some launches do not.
    minor: bool,
    detail: String,
    /// What to do; also said of things that are in order but worth knowing about.
    hint: String,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, ok: true, minor: false, detail: detail.into(), hint: String::new() }
    }

    fn wrong(name: &'static str, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { name, ok: false, minor: false, detail: detail.into(), hint: hint.into() }
    }

    /// Not in order, and no reason for `doctor` to fail.
    fn warning(name: &'static str, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { minor: true, ..Self::wrong(name, detail, hint) }
    }

    fn level(&self) -> &'static str {
        match (self.ok, self.minor) {
            (true, _) => "ok",
            (false, true) => "warning",
            (false, false) => "failed",
        }
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// The same check after a repair.
    fn repaired(mut self) -> Self {
        if self.ok {
            self.detail = format!("{} (repaired)", self.detail);
        }
        self
    }
}

pub(super) async fn run(app: &App, args: &Doctor) -> anyhow::Result<Exit> {
    let mut checks = Vec::new();
    let (config_check, config) = machine::config(app.global.config.as_deref());
    let source = config_check.detail.clone();
    checks.push(config_check);
    if let Some(addr) = &app.global.router {
        // That router has its own configuration, and its nodes run elsewhere.
        checks.extend(daemons::remote(&config, addr).await);
    } else {
        checks.extend(here(app, args, &config, &source).await);
        checks.push(machine::cluster(&config, args.cluster.as_deref()));
        checks.extend(site::cluster(&config, args.cluster.as_deref(), args.fix).await);
        checks.extend(agent(&config).await);
        checks.push(machine::memory(config.worker.agent));
    }
    report(app, &checks)
}

/// Everything that lies in the state directory of this host.
async fn here(app: &App, args: &Doctor, config: &Config, source: &str) -> Vec<Check> {
    let path: PathBuf = match StateDir::path_from_env() {
        Ok(path) => path,
        Err(error) => return vec![Check::wrong("state directory", error.to_string(), "set DROVER_STATE_DIR or HOME")],
    };
    let mut state_check = machine::state_dir(&path);
    if !state_check.ok && args.fix && machine::repair_state_dir(&path) {
        state_check = machine::state_dir(&path).repaired();
    }
    let mut checks = vec![state_check, machine::space(&path), machine::file_system(&path), machine::clock(&path)];
    if !machine::is_private(&path) {
        // Opening it would create or change it, which only --fix may do. One that is merely full has daemons to look at.
        checks.push(daemons::ports(config, &[]));
        return checks;
    }
    match StateDir::open(&path) {
        Ok(state) => checks.extend(daemons::local(app, config, source, &state, args.fix).await),
        Err(error) => checks.push(Check::wrong("daemons", error.to_string(), "repair the state directory first")),
    }
    checks
}

/// The agent that launches run when they name none. Without codex everything but such launches works, so a machine
/// without it is told, not failed.
async fn agent(config: &Config) -> Vec<Check> {
    if config.worker.agent != drover_types::AgentKind::Codex {
        let why = format!("not needed: worker.agent is {}", config.worker.agent);
        return vec![Check::ok("codex", why)];
    }
    let bin = match codex::find(&config.worker) {
        Ok(bin) => bin,
        Err(failure) => return vec![Check::warning("codex", failure.message, without_codex(failure.hint))],
    };
    let login = match codex::usable(&config.worker, &bin).await {
        Ok(()) => Check::ok("codex login", "codex runs and has credentials"),
        Err(failure) => Check::warning("codex login", failure.message, without_codex(failure.hint)),
    };
    vec![Check::ok("codex", bin.display().to_string()), login]
}

/// Every advice about codex ends with the way to do without it.
fn without_codex(hint: String) -> String {
    if hint.contains("--agent echo") {
        hint
    } else {
        format!("{hint}; or launch with `--agent echo`, which needs none")
    }
}

fn report(app: &App, checks: &[Check]) -> anyhow::Result<Exit> {
    let count = |level| checks.iter().filter(|check| check.level() == level).count();
    let (failed, warnings) = (count("failed"), count("warning"));
    let ok = failed == 0;
    if app.global.json {
        let checks: Vec<_> = checks
            .iter()
            .map(|check| {
                json!({
                    "name": check.name, "ok": check.ok, "level": check.level(), "detail": check.detail, "hint": check.hint,
                })
            })
            .collect();
        app.screen.out(&json!({"ok": ok, "checks": checks}).to_string())?;
    } else {
        let paint = app.screen.paint();
        for check in checks {
            let mark = match check.level() {
                "ok" => paint.paint(Tone::Good, "ok  "),
                "warning" => paint.paint(Tone::Warn, "warn"),
                _ => paint.paint(Tone::Bad, "FAIL"),
            };
            app.screen.out(&format!("{mark}  {:<16}  {}", check.name, tame(&check.detail)))?;
            if !check.hint.is_empty() {
                app.screen.out(&format!(
                    "{:24}{}",
                    "",
                    paint.paint(Tone::Busy, &format!("-> {}", tame(&check.hint)))
                ))?;
            }
        }
        app.screen.out(&match (failed, warnings) {
            (0, 0) => "everything is in order".to_owned(),
            (0, _) => format!("drover is in order, with {}", words::count(warnings, "warning")),
            _ => format!("{failed} of {} checks failed", checks.len()),
        })?;
    }
    Ok(if ok { Exit::Done } else { Exit::Failed })
}
