//! What can go wrong between us and a login host.

use std::net::SocketAddr;
use std::time::Duration;

/// Whether the thing that was asked for may have happened on the far side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It surely never started: it may be asked for again.
    NotStarted,
    /// It may have run, wholly or in part. Look at its effects before asking again.
    Unknown,
}

/// Why a command, an upload or a tunnel failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SshError {
    /// Nothing could carry it as it is.
    #[error("`{program}` cannot be sent: {why}")]
    Invalid {
        /// The program.
        program: String,
        /// What is wrong with it.
        why: String,
    },
    /// The settings or the ssh configuration cannot be used.
    #[error("the ssh settings for {host} cannot be used: {why}")]
    Settings {
        /// The host as it was named to us.
        host: String,
        /// What is wrong.
        why: String,
    },
    /// A person has to act before it can work.
    #[error("no connection to {host}: {why}; {hint}")]
    Refused {
        /// The host as it was named to us.
        host: String,
        /// What happened.
        why: String,
        /// What to do.
        hint: String,
    },
    /// The command was still waiting to be started when its deadline came.
    #[error("`{program}` was not started on {host} within {after:?}: {why}")]
    NotStarted {
        /// The program.
        program: String,
        /// The host as it was named to us.
        host: String,
        /// The deadline.
        after: Duration,
        /// What it was waiting for.
        why: String,
    },
    /// The login shell of the account did not run what it was given.
    #[error("the login shell on {host} does not run commands, it said: {said}")]
    Shell {
        /// The host as it was named to us.
        host: String,
        /// What came instead.
        said: String,
    },
    /// It was started and did not end in time. It was told to end; whether it did is not known.
    #[error("`{program}` on {host} did not end within {after:?}; its outcome is unknown, look before trying again")]
    Deadline {
        /// The program.
        program: String,
        /// The host as it was named to us.
        host: String,
        /// The deadline.
        after: Duration,
    },
    /// The connection went away under it.
    #[error(
        "the connection to {host} was lost while `{program}` ran ({why}); its outcome is unknown, look before trying again"
    )]
    UnknownOutcome {
        /// The program.
        program: String,
        /// The host as it was named to us.
        host: String,
        /// What happened to the connection.
        why: String,
    },
    /// It said more than it may.
    #[error("`{program}` on {host} said more than {limit} bytes and was stopped")]
    TooMuchOutput {
        /// The program.
        program: String,
        /// The host as it was named to us.
        host: String,
        /// Most bytes that it may say.
        limit: usize,
    },
    /// A program of this host could not be started.
    #[error("cannot start `{program}` on this host: {why}")]
    Spawn {
        /// The program.
        program: String,
        /// What the system said.
        why: String,
    },
    /// The site forbids forwarding and no other way was set.
    #[error("{host} forbids forwarding of ports; {hint}")]
    ForwardingRefused {
        /// The host as it was named to us.
        host: String,
        /// What to do.
        hint: String,
    },
    /// The far end of a tunnel cannot be reached from the host.
    #[error("{host} cannot connect to {to}: {why}")]
    Tunnel {
        /// The host as it was named to us.
        host: String,
        /// Where the tunnel should end.
        to: SocketAddr,
        /// What the host said.
        why: String,
    },
    /// A file was not placed. Nothing of it is left at its path.
    #[error("{path} was not placed: {why}")]
    Upload {
        /// The path on the host.
        path: String,
        /// What happened, and what to do about it.
        why: String,
    },
}

impl SshError {
    /// Whether what was asked for may have happened.
    pub fn outcome(&self) -> Outcome {
        match self {
            Self::Invalid { .. }
            | Self::Settings { .. }
            | Self::Refused { .. }
            | Self::NotStarted { .. }
            | Self::Shell { .. }
            | Self::Spawn { .. }
            | Self::ForwardingRefused { .. }
            | Self::Tunnel { .. } => Outcome::NotStarted,
            Self::Deadline { .. } | Self::UnknownOutcome { .. } | Self::TooMuchOutput { .. } | Self::Upload { .. } => {
                Outcome::Unknown
            }
        }
    }
}
