//! Which engine is asked, and how it is reached.

use std::path::Path;
use std::sync::Arc;

use drover_config::NodeScalingConfig;

use super::{Brave, Gemini, Off, SearchBackend, Searxng, Tavily, http};
use crate::core::{Money, Price};
use crate::provider::{KeyError, KeySource, Secret};

/// Which engine, and how it is reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SearchSettings {
    /// `searxng`, `brave`, `tavily` or `gemini`; `None`: search is off.
    pub backend: Option<String>,
    /// Where it is, instead of its public address. SearxNG has none.
    pub base_url: Option<String>,
    /// Its key.
    pub key: Option<Secret>,
    /// The model that searches, for `gemini`.
    pub model: Option<String>,
    /// Price of one search in pico-USD. SearxNG costs nothing; of the others no price is assumed.
    pub price_pico_usd: Option<u128>,
    /// What tokens of that model cost.
    pub tokens: Option<Price>,
}

/// The engine cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// An unknown word.
    #[error("node_scaling.search.backend: there is no engine {0:?}; known are searxng, brave, tavily and gemini")]
    Unknown(String),
    /// SearxNG without an address.
    #[error("node_scaling.search.base_url: searxng needs the address of an instance, such as http://127.0.0.1:8888")]
    NoBase,
    /// An address that is none.
    #[error("node_scaling.search.base_url: {url:?} is no address of the web: {why}")]
    BadBase { url: String, why: String },
    /// An engine without its key.
    #[error("node_scaling.search.api_key_env: {0} needs a key")]
    NoKey(&'static str),
    /// A key that cannot be had.
    #[error("node_scaling.search: {0}")]
    Key(#[from] KeyError),
    /// Gemini without a model.
    #[error("node_scaling.search.model: gemini needs the name of a model that can search")]
    NoModel,
    /// The HTTP client.
    #[error("cannot make an HTTP client")]
    Client(#[from] reqwest::Error),
}

impl SearchSettings {
    /// As the configuration wants it. `variables` is the environment, in which keys may be.
    pub fn of(scaling: &NodeScalingConfig, variables: impl Fn(&str) -> Option<String>) -> Result<Self, SetupError> {
        Self::with_keys_in(None, scaling, variables)
    }

    /// The same, where a key that no variable has may lie in a file of this directory.
    pub fn with_keys_in(
        key_dir: Option<&Path>,
        scaling: &NodeScalingConfig,
        variables: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, SetupError> {
        let search = &scaling.search;
        let usual = match search.backend.as_str() {
            "off" => return Ok(Self::default()),
            "brave" => Some("BRAVE_API_KEY"),
            "tavily" => Some("TAVILY_API_KEY"),
            "gemini" => Some("GEMINI_API_KEY"),
            _ => None,
        };
        let key = match (&search.api_key_file, search.api_key_env.as_deref().or(usual)) {
            (Some(file), _) => KeySource::File(file.clone()),
            (None, Some(variable)) => {
                let file = crate::configured::key_file(key_dir, &search.backend);
                KeySource::Env { variable: variable.to_owned(), file }
            }
            (None, None) => KeySource::None,
        };
        Ok(Self { key: key.load(variables)?, ..Self::without_key(scaling) })
    }

    fn without_key(scaling: &NodeScalingConfig) -> Self {
        let search = &scaling.search;
        // The model of the workers may be the one that searches.
        let same = (scaling.provider.name == search.backend).then(|| scaling.provider.model.clone()).flatten();
        Self {
            backend: Some(search.backend.clone()),
            base_url: search.base_url.clone(),
            key: None,
            model: search.model.clone().or(same),
            price_pico_usd: search.price.and_then(Money::from_usd).map(Money::pico),
            tokens: None,
        }
    }

    /// With what the tokens of the model cost that searches, when one does.
    #[must_use]
    pub fn priced(mut self, price: impl Fn(&str, &str) -> Option<Price>) -> Self {
        if let (Some(engine), Some(model)) = (&self.backend, &self.model) {
            self.tokens = price(engine, model);
        }
        self
    }
}

/// The most that one search costs with the engine that is configured, whether its key is here or not; `None` when nobody knows.
pub fn worst_case_pico_usd(scaling: &NodeScalingConfig, price: impl Fn(&str, &str) -> Option<Price>) -> Option<u128> {
    if scaling.search.backend == "off" {
        return Some(0);
    }
    let stand_in = || Secret::new("unset");
    let plain = SearchSettings { key: stand_in(), ..SearchSettings::without_key(scaling) };
    backend(&plain.priced(price)).ok()?.worst_case_pico_usd()
}

/// Sets up the engine that the settings name.
pub fn backend(settings: &SearchSettings) -> Result<Arc<dyn SearchBackend>, SetupError> {
    let key = |engine| settings.key.clone().ok_or(SetupError::NoKey(engine));
    let base = |default: &str| http::base(settings.base_url.as_deref().unwrap_or(default));
    let price = settings.price_pico_usd;
    Ok(match settings.backend.as_deref() {
        None => Arc::new(Off),
        Some("searxng") => {
            let given = settings.base_url.as_deref().ok_or(SetupError::NoBase)?;
            Arc::new(Searxng::new(http::base(given)?, price)?)
        }
        Some("brave") => Arc::new(Brave::new(base(Brave::BASE)?, key("brave")?, price)?),
        Some("tavily") => Arc::new(Tavily::new(base(Tavily::BASE)?, key("tavily")?, price)?),
        Some("gemini") => {
            let model = settings.model.as_deref().ok_or(SetupError::NoModel)?;
            Arc::new(Gemini::new(base(Gemini::BASE)?, model, key("gemini")?, price, settings.tokens)?)
        }
        Some(other) => return Err(SetupError::Unknown(other.to_owned())),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::search::{Query, gemini};

    #[test]
    fn an_engine_is_set_up_or_it_is_said_what_is_missing() {
        let named = |name: &str| SearchSettings { backend: Some(name.to_owned()), ..SearchSettings::default() };
        let keyed = |name: &str| SearchSettings { key: Secret::new("k-e-y"), ..named(name) };
        let wrong =
            |settings: &SearchSettings| backend(settings).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(wrong(&named("duckduckgo")).contains("known are searxng"));
        assert!(wrong(&named("searxng")).contains("base_url"));
        assert!(wrong(&named("brave")).contains("api_key_env") && wrong(&named("tavily")).contains("needs a key"));
        assert!(wrong(&keyed("gemini")).contains("model"));
        let bad = SearchSettings { base_url: Some("127.0.0.1:8888".into()), ..named("searxng") };
        assert!(wrong(&bad).contains("no address of the web"), "{}", wrong(&bad));
        for (settings, price) in [
            (SearchSettings::default(), Some(0)),
            (SearchSettings { base_url: Some("http://127.0.0.1:8888/searx/".into()), ..named("searxng") }, Some(0)),
            (keyed("brave"), None),
            (SearchSettings { price_pico_usd: Some(5), ..keyed("tavily") }, Some(5)),
            (
                SearchSettings {
                    model: Some("m".into()),
                    price_pico_usd: Some(5),
                    tokens: Some(Price { input: 0, output: 2, ..Price::default() }),
                    ..keyed("gemini")
                },
                Some(5 * u128::from(gemini::MOST_QUERIES) + 2 * u128::from(gemini::MOST_TOKENS)),
            ),
            (SearchSettings { model: Some("m".into()), price_pico_usd: Some(5), ..keyed("gemini") }, None),
        ] {
            let engine = backend(&settings).unwrap();
            assert_eq!(engine.name(), settings.backend.as_deref().unwrap_or("off"));
            assert_eq!(engine.worst_case_pico_usd(), price, "{settings:?}");
            assert!(!format!("{engine:?}{settings:?}").contains("k-e-y"), "a key is shown");
        }
    }

    #[test]
    fn search_is_set_up_as_configured() {
        let mut scaling = NodeScalingConfig::default();
        let none = |_: &str| None;
        assert_eq!(SearchSettings::of(&scaling, none).unwrap(), SearchSettings::default());
        scaling.search.backend = "searxng".into();
        scaling.search.base_url = Some("http://127.0.0.1:8888".into());
        assert_eq!(SearchSettings::of(&scaling, none).unwrap().key, None, "it needs none");
        scaling.search.backend = "gemini".into();
        scaling.provider.name = "gemini".into();
        scaling.provider.model = Some("workers".into());
        scaling.search.price = Some(0.035);
        let error = SearchSettings::of(&scaling, none).unwrap_err().to_string();
        assert!(error.contains("GEMINI_API_KEY"), "{error}");
        scaling.search.api_key_env = Some("MY_KEY".into());
        let mine = |name: &str| (name == "MY_KEY").then(|| "k-e-y".to_owned());
        let settings = SearchSettings::of(&scaling, mine).unwrap();
        assert_eq!((settings.key, settings.model.as_deref()), (Secret::new("k-e-y"), Some("workers")));
        assert_eq!(settings.price_pico_usd, Some(35_000_000_000));
        scaling.search.model = Some("searcher".into());
        assert_eq!(SearchSettings::of(&scaling, mine).unwrap().model.as_deref(), Some("searcher"));
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("key");
        std::fs::write(&file, "from-file\n").unwrap();
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        scaling.search.api_key_env = None;
        scaling.search.api_key_file = Some(file);
        assert_eq!(SearchSettings::of(&scaling, none).unwrap().key, Secret::new("from-file"));
    }

    #[tokio::test]
    async fn without_an_engine_search_says_that_it_is_off() {
        let query = Query { text: "sheep".into(), count: 3, limit: Duration::from_secs(1) };
        let error = backend(&SearchSettings::default()).unwrap().search(&query).await.unwrap_err();
        assert!(error.to_string().contains("search is off") && error.hint().contains("searxng"));
    }
}
