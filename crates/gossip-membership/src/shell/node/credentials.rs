//! By what a node proves who it is.

use std::sync::Arc;

use drover_service::pki::IdentityHandle;

use crate::core::{Record, SignedRecord, Signer, Untrusted, Verifier};

/// Who this node is, and by what it proves it.
pub(crate) enum Credentials {
    /// By nothing.
    Plain,
    /// By a certificate of the instance.
    Certified(IdentityHandle),
}

impl Credentials {
    /// Names the cluster, shortly.
    pub(super) fn cluster(&self) -> String {
        match self {
            Self::Plain => String::new(),
            Self::Certified(identity) => {
                let [a, b, c, d, ..] = identity.current().cluster_id();
                format!("{:08x}", u32::from_be_bytes([a, b, c, d]))
            }
        }
    }
}

/// Signs nothing: for networks whose nodes believe each other.
pub(super) struct Unsigned;

impl Signer for Unsigned {
    fn sign(&mut self, record: Record) -> SignedRecord {
        // Records of members always have a certificate; this one is none.
        SignedRecord::new(record, [0; 64], Arc::from(*b"-"))
    }
}

impl Verifier for Unsigned {
    fn check(&mut self, _: &SignedRecord) -> Result<(), Untrusted> {
        Ok(())
    }
}
