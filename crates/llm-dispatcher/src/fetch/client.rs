//! Fetches one page: judged at every hop, with its site's leave, within bounds of size and time.

use std::collections::HashMap;
use std::error::Error as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use reqwest::header::{self, HeaderMap};
use reqwest::{Client, Response};
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};
use tracing::debug;

use super::body::{self, Media};
use super::error::FetchError;
use super::guard::{BadEntry, Guard, Trust, Vetted};
use super::readable::{self, readable};
use super::resolve::{GuardedResolver, Lookup, SystemLookup};
use super::robots::{AGENT, Robots};
use super::{Page, sha256};

/// What a fetch may take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchSettings {
    /// Hosts, or hosts with a port, that may be fetched although they are not public.
    pub allow: Vec<String>,
    /// Most bytes of a page, packed and unpacked alike; what is longer is cut.
    pub max_bytes: usize,
    /// Until a connection stands.
    pub connect: Duration,
    /// Until the head of an answer is there.
    pub head: Duration,
    /// Between two pieces of a body.
    pub read: Duration,
    /// For all of it, with redirects, robots.txt and waiting for a turn.
    pub total: Duration,
    /// Requests to one host at once.
    pub per_host: usize,
    /// Redirects that are followed.
    pub redirects: usize,
}

impl Default for FetchSettings {
    fn default() -> Self {
        Self {
            allow: Vec::new(),
            max_bytes: 2 << 20,
            connect: Duration::from_secs(5),
            head: Duration::from_secs(10),
            read: Duration::from_secs(10),
            total: Duration::from_secs(30),
            per_host: 2,
            redirects: 5,
        }
    }
}

/// Reads pages. One for all workers: it remembers each site's robots.txt and how many requests are under way there.
#[derive(Debug)]
pub struct Fetcher {
    guard: Guard,
    settings: FetchSettings,
    /// Connects to public addresses only.
    public: Client,
    /// Connects to what the operator listed, wherever that lies.
    listed: Client,
    hosts: Hosts,
    robots: Mutex<HashMap<String, Leave>>,
    /// Extracting text is work for a processor; no more than these pages at once.
    extracting: Arc<Semaphore>,
}

/// What a site's robots.txt said, or that it is being asked.
#[derive(Debug, Clone)]
struct Leave {
    asked: Instant,
    answer: Arc<OnceCell<Result<Robots, FetchError>>>,
}

/// How long an answer holds, and how long a failure.
const ROBOTS_HOLD: Duration = Duration::from_hours(1);
const ROBOTS_RETRY: Duration = Duration::from_mins(1);
/// Sites whose answers are remembered.
const ROBOTS_SITES: usize = 1024;

/// What came back for one request.
enum Reply {
    /// Look there.
    Moved(String),
    Answer(Box<Response>),
}

impl Fetcher {
    /// One that asks the system for addresses.
    pub fn new(settings: FetchSettings) -> Result<Self, FetcherError> {
        let system: Arc<dyn Lookup> = Arc::new(SystemLookup);
        Self::with_lookup(settings, &system)
    }

    /// One that asks somebody else for them.
    pub fn with_lookup(settings: FetchSettings, lookup: &Arc<dyn Lookup>) -> Result<Self, FetcherError> {
        let client = |public_only| {
            drover_service::web::client()
                .user_agent(concat!("drover/", env!("CARGO_PKG_VERSION"), " (reads single pages on request)"))
                .redirect(reqwest::redirect::Policy::none())
                .referer(false)
                // A proxy would look names up for us, behind the guard's back.
                .no_proxy()
                .connect_timeout(settings.connect)
                .pool_max_idle_per_host(settings.per_host)
                .pool_idle_timeout(Duration::from_secs(15))
                .dns_resolver(Arc::new(GuardedResolver { lookup: Arc::clone(lookup), public_only }))
                .build()
        };
        Ok(Self {
            guard: Guard::allowing(&settings.allow)?,
            public: client(true)?,
            listed: client(false)?,
            hosts: Hosts { most: settings.per_host.max(1), turns: Mutex::default() },
            robots: Mutex::default(),
            extracting: Arc::new(Semaphore::new(2)),
            settings,
        })
    }

    /// Reads a page.
    pub async fn fetch(&self, url: &str) -> Result<Page, FetchError> {
        let limit = self.settings.total;
        match tokio::time::timeout(limit, self.page(url)).await {
            Ok(result) => result,
            Err(_) => Err(FetchError::Timeout { what: "whole page", limit }),
        }
    }

    async fn page(&self, url: &str) -> Result<Page, FetchError> {
        let began = Instant::now();
        let mut here = self.guard.vet(url)?;
        let asked = here.url().to_string();
        let mut redirects = Vec::new();
        loop {
            self.ask_leave(&here).await?;
            let _turn = self.hosts.turn(here.host()).await;
            let answer =
                match self.request(&here, "text/html,application/xhtml+xml,text/*;q=0.9,application/json;q=0.8").await?
                {
                    Reply::Moved(location) => {
                        here = self.next_hop(&here, &location, &mut redirects)?;
                        continue;
                    }
                    Reply::Answer(answer) => answer,
                };
            let status = answer.status();
            if !status.is_success() {
                return Err(FetchError::Status { status: status.as_u16() });
            }
            let content_type = text_of(answer.headers(), &header::CONTENT_TYPE);
            body::refused_by_name(content_type.as_deref())?;
            let packing = text_of(answer.headers(), &header::CONTENT_ENCODING);
            let (packed, cut) = self.body(*answer, here.host(), self.settings.max_bytes).await?;
            let bytes = packed.len();
            let (bytes_unpacked, more) = body::unpack(packed, packing.as_deref(), self.settings.max_bytes)?;
            let kind = body::kind(content_type.as_deref(), &bytes_unpacked)?;
            let (text, charset) = body::decode(&bytes_unpacked, &kind);
            let (title, text, article) = match kind.media {
                Media::Html => self.extract(text, here.url().to_string()).await?,
                Media::Text => (None, readable::tidy(&text), false),
            };
            let long = text.len() > self.settings.max_bytes;
            let text = if long { text[..text.floor_char_boundary(self.settings.max_bytes)].to_owned() } else { text };
            debug!(url = %here.url(), status = status.as_u16(), bytes, chars = text.len(), "page read");
            return Ok(Page {
                asked,
                url: here.url().to_string(),
                redirects,
                status: status.as_u16(),
                content_type: kind.name,
                charset: charset.to_owned(),
                title,
                sha256: sha256(&text),
                text,
                article,
                bytes,
                truncated: cut || more || long,
                elapsed: began.elapsed(),
            });
        }
    }

    fn next_hop(&self, here: &Vetted, location: &str, so_far: &mut Vec<String>) -> Result<Vetted, FetchError> {
        let next = self.guard.follow(here, location)?;
        if so_far.len() >= self.settings.redirects {
            return Err(FetchError::Redirects { most: self.settings.redirects, url: next.url().to_string() });
        }
        so_far.push(next.url().to_string());
        Ok(next)
    }

    async fn extract(&self, html: String, url: String) -> Result<(Option<String>, String, bool), FetchError> {
        let failed = |what: &dyn std::fmt::Display| FetchError::Internal(format!("extracting the text failed: {what}"));
        let permit = Arc::clone(&self.extracting).acquire_owned().await.map_err(|error| failed(&error))?;
        let work = tokio::task::spawn_blocking(move || {
            let page = readable(&html, &url);
            drop(permit);
            (page.title, page.text, page.article)
        });
        work.await.map_err(|error| failed(&error))
    }

    /// Sends one request and waits for the head of its answer.
    async fn request(&self, to: &Vetted, accept: &str) -> Result<Reply, FetchError> {
        let client = match to.trust() {
            Trust::Public => &self.public,
            Trust::Listed => &self.listed,
        };
        let request = client
            .get(to.url().clone())
            .header(header::ACCEPT, accept)
            .header(header::ACCEPT_LANGUAGE, "en;q=0.9,*;q=0.5")
            .header(header::ACCEPT_ENCODING, "gzip, deflate");
        let limit = self.settings.head;
        let answer = match tokio::time::timeout(limit, request.send()).await {
            Ok(answer) => answer.map_err(|error| self.failed(&error, to.host()))?,
            Err(_) => return Err(FetchError::Timeout { what: "answer", limit }),
        };
        let moved = matches!(answer.status().as_u16(), 301 | 302 | 303 | 307 | 308);
        match text_of(answer.headers(), &header::LOCATION) {
            Some(location) if moved => Ok(Reply::Moved(location)),
            _ => Ok(Reply::Answer(Box::new(answer))),
        }
    }

    /// At most `most` bytes of a body, and whether there was more.
    async fn body(&self, mut answer: Response, host: &str, most: usize) -> Result<(Vec<u8>, bool), FetchError> {
        let mut body = Vec::new();
        let limit = self.settings.read;
        loop {
            let piece = match tokio::time::timeout(limit, answer.chunk()).await {
                Ok(piece) => piece.map_err(|error| self.failed(&error, host))?,
                Err(_) => return Err(FetchError::Timeout { what: "further piece of the page", limit }),
            };
            let Some(piece) = piece else { return Ok((body, false)) };
            let room = most - body.len();
            body.extend_from_slice(&piece[..piece.len().min(room)]);
            if piece.len() > room {
                return Ok((body, true));
            }
        }
    }

    /// Whether the owner of the site lets programs read this page.
    async fn ask_leave(&self, page: &Vetted) -> Result<(), FetchError> {
        let origin = page.origin();
        let cell = self.leave_of(&origin);
        let rules = match cell.get() {
            Some(rules) => rules,
            None => cell.get_or_init(|| self.robots_of(page)).await,
        };
        let path = match page.url().query() {
            Some(query) => format!("{}?{query}", page.url().path()),
            None => page.url().path().to_owned(),
        };
        match rules {
            Ok(robots) if robots.allows(&path) => Ok(()),
            Ok(_) => Err(FetchError::Robots { origin }),
            Err(error) => Err(error.clone()),
        }
    }

    /// The place where the answer of a site is, or will be. Stale ones make room.
    fn leave_of(&self, origin: &str) -> Arc<OnceCell<Result<Robots, FetchError>>> {
        let mut sites = self.robots.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = |leave: &Leave| {
            let hold = if matches!(leave.answer.get(), Some(Err(_))) { ROBOTS_RETRY } else { ROBOTS_HOLD };
            leave.asked.elapsed() < hold
        };
        if let Some(leave) = sites.get(origin).filter(|leave| fresh(leave)) {
            return Arc::clone(&leave.answer);
        }
        if sites.len() >= ROBOTS_SITES {
            sites.retain(|_, leave| fresh(leave));
        }
        if sites.len() >= ROBOTS_SITES {
            let oldest = sites.iter().min_by_key(|(_, leave)| leave.asked).map(|(origin, _)| origin.clone());
            oldest.and_then(|oldest| sites.remove(&oldest));
        }
        let leave = Leave { asked: Instant::now(), answer: Arc::default() };
        let answer = Arc::clone(&leave.answer);
        sites.insert(origin.to_owned(), leave);
        answer
    }

    /// Reads a site's robots.txt: none (4xx) lets everything be read, one that cannot be read nothing. A site that cannot be
    /// reached at all is told as it is.
    async fn robots_of(&self, page: &Vetted) -> Result<Robots, FetchError> {
        let unknown = |why: String| FetchError::RobotsUnknown { origin: page.origin(), why };
        let mut here = self.guard.follow(page, "/robots.txt")?;
        let mut redirects = Vec::new();
        loop {
            let _turn = self.hosts.turn(here.host()).await;
            let answer = match self.request(&here, "text/plain").await {
                Ok(Reply::Moved(location)) => {
                    let next = self.next_hop(&here, &location, &mut redirects);
                    here = next.map_err(|error| unknown(error.to_string()))?;
                    continue;
                }
                Ok(Reply::Answer(answer)) => answer,
                Err(error) if redirects.is_empty() => return Err(error),
                Err(error) => return Err(unknown(error.to_string())),
            };
            return match answer.status().as_u16() {
                200..=299 => {
                    let packing = text_of(answer.headers(), &header::CONTENT_ENCODING);
                    let read = self.body(*answer, here.host(), self.settings.max_bytes).await;
                    let text =
                        read.and_then(|(packed, _)| body::unpack(packed, packing.as_deref(), self.settings.max_bytes));
                    text.map(|(text, _)| Robots::read(&text, AGENT)).map_err(|error| unknown(error.to_string()))
                }
                400..=499 => Ok(Robots::everything()),
                status => Err(unknown(format!("the server answered {status}"))),
            };
        }
    }

    /// What the HTTP client could not do, in our words. What the guard said deep inside it comes out as it was.
    fn failed(&self, error: &reqwest::Error, host: &str) -> FetchError {
        let mut cause = error.source();
        let mut deepest = error.to_string();
        while let Some(at) = cause {
            if let Some(said) = at.downcast_ref::<FetchError>() {
                return said.clone();
            }
            deepest = at.to_string();
            cause = at.source();
        }
        if error.is_timeout() {
            return FetchError::Timeout { what: "connection", limit: self.settings.connect };
        }
        FetchError::Transport { host: host.to_owned(), why: deepest }
    }
}

/// A fetcher cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum FetcherError {
    /// The list of allowed hosts.
    #[error("node_scaling.fetch.allow: {0}")]
    Allow(#[from] BadEntry),
    /// The HTTP client.
    #[error("cannot make an HTTP client")]
    Client(#[from] reqwest::Error),
}

fn text_of(headers: &HeaderMap, name: &header::HeaderName) -> Option<String> {
    // Servers write locations in bytes of their liking; what is no text at all is no header.
    headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
}

/// Whose turn it is at each host.
#[derive(Debug)]
struct Hosts {
    most: usize,
    turns: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Hosts {
    /// Waits until fewer than the most are under way to a host. The turn ends with the value.
    async fn turn(&self, host: &str) -> Option<OwnedSemaphorePermit> {
        let turns = {
            let mut all = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            // Hosts nobody asks any more are forgotten.
            if all.len() >= 256 {
                all.retain(|_, turns| Arc::strong_count(turns) > 1);
            }
            let turns = all.entry(host.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(self.most)));
            Arc::clone(turns)
        };
        // Never closed: the permit always comes.
        turns.acquire_owned().await.ok()
    }
}

impl From<&drover_config::FetchConfig> for FetchSettings {
    fn from(config: &drover_config::FetchConfig) -> Self {
        Self {
            allow: config.allow.clone(),
            max_bytes: usize::try_from(config.max_bytes.get()).unwrap_or(usize::MAX),
            total: config.timeout.get(),
            ..Self::default()
        }
    }
}
