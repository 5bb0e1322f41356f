//! Daemons of a test: each a process with a state directory of its own, ended when the test ends.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use drover_proto::membership::membership_service_client::MembershipServiceClient;
use drover_proto::membership::{
    GetStatusRequest, GetStatusResponse, ListKeysRequest, ListMembersRequest, Member, MemberState,
};
use drover_service::pki::{Authority, Identity, KeyRing};
use drover_service::{StateDir, Target, address_book, connect};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::transport::Channel;

/// The machine may be busy with other tests: bounds of time are this much wider than what is promised.
pub(crate) const SLACK: u32 = 3;
/// How long anything may take before the test gives up.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    /// Gossip in the clear.
    pub(crate) plaintext: bool,
    /// Have a certificate of the lab's instance.
    pub(crate) identity: bool,
    /// Give the name by swarm id and index.
    pub(crate) named: bool,
    /// Take any free UDP port.
    pub(crate) free_port: bool,
}

/// Sealed, five times as fast as by default.
pub(crate) const FAST: Options = Options { plaintext: false, identity: true, named: true, free_port: true };

/// An instance with its authority.
pub(crate) struct Lab {
    _dir: TempDir,
    authority: Authority,
}

/// The files of an identity.
pub(crate) struct Files(Vec<(String, Vec<u8>)>);

impl Lab {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::open_or_create_at(&dir.path().join("pki")).unwrap();
        Self { _dir: dir, authority }
    }

    pub(crate) fn identity(&self, id: &str) -> Files {
        Files::of(&self.authority.issue(id, Duration::from_hours(24)).unwrap())
    }

    /// The signed list of all certificates of these nodes but these.
    pub(crate) fn revoke(&self, nodes: &[&str], kept: &[&Files]) -> Vec<u8> {
        let issued = self.authority.issued().unwrap();
        let newest = |node: &str| issued.iter().rev().find(|issued| issued.node_id == node).unwrap().serial.clone();
        let kept: Vec<String> = kept.iter().map(|files| newest(&files.node_id())).collect();
        let serials: Vec<String> = issued
            .iter()
            .filter(|issued| nodes.contains(&issued.node_id.as_str()) && !kept.contains(&issued.serial))
            .map(|issued| issued.serial.clone())
            .collect();
        self.authority.revoke(&serials).unwrap();
        fs::read(self.authority.dir().join("revoked.crl")).unwrap()
    }

    /// Whether a node lets nobody in who shows the identity of another.
    pub(crate) async fn refused_by(&self, node: &Node, guest: &Node) -> bool {
        let identity = Identity::load(&guest.identity_path()).unwrap();
        match drover_service::connect_node_stream(&identity, node.listen(), &node.id).await {
            // TLS 1.3 tells the client of a refusal when it reads.
            Ok(mut stream) => {
                let read = tokio::time::timeout(Duration::from_millis(300), stream.read_u8()).await;
                matches!(read, Ok(Err(_)))
            }
            Err(_) => true,
        }
    }

    /// One that is valid only in so many seconds.
    pub(crate) fn identity_from(&self, id: &str, seconds: u64) -> Files {
        let now = drover_service::now_us() / 1_000_000;
        Files::of(&self.authority.issue_between(id, now + seconds, now + seconds + 86_400).unwrap())
    }
}

impl Files {
    fn of(identity: &Identity) -> Self {
        Self(identity.files().into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect())
    }

    fn store(&self, dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).unwrap();
        for (name, bytes) in &self.0 {
            fs::write(dir.join(name), bytes).unwrap();
            fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o600)).unwrap();
        }
    }

    pub(crate) fn ring(&self) -> KeyRing {
        let (_, bytes) = self.0.iter().find(|(name, _)| name == "ring.json").unwrap();
        KeyRing::from_json(bytes).unwrap()
    }

    fn node_id(&self) -> String {
        let (_, bytes) = self.0.iter().find(|(name, _)| name == "identity.json").unwrap();
        serde_json::from_slice::<Value>(bytes).unwrap()["node_id"].as_str().unwrap().to_owned()
    }

    pub(crate) fn with_ring(mut self, ring: &KeyRing) -> Self {
        let (_, bytes) = self.0.iter_mut().find(|(name, _)| name == "ring.json").unwrap();
        *bytes = ring.to_json().into_bytes();
        self
    }
}

pub(crate) struct Node {
    dir: TempDir,
    id: String,
    options: Options,
    child: Option<Child>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            use std::io::Write as _;
            let _ = writeln!(std::io::stderr(), "==== {}\n{}", self.id, self.log());
        }
    }
}

/// Polls until there is something.
pub(crate) async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

impl Node {
    /// Starts a node `<swarm>/<index>`; `swarm` is its section of the configuration.
    pub(crate) async fn start(lab: &Lab, id: &str, options: Options, swarm: Value) -> Self {
        Self::start_with(lab, id, options, swarm, &lab.identity(id)).await
    }

    /// The same with an identity of its own.
    pub(crate) async fn start_with(_lab: &Lab, id: &str, options: Options, swarm: Value, identity: &Files) -> Self {
        let mut node = Self { dir: tempfile::tempdir().unwrap(), id: id.to_owned(), options, child: None };
        if options.identity {
            identity.store(&node.identity_path());
        }
        node.restart(swarm).await;
        node
    }

    /// Starts the process again with the same directory.
    pub(crate) async fn restart(&mut self, mut swarm: Value) {
        let Options { plaintext, identity, named, free_port } = self.options;
        let defaults = json!({ "gossip_interval": "200ms", "node_timeout": "1s", "dead_node_timeout": "6s" });
        for (key, value) in defaults.as_object().unwrap() {
            if swarm["discovery"][key].is_null() {
                swarm["discovery"][key] = value.clone();
            }
        }
        if free_port {
            swarm["bind_port"] = json!(0);
        }
        let config = json!({ "swarm": swarm, "security": { "gossip_plaintext": plaintext } });
        let file = self.dir.path().join("config.json");
        fs::write(&file, config.to_string()).unwrap();
        let log = File::options().create(true).append(true).open(self.dir.path().join("log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_drover-gossip-membership"));
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("DROVER_")) {
            command.env_remove(name);
        }
        command.arg("--config").arg(&file).env("DROVER_STATE_DIR", self.state_path());
        if swarm["listen"].is_null() {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        if identity {
            command.env("DROVER_IDENTITY", self.identity_path());
        }
        if named {
            let (swarm, index) = self.id.split_once('/').unwrap();
            command.env("DROVER_SWARM_ID", swarm).env("DROVER_NODE_ID", index);
        }
        self.child = Some(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap());
        let pid = self.pid();
        until("the daemon to listen", async || self.entry().filter(|entry| entry.pid == pid)).await;
    }

    fn state_path(&self) -> std::path::PathBuf {
        self.dir.path().join("state")
    }

    fn identity_path(&self) -> std::path::PathBuf {
        self.dir.path().join("identity")
    }

    /// Replaces the identity while the process runs.
    pub(crate) fn lay(&self, identity: &Files) {
        identity.store(&self.identity_path());
    }

    /// Replaces one file of it.
    pub(crate) fn add_file(&self, name: &str, bytes: &[u8]) {
        let (path, fresh) = (self.identity_path().join(name), self.identity_path().join("fresh"));
        fs::write(&fresh, bytes).unwrap();
        fs::rename(fresh, path).unwrap();
    }

    /// The certificate that it shows to whoever connects.
    pub(crate) async fn shown(&self, lab: &Lab) -> Option<Vec<u8>> {
        let guest = lab.authority.issue("guest", Duration::from_hours(1)).unwrap();
        let stream = drover_service::connect_node_stream(&guest, self.listen(), &self.id).await.ok()?;
        stream.get_ref().1.peer_certificates()?.first().map(|cert| cert.to_vec())
    }

    /// The ring: ids, and which is in use.
    pub(crate) async fn keys(&self) -> Vec<(u32, bool)> {
        let keys = self.client().list_keys(ListKeysRequest {}).await.unwrap().into_inner().keys;
        keys.iter().map(|key| (key.key_id, key.in_use)).collect()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    fn instance(&self) -> String {
        if self.options.named {
            format!("gossip-membership-{}", self.id.replace('/', "+"))
        } else {
            "gossip-membership".to_owned()
        }
    }

    fn entry(&self) -> Option<address_book::Entry> {
        let state = StateDir::open(Path::new(&self.state_path())).ok()?;
        address_book::read(&state, &self.instance())
    }

    pub(crate) fn listen(&self) -> SocketAddr {
        self.entry().unwrap().listen.parse().unwrap()
    }

    pub(crate) fn client(&self) -> MembershipServiceClient<Channel> {
        MembershipServiceClient::new(connect(Target::Address(self.listen().to_string())))
    }

    pub(crate) async fn status(&self) -> GetStatusResponse {
        self.client().get_status(GetStatusRequest {}).await.unwrap().into_inner()
    }

    /// Address of the gossip, once it is bound.
    pub(crate) async fn gossip(&self) -> String {
        until("the gossip to be bound", async || Some(self.status().await.gossip_addr).filter(|addr| !addr.is_empty()))
            .await
    }

    pub(crate) async fn members(&self) -> Vec<Member> {
        self.client().list_members(ListMembersRequest::default()).await.unwrap().into_inner().members
    }

    pub(crate) async fn member(&self, id: &str) -> Option<Member> {
        self.members().await.into_iter().find(|member| member.node_id == id)
    }

    /// Waits until this node sees exactly these members.
    pub(crate) async fn sees(&self, wanted: &[(String, MemberState)]) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let members = self.members().await;
            let seen: Vec<_> = members.iter().map(|member| (member.node_id.clone(), member.state())).collect();
            if seen == wanted {
                return;
            }
            assert!(Instant::now() < deadline, "{} sees {seen:?}, not {wanted:?}", self.id);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) async fn http(&self, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(self.listen()).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM; gives the exit code.
    pub(crate) async fn stop(&mut self) -> Option<i32> {
        let mut child = self.child.take()?;
        let pid = rustix::process::Pid::from_raw(child.id().cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = until("the daemon to stop", async || child.try_wait().unwrap()).await;
        status.code()
    }
}
