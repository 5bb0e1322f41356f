//! What is configured of a provider: which wire format, where, and with which key.

use std::fmt;
use std::path::PathBuf;

use thiserror::Error;

use super::http::Origin;
use super::keys::{KeyError, KeySource};

/// Which wire format is spoken, and with whose habits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProviderKind {
    /// Google Gemini.
    Gemini,
    /// Groq: the format of `OpenAi` with a path and habits of its own.
    Groq,
    /// `OpenAI`.
    OpenAi,
    /// Anthropic.
    Anthropic,
    /// Any server that speaks as `OpenAi` does: vLLM, Ollama, llama.cpp and others.
    Compatible,
    /// Built in; answers are made up.
    Sim,
}

impl ProviderKind {
    /// The kind that a name in the configuration stands for. A name that is not known here is a compatible server's.
    pub fn from_name(name: &str) -> Self {
        match name {
            "gemini" => Self::Gemini,
            "groq" => Self::Groq,
            "openai" => Self::OpenAi,
            "anthropic" => Self::Anthropic,
            "sim" => Self::Sim,
            _ => Self::Compatible,
        }
    }

    /// The variable that its key is looked for in.
    pub fn key_variable(self) -> Option<&'static str> {
        match self {
            Self::Gemini => Some("GEMINI_API_KEY"),
            Self::Groq => Some("GROQ_API_KEY"),
            Self::OpenAi => Some("OPENAI_API_KEY"),
            Self::Anthropic => Some("ANTHROPIC_API_KEY"),
            Self::Compatible | Self::Sim => None,
        }
    }

    fn default_base(self) -> Option<&'static str> {
        match self {
            Self::Gemini => Some("https://generativelanguage.googleapis.com"),
            Self::Groq => Some("https://api.groq.com"),
            Self::OpenAi => Some("https://api.openai.com/v1"),
            Self::Anthropic => Some("https://api.anthropic.com"),
            Self::Compatible | Self::Sim => None,
        }
    }
}

/// What the bound on the answer is called in requests of the `OpenAi` family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MaxTokensField {
    /// `max_tokens`, which every compatible server knows.
    MaxTokens,
    /// `max_completion_tokens`, which newer models insist on.
    MaxCompletionTokens,
}

/// A provider as configured.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Its name in configuration and results.
    pub name: String,
    /// Its wire format.
    pub kind: ProviderKind,
    /// Where it is; unset: the provider's own address.
    pub base_url: Option<String>,
    /// Its key.
    pub key: KeySource,
    /// Version of the interface: `v1beta` or `v1` for Gemini, a date for Anthropic. Unset: the one that knows most.
    pub api_version: Option<String>,
    /// Name of the bound on the answer; unset: the habit of the kind.
    pub max_tokens_field: Option<MaxTokensField>,
    /// Largest answer that is taken.
    pub max_answer_bytes: usize,
}

impl Endpoint {
    /// The provider of this name with nothing but defaults: its usual address, key variable and key file in `key_dir`.
    pub fn named(name: &str, key_dir: Option<PathBuf>) -> Self {
        let kind = ProviderKind::from_name(name);
        let file = key_dir.map(|dir| dir.join(format!("{name}-key.txt")));
        let key = match kind.key_variable() {
            Some(variable) => KeySource::Env { variable: variable.to_owned(), file },
            None => KeySource::None,
        };
        Self {
            name: name.to_owned(),
            kind,
            base_url: None,
            key,
            api_version: None,
            max_tokens_field: None,
            max_answer_bytes: 32 << 20,
        }
    }

    /// Where it is, taken apart: origin, and path without a slash at its end.
    pub fn address(&self) -> Result<(Origin, String), EndpointError> {
        let url = self.base_url.as_deref().or(self.kind.default_base());
        let url = url.ok_or_else(|| EndpointError::NoAddress { name: self.name.clone() })?;
        parse(url).ok_or_else(|| EndpointError::Address { name: self.name.clone() })
    }
}

fn parse(url: &str) -> Option<(Origin, String)> {
    let uri: http::Uri = url.trim().parse().ok()?;
    let tls = match uri.scheme_str()? {
        "https" => true,
        "http" => false,
        _ => return None,
    };
    // A key in the address would be shown with it.
    if uri.authority()?.as_str().contains('@') || uri.query().is_some() {
        return None;
    }
    let host = uri.host()?.trim_matches(['[', ']']).to_owned();
    let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
    (!host.is_empty()).then(|| (Origin { tls, host, port }, uri.path().trim_end_matches('/').to_owned()))
}

/// Why a provider cannot be used as configured.
#[derive(Debug, Error)]
pub enum EndpointError {
    /// There is no usual address.
    #[error("the provider {name:?} needs a base_url")]
    NoAddress {
        /// Its name.
        name: String,
    },
    /// The address is none.
    #[error(
        "the base_url of the provider {name:?} must be http:// or https:// with a host, and without user, password or query"
    )]
    Address {
        /// Its name.
        name: String,
    },
    /// Its key would travel in the clear.
    #[error("the key of the provider {name:?} would be sent to {host} in the clear: use https")]
    InTheClear {
        /// Its name.
        name: String,
        /// Where to.
        host: String,
    },
    /// The version is none.
    #[error("the api version of the provider {name:?} has characters that no version has")]
    Version {
        /// Its name.
        name: String,
    },
    /// There is no key.
    #[error("the provider {name:?} cannot be used: {source}")]
    Key {
        /// Its name.
        name: String,
        /// Why.
        source: KeyError,
    },
}

impl fmt::Display for ProviderKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gemini => "gemini",
            Self::Groq => "groq",
            Self::OpenAi => "openai",
            Self::Anthropic => "anthropic",
            Self::Compatible => "openai-compatible",
            Self::Sim => "sim",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_taken_apart_or_refused() {
        let (origin, path) = parse("https://api.example.com/openai/v1/").unwrap();
        assert_eq!(
            (origin.tls, origin.host.as_str(), origin.port, path.as_str()),
            (true, "api.example.com", 443, "/openai/v1")
        );
        let (origin, path) = parse("http://[::1]:8080").unwrap();
        assert_eq!((origin.host.as_str(), origin.port, path.as_str()), ("::1", 8080, ""));
        assert_eq!(origin.authority(), "[::1]:8080");
        for url in ["", "api.example.com", "ftp://x/", "https://key@x/", "https://x/?key=1", "http://"] {
            assert!(parse(url).is_none(), "{url}");
        }
    }
}
