//! The file of the ring of gossip keys. The router alone changes it; the allocator reads it for nodes that it starts.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use drover_service::StateDir;
use drover_service::pki::{Authority, KeyId, KeyRing, PkiError};
use drover_types::{ErrorCode, Failure};

use crate::core::ring::Ring;

/// A change of the ring.
#[derive(Debug, Clone, Copy)]
pub(crate) enum RingChange {
    /// Adds this key, or a fresh one.
    Add(Option<[u8; 32]>),
    /// Seals with this key from now on.
    Use(KeyId),
    /// Forgets this key.
    Remove(KeyId),
}

/// Reaches the ring's file. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct RingFile {
    dir: PathBuf,
    /// Changes are read, made and written one after another.
    turn: Arc<Mutex<()>>,
}

impl RingFile {
    pub(crate) fn new(state: &StateDir) -> Self {
        Self { dir: state.path().join("pki"), turn: Arc::default() }
    }

    /// The ring, made with the rest of the instance's secrets when there is none.
    pub(crate) async fn read(&self) -> Result<KeyRing, Failure> {
        self.blocking(|file| Authority::open_or_create_at(&file.dir)?.ring()).await
    }

    /// The ring, when the instance has one.
    pub(crate) async fn find(&self) -> Option<KeyRing> {
        let found = self.blocking(|file| {
            let there = file.dir.join("instance.json").exists();
            if there { Authority::open_at(&file.dir)?.ring().map(Some) } else { Ok(None) }
        });
        found.await.unwrap_or_else(|failure| {
            tracing::warn!(error = failure.message, "the ring of gossip keys cannot be read");
            None
        })
    }

    /// Changes the ring, and returns it with the key that was meant.
    pub(crate) async fn change(&self, change: RingChange) -> Result<(KeyRing, KeyId), Failure> {
        self.blocking(move |file| {
            let _turn = file.turn.lock().unwrap_or_else(PoisonError::into_inner);
            let authority = Authority::open_or_create_at(&file.dir)?;
            let mut ring = authority.ring()?;
            let id = match change {
                RingChange::Add(Some(key)) => ring.add(key)?,
                RingChange::Add(None) => ring.add_fresh()?,
                RingChange::Use(id) => {
                    ring.use_key(id)?;
                    id
                }
                RingChange::Remove(id) => {
                    ring.remove(id)?;
                    id
                }
            };
            authority.adopt_ring(&ring)?;
            Ok((ring, id))
        })
        .await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, PkiError> + Send + 'static,
    ) -> Result<T, Failure> {
        let file = self.clone();
        match tokio::task::spawn_blocking(move || work(&file)).await {
            Ok(done) => done.map_err(|error| refused(&error)),
            Err(error) => Err(Failure::new(ErrorCode::Internal, error.to_string())),
        }
    }
}

/// The ring as the nodes get it.
pub(crate) fn sent(ring: &KeyRing) -> Ring {
    Ring { revision: ring.revision(), json: ring.to_json().into() }
}

fn refused(error: &PkiError) -> Failure {
    match error {
        PkiError::Ring(error) => Failure::new(ErrorCode::InvalidRequest, error.to_string()),
        PkiError::Io { .. } => Failure::new(ErrorCode::StoreUnavailable, error.to_string())
            .hint("pki/ of the state directory must be yours and writable"),
        other => {
            Failure::new(ErrorCode::Internal, other.to_string()).hint("pki/ of the state directory holds these files")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_ring_is_changed_one_step_after_another_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = RingFile { dir: dir.path().join("pki"), turn: Arc::default() };
        assert_eq!(file.find().await, None, "looking makes nothing");
        let first = file.read().await.unwrap();
        let adds = (0..3).map(|_| file.change(RingChange::Add(None)));
        let added: Vec<KeyId> = futures::future::join_all(adds).await.into_iter().map(|r| r.unwrap().1).collect();
        let ring = file.find().await.unwrap();
        assert_eq!((ring.ids().count(), ring.revision()), (4, first.revision() + 3), "no change is lost to another");
        let (ring, _) = file.change(RingChange::Use(added[0])).await.unwrap();
        assert_eq!(ring.primary(), added[0]);
        let failure = file.change(RingChange::Remove(added[0])).await.unwrap_err();
        assert!(failure.code == ErrorCode::InvalidRequest && failure.message.contains("in use"), "{failure}");
        file.change(RingChange::Remove(first.primary())).await.unwrap();
        let sent = sent(&file.read().await.unwrap());
        assert_eq!(KeyRing::from_json(sent.json.as_bytes()).unwrap().revision(), sent.revision);
    }
}
