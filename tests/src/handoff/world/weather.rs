//! How bad it is.

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Weather {
    /// Share of messages that are lost, and of those that come twice.
    pub loss: f64,
    /// Comes twice.
    pub twice: f64,
    /// Share of pieces that arrive damaged, and are not noticed on arrival.
    pub damage: f64,
    /// Longest time of a message on its way, in microseconds.
    pub way: u64,
    /// Share of file operations whose outcome nobody learns.
    pub unknown: f64,
    /// Share of file operations that hang for seconds and then happen, whatever has happened meanwhile.
    pub late: f64,
    /// Share of effects before which the process is killed.
    pub kill: f64,
}

impl Weather {
    /// Nothing goes wrong.
    pub const FAIR: Self = Self { loss: 0.0, twice: 0.0, damage: 0.0, way: 2_000, unknown: 0.0, late: 0.0, kill: 0.0 };
}

/// What is done to whoever performs the effect of a certain number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Killed before it performs it; back after two seconds.
    Kill,
    /// Killed, and back after a minute.
    KillForLong,
    /// Stopped for a minute.
    Stop,
    /// Cut off from all others for ten seconds.
    Cut,
    /// What others send does not reach it for ten seconds.
    Deaf,
    /// Does not reach the shared file system for ten seconds.
    NoFiles,
    /// Everybody takes it for gone for ten seconds.
    Slander,
}

impl Fault {
    /// Every one.
    pub const ALL: [Self; 7] =
        [Self::Kill, Self::KillForLong, Self::Stop, Self::Cut, Self::Deaf, Self::NoFiles, Self::Slander];
}
