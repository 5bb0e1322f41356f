//! What a plan can cost at most, said before it is begun. The budget of the dispatcher holds all the same.

use std::collections::BTreeMap;

use drover_config::ModelPricing;

use super::synthesis::{FINDING_CHARS, frame_bytes};
use super::{Plan, SYNTHESIS_TOKENS};
use crate::call::CallRequest;
use crate::provider::Prices as ListedPrices;
use crate::research::{ResearchSettings, Step};

/// What the parts of a plan cost, in pico-USD.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Prices {
    /// A token that a worker's model reads; `None`: not known.
    pub worker_input: Option<u128>,
    /// A token that it writes.
    pub worker_output: Option<u128>,
    /// A token that the coordinator's model reads.
    pub coordinator_input: Option<u128>,
    /// A token that it writes.
    pub coordinator_output: Option<u128>,
    /// The most that one search can cost.
    pub search: Option<u128>,
}

/// What a token costs that a model reads, and one that it writes, in pico-USD; `None` when that is not known.
pub fn token_prices(pricing: &BTreeMap<String, ModelPricing>, provider: &str, model: &str) -> Option<(u128, u128)> {
    let table = ListedPrices::built_in().ok()?;
    let (price, _) = crate::settings::price_of(pricing, &table, provider, model)?;
    Some((u128::from(price.input), u128::from(price.output)))
}

/// The most that a plan can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// Searches.
    pub searches: u64,
    /// Pages that are read, where each first one can be.
    pub pages: u64,
    /// Calls to models, where none has to be repeated.
    pub calls: u64,
    /// Tokens that models read at most.
    pub input_tokens: u64,
    /// Tokens that they write at most.
    pub output_tokens: u64,
    /// The most that it costs, in pico-USD, where none has to be repeated; `None` when a price is not known.
    pub cost_pico_usd: Option<u128>,
}

/// Reckons what a plan can take at most: every text as long as it may be, every byte a token.
pub fn estimate(request: &str, plan: &Plan, settings: &ResearchSettings, searching: bool, prices: &Prices) -> Estimate {
    // Rules, names and fences around a page; then a page of the longest characters.
    const FRAME: u64 = 4096;
    const BYTES_PER_CHAR: u64 = 4;
    let overhead = CallRequest::prompt("", 1).input_upper_bound();
    let subjects = plan.subjects.len() as u64;
    let names = plan.subjects.iter().map(|subject| subject.len() as u64).sum::<u64>();
    let thinking: Vec<u64> =
        plan.phases.iter().filter(|phase| phase.kind.thinks()).map(|phase| phase.prompt.len() as u64).collect();
    // Each reads the page, or what the one before took from it, which is cut to the same length.
    let once = FRAME + overhead + plan.topic.len() as u64 + BYTES_PER_CHAR * settings.page_chars as u64;
    let worker_calls = subjects * thinking.len() as u64;
    let worker_input = worker_calls * once + subjects * thinking.iter().sum::<u64>() + names * thinking.len() as u64;
    let worker_output = worker_calls * u64::from(settings.max_tokens);
    let has = |step: Step| plan.phases.iter().any(|phase| phase.kind == step);
    let findings = subjects * (FRAME + BYTES_PER_CHAR * FINDING_CHARS as u64) + names;
    let coordinator_input = overhead + frame_bytes(request, plan) as u64 + findings;
    let coordinator_output = u64::from(SYNTHESIS_TOKENS);
    // A search that fails in passing is made once more.
    let searches = if searching && has(Step::Search) { 2 * subjects } else { 0 };
    let cost = |count: u64, price: Option<u128>| {
        if count == 0 { Some(0) } else { price.map(|price| price.saturating_mul(u128::from(count))) }
    };
    let parts = [
        cost(worker_input, prices.worker_input),
        cost(worker_output, prices.worker_output),
        cost(coordinator_input, prices.coordinator_input),
        cost(coordinator_output, prices.coordinator_output),
        cost(searches, prices.search),
    ];
    Estimate {
        searches,
        pages: if searching && has(Step::Fetch) { subjects } else { 0 },
        calls: worker_calls + 1,
        input_tokens: worker_input + coordinator_input,
        output_tokens: worker_output + coordinator_output,
        cost_pico_usd: parts.into_iter().try_fold(0u128, |sum, part| Some(sum.saturating_add(part?))),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use async_trait::async_trait;

    use super::*;
    use crate::coordinator::Coordinator;
    use crate::fetch::{FetchError, Page};
    use crate::research::{Ask, Model, Outcome, Pages, Phase, Researcher, Told, usual};
    use crate::search::{Found, Hit, Query, SearchBackend, SearchError, SearchResult};

    /// Everything as long as it may be.
    #[derive(Debug, Default)]
    struct Wordy {
        asked: Mutex<Vec<(u64, u32)>>,
        searches: Mutex<u64>,
    }

    #[async_trait]
    impl SearchBackend for Wordy {
        fn name(&self) -> &'static str {
            "wordy"
        }
        fn worst_case_pico_usd(&self) -> Option<u128> {
            Some(1)
        }
        async fn search(&self, query: &Query) -> Result<SearchResult, SearchError> {
            let mut searches = self.searches.lock().unwrap();
            *searches += 1;
            if *searches % 2 == 1 {
                return Err(SearchError::Timeout { engine: "wordy", limit: query.limit });
            }
            let hit = Hit {
                title: "𝕥".repeat(999),
                url: format!("https://x.example/{}", "u".repeat(900)),
                snippet: "𝕤".repeat(2000),
                engine: String::new(),
                rank: 1,
            };
            Ok(SearchResult { found: Found::Hits(vec![hit; 3]), charged: 1, cost_pico_usd: Some(1) })
        }
    }

    #[async_trait]
    impl Pages for Wordy {
        async fn read(&self, url: &str) -> Result<Page, FetchError> {
            Ok(Page {
                asked: String::new(),
                url: url.to_owned(),
                redirects: Vec::new(),
                status: 200,
                content_type: String::new(),
                charset: String::new(),
                title: Some("𝕥".repeat(300)),
                text: "𝕡".repeat(20_000),
                article: true,
                sha256: String::new(),
                bytes: 0,
                truncated: false,
                elapsed: std::time::Duration::ZERO,
            })
        }
    }

    #[async_trait]
    impl Model for Wordy {
        async fn ask(&self, ask: Ask) -> Told {
            let call = CallRequest::prompt(ask.prompt, ask.max_tokens).with_system(ask.system);
            self.asked.lock().unwrap().push((call.input_upper_bound(), ask.max_tokens));
            Told { outcome: Outcome::Answered("𝕒".repeat(20_000)), ..Told::default() }
        }
    }

    #[tokio::test]
    async fn no_run_takes_more_than_was_said_and_the_bound_is_not_idle() {
        holds(usual(), 1).await;
        let asked = |kind| Phase { prompt: "ö".repeat(900), ..Phase::of(kind) };
        let phases = [Step::Search, Step::Fetch, Step::Extract, Step::Analyze, Step::Analyze].map(asked);
        holds(phases.to_vec(), 3).await;
    }

    async fn holds(phases: Vec<Phase>, thinking: usize) {
        let plan = Plan {
            subjects: (0..7).map(|nth| format!("{nth}{}", "ß".repeat(150))).collect(),
            phases,
            topic: "t".repeat(900),
            synthesis: "s".repeat(900),
        };
        let settings =
            ResearchSettings { search_pause: std::time::Duration::ZERO, width: 1, ..ResearchSettings::default() };
        let prices = Prices {
            worker_input: Some(3),
            worker_output: Some(5),
            coordinator_input: Some(7),
            coordinator_output: Some(11),
            search: Some(13),
        };
        let request = "r".repeat(5000);
        let said = estimate(&request, &plan, &settings, true, &prices);
        let wordy = Arc::new(Wordy::default());
        let researcher = Researcher::new(
            Arc::clone(&wordy) as _,
            Arc::clone(&wordy) as _,
            Arc::clone(&wordy) as _,
            settings.clone(),
        );
        let findings = researcher.run(&plan.research(), |_| ()).await;
        Coordinator::new(Arc::clone(&wordy) as _).synthesize(&request, &plan, &findings).await;
        let asked = wordy.asked.lock().unwrap();
        let input: u64 = asked.iter().map(|(input, _)| input).sum();
        let output: u64 = asked.iter().map(|(_, output)| u64::from(*output)).sum();
        assert_eq!((asked.len() as u64, *wordy.searches.lock().unwrap()), (said.calls, said.searches));
        assert!(input <= said.input_tokens && said.input_tokens < input * 2, "{input} of {}", said.input_tokens);
        assert_eq!(output, said.output_tokens);
        let workers: u64 = asked[..7 * thinking].iter().map(|(input, _)| input).sum();
        let least = u128::from(workers) * 3 + u128::from(input - workers) * 7;
        assert!(said.cost_pico_usd.is_some_and(|cost| cost >= least));
        let unknown = estimate(&request, &plan, &settings, true, &Prices { search: None, ..prices });
        assert_eq!((unknown.cost_pico_usd, unknown.calls), (None, 7 * thinking as u64 + 1));
        assert!(
            estimate(&request, &plan, &settings, false, &Prices { search: None, ..prices }).cost_pico_usd.is_some()
        );
    }
}
