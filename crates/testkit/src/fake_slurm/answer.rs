//! What a command answers.

/// Both outputs and the exit status.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) status: u8,
}

impl Answer {
    /// Success.
    pub(crate) fn says(stdout: impl Into<String>) -> Self {
        Self { stdout: stdout.into(), ..Self::default() }
    }

    /// Failure.
    pub(crate) fn fail(status: u8, stderr: impl Into<String>) -> Self {
        Self { stderr: stderr.into(), status, ..Self::default() }
    }

    /// A command line that is not understood.
    pub(crate) fn usage(program: &str, error: &str) -> Self {
        Self::fail(1, format!("{error}\nTry \"{program} --help\" for more information\n"))
    }
}
