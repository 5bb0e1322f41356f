//! No two questions share a key.

use std::collections::HashMap;
use std::sync::Arc;

use proptest::prelude::*;
use serde_json::json;

use super::key;
use crate::call::{CallRequest, Message, Part, Role, Tool, ToolCall, ToolChoice};
use crate::provider::OutputSchema;
use crate::shell::Chain;

/// Everything that a question is made of, so small that equal ones come up.
type Made = (
    Option<String>,
    Vec<(u8, Vec<(u8, String, String)>)>,
    u32,
    Option<i8>,
    Vec<String>,
    Option<u8>,
    Vec<(String, Option<bool>)>,
    u8,
);

fn made() -> impl Strategy<Value = Made> {
    let word = "[ab]{0,2}";
    let part = (0_u8..3, word, word);
    (
        proptest::option::of(word),
        proptest::collection::vec((0_u8..3, proptest::collection::vec(part, 0..3)), 0..3),
        0_u32..2,
        proptest::option::of(-1_i8..2),
        proptest::collection::vec(word, 0..3),
        proptest::option::of(0_u8..2),
        proptest::collection::vec((word, proptest::option::of(any::<bool>())), 0..2),
        0_u8..5,
    )
}

fn request(made: &Made) -> CallRequest {
    let (system, messages, max_tokens, temperature, stop, schema, tools, choice) = made;
    let part = |(kind, one, two): &(u8, String, String)| match kind {
        0 => Part::Text(format!("{one}|{two}")),
        1 => Part::ToolCall(ToolCall { id: one.clone(), name: two.clone(), arguments: String::new() }),
        _ => Part::ToolResult { id: one.clone(), name: String::new(), content: two.clone() },
    };
    let messages = messages.iter().map(|(role, parts)| Message {
        role: [Role::User, Role::Assistant, Role::Tool][usize::from(*role)],
        parts: parts.iter().map(part).collect(),
    });
    CallRequest {
        system: system.as_deref().map(Into::into),
        messages: messages.collect(),
        max_tokens: *max_tokens,
        temperature: temperature.map(f32::from),
        stop: stop.clone(),
        schema: schema.map(|n| Arc::new(OutputSchema::new("s", json!({"minimum": n})).unwrap())),
        tools: tools
            .iter()
            .map(|(name, strict)| Tool {
                name: name.clone(),
                description: None,
                parameters: json!({}),
                strict: *strict,
            })
            .collect(),
        tool_choice: match choice {
            0 => ToolChoice::Auto,
            1 => ToolChoice::Never,
            2 => ToolChoice::Required,
            3 => ToolChoice::Named(String::new()),
            _ => ToolChoice::Named("a".into()),
        },
        ..CallRequest::default()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Many questions at a time, as a chance meeting needs many; -0.0 and 0.0 never meet in here.
    #[test]
    fn two_questions_have_one_key_only_when_every_byte_is_the_same(all in proptest::collection::vec(made(), 2..60)) {
        let mut seen: HashMap<key::Key, &Made> = HashMap::new();
        let chain = Chain::of([]);
        for made in &all {
            let mut asked = request(made);
            let key = key::of("salt", &chain, &asked);
            asked.stream = true;
            prop_assert_eq!(key, key::of("salt", &chain, &asked), "a stream has the same answer");
            prop_assert!(key != key::of("other salt", &chain, &asked));
            if let Some(other) = seen.insert(key, made) {
                prop_assert_eq!(other, made);
            }
        }
    }

    #[test]
    fn the_tail_of_a_long_text_counts(head in "[a-z]{3000,4000}", one in "[a-z]{1,4}", two in "[a-z]{1,4}") {
        let key = |tail: &str| key::of("", &Chain::of([]), &CallRequest::prompt(format!("{head}{tail}"), 9));
        prop_assert_eq!(key(&one) == key(&two), one == two);
    }
}
