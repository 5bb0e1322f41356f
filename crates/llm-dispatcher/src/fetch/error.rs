//! Why a page was not read, in a form that both a script and a person can act on.

use std::net::IpAddr;
use std::time::Duration;

/// A fetch that came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// It cannot be read as an address of the web.
    #[error("{text:?} is no URL: {why}")]
    NotAUrl { text: String, why: String },
    /// Neither http nor https.
    #[error("only http and https are fetched, not {scheme}")]
    Scheme { scheme: String },
    /// A user name or a password stands in it.
    #[error("the URL carries a user name or a password, and those are never sent")]
    Credentials,
    /// A port on which no web server is to be expected.
    #[error("port {port} is not one that pages are read from")]
    Port { port: u16 },
    /// A name that means something only inside a network.
    #[error("{host} is a name of a local network, not of the public internet")]
    LocalName { host: String },
    /// An address outside the public internet.
    #[error("{} is {why}, not the public internet", led(host, *addr))]
    Address { host: String, addr: IpAddr, why: &'static str },
    /// The public internet leads into a network that only its own pages may be read from.
    #[error("{host} may be fetched, but not because a page of the public internet leads there")]
    LedInside { host: String },
    /// The page was moved too often.
    #[error("moved more than {most} times, last to {url}")]
    Redirects { most: usize, url: String },
    /// The owner of the site does not want it to be read by programs.
    #[error("robots.txt of {origin} does not let programs read this page")]
    Robots { origin: String },
    /// Whether its owner wants that could not be found out.
    #[error("robots.txt of {origin} could not be read, which counts as a no: {why}")]
    RobotsUnknown { origin: String, why: String },
    /// The server answered with something else than the page.
    #[error("the server answered {status}")]
    Status { status: u16 },
    /// Not a kind of document that is read.
    #[error("{content_type} is not a kind of document that is read")]
    ContentType { content_type: String },
    /// Packed in a way that was not asked for.
    #[error("the server packed the page as {encoding}, which was not asked for")]
    Encoding { encoding: String },
    /// The name leads nowhere.
    #[error("{host} has no address: {why}")]
    Resolve { host: String, why: String },
    /// The server could not be reached, or broke off.
    #[error("{host} could not be read: {why}")]
    Transport { host: String, why: String },
    /// It took too long.
    #[error("no {what} within {} s", limit.as_secs())]
    Timeout { what: &'static str, limit: Duration },
    /// The dispatcher, which was to read it, did not; this is what it says.
    #[error("{0}")]
    Elsewhere(String),
    /// Our own part failed.
    #[error("this program could not do its part: {0}")]
    Internal(String),
}

/// An address, and the name that led there if it was one.
fn led(host: &str, addr: IpAddr) -> String {
    let bare = host.trim_matches(['[', ']']);
    if bare.parse() == Ok(addr) { addr.to_string() } else { format!("{host} leads to {addr}, and that") }
}

impl FetchError {
    /// A word for scripts; never renamed.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotAUrl { .. } => "not_a_url",
            Self::Scheme { .. } => "scheme",
            Self::Credentials => "credentials",
            Self::Port { .. } => "port",
            Self::LocalName { .. } => "local_name",
            Self::Address { .. } => "private_address",
            Self::LedInside { .. } => "led_inside",
            Self::Redirects { .. } => "too_many_redirects",
            Self::Robots { .. } => "robots",
            Self::RobotsUnknown { .. } => "robots_unknown",
            Self::Status { .. } => "status",
            Self::ContentType { .. } => "content_type",
            Self::Encoding { .. } => "encoding",
            Self::Resolve { .. } => "no_address",
            Self::Transport { .. } => "transport",
            Self::Timeout { .. } => "timeout",
            Self::Elsewhere(_) => "dispatcher",
            Self::Internal(_) => "internal",
        }
    }

    /// Whether the guard refused it: no attempt of ours went there, and trying again changes nothing.
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::NotAUrl { .. }
                | Self::Scheme { .. }
                | Self::Credentials
                | Self::Port { .. }
                | Self::LocalName { .. }
                | Self::Address { .. }
                | Self::LedInside { .. }
        )
    }

    /// What to do about it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::NotAUrl { .. } | Self::Scheme { .. } => "write it in full, such as https://example.org/page",
            Self::Credentials => "leave them out of the URL; pages behind a login are not fetched",
            Self::Port { .. } => "pages are read from ports 80, 443 and those from 1024 on",
            Self::LocalName { .. } | Self::Address { .. } | Self::LedInside { .. } => {
                "list its host and port in node_scaling.fetch.allow if pages of your own network are to be read"
            }
            Self::Redirects { .. } => "fetch the place it leads to directly",
            Self::Robots { .. } => "respect it: ask the site's owner, or use another source",
            Self::RobotsUnknown { .. } | Self::Transport { .. } | Self::Timeout { .. } => "try again later",
            Self::Status { .. } => "look at the page in a browser; it may be gone or behind a login",
            Self::ContentType { .. } => "HTML, plain text, Markdown, CSV, XML and JSON are read",
            Self::Encoding { .. } => "the server is at fault; use another source",
            Self::Resolve { .. } => "look whether the name is spelt right and this machine can look up names",
            Self::Elsewhere(_) => "`drover fetch` with the URL says more",
            Self::Internal(_) => "this is a fault of ours; the log says more with DROVER_LOG=debug",
        }
    }
}
