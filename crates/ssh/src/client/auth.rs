//! Logging in with keys: those of the agent first, then those of files, as OpenSSH offers them.

use std::sync::Arc;
use std::time::Duration;

use russh::client::{AuthResult, Handle};
use russh::keys::agent::AgentIdentity;
use russh::keys::agent::client::AgentClient;
use russh::keys::signature::Signer as _;
use russh::keys::ssh_encoding::Encode as _;
use russh::keys::ssh_key::Signature;
use russh::keys::ssh_key::private::KeypairData;
use russh::keys::{Algorithm, Certificate, HashAlg, PrivateKey, PrivateKeyWithHashAlg, PublicKey};
use russh::{AgentAuthError, MethodKind, MethodSet, Signer};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::connect::{Client, Failure};
use super::keeper::Shared;
use super::keys::{self, Identity};
use crate::{HostConfig, Settings};

/// How long an agent may take to list its keys; to sign it may have to ask somebody.
const AGENT_LISTS: Duration = Duration::from_secs(5);

type Agent = AgentClient<UnixStream>;

/// With which hash the server takes RSA signatures; none is SHA-1.
#[derive(Clone, Copy)]
enum RsaHash {
    NotAsked,
    Known(Option<HashAlg>),
}

/// What was tried, for the message when nothing helped.
struct Attempt<'a> {
    shared: &'a Shared,
    handle: &'a mut Handle<Client>,
    user: &'a str,
    rsa: RsaHash,
    offered: usize,
    notes: Vec<String>,
    /// The server took a key and wants more.
    more: bool,
    methods: Option<MethodSet>,
}

pub(super) async fn log_in(
    shared: &Shared,
    handle: &mut Handle<Client>,
    settings: &Settings,
    config: &HostConfig,
) -> Result<(), Failure> {
    let mut attempt = Attempt {
        shared,
        handle,
        user: &config.user,
        rsa: RsaHash::NotAsked,
        offered: 0,
        notes: Vec::new(),
        more: false,
        methods: None,
    };
    let identities = keys::identities(config);
    let certificates = keys::certificates(config);
    let (mut agent, held) = attempt.agent(config).await;
    if attempt.try_all(&identities, &certificates, agent.as_mut(), &held, config.identities_only).await? {
        return Ok(());
    }
    Err(attempt.refused(settings, config))
}

impl Attempt<'_> {
    async fn agent(&mut self, config: &HostConfig) -> (Option<Agent>, Vec<AgentIdentity>) {
        let Some(socket) = &config.agent else { return (None, Vec::new()) };
        let listed = timeout(AGENT_LISTS, async {
            let mut agent = AgentClient::connect_uds(socket).await?;
            let held = agent.request_identities().await?;
            Ok::<_, russh::keys::Error>((agent, held))
        });
        match listed.await {
            Ok(Ok((agent, held))) => return (Some(agent), held),
            Ok(Err(error)) => self.notes.push(format!("the agent at {} does not help: {error}", socket.display())),
            Err(_) => self.notes.push(format!("the agent at {} does not answer", socket.display())),
        }
        (None, Vec::new())
    }

    async fn try_all(
        &mut self,
        identities: &[Identity],
        certificates: &[Certificate],
        mut agent: Option<&mut Agent>,
        held: &[AgentIdentity],
        only: bool,
    ) -> Result<bool, Failure> {
        // Certificates, signed for by whoever has their key.
        for certificate in certificates {
            let key = certificate.public_key();
            let holder = held.iter().find(|identity| identity.public_key().key_data() == key);
            if let (Some(agent), Some(holder)) = (agent.as_deref_mut(), holder) {
                if self.certificate_by(certificate, &mut InAgent { agent, holder }).await? {
                    return Ok(true);
                }
            } else if let Some(identity) = identities.iter().find(|identity| keys::is(identity, key)) {
                match keys::open(self.shared, &identity.path).await {
                    Err(note) => self.notes.push(note),
                    Ok(key) => {
                        if self.certificate_by(certificate, &mut InFile(key)).await? {
                            return Ok(true);
                        }
                    }
                }
            }
        }
        // The agent's keys: those that the configuration names first, the others unless it forbids them.
        if let Some(agent) = agent {
            let named = |identity: &&AgentIdentity| {
                identities.iter().any(|file| keys::is(file, identity.public_key().key_data()))
            };
            let others = held.iter().filter(|identity| !only && !named(identity));
            for identity in held.iter().filter(named).chain(others) {
                let accepted = match identity {
                    AgentIdentity::Certificate { certificate, .. } => {
                        self.certificate_by(certificate, &mut *agent).await?
                    }
                    AgentIdentity::PublicKey { key, .. } => self.key_by_agent(key, agent).await?,
                };
                if accepted {
                    return Ok(true);
                }
            }
        }
        // Files whose keys the agent does not have.
        for identity in identities {
            if held.iter().any(|held| keys::is(identity, held.public_key().key_data())) || !identity.path.exists() {
                continue;
            }
            match keys::open(self.shared, &identity.path).await {
                Err(note) => self.notes.push(note),
                Ok(key) => {
                    let hash = self.hash(&key.algorithm()).await;
                    let result =
                        self.handle.authenticate_publickey(self.user, PrivateKeyWithHashAlg::new(key, hash)).await;
                    if self.judge(result)? {
                        return Ok(true);
                    }
                }
            }
        }
        Ok(false)
    }

    async fn key_by_agent(&mut self, key: &PublicKey, agent: &mut Agent) -> Result<bool, Failure> {
        let hash = self.hash(&key.algorithm()).await;
        match self.handle.authenticate_publickey_with(self.user, key.clone(), hash, agent).await {
            Ok(result) => self.judge(Ok(result)),
            Err(error) => self.not_signed(&error.to_string()),
        }
    }

    async fn certificate_by(
        &mut self,
        certificate: &Certificate,
        signer: &mut impl Signer<Error = AgentAuthError>,
    ) -> Result<bool, Failure> {
        let hash = self.hash(&certificate.public_key().algorithm()).await;
        match self.handle.authenticate_certificate_with(self.user, certificate.clone(), hash, signer).await {
            Ok(result) => self.judge(Ok(result)),
            Err(error) => self.not_signed(&error.to_string()),
        }
    }

    fn not_signed(&mut self, why: &str) -> Result<bool, Failure> {
        self.notes.push(format!("the key did not sign: {why}"));
        self.still_there()?;
        Ok(false)
    }

    /// The hash with which this server takes RSA signatures; asked once.
    async fn hash(&mut self, kind: &Algorithm) -> Option<HashAlg> {
        if !matches!(kind, Algorithm::Rsa { .. }) {
            return None;
        }
        if let RsaHash::Known(hash) = self.rsa {
            return hash;
        }
        let best = self.handle.best_supported_rsa_hash().await.ok().flatten();
        let hash = best.unwrap_or(Some(HashAlg::Sha512));
        self.rsa = RsaHash::Known(hash);
        hash
    }

    fn judge(&mut self, result: Result<AuthResult, russh::Error>) -> Result<bool, Failure> {
        self.offered += 1;
        match result {
            Ok(AuthResult::Success) => Ok(true),
            Ok(AuthResult::Failure { remaining_methods, partial_success }) => {
                self.more |= partial_success;
                if !remaining_methods.is_empty() {
                    self.methods = Some(remaining_methods);
                }
                self.still_there()?;
                Ok(false)
            }
            Err(error) => {
                self.still_there()?;
                self.notes.push(error.to_string());
                Ok(false)
            }
        }
    }

    /// Servers hang up after a few keys that they do not take. One that hangs up at the first has another reason.
    fn still_there(&self) -> Result<(), Failure> {
        if !self.handle.is_closed() {
            return Ok(());
        }
        if self.offered < 2 {
            return Err(Failure::Passing("the server hung up during the login".to_owned()));
        }
        Err(Failure::Refused {
            why: format!("the server hung up after {} keys that it did not accept", self.offered),
            hint: "name the right one with IdentityFile and set IdentitiesOnly in your ssh configuration".to_owned(),
        })
    }

    fn refused(&self, settings: &Settings, config: &HostConfig) -> Failure {
        let keys = match self.offered {
            0 => "there was no key to offer".to_owned(),
            1 => "one key was offered and not accepted".to_owned(),
            several => format!("{several} keys were offered and none was accepted"),
        };
        let mut why = format!("{} may not log in: {keys}", config.user);
        if self.more {
            why = format!("{} may not log in with a key alone", config.user);
        }
        for note in &self.notes {
            why.push_str("; ");
            why.push_str(note);
        }
        let takes_keys = self.methods.as_ref().is_none_or(|methods| methods.contains(&MethodKind::PublicKey));
        let hint = if self.more || !takes_keys {
            "this site asks for more: use the system's ssh for this cluster and open a shared connection by hand (ControlMaster)".to_owned()
        } else {
            format!(
                "`ssh {} exit` must work without questions: put the key into the agent, or name it with IdentityFile",
                settings.host
            )
        };
        Failure::Refused { why, hint }
    }
}

/// Signs for a certificate with the key of a file. The client's own way signs RSA with SHA-1, which servers refuse.
struct InFile(Arc<PrivateKey>);

impl Signer for InFile {
    type Error = AgentAuthError;

    async fn auth_sign(
        &mut self,
        _: &AgentIdentity,
        hash: Option<HashAlg>,
        mut to_sign: Vec<u8>,
    ) -> Result<Vec<u8>, AgentAuthError> {
        let wrong = |error: russh::keys::ssh_key::Error| AgentAuthError::Key(error.into());
        let signed: Result<Signature, _> = match self.0.key_data() {
            KeypairData::Rsa(key) => (key, hash).try_sign(&to_sign),
            key => key.try_sign(&to_sign),
        };
        let mut signature = Vec::new();
        signed.map_err(|error| wrong(error.into()))?.encode(&mut signature).map_err(|error| wrong(error.into()))?;
        signature.encode(&mut to_sign).map_err(|error| wrong(error.into()))?;
        Ok(to_sign)
    }
}

/// Signs for a certificate with a key of the agent, which need not hold the certificate.
struct InAgent<'a> {
    agent: &'a mut Agent,
    holder: &'a AgentIdentity,
}

impl Signer for InAgent<'_> {
    type Error = AgentAuthError;

    async fn auth_sign(
        &mut self,
        _: &AgentIdentity,
        hash: Option<HashAlg>,
        to_sign: Vec<u8>,
    ) -> Result<Vec<u8>, AgentAuthError> {
        Ok(self.agent.sign_request(self.holder, hash, to_sign).await?)
    }
}
