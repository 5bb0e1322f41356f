//! From nothing to a connection that is logged in, through as many hosts as the configuration names.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use russh::client::{self, DisconnectReason, Handle};
use russh::keys::ssh_key::certificate::CertType;
use russh::keys::{Algorithm, Certificate, HashAlg, PublicKey, PublicKeyOrCertificate};
use russh::{Preferred, SshId};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::auth;
use super::keeper::{Live, Shared};
use super::stream::{Bytes, Mortal, Proxied};
use crate::known_hosts::{self, Known};
use crate::{Hop, HostConfig, Proxy, Settings, Verdict, resolve};

/// Most hosts on the way.
const MOST_HOPS: usize = 8;

/// How long a step may take when a person may have to be asked.
const PATIENCE_WITH_PEOPLE: Duration = Duration::from_secs(110);

/// Why there is no connection.
#[derive(Debug)]
pub(super) enum Failure {
    /// It may work the next time.
    Passing(String),
    /// It will not, until a person has done something.
    Refused { why: String, hint: String },
}

impl Failure {
    fn at(self, alias: &str, last: bool) -> Self {
        if last {
            return self;
        }
        match self {
            Self::Passing(why) => Self::Passing(format!("on the way, at {alias}: {why}")),
            Self::Refused { why, hint } => Self::Refused { why: format!("on the way, at {alias}: {why}"), hint },
        }
    }
}

/// Our side of the protocol: judges the key of the host and says when the connection ends.
pub(super) struct Client {
    settings: Settings,
    config: HostConfig,
    known: Known,
    why: Arc<OnceLock<String>>,
    /// Its drop is the end of the connection's task.
    _dead: tokio_util::sync::DropGuard,
}

#[derive(Debug)]
pub(super) enum Trouble {
    Ssh(russh::Error),
    HostKey(Failure),
}

impl From<russh::Error> for Trouble {
    fn from(error: russh::Error) -> Self {
        Self::Ssh(error)
    }
}

impl client::Handler for Client {
    type Error = Trouble;

    async fn check_server_key(&mut self, shown: &PublicKeyOrCertificate) -> Result<bool, Trouble> {
        let judged = match shown {
            PublicKeyOrCertificate::PublicKey { key, .. } => self.judge(key).await,
            PublicKeyOrCertificate::Certificate(certificate) => self.judge_certificate(certificate),
        };
        judged.map(|()| true).map_err(Trouble::HostKey)
    }

    async fn disconnected(&mut self, reason: DisconnectReason<Trouble>) -> Result<(), Trouble> {
        let why = match &reason {
            DisconnectReason::ReceivedDisconnect(info) => {
                format!("the server ended it: {}", info.message.escape_debug())
            }
            DisconnectReason::Error(Trouble::Ssh(russh::Error::KeepaliveTimeout)) => {
                "the server no longer answers".to_owned()
            }
            DisconnectReason::Error(Trouble::Ssh(error)) => error.to_string(),
            DisconnectReason::Error(Trouble::HostKey(_)) => "the key of the host changed while connected".to_owned(),
        };
        // The first reason is the one that counts.
        let _ = self.why.set(why);
        Ok(())
    }
}

impl Client {
    fn name(&self) -> String {
        let host = self.config.host_key_alias.as_ref().unwrap_or(&self.config.host_name);
        // As in OpenSSH an alias stands for the host with whatever port.
        let port = if self.config.host_key_alias.is_some() { 22 } else { self.config.port };
        known_hosts::name(host, port)
    }

    async fn judge(&self, key: &PublicKey) -> Result<(), Failure> {
        let name = self.name();
        let fingerprint = key.fingerprint(HashAlg::Sha256);
        let kind = key.algorithm();
        match self.known.judge(key) {
            Verdict::Known => Ok(()),
            Verdict::Revoked { file, line } => Err(Failure::Refused {
                why: format!("the key that {name} shows was revoked ({}:{line})", file.display()),
                hint: "do not connect; ask the site for its new key".to_owned(),
            }),
            Verdict::Changed { file, line } => Err(Failure::Refused {
                why: format!(
                    "{name} shows another {kind} key than the one known for it ({}:{line}); it may be somebody else",
                    file.display()
                ),
                hint: format!(
                    "ask the site whether its key is now {fingerprint}; only then `ssh-keygen -R '{name}' -f {}` and `{}`",
                    file.display(),
                    self.first_login()
                ),
            }),
            Verdict::Unknown => self.ask(&name, key, &fingerprint.to_string()).await,
        }
    }

    async fn ask(&self, name: &str, key: &PublicKey, fingerprint: &str) -> Result<(), Failure> {
        let kind = key.algorithm();
        let question = format!(
            "the host {name} is not known; its {kind} key is {fingerprint}. Does the site publish this fingerprint, and shall we trust it?"
        );
        let file = self.config.known_hosts.first();
        if !self.settings.prompt.confirm(&question).await {
            return Err(Failure::Refused {
                why: format!("the host {name} is not known; its {kind} key is {fingerprint}"),
                hint: format!(
                    "run `{}` once and compare the fingerprint with the one that the site publishes",
                    self.first_login()
                ),
            });
        }
        let Some(file) = file else { return Ok(()) };
        known_hosts::remember(file, name, key).map_err(|error| Failure::Refused {
            why: format!("{} cannot be written: {error}", file.display()),
            hint: "make it writable, so that the host is known the next time".to_owned(),
        })
    }

    fn judge_certificate(&self, certificate: &Certificate) -> Result<(), Failure> {
        let name = self.name();
        let refuse = |why: &str| Failure::Refused {
            why: format!("the certificate that {name} shows is not good: {why}"),
            hint: "ask the site; its authority must be in the known hosts as @cert-authority".to_owned(),
        };
        let key = PublicKey::new(certificate.public_key().clone(), "");
        if matches!(self.known.judge(&key), Verdict::Revoked { .. }) {
            return Err(refuse("its key was revoked"));
        }
        if certificate.cert_type() != CertType::Host {
            return Err(refuse("it is not for a host"));
        }
        let host = self.config.host_key_alias.as_ref().unwrap_or(&self.config.host_name).to_lowercase();
        let principals = certificate.valid_principals();
        if !principals.is_empty() && !principals.iter().any(|pattern| crate::config::matches(pattern, &host)) {
            return Err(refuse("it is for another host"));
        }
        let authorities: Vec<_> =
            self.known.authorities().into_iter().map(|key| key.fingerprint(HashAlg::Sha256)).collect();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        certificate.validate_at(now, &authorities).map_err(|error| refuse(&error.to_string()))
    }

    /// The command with which a person gets to know the host.
    fn first_login(&self) -> String {
        let mut command = "ssh".to_owned();
        if let Some(file) = &self.settings.config_file {
            let _ = write!(command, " -F '{}'", file.display());
        }
        for (key, value) in &self.settings.options {
            let _ = write!(command, " -o '{key}={value}'");
        }
        format!("{command} {} exit", self.settings.host)
    }
}

/// Connects and logs in.
pub(super) async fn connect(shared: &Arc<Shared>) -> Result<Live, Failure> {
    let mut way = Vec::new();
    plan(&shared.settings, &shared.config, &mut way)?;
    let mut hops: Vec<Handle<Client>> = Vec::new();
    let last = way.len() - 1;
    for (at, (settings, config)) in way.into_iter().enumerate() {
        let alias = config.alias.clone();
        let joined =
            step(shared, &settings, &config, hops.last()).await.map_err(|failure| failure.at(&alias, at == last))?;
        let (handle, dead, why) = joined;
        if at == last {
            return Ok(Live::new(handle, dead, why, hops, shared.settings.max_sessions));
        }
        hops.push(handle);
    }
    Err(Failure::Passing("there is no way".to_owned()))
}

/// The hosts on the way, the nearest first and the goal last.
fn plan(settings: &Settings, config: &HostConfig, way: &mut Vec<(Settings, HostConfig)>) -> Result<(), Failure> {
    let refused =
        |why: String| Failure::Refused { why, hint: "look at ProxyJump in your ssh configuration".to_owned() };
    if way.len() > MOST_HOPS {
        return Err(refused("the jump hosts lead in a circle".to_owned()));
    }
    if let Proxy::Jump(hops) = &config.proxy {
        for (at, hop) in hops.iter().enumerate() {
            let settings = through(settings, hop);
            let mut config = resolve(&settings).map_err(|error| refused(error.to_string()))?;
            if at == 0 {
                plan_hop(&settings, &config, way)?;
            } else {
                // Behind the first one the way is this list, whatever is configured for the others.
                config.proxy = Proxy::None;
                way.push((settings, config));
            }
        }
    }
    way.push((settings.clone(), config.clone()));
    Ok(())
}

fn plan_hop(settings: &Settings, config: &HostConfig, way: &mut Vec<(Settings, HostConfig)>) -> Result<(), Failure> {
    // A jump host that is reached through itself would be planned for ever: each level counts as a hop.
    if let Proxy::Jump(hops) = &config.proxy
        && (hops.iter().any(|hop| hop.host == config.alias) || way.len() + hops.len() > MOST_HOPS)
    {
        return Err(Failure::Refused {
            why: format!("the way to {} leads through itself", config.alias),
            hint: "look at ProxyJump in your ssh configuration".to_owned(),
        });
    }
    plan(settings, config, way)
}

fn through(settings: &Settings, hop: &Hop) -> Settings {
    // Options of the goal are not for the hosts on the way, but for where to find keys and known hosts.
    let shared = ["userknownhostsfile", "globalknownhostsfile", "identityagent"];
    let mut options: Vec<(String, String)> = settings
        .options
        .iter()
        .filter(|(key, _)| shared.contains(&key.to_ascii_lowercase().as_str()))
        .cloned()
        .collect();
    options.extend(hop.user.iter().map(|user| ("User".to_owned(), user.clone())));
    options.extend(hop.port.iter().map(|port| ("Port".to_owned(), port.to_string())));
    Settings { host: hop.host.clone(), options, ..settings.clone() }
}

type Joined = (Handle<Client>, CancellationToken, Arc<OnceLock<String>>);

async fn step(
    shared: &Arc<Shared>,
    settings: &Settings,
    config: &HostConfig,
    through: Option<&Handle<Client>>,
) -> Result<Joined, Failure> {
    let patience = config.connect_timeout.unwrap_or(settings.connect_timeout);
    let slow = if settings.prompt.interactive() { PATIENCE_WITH_PEOPLE.max(patience) } else { patience };
    let late = |what: &str| Failure::Passing(format!("{what} took longer than {patience:?}"));
    let bytes = timeout(patience, reach(config, through)).await.unwrap_or_else(|_| Err(late("connecting")))?;

    let known = known(config)?;
    let dead = CancellationToken::new();
    let why = Arc::new(OnceLock::new());
    let ssh = Arc::new(protocol(settings, config, &known));
    let stall = ssh.keepalive_interval.unwrap_or(patience) * (ssh.keepalive_max as u32 + 1);
    let stream = Mortal::new(bytes, &dead, stall);
    let client = Client {
        settings: settings.clone(),
        config: config.clone(),
        known,
        why: Arc::clone(&why),
        _dead: dead.clone().drop_guard(),
    };
    // The client's own task outlives a future of ours that is dropped, so it is ended through its bytes.
    let unfinished = dead.clone().drop_guard();
    let handshake = timeout(slow, client::connect_stream(ssh, stream, client)).await;
    let mut handle = match handshake {
        Err(_) => return Err(late("the handshake")),
        Ok(Err(Trouble::HostKey(failure))) => return Err(failure),
        Ok(Err(Trouble::Ssh(error))) => return Err(handshake_failure(&error)),
        Ok(Ok(handle)) => handle,
    };
    timeout(slow, auth::log_in(shared, &mut handle, settings, config))
        .await
        .unwrap_or_else(|_| Err(late("logging in")))?;
    let _ = unfinished.disarm();
    Ok((handle, dead, why))
}

async fn reach(config: &HostConfig, through: Option<&Handle<Client>>) -> Result<Box<dyn Bytes>, Failure> {
    let goal = format!("{}:{}", config.host_name, config.port);
    if let Some(hop) = through {
        let opened = hop.channel_open_direct_tcpip(config.host_name.clone(), config.port.into(), "127.0.0.1", 0).await;
        let channel =
            opened.map_err(|error| Failure::Passing(format!("the jump host cannot connect to {goal}: {error}")))?;
        return Ok(Box::new(channel.into_stream()));
    }
    if let Proxy::Command(command) = &config.proxy {
        let proxied = Proxied::spawn(command)
            .map_err(|error| Failure::Passing(format!("the proxy command cannot be started: {error}")))?;
        return Ok(Box::new(proxied));
    }
    let connected = TcpStream::connect((config.host_name.as_str(), config.port)).await;
    let stream = connected.map_err(|error| Failure::Passing(format!("{goal}: {error}")))?;
    // Without it small commands wait for the acknowledgement of those before.
    let _ = stream.set_nodelay(true);
    Ok(Box::new(stream))
}

fn known(config: &HostConfig) -> Result<Known, Failure> {
    let host = config.host_key_alias.as_ref().unwrap_or(&config.host_name);
    let port = if config.host_key_alias.is_some() { 22 } else { config.port };
    Known::read(&config.known_hosts, &known_hosts::name(host, port)).map_err(|error| Failure::Refused {
        why: error.to_string(),
        hint: "make the file readable, or name another in UserKnownHostsFile".to_owned(),
    })
}

fn protocol(settings: &Settings, config: &HostConfig, known: &Known) -> client::Config {
    let mut preferred = Preferred::DEFAULT;
    // A host with several keys shows the kind that is asked for first: ask for one that we can compare.
    let kinds: Vec<_> = known.keys().map(PublicKey::algorithm).collect();
    let mut order = preferred.key.to_vec();
    order.sort_by_key(|kind| !kinds.iter().any(|known| known == kind || (is_rsa(known) && is_rsa(kind))));
    preferred.key = Cow::Owned(order);
    if !known.authorities().is_empty() {
        preferred.host_key_certificates.clone_from(&preferred.key);
    }
    client::Config {
        client_id: SshId::Standard(Cow::Borrowed(concat!("SSH-2.0-drover_", env!("CARGO_PKG_VERSION")))),
        keepalive_interval: Some(config.alive_interval.unwrap_or(settings.keepalive)),
        keepalive_max: config.alive_count.unwrap_or(settings.keepalive_misses),
        preferred,
        nodelay: true,
        ..client::Config::default()
    }
}

fn handshake_failure(error: &russh::Error) -> Failure {
    match error {
        russh::Error::NoCommonAlgo { kind, ours, theirs } => Failure::Refused {
            why: format!(
                "we and the server have no {kind:?} algorithm in common (ours: {}; theirs: {})",
                ours.join(", "),
                theirs.join(", ")
            ),
            hint: "use the system's ssh for this cluster".to_owned(),
        },
        // A server that has too many logins under way (MaxStartups) hangs up before its first word.
        russh::Error::Disconnect | russh::Error::HUP | russh::Error::IO(_) => Failure::Passing(format!(
            "the server hung up during the handshake, as one does that has too many at once ({error})"
        )),
        error => Failure::Passing(format!("the handshake failed: {error}")),
    }
}

fn is_rsa(kind: &Algorithm) -> bool {
    matches!(kind, Algorithm::Rsa { .. })
}
