//! The words that every crate of drover shares: ids, counters, states and error codes.
//!
//! Everything here is parsed once at the edge and trusted afterwards. Nothing here does I/O.

mod error_code;
mod ids;
mod state;
mod text;

pub use error_code::{ErrorCode, Failure};
pub use ids::{
    Epoch, Generation, IdError, InjectionId, JobId, NodeIndex, OutboxId, RequestId, Seq, SessionId, SwarmId,
};
pub use state::{AgentKind, InjectionState, NodeState, SwarmStatus, UnknownName};
pub use text::shortened;

/// Version of the programs; all daemons of one instance carry the same one.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
