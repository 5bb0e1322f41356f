//! The way over TLS: gRPC to the dispatcher, which knows this node by its certificate.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use drover_dispatcher::pool::{Ask, Frame, NODE_ID, Whereabouts};
use drover_proto::pool::ReleaseRequest;
use drover_proto::pool::pool_service_client::PoolServiceClient;
use drover_service::pki::{Identity, IdentityHandle, PkiError};
use drover_service::{MAX_MESSAGE_BYTES, connect_node, why};
use tokio::sync::Mutex;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::carriage::{Broken, Progress};

/// How long the dispatcher may take to take a request in, or to hear that one is over.
const TAKEN: Duration = Duration::from_secs(10);

/// The node's side of the connection.
pub(super) struct Tls {
    identity: IdentityHandle,
    /// Where it was read.
    dir: PathBuf,
    address: Option<String>,
    mailbox: PathBuf,
    client: Mutex<Option<(SocketAddr, PoolServiceClient<Channel>)>>,
}

impl Tls {
    pub(super) fn new(dir: &Path, address: Option<String>, mailbox: PathBuf) -> Result<Self, PkiError> {
        let identity = IdentityHandle::new(Identity::load(dir)?);
        Ok(Self { identity, dir: dir.to_owned(), address, mailbox, client: Mutex::default() })
    }

    /// A connection to where the dispatcher is now.
    async fn client(&self) -> Result<PoolServiceClient<Channel>, Broken> {
        let addr = find(self.address.as_deref(), &self.mailbox).await.map_err(Broken::Unreachable)?;
        let mut kept = self.client.lock().await;
        if let Some((known, client)) = &*kept
            && *known == addr
        {
            return Ok(client.clone());
        }
        // A renewed certificate lies where the old one did.
        let dir = self.dir.clone();
        if let Ok(Ok(renewed)) = tokio::task::spawn_blocking(move || Identity::load(&dir)).await {
            self.identity.replace(renewed);
        }
        let client = PoolServiceClient::new(connect_node(&self.identity, addr, NODE_ID))
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        *kept = Some((addr, client.clone()));
        Ok(client)
    }

    pub(super) async fn carry(&self, ask: &Ask, progress: &mut Progress) -> Result<(), Broken> {
        let mut client = self.client().await?;
        let asked = timeout(TAKEN, client.ask(ask.to_message(progress.have))).await;
        let mut frames = match asked {
            Ok(Ok(frames)) => frames.into_inner(),
            Ok(Err(status)) => {
                *self.client.lock().await = None;
                return Err(refused(&status));
            }
            Err(_) => {
                *self.client.lock().await = None;
                return Err(Broken::Unreachable(format!("no answer within {} s", TAKEN.as_secs())));
            }
        };
        progress.by_tls.store(true, Ordering::Relaxed);
        loop {
            match frames.message().await {
                Ok(Some(message)) => {
                    let frame = Frame::of_message(message).map_err(|error| Broken::Lost(error.to_string()))?;
                    if progress.take(frame).await? {
                        return Ok(());
                    }
                }
                Ok(None) => return Err(Broken::Lost("it ended early".to_owned())),
                Err(status) => {
                    *self.client.lock().await = None;
                    return Err(Broken::Lost(why(&status)));
                }
            }
        }
    }

    pub(super) async fn release(&self, id: &str) {
        let Ok(mut client) = self.client().await else { return };
        // One that does not hear it gives the exchange up by itself after a while.
        let _ = timeout(TAKEN, client.release(ReleaseRequest { exchange_ids: vec![id.to_owned()] })).await;
    }
}

fn refused(status: &Status) -> Broken {
    match status.code() {
        Code::ResourceExhausted => Broken::Busy(status.message().to_owned()),
        Code::Unimplemented => {
            Broken::Unreachable("it has no pool for nodes: worker.codex_provider is not set there".to_owned())
        }
        _ => Broken::Unreachable(why(status)),
    }
}

/// Where the dispatcher is: as configured, else as it says in the mailbox.
pub(crate) async fn find(address: Option<&str>, mailbox: &Path) -> Result<SocketAddr, String> {
    let text = if let Some(text) = address {
        text.to_owned()
    } else {
        let root = mailbox.to_owned();
        let said = tokio::task::spawn_blocking(move || Whereabouts::read(&root)).await.ok().flatten();
        let said = said.ok_or_else(|| "it has not said in the mailbox where it is".to_owned())?;
        let elsewhere = || format!("it listens only for its own host: set node_scaling.listen on {}", said.host);
        said.reachable().map(str::to_owned).ok_or_else(elsewhere)?
    };
    let found = tokio::net::lookup_host(&text).await.map_err(|error| format!("{text}: {error}"))?.next();
    found.ok_or_else(|| format!("{text} has no address"))
}
