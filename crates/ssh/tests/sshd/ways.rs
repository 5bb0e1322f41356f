use drover_ssh::{Command, Remote, Russh, Settings, SshError};

use crate::support::{Sshd, text};

/// Settings over a configuration file that names both servers.
fn configured(goal: &Sshd, jump: &Sshd, way: &str) -> Settings {
    let known = [goal, jump].map(|sshd| std::fs::read_to_string(sshd.path("known_hosts")).unwrap()).concat();
    std::fs::write(goal.path("both"), known).unwrap();
    let block = |name: &str, sshd: &Sshd, more: &str| {
        format!(
            "Host {name}\n HostName 127.0.0.1\n Port {}\n User drover-sh\n IdentityFile {}\n {more}\n",
            sshd.port,
            sshd.text("user")
        )
    };
    let config = [
        block("goal", goal, way),
        block("jump", jump, ""),
        format!("Host *\nUserKnownHostsFile {}\nGlobalKnownHostsFile none\nIdentitiesOnly yes\n", goal.text("both")),
    ]
    .concat();
    let file = goal.path("config");
    std::fs::write(&file, config.replace("CONFIG", &file.display().to_string())).unwrap();
    Settings { host: "goal".to_owned(), options: Vec::new(), config_file: Some(file), ..goal.settings("drover-sh") }
}

async fn works(way: &str) {
    let (Some(goal), Some(jump)) = (Sshd::start(), Sshd::start()) else { return };
    let remote = Russh::new(configured(&goal, &jump, way)).unwrap();
    assert_eq!(text(&remote, Command::new("echo").arg("there")).await.unwrap(), "there");
    assert_eq!((goal.logins(), jump.logins()), (1, 1), "{way}");
    drop(remote);
    crate::support::until("both connections to end", || goal.sessions().is_empty() && jump.sessions().is_empty()).await;
}

#[tokio::test]
async fn through_a_jump_host() {
    works("ProxyJump jump").await;
}

#[tokio::test]
async fn through_a_command() {
    works("ProxyCommand ssh -F CONFIG -W %h:%p jump").await;
}

#[tokio::test]
async fn the_jump_host_is_judged_as_well() {
    let (Some(goal), Some(jump)) = (Sshd::start(), Sshd::start()) else { return };
    let settings = configured(&goal, &jump, "ProxyJump jump");
    std::fs::copy(goal.path("known_hosts"), goal.path("both")).unwrap();
    let error = Russh::new(settings).unwrap().run(Command::new("true")).await.unwrap_err();
    assert!(
        matches!(&error, SshError::Refused { why, .. } if why.contains("on the way, at jump: the host")),
        "{error}"
    );
    assert_eq!(goal.logins(), 0);

    let circle = configured(&goal, &jump, "ProxyJump goal");
    let error = Russh::new(circle).unwrap().run(Command::new("true")).await.unwrap_err();
    assert!(error.to_string().contains("through itself"), "{error}");
}
