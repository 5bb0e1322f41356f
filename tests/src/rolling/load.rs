//! The clients: each asks one thing after the other until every daemon has been replaced, and asks again as little as a client is
//! expected to.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::bail;
use drover_proto::dispatch::dispatch_service_client::DispatchServiceClient;
use drover_proto::dispatch::{DispatchRequest, OpenRun, Task, TaskBatch, dispatch_request, dispatch_response};
use drover_proto::handoff::handoff_service_client::HandoffServiceClient;
use drover_proto::handoff::send_response::Update;
use drover_proto::handoff::{OpenSession, SendRequest};
use drover_proto::router::{InjectRequest, InjectionState};
use drover_service::{StateDir, Target, connect};
use drover_testkit::cluster::router;
use tonic::transport::Channel;

use super::Plan;

/// What a client may do about a failure: how long it waits before each further try. What is left of its patience is for the tries
/// themselves.
const WAITS: [Duration; 3] = [Duration::from_millis(300), Duration::from_secs(1), Duration::from_millis(2300)];
/// When a client gives up whatever is left of its tries.
const PATIENCE: Duration = Duration::from_secs(5);
/// The same for what takes time when all is well: a turn of a session whose node is replaced is answered by the next one.
const ANSWER: Duration = Duration::from_secs(30);

/// One request that was taken.
pub(super) struct Taken {
    pub(super) name: String,
    /// What the daemons call it.
    pub(super) id: String,
    pub(super) again: usize,
    pub(super) took: Duration,
}

/// All clients.
pub(super) struct Load<'a> {
    state: StateDir,
    swarm: &'a str,
    injections: usize,
    nodes: u32,
    gives_up: bool,
    next: AtomicUsize,
    over: AtomicBool,
}

/// Name of a session.
pub(super) fn session(number: usize) -> String {
    format!("rolling-{number}")
}

/// The router as a door to the sessions.
pub(super) fn door(state: &StateDir) -> HandoffServiceClient<Channel> {
    HandoffServiceClient::new(connect(Target::Daemon { state: state.clone(), name: "router".to_owned() }))
}

impl<'a> Load<'a> {
    pub(super) fn new(state: &StateDir, swarm: &'a str, plan: &Plan) -> Self {
        Self {
            state: state.clone(),
            swarm,
            injections: plan.injections,
            nodes: plan.nodes,
            gives_up: plan.gives_up,
            next: AtomicUsize::new(0),
            over: AtomicBool::new(false),
        }
    }

    /// Nothing is asked any more once there is enough.
    pub(super) fn stop(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Tries until it is done, as often and as long as a client is expected to.
    async fn persist(
        &self,
        name: String,
        patience: Duration,
        mut attempt: impl AsyncFnMut(usize) -> Result<String, tonic::Status>,
    ) -> anyhow::Result<Taken> {
        let began = Instant::now();
        let mut again = 0;
        let mut failures = Vec::new();
        loop {
            match tokio::time::timeout(patience.saturating_sub(began.elapsed()), attempt(again)).await {
                Ok(Ok(id)) => return Ok(Taken { name, id, again, took: began.elapsed() }),
                Ok(Err(status)) => failures.push(format!("{:?} {}", began.elapsed(), drover_service::why(&status))),
                Err(_) => failures.push("no answer".to_owned()),
            }
            let wait = WAITS.get(again).filter(|wait| !self.gives_up && began.elapsed() + **wait < patience);
            let Some(wait) = wait else {
                bail!("{name} was not taken after {} tries in {:?}: {failures:?}", again + 1, began.elapsed());
            };
            again += 1;
            tokio::time::sleep(*wait).await;
        }
    }

    /// Sends one prompt after the other, until there are enough and every daemon has been replaced.
    pub(super) async fn prompts(&self) -> anyhow::Result<Vec<Taken>> {
        let mut taken = Vec::new();
        loop {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.injections && self.is_over() {
                return Ok(taken);
            }
            let name = format!("rolling-{number}");
            let request = InjectRequest {
                request_id: name.clone(),
                swarm_id: self.swarm.to_owned(),
                nodes: vec![number as u32 % self.nodes],
                content: format!("{name}\n@echo deltas=3 over=50ms"),
                ..Default::default()
            };
            taken.push(self.persist(name, PATIENCE, async |_| self.inject(&request).await).await?);
            // As many as are wanted, over the time that the restarts take: they are to meet each other.
            let early = number >= self.injections / 2 && !self.is_over();
            tokio::time::sleep(Duration::from_millis(if early { 100 } else { 20 })).await;
        }
    }

    /// A prompt until it is in its node's inbox.
    async fn inject(&self, request: &InjectRequest) -> Result<String, tonic::Status> {
        let mut steps = router(&self.state).inject(request.clone()).await?.into_inner();
        while let Some(step) = steps.message().await? {
            match step.state() {
                InjectionState::Failed => return Err(tonic::Status::failed_precondition(step.error)),
                InjectionState::Accepted => return Ok(step.injection_id),
                _ => {}
            }
        }
        Err(tonic::Status::unavailable("the stream ended"))
    }

    /// Opens the sessions.
    pub(super) async fn open_sessions(&self) -> anyhow::Result<()> {
        for number in 0..super::SESSIONS {
            let deadline = Instant::now() + super::BACK;
            while let Err(status) = self.say(number, "opening", "opening").await {
                if Instant::now() >= deadline {
                    bail!("session {number} cannot be opened: {}", drover_service::why(&status));
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        Ok(())
    }

    /// Says one thing after the other in a session, each until it is answered.
    pub(super) async fn turns(&self, session: usize) -> anyhow::Result<Vec<Taken>> {
        let mut taken = Vec::new();
        while !self.is_over() {
            let name = format!("turn {} of {session}", taken.len());
            let request = format!("turn-{}", taken.len());
            taken.push(self.persist(name.clone(), ANSWER, async |_| self.say(session, &request, &name).await).await?);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(taken)
    }

    /// A turn until its answer.
    async fn say(&self, number: usize, request: &str, prompt: &str) -> Result<String, tonic::Status> {
        let request = SendRequest {
            session_id: session(number),
            request_id: request.to_owned(),
            prompt: prompt.to_owned(),
            open: Some(OpenSession { agent: "echo".to_owned(), ..OpenSession::default() }),
            ..SendRequest::default()
        };
        let mut updates = door(&self.state).send(request).await?.into_inner();
        while let Some(response) = updates.message().await? {
            if let Some(Update::Answer(answer)) = response.update {
                if answer.text != prompt {
                    return Err(tonic::Status::data_loss(format!("the answer is {answer:?}")));
                }
                return Ok(answer.text);
            }
        }
        Err(tonic::Status::unavailable("the stream ended"))
    }

    /// Has one model called after the other, each in a run of its own, which is resumed when it was broken off.
    pub(super) async fn calls(&self) -> anyhow::Result<Vec<Taken>> {
        let mut taken = Vec::new();
        while !self.is_over() {
            let name = format!("call-{}", taken.len());
            let run = name.clone();
            let call = async |again: usize| match self.call(&run, again > 0).await {
                // It was broken off before it was begun.
                Err(status) if again > 0 && drover_proto::failure_of(&status).message.contains("no run") => {
                    self.call(&run, false).await
                }
                done => done,
            };
            taken.push(self.persist(name, ANSWER, call).await?);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(taken)
    }

    async fn call(&self, run: &str, resume: bool) -> Result<String, tonic::Status> {
        let target = Target::Daemon { state: self.state.clone(), name: "llm-dispatcher".to_owned() };
        let open = OpenRun { run_id: run.to_owned(), resume, ..OpenRun::default() };
        let tasks = TaskBatch { tasks: vec![Task { prompt: format!("prompt of {run}"), ..Task::default() }] };
        let requests = [dispatch_request::Request::Open(open), dispatch_request::Request::Tasks(tasks)];
        let requests = requests.map(|request| DispatchRequest { request: Some(request) });
        let mut client = DispatchServiceClient::new(connect(target));
        let mut responses = client.dispatch(tokio_stream::iter(requests)).await?.into_inner();
        let mut output = None;
        while let Some(response) = responses.message().await? {
            match response.response {
                Some(dispatch_response::Response::Results(batch)) => {
                    for result in batch.results {
                        if result.status != "succeeded" {
                            return Err(tonic::Status::aborted(format!("{}: {}", result.status, result.error)));
                        }
                        output = Some(result.output);
                    }
                }
                Some(dispatch_response::Response::Summary(_)) => break,
                _ => {}
            }
        }
        output.ok_or_else(|| tonic::Status::unavailable("the stream ended"))
    }
}
