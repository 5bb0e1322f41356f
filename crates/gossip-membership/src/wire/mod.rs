//! The bytes of what nodes say to each other. Nothing here allocates by a number that a stranger wrote, and nothing panics.
//!
//! ```text
//! datagram = tag u8 | fields            tag: low bits the kind, top bit "the sender is overloaded"
//! ping     = seq var | digest 8 | score u8 | load seq 2 | rumor*        ack the same
//! relay    = seq var | target 8         relay-ack and nack the same
//! gossip   = rumor*                     load = score u8 | load seq 2
//! rumor    = 0 or 1 (bare) | signed record
//!          | 2..5 (suspect, dead; each silent or refused) | key 8 | boot 8 | incarnation var | accuser 8
//! ```
//!
//! Rumours go on to the end of the datagram. The seal around it says which version of this layout it is.

mod buf;
mod lease;
mod message;
mod stream;

pub use buf::WireError;
pub use lease::{decode_reply, decode_request, encode_reply, encode_request};
pub use message::{decode, encode};
pub use stream::{Malformed, entries_from, entries_to, record_from, record_to};
