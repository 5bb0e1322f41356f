//! Who is there: the members of the gossip, as its leaders report them, and the events that follow from changes of this
//! table.
//!
//! Several nodes may lead one after another, and each writes all that it knows; what they write arrives late, twice, or from
//! one who no longer leads. So events are never taken from a record. They are derived from what the table says before and
//! after it, and a change is told once, whoever reported it and however often.
//!
//! What a node claims of itself is ordered by (boot, incarnation), whoever passes it on. What others believe about one and the
//! same claim is ordered by the leader's ballot, and within one ballot by the order in which that leader wrote it.

use std::collections::{BTreeMap, BTreeSet};

use drover_types::SwarmId;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::effects::{Effects, Micros};
use super::model::SwarmKey;
use super::{Core, Saying, Word};

/// Longest gossip id.
const MOST_ID: usize = 128;
/// More members than any gossip that we could follow.
const MOST_MEMBERS: usize = 20_000;

/// What the others believe about a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum MemberState {
    #[default]
    Alive,
    Suspect,
    Dead,
    Left,
}

impl MemberState {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Alive => "alive",
            Self::Suspect => "suspect",
            Self::Dead => "dead",
            Self::Left => "left",
        }
    }

    /// It answers, or has not been given up.
    pub(crate) fn is_up(self) -> bool {
        matches!(self, Self::Alive | Self::Suspect)
    }
}

/// A member as a leader writes it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct MemberWord {
    pub(crate) node_id: String,
    pub(crate) state: MemberState,
    #[serde(default)]
    pub(crate) swarm_id: Option<SwarmId>,
    #[serde(default)]
    pub(crate) node_index: Option<u32>,
    #[serde(default)]
    pub(crate) addr: String,
    #[serde(default)]
    pub(crate) port: u32,
    #[serde(default)]
    pub(crate) load_score: Option<f64>,
    #[serde(default)]
    pub(crate) overloaded: bool,
    #[serde(default)]
    pub(crate) overload_reason: Option<String>,
    #[serde(default)]
    pub(crate) incarnation: u32,
    #[serde(default)]
    pub(crate) boot: u64,
    #[serde(default)]
    pub(crate) capabilities: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) labels: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) region: Option<String>,
    #[serde(default)]
    pub(crate) version: String,
    /// Microseconds of Unix time, by the member's own clock.
    #[serde(default)]
    pub(crate) timestamp: u64,
    #[serde(default)]
    pub(crate) cause: Option<String>,
}

impl MemberWord {
    /// Orders what a node claims of itself.
    fn version(&self) -> (u64, u32) {
        (self.boot, self.incarnation)
    }

    /// The payload of `NodeJoined` and `NodeAlive`.
    fn info(&self) -> Value {
        json!({
            "ID": self.node_id, "Addr": self.addr, "Port": self.port, "AgentCaps": self.capabilities,
            "LoadScore": self.load_score.unwrap_or(0.0), "Labels": self.labels, "Timestamp": self.timestamp,
            "Version": self.version,
        })
    }
}

/// Orders leaders.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub(crate) struct Ballot {
    pub(crate) epoch: u64,
    pub(crate) term: u64,
}

/// A record of a leader.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct MembersWord {
    /// It names every member there is.
    pub(crate) complete: bool,
    pub(crate) ballot: Ballot,
    pub(crate) members: Vec<MemberWord>,
}

/// A member's row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct MemberFacts {
    pub(crate) word: MemberWord,
    /// The leader whose word it is.
    pub(crate) ballot: Ballot,
    /// Since when it is in its state.
    pub(crate) since: Micros,
}

/// Who reported last.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct MembersView {
    pub(crate) reporter: String,
    pub(crate) ballot: Ballot,
    /// When a leader was last heard of; 0 when none ever was.
    pub(crate) heard: Micros,
}

/// What a swarm's own listing shows of a node's membership.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Glance {
    pub(crate) node_id: String,
    pub(crate) state: MemberState,
    pub(crate) since: Micros,
    pub(crate) load: Option<f64>,
    pub(crate) overloaded: bool,
    pub(crate) reason: String,
}

impl From<&MemberFacts> for Glance {
    fn from(facts: &MemberFacts) -> Self {
        let word = &facts.word;
        Self {
            node_id: word.node_id.clone(),
            state: word.state,
            since: facts.since,
            load: word.load_score,
            overloaded: word.overloaded,
            reason: word.overload_reason.clone().unwrap_or_default(),
        }
    }
}

/// Where a record came from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source {
    pub(super) key: SwarmKey,
    pub(super) node: u32,
    /// Its worker has been replaced since.
    pub(super) late: bool,
    pub(super) happened: Micros,
}

impl Core {
    /// Takes what a leader says of the members.
    pub(super) fn members_said(&mut self, source: Source, said: &MembersWord, fx: &mut Effects) {
        let mut named = BTreeSet::new();
        for word in &said.members {
            named.insert(word.node_id.as_str());
            self.member_said(source, said.ballot, word, fx);
        }
        if said.complete && !source.late {
            // Whoever is missing has been forgotten there. A leader of an earlier term may never have known it.
            // And one of another cluster knows nothing of those that share no file system with it.
            let side = self.swarms.get(&source.key).map(|swarm| &swarm.facts.side);
            let of_its_side = |facts: &MemberFacts| {
                let own = self.place_of(&facts.word).and_then(|(key, _)| self.swarms.get(&key));
                own.is_none_or(|own| Some(&own.facts.side) == side)
            };
            let missing = |(id, facts): &(&String, &MemberFacts)| {
                !named.contains(id.as_str()) && facts.ballot <= said.ballot && of_its_side(facts)
            };
            let gone: Vec<String> = self.book.members.iter().filter(missing).map(|(id, _)| id.clone()).collect();
            for id in gone {
                self.forget_member(&id, source.happened, fx);
            }
        }
        let view = &mut self.book.members_view;
        if said.ballot >= view.ballot {
            let reporter = self.swarms.get(&source.key).map(|swarm| format!("{}/{}", swarm.head.id, source.node));
            view.reporter = reporter.unwrap_or_default();
            view.ballot = said.ballot;
            view.heard = fx.now;
            self.book.dirty.members_view = true;
        }
    }

    fn member_said(&mut self, source: Source, ballot: Ballot, word: &MemberWord, fx: &mut Effects) {
        let id = &word.node_id;
        if id.is_empty() || id.len() > MOST_ID || id.chars().any(char::is_control) || !self.is_of_interest(word) {
            return;
        }
        let known = self.book.members.get(id);
        if let Some(known) = known {
            let newer_claim = word.version() > known.word.version();
            let later_belief = word.version() == known.word.version()
                && (ballot > known.ballot || (ballot == known.ballot && !source.late));
            if !newer_claim && !later_belief {
                return;
            }
            if known.word == *word && known.ballot == ballot {
                return;
            }
        } else if self.book.members.len() >= MOST_MEMBERS {
            return;
        }
        let before = known.map(|known| (known.word.state, known.word.boot, known.since));
        let same_state = before.filter(|(state, boot, _)| *state == word.state && *boot == word.boot);
        let since = same_state.map_or(source.happened, |(_, _, since)| since);
        let facts = MemberFacts { word: word.clone(), ballot, since };
        self.show_member(&facts);
        self.book.members.insert(id.clone(), facts);
        self.book.dirty.members.insert(id.clone());
        self.tell_member(before.map(|(state, boot, _)| (state, boot)), word, source.happened, fx);
    }

    /// Members of swarms that have ended are nobody's any more, whatever is still said of them.
    fn is_of_interest(&self, word: &MemberWord) -> bool {
        let Some(id) = &word.swarm_id else { return true };
        self.by_id.get(id).and_then(|key| self.swarms.get(key)).is_some_and(|swarm| !swarm.is_over())
    }

    /// Says what changed: at most one way from one state to the other.
    fn tell_member(
        &mut self,
        before: Option<(MemberState, u64)>,
        word: &MemberWord,
        happened: Micros,
        fx: &mut Effects,
    ) {
        let was_up = before.is_some_and(|(state, _)| state.is_up());
        let restarted = before.is_some_and(|(_, boot)| boot != word.boot);
        if was_up && (restarted || !word.state.is_up()) {
            self.say_of_member("NodeLeft", word, &json!({ "NodeID": word.node_id }), happened, fx);
        }
        let joined = word.state.is_up() && (!was_up || restarted);
        if joined {
            self.say_of_member("NodeJoined", word, &word.info(), happened, fx);
        }
        let was_suspect = before.is_some_and(|(state, _)| state == MemberState::Suspect) && !joined;
        match word.state {
            MemberState::Suspect if !was_suspect => {
                self.say_of_member("NodeSuspect", word, &json!({ "NodeID": word.node_id }), happened, fx);
            }
            MemberState::Alive if was_suspect => {
                self.say_of_member("NodeAlive", word, &word.info(), happened, fx);
            }
            _ => {}
        }
    }

    fn say_of_member(
        &mut self,
        name: &'static str,
        word: &MemberWord,
        data: &Value,
        happened: Micros,
        fx: &mut Effects,
    ) {
        let saying = Saying {
            name: Word::Known(name),
            node: word.node_index.filter(|_| word.swarm_id.is_some()),
            injection: None,
            happened: Some(happened),
            data: data.to_string().into(),
        };
        let key = word.swarm_id.as_ref().and_then(|id| self.by_id.get(id));
        match key.and_then(|key| self.swarms.get(key)) {
            Some(swarm) => self.book.say(fx, &swarm.head, saying),
            None => self.book.say_of_none(fx, saying),
        };
    }

    /// Takes a member out of the table, and says that it left when nothing has said so yet.
    fn forget_member(&mut self, id: &str, happened: Micros, fx: &mut Effects) {
        let Some(facts) = self.book.members.remove(id) else { return };
        self.book.dirty.members.insert(id.to_owned());
        if facts.word.state.is_up() {
            let data = json!({ "NodeID": facts.word.node_id });
            self.say_of_member("NodeLeft", &facts.word, &data, happened, fx);
        }
        if let Some((key, index)) = self.place_of(&facts.word)
            && let Some(node) = self.swarms.get_mut(&key).and_then(|swarm| swarm.nodes.get_mut(index as usize))
            && node.member.as_ref().is_some_and(|glance| glance.node_id == id)
        {
            node.member = None;
            self.book.dirty.views.insert(key);
        }
    }

    /// The members of a swarm that ends go with it.
    pub(super) fn forget_members_of(&mut self, key: SwarmKey, fx: &mut Effects) {
        let Some(swarm) = self.swarms.get(&key) else { return };
        let of_swarm = |facts: &MemberFacts| facts.word.swarm_id.as_ref() == Some(&swarm.head.id);
        let gone: Vec<String> =
            self.book.members.iter().filter(|(_, facts)| of_swarm(facts)).map(|(id, _)| id.clone()).collect();
        for id in gone {
            self.forget_member(&id, fx.now, fx);
        }
    }

    fn place_of(&self, word: &MemberWord) -> Option<(SwarmKey, u32)> {
        Some((*self.by_id.get(word.swarm_id.as_ref()?)?, word.node_index?))
    }

    /// Lets the swarm's own listing show it.
    pub(super) fn show_member(&mut self, facts: &MemberFacts) {
        let Some((key, index)) = self.place_of(&facts.word) else { return };
        let Some(node) = self.swarms.get_mut(&key).and_then(|swarm| swarm.nodes.get_mut(index as usize)) else {
            return;
        };
        let glance = Some(Glance::from(facts));
        if node.member != glance {
            node.member = glance;
            self.book.dirty.views.insert(key);
        }
    }
}
