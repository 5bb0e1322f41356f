//! What all engines share: one request, an answer in JSON of bounded size, and errors without secrets.

use std::error::Error as _;
use std::time::Duration;

use reqwest::{Client, RequestBuilder, Url};
use serde::de::DeserializeOwned;

use super::{SearchError, SetupError};
use crate::provider::Secret;

/// No honest answer is longer.
const MOST_BYTES: usize = 4 << 20;
/// So much of an engine's complaint is repeated.
const MOST_SAID: usize = 200;

/// An address that paths are put behind.
pub(super) fn base(text: &str) -> Result<Url, SetupError> {
    let wrong = |why: String| SetupError::BadBase { url: text.to_owned(), why };
    let mut url = Url::parse(text).map_err(|error| wrong(error.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(wrong("it begins with neither http:// nor https://".to_owned()));
    }
    if !url.path().ends_with('/') {
        let path = format!("{}/", url.path());
        url.set_path(&path);
    }
    Ok(url)
}

/// The client of an engine. Its address was written by the operator, so it may lie anywhere, and the system's proxy is used.
pub(super) fn client() -> Result<Client, reqwest::Error> {
    drover_service::web::client()
        .user_agent(concat!("drover/", env!("CARGO_PKG_VERSION")))
        // A key goes to the host it is for and nowhere else.
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .connect_timeout(Duration::from_secs(5))
        .build()
}

/// Sends a request and reads its answer.
pub(super) async fn ask<T: DeserializeOwned>(
    engine: &'static str,
    request: RequestBuilder,
    key: Option<&Secret>,
    limit: Duration,
) -> Result<T, SearchError> {
    let unreachable = |error: &reqwest::Error| {
        // The innermost reason; the layers above repeat the address, and addresses may carry secrets.
        let mut why: &dyn std::error::Error = error;
        while let Some(cause) = why.source() {
            why = cause;
        }
        let why = if error.source().is_none() { "the connection failed".to_owned() } else { why.to_string() };
        SearchError::Unreachable { engine, why }
    };
    let exchange = async {
        let mut answer = request.send().await.map_err(|error| unreachable(&error))?;
        let status = answer.status().as_u16();
        let wait = answer.headers().get("retry-after").and_then(|value| value.to_str().ok()?.trim().parse().ok());
        let mut body = Vec::new();
        while let Some(piece) = answer.chunk().await.map_err(|error| unreachable(&error))? {
            if body.len() + piece.len() > MOST_BYTES {
                let why = format!("it has more than {MOST_BYTES} bytes");
                return Err(SearchError::Unreadable { engine, why });
            }
            body.extend_from_slice(&piece);
        }
        match status {
            200..=299 => serde_json::from_slice(&body)
                .map_err(|error| SearchError::Unreadable { engine, why: error.to_string() }),
            401 | 403 => Err(SearchError::Key { engine, status }),
            429 => Err(SearchError::Limited { engine, retry_after: wait.map(Duration::from_secs) }),
            status => Err(SearchError::Refused { engine, status, said: said(&body, key) }),
        }
    };
    match tokio::time::timeout(limit, exchange).await {
        Ok(result) => result,
        Err(_) => Err(SearchError::Timeout { engine, limit }),
    }
}

/// The beginning of a complaint, in one line. Some engines repeat the key in it.
fn said(body: &[u8], key: Option<&Secret>) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(16 * MOST_SAID)]).into_owned();
    let text = key.map_or(text.clone(), |key| key.scrub(&text));
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().filter(|letter| !letter.is_control()).take(MOST_SAID).collect()
}
