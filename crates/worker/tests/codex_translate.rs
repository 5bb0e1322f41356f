//! The translation of codex's messages, tested on a recording of the real program: no binary is needed here.
//!
//! `fixtures/codex-0.169.0.jsonl` is what `codex app-server` wrote in seven turns (an answer, a command accepted, one
//! declined, a patch, an interrupted command, a failure, a steered turn), with ids and paths made neutral.
//! `fixtures/codex-0.169.0.events.jsonl` is what clients are told; `DROVER_UPDATE_FIXTURES=1` writes it anew.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::path::PathBuf;

use drover_worker::codex::rpc::{Decoder, Faults, Message};
use drover_worker::codex::translate::{Said, Translator};
use serde_json::{Value, json};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn recording() -> Vec<Message> {
    let bytes = std::fs::read(fixture("codex-0.169.0.jsonl")).unwrap();
    let mut decoder = Decoder::default();
    decoder.push(&bytes);
    let messages = std::iter::from_fn(|| decoder.next_message()).collect();
    decoder.finish();
    assert_eq!(decoder.faults(), Faults::default());
    messages
}

fn line(said: &Said) -> Value {
    match said {
        Said::Event { kind, turn_id, data } => json!({"event": kind, "turn_id": turn_id, "data": data}),
        Said::TurnStarted { turn_id } => json!({"turn_started": turn_id}),
        Said::TurnEnded { turn_id, status, error, text } => json!({
            "turn_ended": turn_id,
            "status": status.as_str(),
            "error": error.as_ref().map(|error| json!({"message": error.message, "info": error.info})),
            "text": text,
        }),
        Said::PromptTaken { client_id } => json!({"prompt_taken": client_id}),
        Said::QuestionClosed { request_id } => json!({"question_closed": request_id}),
        Said::Notice { message } => json!({"notice": message}),
    }
}

fn play(messages: &[Message]) -> Vec<Value> {
    let mut translator = Translator::default();
    let mut out = Vec::new();
    for message in messages {
        match message {
            Message::Response { result: Ok(result), .. } if result["thread"]["id"].is_string() => {
                translator.open_thread(result["thread"]["id"].as_str().unwrap(), result["model"].as_str(), false);
            }
            Message::Response { result: Ok(result), .. } if result["turn"]["id"].is_string() => translator.begin_turn(),
            Message::Notification { method, params } => {
                out.extend(translator.translate(method, params).iter().map(line));
            }
            _ => {}
        }
    }
    out
}

#[test]
fn the_recording_gives_these_events() {
    let told = play(&recording());
    let path = fixture("codex-0.169.0.events.jsonl");
    if std::env::var_os("DROVER_UPDATE_FIXTURES").is_some() {
        let lines: Vec<String> = told.iter().map(Value::to_string).collect();
        std::fs::write(&path, lines.join("\n") + "\n").unwrap();
    }
    let expected: Vec<Value> =
        std::fs::read_to_string(&path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (at, (told, expected)) in told.iter().zip(&expected).enumerate() {
        assert_eq!(told, expected, "event {at}");
    }
    assert_eq!(told.len(), expected.len());
}

/// Whatever codex may send, the worker lives.
#[test]
fn no_shape_of_a_message_is_fatal() {
    let mut translator = Translator::default();
    translator.begin_turn();
    for message in recording() {
        let Message::Notification { method, params } = message else { continue };
        for pointer in pointers(&params, "") {
            for wrong in [Value::Null, json!(-7), json!("é"), json!([[]]), json!({"": null})] {
                let mut params = params.clone();
                *params.pointer_mut(&pointer).unwrap() = wrong;
                translator.translate(&method, &params);
                let old = json!({"id": "", "msg": params});
                for event in ["item_completed", "token_count", "exec_command_end", "patch_apply_begin", "error"] {
                    translator.translate(&format!("codex/event/{event}"), &old);
                }
            }
        }
    }
}

fn pointers(value: &Value, at: &str) -> Vec<String> {
    let mut all = vec![at.to_owned()];
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                all.extend(pointers(value, &format!("{at}/{}", name.replace('~', "~0").replace('/', "~1"))));
            }
        }
        Value::Array(items) => {
            for (index, value) in items.iter().enumerate() {
                all.extend(pointers(value, &format!("{at}/{index}")));
            }
        }
        _ => {}
    }
    all
}

fn events(translator: &mut Translator, messages: &[(&str, Value)]) -> Vec<(String, Value)> {
    let said = messages.iter().flat_map(|(method, params)| translator.translate(method, params));
    let events = said.filter_map(|said| match said {
        Said::Event { kind, data, .. } => Some((kind.to_owned(), data)),
        _ => None,
    });
    events.collect()
}

fn old(msg: &Value) -> Value {
    json!({"id": "turn", "conversationId": "thread", "msg": msg})
}

#[test]
fn the_older_dialect_is_understood() {
    let mut translator = Translator::default();
    translator.open_thread("thread", Some("m"), false);
    translator.begin_turn();
    translator.translate("turn/started", &json!({"threadId": "thread", "turn": {"id": "turn"}}));
    let command = json!(["bash", "-lc", "ls"]);
    let tokens = |n: i64| json!({"total_tokens": n, "input_tokens": n, "cached_input_tokens": 0, "output_tokens": 0, "reasoning_output_tokens": 0});
    let told = events(
        &mut translator,
        &[
            ("codex/event/task_started", old(&json!({"type": "task_started"}))),
            ("codex/event/agent_reasoning_delta", old(&json!({"delta": "hm"}))),
            ("codex/event/agent_reasoning", old(&json!({"text": "hmm"}))),
            ("codex/event/exec_command_begin", old(&json!({"call_id": "c1", "command": command, "cwd": "/ws"}))),
            (
                "codex/event/exec_command_end",
                old(&json!({"call_id": "c1", "command": command, "cwd": "/ws", "stdout": "a\n",
            "stderr": "w", "exit_code": 1, "duration": {"secs": 1, "nanos": 5}})),
            ),
            (
                "codex/event/patch_apply_begin",
                old(&json!({"call_id": "c2", "changes": {"a.txt": {"type": "add", "content": "x"}}})),
            ),
            ("codex/event/patch_apply_end", old(&json!({"call_id": "c2", "success": true}))),
            ("codex/event/agent_message_content_delta", old(&json!({"delta": "do"}))),
            ("codex/event/agent_message", old(&json!({"message": "done", "phase": "final_answer"}))),
            ("codex/event/token_count", old(&json!({"info": null}))),
            (
                "codex/event/token_count",
                old(&json!({"info": {"total_token_usage": tokens(9), "last_token_usage": tokens(4)}})),
            ),
            (
                "codex/event/stream_error",
                old(&json!({"message": "retrying", "codex_error_info": {"response_stream_disconnected": {}}})),
            ),
            ("codex/event/error", old(&json!({"message": "no quota", "codex_error_info": "usage_limit_exceeded"}))),
            ("codex/event/task_complete", old(&json!({"last_agent_message": "done"}))),
            ("codex/event/something_new", old(&json!({"x": 1}))),
        ],
    );
    let kinds: Vec<&str> = told.iter().map(|(kind, _)| kind.as_str()).collect();
    assert_eq!(
        kinds,
        [
            "task_started",
            "reasoning_delta",
            "reasoning",
            "command_started",
            "command_completed",
            "filechange_started",
            "filechange_completed",
            "assistant_delta",
            "assistant",
            "usage",
            "agent_error",
            "agent_error",
            "task_complete",
        ]
    );
    let of = |kind: &str| &told.iter().find(|(k, _)| k == kind).unwrap().1;
    assert_eq!(
        *of("command_completed"),
        json!({"turn_id": "turn", "call_id": "c1", "command": command, "cwd": "/ws",
        "stdout": "a\n", "stderr": "w", "exit_code": 1, "duration": {"secs": 1, "nanos": 5}})
    );
    assert_eq!(of("filechange_started")["changes"][0]["path"], "a.txt");
    assert_eq!(*of("assistant"), json!({"content": "done", "final_answer": true}));
    assert_eq!((&of("usage")["total_tokens"], &of("usage")["last_total_tokens"]), (&json!(9), &json!(9)));
    assert_eq!((&told[10].1["will_retry"], &told[11].1["will_retry"]), (&json!(true), &json!(false)));
    assert_eq!(of("task_complete")["last_agent_message"], "done");
}

#[test]
fn what_both_dialects_say_is_told_once() {
    let mut translator = Translator::default();
    translator.open_thread("thread", None, false);
    translator.begin_turn();
    translator.translate("turn/started", &json!({"threadId": "thread", "turn": {"id": "turn"}}));
    let item = |item: Value| json!({"threadId": "thread", "turnId": "turn", "item": item});
    let delta = json!({"threadId": "thread", "turnId": "turn", "itemId": "i", "delta": "hi"});
    let message = |id: &str| item(json!({"type": "agentMessage", "id": id, "text": "hi"}));
    let command = item(json!({"type": "commandExecution", "id": "c1", "command": "ls", "cwd": "/ws", "exitCode": 0}));
    let usage = json!({"threadId": "thread", "turnId": "turn", "tokenUsage": {"total": {"totalTokens": 5}, "last": {"totalTokens": 5}}});
    let told = events(
        &mut translator,
        &[
            ("codex/event/exec_command_begin", old(&json!({"call_id": "c1", "command": ["ls"], "cwd": "/ws"}))),
            ("item/started", command.clone()),
            ("codex/event/exec_command_end", old(&json!({"call_id": "c1", "exit_code": 0}))),
            ("item/completed", command),
            ("codex/event/agent_message_delta", old(&json!({"delta": "hi"}))),
            ("codex/event/agent_message_content_delta", old(&json!({"delta": "hi"}))),
            ("item/agentMessage/delta", delta),
            ("codex/event/agent_message", old(&json!({"message": "hi"}))),
            ("item/completed", message("i")),
            (
                "codex/event/item_completed",
                old(
                    &json!({"item": {"type": "AgentMessage", "id": "i", "content": [{"type": "Text", "text": "other"}]}}),
                ),
            ),
            (
                "codex/event/token_count",
                old(
                    &json!({"info": {"total_token_usage": {"total_tokens": 5}, "last_token_usage": {"total_tokens": 5}}}),
                ),
            ),
            ("thread/tokenUsage/updated", usage),
            // The same words a second time, as a message of its own, are no echo.
            ("item/completed", message("j")),
            ("item/completed", message("k")),
        ],
    );
    let kinds: Vec<&str> = told.iter().map(|(kind, _)| kind.as_str()).collect();
    assert_eq!(
        kinds,
        [
            "command_started",
            "command_completed",
            "assistant_delta",
            "assistant",
            "assistant",
            "usage",
            "assistant",
            "assistant",
        ]
    );
    // Another thread's words are nobody's here.
    assert_eq!(events(&mut translator, &[("item/agentMessage/delta", json!({"threadId": "sub", "delta": "x"}))]), []);
}

#[test]
fn a_long_output_is_cut_between_characters() {
    let mut translator = Translator::default();
    let output = "ä".repeat(1024 * 1024);
    let item = json!({"item": {"type": "commandExecution", "id": "c", "aggregatedOutput": output, "exitCode": 0}});
    let told = events(&mut translator, &[("item/completed", item)]);
    let stdout = told[0].1["stdout"].as_str().unwrap();
    assert!(stdout.len() < 300 * 1024 && stdout.contains("bytes left out"), "{}", stdout.len());
}
