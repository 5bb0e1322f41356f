//! Who may speak, and that it is they who speak. No sockets, no clock, no randomness beyond what is handed in.
//!
//! ```text
//! datagram = version 1 | kind u8 | ring key id u8 | sender's boot tag 8 | counter 8 | ...
//! pair     = ... sealed(message) 16+          between two nodes that know each other's records
//! hello    = ... salt 16 | sealed(hello) 16+  first contact, under the ring key
//! notice   = ... with the refused datagram's tag and counter, and the reason in place of the key id; a hint, never believed
//! ```
//!
//! | who | can |
//! | --- | --- |
//! | a stranger | nothing; is counted |
//! | a holder of the ring key | ask for a hello, and get an answer no larger than the question |
//! | a holder of a certificate, too | speak for that one node |
//!
//! The key between two nodes is agreed from the X25519 keys in their signed records and mixed with a key of the ring, one for
//! each direction. The X25519 keys are fresh with every start, and no counter is used twice within one, so no pair of key and
//! nonce ever comes again.
//!
//! ```text
//!  A                                     B
//!  │ ask       challenge of A            │
//!  ├────────────────────────────────────►│ no state, no signature checked
//!  │ show      echo, challenge of B      │
//!  │◄────────────────────────────────────┤ no longer than the ask
//!  │ introduce echo, challenge, record   │
//!  ├────────────────────────────────────►│ A's address is proved: B checks certificate and signatures
//!  │ met       echo, record              │
//!  │◄────────────────────────────────────┤ both know each other
//! ```

mod certified;
pub mod envelope;
mod hello;
mod limit;
mod refusal;
mod sealer;
mod secrets;
mod window;

pub use certified::{Certified, NodeSigner};
pub use refusal::{Refusal, Refusals};
pub use sealer::{Moment, Opened, Sealer};
pub use secrets::BootSecrets;

#[cfg(test)]
mod tests;
