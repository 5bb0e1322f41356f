use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command as Process, Stdio};
use std::sync::Arc;
use std::time::Duration;

use drover_ssh::{Askpass, Command, Remote, Russh, Settings, SshError, State};
use rustix::process::Signal;

use crate::support::{Sshd, executable, keygen, set, signal, text, wait};

async fn in_with(settings: Settings) -> Result<String, SshError> {
    let remote = Russh::new(settings).unwrap();
    text(&remote, Command::new("echo").arg("in")).await
}

/// A real agent, ended by its number.
struct Agent(std::process::Child, std::path::PathBuf);

impl Agent {
    fn start(sshd: &Sshd) -> Self {
        let socket = sshd.path("agent");
        let child = Process::new("ssh-agent").args(["-D", "-a"]).arg(&socket).stdout(Stdio::null()).spawn().unwrap();
        wait("the agent", || socket.exists());
        Self(child, socket)
    }

    fn add(&self, key: &std::path::Path) {
        let status = Process::new("ssh-add")
            .arg("-q")
            .arg(key)
            .env("SSH_AUTH_SOCK", &self.1)
            .stdin(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success());
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        signal(&[self.0.id()], Signal::KILL);
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn keys_of_the_agent() {
    let Some(sshd) = Sshd::start() else { return };
    let agent = Agent::start(&sshd);
    agent.add(&sshd.path("user"));
    // Only the agent has the private half.
    fs::rename(sshd.path("user"), sshd.path("away")).unwrap();
    let mut settings = sshd.settings("drover-sh");
    settings.agent = Some(agent.1.clone());
    assert_eq!(in_with(settings.clone()).await.unwrap(), "in");

    // Keys that are not named are offered unless that is forbidden.
    set(&mut settings, "IdentityFile", "/nonexistent");
    let refused = in_with(settings.clone()).await.unwrap_err().to_string();
    assert!(refused.contains("there was no key to offer"), "{refused}");
    set(&mut settings, "IdentitiesOnly", "no");
    assert_eq!(in_with(settings.clone()).await.unwrap(), "in");

    settings.agent = Some(sshd.path("no-agent"));
    let refused = in_with(settings).await.unwrap_err().to_string();
    assert!(refused.contains("no-agent does not help"), "{refused}");
}

#[tokio::test]
async fn keys_with_a_passphrase() {
    let Some(sshd) = Sshd::start() else { return };
    keygen(&sshd.path("locked"), &["-t", "ed25519", "-N", "open sesame"]);
    fs::copy(sshd.path("locked.pub"), sshd.path("authorized_keys")).unwrap();
    let mut settings = sshd.settings("drover-sh");
    set(&mut settings, "IdentityFile", &sshd.text("locked"));
    let refused = in_with(settings.clone()).await.unwrap_err().to_string();
    assert!(refused.contains("it has a passphrase, and nobody gave it"), "{refused}");

    let asked = sshd.text("asked");
    let askpass = sshd.path("askpass");
    executable(&askpass, &format!("#!/bin/sh\necho \"$1\" >> {asked}\necho 'open sesame'\n"));
    settings.prompt = Arc::new(Askpass(askpass.clone()));
    let remote = Russh::new(settings.clone()).unwrap();
    assert_eq!(text(&remote, Command::new("echo").arg("in")).await.unwrap(), "in");
    assert!(fs::read_to_string(&asked).unwrap().contains("passphrase for key"));
    // The connection is lost: nobody is asked again.
    signal(&sshd.sessions(), Signal::KILL);
    let lost = tokio::time::timeout(Duration::from_secs(10), async {
        remote.state().wait_for(|state| !matches!(state, State::Up { .. })).await.is_ok()
    });
    assert!(lost.await.unwrap());
    assert_eq!(text(&remote, Command::new("echo").arg("in")).await.unwrap(), "in");
    assert_eq!(fs::read_to_string(&asked).unwrap().lines().count(), 1);

    executable(&askpass, "#!/bin/sh\necho wrong\n");
    let refused = in_with(settings).await.unwrap_err().to_string();
    assert!(refused.contains("the passphrase is wrong"), "{refused}");
}

#[tokio::test]
async fn certificates_and_other_kinds_of_keys() {
    let Some(sshd) = Sshd::with("TrustedUserCAKeys DIR/ca.pub", "ssh-keygen -q -t ed25519 -N '' -f ca") else { return };
    for kind in ["ed25519", "ecdsa", "rsa"] {
        let key = sshd.path(kind);
        keygen(&key, &["-t", kind, "-N", ""]);
        let mut settings = sshd.settings("drover-sh");
        set(&mut settings, "IdentityFile", &sshd.text(kind));
        fs::write(sshd.path("authorized_keys"), "").unwrap();
        let refused = in_with(settings.clone()).await.unwrap_err().to_string();
        assert!(
            refused.contains("one key was offered and not accepted")
                && refused.contains("`ssh cluster exit` must work"),
            "{refused}"
        );

        fs::copy(sshd.path(&format!("{kind}.pub")), sshd.path("authorized_keys")).unwrap();
        assert_eq!(in_with(settings.clone()).await.unwrap(), "in", "{kind}");

        fs::write(sshd.path("authorized_keys"), "").unwrap();
        let status = Process::new("ssh-keygen")
            .args(["-q", "-s"])
            .arg(sshd.path("ca"))
            .args(["-I", "me", "-n", "drover-sh"])
            .arg(sshd.path(&format!("{kind}.pub")))
            .status();
        assert!(status.unwrap().success());
        assert_eq!(in_with(settings.clone()).await.unwrap(), "in", "certificate for {kind}");

        let agent = Agent::start(&sshd);
        agent.add(&key);
        fs::rename(&key, sshd.path("away")).unwrap();
        settings.agent = Some(agent.1.clone());
        assert_eq!(in_with(settings).await.unwrap(), "in", "certificate for {kind}, agent");
        fs::remove_file(sshd.path("agent")).unwrap();
    }
}

#[tokio::test]
async fn a_refusal_is_looked_at_again_when_somebody_asks() {
    let Some(sshd) = Sshd::start() else { return };
    let keys = fs::read_to_string(sshd.path("authorized_keys")).unwrap();
    fs::write(sshd.path("authorized_keys"), "").unwrap();
    let remote = sshd.russh();
    let error = remote.run(Command::new("true")).await.unwrap_err();
    assert!(matches!(error, SshError::Refused { .. }), "{error}");
    assert!(matches!(*remote.state().borrow(), State::Refused { .. }));
    fs::write(sshd.path("authorized_keys"), keys).unwrap();
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert_eq!(text(&remote, Command::new("echo").arg("in")).await.unwrap(), "in");

    fs::set_permissions(sshd.path("user"), fs::Permissions::from_mode(0o644)).unwrap();
    let refused = in_with(sshd.settings("drover-sh")).await.unwrap_err().to_string();
    assert!(refused.contains("others may read it"), "{refused}");
}

#[tokio::test]
async fn a_site_that_asks_for_more_than_a_key_is_told_apart() {
    let Some(sshd) = Sshd::with("AuthenticationMethods publickey,publickey", "") else { return };
    let refused = in_with(sshd.settings("drover-sh")).await.unwrap_err().to_string();
    assert!(refused.contains("with a key alone") && refused.contains("use the system's ssh"), "{refused}");
}
