//! Dispatching as it is configured: providers, their keys, limits, the day's money, who searches. No key is shown, and nobody is
//! called.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use drover_config::{Config, Env, NodeScalingConfig, ProviderSettings};
use drover_dispatcher::search::{SearchSettings, backend};
use drover_dispatcher::setup::{self, KeyFound};
use drover_dispatcher::{Configured, key_dir};
use drover_proto::dispatch as pb;
use drover_service::{StateDir, address_book};
use jiff::Timestamp;

use super::Check;
use crate::daemons::DISPATCHER;
use crate::dispatcher::{rpc, usd};

const DISPATCHING: &str = "dispatching";
const KEY: &str = "provider key";
const MODEL: &str = "provider model";
const BUDGET: &str = "budget";
const SEARCH: &str = "search";
const KEY_FILES: &str = "key files";
const AUTHORITIES: &str = "certificate authorities";

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

pub(super) async fn checks(config: &Config, source: &str, state: &StateDir, fix: bool) -> Vec<Check> {
    let env = Env::of_process();
    let configured = match Configured::of(config, Some(Path::new(source)), &env) {
        Ok(configured) => configured,
        Err(error) => {
            return vec![Check::wrong(DISPATCHING, error.to_string(), "correct the file, or: drover setup --force")];
        }
    };
    let keys = key_dir(&env);
    let mut checks = vec![dispatching(&configured)];
    checks.extend(keys.as_deref().and_then(|dir| key_files(dir, fix)));
    let scaling = &configured.scaling;
    if !scaling.enabled || configured.source.is_none() {
        return checks;
    }
    let running = address_book::read(state, DISPATCHER).is_some();
    let providers = std::iter::once(&scaling.provider).chain(&scaling.fallback).chain(&scaling.coordinator);
    for provider in providers.clone() {
        checks.push(key(provider, keys.as_deref(), fix, running));
        checks.push(model(provider, &configured));
    }
    checks.extend(authorities(providers, drover_service::web::has_authorities()));
    checks.push(budget(scaling, state).await);
    checks.push(search(scaling, keys.as_deref()));
    checks
}

/// Where the configuration came from, and the limits in it.
fn dispatching(configured: &Configured) -> Check {
    let Configured { scaling, source, .. } = configured;
    let Some(source) = source else {
        return Check::ok(DISPATCHING, "none is configured: answers are simulated").hint("drover setup sets one up");
    };
    if !scaling.enabled {
        return Check::ok(DISPATCHING, format!("{source}: node_scaling.enabled is false, so nothing is dispatched"));
    }
    let limits = &scaling.limits;
    let mut said = format!("{source}: {} nodes, {} calls at once", limits.max_nodes, limits.max_concurrent_api);
    for (limit, what) in
        [(limits.requests_per_minute.map(u64::from), "calls a minute"), (limits.tokens_per_minute, "tokens a minute")]
    {
        if let Some(limit) = limit {
            let _ = write!(said, ", {limit} {what}");
        }
    }
    let check = Check::ok(DISPATCHING, said);
    if limits.max_concurrent_api > limits.max_nodes {
        return check.hint(format!(
            "no more than node_scaling.limits.max_nodes ({}) are ever under way, whatever max_concurrent_api says",
            limits.max_nodes
        ));
    }
    check
}

fn key(provider: &ProviderSettings, keys: Option<&Path>, fix: bool, running: bool) -> Check {
    let name = &provider.name;
    let look = || setup::find_key(provider, keys, variable);
    let mut found = look();
    let mut repaired = false;
    if let (Err(drover_dispatcher::provider::KeyError::TooOpen { path, .. }), true) = (&found, fix) {
        repaired = close(path);
        found = look();
    }
    match found {
        Ok(KeyFound::NotNeeded) => Check::ok(KEY, format!("{name}: none is needed")),
        Ok(found) => {
            let check = Check::ok(KEY, format!("{name}: {found}"));
            if repaired { check.repaired() } else { check }
        }
        // What the one that runs has is told with what it asks.
        Err(drover_dispatcher::provider::KeyError::Missing { .. }) if running => Check::ok(
            KEY,
            format!("{name}: not in this environment; the dispatcher that runs has what it was started with"),
        ),
        Err(error @ drover_dispatcher::provider::KeyError::Missing { .. }) => {
            let page = setup::key_page(name);
            let page = if page.is_empty() { String::new() } else { format!("make one at {page}; ") };
            let hint =
                format!("{page}drover setup --provider {name} --key-stdin < FILE, or try without: --provider sim");
            Check::warning(KEY, format!("{name} has no key here: {error}"), hint)
        }
        Err(error) => {
            Check::wrong(KEY, format!("{name}: {error}"), "drover doctor --fix closes a file that is too open")
        }
    }
}

/// Says that providers cannot be reached by HTTPS, when that is so.
fn authorities<'a>(mut providers: impl Iterator<Item = &'a ProviderSettings>, found: bool) -> Option<Check> {
    let by_https = |provider: &ProviderSettings| match &provider.base_url {
        Some(url) => url.starts_with("https:"),
        None => provider.name != "sim",
    };
    let wanted = providers.any(by_https);
    (wanted && !found).then(|| {
        let said = "this machine has none: HTTPS to providers is not possible";
        Check::warning(AUTHORITIES, said, drover_service::web::NO_AUTHORITIES)
    })
}

fn close(path: &Path) -> bool {
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).is_ok()
}

/// Key files that others can read, whoever they are for.
fn key_files(dir: &Path, fix: bool) -> Option<Check> {
    let entries = fs::read_dir(dir).ok()?;
    let of_keys = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.ends_with("-key.txt")));
    let mut files: Vec<PathBuf> = of_keys.collect();
    files.sort();
    if files.is_empty() {
        return None;
    }
    let open = |path: &&PathBuf| fs::metadata(path).is_ok_and(|file| file.permissions().mode() & 0o077 != 0);
    let too_open: Vec<&PathBuf> = files.iter().filter(open).collect();
    let count = files.len();
    let all = format!("{count} in {}, for their owner only", dir.display());
    if too_open.is_empty() {
        return Some(Check::ok(KEY_FILES, all));
    }
    if fix && too_open.iter().all(|path| close(path)) {
        return Some(Check::ok(KEY_FILES, all).repaired().hint("others may have read them: take new keys"));
    }
    let named: Vec<String> = too_open.iter().map(|path| path.display().to_string()).collect();
    let hint =
        format!("chmod 600 {}, or drover doctor --fix; take new keys if others may have read them", named.join(" "));
    Some(Check::wrong(KEY_FILES, format!("others can read {}", named.join(", ")), hint))
}

fn model(provider: &ProviderSettings, configured: &Configured) -> Check {
    let name = provider.model.as_deref().unwrap_or(&provider.name);
    let said = format!("{} {name}", provider.name);
    let today = Timestamp::now().to_string();
    if let Some(day) = setup::retired(&provider.name, name).filter(|day| *day <= today) {
        let hint = "drover setup --list shows models that are offered; set node_scaling.provider.model";
        return Check::warning(MODEL, format!("{said} was to be switched off by its provider on {day}"), hint);
    }
    match setup::price(&configured.pricing, &provider.name, name) {
        Some(price) => {
            let usd = |pico: u64| pico as f64 / 1e6;
            Check::ok(
                MODEL,
                format!("{said}: {} USD per million tokens in, {} out", usd(price.input), usd(price.output)),
            )
        }
        None if configured.scaling.cost.max_daily_spend.is_some() && !configured.scaling.cost.allow_unknown_prices => {
            let hint =
                "add it to model_pricing, or set node_scaling.cost.allow_unknown_prices: no cap holds for it then";
            Check::warning(
                MODEL,
                format!("{said}: its price is not known, so its tasks are refused under the cap"),
                hint,
            )
        }
        None => Check::ok(MODEL, format!("{said}: its price is not known")).hint("model_pricing sets one"),
    }
}

async fn budget(scaling: &NodeScalingConfig, state: &StateDir) -> Check {
    let cost = &scaling.cost;
    let zone = cost.timezone.as_deref().unwrap_or("UTC");
    let Some(cap) = cost.max_daily_spend else {
        return Check::ok(BUDGET, "no cap on a day's spending").hint("node_scaling.cost.max_daily_spend sets one");
    };
    let mut said = format!("at most {cap} USD a day ({zone}), a warning at {:.0} %", cost.warn_at * 100.0);
    if address_book::read(state, DISPATCHER).is_some()
        && let Ok(spend) = rpc(state).get_spend(pb::GetSpendRequest { days: 1 }).await
    {
        let spend = spend.into_inner();
        let counted = usd(spend.counted_pico_usd);
        let _ = write!(said, "; {counted:.6} USD count today");
        if spend.cap_pico_usd.is_some_and(|cap| spend.counted_pico_usd >= cap) {
            let hint = "raise node_scaling.cost.max_daily_spend and restart the dispatcher (drover down), or wait for tomorrow";
            return Check::warning(BUDGET, said, hint);
        }
    }
    Check::ok(BUDGET, said)
}

fn search(scaling: &NodeScalingConfig, keys: Option<&Path>) -> Check {
    let engine = scaling.search.backend.as_str();
    if engine == "off" {
        return Check::ok(SEARCH, "off: research answers from the model alone, and says so")
            .hint("node_scaling.search.backend: searxng (needs no key), brave, tavily or gemini");
    }
    match SearchSettings::with_keys_in(keys, scaling, variable).and_then(|settings| backend(&settings)) {
        Ok(backend) if backend.worst_case_pico_usd().is_none() && engine != "gemini" => Check::ok(SEARCH, engine)
            .hint("node_scaling.search.price says what a search costs; under a cap it must be known"),
        Ok(_) => Check::ok(SEARCH, engine),
        Err(error) => Check::warning(
            SEARCH,
            error.to_string(),
            "set it right, or switch it off: node_scaling.search.backend: off",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_files_that_others_can_read_are_found_and_closed() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(key_files(dir.path(), false), None);
        let file = dir.path().join("gemini-key.txt");
        fs::write(&file, "k-e-y\n").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
        let open = key_files(dir.path(), false).unwrap();
        assert!(!open.ok && open.hint.contains("chmod 600") && !open.detail.contains("k-e-y"), "{open:?}");
        let provider =
            ProviderSettings { name: "gemini".into(), model: Some("m".into()), ..ProviderSettings::default() };
        let wrong = key(&provider, Some(dir.path()), false, false);
        assert!(
            variable("GEMINI_API_KEY").is_some() || (!wrong.ok && wrong.detail.contains("read by others")),
            "{wrong:?}"
        );
        assert!(key_files(dir.path(), true).unwrap().ok);
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(key(&provider, Some(dir.path()), false, false).ok);
    }

    #[test]
    fn a_machine_without_authorities_is_told_of_what_needs_them() {
        let of = |name: &str, url: Option<&str>, found| {
            let base_url = url.map(str::to_owned);
            let provider = ProviderSettings { name: name.into(), base_url, ..ProviderSettings::default() };
            authorities([&provider].into_iter(), found)
        };
        assert!(of("gemini", None, false).unwrap().hint.contains("ca-certificates"));
        assert!(of("gemini", None, true).is_none() && of("sim", None, false).is_none());
        assert!(of("own", Some("http://127.0.0.1:1"), false).is_none());
        assert!(of("own", Some("https://models.test"), false).is_some());
    }

    #[test]
    fn a_model_that_is_gone_or_has_no_price_is_told() {
        let configured = |cap: Option<f64>| {
            let mut scaling = NodeScalingConfig::default();
            scaling.cost.max_daily_spend = cap;
            Configured { scaling, pricing: std::collections::BTreeMap::new(), source: Some("x".into()) }
        };
        let of = |name: &str, cap| {
            let provider =
                ProviderSettings { name: "gemini".into(), model: Some(name.into()), ..ProviderSettings::default() };
            model(&provider, &configured(cap))
        };
        assert!(of("gemini-2.0-flash", None).detail.contains("2026-06-01"));
        assert!(of("gemini-2.5-flash", Some(1.0)).ok);
        assert!(of("gemini-17", None).ok && !of("gemini-17", Some(1.0)).ok);
    }
}
