//! A request to a provider and the head of its answer, whichever the family.

use std::fmt;
use std::io::Write as _;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, USER_AGENT};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri};
use jiff::Timestamp;

use super::endpoint::{Endpoint, EndpointError, ProviderKind};
use super::failure;
use super::hints::{self, Counting};
use super::http::{Answer, Destination, HttpClient};
use super::keys::Secret;
use crate::call::{CallError, FailureKind, LimitHints, Sink};

/// Most of the body of an error that is read.
const MAX_ERROR_BYTES: usize = 64 << 10;

/// Who is asked, how to get there, and what goes along with every request.
pub(super) struct Transport {
    pub(super) name: String,
    pub(super) kind: ProviderKind,
    pub(super) secret: Option<Secret>,
    pub(super) max_answer_bytes: usize,
    to: Destination,
    /// Path of the base address, without a slash at its end.
    base: String,
    headers: HeaderMap,
    counting: Counting,
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport")
            .field("name", &self.name)
            .field("kind", &self.kind)
            .field("to", &self.to)
            .field("base", &self.base)
            .finish_non_exhaustive()
    }
}

/// The beginning of every request to one path, up to the number of bytes of its body. There is a key in it.
#[derive(Clone)]
pub(super) struct Target(Arc<[u8]>);

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Target")
    }
}

/// An answer whose status is a success.
pub(super) struct Begun {
    pub(super) answer: Answer,
    pub(super) hints: LimitHints,
}

/// Either of the two ways in which a provider can answer a request that it understood.
pub(super) enum Reply {
    Begun(Begun),
    /// It withholds the answer, and says so with an error.
    Blocked(String, LimitHints),
}

impl Transport {
    pub(super) fn new(
        endpoint: &Endpoint,
        http: &HttpClient,
        variables: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, EndpointError> {
        let (origin, base) = endpoint.address()?;
        let name = endpoint.name.clone();
        let failed = |source| EndpointError::Key { name: name.clone(), source };
        let secret = endpoint.key.load(variables).map_err(failed)?;
        if secret.is_some() && !origin.tls && !near(&origin.host) {
            return Err(EndpointError::InTheClear { name, host: origin.host });
        }
        let mut headers = HeaderMap::new();
        if let Ok(host) = HeaderValue::from_str(&origin.authority()) {
            headers.insert(HOST, host);
        }
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
        headers.insert(USER_AGENT, HeaderValue::from_static(concat!("drover/", env!("CARGO_PKG_VERSION"))));
        if let Some(secret) = &secret {
            let (header, scheme) = match endpoint.kind {
                ProviderKind::Gemini => (HeaderName::from_static("x-goog-api-key"), ""),
                ProviderKind::Anthropic => (HeaderName::from_static("x-api-key"), ""),
                _ => (AUTHORIZATION, "Bearer "),
            };
            if let Some(value) = secret.header(scheme) {
                headers.insert(header, value);
            }
        }
        let counting =
            if endpoint.kind == ProviderKind::Groq { Counting::RequestsDailyTokensByMinute } else { Counting::Unknown };
        Ok(Self {
            name,
            kind: endpoint.kind,
            secret,
            max_answer_bytes: endpoint.max_answer_bytes,
            to: http.to(origin),
            base,
            headers,
            counting,
        })
    }

    /// Adds a header to every request.
    pub(super) fn add_header(&mut self, name: &'static str, value: &str) -> Result<(), EndpointError> {
        let value = HeaderValue::from_str(value).map_err(|_| EndpointError::Version { name: self.name.clone() })?;
        self.headers.insert(HeaderName::from_static(name), value);
        Ok(())
    }

    /// The path of the base address.
    pub(super) fn base(&self) -> &str {
        &self.base
    }

    /// What requests to this path begin with; where it is always the same, it is made once.
    pub(super) fn target(&self, path: &str) -> Result<Target, CallError> {
        let uri: Result<Uri, _> = path.parse();
        if uri.is_err() || path.bytes().any(|byte| byte <= b' ' || byte == 0x7f) {
            let message = "the name of the model has characters that no model has";
            return Err(CallError { maybe_billed: false, ..CallError::new(FailureKind::BadRequest, message) });
        }
        let mut head = format!("POST {path} HTTP/1.1\r\n").into_bytes();
        for (name, value) in &self.headers {
            head.extend_from_slice(name.as_str().as_bytes());
            head.extend_from_slice(b": ");
            head.extend_from_slice(value.as_bytes());
            head.extend_from_slice(b"\r\n");
        }
        head.extend_from_slice(b"content-length: ");
        Ok(Target(head.into()))
    }

    /// Sends a body and waits for the head of the answer.
    pub(super) async fn post(&self, target: &Target, body: &[u8], sink: &mut dyn Sink) -> Result<Reply, CallError> {
        let Target(head) = target;
        let mut request = Vec::with_capacity(head.len() + body.len() + 24);
        request.extend_from_slice(head);
        // Writing into memory does not fail.
        let _ = write!(request, "{}\r\n\r\n", body.len());
        request.extend_from_slice(body);
        let mut answer = self.to.send(&request).await.map_err(|error| failure::of_http(&error))?;
        drop(request);
        let hints = hints::from_fields(&answer.fields, self.counting, Timestamp::now);
        sink.head(&hints);
        if answer.status.is_success() {
            return Ok(Reply::Begun(Begun { answer, hints }));
        }
        let status = answer.status;
        // A body that cannot be read does not make the status less true.
        let body = answer.bytes(MAX_ERROR_BYTES).await.unwrap_or_default();
        if status == StatusCode::BAD_REQUEST
            && let Some(reason) = failure::blocked(&body)
        {
            return Ok(Reply::Blocked(reason, hints));
        }
        Err(failure::of_status(status, hints, &body, self.secret.as_ref()))
    }

    /// The whole body of an answer.
    pub(super) async fn whole(&self, answer: &mut Answer) -> Result<Bytes, CallError> {
        answer.bytes(self.max_answer_bytes).await.map_err(|error| failure::of_http(&error))
    }
}

/// On this machine or in a private network, where a plain connection is a choice that people make.
fn near(host: &str) -> bool {
    match host.parse::<std::net::IpAddr>() {
        Ok(std::net::IpAddr::V4(address)) => address.is_loopback() || address.is_private(),
        Ok(std::net::IpAddr::V6(address)) => address.is_loopback() || address.is_unique_local(),
        // A name without a dot is one of the local network.
        Err(_) => {
            let zone = host.rsplit('.').next().unwrap_or_default();
            !host.contains('.') || ["local", "internal", "localhost"].contains(&zone)
        }
    }
}
