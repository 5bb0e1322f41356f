//! The key ring while the node runs: changes by people, and newer rings of other nodes.

use std::time::Duration;

use drover_proto::membership::RingKey;
use drover_service::now_us;
use drover_service::pki::{KeyId, KeyRing, PkiError, RING_LABEL, RingError, RingSummary};
use drover_types::{ErrorCode, Failure};
use tracing::{info, warn};

use super::node::{Credentials, Node};
use super::streams;
use crate::core::{Command, Engine as _, Input, SignedRecord};

/// A ring that could not be fetched is asked for again after this.
const FETCH_AGAIN: Duration = Duration::from_secs(1);

impl Node {
    /// The ring, when there is one.
    pub(super) fn ring(&self) -> Option<KeyRing> {
        self.link.sealer().map(|sealer| sealer.ring().clone())
    }

    fn own_ring(&self) -> Result<KeyRing, Failure> {
        let none = "this node gossips in the clear and has no key ring";
        self.ring().ok_or_else(|| Failure::new(ErrorCode::InvalidRequest, none))
    }

    pub(super) fn keys(&self) -> Result<Vec<RingKey>, Failure> {
        Ok(listed(&self.own_ring()?))
    }

    pub(super) fn add_key(&mut self, key: Option<[u8; 32]>) -> Result<(KeyId, Vec<RingKey>), Failure> {
        let mut ring = self.own_ring()?;
        let id = match key {
            Some(key) => ring.add(key).map_err(|error| refused(&error))?,
            None => ring.add_fresh().map_err(|error| match error {
                PkiError::Ring(error) => refused(&error),
                other => Failure::new(ErrorCode::Internal, other.to_string()),
            })?,
        };
        Ok((id, self.put_ring(ring)))
    }

    pub(super) fn use_key(&mut self, id: KeyId, force: bool) -> Result<Vec<RingKey>, Failure> {
        let mut ring = self.own_ring()?;
        if !force {
            self.agreed(|members| RingSummary::may_use(&ring, id, members))?;
        }
        ring.use_key(id).map_err(|error| refused(&error))?;
        Ok(self.put_ring(ring))
    }

    pub(super) fn remove_key(&mut self, id: KeyId, force: bool) -> Result<Vec<RingKey>, Failure> {
        let mut ring = self.own_ring()?;
        if !force {
            self.agreed(|members| RingSummary::may_remove(&ring, id, members))?;
        }
        ring.remove(id).map_err(|error| refused(&error))?;
        Ok(self.put_ring(ring))
    }

    /// Asks a rule about the rings of all members, as their records say them.
    fn agreed(
        &self,
        rule: impl FnOnce(Vec<(&str, Option<RingSummary>)>) -> Result<(), RingError>,
    ) -> Result<(), Failure> {
        let records: Vec<_> = self.core.members().map(|member| member.record).collect();
        let of = |record: &SignedRecord| RingSummary::parse(record.record.labels.get(RING_LABEL)?);
        let members = records.iter().map(|record| (record.record.node_id.as_str(), of(record))).collect();
        rule(members).map_err(|error| refused(&error))
    }

    /// Puts a ring in force, keeps it for the next start, and tells everybody which one it is.
    fn put_ring(&mut self, ring: KeyRing) -> Vec<RingKey> {
        let keys = listed(&ring);
        let summary = ring.summary().to_string();
        if let Credentials::Certified(identity) = &self.credentials {
            let (identity, kept, notes) = (identity.current(), ring.clone(), self.notes().clone());
            self.ctx.spawn("key ring", async move {
                let stored = tokio::task::spawn_blocking(move || identity.store_ring(&kept)).await;
                match stored {
                    Ok(Ok(())) => notes.over("ring"),
                    Ok(Err(error)) => notes.holds(now_us(), "ring", format!("the key ring cannot be kept: {error}")),
                    Err(_) => {}
                }
            });
        }
        info!(ring = summary, "key ring changed");
        let now = self.now();
        if let Some(sealer) = self.link.sealer_mut() {
            sealer.set_ring(now, ring);
        }
        let mut labels = self.core.local().record.labels.clone();
        labels.insert(RING_LABEL.to_owned(), summary);
        self.update(None, Some(labels));
        keys
    }

    /// Fetches the ring of a node whose record says that it has a newer one.
    pub(super) fn look_for_ring(&mut self, record: &SignedRecord) {
        let Some(sealer) = self.link.sealer() else { return };
        let summary = record.record.labels.get(RING_LABEL).and_then(|label| RingSummary::parse(label));
        if self.fetching || !summary.is_some_and(|summary| sealer.ring().is_behind(&summary)) {
            return;
        }
        self.fetching = true;
        let peer = streams::Peer { record: std::sync::Arc::new(record.clone()), own: self.core.local().key };
        let (dial, handle) = (self.dial.clone(), self.handle.clone());
        self.ctx.spawn("key ring", async move {
            let fetched = streams::ring(dial, peer).await;
            if let Err(why) = &fetched {
                warn!(why, "a newer key ring could not be fetched");
                tokio::time::sleep(FETCH_AGAIN).await;
            }
            let _ = handle.with(move |node| node.ring_fetched(fetched.ok())).await;
        });
    }

    fn ring_fetched(&mut self, fetched: Option<KeyRing>) {
        self.fetching = false;
        if let (Some(theirs), Some(mut own)) = (fetched, self.ring())
            && own.adopt(&theirs)
        {
            self.put_ring(own);
        }
        let ahead: Vec<_> =
            self.core.members().filter(|member| member.state.is_up()).map(|member| member.record).collect();
        for record in ahead {
            self.look_for_ring(&record);
        }
    }

    /// Lets the core make a new claim.
    pub(super) fn update(
        &mut self,
        capabilities: Option<std::collections::BTreeMap<String, String>>,
        labels: Option<std::collections::BTreeMap<String, String>>,
    ) {
        self.input(Input::Command(Command::Update { capabilities, labels }));
    }
}

fn listed(ring: &KeyRing) -> Vec<RingKey> {
    let key = |key: drover_service::pki::RingKeyInfo| RingKey {
        key_id: u32::from(key.id),
        fingerprint: key.fingerprint,
        in_use: key.primary,
    };
    ring.list().into_iter().map(key).collect()
}

fn refused(error: &RingError) -> Failure {
    Failure::new(ErrorCode::InvalidRequest, error.to_string())
}
