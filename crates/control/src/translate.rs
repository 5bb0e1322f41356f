//! From an event of the log to a line: the one table of which event carries which common fields.
//!
//! What the table relies on (the router writes it so):
//! - `data` of `swarm_launch_progress`, `swarm_launched`, `inject_*`, `swarm_terminate_progress`, `swarm_terminated`,
//!   `exec_approval_submitted` and of the `swarm_status` of a termination has the `request_id` of the asker;
//! - the order of the log is the order that clients depend on: `swarm_launched` before the `inject_ack` of the system
//!   prompt, `inject_ack` before every event of its turn.

use std::borrow::Cow;
use std::fmt;

use drover_proto::router::Event;
use serde::de::{Deserializer as _, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::envelope::{LINE_END, begin_line};
use crate::json::Object;
use crate::line::RequestId;

/// How the lines of an event differ from those of a runtime event.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Rule {
    /// Keeps the `request_id`. Every other event loses it: a client that sees its id on an event it does not expect ends
    /// with an error.
    request_id: bool,
    /// Ends a request: whoever waits for it needs no further answer.
    ends_request: bool,
    /// Only values that are no object and no array: the CLI prints each with its key.
    scalars_only: bool,
    /// Has a `timestamp` in Unix seconds inside `data`.
    unix_timestamp: bool,
}

fn rule(event: &str) -> Rule {
    let none = Rule::default();
    match event {
        "inject_ack" | "inject_delivered" | "inject_failed" | "swarm_status" => Rule { request_id: true, ..none },
        "swarm_launch_progress" | "swarm_terminate_progress" => Rule { request_id: true, unix_timestamp: true, ..none },
        "swarm_launched" => Rule { request_id: true, ends_request: true, scalars_only: true, ..none },
        "swarm_terminated" | "exec_approval_submitted" | "exec_approval_resolved" => {
            Rule { request_id: true, ends_request: true, ..none }
        }
        _ => none,
    }
}

/// Appends the event's line. Gives back the id of the request that it ends, if it ends one.
pub(crate) fn push_event(out: &mut Vec<u8>, event: &Event) -> Option<String> {
    let rule = rule(&event.event);
    let fields = Fields::read(&event.data);
    begin_line(out, &event.event, event.timestamp_us, Some(event.seq));
    let mut data = Object::begin(out);
    let request_id = fields.get("request_id").filter(|_| rule.request_id);
    let asked_as = request_id.and_then(|raw| serde_json::from_str::<Cow<'_, str>>(raw.get()).ok());
    match (&asked_as, request_id) {
        (Some(text), _) => data.raw("request_id", &RequestId::of_text(text).to_json()),
        (None, Some(raw)) => data.raw("request_id", raw.get()),
        (None, None) => {}
    }
    let common = push_common(&mut data, event);
    for (key, value) in &fields.0 {
        let written = key == "request_id" || common.contains(&key.as_ref());
        let unwanted = rule.scalars_only && value.get().starts_with(['{', '[']);
        if !written && !unwanted {
            data.raw(key, value.get());
        }
    }
    if rule.unix_timestamp && fields.get("timestamp").is_none() {
        data.raw("timestamp", &unix_seconds(event.timestamp_us));
    }
    data.end();
    out.extend_from_slice(LINE_END);
    asked_as.filter(|_| rule.ends_request).map(Cow::into_owned)
}

/// Writes the common fields that the event has, and says which those are.
fn push_common(data: &mut Object<'_>, event: &Event) -> [&'static str; 4] {
    let mut written = [""; 4];
    if !event.swarm_id.is_empty() {
        data.text("swarm_id", &event.swarm_id);
        written[0] = "swarm_id";
    }
    if !event.job_id.is_empty() || event.node_id.is_some() {
        data.text("job_id", &event.job_id);
        written[1] = "job_id";
    }
    if let Some(node_id) = event.node_id {
        data.number("node_id", node_id.into());
        written[2] = "node_id";
    }
    if !event.injection_id.is_empty() || event.node_id.is_some() {
        data.text_or_null("injection_id", &event.injection_id);
        written[3] = "injection_id";
    }
    written
}

/// Unix time in seconds with a fraction.
pub(crate) fn unix_seconds(timestamp_us: u64) -> String {
    format!("{}.{:06}", timestamp_us / 1_000_000, timestamp_us % 1_000_000)
}

/// The fields of a JSON object in their order, values untouched. Text that is no object has none: a line of ours is
/// always JSON, whatever the log holds.
struct Fields<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'a> Fields<'a> {
    fn read(data: &'a [u8]) -> Self {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Fields<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::with_capacity(8);
                while let Some((Key(key), value)) = map.next_entry::<Key<'de>, &'de RawValue>()? {
                    fields.push((key, value));
                }
                Ok(Fields(fields))
            }
        }
        let Ok(text) = std::str::from_utf8(data) else { return Fields(Vec::new()) };
        let mut reader = serde_json::Deserializer::from_str(text);
        let fields = reader.deserialize_map(Read);
        match (fields, reader.end()) {
            (Ok(fields), Ok(())) => fields,
            _ => Fields(Vec::new()),
        }
    }

    fn get(&self, key: &str) -> Option<&'a RawValue> {
        self.0.iter().find(|(name, _)| name == key).map(|&(_, value)| value)
    }
}

/// A key that borrows unless it has escapes.
struct Key<'a>(Cow<'a, str>);

impl<'de> serde::Deserialize<'de> for Key<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Key<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }
            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Key(Cow::Borrowed(text)))
            }
            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Key(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(Read)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn event(name: &str, node_id: Option<u32>, injection_id: &str, data: &str) -> Event {
        Event {
            seq: 9,
            timestamp_us: 1_772_063_938_123_456,
            stored_us: 0,
            event: name.to_owned(),
            swarm_id: "s1".to_owned(),
            job_id: "272900".to_owned(),
            node_id,
            injection_id: injection_id.to_owned(),
            data: data.to_owned().into_bytes().into(),
        }
    }

    fn data_of(event: &Event) -> (Value, Option<String>) {
        let mut out = Vec::new();
        let ends = push_event(&mut out, event);
        assert!(out.is_ascii() && out.ends_with(b"\n") && !out[..out.len() - 1].contains(&b'\n'));
        let line: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!((&line["type"], &line["protocol"]), (&json!("event"), &json!("codeswarm.router.v1")));
        assert_eq!((&line["event"], &line["seq"]), (&json!(event.event), &json!(9)));
        (line["data"].clone(), ends)
    }

    #[test]
    fn runtime_events_carry_the_common_fields_and_no_request_id() {
        let delta = event("assistant_delta", Some(3), "i1", r#"{"content":"grüße 🙂","request_id":"r","node_id":"x"}"#);
        let expected = json!({"swarm_id":"s1","job_id":"272900","node_id":3,"injection_id":"i1","content":"grüße 🙂"});
        assert_eq!(data_of(&delta), (expected, None));
        let (idle, _) = data_of(&event("thread_status", Some(0), "", r#"{"status":{"type":"idle"}}"#));
        assert_eq!(idle["injection_id"], Value::Null);
        assert_eq!(idle["status"]["type"], "idle");
    }

    #[test]
    fn answers_keep_the_request_id_in_front_and_say_what_they_end() {
        let launched = event(
            "swarm_launched",
            None,
            "",
            r#"{"node_count":2,"nodes":[{}],"spec":{},"request_id":"r","time":null}"#,
        );
        let mut out = Vec::new();
        assert_eq!(push_event(&mut out, &launched).as_deref(), Some("r"));
        let text = String::from_utf8(out).unwrap();
        assert!(
            text.ends_with(
                r#""data":{"request_id":"r","swarm_id":"s1","job_id":"272900","node_count":2,"time":null}}"#.to_owned().as_str()
            ) || text.trim_end().ends_with(
                r#""data":{"request_id":"r","swarm_id":"s1","job_id":"272900","node_count":2,"time":null}}"#
            ),
            "{text}"
        );
        let (ack, ends) = data_of(&event("inject_ack", Some(1), "i1", r#"{"request_id":"r","prompt":"go"}"#));
        assert_eq!(
            ack,
            json!({"request_id":"r","swarm_id":"s1","job_id":"272900","node_id":1,"injection_id":"i1","prompt":"go"})
        );
        assert_eq!(ends, None);
        let (progress, ends) =
            data_of(&event("swarm_launch_progress", None, "", r#"{"request_id":"r","stage":"queued","message":"m"}"#));
        assert!((progress["timestamp"].as_f64().unwrap() - 1_772_063_938.123_456).abs() < 1e-3);
        assert_eq!(ends, None);
    }

    #[test]
    fn the_asker_gets_its_own_id_back_whatever_its_type() {
        for id in
            [json!("r"), json!("7"), json!(7), json!(-1.5), json!({"a":["\n",null]}), json!("json:7"), json!(false)]
        {
            let sent = json!({"protocol":"codeswarm.router.v1","command":"swarm_list","request_id":id}).to_string();
            let crate::line::Inbound::Command(command) = crate::line::decode(sent.as_bytes()) else { panic!("{id}") };
            let known_as = command.request_id.as_text();
            let stored = json!({"request_id":known_as}).to_string();
            let (data, ends) = data_of(&event("swarm_terminated", None, "", &stored));
            assert_eq!((&data["request_id"], ends.as_ref()), (&id, Some(&known_as)));
        }
    }

    #[test]
    fn damaged_data_still_makes_a_line() {
        for data in ["", "[]", "{\"content\":", "{} x", "{\"a\":1}{", "nul"] {
            let (line, _) = data_of(&event("turn_complete", Some(0), "i1", data));
            assert_eq!(line, json!({"swarm_id":"s1","job_id":"272900","node_id":0,"injection_id":"i1"}), "{data}");
        }
        let mut broken = event("assistant", Some(0), "i1", "");
        broken.data = vec![b'{', b'"', 0xff, b'"', b':', b'1', b'}'].into();
        assert_eq!(data_of(&broken).0["node_id"], 0);
    }

    proptest! {
        #[test]
        fn any_object_arrives_as_it_is(key in "[a-z\\n\"é]{1,8}", text in ".*", pretty in any::<bool>()) {
            prop_assume!(!["swarm_id", "job_id", "node_id", "request_id"].contains(&key.as_str()));
            let data = json!({ key.clone(): [text, {"deep": "\u{1f600}"}] });
            let written = if pretty { serde_json::to_string_pretty(&data) } else { serde_json::to_string(&data) }.unwrap();
            let (line, _) = data_of(&event("whatever", Some(0), "i", &written));
            prop_assert_eq!(&line[&key], &data[&key]);
        }
    }
}
