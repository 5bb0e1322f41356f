//! What a task may read of the network: single pages of the public internet, as text.
//!
//! The URLs come from search engines, models and pages, so from strangers. None of them may make this program read inside
//! a private network, drown it, or keep it busy:
//!
//! ```text
//! URL ─ guard ─ robots ─ per-host turn ─ resolver hook ─ connect ─ head ─ body ─ unpack ─ decode ─ readable ─ Page
//!         ^        scheme, port, name, address           |
//!         └──────── every redirect, at most 5 ───────────┘
//! ```
//!
//! A name is looked up once, its addresses are judged, and the connection goes to those: there is no gap in which it could change
//! its mind. No cookies, no keys, no proxy.

mod address;
mod body;
mod client;
mod error;
mod guard;
#[cfg(test)]
mod hostile;
#[cfg(test)]
pub(crate) mod loopback;
mod readable;
mod resolve;
mod robots;
mod scan;

use std::time::Duration;

pub use address::forbidden;
pub use client::{FetchSettings, Fetcher, FetcherError};
pub use error::FetchError;
pub use guard::{BadEntry, Guard, Trust, Vetted};
pub use resolve::{Lookup, SystemLookup};
pub use robots::{AGENT, Robots};

/// A page as a worker sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The URL that was asked for, normalised.
    pub asked: String,
    /// Where it was found in the end.
    pub url: String,
    /// Where it had been moved to, one after another; the last is `url`.
    pub redirects: Vec<String>,
    /// The HTTP status.
    pub status: u16,
    /// As the server names it, without parameters.
    pub content_type: String,
    /// The characters it was written in.
    pub charset: String,
    /// Its title, when it has one.
    pub title: Option<String>,
    /// What a person would read of it, as Markdown or as it stands.
    pub text: String,
    /// Whether an article was found in it; otherwise the text is all of the page's.
    pub article: bool,
    /// SHA-256 of the text, in hexadecimal digits.
    pub sha256: String,
    /// Bytes that came over the network.
    pub bytes: usize,
    /// The page was longer than what is read.
    pub truncated: bool,
    /// How long it took.
    pub elapsed: Duration,
}

/// What a person would read of an HTML page that was found there, as Markdown.
pub fn page_text(html: &str, url: &str) -> String {
    readable::readable(html, url).text
}

/// The hash by which a text is known, in hexadecimal digits.
pub fn sha256(text: &str) -> String {
    use std::fmt::Write as _;
    let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
    digest.as_ref().iter().fold(String::with_capacity(64), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}
