//! The router as a daemon, between fakes of its neighbours: restarted at any moment, with a follower that loses answers
//! and breaks streams.

#![expect(clippy::unwrap_used, reason = "a test that fails loudly")]

mod fakes;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use drover_config::Config;
use drover_proto::common::LaunchSpec;
use drover_proto::failure_of;
use drover_proto::router as pb;
use drover_proto::router::router_service_client::RouterServiceClient;
use drover_router::{Router, RouterArgs};
use drover_service::{Context, Daemon as _, MAX_MESSAGE_BYTES, StateDir, Target, connect};
use drover_types::ErrorCode;
use tonic::transport::Channel;

type Client = RouterServiceClient<Channel>;

/// A router on a runtime of its own, so that it can be dropped in the middle of whatever it does.
struct Running {
    runtime: Option<tokio::runtime::Runtime>,
    ended: std::sync::mpsc::Receiver<anyhow::Result<()>>,
    ctx: Context,
}

/// Whether the thread of a router that writes still runs in this process. A real kill leaves none.
fn writes() -> bool {
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else { return false };
    threads
        .flatten()
        .any(|thread| std::fs::read_to_string(thread.path().join("comm")).is_ok_and(|name| name.trim() == "store"))
}

impl Running {
    fn start(state: &Path) -> Self {
        let any = "127.0.0.1:0".parse().ok();
        let mut config = Config::default();
        config.router.listen = any;
        config.router.control_listen = any;
        config.worker.agent = drover_types::AgentKind::Echo;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let ctx = Context::for_test("router", state);
        let (done, ended) = std::sync::mpsc::channel();
        let run = Router::run(Arc::new(config), RouterArgs::default(), ctx.clone());
        runtime.spawn(async move { drop(done.send(run.await)) });
        Self { runtime: Some(runtime), ended, ctx }
    }

    /// Nothing is flushed, nobody is told.
    fn kill(mut self) {
        self.runtime.take().unwrap().shutdown_background();
        // The writer's thread ends when it notices; the directory is free when it has.
        let _ = self.ended.recv_timeout(Duration::from_secs(5));
        let deadline = Instant::now() + Duration::from_secs(5);
        while writes() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn stop(mut self) -> anyhow::Result<()> {
        self.ctx.shutdown().cancel();
        let ended = self.ended.recv_timeout(Duration::from_secs(10)).unwrap();
        self.runtime.take().unwrap().shutdown_background();
        ended
    }
}

fn client(state: &Path) -> Client {
    let state = StateDir::open(state).unwrap();
    RouterServiceClient::new(connect(Target::Daemon { state, name: "router".into() }))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
}

/// Calls until the router answers: it may be on its way up.
async fn answered<T, F: Future<Output = Result<T, tonic::Status>>>(call: impl Fn() -> F) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match call().await {
            Ok(answer) => return answer,
            Err(status) => {
                let failure = failure_of(&status);
                let passing = matches!(
                    failure.code,
                    ErrorCode::BackendUnavailable | ErrorCode::ShuttingDown | ErrorCode::Internal
                );
                assert!(passing && Instant::now() < deadline, "{failure:?}");
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn launch(client: &Client, request_id: &str, nodes: u32, prompt: &str) -> Result<pb::Swarm, tonic::Status> {
    let spec = LaunchSpec { node_count: nodes, system_prompt: prompt.into(), ..LaunchSpec::default() };
    launch_spec(client, request_id, spec).await
}

async fn launch_spec(client: &Client, request_id: &str, spec: LaunchSpec) -> Result<pb::Swarm, tonic::Status> {
    let request = pb::LaunchSwarmRequest { request_id: request_id.into(), spec: Some(spec), ..Default::default() };
    let mut steps = client.clone().launch_swarm(request).await?.into_inner();
    while let Some(step) = steps.message().await? {
        if let Some(pb::launch_swarm_response::Step::Launched(swarm)) = step.step {
            return Ok(swarm);
        }
    }
    Err(tonic::Status::unavailable("the stream ended"))
}

async fn inject(
    client: &Client,
    request_id: &str,
    swarm: &str,
    content: &str,
) -> Result<BTreeSet<String>, tonic::Status> {
    let request = pb::InjectRequest {
        request_id: request_id.into(),
        swarm_id: swarm.into(),
        content: content.into(),
        ..Default::default()
    };
    let mut steps = client.clone().inject(request).await?.into_inner();
    let mut ids = BTreeSet::new();
    let mut delivered = 0;
    while let Some(step) = steps.message().await? {
        ids.insert(step.injection_id.clone());
        delivered += u32::from(step.state() == pb::InjectionState::Delivered);
    }
    if delivered == 2 { Ok(ids) } else { Err(tonic::Status::unavailable("the stream ended")) }
}

/// Follows the log across restarts, by number.
async fn subscribe(client: Client, until: usize) -> Vec<pb::Event> {
    let mut events: Vec<pb::Event> = Vec::new();
    let mut ended = 0;
    while ended < until {
        let after_seq = events.last().map_or(0, |event| event.seq);
        let request = pb::WatchEventsRequest { after_seq, follow: true, ..Default::default() };
        let mut stream = answered(|| {
            let mut client = client.clone();
            let request = request.clone();
            async move { client.watch_events(request).await }
        })
        .await
        .into_inner();
        while let Ok(Some(message)) = stream.message().await {
            ended += message.events.iter().filter(|event| event.event == "turn_complete").count();
            events.extend(message.events);
            if ended >= until {
                break;
            }
        }
    }
    events
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_and_nothing_twice_while_everything_breaks() {
    let dir = tempfile::tempdir().unwrap();
    let (mailboxes, allocations, _contexts) = fakes::start(dir.path());
    let mut router = Some(Running::start(dir.path()));
    let client = client(dir.path());
    let swarm = answered(|| launch(&client, "launch", 2, "be kind")).await;
    assert_eq!((swarm.status.as_str(), swarm.node_count, swarm.provider.as_str()), ("running", 2, "local"));
    mailboxes.lose_answers.store(5, Ordering::Relaxed);
    mailboxes.break_streams.store(7, Ordering::Relaxed);

    let prompts = 60;
    let subscriber = subscribe(client.clone(), 2 + prompts * 2);
    let work = async {
        for n in 0..prompts {
            if n % 9 == 4 {
                let old = router.take().unwrap();
                if n % 2 == 0 {
                    old.kill();
                } else {
                    old.stop().unwrap();
                }
                router = Some(Running::start(dir.path()));
            }
            let request = format!("r{n}");
            let prompt = format!("prompt {n}");
            let first = answered(|| inject(&client, &request, &swarm.swarm_id, &prompt)).await;
            if n % 10 == 0 {
                let again = answered(|| inject(&client, &request, &swarm.swarm_id, &prompt)).await;
                assert_eq!(first, again, "a repeated request answers with the same injections");
            }
        }
    };
    let (events, ()) = tokio::time::timeout(Duration::from_mins(2), async { tokio::join!(subscriber, work) })
        .await
        .expect("it comes to an end");

    for executed in mailboxes.executed(&swarm.swarm_id) {
        let wanted: Vec<String> =
            std::iter::once("be kind".to_owned()).chain((0..prompts).map(|n| format!("prompt {n}"))).collect();
        assert_eq!(executed, wanted, "each prompt once, in order");
    }
    assert!(events.windows(2).all(|pair| pair[1].seq == pair[0].seq + 1), "each event once, in order");
    let mut last = BTreeMap::<&str, Vec<&str>>::new();
    for event in events.iter().filter(|event| !event.injection_id.is_empty()) {
        last.entry(&event.injection_id).or_default().push(&event.event);
    }
    assert_eq!(last.len(), 2 + prompts * 2);
    for (id, mut names) in last {
        assert_eq!(names[0], "inject_ack", "{id}");
        names.retain(|name| *name != "inject_delivered");
        assert_eq!(names, ["inject_ack", "turn_started", "assistant_delta", "assistant", "turn_complete"], "{id}");
    }
    assert_eq!(allocations.ensured.load(Ordering::Relaxed), 1);

    let mut steps = client
        .clone()
        .terminate_swarm(pb::TerminateSwarmRequest {
            request_id: "end".into(),
            swarm_id: swarm.swarm_id[..6].into(),
            force: false,
        })
        .await
        .unwrap()
        .into_inner();
    let mut over = false;
    while let Some(step) = steps.message().await.unwrap() {
        over = matches!(step.step, Some(pb::terminate_swarm_response::Step::Terminated(_)));
    }
    assert!(over, "the last step says that it is over");
    let listed = client.clone().list_swarms(pb::ListSwarmsRequest {}).await.unwrap().into_inner().swarms;
    assert_eq!(listed[0].status, "terminated");
    router.take().unwrap().stop().unwrap();
    assert!(!dir.path().join("router/owner.json").exists() && !dir.path().join("router.pid").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_backend_slows_nobody_down_and_changes_no_status() {
    let dir = tempfile::tempdir().unwrap();
    let (_mailboxes, allocations, contexts) = fakes::start(dir.path());
    let router = Running::start(dir.path());
    let mut client = client(dir.path());
    let swarm = answered(|| launch(&client, "first", 2, "")).await;
    allocations.hang.store(true, Ordering::Relaxed);
    let spec = LaunchSpec { node_count: 1, ..LaunchSpec::default() };
    let request = pb::LaunchSwarmRequest { request_id: "hung".into(), spec: Some(spec), ..Default::default() };
    let mut steps = client.launch_swarm(request).await.unwrap().into_inner();
    let first = steps.message().await.unwrap().unwrap();
    let Some(pb::launch_swarm_response::Step::Progress(progress)) = first.step else { panic!("{first:?}") };
    assert_eq!(progress.stage, "queued");

    let mut slowest = Duration::ZERO;
    for n in 0..100 {
        let begun = Instant::now();
        let listed = client.list_swarms(pb::ListSwarmsRequest {}).await.unwrap().into_inner().swarms;
        slowest = slowest.max(begun.elapsed());
        assert_eq!(
            listed.iter().map(|swarm| swarm.status.as_str()).collect::<Vec<_>>(),
            ["running", "launching"],
            "{listed:?}"
        );
        if n % 20 == 0 {
            inject(&client, &format!("r{n}"), &swarm.swarm_id, "x").await.unwrap();
        }
    }
    assert!(slowest < Duration::from_millis(500), "listing took {slowest:?}");
    let why = client.explain(pb::ExplainRequest { subject: progress.swarm_id.clone() }).await.unwrap().into_inner();
    assert_eq!((why.kind.as_str(), why.state.as_str()), ("swarm", "launching"));
    assert!(why.because[0].contains("has not confirmed"), "{why:?}");

    // The allocator goes away altogether.
    contexts[1].shutdown().cancel();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let info = client.get_info(pb::GetInfoRequest {}).await.unwrap().into_inner();
        if !info.allocator_error.is_empty() {
            break;
        }
        assert!(Instant::now() < deadline, "the allocator's absence was never noticed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let told = client.get_swarm(pb::GetSwarmRequest { swarm_id: swarm.swarm_id.clone() }).await.unwrap().into_inner();
    assert_eq!(told.swarm.unwrap().status, "running");
    assert!(!told.backend_error.is_empty());
    let status = client.get_swarm(pb::GetSwarmRequest { swarm_id: "nope".into() }).await.unwrap_err();
    assert_eq!((failure_of(&status).code, status.message()), (ErrorCode::UnknownSwarm, "unknown swarm_id"));
    router.stop().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_swarm_of_a_cluster_goes_through_its_own_follower_and_waits_for_it_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (near_files, allocations, _contexts) = fakes::start(dir.path());
    let far_files = Arc::clone(&allocations.far);
    let mut router = Running::start(dir.path());
    let client = client(dir.path());
    let near = answered(|| launch(&client, "near", 2, "")).await;

    // Nothing leads to the cluster yet: its swarm waits and says for what, the other works.
    let spec = LaunchSpec { node_count: 2, provider: "far".into(), ..LaunchSpec::default() };
    let waiting = {
        let (client, spec) = (client.clone(), spec.clone());
        async move { answered(|| launch_spec(&client, "far", spec.clone())).await }
    };
    let meanwhile = async {
        let deadline = Instant::now() + Duration::from_secs(30);
        let far_id = loop {
            let listed = client.clone().list_swarms(pb::ListSwarmsRequest {}).await.unwrap().into_inner().swarms;
            if let Some(swarm) = listed.iter().find(|swarm| swarm.swarm_id != near.swarm_id) {
                let subject = swarm.swarm_id.clone();
                let why = client.clone().explain(pb::ExplainRequest { subject }).await.unwrap().into_inner();
                if why.because.iter().any(|words| words.contains(fakes::FAR)) {
                    break swarm.swarm_id.clone();
                }
            }
            assert!(Instant::now() < deadline, "nobody says what it waits for: {listed:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        answered(|| inject(&client, "n1", &near.swarm_id, "near prompt")).await;
        (far_id, fakes::start_far(dir.path(), &far_files))
    };
    let (far, (far_id, way)) =
        tokio::time::timeout(Duration::from_mins(1), async { tokio::join!(waiting, meanwhile) }).await.unwrap();
    assert_eq!((far.swarm_id.as_str(), far.status.as_str()), (far_id.as_str(), "running"));

    // The way there breaks and comes back, and so does the router.
    far_files.lose_answers.store(3, Ordering::Relaxed);
    far_files.break_streams.store(4, Ordering::Relaxed);
    let mut way = Some(way);
    for n in 0..10 {
        if n == 3 {
            way.take().unwrap().shutdown().cancel();
            answered(|| inject(&client, "n2", &near.swarm_id, "still here")).await;
            way = Some(fakes::start_far(dir.path(), &far_files));
        }
        if n == 6 {
            router.kill();
            router = Running::start(dir.path());
        }
        let (request, prompt) = (format!("f{n}"), format!("far prompt {n}"));
        answered(|| inject(&client, &request, &far.swarm_id, &prompt)).await;
    }
    let wanted: Vec<String> = (0..10).map(|n| format!("far prompt {n}")).collect();
    let deadline = Instant::now() + Duration::from_secs(30);
    while far_files.executed(&far.swarm_id) != [wanted.clone(), wanted.clone()] {
        assert!(Instant::now() < deadline, "{:?}", far_files.executed(&far.swarm_id));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let own = ["near prompt".to_owned(), "still here".to_owned()];
    assert_eq!(near_files.executed(&near.swarm_id), [own.clone(), own]);
    assert!(near_files.executed(&far.swarm_id).is_empty() && far_files.executed(&near.swarm_id).is_empty());
    drop(way);
    router.stop().unwrap();
}
