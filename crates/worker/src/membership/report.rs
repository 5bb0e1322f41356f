//! What the node that leads writes about the members: everything when it takes the lead and now and then, changes as they
//! come. No clock, files or tasks in here.
//!
//! Reports may come late, twice or from one who no longer leads; whoever reads them compares. So nothing here has to be
//! exact but this: whoever does not lead writes nothing, and every change of a state is written by whoever leads then.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use drover_proto::membership::{Member, MemberState};
use serde_json::{Value, json};

/// Changes that come so close together are one record.
const BATCH: Duration = Duration::from_millis(200);
/// A load that changed is no news that anybody waits for.
const LOAD_BATCH: Duration = Duration::from_secs(5);
/// A load that changed by less is as it was.
const LOAD_STEP: f64 = 0.05;
/// Between two complete reports when something has happened.
const COMPLETE: Duration = Duration::from_secs(30);
/// The same when nothing has: a sign of life.
const QUIET: Duration = Duration::from_mins(5);
/// Label by which a node says why it is overloaded.
pub(super) const OVERLOAD: &str = "overload";
/// Members in one record; it has to stay a line that readers take.
const MOST: usize = 2_000;

/// What this node may say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// Nothing: another leads, or nobody does.
    Silent,
    /// Nobody can lead yet, and this node was chosen to speak meanwhile. It cannot know that it knows everybody.
    Stopgap,
    /// Everything: it leads.
    Leads { epoch: u64, term: u64 },
}

/// What was written of a member last.
#[derive(Debug, Clone, PartialEq)]
struct Told {
    claim: (u64, u32),
    state: i32,
    overloaded: bool,
    load: Option<f64>,
}

impl Told {
    fn of(member: &Member) -> Self {
        Self {
            claim: (member.boot, member.incarnation),
            state: member.state,
            overloaded: member.overloaded,
            load: member.load_score,
        }
    }
}

/// Keeps the view and knows what of it is not written yet.
#[derive(Debug)]
pub(super) struct Reporter {
    view: BTreeMap<String, Member>,
    told: BTreeMap<String, Told>,
    /// Members whose change is to be written, and since when that is due.
    fresh: BTreeSet<String>,
    fresh_at: Option<Instant>,
    standing: Standing,
    /// The view is one: a snapshot has come since the stream began.
    known: bool,
    /// Something was written, or somebody forgotten, since the last complete report.
    moved: bool,
    complete_at: Option<Instant>,
    last_complete: Option<Instant>,
}

impl Reporter {
    pub(super) fn new() -> Self {
        Self {
            view: BTreeMap::new(),
            told: BTreeMap::new(),
            fresh: BTreeSet::new(),
            fresh_at: None,
            standing: Standing::Silent,
            known: false,
            moved: false,
            complete_at: None,
            last_complete: None,
        }
    }

    /// Every member as it is now.
    pub(super) fn snapshot(&mut self, now: Instant, members: Vec<Member>) {
        let fresh: BTreeMap<String, Member> =
            members.into_iter().map(|member| (member.node_id.clone(), member)).collect();
        let gone: Vec<String> = self.view.keys().filter(|id| !fresh.contains_key(*id)).cloned().collect();
        for id in gone {
            self.removed(&id);
        }
        self.known = true;
        self.view = fresh;
        let ids: Vec<String> = self.view.keys().cloned().collect();
        for id in ids {
            self.look(now, &id);
        }
    }

    /// A member is new or has changed.
    pub(super) fn changed(&mut self, now: Instant, member: Member) {
        let id = member.node_id.clone();
        self.view.insert(id.clone(), member);
        self.look(now, &id);
    }

    /// A member is forgotten.
    pub(super) fn removed(&mut self, id: &str) {
        if self.view.remove(id).is_some() {
            self.told.remove(id);
            self.fresh.remove(id);
            self.moved = true;
        }
    }

    /// What is known of the members now.
    pub(super) fn members(&self) -> impl Iterator<Item = &Member> {
        self.view.values()
    }

    /// The stream of changes has broken off: what is known may be old.
    pub(super) fn lost(&mut self) {
        self.known = false;
    }

    /// Who may speak has been looked up.
    pub(super) fn standing(&mut self, now: Instant, standing: Standing) {
        if self.standing == standing {
            return;
        }
        self.standing = standing;
        // Whatever another wrote meanwhile is not known here.
        self.told.clear();
        self.fresh.clear();
        self.fresh_at = None;
        self.last_complete = None;
        self.complete_at = (standing != Standing::Silent).then_some(now);
    }

    fn look(&mut self, now: Instant, id: &str) {
        if self.standing == Standing::Silent {
            return;
        }
        let Some(member) = self.view.get(id) else { return };
        let pause = match self.told.get(id) {
            Some(told) if *told == Told::of(member) => return,
            Some(told) => {
                let now_is = Told::of(member);
                let same = (told.claim, told.state, told.overloaded) == (now_is.claim, now_is.state, now_is.overloaded);
                let step = match (told.load, now_is.load) {
                    (Some(a), Some(b)) => (a - b).abs() >= LOAD_STEP,
                    (a, b) => a.is_some() != b.is_some(),
                };
                match (same, step) {
                    (false, _) => BATCH,
                    (true, true) => LOAD_BATCH,
                    (true, false) => return,
                }
            }
            None => BATCH,
        };
        self.fresh.insert(id.to_owned());
        let at = now + pause;
        self.fresh_at = Some(self.fresh_at.map_or(at, |earlier| earlier.min(at)));
    }

    /// When there is something to write; `None` while there is not.
    pub(super) fn due(&self) -> Option<Instant> {
        if self.standing == Standing::Silent || !self.known {
            return None;
        }
        let complete = self.complete_at.or_else(|| {
            let last = self.last_complete?;
            Some(last + if self.moved { COMPLETE } else { QUIET })
        });
        [complete, self.fresh_at].into_iter().flatten().min()
    }

    /// What is to be written now: the data of `members` records.
    pub(super) fn take(&mut self, now: Instant) -> Vec<Value> {
        if self.due().is_none_or(|due| due > now) {
            return Vec::new();
        }
        let whole = match (self.complete_at, self.last_complete) {
            (Some(at), _) => at <= now,
            (None, Some(last)) => now >= last + if self.moved { COMPLETE } else { QUIET },
            (None, None) => false,
        };
        let members: Vec<&Member> = if whole {
            self.view.values().collect()
        } else {
            self.fresh.iter().filter_map(|id| self.view.get(id)).collect()
        };
        let (epoch, term) = match self.standing {
            Standing::Leads { epoch, term } => (epoch, term),
            Standing::Silent | Standing::Stopgap => (0, 0),
        };
        // Somebody who is missing from a complete report counts as gone; only one who leads, and in one line, can say that.
        let complete = whole && matches!(self.standing, Standing::Leads { .. }) && members.len() <= MOST;
        let record = |members: &[&Member]| {
            let words: Vec<Value> = members.iter().map(|member| word(member)).collect();
            json!({ "complete": complete, "epoch": epoch, "term": term, "members": words })
        };
        let records = if members.is_empty() { vec![record(&[])] } else { members.chunks(MOST).map(record).collect() };
        let told: Vec<(String, Told)> =
            members.iter().map(|member| (member.node_id.clone(), Told::of(member))).collect();
        self.told.extend(told);
        self.fresh.clear();
        self.fresh_at = None;
        if whole {
            self.complete_at = None;
            self.last_complete = Some(now);
            self.moved = false;
        } else {
            self.moved = true;
        }
        records
    }
}

/// A member as the router reads it.
fn word(member: &Member) -> Value {
    let state = member.state();
    let cause = match state {
        MemberState::Dead => Some("silent"),
        MemberState::Left => Some("left"),
        MemberState::Alive | MemberState::Suspect | MemberState::Unspecified => None,
    };
    let labels: BTreeMap<&String, &String> =
        member.labels.iter().filter(|(key, _)| !key.starts_with("drover.") && *key != OVERLOAD).collect();
    let capabilities: BTreeMap<&String, &String> = member.capabilities.iter().collect();
    let swarm = Some(&member.swarm_id).filter(|id| !id.is_empty());
    json!({
        "node_id": member.node_id,
        "swarm_id": swarm,
        "node_index": member.node_index.filter(|_| swarm.is_some()),
        "addr": member.addr,
        "port": member.port,
        "state": state_name(state),
        "load_score": member.load_score.map(|load| (load * 1000.0).round() / 1000.0),
        "overloaded": member.overloaded,
        "overload_reason": member.labels.get(OVERLOAD).filter(|_| member.overloaded),
        "incarnation": member.incarnation,
        "boot": member.boot,
        "capabilities": capabilities,
        "labels": labels,
        "region": member.region,
        "version": member.version,
        "timestamp": member.timestamp_us,
        "cause": cause,
    })
}

fn state_name(state: MemberState) -> &'static str {
    match state {
        // A state that is newer than this program: the member is there, and more we cannot say.
        MemberState::Alive | MemberState::Unspecified => "alive",
        MemberState::Suspect => "suspect",
        MemberState::Dead => "dead",
        MemberState::Left => "left",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: &str, boot: u64, state: MemberState, load: f64) -> Member {
        let (swarm, index) = id.split_once('/').unwrap();
        Member {
            node_id: id.to_owned(),
            swarm_id: swarm.to_owned(),
            node_index: index.parse().ok(),
            state: state.into(),
            load_score: Some(load),
            boot,
            incarnation: 1,
            ..Member::default()
        }
    }

    /// Whether it is complete, its term, and the members with their states.
    type Said = (bool, u64, Vec<(String, String)>);

    fn told(records: &[Value]) -> Vec<Said> {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        records
            .iter()
            .map(|record| {
                let members = record["members"].as_array().unwrap();
                let members = members.iter().map(|member| (text(&member["node_id"]), text(&member["state"]))).collect();
                (record["complete"].as_bool().unwrap(), record["term"].as_u64().unwrap(), members)
            })
            .collect()
    }

    fn pairs(all: &[(&str, &str)]) -> Vec<(String, String)> {
        all.iter().map(|(id, state)| ((*id).to_owned(), (*state).to_owned())).collect()
    }

    #[test]
    fn only_who_leads_speaks_and_then_says_everything_once() {
        use MemberState::{Alive, Dead, Suspect};
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut reporter = Reporter::new();
        reporter.snapshot(at(0), vec![member("s/0", 1, Alive, 0.1), member("s/1", 1, Alive, 0.1)]);
        reporter.changed(at(0), member("s/1", 1, Suspect, 0.1));
        assert_eq!((reporter.due(), reporter.take(at(10_000))), (None, Vec::new()), "another leads");

        reporter.standing(at(1_000), Standing::Leads { epoch: 1, term: 7 });
        assert_eq!(reporter.due(), Some(at(1_000)));
        let all = pairs(&[("s/0", "alive"), ("s/1", "suspect")]);
        assert_eq!(told(&reporter.take(at(1_000))), [(true, 7, all)]);
        assert!(reporter.take(at(1_001)).is_empty());

        // Two changes of one moment are one record; a load that hardly moved is none.
        reporter.changed(at(2_000), member("s/1", 1, Dead, 0.1));
        reporter.changed(at(2_100), member("s/2", 5, Alive, 0.0));
        reporter.changed(at(2_100), member("s/0", 1, Alive, 0.12));
        assert!(reporter.take(at(2_199)).is_empty());
        let changed = pairs(&[("s/1", "dead"), ("s/2", "alive")]);
        assert_eq!(told(&reporter.take(at(2_200))), [(false, 7, changed)]);
        reporter.changed(at(3_000), member("s/0", 1, Alive, 0.5));
        assert_eq!(reporter.due(), Some(at(8_000)), "a load can wait");
        assert_eq!(told(&reporter.take(at(8_000))), [(false, 7, pairs(&[("s/0", "alive")]))]);

        // Once in a while everything again: soon after changes, seldom without.
        reporter.removed("s/1");
        assert_eq!(reporter.due(), Some(at(31_000)));
        let all = pairs(&[("s/0", "alive"), ("s/2", "alive")]);
        assert_eq!(told(&reporter.take(at(31_000))), [(true, 7, all.clone())]);
        assert_eq!(reporter.due(), Some(at(331_000)));

        // A new term says everything again, an old one nothing more.
        reporter.standing(at(40_000), Standing::Leads { epoch: 1, term: 8 });
        assert_eq!(told(&reporter.take(at(40_000))), [(true, 8, all)]);
        reporter.lost();
        reporter.standing(at(41_000), Standing::Leads { epoch: 1, term: 9 });
        assert_eq!(reporter.due(), None, "what is known may be old");
        reporter.standing(at(42_000), Standing::Silent);
        reporter.snapshot(at(42_000), vec![member("s/0", 2, Alive, 0.1)]);
        assert_eq!(reporter.due(), None);
    }

    #[test]
    fn a_stopgap_never_claims_to_know_everybody() {
        let now = Instant::now();
        let mut reporter = Reporter::new();
        reporter.standing(now, Standing::Stopgap);
        assert_eq!(reporter.due(), None, "nothing is known yet");
        reporter.snapshot(now, vec![member("s/0", 1, MemberState::Alive, 0.1)]);
        assert_eq!(told(&reporter.take(now)), [(false, 0, pairs(&[("s/0", "alive")]))]);
        reporter.removed("s/0");
        assert_eq!(told(&reporter.take(now + COMPLETE)), [(false, 0, Vec::new())]);
    }

    #[test]
    fn a_member_says_what_people_read_and_keeps_the_rest_to_itself() {
        let mut member = member("s/1", 3, MemberState::Left, 0.81249);
        member.overloaded = true;
        member.labels = [("drover.ring", "1:x"), (OVERLOAD, "the processors are busy"), ("host", "n1")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into();
        let word = word(&member);
        assert_eq!(word["labels"], json!({ "host": "n1" }));
        assert_eq!(word["overload_reason"], "the processors are busy");
        assert_eq!((&word["load_score"], &word["cause"]), (&json!(0.812), &json!("left")));
        member.swarm_id.clear();
        let word = super::word(&member);
        assert_eq!((&word["swarm_id"], &word["node_index"]), (&Value::Null, &Value::Null));
    }
}
