//! The key of a question: a hash of everything that decides over its answer.

use ring::digest::{Context, SHA256};

use crate::call::{CallRequest, Part, Role, ToolChoice};
use crate::shell::Chain;

/// A SHA-256.
pub(crate) type Key = [u8; 32];

/// Collects parts, each with its length before it, so that no two lists of parts look the same.
struct Hasher(Context);

impl Hasher {
    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.0.update(text.as_bytes());
    }

    fn number(&mut self, number: u64) {
        self.0.update(&number.to_le_bytes());
    }

    /// Nothing, or something: an empty text is not a missing one.
    fn maybe<T>(&mut self, value: Option<T>, add: impl FnOnce(&mut Self, T)) {
        self.number(u64::from(value.is_some()));
        if let Some(value) = value {
            add(self, value);
        }
    }
}

/// The key of a request to the lanes of a chain.
pub(super) fn of(salt: &str, chain: &Chain, request: &CallRequest) -> Key {
    // Taken apart by name, so that a field which is added later cannot be forgotten here.
    let CallRequest {
        system,
        messages,
        max_tokens,
        temperature,
        top_p,
        stop,
        schema,
        json,
        tools,
        tool_choice,
        grounded,
        user,
        stream: _,
    } = request;
    let mut hash = Hasher(Context::new(&SHA256));
    hash.text(salt);
    hash.number(chain.lanes().len() as u64);
    for lane in chain.lanes() {
        hash.text(&lane.name);
        hash.text(&lane.model);
    }
    hash.maybe(system.as_deref(), Hasher::text);
    hash.number(messages.len() as u64);
    for message in messages {
        hash.number(match message.role {
            Role::User => 0,
            Role::Assistant => 1,
            Role::Tool => 2,
        });
        hash.number(message.parts.len() as u64);
        for part in &message.parts {
            match part {
                Part::Text(text) => {
                    hash.number(0);
                    hash.text(text);
                }
                Part::ToolCall(call) => {
                    hash.number(1);
                    for text in [&call.id, &call.name, &call.arguments] {
                        hash.text(text);
                    }
                }
                Part::ToolResult { id, name, content } => {
                    hash.number(2);
                    for text in [id, name, content] {
                        hash.text(text);
                    }
                }
            }
        }
    }
    hash.number(u64::from(*max_tokens));
    hash.maybe(*temperature, |hash, value| hash.number(u64::from(value.to_bits())));
    hash.maybe(*top_p, |hash, value| hash.number(u64::from(value.to_bits())));
    hash.number(stop.len() as u64);
    for text in stop {
        hash.text(text);
    }
    hash.maybe(schema.as_deref(), |hash, schema| {
        hash.text(schema.name());
        hash.text(schema.text());
    });
    hash.number(u64::from(*json));
    hash.number(tools.len() as u64);
    for tool in tools {
        hash.text(&tool.name);
        hash.maybe(tool.description.as_deref(), Hasher::text);
        hash.text(&tool.parameters.to_string());
        hash.maybe(tool.strict, |hash, strict| hash.number(u64::from(strict)));
    }
    match tool_choice {
        ToolChoice::Auto => hash.number(0),
        ToolChoice::Never => hash.number(1),
        ToolChoice::Required => hash.number(2),
        ToolChoice::Named(name) => {
            hash.number(3);
            hash.text(name);
        }
    }
    hash.number(u64::from(*grounded));
    hash.maybe(user.as_deref(), Hasher::text);
    let mut key = Key::default();
    key.copy_from_slice(hash.0.finish().as_ref());
    key
}
