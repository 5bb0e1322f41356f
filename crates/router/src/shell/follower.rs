//! The client of the outbox follower: one stream of records in, inbox records out.

use std::sync::Arc;
use std::time::Duration;

use drover_mailbox::{Record, encode_line};
use drover_proto::common::{Cursor, NodeRef, OutboxRef};
use drover_proto::failure_of;
use drover_proto::mailbox::mailbox_service_client::MailboxServiceClient;
use drover_proto::mailbox::{DeliverRequest, Delivery, FollowFrom, FollowRequest, RemoveSwarmRequest};
use drover_service::{Context, MAX_MESSAGE_BYTES, Target, connect, in_trace, now_us};
use drover_types::SwarmId;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use serde_json::value::RawValue;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::transport::Channel;
use tracing::{debug, info, warn};

use super::Backoff;
use super::decode::Decoder;
use super::orders::{FollowPlan, Plans, SidePlans};
use crate::core::effects::{DeliveryOrder, InboxBody, InboxRecord};
use crate::core::inject_data;
use crate::core::input::{DeliveryReport, Input, Outcome};
use crate::core::model::Side;
use crate::metrics::Metrics;
use crate::store::{Command, StoreHandle};

/// Chunks that may wait for the writer; then the follower waits.
const CHUNKS: usize = 16;
/// Changes of outboxes in one message.
const MOST_CHANGES: usize = 4096;
/// Deliver calls at the same time; each is mostly waiting for the disk.
const CALLS: usize = 8;
/// Bytes of one Deliver call, unless a single order is larger.
const MOST_BYTES: usize = 8 << 20;
/// Orders of one Deliver call.
const MOST_ORDERS: usize = 2048;
/// How long one Deliver call may take before its outcome counts as unknown.
const DELIVER_TIMEOUT: Duration = Duration::from_secs(30);

type Client = MailboxServiceClient<Channel>;

/// Starts the tasks that talk to followers: to the one beside the router from the start, to those of clusters when they are
/// wanted.
pub(crate) fn run(ctx: &Context, plans: &Arc<Plans>, store: &StoreHandle, metrics: &Metrics, channel: Channel) {
    run_side(ctx, &Side::default(), &plans.beside, store, metrics, channel);
    let (plans, store, metrics) = (Arc::clone(plans), store.clone(), metrics.clone());
    let (starting, shutdown) = (ctx.clone(), ctx.shutdown().clone());
    ctx.spawn("reach-followers", async move {
        let work = async {
            loop {
                for (side, plans) in plans.fresh.take() {
                    let target = Target::Daemon { state: starting.state().clone(), name: side.to_string() };
                    run_side(&starting, &side, &plans, &store, &metrics, connect(target));
                }
                plans.fresh.rung().await;
            }
        };
        shutdown.run_until_cancelled(work).await;
    });
}

/// Starts the tasks that talk to one follower.
fn run_side(
    ctx: &Context,
    side: &Side,
    plans: &Arc<SidePlans>,
    store: &StoreHandle,
    metrics: &Metrics,
    channel: Channel,
) {
    let client = MailboxServiceClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let until_over = |task: BoxFuture<'static, ()>| {
        let (shutdown, over) = (ctx.shutdown().clone(), plans.over.clone());
        async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = over.cancelled() => {}
                () = task => {}
            }
        }
    };
    let follow = follow_for_ever(side.clone(), Arc::clone(plans), store.clone(), metrics.clone(), client.clone());
    ctx.spawn("follow-outboxes", until_over(follow.boxed()));
    let deliver = deliver_for_ever(ctx.clone(), Arc::clone(plans), store.clone(), metrics.clone(), client.clone());
    ctx.spawn("deliver", until_over(deliver.boxed()));
    let remove = remove_for_ever(Arc::clone(plans), store.clone(), client);
    ctx.spawn("remove-mailboxes", until_over(remove.boxed()));
}

async fn follow_for_ever(side: Side, plans: Arc<SidePlans>, store: StoreHandle, metrics: Metrics, client: Client) {
    let mut backoff = Backoff::default();
    let permits = Arc::new(Semaphore::new(CHUNKS));
    loop {
        let ended = follow(&side, &plans, &store, &metrics, client.clone(), &permits, &mut backoff).await;
        let why = failure_of(&ended).message;
        debug!(side = &*side, error = why, "no stream from the outbox follower");
        store.tell(Command::Happened(Input::FollowerDown(Side::clone(&side), why))).await;
        tokio::time::sleep(backoff.after_failure()).await;
    }
}

/// Follows outboxes until the stream breaks, and says why it did.
async fn follow(
    side: &Side,
    plans: &SidePlans,
    store: &StoreHandle,
    metrics: &Metrics,
    mut client: Client,
    permits: &Arc<Semaphore>,
    backoff: &mut Backoff,
) -> Status {
    let (requests, outgoing) = mpsc::channel(4);
    // A first message, so that a server that waits for one answers.
    let _ = requests.try_send(FollowRequest::default());
    let mut chunks = match client.follow(ReceiverStream::new(outgoing)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return status,
    };
    info!(side = &**side, "following outboxes");
    backoff.reset();
    // What was noted for an earlier stream is said again in answer to this.
    drop(plans.follow.take());
    store.tell(Command::Happened(Input::FollowerUp(Side::clone(side)))).await;
    let send = async {
        loop {
            let plan = plans.follow.take();
            for request in requests_of(plan) {
                if requests.send(request).await.is_err() {
                    return Status::unavailable("the outbox follower takes no more requests");
                }
            }
            plans.follow.rung().await;
        }
    };
    let receive = async {
        let mut decoder = Decoder::new(metrics.clone());
        loop {
            match chunks.message().await {
                Ok(Some(response)) => {
                    let Some(chunk) = decoder.chunk(response) else {
                        warn!("the outbox follower sent a chunk of no outbox");
                        continue;
                    };
                    let Ok(permit) = Arc::clone(permits).acquire_owned().await else {
                        return Status::unavailable("the router is shutting down");
                    };
                    store.tell(Command::Records(chunk, permit)).await;
                }
                Ok(None) => return Status::unavailable("the outbox follower ended the stream"),
                Err(status) => return status,
            }
        }
    };
    tokio::select! {
        status = send => status,
        status = receive => status,
    }
}

/// The messages that tell a plan.
fn requests_of(plan: FollowPlan) -> Vec<FollowRequest> {
    if plan.is_empty() {
        return Vec::new();
    }
    let mut requests = vec![FollowRequest::default()];
    for (id, from) in plan.outboxes {
        if requests.last().is_some_and(|request| request.add.len() + request.remove.len() >= MOST_CHANGES) {
            requests.push(FollowRequest::default());
        }
        let Some(request) = requests.last_mut() else { break };
        let outbox = OutboxRef { swarm_id: id.swarm.to_string(), node_id: id.node.0, generation: id.generation.0 };
        match from {
            Some(cursor) => {
                let cursor = Cursor { segment: cursor.segment, offset: cursor.offset, seq: cursor.seq };
                request.add.push(FollowFrom { outbox: Some(outbox), cursor: Some(cursor) });
            }
            None => request.remove.push(outbox),
        }
    }
    if let Some(request) = requests.last_mut() {
        for ((swarm, node), hot) in plan.heat {
            let node = NodeRef { swarm_id: swarm.to_string(), node_id: node.0 };
            if hot { request.hot.push(node) } else { request.cold.push(node) }
        }
    }
    requests
}

async fn deliver_for_ever(ctx: Context, plans: Arc<SidePlans>, store: StoreHandle, metrics: Metrics, client: Client) {
    let calls = Arc::new(Semaphore::new(CALLS));
    loop {
        let mut orders = plans.deliver.take();
        while !orders.is_empty() {
            let mut bytes = 0;
            let mut share = Vec::new();
            while let Some(order) = orders.front() {
                bytes += order.records.iter().map(|record| record.body.bytes() + 256).sum::<usize>();
                if !share.is_empty() && (bytes > MOST_BYTES || share.len() >= MOST_ORDERS) {
                    break;
                }
                share.extend(orders.pop_front());
            }
            let Ok(permit) = Arc::clone(&calls).acquire_owned().await else { return };
            let (store, metrics, client) = (store.clone(), metrics.clone(), client.clone());
            ctx.spawn("deliver-call", async move {
                deliver(share, &store, &metrics, client).await;
                drop(permit);
            });
        }
        plans.deliver.rung().await;
    }
}

/// One Deliver call. Every order gets a report, whatever happens.
async fn deliver(orders: Vec<DeliveryOrder>, store: &StoreHandle, metrics: &Metrics, mut client: Client) {
    let now = now_us();
    let deliveries: Vec<Delivery> = orders
        .iter()
        .flat_map(|order| {
            let node = NodeRef { swarm_id: order.swarm.to_string(), node_id: order.node.0 };
            order
                .records
                .iter()
                .map(move |record| Delivery { node: Some(node.clone()), record: encode(order, record, now).into() })
        })
        .collect();
    let asked = deliveries.len();
    // Records of several prompts may share a call; each names its own trace, and the call can be part of one only.
    let traces = orders.iter().flat_map(|order| &order.records).filter_map(|record| match &record.body {
        InboxBody::Inject(request) => Some(request.trace.as_str()),
        InboxBody::Control { .. } => None,
    });
    let mut traces = traces.filter(|trace| !trace.is_empty());
    let trace = traces.next().unwrap_or_default();
    let call = client.deliver(in_trace(DeliverRequest { deliveries }, trace));
    let answered = match tokio::time::timeout(DELIVER_TIMEOUT, call).await {
        Ok(Ok(response)) => Ok(response.into_inner().results),
        Ok(Err(status)) => Err(failure_of(&status).message),
        Err(_) => Err(format!("the outbox follower did not answer within {} s", DELIVER_TIMEOUT.as_secs())),
    };
    let mut outcomes = match answered {
        Ok(results) if results.len() == asked => results
            .into_iter()
            .map(|result| match (result.error.is_empty(), result.refused) {
                (true, _) => {
                    metrics.deliveries.inc();
                    Outcome::Written
                }
                (false, true) => Outcome::Refused(result.error),
                (false, false) => Outcome::Uncertain(result.error),
            })
            .collect::<Vec<_>>(),
        Ok(results) => {
            let why = format!("the outbox follower answered {} of {asked} records", results.len());
            vec![Outcome::Uncertain(why); asked]
        }
        Err(why) => vec![Outcome::Uncertain(why); asked],
    }
    .into_iter();
    for order in orders {
        let results = order.records.iter().map(|record| record.seq).zip(&mut outcomes).collect();
        let report = DeliveryReport { swarm: order.swarm, node: order.node, results };
        store.tell(Command::Happened(Input::Delivered(report))).await;
    }
}

/// The line of an inbox record, without its line end.
fn encode(order: &DeliveryOrder, record: &InboxRecord, now: u64) -> Vec<u8> {
    let (kind, data, trace) = match &record.body {
        InboxBody::Inject(request) => ("inject", inject_data(request).to_string(), request.trace.as_str()),
        InboxBody::Control { kind, data } => (*kind, data.to_string(), ""),
    };
    let data = RawValue::from_string(data).unwrap_or_else(|_| RawValue::NULL.to_owned());
    let mut line = Vec::with_capacity(data.get().len() + 256);
    encode_line(
        &Record {
            seq: record.seq,
            ts: now,
            job_id: (&*order.job).into(),
            node_id: order.node.0,
            generation: order.generation,
            injection_id: record.injection.as_ref().map(|id| id.as_str().into()),
            trace: (!trace.is_empty()).then(|| trace.into()),
            kind: kind.into(),
            data: &data,
        },
        &mut line,
    );
    if line.last() == Some(&b'\n') {
        line.pop();
    }
    line
}

async fn remove_for_ever(plans: Arc<SidePlans>, store: StoreHandle, mut client: Client) {
    let mut backoff = Backoff::default();
    loop {
        for swarm in plans.remove.take() {
            remove(&mut client, &store, &mut backoff, swarm).await;
        }
        plans.remove.rung().await;
    }
}

async fn remove(client: &mut Client, store: &StoreHandle, backoff: &mut Backoff, swarm: SwarmId) {
    loop {
        match client.remove_swarm(RemoveSwarmRequest { swarm_id: swarm.to_string() }).await {
            Ok(_) => {
                backoff.reset();
                store.tell(Command::Happened(Input::MailboxRemoved(swarm))).await;
                return;
            }
            Err(status) => {
                debug!(swarm_id = %swarm, error = failure_of(&status).message, "mailbox not removed yet");
                tokio::time::sleep(backoff.after_failure()).await;
            }
        }
    }
}
