//! How the command lines start a router that does not run, and how `stop-all` ends it.

use std::ffi::OsString;
use std::io;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};

use super::transport::probe;

/// A command line that was installed somewhere and was given `--config` and no `--router`.
pub struct AutoSpawn {
    /// Where its repository lies: what `CODESWARM_HOME` names.
    pub home: PathBuf,
    /// `--config`, as given: a relative one is resolved by the router against `home`.
    pub config: String,
    /// Environment of the command line, which the router inherits.
    pub env: Vec<(OsString, OsString)>,
    /// Where the router is expected; the original knows only 127.0.0.1:8765.
    pub addr: SocketAddr,
}

/// How a command line came to its router.
#[derive(Debug)]
pub enum Found {
    /// `[codeswarm] Using existing router.`
    Existing,
    /// `[codeswarm] Starting embedded router...`
    Started(Child),
}

impl AutoSpawn {
    /// The later generation: looks for a Python, probes, starts a router as a module when nobody answers, and connects
    /// every 250 ms for a minute.
    pub async fn head(&self) -> io::Result<Found> {
        let python = self.python()?;
        let found = if probe(self.addr).await {
            Found::Existing
        } else {
            let args = ["-u", "-m", "router.router", "--config", &self.config, "--daemon"];
            Found::Started(self.detached(&python, &args)?)
        };
        self.connects(Duration::from_millis(250), 240).await?;
        Ok(found)
    }

    /// The seed: always starts a router as a script, then connects every 100 ms, 50 times.
    pub async fn seed(&self) -> io::Result<Child> {
        let script = self.home.join("router/router.py");
        let script = script.to_string_lossy();
        let child = self.detached(Path::new("python3"), &["-u", &script, "--config", &self.config, "--daemon"])?;
        self.connects(Duration::from_millis(100), 50).await?;
        Ok(child)
    }

    /// The last step of `stop-all`: SIGTERM to the process of `router.pid`, two seconds, SIGKILL. Gives what stood in the
    /// file and whether the process went when it was asked to.
    pub async fn stop_router(&self) -> io::Result<(u32, bool)> {
        let text = std::fs::read_to_string(self.home.join("router.pid"))?;
        let pid: u32 = text.strip_suffix('\n').and_then(|pid| pid.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
        crate::cluster::signal(pid, rustix::process::Signal::TERM)?;
        let deadline = Instant::now() + Duration::from_secs(2);
        while Instant::now() < deadline {
            if drover_service::process::of(pid).is_none() {
                return Ok((pid, true));
            }
            sleep(Duration::from_millis(20)).await;
        }
        crate::cluster::signal(pid, rustix::process::Signal::KILL)?;
        Ok((pid, false))
    }

    /// The first Python that says it is new enough.
    fn python(&self) -> io::Result<PathBuf> {
        let variable = self.env.iter().find(|(name, _)| name == "CODESWARM_PYTHON").map(|(_, path)| path.clone());
        let names = ["python3.12", "python3.11", "python3.10", "python3"].map(OsString::from);
        let question = "import sys; print(f\"{sys.version_info[0]}.{sys.version_info[1]}\")";
        for name in variable.into_iter().chain(names) {
            let Ok(answer) = self.command(Path::new(&name)).args(["-c", question]).stderr(Stdio::null()).output()
            else {
                continue;
            };
            let text = String::from_utf8_lossy(&answer.stdout);
            let version = text.trim().split_once('.').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
            if version.is_some_and(|version: (u32, u32)| version >= (3, 10)) {
                return Ok(name.into());
            }
        }
        Err(io::Error::new(io::ErrorKind::NotFound, "no Python of 3.10 or later was found"))
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.envs(self.env.iter().map(|(name, value)| (name, value))).stdin(Stdio::null());
        command
    }

    /// No input, no output, and a process group of its own.
    fn detached(&self, python: &Path, args: &[&str]) -> io::Result<Child> {
        let mut command = self.command(python);
        command.args(args).current_dir(&self.home).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        command.spawn()
    }

    async fn connects(&self, pause: Duration, tries: u32) -> io::Result<()> {
        for _ in 1..tries {
            if TcpStream::connect(self.addr).await.is_ok() {
                return Ok(());
            }
            sleep(pause).await;
        }
        TcpStream::connect(self.addr).await.map(drop)
    }
}
