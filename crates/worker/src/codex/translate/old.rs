//! The dialect of older app-servers: `codex/event/*`, everything in `params.msg`, in snake case.

use serde_json::{Map, Value, json};

use super::{Dialect, Said, Translator, Usage, count, event, notice, short_changes, shortened, text};

impl Translator {
    /// The messages of older app-servers: everything is in `msg`, whose `type` repeats the method.
    pub(super) fn old_event(&mut self, name: &str, params: &Value) -> Vec<Said> {
        let msg = &params["msg"];
        let turn_id = text(&msg["turn_id"]).or_else(|| text(&params["id"])).filter(|id| !id.is_empty());
        let call_id = text(&msg["call_id"]).unwrap_or_default();
        let method = format!("codex/event/{name}");
        match name {
            "task_started" => vec![event("task_started", turn_id, json!({"raw": msg}))],
            "task_complete" => {
                let data = json!({"last_agent_message": msg["last_agent_message"], "raw": msg});
                vec![event("task_complete", turn_id, data)]
            }
            "agent_message_content_delta" | "agent_message_delta" => {
                self.delta("assistant_delta", &method, turn_id, &msg["delta"])
            }
            "agent_reasoning_delta" | "agent_reasoning_raw_content_delta" | "reasoning_content_delta" => {
                self.delta("reasoning_delta", &method, turn_id, &msg["delta"])
            }
            "agent_message" => {
                let text = text(&msg["message"]).unwrap_or_default();
                self.assistant(Dialect::Events, turn_id, text, msg["phase"] == "final_answer")
            }
            "agent_reasoning" => {
                let text = text(&msg["text"]).unwrap_or_default();
                self.reasoning(Dialect::Events, turn_id, &text)
            }
            "token_count" => {
                let info = &msg["info"];
                let read = |part: &Value| Usage {
                    total: count(&part["total_tokens"]),
                    input: count(&part["input_tokens"]),
                    cached: count(&part["cached_input_tokens"]),
                    output: count(&part["output_tokens"]),
                    reasoning: count(&part["reasoning_output_tokens"]),
                };
                if info.is_null() {
                    return Vec::new();
                }
                let (total, last) = (read(&info["total_token_usage"]), read(&info["last_token_usage"]));
                self.usage(turn_id, total, last, &info["model_context_window"])
            }
            "exec_command_begin" => {
                self.command_started(turn_id, call_id, &json!({"command": msg["command"], "cwd": msg["cwd"]}))
            }
            "exec_command_end" => {
                let command = json!({"command": msg["command"], "cwd": msg["cwd"]});
                let stdout = if msg["stdout"].is_string() { &msg["stdout"] } else { &msg["aggregated_output"] };
                let duration = if msg["duration"].is_object() { msg["duration"].clone() } else { Value::Null };
                let output = json!({"stdout": shortened(stdout), "stderr": shortened(&msg["stderr"]),
                    "exit_code": msg["exit_code"], "duration": duration});
                self.command_completed(turn_id, &call_id, &command, output)
            }
            "patch_apply_begin" => {
                let changes = short_changes(&changes_of_map(&msg["changes"]));
                self.turn.changes.insert(call_id.clone(), changes.clone());
                self.file_change(false, turn_id, &call_id, json!({"status": "inProgress", "changes": changes}))
            }
            "patch_apply_end" => {
                let status = if msg["success"] == true { "completed" } else { "failed" };
                self.file_change(
                    true,
                    turn_id,
                    &call_id,
                    json!({"status": status, "stderr": shortened(&msg["stderr"])}),
                )
            }
            "error" => self.error(Dialect::Events, turn_id, msg, &msg["codex_error_info"], &Value::Null, false),
            "stream_error" => self.error(Dialect::Events, turn_id, msg, &msg["codex_error_info"], &Value::Null, true),
            "item_started" => self.item(false, turn_id, &new_item(&msg["item"])),
            "item_completed" => self.item(true, turn_id, &new_item(&msg["item"])),
            "warning" => notice(&msg["message"]),
            _ => Vec::new(),
        }
    }
}

/// The older dialect maps paths to changes; the newer one lists them.
pub(in crate::codex) fn changes_of_map(changes: &Value) -> Value {
    let Some(map) = changes.as_object() else { return json!([]) };
    let list = map.iter().map(|(path, change)| {
        let diff = if change["unified_diff"].is_string() { &change["unified_diff"] } else { &change["content"] };
        json!({"path": path, "kind": {"type": change["type"], "move_path": change["move_path"]}, "diff": diff})
    });
    Value::Array(list.collect())
}

/// Items inside the older dialect name their type in capitals and carry snake case.
fn new_item(item: &Value) -> Value {
    let Value::Object(fields) = item else { return Value::Null };
    let mut renamed = Map::new();
    for (name, value) in fields {
        let name = match name.as_str() {
            "aggregated_output" => "aggregatedOutput",
            "exit_code" => "exitCode",
            "duration_ms" => "durationMs",
            "client_id" => "clientId",
            "summary_text" => "summary",
            "raw_content" => "content",
            same => same,
        };
        renamed.insert(name.to_owned(), value.clone());
    }
    if let Some(Value::String(kind)) = renamed.get_mut("type")
        && let Some(first) = kind.get(..1).map(str::to_ascii_lowercase)
    {
        kind.replace_range(..1, &first);
    }
    Value::Object(renamed)
}
