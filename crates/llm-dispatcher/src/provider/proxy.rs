//! The proxy of the environment, for machines whose only way out is one: `HTTPS_PROXY` and `NO_PROXY`, as other programs read
//! them. Only requests over TLS go through it, by CONNECT; what is plain is on this machine or beside it.

use std::io;

use thiserror::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::http::Origin;

/// Longest answer of a proxy.
const MAX_HEAD: usize = 8 << 10;

/// Why a proxy is no use.
#[derive(Debug, Error)]
pub(super) enum ProxyError {
    /// The variable does not name a proxy that can be used.
    #[error("HTTPS_PROXY must be http://host:port without a user name, or empty")]
    Unusable,
    /// It cannot be reached.
    #[error("cannot connect to the proxy {0}")]
    Connect(String, #[source] io::Error),
    /// It does not let us through.
    #[error("the proxy {proxy} answers {answer:?}")]
    Refused {
        /// Which.
        proxy: String,
        /// The first line of its answer.
        answer: String,
    },
}

/// Which proxy is used for whom.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Proxy {
    /// Host and port; an error when the variable was set to something else.
    via: Option<Result<(String, u16), ()>>,
    /// Hosts that are reached without it: suffixes of names, or `*`.
    except: Vec<String>,
}

impl Proxy {
    /// Reads the environment.
    pub(super) fn from_env(variables: impl Fn(&str) -> Option<String>) -> Self {
        let either = |name: &str| {
            let upper = name.to_ascii_uppercase();
            variables(name).or_else(|| variables(&upper)).filter(|value| !value.trim().is_empty())
        };
        let via = either("https_proxy").or_else(|| either("all_proxy")).map(|value| parse(value.trim()).ok_or(()));
        let except = either("no_proxy").unwrap_or_default();
        let except = except.split(',').map(|entry| entry.trim().trim_start_matches('.').to_ascii_lowercase());
        Self { via, except: except.filter(|entry| !entry.is_empty()).collect() }
    }

    fn applies(&self, origin: &Origin) -> bool {
        let host = origin.host.to_ascii_lowercase();
        let excepted = |entry: &String| {
            entry == "*" || host == *entry || host.strip_suffix(entry.as_str()).is_some_and(|rest| rest.ends_with('.'))
        };
        let here = host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
        origin.tls && !here && !self.except.iter().any(excepted)
    }

    /// A connection to the origin through the proxy; `None` when it is reached without one.
    pub(super) async fn tunnel(&self, origin: &Origin) -> Result<Option<TcpStream>, ProxyError> {
        let Some(via) = &self.via else { return Ok(None) };
        if !self.applies(origin) {
            return Ok(None);
        }
        let (host, port) = via.as_ref().map_err(|()| ProxyError::Unusable)?;
        let proxy = format!("{host}:{port}");
        let failed = |source| ProxyError::Connect(proxy.clone(), source);
        let mut stream = TcpStream::connect((host.as_str(), *port)).await.map_err(failed)?;
        let target = if origin.host.contains(':') {
            format!("[{}]:{}", origin.host, origin.port)
        } else {
            format!("{}:{}", origin.host, origin.port)
        };
        let request = format!("CONNECT {target} HTTP/1.1\r\nhost: {target}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.map_err(failed)?;
        let mut head = Vec::new();
        // Byte by byte: what follows the head belongs to the origin.
        while !head.ends_with(b"\r\n\r\n") && head.len() < MAX_HEAD {
            head.push(stream.read_u8().await.map_err(failed)?);
        }
        let first = String::from_utf8_lossy(&head).lines().next().unwrap_or_default().chars().take(100).collect();
        let status = head.get(9..12);
        if head.starts_with(b"HTTP/1.") && status == Some(b"200") && head.ends_with(b"\r\n\r\n") {
            Ok(Some(stream))
        } else {
            Err(ProxyError::Refused { proxy, answer: first })
        }
    }
}

fn parse(value: &str) -> Option<(String, u16)> {
    let rest = value.strip_prefix("http://").unwrap_or(value).trim_end_matches('/');
    if rest.contains("://") || rest.contains('@') || rest.contains('/') {
        return None;
    }
    let (host, port) = rest.rsplit_once(':').map_or((rest, Some(80)), |(host, port)| (host, port.parse().ok()));
    let host = host.trim_matches(['[', ']']);
    (!host.is_empty()).then_some((host.to_owned(), port?))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    fn origin(tls: bool, host: &str) -> Origin {
        Origin { tls, host: host.into(), port: 443 }
    }

    fn proxy(variables: &[(&str, &str)]) -> Proxy {
        Proxy::from_env(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn the_environment_says_who_is_reached_through_it() {
        let proxy = proxy(&[("HTTPS_PROXY", "http://proxy.site:3128/"), ("no_proxy", "internal.site, .lab")]);
        assert_eq!(proxy.via, Some(Ok(("proxy.site".into(), 3128))));
        assert!(proxy.applies(&origin(true, "api.example.com")) && proxy.applies(&origin(true, "notinternal.site")));
        for host in ["internal.site", "a.INTERNAL.site", "x.lab", "localhost", "127.0.0.9", "::1"] {
            assert!(!proxy.applies(&origin(true, host)), "{host}");
        }
        assert!(!proxy.applies(&origin(false, "api.example.com")));
        assert_eq!(parse("socks5://p:1"), None);
        assert_eq!(parse("http://user:word@p:1"), None);
        assert_eq!(parse("p:1"), Some(("p".into(), 1)));
    }

    #[tokio::test]
    async fn a_tunnel_is_asked_for_and_a_refusal_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let proxy = proxy(&[("https_proxy", &address)]);
        for (answer, wanted) in
            [("HTTP/1.1 200 Connection established\r\n\r\n", None), ("HTTP/1.1 407 No\r\nx: y\r\n\r\n", Some("407"))]
        {
            let server = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut asked = Vec::new();
                while !asked.ends_with(b"\r\n\r\n") {
                    asked.push(stream.read_u8().await.unwrap());
                }
                stream.write_all(answer.as_bytes()).await.unwrap();
                String::from_utf8(asked).unwrap()
            };
            let api = origin(true, "api.example.com");
            let (asked, tunnel) = tokio::join!(server, proxy.tunnel(&api));
            assert!(asked.starts_with("CONNECT api.example.com:443 HTTP/1.1\r\n"), "{asked}");
            match wanted {
                None => assert!(tunnel.unwrap().is_some()),
                Some(word) => assert!(tunnel.unwrap_err().to_string().contains(word)),
            }
        }
    }
}
