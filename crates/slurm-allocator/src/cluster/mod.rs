//! The far side of a cluster: its login host, what of ours is placed there, and the outbox follower that runs there.
//!
//! ```text
//! router --gRPC--> relay (loopback, in the address book as outbox-follower@<cluster>)
//!                    |
//!                    |  one connection per cluster: drover-ssh
//!                    v
//! login host: <base>/bin/<checksum>/drover    one file, this very program; placed whole or not at all
//!             drover site follower            starts the follower, or finds the one that runs
//!             drover daemon outbox-follower   on loopback; ends by itself when nobody uses it
//! ```
//!
//! Nothing happens before somebody wants something of a cluster: the relay listens from the start, and the first connection to
//! it brings up the rest. What fails is tried anew with the next connection, and told to whoever made this one.
//!
//! This is not the Slurm backend: it knows neither jobs nor partitions.

mod answers;
mod checks;
mod codex;
mod failure;
mod install;
mod relay;
mod settings;
mod shared;

pub use answers::{CodexInstalled, FollowerFound, SiteReport};
pub use checks::{Finding, Thresholds, Wishes, check};
pub use install::{Placed, Program};
pub use relay::serve as serve_relay;
pub use settings::{ClusterSettings, Clusters, Way};
pub use shared::{Cluster, Ready, Report, Stage};
