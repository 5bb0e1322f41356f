use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use drover_ssh::{Command, Exit, Local, Outcome, Remote, Russh, SshError, System};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::support::{SHELLS, Sshd, executable, sh, until};

fn hostile() -> Vec<OsString> {
    let mut values: Vec<OsString> = [
        "it's",
        "\"quoted\"",
        "a\nb",
        "\n",
        "ends\n\n",
        "$(touch /tmp/drover-was-here)",
        "`id`",
        "$HOME",
        "${HOME}",
        "-rf",
        "--",
        "!!",
        "!x",
        "a\\b",
        "\\",
        "\\'",
        "'\\''",
        "*",
        "~",
        "~root",
        "#c",
        "a;b|c&d<e>f",
        "(x)",
        "{a,b}",
        "[a]",
        "%s",
        "=x",
        "A=b",
        "\r",
        "\t ",
        "",
        " ",
        "é✓",
    ]
    .map(OsString::from)
    .into();
    values.push(OsString::from_vec(vec![0xff, 0xe2, b'\'', 0x80, 0x01, 0x7f]));
    values.push("x".repeat(100_000).into());
    values
}

async fn arguments_arrive(remote: &dyn Remote, which: &str) {
    let values = hostile();
    let mut expected = Vec::new();
    for value in &values {
        expected.extend_from_slice(value.as_bytes());
        expected.push(0);
    }
    let output = remote.run(Command::new("/usr/bin/printf").arg("%s\\0").args(values.clone())).await.unwrap();
    assert!(
        output.stdout == expected,
        "{which}: {:?}",
        String::from_utf8_lossy(&output.stdout[..output.stdout.len().min(600)])
    );
    assert!(output.success() && output.stderr.is_empty(), "{which}: {}", output.complaint());

    let mut command = Command::new("printenv").arg("-0");
    for (number, value) in values.into_iter().enumerate() {
        command = command.arg(format!("DROVER_{number}")).env(format!("DROVER_{number}"), value);
    }
    let output = remote.run(command).await.unwrap();
    assert!(
        output.stdout == expected,
        "{which}: {:?}",
        String::from_utf8_lossy(&output.stdout[..output.stdout.len().min(600)])
    );
    let nul = remote.run(Command::new("echo").arg("a\0b")).await.unwrap_err();
    assert!(matches!(nul, SshError::Invalid { .. }));
    assert!(!Path::new("/tmp/drover-was-here").exists());
}

#[tokio::test]
async fn arguments_arrive_as_they_are_whatever_the_login_shell() {
    let Some(sshd) = Sshd::start() else { return };
    let mut tried = Vec::new();
    for shell in SHELLS.iter().filter(|shell| Path::new("/bin").join(shell).exists()) {
        let remote = Russh::new(sshd.settings(&format!("drover-{shell}"))).unwrap();
        arguments_arrive(&remote, shell).await;
        tried.push(*shell);
    }
    assert!(tried.contains(&"sh") && tried.len() >= 3, "{tried:?}");
    let csh = if tried.contains(&"tcsh") { "drover-tcsh" } else { "drover-sh" };
    arguments_arrive(&System::new(sshd.settings(csh)).unwrap(), "the system's ssh").await;
}

#[tokio::test]
async fn arguments_arrive_as_they_are_on_this_host() {
    arguments_arrive(&Local::new(), "local").await;
}

#[tokio::test]
async fn rc_files_that_talk_do_no_harm() {
    let Some(sshd) = Sshd::start() else { return };
    std::fs::write(sshd.path("home/.bashrc"), "echo Welcome to the cluster\nprintf 'no newline'\necho careful >&2\n")
        .unwrap();
    let remote = Russh::new(sshd.settings("drover-bash")).unwrap();
    let output = remote.run(Command::new("echo").arg("answer")).await.unwrap();
    assert_eq!(output.stdout, "answer\n");
    let output =
        System::new(sshd.settings("drover-bash")).unwrap().run(Command::new("echo").arg("answer")).await.unwrap();
    assert_eq!(output.stdout, "answer\n");

    let nobody = Russh::new(sshd.settings("drover-nobody")).unwrap();
    let error = nobody.run(Command::new("true")).await.unwrap_err();
    assert!(matches!(&error, SshError::Shell { said, .. } if said.contains("not available")), "{error}");
}

/// What holds for every adapter. The system's `ssh` does not tell of signals.
async fn behaves(remote: &dyn Remote, killed: bool) {
    let big: Vec<u8> = (0..1_u32 << 20).map(|i| (i * 31 % 251) as u8).collect();
    let output = remote.run(Command::new("cat").stdin(big.clone())).await.unwrap();
    assert!(output.stdout == big, "{} bytes came back", output.stdout.len());
    let output = remote.run(Command::new("true").stdin(big)).await.unwrap();
    assert!(output.success(), "a program need not read its input");

    for (script, exit) in [("exit 7", Exit::Code(7)), ("kill -KILL $$", Exit::Signal("KILL".to_owned()))]
        .into_iter()
        .take(1 + usize::from(killed))
    {
        let output = remote.run(sh(&format!("echo out; echo err >&2; {script}"))).await.unwrap();
        assert_eq!((output.exit, &*output.stdout, &*output.stderr), (exit, &b"out\n"[..], &b"err\n"[..]));
    }
    let output = remote.run(Command::new("drover-no-such-program")).await.unwrap();
    assert_eq!(output.exit, Exit::Code(127));

    let before = Instant::now();
    let late = remote.run(Command::new("sleep").arg("60.25").deadline(Duration::from_secs(4))).await.unwrap_err();
    assert!(matches!(late, SshError::Deadline { .. }), "{late}");
    assert_eq!(late.outcome(), Outcome::Unknown);
    assert!(before.elapsed() < Duration::from_secs(15));

    let much = remote.run(Command::new("yes").max_output(10_000)).await.unwrap_err();
    assert!(matches!(much, SshError::TooMuchOutput { limit: 10_000, .. }), "{much}");

    let mut pipe = remote.open(sh("echo hello >&2; cat; exit 3")).await.unwrap();
    let watch = pipe.watch();
    pipe.write_all(b"ping").await.unwrap();
    let mut four = [0; 4];
    pipe.read_exact(&mut four).await.unwrap();
    assert_eq!(&four, b"ping");
    pipe.shutdown().await.unwrap();
    assert_eq!(pipe.read(&mut four).await.unwrap(), 0);
    let ended = watch.ended().await;
    assert_eq!((ended.exit, ended.failure, ended.stderr.as_str()), (Some(Exit::Code(3)), None, "hello"));

    let pipe = remote.open(Command::new("sleep").arg("60.25")).await.unwrap();
    let watch = pipe.watch();
    drop(pipe);
    watch.ended().await;
}

#[tokio::test]
async fn commands_over_our_own_client() {
    let Some(sshd) = Sshd::start() else { return };
    behaves(&sshd.russh(), true).await;
    assert_eq!(sshd.logins(), 1);
}

#[tokio::test]
async fn what_is_given_up_is_told_to_end() {
    let Some(sshd) = Sshd::start() else { return };
    // For root a server passes no signals on.
    let remote = Russh::new(sshd.settings("drover-user")).unwrap();
    let late = remote.run(Command::new("sleep").arg("60.75").deadline(Duration::from_secs(2))).await.unwrap_err();
    assert!(matches!(late, SshError::Deadline { .. }), "{late}");
    until("it to end", || !processes_with("60.75", &sshd)).await;
}

#[tokio::test]
async fn commands_over_the_systems_ssh() {
    let Some(sshd) = Sshd::start() else { return };
    behaves(&sshd.system(), false).await;
}

#[tokio::test]
async fn commands_on_this_host() {
    behaves(&Local::new(), true).await;
}

fn processes_with(word: &str, sshd: &Sshd) -> bool {
    sshd.sessions().iter().any(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|arg| arg == word.as_bytes())
    })
}

/// Many commands at once over one connection, whatever the server allows.
async fn forty_at_once(config: &str) {
    let Some(sshd) = Sshd::with(config, "") else { return };
    let remote = Arc::new(sshd.russh());
    let running = (0..40).map(|number| {
        let remote = Arc::clone(&remote);
        async move { remote.run(sh(&format!("sleep 0.1; echo {number}")).deadline(Duration::from_mins(1))).await }
    });
    for (number, output) in futures::future::join_all(running).await.into_iter().enumerate() {
        assert_eq!(output.unwrap().stdout, format!("{number}\n"));
    }
    assert_eq!(sshd.logins(), 1, "all of it over one connection");
}

#[tokio::test]
async fn forty_commands_at_once_over_one_connection() {
    forty_at_once("MaxSessions 10").await;
}

#[tokio::test]
async fn a_server_that_allows_less_than_we_think_makes_us_wait() {
    forty_at_once("MaxSessions 3").await;
}

#[tokio::test]
async fn a_command_that_finds_no_free_session_in_time_was_never_started() {
    let Some(sshd) = Sshd::start() else { return };
    let mut settings = sshd.settings("drover-sh");
    settings.max_sessions = 1;
    let remote = Russh::new(settings).unwrap();
    let _held = remote.open(Command::new("cat")).await.unwrap();
    let error = remote
        .run(Command::new("touch").arg(sshd.path("never")).deadline(Duration::from_millis(300)))
        .await
        .unwrap_err();
    assert_eq!(error.outcome(), Outcome::NotStarted);
    assert!(error.to_string().contains("all 1 sessions are in use"), "{error}");
    assert!(!sshd.path("never").exists());
}

#[tokio::test]
async fn a_program_that_ssh_itself_would_exit_like_is_of_unknown_outcome() {
    let Some(sshd) = Sshd::start() else { return };
    let error = sshd.system().run(sh("exit 255")).await.unwrap_err();
    assert!(matches!(error, SshError::UnknownOutcome { .. }), "{error}");
    assert_eq!(sshd.russh().run(sh("exit 255")).await.unwrap().exit, Exit::Code(255));
    executable(&sshd.path("home/x"), "#!/bin/sh\necho ran\n");
    assert_eq!(sshd.russh().run(Command::new(sshd.path("home/x"))).await.unwrap().stdout, "ran\n");
}
