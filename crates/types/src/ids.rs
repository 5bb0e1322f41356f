//! Newtypes for everything that has a name or a number.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// An id that cannot be one.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum IdError {
    /// Nothing was given.
    #[error("empty {0}")]
    Empty(&'static str),
    /// Longer than any id we make.
    #[error("{what} is longer than {limit} bytes")]
    TooLong {
        /// What kind of id.
        what: &'static str,
        /// The most it may have.
        limit: usize,
    },
    /// Has a character that must not reach a path or a shell.
    #[error("{what} may hold only letters, digits, '-', '_' and '.', and must begin with a letter or digit")]
    BadCharacter {
        /// What kind of id.
        what: &'static str,
    },
}

/// The longest id accepted from outside.
const MAX_ID_BYTES: usize = 128;

/// Ids become parts of paths: only harmless characters, never a leading dot or dash.
fn check(what: &'static str, text: &str) -> Result<(), IdError> {
    let first = *text.as_bytes().first().ok_or(IdError::Empty(what))?;
    if text.len() > MAX_ID_BYTES {
        return Err(IdError::TooLong { what, limit: MAX_ID_BYTES });
    }
    let harmless = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if !first.is_ascii_alphanumeric() || !text.bytes().all(harmless) {
        return Err(IdError::BadCharacter { what });
    }
    Ok(())
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(std::sync::Arc<str>);

        impl $name {
            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                check($what, text)?;
                Ok(Self(text.into()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0.as_ref().to_owned()
            }
        }

        impl From<uuid::Uuid> for $name {
            fn from(id: uuid::Uuid) -> Self {
                Self(id.to_string().into())
            }
        }
    };
}

text_id!(
    /// Names a swarm. Ours are UUIDs; any harmless text is accepted.
    SwarmId, "swarm id"
);
text_id!(
    /// Names one prompt on its way to one node, from `accepted` to its end.
    InjectionId, "injection id"
);
text_id!(
    /// The backend's name of an allocation: a Slurm job id, or `local-…`.
    JobId, "job id"
);
text_id!(
    /// Names a session: one conversation, wherever it lives.
    SessionId, "session id"
);
text_id!(
    /// Names one turn that a client asks of a session, however often it asks.
    RequestId, "request id"
);

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// The one after this.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = std::num::ParseIntError;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    };
}

counter!(
    /// A node's index in its swarm, from 0.
    NodeIndex, u32
);
counter!(
    /// Which incarnation of a node's worker, from 1. A late word of an earlier one changes nothing.
    Generation, u32
);
counter!(
    /// Which ownership of a session, from 1. Whoever acts under an earlier one is refused.
    Epoch, u64
);
counter!(
    /// A sequence number: of an event in the log, or of a record in a stream. 0 means "before the first".
    Seq, u64
);

/// Names one outbox: what one incarnation of one node's worker writes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OutboxId {
    /// The swarm.
    pub swarm: SwarmId,
    /// The node.
    pub node: NodeIndex,
    /// The incarnation.
    pub generation: Generation,
}

impl fmt::Display for OutboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.swarm, self.node, self.generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_never_leave_their_directory_or_reach_a_shell() {
        for bad in ["", "..", ".hidden", "-rf", "a/b", "a b", "a\nb", "$(x)", "ä", "a\0"] {
            assert!(bad.parse::<SwarmId>().is_err(), "{bad:?} was accepted");
        }
        assert!("x".repeat(129).parse::<SwarmId>().is_err());
        for good in ["0", "local-7f", "6c1f2c0e-0b1a-4a61-8d2a-6b3f8f1f3c11", "4242_7", "a..b"] {
            assert_eq!(good.parse::<SwarmId>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn ids_travel_as_plain_strings() {
        let id: JobId = serde_json::from_str("\"local-1\"").unwrap();
        assert_eq!(serde_json::to_string(&id).unwrap(), "\"local-1\"");
        assert!(serde_json::from_str::<JobId>("\"../x\"").is_err());
    }
}
