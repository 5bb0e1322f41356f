//! Identities of the login side's own daemons, which stand beside the authority: what is revoked there holds for them at once.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tracing::{debug, info};

use super::authority::{CA_CERT, REVOKED};
use super::identity::{Stamp, stamp_of};
use super::{Authority, IdentityHandle, PkiError};
use crate::context::Context;

/// How long such a certificate is good. A daemon that runs longer gets another in time.
const VALID_FOR: Duration = Duration::from_hours(24 * 365);
/// When it gets another.
const RENEW_AFTER: Duration = Duration::from_hours(24 * 180);
/// How often it is looked whether something was revoked, or the authority replaced.
const LOOK: Duration = Duration::from_secs(2);

/// Issues an identity to this daemon, and another one whenever what it rests on changes. Reads and writes files: not for async code.
pub fn issue_own(ctx: &Context, node_id: &'static str) -> Result<IdentityHandle, PkiError> {
    let mut own = Own { dir: ctx.state().path().join("pki"), node_id, seen: Stamp::default() };
    let handle = IdentityHandle::new(own.issue()?);
    let (kept, stop) = (handle.clone(), ctx.shutdown().clone());
    ctx.spawn("own identity", async move {
        let mut age = Duration::ZERO;
        loop {
            tokio::select! {
                () = tokio::time::sleep(LOOK) => age += LOOK,
                () = stop.cancelled() => return,
            }
            let looked = tokio::task::spawn_blocking(move || {
                let fresh = (age >= RENEW_AFTER || own.has_changed()).then(|| own.issue());
                (own, fresh)
            });
            let Ok((back, fresh)) = looked.await else { return };
            own = back;
            match fresh {
                Some(Ok(identity)) => {
                    info!("a fresh identity is in force: something was revoked, replaced or due");
                    kept.replace(identity);
                    age = Duration::ZERO;
                }
                // Files are written one after another: the next look finds all of them.
                Some(Err(error)) => debug!(%error, "the identity cannot be issued again"),
                None => {}
            }
        }
    });
    Ok(handle)
}

struct Own {
    dir: PathBuf,
    node_id: &'static str,
    seen: Stamp,
}

impl Own {
    fn now(dir: &Path) -> Stamp {
        stamp_of(dir, &[CA_CERT, REVOKED])
    }

    fn has_changed(&self) -> bool {
        Self::now(&self.dir) != self.seen
    }

    fn issue(&mut self) -> Result<super::Identity, PkiError> {
        let authority = Authority::open_or_create_at(&self.dir)?;
        // Looked at before: what changes meanwhile is seen at the next look.
        let now = Self::now(&self.dir);
        let identity = authority.issue(self.node_id, VALID_FOR)?;
        self.seen = now;
        Ok(identity)
    }
}
