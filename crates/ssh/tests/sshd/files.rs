use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use drover_ssh::{Local, Remote, RemotePath, Source, SshError, Upload};

use crate::support::{Sshd, executable, until};

fn upload(content: impl Into<Bytes>, to: &Path) -> Upload {
    Upload::new(Source::Bytes(content.into()), RemotePath::new(to.display().to_string()).unwrap()).mode(0o750)
}

fn files(dir: &Path) -> Vec<String> {
    fs::read_dir(dir)
        .map(|entries| entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect())
        .unwrap_or_default()
}

async fn places(remote: &dyn Remote, dir: &Path) {
    let to = dir.join("new dir/it's $(a) program");
    let content: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 253) as u8).collect();
    let first = remote.upload(upload(content.clone(), &to)).await.unwrap();
    assert!(first.sent && first.sha256.len() == 64);
    assert_eq!(fs::read(&to).unwrap(), content);
    assert_eq!(fs::metadata(&to).unwrap().permissions().mode() & 0o7777, 0o750);

    let source = dir.join("source");
    fs::write(&source, &content).unwrap();
    let again = Upload::new(Source::File(source), RemotePath::new(to.display().to_string()).unwrap()).mode(0o700);
    let again = remote.upload(again).await.unwrap();
    assert_eq!((again.sent, &again.sha256), (false, &first.sha256), "the same content is not sent twice");
    assert_eq!(fs::metadata(&to).unwrap().permissions().mode() & 0o7777, 0o700);

    assert!(remote.upload(upload("other", &to)).await.unwrap().sent);
    assert_eq!(fs::read(&to).unwrap(), b"other");
    assert!(remote.upload(upload("", &to)).await.unwrap().sent);
    assert_eq!(files(to.parent().unwrap()).len(), 1);

    let error = remote.upload(upload("x", to.parent().unwrap())).await.unwrap_err();
    assert!(matches!(&error, SshError::Upload { why, .. } if why.contains("directory of that name")), "{error}");
}

#[tokio::test]
async fn files_are_placed_whole_by_every_adapter() {
    let Some(sshd) = Sshd::start() else { return };
    places(&sshd.russh(), &sshd.path("home/a")).await;
    places(&sshd.system(), &sshd.path("home/b")).await;
}

#[tokio::test]
async fn files_are_placed_whole_on_this_host() {
    let dir = tempfile::tempdir().unwrap();
    places(&Local::new(), dir.path()).await;
}

#[tokio::test]
async fn an_upload_that_is_interrupted_leaves_nothing() {
    let Some(sshd) = Sshd::start() else { return };
    let dir = sshd.path("home/files");
    let remote = sshd.russh();
    let sending = remote.upload(upload(vec![1; 512 << 20], &dir.join("big")).deadline(Duration::from_mins(1)));
    let interrupt = async {
        until("the part", || files(&dir).iter().any(|name| name.starts_with("big."))).await;
        // The connections' own processes: what they run sees the end of its input.
        let server = sshd
            .sessions()
            .into_iter()
            .filter(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "sshd"));
        crate::support::signal(&server.collect::<Vec<_>>(), rustix::process::Signal::KILL);
    };
    let (result, ()) = tokio::join!(sending, interrupt);
    assert!(matches!(result, Err(SshError::UnknownOutcome { .. })), "{result:?}");
    until("the part to be taken away", || files(&dir).is_empty()).await;
}

#[tokio::test]
async fn content_that_arrives_changed_is_refused() {
    let Some(sshd) = Sshd::with("SetEnv PATH=DIR/bin:/usr/bin:/bin", "mkdir -p bin") else { return };
    executable(&sshd.path("bin/sha256sum"), "#!/bin/sh\ncat >/dev/null\necho 0000  -\n");
    let dir = sshd.path("home/files");
    let error = sshd.russh().upload(upload("content", &dir.join("file"))).await.unwrap_err();
    assert!(matches!(&error, SshError::Upload { why, .. } if why.contains("its checksum there is 0000")), "{error}");
    assert!(files(&dir).is_empty());
}

#[tokio::test]
async fn a_full_disk_is_told_plainly() {
    let Some(sshd) = Sshd::with("", "mkdir -p small && mount -t tmpfs -o size=64k tmpfs small") else { return };
    let remote = sshd.russh();
    let path = sshd.path("small/file");
    let error = remote.upload(upload(vec![1; 1 << 20], &path)).await.unwrap_err();
    assert!(
        matches!(&error, SshError::Upload { why, .. } if why.contains("No space left") && why.contains("free space there")),
        "{error}"
    );
    let left = remote.run(drover_ssh::Command::new("ls").arg("-A").arg(sshd.path("small"))).await.unwrap();
    assert_eq!(left.stdout, "");
    assert!(remote.upload(upload("fits", &path)).await.unwrap().sent);
}
