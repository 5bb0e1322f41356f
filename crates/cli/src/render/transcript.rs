//! Turns events into lines for people. Knows no terminal: what is done and what is still growing are told apart, and the
//! caller decides where each goes.

use std::collections::BTreeMap;

use drover_proto::router as pb;
use serde_json::Value;

use crate::render::colour::Tone;
use crate::render::json::data_of;
use crate::render::table::one_line;
use crate::render::words;

/// One whole line about a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    /// Which node; none for the swarm as a whole.
    pub(crate) node: Option<u32>,
    /// Says what kind of line it is.
    pub(crate) kind: Kind,
    pub(crate) text: String,
}

/// What kind of line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A line of the agent's answer, as it is.
    Answer,
    /// A remark of ours.
    Remark(Tone),
}

/// What a node is saying at the moment.
#[derive(Debug, Default)]
struct Voice {
    injection: String,
    /// The text since the last line end.
    partial: String,
    /// Deltas came for this turn, so the whole text at its end is known already.
    streamed: bool,
    started_us: u64,
    tokens: Option<u64>,
    busy: bool,
}

/// The voices of a swarm.
#[derive(Debug, Default)]
pub(crate) struct Transcript {
    voices: BTreeMap<u32, Voice>,
}

impl Transcript {
    /// What a node is saying right now: whether a turn runs, and the end of its unfinished line.
    pub(crate) fn current(&self, node: u32) -> (bool, &str) {
        self.voices.get(&node).map_or((false, ""), |voice| (voice.busy, voice.partial.as_str()))
    }

    /// Nodes whose turn is running.
    pub(crate) fn busy(&self) -> usize {
        self.voices.values().filter(|voice| voice.busy).count()
    }

    /// The lines that this event completes.
    pub(crate) fn take(&mut self, event: &pb::Event) -> Vec<Line> {
        let mut lines = Vec::new();
        let data = data_of(event);
        let Some(node) = event.node_id else {
            lines.extend(of_swarm(event, &data));
            return lines;
        };
        let voice = self.voices.entry(node).or_default();
        if !event.injection_id.is_empty() && voice.injection != event.injection_id && opens(&event.event) {
            voice.flush(node, &mut lines);
            *voice = Voice { injection: event.injection_id.clone(), ..Voice::default() };
        }
        let text = |key: &str| data.get(key).and_then(Value::as_str).unwrap_or_default();
        match event.event.as_str() {
            "turn_started" => {
                voice.started_us = event.timestamp_us;
                voice.busy = true;
            }
            "assistant_delta" => {
                voice.streamed = true;
                voice.say(node, text("content"), &mut lines);
            }
            "assistant" => {
                if !voice.streamed {
                    voice.say(node, text("content"), &mut lines);
                }
                voice.flush(node, &mut lines);
                voice.streamed = false;
            }
            "usage" => voice.tokens = tokens(&data),
            "turn_complete" => {
                voice.flush(node, &mut lines);
                lines.push(remark(node, voice.ending(event.timestamp_us, &data)));
                voice.busy = false;
                voice.streamed = false;
            }
            _ => lines.extend(of_node(&event.event, &data).map(|said| remark(node, said))),
        }
        lines
    }
}

/// Tokens of this turn; `total_tokens` counts those of the whole conversation.
fn tokens(usage: &Value) -> Option<u64> {
    ["last_total_tokens", "total_tokens"].iter().find_map(|key| usage.get(key).and_then(Value::as_u64))
}

/// The event is part of a turn, so a new injection id in it means a new turn.
fn opens(event: &str) -> bool {
    matches!(event, "turn_started" | "assistant_delta" | "assistant")
}

fn remark(node: u32, (tone, text): (Tone, String)) -> Line {
    Line { node: Some(node), kind: Kind::Remark(tone), text }
}

impl Voice {
    fn say(&mut self, node: u32, text: &str, lines: &mut Vec<Line>) {
        // Only the new text is searched: an answer without line ends may grow for long.
        let mut rest = text;
        while let Some((line, next)) = rest.split_once('\n') {
            self.partial.push_str(line);
            let whole = std::mem::take(&mut self.partial);
            lines.push(Line { node: Some(node), kind: Kind::Answer, text: harmless(whole.trim_end()) });
            rest = next;
        }
        self.partial.push_str(rest);
    }

    fn flush(&mut self, node: u32, lines: &mut Vec<Line>) {
        if !self.partial.is_empty() {
            let text = harmless(std::mem::take(&mut self.partial).trim_end());
            lines.push(Line { node: Some(node), kind: Kind::Answer, text });
        }
    }

    fn ending(&self, now_us: u64, data: &Value) -> (Tone, String) {
        let status = data.get("status").and_then(Value::as_str).unwrap_or("completed");
        let mut facts = Vec::new();
        if let Some(tokens) = self.tokens {
            facts.push(words::count(usize::try_from(tokens).unwrap_or(usize::MAX), "token"));
        }
        // The worker's own measure, which no clock that is set in between can spoil.
        let measured = data.get("duration_ms").and_then(Value::as_u64).map(|ms| ms.saturating_mul(1000));
        if let Some(took) = measured.or_else(|| (self.started_us != 0).then(|| now_us.saturating_sub(self.started_us)))
        {
            facts.push(words::took(took));
        }
        let facts = if facts.is_empty() { String::new() } else { format!(" ({})", facts.join(", ")) };
        let error = data.get("error").and_then(Value::as_str).filter(|error| !error.is_empty());
        match (status, error) {
            ("completed", _) => (Tone::Dim, format!("done{facts}")),
            (status, Some(error)) => (Tone::Bad, format!("{status}{facts}: {}", one_line(error))),
            (status, None) => (Tone::Bad, format!("{status}{facts}")),
        }
    }
}

/// An agent's text may hold sequences that drive a terminal; only tabs are let through.
fn harmless(text: &str) -> String {
    text.chars().filter(|c| *c == '\t' || !c.is_control()).collect()
}

/// What an event of a node means to a person; nothing when it says nothing new.
fn of_node(event: &str, data: &Value) -> Option<(Tone, String)> {
    let text = |key: &str| data.get(key).and_then(Value::as_str).map(one_line).unwrap_or_default();
    let command = || match data.get("command") {
        Some(Value::Array(words)) => one_line(&words.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" ")),
        _ => text("command"),
    };
    let said = match event {
        "command_started" => (Tone::Dim, format!("$ {}", command())),
        "command_completed" => match data.get("exit_code").and_then(Value::as_i64) {
            Some(0) | None => return None,
            Some(code) => (Tone::Warn, format!("command ended with {code}: {}", command())),
        },
        "exec_approval_required" => {
            let what = match (command(), text("reason")) {
                (command, reason) if command.is_empty() => reason,
                (command, reason) if reason.is_empty() => command,
                (command, reason) => format!("{command} ({reason})"),
            };
            (Tone::Warn, format!("waits for your word: {what}; drover approve {} [--decline]", text("approval_id")))
        }
        "exec_approval_resolved" => {
            let word =
                if data.get("approved").and_then(Value::as_bool) == Some(true) { "approved" } else { "declined" };
            (Tone::Dim, format!("{word} by {}", words::dash(&text("source"))))
        }
        "agent_error" => (Tone::Bad, format!("agent error: {}", text("message"))),
        "worker_error" => {
            let hint = text("hint");
            let hint = if hint.is_empty() { hint } else { format!("; {hint}") };
            (Tone::Bad, format!("{}{hint}", text("message")))
        }
        "worker_hello" => (Tone::Dim, format!("ready on {}", words::dash(&text("host")))),
        "worker_bye" => (Tone::Dim, format!("left: {}", words::dash(&text("reason")))),
        "inject_failed" => (Tone::Bad, format!("prompt failed: {}", text("error"))),
        "node_restarted" => {
            let start = data.get("generation").and_then(Value::as_u64).unwrap_or_default();
            (Tone::Warn, format!("started again (start {start}): {}", words::dash(&text("reason"))))
        }
        "node_failed" => (Tone::Bad, format!("given up: {}", words::dash(&text("reason")))),
        _ => return None,
    };
    Some(said)
}

fn of_swarm(event: &pb::Event, data: &Value) -> Option<Line> {
    let text = |key: &str| data.get(key).and_then(Value::as_str).map(one_line).unwrap_or_default();
    let (tone, text) = match event.event.as_str() {
        "swarm_terminated" => (Tone::Dim, "swarm terminated".to_owned()),
        "swarm_launch_failed" => (Tone::Bad, format!("the launch failed: {}", text("reason"))),
        "swarm_state" => {
            let reason = text("reason");
            let reason = if reason.is_empty() { reason } else { format!(": {reason}") };
            (Tone::Dim, format!("swarm {}{reason}", text("status")))
        }
        "agent_error" => (Tone::Bad, format!("agent error: {}", text("message"))),
        _ => return None,
    };
    Some(Line { node: None, kind: Kind::Remark(tone), text })
}

/// One line that sums up an event, for `drover events`.
pub(crate) fn summary(event: &pb::Event) -> String {
    let data = data_of(event);
    if let Some((_, said)) = of_node(&event.event, &data) {
        return said;
    }
    for key in ["content", "message", "reason", "error", "status", "prompt", "command"] {
        match data.get(key) {
            Some(Value::String(text)) if !text.is_empty() => return one_line(text),
            Some(Value::Object(object)) if key == "status" => {
                return object.get("type").and_then(Value::as_str).unwrap_or_default().to_owned();
            }
            _ => {}
        }
    }
    match event.event.as_str() {
        "usage" => tokens(&data).map_or_else(String::new, |n| format!("{n} tokens")),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(node: u32, injection: &str, name: &str, at_ms: u64, data: &str) -> pb::Event {
        pb::Event {
            timestamp_us: at_ms * 1000,
            stored_us: 0,
            event: name.into(),
            node_id: Some(node),
            injection_id: injection.into(),
            data: data.to_owned().into(),
            ..Default::default()
        }
    }

    fn lines(events: &[pb::Event]) -> Vec<String> {
        let mut transcript = Transcript::default();
        let lines = events.iter().flat_map(|event| transcript.take(event));
        lines.map(|line| format!("{}|{}", line.node.map_or("-".to_owned(), |n| n.to_string()), line.text)).collect()
    }

    #[test]
    fn deltas_become_whole_lines_and_the_final_text_is_not_repeated() {
        let got = lines(&[
            event(0, "a", "turn_started", 1, "{}"),
            event(0, "a", "assistant_delta", 1, r#"{"content":"one\ntw"}"#),
            event(1, "b", "assistant", 1, r#"{"content":"other\nnode"}"#),
            event(0, "a", "assistant_delta", 2, r#"{"content":"o\u001b[2J"}"#),
            event(0, "a", "usage", 2, r#"{"total_tokens":900,"last_total_tokens":42}"#),
            event(0, "a", "assistant", 3, r#"{"content":"one\ntwo"}"#),
            event(0, "a", "turn_complete", 1501, r#"{"status":"completed"}"#),
            event(0, "c", "assistant", 1600, r#"{"content":"next turn"}"#),
            event(
                0,
                "c",
                "turn_complete",
                1700,
                r#"{"status":"failed","error":"agent died\nhard","code":"turn_lost"}"#,
            ),
        ]);
        insta::assert_snapshot!(got.join("\n"), @r"
        0|one
        1|other
        1|node
        0|two[2J
        0|done (42 tokens, 1.5 s)
        0|next turn
        0|failed: agent died hard
        ");
    }

    #[test]
    fn a_turn_that_ends_in_the_middle_of_a_line_loses_nothing() {
        let got = lines(&[
            event(0, "a", "assistant_delta", 1, r#"{"content":"half"}"#),
            event(0, "b", "turn_started", 2, "{}"),
            event(0, "b", "assistant_delta", 3, r#"{"content":"new"}"#),
            event(0, "b", "turn_complete", 4, r#"{"status":"interrupted"}"#),
        ]);
        insta::assert_snapshot!(got.join("\n"), @r"
        0|half
        0|new
        0|interrupted (2.0 ms)
        ");
    }

    #[test]
    fn a_question_names_the_command_that_answers_it() {
        let got = lines(&[event(
            3,
            "a",
            "exec_approval_required",
            1,
            r#"{"approval_id":"91ce","command":["rm","-rf","x"],"reason":"cleanup"}"#,
        )]);
        assert_eq!(got, ["3|waits for your word: rm -rf x (cleanup); drover approve 91ce [--decline]"]);
    }
}
