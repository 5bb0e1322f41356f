//! The provider that only pretends: no network, no key, no model. It has a latency, errors and a rate limit as configured, and
//! whatever it says is labelled.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::stream::Assembly;
use crate::call::{
    CallAnswer, CallError, CallRequest, Delta, FailureKind, Finish, LimitHints, Part, Provider, Sink, Usage,
};

/// What every answer of it begins with, unless the answer must be JSON.
pub const LABEL: &str = "[simulated]";
/// Bytes of text that it counts as one token.
const BYTES_PER_TOKEN: usize = 4;
/// Pieces that a streamed answer comes in at most.
const MOST_PIECES: usize = 16;
/// How deep a made-up JSON answer goes.
const MOST_DEPTH: usize = 8;

/// Answers in place of the usual words; `None` leaves a request to them.
pub type Responder = Arc<dyn Fn(&CallRequest) -> Option<String> + Send + Sync>;

/// How it behaves.
#[derive(Clone)]
pub struct SimSettings {
    /// Its name in configuration and results.
    pub name: String,
    /// How long an answer takes.
    pub latency: Duration,
    /// How much longer or shorter it may take, as a share of the latency.
    pub jitter: f64,
    /// Share of calls that fail as a provider's own error does.
    pub error_rate: f64,
    /// Calls a minute; one above is refused with the time to wait. Unset: any number.
    pub requests_per_minute: Option<u32>,
    /// Where its randomness begins.
    pub seed: u64,
    /// Who answers before it does.
    pub responder: Option<Responder>,
}

impl Default for SimSettings {
    fn default() -> Self {
        Self {
            name: "sim".to_owned(),
            latency: Duration::from_millis(200),
            jitter: 0.0,
            error_rate: 0.0,
            requests_per_minute: None,
            seed: 1,
            responder: None,
        }
    }
}

impl fmt::Debug for SimSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimSettings")
            .field("name", &self.name)
            .field("latency", &self.latency)
            .field("jitter", &self.jitter)
            .field("error_rate", &self.error_rate)
            .field("requests_per_minute", &self.requests_per_minute)
            .finish_non_exhaustive()
    }
}

/// The provider.
#[derive(Debug)]
pub struct Sim {
    settings: SimSettings,
    calls: AtomicU64,
    /// When the next call is due by the rate limit.
    due: Mutex<Option<Instant>>,
}

impl Sim {
    /// A provider that behaves like this.
    pub fn new(settings: SimSettings) -> Self {
        Self { settings, calls: AtomicU64::new(0), due: Mutex::default() }
    }

    /// A strict bucket that holds one second's worth.
    fn admit(&self) -> Result<(), Duration> {
        let Some(rate) = self.settings.requests_per_minute.filter(|&rate| rate > 0) else { return Ok(()) };
        let each = Duration::from_mins(1) / rate;
        let burst = each.max(Duration::from_secs(1));
        let now = Instant::now();
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        let next = due.unwrap_or(now).max(now) + each;
        if next > now + burst {
            return Err(next.saturating_duration_since(now + burst));
        }
        *due = Some(next);
        Ok(())
    }

    fn latency(&self, rng: &mut SmallRng) -> Duration {
        let jitter = self.settings.jitter.clamp(0.0, 1.0);
        if jitter == 0.0 {
            self.settings.latency
        } else {
            self.settings.latency.mul_f64(rng.random_range(1.0 - jitter..=1.0 + jitter))
        }
    }
}

#[async_trait]
impl Provider for Sim {
    fn name(&self) -> &str {
        &self.settings.name
    }

    fn simulated(&self) -> bool {
        true
    }

    async fn call(&self, model: &str, request: &CallRequest, sink: &mut dyn Sink) -> Result<CallAnswer, CallError> {
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        let mut rng =
            SmallRng::seed_from_u64(self.settings.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(number));
        let refused = |kind, status, message: &str| {
            let mut error = CallError::new(kind, message);
            error.maybe_billed = false;
            error.status = Some(status);
            error
        };
        if let Err(wait) = self.admit() {
            let mut error =
                refused(FailureKind::RateLimited, 429, "the simulated provider answered 429: rate limit reached");
            error.hints.retry_after = Some(wait);
            return Err(error);
        }
        let latency = self.latency(&mut rng);
        let fails = rng.random_bool(self.settings.error_rate.clamp(0.0, 1.0));
        let text =
            self.settings.responder.as_ref().and_then(|responder| responder(request)).unwrap_or_else(|| say(request));
        let (text, cut) = bounded(text, request.max_tokens);
        let pieces = if request.stream { pieces(&text) } else { Vec::new() };
        // The first piece comes after half of the time, the rest is spread over the other half.
        let first = if pieces.is_empty() { latency } else { latency / 2 };
        tokio::time::sleep(first).await;
        if fails {
            return Err(refused(FailureKind::Server, 500, "the simulated provider answered 500: error on purpose"));
        }
        let hints = LimitHints::default();
        sink.head(&hints);
        let pause = latency.saturating_sub(first) / pieces.len().max(1) as u32;
        for piece in pieces {
            tokio::time::sleep(pause).await;
            sink.delta(Delta::Text(piece.to_owned())).await;
        }
        let usage = Usage {
            input_tokens: input_bytes(request).div_ceil(BYTES_PER_TOKEN) as u64,
            output_tokens: text.len().div_ceil(BYTES_PER_TOKEN) as u64,
            ..Usage::default()
        };
        let assembly = Assembly {
            text,
            finish: Some(if cut { Finish::Length } else { Finish::Stop }),
            usage: Some(usage),
            model: Some(model.to_owned()),
            response_id: Some(format!("sim-{number}")),
            ended: true,
            ..Assembly::default()
        };
        assembly.answer(request)
    }
}

fn texts(request: &CallRequest) -> impl Iterator<Item = &str> {
    let parts = request.messages.iter().flat_map(|message| &message.parts);
    parts.map(|part| match part {
        Part::Text(text) => text.as_str(),
        Part::ToolCall(call) => call.arguments.as_str(),
        Part::ToolResult { content, .. } => content.as_str(),
    })
}

fn input_bytes(request: &CallRequest) -> usize {
    texts(request).map(str::len).sum::<usize>() + request.system.as_ref().map_or(0, |system| system.len())
}

/// The usual words: what was asked, shortened, or a made-up value of the shape that was asked for.
fn say(request: &CallRequest) -> String {
    let asked = texts(request).last().unwrap_or_default();
    let words: String = asked.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(160).collect();
    if let Some(schema) = &request.schema {
        return made_up(schema.schema(), schema.schema(), &words, 0).to_string();
    }
    if request.json {
        return json!({"simulated": true, "about": words}).to_string();
    }
    format!("{LABEL} No model was asked. The request was: {words}")
}

/// A value of a schema: what the schema itself offers, else the least that fits.
fn made_up(schema: &Value, root: &Value, words: &str, depth: usize) -> Value {
    for key in ["const", "default"] {
        if let Some(value) = schema.get(key) {
            return value.clone();
        }
    }
    for key in ["examples", "enum"] {
        if let Some(value) = schema.get(key).and_then(|list| list.get(0)) {
            return value.clone();
        }
    }
    if depth > MOST_DEPTH {
        return Value::Null;
    }
    if let Some(inside) = schema.get("$ref").and_then(Value::as_str).and_then(|path| path.strip_prefix('#')) {
        return root.pointer(inside).map_or(Value::Null, |schema| made_up(schema, root, words, depth + 1));
    }
    for key in ["anyOf", "oneOf", "allOf"] {
        if let Some(one) = schema.get(key).and_then(|list| list.get(0)) {
            return made_up(one, root, words, depth + 1);
        }
    }
    let number = |key: &str| schema.get(key).and_then(Value::as_f64);
    let kind = match schema.get("type") {
        Some(Value::Array(kinds)) => kinds.first().and_then(Value::as_str),
        kind => kind.and_then(Value::as_str),
    };
    match kind.unwrap_or(if schema.get("properties").is_some() { "object" } else { "string" }) {
        "object" => {
            let mut object = Map::new();
            for (name, property) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
                object.insert(name.clone(), made_up(property, root, words, depth + 1));
            }
            Value::Object(object)
        }
        "array" => {
            let least = schema.get("minItems").and_then(Value::as_u64).unwrap_or(1).min(100);
            let item = schema.get("items").map_or_else(|| json!(words), |item| made_up(item, root, words, depth + 1));
            Value::Array((0..least).map(|_| item.clone()).collect())
        }
        "integer" => json!(number("minimum").unwrap_or(0.0).ceil() as i64),
        "number" => json!(number("minimum").unwrap_or(0.0)),
        "boolean" => json!(true),
        "null" => Value::Null,
        _ => {
            let mut text = format!("{LABEL} {words}");
            if let Some(most) = schema.get("maxLength").and_then(Value::as_u64) {
                text = text.chars().take(most as usize).collect();
            }
            let least = schema.get("minLength").and_then(Value::as_u64).unwrap_or(0).min(10_000) as usize;
            while text.chars().count() < least {
                text.push('.');
            }
            json!(text)
        }
    }
}

/// The text within its bound, and whether it had to be cut.
fn bounded(mut text: String, max_tokens: u32) -> (String, bool) {
    let most = (max_tokens as usize).saturating_mul(BYTES_PER_TOKEN);
    if text.len() <= most {
        return (text, false);
    }
    let end = (0..=most).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    text.truncate(end);
    (text, true)
}

/// The text in pieces that end between words.
fn pieces(text: &str) -> Vec<&str> {
    let words: Vec<&str> = text.split_inclusive(' ').collect();
    let each = words.len().div_ceil(MOST_PIECES).max(1);
    let mut out = Vec::new();
    let mut from = 0;
    for group in words.chunks(each) {
        let length: usize = group.iter().map(|word| word.len()).sum();
        out.push(&text[from..from + length]);
        from += length;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::NoSink;
    use crate::provider::OutputSchema;

    #[derive(Default)]
    struct Collect(String, usize);

    #[async_trait]
    impl Sink for Collect {
        fn head(&mut self, _hints: &LimitHints) {}

        async fn delta(&mut self, delta: Delta) {
            let Delta::Text(text) = delta else { panic!("only text is simulated") };
            self.0.push_str(&text);
            self.1 += 1;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn answers_are_labelled_timed_bounded_and_the_same_in_pieces() {
        let sim = Sim::new(SimSettings::default());
        let mut request = CallRequest::prompt("What is the tallest mountain?", 100);
        let begun = Instant::now();
        let answer = sim.call("none", &request, &mut NoSink).await.unwrap();
        assert_eq!(begun.elapsed(), Duration::from_millis(200));
        assert!(answer.text.starts_with(LABEL) && answer.text.contains("tallest"), "{}", answer.text);
        let usage = answer.usage.unwrap();
        assert!(usage.input_tokens <= request.input_upper_bound() && usage.output_tokens <= 100);

        request.stream = true;
        let mut collect = Collect::default();
        let streamed = sim.call("none", &request, &mut collect).await.unwrap();
        assert_eq!((streamed.text.as_str(), collect.0.as_str()), (answer.text.as_str(), answer.text.as_str()));
        assert!(collect.1 > 1);

        request.max_tokens = 3;
        let cut = sim.call("none", &request, &mut NoSink).await.unwrap();
        assert_eq!((cut.finish, cut.usage.unwrap().output_tokens), (Finish::Length, 3));
    }

    #[tokio::test(start_paused = true)]
    async fn errors_and_limits_are_as_configured() {
        let settings = SimSettings { error_rate: 0.1, jitter: 0.5, ..SimSettings::default() };
        let failed = async |settings: SimSettings| {
            let sim = Sim::new(settings);
            let request = CallRequest::prompt("x", 10);
            let mut failed = Vec::new();
            for number in 0..500 {
                if let Err(error) = sim.call("none", &request, &mut NoSink).await {
                    assert!(error.retryable() && error.kind == FailureKind::Server && !error.maybe_billed);
                    failed.push(number);
                }
            }
            failed
        };
        let first = failed(settings.clone()).await;
        assert!((25..=80).contains(&first.len()), "{}", first.len());
        assert_eq!(first, failed(settings.clone()).await);
        assert_ne!(first, failed(SimSettings { seed: 2, ..settings }).await);

        let strict =
            Sim::new(SimSettings { requests_per_minute: Some(60), latency: Duration::ZERO, ..SimSettings::default() });
        let request = CallRequest::prompt("x", 10);
        strict.call("none", &request, &mut NoSink).await.unwrap();
        let error = strict.call("none", &request, &mut NoSink).await.unwrap_err();
        assert_eq!(error.kind, FailureKind::RateLimited);
        tokio::time::sleep(error.hints.delay().unwrap()).await;
        strict.call("none", &request, &mut NoSink).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_shape_is_kept_and_a_responder_goes_first() {
        let schema = json!({"type": "object", "required": ["a", "b", "c"], "properties": {
            "a": {"type": "array", "minItems": 3, "items": {"$ref": "#/$defs/n"}},
            "b": {"enum": ["x", "y"]}, "c": {"type": ["string", "null"], "minLength": 300, "maxLength": 310}},
            "$defs": {"n": {"type": "integer", "minimum": 4}}});
        let schema = Arc::new(OutputSchema::new("t", schema).unwrap());
        let request = CallRequest::prompt("x", 1000).with_schema(schema);
        let value =
            Sim::new(SimSettings::default()).call("none", &request, &mut NoSink).await.unwrap().structured.unwrap();
        assert_eq!((&value["a"], &value["b"]), (&json!([4, 4, 4]), &json!("x")));

        let responder: Responder = Arc::new(|_| Some("{\"a\":[],\"b\":\"x\"}".to_owned()));
        let sim = Sim::new(SimSettings { responder: Some(responder), ..SimSettings::default() });
        let error = sim.call("none", &request, &mut NoSink).await.unwrap_err();
        assert_eq!(error.kind, FailureKind::Schema);
        assert!(error.usage.is_some() && error.maybe_billed);
    }
}
