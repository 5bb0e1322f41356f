//! Structured output: the shape that an answer must have, and the check that it has.

use std::fmt;

use serde_json::Value;
use thiserror::Error;

/// Largest schema that is taken.
const MAX_SCHEMA_BYTES: usize = 256 << 10;

/// Why a schema is not taken.
#[derive(Debug, Error)]
pub enum SchemaError {
    /// It is no JSON Schema.
    #[error("the output schema is no JSON Schema: {0}")]
    Invalid(String),
    /// It is too large.
    #[error("the output schema is larger than {MAX_SCHEMA_BYTES} bytes")]
    TooLarge,
}

/// A JSON Schema that answers are checked against.
pub struct OutputSchema {
    name: String,
    schema: Value,
    text: String,
    validator: jsonschema::Validator,
}

impl fmt::Debug for OutputSchema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OutputSchema")
            .field("name", &self.name)
            .field("bytes", &self.text.len())
            .finish_non_exhaustive()
    }
}

impl OutputSchema {
    /// Takes a schema. References out of it are refused: nothing is fetched for a schema.
    pub fn new(name: &str, schema: Value) -> Result<Self, SchemaError> {
        let text = schema.to_string();
        if text.len() > MAX_SCHEMA_BYTES {
            return Err(SchemaError::TooLarge);
        }
        let validator =
            jsonschema::validator_for(&schema).map_err(|error| SchemaError::Invalid(shortened(&error.to_string())))?;
        // Providers take only these characters in a name.
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '_' || c == '-' { c } else { '_' };
        let name: String = name.chars().map(plain).take(64).collect();
        Ok(Self { name: if name.is_empty() { "answer".to_owned() } else { name }, schema, text, validator })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The schema.
    pub fn schema(&self) -> &Value {
        &self.schema
    }

    /// The schema as text.
    pub fn text(&self) -> &str {
        &self.text
    }

    pub(crate) fn bytes(&self) -> u64 {
        (self.text.len() + self.name.len()) as u64
    }

    /// Whether answers are objects; some providers can force nothing else.
    pub(super) fn is_object(&self) -> bool {
        self.schema.get("type").and_then(Value::as_str) == Some("object")
    }

    /// The shape in words, for a provider that has no parameter for it.
    pub(super) fn in_words(&self) -> String {
        format!("Answer with JSON only, without a code fence, following this JSON Schema exactly: {}", self.text)
    }

    /// Reads a text as JSON of this shape; else says what is wrong, without the text.
    pub fn check(&self, text: &str) -> Result<Value, String> {
        let value: Value =
            serde_json::from_str(without_fence(text)).map_err(|error| format!("it is no JSON ({error})"))?;
        // The error is told by its place and rule; the value in it may be what a model was asked in confidence.
        let wrong = self.validator.iter_errors(&value).next().map(|error| {
            let place = error.instance_path().to_string();
            let place = if place.is_empty() { "the whole".to_owned() } else { shortened(&place) };
            format!("{place} breaks the rule {} of its schema", shortened(&error.schema_path().to_string()))
        });
        match wrong {
            None => Ok(value),
            Some(wrong) => Err(wrong),
        }
    }
}

fn shortened(text: &str) -> String {
    text.chars().take(300).collect()
}

/// Models put JSON into code fences even when told not to.
fn without_fence(text: &str) -> &str {
    let text = text.trim();
    let Some(inner) = text.strip_prefix("```").and_then(|rest| rest.strip_suffix("```")) else { return text };
    inner.strip_prefix("json").unwrap_or(inner).trim()
}

/// The schema in the dialect of Gemini's `responseSchema`, which knows a few keywords and no references; `None` when it cannot
/// be said there.
pub(super) fn openapi_subset(schema: &Value) -> Option<Value> {
    const KEPT: &[&str] = &[
        "description",
        "enum",
        "format",
        "maxItems",
        "maximum",
        "minItems",
        "minimum",
        "nullable",
        "required",
        "title",
    ];
    let map = schema.as_object()?;
    if map.contains_key("$ref") {
        return None;
    }
    let mut out = serde_json::Map::new();
    for (key, value) in map {
        match key.as_str() {
            "type" => match value {
                Value::Array(types) => {
                    let named: Vec<&str> =
                        types.iter().filter_map(Value::as_str).filter(|&name| name != "null").collect();
                    let [only] = named[..] else { return None };
                    out.insert("type".into(), only.into());
                    out.insert("nullable".into(), (named.len() < types.len()).into());
                }
                one => {
                    out.insert("type".into(), one.clone());
                }
            },
            "properties" => {
                let mut properties = serde_json::Map::new();
                for (name, property) in value.as_object()? {
                    properties.insert(name.clone(), openapi_subset(property)?);
                }
                out.insert(key.clone(), Value::Object(properties));
            }
            "items" => {
                out.insert(key.clone(), openapi_subset(value)?);
            }
            "anyOf" => {
                let any: Option<Vec<Value>> = value.as_array()?.iter().map(openapi_subset).collect();
                out.insert(key.clone(), Value::Array(any?));
            }
            "const" => {
                out.insert("enum".into(), Value::Array(vec![value.clone()]));
            }
            kept if KEPT.contains(&kept) => {
                out.insert(key.clone(), value.clone());
            }
            _ => {}
        }
    }
    Some(Value::Object(out))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_answer_is_checked_in_depth_and_an_error_does_not_repeat_it() {
        let schema = OutputSchema::new(
            "my plan!",
            json!({"type": "object", "required": ["items"], "additionalProperties": false,
                "properties": {"items": {"type": "array", "minItems": 1, "items": {"type": "object",
                    "required": ["n"], "properties": {"n": {"type": "integer", "minimum": 3}}}}}}),
        )
        .unwrap();
        assert_eq!(schema.name(), "my_plan_");
        assert_eq!(schema.check("```json\n{\"items\":[{\"n\":3}]}\n```").unwrap(), json!({"items": [{"n": 3}]}));
        for (text, wanted) in [
            ("{\"items\":[{\"n\":3},{\"n\":\"secret\"}]}", "/items/1/n"),
            ("{\"items\":[]}", "minItems"),
            ("{\"items\":[{\"n\":2}]}", "minimum"),
            ("{\"secret\":1,\"items\":[{\"n\":3}]}", "additionalProperties"),
            ("secret words", "no JSON"),
        ] {
            let error = schema.check(text).unwrap_err();
            assert!(error.contains(wanted) && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_schema_that_is_none_or_that_leads_elsewhere_is_refused() {
        for schema in [
            json!({"type": "nothing"}),
            json!({"minimum": "three"}),
            json!({"$ref": "https://schemas.example.com/x.json"}),
            json!({"$ref": "file:///etc/passwd"}),
        ] {
            assert!(OutputSchema::new("x", schema.clone()).is_err(), "{schema}");
        }
        let inside = json!({"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}});
        assert!(OutputSchema::new("x", inside).unwrap().check("5").is_ok());
    }

    #[test]
    fn gemini_gets_only_keywords_that_it_knows() {
        let schema = json!({"$schema": "x", "type": "object", "additionalProperties": false, "properties": {
            "a": {"type": ["string", "null"], "pattern": "x"}, "b": {"type": "array", "items": {"const": "y"}}}});
        assert_eq!(
            openapi_subset(&schema).unwrap(),
            json!({"type": "object", "properties": {
                "a": {"type": "string", "nullable": true}, "b": {"type": "array", "items": {"enum": ["y"]}}}})
        );
        assert_eq!(openapi_subset(&json!({"items": {"$ref": "#/x"}})), None);
        assert_eq!(openapi_subset(&json!({"type": ["string", "integer"]})), None);
    }
}
