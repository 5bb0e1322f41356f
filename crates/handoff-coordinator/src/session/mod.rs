//! What a conversation is: records that are only ever added, and the state that they add up to.

mod codec;
mod merge;
mod record;
mod state;

pub use codec::{CodecError, LogSum, decode, encode};
pub use merge::{Head, Span, begins, spans};
pub use record::{Opening, Outcome, Record, TurnFault};
pub use state::{Message, Role, SessionState, StateError, ToolCall};
