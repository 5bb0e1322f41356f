//! The door for calls that come through the mailbox, from where nobody reaches this node over the network: looks for them, has each
//! answered by the same service as all others, and clears away what nobody waits for.
//!
//! Only this user can write the mailbox, so a call is this user's. One that an earlier process of this node began is not begun again:
//! whoever called hears that, and asks anew what may be asked twice.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use drover_mailbox::{Pairs, Post, PostedCall, PostedFrame, StreamWriter, is_network_fs};
use drover_proto::handoff::handoff_service_server::HandoffServiceServer;
use drover_service::{Context, MAX_MESSAGE_BYTES, now_us};
use http_body_util::{BodyExt as _, Full};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::codegen::Service as _;
use tonic::codegen::http::{self, HeaderMap, Request};
use tracing::{debug, warn};

use super::Door;

/// How often calls are looked for: while some are under way or were a moment ago, and else; on a file system of this host and on one
/// that several share.
const HOT: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(100));
const COLD: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(1));
/// How long it stays hot.
const STAYS_HOT: Duration = Duration::from_mins(1);
/// How often a caller hears that the answer is still being worked on.
const STILL: Duration = Duration::from_secs(5);
/// A call that was not touched for so long is of somebody who is gone.
const ABANDONED: Duration = Duration::from_mins(1);
/// Calls that are answered at a time; the others lie there until there is room.
const AT_ONCE: usize = 64;
/// No answer fills a segment.
const SEGMENT: u64 = 256 << 20;
/// Bytes of an answer in one line; as text they may be six times as many.
const PIECE: usize = 1 << 20;
/// Room for the path and the headers of a call.
const HEAD_BYTES: u64 = 64 << 10;

type Service = HandoffServiceServer<Door>;

/// A call that is there.
struct Seen {
    touched: SystemTime,
    /// When that was seen to change, by our own clock.
    changed: Instant,
    /// It is gone.
    over: CancellationToken,
}

/// Answers calls until the daemon ends.
pub(crate) async fn serve(service: Service, dir: PathBuf, ctx: Context) {
    let post = Post::new(&dir);
    let network = is_network_fs(&dir).ok().flatten().is_some();
    let pick = |pace: (Duration, Duration)| if network { pace.1 } else { pace.0 };
    let mut seen: BTreeMap<String, Seen> = BTreeMap::new();
    let mut hot_until = Instant::now();
    let mut complained = false;
    clear_leftovers(&post).await;
    loop {
        let looking = post.clone();
        match tokio::task::spawn_blocking(move || looking.list()).await {
            Ok(Ok(there)) => {
                complained = false;
                let now = Instant::now();
                seen.retain(|id, known| {
                    let stays = there.contains_key(id);
                    if !stays {
                        known.over.cancel();
                    }
                    stays
                });
                for (id, touched) in there {
                    if let Some(known) = seen.get_mut(&id) {
                        if known.touched != touched {
                            (known.touched, known.changed) = (touched, now);
                        } else if now.duration_since(known.changed) >= ABANDONED {
                            debug!(call = id, "nobody waits for an answer any more");
                            let post = post.clone();
                            let _ = tokio::task::spawn_blocking(move || post.remove(&id)).await;
                        }
                        continue;
                    }
                    hot_until = now + STAYS_HOT;
                    if seen.len() >= AT_ONCE {
                        break;
                    }
                    let over = CancellationToken::new();
                    seen.insert(id.clone(), Seen { touched, changed: now, over: over.clone() });
                    let letter = Letter { post: post.clone(), id, network, seq: 0 };
                    let (service, stopping) = (service.clone(), ctx.shutdown().clone());
                    ctx.spawn("posted call", letter.serve(service, over, stopping));
                }
            }
            Ok(Err(error)) if !complained => {
                complained = true;
                warn!(%error, dir = %dir.display(), "calls that come through the mailbox cannot be read");
            }
            Ok(Err(_)) | Err(_) => {}
        }
        let hot = !seen.is_empty() || Instant::now() < hot_until;
        tokio::select! {
            () = tokio::time::sleep(if hot { pick(HOT) } else { pick(COLD) }) => {}
            () = ctx.shutdown().cancelled() => return,
        }
    }
}

/// Answers whose call is gone are nobody's.
async fn clear_leftovers(post: &Post) {
    let post = post.clone();
    let _ = tokio::task::spawn_blocking(move || {
        let Ok(there) = post.list() else { return };
        for id in post.answers().into_iter().filter(|id| !there.contains_key(id)) {
            let _ = post.remove_answer(&id);
        }
    })
    .await;
}

/// One call and its answer.
struct Letter {
    post: Post,
    id: String,
    network: bool,
    /// Lines that were written.
    seq: u64,
}

impl Letter {
    /// Answers it, then waits until it is taken away, and forgets it.
    async fn serve(mut self, service: Service, over: CancellationToken, stopping: CancellationToken) {
        tokio::select! {
            answered = self.answer(service, &stopping) => if let Err(error) = answered {
                warn!(call = self.id, %error, "a call in the mailbox cannot be answered");
            },
            () = over.cancelled() => {}
        }
        tokio::select! {
            () = over.cancelled() => {}
            // The next process of this node clears it away.
            () = stopping.cancelled() => return,
        }
        let (post, id) = (self.post, self.id);
        let _ = tokio::task::spawn_blocking(move || post.remove_answer(&id)).await;
    }

    async fn answer(&mut self, mut service: Service, stopping: &CancellationToken) -> std::io::Result<()> {
        let (post, id) = (self.post.clone(), self.id.clone());
        let begun = post.answer(&id).exists();
        let opened = tokio::task::spawn_blocking(move || {
            let call = post.read(&id, MAX_MESSAGE_BYTES as u64 + HEAD_BYTES);
            Ok::<_, std::io::Error>((call, StreamWriter::open(post.answer(&id), SEGMENT)?))
        });
        let (call, writer) = opened.await??;
        let mut writer = Some(writer);
        let lost = |why: &str| PostedFrame::Lost { why: why.to_owned() };
        if begun {
            return self.write(&mut writer, &[lost("the sessions of the node were started anew")]).await;
        }
        let request = match call.and_then(request) {
            Ok(request) => request,
            Err(error) => {
                return self.write(&mut writer, &[lost(&format!("the call cannot be read: {error}"))]).await;
            }
        };
        let called = service.call(request);
        tokio::pin!(called);
        let response = loop {
            tokio::select! {
                biased;
                response = timeout(STILL, &mut called) => match response {
                    Ok(Ok(response)) => break response,
                    Ok(Err(never)) => match never {},
                    Err(_) => self.write(&mut writer, &[PostedFrame::Wait]).await?,
                },
                () = stopping.cancelled() => {
                    return self.write(&mut writer, &[lost("the sessions of the node are ending")]).await;
                }
            }
        };
        let (head, mut body) = response.into_parts();
        let frame = PostedFrame::Head { status: head.status.as_u16(), headers: pairs(&head.headers) };
        self.write(&mut writer, &[frame]).await?;
        loop {
            let next = tokio::select! {
                next = timeout(STILL, body.frame()) => next,
                () = stopping.cancelled() => {
                    return self.write(&mut writer, &[lost("the sessions of the node are ending")]).await;
                }
            };
            let frames = match next {
                Err(_) => vec![PostedFrame::Wait],
                Ok(None) => return self.write(&mut writer, &[PostedFrame::End { trailers: Pairs::new() }]).await,
                Ok(Some(Err(status))) => return self.write(&mut writer, &[lost(status.message())]).await,
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => data.chunks(PIECE).map(|piece| PostedFrame::Body(piece.to_vec())).collect(),
                    Err(frame) => {
                        let trailers = frame.into_trailers().map(|trailers| pairs(&trailers)).unwrap_or_default();
                        return self.write(&mut writer, &[PostedFrame::End { trailers }]).await;
                    }
                },
            };
            self.write(&mut writer, &frames).await?;
        }
    }

    async fn write(&mut self, writer: &mut Option<StreamWriter>, frames: &[PostedFrame]) -> std::io::Result<()> {
        let Some(mut open) = writer.take() else {
            return Err(std::io::Error::other("the answer cannot be written"));
        };
        let mut text = Vec::new();
        for frame in frames {
            self.seq += 1;
            frame.write(self.seq, now_us(), &mut text).map_err(std::io::Error::other)?;
        }
        let network = self.network;
        let (open, written) = tokio::task::spawn_blocking(move || {
            // Readers on other hosts see what has reached the server.
            let written = open.append(&text).and_then(|()| if network { open.sync() } else { Ok(()) });
            (open, written)
        })
        .await?;
        *writer = Some(open);
        written
    }
}

fn request(call: PostedCall) -> std::io::Result<Request<Body>> {
    let mut request = Request::post(&call.path).version(http::Version::HTTP_2);
    for (name, value) in &call.headers {
        request = request.header(name, value);
    }
    request.body(Body::new(Full::new(Bytes::from(call.body)))).map_err(std::io::Error::other)
}

/// Headers that are text; those of this service are.
fn pairs(headers: &HeaderMap) -> Pairs {
    let text = headers.iter().filter_map(|(name, value)| Some((name.to_string(), value.to_str().ok()?.to_owned())));
    text.collect()
}
