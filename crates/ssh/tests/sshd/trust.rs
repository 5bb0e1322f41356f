use std::fs;
use std::process::{Command as Process, Stdio};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use drover_ssh::{Command, Prompt, Remote, Russh, Settings, SshError};

use crate::support::{Sshd, keygen, set, text};

async fn refusal(settings: Settings) -> (String, String) {
    let remote = Russh::new(settings).unwrap();
    match remote.run(Command::new("true")).await.unwrap_err() {
        SshError::Refused { why, hint, .. } => (why, hint),
        other => panic!("{other}"),
    }
}

async fn accepted(settings: Settings) {
    let remote = Russh::new(settings).unwrap();
    assert_eq!(text(&remote, Command::new("echo").arg("hi")).await.unwrap(), "hi");
}

fn fingerprint(sshd: &Sshd) -> String {
    let output = Process::new("ssh-keygen").arg("-lf").arg(sshd.path("host.pub")).output().unwrap();
    String::from_utf8(output.stdout).unwrap().split(' ').nth(1).unwrap().to_owned()
}

#[tokio::test]
async fn the_key_of_a_host_is_never_accepted_silently() {
    let Some(sshd) = Sshd::start() else { return };
    let known = sshd.path("known_hosts");
    let right = fs::read_to_string(&known).unwrap();
    keygen(&sshd.path("other"), &["-t", "ed25519", "-N", ""]);
    let other = fs::read_to_string(sshd.path("other.pub")).unwrap();
    let name = format!("[127.0.0.1]:{}", sshd.port);
    let settings = || {
        let mut settings = sshd.settings("drover-sh");
        // Not even when the configuration asks for it.
        set(&mut settings, "StrictHostKeyChecking", "no");
        settings
    };

    fs::write(&known, "").unwrap();
    let (why, hint) = refusal(settings()).await;
    assert!(why.contains("is not known") && why.contains(&fingerprint(&sshd)), "{why}");
    assert!(hint.contains("ssh -F '/dev/null' -o 'HostName=127.0.0.1'") && hint.contains("cluster exit"), "{hint}");
    assert_eq!(fs::read_to_string(&known).unwrap(), "", "nothing was remembered");

    fs::write(&known, format!("# a comment\n{name} {other}")).unwrap();
    let (why, hint) = refusal(settings()).await;
    assert!(why.contains("shows another ssh-ed25519 key") && why.contains("known_hosts:2"), "{why}");
    assert!(hint.contains("ssh-keygen -R"), "{hint}");

    fs::write(&known, format!("{right}@revoked * {}", right.split_once(' ').unwrap().1)).unwrap();
    assert!(refusal(settings()).await.0.contains("was revoked"));

    fs::write(&known, format!("{right}@revoked * {other}")).unwrap();
    accepted(settings()).await;

    // Hashed by the tool that people use.
    let status = Process::new("ssh-keygen")
        .args(["-H", "-f"])
        .arg(&known)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success() && fs::read_to_string(&known).unwrap().contains("|1|"));
    accepted(settings()).await;

    fs::write(&known, format!("pool {}", right.split_once(' ').unwrap().1)).unwrap();
    let mut alias = settings();
    set(&mut alias, "HostKeyAlias", "pool");
    accepted(alias).await;

    fs::remove_file(&known).unwrap();
    fs::create_dir(&known).unwrap();
    assert!(
        refusal(settings()).await.0.contains("cannot be read"),
        "a file that may hold a revocation must be readable"
    );
}

#[derive(Debug, Default)]
struct Person {
    says: bool,
    asked: Mutex<Vec<String>>,
}

#[async_trait]
impl Prompt for Person {
    fn interactive(&self) -> bool {
        true
    }

    async fn secret(&self, _: &str) -> Option<String> {
        None
    }

    async fn confirm(&self, question: &str) -> bool {
        self.asked.lock().unwrap().push(question.to_owned());
        self.says
    }
}

#[tokio::test]
async fn a_person_may_accept_an_unknown_host_but_not_a_changed_one() {
    let Some(sshd) = Sshd::start() else { return };
    let known = sshd.path("home/.ssh/known_hosts");
    let asked_by = |says| {
        let person = Arc::new(Person { says, ..Person::default() });
        let mut settings = sshd.settings("drover-sh");
        set(&mut settings, "UserKnownHostsFile", "~/.ssh/known_hosts");
        settings.prompt = Arc::clone(&person) as Arc<dyn Prompt>;
        (person, settings)
    };
    let (person, settings) = asked_by(false);
    assert!(refusal(settings).await.0.contains("is not known"));
    assert!(person.asked.lock().unwrap()[0].contains(&fingerprint(&sshd)));
    assert!(!known.exists());

    let (_, settings) = asked_by(true);
    accepted(settings).await;
    let (person, settings) = asked_by(false);
    accepted(settings).await;
    assert!(person.asked.lock().unwrap().is_empty(), "it is known now");

    keygen(&sshd.path("other"), &["-t", "ed25519", "-N", ""]);
    let other = fs::read_to_string(sshd.path("other.pub")).unwrap();
    fs::write(&known, format!("[127.0.0.1]:{} {other}", sshd.port)).unwrap();
    let (person, settings) = asked_by(true);
    assert!(refusal(settings).await.0.contains("shows another"));
    assert!(person.asked.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_host_with_a_certificate_of_a_known_authority_is_known() {
    let Some(sshd) = Sshd::with(
        "HostCertificate DIR/host-cert.pub",
        "ssh-keygen -q -t ed25519 -N '' -f ca && ssh-keygen -q -s ca -I host -h -n 127.0.0.1,login host.pub",
    ) else {
        return;
    };
    let authority = fs::read_to_string(sshd.path("ca.pub")).unwrap();
    let known = sshd.path("known_hosts");
    fs::write(&known, format!("@cert-authority [127.0.0.1]:* {authority}")).unwrap();
    accepted(sshd.settings("drover-sh")).await;

    let mut elsewhere = sshd.settings("drover-sh");
    set(&mut elsewhere, "HostKeyAlias", "elsewhere");
    fs::write(&known, format!("@cert-authority * {authority}")).unwrap();
    assert!(refusal(elsewhere).await.0.contains("for another host"));

    fs::write(&known, format!("@cert-authority * {authority}@revoked * {authority}")).unwrap();
    assert!(refusal(sshd.settings("drover-sh")).await.0.contains("is not known"));
}
