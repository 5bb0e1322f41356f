//! Who gets in through the one port, and whom a node believes that it has reached.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use super::*;
use crate::pki::{Authority, Identity, IdentityHandle};
use crate::{Context, Server};

const HOUR: Duration = Duration::from_hours(1);

struct Node {
    ctx: Context,
    addr: std::net::SocketAddr,
    handle: IdentityHandle,
}

/// A daemon that serves health to nodes and `/metrics` to people, as `a`.
fn serve(dir: &Path, authority: &Authority) -> Node {
    let ctx = Context::for_test("probe", &dir.join("state"));
    let handle = IdentityHandle::new(authority.issue("a", HOUR).unwrap());
    ctx.use_identity(handle.clone());
    let listener = ctx.bind("probe", None, "127.0.0.1:0".parse().unwrap()).unwrap();
    let addr = Server::new(&ctx).serve(listener).unwrap();
    Node { ctx, addr, handle }
}

async fn ask(identity: Identity, node: &Node, expected: &str) -> Result<(), String> {
    let channel = connect_node(&IdentityHandle::new(identity), node.addr, expected);
    let asked = HealthClient::new(channel).check(HealthCheckRequest::default()).await;
    asked.map(drop).map_err(|status| {
        let mut text = status.to_string();
        let mut cause = std::error::Error::source(&status);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    })
}

async fn metrics(node: &Node) -> String {
    let mut stream = TcpStream::connect(node.addr).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

#[tokio::test]
async fn a_node_of_the_instance_comes_in_and_everybody_else_is_told_why_not() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Authority::open_or_create_at(&dir.path().join("ours")).unwrap();
    let theirs = Authority::open_or_create_at(&dir.path().join("theirs")).unwrap();
    let node = serve(dir.path(), &ours);
    let now = crate::now_us() / 1_000_000;

    ask(ours.issue("b", HOUR).unwrap(), &node, "a").await.unwrap();

    // Whom the client does not believe.
    let wrong = ask(ours.issue("b", HOUR).unwrap(), &node, "c").await.unwrap_err();
    assert!(wrong.contains("for another node"), "{wrong}");
    let foreign = ask(theirs.issue("b", HOUR).unwrap(), &node, "a").await.unwrap_err();
    assert!(foreign.contains("not from this instance"), "{foreign}");

    // Whom the server does not believe. The stranger trusts the server, so that it is the server that refuses. Its client is told
    // who refused what, and what to do.
    let foreign = theirs.issue("b", HOUR).unwrap().trusting(ours.issue("x", HOUR).unwrap().trust()).unwrap();
    let told = ask(foreign, &node, "a").await.unwrap_err();
    assert!(told.contains(&format!("a at {}: it refuses our certificate", node.addr)), "{told}");
    assert!(told.contains(" of b, which is from another instance"), "{told}");
    let told = ask(ours.issue_between("b", now - 7200, now - 3600).unwrap(), &node, "a").await.unwrap_err();
    assert!(told.contains(" of b, which has expired") && told.contains("drover pki rotate"), "{told}");
    let told = ask(ours.issue_between("b", now + 3600, now + 7200).unwrap(), &node, "a").await.unwrap_err();
    assert!(told.contains("not valid yet"), "{told}");
    assert!(without_certificate(&ours, node.addr).await.is_err());
    let text = metrics(&node).await;
    for reason in ["foreign", "expired", "not_yet_valid", "no_certificate"] {
        assert!(text.contains(&format!("drover_refused_nodes_total{{reason=\"{reason}\"}} 1")), "{reason}: {text}");
    }
    node.ctx.shutdown().cancel();
}

/// A handshake by a client that has no certificate; TLS 1.3 tells it of the refusal when it reads.
async fn without_certificate(ours: &Authority, addr: std::net::SocketAddr) -> io::Result<()> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ours.issue("x", HOUR).unwrap().trust().cas()[0].clone()).unwrap();
    let config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let name = rustls::pki_types::ServerName::try_from(crate::pki::node_domain("a")).unwrap();
    let stream = TcpStream::connect(addr).await?;
    let mut stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    stream.read_u8().await.map(drop)
}

#[tokio::test]
async fn the_rest_of_the_daemon_is_not_served_to_nodes_and_nodes_services_not_to_users() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Authority::open_or_create_at(&dir.path().join("ours")).unwrap();
    let node = serve(dir.path(), &ours);
    let mut stream = connect_node_stream(&ours.issue("b", HOUR).unwrap(), node.addr, "a").await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    assert!(!String::from_utf8_lossy(&answer).contains("drover_"), "{}", String::from_utf8_lossy(&answer));
    assert!(
        metrics(&node).await.contains("drover_refused_connections"),
        "people of this user still come in without TLS"
    );
    node.ctx.shutdown().cancel();
}

#[tokio::test]
async fn certificates_are_renewed_and_revoked_while_the_daemon_runs() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Authority::open_or_create_at(&dir.path().join("ours")).unwrap();
    let node = serve(dir.path(), &ours);
    let guest = ours.issue("b", HOUR).unwrap();
    let at = dir.path().join("b");
    guest.store(&at).unwrap();
    ask(guest, &node, "a").await.unwrap();

    let serial = ours.issued().unwrap().into_iter().find(|issued| issued.node_id == "b").unwrap().serial;
    ours.revoke(&[serial]).unwrap();
    node.handle.replace(ours.issue("a", HOUR).unwrap());
    let told = ask(Identity::load(&at).unwrap(), &node, "a").await.unwrap_err();
    let of = &ours.issued().unwrap().into_iter().find(|issued| issued.node_id == "b").unwrap().serial;
    assert!(told.contains(&format!("our certificate {of} of b, which was revoked")), "{told}");
    assert!(told.contains("drover pki issue"), "it says what to do: {told}");
    ask(ours.issue("b", HOUR).unwrap(), &node, "a").await.unwrap();
    assert!(metrics(&node).await.contains("reason=\"revoked\"} 1"));
    node.ctx.shutdown().cancel();
}

#[tokio::test]
async fn an_address_beyond_loopback_needs_an_identity() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Authority::open_or_create_at(&dir.path().join("ours")).unwrap();
    let any = "0.0.0.0:0".parse().unwrap();
    let ctx = Context::for_test("bare", &dir.path().join("bare"));
    let refused = ctx.bind("bare", Some(any), any).err().unwrap().to_string();
    assert!(refused.contains("identity"), "{refused}");
    ctx.use_identity(IdentityHandle::new(ours.issue("a", HOUR).unwrap()));
    ctx.bind("bare", Some(any), any).unwrap();
}

/// Somebody who opens connections and says nothing keeps nobody out for longer than the patience.
#[tokio::test]
async fn silent_connections_do_not_keep_others_out() {
    let dir = tempfile::tempdir().unwrap();
    let ours = Authority::open_or_create_at(&dir.path().join("ours")).unwrap();
    let node = serve(dir.path(), &ours);
    let mut silent = Vec::new();
    for _ in 0..64 {
        silent.push(TcpStream::connect(node.addr).await.unwrap());
    }
    // Garbage that begins like TLS.
    let mut odd = TcpStream::connect(node.addr).await.unwrap();
    odd.write_all(&[0x16, 3, 3, 0, 5, 0xff, 0xff, 0xff, 0xff, 0xff]).await.unwrap();
    let _ = odd.read_to_end(&mut Vec::new()).await;
    ask(ours.issue("b", HOUR).unwrap(), &node, "a").await.unwrap();
    node.ctx.shutdown().cancel();
}
