//! The router's doors: every call, whichever way it came, passes here before it reaches the router. Here it is decided who
//! may do what, and written down who changed what.
//!
//! ```text
//! gRPC port ────────> Doors ──> Service
//! JSON-line plane ──────^  (in the same process; it says for whom it asks)
//! ```

mod audit;
mod roles;
mod rpcs;
mod sessions;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use drover_config::SecurityConfig;
use drover_control::Entrance;
use drover_proto::{failure_of, status_of};
use drover_service::{Caller, Context, Token, now_us};
use drover_types::{ErrorCode, Failure};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use serde_json::{Map, Value, json};
use tonic::metadata::MetadataMap;
use tonic::{Extensions, Request, Response, Status};
use tracing::warn;

use crate::core::find_by_name;
use crate::grpc::Service;
use audit::{Audit, put};
use roles::{Needs, People, Role};
pub(crate) use sessions::SessionDoors;

/// Refusals are told to people so often at most, and counted always.
const SAY_AGAIN_US: u64 = 1_000_000;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Why {
    reason: &'static str,
}

/// Who may come in, and what is written down of them.
#[derive(Debug)]
pub(crate) struct Guard {
    people: People,
    token: Token,
    audit: Audit,
    /// Tells this router's commands from those of the ones before it.
    run: u64,
    commands: AtomicU64,
    refused: Family<Why, Counter>,
    said: AtomicU64,
}

impl Guard {
    /// Reads the token and opens the audit log, in this directory.
    pub(crate) fn new(ctx: &Context, security: &SecurityConfig, audit: &Path) -> anyhow::Result<Self> {
        let refused = Family::<Why, Counter>::default();
        let registry = ctx.registry();
        let mut registry = registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        registry.sub_registry_with_prefix("router").register(
            "refused_calls",
            "Calls of users without the role or the token that they need",
            refused.clone(),
        );
        Ok(Self {
            people: People::new(rustix::process::geteuid().as_raw(), security),
            token: ctx.token()?,
            audit: Audit::open(audit, security.audit_file_size.0)?,
            run: now_us(),
            commands: AtomicU64::new(0),
            refused,
            said: AtomicU64::new(0),
        })
    }

    /// Users whom the ports let in for this to decide.
    pub(crate) fn guests(&self) -> std::collections::BTreeSet<u32> {
        self.people.guests()
    }

    /// Where it is said why the audit log cannot be written.
    pub(crate) fn trouble(&self) -> Arc<ArcSwap<String>> {
        self.audit.trouble()
    }

    /// Everything that was begun is written down when this returns.
    pub(crate) async fn close(&self) {
        self.audit.close().await;
    }

    /// Who makes a call, if they may.
    fn check(&self, extensions: &Extensions, metadata: &MetadataMap, needs: Needs) -> Result<Caller, Failure> {
        let Some(caller) = extensions.get::<Caller>().copied() else {
            return Err(Failure::new(ErrorCode::Internal, "nobody said whose call this is"));
        };
        if !caller.proven && !self.token.is_shown(metadata) {
            return Err(self.refuse(caller, "token", no_token("authorization: Bearer TOKEN")));
        }
        self.people.may(caller.uid, needs).map_err(|failure| self.refuse(caller, "role", failure))?;
        Ok(caller)
    }

    fn refuse(&self, caller: Caller, reason: &'static str, failure: Failure) -> Failure {
        self.refused.get_or_create(&Why { reason }).inc();
        let (now, last) = (now_us(), self.said.load(Ordering::Relaxed));
        if now.saturating_sub(last) >= SAY_AGAIN_US
            && self.said.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            warn!(uid = caller.uid, door = caller.door.as_str(), why = %failure, "refused a call");
        }
        failure
    }

    /// Writes down that a command is taken; what becomes of it is for [`Taken::answered`].
    async fn take(
        &self,
        caller: &Caller,
        command: &'static str,
        asked: Map<String, Value>,
    ) -> Result<Taken<'_>, Failure> {
        let number = self.commands.fetch_add(1, Ordering::Relaxed);
        let id = format!("{:x}-{number}", self.run);
        let line = json!({
            "id": id, "at": at(), "command": command, "uid": caller.uid, "door": caller.door.as_str(), "asked": asked,
        });
        self.audit.taken(&line).await?;
        Ok(Taken { audit: &self.audit, id })
    }
}

/// A command whose answer is to be written down.
struct Taken<'a> {
    audit: &'a Audit,
    id: String,
}

impl Taken<'_> {
    /// Writes down what became of the command, and gives the answer on.
    async fn ended<A>(
        self,
        answer: Result<Response<A>, Status>,
        told: Map<String, Value>,
    ) -> Result<Response<A>, Status> {
        let failed = answer.as_ref().err().map(|status| failure_of(status).code);
        self.answered(failed, told).await;
        answer
    }

    /// Writes down what became of the command. Of a failure it is the code only: messages may repeat what was asked.
    async fn answered(self, failed: Option<ErrorCode>, told: Map<String, Value>) {
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

fn no_token(how: &str) -> Failure {
    Failure::new(ErrorCode::NotAllowed, "this router wants to be shown a token, and it was none or not the right one")
        .hint(format!("its owner has it, in the file of security.token_file; show it with {how}"))
}

/// The JSON-line plane tells everybody everything.
impl Entrance for Guard {
    fn wants_token(&self) -> bool {
        self.token.is_wanted()
    }

    fn admit(&self, caller: Caller, token: Option<&str>) -> Result<Caller, Failure> {
        if !self.token.is(token) {
            let how = r#"the first line {"protocol":"codeswarm.router.v1","type":"token","token":"TOKEN"}"#;
            return Err(self.refuse(caller, "token", no_token(how)));
        }
        let may = self.people.may(caller.uid, Needs::OneOf(&[Role::Read]));
        may.map_err(|failure| self.refuse(caller, "role", failure))?;
        Ok(Caller { proven: true, ..caller })
    }
}

/// The service behind its doors.
pub(crate) struct Doors {
    pub(crate) inner: Arc<Service>,
    pub(crate) guard: Arc<Guard>,
}

impl Doors {
    /// Lets a call that changes nothing in.
    fn look<T>(&self, request: &Request<T>, needs: Needs) -> Result<(), Status> {
        self.guard.check(request.extensions(), request.metadata(), needs).map(drop).map_err(|why| status_of(&why))
    }

    /// Lets a command in once it is written down; [`Taken::ended`] writes down what became of it.
    async fn begin(
        &self,
        command: &'static str,
        caller: Result<Caller, Failure>,
        asked: Map<String, Value>,
    ) -> Result<Taken<'_>, Status> {
        let taken = match caller {
            Ok(caller) => self.guard.take(&caller, command, asked).await,
            Err(failure) => Err(failure),
        };
        taken.map_err(|why| status_of(&why))
    }

    /// Whose command it is, if they may.
    fn caller<T>(&self, request: &Request<T>, needs: Needs) -> Result<Caller, Failure> {
        self.guard.check(request.extensions(), request.metadata(), needs)
    }

    /// The whole id of the swarm that is meant, when there is one.
    fn put_swarm(&self, fields: &mut Map<String, Value>, name: &str) {
        let registry = self.inner.shared.registry.load();
        match find_by_name(&registry.swarms, name) {
            Ok(view) => put(fields, "swarm_id", &view.swarm.swarm_id),
            Err(_) => put(fields, "swarm_id", name),
        }
    }
}
