//! Those who answer calls: the wire formats of four families of providers, and `sim`, which only pretends.
//!
//! One call is made once in here. Whether, when and where it is made again is the core's to say; a provider only tells, in
//! [`CallError`](crate::call::CallError), all that is needed for that.
//!
//! ```text
//! gemini  openai (groq, compatible)  anthropic      bodies and answers of each family
//!       transport  failure  stream  hints           a request, an error, a stream of events, what was said of limits
//!       http  wire  proxy  sse                      connections, bytes
//! sim                                               no network at all
//! ```
#![expect(
    clippy::result_large_err,
    reason = "an error carries all that was said of limits, and is made once in a call"
)]

mod anthropic;
mod endpoint;
mod failure;
mod gemini;
mod hints;
mod http;
mod keys;
mod openai;
mod prices;
mod proxy;
mod sim;
mod sse;
mod stream;
mod structured;
mod transport;
mod wire;

#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use endpoint::{Endpoint, EndpointError, MaxTokensField, ProviderKind};
pub use http::{HttpClient, HttpSettings, Origin};
pub use keys::{KeyError, KeySource, Secret, read_key_file};
pub use prices::{Listed, PriceError, Prices, per_million};
pub use sim::{LABEL, Responder, Sim, SimSettings};
pub use sse::{SseDecoder, SseError, SseEvent};
pub use structured::{OutputSchema, SchemaError};
pub use wire::read_answer;

use crate::call::Provider;
use transport::Transport;

/// Makes the provider of an endpoint, with its key read. For `sim` see [`Sim`]. `variables` is the environment.
pub fn build(
    endpoint: &Endpoint,
    http: &HttpClient,
    variables: impl Fn(&str) -> Option<String>,
) -> Result<Arc<dyn Provider>, EndpointError> {
    let transport = Transport::new(endpoint, http, variables)?;
    Ok(match endpoint.kind {
        ProviderKind::Gemini => Arc::new(gemini::Gemini::new(transport, endpoint)),
        ProviderKind::Anthropic => Arc::new(anthropic::Anthropic::new(transport, endpoint)?),
        ProviderKind::OpenAi | ProviderKind::Groq | ProviderKind::Compatible => {
            Arc::new(openai::OpenAi::new(transport, endpoint))
        }
        ProviderKind::Sim => Arc::new(Sim::new(SimSettings::default())),
    })
}
