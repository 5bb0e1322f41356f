//! What somebody needs to know who sets dispatching up: which providers there are, where their keys come from, whether a key is
//! there and works, and how many workers this machine is good for. Nothing in here is written anywhere but what a call cost.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use drover_config::{ModelPricing, ProviderSettings};
use thiserror::Error;

use crate::call::{CallError, CallRequest, FailureKind, Finish, NoSink, Provider, Usage};
use crate::core::{Money, Price};
use crate::ledger::{Charge, LedgerError, Outside, Zone};
use crate::provider::{
    self, EndpointError, HttpClient, HttpSettings, KeyError, KeySource, Prices, ProviderKind, Secret, Sim, SimSettings,
    read_key_file,
};
use crate::settings::{endpoint_of, price_of};

/// A worker takes about so much memory while its page or its answer is held.
const PER_WORKER: u64 = 100 << 20;
/// More workers than this want a measurement first.
const MOST_WORKERS: u64 = 50;
/// What is asked to see whether a key works, and the most that is answered.
const QUESTION: &str = "Answer with the one word: ready";
const MOST_TOKENS: u32 = 64;
/// How long that may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A provider that can be chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Its name in the configuration.
    pub name: &'static str,
    /// What speaks for it.
    pub about: &'static str,
    /// Where a person gets a key; empty when none is needed.
    pub key_page: &'static str,
    /// The variable that the key is looked for in.
    pub key_variable: Option<&'static str>,
    /// The cheapest model of the table that is not known to be switched off; `None` when there is none.
    pub model: Option<String>,
    /// Its price, in pico-USD a token.
    pub price: Option<Price>,
}

/// Where a person gets a key of a provider; empty for one that is not known here, or that needs none.
pub fn key_page(name: &str) -> &'static str {
    match name {
        "gemini" => "https://aistudio.google.com/apikey",
        "groq" => "https://console.groq.com/keys",
        "openai" => "https://platform.openai.com/api-keys",
        "anthropic" => "https://console.anthropic.com/settings/keys",
        _ => "",
    }
}

/// All that can be chosen by name, and the day of the prices. `today` is as `2026-11-21`.
pub fn offers(today: &str) -> (Vec<Offer>, String) {
    let table = Prices::built_in().unwrap_or_else(|_| Prices::none());
    let about = [
        ("gemini", "cheapest, recommended"),
        ("groq", "free tier, fastest"),
        ("openai", "good quality"),
        ("anthropic", "reliable"),
        ("sim", "built in, offline: only pretends to answer, costs nothing"),
    ];
    let offers = about.into_iter().map(|(name, about)| {
        let found = suggested(&table, name, today);
        let model = if name == "sim" { Some("sim".to_owned()) } else { found.as_ref().map(|(model, _)| model.clone()) };
        Offer {
            name,
            about,
            key_page: key_page(name),
            key_variable: ProviderKind::from_name(name).key_variable(),
            model,
            price: if name == "sim" { Some(Price::default()) } else { found.map(|(_, price)| price) },
        }
    });
    (offers.collect(), table.date.clone())
}

/// The cheapest model of a provider that was not to be switched off by that day.
fn suggested(table: &Prices, provider: &str, today: &str) -> Option<(String, Price)> {
    let alive = table.of_provider(provider).filter(|(_, listed)| {
        listed.retired.as_deref().is_none_or(|day| day > today) && listed.up_to_input_tokens.is_none()
    });
    let cheapest = alive.min_by_key(|(_, listed)| listed.price.worst(3, 1));
    cheapest.map(|(model, listed)| (model.to_owned(), listed.price))
}

/// The day on which a model was to be switched off, when it is in the table with one.
pub fn retired(provider: &str, model: &str) -> Option<String> {
    Prices::built_in().ok()?.listed(provider, model)?.retired.clone()
}

/// What a model costs: as configured, else as the table says; `None` when nobody knows.
pub fn price(pricing: &BTreeMap<String, ModelPricing>, provider: &str, model: &str) -> Option<Price> {
    let table = Prices::built_in().ok()?;
    price_of(pricing, &table, provider, model).map(|(price, _)| price)
}

/// Workers that a machine with so many processors and so much free memory is good for: two for each processor, a hundred
/// mebibytes for each worker, from 2 to 50.
pub fn suggested_nodes(processors: usize, free_bytes: u64) -> u32 {
    let by_processors = 2 * processors as u64;
    by_processors.min(free_bytes / PER_WORKER).clamp(2, MOST_WORKERS) as u32
}

/// Where a key was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyFound {
    /// None is needed.
    NotNeeded,
    /// In this environment variable.
    Variable(String),
    /// In this file, which only its owner can read.
    File(PathBuf),
}

impl std::fmt::Display for KeyFound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NotNeeded => f.write_str("none is needed"),
            Self::Variable(name) => write!(f, "from the environment variable {name}"),
            Self::File(path) => write!(f, "from {}, mode 0600", path.display()),
        }
    }
}

/// Looks where the key of a provider is, in the order in which the dispatcher looks.
pub fn find_key(
    settings: &ProviderSettings,
    key_dir: Option<&Path>,
    variables: impl Fn(&str) -> Option<String>,
) -> Result<KeyFound, KeyError> {
    if settings.name == "sim" && settings.base_url.is_none() {
        return Ok(KeyFound::NotNeeded);
    }
    let source = endpoint_of(settings, key_dir).key;
    source.load(&variables)?;
    Ok(match source {
        KeySource::None | KeySource::Given(_) => KeyFound::NotNeeded,
        KeySource::File(path) => KeyFound::File(path),
        KeySource::Env { variable, file } => match variables(&variable).as_deref().and_then(Secret::new) {
            Some(_) => KeyFound::Variable(variable),
            None => KeyFound::File(file.unwrap_or_default()),
        },
    })
}

/// Reads a key file as the dispatcher does, to see whether it would; the key itself goes nowhere.
pub fn check_key_file(path: &Path) -> Result<(), KeyError> {
    read_key_file(path).map(drop)
}

/// What one call to a provider came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probed {
    /// How long it took.
    pub took: Duration,
    /// The model that answered, as the provider names it.
    pub model: Option<String>,
    /// What it cost; `None` when no price is known.
    pub cost: Option<Money>,
    /// The key works, and something else is in the way at the moment: this.
    pub but: Option<String>,
}

/// Where that call is written down.
#[derive(Debug, Clone, Copy)]
pub struct Books<'a> {
    /// The directory of the ledger.
    pub dir: &'a Path,
    /// The most money of a day.
    pub cap: Option<Money>,
}

/// Why a provider cannot be used.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// Nobody could say what was spent, so nothing is.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// The day's money is used up.
    #[error("the call could cost {worst} USD, and {left} USD of the day's cap are left")]
    Budget {
        /// The most that it can cost.
        worst: Money,
        /// What is left.
        left: Money,
    },
    /// Its address or its key cannot be used.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// It does not answer.
    #[error("no answer within {} s", PATIENCE.as_secs())]
    Silent,
    /// It refuses, or fails.
    #[error("{0}")]
    Call(Box<CallError>),
}

impl ProbeError {
    /// What to do about it.
    pub fn hint(&self, name: &str) -> String {
        let page = key_page(name);
        let kind = match self {
            Self::Ledger(_) | Self::Budget { .. } => None,
            Self::Endpoint(EndpointError::Key { .. }) => Some(FailureKind::Auth),
            Self::Endpoint(_) => {
                return "give its address with --base-url, such as http://127.0.0.1:8000/v1".to_owned();
            }
            Self::Silent => Some(FailureKind::Timeout),
            Self::Call(error) => Some(error.kind),
        };
        match kind {
            Some(FailureKind::Auth) if page.is_empty() => "look at the key".to_owned(),
            Some(FailureKind::Auth) => format!("get a key at {page}"),
            Some(FailureKind::NotFound) => "choose another with --model; `drover setup --list` shows some".to_owned(),
            Some(FailureKind::Connect | FailureKind::Timeout) => {
                "look at the network and at --base-url; --no-check writes the configuration all the same".to_owned()
            }
            _ => "--no-check writes the configuration all the same".to_owned(),
        }
    }
}

/// Makes one small call to see whether key, address and model work. `key` is used in place of the configured one. The call is
/// in the ledger before it is made, at its worst case, and then at what it cost.
pub async fn probe(
    settings: &ProviderSettings,
    pricing: &BTreeMap<String, ModelPricing>,
    key: Option<&str>,
    key_dir: Option<&Path>,
    books: Option<Books<'_>>,
    variables: impl Fn(&str) -> Option<String>,
) -> Result<Probed, ProbeError> {
    let model = settings.model.clone().unwrap_or_else(|| settings.name.clone());
    let provider: std::sync::Arc<dyn Provider> = if settings.name == "sim" && settings.base_url.is_none() {
        std::sync::Arc::new(Sim::new(SimSettings::default()))
    } else {
        let mut endpoint = endpoint_of(settings, key_dir);
        if let Some(secret) = key.and_then(Secret::new) {
            endpoint.key = KeySource::Given(secret);
        }
        provider::build(&endpoint, &HttpClient::new(HttpSettings::default()), variables)?
    };
    let price = price(pricing, &settings.name, &model);
    let request = CallRequest::prompt(QUESTION, MOST_TOKENS);
    let worst = price.map(|price| price.worst(request.input_upper_bound(), u64::from(MOST_TOKENS)));
    let entry = match books.filter(|_| !provider.simulated()) {
        Some(books) => Some(set_down(books, &settings.name, &model, worst.unwrap_or_default())?),
        None => None,
    };
    let began = Instant::now();
    let mut sink = NoSink;
    let called = tokio::time::timeout(PATIENCE, provider.call(&model, &request, &mut sink)).await;
    let took = began.elapsed();
    let (usage, billed) = match &called {
        Err(_) => (None, true),
        Ok(Ok(answer)) => (answer.usage, true),
        Ok(Err(error)) => (error.usage, error.maybe_billed),
    };
    let cost = match (usage, price) {
        (Some(usage), Some(price)) => Some(price.of(&usage)),
        _ if billed => worst,
        _ => Some(Money::ZERO),
    };
    if let Some(entry) = entry
        && (usage.is_some() || !billed)
    {
        entry.settle(cost.unwrap_or_default(), usage)?;
    }
    match called {
        Err(_) => Err(ProbeError::Silent),
        Ok(Ok(answer)) => {
            let but = match answer.finish {
                Finish::Blocked(why) => Some(format!("it withheld its answer ({why})")),
                _ => None,
            };
            Ok(Probed { took, model: answer.model, cost, but })
        }
        // Whoever is told that it asked too much was known by its key.
        Ok(Err(error)) if error.kind == FailureKind::RateLimited => {
            Ok(Probed { took, model: None, cost, but: Some(error.message) })
        }
        Ok(Err(error)) => Err(ProbeError::Call(Box::new(error))),
    }
}

fn set_down(books: Books<'_>, provider: &str, model: &str, worst: Money) -> Result<Outside, ProbeError> {
    // What setup writes names no time zone, so a day is one of UTC.
    let charge = Charge {
        day: Zone::utc().day(drover_service::now_us()),
        provider: provider.to_owned(),
        model: model.to_owned(),
        calls: 1,
        amount: worst,
        estimated: true,
        usage: Usage::default(),
    };
    Outside::set_down(books.dir, charge, books.cap)?.map_err(|left| ProbeError::Budget { worst, left })
}

#[cfg(test)]
mod tests {
    use drover_testkit::mock_llm::{MockLlm, Settings as Mock};

    use super::*;

    #[test]
    fn a_machine_is_good_for_two_workers_a_processor_as_far_as_its_memory_goes() {
        let gib = 1 << 30;
        for (processors, free, expected) in
            [(2, 8 * gib, 4), (1, gib, 2), (8, gib, 10), (64, 64 * gib, 50), (16, 0, 2), (12, 100 * gib, 24)]
        {
            assert_eq!(suggested_nodes(processors, free), expected, "{processors} processors, {free} bytes");
        }
    }

    #[test]
    fn what_is_offered_has_a_page_for_its_key_and_a_model_that_is_alive() {
        let (offers, date) = offers("2026-11-21");
        assert_eq!(date.len(), 10);
        for offer in &offers {
            let known = offer.name == "sim" || (offer.key_page.starts_with("https://") && offer.key_variable.is_some());
            assert!(known && offer.model.is_some() && offer.price.is_some(), "{offer:?}");
            let model = offer.model.as_deref().unwrap_or_default();
            assert_eq!(retired(offer.name, model), None, "{offer:?}");
        }
        assert_eq!(offers[0].model.as_deref(), Some("gemini-2.5-flash-lite"));
        assert_eq!(retired("gemini", "gemini-2.0-flash").as_deref(), Some("2026-06-01"));
    }

    #[tokio::test]
    async fn one_call_tells_whether_key_address_and_model_work_and_shows_no_key() {
        let mock = MockLlm::start(Mock { api_key: Some("right-k-e-y".into()), ..Mock::default() }).unwrap();
        let settings = ProviderSettings {
            name: "openai".into(),
            model: Some("gpt-4o-mini".into()),
            base_url: Some(mock.base_url("openai")),
            ..ProviderSettings::default()
        };
        let dir = tempfile::tempdir().unwrap();
        let none = |_: &str| None;
        let cap = Money::from_usd(0.0001);
        let books = Books { dir: dir.path(), cap };
        let tried = async |key: Option<&str>| {
            probe(&settings, &BTreeMap::new(), key, Some(dir.path()), Some(books), none).await
        };
        let error = tried(None).await.unwrap_err();
        assert!(
            error.to_string().contains("OPENAI_API_KEY") && error.to_string().contains("openai-key.txt"),
            "{error}"
        );
        assert!(error.hint("openai").contains("platform.openai.com"));
        let error = tried(Some("wrong-k-e-y")).await.unwrap_err();
        assert!(!format!("{error} {error:?}").contains("k-e-y"), "{error:?}");
        assert!(error.hint("openai").contains("platform.openai.com"), "{error}");
        let probed = tried(Some("right-k-e-y")).await.unwrap();
        assert!(probed.cost.is_some_and(|cost| !cost.is_zero()) && probed.but.is_none(), "{probed:?}");
        assert_eq!(mock.ledger().answered, 1);
        mock.change(|settings| settings.outage = true);
        assert!(matches!(tried(Some("right-k-e-y")).await, Err(ProbeError::Call(_))));
        // The ledger has what the one cost that was answered, and a daemon finds it there.
        let (ledger, closed) = crate::ledger::Ledger::open(dir.path()).unwrap();
        let spent = ledger.spent(7).await.unwrap();
        let line = &spent[0].spent[0];
        assert_eq!((line.provider.as_str(), line.calls, Some(line.cost)), ("openai", 3, probed.cost));
        assert!(line.input_tokens > 0 && line.estimated.is_zero(), "{line:?}");
        drop(ledger);
        closed.wait().await;
        let tight = Books { cap: probed.cost, ..books };
        let refused =
            probe(&settings, &BTreeMap::new(), Some("right-k-e-y"), Some(dir.path()), Some(tight), none).await;
        assert!(matches!(refused, Err(ProbeError::Budget { .. })), "{refused:?}");
    }

    #[test]
    fn a_key_is_found_where_the_dispatcher_finds_it() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let gemini = ProviderSettings { name: "gemini".into(), ..ProviderSettings::default() };
        let find = |settings: &ProviderSettings, env: Option<&str>| {
            let env = env.map(str::to_owned);
            find_key(settings, Some(dir.path()), |_| env.clone())
        };
        assert!(matches!(find(&gemini, None), Err(KeyError::Missing { .. })));
        assert_eq!(find(&gemini, Some("k")).unwrap(), KeyFound::Variable("GEMINI_API_KEY".into()));
        let file = dir.path().join("gemini-key.txt");
        std::fs::write(&file, "k\n").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(find(&gemini, None), Err(KeyError::TooOpen { .. })));
        assert!(check_key_file(&file).is_err());
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(find(&gemini, None).unwrap(), KeyFound::File(file));
        assert_eq!(find(&ProviderSettings::default(), None).unwrap(), KeyFound::NotNeeded);
    }
}
