//! Calls to a node through the files of its mailbox, by way of the follower that is on the node's side of them.

use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use drover_mailbox::{Pairs, PostedCall, PostedFrame, lines};
use drover_proto::common::NodeRef;
use drover_proto::mailbox::mailbox_service_client::MailboxServiceClient;
use drover_proto::mailbox::{CarryRequest, CarryResponse};
use drover_service::MAX_MESSAGE_BYTES;
use futures::future::BoxFuture;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use tokio::time::timeout;
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use tonic::codegen::{Service, StdError};
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::reason;

/// A node that is at work says so every few seconds.
const SILENT: Duration = Duration::from_secs(30);
/// What the other side makes anew.
const NOT_CARRIED: [&str; 3] = ["te", "user-agent", "content-length"];

/// The way to one node. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Postman {
    follower: MailboxServiceClient<Channel>,
    /// The follower, as people know it.
    by: String,
    node: NodeRef,
}

impl Postman {
    pub(super) fn new(follower: Channel, by: &str, node: NodeRef) -> Self {
        let follower = MailboxServiceClient::new(follower)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Self { follower, by: by.to_owned(), node }
    }

    async fn carry(mut self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let (head, body) = request.into_parts();
        let mut headers = pairs(&head.headers);
        headers.retain(|(name, _)| !NOT_CARRIED.contains(&name.as_str()));
        let body = body.collect().await?.to_bytes().to_vec();
        let call = PostedCall { path: head.uri.path().to_owned(), headers, body };
        let call = call.encode().map_err(|error| Status::internal(error.to_string()))?;
        let request = CarryRequest {
            node: Some(self.node.clone()),
            call_id: uuid::Uuid::new_v4().simple().to_string(),
            call: call.into(),
        };
        let stream = match self.follower.carry(request).await {
            Ok(response) => response.into_inner(),
            Err(status) => return Err(self.told(&status)),
        };
        let mut answer = Answer { stream, ready: Vec::new().into_iter(), have: 0, by: self };
        match answer.next().await? {
            PostedFrame::Head { status, headers } => {
                let mut response = Response::new(answer.into_body());
                *response.status_mut() =
                    status.try_into().map_err(|_| Status::unavailable("the node answers with no status"))?;
                *response.headers_mut() = header_map(headers);
                Ok(response)
            }
            _ => Err(Status::unavailable("the answer of the node has no beginning")),
        }
    }

    /// What is said when the follower, or the way to it, is in the way: it is not the node's word, so another node may do.
    fn told(&self, status: &Status) -> Status {
        let why = match status.code() {
            Code::Unimplemented => {
                "it is of an earlier version of drover, which carries no calls; end it there".to_owned()
            }
            _ => reason(status),
        };
        Status::unavailable(format!("{}: {why}", self.by))
    }
}

impl Service<Request<Body>> for Postman {
    type Response = Response<Body>;
    type Error = StdError;
    type Future = BoxFuture<'static, Result<Response<Body>, StdError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), StdError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let me = self.clone();
        Box::pin(async move { Ok(me.carry(request).await.unwrap_or_else(Status::into_http)) })
    }
}

/// What comes back.
struct Answer {
    stream: Streaming<CarryResponse>,
    ready: std::vec::IntoIter<PostedFrame>,
    /// The number of the last line.
    have: u64,
    by: Postman,
}

impl Answer {
    /// The next frame that says something.
    async fn next(&mut self) -> Result<PostedFrame, Status> {
        loop {
            match self.ready.next() {
                Some(PostedFrame::Wait) => continue,
                Some(PostedFrame::Lost { why }) => return Err(Status::unavailable(why)),
                Some(frame) => return Ok(frame),
                None => {}
            }
            let silent =
                |_| Status::unavailable(format!("{}: nothing was heard for {} s", self.by.by, SILENT.as_secs()));
            let response = match timeout(SILENT, self.stream.message()).await.map_err(silent)? {
                Ok(Some(response)) => response,
                Ok(None) => return Err(Status::unavailable(format!("{}: the answer broke off", self.by.by))),
                Err(status) => return Err(self.by.told(&status)),
            };
            let mut frames = Vec::new();
            for line in lines(&response.lines) {
                let (seq, frame) = PostedFrame::read(line).map_err(|error| Status::unavailable(error.to_string()))?;
                // Damage in a file is read again, so a line may come twice.
                if seq <= self.have {
                    continue;
                }
                if seq > self.have + 1 {
                    return Err(Status::unavailable("a part of the answer of the node is missing"));
                }
                self.have = seq;
                frames.push(frame);
            }
            self.ready = frames.into_iter();
        }
    }

    fn into_body(self) -> Body {
        let frames = futures::stream::unfold(Some(self), |answer| async {
            let mut answer = answer?;
            match answer.next().await {
                Ok(PostedFrame::Body(bytes)) => Some((Ok(Frame::data(Bytes::from(bytes))), Some(answer))),
                Ok(PostedFrame::End { trailers }) => Some((Ok(Frame::trailers(header_map(trailers))), None)),
                Ok(_) => Some((Err(Status::unavailable("the answer of the node makes no sense")), None)),
                Err(status) => Some((Err(status), None)),
            }
        });
        Body::new(StreamBody::new(Box::pin(frames)))
    }
}

fn pairs(headers: &HeaderMap) -> Pairs {
    let text = headers.iter().filter_map(|(name, value)| Some((name.to_string(), value.to_str().ok()?.to_owned())));
    text.collect()
}

fn header_map(pairs: Pairs) -> HeaderMap {
    let parsed =
        |(name, value): (String, String)| Some((HeaderName::try_from(name).ok()?, HeaderValue::try_from(value).ok()?));
    pairs.into_iter().filter_map(parsed).collect()
}
