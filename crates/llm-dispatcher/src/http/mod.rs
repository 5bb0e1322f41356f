//! The HTTP front: the pool for programs that speak `OpenAI`'s interface, and the routes of the older daemon.
//!
//! ```text
//! express: the commonest request on a short way; all others:
//! guard: Host, Origin, bearer token, size of the body
//!   chat        POST /v1/chat/completions      responses   POST /v1/responses      GET /v1/models
//!   daemon      POST /parallel   GET /status   GET /health     research    POST /research
//! ```
//!
//! It is a translator: what a request is worth, when it goes and what it costs is decided where all other work is decided too.
//! A caller that goes away takes its call with it. Nothing is kept of a conversation.

mod chat;
mod clients;
mod daemon;
mod error;
mod express;
mod guard;
mod inbound;
mod outcome;
mod research;
mod responses;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};

pub(crate) use express::Express;
pub use express::framed_request;
pub(crate) use guard::{Access, load_or_make_token};

use crate::errands::Errands;
use crate::shell::Pool;
use clients::Clients;

/// Largest request.
const MAX_BODY: usize = 16 << 20;
/// Longest that a call may take that does not say itself.
const WITHIN: Duration = Duration::from_mins(30);

/// What every route needs.
#[derive(Debug)]
pub(crate) struct Front {
    pool: Pool,
    clients: Clients,
    errands: Errands,
    started: std::time::Instant,
}

/// What agents on nodes may ask, for those who have found out who asks before a request comes here.
pub(crate) fn routes_for_nodes(pool: &Pool, errands: Errands) -> Router {
    models_routes().layer(DefaultBodyLimit::max(MAX_BODY)).with_state(front(pool, errands))
}

fn models_routes() -> Router<Arc<Front>> {
    Router::new()
        .route("/v1/chat/completions", post(chat::completions))
        .route("/v1/responses", post(responses::create))
        .route("/v1/models", get(outcome::models))
}

fn front(pool: &Pool, errands: Errands) -> Arc<Front> {
    let started = std::time::Instant::now();
    Arc::new(Front { clients: Clients::new(pool), pool: pool.clone(), errands, started })
}

/// The short way, and the routes behind their guard.
pub(crate) fn doors(pool: &Pool, errands: Errands, access: Access) -> (Arc<Express>, Router) {
    let front = front(pool, errands);
    let access = Arc::new(access);
    (Express::new(Arc::clone(&front), Arc::clone(&access)), router(front, access))
}

fn router(front: Arc<Front>, access: Arc<Access>) -> Router {
    let open = Router::new()
        .route("/health", get(daemon::health))
        .route_layer(axum::middleware::from_fn_with_state(Arc::clone(&access), guard::from_here));
    models_routes()
        .route("/parallel", post(daemon::parallel))
        .route("/research", post(research::research))
        .route("/status", get(daemon::status))
        .route_layer(DefaultBodyLimit::max(MAX_BODY))
        .route_layer(axum::middleware::from_fn_with_state(access, guard::authorized))
        .merge(open)
        .with_state(front)
}

#[cfg(test)]
mod express_tests;
#[cfg(test)]
mod more_tests;
#[cfg(test)]
mod tests;
