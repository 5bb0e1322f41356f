//! Checks before a node is said to be up that codex can do anything at all.

use std::path::Path;
use std::time::Duration;

use drover_types::{ErrorCode, Failure};
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::time::{Instant, timeout, timeout_at};

use super::binary::TESTED_VERSION;
use super::process::{Output, Process};
use super::rpc::{self, Message};
use super::{CodexSettings, PoolDoor, home};

/// How long each question may take; a cold start from a network file system is slow.
const LIMIT: Duration = Duration::from_secs(30);

/// Whether codex runs, and whether it has what the configured model provider wants: a login, or a key.
pub async fn preflight(settings: &CodexSettings) -> Result<(), Failure> {
    let version = version(settings).await?;
    if !version.contains(TESTED_VERSION) {
        tracing::warn!(version, tested = TESTED_VERSION, "this version of codex was not tested with drover");
    }
    let broken = |what: String| {
        Failure::new(ErrorCode::CodexMissing, format!("{} is no usable codex: {what}", settings.bin.display()))
            .hint(format!("see {}", settings.node_dir.join("codex.stderr.log").display()))
    };
    std::fs::create_dir_all(&settings.node_dir).and_then(|()| home::prepare(settings)).map_err(|error| {
        Failure::new(ErrorCode::StoreUnavailable, format!("cannot set up codex's home: {error}"))
            .hint(format!("check that {} can be written", settings.node_dir.display()))
    })?;
    let mut process = Process::spawn(settings).map_err(|error| broken(error.to_string()))?;
    let client = json!({"clientInfo": {"name": "drover-worker", "title": "drover", "version": drover_types::VERSION}});
    ask(&mut process, 1, "initialize", &client).await.map_err(&broken)?;
    process.send(&rpc::notification("initialized"));
    let account = ask(&mut process, 2, "account/read", &json!({})).await.map_err(&broken)?;
    let config = ask(&mut process, 3, "config/read", &json!({})).await.map_err(&broken)?;
    process.end(false);
    while let Output::Message(_) = process.next().await {}

    let allowed = |name: &str| {
        let named = settings.env_allow.iter().any(|allow| allow == name) && std::env::var_os(name).is_some();
        named || (settings.pool.is_some() && name == PoolDoor::VARIABLE)
    };
    credentials(&account, &config["config"], settings.home_source.as_deref(), allowed)
}

/// Judges what codex says about its own account and settings.
fn credentials(
    account: &Value,
    config: &Value,
    source: Option<&Path>,
    is_set: impl Fn(&str) -> bool,
) -> Result<(), Failure> {
    let provider = config["model_provider"].as_str().unwrap_or("openai");
    if let Some(key) = config["model_providers"][provider]["env_key"].as_str()
        && !is_set(key)
    {
        let message = format!("the model provider {provider} wants a key in {key}, which codex does not get");
        return Err(Failure::new(ErrorCode::CodexNotLoggedIn, message)
            .hint(format!("set {key} where the worker runs, and name it in worker.agent_env")));
    }
    if account["requiresOpenaiAuth"] == true && account["account"].is_null() {
        let home = source.map_or_else(|| "~/.codex".to_owned(), |path| path.display().to_string());
        return Err(Failure::new(ErrorCode::CodexNotLoggedIn, format!("codex has no credentials in {home}")).hint(
            "run `codex login` (or `codex login --with-api-key`) as this user, or configure a model provider with a key \
             in codex's config.toml, or launch with `--agent echo`",
        ));
    }
    Ok(())
}

async fn version(settings: &CodexSettings) -> Result<String, Failure> {
    let failure = |what: String| {
        Failure::new(ErrorCode::CodexMissing, format!("cannot run {}: {what}", settings.bin.display()))
            .hint("set worker.codex_bin to the native codex binary, or launch with `--agent echo`")
    };
    let mut command = Command::new(&settings.bin);
    command.arg("--version").env_clear().envs(home::environment(settings)).kill_on_drop(true);
    let output = match timeout(LIMIT, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => return Err(failure(error.to_string())),
        Err(_) => return Err(failure(format!("no answer within {} s", LIMIT.as_secs()))),
    };
    if !output.status.success() {
        return Err(failure(output.status.to_string()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

async fn ask(process: &mut Process, id: u64, method: &str, params: &Value) -> Result<Value, String> {
    process.send(&rpc::request(id, method, params));
    let until = Instant::now() + LIMIT;
    loop {
        match timeout_at(until, process.next()).await {
            Ok(Output::Message(Message::Response { id: answered, result })) if answered == id => {
                return result.map_err(|error| format!("{method}: {error}"));
            }
            Ok(Output::Message(_)) => {}
            Ok(Output::Exited(reason)) => return Err(format!("it ended: {reason}")),
            Err(_) => return Err(format!("no answer to {method} within {} s", LIMIT.as_secs())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_or_a_login_is_wanted_by_name() {
        let config = json!({"model_provider": "mine", "model_providers": {"mine": {"env_key": "MY_KEY"}}});
        let none = json!({"account": null, "requiresOpenaiAuth": false});
        let failure = credentials(&none, &config, None, |_| false).unwrap_err();
        assert_eq!(failure.code, ErrorCode::CodexNotLoggedIn);
        assert!(failure.hint.contains("MY_KEY") && failure.hint.contains("worker.agent_env"), "{}", failure.hint);
        assert_eq!(credentials(&none, &config, None, |key| key == "MY_KEY"), Ok(()));

        let wanted = json!({"account": null, "requiresOpenaiAuth": true});
        let failure = credentials(&wanted, &json!({}), Some(Path::new("/home/x/.codex")), |_| true).unwrap_err();
        assert!(failure.message.contains("/home/x/.codex") && failure.hint.contains("codex login"), "{failure}");
        let known = json!({"account": {"type": "apiKey"}, "requiresOpenaiAuth": true});
        assert_eq!(credentials(&known, &json!({}), None, |_| false), Ok(()));
    }
}
