//! States with one spelling each, the same in logs, protocol, database and output.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A word that is none of the known ones.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("unknown {what} {got:?}, expected one of {expected}")]
pub struct UnknownName {
    /// What kind of word.
    pub what: &'static str,
    /// What was given.
    pub got: String,
    /// What would have been understood.
    pub expected: String,
}

macro_rules! named {
    ($(#[$doc:meta])* $name:ident, $what:literal { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$vdoc])* #[serde(rename = $text)] $variant),+
        }

        impl $name {
            /// Every value, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The one spelling.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = UnknownName;
            fn from_str(text: &str) -> Result<Self, UnknownName> {
                match text {
                    $($text => Ok(Self::$variant),)+
                    _ => Err(UnknownName {
                        what: $what,
                        got: text.to_owned(),
                        expected: Self::ALL.iter().map(|v| v.as_str()).collect::<Vec<_>>().join(", "),
                    }),
                }
            }
        }
    };
}

named!(
    /// Where a swarm is in its life.
    SwarmStatus, "swarm status" {
        /// Asked for; not every node is up yet.
        Launching = "launching",
        /// Every node is up.
        Running = "running",
        /// Some nodes are up, others were given up.
        Degraded = "degraded",
        /// Its end was asked for.
        Terminating = "terminating",
        /// Ended as asked, or because its allocation ended.
        Terminated = "terminated",
        /// It never came up.
        Failed = "failed",
    }
);

impl SwarmStatus {
    /// Nothing will happen in this swarm any more.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Terminated | Self::Failed)
    }

    /// Prompts are taken: they wait until the node is up.
    pub fn takes_prompts(self) -> bool {
        matches!(self, Self::Launching | Self::Running | Self::Degraded)
    }
}

named!(
    /// What a node is doing.
    NodeState, "node state" {
        /// Waiting for resources.
        Pending = "pending",
        /// Its worker runs, its agent is not ready yet.
        Starting = "starting",
        /// Ready, no turn running.
        Idle = "idle",
        /// A turn is running.
        Busy = "busy",
        /// Its worker ended unasked and is started again.
        Restarting = "restarting",
        /// Ended as asked.
        Exited = "exited",
        /// Given up.
        Failed = "failed",
    }
);

named!(
    /// Where an injection is in its life.
    InjectionState, "injection state" {
        /// On disk in the router.
        Accepted = "accepted",
        /// On disk in the node's inbox.
        Delivered = "delivered",
        /// Its turn has begun.
        Started = "started",
        /// Its turn has ended well.
        Completed = "completed",
        /// Not carried out, or not to its end.
        Failed = "failed",
    }
);

impl InjectionState {
    /// Nothing will happen to this injection any more.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Completed | Self::Failed)
    }
}

named!(
    /// Which program answers the prompts on a node.
    AgentKind, "agent" {
        /// The real Codex CLI over its app-server.
        Codex = "codex",
        /// Built in, offline: answers what it was sent.
        Echo = "echo",
        /// A conversation with the model that the dispatcher is configured with.
        Chat = "chat",
    }
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_reads_its_own_spelling() {
        for status in SwarmStatus::ALL {
            assert_eq!(status.as_str().parse::<SwarmStatus>().as_ref(), Ok(status));
        }
        let wrong = "runing".parse::<SwarmStatus>().unwrap_err();
        assert!(wrong.to_string().contains("running"), "{wrong}");
    }
}
