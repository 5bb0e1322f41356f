//! One port for everything, and only for those who may.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::process::Command;
use std::time::Duration;
use tonic_reflection::pb::v1alpha::server_reflection_client::ServerReflectionClient as OldClient;
use tonic_reflection::pb::v1alpha::server_reflection_request::MessageRequest as OldRequest;

use drover_config::SecurityConfig;
use drover_proto::worker::worker_service_server::{WorkerService, WorkerServiceServer};
use drover_proto::worker::{DrainRequest, DrainResponse, GetStatusRequest, GetStatusResponse};
use drover_service::{Context, Server, Target, address_book, connect};
use tonic::{Request, Response, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

struct Quiet;

#[tonic::async_trait]
impl WorkerService for Quiet {
    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, Status> {
        Ok(Response::new(GetStatusResponse { agent: "echo".into(), ..Default::default() }))
    }
    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
        Err(Status::unavailable("no"))
    }
}

fn serve(ctx: &Context) -> std::net::SocketAddr {
    let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let served = ctx
        .bind("worker", None, any)
        .and_then(|listener| Server::new(ctx).grpc(WorkerServiceServer::new(Quiet)).serve(listener));
    served.unwrap_or_else(|error| panic!("{error:#}"))
}

#[tokio::test]
async fn health_reflection_metrics_and_service_share_a_port() {
    let dir = tempfile::tempdir().unwrap();
    let ctx = Context::for_test("worker", dir.path());
    let addr = serve(&ctx);

    for (path, expected) in [("healthz", "ok"), ("metrics", "drover_refused_connections")] {
        let body = reqwest::get(format!("http://{addr}/{path}")).await.unwrap().text().await.unwrap();
        assert!(body.contains(expected), "{path}: {body}");
    }

    // Found through the address book, as every daemon finds the others.
    let mut worker = drover_proto::worker::worker_service_client::WorkerServiceClient::new(ctx.channel("worker"));
    assert_eq!(worker.get_status(GetStatusRequest {}).await.unwrap().into_inner().agent, "echo");

    let channel = connect(Target::Address(addr.to_string()));
    let request = HealthCheckRequest { service: "drover.worker.v1.WorkerService".into() };
    assert_eq!(HealthClient::new(channel.clone()).check(request).await.unwrap().into_inner().status, 1);

    let ask = ServerReflectionRequest {
        message_request: Some(MessageRequest::ListServices(String::new())),
        ..Default::default()
    };
    let mut answers = ServerReflectionClient::new(channel)
        .server_reflection_info(tokio_stream::once(ask))
        .await
        .unwrap()
        .into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"drover.worker.v1.WorkerService"), "{names:?}");
    assert!(!names.contains(&"drover.router.v1.RouterService"), "only what is served is named: {names:?}");

    // The older version too, which most installed tools speak.
    let ask = tonic_reflection::pb::v1alpha::ServerReflectionRequest {
        message_request: Some(OldRequest::FileContainingSymbol("drover.worker.v1.WorkerService".into())),
        ..Default::default()
    };
    let mut old = OldClient::new(connect(Target::Address(addr.to_string())));
    let mut answers = old.server_reflection_info(tokio_stream::once(ask)).await.unwrap().into_inner();
    let answer = format!("{:?}", answers.message().await.unwrap().unwrap().message_response.unwrap());
    assert!(answer.contains("FileDescriptorResponse"), "{answer}");
}

#[tokio::test]
async fn a_channel_follows_a_daemon_to_another_port() {
    let dir = tempfile::tempdir().unwrap();
    let client = Context::for_test("client", dir.path());
    let mut worker = drover_proto::worker::worker_service_client::WorkerServiceClient::new(client.channel("worker"));
    assert!(worker.get_status(GetStatusRequest {}).await.is_err(), "nobody serves yet");
    for _ in 0..2 {
        let ctx = Context::for_test("worker", dir.path());
        serve(&ctx);
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        while worker.get_status(GetStatusRequest {}).await.is_err() {
            assert!(tokio::time::Instant::now() < deadline, "the channel did not find the daemon");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        ctx.shutdown().cancel();
    }
}

#[tokio::test]
async fn a_default_port_that_is_taken_gives_way_and_an_explicit_one_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let ctx = Context::for_test("worker", dir.path());
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap();
    let listener = ctx.bind("worker", None, addr).unwrap();
    assert_ne!(listener.local_addr(), addr);
    let error = ctx.bind("worker", Some(addr), addr).err().unwrap().to_string();
    assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
    let error = ctx.bind("worker", Some("0.0.0.0:0".parse().unwrap()), addr).err().unwrap().to_string();
    assert!(error.contains("loopback"), "{error}");
    assert_eq!(address_book::read(ctx.state(), "worker"), None, "nothing is served, so nothing is published");
}

/// What a program of another user receives when it asks for `/healthz`.
fn ask_as(uid: u32, addr: std::net::SocketAddr) -> String {
    get_as(uid, addr, "/healthz")
}

/// What a program of another user receives when it asks for this path.
fn get_as(uid: u32, addr: std::net::SocketAddr, path: &str) -> String {
    let script = format!(
        "exec 3<>/dev/tcp/{}/{} && printf 'GET {path} HTTP/1.0\\r\\n\\r\\n' >&3 && timeout 5 cat <&3",
        addr.ip(),
        addr.port()
    );
    let uid = uid.to_string();
    let output = Command::new("setpriv")
        .args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "bash", "-c", &script])
        .output()
        .unwrap_or_else(|error| panic!("setpriv: {error}"));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn another_user_gets_nothing_unless_allowed() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("needs root to become another user");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let addr = serve(&Context::for_test("worker", dir.path()));
    let (mine, theirs) = tokio::task::spawn_blocking(move || (ask_as(0, addr), ask_as(65534, addr))).await.unwrap();
    assert!(mine.contains("200 OK"), "{mine}");
    assert_eq!(theirs, "", "not one byte for a stranger");

    let dir = tempfile::tempdir().unwrap();
    let allowed = SecurityConfig { allow_uids: vec![65534], ..SecurityConfig::default() };
    let addr = serve(&Context::for_test_with("worker", dir.path(), &allowed));
    let theirs = tokio::task::spawn_blocking(move || ask_as(65534, addr)).await.unwrap();
    assert!(theirs.contains("200 OK"), "{theirs}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_observer_sees_how_a_daemon_fares_and_nothing_else() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("needs root to become another user");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let security = SecurityConfig { metrics_uids: vec![65534], ..SecurityConfig::default() };
    let addr = serve(&Context::for_test_with("worker", dir.path(), &security));
    let get = |path: &'static str| tokio::task::spawn_blocking(move || get_as(65534, addr, path));
    assert!(get("/healthz").await.unwrap().contains("200 OK"));
    assert!(get("/metrics").await.unwrap().contains("drover_build_info"));
    let targets = get("/targets").await.unwrap();
    assert!(targets.contains(&addr.to_string()) && targets.contains("\"daemon\":\"worker\""), "{targets}");
    for path in ["/drover.worker.v1.WorkerService/GetStatus", "/grpc.reflection.v1.ServerReflection/x", "/"] {
        let answer = get(path).await.unwrap();
        assert!(answer.contains("404 Not Found") && !answer.contains("grpc-status"), "{path}: {answer}");
    }
    // The JSON-line plane and everything else that knows no roles stays shut.
    let ctx = Context::for_test_with("router", dir.path(), &security);
    let listener = ctx.bind("control", None, "127.0.0.1:0".parse().unwrap()).unwrap();
    let addr = listener.local_addr();
    let (told, mut let_in) = tokio::sync::oneshot::channel();
    ctx.spawn("accept", async move {
        if listener.accept().await.is_ok() {
            let _ = told.send(());
        }
    });
    let theirs = tokio::task::spawn_blocking(move || get_as(65534, addr, "/")).await.unwrap();
    assert_eq!(theirs, "");
    assert!(let_in.try_recv().is_err(), "an observer was let in");
}

/// The value of the one series of `/metrics` that begins so.
async fn metric(addr: std::net::SocketAddr, series: &str) -> Option<f64> {
    let text = reqwest::get(format!("http://{addr}/metrics")).await.unwrap().text().await.unwrap();
    text.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok())
}

#[tokio::test]
async fn calls_are_counted_by_method_and_code() {
    let dir = tempfile::tempdir().unwrap();
    let ctx = Context::for_test("worker", dir.path());
    let addr = serve(&ctx);
    let mut worker = drover_proto::worker::worker_service_client::WorkerServiceClient::new(ctx.channel("worker"));
    for _ in 0..3 {
        worker.get_status(GetStatusRequest {}).await.unwrap();
    }
    worker.drain(DrainRequest::default()).await.unwrap_err();
    // Another daemon's service, and none at all: neither makes a series of its own.
    let mut router = drover_proto::router::router_service_client::RouterServiceClient::new(ctx.channel("worker"));
    router.get_info(drover_proto::router::GetInfoRequest {}).await.unwrap_err();

    let of = |name: &str, code: &str| format!("drover_rpc_calls_total{{method=\"{name}\",code=\"{code}\"}}");
    let status = "drover.worker.v1.WorkerService/GetStatus";
    // What a call counts stands once its last frame has left, a moment after the answer.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while metric(addr, &of(status, "ok")).await != Some(3.0) {
        assert!(tokio::time::Instant::now() < deadline, "{:?}", metric(addr, &of(status, "ok")).await);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(metric(addr, &of("drover.worker.v1.WorkerService/Drain", "unavailable")).await, Some(1.0));
    assert_eq!(metric(addr, &of("other", "unimplemented")).await, Some(1.0));
    let count = format!("drover_rpc_seconds_count{{method=\"{status}\"}}");
    assert_eq!(metric(addr, &count).await, Some(3.0));

    // A stream that its caller drops is a call that was given up, and open until then.
    let mut health = HealthClient::new(connect(Target::Address(addr.to_string())));
    let watch = "grpc.health.v1.Health/Watch";
    let open = "drover_rpc_open{service=\"grpc.health.v1.Health\"}";
    let stream = health.watch(HealthCheckRequest { service: String::new() }).await.unwrap();
    assert_eq!(metric(addr, open).await, Some(1.0));
    drop((stream, health));
    while metric(addr, &of(watch, "cancelled")).await != Some(1.0) {
        assert!(tokio::time::Instant::now() < deadline, "the dropped stream is still open");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(metric(addr, open).await, Some(0.0));
}
