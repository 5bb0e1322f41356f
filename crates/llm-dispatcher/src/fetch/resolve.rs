//! Looks names up once and lets the connection go only to the addresses that were judged. A name that changes its mind between
//! a check and a connection finds no gap to do so in.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use async_trait::async_trait;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use super::address::forbidden;
use super::error::FetchError;

/// Who knows the addresses of names.
#[async_trait]
pub trait Lookup: Send + Sync + 'static {
    /// All addresses of a name.
    async fn addresses(&self, host: &str) -> io::Result<Vec<IpAddr>>;
}

/// The system's resolver.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemLookup;

#[async_trait]
impl Lookup for SystemLookup {
    async fn addresses(&self, host: &str) -> io::Result<Vec<IpAddr>> {
        Ok(tokio::net::lookup_host((host, 0)).await?.map(|addr| addr.ip()).collect())
    }
}

/// The hook of the HTTP client.
#[derive(Clone)]
pub(super) struct GuardedResolver {
    pub(super) lookup: Arc<dyn Lookup>,
    /// Not for hosts that the operator listed.
    pub(super) public_only: bool,
}

impl GuardedResolver {
    async fn vetted(&self, host: &str) -> Result<Vec<IpAddr>, FetchError> {
        let unresolved = |why: String| FetchError::Resolve { host: host.to_owned(), why };
        let found = self.lookup.addresses(host).await.map_err(|error| unresolved(error.to_string()))?;
        if found.is_empty() {
            return Err(unresolved("the answer is empty".to_owned()));
        }
        if self.public_only {
            // One address inside is enough to refuse all: honest sites do not mix them.
            for &addr in &found {
                if let Some(why) = forbidden(addr) {
                    return Err(FetchError::Address { host: host.to_owned(), addr, why });
                }
            }
        }
        Ok(found)
    }
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let resolver = self.clone();
        Box::pin(async move {
            let found = resolver.vetted(name.as_str()).await?;
            let addrs: Addrs = Box::new(found.into_iter().map(|addr| SocketAddr::new(addr, 0)));
            Ok(addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Answers each look-up with the next of its answers.
    struct Fickle(Mutex<Vec<Vec<IpAddr>>>);

    #[async_trait]
    impl Lookup for Fickle {
        async fn addresses(&self, _host: &str) -> io::Result<Vec<IpAddr>> {
            self.0.lock().unwrap().pop().ok_or_else(|| io::Error::other("no more answers"))
        }
    }

    fn resolver(answers: &[&[&str]], public_only: bool) -> GuardedResolver {
        let parsed = |answer: &&[&str]| answer.iter().map(|addr| addr.parse().unwrap()).collect();
        GuardedResolver {
            lookup: Arc::new(Fickle(Mutex::new(answers.iter().rev().map(parsed).collect()))),
            public_only,
        }
    }

    async fn resolve(resolver: &GuardedResolver) -> Result<Vec<String>, String> {
        let found = resolver.resolve("site.example.org".parse().unwrap()).await.map_err(|error| error.to_string())?;
        Ok(found.map(|addr| addr.to_string()).collect())
    }

    #[tokio::test]
    async fn only_what_was_judged_is_connected_to_however_often_the_name_changes_its_mind() {
        let fickle = resolver(&[&["8.8.8.8"], &["127.0.0.1"], &["8.8.4.4", "10.0.0.1"], &["::1"], &[]], true);
        assert_eq!(resolve(&fickle).await, Ok(vec!["8.8.8.8:0".to_owned()]));
        for part in ["127.0.0.1", "10.0.0.1", "::1", "empty", "no more"] {
            let error = resolve(&fickle).await.unwrap_err();
            assert!(error.contains("site.example.org") && error.contains(part), "{error}");
        }
        let listed = resolver(&[&["127.0.0.1"]], false);
        assert_eq!(resolve(&listed).await, Ok(vec!["127.0.0.1:0".to_owned()]));
    }
}
