//! What a request of any of the four formats asks for, as far as the mock cares.

use std::borrow::Cow;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use serde::Deserialize;
use serde_json::Value;

/// Whose format a request is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wire {
    OpenAi,
    Groq,
    Anthropic,
    Gemini,
}

/// A request that was understood.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) wire: Wire,
    pub(super) model: String,
    /// The last text of the conversation.
    pub(super) prompt: String,
    /// The last text is what a function returned.
    pub(super) after_tool: bool,
    pub(super) input_tokens: u64,
    pub(super) max_tokens: Option<u64>,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) tools: usize,
    /// Name of the one function that must be called.
    pub(super) must_call: Option<String>,
}

impl Asked {
    /// A number for the prompt, by which it is known again.
    pub(super) fn number(&self) -> u64 {
        number(&self.prompt)
    }

    /// What stands between `[[name:` and `]]` in the prompt; empty for `[[name]]`.
    pub(super) fn directive(&self, name: &str) -> Option<&str> {
        if self.after_tool {
            return None;
        }
        let mut rest = self.prompt.as_str();
        while let Some(at) = rest.find("[[") {
            rest = &rest[at + 2..];
            let end = rest.find("]]")?;
            let inside = &rest[..end];
            if inside == name {
                return Some("");
            }
            if let Some(value) = inside.strip_prefix(name).and_then(|value| value.strip_prefix(':')) {
                return Some(value);
            }
            rest = &rest[end + 2..];
        }
        None
    }
}

/// The number of a prompt.
pub(super) fn number(prompt: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    prompt.hash(&mut hasher);
    hasher.finish()
}

#[derive(Deserialize)]
struct Body<'a> {
    #[serde(borrow)]
    model: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    messages: Vec<Message<'a>>,
    #[serde(borrow, default)]
    contents: Vec<Message<'a>>,
    system: Option<Value>,
    #[serde(rename = "systemInstruction")]
    system_instruction: Option<Value>,
    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    #[serde(rename = "generationConfig")]
    generation_config: Option<Config>,
    #[serde(default)]
    stream: bool,
    stream_options: Option<StreamOptions>,
    #[serde(default)]
    tools: Vec<Value>,
    tool_choice: Option<Value>,
}

#[derive(Deserialize)]
struct Config {
    #[serde(rename = "maxOutputTokens")]
    max_output_tokens: Option<u64>,
}

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow, default)]
    role: Cow<'a, str>,
    #[serde(borrow)]
    content: Option<Content<'a>>,
    #[serde(default)]
    parts: Vec<Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content<'a> {
    Text(#[serde(borrow)] Cow<'a, str>),
    Parts(Vec<Value>),
}

/// Reads a request. The error says what is wrong with it.
pub(super) fn read(path: &str, query: Option<&str>, body: &[u8]) -> Result<Asked, String> {
    let (wire, model, stream) = if path.ends_with("/chat/completions") {
        (if path.contains("/openai/v1/") { Wire::Groq } else { Wire::OpenAi }, None, None)
    } else if path.ends_with("/v1/messages") {
        (Wire::Anthropic, None, None)
    } else if let Some((_, called)) = path.split_once("/models/") {
        match called.rsplit_once(':') {
            Some((model, "generateContent")) => (Wire::Gemini, Some(model), Some(false)),
            Some((model, "streamGenerateContent")) if query.is_some_and(|query| query.contains("alt=sse")) => {
                (Wire::Gemini, Some(model), Some(true))
            }
            _ => return Err("the mock knows generateContent, and streamGenerateContent with alt=sse".to_owned()),
        }
    } else {
        return Err(format!("the mock has nothing at {path}"));
    };
    let body: Body<'_> = serde_json::from_slice(body).map_err(|error| format!("the body is no request: {error}"))?;
    let messages = if wire == Wire::Gemini { &body.contents } else { &body.messages };
    let Some(last) = messages.last() else { return Err("there are no messages".to_owned()) };
    if wire == Wire::Anthropic && body.max_tokens.is_none() {
        return Err("max_tokens: field required".to_owned());
    }
    if wire == Wire::Anthropic && messages.iter().any(|message| message.role == "system") {
        return Err("messages: unexpected role \"system\"".to_owned());
    }
    let system = body.system.as_ref().map_or(0, |system| bytes(std::slice::from_ref(system)))
        + body.system_instruction.as_ref().map_or(0, |system| bytes(std::slice::from_ref(system)));
    let input_bytes = system + messages.iter().map(bytes_of).sum::<usize>() + bytes(&body.tools);
    let (prompt, after_tool) = last_text(last);
    let must_call = body.tool_choice.as_ref().and_then(|choice| {
        let named = choice.get("name").or_else(|| choice.pointer("/function/name"))?;
        Some(named.as_str()?.to_owned())
    });
    Ok(Asked {
        wire,
        model: model.map_or_else(|| body.model.unwrap_or_default().into_owned(), str::to_owned),
        prompt,
        after_tool,
        input_tokens: (input_bytes as u64).div_ceil(4) + 3,
        max_tokens: body
            .max_tokens
            .or(body.max_completion_tokens)
            .or(body.generation_config.and_then(|config| config.max_output_tokens)),
        stream: stream.unwrap_or(body.stream),
        include_usage: wire != Wire::OpenAi || body.stream_options.is_some_and(|options| options.include_usage),
        tools: body.tools.len(),
        must_call,
    })
}

fn bytes_of(message: &Message<'_>) -> usize {
    let content = match &message.content {
        Some(Content::Text(text)) => text.len(),
        Some(Content::Parts(parts)) => bytes(parts),
        None => 0,
    };
    content + bytes(&message.parts)
}

/// Bytes of all text in values, names of fields not counted.
fn bytes(values: &[Value]) -> usize {
    values
        .iter()
        .map(|value| match value {
            Value::String(text) => text.len(),
            Value::Array(items) => bytes(items),
            Value::Object(map) => map.values().map(|value| bytes(std::slice::from_ref(value))).sum(),
            _ => 1,
        })
        .sum()
}

/// The last text of a message, and whether a function said it.
fn last_text(message: &Message<'_>) -> (String, bool) {
    let parts = match &message.content {
        Some(Content::Text(text)) => return (text.to_string(), message.role == "tool"),
        Some(Content::Parts(parts)) => parts,
        None => &message.parts,
    };
    let Some(part) = parts.last() else { return (String::new(), false) };
    if let Some(text) = part.get("text").and_then(Value::as_str) {
        return (text.to_owned(), message.role == "tool");
    }
    let returned = part.get("content").or_else(|| part.pointer("/functionResponse/response"));
    match returned {
        Some(Value::String(text)) => (text.clone(), true),
        Some(other) => (other.to_string(), true),
        None => (String::new(), false),
    }
}
