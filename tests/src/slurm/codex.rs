//! The real Codex CLI on a laboratory's compute hosts, with a model that is played on its login host.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::Context as _;
use drover_testkit::lab::USER;
use drover_testkit::mock_responses::{MockResponses, codex_config};

use super::Site;

/// Where compute hosts find the program.
pub fn program() -> String {
    format!("/home/{USER}/tools/codex")
}

/// And its settings.
pub fn settings() -> String {
    format!("/home/{USER}/settings")
}

/// Puts codex and its settings on the shared file system, as its user would have done, and plays its model on the login host, which
/// compute hosts reach and the laptop does not.
pub fn install(site: &Site, codex: &Path) -> anyhow::Result<MockResponses> {
    let home = site.lab.home()?;
    fs::create_dir(home.join("tools"))?;
    for program in fs::read_dir(codex.parent().context("codex lies nowhere")?)?.flatten() {
        let to = home.join("tools").join(program.file_name());
        if fs::hard_link(program.path(), &to).is_err() {
            fs::copy(program.path(), to)?;
        }
    }
    play_model(site)
}

/// Plays the model on the login host, and leaves the settings of codex that lead to it.
pub fn play_model(site: &Site) -> anyhow::Result<MockResponses> {
    let home = site.lab.home()?;
    let login = site.lab.network("login");
    let mock = login.within(|| MockResponses::start_on(SocketAddr::from((login.addr, 0)), None))??;
    fs::create_dir(home.join("settings"))?;
    fs::write(home.join("settings/config.toml"), codex_config(&mock.base_url(), "mock-model"))?;
    Ok(mock)
}
