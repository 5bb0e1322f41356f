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
            // A person has to do something first: no launch is to wait for it.
            SshError::Refused { host, why, hint } => {
                Failure::new(ErrorCode::ProviderUnavailable, format!("no connection to {host}: {why}"))
                    .hint(hint.clone())
            }
            SshError::Settings { .. } | SshError::Shell { .. } | SshError::Invalid { .. } => {
                Failure { code: ErrorCode::ProviderUnavailable, ..self.unavailable(error.to_string()) }
            }
            SshError::Upload { .. } => {
                Failure { code: ErrorCode::StoreUnavailable, ..self.unavailable(error.to_string()) }
            }
            error => self.unavailable(error.to_string()),
        }
    }
}
