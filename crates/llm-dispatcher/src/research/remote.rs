//! A dispatcher elsewhere as the tools of research: one run of it, to which tasks are added as they come up. Searching and
//! reading go there too, so that they count in its limits and in its ledger, and can be done where there are workers for them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use drover_proto::dispatch as pb;
use drover_proto::dispatch::dispatch_service_client::DispatchServiceClient;
use futures::StreamExt as _;
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use super::{Ask, Model, Outcome, Pages, Told, detail};
use crate::core::Kind;
use crate::fetch::{FetchError, Page, sha256};
use crate::search::{Query, SearchBackend, SearchError, SearchResult};

/// Tasks that may wait to be sent.
const QUEUE: usize = 64;

/// One run of a dispatcher. It ends when it is closed and everything asked is answered.
#[derive(Debug)]
pub struct Remote {
    state: Mutex<State>,
    /// How often each search was made and each page asked for.
    errands: Mutex<HashMap<String, u64>>,
}

#[derive(Debug)]
struct State {
    /// None: closed, or the dispatcher went away.
    tasks: Option<mpsc::Sender<pb::DispatchRequest>>,
    /// Who waits for which task.
    waiting: HashMap<String, oneshot::Sender<pb::TaskResult>>,
    /// Why nothing is answered any more.
    over: Option<String>,
}

/// The dispatcher's side of a run; somebody has to listen to it for anything to be answered.
#[derive(Debug)]
pub struct Listener {
    remote: Arc<Remote>,
    answers: Streaming<pb::DispatchResponse>,
}

impl Remote {
    /// Opens a run. Results come as they are there, whatever `open` says of their order.
    pub async fn open(
        mut client: DispatchServiceClient<Channel>,
        open: pb::OpenRun,
    ) -> Result<(Arc<Self>, Listener), Status> {
        let (tasks, requests) = mpsc::channel(QUEUE);
        let open = pb::OpenRun { unordered: true, any_order: true, ..open };
        let first = pb::DispatchRequest { request: Some(pb::dispatch_request::Request::Open(open)) };
        // There is room: it is the first.
        tasks.try_send(first).map_err(|_| Status::internal("the queue of a new run is full"))?;
        let answers = client.dispatch(ReceiverStream::new(requests)).await?.into_inner();
        let state = State { tasks: Some(tasks), waiting: HashMap::new(), over: None };
        let remote = Arc::new(Self { state: Mutex::new(state), errands: Mutex::default() });
        Ok((Arc::clone(&remote), Listener { remote, answers }))
    }

    /// Nothing more will be asked.
    pub fn close(&self) {
        self.locked().tasks = None;
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everybody who still waits learns that there will be no answer.
    fn end(&self, why: String) {
        let mut state = self.locked();
        (state.tasks, state.over) = (None, Some(why));
        state.waiting.clear();
    }

    /// Who may ask a question, and where the answer will come; or why nobody may.
    fn enlist(
        &self,
        id: &str,
    ) -> Result<(mpsc::Sender<pb::DispatchRequest>, oneshot::Receiver<pb::TaskResult>), String> {
        let mut state = self.locked();
        let Some(tasks) = state.tasks.clone() else {
            return Err(state.over.clone().unwrap_or_else(|| "the run is closed".to_owned()));
        };
        if state.waiting.contains_key(id) {
            return Err(format!("task {id} is under way already"));
        }
        let (answer, coming) = oneshot::channel();
        state.waiting.insert(id.to_owned(), answer);
        Ok((tasks, coming))
    }
}

impl Remote {
    /// Has a task done.
    async fn perform(&self, task: pb::Task) -> Result<pb::TaskResult, String> {
        let (tasks, coming) = self.enlist(&task.id)?;
        let batch = pb::dispatch_request::Request::Tasks(pb::TaskBatch { tasks: vec![task] });
        // When nobody takes it any more, whoever found out has ended the run, and that ends the waiting too.
        let _ = tasks.send(pb::DispatchRequest { request: Some(batch) }).await;
        // With this one gone, closing the run closes the stream.
        drop(tasks);
        let gone = || self.locked().over.clone().unwrap_or_else(|| "the dispatcher went away".to_owned());
        let mut result = coming.await.map_err(|_| gone())?;
        if result.resumed || result.cached {
            // Nothing was done for it now: it took no time, and an earlier part of the run has paid for it.
            result.started_ms = result.ended_ms;
            result.cost_pico_usd = 0;
        }
        Ok(result)
    }

    /// Has a page read or a search made; gives its result, and what is known beside it.
    async fn errand(&self, kind: Kind, prompt: &str, url: &str) -> Result<(pb::TaskResult, Value), String> {
        // Named by what is asked and not by when, so that a run which is resumed finds what was answered, whatever its order.
        let mut what = sha256(&format!("{prompt}\0{url}"));
        what.truncate(16);
        let number = {
            let mut errands = self.errands.lock().unwrap_or_else(PoisonError::into_inner);
            let times = errands.entry(format!("{}-{what}", kind.as_str())).or_default();
            *times += 1;
            *times
        };
        let task = pb::Task {
            id: format!("{}-{what}-{number}", kind.as_str()),
            prompt: prompt.to_owned(),
            url: url.to_owned(),
            kind: kind.as_str().to_owned(),
            ..pb::Task::default()
        };
        let result = self.perform(task).await?;
        if result.status != "succeeded" {
            return Err(result.error);
        }
        let detail = serde_json::from_str(&result.detail)
            .map_err(|_| "the dispatcher is of another version: drover down, and again".to_owned())?;
        Ok((result, detail))
    }
}

#[async_trait]
impl Model for Remote {
    async fn ask(&self, ask: Ask) -> Told {
        let task = pb::Task {
            id: ask.id,
            prompt: ask.prompt,
            system: ask.system,
            kind: ask.kind.as_str().to_owned(),
            max_tokens: ask.max_tokens,
            schema: ask.schema.unwrap_or_default(),
            ..pb::Task::default()
        };
        match self.perform(task).await {
            Ok(result) => told(result),
            Err(why) => Told { outcome: Outcome::Failed(why), ..Told::default() },
        }
    }
}

#[async_trait]
impl Pages for Remote {
    async fn read(&self, url: &str) -> Result<Page, FetchError> {
        let (result, detail) = self.errand(Kind::Fetch, "", url).await.map_err(FetchError::Elsewhere)?;
        let odd = || FetchError::Elsewhere("the dispatcher described no page".to_owned());
        let (again, text) = (result.resumed, result.output);
        let page = detail::page(text, &detail).ok_or_else(odd)?;
        Ok(if again { Page { elapsed: Duration::ZERO, ..page } } else { page })
    }
}

#[async_trait]
impl SearchBackend for Remote {
    fn name(&self) -> &'static str {
        "dispatcher"
    }

    fn worst_case_pico_usd(&self) -> Option<u128> {
        None
    }

    async fn search(&self, query: &Query) -> Result<SearchResult, SearchError> {
        let (result, detail) = self.errand(Kind::Search, &query.text, "").await.map_err(SearchError::Elsewhere)?;
        let odd = || SearchError::Elsewhere("the dispatcher described no search".to_owned());
        detail::search(&detail, u128::from(result.cost_pico_usd)).ok_or_else(odd)
    }
}

fn told(result: pb::TaskResult) -> Told {
    let why = if result.error.is_empty() { result.status.clone() } else { result.error };
    let outcome = match result.status.as_str() {
        "succeeded" => Outcome::Answered(result.output),
        "blocked" => Outcome::Blocked(why),
        _ => Outcome::Failed(why),
    };
    Told {
        outcome,
        provider: result.provider,
        model: result.model,
        cost_pico_usd: u128::from(result.cost_pico_usd),
        attempts: result.attempts,
        simulated: result.simulated,
        busy: Duration::from_millis(result.ended_ms.saturating_sub(result.started_ms)),
    }
}

impl Listener {
    /// Hands answers to those who wait for them, until the run is over. `heard` is told what a person should know.
    pub async fn listen(
        mut self,
        mut heard: impl FnMut(pb::dispatch_response::Response),
    ) -> Result<Option<pb::RunSummary>, Status> {
        use pb::dispatch_response::Response;
        let mut summary = None;
        let ended = loop {
            match self.answers.next().await {
                Some(Ok(pb::DispatchResponse { response: Some(Response::Results(batch)) })) => {
                    let mut state = self.remote.locked();
                    for result in batch.results {
                        if let Some(waiting) = state.waiting.remove(&result.id) {
                            // Whoever asked may have gone away.
                            let _ = waiting.send(result);
                        }
                    }
                }
                Some(Ok(pb::DispatchResponse { response: Some(Response::Summary(sum)) })) => summary = Some(sum),
                Some(Ok(pb::DispatchResponse { response: Some(other) })) => heard(other),
                Some(Ok(pb::DispatchResponse { response: None })) => {}
                Some(Err(status)) => break Err(status),
                None => break Ok(()),
            }
        };
        let why = match &ended {
            Ok(()) => "the dispatcher ended the run".to_owned(),
            Err(status) => format!("the dispatcher broke off: {}", status.message()),
        };
        self.remote.end(why);
        ended.map(|()| summary)
    }
}
