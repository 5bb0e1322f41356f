//! The router's doors: every call, whichever way it came, passes here before it reaches the router. Here it is decided who
//! may do what, and written down who changed what.
//!
//! ```text
//! gRPC port ────────> Doors ──> Service
//! JSON-line plane ──────^  (in the same process; it says for whom it asks)
//! ```

mod rpcs;
mod sessions;

use std::path::Path;
use std::sync::Arc;

use drover_config::SecurityConfig;
use drover_control::Entrance;
use drover_proto::{failure_of, status_of};
use drover_service::guard::{self, Guard, Needs, Refused, Role, Taken, put};
use drover_service::{Caller, Context};
use drover_types::Failure;
use serde_json::{Map, Value};
use tonic::{Request, Response, Status};

use crate::core::find_by_name;
use crate::grpc::Service;
pub(crate) use sessions::SessionDoors;

/// Who may come in, and what is written down of them in this directory.
pub(crate) fn guard(ctx: &Context, security: &SecurityConfig, audit: &Path) -> anyhow::Result<Arc<Guard>> {
    let doors = guard::Doors { daemon: "router", roles: Role::OF_ROUTER, log: "audit" };
    Ok(Guard::new(ctx, security, doors, ctx.token()?, audit)?)
}

/// Writes down what became of a command, and gives the answer on.
async fn ended<A>(
    taken: Taken<'_>,
    answer: Result<Response<A>, Status>,
    told: Map<String, Value>,
) -> Result<Response<A>, Status> {
    let failed = answer.as_ref().err().map(|status| failure_of(status).code);
    taken.answered(failed, told).await;
    answer
}

/// The way in for the JSON-line plane.
#[derive(Debug)]
pub(crate) struct LineDoor(pub(crate) Arc<Guard>);

/// The JSON-line plane tells everybody everything.
impl Entrance for LineDoor {
    fn wants_token(&self) -> bool {
        self.0.wants_token()
    }

    fn admit(&self, caller: Caller, token: Option<&str>) -> Result<Caller, Failure> {
        let how = r#"the first line {"protocol":"codeswarm.router.v1","type":"token","token":"TOKEN"}"#;
        let admitted = self.0.admit(caller, token, Needs::OneOf(&[Role::Read]), how);
        admitted.map_err(|refused| self.0.refuse(refused, "connect", &Map::new()))
    }
}

/// The service behind its doors.
pub(crate) struct Doors {
    pub(crate) inner: Arc<Service>,
    pub(crate) guard: Arc<Guard>,
}

impl Doors {
    /// Lets a call that changes nothing in.
    fn look<T>(&self, call: &'static str, request: &Request<T>, needs: Needs) -> Result<(), Status> {
        look(&self.guard, call, request, needs)
    }

    /// Lets a command in once it is written down; [`ended`] writes down what became of it.
    async fn begin(
        &self,
        command: &'static str,
        caller: Result<Caller, Refused>,
        asked: Map<String, Value>,
    ) -> Result<Taken<'_>, Status> {
        begin(&self.guard, command, caller, asked).await
    }

    /// Whose command it is, if they may.
    fn caller<T>(&self, request: &Request<T>, needs: Needs) -> Result<Caller, Refused> {
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

fn look<T>(guard: &Guard, call: &'static str, request: &Request<T>, needs: Needs) -> Result<(), Status> {
    let checked = guard.check(request.extensions(), request.metadata(), needs);
    checked.map(drop).map_err(|refused| status_of(&guard.refuse(refused, call, &Map::new())))
}

async fn begin<'a>(
    guard: &'a Guard,
    command: &'static str,
    caller: Result<Caller, Refused>,
    asked: Map<String, Value>,
) -> Result<Taken<'a>, Status> {
    let taken = match caller {
        Ok(caller) => guard.take(&caller, command, &asked).await,
        Err(refused) => Err(guard.refuse(refused, command, &asked)),
    };
    taken.map_err(|why| status_of(&why))
}
