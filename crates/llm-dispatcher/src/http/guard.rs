//! Who may use the front: programs of this user that know the token, and no web page that a browser has open.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::Response;
use thiserror::Error;

use super::error::Refusal;
use crate::provider::{KeyError, Secret, read_key_file};

/// Name of the file with the token, in the directory of the dispatcher.
const TOKEN_FILE: &str = "token";

/// What lets a request in.
#[derive(Debug)]
pub(crate) struct Access {
    token: Secret,
    /// Names, beside those of this machine, that the front may be called by.
    hosts: Vec<String>,
    /// Web pages that may use it.
    origins: Vec<String>,
}

impl Access {
    /// Only programs on this machine that know the token.
    pub(crate) fn new(token: Secret) -> Self {
        Self { token, hosts: Vec::new(), origins: Vec::new() }
    }

    /// A page that was made to look local by its name service still sends its own name; and a page sends where it is from.
    fn check_place(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), Refusal> {
        let host =
            headers.get(header::HOST).and_then(|value| value.to_str().ok()).or_else(|| Some(uri.authority()?.as_str()));
        if !self.is_place(host.unwrap_or_default()) {
            return Err(Refusal::new(
                StatusCode::FORBIDDEN,
                "forbidden_host",
                "the dispatcher is not called by this name: use 127.0.0.1 or localhost",
            ));
        }
        for origin in headers.get_all(header::ORIGIN) {
            let known = origin.to_str().is_ok_and(|origin| self.origins.iter().any(|known| known == origin));
            if !known {
                return Err(Refusal::new(
                    StatusCode::FORBIDDEN,
                    "forbidden_origin",
                    "web pages may not use the dispatcher",
                ));
            }
        }
        Ok(())
    }

    /// The front may be called by this name.
    pub(super) fn is_place(&self, host: &str) -> bool {
        let name = name_of(host);
        is_local(&name) || self.hosts.contains(&name)
    }

    /// What stands in `authorization` is the token.
    pub(super) fn is_token(&self, authorization: &str) -> bool {
        let given = authorization.strip_prefix("Bearer ").or_else(|| authorization.strip_prefix("bearer "));
        given.is_some_and(|given| self.token.is(given.trim()))
    }

    fn knows_token(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        if given.is_some_and(|given| self.is_token(given)) {
            return Ok(());
        }
        Err(Refusal::new(
            StatusCode::UNAUTHORIZED,
            "invalid_api_key",
            "the bearer token is missing or wrong: it is in dispatcher/token of the state directory",
        ))
    }
}

/// The name in a `host` header, without its port, in lower case.
fn name_of(host: &str) -> String {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.trim_end_matches('.').to_ascii_lowercase()
}

fn is_local(name: &str) -> bool {
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Lets requests through that come from this machine.
pub(super) async fn from_here(
    State(access): State<Arc<Access>>,
    request: Request,
    next: Next,
) -> Result<Response, Refusal> {
    access.check_place(request.uri(), request.headers())?;
    Ok(next.run(request).await)
}

/// Lets requests through that come from this machine and know the token.
pub(super) async fn authorized(
    State(access): State<Arc<Access>>,
    request: Request,
    next: Next,
) -> Result<Response, Refusal> {
    access.check_place(request.uri(), request.headers())?;
    access.knows_token(request.headers())?;
    Ok(next.run(request).await)
}

/// Why there is no token.
#[derive(Debug, Error)]
pub(crate) enum TokenError {
    /// The file is there and no use.
    #[error(transparent)]
    Read(#[from] KeyError),
    /// It cannot be written.
    #[error("cannot write the token file {}", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// The token of this state directory; the first start makes it.
pub(crate) fn load_or_make_token(dir: &Path) -> Result<Secret, TokenError> {
    let path = dir.join(TOKEN_FILE);
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
        Ok(mut file) => {
            let token: [u8; 32] = rand::random();
            let mut text = String::new();
            for byte in token {
                let _ = write!(text, "{byte:02x}");
            }
            text.push('\n');
            let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
            written.map_err(|source| TokenError::Write { path: path.clone(), source })?;
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
        Err(source) => return Err(TokenError::Write { path, source }),
    }
    Ok(read_key_file(&path)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn only_names_of_this_machine_are_local() {
        for host in ["localhost", "LOCALHOST:7955", "127.0.0.1:80", "127.9.9.9", "[::1]:7955", "localhost."] {
            assert!(is_local(&name_of(host)), "{host}");
        }
        for host in ["", "evil.example", "localhost.evil.example:7955", "10.0.0.1", "[::ffff:1.2.3.4]", "0.0.0.0:1"] {
            assert!(!is_local(&name_of(host)), "{host}");
        }
    }

    #[test]
    fn a_token_is_made_once_for_its_owner_only_and_not_trusted_when_others_could_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let token = load_or_make_token(dir.path()).unwrap();
        assert_eq!(load_or_make_token(dir.path()).unwrap(), token);
        let path = dir.path().join(TOKEN_FILE);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_to_string(&path).unwrap().trim().len(), 64);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let error = load_or_make_token(dir.path()).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
    }
}
