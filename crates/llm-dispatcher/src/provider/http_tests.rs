//! Connections over loopback, to servers that follow a script.

use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::*;

const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n";

fn plain(listener: &TcpListener) -> Destination {
    let port = listener.local_addr().unwrap().port();
    let client = HttpClient::with(HttpSettings::default(), Proxy::default(), OnceLock::new());
    client.to(Origin { tls: false, host: "127.0.0.1".into(), port })
}

impl Destination {
    fn idle(&self) -> usize {
        lock(&self.idle).len()
    }
}

/// Reads requests without bodies and answers each with the next of these texts, one list per connection.
async fn scripted(listener: TcpListener, connections: Vec<Vec<&'static str>>) -> usize {
    let mut served = 0;
    for answers in connections {
        let (mut stream, _) = listener.accept().await.unwrap();
        for answer in answers {
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(stream.read_u8().await.unwrap());
            }
            served += 1;
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
        // What was written must arrive whole even when the other side writes at this moment.
        stream.shutdown().await.unwrap();
    }
    served
}

#[tokio::test]
async fn a_connection_is_used_again_until_it_closes() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = plain(&listener);
    let ok = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
    let early = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok";
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;a=b\r\no\r\n1\r\nk\r\n0\r\nx: y\r\n\r\n";
    let empty = "HTTP/1.1 204 No Content\r\n\r\n";
    let server = scripted(listener, vec![vec![ok, early, chunked, empty, ok], vec![ok]]);
    let calls = async {
        for number in 0..5 {
            let mut answer = to.send(GET).await.unwrap();
            let said = answer.bytes(10).await.unwrap();
            assert_eq!(said, if answer.status == 204 { "" } else { "ok" });
            // With the last answer the end of the connection may have come, too.
            assert!(to.idle() == 1 || number == 4);
        }
        // The server has closed, or is about to: either way the next request gets through on another connection.
        tokio::time::timeout(Duration::from_secs(30), async {
            while let Some(wire) = to.take_idle() {
                to.keep(wire);
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap();
        let mut answer = to.send(GET).await.unwrap();
        assert_eq!(answer.bytes(10).await.unwrap(), "ok");
    };
    let (served, ()) = tokio::join!(server, calls);
    assert_eq!(served, 6);
}

#[tokio::test]
async fn an_answer_that_ends_its_connection_is_whole_and_the_connection_is_not_used_again() {
    for answer in [
        "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok",
        "HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
        "HTTP/1.1 200 OK\r\n\r\nok",
        "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok and more than that",
        "HTTP/1.1 200 OK\r\ncontent-length: 9\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = plain(&listener);
        let call = async { to.send(GET).await.unwrap().bytes(10).await.unwrap() };
        let (_, said) = tokio::join!(scripted(listener, vec![vec![answer]]), call);
        assert_eq!((said.as_ref(), to.idle()), (&b"ok"[..], 0), "{answer:?}");
    }
}

#[tokio::test]
async fn torn_and_huge_answers_are_errors_and_their_connections_are_not_kept() {
    for (answer, wanted) in [
        ("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort", "broke"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nokk", "broke"),
        ("HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\nok", "broke"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "broke"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab", "broke"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n", "broke"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nx\r\n", "broke"),
        ("HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n", "broke"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n01234567890", "larger"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n6\r\n012345\r\n6\r\n012345\r\n0\r\n\r\n", "larger"),
        ("HTTP/1.1 200 OK\r\n\r\nuntil the connection ends", "larger"),
        ("SSH-2.0-OpenSSH_9.2p1\r\n", "broke"),
        ("", "broke"),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = plain(&listener);
        let call = async {
            let mut head = to.send(GET).await?;
            head.bytes(10).await
        };
        let (_, result) = tokio::join!(scripted(listener, vec![vec![answer]]), call);
        let error = result.unwrap_err().to_string();
        assert!(error.contains(wanted), "{answer:?}: {error}");
        assert_eq!(to.idle(), 0, "{answer:?}");
    }
}

#[tokio::test]
async fn an_answer_in_single_bytes_is_read_as_one_in_one_piece() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = plain(&listener);
    let text = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nA\r\n0123456789\r\n2\r\nab\r\n0\r\n\r\n";
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        for byte in text.bytes() {
            stream.write_all(&[byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        stream
    };
    let call = async { to.send(GET).await.unwrap().bytes(20).await.unwrap() };
    let (_stream, said) = tokio::join!(server, call);
    assert_eq!((said.as_ref(), to.idle()), (&b"0123456789ab"[..], 1));
}

#[tokio::test]
async fn a_refusal_before_the_whole_request_was_taken_is_heard() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = plain(&listener);
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno").await.unwrap();
        stream
    };
    let huge = vec![b'x'; 64 << 20];
    let call = async {
        let mut answer = to.send(&huge).await.unwrap();
        (answer.status.as_u16(), answer.bytes(10).await.unwrap())
    };
    let both = async { tokio::join!(server, call) };
    let (_stream, said) = tokio::time::timeout(Duration::from_secs(30), both).await.unwrap();
    assert_eq!((said.0, said.1.as_ref(), to.idle()), (413, &b"no"[..], 0));
}

#[tokio::test]
async fn dropping_a_call_closes_its_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = plain(&listener);
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut buffer = vec![0; 1024];
        assert!(stream.read(&mut buffer).await.unwrap() > 0);
        stream
    };
    let mut call = Box::pin(to.send(GET));
    let mut stream = tokio::select! {
        stream = server => stream,
        _ = &mut call => panic!("nothing was answered"),
    };
    drop(call);
    let mut rest = Vec::new();
    let end = tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut rest)).await.unwrap();
    assert!(end.is_err() || rest.is_empty());
}

#[tokio::test]
async fn nobody_there_is_an_error_that_says_where() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = plain(&listener);
    drop(listener);
    let error = to.send(GET).await.unwrap_err();
    assert!(matches!(error, HttpError::Connect { .. }), "{error}");
    assert!(error.to_string().contains(&to.origin.port.to_string()), "{error}");
}

#[tokio::test]
async fn tls_is_spoken_with_those_whom_we_trust_and_with_nobody_else() {
    let issued = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(issued.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let server_config = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![issued.cert.der().clone()], key)
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server_config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let origin = Origin { tls: true, host: "localhost".into(), port: listener.local_addr().unwrap().port() };

    let mut roots = rustls::RootCertStore::empty();
    roots.add(issued.cert.der().clone()).unwrap();
    let trusting = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let strangers = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();

    for (config, trusted) in [(trusting, true), (strangers, false)] {
        let to = HttpClient::with_tls(HttpSettings::default(), config).to(origin.clone());
        let server = async {
            let (stream, _) = listener.accept().await.unwrap();
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let service = hyper::service::service_fn(|request: Request<Incoming>| async move {
                request.into_body().collect().await?;
                Ok::<_, hyper::Error>(Response::new(Full::new(Bytes::from_static(b"ok"))))
            });
            let _ = hyper::server::conn::http1::Builder::new()
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service)
                .await;
        };
        let call = async {
            let mut answer = to.send(GET).await?;
            answer.bytes(10).await
        };
        let ((), result) = tokio::join!(server, call);
        assert_eq!(result.is_ok(), trusted, "{result:?}");
    }
}
