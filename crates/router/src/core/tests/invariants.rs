//! What must hold of every event log, whatever happened.

use std::collections::{BTreeMap, BTreeSet};

use drover_types::InjectionId;

use super::Event;

/// Sequence numbers grow, by one each.
pub(super) fn numbers_never_repeat(events: &[Event]) {
    for pair in events.windows(2) {
        assert_eq!(pair[1].seq, pair[0].seq + 1, "{pair:?}");
    }
}

/// A prompt is acknowledged once, before anything else is said of it, and delivered at most once.
pub(super) fn acknowledged_first(events: &[Event]) {
    let mut acknowledged = BTreeSet::new();
    let mut delivered = BTreeSet::new();
    for event in events {
        let Some(id) = &event.injection else { continue };
        match &*event.name {
            "inject_ack" => assert!(acknowledged.insert(id.clone()), "{id} was acknowledged twice"),
            "inject_delivered" => assert!(delivered.insert(id.clone()), "{id} was delivered twice"),
            _ => {}
        }
        assert!(acknowledged.contains(id), "{event:?} came before its acknowledgement");
    }
}

/// Nothing ends twice.
pub(super) fn ends_at_most_once(events: &[Event]) -> BTreeMap<InjectionId, &Event> {
    let mut ended = BTreeMap::new();
    for event in events.iter().filter(|event| matches!(&*event.name, "turn_complete" | "inject_failed")) {
        let id = event.injection.clone().unwrap();
        let earlier = ended.insert(id, event);
        assert!(earlier.is_none(), "ended twice: {earlier:?} and {event:?}");
    }
    ended
}

/// What a client that waits for a prompt needs to see: `assistant` before `turn_complete`, or `inject_failed`.
pub(super) fn clients_come_to_an_end(events: &[Event]) {
    let mut answered = BTreeSet::new();
    let mut delivered = BTreeSet::new();
    for event in events {
        let Some(id) = &event.injection else { continue };
        match &*event.name {
            "assistant" => drop(answered.insert(id)),
            "inject_delivered" => drop(delivered.insert(id)),
            "turn_complete" => {
                assert!(answered.contains(id), "{id} ended without an assistant event");
                assert!(delivered.contains(id), "{id} ended without having been delivered");
            }
            _ => {}
        }
    }
}

/// Every record of the runtime reached the log at most once: `words` tells them apart.
pub(super) fn no_word_twice(events: &[Event]) {
    let mut words = BTreeSet::new();
    for event in events.iter().filter(|event| *event.name == *"assistant_delta") {
        assert!(words.insert(event.data.clone()), "{event:?} is in the log twice");
    }
}

/// All of them.
pub(super) fn hold(events: &[Event]) {
    numbers_never_repeat(events);
    acknowledged_first(events);
    ends_at_most_once(events);
    clients_come_to_an_end(events);
    no_word_twice(events);
}
