//! How the mock behaves. Everything can be changed while it runs, through `PATCH /__mock/settings`.

use serde::{Deserialize, Serialize};

/// The settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// How long an answer takes, in milliseconds.
    pub latency_ms: f64,
    /// How much longer or shorter it may take, as a share of the latency.
    pub jitter: f64,
    /// Share of calls that are slow.
    pub slow_rate: f64,
    /// How long a slow answer takes, in milliseconds.
    pub slow_ms: f64,
    /// Share of calls that are answered with `error_status`.
    pub error_rate: f64,
    /// Status of an error on purpose.
    pub error_status: u16,
    /// Share of calls whose connection is reset.
    pub reset_rate: f64,
    /// Share of calls that are never answered.
    pub hang_rate: f64,
    /// Share of calls whose answer is no answer of the format.
    pub garbage_rate: f64,
    /// Share of calls whose answer ends in the middle.
    pub torn_rate: f64,
    /// Every call is answered with 503.
    pub outage: bool,
    /// Strict limit of requests.
    pub requests_per_minute: Option<f64>,
    /// Requests that may come at once when none came before.
    pub burst: u32,
    /// Strict limit of tokens, input and output together; its bucket holds one second's worth.
    pub tokens_per_minute: Option<f64>,
    /// Calls that may be under way at once; one more is answered with 429.
    pub max_in_flight: Option<u32>,
    /// Say what the limits are and what is left of them in every answer.
    pub limit_headers: bool,
    /// Say in a refusal when to try again.
    pub retry_hints: bool,
    /// Price of a million tokens of input, in micro-USD.
    pub input_price: u64,
    /// Price of a million tokens of output, in micro-USD.
    pub output_price: u64,
    /// What is answered; unset: a repetition of the beginning of the prompt.
    pub answer: Option<String>,
    /// Tokens that an answer is counted as; unset: a quarter of its bytes. Never above what the request allows.
    pub output_tokens: Option<u64>,
    /// Pieces of a streamed answer.
    pub pieces: usize,
    /// Say how many tokens were counted.
    pub usage: bool,
    /// Requests must carry this key.
    pub api_key: Option<String>,
    /// Wait for the exact time by spinning through its last millisecond; for measurements on a core of its own.
    pub precise: bool,
    /// Where its randomness begins.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            latency_ms: 0.0,
            jitter: 0.0,
            slow_rate: 0.0,
            slow_ms: 0.0,
            error_rate: 0.0,
            error_status: 500,
            reset_rate: 0.0,
            hang_rate: 0.0,
            garbage_rate: 0.0,
            torn_rate: 0.0,
            outage: false,
            requests_per_minute: None,
            burst: 1,
            tokens_per_minute: None,
            max_in_flight: None,
            limit_headers: false,
            retry_hints: true,
            input_price: 100_000,
            output_price: 400_000,
            answer: None,
            output_tokens: None,
            pieces: 8,
            usage: true,
            api_key: None,
            precise: false,
            seed: 1,
        }
    }
}
