//! The questions that codex asks before it acts, and the answers it understands.

use std::path::Path;

use drover_types::InjectionId;
use serde_json::{Value, json};

use super::translate::{Translator, changes_of_map};
use super::workspace::Workspace;

/// A question that waits for an answer.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Question {
    /// Codex's id for it, to answer with.
    pub(super) rpc_id: Value,
    /// Names it everywhere outside codex, among the questions of every node of every swarm. What codex calls its turns and
    /// its questions may be the same in two of its processes; an injection's id is unique.
    pub(super) approval_id: String,
    /// The call it is about.
    pub(super) call_id: String,
    /// Whether the call stays inside the node's working directory.
    pub(super) inside_workspace: bool,
    /// What people are shown.
    pub(super) data: Value,
    words: Words,
}

/// Which words codex takes for an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Words {
    Command,
    FileChange,
    /// The two questions of older app-servers.
    Older,
}

const DECISIONS: [&str; 4] = ["accept", "acceptForSession", "decline", "cancel"];

impl Question {
    /// Reads a question of this injection's turn; none when it is one that we do not know.
    pub(super) fn read(
        injection: Option<&InjectionId>,
        rpc_id: &Value,
        method: &str,
        params: &Value,
        workspace: &Workspace,
        translator: &Translator,
    ) -> Option<Self> {
        let words = match method {
            "item/commandExecution/requestApproval" => Words::Command,
            "item/fileChange/requestApproval" => Words::FileChange,
            "execCommandApproval" | "applyPatchApproval" => Words::Older,
            _ => return None,
        };
        let call_id = params["itemId"].as_str().or_else(|| params["callId"].as_str()).unwrap_or_default().to_owned();
        let turn_id =
            params["turnId"].as_str().or_else(|| params["conversationId"].as_str()).unwrap_or("turn").to_owned();
        let cwd = params["cwd"].as_str().unwrap_or_default().to_owned();
        let command = &params["command"];

        let changes = match &params["fileChanges"] {
            Value::Null => translator.changes_of(&call_id).cloned().unwrap_or(Value::Null),
            map => changes_of_map(map),
        };
        let is_patch = words == Words::FileChange || method == "applyPatchApproval";
        let inside_workspace = if is_patch {
            changes_inside(&changes, workspace) && grant_inside(&params["grantRoot"], workspace)
        } else {
            params["networkApprovalContext"].is_null()
                && params["additionalPermissions"].is_null()
                && matches!(params["kind"].as_str(), None | Some("command"))
                && command_line(command).is_some_and(|line| workspace.holds_command(Path::new(&cwd), &line))
        };

        let rpc = rpc_id.as_str().map_or_else(|| rpc_id.to_string(), str::to_owned);
        let approval_id = injection.map_or_else(|| rpc.clone(), |injection| format!("{injection}-{rpc}"));
        let mut data = json!({
            "approval_id": approval_id,
            "call_id": call_id,
            "turn_id": turn_id,
            "command": command,
            "reason": params["reason"],
            "cwd": params["cwd"],
            "proposed_execpolicy_amendment": params["proposedExecpolicyAmendment"],
            "available_decisions": decisions(&params["availableDecisions"]),
        });
        if is_patch {
            data["changes"] = changes;
            data["grant_root"] = params["grantRoot"].clone();
        }
        Some(Self { rpc_id: rpc_id.clone(), approval_id, call_id, inside_workspace, data, words })
    }

    /// The result to send. A refusal wins over whatever the decision says: only a word that fits `approved` is taken.
    pub(super) fn result(&self, approved: bool, decision: Option<&Value>) -> Value {
        let word = decision.and_then(Value::as_str).unwrap_or_default();
        let canonical = match (approved, word) {
            (true, "acceptForSession" | "approved_for_session" | "session") => "acceptForSession",
            (true, "decline" | "declined" | "denied" | "deny") => "decline",
            (_, "cancel" | "abort") => "cancel",
            (true, _) => "accept",
            (false, _) => "decline",
        };
        if approved && self.words == Words::Command && decision.is_some_and(Value::is_object) {
            return json!({"decision": decision});
        }
        let word = match (self.words, canonical) {
            (Words::Older, "accept") => "approved",
            (Words::Older, "acceptForSession") => "approved_for_session",
            (Words::Older, "decline") => "denied",
            (Words::Older, "cancel") => "abort",
            (_, same) => same,
        };
        json!({"decision": word})
    }
}

/// What codex offers, and what it understands although it does not offer it.
fn decisions(offered: &Value) -> Value {
    let mut list = offered.as_array().cloned().unwrap_or_default();
    for decision in DECISIONS {
        if !list.iter().any(|offer| offer == decision) {
            list.push(json!(decision));
        }
    }
    Value::Array(list)
}

fn command_line(command: &Value) -> Option<String> {
    match command {
        Value::String(line) => Some(line.clone()),
        Value::Array(words) => Some(words.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" ")),
        _ => None,
    }
}

/// Without a known path nothing can be said, so that counts as outside.
fn changes_inside(changes: &Value, workspace: &Workspace) -> bool {
    let changes = changes.as_array().map(Vec::as_slice).unwrap_or_default();
    let inside = |path: &Value| path.as_str().is_some_and(|path| workspace.holds(Path::new(""), path));
    !changes.is_empty()
        && changes.iter().all(|change| {
            let moved = &change["kind"]["move_path"];
            inside(&change["path"]) && (moved.is_null() || inside(moved))
        })
}

fn grant_inside(root: &Value, workspace: &Workspace) -> bool {
    root.is_null() || root.as_str().is_some_and(|path| workspace.holds(Path::new(""), path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(method: &str, params: &Value) -> Question {
        let dir = tempfile::tempdir().unwrap();
        let mut translator = Translator::default();
        translator.translate(
            "item/started",
            &json!({"item": {"type": "fileChange", "id": "c1",
            "changes": [{"path": "a.txt", "kind": {"type": "update", "move_path": null}, "diff": ""}]}}),
        );
        let injection = "injection-1".parse().unwrap();
        Question::read(Some(&injection), &json!(3), method, params, &Workspace::new(dir.path()), &translator).unwrap()
    }

    #[test]
    fn every_answer_finds_its_word() {
        let command =
            question("item/commandExecution/requestApproval", &json!({"itemId": "c", "turnId": "t", "command": "ls"}));
        let older = question("execCommandApproval", &json!({"callId": "c", "command": ["ls", "-l"]}));
        let amendment = json!({"acceptWithExecpolicyAmendment": {"execpolicy_amendment": ["ls"]}});
        for (approved, decision, new, old) in [
            (true, None, "accept", "approved"),
            (true, Some(json!("approved")), "accept", "approved"),
            (true, Some(json!("acceptForSession")), "acceptForSession", "approved_for_session"),
            (true, Some(json!("cancel")), "cancel", "abort"),
            (true, Some(json!("denied")), "decline", "denied"),
            (false, None, "decline", "denied"),
            (false, Some(json!("accept")), "decline", "denied"),
            (false, Some(json!("abort")), "cancel", "abort"),
            (false, Some(amendment.clone()), "decline", "denied"),
        ] {
            assert_eq!(
                command.result(approved, decision.as_ref()),
                json!({"decision": new}),
                "{approved} {decision:?}"
            );
            assert_eq!(older.result(approved, decision.as_ref()), json!({"decision": old}), "{approved} {decision:?}");
        }
        assert_eq!(command.result(true, Some(&amendment)), json!({"decision": amendment}));
        assert_eq!(
            (command.approval_id.as_str(), &command.data["approval_id"]),
            ("injection-1-3", &json!("injection-1-3"))
        );
    }

    #[test]
    fn a_file_change_is_judged_by_its_paths() {
        let ask = |params: &Value| question("item/fileChange/requestApproval", params).inside_workspace;
        assert!(ask(&json!({"itemId": "c1", "turnId": "t"})));
        assert!(!ask(&json!({"itemId": "c1", "turnId": "t", "grantRoot": "/etc"})));
        assert!(!ask(&json!({"itemId": "unknown", "turnId": "t"})));
        let older = |path: &str| {
            question(
                "applyPatchApproval",
                &json!({"callId": "x", "fileChanges": {path: {"type": "add", "content": ""}}}),
            )
        };
        assert!(older("sub/new.txt").inside_workspace);
        assert!(!older("/etc/passwd").inside_workspace);
    }
}
