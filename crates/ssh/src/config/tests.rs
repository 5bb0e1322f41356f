use std::fs;
use std::time::Duration;

use super::*;

fn settings(home: &Path, host: &str) -> Settings {
    Settings {
        home: home.to_owned(),
        local_user: "me".to_owned(),
        agent: None,
        config_file: Some(home.join(".ssh/config")),
        ..Settings::from_env(host)
    }
}

fn home(files: &[(&str, &str)]) -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = home.path().join(".ssh").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    home
}

/// What a configuration says about a host, as one line.
fn said(config: &str, host: &str) -> String {
    let home = home(&[("config", config)]);
    match resolve(&settings(home.path(), host)) {
        Ok(found) => format!("{}@{}:{}", found.user, found.host_name, found.port),
        Err(error) => error.to_string(),
    }
}

#[test]
fn blocks_and_patterns() {
    const CONFIG: &str = "
        # Values before any block hold for all.
        Port 2200
        Host login login2 !other
            HostName=login.example.org
            User  \"al ice\"
        Host *.example.com !secret.example.com
            User bob
        Host secret?example.com
            User carol
        Match host never
            User nobody
        HostKeyAlgorithms +ssh-rsa
        Match all
            User dave
        Host *
            User late
            Port 9
    ";
    let config = &CONFIG.replace("\"al ice\"", "alice # trailing words");
    for (host, expected) in [
        ("login", "alice@login.example.org:2200"),
        ("LOGIN2", "alice@login.example.org:2200"),
        ("a.example.com", "bob@a.example.com:2200"),
        ("secret.example.com", "carol@secret.example.com:2200"),
        ("login3", "dave@login3:2200"),
    ] {
        assert_eq!(said(config, host), expected);
    }
    assert!(said(CONFIG, "login").contains("al ice"), "a name with a blank goes into no command line");
}

#[test]
fn values() {
    for (config, expected) in [
        ("", "me@h:22"),
        ("HostName %h.example.org", "me@h.example.org:22"),
        ("port=2022\nuser\tx", "x@h:2022"),
        ("Host !h *\nUser x", "me@h:22"),
        ("Host !h\nUser x", "me@h:22"),
        ("Host g\nHost\nUser x", "me@h:22"),
        ("Port 0", "the ssh settings for h cannot be used: `0` is not a port"),
        ("Port 70000", "the ssh settings for h cannot be used: `70000` is not a port"),
    ] {
        assert_eq!(said(config, "h"), expected, "{config}");
    }
    for config in [
        "User \"x",
        "User",
        "User $(id)",
        "User -x",
        "HostName ;x",
        "ProxyJump a,-b",
        "ProxyJump a:b",
        "ServerAliveInterval soon",
    ] {
        assert!(said(config, "h").contains("cannot be used"), "{config}: {}", said(config, "h"));
    }
    assert!(said("", "-oProxyCommand=x").contains("cannot be used"));
}

#[test]
fn included_files_hold_where_they_are_included() {
    let home = home(&[
        ("config", "Include conf.d/*.conf\nHost a\n  Include only-a\nHost b\n  User from-config\nInclude missing"),
        ("conf.d/10.conf", "Host b\n  Port 10\nHost c\n  Port 11"),
        ("conf.d/20.conf", "Port 20"),
        ("conf.d/ignored.txt", "Port 99"),
        ("only-a", "User for-a\nHost b\n  User never\nHost *\n  HostName a.example.org"),
    ]);
    let user_port = |host: &str| {
        let found = resolve(&settings(home.path(), host)).unwrap();
        format!("{}@{}:{}", found.user, found.host_name, found.port)
    };
    assert_eq!(user_port("a"), "for-a@a.example.org:20");
    assert_eq!(user_port("b"), "from-config@b:10");
    assert_eq!(user_port("c"), "me@c:11");

    fs::write(home.path().join(".ssh/only-a"), "Include only-a").unwrap();
    let error = resolve(&settings(home.path(), "a")).unwrap_err().to_string();
    assert!(error.contains("only-a:1: files include each other too deeply"), "{error}");
}

#[test]
fn keys_agents_and_known_hosts() {
    let home = home(&[(
        "config",
        "Host plain\nHost full\n IdentityFile ~/.ssh/%r-%n\n IdentityFile /keys/\"my key\"\n IdentitiesOnly yes\n CertificateFile c-cert.pub
 IdentityAgent ~/agent\n UserKnownHostsFile ~/kh1 \"/tmp/k h\"\n GlobalKnownHostsFile none\n HostKeyAlias pool\n ServerAliveInterval 1m30
 ServerAliveCountMax 4\n ConnectTimeout 3\nHost none\n IdentityAgent none\n IdentityFile none",
    )]);
    let at = |path: &str| home.path().join(path);
    let plain = resolve(&Settings { agent: Some("/a".into()), ..settings(home.path(), "plain") }).unwrap();
    assert_eq!(plain.identities, [at(".ssh/id_ed25519"), at(".ssh/id_ecdsa"), at(".ssh/id_rsa")]);
    assert_eq!(plain.agent, Some("/a".into()));
    assert_eq!(plain.known_hosts[0], at(".ssh/known_hosts"));
    assert_eq!(plain.alive_interval, None);

    let full = resolve(&Settings { agent: Some("/a".into()), ..settings(home.path(), "full") }).unwrap();
    assert_eq!(full.identities, [at(".ssh/me-full"), "/keys/my key".into()]);
    assert!(full.identities_only);
    assert_eq!(full.certificates, [at("c-cert.pub")]);
    assert_eq!(full.agent, Some(at("agent")));
    assert_eq!(full.known_hosts, [at("kh1"), "/tmp/k h".into()]);
    assert_eq!(full.host_key_alias.as_deref(), Some("pool"));
    assert_eq!((full.alive_interval, full.alive_count), (Some(Duration::from_secs(90)), Some(4)));
    assert_eq!(full.connect_timeout, Some(Duration::from_secs(3)));

    let none = resolve(&Settings { agent: Some("/a".into()), ..settings(home.path(), "none") }).unwrap();
    assert_eq!((none.identities, none.agent), (vec![], None));
}

#[test]
fn ways_to_a_host() {
    let proxy = |config: &str| {
        let home = home(&[("config", config)]);
        resolve(&settings(home.path(), "h")).unwrap().proxy
    };
    let hop = |host: &str, user: Option<&str>, port| Hop { host: host.to_owned(), user: user.map(str::to_owned), port };
    assert_eq!(proxy(""), Proxy::None);
    assert_eq!(
        proxy("ProxyJump a, bob@b:2222,ssh://c@[::1]:7,fe80::1"),
        Proxy::Jump(vec![
            hop("a", None, None),
            hop("b", Some("bob"), Some(2222)),
            hop("::1", Some("c"), Some(7)),
            hop("fe80::1", None, None)
        ])
    );
    assert_eq!(
        proxy("Port 7\nUser u\nProxyCommand nc -X 'a b' %h %p # %r %%"),
        Proxy::Command("nc -X 'a b' h 7 # u %".to_owned())
    );
    assert_eq!(proxy("ProxyJump none\nProxyCommand x"), Proxy::None);
    assert_eq!(proxy("ProxyCommand x\nProxyJump a"), Proxy::Command("x".to_owned()));
}

#[test]
fn options_win_over_files_and_a_named_file_must_exist() {
    let home = home(&[("config", "User file\nPort 5")]);
    let mut settings = settings(home.path(), "h");
    settings.options = vec![("User".to_owned(), "flag".to_owned())];
    let found = resolve(&settings).unwrap();
    assert_eq!((found.user.as_str(), found.port), ("flag", 5));
    settings.config_file = Some(home.path().join("nothing"));
    assert!(resolve(&settings).unwrap_err().to_string().contains("cannot be read"));
}
