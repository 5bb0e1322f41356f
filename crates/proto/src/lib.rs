//! Generated messages and services, their descriptor set, and what turns a failure into a gRPC status and back.
//!
//! `proto/` at the top of the repository is the source; nothing generated is checked in. Domain types never derive from
//! generated ones: what crosses the boundary is checked in the daemon that receives it, once, and trusted afterwards.

mod failure;

pub use failure::{failure_of, status_of};

/// Every file of `proto/`, encoded, for gRPC reflection.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));

/// The generated code; its module path is the package path, which is what the generated references need.
#[allow(clippy::all, clippy::pedantic, unreachable_pub, reason = "generated code")]
mod drover {
    pub mod allocator {
        pub mod v1 {
            tonic::include_proto!("drover.allocator.v1");
        }
    }
    pub mod common {
        pub mod v1 {
            tonic::include_proto!("drover.common.v1");
        }
    }
    pub mod dispatch {
        pub mod v1 {
            tonic::include_proto!("drover.dispatch.v1");
        }
    }
    pub mod gossip {
        pub mod v1 {
            tonic::include_proto!("drover.gossip.v1");
        }
    }
    pub mod handoff {
        pub mod v1 {
            tonic::include_proto!("drover.handoff.v1");
        }
    }
    pub mod mailbox {
        pub mod v1 {
            tonic::include_proto!("drover.mailbox.v1");
        }
    }
    pub mod membership {
        pub mod v1 {
            tonic::include_proto!("drover.membership.v1");
        }
    }
    pub mod pool {
        pub mod v1 {
            tonic::include_proto!("drover.pool.v1");
        }
    }
    pub mod router {
        pub mod v1 {
            tonic::include_proto!("drover.router.v1");
        }
    }
    pub mod tasks {
        pub mod v1 {
            tonic::include_proto!("drover.tasks.v1");
        }
    }
    pub mod transfer {
        pub mod v1 {
            tonic::include_proto!("drover.transfer.v1");
        }
    }
    pub mod worker {
        pub mod v1 {
            tonic::include_proto!("drover.worker.v1");
        }
    }
}

pub use drover::allocator::v1 as allocator;
pub use drover::common::v1 as common;
pub use drover::dispatch::v1 as dispatch;
pub use drover::gossip::v1 as gossip;
pub use drover::handoff::v1 as handoff;
pub use drover::mailbox::v1 as mailbox;
pub use drover::membership::v1 as membership;
pub use drover::pool::v1 as pool;
pub use drover::router::v1 as router;
pub use drover::tasks::v1 as tasks;
pub use drover::transfer::v1 as transfer;
pub use drover::worker::v1 as worker;
