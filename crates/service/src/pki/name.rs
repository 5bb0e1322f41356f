//! A node id as the two names in its certificate: a URI that says it exactly, and a host name that TLS can ask for.

use std::fmt::Write as _;

use ring::digest::{SHA256, digest};

use super::{PkiError, to_hex};

/// Longest node id in bytes.
pub const MAX_NODE_ID: usize = 128;

const SCHEME: &str = "drover:node:";

/// Refuses what cannot name a node.
pub(super) fn check(node_id: &str) -> Result<(), PkiError> {
    if node_id.is_empty() || node_id.len() > MAX_NODE_ID || node_id.chars().any(char::is_control) {
        return Err(PkiError::Name(node_id.chars().take(MAX_NODE_ID).collect()));
    }
    Ok(())
}

/// `drover:node:` and the node id, percent-encoded.
pub(super) fn uri(node_id: &str) -> String {
    node_id.bytes().fold(SCHEME.to_owned(), |mut text, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
        text
    })
}

/// The node id of such a URI. Only the form that [`uri`] writes is taken, so that one node has one name.
pub(super) fn node_id_of(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text.strip_prefix(SCHEME)?.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
                (digit(rest.next())? << 4 | digit(rest.next())?) as u8
            }
            other => other,
        });
    }
    let node_id = String::from_utf8(bytes).ok()?;
    (check(&node_id).is_ok() && uri(&node_id) == text).then_some(node_id)
}

/// The host name that TLS asks for: the first 8 bytes of SHA-256 of the node id.
pub fn node_domain(node_id: &str) -> String {
    let hash = digest(&SHA256, node_id.as_bytes());
    format!("{}.node.drover", to_hex(hash.as_ref().get(..8).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_id_survives_its_uri_and_has_only_one() {
        for node_id in ["sw-1/3", "a", "näme mit % und #", "..", "%2F", &"x".repeat(MAX_NODE_ID)] {
            assert_eq!(node_id_of(&uri(node_id)).as_deref(), Some(node_id));
        }
        for odd in
            ["drover:node:", "drover:node:a%2Fb", "drover:node:a%2", "drover:node:%ff", "node:a", "drover:node:a%0A"]
        {
            assert_eq!(node_id_of(odd), None, "{odd}");
        }
        assert!(check("a\nb").is_err() && check("").is_err() && check(&"x".repeat(MAX_NODE_ID + 1)).is_err());
        assert_eq!(node_domain("sw-1/3").len(), 16 + ".node.drover".len());
    }
}
