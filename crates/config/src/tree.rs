//! The file as a tree in which every key and value knows where it stands. Read once from YAML or JSON; renames, overrides
//! from the environment and the typed reading all work on the tree, so each of their complaints can name a place.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_yaml::{Spanned, UserMessageFormatter};

/// Where a key or value stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the file, counted from 1.
    File {
        /// Line.
        line: u64,
        /// Column.
        column: u64,
    },
    /// In an environment variable.
    Env(Arc<str>),
}

impl Place {
    pub(crate) const START: Self = Self::File { line: 1, column: 1 };
}

/// A value and its place.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Node {
    pub(crate) value: Value,
    pub(crate) place: Place,
}

/// A key of a map and its place.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Name {
    pub(crate) text: String,
    pub(crate) place: Place,
}

/// What YAML can say.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Value {
    Null,
    Bool(bool),
    Signed(i64),
    Unsigned(u64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Name, Node)>),
}

/// A file that is no YAML.
#[derive(Debug)]
pub(crate) struct SyntaxError {
    pub(crate) line: u64,
    pub(crate) column: u64,
    pub(crate) message: String,
}

/// Reads YAML or JSON. An empty file is an empty map.
pub(crate) fn parse(text: &str) -> Result<Node, SyntaxError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let spanned: Spanned<Value> = match serde_yaml::from_str(text) {
        Ok(spanned) => spanned,
        Err(_) if is_blank(text) => return Ok(Node { value: Value::Map(Vec::new()), place: Place::START }),
        Err(error) => {
            let location = error.location();
            let mut message = error.without_snippet().render_with_formatter(&UserMessageFormatter);
            if let Some(location) = location {
                // The parser repeats the place in its text; we print it in front.
                let suffix = format!(" at line {}, column {}", location.line(), location.column());
                message = message.replace(&suffix, "");
            }
            return Err(SyntaxError {
                line: location.map_or(1, |at| at.line()).max(1),
                column: location.map_or(1, |at| at.column()).max(1),
                message: message.lines().map(str::trim).collect::<Vec<_>>().join(" "),
            });
        }
    };
    Ok(Node::from(spanned))
}

/// Nothing but comments and white space.
fn is_blank(text: &str) -> bool {
    text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#'))
}

impl From<Spanned<Value>> for Node {
    fn from(spanned: Spanned<Value>) -> Self {
        Self { place: place(&spanned), value: spanned.value }
    }
}

fn place<T>(spanned: &Spanned<T>) -> Place {
    Place::File { line: spanned.referenced.line().max(1), column: spanned.referenced.column().max(1) }
}

/// Nothing in a configuration is nested this deeply. Aliases can nest what is flat in the text, so the parser's own limit is
/// not enough to keep the stack small.
const MAX_DEPTH: u32 = 16;

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// One level of nesting while it is being read.
struct Level;

impl Level {
    fn enter<E: serde::de::Error>() -> Result<Self, E> {
        let depth = DEPTH.get();
        if depth >= MAX_DEPTH {
            return Err(E::custom(format_args!("nested more than {MAX_DEPTH} levels deep")));
        }
        DEPTH.set(depth + 1);
        Ok(Self)
    }
}

impl Drop for Level {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ValueVisitor;
        impl<'de> Visitor<'de> for ValueVisitor {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
                Ok(Value::Bool(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
                Ok(u64::try_from(value).map_or(Value::Signed(value), Value::Unsigned))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
                Ok(Value::Unsigned(value))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
                Ok(Value::Float(value))
            }

            fn visit_str<E>(self, value: &str) -> Result<Value, E> {
                Ok(Value::Text(value.to_owned()))
            }

            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_none<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
                Value::deserialize(deserializer)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
                let mut list = Vec::new();
                while let Some(item) = seq.next_element::<Spanned<Value>>()? {
                    list.push(Node::from(item));
                }
                Ok(Value::List(list))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(key) = map.next_key::<Spanned<String>>()? {
                    let name = Name { place: place(&key), text: key.value };
                    entries.push((name, Node::from(map.next_value::<Spanned<Value>>()?)));
                }
                Ok(Value::Map(entries))
            }
        }
        let _level = Level::enter()?;
        deserializer.deserialize_any(ValueVisitor)
    }
}

impl Serialize for Node {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.value {
            Value::Null => serializer.serialize_unit(),
            Value::Bool(value) => serializer.serialize_bool(*value),
            Value::Signed(value) => serializer.serialize_i64(*value),
            Value::Unsigned(value) => serializer.serialize_u64(*value),
            Value::Float(value) => serializer.serialize_f64(*value),
            Value::Text(text) => serializer.serialize_str(text),
            Value::List(items) => serializer.collect_seq(items),
            Value::Map(entries) => serializer.collect_map(entries.iter().map(|(name, node)| (&name.text, node))),
        }
    }
}

impl Node {
    /// The entry of a map, when this is one and has it.
    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|(name, _)| name.text == key).map(|(_, node)| node),
            _ => None,
        }
    }

    /// Like `get`, to change it.
    pub(crate) fn get_mut(&mut self, key: &str) -> Option<&mut Node> {
        match &mut self.value {
            Value::Map(entries) => entries.iter_mut().find(|(name, _)| name.text == key).map(|(_, node)| node),
            _ => None,
        }
    }

    /// Takes the entry out of a map.
    pub(crate) fn remove(&mut self, key: &str) -> Option<(Name, Node)> {
        let Value::Map(entries) = &mut self.value else { return None };
        let at = entries.iter().position(|(name, _)| name.text == key)?;
        Some(entries.remove(at))
    }

    /// Takes out the innermost entry whose key or value stands there. False when there is none.
    pub(crate) fn forget(&mut self, place: &Place) -> bool {
        match &mut self.value {
            Value::Map(entries) => {
                if entries.iter_mut().any(|(_, node)| node.forget(place)) {
                    return true;
                }
                let found = entries.iter().position(|(name, node)| name.place == *place || node.place == *place);
                found.map(|at| entries.remove(at)).is_some()
            }
            Value::List(items) => {
                if items.iter_mut().any(|node| node.forget(place)) {
                    return true;
                }
                let found = items.iter().position(|node| node.place == *place);
                found.map(|at| items.remove(at)).is_some()
            }
            Value::Null | Value::Bool(_) | Value::Signed(_) | Value::Unsigned(_) | Value::Float(_) | Value::Text(_) => {
                false
            }
        }
    }

    /// Puts `node` at a dotted path, making maps on the way and replacing what was there. False when a part of the path
    /// is no map.
    pub(crate) fn set(&mut self, path: &[&str], node: Node) -> bool {
        let Some((first, rest)) = path.split_first() else {
            *self = node;
            return true;
        };
        if self.value == Value::Null {
            self.value = Value::Map(Vec::new());
        }
        let Value::Map(entries) = &mut self.value else { return false };
        let found = entries.iter().position(|(name, _)| name.text == *first);
        let at = found.unwrap_or_else(|| {
            let name = Name { text: (*first).to_owned(), place: node.place.clone() };
            entries.push((name, Node { value: Value::Null, place: node.place.clone() }));
            entries.len() - 1
        });
        entries[at].0.place = node.place.clone();
        entries[at].1.set(rest, node)
    }

    /// The place of the key at a dotted path, or of the nearest one above it that is there.
    pub(crate) fn place_of(&self, path: &str) -> Place {
        let mut node = self;
        let mut place = self.place.clone();
        for part in path.split('.') {
            let (key, index) = match part.strip_suffix(']').and_then(|p| p.split_once('[')) {
                Some((key, index)) => (key, index.parse::<usize>().ok()),
                None => (part, None),
            };
            let Value::Map(entries) = &node.value else { return place };
            let Some((name, child)) = entries.iter().find(|(name, _)| name.text == key) else { return place };
            (node, place) = (child, name.place.clone());
            if let (Some(index), Value::List(items)) = (index, &node.value) {
                let Some(item) = items.get(index) else { return place };
                (node, place) = (item, item.place.clone());
            }
        }
        place
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    #[test]
    fn every_key_and_value_knows_its_place() {
        let tree = parse("# a comment\nrouter:\n  listen: 1\n  list: [a,\n    b]\n").unwrap();
        assert_eq!(tree.place_of("router"), Place::File { line: 2, column: 1 });
        assert_eq!(tree.place_of("router.listen"), Place::File { line: 3, column: 3 });
        assert_eq!(tree.place_of("router.missing"), Place::File { line: 2, column: 1 });
        assert_eq!(tree.place_of("router.list[1]"), Place::File { line: 5, column: 5 });
    }

    #[test]
    fn json_is_read_as_people_and_programs_write_it() {
        let tree = parse(
            "{\n\t\"a\": {\"b\": \"x\\/y \\u00e4 \\ud83d\\ude00\", \"n\": -3, \"f\": 0.5},\n\t\"l\": [1, null]\n}\n",
        );
        let tree = tree.unwrap();
        let a = tree.get("a").unwrap();
        assert_eq!(a.get("b").unwrap().value, Value::Text("x/y \u{e4} \u{1f600}".into()));
        assert_eq!(a.get("n").unwrap().value, Value::Signed(-3));
        assert_eq!(a.get("f").unwrap().value, Value::Float(0.5));
    }

    #[test]
    fn nesting_is_limited_however_it_comes_about() {
        let written = format!("a: {}{}", "[".repeat(20), "]".repeat(20));
        assert!(parse(&written).unwrap_err().message.contains("nested more than 16 levels"));
        let mut chained = "a0: &a0 x\n".to_owned();
        for level in 1..200 {
            let _ = writeln!(chained, "a{level}: &a{level} [*a{}]", level - 1);
        }
        parse(&chained).unwrap_err();
        assert!(parse("a: {b: {c: [[1]]}}").is_ok(), "the count starts anew");
    }

    #[test]
    fn an_empty_file_is_an_empty_map() {
        for text in ["", "\n", "# only a comment\n", "---\n", "{}", "\u{feff}"] {
            let tree = parse(text).unwrap();
            assert!(
                matches!(&tree.value, Value::Map(entries) if entries.is_empty()) || tree.value == Value::Null,
                "{text:?}"
            );
        }
    }
}
