//! Logs to standard error, as text or JSON; traces by OTLP when an endpoint is configured, else nowhere.

use std::io::IsTerminal as _;

use axum::http::Request;
use drover_config::TelemetryConfig;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator as _};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::WithExportConfig as _;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

/// Keeps the exporter alive; dropping it sends what is still waiting.
#[derive(Default)]
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(provider) = self.provider.take() {
            let _ = provider.shutdown();
        }
    }
}

/// Sets up logging as `DROVER_LOG` and `DROVER_LOG_FORMAT` say, and tracing as the configuration says.
pub fn init(service: &str, config: &TelemetryConfig, default_filter: &str) -> anyhow::Result<Telemetry> {
    let filter = match std::env::var("DROVER_LOG") {
        Ok(text) if !text.is_empty() => EnvFilter::try_new(&text).map_err(|error| {
            anyhow::anyhow!("DROVER_LOG is {text:?}; write a filter such as info or drover_router=debug: {error}")
        })?,
        _ => EnvFilter::new(default_filter),
    };
    let json = match std::env::var("DROVER_LOG_FORMAT").unwrap_or_default().as_str() {
        "json" => true,
        "" | "text" => false,
        other => anyhow::bail!("DROVER_LOG_FORMAT is {other:?}; write text or json"),
    };
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = if json {
        lines.json().flatten_event(true).with_filter(filter).boxed()
    } else {
        lines.with_ansi(std::io::stderr().is_terminal()).with_target(false).with_filter(filter).boxed()
    };
    let provider = match &config.otlp_endpoint {
        None => None,
        Some(endpoint) => {
            let exporter =
                opentelemetry_otlp::SpanExporter::builder().with_tonic().with_endpoint(endpoint.clone()).build()?;
            let resource = Resource::builder().with_service_name(format!("drover-{service}")).build();
            Some(SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build())
        }
    };
    let traces = provider.as_ref().map(|provider| {
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("drover"))
            .with_filter(EnvFilter::new("info,drover=debug,rpc=trace"))
    });
    // A second start in one process (tests) keeps the first subscriber.
    let _ = tracing_subscriber::registry().with(lines).with(traces).try_init();
    Ok(Telemetry { provider })
}

/// One span per rpc, the child of the caller's when it sent a trace context.
pub(crate) fn rpc_span<B>(request: &Request<B>) -> Span {
    let span = tracing::debug_span!(target: "rpc", "rpc", path = request.uri().path());
    if let Some(parent) = request.headers().get("traceparent").and_then(|value| value.to_str().ok()) {
        remote_parent(&span, parent);
    }
    span
}

/// Makes a span the child of a W3C trace context that came from elsewhere.
pub fn remote_parent(span: &Span, traceparent: &str) {
    struct One<'a>(&'a str);
    impl Extractor for One<'_> {
        fn get(&self, key: &str) -> Option<&str> {
            (key == "traceparent").then_some(self.0)
        }
        fn keys(&self) -> Vec<&str> {
            vec!["traceparent"]
        }
    }
    let _ = span.set_parent(TraceContextPropagator::new().extract(&One(traceparent)));
}

/// A call that is part of this trace; of none when that is empty.
pub fn in_trace<T>(message: T, traceparent: &str) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    if let Ok(value) = traceparent.parse::<tonic::metadata::AsciiMetadataValue>()
        && !traceparent.is_empty()
    {
        request.metadata_mut().insert("traceparent", value);
    }
    request
}

/// The W3C trace context of the current span; `None` when nothing is traced.
pub fn traceparent() -> Option<String> {
    struct One(Option<String>);
    impl Injector for One {
        fn set(&mut self, key: &str, value: String) {
            if key == "traceparent" {
                self.0 = Some(value);
            }
        }
    }
    let mut found = One(None);
    TraceContextPropagator::new().inject_context(&Span::current().context(), &mut found);
    found.0
}
