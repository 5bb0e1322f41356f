//! A real sshd on loopback, in namespaces of its own: its accounts exist only there, and nothing it started outlives it.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use drover_ssh::{Batch, Command, Output, Remote, Retry, Russh, Settings, SshError, System};
use drover_testkit::{skip, this_test};
use rustix::process::{Pid, Signal, kill_process};

/// Shells that an account may have as its login shell, when they are installed.
pub(crate) const SHELLS: [&str; 7] = ["sh", "dash", "bash", "csh", "tcsh", "fish", "zsh"];

pub(crate) struct Sshd {
    child: Option<Child>,
    pub(crate) port: u16,
    dir: tempfile::TempDir,
    prelude: String,
}

/// Whether the machine can run these tests; where it may, what is missing is installed.
fn ready() -> bool {
    if !rustix::process::getuid().is_root() {
        skip(&this_test(), "only root may start an sshd with accounts of its own");
        return false;
    }
    for (program, package) in [
        ("/usr/sbin/sshd", "openssh-server"),
        ("/usr/bin/ssh-agent", "openssh-client"),
        ("/usr/bin/tcsh", "tcsh"),
        ("/usr/bin/fish", "fish"),
    ] {
        if Path::new(program).exists() || install(package) {
            continue;
        }
        // Without the two shells the others are still tested.
        if package.starts_with("openssh") {
            skip(&this_test(), &format!("{package} is missing and apt could not install it"));
            return false;
        }
    }
    true
}

fn install(package: &str) -> bool {
    let apt = |args: &[&str]| {
        let status = Process::new("apt-get")
            .args(["-qq", "-o", "DPkg::Lock::Timeout=120"])
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdout(Stdio::null())
            .status();
        status.is_ok_and(|status| status.success())
    };
    apt(&["install", "-y", "--no-install-recommends", package])
        || (apt(&["update"]) && apt(&["install", "-y", "--no-install-recommends", package]))
}

impl Sshd {
    pub(crate) fn start() -> Option<Self> {
        Self::with("", "")
    }

    /// With more lines for its configuration, and commands that run first in its namespace.
    pub(crate) fn with(config: &str, prelude: &str) -> Option<Self> {
        if !ready() {
            return None;
        }
        let dir = tempfile::Builder::new().prefix("drover-sshd-").tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut sshd = Self { child: None, port, dir, prelude: prelude.to_owned() };
        for name in ["host", "user"] {
            keygen(&sshd.path(name), &["-t", "ed25519", "-N", ""]);
        }
        fs::create_dir(sshd.path("home")).unwrap();
        fs::set_permissions(sshd.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::copy(sshd.path("user.pub"), sshd.path("authorized_keys")).unwrap();
        let host = fs::read_to_string(sshd.path("host.pub")).unwrap();
        fs::write(sshd.path("known_hosts"), format!("[127.0.0.1]:{port} {host}")).unwrap();
        let home = sshd.path("home");
        let account = |name: &str, shell: &str| format!("drover-{name}:*:0:0::{}:{shell}\n", home.display());
        let mut accounts = vec![fs::read_to_string("/etc/passwd").unwrap(), account("nobody", "/usr/sbin/nologin")];
        accounts.push(account("user", "/bin/sh").replace(":0:0:", ":64001:64001:"));
        accounts.extend(SHELLS.iter().map(|shell| account(shell, &format!("/bin/{shell}"))));
        fs::write(sshd.path("passwd"), accounts.concat()).unwrap();
        let at = sshd.dir.path().display().to_string();
        let lines = format!(
            "{config}\nListenAddress 127.0.0.1\nPort {port}\nHostKey {at}/host\nPidFile none\nAuthorizedKeysFile {at}/authorized_keys\n\
             StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n\
             LogLevel VERBOSE\nUseDNS no\nPrintMotd no\n"
        );
        fs::write(sshd.path("sshd_config"), lines.replace("DIR", &at)).unwrap();
        sshd.listen();
        Some(sshd)
    }

    /// Starts the server, or starts it again.
    pub(crate) fn listen(&mut self) {
        fs::create_dir_all("/run/sshd").unwrap();
        let script = format!(
            "mount --bind passwd /etc/passwd && {{ {}\n}} && exec /usr/sbin/sshd -D -f sshd_config -E \"$PWD/log\"",
            if self.prelude.is_empty() { ":" } else { &self.prelude }
        );
        let child = Process::new("unshare")
            .args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "/bin/sh", "-c", &script])
            .current_dir(self.dir.path())
            .spawn()
            .unwrap();
        self.child = Some(child);
        wait("sshd to listen", || TcpStream::connect(("127.0.0.1", self.port)).is_ok() || self.log().contains("rror"));
    }

    /// Ends the server and all of its connections at once.
    pub(crate) fn kill(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        // The server is the first process of its namespace: all others end with it.
        signal(&children(child.id()), Signal::KILL);
        child.wait().unwrap();
    }

    /// All processes of its connections.
    pub(crate) fn sessions(&self) -> Vec<u32> {
        let server = self.child.as_ref().map(|child| children(child.id())).unwrap_or_default();
        server.into_iter().flat_map(descendants).collect()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Logins so far: one for each connection.
    pub(crate) fn logins(&self) -> usize {
        self.log().matches("Accepted publickey").count()
    }

    pub(crate) fn settings(&self, user: &str) -> Settings {
        let options = [
            ("HostName", "127.0.0.1".to_owned()),
            ("Port", self.port.to_string()),
            ("User", user.to_owned()),
            ("IdentityFile", self.text("user")),
            ("IdentitiesOnly", "yes".to_owned()),
            ("UserKnownHostsFile", self.text("known_hosts")),
            ("GlobalKnownHostsFile", "none".to_owned()),
        ];
        Settings {
            options: options.map(|(key, value)| (key.to_owned(), value)).into(),
            config_file: Some("/dev/null".into()),
            home: self.path("home"),
            agent: None,
            retry: Retry { first: Duration::from_millis(50), ceiling: Duration::from_millis(500) },
            refused_pause: Duration::from_millis(100),
            prompt: Arc::new(Batch),
            ..Settings::from_env("cluster")
        }
    }

    pub(crate) fn russh(&self) -> Russh {
        Russh::new(self.settings("drover-sh")).unwrap()
    }

    pub(crate) fn system(&self) -> System {
        System::new(self.settings("drover-sh")).unwrap()
    }
}

impl Drop for Sshd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("--- log of sshd\n{}", self.log());
        }
        self.kill();
    }
}

pub(crate) fn set(settings: &mut Settings, key: &str, value: &str) {
    settings.options.retain(|(known, _)| known != key);
    settings.options.push((key.to_owned(), value.to_owned()));
}

pub(crate) fn keygen(path: &Path, args: &[&str]) {
    let status =
        Process::new("ssh-keygen").arg("-q").args(args).arg("-f").arg(path).stdin(Stdio::null()).status().unwrap();
    assert!(status.success(), "ssh-keygen {args:?}");
}

pub(crate) fn executable(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

pub(crate) fn sh(script: &str) -> Command {
    Command::new("/bin/sh").arg("-c").arg(script)
}

pub(crate) async fn text(remote: &dyn Remote, command: Command) -> Result<String, SshError> {
    let output: Output = remote.run(command).await?;
    assert!(output.success(), "{output:?}");
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Waits until something holds.
pub(crate) fn wait(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The same within a runtime.
pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) fn signal(pids: &[u32], signal: Signal) {
    for pid in pids {
        if let Some(pid) = i32::try_from(*pid).ok().and_then(Pid::from_raw) {
            // It may be gone already.
            let _ = kill_process(pid, signal);
        }
    }
}

fn children(of: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

fn descendants(of: u32) -> Vec<u32> {
    let mut found = Vec::new();
    let mut look = vec![of];
    while let Some(pid) = look.pop() {
        let children = children(pid);
        found.extend(&children);
        look.extend(children);
    }
    found
}
