//! Reads the tree into the typed sections. A `serde` deserializer whose errors carry the place of the innermost value.

use std::fmt;
use std::fmt::Write as _;

use serde::de::value::StrDeserializer;
use serde::de::{DeserializeSeed, Error as _, IntoDeserializer, MapAccess, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, forward_to_deserialize_any};

use crate::tree::{Name, Node, Place, Value};

/// A value that does not fit its key.
#[derive(Debug)]
pub(crate) struct ReadError {
    /// Where; always there once it leaves this module.
    pub(crate) place: Option<Place>,
    /// What is wrong.
    pub(crate) message: String,
    /// Something is missing: no entry is to blame.
    pub(crate) incomplete: bool,
}

/// Reads a typed value out of the tree.
pub(crate) fn read<'de, T: Deserialize<'de>>(node: &'de Node) -> Result<T, ReadError> {
    T::deserialize(node)
}

impl ReadError {
    /// The innermost place wins: it is set first.
    fn at(mut self, place: &Place) -> Self {
        self.place.get_or_insert_with(|| place.clone());
        self
    }
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ReadError {}

impl serde::de::Error for ReadError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self { place: None, message: message.to_string(), incomplete: false }
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        let mut message = format!("unknown field {field:?}, expected one of {}", expected.join(", "));
        if crate::secret::is_secret(field) {
            message += "; a secret never stands in the file, name the environment variable that holds it";
        } else if let Some(close) = closest(field, expected) {
            let _ = write!(message, "; did you mean {close:?}?");
        }
        Self::custom(message)
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        let mut message = format!("unknown value {variant:?}, expected one of {}", expected.join(", "));
        if let Some(close) = closest(variant, expected) {
            let _ = write!(message, "; did you mean {close:?}?");
        }
        Self::custom(message)
    }

    fn missing_field(field: &'static str) -> Self {
        Self { incomplete: true, ..Self::custom(format_args!("missing field {field:?}")) }
    }

    fn invalid_type(got: Unexpected<'_>, expected: &dyn serde::de::Expected) -> Self {
        let expected = wanted(expected);
        let mut message = format!("expected {expected}, got {}", words(got));
        if expected == "text" && matches!(got, Unexpected::Signed(_) | Unexpected::Unsigned(_)) {
            message += "; put it in quotes";
        }
        Self::custom(message)
    }

    fn invalid_value(got: Unexpected<'_>, expected: &dyn serde::de::Expected) -> Self {
        Self::custom(format_args!("expected {}, got {}", wanted(expected), words(got)))
    }
}

/// What was expected, in words that do not need Rust.
fn wanted(expected: &dyn serde::de::Expected) -> String {
    let text = expected.to_string();
    match text.as_str() {
        "u16" => "a number from 0 to 65535".to_owned(),
        "u32" | "u64" | "usize" => "a whole number from 0".to_owned(),
        "f64" => "a number".to_owned(),
        _ if text.contains("string") => "text".to_owned(),
        _ => text,
    }
}

/// A value in a few words; serde's own would show no more of text than we do.
fn words(got: Unexpected<'_>) -> String {
    match got {
        Unexpected::Str(text) => {
            let short: String = text.chars().take(40).collect();
            format!("{short:?}{}", if short.len() < text.len() { "..." } else { "" })
        }
        Unexpected::Bool(value) => value.to_string(),
        Unexpected::Unsigned(value) => value.to_string(),
        Unexpected::Signed(value) => value.to_string(),
        Unexpected::Float(value) => value.to_string(),
        Unexpected::Unit | Unexpected::Option => "nothing".to_owned(),
        Unexpected::Seq => "a list".to_owned(),
        Unexpected::Map => "a map".to_owned(),
        other => other.to_string(),
    }
}

/// The known word that differs by at most two letters, when there is one.
fn closest(word: &str, known: &[&'static str]) -> Option<&'static str> {
    if word.chars().count() < 3 || word.len() > 64 {
        return None;
    }
    known.iter().map(|k| (distance(word, k), *k)).filter(|(d, _)| *d <= 2).min().map(|(_, k)| k)
}

/// Letters to insert, delete, replace or swap with their neighbour to get from one word to the other.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![(0..=b.len()).collect::<Vec<_>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replace = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replace.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

impl<'de> Deserializer<'de> for &'de Node {
    type Error = ReadError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match &self.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Signed(value) => visitor.visit_i64(*value),
            Value::Unsigned(value) => visitor.visit_u64(*value),
            Value::Float(value) => visitor.visit_f64(*value),
            Value::Text(text) => visitor.visit_borrowed_str(text),
            Value::List(items) => visitor.visit_seq(Items { items: items.iter() }),
            Value::Map(entries) => visitor.visit_map(Entries { entries: entries.iter(), current: None }),
        }
        .map_err(|error: ReadError| error.at(&self.place))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match self.value {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
        .map_err(|error: ReadError| error.at(&self.place))
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, ReadError> {
        visitor.visit_newtype_struct(self).map_err(|error: ReadError| error.at(&self.place))
    }

    /// `router:` with nothing after it is an empty section.
    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match self.value {
            Value::Null => visitor
                .visit_map(Entries { entries: [].iter(), current: None })
                .map_err(|error: ReadError| error.at(&self.place)),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        match self.value {
            Value::Null | Value::Map(_) => self.deserialize_map(visitor),
            ref other => {
                Err(ReadError::custom(format_args!("expected a section, got {}", words(unexpected(other))))
                    .at(&self.place))
            }
        }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match &self.value {
            Value::Null => {
                visitor.visit_seq(Items { items: [].iter() }).map_err(|error: ReadError| error.at(&self.place))
            }
            Value::List(_) => self.deserialize_any(visitor),
            other => {
                Err(ReadError::custom(format_args!("expected a list, got {}", words(unexpected(other))))
                    .at(&self.place))
            }
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        match &self.value {
            Value::Text(text) => {
                let text: StrDeserializer<'_, ReadError> = text.as_str().into_deserializer();
                visitor.visit_enum(text)
            }
            other => Err(ReadError::custom(format_args!("expected a word, got {}", words(unexpected(other))))),
        }
        .map_err(|error: ReadError| error.at(&self.place))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple
        tuple_struct identifier ignored_any
    }
}

fn unexpected(value: &Value) -> Unexpected<'_> {
    match value {
        Value::Null => Unexpected::Unit,
        Value::Bool(value) => Unexpected::Bool(*value),
        Value::Signed(value) => Unexpected::Signed(*value),
        Value::Unsigned(value) => Unexpected::Unsigned(*value),
        Value::Float(value) => Unexpected::Float(*value),
        Value::Text(text) => Unexpected::Str(text),
        Value::List(_) => Unexpected::Seq,
        Value::Map(_) => Unexpected::Map,
    }
}

struct Items<'de> {
    items: std::slice::Iter<'de, Node>,
}

impl<'de> SeqAccess<'de> for Items<'de> {
    type Error = ReadError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, ReadError> {
        self.items.next().map(|node| seed.deserialize(node).map_err(|error| error.at(&node.place))).transpose()
    }
}

struct Entries<'de> {
    entries: std::slice::Iter<'de, (Name, Node)>,
    current: Option<&'de Node>,
}

impl<'de> MapAccess<'de> for Entries<'de> {
    type Error = ReadError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, ReadError> {
        let Some((name, node)) = self.entries.next() else { return Ok(None) };
        self.current = Some(node);
        let key: StrDeserializer<'_, ReadError> = name.text.as_str().into_deserializer();
        seed.deserialize(key).map(Some).map_err(|error| error.at(&name.place))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, ReadError> {
        match self.current.take() {
            Some(node) => seed.deserialize(node).map_err(|error| error.at(&node.place)),
            None => Err(ReadError::custom("a value was asked for before its key")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_fingers_is_recognised() {
        let known = &["nodes", "listen", "codex_bin"];
        for (typed, meant) in [("nodse", "nodes"), ("lisen", "listen"), ("codex-bin", "codex_bin")] {
            assert_eq!(closest(typed, known), Some(meant));
        }
        assert_eq!(closest("partition", known), None);
    }
}
