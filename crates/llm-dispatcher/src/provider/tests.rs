//! The four wire formats: against recorded shapes on a loopback server, and against the mock, which keeps its own books.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use drover_testkit::mock_llm::{MockLlm, Settings};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::call::{
    CallAnswer, CallError, CallRequest, Delta, FailureKind, Finish, LimitHints, Message, NoSink, Part, Role, Sink,
    Tool, ToolCall, ToolChoice,
};
use crate::core::Price;

const KINDS: [&str; 4] = ["openai", "groq", "anthropic", "gemini"];
const KEY: &str = "sk-not-to-be-seen";

fn endpoint(name: &str, base_url: String) -> Endpoint {
    Endpoint {
        base_url: Some(base_url),
        key: KeySource::Given(Secret::new(KEY).unwrap()),
        ..Endpoint::named(name, None)
    }
}

fn client() -> HttpClient {
    HttpClient::new(HttpSettings::default())
}

fn provider(name: &str, base_url: String) -> Arc<dyn Provider> {
    build(&endpoint(name, base_url), &client(), |_| None).unwrap()
}

fn mocked(settings: Settings) -> (MockLlm, impl Fn(&str) -> Arc<dyn Provider>) {
    let mock = MockLlm::start(Settings { api_key: Some(KEY.into()), ..settings }).unwrap();
    let addr = mock.addr();
    let provider = move |name: &str| {
        let base = if name == "openai" { format!("http://{addr}/v1") } else { format!("http://{addr}") };
        provider(name, base)
    };
    (mock, provider)
}

#[derive(Debug, Default)]
struct Collect {
    deltas: Vec<Delta>,
    heads: usize,
    hints: LimitHints,
}

#[async_trait]
impl Sink for Collect {
    fn head(&mut self, hints: &LimitHints) {
        self.heads += 1;
        self.hints = *hints;
    }

    async fn delta(&mut self, delta: Delta) {
        self.deltas.push(delta);
    }
}

impl Collect {
    fn text(&self) -> String {
        self.deltas
            .iter()
            .filter_map(|delta| if let Delta::Text(text) = delta { Some(text.as_str()) } else { None })
            .collect()
    }

    fn calls(&self) -> Vec<ToolCall> {
        let mut calls: Vec<ToolCall> = Vec::new();
        for delta in &self.deltas {
            match delta {
                Delta::Text(_) => {}
                Delta::ToolCall { index, id, name } => {
                    assert_eq!(*index, calls.len());
                    calls.push(ToolCall { id: id.clone(), name: name.clone(), arguments: String::new() });
                }
                Delta::Arguments { index, text } => calls[*index].arguments.push_str(text),
            }
        }
        calls
    }
}

async fn ask(provider: &Arc<dyn Provider>, prompt: &str, stream: bool) -> Result<(CallAnswer, Collect), CallError> {
    let mut sink = Collect::default();
    let request = CallRequest { stream, ..CallRequest::prompt(prompt, 1000) };
    let answer = provider.call("a-model", &request, &mut sink).await?;
    Ok((answer, sink))
}

#[tokio::test]
async fn every_format_answers_whole_and_in_pieces_and_counts_as_the_mock_does() {
    let price = Price { input: 100_000, output: 400_000, ..Price::default() };
    for name in KINDS {
        let (mock, provider) =
            mocked(Settings { limit_headers: true, requests_per_minute: Some(6e6), ..Settings::default() });
        let provider = provider(name);
        let mut spent = 0;
        for stream in [false, true, false] {
            let (answer, sink) = ask(&provider, "[[say:Zwölf Boxkämpfer jagen Viktor 🥊]]", stream).await.unwrap();
            assert_eq!(answer.text, "Zwölf Boxkämpfer jagen Viktor 🥊", "{name}");
            assert_eq!((&answer.finish, sink.heads), (&Finish::Stop, 1), "{name}");
            assert_eq!(answer.model.as_deref(), Some("a-model"), "{name}");
            assert!(answer.response_id.as_deref().is_some_and(|id| id.contains("mock")), "{name}");
            assert_eq!(sink.text(), if stream { answer.text.as_str() } else { "" }, "{name}");
            assert_eq!(answer.hints, sink.hints);
            assert_eq!(answer.hints.requests.limit.is_some(), name != "gemini", "{name} {:?}", answer.hints);
            spent += price.of(&answer.usage.unwrap()).pico();
        }
        let ledger = mock.ledger();
        assert_eq!((ledger.answered, ledger.spent_pico), (3, spent), "{name}");
    }
}

#[tokio::test]
async fn connections_are_kept_between_calls_streamed_or_not() {
    let mock = MockLlm::start(Settings::default()).unwrap();
    let http = client();
    let provider = build(&endpoint("openai", mock.base_url("openai")), &http, |_| None).unwrap();
    for round in 0..20 {
        ask(&provider, "x", round % 2 == 0).await.unwrap();
    }
    assert_eq!(http.idle(), 1);
}

#[tokio::test]
async fn functions_are_asked_for_and_their_results_given_back() {
    let tool = Tool {
        name: "weather".into(),
        description: Some("Tells the weather.".into()),
        parameters: json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}),
        strict: None,
    };
    for name in KINDS {
        let (_mock, provider) = mocked(Settings::default());
        let provider = provider(name);
        for stream in [false, true] {
            let mut request = CallRequest::prompt("[[tool:weather {\"city\":\"Bergen, Norway\"}]]", 1000);
            request.tools.push(tool.clone());
            request.stream = stream;
            let mut sink = Collect::default();
            let answer = provider.call("m", &request, &mut sink).await.unwrap();
            assert_eq!(answer.finish, Finish::ToolCalls, "{name}");
            let [call] = &answer.tool_calls[..] else { panic!("{name}: {answer:?}") };
            assert_eq!(call.name, "weather", "{name}");
            assert_eq!(
                serde_json::from_str::<Value>(&call.arguments).unwrap(),
                json!({"city": "Bergen, Norway"}),
                "{name}"
            );
            assert_eq!(sink.calls(), if stream { vec![call.clone()] } else { vec![] }, "{name}");

            request.messages.push(Message { role: Role::Assistant, parts: vec![Part::ToolCall(call.clone())] });
            let result =
                Part::ToolResult { id: call.id.clone(), name: call.name.clone(), content: "{\"rain\":true}".into() };
            request.messages.push(Message { role: Role::Tool, parts: vec![result] });
            request.tool_choice = ToolChoice::Never;
            let answer = provider.call("m", &request, &mut NoSink).await.unwrap();
            assert!(answer.text.contains("rain"), "{name}: {}", answer.text);
        }
    }
}

#[tokio::test]
async fn what_is_withheld_is_a_result() {
    for name in KINDS {
        let (_mock, provider) = mocked(Settings::default());
        let provider = provider(name);
        for stream in [false, true] {
            let (answer, _) = ask(&provider, "[[blocked]]", stream).await.unwrap();
            assert!(matches!(answer.finish, Finish::Blocked(_)), "{name}: {answer:?}");
        }
    }
    let (_mock, provider) = mocked(Settings::default());
    for stream in [false, true] {
        let (answer, _) = ask(&provider("gemini"), "[[blocked-prompt]]", stream).await.unwrap();
        assert_eq!(answer.finish, Finish::Blocked("PROHIBITED_CONTENT".into()));
    }
}

#[tokio::test]
async fn a_shape_is_asked_for_checked_and_its_breach_is_paid_for() {
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]});
    let list = json!({"type": "array", "items": {"type": "integer"}});
    for name in KINDS {
        let (_mock, provider) = mocked(Settings::default());
        let provider = provider(name);
        for (schema, good, bad) in [(&schema, "{\"n\":3}", "{\"n\":\"3\"}"), (&list, "[1,2]", "[1,\"2\"]")] {
            let schema = Arc::new(OutputSchema::new("numbers", schema.clone()).unwrap());
            for stream in [false, true] {
                let ask = async |text: &str| {
                    let mut request =
                        CallRequest::prompt(format!("[[say:{text} ]]"), 1000).with_schema(Arc::clone(&schema));
                    request.stream = stream;
                    provider.call("m", &request, &mut NoSink).await
                };
                let answer = ask(good).await.unwrap();
                assert_eq!(answer.structured, Some(serde_json::from_str(good).unwrap()), "{name} {stream}");
                assert_eq!(answer.finish, Finish::Stop, "{name} {stream}");
                let error = ask(bad).await.unwrap_err();
                assert_eq!((error.kind, error.streamed), (FailureKind::Schema, stream), "{name}: {error}");
                assert!(error.usage.is_some() && error.maybe_billed, "{name}");
            }
        }
        // Cut short is not misshapen: to buy it again would cut it again.
        let schema = Arc::new(OutputSchema::new("words", json!({"type": "string"})).unwrap());
        let request = CallRequest::prompt("[[say:\"much too long\"]]", 2).with_schema(schema);
        let answer = provider.call("m", &request, &mut NoSink).await.unwrap();
        assert_eq!((answer.finish, answer.structured), (Finish::Length, None), "{name}");
    }
}

#[tokio::test]
async fn torn_garbled_huge_and_broken_answers_are_failures_that_may_be_billed() {
    for name in KINDS {
        let (mock, of) = mocked(Settings::default());
        let mut small = endpoint(name, mock.base_url(name));
        small.max_answer_bytes = 10_000;
        let small = build(&small, &client(), |_| None).unwrap();
        let usual = of(name);
        for stream in [false, true] {
            for (provider, prompt, kinds) in [
                (&usual, "[[garbage]]", &[FailureKind::Malformed, FailureKind::Broken][..]),
                (&usual, "[[torn]]", &[FailureKind::Broken]),
                (&usual, "[[reset]]", &[FailureKind::Broken]),
                (&small, "[[huge:20000]]", &[FailureKind::Malformed]),
            ] {
                let error = ask(provider, prompt, stream).await.unwrap_err();
                assert!(kinds.contains(&error.kind), "{name} {prompt} {stream}: {error}");
                assert!(error.maybe_billed, "{name} {prompt}");
                assert_eq!(error.retryable(), !error.streamed, "{name} {prompt}");
            }
            let error = ask(&usual, "[[status:500]]", stream).await.unwrap_err();
            assert_eq!(
                (error.kind, error.status, error.maybe_billed),
                (FailureKind::Server, Some(500), false),
                "{name}"
            );
        }
        let ledger = mock.ledger();
        assert_eq!((ledger.answered, ledger.in_flight), (0, 0), "{name}");
    }
}

#[tokio::test]
async fn a_dropped_call_ends_at_the_provider_too() {
    let (mock, provider) = mocked(Settings::default());
    for name in KINDS {
        let before = mock.ledger().aborted;
        let provider = provider(name);
        let until = async |reached: &dyn Fn() -> bool| {
            for _ in 0..3000 {
                if reached() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            panic!("{name}: it did not come about in 30 s");
        };
        {
            let call = ask(&provider, "[[hang]]", false);
            let begun = || mock.ledger().in_flight == 1;
            tokio::select! {
                _ = call => panic!("{name}: it hangs"),
                () = until(&begun) => {}
            }
        }
        until(&|| mock.ledger().aborted == before + 1).await;
        assert_eq!(mock.ledger().in_flight, 0, "{name}");
    }
}

#[tokio::test]
async fn a_refusal_says_when_to_come_again_and_then_it_is_right() {
    for name in KINDS {
        let limits = Settings { requests_per_minute: Some(60.0), burst: 1, ..Settings::default() };
        let (mock, provider) = mocked(limits);
        let provider = provider(name);
        // The second call is too early, unless the machine was very slow with the first.
        let error = loop {
            if let Err(error) = ask(&provider, "x", false).await {
                break error;
            }
        };
        assert_eq!((error.kind, error.status), (FailureKind::RateLimited, Some(429)), "{name}");
        let wait = error.hints.delay().unwrap();
        assert!(wait > Duration::ZERO && wait <= Duration::from_secs(1), "{name}: {wait:?}");
        tokio::time::sleep(wait).await;
        ask(&provider, "x", false).await.unwrap();
        assert_eq!(mock.ledger().rejected_rate, 1, "{name}");
    }
}

#[tokio::test]
async fn a_key_is_in_no_error_and_no_debug_output() {
    let mock = MockLlm::start(Settings { api_key: Some("another".into()), ..Settings::default() }).unwrap();
    for name in KINDS {
        let endpoint = endpoint(name, mock.base_url(name));
        let provider = build(&endpoint, &client(), |_| None).unwrap();
        for stream in [false, true] {
            // The mock repeats every header it was sent in its refusal.
            let error = ask(&provider, "x", stream).await.unwrap_err();
            assert_eq!(error.kind, FailureKind::Auth, "{name}");
            assert!(error.message.contains("***"), "{name}: {error}");
            for shown in [format!("{error:?}"), format!("{provider:?}"), format!("{endpoint:?}")] {
                assert!(!shown.contains(KEY), "{name}: {shown}");
            }
        }
    }
    let elsewhere = Endpoint { base_url: Some("http://api.example.com".into()), ..endpoint("openai", String::new()) };
    let error = build(&elsewhere, &client(), |_| None).unwrap_err().to_string();
    assert!(error.contains("in the clear") && !error.contains(KEY), "{error}");
    let missing = Endpoint::named("groq", None);
    let error = build(&missing, &client(), |_| None).unwrap_err().to_string();
    assert!(error.contains("GROQ_API_KEY"), "{error}");
}

/// Takes one request and answers with these bytes of a body.
async fn record(listener: &TcpListener, kind: &str, answer: &str) -> (String, Value) {
    let (mut stream, _) = listener.accept().await.unwrap();
    let (head, body) = read_request(&mut stream).await;
    let response = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{answer}",
        answer.len()
    );
    stream.write_all(response.as_bytes()).await.unwrap();
    (head, serde_json::from_slice(&body).unwrap())
}

async fn read_request(stream: &mut TcpStream) -> (String, Vec<u8>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap().parse().unwrap();
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.unwrap();
    (head, body)
}

/// What a provider is sent for a request, and what it makes of an answer.
async fn exchange(
    endpoint: impl FnOnce(String) -> Endpoint,
    request: &CallRequest,
    answer: &str,
) -> (String, Value, Result<CallAnswer, CallError>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = endpoint(format!("http://{}", listener.local_addr().unwrap()));
    let provider = build(&endpoint, &client(), |_| None).unwrap();
    let kind = if request.stream { "text/event-stream" } else { "application/json" };
    let mut sink = NoSink;
    let ((head, body), result) =
        tokio::join!(record(&listener, kind, answer), provider.call("the-model", request, &mut sink));
    (head, body, result)
}

fn full_request() -> CallRequest {
    CallRequest {
        temperature: Some(0.2),
        top_p: Some(0.9),
        stop: vec!["X".into()],
        user: Some("tenant-1".into()),
        ..CallRequest::prompt("Hi", 64).with_system("You are brief.")
    }
}

#[tokio::test]
async fn openai_is_sent_what_its_own_client_sends() {
    let answer = r#"{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"gpt-4o-mini","choices":[{"index":0,"message":{"role":"assistant","content":"Hello"},"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":9,"completion_tokens":4,"total_tokens":13,"prompt_tokens_details":{"cached_tokens":2},"completion_tokens_details":{"reasoning_tokens":1}},"system_fingerprint":null}"#;
    let (head, body, result) = exchange(|base| endpoint("openai", base + "/v1"), &full_request(), answer).await;
    assert!(head.starts_with("POST /v1/chat/completions HTTP/1.1\r\n"), "{head}");
    assert!(
        head.contains(&format!("authorization: Bearer {KEY}\r\n"))
            && head.contains("content-type: application/json\r\n")
    );
    let mut wanted = json!({"model": "the-model", "messages": [{"role": "system", "content": "You are brief."},
        {"role": "user", "content": "Hi"}], "max_completion_tokens": 64, "stop": ["X"], "temperature": 0.2, "top_p": 0.9,
        "user": "tenant-1"});
    assert_eq!(close(&body), close(&wanted));
    let answer = result.unwrap();
    let usage = answer.usage.unwrap();
    assert_eq!(
        (usage.input_tokens, usage.cached_input_tokens, usage.output_tokens, usage.reasoning_tokens),
        (9, 2, 4, 1)
    );

    // A compatible server knows only the older name, may need no key, and may not count.
    let bare = r#"{"choices":[{"index":0,"message":{"role":"assistant","content":[{"type":"text","text":"Hel"},{"type":"text","text":"lo"}]},"finish_reason":"stop"}]}"#;
    let compatible = |base| Endpoint { base_url: Some(base + "/v1"), ..Endpoint::named("my-vllm", None) };
    let (head, body, result) = exchange(compatible, &full_request(), bare).await;
    assert!(!head.contains("authorization"));
    wanted.as_object_mut().unwrap().remove("max_completion_tokens");
    wanted["max_tokens"] = json!(64);
    assert_eq!(close(&body), close(&wanted));
    let answer = result.unwrap();
    assert_eq!((answer.text.as_str(), answer.usage), ("Hello", None));
}

/// Numbers as text of few digits, for what was a single-precision number is not quite the double of the same name.
fn close(value: &Value) -> Value {
    match value {
        Value::Number(number) => json!(format!("{:.4}", number.as_f64().unwrap())),
        Value::Array(items) => items.iter().map(close).collect(),
        Value::Object(map) => {
            map.iter().map(|(key, value)| (key.clone(), close(value))).collect::<serde_json::Map<_, _>>().into()
        }
        other => other.clone(),
    }
}

#[tokio::test]
async fn streams_of_the_openai_family_end_and_count_in_several_ways() {
    let chunk = |delta: &str, finish: &str, rest: &str| {
        format!(
            "data: {{\"id\":\"c\",\"object\":\"chat.completion.chunk\",\"choices\":[{{\"index\":0,\"delta\":{delta},\"finish_reason\":{finish}}}]{rest}}}\n\n"
        )
    };
    let start = chunk("{\"role\":\"assistant\",\"content\":\"He\"}", "null", "");
    let end = chunk("{\"content\":\"y\"}", "\"stop\"", "");
    let usage = "\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":4,\"total_tokens\":13}";
    let request = CallRequest { stream: true, ..CallRequest::prompt("Hi", 64) };
    let openai = format!("{start}{end}data: {{\"choices\":[],{usage}}}\n\ndata: [DONE]\n\n");
    let (_, body, result) = exchange(|base| endpoint("openai", base + "/v1"), &request, &openai).await;
    assert_eq!((&body["stream"], &body["stream_options"]), (&json!(true), &json!({"include_usage": true})));
    let answer = result.unwrap();
    assert_eq!((answer.text.as_str(), answer.usage.unwrap().output_tokens), ("Hey", 4));

    let last = chunk("{}", "\"stop\"", &format!(",\"x_groq\":{{\"id\":\"r\",{usage}}}"));
    let groq = format!("{start}{last}data: [DONE]\n\n");
    let (head, body, result) = exchange(|base| endpoint("groq", base), &request, &groq).await;
    assert!(head.starts_with("POST /openai/v1/chat/completions "), "{head}");
    assert_eq!(body.get("stream_options"), None);
    assert_eq!(result.unwrap().usage.unwrap().input_tokens, 9);

    // Usage beside a choice; no usage at all; no [DONE]: all are whole answers. Without an end it is none.
    let compatible = |base: String| Endpoint { base_url: Some(base), ..Endpoint::named("local", None) };
    for (stream, counted) in [
        (format!("{start}{}data: [DONE]\n\n", chunk("{}", "\"stop\"", &format!(",{usage}"))), true),
        (format!("{start}{end}data: [DONE]\n\n"), false),
        (format!("{start}{end}"), false),
        (format!(": comment\n\n{start}{end}"), false),
    ] {
        let (.., result) = exchange(compatible, &request, &stream).await;
        assert_eq!(result.unwrap().usage.is_some(), counted, "{stream}");
    }
    let (.., result) = exchange(compatible, &request, &start).await;
    let error = result.unwrap_err();
    assert_eq!((error.kind, error.streamed, error.retryable()), (FailureKind::Broken, true, false));
    let told = format!("{start}data: {{\"error\":{{\"message\":\"worker died\",\"type\":\"server_error\"}}}}\n\n");
    let (.., result) = exchange(compatible, &request, &told).await;
    let error = result.unwrap_err();
    assert!(error.kind == FailureKind::Server && error.message.contains("worker died") && error.streamed, "{error:?}");
}

#[tokio::test]
async fn anthropic_is_sent_what_its_own_client_sends() {
    let answer = r#"{"id":"msg_1","type":"message","role":"assistant","model":"m","content":[{"type":"thinking","thinking":"hm"},{"type":"text","text":"Hello"}],"stop_reason":"a_new_reason","stop_sequence":null,"usage":{"input_tokens":9,"cache_creation_input_tokens":5,"cache_read_input_tokens":2,"output_tokens":4}}"#;
    let (head, body, result) = exchange(|base| endpoint("anthropic", base), &full_request(), answer).await;
    assert!(head.starts_with("POST /v1/messages HTTP/1.1\r\n"), "{head}");
    assert!(head.contains(&format!("x-api-key: {KEY}\r\n")) && head.contains("anthropic-version: 2023-06-01\r\n"));
    let mut wanted = json!({"model": "the-model", "max_tokens": 64, "system": "You are brief.",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "stop_sequences": ["X"],
        "metadata": {"user_id": "tenant-1"}, "temperature": 0.2, "top_p": 0.9});
    assert_eq!(close(&body), close(&wanted));
    let answer = result.unwrap();
    assert_eq!((answer.text.as_str(), answer.finish), ("Hello", Finish::Other("a_new_reason".into())));
    let usage = answer.usage.unwrap();
    assert_eq!((usage.input_tokens, usage.cached_input_tokens, usage.output_tokens), (16, 2, 4));

    // The newer version refuses a temperature.
    let newer = |base| Endpoint { api_version: Some("2026-10-21".into()), ..endpoint("anthropic", base) };
    let (head, body, _) = exchange(newer, &full_request(), "{}").await;
    assert!(head.contains("anthropic-version: 2026-10-21\r\n"));
    wanted.as_object_mut().unwrap().retain(|key, _| key != "temperature" && key != "top_p");
    assert_eq!(close(&body), close(&wanted));
}

#[tokio::test]
async fn an_error_of_anthropic_can_come_in_the_middle_of_a_stream() {
    let start = "event: message_start\ndata: {\"type\":\"message_start\",\"message\":{\"id\":\"m\",\"usage\":{\"input_tokens\":9,\"output_tokens\":1}}}\n\n";
    let stream = format!(
        "{start}event: error\ndata: {{\"type\":\"error\",\"error\":{{\"type\":\"overloaded_error\",\"message\":\"Overloaded\"}}}}\n\n"
    );
    let request = CallRequest { stream: true, ..CallRequest::prompt("Hi", 64) };
    let (.., result) = exchange(|base| endpoint("anthropic", base), &request, &stream).await;
    let error = result.unwrap_err();
    // Nothing was handed out yet, so it may be tried again; what was counted is told.
    assert_eq!((error.kind, error.retryable(), error.usage.unwrap().input_tokens), (FailureKind::Overloaded, true, 9));
}

#[tokio::test]
async fn gemini_is_sent_what_its_own_client_sends() {
    let answer = r#"{"candidates":[{"content":{"role":"model","parts":[{"text":"hm","thought":true},{"text":"Hel"},{"text":"lo"}]},"finishReason":"STOP","index":0,"groundingMetadata":{"webSearchQueries":["q"],"groundingChunks":[{"web":{"uri":"https://a.example","title":"A"}}]}}],"usageMetadata":{"promptTokenCount":7,"candidatesTokenCount":5,"thoughtsTokenCount":3,"totalTokenCount":15},"modelVersion":"gemini-2.5-flash","responseId":"r1"}"#;
    let (head, body, result) = exchange(|base| endpoint("gemini", base), &full_request(), answer).await;
    assert!(head.starts_with("POST /v1beta/models/the-model:generateContent HTTP/1.1\r\n"), "{head}");
    assert!(head.contains(&format!("x-goog-api-key: {KEY}\r\n")));
    let wanted = json!({"contents": [{"role": "user", "parts": [{"text": "Hi"}]}],
        "systemInstruction": {"role": "user", "parts": [{"text": "You are brief."}]},
        "generationConfig": {"temperature": 0.2, "topP": 0.9, "maxOutputTokens": 64, "stopSequences": ["X"]}});
    assert_eq!(close(&body), close(&wanted));
    let answer = result.unwrap();
    assert_eq!((answer.text.as_str(), answer.searches.len(), answer.citations.len()), ("Hello", 1, 1));
    let usage = answer.usage.unwrap();
    assert_eq!((usage.input_tokens, usage.output_tokens, usage.reasoning_tokens), (7, 8, 3));

    let blocked =
        r#"{"promptFeedback":{"blockReason":"JAILBREAK"},"usageMetadata":{"promptTokenCount":7,"totalTokenCount":7}}"#;
    let v1 = |base| Endpoint { api_version: Some("v1".into()), ..endpoint("gemini", base) };
    let (head, body, result) = exchange(v1, &CallRequest { grounded: true, ..full_request() }, blocked).await;
    assert!(head.starts_with("POST /v1/models/the-model:generateContent "), "{head}");
    assert_eq!(body["tools"], json!([{"google_search": {}}]));
    let answer = result.unwrap();
    assert_eq!((answer.finish, answer.usage.unwrap().output_tokens), (Finish::Blocked("JAILBREAK".into()), 0));
}

#[tokio::test]
async fn a_name_of_a_model_cannot_lead_elsewhere() {
    let (mock, provider) = mocked(Settings::default());
    for model in ["../../x", "a?b=c", "a b", "a%2f", "a#b"] {
        let error = provider("gemini").call(model, &CallRequest::prompt("x", 5), &mut NoSink).await.unwrap_err();
        assert!(!error.retryable() && !error.maybe_billed, "{model}: {error}");
    }
    assert_eq!(mock.ledger().calls, 0);
}

#[tokio::test]
async fn answers_that_are_json_but_no_answers_are_malformed() {
    let request = CallRequest::prompt("Hi", 64);
    let mut stream = request.clone();
    stream.stream = true;
    for name in KINDS {
        for text in
            ["", "{}", "[]", "null", "{\"choices\":[]}", "{\"choices\":[{}]}", "{\"candidates\":[]}", "{\"content\":5}"]
        {
            let base = |base: String| endpoint(name, if name == "openai" { base + "/v1" } else { base });
            let (.., result) = exchange(base, &request, text).await;
            let error = result.unwrap_err();
            assert_eq!(error.kind, FailureKind::Malformed, "{name} {text}: {error}");
            let (.., result) = exchange(base, &stream, &format!("data: {text}\n\n")).await;
            let kind = result.unwrap_err().kind;
            assert!(matches!(kind, FailureKind::Malformed | FailureKind::Broken), "{name} {text}: {kind:?}");
        }
    }
}

proptest! {
    /// The bound that money is reserved by holds for any way in which a tokenizer may count: by bytes at worst.
    #[test]
    fn the_upper_bound_of_the_input_is_above_its_bytes(
        system in proptest::option::of("\\PC{0,50}"),
        texts in prop::collection::vec("\\PC{0,50}", 1..5),
        max in 1_u32..1000,
    ) {
        let mut request = CallRequest::prompt(texts[0].clone(), max);
        request.messages = texts.iter().map(|text| Message::user(text.clone())).collect();
        request.system = system.clone().map(Into::into);
        let bytes: usize = texts.iter().map(String::len).sum::<usize>() + system.map_or(0, |system| system.len());
        prop_assert!(request.input_upper_bound() >= (bytes + 10 * (texts.len() + 1)) as u64);
    }
}
