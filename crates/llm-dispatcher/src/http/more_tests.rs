//! Research over HTTP, answers that are kept, and what a trace tells.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::http::{HeaderValue, StatusCode, header};
use drover_config::{FetchConfig, NodeScalingConfig, SearchSettings};
use drover_testkit::mock_llm::{MockLlm, Settings as MockSettings};
use futures::future::join_all;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing_subscriber::layer::{Context as Place, Layer, SubscriberExt as _};

use super::tests::{Setup, World, chat, events, request, world_with};
use crate::cache::CacheSettings;
use crate::call::CallRequest;
use crate::fetch::loopback::{Loopback, Said};
use crate::ledger::Zone;
use crate::shell::Job;

/// A site about animals and an engine that finds its pages; it knows nothing of goats, and the page on yaks is gone.
fn animals() -> Loopback {
    let known = Arc::new(std::sync::OnceLock::<String>::new());
    let own = Arc::clone(&known);
    let site = Loopback::serve(move |asked| match asked.path.as_str() {
        "/robots.txt" => Said::new(200, "text/plain", ""),
        "/yaks" => Said::new(404, "text/html", ""),
        path if path.starts_with("/search?") => {
            let name = ["sheep", "yaks", "llamas"].into_iter().find(|name| path.contains(name));
            let base = own.get().cloned().unwrap_or_default();
            let hit = name
                .map(|name| json!({"url": format!("{base}/{name}"), "title": name, "content": format!("On {name}.")}));
            Said::json(200, &json!({"results": hit.into_iter().collect::<Vec<_>>()}).to_string())
        }
        path => {
            let name = path.trim_start_matches('/');
            Said::html(&format!("<title>{name}</title><p>{}", format!("A page on {name}, with facts. ").repeat(10)))
        }
    });
    known.set(site.url("")).unwrap();
    site
}

fn searching(site: &Loopback, price: Option<f64>) -> NodeScalingConfig {
    let base = site.url("");
    NodeScalingConfig {
        fetch: FetchConfig { allow: vec![site.addr.to_string()], ..FetchConfig::default() },
        search: SearchSettings { backend: "searxng".into(), base_url: Some(base), price, ..SearchSettings::default() },
        ..NodeScalingConfig::default()
    }
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn research_answers_each_subject_from_its_own_page_and_pays_for_searches_from_the_same_ledger() {
    let site = animals();
    let setup = Setup { scaling: searching(&site, Some(0.01)), cap: Some(1.0), ..Setup::default() };
    let mock = MockLlm::start(MockSettings { latency_ms: 2.0, ..MockSettings::default() }).unwrap();
    let world = world_with(mock, &setup, tempfile::tempdir().unwrap()).await;
    let body = json!({"subjects": ["sheep", "goats", "yaks", "llamas"], "topic": "wool"});
    let (status, text) = world.post("/research", &body).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    let lines = lines(&text);
    assert_eq!((&lines[0]["event"], &lines[0]["topic"]), (&json!("start"), &json!("wool")));
    let tasks: Vec<&Value> = lines.iter().filter(|line| line["event"] == "task").collect();
    assert_eq!((tasks.len(), &tasks[3]["completed"], &tasks[3]["total"]), (4, &json!(4), &json!(4)));
    let last = lines.last().unwrap();
    assert_eq!((&last["event"], &last["stats"]["successful"]), (&json!("complete"), &json!(4)), "{last}");
    let expected = [("sheep", "page"), ("goats", "none"), ("yaks", "snippets"), ("llamas", "page")];
    for (analysis, (subject, grounding)) in last["analyses"].as_array().unwrap().iter().zip(expected) {
        assert_eq!((&analysis["subject"], &analysis["grounding"]), (&json!(subject), &json!(grounding)), "{analysis}");
        assert!(analysis["analysis"].as_str().unwrap().contains(&format!("Subject: {subject}")), "{analysis}");
        for source in analysis["sources"].as_array().unwrap() {
            assert_eq!(source["url"], json!(site.url(&format!("/{subject}"))), "{analysis}");
        }
    }
    // Four searches at a cent each, and four calls as the mock counts them.
    let spent = world.ledger.spent(1).await.unwrap();
    let cost =
        |provider: &str| spent[0].spent.iter().find(|line| line.provider == provider).map(|line| line.cost.usd());
    assert!((cost("searxng").unwrap() - 0.04).abs() < 1e-9, "{spent:?}");
    assert!((cost("local").unwrap() - world.mock.ledger().spent_pico as f64 / 1e12).abs() < 1e-12, "{spent:?}");
    let told = last["cost"]["usd"].as_f64().unwrap();
    assert!((told - cost("searxng").unwrap() - cost("local").unwrap()).abs() < 1e-9, "{told} {spent:?}");

    for wrong in [json!({"topic": "x"}), json!({"subjects": [" "]}), json!({"subjects": "sheep"})] {
        let (status, _) = world.post("/research", &wrong).await;
        assert!(status.is_client_error(), "{wrong}");
    }
    let mut unknown = request("POST", "/research", Some(&body));
    unknown.headers_mut().remove(header::AUTHORIZATION);
    assert_eq!(world.send(unknown).await.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn a_search_that_the_days_budget_does_not_allow_is_not_made() {
    let site = animals();
    let mock = || MockLlm::start(MockSettings::default()).unwrap();
    // Three searches at a cent each are in it, whatever becomes of the others.
    let setup = Setup { scaling: searching(&site, Some(0.01)), cap: Some(0.035), ..Setup::default() };
    let world = world_with(mock(), &setup, tempfile::tempdir().unwrap()).await;
    let body = json!({"subjects": vec!["sheep"; 12]});
    world.post("/research", &body).await;
    let searches = site.paths().iter().filter(|path| path.starts_with("/search?")).count();
    assert!((1..=3).contains(&searches), "{searches} searches");
    let counted = world.ledger.counted(Zone::named(None).unwrap().day(drover_service::now_us())).await.unwrap();
    assert!(counted.usd() <= 0.035 + 1e-9, "{counted}");
}

async fn caching(mock: MockSettings, dir: tempfile::TempDir) -> World {
    let cache = CacheSettings { max_bytes: 1 << 20, ttl: Duration::from_hours(1), salt: "here".into() };
    let setup = Setup { cache: Some(cache), ..Setup::default() };
    world_with(MockLlm::start(mock).unwrap(), &setup, dir).await
}

#[tokio::test]
async fn an_answer_is_given_again_marked_and_for_nothing_and_only_to_the_same_question() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let world = caching(MockSettings::default(), dir).await;
    let ask = async |world: &World, body: &Value| world.post_json("/v1/chat/completions", body).await.1;
    let first = ask(&world, &chat("What is wool?")).await;
    assert_eq!(first["drover"]["cached"], json!(false));
    let again = ask(&world, &chat("What is wool?")).await;
    assert_eq!((&again["drover"]["cached"], &again["drover"]["cost_usd"]), (&json!(true), &json!(0.0)), "{again}");
    assert_eq!((&again["choices"], &again["usage"]), (&first["choices"], &first["usage"]));
    assert_eq!(world.mock.ledger().calls, 1);

    // A stream of the same, and a whole one of what was streamed.
    let mut streamed = chat("What is wool?");
    streamed["stream"] = json!(true);
    let (_, text) = world.post("/v1/chat/completions", &streamed).await;
    let content: String =
        events(&text).iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!((json!(content), world.mock.ledger().calls), (first["choices"][0]["message"]["content"].clone(), 1));
    let mut streamed = chat("What is felt?");
    streamed["stream"] = json!(true);
    world.post("/v1/chat/completions", &streamed).await;
    assert_eq!(ask(&world, &chat("What is felt?")).await["drover"]["cached"], json!(true));
    assert_eq!(world.mock.ledger().calls, 2);

    let mut changed = vec![chat("What is wool? "), chat("what is wool?")];
    for (key, value) in [
        ("temperature", json!(0.0)),
        ("top_p", json!(0.5)),
        ("max_tokens", json!(99)),
        ("stop", json!(["."])),
        ("model", json!("other")),
        ("user", json!("someone")),
        ("tools", json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}])),
    ] {
        let mut body = chat("What is wool?");
        body[key] = value;
        changed.push(body);
    }
    for body in &changed {
        let before = world.mock.ledger().calls;
        ask(&world, body).await;
        assert_eq!(world.mock.ledger().calls, before + 1, "{body}");
    }
    let before = world.mock.ledger().calls;
    let mut fresh = request("POST", "/v1/chat/completions", Some(&chat("What is wool?")));
    fresh.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    assert_eq!(world.send(fresh).await.status(), StatusCode::OK);
    assert_eq!(world.mock.ledger().calls, before + 1, "a fresh one was asked for");

    // Another process with the same directory, to which the answer was handed through the disk.
    let disk = path.join("dispatcher");
    let written = || {
        let open = rusqlite::Connection::open(disk.join("cache.sqlite")).unwrap();
        open.query_row("SELECT count(*) FROM answers", [], |row| row.get::<_, i64>(0)).unwrap_or(0)
    };
    let expected = 2 + i64::try_from(changed.len()).unwrap();
    for _ in 0..3000 {
        if written() == expected {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(written(), expected, "answers reach the disk");
    let next = tempfile::tempdir().unwrap();
    let store = next.path().join("dispatcher");
    std::fs::create_dir_all(&store).unwrap();
    for suffix in ["", "-wal"] {
        let name = format!("cache.sqlite{suffix}");
        let _ = std::fs::copy(disk.join(&name), store.join(&name));
    }
    let bytes = std::fs::read(store.join("cache.sqlite")).unwrap();
    let wal = std::fs::read(store.join("cache.sqlite-wal")).unwrap_or_default();
    let holds = |text: &[u8]| [&bytes, &wal].iter().any(|file| file.windows(text.len()).any(|part| part == text));
    assert!(!holds(b"Be brief."), "prompts are not kept");
    let other = caching(MockSettings::default(), next).await;
    let later = ask(&other, &chat("What is wool?")).await;
    assert_eq!((&later["drover"]["cached"], other.mock.ledger().calls), (&json!(true), 0), "{later}");
    assert_eq!(later["choices"], first["choices"]);
}

#[tokio::test]
async fn equal_questions_at_once_are_asked_once_and_survive_whoever_asked() {
    let world =
        caching(MockSettings { latency_ms: 300.0, ..MockSettings::default() }, tempfile::tempdir().unwrap()).await;
    let chain = world.pool.chain(None, None).unwrap();
    let job = |text: &str| Job::call(CallRequest::prompt(text, 50), chain.clone());
    let client = world.pool.client(1);
    let answers = join_all((0..40).map(|_| client.run(job("the same")))).await;
    assert_eq!(world.mock.ledger().calls, 1);
    assert_eq!(answers.iter().filter(|done| !done.cached).count(), 1, "one of them paid");
    assert!(answers.iter().all(|done| done.answer == answers[0].answer && done.answer.is_some()));
    let cost: u128 = answers.iter().map(|done| done.cost.pico()).sum();
    assert_eq!(cost, world.mock.ledger().spent_pico);

    // The one who asks goes away in the middle, and would never have had an answer: another asks instead.
    world.mock.change(|settings| settings.hang_rate = 1.0);
    let gone = world.pool.client(1);
    let mut asking = Box::pin(gone.run(job("another")));
    let until = async |wanted: &dyn Fn(&MockLlm) -> bool| {
        for _ in 0..3000 {
            if wanted(&world.mock) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it did not come about in 30 s");
    };
    tokio::select! {
        _ = &mut asking => panic!("it hangs"),
        () = until(&|mock| mock.ledger().in_flight == 1) => {}
    }
    let mut waiting = Box::pin(client.run(job("another")));
    tokio::select! {
        _ = &mut asking => panic!("it hangs"),
        _ = &mut waiting => panic!("it waits"),
        () = tokio::time::sleep(Duration::from_millis(50)) => {}
    }
    assert_eq!(world.mock.ledger().in_flight, 1, "it waits for the answer to the same question");
    world.mock.change(|settings| settings.hang_rate = 0.0);
    drop(asking);
    let done = waiting.await;
    assert!(done.answer.is_some(), "{}", done.error);

    // What fails is not kept, and those who waited for it find out for themselves.
    let before = world.mock.ledger().calls;
    let failed = join_all((0..3).map(|_| client.run(job("[[status:400]]")))).await;
    assert!(failed.iter().all(|done| done.answer.is_none() && !done.cached));
    assert_eq!(world.mock.ledger().calls - before, 3);
    // And what is withheld is asked again.
    for _ in 0..2 {
        client.run(job("[[blocked]]")).await;
    }
    assert_eq!(world.mock.ledger().calls - before, 5);
}

/// Keeps every name and value that anybody tells the log or a trace.
#[derive(Clone, Default)]
struct Capture {
    all: Arc<Mutex<String>>,
    calls: Arc<Mutex<BTreeMap<u64, BTreeMap<String, String>>>>,
}

struct Words<'a>(&'a mut BTreeMap<String, String>);

impl Visit for Words<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.insert(field.name().to_owned(), format!("{value:?}"));
    }
}

impl Capture {
    fn note(&self, fields: &BTreeMap<String, String>) {
        let _ = writeln!(self.all.lock().unwrap(), "{fields:?}");
    }
}

impl<S: tracing::Subscriber> Layer<S> for Capture {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, _: Place<'_, S>) {
        let mut fields = BTreeMap::new();
        attributes.record(&mut Words(&mut fields));
        self.note(&fields);
        if attributes.metadata().target() == "drover::gen_ai" {
            self.calls.lock().unwrap().insert(id.into_u64(), fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, _: Place<'_, S>) {
        let mut fields = BTreeMap::new();
        values.record(&mut Words(&mut fields));
        self.note(&fields);
        if let Some(call) = self.calls.lock().unwrap().get_mut(&id.into_u64()) {
            call.extend(fields);
        }
    }

    fn on_event(&self, event: &tracing::Event<'_>, _: Place<'_, S>) {
        let mut fields = BTreeMap::new();
        event.record(&mut Words(&mut fields));
        self.note(&fields);
    }
}

#[tokio::test]
async fn a_trace_counts_by_the_names_of_the_convention_and_has_no_word_of_prompt_answer_or_key() {
    let capture = Capture::default();
    let listening = tracing::subscriber::set_default(tracing_subscriber::registry().with(capture.clone()));
    let key = "k-e-y-that-must-not-show";
    let settings = MockSettings {
        api_key: Some(key.to_owned()),
        answer: Some("planted-answer".into()),
        output_tokens: Some(7),
        ..MockSettings::default()
    };
    let setup = Setup { key: Some("k-e-y-that-must-not-show"), ..Setup::default() };
    let world = world_with(MockLlm::start(settings).unwrap(), &setup, tempfile::tempdir().unwrap()).await;
    let mut body = chat("planted-prompt");
    body["messages"][0]["content"] = json!("planted-system");
    body["temperature"] = json!(0.25);
    body["max_tokens"] = json!(321);
    let (_, answer) = world.post_json("/v1/chat/completions", &body).await;
    assert_eq!(answer["choices"][0]["message"]["content"], json!("planted-answer"), "{answer}");
    let (status, _) = world.post_json("/v1/chat/completions", &chat("planted-prompt [[status:400]]")).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    let response = world.send(request("POST", "/parallel", Some(&json!({"prompts": ["planted-prompt"]})))).await;
    response.into_body().collect().await.unwrap();
    world.mock.change(|settings| settings.api_key = Some("another".into()));
    world.post_json("/v1/chat/completions", &chat("planted-prompt")).await;
    drop(listening);

    let calls: Vec<_> = capture.calls.lock().unwrap().values().cloned().collect();
    let of = |call: &BTreeMap<String, String>, name: &str| call.get(name).cloned().unwrap_or_default();
    let good = calls.iter().find(|call| of(call, "gen_ai.request.max_tokens") == "321").unwrap();
    let usage = &answer["usage"];
    for (name, value) in [
        ("otel.name", "\"chat small\"".to_owned()),
        ("otel.kind", "\"client\"".to_owned()),
        ("gen_ai.operation.name", "\"chat\"".to_owned()),
        ("gen_ai.provider.name", "\"local\"".to_owned()),
        ("gen_ai.request.model", "small".to_owned()),
        ("gen_ai.request.temperature", "0.25".to_owned()),
        ("gen_ai.response.model", format!("{:?}", answer["model"].as_str().unwrap())),
        ("gen_ai.response.finish_reasons", "\"[\\\"stop\\\"]\"".to_owned()),
        ("gen_ai.usage.input_tokens", usage["prompt_tokens"].to_string()),
        ("gen_ai.usage.output_tokens", "7".to_owned()),
    ] {
        assert_eq!(of(good, name), value, "{name} of {good:?}");
    }
    let mut failed: Vec<String> =
        calls.iter().map(|call| of(call, "error.type")).filter(|kind| !kind.is_empty()).collect();
    failed.sort();
    assert_eq!(failed, ["\"auth\"", "\"bad_request\""], "{calls:?}");
    let all = capture.all.lock().unwrap().clone();
    assert!(all.contains("gen_ai.operation.name"));
    for planted in ["planted-prompt", "planted-system", "planted-answer", key, "a-token-of-the-tests"] {
        assert!(
            !all.contains(planted),
            "{planted} shows: {}",
            all.lines().find(|line| line.contains(planted)).unwrap()
        );
    }
}
