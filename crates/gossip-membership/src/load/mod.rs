//! How loaded this node is: a weighted sum of processor, memory and sessions, compared with a threshold.
//!
//! ```text
//! machine (sysinfo, cgroups) --Usage--> score (pure: window, formula, hysteresis) --Report--> the gossip, GetStatus
//!                           sessions ------^
//! ```

pub mod cgroup;
pub mod machine;
pub mod score;

pub use machine::Machine;
pub use score::{Monitor, Report, Settings, Usage};
