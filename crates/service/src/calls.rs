//! What every daemon counts of its gRPC methods: how many calls, how they ended, how long they took, how many are open.
//!
//! A method has a series once it has done something. Whatever this daemon does not serve is counted as `other`, so that
//! strangers cannot make series. The code of a call stands in its trailers, so the body is watched to its end; one that is
//! dropped before is a call that its caller gave up.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as Waker, Poll};
use std::time::Instant;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::middleware::Next;
use axum::response::Response;
use hyper::body::{Frame, SizeHint};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use tonic::Code;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabel {
    method: Arc<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabel {
    method: Arc<String>,
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ServiceLabel {
    service: &'static str,
}

/// The metrics of all methods. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Calls {
    services: Arc<BTreeMap<&'static str, Gauge>>,
    other: Gauge,
    ended: Family<CallLabel, Counter>,
    seconds: Family<MethodLabel, Histogram, fn() -> Histogram>,
}

impl Calls {
    /// Registers them for these services.
    pub(crate) fn register(registry: &mut Registry, services: impl IntoIterator<Item = &'static str>) -> Self {
        let open = Family::<ServiceLabel, Gauge>::default();
        let of = |service: &'static str| open.get_or_create(&ServiceLabel { service }).clone();
        let calls = Self {
            services: Arc::new(services.into_iter().map(|service| (service, of(service))).collect()),
            other: of(OTHER),
            ended: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(exponential_buckets(0.000_5, 4.0, 10))),
        };
        let registry = registry.sub_registry_with_prefix("rpc");
        registry.register("calls", "Calls that ended, by method and gRPC code", calls.ended.clone());
        registry.register("seconds", "Duration of calls, streams as a whole", calls.seconds.clone());
        registry.register("open", "Calls that are open", open);
        calls
    }

    fn begin(&self, path: &str) -> Call {
        let path = path.strip_prefix('/').unwrap_or(path);
        let known = path.split_once('/').and_then(|(service, _)| self.services.get(service));
        let open = known.unwrap_or(&self.other).clone();
        open.inc();
        let method = known.map(|_| path.to_owned());
        Call { calls: self.clone(), method, open, began: Instant::now(), code: None }
    }
}

/// What is not served here.
const OTHER: &str = "other";

/// One call under way; it is counted when it is dropped.
struct Call {
    calls: Calls,
    method: Option<String>,
    open: Gauge,
    began: Instant,
    code: Option<Code>,
}

impl Drop for Call {
    fn drop(&mut self) {
        self.open.dec();
        let code = self.code.unwrap_or(Code::Cancelled);
        // A method that the service does not have would be a series with a name of the caller's choice.
        let method = self.method.take().filter(|_| code != Code::Unimplemented);
        let method = Arc::new(method.unwrap_or_else(|| OTHER.to_owned()));
        let took = self.began.elapsed().as_secs_f64();
        self.calls.seconds.get_or_create(&MethodLabel { method: Arc::clone(&method) }).observe(took);
        self.calls.ended.get_or_create(&CallLabel { method, code: name(code) }).inc();
    }
}

/// Measures one call.
pub(crate) async fn measure(State(calls): State<Calls>, request: Request, next: Next) -> Response {
    let mut call = calls.begin(request.uri().path());
    let response = next.run(request).await;
    // A call that fails at once has its code among the headers; a path that leads nowhere has none at all.
    call.code = code_of(response.headers());
    if call.code.is_none() && !response.status().is_success() {
        call.code = Some(Code::Unimplemented);
    }
    if call.code.is_some() {
        return response;
    }
    response.map(|body| Body::new(Measured { body, call }))
}

fn code_of(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|code| Code::from_bytes(code.as_bytes()))
}

/// The body of an answer, watched for its trailers.
struct Measured {
    body: Body,
    call: Call,
}

impl HttpBody for Measured {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Waker<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                if let Some(code) = frame.trailers_ref().and_then(code_of) {
                    self.call.code = Some(code);
                }
            }
            Poll::Ready(Some(Err(_))) => self.call.code = Some(Code::Internal),
            Poll::Ready(None) if self.call.code.is_none() => self.call.code = Some(Code::Unknown),
            Poll::Ready(None) | Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::Cancelled => "cancelled",
        Code::Unknown => "unknown",
        Code::InvalidArgument => "invalid_argument",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::NotFound => "not_found",
        Code::AlreadyExists => "already_exists",
        Code::PermissionDenied => "permission_denied",
        Code::ResourceExhausted => "resource_exhausted",
        Code::FailedPrecondition => "failed_precondition",
        Code::Aborted => "aborted",
        Code::OutOfRange => "out_of_range",
        Code::Unimplemented => "unimplemented",
        Code::Internal => "internal",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data_loss",
        Code::Unauthenticated => "unauthenticated",
    }
}
