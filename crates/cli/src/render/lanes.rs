//! One live line per node while answers stream in, for as many nodes as the terminal has room for.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::render::screen::{Live, Screen};
use crate::render::table::one_line;
use crate::render::transcript::Transcript;

/// Lanes of the nodes that are at work.
#[derive(Debug)]
pub(crate) struct Lanes {
    screen: Screen,
    room: usize,
    /// Characters of text that fit into a lane.
    width: usize,
    by_node: BTreeMap<u32, Lane>,
    /// What stands out about nodes as members of the gossip.
    marks: BTreeMap<u32, String>,
    more: Option<Live>,
}

/// One node's line.
#[derive(Debug)]
struct Lane {
    live: Live,
    said: Option<Instant>,
}

/// A person sees no more changes than this, and drawing each of a fast agent's words would hold up the reading.
const REDRAW: Duration = Duration::from_millis(50);
/// Lines that stay free for what scrolls by above the lanes.
const LEAVE_FREE: usize = 8;
/// Columns of a lane before its text: "node 1000 ⠋ ".
const HEAD: usize = 13;

impl Lanes {
    pub(crate) fn new(screen: &Screen) -> Self {
        let size =
            rustix::termios::tcgetwinsize(std::io::stderr()).ok().filter(|size| size.ws_row > 0 && size.ws_col > 0);
        let (rows, columns) = size.map_or((24, 80), |size| (usize::from(size.ws_row), usize::from(size.ws_col)));
        Self {
            screen: screen.clone(),
            room: rows.saturating_sub(LEAVE_FREE).clamp(1, 16),
            width: columns.saturating_sub(HEAD).max(20),
            by_node: BTreeMap::new(),
            marks: BTreeMap::new(),
            more: None,
        }
    }

    /// Notes how the other nodes see one, as an event tells it: its lane says so when that is anything but alive, and how
    /// loaded it was when it was last alive.
    pub(crate) fn member(&mut self, node: u32, event: &str, data: &Value) {
        let Some(mark) = mark(event, data) else { return };
        self.marks.insert(node, mark);
        if let Some(lane) = self.by_node.get(&node) {
            lane.live.head(&self.head(node));
        }
    }

    fn head(&self, node: u32) -> String {
        match self.marks.get(&node).map(String::as_str) {
            None | Some("") => format!("node {node}"),
            Some(mark) => format!("node {node} ({mark})"),
        }
    }

    /// Shows what a node is saying now. Nodes without a running turn have no lane.
    pub(crate) fn show(&mut self, node: u32, transcript: &Transcript) {
        if !self.screen.is_live() {
            return;
        }
        let (busy, text) = transcript.current(node);
        if busy {
            if self.by_node.contains_key(&node) || self.by_node.len() < self.room {
                let position = self.by_node.range(..node).count();
                let head = self.head(node);
                let lane = self
                    .by_node
                    .entry(node)
                    .or_insert_with(|| Lane { live: self.screen.lane(position, head), said: None });
                if lane.said.is_none_or(|said| said.elapsed() >= REDRAW) {
                    lane.said = Some(Instant::now());
                    lane.live.say(&tail(text, self.width));
                }
            }
        } else {
            self.by_node.remove(&node);
        }
        let hidden = transcript.busy().saturating_sub(self.by_node.len());
        let lanes = self.by_node.len();
        if hidden == 0 {
            self.more = None;
        } else {
            let more = self.more.get_or_insert_with(|| self.screen.lane(lanes, "  …   ".to_owned()));
            more.say(&format!("and {hidden} more at work"));
        }
    }
}

/// What a lane says of its node as a member; `None` for events that are not about that.
fn mark(event: &str, data: &Value) -> Option<String> {
    match event {
        "NodeSuspect" => Some("suspect".to_owned()),
        "NodeLeft" => Some("left".to_owned()),
        "NodeJoined" | "NodeAlive" => {
            let load = data["LoadScore"].as_f64().filter(|load| *load > 0.0);
            Some(load.map_or_else(String::new, |load| format!("load {load:.2}")))
        }
        _ => None,
    }
}

/// The end of a text: what comes in last is what a person watches.
fn tail(text: &str, length: usize) -> String {
    // Only the end is looked at, whose spaces and control characters may take room that the lane does not show.
    let from = text.char_indices().rev().nth(length * 4).map_or(0, |(at, _)| at);
    let end = one_line(&text[from..]);
    let count = end.chars().count();
    if from == 0 && count <= length {
        return end;
    }
    format!("…{}", end.chars().skip((count + 1).saturating_sub(length)).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_says_how_the_others_see_its_node() {
        let info = serde_json::json!({"LoadScore": 0.834});
        assert_eq!(mark("NodeSuspect", &Value::Null).as_deref(), Some("suspect"));
        assert_eq!(mark("NodeLeft", &Value::Null).as_deref(), Some("left"));
        assert_eq!(mark("NodeAlive", &info).as_deref(), Some("load 0.83"));
        assert_eq!(mark("NodeJoined", &Value::Null).as_deref(), Some(""));
        assert_eq!(mark("assistant", &info), None);
    }

    #[test]
    fn a_lane_shows_the_end_of_a_long_line() {
        assert_eq!(tail("short", 10), "short");
        assert_eq!(tail("abcdefghijklmnop", 5), "…mnop");
        let long = format!("{}é\u{1b}\n tail", "x".repeat(1 << 20));
        assert_eq!(tail(&long, 7), "…é tail");
    }
}
