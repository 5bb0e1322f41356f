//! What goes wrong with a cluster, in the words of the rest of drover.

use drover_ssh::SshError;
use drover_types::{ErrorCode, Failure};

use super::ClusterSettings;

impl ClusterSettings {
    /// Something of this cluster cannot be had now.
    pub(crate) fn unavailable(&self, message: impl Into<String>) -> Failure {
        Failure::new(ErrorCode::BackendUnavailable, message)
            .hint(format!("`drover doctor --cluster {}` looks at it more closely", self.name))
    }

    /// What the connection said.
    pub(crate) fn of_ssh(&self, error: &SshError) -> Failure {
        match error {
            SshError::Refused { host, why, hint } => {
                Failure::new(ErrorCode::BackendUnavailable, format!("no connection to {host}: {why}"))
                    .hint(hint.clone())
            }
            error => self.unavailable(error.to_string()),
        }
    }
}
