//! Who may do what at a daemon that lets others than its owner in, and who did what.
//!
//! ```text
//! call ─> Guard::check: token, role ──> Guard::take: written down ──> carried out ──> Taken::answered: written down
//!              └─ refused: written down, counted, told                                   the answer goes out behind this
//! ```

mod audit;
mod roles;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use drover_config::SecurityConfig;
use drover_types::{ErrorCode, Failure};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use serde_json::{Map, Value, json};
use tonic::Extensions;
use tonic::metadata::MetadataMap;
use tracing::warn;

pub use audit::put;
pub use roles::{Needs, Role};

use crate::{Caller, Context, Token, now_us};
use audit::Audit;
use roles::People;

/// Refusals are told to people so often at most, and counted always.
const SAY_AGAIN_US: u64 = 1_000_000;
/// Refusals of one user that are written down at once; and how long until one more may be. Others are counted only, so that nobody
/// fills the disk by asking.
const REFUSALS: u32 = 20;
const REFUSAL_AGAIN_US: u64 = 1_000_000;

/// Which daemon's doors these are.
#[derive(Debug, Clone, Copy)]
pub struct Doors {
    /// The daemon, as people call it and as its metrics begin.
    pub daemon: &'static str,
    /// What may be given to others there.
    pub roles: &'static [Role],
    /// First part of the names of its audit log's files.
    pub log: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Why {
    reason: &'static str,
}

/// Who may come in, and what is written down of them.
#[derive(Debug)]
pub struct Guard {
    doors: Doors,
    people: People,
    token: Token,
    audit: Audit,
    /// Tells this run's commands from those of the ones before it.
    run: u64,
    commands: AtomicU64,
    refused: Family<Why, Counter>,
    said: AtomicU64,
    refusals: Mutex<BTreeMap<u32, Refusals>>,
}

/// Refusals of one user.
#[derive(Debug, Default)]
struct Refusals {
    /// How many may be written down, as of `at`.
    left: u32,
    at: u64,
    /// How many were not, since the last that was.
    unwritten: u64,
}

/// A call that may not come in.
#[derive(Debug)]
pub struct Refused {
    /// Whose it was.
    caller: Option<Caller>,
    reason: &'static str,
    /// What the caller is told.
    pub failure: Failure,
}

impl Guard {
    /// Opens the audit log, in this directory. Calls have to show the token, if there is one.
    pub fn new(
        ctx: &Context,
        security: &SecurityConfig,
        doors: Doors,
        token: Token,
        audit: &Path,
    ) -> io::Result<Arc<Self>> {
        let refused = Family::<Why, Counter>::default();
        let registry = ctx.registry();
        registry.lock().unwrap_or_else(PoisonError::into_inner).sub_registry_with_prefix(doors.daemon).register(
            "refused_calls",
            "Calls of users without the role or the token that they need",
            refused.clone(),
        );
        for reason in ["role", "token"] {
            drop(refused.get_or_create(&Why { reason }));
        }
        let guard = Self {
            people: People::new(doors.daemon, doors.roles, rustix::process::geteuid().as_raw(), security),
            doors,
            token,
            audit: Audit::open(audit, doors.log, security.audit_file_size.0)?,
            run: now_us(),
            commands: AtomicU64::new(0),
            refused,
            said: AtomicU64::new(0),
            refusals: Mutex::default(),
        };
        ctx.spawn("audit", guard.audit.clone().mend(ctx.shutdown().clone()));
        Ok(Arc::new(guard))
    }

    /// Users whom the ports let in for this to decide.
    pub fn guests(&self) -> BTreeSet<u32> {
        self.people.guests()
    }

    /// Whether callers have to show a token.
    pub fn wants_token(&self) -> bool {
        self.token.is_wanted()
    }

    /// Where it is said why the audit log cannot be written.
    pub fn trouble(&self) -> Arc<ArcSwap<String>> {
        self.audit.trouble()
    }

    /// Everything that was begun is written down when this returns.
    pub async fn close(&self) {
        self.audit.close().await;
    }

    /// Who makes a call, if they may. What comes of a refusal is for [`Guard::refuse`].
    pub fn check(&self, extensions: &Extensions, metadata: &MetadataMap, needs: Needs) -> Result<Caller, Refused> {
        let Some(caller) = extensions.get::<Caller>().copied() else {
            let failure = Failure::new(ErrorCode::Internal, "nobody said whose call this is");
            return Err(Refused { caller: None, reason: "nobody", failure });
        };
        if !caller.proven && !self.token.is_shown(metadata) {
            let failure = self.no_token("authorization: Bearer TOKEN");
            return Err(Refused { caller: Some(caller), reason: "token", failure });
        }
        self.may(caller, needs)
    }

    /// Whether a whole connection may come in, which has shown this token or none, and says how it is shown.
    pub fn admit(&self, caller: Caller, token: Option<&str>, needs: Needs, how: &str) -> Result<Caller, Refused> {
        if !self.token.is(token) {
            return Err(Refused { caller: Some(caller), reason: "token", failure: self.no_token(how) });
        }
        self.may(caller, needs).map(|caller| Caller { proven: true, ..caller })
    }

    fn may(&self, caller: Caller, needs: Needs) -> Result<Caller, Refused> {
        let may = self.people.may(caller.uid, needs);
        may.map(|()| caller).map_err(|failure| Refused { caller: Some(caller), reason: "role", failure })
    }

    fn no_token(&self, how: &str) -> Failure {
        let message =
            format!("this {} wants to be shown a token, and it was none or not the right one", self.doors.daemon);
        Failure::new(ErrorCode::NotAllowed, message)
            .hint(format!("its owner has it, in the file of security.token_file; show it with {how}"))
    }

    /// Counts a refusal, tells people, and writes down what was refused. Returns what the caller is told.
    pub fn refuse(&self, refused: Refused, command: &'static str, asked: &Map<String, Value>) -> Failure {
        let Refused { caller, reason, failure } = refused;
        self.refused.get_or_create(&Why { reason }).inc();
        let Some(caller) = caller else { return failure };
        let (now, last) = (now_us(), self.said.load(Ordering::Relaxed));
        if now.saturating_sub(last) >= SAY_AGAIN_US
            && self.said.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            warn!(uid = caller.uid, door = caller.door.as_str(), command, why = %failure, "refused a call");
        }
        let Some(unwritten) = self.may_be_written(caller.uid, now) else { return failure };
        let mut line = self.line(caller, command, asked);
        line["result"] = failure.code.as_str().into();
        line["refused"] = reason.into();
        if unwritten > 0 {
            line["not_written_before"] = unwritten.into();
        }
        self.audit.refused(&line);
        failure
    }

    /// Whether one more refusal of a user is written down, and how many were not since the last. Few users can come so far: those
    /// whom the configuration names.
    fn may_be_written(&self, uid: u32, now: u64) -> Option<u64> {
        let mut all = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        let of = all.entry(uid).or_insert(Refusals { left: REFUSALS, at: now, unwritten: 0 });
        let earned = u32::try_from(now.saturating_sub(of.at) / REFUSAL_AGAIN_US).unwrap_or(REFUSALS);
        if earned > 0 {
            of.left = of.left.saturating_add(earned).min(REFUSALS);
            of.at = now;
        }
        if of.left == 0 {
            of.unwritten += 1;
            return None;
        }
        of.left -= 1;
        Some(std::mem::take(&mut of.unwritten))
    }

    fn line(&self, caller: Caller, command: &'static str, asked: &Map<String, Value>) -> Value {
        let number = self.commands.fetch_add(1, Ordering::Relaxed);
        let id = format!("{:x}-{number}", self.run);
        json!({
            "id": id, "at": at(), "command": command, "uid": caller.uid, "door": caller.door.as_str(), "asked": asked,
        })
    }

    /// Writes down that a command is taken; what becomes of it is for [`Taken::answered`].
    pub async fn take(
        &self,
        caller: &Caller,
        command: &'static str,
        asked: &Map<String, Value>,
    ) -> Result<Taken<'_>, Failure> {
        let line = self.line(*caller, command, asked);
        let id = line["id"].as_str().unwrap_or_default().to_owned();
        let written = self.audit.taken(&line).await?;
        Ok(Taken { audit: &self.audit, id, written })
    }
}

/// A command whose answer is to be written down.
#[derive(Debug)]
pub struct Taken<'a> {
    audit: &'a Audit,
    id: String,
    /// Which write of the log it is part of.
    written: u64,
}

impl Taken<'_> {
    /// Returns when the disk has what was asked: for commands that say something before they are answered.
    pub async fn on_disk(&self) {
        self.audit.on_disk(self.written).await;
    }

    /// Writes down what became of the command, once the disk has what was asked: nobody is told of a command that a power cut
    /// could still take out of the log. Of a failure it is the code only: messages may repeat what was asked.
    pub async fn answered(self, failed: Option<ErrorCode>, told: Map<String, Value>) {
        self.audit.on_disk(self.written).await;
        let mut line = json!({"id": self.id, "at": at(), "result": failed.map_or("ok", ErrorCode::as_str)});
        if !told.is_empty() {
            line["told"] = told.into();
        }
        self.audit.answered(&line).await;
    }
}

/// Now, as people and programs read it.
fn at() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S%.6fZ").to_string()
}
