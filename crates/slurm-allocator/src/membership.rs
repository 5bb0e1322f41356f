//! What nodes get for the gossip before they start: an identity each, and the charter that says who votes first.
//!
//! ```text
//! <state>/pki/                        the instance's authority (ca.key, ring.json, …) and charter.json, what was signed last
//! <state>/nodes/<swarm>/<NN>/identity/     local backend: one directory per node
//! <mailbox>/static/<host>.identity/        static backend: one directory per host
//! <mailbox>/gossip/voters.json             the charter once more, for those who look for it there
//! ```
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
use tracing::{info, warn};

use crate::board::Board;
use crate::files;

/// How long a certificate is good. Longer than any swarm lives; a stolen one can be revoked.
const VALID_FOR: Duration = Duration::from_hours(24 * 365);
/// A certificate with less than this left is not given to another start.
const RENEW_BEFORE: Duration = Duration::from_hours(24 * 30);
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
    mailbox: PathBuf,
    enabled: bool,
    /// Charters are signed one after another.
    turn: Mutex<()>,
}

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
    pub(crate) fn new(ctx: &Context, config: &Config, mailbox: &Mailbox) -> Arc<Self> {
        Arc::new(Self {
            state: ctx.state().path().to_owned(),
            mailbox: mailbox.root().to_owned(),
            enabled: config.swarm.as_ref().is_none_or(|swarm| swarm.enabled),
            turn: Mutex::default(),
        })
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
            if known.node_id() == node_id && known.cluster_id() == authority.cluster_id() && lasts {
                let mut ring = known.ring().clone();
                return if ring.adopt(&authority.ring()?) { known.store_ring(&ring) } else { Ok(()) };
            }
        }
        authority.issue(node_id, VALID_FOR)?.store(dir)
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
        let epoch = self.signed().map_or(0, |signed| signed.epoch) + 1;
        // An even number takes as many for a majority as the next odd one, and survives no more.
        let voters = if nodes.is_multiple_of(2) { nodes.saturating_sub(1).max(1) } else { nodes }.min(MOST_VOTERS);
        let bytes = encode(epoch, swarm, voters);
        let written = self.authority().and_then(|authority| {
            let message = [MAGIC, &authority.cluster_id()[..], &bytes].concat();
            let charter = SignedCharter { signature: authority.sign(&message)?, bytes };
            let signed = Signed { v: 1, epoch, swarm_id: swarm.clone(), voters, charter };
            // What was signed is remembered before anybody gets it: an epoch is never given out twice.
            replace(authority.dir(), CHARTER, &signed)?;
            let gossip = self.mailbox.join("gossip");
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
        serde_json::from_slice(&std::fs::read(self.state.join("pki").join(CHARTER)).ok()?).ok()
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
        let entries = std::fs::read_dir(self.mailbox.join("static")).into_iter().flatten().flatten();
        let hosts =
            entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "identity"));
        let ours = |dir: &PathBuf| Identity::load(dir).is_ok_and(|identity| names.contains(identity.node_id()));
        local.chain(hosts).filter(ours).collect()
    }

    fn authority(&self) -> Result<Authority, PkiError> {
        Authority::open_or_create_at(&self.state.join("pki"))
    }
}

/// Follows the board, and sees to it that somebody can vote whenever somebody lives.
pub(crate) async fn keep_voters(membership: Arc<Membership>, board: Board, ctx: Context) {
    let mut changes = board.bell();
    let mut known = None;
    loop {
        let living = board.living();
        if known.as_ref() != Some(&living) {
            let (membership, living) = (Arc::clone(&membership), living.clone());
            // A failure has been told; the next change tries again.
            let _ = tokio::task::spawn_blocking(move || membership.after_end(&living)).await;
        }
        known = Some(living);
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
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
        Membership { state, mailbox, enabled, turn: Mutex::default() }
    }

    fn swarm(name: &str) -> SwarmId {
        name.parse().unwrap()
    }

    /// The charter that a node finds beside its identity, as the node checks it.
    fn charter(membership: &Membership, dir: &Path) -> Charter {
        let authority = membership.authority().unwrap();
        let seen: Seen = serde_json::from_slice(&std::fs::read(dir.join(CHARTER)).unwrap()).unwrap();
        let ca = Identity::load(dir).unwrap().trust().ca().clone();
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
        let published: Seen =
            serde_json::from_slice(&std::fs::read(membership.mailbox.join("gossip/voters.json")).unwrap()).unwrap();
        assert_eq!(Charter::decode(&published.bytes).unwrap(), third);
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
