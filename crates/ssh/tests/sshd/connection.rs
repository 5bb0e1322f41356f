use std::sync::Arc;
use std::time::{Duration, Instant};

use drover_ssh::{Command, Outcome, Remote, Russh, SshError, State};
use rustix::process::Signal;
use tokio::io::AsyncReadExt as _;

use crate::support::{Sshd, set, sh, signal, text, until};

/// Starts a command that leaves a mark and then runs for long; returns once the mark is there.
async fn started(sshd: &Sshd, remote: &Arc<Russh>) -> tokio::task::JoinHandle<Result<drover_ssh::Output, SshError>> {
    let mark = sshd.text("mark");
    let command = sh(&format!("echo once >> {mark}; exec sleep 30.5")).deadline(Duration::from_mins(1));
    let remote = Arc::clone(remote);
    let task = tokio_util::task::TaskTracker::new().spawn(async move { remote.run(command).await });
    until("the mark", || sshd.path("mark").exists()).await;
    task
}

fn marks(sshd: &Sshd) -> usize {
    std::fs::read_to_string(sshd.path("mark")).unwrap().lines().count()
}

#[tokio::test]
async fn a_server_that_dies_and_comes_back_is_found_again_and_nothing_runs_twice() {
    let Some(mut sshd) = Sshd::start() else { return };
    let remote = Arc::new(sshd.russh());
    let mut state = remote.state();
    let task = started(&sshd, &remote).await;
    assert!(matches!(*state.borrow_and_update(), State::Up { .. }));
    let mut pipe = remote.open(Command::new("cat")).await.unwrap();

    sshd.kill();
    let error = task.await.unwrap().unwrap_err();
    assert!(matches!(error, SshError::UnknownOutcome { .. }), "{error}");
    assert_eq!(error.outcome(), Outcome::Unknown);
    let mut byte = [0];
    assert!(pipe.read(&mut byte).await.is_err(), "a lost connection is no end of the output");
    let waited = tokio::time::timeout(
        Duration::from_secs(20),
        state.wait_for(|state| matches!(state, State::Connecting { attempt: 1.., .. })),
    );
    assert!(waited.await.unwrap().is_ok());

    let error = remote.run(Command::new("true").deadline(Duration::from_millis(500))).await.unwrap_err();
    assert!(matches!(&error, SshError::NotStarted { why, .. } if why.contains("onnect")), "{error}");

    // Asked for while nobody is there, answered when somebody is.
    let waiting = remote.run(Command::new("echo").arg("back"));
    let (output, ()) = tokio::join!(waiting, async {
        tokio::task::yield_now().await;
        sshd.listen();
    });
    assert_eq!(output.unwrap().stdout, "back\n");
    assert_eq!(marks(&sshd), 1);
}

#[tokio::test]
async fn a_frozen_server_is_noticed_within_the_budget() {
    let Some(sshd) = Sshd::start() else { return };
    let mut settings = sshd.settings("drover-sh");
    settings.keepalive = Duration::from_millis(500);
    settings.keepalive_misses = 2;
    let remote = Arc::new(Russh::new(settings).unwrap());
    let task = started(&sshd, &remote).await;
    let frozen = sshd.sessions();
    signal(&frozen, Signal::STOP);
    let since = Instant::now();
    let error = task.await.unwrap().unwrap_err();
    let took = since.elapsed();
    signal(&frozen, Signal::CONT);
    assert!(matches!(error, SshError::UnknownOutcome { .. }), "{error}");
    assert!(took < Duration::from_secs(6), "noticed after {took:?}");
    assert_eq!(text(&*remote, Command::new("echo").arg("again")).await.unwrap(), "again");
    assert_eq!(marks(&sshd), 1);
}

#[tokio::test]
async fn a_server_that_freezes_while_we_send_is_noticed_too() {
    let Some(sshd) = Sshd::start() else { return };
    let mut settings = sshd.settings("drover-sh");
    settings.keepalive = Duration::from_millis(500);
    settings.keepalive_misses = 2;
    let remote = Russh::new(settings).unwrap();
    let mark = sshd.text("mark");
    let flood = sh(&format!("echo once >> {mark}; cat > /dev/null; sleep 30"))
        .stdin(vec![7_u8; 256 << 20])
        .deadline(Duration::from_mins(1));
    let freeze = async {
        until("the mark", || sshd.path("mark").exists()).await;
        signal(&sshd.sessions(), Signal::STOP);
        Instant::now()
    };
    let (result, since) = tokio::join!(remote.run(flood), freeze);
    let took = since.elapsed();
    signal(&sshd.sessions(), Signal::CONT);
    assert!(matches!(result, Err(SshError::UnknownOutcome { .. })), "{result:?}");
    assert!(took < Duration::from_secs(8), "noticed after {took:?}");
}

#[tokio::test]
async fn a_server_with_too_many_logins_under_way_is_asked_again() {
    let Some(sshd) = Sshd::with("MaxStartups 2:100:2", "") else { return };
    // Silent clients that never log in take all the places.
    let mut silent = Vec::new();
    until("both places to be taken", || {
        let mut client = std::net::TcpStream::connect(("127.0.0.1", sshd.port)).unwrap();
        let mut greeting = [0; 4];
        // One that came too early, while the place of another was not free yet, is told so and not kept.
        if std::io::Read::read_exact(&mut client, &mut greeting).is_ok() && &greeting == b"SSH-" {
            silent.push(client);
        }
        silent.len() == 2
    })
    .await;
    let remote = sshd.russh();
    let mut state = remote.state();
    let refused = tokio::time::timeout(
        Duration::from_secs(20),
        state.wait_for(|state| matches!(state, State::Connecting { attempt: 2.., .. })),
    );
    let why = format!("{:?}", refused.await.unwrap().unwrap());
    assert!(why.contains("too many"), "{why}");
    drop(silent);
    assert_eq!(text(&remote, Command::new("echo").arg("in")).await.unwrap(), "in");
    assert!(sshd.log().contains("MaxStartups"));
}

#[tokio::test]
async fn the_systems_ssh_is_tried_again_as_well() {
    let Some(mut sshd) = Sshd::start() else { return };
    let remote = sshd.system();
    sshd.kill();
    let waiting = remote.run(Command::new("echo").arg("back").deadline(Duration::from_secs(20)));
    let (output, ()) = tokio::join!(waiting, async {
        tokio::time::timeout(
            Duration::from_secs(10),
            remote.state().wait_for(|state| matches!(state, State::Connecting { attempt: 1.., .. })),
        )
        .await
        .unwrap()
        .unwrap();
        sshd.listen();
    });
    assert_eq!(output.unwrap().stdout, "back\n");
    assert!(matches!(*remote.state().borrow(), State::Up { .. }));

    let mut settings = sshd.settings("drover-sh");
    set(&mut settings, "IdentityFile", "/dev/null");
    let refused = drover_ssh::System::new(settings).unwrap().run(Command::new("true")).await.unwrap_err();
    assert!(matches!(&refused, SshError::Refused { hint, .. } if hint.contains("ControlMaster")), "{refused}");
}

#[tokio::test]
async fn a_reader_that_does_not_read_is_cut_and_the_others_go_on() {
    let Some(sshd) = Sshd::start() else { return };
    let mut settings = sshd.settings("drover-sh");
    settings.slow_reader = Duration::from_secs(1);
    let remote = Russh::new(settings).unwrap();
    let mut lazy = remote.open(Command::new("yes")).await.unwrap();
    let watch = lazy.watch();
    let ended = tokio::time::timeout(Duration::from_secs(20), watch.ended()).await.unwrap();
    assert!(ended.failure.is_some_and(|why| why.contains("nobody has read")));
    assert_eq!(text(&remote, Command::new("echo").arg("others")).await.unwrap(), "others");
    let read = tokio::io::copy(&mut lazy, &mut tokio::io::sink()).await;
    assert!(read.is_err(), "what is missing is not an end");
}
