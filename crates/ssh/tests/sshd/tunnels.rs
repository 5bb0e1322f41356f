use std::net::SocketAddr;

use drover_ssh::{Local, Pipe, Remote, Russh, SshError, System};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio_util::task::TaskTracker;

use crate::support::{Sshd, executable, text};

/// Sends back what it gets, and ends when its client has.
async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let tasks = TaskTracker::new();
    tasks.clone().spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tasks.spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    address
}

async fn echoes(mut pipe: Pipe) {
    let sent: Vec<u8> = (0..4_u32 << 20).map(|i| (i % 241) as u8).collect();
    let (mut read, mut write) = tokio::io::split(&mut pipe);
    let send = async {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let mut back = vec![0; sent.len()];
    let (read, ()) = tokio::join!(read.read_exact(&mut back), send);
    read.unwrap();
    assert!(back == sent);
}

async fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

#[tokio::test]
async fn tunnels_end_where_they_should() {
    let Some(sshd) = Sshd::start() else { return };
    let to = echo().await;
    let remote = sshd.russh();
    let many = futures::future::join_all((0..20).map(|_| remote.tunnel(to))).await;
    for pipe in many {
        echoes(pipe.unwrap()).await;
    }
    assert_eq!(sshd.logins(), 1);
    let error = remote.tunnel(nobody().await).await.unwrap_err();
    assert!(matches!(error, SshError::Tunnel { .. }), "{error}");

    echoes(sshd.system().tunnel(to).await.unwrap()).await;
    let mut pipe = sshd.system().tunnel(nobody().await).await.unwrap();
    assert!(pipe.read(&mut [0]).await.is_err());
    echoes(Local::new().tunnel(to).await.unwrap()).await;
    assert!(matches!(Local::new().tunnel(nobody().await).await, Err(SshError::Tunnel { .. })));
}

#[tokio::test]
async fn where_forwarding_is_forbidden_a_bridge_stands_in() {
    let Some(sshd) = Sshd::with("AllowTcpForwarding no", "") else { return };
    let to = echo().await;
    let error = sshd.russh().tunnel(to).await.unwrap_err();
    assert!(matches!(&error, SshError::ForwardingRefused { hint, .. } if hint.contains("connect")), "{error}");

    let bridge = sshd.path("home/bridge");
    executable(&bridge, "#!/bin/bash\nexec 3<>\"/dev/tcp/${2%:*}/${2##*:}\" || exit 1\ncat <&3 &\ncat >&3\nwait\n");
    let mut settings = sshd.settings("drover-sh");
    settings.bridge = Some(vec![bridge.into(), "connect".into()]);
    let remote = Russh::new(settings.clone()).unwrap();
    for _ in 0..2 {
        echoes(remote.tunnel(to).await.unwrap()).await;
    }
    assert_eq!(text(&remote, drover_ssh::Command::new("echo").arg("x")).await.unwrap(), "x");
    echoes(System::new(settings).unwrap().tunnel(to).await.unwrap()).await;
}
