//! What nodes get for the gossip before they start: an identity each, and the charter that says who votes first.
//!
//! ```text
//! <state>/pki/                        the instance's authority (ca.key, ring.json, …) and charter.json, what was signed last
//! <state>/pki/charter@<cluster>.json       the same for a cluster with a mailbox of its own
//! <state>/nodes/<swarm>/<NN>/identity/     local backend: one directory per node; Slurm backend: what the nodes were sent
//! <mailbox>/static/<host>.identity/        static backend: one directory per host
//! <mailbox>/gossip/voters.json             the charter once more, for those who look for it there
//! ```
//!
//! Nodes that share no mailbox share no network either: each cluster has first voters of its own, and no epoch is given to two of
//! them.
//!
//! None of this is a condition of a launch: a node without an identity runs its agent and is no member.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use drover_config::Config;
use drover_mailbox::Mailbox;
use drover_service::pki::{Authority, Identity, PkiError, node_domain};
use drover_service::{Context, now_us};
use drover_types::{NodeIndex, SwarmId};
use serde::{Deserialize, Serialize};
use tokio::time::MissedTickBehavior;
use tracing::{info, warn};

use crate::board::Board;
use crate::files;

/// How long a certificate is good. Longer than any swarm lives; a stolen one can be revoked.
const VALID_FOR: Duration = Duration::from_hours(24 * 365);
/// A certificate with less than this left is not given to another start.
const RENEW_BEFORE: Duration = Duration::from_hours(24 * 30);
/// How often the identities of nodes that run are looked at.
const RENEW_LOOK: Duration = Duration::from_hours(1);
/// Most first voters.
const MOST_VOTERS: u32 = 7;
const CHARTER: &str = "charter.json";
/// What a charter's signature is over begins so.
const MAGIC: &[u8] = b"drover charter 1\0";
/// The worker generation in which a new node begins to remember.
const FIRST_SEAT: u64 = 1;

/// Hands out identities and charters. Everything here reads and writes files: not for async code.
#[derive(Debug)]
pub(crate) struct Membership {
    state: PathBuf,
    /// Where the charter is published; none when somebody else takes it there.
    mailbox: Option<PathBuf>,
    /// File that remembers the charter that was signed last.
    remembered: String,
    scope: Scope,
    enabled: bool,
    /// Charters are signed one after another.
    turn: Arc<Mutex<()>>,
}

/// Which allocations' nodes can reach each other.
#[derive(Debug, Clone)]
enum Scope {
    /// Those with the mailbox of this host: of all entries of the catalogue but these.
    Here { elsewhere: BTreeSet<String> },
    /// Those of a cluster: of these entries of the catalogue.
    Cluster { providers: BTreeSet<String> },
}

/// The files of one node's identity, all of them text.
pub(crate) type NodeFiles = Vec<(String, String)>;

/// A charter as nodes read it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct SignedCharter {
    bytes: Vec<u8>,
    signature: Vec<u8>,
}

/// What was signed last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Signed {
    v: u32,
    epoch: u64,
    /// The swarm whose nodes vote first.
    swarm_id: SwarmId,
    voters: u32,
    charter: SignedCharter,
}

impl Membership {
    /// That of the nodes with this host's mailbox. `elsewhere` are the entries of the catalogue whose nodes have another.
    pub(crate) fn new(ctx: &Context, config: &Config, mailbox: &Mailbox, elsewhere: BTreeSet<String>) -> Arc<Self> {
        Arc::new(Self {
            scope: Scope::Here { elsewhere },
            state: ctx.state().path().to_owned(),
            mailbox: Some(mailbox.root().to_owned()),
            remembered: CHARTER.to_owned(),
            enabled: config.swarm.as_ref().is_none_or(|swarm| swarm.enabled),
            turn: Arc::default(),
        })
    }

    /// That of the nodes of a cluster with a mailbox of its own: of what is launched on these entries. The name is a plain word.
    pub(crate) fn of_cluster(&self, name: &str, providers: BTreeSet<String>) -> Arc<Self> {
        Arc::new(Self {
            scope: Scope::Cluster { providers },
            state: self.state.clone(),
            mailbox: None,
            remembered: format!("charter@{name}.json"),
            enabled: self.enabled,
            turn: Arc::clone(&self.turn),
        })
    }

    /// Whether another swarm of these lives.
    pub(crate) fn others_live(&self, board: &Board, swarm: &SwarmId) -> bool {
        self.living(board).iter().any(|(other, _)| other != swarm)
    }

    /// The swarms of these that live.
    pub(crate) fn living(&self, board: &Board) -> Vec<(SwarmId, u32)> {
        board.living(|allocation| match &self.scope {
            Scope::Here { elsewhere } => !elsewhere.contains(&allocation.provider),
            Scope::Cluster { providers } => providers.contains(&allocation.provider),
        })
    }

    /// What nodes that are reached over a line are sent: the files of their identities, by index, and the charter.
    pub(crate) fn furnish(&self, swarm: &SwarmId, nodes: u32) -> (Vec<NodeFiles>, Option<String>) {
        let files = |node: u32| {
            let dir = self.identity(&self.sent_to(swarm, node), swarm, NodeIndex(node))?;
            let files = Identity::load(&dir).ok()?.files();
            files.into_iter().map(|(name, bytes)| Some((name.to_owned(), String::from_utf8(bytes).ok()?))).collect()
        };
        // One without the others could prove itself to nobody.
        let identities: Option<Vec<NodeFiles>> = (0..nodes).map(files).collect();
        (identities.unwrap_or_default(), self.charter())
    }

    /// Forgets what the nodes of a swarm were sent.
    pub(crate) fn withdraw_sent(&self, swarm: &SwarmId, nodes: u32) {
        for node in 0..nodes {
            let dir = self.sent_to(swarm, node);
            Self::withdraw(&dir);
            // Whatever else is there keeps them.
            for above in dir.ancestors().skip(1).take(2) {
                let _ = std::fs::remove_dir(above);
            }
        }
    }

    fn sent_to(&self, swarm: &SwarmId, node: u32) -> PathBuf {
        self.state.join("nodes").join(swarm.as_str()).join(format!("{node:02}")).join("identity")
    }

    /// The newest charter as nodes read it.
    pub(crate) fn charter(&self) -> Option<String> {
        serde_json::to_string(&self.signed()?.charter).ok()
    }

    /// Makes sure that the directory holds the identity of this node, with the newest ring and charter. The same node keeps
    /// its identity from one start to the next. `None` when it is to have none, or cannot.
    pub(crate) fn identity(&self, dir: &Path, swarm: &SwarmId, node: NodeIndex) -> Option<PathBuf> {
        if !self.enabled {
            return None;
        }
        let node_id = gossip_id(swarm, node.0);
        match self.issue(dir, &node_id).and_then(|()| self.lay_charter(dir)) {
            Ok(()) => Some(dir.to_owned()),
            Err(error) => {
                let why = why(&error);
                warn!(swarm_id = %swarm, node_id = %node, why, "no identity for a node: it is no member of the gossip");
                None
            }
        }
    }

    fn issue(&self, dir: &Path, node_id: &str) -> Result<(), PkiError> {
        let authority = self.authority()?;
        // Whatever is wrong with the one that is there, a new one mends it.
        if let Ok(known) = Identity::load(dir) {
            let lasts = known.expires() > now_us() / 1_000_000 + RENEW_BEFORE.as_secs();
            let (theirs, ours) = (known.trust(), authority.trust()?);
            let same_trust = theirs.cas() == ours.cas() && theirs.revoked() == ours.revoked();
            if known.node_id() == node_id && known.cluster_id() == authority.cluster_id() && lasts && same_trust {
                let mut ring = known.ring().clone();
                return if ring.adopt(&authority.ring()?) { known.store_ring(&ring) } else { Ok(()) };
            }
        }
        authority.issue(node_id, VALID_FOR)?.store(dir)
    }

    /// Renews what nodes that run have: a certificate whose time comes to an end, and whom they trust when that has changed. They
    /// look at their directories themselves and put it in force without a restart.
    fn renew(&self, living: &[(SwarmId, u32)]) {
        if !self.enabled {
            return;
        }
        for dir in self.identities(living) {
            let renewed = Identity::load(&dir).and_then(|known| self.issue(&dir, known.node_id()));
            if let Err(error) = renewed {
                warn!(path = %dir.display(), why = why(&error), "the identity of a node cannot be renewed");
            }
        }
    }

    /// The node is gone for good: nobody is to find its key.
    pub(crate) fn withdraw(dir: &Path) {
        if let Err(error) = std::fs::remove_dir_all(dir)
            && error.kind() != io::ErrorKind::NotFound
        {
            warn!(path = %dir.display(), %error, "the identity of a node that is gone cannot be removed");
        }
    }

    /// A swarm is about to start. When no other one lives, its nodes are the first voters of a new epoch: whoever voted before
    /// has ended with its allocation.
    pub(crate) fn before_launch(&self, swarm: &SwarmId, nodes: u32, others_live: bool) {
        if !self.enabled {
            return;
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let signed = self.signed();
        // A launch that is repeated after a crash keeps its charter.
        let settled = signed.is_some_and(|signed| others_live || signed.swarm_id == *swarm);
        if !settled {
            self.sign(swarm, nodes);
        }
    }

    /// Swarms that live, with their sizes. When the one that the charter names has ended and others live on, these vote: only the
    /// backend knows that the earlier voters cannot come back.
    pub(crate) fn after_end(&self, living: &[(SwarmId, u32)]) {
        let Some((heir, nodes)) = living.iter().find(|(_, nodes)| *nodes > 0) else { return };
        if !self.enabled {
            return;
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(signed) = self.signed() else { return };
        if living.iter().any(|(swarm, _)| *swarm == signed.swarm_id) {
            return;
        }
        if self.sign(heir, *nodes) {
            for dir in self.identities(living) {
                if let Err(error) = self.lay_charter(&dir) {
                    warn!(path = %dir.display(), why = why(&error), "a node cannot be given the new charter");
                }
            }
        }
    }

    fn sign(&self, swarm: &SwarmId, nodes: u32) -> bool {
        let epoch = self.last_epoch() + 1;
        // An even number takes as many for a majority as the next odd one, and survives no more.
        let voters = if nodes.is_multiple_of(2) { nodes.saturating_sub(1).max(1) } else { nodes }.min(MOST_VOTERS);
        let bytes = encode(epoch, swarm, voters);
        let written = self.authority().and_then(|authority| {
            let message = [MAGIC, &authority.cluster_id()[..], &bytes].concat();
            let charter = SignedCharter { signature: authority.sign(&message)?, bytes };
            let signed = Signed { v: 1, epoch, swarm_id: swarm.clone(), voters, charter };
            // What was signed is remembered before anybody gets it: an epoch is never given out twice.
            replace(authority.dir(), &self.remembered, &signed)?;
            let Some(mailbox) = &self.mailbox else { return Ok(()) };
            let gossip = mailbox.join("gossip");
            files::make_dir(&gossip).map_err(|source| failed(&gossip, source))?;
            replace(&gossip, "voters.json", &signed.charter)
        });
        match written {
            Ok(()) => {
                info!(swarm_id = %swarm, epoch, voters, "signed who votes first");
                true
            }
            Err(error) => {
                warn!(swarm_id = %swarm, why = why(&error), "no charter can be signed: the gossip has no leader");
                false
            }
        }
    }

    /// What was signed last; nothing when that cannot be read, which a next epoch mends.
    fn signed(&self) -> Option<Signed> {
        serde_json::from_slice(&std::fs::read(self.state.join("pki").join(&self.remembered)).ok()?).ok()
    }

    /// The last epoch that was given to anybody.
    fn last_epoch(&self) -> u64 {
        let entries = std::fs::read_dir(self.state.join("pki")).into_iter().flatten().flatten();
        let charters = entries.map(|entry| entry.path()).filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name == CHARTER || (name.starts_with("charter@") && path.extension().is_some_and(|end| end == "json"))
        });
        let epochs = charters.filter_map(|path| {
            let signed: Signed = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
            Some(signed.epoch)
        });
        epochs.max().unwrap_or(0)
    }

    fn lay_charter(&self, dir: &Path) -> Result<(), PkiError> {
        let Some(signed) = self.signed() else { return Ok(()) };
        let known = std::fs::read(dir.join(CHARTER)).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        if known.as_ref() == Some(&signed.charter) { Ok(()) } else { replace(dir, CHARTER, &signed.charter) }
    }

    /// Every identity of these swarms' nodes that this side can reach.
    fn identities(&self, living: &[(SwarmId, u32)]) -> Vec<PathBuf> {
        let names: BTreeSet<String> =
            living.iter().flat_map(|(swarm, nodes)| (0..*nodes).map(move |node| gossip_id(swarm, node))).collect();
        let local = living.iter().flat_map(|(swarm, nodes)| {
            let dir = self.state.join("nodes").join(swarm.as_str());
            (0..*nodes).map(move |node| dir.join(format!("{node:02}")).join("identity"))
        });
        let hosts_dir = self.mailbox.as_ref().map(|mailbox| mailbox.join("static"));
        let entries = hosts_dir.and_then(|dir| std::fs::read_dir(dir).ok()).into_iter().flatten().flatten();
        let hosts =
            entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "identity"));
        let ours = |dir: &PathBuf| Identity::load(dir).is_ok_and(|identity| names.contains(identity.node_id()));
        local.chain(hosts).filter(ours).collect()
    }

    fn authority(&self) -> Result<Authority, PkiError> {
        Authority::open_or_create_at(&self.state.join("pki"))
    }
}

/// Follows the board, and sees to it that somebody can vote whenever somebody of these lives.
pub(crate) async fn keep_voters(membership: Arc<Membership>, board: Board, ctx: Context) {
    let mut changes = board.bell();
    let mut known = None;
    let mut renewals = tokio::time::interval(RENEW_LOOK);
    renewals.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let living = membership.living(&board);
        if known.as_ref() != Some(&living) {
            let (membership, living) = (Arc::clone(&membership), living.clone());
            // A failure has been told; the next change tries again.
            let _ = tokio::task::spawn_blocking(move || membership.after_end(&living)).await;
        }
        known = Some(living.clone());
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            _ = renewals.tick() => {
                let membership = Arc::clone(&membership);
                let _ = tokio::task::spawn_blocking(move || membership.renew(&living)).await;
            }
            () = ctx.shutdown().cancelled() => return,
        }
    }
}

/// What the gossip calls a node of a swarm.
fn gossip_id(swarm: &SwarmId, node: u32) -> String {
    format!("{swarm}/{node}")
}

/// The bytes of a charter: numbers of 8 bytes, big end first: epoch, count, then key and seat of each voter.
fn encode(epoch: u64, swarm: &SwarmId, voters: u32) -> Vec<u8> {
    let mut bytes = [epoch.to_be_bytes(), u64::from(voters).to_be_bytes()].concat();
    let mut keys: Vec<u64> = (0..voters).map(|node| key_of(&gossip_id(swarm, node))).collect();
    keys.sort_unstable();
    for key in keys {
        bytes.extend(key.to_be_bytes());
        bytes.extend(FIRST_SEAT.to_be_bytes());
    }
    bytes
}

/// A node's number in the gossip: the first 8 bytes of the hash of its id, which its host name in TLS shows in hexadecimal.
fn key_of(node_id: &str) -> u64 {
    let domain = node_domain(node_id);
    u64::from_str_radix(domain.split('.').next().unwrap_or_default(), 16).unwrap_or_default()
}

fn replace(dir: &Path, name: &str, value: &impl Serialize) -> Result<(), PkiError> {
    let path = dir.join(name);
    let bytes = serde_json::to_vec(value).map_err(|error| failed(&path, error.into()))?;
    files::replace(dir, name, &format!(".{name}.new"), &bytes).map_err(|source| failed(&path, source))
}

fn failed(path: &Path, source: io::Error) -> PkiError {
    PkiError::Io { path: path.to_owned(), source }
}

/// An error with its cause, on one line.
fn why(error: &PkiError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use drover_membership::core::NodeKey;
    use drover_membership::core::lease::{Charter, SignedCharter as Seen};
    use drover_service::pki::Certificate;

    use super::*;

    fn rig(dir: &Path, enabled: bool) -> Membership {
        let (state, mailbox) = (dir.join("state"), dir.join("mailbox"));
        for made in [&state, &mailbox] {
            files::make_dir(made).unwrap();
        }
        Membership {
            state,
            mailbox: Some(mailbox),
            remembered: CHARTER.to_owned(),
            scope: Scope::Here { elsewhere: BTreeSet::new() },
            enabled,
            turn: Arc::default(),
        }
    }

    fn swarm(name: &str) -> SwarmId {
        name.parse().unwrap()
    }

    /// The charter that a node finds beside its identity, as the node checks it.
    fn charter(membership: &Membership, dir: &Path) -> Charter {
        let authority = membership.authority().unwrap();
        let seen: Seen = serde_json::from_slice(&std::fs::read(dir.join(CHARTER)).unwrap()).unwrap();
        let ca = Identity::load(dir).unwrap().trust().cas()[0].clone();
        let message = Seen::message(&authority.cluster_id(), &seen.bytes);
        assert_eq!(authority.sign(&message).unwrap(), &seen.signature[..], "the authority signed just this");
        assert!(!ca.is_empty());
        Charter::decode(&seen.bytes).unwrap()
    }

    #[test]
    fn a_node_keeps_its_identity_and_gets_what_is_new() {
        let dir = tempfile::tempdir().unwrap();
        let membership = rig(dir.path(), true);
        let at = membership.state.join("nodes/s/01/identity");
        membership.before_launch(&swarm("s"), 3, false);
        assert_eq!(membership.identity(&at, &swarm("s"), NodeIndex(1)), Some(at.clone()));
        let first = Identity::load(&at).unwrap();
        let now = now_us() / 1_000_000;
        let Certificate { node_id, .. } = first.trust().check(first.cert(), now).unwrap();
        assert_eq!(node_id, "s/1");
        assert_eq!(std::fs::metadata(&at).unwrap().mode() & 0o777, 0o700);
        for entry in std::fs::read_dir(&at).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().mode() & 0o777, 0o600, "{:?}", entry.file_name());
        }

        let authority = membership.authority().unwrap();
        let mut ring = authority.ring().unwrap();
        ring.add_fresh().unwrap();
        authority.adopt_ring(&ring).unwrap();
        membership.identity(&at, &swarm("s"), NodeIndex(1)).unwrap();
        let second = Identity::load(&at).unwrap();
        assert_eq!((second.cert(), second.ring().revision()), (first.cert(), ring.revision()));
        // Another node in its place, or damage, is a new identity.
        membership.identity(&at, &swarm("t"), NodeIndex(1)).unwrap();
        assert_eq!(Identity::load(&at).unwrap().node_id(), "t/1");
        std::fs::write(at.join("node.key"), "x").unwrap();
        membership.identity(&at, &swarm("t"), NodeIndex(1)).unwrap();
        assert!(Identity::load(&at).is_ok());
        Membership::withdraw(&at);
        assert!(!at.exists());
    }

    #[test]
    fn nodes_that_run_get_a_fresh_certificate_before_theirs_ends_and_learn_of_other_trust() {
        let dir = tempfile::tempdir().unwrap();
        let membership = rig(dir.path(), true);
        let living = [(swarm("s"), 2)];
        let at = |node: u32| membership.state.join(format!("nodes/s/{node:02}/identity"));
        let authority = membership.authority().unwrap();
        authority.issue("s/0", Duration::from_hours(24)).unwrap().store(&at(0)).unwrap();
        membership.identity(&at(1), &swarm("s"), NodeIndex(1)).unwrap();
        let load = |node| Identity::load(&at(node)).unwrap();
        let (soon, later) = (load(0), load(1));
        membership.renew(&living);
        let renewed = load(0);
        assert!(renewed.expires() > soon.expires() + 24 * 3600 && renewed.cert() != soon.cert());
        assert_eq!((renewed.node_id(), load(1).cert()), ("s/0", later.cert()), "one that lasts is kept");
        authority.revoke(&[authority.issued().unwrap()[0].serial.clone()]).unwrap();
        membership.renew(&living);
        for node in [0, 1] {
            let known = load(node);
            let seen = known.trust().check(soon.cert(), now_us() / 1_000_000);
            assert!(seen.is_err(), "what was revoked is not believed");
        }
        membership.renew(&[]);
    }

    #[test]
    fn whoever_lives_can_vote_and_an_epoch_is_given_out_once() {
        let dir = tempfile::tempdir().unwrap();
        let membership = rig(dir.path(), true);
        let identity = |name: &str| {
            let at = membership.state.join("nodes").join(name).join("00/identity");
            membership.identity(&at, &swarm(name), NodeIndex(0)).unwrap()
        };
        membership.before_launch(&swarm("a"), 4, false);
        let first = charter(&membership, &identity("a"));
        let keys: BTreeSet<u64> = first.voters.iter().map(|voter| voter.key.0).collect();
        assert_eq!((first.epoch, keys), (1, (0..3).map(|n| NodeKey::of(&format!("a/{n}")).0).collect()));
        assert!(first.voters.iter().all(|voter| voter.seat == 1));
        membership.before_launch(&swarm("a"), 4, false);
        membership.before_launch(&swarm("b"), 1, true);
        assert_eq!(charter(&membership, &identity("b")).epoch, 1, "a node that comes later gets the same");
        membership.after_end(&[(swarm("a"), 4), (swarm("b"), 1)]);
        assert_eq!(charter(&membership, &identity("b")).epoch, 1);
        // The first is gone at once; the other one, and it alone, can go on.
        membership.after_end(&[(swarm("b"), 1)]);
        let b = membership.state.join("nodes/b/00/identity");
        let second = charter(&membership, &b);
        assert_eq!((second.epoch, second.voters[0].key), (2, NodeKey::of("b/0")));
        membership.after_end(&[]);
        membership.before_launch(&swarm("c"), 100, false);
        let third = charter(&membership, &identity("c"));
        assert_eq!((third.epoch, third.voters.len()), (3, 7));
        let published: Seen = serde_json::from_slice(
            &std::fs::read(membership.mailbox.as_ref().unwrap().join("gossip/voters.json")).unwrap(),
        )
        .unwrap();
        assert_eq!(Charter::decode(&published.bytes).unwrap(), third);
    }

    #[test]
    fn a_cluster_has_voters_and_epochs_of_its_own_and_gets_them_sent() {
        let dir = tempfile::tempdir().unwrap();
        let here = rig(dir.path(), true);
        let there = here.of_cluster("hpc", BTreeSet::new());
        here.before_launch(&swarm("a"), 1, false);
        there.before_launch(&swarm("b"), 3, false);
        let (nodes, sent) = there.furnish(&swarm("b"), 3);
        let again = there.furnish(&swarm("b"), 3);
        assert_eq!((&nodes, &sent), (&again.0, &again.1), "a node keeps its identity");
        // As it is laid on the far side.
        let far = dir.path().join("far");
        files::make_dir(&far).unwrap();
        for (name, content) in &nodes[2] {
            files::replace(&far, name, ".new", content.as_bytes()).unwrap();
        }
        assert_eq!(Identity::load(&far).unwrap().node_id(), "b/2");
        std::fs::write(far.join(CHARTER), sent.unwrap()).unwrap();
        let charter_there = charter(&there, &far);
        assert_eq!((charter_there.epoch, charter_there.voters.len()), (2, 3));
        there.after_end(&[(swarm("c"), 1)]);
        here.before_launch(&swarm("d"), 1, false);
        let epoch = |membership: &Membership| membership.signed().unwrap().epoch;
        assert_eq!((epoch(&there), epoch(&here)), (3, 4));
        there.withdraw_sent(&swarm("b"), 3);
        assert!(!here.state.join("nodes/b").exists());
    }

    #[test]
    fn nothing_is_made_where_nodes_are_not_to_find_each_other() {
        let dir = tempfile::tempdir().unwrap();
        // swarm.enabled: false
        let membership = rig(dir.path(), false);
        membership.before_launch(&swarm("s"), 3, false);
        membership.after_end(&[(swarm("s"), 3)]);
        assert_eq!(membership.identity(&membership.state.join("i"), &swarm("s"), NodeIndex(0)), None);
        assert_eq!(std::fs::read_dir(&membership.state).unwrap().count(), 0);
    }
}
