//! What the worker and the membership daemon have to say to each other while both run.

use std::collections::{BTreeSet, HashMap};
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use drover_proto::membership::membership_service_client::MembershipServiceClient;
use drover_proto::membership::{
    AddKeyRequest, GetLeaderRequest, GetStatusRequest, GetStatusResponse, JoinRequest, ListKeysRequest, LoadReport,
    Member, PlaceRequest, RemoveKeyRequest, ReportLoadRequest, UpdateMetadataRequest, UseKeyRequest,
    WatchMembersRequest, WatchMembersResponse, watch_members_response::Update,
};
use drover_service::pki::{Identity, KeyRing, RING_LABEL, RingSummary};
use drover_service::{Context, MAX_MESSAGE_BYTES, Target, address_book, connect};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tonic::transport::Channel;
use tonic::{Status, Streaming};
use tracing::{debug, info, warn};

use super::notes::Notes;
use super::report::{OVERLOAD, Reporter, Standing};
use super::{Ears, Plan, Word, process, seeds};
use crate::core::kind;

/// Longest wait for an answer of the daemon, which is on this host.
const PATIENCE: Duration = Duration::from_secs(3);
/// Pause before the daemon is called again, and longest time between two looks for its address.
const AGAIN: Duration = Duration::from_millis(50);
const LATER: Duration = Duration::from_secs(1);
/// How often it is asked who leads.
const LEADER: Duration = Duration::from_secs(1);
/// How often it is asked how it is: at first, and once it has joined.
const STATUS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));
/// How often the directory of seeds is read: at first, at most while nobody was found, and later for those who were missed.
const SEEDS: (Duration, Duration, Duration) =
    (Duration::from_millis(200), Duration::from_secs(10), Duration::from_mins(1));
/// Names the node that reports while nobody can lead.
const REPORTER: &str = "drover.reporter";
/// Most bytes of a reason that goes into the node's record.
const REASON_BYTES: usize = 160;

type Client = MembershipServiceClient<Channel>;

/// One side of the talk. Outlives the daemons that it talks to.
pub(super) struct Talk {
    plan: Plan,
    ctx: Context,
    ears: Ears,
    words: mpsc::Sender<Word>,
    reporter: Reporter,
    pub(super) notes: Notes,
    /// The daemon that runs now.
    pid: Option<u32>,
    /// The label of the own record whose keys were reported.
    ring_told: String,
    /// The address that stands in this node's seed file.
    seeded: String,
    overloaded: bool,
    /// Its gossip is bound: it has a record that can be changed.
    bound: bool,
    joined: bool,
    /// There are voters: a charter has come.
    chartered: bool,
    /// Seeds are being asked.
    joining: Arc<AtomicBool>,
}

/// When what is due next.
struct Due {
    status: Instant,
    status_every: Duration,
    leader: Instant,
    seeds: Instant,
    seeds_every: Duration,
}

impl Talk {
    pub(super) fn new(plan: Plan, ctx: &Context, ears: Ears, words: mpsc::Sender<Word>) -> Self {
        Self {
            plan,
            ctx: ctx.clone(),
            ears,
            words,
            reporter: Reporter::new(),
            notes: Notes::default(),
            pid: None,
            ring_told: String::new(),
            seeded: String::new(),
            overloaded: false,
            bound: false,
            joined: false,
            chartered: false,
            joining: Arc::default(),
        }
    }

    /// A daemon was started.
    pub(super) fn begin(&mut self, pid: Option<u32>) {
        self.pid = pid;
        self.overloaded = false;
        self.bound = false;
        self.joined = false;
        self.ears.hello.mark_changed();
        self.ears.ring.mark_changed();
    }

    /// It is gone.
    pub(super) fn end(&mut self) {
        self.pid = None;
        self.reporter.lost();
        self.reporter.standing(Instant::now().into_std(), Standing::Silent);
    }

    async fn say(&self, kind: &'static str, data: Value) {
        // Without a reader the worker is at its end.
        let _ = self.words.send(Word { kind, data }).await;
    }

    /// Writes the notes when they have changed.
    pub(super) async fn tell_notes(&mut self) {
        if let Some(data) = self.notes.take() {
            self.say(kind::MEMBERSHIP_NOTES, data).await;
        }
    }

    /// Talks to the daemon, again and again. Ends only by being dropped.
    pub(super) async fn talk(&mut self) {
        let mut pause = AGAIN;
        loop {
            if self.is_reachable() {
                let target = Target::Daemon { state: self.ctx.state().clone(), name: process::instance(&self.plan) };
                let mut client =
                    MembershipServiceClient::new(connect(target)).max_decoding_message_size(MAX_MESSAGE_BYTES);
                let begun = Instant::now();
                let Err(status) = self.converse(&mut client).await;
                debug!(error = %status.message(), "the talk with membership broke off");
                self.reporter.lost();
                if begun.elapsed() > LATER {
                    pause = AGAIN;
                }
            }
            sleep(pause).await;
            pause = (pause * 2).min(LATER);
        }
    }

    /// The daemon has said where it listens.
    fn is_reachable(&self) -> bool {
        let entry = address_book::read(self.ctx.state(), &process::instance(&self.plan));
        entry.is_some_and(|entry| Some(entry.pid) == self.pid)
    }

    async fn converse(&mut self, client: &mut Client) -> Result<std::convert::Infallible, Status> {
        let mut changes = within(client.watch_members(WatchMembersRequest::default())).await?.into_inner();
        self.notes.runs();
        let now = Instant::now();
        let mut due = Due { status: now, status_every: STATUS.0, leader: now, seeds: now, seeds_every: SEEDS.0 };
        let mut sessions = None;
        loop {
            let running = u32::from(self.ears.status.borrow_and_update().running.is_some());
            if sessions != Some(running) {
                let report =
                    within(client.report_load(ReportLoadRequest { sessions: running, ..Default::default() })).await?;
                sessions = Some(running);
                self.load(client, report.into_inner().load).await?;
            }
            let report = self.reporter.due().map(Instant::from_std);
            tokio::select! {
                update = next(&mut changes) => self.update(client, update?).await?,
                () = sleep_until(due.status) => {
                    let status = within(client.get_status(GetStatusRequest {})).await?.into_inner();
                    self.status(client, status).await?;
                    if !self.chartered {
                        self.hand_over_charter().await;
                    }
                    due.status_every =
                        if self.joined { STATUS.1 } else { (due.status_every * 2).min(STATUS.1) };
                    due.status = Instant::now() + due.status_every;
                }
                () = sleep_until(due.leader) => {
                    let standing = self.ask_who_leads(client).await?;
                    self.reporter.standing(Instant::now().into_std(), standing);
                    due.leader = Instant::now() + LEADER;
                }
                () = sleep_until(due.seeds) => {
                    self.look_for_seeds(client).await;
                    self.hand_over_charter().await;
                    due.seeds_every = if self.joined { SEEDS.2 } else { (due.seeds_every * 2).min(SEEDS.1) };
                    due.seeds = Instant::now() + due.seeds_every;
                }
                () = until(report) => {
                    for data in self.reporter.take(Instant::now().into_std()) {
                        self.say(kind::MEMBERS, data).await;
                    }
                }
                Ok(()) = self.ears.status.changed() => {}
                Ok(()) = self.ears.ring.changed(), if self.bound => match self.take_ring(client).await {
                    Err(status) if status.code() == tonic::Code::InvalidArgument => {
                        warn!(error = status.message(), "the key ring was not taken over");
                    }
                    Err(status) => {
                        self.ears.ring.mark_changed();
                        return Err(status);
                    }
                    Ok(()) => {}
                },
                Ok(()) = self.ears.hello.changed(), if self.bound => self.introduce(client).await?,
            }
        }
    }

    async fn update(&mut self, client: &mut Client, update: WatchMembersResponse) -> Result<(), Status> {
        let now = Instant::now().into_std();
        match update.update {
            Some(Update::Snapshot(snapshot)) => {
                let own = snapshot.members.iter().find(|member| member.local).cloned();
                self.reporter.snapshot(now, snapshot.members);
                if let Some(own) = own {
                    self.own_record(client, &own).await?;
                }
            }
            Some(Update::Changed(member)) => {
                if member.local {
                    self.own_record(client, &member).await?;
                }
                self.reporter.changed(now, member);
            }
            Some(Update::Removed(id)) => {
                self.reporter.removed(&id);
                let dir = seeds::dir(&self.plan.mailbox);
                // One who is back by now writes it again.
                let _ = tokio::task::spawn_blocking(move || seeds::remove(&dir, &id)).await;
            }
            None => {}
        }
        Ok(())
    }

    /// The ring that the own record tells of: which keys the node has goes to the login side.
    async fn own_record(&mut self, client: &mut Client, own: &Member) -> Result<(), Status> {
        let ring = own.labels.get(RING_LABEL).cloned().unwrap_or_default();
        if !ring.is_empty() && ring != self.ring_told {
            self.tell_keys(client).await?;
            self.ring_told = ring;
        }
        Ok(())
    }

    async fn tell_keys(&mut self, client: &mut Client) -> Result<(), Status> {
        let keys = within(client.list_keys(ListKeysRequest {})).await?.into_inner().keys;
        let ids: Vec<u32> = keys.iter().map(|key| key.key_id).collect();
        let primary = keys.iter().find(|key| key.in_use).map(|key| key.key_id);
        self.say(kind::KEYRING_STATE, json!({ "ids": ids, "primary": primary })).await;
        Ok(())
    }

    async fn status(&mut self, client: &mut Client, status: GetStatusResponse) -> Result<(), Status> {
        self.notes.daemon(status.notes);
        self.tell_notes().await;
        let joined = matches!(status.state.as_str(), "joined" | "left" | "disabled");
        if joined && !self.joined {
            info!(alive = status.alive, "membership joined");
        }
        self.joined = joined;
        self.bound = !status.gossip_addr.is_empty();
        if self.bound && status.advertised_addr != self.seeded {
            let (dir, own) = (seeds::dir(&self.plan.mailbox), self.plan.node_id());
            let (swarm, addr) = (self.plan.id.swarm.to_string(), status.advertised_addr.clone());
            let written = tokio::task::spawn_blocking(move || seeds::write(&dir, &own, &swarm, &addr)).await;
            match written {
                Ok(Ok(())) => self.seeded = status.advertised_addr,
                Ok(Err(error)) => debug!(%error, "this node's address cannot be written for the others yet"),
                Err(_) => {}
            }
        }
        self.load(client, status.load).await
    }

    /// A node says in its record why it is overloaded.
    async fn load(&mut self, client: &mut Client, load: Option<LoadReport>) -> Result<(), Status> {
        let Some(load) = load.filter(|load| self.bound && load.overloaded != self.overloaded) else { return Ok(()) };
        let mut request = UpdateMetadataRequest::default();
        if load.overloaded {
            let mut reason = load.reason;
            reason.truncate(reason.floor_char_boundary(REASON_BYTES));
            request.set_labels.insert(OVERLOAD.to_owned(), reason);
        } else {
            request.remove_labels.push(OVERLOAD.to_owned());
        }
        self.change_record(client, request).await?;
        self.overloaded = load.overloaded;
        Ok(())
    }

    /// What the agent said of itself belongs to what the node can do.
    async fn introduce(&mut self, client: &mut Client) -> Result<(), Status> {
        let Some(hello) = self.ears.hello.borrow_and_update().clone() else { return Ok(()) };
        let set: HashMap<String, String> = [("models", "model"), ("model_provider", "model_provider")]
            .into_iter()
            .filter_map(|(name, field)| Some((name.to_owned(), hello[field].as_str()?.to_owned())))
            .filter(|(_, value)| !value.is_empty())
            .collect();
        if set.is_empty() {
            return Ok(());
        }
        self.change_record(client, UpdateMetadataRequest { set_capabilities: set, ..Default::default() }).await
    }

    /// A record that cannot be changed in this way stays as it is; the talk goes on.
    async fn change_record(&mut self, client: &mut Client, request: UpdateMetadataRequest) -> Result<(), Status> {
        match within(client.update_metadata(request)).await {
            Err(status) if status.code() == tonic::Code::InvalidArgument => {
                warn!(error = status.message(), "the node's record was not changed");
                Ok(())
            }
            other => other.map(drop),
        }
    }

    /// Whether this node is the one that writes what it knows.
    async fn ask_who_leads(&mut self, client: &mut Client) -> Result<Standing, Status> {
        let own = self.plan.node_id();
        let leader = match within(client.get_leader(GetLeaderRequest {})).await {
            Ok(leader) => leader.into_inner(),
            // It takes no part at the moment, or not yet.
            Err(status) if is_told(&status) => return Ok(Standing::Silent),
            Err(status) => return Err(status),
        };
        self.chartered = !leader.voters.is_empty();
        if !leader.node_id.is_empty() {
            let mine = leader.node_id == own && leader.remaining_ms > 0;
            return Ok(if mine {
                Standing::Leads { epoch: leader.epoch, term: leader.term }
            } else {
                Standing::Silent
            });
        }
        if self.chartered {
            return Ok(Standing::Silent);
        }
        let place = PlaceRequest { key: REPORTER.to_owned(), count: 1, swarm_id: String::new() };
        let placed = match within(client.place(place)).await {
            Ok(placed) => placed.into_inner().node_ids,
            Err(status) if is_told(&status) => return Ok(Standing::Silent),
            Err(status) => return Err(status),
        };
        Ok(if placed.first() == Some(&own) { Standing::Stopgap } else { Standing::Silent })
    }

    async fn hand_over_charter(&self) {
        let Some(identity) = self.plan.identity.clone() else { return };
        let mailbox = self.plan.mailbox.clone();
        let done = tokio::task::spawn_blocking(move || seeds::hand_over_charter(&mailbox, &identity)).await;
        if let Ok(Err(error)) = done {
            debug!(%error, "the charter cannot be handed over yet");
        }
    }

    /// Asks those whose files lie in the mailbox and who are not known yet.
    async fn look_for_seeds(&self, client: &Client) {
        let own = self.plan.node_id();
        let mut known: BTreeSet<String> =
            self.reporter.members().map(|member| seeds::key_of(&member.node_id)).collect();
        known.insert(seeds::key_of(&own));
        let (dir, swarm) = (seeds::dir(&self.plan.mailbox), self.plan.id.swarm.to_string());
        let addrs = tokio::task::spawn_blocking(move || seeds::read(&dir, &swarm, &known)).await.unwrap_or_default();
        if addrs.is_empty() || self.joining.swap(true, Ordering::Relaxed) {
            return;
        }
        let (mut client, joining) = (client.clone(), Arc::clone(&self.joining));
        let shutdown = self.ctx.shutdown().clone();
        // It answers when one of them did, and that may take its time.
        self.ctx.spawn("membership join", async move {
            let joined = timeout(4 * PATIENCE, client.join(JoinRequest { addrs }));
            tokio::select! {
                answer = joined => debug!(answered = ?answer.map(|answer| answer.map(|it| it.into_inner().answered)), "asked seeds"),
                () = shutdown.cancelled() => {}
            }
            joining.store(false, Ordering::Relaxed);
        });
    }

    /// Puts the login side's ring in force, unless the node has it or a newer one.
    async fn take_ring(&mut self, client: &mut Client) -> Result<(), Status> {
        let Some(text) = self.ears.ring.borrow_and_update().clone() else { return Ok(()) };
        let ring = match KeyRing::from_json(text.as_bytes()) {
            Ok(ring) => ring,
            Err(error) => {
                warn!(%error, "the key ring that was sent cannot be used");
                return Ok(());
            }
        };
        let own = self.reporter.members().find(|member| member.local);
        let label = own.and_then(|own| own.labels.get(RING_LABEL));
        let Some(has) = label.and_then(|label| RingSummary::parse(label)) else {
            return Err(Status::unavailable("the node's record is not there yet"));
        };
        if has.revision() < ring.revision() {
            let listed = within(client.list_keys(ListKeysRequest {})).await?.into_inner().keys;
            let had: Vec<u32> = listed.iter().map(|key| key.key_id).collect();
            for id in ring.ids().filter(|id| !had.contains(&u32::from(*id))) {
                let Some(key) = ring.get(id) else { continue };
                within(client.add_key(AddKeyRequest { key: key.to_vec().into() })).await?;
            }
            // Whether anybody is cut off was weighed where the order comes from.
            let primary = u32::from(ring.primary());
            if !listed.iter().any(|key| key.in_use && key.key_id == primary) {
                within(client.use_key(UseKeyRequest { key_id: primary, force: true })).await?;
            }
            for key_id in had.into_iter().filter(|id| !ring.ids().any(|kept| u32::from(kept) == *id)) {
                within(client.remove_key(RemoveKeyRequest { key_id, force: true })).await?;
            }
            info!(revision = ring.revision(), "took over the key ring");
        }
        self.tell_keys(client).await
    }

    /// Puts the ring that came through the inbox where the daemon finds it when it starts.
    pub(super) async fn keep_ring(&self) {
        let (ring, dir) = (self.ears.ring.borrow().clone(), self.plan.identity.clone());
        let (Some(text), Some(dir)) = (ring, dir) else { return };
        let kept = tokio::task::spawn_blocking(move || {
            let (identity, ring) = (Identity::load(&dir)?, KeyRing::from_json(text.as_bytes())?);
            let mut own = identity.ring().clone();
            if own.adopt(&ring) { identity.store_ring(&own) } else { Ok(()) }
        });
        if let Ok(Err(error)) = kept.await {
            warn!(%error, "the key ring cannot be kept");
        }
    }
}

/// The next change of the members.
async fn next(changes: &mut Streaming<WatchMembersResponse>) -> Result<WatchMembersResponse, Status> {
    changes.message().await?.ok_or_else(|| Status::unavailable("membership ended its stream"))
}

/// An answer that is awaited only so long.
async fn within<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    timeout(PATIENCE, call).await.unwrap_or_else(|_| Err(Status::deadline_exceeded("membership does not answer")))
}

/// The daemon itself said no: it is there.
fn is_told(status: &Status) -> bool {
    drover_proto::failure_of(status).code == drover_types::ErrorCode::BackendUnavailable && !status.details().is_empty()
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => pending().await,
    }
}
