//! A dispatcher elsewhere as the model of research: one run of it, to which tasks are added as they come up.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use drover_proto::dispatch as pb;
use drover_proto::dispatch::dispatch_service_client::DispatchServiceClient;
use futures::StreamExt as _;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use super::{Ask, Model, Outcome, Told};

/// Tasks that may wait to be sent.
const QUEUE: usize = 64;

/// One run of a dispatcher. It ends when it is closed and everything asked is answered.
#[derive(Debug)]
pub struct Remote {
    state: Mutex<State>,
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
        let open = pb::OpenRun { unordered: true, ..open };
        let first = pb::DispatchRequest { request: Some(pb::dispatch_request::Request::Open(open)) };
        // There is room: it is the first.
        tasks.try_send(first).map_err(|_| Status::internal("the queue of a new run is full"))?;
        let answers = client.dispatch(ReceiverStream::new(requests)).await?.into_inner();
        let state = State { tasks: Some(tasks), waiting: HashMap::new(), over: None };
        let remote = Arc::new(Self { state: Mutex::new(state) });
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

#[async_trait]
impl Model for Remote {
    async fn ask(&self, ask: Ask) -> Told {
        let failed = |why: String| Told { outcome: Outcome::Failed(why), ..Told::default() };
        let (tasks, coming) = match self.enlist(&ask.id) {
            Ok(places) => places,
            Err(why) => return failed(why),
        };
        let task = pb::Task {
            id: ask.id,
            prompt: ask.prompt,
            system: ask.system,
            kind: ask.kind.as_str().to_owned(),
            max_tokens: ask.max_tokens,
            schema: ask.schema.unwrap_or_default(),
            ..pb::Task::default()
        };
        let batch = pb::dispatch_request::Request::Tasks(pb::TaskBatch { tasks: vec![task] });
        // When nobody takes it any more, whoever found out has ended the run, and that ends the waiting too.
        let _ = tasks.send(pb::DispatchRequest { request: Some(batch) }).await;
        // With this one gone, closing the run closes the stream.
        drop(tasks);
        match coming.await {
            Ok(result) => told(result),
            Err(_) => failed(self.locked().over.clone().unwrap_or_else(|| "the dispatcher went away".to_owned())),
        }
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
