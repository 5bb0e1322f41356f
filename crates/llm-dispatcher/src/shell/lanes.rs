//! Where calls can go: each provider, key and model, and in which order they are tried.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};
use std::time::Duration;

use drover_types::{ErrorCode, Failure};

use crate::call::Provider;
use crate::core::{LaneId, LaneSettings, Price};

/// Lanes that models can be added to by name, such as by clients of the HTTP front that name one; a mistake or malice of
/// theirs must not grow memory without end.
const MOST_LANES: usize = 256;

/// One provider, key and model.
#[derive(Debug)]
pub struct Lane {
    /// The core's name for it.
    pub id: LaneId,
    /// Who answers; none on the lane of errands.
    pub provider: Option<Arc<dyn Provider>>,
    /// Name of the provider in configuration and results.
    pub name: String,
    /// The model.
    pub model: String,
    /// What it costs; unset when nobody knows.
    pub price: Option<Price>,
    /// Longer inputs cost more than the price says.
    pub price_up_to: Option<u64>,
    /// Most tokens of an answer, for those who do not say.
    pub max_tokens: u32,
    /// Why it cannot be used, such as for want of a key.
    pub unusable: Option<String>,
}

impl Lane {
    /// Whether it is known what a call with so many input tokens costs.
    pub fn is_priced_for(&self, input_tokens: u64) -> bool {
        self.price.is_some() && self.price_up_to.is_none_or(|most| input_tokens <= most)
    }

    /// Answers are made up.
    pub fn simulated(&self) -> bool {
        self.provider.as_ref().is_some_and(|provider| provider.simulated())
    }
}

/// Lanes in the order in which they are tried.
#[derive(Clone)]
pub struct Chain(Arc<[Arc<Lane>]>);

impl Chain {
    /// The chain of errands: they go nowhere.
    pub(super) fn errands() -> Self {
        Self(Arc::new([]))
    }

    /// A chain of these.
    pub fn of(lanes: impl IntoIterator<Item = Arc<Lane>>) -> Self {
        Self(lanes.into_iter().collect())
    }

    /// The lane that is tried first; none in the chain of errands.
    pub fn first(&self) -> Option<&Arc<Lane>> {
        self.0.first()
    }

    /// All of them.
    pub fn lanes(&self) -> &[Arc<Lane>] {
        &self.0
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|lane| format!("{}/{}", lane.name, lane.model))).finish()
    }
}

/// A lane before the core knows it.
#[derive(Debug, Clone)]
pub struct NewLane {
    /// Who answers.
    pub provider: Arc<dyn Provider>,
    /// Name in configuration and results.
    pub name: String,
    /// The model.
    pub model: String,
    /// Longer inputs cost more than the price says.
    pub price_up_to: Option<u64>,
    /// Most tokens of an answer, for those who do not say.
    pub max_tokens: u32,
    /// Why it cannot be used, such as for want of a key.
    pub unusable: Option<String>,
    /// Limits and price.
    pub settings: LaneSettings,
}

/// What a model of a provider costs, and up to which input.
type Priced = dyn Fn(&str, &str) -> Option<(Price, Option<u64>)> + Send + Sync;

/// All lanes. The first is that of errands; then the configured ones.
pub struct Lanes {
    all: RwLock<Vec<Arc<Lane>>>,
    settings: RwLock<Vec<LaneSettings>>,
    /// The configured chain, by index.
    chain: Vec<usize>,
    /// The lane of errands that cost something.
    fees: Option<LaneId>,
    priced: Box<Priced>,
}

impl fmt::Debug for Lanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lanes").field("chain", &self.chain()).finish_non_exhaustive()
    }
}

impl Lanes {
    /// Index of the lane of errands.
    pub(super) const ERRANDS: LaneId = LaneId(0);

    /// The lanes of a configuration: the first `chained` of them are the chain, the others stand beside it.
    pub fn new(
        lanes: Vec<NewLane>,
        chained: usize,
        timeout: Duration,
        priced: impl Fn(&str, &str) -> Option<(Price, Option<u64>)> + Send + Sync + 'static,
    ) -> Self {
        let errands = Lane {
            id: Self::ERRANDS,
            provider: None,
            name: String::new(),
            model: String::new(),
            price: Some(Price::default()),
            price_up_to: None,
            max_tokens: 0,
            unusable: None,
        };
        let free = LaneSettings { price: Some(Price::default()), api: false, timeout, ..LaneSettings::default() };
        let this = Self {
            all: RwLock::new(vec![Arc::new(errands)]),
            settings: RwLock::new(vec![free]),
            chain: (1..=chained.min(lanes.len())).collect(),
            fees: None,
            priced: Box::new(priced),
        };
        for lane in lanes {
            push(&mut write(&this.all), &mut write(&this.settings), lane);
        }
        this
    }

    /// With a lane for searches that cost something. Its tokens are pico-dollars, so that each is charged what it did cost.
    #[must_use]
    pub fn with_fees(mut self, engine: &str, timeout: Duration) -> Self {
        let price = Some(Price { input: 1, ..Price::default() });
        let mut all = write(&self.all);
        let id = LaneId(all.len() as u16);
        all.push(Arc::new(Lane {
            id,
            provider: None,
            name: engine.to_owned(),
            model: "search".to_owned(),
            price,
            price_up_to: None,
            max_tokens: 0,
            unusable: None,
        }));
        drop(all);
        write(&self.settings).push(LaneSettings { price, api: false, timeout, ..LaneSettings::default() });
        self.fees = Some(id);
        self
    }

    pub(super) fn fees(&self) -> Option<LaneId> {
        self.fees
    }

    /// What the core is to know of them, in their order.
    pub fn settings(&self) -> Vec<LaneSettings> {
        self.settings.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Lane>> {
        self.all.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn count(&self) -> usize {
        self.settings.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub(super) fn get(&self, id: LaneId) -> Option<Arc<Lane>> {
        self.all.read().unwrap_or_else(PoisonError::into_inner).get(usize::from(id.0)).cloned()
    }

    /// The configured chain.
    pub fn chain(&self) -> Chain {
        let all = self.all.read().unwrap_or_else(PoisonError::into_inner);
        Chain::of(self.chain.iter().filter_map(|&index| all.get(index)).cloned())
    }

    /// The chain for somebody who may name a provider, a model or both. A model that is not configured is asked of the
    /// provider that is, under the same key; the provider knows whether it has it.
    pub fn named(&self, provider: Option<&str>, model: Option<&str>) -> Result<Chain, Failure> {
        let (provider, model) = (provider.filter(|name| !name.is_empty()), model.filter(|name| !name.is_empty()));
        if provider.is_none() && model.is_none() {
            return usable(&self.chain());
        }
        let fits = |lane: &Arc<Lane>| {
            lane.provider.is_some()
                && provider.is_none_or(|name| lane.name == name)
                && model.is_none_or(|model| lane.model == model)
        };
        let all = self.all();
        let mut lanes: Vec<_> = all.iter().filter(|lane| fits(lane)).cloned().collect();
        if lanes.is_empty()
            && let Some(model) = model
        {
            lanes.extend(self.beside(provider, model)?);
        }
        if lanes.is_empty() {
            let known: BTreeSet<&str> =
                all.iter().filter(|lane| lane.provider.is_some()).map(|lane| lane.name.as_str()).collect();
            let known = known.into_iter().collect::<Vec<_>>().join(", ");
            let wanted = provider.unwrap_or_default();
            return Err(Failure::new(
                ErrorCode::UnknownProvider,
                format!("provider {wanted:?} is not configured; those that are: {known}"),
            )
            .hint("name it in node_scaling.provider or node_scaling.fallback of drover.yaml"));
        }
        usable(&Chain::of(lanes))
    }

    /// A lane for a further model of a provider that has one.
    fn beside(&self, provider: Option<&str>, model: &str) -> Result<Option<Arc<Lane>>, Failure> {
        let chain = self.chain();
        let first = chain.first().map(|lane| lane.name.as_str());
        let Some(name) = provider.or(first) else { return Ok(None) };
        let all = self.all();
        let Some(like) = all.iter().find(|lane| lane.provider.is_some() && lane.name == name) else { return Ok(None) };
        let Some(of_provider) = like.provider.clone() else { return Ok(None) };
        let settings = self.settings();
        let mut settings = settings.get(usize::from(like.id.0)).cloned().unwrap_or_default();
        let priced = (self.priced)(name, model);
        settings.price = priced.map(|(price, _)| price);
        let lane = NewLane {
            provider: of_provider,
            name: name.to_owned(),
            model: model.to_owned(),
            price_up_to: priced.and_then(|(_, most)| most),
            max_tokens: like.max_tokens,
            unusable: like.unusable.clone(),
            settings,
        };
        self.add(lane).map(Some)
    }

    fn add(&self, lane: NewLane) -> Result<Arc<Lane>, Failure> {
        let mut all = write(&self.all);
        // Somebody else may have been quicker.
        if let Some(there) = all.iter().find(|there| there.name == lane.name && there.model == lane.model) {
            return Ok(Arc::clone(there));
        }
        if all.len() >= MOST_LANES {
            return Err(Failure::new(ErrorCode::InvalidRequest, "too many different models were asked for")
                .hint("restart the dispatcher, or ask for those that are configured"));
        }
        Ok(push(&mut all, &mut write(&self.settings), lane))
    }
}

/// Leaves out what cannot be used; refuses when nothing is left.
fn usable(chain: &Chain) -> Result<Chain, Failure> {
    let why = chain.lanes().iter().find_map(|lane| lane.unusable.clone());
    let rest = Chain::of(chain.lanes().iter().filter(|lane| lane.unusable.is_none()).cloned());
    match why {
        Some(why) if rest.lanes().is_empty() => Err(Failure::new(ErrorCode::ProviderUnavailable, why).hint(
            "set the key where the dispatcher starts and restart it (drover down), or try without: --provider sim",
        )),
        _ => Ok(rest),
    }
}

fn push(all: &mut Vec<Arc<Lane>>, settings: &mut Vec<LaneSettings>, lane: NewLane) -> Arc<Lane> {
    let made = Arc::new(Lane {
        id: LaneId(all.len() as u16),
        provider: Some(lane.provider),
        name: lane.name,
        model: lane.model,
        price: lane.settings.price,
        price_up_to: lane.price_up_to,
        max_tokens: lane.max_tokens,
        unusable: lane.unusable,
    });
    settings.push(lane.settings);
    all.push(Arc::clone(&made));
    made
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
