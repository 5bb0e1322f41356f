//! What a process draws at random once, when it starts.

use std::fmt;

use ring::rand::{SecureRandom, SystemRandom};
use x25519_dalek::{PublicKey, StaticSecret};

/// Fresh with every start, never stored. That is what makes a counter that begins at one safe as a nonce.
#[derive(Clone)]
pub struct BootSecrets {
    pub(super) dh: StaticSecret,
    pub(super) salt: [u8; 16],
    pub(super) cookie: [u8; 32],
    pub(super) spread: [u8; 16],
}

impl BootSecrets {
    /// From the system's random numbers; `None` when it has none.
    pub fn generate() -> Option<Self> {
        let mut bytes = [0; 96];
        SystemRandom::new().fill(&mut bytes).ok()?;
        Some(Self::from_entropy(bytes))
    }

    /// From bytes that must be random and used for nothing else; for tests, chosen ones.
    pub fn from_entropy(bytes: [u8; 96]) -> Self {
        let part = |at: usize| {
            let mut part = [0; 16];
            part.copy_from_slice(&bytes[at..at + 16]);
            part
        };
        let long = |at: usize| {
            let mut long = [0; 32];
            long.copy_from_slice(&bytes[at..at + 32]);
            long
        };
        Self { dh: StaticSecret::from(long(0)), salt: part(32), cookie: long(48), spread: part(80) }
    }

    /// What goes into the node's record.
    pub fn dh_public(&self) -> [u8; 32] {
        PublicKey::from(&self.dh).to_bytes()
    }
}

impl fmt::Debug for BootSecrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BootSecrets")
    }
}
