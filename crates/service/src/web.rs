//! Clients of what is asked over HTTP, and whom they trust.

use std::sync::OnceLock;

use reqwest::ClientBuilder;
use tracing::warn;

use crate::daemon::install_crypto;

/// A client that trusts whom this machine trusts. One without a list of authorities, as in the barest of containers, trusts nobody:
/// what needs no HTTPS works there all the same.
pub fn client() -> ClientBuilder {
    builder(has_authorities())
}

/// Whether this machine has a list of certificate authorities, without which no HTTPS is possible. Looked at once.
pub fn has_authorities() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        install_crypto();
        let tried = builder(true).build();
        if let Err(error) = &tried {
            let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
            warn!(cause, "no HTTPS is possible: {NO_AUTHORITIES}");
        }
        tried.is_ok()
    })
}

/// What to do about it.
pub const NO_AUTHORITIES: &str = "install ca-certificates, or name a file in SSL_CERT_FILE";

fn builder(has_authorities: bool) -> ClientBuilder {
    if has_authorities { ClientBuilder::new() } else { ClientBuilder::new().tls_certs_only([]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_authorities_has_a_client_all_the_same() {
        client().build().expect("a client of this machine");
        builder(false).build().expect("a client that trusts nobody");
    }
}
