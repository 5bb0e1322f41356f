//! What stands beside a router that another program started.
//!
//! Clients of the older command line know one daemon: they start `ROUTER --config FILE --daemon`, with no terminal and no
//! output, and end what stands in its PID file. Their launches are to work all the same, so `drover daemon router
//! --daemon` starts the allocator and the follower of its state directory when they do not run, looks after the two as
//! long as it runs itself, and ends in order what it has started.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::Child;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use drover_service::process;
use drover_service::{StateDir, address_book};
use rustix::process::Signal;

use crate::daemons::{LOGIN_SIDE, ROUTER};
use crate::files;
use crate::start::{self, Recipe, START_LOCK, UP_LOCK};
use crate::supervise::{Backoff, signal};

/// How often the two are looked at.
const LOOK: Duration = Duration::from_millis(500);
/// How long the router waits for them before it listens. A client of the first generation gives up after 5 s.
const FIRST_LOOK: Duration = Duration::from_secs(3);

/// Allocator and follower of a router that was started with `--daemon`.
pub(crate) struct Beside {
    state: StateDir,
    started: Started,
}

type Started = Arc<Mutex<Children>>;

#[derive(Default)]
struct Children {
    over: bool,
    running: BTreeMap<&'static str, Running>,
}

struct Running {
    child: Child,
    /// It has listened at least once.
    listened: bool,
}

impl Beside {
    /// Starts what is missing, if these are the arguments of a router that another program starts.
    pub(crate) fn of_router(args: &[OsString]) -> Option<Self> {
        let config = Wish::of(args)?.config;
        let config = config.map(std::path::absolute).transpose().ok()?;
        // A broken file is the router's to speak about.
        drover_config::load(config.as_deref()).ok()?;
        let state = StateDir::from_env().ok()?;
        keep_a_log(&state);
        let started = Started::default();
        let mut keeper =
            Keeper { state: state.clone(), config, started: Arc::clone(&started), backoff: BTreeMap::default() };
        keeper.look(Instant::now() + FIRST_LOOK);
        let looking = std::thread::Builder::new().name("beside".to_owned()).spawn(move || {
            loop {
                std::thread::sleep(LOOK);
                keeper.look(Instant::now() + start::STARTING);
            }
        });
        if let Err(error) = looking {
            say(&format!("allocator and follower are not looked after: {error}"));
        }
        Some(Self { state, started })
    }

    /// Ends what was started, unless another router goes on with it.
    pub(crate) fn end(self) {
        let mut children = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        children.over = true;
        if address_book::read(&self.state, ROUTER).is_some() {
            return;
        }
        for (name, running) in &children.running {
            if let Some(id) = process::of(running.child.id())
                && signal(id, Signal::TERM)
            {
                say(&format!("stopping {name} (pid {})", id.pid));
            }
        }
    }
}

/// What the arguments of a router say.
#[derive(Debug, PartialEq)]
struct Wish {
    config: Option<PathBuf>,
}

impl Wish {
    /// Only `--daemon` asks for more than a router, and not when the call only asks a question.
    fn of(args: &[OsString]) -> Option<Self> {
        let questions = ["--check-config", "--dump-config", "--help", "-h", "--version", "-V"];
        let has = |flag: &str| args.iter().any(|arg| arg == flag);
        if !has("--daemon") || questions.into_iter().any(has) {
            return None;
        }
        let mut config = std::env::var_os("DROVER_CONFIG").filter(|path| !path.is_empty());
        let mut rest = args.iter();
        while let Some(arg) = rest.next() {
            if arg == "--config" {
                config = rest.next().cloned();
            } else if let Some(path) = arg.to_str().and_then(|arg| arg.strip_prefix("--config=")) {
                config = Some(OsStr::new(path).to_owned());
            }
        }
        Some(Self { config: config.map(PathBuf::from) })
    }
}

struct Keeper {
    state: StateDir,
    config: Option<PathBuf>,
    started: Started,
    backoff: BTreeMap<&'static str, (Backoff, Instant)>,
}

impl Keeper {
    /// Starts what does not run and waits until it listens, or to the deadline.
    fn look(&mut self, deadline: Instant) {
        self.bury();
        if start::missing(&self.state).iter().all(|name| *name == ROUTER) {
            return;
        }
        if files::holder(&self.state, UP_LOCK).is_some() {
            return; // `up` starts them again itself.
        }
        // Held until they listen, so that a command of ours at this moment does not start them too.
        let Ok(Some(_lock)) = files::Lock::take(&self.state, START_LOCK) else { return };
        let mut awaited = Vec::new();
        for &daemon in LOGIN_SIDE.iter().filter(|name| **name != ROUTER) {
            if address_book::read(&self.state, daemon).is_none() && self.is_due(daemon) && self.start(daemon) {
                awaited.push(daemon);
            }
        }
        while self.is_one_awaited(&awaited) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
            self.bury();
        }
    }

    /// One of these was started, lives, and does not listen yet.
    fn is_one_awaited(&self, daemons: &[&'static str]) -> bool {
        let children = self.children();
        daemons.iter().filter_map(|daemon| children.running.get(daemon)).any(|running| !running.listened)
    }

    fn is_due(&self, daemon: &'static str) -> bool {
        self.backoff.get(daemon).is_none_or(|(_, next)| Instant::now() >= *next)
    }

    fn start(&mut self, daemon: &'static str) -> bool {
        let mut children = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        if children.over || children.running.contains_key(daemon) {
            return false;
        }
        let again = self.backoff.contains_key(daemon);
        let recipe = Recipe { state: &self.state, config: self.config.as_deref(), detached: true, rotate: !again };
        match recipe.command(daemon).and_then(|mut command| command.spawn()) {
            Ok(child) => {
                let log = files::log_path(&self.state, daemon);
                say(&format!("{daemon} did not run; started it (pid {}, log: {})", child.id(), log.display()));
                children.running.insert(daemon, Running { child, listened: false });
                true
            }
            Err(error) => {
                say(&format!("cannot start {daemon}: {error}"));
                drop(children);
                self.put_off(daemon, false);
                false
            }
        }
    }

    /// Takes note of what listens by now and of what has ended.
    fn bury(&mut self) {
        let mut ended = Vec::new();
        self.children().running.retain(|daemon, running| {
            let pid = running.child.id();
            running.listened =
                running.listened || address_book::read_any(&self.state, daemon).is_some_and(|entry| entry.pid == pid);
            let how = match running.child.try_wait() {
                Ok(None) => return true,
                Ok(Some(status)) => status.to_string(),
                Err(error) => error.to_string(),
            };
            ended.push((*daemon, how, running.listened));
            false
        });
        for (daemon, how, listened) in ended {
            let pause = self.put_off(daemon, listened);
            let log = files::log_path(&self.state, daemon);
            say(&format!("{daemon} ended ({how}; log: {}); starting it again in {pause:.1?}", log.display()));
        }
    }

    fn put_off(&mut self, daemon: &'static str, listened: bool) -> Duration {
        let (backoff, next) = self.backoff.entry(daemon).or_insert_with(|| (Backoff::default(), Instant::now()));
        let pause = backoff.after(listened);
        *next = Instant::now() + pause;
        pause
    }

    fn children(&self) -> std::sync::MutexGuard<'_, Children> {
        self.started.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whoever throws our output away would have nothing to look at when something is wrong.
fn keep_a_log(state: &StateDir) {
    let nowhere = || -> io::Result<bool> {
        let null = File::open("/dev/null")?.metadata()?;
        let mine = rustix::fs::fstat(io::stderr())?;
        Ok(mine.st_rdev == null.rdev() && null.rdev() != 0)
    };
    if nowhere().unwrap_or(false) {
        // The log of a router that runs already is not ours to put aside.
        let first = address_book::read(state, ROUTER).is_none();
        if let Ok(log) = files::open_log(state, ROUTER, first) {
            let _ = rustix::stdio::dup2_stderr(log);
        }
    }
}

/// In the router's log, or wherever its standard error goes. Telemetry does not run yet.
fn say(words: &str) {
    let _ = writeln!(io::stderr(), "{words}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(line: &str) -> Option<Wish> {
        Wish::of(&line.split(' ').map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn only_a_router_started_by_another_program_needs_company() {
        let with = |path: &str| Some(Wish { config: Some(PathBuf::from(path)) });
        assert_eq!(wish("--config configs/local.json --daemon"), with("configs/local.json"));
        assert_eq!(wish("--daemon --debug --config=x.yaml"), with("x.yaml"));
        assert_eq!(wish("--config x.yaml"), None, "our own commands start what they need");
        assert_eq!(wish("--daemon --check-config"), None);
        assert_eq!(wish("--help --daemon"), None);
    }
}
