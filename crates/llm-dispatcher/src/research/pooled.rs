//! The dispatcher itself as the tools of research: each step is a job of the pool, under the same limits and the same budget as
//! everything else.

use std::sync::Arc;

use async_trait::async_trait;
use serde_json::Value;

use super::{Ask, Model, Outcome, Pages, Told, detail};
use crate::call::CallRequest;
use crate::core::{Kind, Priority, Status};
use crate::errands::Errands;
use crate::fetch::{FetchError, Page};
use crate::provider::OutputSchema;
use crate::search::{Query, SearchBackend, SearchError, SearchResult};
use crate::shell::{Chain, Client, Done, Job};

/// One client of the pool. When it is dropped, whatever it waits for is broken off.
#[derive(Debug)]
pub(crate) struct Pooled {
    pub(crate) client: Client,
    pub(crate) chain: Chain,
    pub(crate) errands: Errands,
    pub(crate) priority: Priority,
}

impl Pooled {
    async fn run(&self, job: Job) -> Done {
        self.client.run(Job { priority: self.priority, ..job }).await
    }

    fn call(&self, ask: &Ask) -> Result<Job, String> {
        let mut request = CallRequest::prompt(ask.prompt.as_str(), ask.max_tokens).with_system(ask.system.as_str());
        if let Some(schema) = &ask.schema {
            let schema: Value = serde_json::from_str(schema).map_err(|error| error.to_string())?;
            let schema = OutputSchema::new("answer", schema).map_err(|error| error.to_string())?;
            request = request.with_schema(Arc::new(schema));
        }
        Ok(Job { kind: ask.kind, ..Job::call(request, self.chain.clone()) })
    }
}

#[async_trait]
impl Model for Pooled {
    async fn ask(&self, ask: Ask) -> Told {
        let job = match self.call(&ask) {
            Ok(job) => job,
            Err(why) => return Told { outcome: Outcome::Failed(why), ..Told::default() },
        };
        let done = self.run(job).await;
        let (provider, model, simulated) = done.lane.as_ref().map_or_else(
            || (String::new(), String::new(), false),
            |lane| (lane.name.clone(), lane.model.clone(), lane.simulated()),
        );
        let outcome = match (done.status, done.answer) {
            (Status::Answered, Some(answer)) => Outcome::Answered(answer.text),
            (Status::Blocked, _) => Outcome::Blocked(done.error),
            _ => Outcome::Failed(done.error),
        };
        Told {
            outcome,
            provider,
            model,
            cost_pico_usd: done.cost.pico(),
            attempts: done.attempts,
            simulated,
            busy: done.busy,
        }
    }
}

#[async_trait]
impl Pages for Pooled {
    async fn read(&self, url: &str) -> Result<Page, FetchError> {
        let job = self.errands.fetch(url).map_err(FetchError::Elsewhere)?;
        let done = self.run(Job { kind: Kind::Fetch, ..job }).await;
        let page = done.answer.and_then(|answer| detail::page(answer.text, &answer.structured?));
        page.ok_or(FetchError::Elsewhere(done.error))
    }
}

#[async_trait]
impl SearchBackend for Pooled {
    fn name(&self) -> &'static str {
        self.errands.engine_name()
    }

    fn worst_case_pico_usd(&self) -> Option<u128> {
        self.errands.worst_case_pico_usd()
    }

    async fn search(&self, query: &Query) -> Result<SearchResult, SearchError> {
        let job = self.errands.search(&query.text, query.count).map_err(SearchError::Elsewhere)?;
        let done = self.run(Job { kind: Kind::Search, ..job }).await;
        let cost = done.cost.pico();
        let found = done.answer.and_then(|answer| detail::search(&answer.structured?, cost));
        found.ok_or(SearchError::Elsewhere(done.error))
    }
}
