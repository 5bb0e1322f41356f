//! Private keys and certificates in files.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use russh::keys::ssh_key::public::KeyData;
use russh::keys::{Certificate, PrivateKey, PublicKey, decode_secret_key, load_openssh_certificate, load_public_key};

use super::keeper::Shared;
use crate::HostConfig;

/// Times that a passphrase is asked for.
const TRIES: usize = 3;

/// A key that the configuration names.
pub(super) struct Identity {
    pub(super) path: PathBuf,
    /// Known without its passphrase, unless the file is in an old format and has no public file beside it.
    pub(super) public: Option<PublicKey>,
}

/// The identities whose files are there.
pub(super) fn identities(config: &HostConfig) -> Vec<Identity> {
    let beside = |path: &Path| PathBuf::from(format!("{}.pub", path.display()));
    config
        .identities
        .iter()
        .filter(|path| path.exists() || beside(path).exists())
        .map(|path| {
            let public = load_public_key(beside(path)).ok();
            let inside = || PrivateKey::read_openssh_file(path).ok().map(|key| key.public_key().clone());
            // A public key file may itself be what is named, for a key that only the agent has.
            let itself = || load_public_key(path).ok();
            Identity { public: public.or_else(inside).or_else(itself), path: path.clone() }
        })
        .collect()
}

/// The certificates that are named, and those beside the keys.
pub(super) fn certificates(config: &HostConfig) -> Vec<Certificate> {
    let beside = config.identities.iter().map(|path| PathBuf::from(format!("{}-cert.pub", path.display())));
    config.certificates.iter().cloned().chain(beside).filter_map(|path| load_openssh_certificate(path).ok()).collect()
}

pub(super) fn is(identity: &Identity, key: &KeyData) -> bool {
    identity.public.as_ref().is_some_and(|public| public.key_data() == key)
}

/// Reads a private key, and asks for its passphrase where it has one.
pub(super) async fn open(shared: &Shared, path: &Path) -> Result<Arc<PrivateKey>, String> {
    if let Some(key) = shared.opened(path) {
        return Ok(key);
    }
    let cannot = |why: &str| format!("{}: {why}", path.display());
    let mode = std::fs::metadata(path).map_err(|error| cannot(&error.to_string()))?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(cannot("others may read it (chmod 600)"));
    }
    let text = std::fs::read_to_string(path).map_err(|error| cannot(&error.to_string()))?;
    let first = decode_secret_key(&text, None);
    let encrypted = match &first {
        Ok(key) => key.is_encrypted(),
        Err(russh::keys::Error::KeyIsEncrypted) => true,
        Err(_) => text.contains("ENCRYPTED"),
    };
    if !encrypted {
        return first.map(Arc::new).map_err(|error| cannot(&error.to_string()));
    }
    for _ in 0..TRIES {
        let question = format!("Enter passphrase for key '{}': ", path.display());
        let Some(passphrase) = shared.settings.prompt.secret(&question).await else {
            return Err(cannot(
                "it has a passphrase, and nobody gave it (load it into the agent with ssh-add, or set SSH_ASKPASS)",
            ));
        };
        // Making a key of a passphrase takes a while by design.
        let text = text.clone();
        let opened = tokio::task::spawn_blocking(move || decode_secret_key(&text, Some(&passphrase))).await;
        if let Ok(Ok(key)) = opened {
            let key = Arc::new(key);
            shared.remember_opened(path.to_owned(), &key);
            return Ok(key);
        }
    }
    Err(cannot("the passphrase is wrong"))
}
