//! Checks that the agent sends back everything that was said before.
//!
//! The Responses API keeps nothing between requests, so an agent that forgets, doubles or reorders an item of its history
//! shows it here. Each request must begin with the request before it, followed by what was answered to it.

use std::collections::HashMap;

use serde_json::Value;

/// One item of a history, reduced to what identifies it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Item {
    /// A prompt.
    User(String),
    /// An answer.
    Assistant(String),
    /// A tool call.
    Call(String),
    /// What a tool call gave.
    Output(String),
    /// The note that a turn was cut short.
    Aborted,
}

/// The items of a request's `input` that make up the conversation; instructions and surroundings are left out.
pub(super) fn items(input: &[Value]) -> Vec<Item> {
    input.iter().filter_map(item).collect()
}

fn item(value: &Value) -> Option<Item> {
    let call_id = || value["call_id"].as_str().unwrap_or_default().to_owned();
    match value["type"].as_str()? {
        "message" => {
            let text = text_of(&value["content"]);
            match value["role"].as_str()? {
                "assistant" => Some(Item::Assistant(text)),
                "user" if text.trim_start().starts_with("<turn_aborted>") => Some(Item::Aborted),
                "user" if is_surroundings(&text) => None,
                "user" => Some(Item::User(text)),
                _ => None,
            }
        }
        "function_call" | "custom_tool_call" => Some(Item::Call(call_id())),
        "function_call_output" | "custom_tool_call_output" => Some(Item::Output(call_id())),
        _ => None,
    }
}

/// The agent itself puts some user messages in front of the prompts: the environment and the rules of the project.
fn is_surroundings(text: &str) -> bool {
    text.starts_with('<') || text.starts_with("# AGENTS.md")
}

/// The text of a message's content or of a tool's output, in whichever shape it comes.
pub(super) fn text_of(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
        Value::Object(fields) => fields.get("content").map(text_of).unwrap_or_default(),
        _ => String::new(),
    }
}

/// What is known of one conversation.
#[derive(Debug, Default)]
pub(super) struct Conversation {
    /// The items of the last request.
    sent: Vec<Item>,
    /// The items of the answer to it, once the answer was complete.
    answered: Vec<Item>,
    /// How many items an earlier completed exchange has confirmed; these may never go missing.
    confirmed: usize,
    /// The agent was killed since the last request: what it had not yet written down may be gone.
    forgiven: bool,
}

impl Conversation {
    /// Takes the next request. Returns how many of its items are old, and what is wrong with it.
    pub(super) fn request(&mut self, items: &[Item]) -> (usize, Vec<String>) {
        let mut wrong = unanswered_calls(items);
        let mut expected = self.sent.clone();
        expected.append(&mut self.answered);
        let common = expected.iter().zip(items).take_while(|(old, new)| old == new).count();
        let cut_short = self.forgiven || items.get(common) == Some(&Item::Aborted);
        if common < self.confirmed || (common < expected.len() && !cut_short) {
            wrong.push(format!(
                "history is not complete: item {common} should be {:?} and is {:?}",
                expected[common],
                items.get(common)
            ));
        }
        self.confirmed = common;
        self.forgiven = false;
        self.sent = items.to_vec();
        (common, wrong)
    }

    /// The answer to the last request was given to its end.
    pub(super) fn answered(&mut self, items: Vec<Item>) {
        self.answered = items;
    }

    /// The agent was killed: its last exchange may be missing from the next request.
    pub(super) fn forgive(&mut self) {
        self.forgiven = true;
    }
}

/// Every call needs exactly one output, and every output a call before it.
fn unanswered_calls(items: &[Item]) -> Vec<String> {
    let mut open: HashMap<&str, usize> = HashMap::new();
    let mut wrong = Vec::new();
    for item in items {
        match item {
            Item::Call(id) if open.insert(id, 0).is_some() => wrong.push(format!("call {id} is there twice")),
            Item::Output(id) => match open.get_mut(id.as_str()) {
                Some(count) => *count += 1,
                None => wrong.push(format!("output of {id} without its call")),
            },
            _ => {}
        }
    }
    for (id, count) in open {
        if count != 1 {
            wrong.push(format!("call {id} has {count} outputs"));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(text: &str) -> Item {
        Item::User(text.into())
    }

    fn said(text: &str) -> Item {
        Item::Assistant(text.into())
    }

    #[test]
    fn a_forgotten_answer_is_seen() {
        let mut talk = Conversation::default();
        assert_eq!(talk.request(&[user("a")]), (0, vec![]));
        talk.answered(vec![said("1")]);
        assert_eq!(talk.request(&[user("a"), said("1"), user("b")]), (2, vec![]));
        talk.answered(vec![said("2")]);
        let (_, wrong) = talk.request(&[user("a"), said("1"), user("b"), user("c")]);
        assert_eq!(wrong.len(), 1, "{wrong:?}");
        let (_, wrong) = talk.request(&[user("d")]);
        assert_eq!(wrong.len(), 1, "{wrong:?}");
    }

    #[test]
    fn a_kill_excuses_only_the_last_exchange() {
        let history = [user("a"), said("1"), user("b"), said("2")];
        let mut talk = Conversation::default();
        talk.request(&history[..1]);
        talk.answered(vec![said("1")]);
        talk.request(&history[..3]);
        talk.answered(vec![said("2")]);
        talk.forgive();
        assert_eq!(talk.request(&[user("a"), said("1"), user("c")]).1, Vec::<String>::new());
        talk.forgive();
        assert_eq!(talk.request(&[user("c")]).1.len(), 1, "an old answer went missing");
    }

    #[test]
    fn a_call_needs_its_output() {
        let call = Item::Call("c1".into());
        let output = Item::Output("c1".into());
        assert_eq!(unanswered_calls(&[call.clone(), output.clone()]), Vec::<String>::new());
        assert_eq!(unanswered_calls(std::slice::from_ref(&call)).len(), 1);
        assert_eq!(unanswered_calls(std::slice::from_ref(&output)).len(), 1);
        assert_eq!(unanswered_calls(&[call, output.clone(), output]).len(), 1);
    }
}
