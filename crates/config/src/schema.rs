//! One place that knows every key: the macro that declares a section also writes down its keys, types, defaults and docs.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use drover_types::AgentKind;

use crate::human::{HumanDuration, HumanSize};

/// One key of the configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// Its dotted path, such as `router.listen`; `[]` and `<name>` stand for any entry.
    pub path: String,
    /// The type, in words.
    pub kind: String,
    /// The default as it would be written; `unset` when there is none.
    pub default: String,
    /// What it does.
    pub doc: String,
}

/// One step of the walk through the schema.
#[derive(Debug)]
pub(crate) enum Entry {
    /// A section begins.
    Section { path: String, doc: String },
    /// A key of it.
    Key(Key),
}

/// A type that may stand in the file: how the reference page names it, and which keys it has.
pub(crate) trait Kind {
    /// It has keys of its own.
    const SECTION: bool = false;

    /// The type in words.
    fn kind() -> String;

    /// Adds what stands at `path`. A plain value is one key; a section adds its keys.
    fn describe(path: &str, doc: &str, default: &serde_json::Value, out: &mut Vec<Entry>) {
        out.push(Entry::Key(Key {
            path: path.to_owned(),
            kind: Self::kind(),
            default: written(default),
            doc: doc.to_owned(),
        }));
    }
}

fn written(default: &serde_json::Value) -> String {
    match default {
        serde_json::Value::Null => "unset".to_owned(),
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Puts a key below a path.
pub(crate) fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

macro_rules! plain_kind {
    ($($ty:ty => $words:literal),+ $(,)?) => {
        $(impl Kind for $ty {
            fn kind() -> String {
                $words.to_owned()
            }
        })+
    };
}

plain_kind! {
    bool => "true or false",
    i64 => "number",
    u16 => "number",
    u32 => "number",
    u64 => "number",
    usize => "number",
    f64 => "number",
    String => "text",
    PathBuf => "path",
    SocketAddr => "address:port",
    HumanDuration => "duration",
    HumanSize => "size",
    serde_json::Value => "any value",
}

impl Kind for AgentKind {
    fn kind() -> String {
        Self::ALL.iter().map(|agent| format!("`{agent}`")).collect::<Vec<_>>().join(" or ")
    }
}

impl<T: Kind> Kind for Option<T> {
    const SECTION: bool = T::SECTION;

    fn kind() -> String {
        T::kind()
    }

    fn describe(path: &str, doc: &str, default: &serde_json::Value, out: &mut Vec<Entry>) {
        T::describe(path, doc, default, out);
    }
}

impl<T: Kind> Kind for Vec<T> {
    const SECTION: bool = T::SECTION;

    fn kind() -> String {
        format!("list of {}", T::kind())
    }

    fn describe(path: &str, doc: &str, default: &serde_json::Value, out: &mut Vec<Entry>) {
        if T::SECTION {
            T::describe(&format!("{path}[]"), doc, &serde_json::Value::Null, out);
        } else {
            out.push(Entry::Key(Key {
                path: path.to_owned(),
                kind: Self::kind(),
                default: written(default),
                doc: doc.to_owned(),
            }));
        }
    }
}

impl<T: Kind> Kind for BTreeMap<String, T> {
    const SECTION: bool = T::SECTION;

    fn kind() -> String {
        format!("map from name to {}", T::kind())
    }

    fn describe(path: &str, doc: &str, default: &serde_json::Value, out: &mut Vec<Entry>) {
        if T::SECTION {
            T::describe(&format!("{path}.<name>"), doc, &serde_json::Value::Null, out);
        } else {
            out.push(Entry::Key(Key {
                path: path.to_owned(),
                kind: Self::kind(),
                default: written(default),
                doc: doc.to_owned(),
            }));
        }
    }
}

/// True for kinds whose environment override is taken as it stands, without reading it as YAML.
pub(crate) fn is_text(kind: &str) -> bool {
    kind != "true or false"
        && kind != "number"
        && kind != "any value"
        && !kind.starts_with("list of ")
        && !kind.starts_with("map from ")
}

/// Declares a section: the struct, its defaults beside its fields, and its entries of the schema.
macro_rules! section {
    (
        $(#[doc = $section_doc:literal])+
        pub struct $name:ident {
            $(
                $(#[doc = $doc:literal])+
                $(#[serde($($serde:tt)+)])?
                pub $field:ident: $ty:ty = $default:expr
            ),+ $(,)?
        }
    ) => {
        $(#[doc = $section_doc])+
        #[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $(
                $(#[doc = $doc])+
                $(#[serde($($serde)+)])?
                pub $field: $ty,
            )+
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default),+ }
            }
        }

        impl $crate::schema::Kind for $name {
            const SECTION: bool = true;

            fn kind() -> String {
                "section".to_owned()
            }

            fn describe(
                path: &str,
                _doc: &str,
                _default: &serde_json::Value,
                out: &mut Vec<$crate::schema::Entry>,
            ) {
                let defaults = serde_json::to_value(Self::default()).unwrap_or_default();
                if !path.is_empty() {
                    out.push($crate::schema::Entry::Section {
                        path: path.to_owned(),
                        doc: concat!($($section_doc, "\n"),+).trim().to_owned(),
                    });
                }
                $(
                    <$ty as $crate::schema::Kind>::describe(
                        &$crate::schema::join(path, stringify!($field)),
                        concat!($($doc),+).trim(),
                        &defaults[stringify!($field)],
                        out,
                    );
                )+
            }
        }
    };
}

pub(crate) use section;

/// Every section and key in the order of the file.
pub(crate) fn walk() -> Vec<Entry> {
    let mut out = Vec::new();
    crate::Config::describe("", "", &serde_json::Value::Null, &mut out);
    out
}

/// Every key of the file, in order.
pub fn schema() -> Vec<Key> {
    walk()
        .into_iter()
        .filter_map(|entry| match entry {
            Entry::Key(key) => Some(key),
            Entry::Section { .. } => None,
        })
        .collect()
}
