//! Judges a URL before anything is sent: its scheme, its port, and whether its host can lie on the public internet. Names are
//! judged again by the addresses they lead to, in [`super::resolve`].

use std::net::IpAddr;

use url::{Host, Url};

use super::address::forbidden;
use super::error::FetchError;

/// Longer ones are attacks or accidents.
const MAX_URL: usize = 8 * 1024;

/// Ends of names that only mean something inside a network, whatever a resolver makes of them.
const LOCAL_ENDS: &[&str] = &[
    "localhost",
    "local",
    "localdomain",
    "internal",
    "intranet",
    "private",
    "corp",
    "home",
    "lan",
    "svc",
    "arpa",
    "onion",
    "metadata.goog",
];

/// A host and port that may be fetched although they lie inside a network. The operator lists them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Allowed {
    host: String,
    /// None: every port.
    port: Option<u16>,
}

/// An entry of the list cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no host and port, such as docs.example.lan:8080 or 127.0.0.1:8080")]
pub struct BadEntry(pub String);

/// What the guard lets pass.
#[derive(Debug, Clone, Default)]
pub struct Guard {
    allowed: Vec<Allowed>,
}

/// How far a vetted URL is trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// It has to lead to the public internet; its name is still to be judged by its addresses.
    Public,
    /// The operator listed it.
    Listed,
}

/// A URL that may be asked for, and on what terms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vetted {
    url: Url,
    trust: Trust,
}

impl Vetted {
    /// The URL as it is sent: normalised, without a fragment.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// On what terms.
    pub fn trust(&self) -> Trust {
        self.trust
    }

    /// The host as people write it.
    pub fn host(&self) -> &str {
        self.url.host_str().unwrap_or_default()
    }

    /// Scheme, host and port: what one robots.txt speaks for.
    pub fn origin(&self) -> String {
        self.url.origin().ascii_serialization()
    }
}

impl Guard {
    /// A guard that lets these hosts pass although they are not public: `host`, `host:port` or `[v6]:port`.
    pub fn allowing<S: AsRef<str>>(entries: &[S]) -> Result<Self, BadEntry> {
        let read = |entry: &S| -> Option<Allowed> {
            let entry = entry.as_ref().trim();
            // Read as the web reads it, so that 127.1 in the list is the 127.0.0.1 of a URL.
            let url = Url::parse(&format!("http://{entry}/")).ok()?;
            let bare =
                url.path() == "/" && url.query().is_none() && url.username().is_empty() && url.password().is_none();
            let (_, after) = entry.rsplit_once(']').unwrap_or(("", entry));
            let port = match after.rsplit_once(':') {
                Some((_, port)) => Some(port.parse().ok().filter(|port| *port != 0)?),
                None => None,
            };
            (bare && !entry.contains('/')).then(|| Some(Allowed { host: host_of(&url)?, port }))?
        };
        let allowed: Result<Vec<_>, _> =
            entries.iter().map(|entry| read(entry).ok_or_else(|| BadEntry(entry.as_ref().to_owned()))).collect();
        Ok(Self { allowed: allowed? })
    }

    /// Judges what somebody wrote.
    pub fn vet(&self, text: &str) -> Result<Vetted, FetchError> {
        let url = parse(text, None)?;
        let trust = self.judge(&url)?;
        Ok(Vetted { url, trust })
    }

    /// Judges where a server wants to send us.
    pub fn follow(&self, from: &Vetted, location: &str) -> Result<Vetted, FetchError> {
        let url = parse(location, Some(&from.url))?;
        let trust = self.judge(&url)?;
        if trust == Trust::Listed && from.trust == Trust::Public {
            // Listed for those who ask for it by name; any page of the web could otherwise make us read there.
            return Err(FetchError::LedInside { host: url.host_str().unwrap_or_default().to_owned() });
        }
        Ok(Vetted { url, trust })
    }

    fn judge(&self, url: &Url) -> Result<Trust, FetchError> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(FetchError::Scheme { scheme: url.scheme().to_owned() });
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(FetchError::Credentials);
        }
        let unknown = || FetchError::NotAUrl { text: shortened(url.as_str()), why: "it has no host".to_owned() };
        let port = url.port_or_known_default().ok_or_else(unknown)?;
        let host = host_of(url).ok_or_else(unknown)?;
        if self.allowed.iter().any(|entry| entry.host == host && entry.port.is_none_or(|only| only == port)) {
            return Ok(Trust::Listed);
        }
        if port == 0 || (port < 1024 && port != 80 && port != 443) {
            return Err(FetchError::Port { port });
        }
        let literal = match url.host() {
            Some(Host::Ipv4(addr)) => Some(IpAddr::V4(addr)),
            Some(Host::Ipv6(addr)) => Some(IpAddr::V6(addr)),
            // What the URL's reader takes for a name, and the connector for an address, never reaches the resolver.
            Some(Host::Domain(_)) => host.parse().ok(),
            None => None,
        };
        match literal {
            Some(addr) => match forbidden(addr) {
                Some(why) => Err(FetchError::Address { host, addr, why }),
                None => Ok(Trust::Public),
            },
            None if is_local(&host) => Err(FetchError::LocalName { host }),
            None => Ok(Trust::Public),
        }
    }
}

/// The host in lower case, without the dots that a full name may end with.
fn host_of(url: &Url) -> Option<String> {
    let host = url.host_str()?.to_ascii_lowercase();
    let host = host.trim_end_matches('.');
    (!host.is_empty()).then(|| host.to_owned())
}

fn is_local(host: &str) -> bool {
    // A name of one word is completed by the search list of whoever resolves it.
    !host.contains('.')
        || LOCAL_ENDS
            .iter()
            .any(|end| host.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')))
}

fn parse(text: &str, base: Option<&Url>) -> Result<Url, FetchError> {
    let wrong = |why: String| FetchError::NotAUrl { text: shortened(text), why };
    if text.len() > MAX_URL {
        return Err(wrong(format!("it has {} bytes, more than {MAX_URL}", text.len())));
    }
    let parsed = match base {
        Some(base) => base.join(text),
        None => Url::parse(text),
    };
    let mut url = parsed.map_err(|error| wrong(error.to_string()))?;
    if url.as_str().len() > MAX_URL {
        return Err(wrong(format!("written out it has more than {MAX_URL} bytes")));
    }
    url.set_fragment(None);
    Ok(url)
}

/// The beginning of a text that somebody else wrote, for a message.
fn shortened(text: &str) -> String {
    const MOST: usize = 120;
    if text.chars().count() <= MOST { text.to_owned() } else { text.chars().take(MOST).chain(['…']).collect() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn judged(text: &str) -> Result<Trust, &'static str> {
        Guard::default().vet(text).map(|vetted| vetted.trust()).map_err(|error| error.code())
    }

    #[test]
    fn what_is_public_passes_and_the_rest_says_why_not() {
        for text in [
            "http://example.org",
            "https://example.org:8443/a?b=c#d",
            "http://8.8.8.8/",
            "https://[2606:4700::1]/",
            "HTTP://EXAMPLE.ORG/",
            "https://пример.рф/",
        ] {
            assert_eq!(judged(text), Ok(Trust::Public), "{text}");
        }
        let wrong = [
            ("", "not_a_url"),
            ("example.org", "not_a_url"),
            ("http://", "not_a_url"),
            ("http://a b/", "not_a_url"),
            ("http://256.256.256.256/", "not_a_url"),
            ("http://[fe80::1%25eth0]/", "not_a_url"),
            ("file:///etc/passwd", "scheme"),
            ("ftp://example.org/", "scheme"),
            ("gopher://example.org/", "scheme"),
            ("javascript:alert(1)", "scheme"),
            ("data:text/html,x", "scheme"),
            ("http://user@example.org/", "credentials"),
            ("http://:secret@example.org/", "credentials"),
            ("http://example.org:22/", "port"),
            ("http://example.org:0/", "port"),
            ("http://intranet/", "local_name"),
            ("http://LOCALHOST./", "local_name"),
            ("http://a.b.localhost/", "local_name"),
            ("http://metadata.google.internal/computeMetadata/v1/", "local_name"),
            ("http://kubernetes.default.svc/", "local_name"),
            ("http://127.0.0.1/", "private_address"),
            ("http://[::1]/", "private_address"),
        ];
        for (text, code) in wrong {
            assert_eq!(judged(text), Err(code), "{text}");
        }
        let long = format!("http://example.org/{}", "x".repeat(MAX_URL));
        assert_eq!(judged(&long), Err("not_a_url"));
        let spelt_out = format!("http://example.org/{}", "é".repeat(MAX_URL / 3));
        assert_eq!(judged(&spelt_out), Err("not_a_url"));
    }

    #[test]
    fn what_is_listed_passes_on_its_port_and_only_there() {
        let guard = Guard::allowing(&["127.1:8080", "[::1]:9", "wiki.lan", " Docs.Internal:80 "]).unwrap();
        for text in [
            "http://127.0.0.1:8080/x",
            "http://[::1]:9/",
            "http://wiki.lan:22/",
            "https://wiki.lan./",
            "http://docs.internal/",
        ] {
            assert_eq!(guard.vet(text).map(|vetted| vetted.trust()), Ok(Trust::Listed), "{text}");
        }
        for text in [
            "http://127.0.0.1:8081/",
            "http://127.0.0.2:8080/",
            "http://[::1]/",
            "http://x.wiki.lan/",
            "https://docs.internal/",
        ] {
            assert!(guard.vet(text).is_err_and(|error| error.is_refusal()), "{text}");
        }
        for bad in ["", "http://x", "x/y", "x:0", "x:99999", "x:", "a@x", "a b", "x?y"] {
            assert!(Guard::allowing(&[bad]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_redirect_is_judged_like_a_url_and_never_leads_from_outside_inside() {
        let guard = Guard::allowing(&["127.0.0.1:8080"]).unwrap();
        let outside = guard.vet("https://example.org/a/b").unwrap();
        let inside = guard.vet("http://127.0.0.1:8080/").unwrap();
        assert_eq!(guard.follow(&outside, "../c#x").unwrap().url().as_str(), "https://example.org/c");
        assert_eq!(guard.follow(&outside, "//example.com/").unwrap().url().as_str(), "https://example.com/");
        assert_eq!(guard.follow(&inside, "/next").unwrap().trust(), Trust::Listed);
        for location in ["http://127.0.0.1:8080/", "//127.0.0.1/", "http://[::1]/", "file:///x", "http://localhost/"] {
            assert!(guard.follow(&outside, location).is_err_and(|error| error.is_refusal()), "{location}");
        }
    }

    /// Ways to write the same IPv4 address that readers of URLs understand.
    fn spelt(addr: u32, way: u8) -> String {
        let [a, b, c, d] = addr.to_be_bytes();
        match way % 8 {
            0 => format!("{a}.{b}.{c}.{d}"),
            1 => addr.to_string(),
            2 => format!("0x{addr:x}"),
            3 => format!("0{addr:o}"),
            4 => format!("{a}.{}", addr & 0x00ff_ffff),
            5 => format!("0x{a:x}.0{b:o}.{}", addr & 0xffff),
            6 => format!("{a}.{b}.{c}.{d}."),
            _ => format!("%{:02x}{}.{b}.{c}.{d}", a.to_string().as_bytes()[0], &a.to_string()[1..]),
        }
    }

    proptest! {
        #[test]
        fn no_spelling_of_an_address_changes_its_verdict(addr: u32, way: u8, near in 0usize..16) {
            // Half of the addresses lie near the private networks, where the borders are.
            let nets = [0x7f00_0001, 0x0a00_0000, 0xc0a8_0101, 0xa9fe_a9fe, 0x6440_0000, 0xac10_0000, 0xe000_0001, 0];
            let addr = nets.get(near).map_or(addr, |net| net ^ (addr & 0xff));
            let verdict = Guard::default().vet(&format!("http://{}/", spelt(addr, way)));
            let expected = forbidden(IpAddr::V4(addr.into()));
            match verdict {
                Ok(vetted) => {
                    prop_assert_eq!(expected, None);
                    prop_assert_eq!(vetted.host().parse::<std::net::Ipv4Addr>().unwrap().to_bits(), addr);
                }
                Err(error) => prop_assert!(expected.is_some() && error.code() == "private_address", "{}", error),
            }
        }

        #[test]
        fn whatever_passes_is_of_the_web_and_no_private_address(text in "\\PC{0,40}", head in "(http|https|ftp|file|HTTP)(://|:/|:|:\\\\\\\\|:///)", tail in "[0-9a-fx.:\\[\\]@%/\\\\?#]{0,30}") {
            for text in [text.clone(), format!("{head}{text}"), format!("{head}{tail}")] {
                let Ok(vetted) = Guard::default().vet(&text) else { continue };
                prop_assert_eq!(vetted.trust(), Trust::Public);
                prop_assert!(matches!(vetted.url().scheme(), "http" | "https"));
                prop_assert!(vetted.url().username().is_empty() && vetted.url().password().is_none());
                let bare = vetted.host().trim_matches(['[', ']']);
                if let Ok(addr) = bare.parse::<IpAddr>() {
                    prop_assert_eq!(forbidden(addr), None);
                }
                prop_assert!(!is_local(bare.trim_end_matches('.')) || bare.contains(':'));
                // What is sent means the same when it is read again.
                let again = Guard::default().vet(vetted.url().as_str());
                prop_assert_eq!(again.as_ref(), Ok(&vetted));
            }
        }
    }
}
