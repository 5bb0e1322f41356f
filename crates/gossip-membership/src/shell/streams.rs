//! Requests of ours to other nodes over connections. Each is a task that ends with one word to the node.

use std::error::Error as _;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use drover_proto::gossip as pb;
use drover_proto::gossip::gossip_service_client::GossipServiceClient;
use drover_service::now_us;
use drover_service::pki::{IdentityHandle, KeyRing};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::core::{NodeKey, Outcome, PullAnswer, Request as Asked, SignedRecord};
use crate::wire;

/// Most bytes of one message; entries are spread over as many as it takes.
pub(super) const MAX_MESSAGE: usize = 1 << 20;
/// Entries in one message: even the largest records fit.
pub(super) const PART: usize = 128;
/// Most entries that one exchange may bring.
pub(super) const MAX_ENTRIES: usize = 100_000;
/// Header by which nodes without identity say who they are; never believed when there is an identity.
pub(super) const WHO: &str = "drover-node-key";
/// How long an exchange of state may take.
const EXCHANGE: Duration = Duration::from_secs(10);

/// How long a connection that was of use stays for the next exchange. A node that joins asks the same one several times, and a
/// handshake costs both sides more than all that they say.
const KEEP: Duration = Duration::from_secs(1);
/// Connections that are kept at a time.
const KEPT: usize = 4;

/// How connections to other nodes are made, and those that are still there.
#[derive(Clone)]
pub(crate) struct Dial {
    /// Both sides show a certificate of the instance; without an identity in the clear, to nodes on this machine.
    identity: Option<IdentityHandle>,
    kept: Arc<Mutex<Vec<Kept>>>,
}

/// A connection to one start of a node.
struct Kept {
    key: NodeKey,
    boot: u64,
    until: Instant,
    client: GossipServiceClient<Channel>,
}

/// Whom to ask.
pub(super) struct Peer {
    pub(super) record: Arc<SignedRecord>,
    pub(super) own: NodeKey,
}

/// What came of it, and what the other side's clock showed against ours.
pub(super) struct Ended {
    pub(super) outcome: Outcome,
    pub(super) skew_us: Option<i64>,
    /// Why, when it came to nothing.
    pub(super) why: Option<String>,
}

impl Dial {
    /// Shows the identity in force, or nothing.
    pub(crate) fn new(identity: Option<IdentityHandle>) -> Self {
        Self { identity, kept: Arc::default() }
    }

    fn channel(&self, peer: &Peer) -> Channel {
        let record = &peer.record.record;
        let addr = SocketAddr::new(record.addr.ip(), record.rpc_port);
        match &self.identity {
            Some(identity) => drover_service::connect_node(identity, addr, &record.node_id),
            None => drover_service::connect(drover_service::Target::Address(addr.to_string())),
        }
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection of a moment ago, or a new one.
    fn kept_client(&self, peer: &Peer) -> GossipServiceClient<Channel> {
        let (key, boot, now) = (peer.record.key, peer.record.record.boot, Instant::now());
        let mut all = self.kept();
        if let Some(kept) = all.iter_mut().find(|kept| kept.key == key && kept.boot == boot) {
            kept.until = now + KEEP;
            return kept.client.clone();
        }
        all.retain(|kept| kept.key != key);
        if all.len() >= KEPT {
            all.remove(0);
        }
        let client = self.client(peer);
        all.push(Kept { key, boot, until: now + KEEP, client: client.clone() });
        client
    }

    /// Ends connections that have been of no use for a while.
    pub(super) fn let_go(&self) {
        let now = Instant::now();
        self.kept().retain(|kept| kept.until > now);
    }

    /// Ends the connection to a node, and all of them with `None`: those that this node showed an earlier certificate to.
    pub(super) fn hang_up(&self, key: Option<NodeKey>) {
        self.kept().retain(|kept| key.is_some_and(|key| kept.key != key));
    }

    pub(super) fn client(&self, peer: &Peer) -> GossipServiceClient<Channel> {
        GossipServiceClient::new(self.channel(peer))
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }
}

/// Asks, within a time.
pub(super) async fn ask(dial: Dial, peer: Peer, request: Asked, ping: Duration) -> Ended {
    let limit = if matches!(request, Asked::Ping) { ping } else { EXCHANGE };
    let ended = tokio::time::timeout(limit, exchange(&dial, &peer, request)).await;
    if !matches!(ended, Ok(Ok(_))) {
        dial.hang_up(Some(peer.record.key));
    }
    match ended {
        Ok(Ok((outcome, skew_us))) => Ended { outcome, skew_us, why: None },
        Ok(Err(status)) => {
            let outcome = if refused(&status) { Outcome::Refused } else { Outcome::Silent };
            Ended { outcome, skew_us: None, why: Some(words(&status)) }
        }
        Err(_) => Ended { outcome: Outcome::Silent, skew_us: None, why: Some("no answer in time".to_owned()) },
    }
}

/// Fetches the key ring of a node that has a newer one.
pub(super) async fn ring(dial: Dial, peer: Peer) -> Result<KeyRing, String> {
    let asked = async {
        let answer = dial.client(&peer).ring(signed(peer.own, pb::RingRequest {})).await;
        answer.map_err(|status| words(&status))
    };
    let answer = tokio::time::timeout(EXCHANGE, asked).await.map_err(|_| "no answer in time".to_owned())??;
    KeyRing::from_json(&answer.into_inner().ring).map_err(|error| error.to_string())
}

/// Says who asks, for a side that cannot see it from a certificate.
pub(super) fn signed<T>(own: NodeKey, message: T) -> Request<T> {
    let mut request = Request::new(message);
    if let Ok(value) = own.to_string().parse() {
        request.metadata_mut().insert(WHO, value);
    }
    request
}

async fn exchange(dial: &Dial, peer: &Peer, request: Asked) -> Result<(Outcome, Option<i64>), Status> {
    // Whether anybody listens there is what a ping asks: that takes a connection of its own.
    let mut client = if matches!(request, Asked::Ping) { dial.client(peer) } else { dial.kept_client(peer) };
    let bad = |error: wire::Malformed| Status::data_loss(error.to_string());
    match request {
        Asked::Ping => {
            client.ping(signed(peer.own, pb::PingRequest { target: peer.record.key.0 })).await?;
            Ok((Outcome::Pong, None))
        }
        Asked::Push(entries) => {
            let parts = wire::entries_to(&entries, PART).into_iter().map(|entries| pb::PushRequest { entries });
            client.push(signed(peer.own, tokio_stream::iter(parts.collect::<Vec<_>>()))).await?;
            Ok((Outcome::Pushed, None))
        }
        Asked::Pull(pull) => {
            let record = Some(wire::record_to(&pull.record).map_err(bad)?);
            let sent = now_us();
            let message = pb::PullRequest { record, buckets: pull.buckets.to_vec(), now_us: sent };
            let mut parts = client.pull(signed(peer.own, message)).await?.into_inner();
            let (mut answerer, mut differing, mut entries, mut skew) = (None, 0, Vec::new(), None);
            while let Some(part) = parts.message().await? {
                if let Some(record) = part.record {
                    answerer = Some(wire::record_from(Some(record)).map_err(bad)?);
                    differing = part.differing;
                    // Half the way there and back lies between the two readings.
                    let middle = sent + now_us().saturating_sub(sent) / 2;
                    skew = Some(part.now_us.cast_signed().saturating_sub(middle.cast_signed()));
                }
                entries.extend(wire::entries_from(part.entries).map_err(bad)?);
                if entries.len() > MAX_ENTRIES {
                    return Err(Status::resource_exhausted("more members than any cluster has"));
                }
            }
            let record = Arc::new(answerer.ok_or_else(|| bad(wire::Malformed::NoRecord))?);
            Ok((Outcome::Pulled(PullAnswer { record, differing, entries }), skew))
        }
    }
}

/// The host is up, and nobody listens there.
fn refused(status: &Status) -> bool {
    let mut cause = status.source();
    while let Some(error) = cause {
        if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
            return true;
        }
        cause = error.source();
    }
    false
}

fn words(status: &Status) -> String {
    let mut text = if status.code() == Code::Unavailable { String::new() } else { format!("{:?}: ", status.code()) };
    text.push_str(status.message());
    let mut cause = status.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
