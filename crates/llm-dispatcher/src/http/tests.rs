//! The front with a real pool behind it, asking the mock, which keeps its own books.

use axum::body::Body;
use axum::http::{Request, StatusCode, header};
use axum::response::Response;
use drover_config::NodeScalingConfig;
use drover_service::Context;
use drover_testkit::mock_llm::{MockLlm, Settings as MockSettings};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::*;
use crate::cache::{Cache, CacheSettings};
use crate::core::{HedgeSettings, LaneSettings, Money, Price, Settings as CoreSettings};
use crate::ledger::{Ledger, Zone};
use crate::metrics::Metrics;
use crate::provider::{self, Endpoint, HttpClient, HttpSettings, KeySource, Secret};
use crate::shell::{Driver, Lanes, NewLane, Start};

pub(super) const TOKEN: &str = "a-token-of-the-tests";

pub(super) struct World {
    pub(super) mock: MockLlm,
    router: Router,
    pub(super) express: Arc<Express>,
    pub(super) ctx: Context,
    pub(super) ledger: Ledger,
    pub(super) pool: Pool,
    _dir: tempfile::TempDir,
}

impl Drop for World {
    fn drop(&mut self) {
        self.ctx.shutdown().cancel();
    }
}

pub(super) async fn world(mock: MockSettings, cap: Option<f64>) -> World {
    let settings = Setup { cap, ..Setup::default() };
    world_with(MockLlm::start(mock).unwrap(), &settings, tempfile::tempdir().unwrap()).await
}

/// What a world is made of, beside the mock.
#[derive(Default)]
pub(super) struct Setup {
    pub(super) cap: Option<f64>,
    pub(super) cache: Option<CacheSettings>,
    /// Search and fetch of it act.
    pub(super) scaling: NodeScalingConfig,
    /// The mock's key.
    pub(super) key: Option<&'static str>,
}

pub(super) async fn world_with(mock: MockLlm, setup: &Setup, dir: tempfile::TempDir) -> World {
    let ctx = Context::for_test("llm-dispatcher", dir.path());
    let key = setup.key.and_then(Secret::new).map_or(KeySource::None, KeySource::Given);
    let endpoint = Endpoint { base_url: Some(mock.base_url("local")), key, ..Endpoint::named("local", None) };
    let provider = provider::build(&endpoint, &HttpClient::new(HttpSettings::default()), |_| None).unwrap();
    let price = Some(Price { input: 100_000, output: 400_000, ..Price::default() });
    let lane = NewLane {
        provider,
        name: "local".into(),
        model: "small".into(),
        max_tokens: 500,
        price_up_to: None,
        unusable: None,
        settings: LaneSettings { price, ..LaneSettings::default() },
    };
    let minute = std::time::Duration::from_mins(1);
    let lanes = Lanes::new(vec![lane], 1, minute, move |_, _| price.map(|price| (price, None)));
    let engine = &setup.scaling.search.backend;
    let lanes = if engine == "off" { lanes } else { lanes.with_fees(engine, minute) };
    let store = ctx.state().join("dispatcher").unwrap();
    let (ledger, _closed) = Ledger::open(&store).unwrap();
    let settings = CoreSettings {
        max_nodes: 100,
        max_concurrent_api: 100,
        max_daily_spend: setup.cap.and_then(Money::from_usd),
        // A slow machine would have calls made twice, and calls are counted here.
        hedge: HedgeSettings { max: 0, ..HedgeSettings::default() },
        ..CoreSettings::default()
    };
    let metrics = Metrics::register(&ctx.registry());
    let zone = Zone::named(None).unwrap();
    let start = Start { settings, lanes, ledger: ledger.clone(), zone, metrics: metrics.clone(), seed: 1 };
    let (pool, driver) = Driver::start(start, &ctx).await.unwrap();
    ctx.spawn("driver", driver.run());
    let pool = match &setup.cache {
        Some(cache) => pool.cached(Cache::open(&store, cache.clone(), metrics, &ctx)),
        None => pool,
    };
    let errands = Errands::new(&setup.scaling, None, |_, _| None).unwrap();
    let (express, router) = doors(&pool, errands, Access::new(Secret::new(TOKEN).unwrap()));
    World { mock, router, express, ctx, ledger, pool, _dir: dir }
}

pub(super) fn request(method: &str, path: &str, body: Option<&Value>) -> Request<Body> {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "127.0.0.1:7955")
        .header(header::AUTHORIZATION, format!("Bearer {TOKEN}"))
        .header(header::CONTENT_TYPE, "application/json");
    request.body(body.map_or_else(Body::empty, |body| Body::from(body.to_string()))).unwrap()
}

impl World {
    pub(super) async fn send(&self, request: Request<Body>) -> Response {
        self.router.clone().oneshot(request).await.unwrap()
    }

    pub(super) async fn post(&self, path: &str, body: &Value) -> (StatusCode, String) {
        let response = self.send(request("POST", path, Some(body))).await;
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(bytes.to_vec()).unwrap())
    }

    pub(super) async fn post_json(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        let (status, text) = self.post(path, body).await;
        (status, serde_json::from_str(&text).unwrap())
    }
}

/// The `data` of every event of a stream; `[DONE]` as text.
pub(super) fn events(text: &str) -> Vec<Value> {
    let data = text.split("\n\n").filter_map(|event| event.lines().find_map(|line| line.strip_prefix("data: ")));
    data.map(|data| serde_json::from_str(data).unwrap_or_else(|_| json!(data))).collect()
}

pub(super) fn chat(prompt: &str) -> Value {
    json!({"model": "small", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]})
}

#[tokio::test]
async fn only_local_programs_that_know_the_token_get_in() {
    let world = world(MockSettings::default(), None).await;
    let altered = |path: &str, name: header::HeaderName, value: Option<&str>| {
        let mut request = request("GET", path, None);
        match value {
            Some(value) => request.headers_mut().insert(name, value.parse().unwrap()),
            None => request.headers_mut().remove(name),
        };
        request
    };
    for path in ["/v1/models", "/status"] {
        assert_eq!(world.send(request("GET", path, None)).await.status(), StatusCode::OK);
        for wrong in [None, Some("Bearer wrong"), Some(TOKEN), Some("Bearer ")] {
            let response = world.send(altered(path, header::AUTHORIZATION, wrong)).await;
            assert_eq!(response.status(), StatusCode::UNAUTHORIZED, "{path} {wrong:?}");
        }
    }
    for path in ["/v1/models", "/status", "/health"] {
        for host in ["evil.example:7955", "127.0.0.1.evil.example", "10.1.2.3:7955", ""] {
            let response = world.send(altered(path, header::HOST, Some(host))).await;
            assert_eq!(response.status(), StatusCode::FORBIDDEN, "{path} {host}");
        }
        for origin in ["https://evil.example", "http://localhost:3000", "null"] {
            let response = world.send(altered(path, header::ORIGIN, Some(origin))).await;
            assert_eq!(response.status(), StatusCode::FORBIDDEN, "{path} {origin}");
        }
    }
    assert_eq!(world.send(altered("/health", header::AUTHORIZATION, None)).await.status(), StatusCode::OK);
    let mut big = request("POST", "/v1/chat/completions", None);
    *big.body_mut() = Body::from(format!("{{\"messages\":\"{}\"}}", "x".repeat(MAX_BODY)));
    assert_eq!(world.send(big).await.status(), StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(world.mock.ledger().calls, 0);
}

#[tokio::test]
async fn a_chat_is_answered_whole_and_in_chunks_and_counted_as_the_provider_does() {
    let world = world(MockSettings::default(), None).await;
    let (status, body) = world.post_json("/v1/chat/completions", &chat("[[say:Grüße 🥊]]")).await;
    assert_eq!((status, &body["object"]), (StatusCode::OK, &json!("chat.completion")), "{body}");
    let choice = &body["choices"][0];
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!("Grüße 🥊"), &json!("stop")));
    assert_eq!((&body["drover"]["provider"], &body["drover"]["attempts"]), (&json!("local"), &json!(1)));
    let spent = world.mock.ledger().spent_pico as f64 / 1e12;
    assert!((body["drover"]["cost_usd"].as_f64().unwrap() - spent).abs() < 1e-12, "{body} {spent}");

    let mut streamed = chat("[[say:one two three four]]");
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let (status, text) = world.post("/v1/chat/completions", &streamed).await;
    assert_eq!(status, StatusCode::OK);
    let events = events(&text);
    let content: String = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(content, "one two three four");
    let finishes: Vec<_> = events.iter().filter_map(|event| event["choices"][0]["finish_reason"].as_str()).collect();
    assert_eq!(finishes, ["stop"]);
    let [.., usage, end] = &events[..] else { panic!("{text}") };
    assert_eq!((usage["usage"]["completion_tokens"].as_u64(), end), (Some(5), &json!("[DONE]")));
    assert!(events.len() > 6, "{text}");
}

#[tokio::test]
async fn tools_are_passed_through_both_interfaces_and_back() {
    let world = world(MockSettings::default(), None).await;
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}});
    let prompt = "[[tool:weather {\"city\":\"Oslo\"}]]";
    for stream in [false, true] {
        let mut body = chat(prompt);
        body["stream"] = json!(stream);
        body["tools"] = json!([{"type": "function", "function": {"name": "weather", "parameters": parameters}}]);
        let (_, text) = world.post("/v1/chat/completions", &body).await;
        let call = if stream {
            let events = events(&text);
            let mut call = json!({"arguments": ""});
            for piece in events.iter().filter_map(|event| event["choices"][0]["delta"]["tool_calls"].get(0)) {
                if let Some(id) = piece["id"].as_str() {
                    call["id"] = json!(id);
                    call["name"] = piece["function"]["name"].clone();
                }
                let more = piece["function"]["arguments"].as_str().unwrap_or_default();
                call["arguments"] = json!(format!("{}{more}", call["arguments"].as_str().unwrap()));
            }
            assert!(text.contains("\"finish_reason\":\"tool_calls\""));
            call
        } else {
            let answer: Value = serde_json::from_str(&text).unwrap();
            let call = &answer["choices"][0]["message"]["tool_calls"][0];
            json!({"id": call["id"], "name": call["function"]["name"], "arguments": call["function"]["arguments"]})
        };
        assert_eq!((&call["name"], &call["arguments"]), (&json!("weather"), &json!("{\"city\":\"Oslo\"}")), "{text}");
        body["stream"] = json!(false);
        let messages = body["messages"].as_array_mut().unwrap();
        messages
            .push(json!({"role": "assistant", "content": null, "tool_calls": [{"id": call["id"], "type": "function",
            "function": {"name": call["name"], "arguments": call["arguments"]}}]}));
        messages.push(json!({"role": "tool", "tool_call_id": call["id"], "content": "it rains"}));
        let (_, answer) = world.post_json("/v1/chat/completions", &body).await;
        assert!(answer["choices"][0]["message"]["content"].as_str().unwrap().contains("it rains"), "{answer}");
    }

    // The other interface, with a tool of free text beside the function and one that no provider here has.
    let tools = json!([{"type": "function", "name": "weather", "parameters": parameters}, {"type": "web_search"},
        {"type": "custom", "name": "apply_patch", "description": "Edits."}]);
    let ask = |input: Value, stream: bool| json!({"model": "small", "input": input, "tools": tools, "stream": stream});
    let (_, text) = world.post("/v1/responses", &ask(json!(prompt), true)).await;
    let happened = events(&text);
    let kinds: Vec<&str> = happened.iter().filter_map(|event| event["type"].as_str()).collect();
    assert_eq!((kinds[0], kinds[kinds.len() - 1]), ("response.created", "response.completed"), "{text}");
    let numbers: Vec<u64> = happened.iter().filter_map(|event| event["sequence_number"].as_u64()).collect();
    assert_eq!(numbers, (0..happened.len() as u64).collect::<Vec<_>>());
    let item = happened.iter().find(|event| event["type"] == "response.output_item.done").unwrap()["item"].clone();
    assert_eq!((&item["type"], &item["arguments"]), (&json!("function_call"), &json!("{\"city\":\"Oslo\"}")));
    assert_eq!(happened[happened.len() - 1]["response"]["output"][0], item);
    let output = json!({"type": "function_call_output", "call_id": item["call_id"], "output": "sun"});
    let question = json!({"type": "message", "role": "user", "content": [{"type": "input_text", "text": prompt}]});
    let (_, answer) = world.post_json("/v1/responses", &ask(json!([question, item, output]), false)).await;
    assert_eq!(answer["status"], "completed", "{answer}");
    assert!(answer["output"][0]["content"][0]["text"].as_str().unwrap().contains("sun"), "{answer}");

    let patch = "[[tool:apply_patch {\"input\":\"*** Begin\"}]]";
    for stream in [false, true] {
        let (_, text) = world.post("/v1/responses", &ask(json!(patch), stream)).await;
        let item = if stream {
            events(&text).into_iter().find(|event| event["type"] == "response.output_item.done").unwrap()["item"]
                .clone()
        } else {
            serde_json::from_str::<Value>(&text).unwrap()["output"][0].clone()
        };
        assert_eq!((&item["type"], &item["input"]), (&json!("custom_tool_call"), &json!("*** Begin")), "{text}");
    }
}

#[tokio::test]
async fn responses_stream_text_between_an_item_that_begins_and_ends() {
    let world = world(MockSettings { pieces: 3, ..MockSettings::default() }, None).await;
    let body =
        json!({"model": "local/small", "instructions": "Be brief.", "input": "[[say:abc def ghi]]", "stream": true});
    let (_, text) = world.post("/v1/responses", &body).await;
    let happened = events(&text);
    let kinds: Vec<&str> = happened.iter().filter_map(|event| event["type"].as_str()).collect();
    assert_eq!(
        kinds,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ],
        "{text}"
    );
    let last = &happened[happened.len() - 1]["response"];
    assert_eq!(last["output"][0]["content"][0]["text"], "abc def ghi");
    assert_eq!(last["usage"]["output_tokens"], 3);
}

#[tokio::test]
async fn shapes_are_kept_and_what_cannot_be_passed_on_is_refused_with_a_reason() {
    let world = world(MockSettings::default(), None).await;
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]});
    let mut body = chat("[[say:{\"n\":3}]]");
    body["response_format"] = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
    let (status, answer) = world.post_json("/v1/chat/completions", &body).await;
    assert_eq!((status, &answer["choices"][0]["message"]["content"]), (StatusCode::OK, &json!("{\"n\":3}")));
    let before = world.mock.ledger().calls;
    for (path, body, word) in [
        ("/v1/chat/completions", json!({"messages": [], "model": "small"}), "no message"),
        ("/v1/chat/completions", json!({"messages": [{"role": "king", "content": "x"}]}), "role"),
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "x"}], "n": 2}), "n must be 1"),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "only text",
        ),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "tool", "tool_call_id": "x", "content": "y"}]}),
            "no call",
        ),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}),
            "at least 1",
        ),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": "x"}],
                "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}}),
            "JSON Schema",
        ),
        ("/v1/responses", json!({"input": "x", "previous_response_id": "r"}), "whole conversation"),
        ("/parallel", json!({"prompts": "x"}), "prompts"),
    ] {
        let (status, answer) = world.post_json(path, &body).await;
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(status.is_client_error() && message.contains(word), "{status} {message}");
    }
    assert_eq!(world.mock.ledger().calls, before);
}

#[tokio::test]
async fn failures_have_a_status_of_their_own_and_clients_are_told_not_to_repeat_them() {
    for (directive, status, code) in [
        ("[[status:401]]", StatusCode::BAD_GATEWAY, "provider_auth"),
        ("[[status:400]]", StatusCode::BAD_REQUEST, "invalid_request"),
        ("[[status:404]]", StatusCode::NOT_FOUND, "model_not_found"),
    ] {
        for stream in [false, true] {
            // A pool of its own: after a refused key the provider is left alone for a while.
            let world = world(MockSettings::default(), None).await;
            let mut body = chat(directive);
            body["stream"] = json!(stream);
            let response = world.send(request("POST", "/v1/chat/completions", Some(&body))).await;
            assert_eq!((response.status(), response.headers()["x-should-retry"].as_bytes()), (status, &b"false"[..]));
            let body = response.into_body().collect().await.unwrap().to_bytes();
            let body: Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(body["error"]["code"], code, "{body}");
        }
    }
    let world = world(MockSettings::default(), None).await;
    let (status, body) = world.post_json("/v1/chat/completions", &chat("[[blocked]]")).await;
    assert_eq!((status, &body["choices"][0]["finish_reason"]), (StatusCode::OK, &json!("content_filter")));
}

#[tokio::test]
async fn a_budget_that_is_used_up_is_told_and_nothing_is_called() {
    let world = world(MockSettings::default(), Some(0.000_001)).await;
    let (status, body) = world.post_json("/v1/chat/completions", &chat("x")).await;
    assert_eq!(
        (status, &body["error"]["code"]),
        (StatusCode::TOO_MANY_REQUESTS, &json!("insufficient_quota")),
        "{body}"
    );
    assert!(body["error"]["message"].as_str().unwrap().contains("max_daily_spend"), "{body}");
    assert_eq!(world.mock.ledger().calls, 0);
}

#[tokio::test]
async fn a_caller_that_goes_away_takes_its_call_with_it() {
    let world = world(MockSettings::default(), None).await;
    for stream in [false, true] {
        let before = world.mock.ledger().aborted;
        let mut body = chat("[[hang]]");
        body["stream"] = json!(stream);
        let reached = async |wanted: &dyn Fn(&MockLlm) -> bool| {
            for _ in 0..3000 {
                if wanted(&world.mock) {
                    return;
                }
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
            panic!("it did not come about in 30 s");
        };
        {
            let call = world.send(request("POST", "/v1/chat/completions", Some(&body)));
            let begun = |mock: &MockLlm| mock.ledger().in_flight == 1;
            tokio::select! {
                _ = call => panic!("it hangs"),
                () = reached(&begun) => {}
            }
        }
        reached(&|mock| mock.ledger().aborted == before + 1).await;
    }
}

#[tokio::test]
async fn many_prompts_are_answered_in_their_order_whatever_fails() {
    let world = world(MockSettings { latency_ms: 5.0, jitter: 1.0, ..MockSettings::default() }, None).await;
    let mut prompts: Vec<String> = (0..600).map(|number| format!("[[say:answer {number}]]")).collect();
    prompts[7] = "[[status:400]]".into();
    let (status, text) = world.post("/parallel", &json!({"prompts": prompts})).await;
    assert_eq!(status, StatusCode::OK);
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((lines.len(), &lines[0]["event"]), (602, &json!("start")));
    assert!(lines[1..601].iter().all(|line| line["event"] == "progress"));
    let last = &lines[601];
    assert_eq!((&last["event"], &last["stats"]), (&json!("complete"), &json!({"successful": 599, "failed": 1})));
    for (number, result) in last["results"].as_array().unwrap().iter().enumerate() {
        let wanted = if number == 7 { Value::Null } else { json!(format!("answer {number}")) };
        assert_eq!(result, &wanted);
    }
    let ledger = world.mock.ledger();
    assert!(ledger.max_in_flight > 1 && ledger.answered_again == 0, "{ledger:?}");
}

/// Events of the older daemon were everybody's: the eighth of twelve clients heard of all prompts.
#[tokio::test]
async fn twelve_clients_at_once_hear_of_their_own_prompts_and_of_no_others() {
    let world = world(MockSettings { latency_ms: 5.0, jitter: 1.0, ..MockSettings::default() }, None).await;
    let ask = async |client: usize| {
        let prompts: Vec<String> = (0..20).map(|number| format!("[[say:{client} of {number}]]")).collect();
        let (status, text) = world.post("/parallel", &json!({"prompts": prompts})).await;
        assert_eq!(status, StatusCode::OK);
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 22, "client {client}: {text}");
        let foreign = |line: &&str| (0..12).any(|other| other != client && line.contains(&format!("\"{other} of ")));
        assert_eq!(text.lines().find(foreign), None, "client {client}");
        let own: Vec<Value> = (0..20).map(|number| json!(format!("{client} of {number}"))).collect();
        assert_eq!(lines[21]["results"], json!(own), "client {client}");
    };
    futures::future::join_all((0..12).map(ask)).await;
    assert!(world.mock.ledger().max_in_flight > 20, "they were not at once: {:?}", world.mock.ledger());
}
