//! Which directory changed: inotify, shared by all streams of this process.
//!
//! A directory that exists is watched itself. For one that does not, the nearest directory above it is, and the word
//! comes when the next part of the path appears. Every word is only a reason to look; a look finds out what is true.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use notify::event::{EventKind, ModifyKind};
use notify::{ErrorKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tracing::{debug, info, warn};

use crate::lane::Bell;
use crate::schedule::Key;

/// Whom to tell: an outbox of a lane.
#[derive(Debug, Clone)]
pub(crate) struct Token {
    pub(crate) bell: Arc<Bell>,
    pub(crate) key: Key,
}

impl Token {
    fn is(&self, other: &Self) -> bool {
        self.key == other.key && Arc::ptr_eq(&self.bell, &other.bell)
    }
}

/// What is watched for one outbox. Give it back with [`Watches::uncover`].
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Cover {
    /// The directory itself.
    Dir(PathBuf),
    /// A directory above it, until `child` appears in it.
    Above { dir: PathBuf, child: PathBuf },
}

impl Cover {
    pub(crate) fn is_direct(&self) -> bool {
        matches!(self, Self::Dir(_))
    }
}

pub(crate) struct Watches {
    /// Held during changes, so that two streams cannot watch and unwatch one directory in turns. The thread that hears
    /// from the system never takes it: it may be what we wait for.
    watcher: Mutex<Option<RecommendedWatcher>>,
    interests: Arc<Mutex<Interests>>,
    complained: AtomicBool,
}

#[derive(Default)]
struct Interests {
    /// Watched directories.
    dirs: HashMap<PathBuf, Watched>,
    /// Paths that somebody waits for, below watched directories.
    awaited: HashMap<PathBuf, Vec<Token>>,
}

#[derive(Default)]
struct Watched {
    /// Whom any change in it concerns.
    direct: Vec<Token>,
    /// Who waits for something below it.
    above: Vec<Token>,
    /// The system has stopped watching it: the directory was removed.
    gone: bool,
}

impl Watches {
    /// None watches at all when `enabled` is false or the system has no watcher left: then everything is polled.
    pub(crate) fn new(enabled: bool) -> Self {
        let interests = Arc::new(Mutex::new(Interests::default()));
        let heard = Arc::clone(&interests);
        let watcher = enabled.then(|| notify::recommended_watcher(move |event| lock(&heard).hear(event)));
        let watcher = match watcher {
            None => None,
            Some(Ok(watcher)) => Some(watcher),
            Some(Err(error)) => {
                warn!(%error, "no file watcher to be had (fs.inotify.max_user_instances); outboxes are polled");
                None
            }
        };
        Self { watcher: Mutex::new(watcher), interests, complained: AtomicBool::new(false) }
    }

    /// Sees to it that the token hears of changes of `dir`, from before this returns. `None`: it has to be polled.
    pub(crate) fn cover(&self, dir: &Path, token: &Token) -> Option<Cover> {
        let mut watcher = lock(&self.watcher);
        let watcher = watcher.as_mut()?;
        // Each turn either ends or found that a part of the path came or went meanwhile.
        for _ in 0..16 {
            if self.watch(watcher, dir, |interests| interests.watched(dir).direct.push(token.clone()))? {
                return Some(Cover::Dir(dir.to_owned()));
            }
            let mut child = dir;
            loop {
                let above = child.parent()?;
                let await_child = |interests: &mut Interests| {
                    interests.watched(above).above.push(token.clone());
                    interests.awaited.entry(child.to_owned()).or_default().push(token.clone());
                };
                if self.watch(watcher, above, await_child)? {
                    let cover = Cover::Above { dir: above.to_owned(), child: child.to_owned() };
                    if !child.exists() && above.exists() {
                        return Some(cover);
                    }
                    self.release(watcher, cover, token);
                    break;
                }
                child = above;
            }
        }
        None
    }

    pub(crate) fn uncover(&self, cover: Cover, token: &Token) {
        if let Some(watcher) = lock(&self.watcher).as_mut() {
            self.release(watcher, cover, token);
        }
    }

    /// Adds a user to a directory. `Some(false)`: it does not exist. `None`: it cannot be watched.
    fn watch(
        &self,
        watcher: &mut RecommendedWatcher,
        dir: &Path,
        interest: impl FnOnce(&mut Interests),
    ) -> Option<bool> {
        let is_new = lock(&self.interests).dirs.get_mut(dir).is_none_or(|watched| std::mem::take(&mut watched.gone));
        let result = if is_new { watcher.watch(dir, RecursiveMode::NonRecursive) } else { Ok(()) };
        let mut interests = lock(&self.interests);
        let Err(error) = result else {
            interest(&mut interests);
            return Some(true);
        };
        if let Some(watched) = interests.dirs.get_mut(dir) {
            watched.gone = true;
        }
        match &error.kind {
            ErrorKind::PathNotFound => Some(false),
            ErrorKind::Io(io) if io.kind() == std::io::ErrorKind::NotFound => Some(false),
            _ => {
                if !self.complained.swap(true, Ordering::Relaxed) {
                    warn!(dir = %dir.display(), %error, "cannot watch any more directories (fs.inotify.max_user_watches); the rest is polled");
                }
                None
            }
        }
    }

    fn release(&self, watcher: &mut RecommendedWatcher, cover: Cover, token: &Token) {
        let others = |tokens: &mut Vec<Token>| tokens.retain(|other| !other.is(token));
        let dir = {
            let mut interests = lock(&self.interests);
            let dir = match cover {
                Cover::Dir(dir) => {
                    others(&mut interests.watched(&dir).direct);
                    dir
                }
                Cover::Above { dir, child } => {
                    others(&mut interests.watched(&dir).above);
                    if let Some(tokens) = interests.awaited.get_mut(&child) {
                        others(tokens);
                        if tokens.is_empty() {
                            interests.awaited.remove(&child);
                        }
                    }
                    dir
                }
            };
            let watched = interests.watched(&dir);
            if !watched.direct.is_empty() || !watched.above.is_empty() {
                return;
            }
            interests.dirs.remove(&dir);
            dir
        };
        if let Err(error) = watcher.unwatch(&dir) {
            // Removed directories are no longer watched anyway.
            debug!(dir = %dir.display(), %error, "not watched any more");
        }
    }
}

impl Interests {
    fn watched(&mut self, dir: &Path) -> &mut Watched {
        self.dirs.entry(dir.to_owned()).or_default()
    }

    fn hear(&mut self, event: notify::Result<notify::Event>) {
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                info!(%error, "file watcher failed; looking everywhere");
                return self.tell_all();
            }
        };
        if event.need_rescan() {
            return self.tell_all();
        }
        match event.kind {
            // Our own reading is no news.
            EventKind::Access(_) | EventKind::Modify(ModifyKind::Metadata(_)) => return,
            _ => {}
        }
        for path in &event.paths {
            tell(self.awaited.get(path).into_iter().flatten());
            if let Some(parent) = path.parent() {
                tell(self.dirs.get(parent).into_iter().flat_map(|watched| &watched.direct));
            }
            if let Some(watched) = self.dirs.get_mut(path)
                && event.kind.is_remove()
            {
                watched.gone = true;
                for token in watched.direct.iter().chain(&watched.above) {
                    token.bell.uncover(token.key);
                }
            }
        }
    }

    fn tell_all(&self) {
        tell(self.awaited.values().flatten());
        tell(self.dirs.values().flat_map(|watched| &watched.direct));
    }
}

fn tell<'a>(tokens: impl IntoIterator<Item = &'a Token>) {
    for token in tokens {
        token.bell.tell(token.key);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
