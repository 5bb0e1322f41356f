//! One engine by hand: what the mission's flow charts say of trying again, of other nodes and of staying, and when the load moves a session.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use drover_types::{AgentKind, Epoch, SessionId};

use super::*;
use crate::session::{Opening, Record};

/// One node with sessions, whose file systems answer at once and whose peers are silent unless a test speaks for them.
struct Desk {
    engine: Engine,
    now: Duration,
    len: BTreeMap<SessionId, u64>,
    sent: Vec<(NodeId, Message)>,
    events: Vec<Event>,
    suspects: Vec<NodeId>,
    replies: Vec<Reply>,
    runs: Vec<(SessionId, Turn)>,
    ends: Vec<(SessionId, Turn)>,
    faults: Vec<(Turn, crate::session::TurnFault)>,
    /// Offset and length of all pieces that went out.
    chunks: Vec<(u64, u64)>,
    looks: usize,
}

fn node(number: u32) -> NodeId {
    NodeId::new(&format!("swarm/{number}"))
}

fn session(number: usize) -> SessionId {
    format!("s{number}").parse().unwrap()
}

fn echo() -> BTreeSet<String> {
    BTreeSet::from(["echo".to_owned()])
}

impl Desk {
    fn new(peers: u32, sessions: usize, settings: Settings) -> Self {
        let me = Owner { node: node(0), boot: 1 };
        let engine = Engine::new(Duration::ZERO, me, settings, 7);
        let mut desk = Self {
            engine,
            now: Duration::ZERO,
            len: BTreeMap::new(),
            sent: Vec::new(),
            events: Vec::new(),
            suspects: Vec::new(),
            replies: Vec::new(),
            runs: Vec::new(),
            ends: Vec::new(),
            faults: Vec::new(),
            chunks: Vec::new(),
            looks: 0,
        };
        desk.load(0.1);
        let peers = (1..=peers).map(|number| Peer {
            node: node(number),
            state: PeerState::Alive,
            load: 0.1,
            overloaded: false,
            capabilities: echo(),
        });
        desk.feed(Input::Peers(peers.collect()));
        for number in 0..sessions {
            desk.ask(number, "first");
            desk.answer(number, 0);
        }
        desk
    }

    fn load(&mut self, load: f64) {
        self.feed(Input::Own(Own { load, leaving: false, capabilities: echo() }));
    }

    fn ask(&mut self, number: usize, request: &str) {
        let metadata = BTreeMap::new();
        let open = Opening { agent: AgentKind::Echo, replayable: false, capabilities: echo(), metadata, at_us: 0 };
        let asked = Asked {
            session: session(number),
            request: request.parse().unwrap(),
            prompt: "hello".into(),
            reply: ReplyTo(1),
            known: Epoch(0),
            open: Some(open),
            at_us: 0,
        };
        self.feed(Input::Turn(Box::new(asked)));
    }

    fn answer(&mut self, number: usize, turn: u32) {
        let outcome = crate::session::Outcome::Answer("hello".into());
        let (session, turn) = (session(number), Turn(turn));
        self.feed(Input::Ended { session, epoch: Epoch(1), turn, outcome, notes: Vec::new(), at_us: 0 });
    }

    fn feed(&mut self, input: Input) {
        let mut inputs = vec![input];
        while let Some(input) = inputs.pop() {
            let mut effects = Vec::new();
            self.engine.handle(self.now, input, &mut effects);
            for effect in effects {
                match effect {
                    Effect::Look { session } => {
                        self.looks += 1;
                        inputs.push(Input::Looked { session, outcome: Looked::Nobody });
                    }
                    Effect::Claim { record } => {
                        let (session, epoch) = (record.session, record.epoch);
                        inputs.push(Input::Claimed { session, epoch, outcome: ClaimOutcome::Won });
                    }
                    Effect::Append { session, epoch, first, records } => {
                        let len = self.len.entry(session.clone()).or_default();
                        *len += 100 * records.len() as u64;
                        self.faults.extend(records.iter().filter_map(|record| match record {
                            Record::Ended { turn, outcome: crate::session::Outcome::Failed { fault, .. }, .. } => {
                                Some((*turn, *fault))
                            }
                            _ => None,
                        }));
                        let outcome = Appended::Done { len: *len, digest: Digest::default() };
                        inputs.push(Input::Appended { session, epoch, first, outcome });
                    }
                    Effect::Park { session, epoch, handoff } => inputs.push(Input::Parked { session, epoch, handoff }),
                    Effect::Send { to, message } => self.sent.push((to, message)),
                    Effect::Event(event) => self.events.push(event),
                    Effect::Suspect { node } => self.suspects.push(node),
                    Effect::Reply { reply, .. } => self.replies.push(reply),
                    Effect::Run { session, turn, .. } => self.runs.push((session, turn)),
                    Effect::Interrupt { session, turn, .. } => self.ends.push((session, turn)),
                    Effect::SendChunk { offset, len, .. } => self.chunks.push((offset, len)),
                    _ => {}
                }
            }
        }
    }

    /// Lets time pass until nothing is on its way or that long is over.
    fn wait(&mut self, span: Duration) {
        let end = self.now + span;
        while self.engine.deadline() <= end && (self.engine.moving().0 > 0 || self.events.is_empty()) {
            self.now = self.engine.deadline().max(self.now);
            self.feed(Input::Tick);
        }
        self.now = self.now.max(end);
    }

    fn go(&mut self, to: Option<NodeId>) {
        self.events.clear();
        self.feed(Input::Move { session: session(0), to, why: Why::Operator });
    }

    /// Requests by node, each attempt once.
    fn requests(&self) -> Vec<NodeId> {
        let mut seen = BTreeSet::new();
        let requests = self.sent.iter().filter(|(_, message)| matches!(message, Message::Request { .. }));
        requests.filter(|(_, message)| seen.insert(message.handoff())).map(|(to, _)| to.clone()).collect()
    }

    fn reject(&mut self, why: Rejection) {
        let (from, handoff) = self.sent.last().map(|(to, message)| (to.clone(), message.handoff())).unwrap();
        self.feed(Input::Message { from, message: Message::Reject { handoff, why } });
    }
}

#[test]
fn a_silent_node_is_tried_again_then_suspected_then_another_is_tried_and_then_the_session_stays() {
    let settings = Settings { max_retries: 2, max_targets: 2, ..Settings::default() };
    let mut desk = Desk::new(3, 1, settings);
    desk.go(None);
    desk.wait(Duration::from_mins(10));
    let requests = desk.requests();
    assert_eq!(requests.len(), 2 * 3, "each of two nodes once and twice again: {requests:?}");
    assert!(requests[..3].iter().all(|to| *to == requests[0]) && requests[3..].iter().all(|to| *to == requests[3]));
    assert_ne!(requests[0], requests[3]);
    assert_eq!(desk.suspects, [requests[0].clone(), requests[3].clone()]);
    let [Event::Started { .. }, Event::Failed { error: Failure::Silent, attempts: 6, .. }] = &desk.events[..] else {
        panic!("{:?}", desk.events)
    };
    desk.ask(0, "second");
    assert_eq!(desk.runs.last(), Some(&(session(0), Turn(1))), "it goes on here");
}

#[test]
fn the_pause_between_attempts_is_the_one_that_is_set() {
    let settings = Settings { max_retries: 1, retry_delay: Duration::from_secs(7), ..Settings::default() };
    let (silence, pause) = (settings.rpc_timeout, settings.retry_delay);
    let mut desk = Desk::new(1, 1, settings);
    let start = desk.now;
    desk.go(Some(node(1)));
    desk.wait((silence + pause).saturating_sub(Duration::from_millis(1)));
    assert_eq!(desk.requests().len(), 1);
    desk.now = start + silence + pause;
    desk.feed(Input::Tick);
    assert_eq!(desk.requests().len(), 2);
}

#[test]
fn who_says_no_is_not_asked_again_and_nobody_is_suspected() {
    let mut desk = Desk::new(2, 1, Settings::default());
    desk.go(None);
    desk.reject(Rejection::Overloaded);
    assert_eq!(desk.requests().len(), 2, "the next one at once");
    desk.reject(Rejection::Full);
    let requests = desk.requests();
    assert_ne!(requests[0], requests[1]);
    let last = desk.events.last();
    let failed =
        matches!(last, Some(Event::Failed { error: Failure::NobodyTook(Some(Rejection::Full)), attempts: 2, .. }));
    assert!(failed, "{last:?}");
    assert!(desk.suspects.is_empty());
}

#[test]
fn a_node_that_was_named_is_the_only_one_that_is_asked() {
    let mut desk = Desk::new(3, 1, Settings::default());
    desk.go(Some(node(2)));
    desk.reject(Rejection::Overloaded);
    assert_eq!(desk.requests(), [node(2)]);
    assert!(matches!(desk.events.last(), Some(Event::Failed { .. })));
    desk.go(Some(node(0)));
    assert!(matches!(desk.events[..], [Event::NotMoved { error: Failure::NoTarget, .. }]), "it is there");
}

#[test]
fn a_target_that_turns_doubtful_before_the_offer_costs_nothing() {
    let mut desk = Desk::new(2, 1, Settings::default());
    desk.go(None);
    let first = desk.requests()[0].clone();
    let state = |number: u32| if node(number) == first { PeerState::Suspect } else { PeerState::Alive };
    let peers = (1..=2).map(|number| Peer {
        node: node(number),
        state: state(number),
        load: 0.1,
        overloaded: false,
        capabilities: echo(),
    });
    desk.feed(Input::Peers(peers.collect()));
    let requests = desk.requests();
    assert!(requests.len() == 2 && requests[1] != first, "{requests:?}");
    assert!(desk.suspects.is_empty(), "the membership knows");
}

#[test]
fn load_moves_sessions_that_have_stayed_for_a_while_and_only_some_at_a_time() {
    let settings = Settings { max_moves: 2, ..Settings::default() };
    let (residence, interval) = (settings.residence, settings.rebalance_interval);
    let mut desk = Desk::new(3, 5, settings);
    desk.events.clear();
    desk.load(0.9);
    let tick = |desk: &mut Desk, until: Duration| {
        while desk.engine.deadline() <= until {
            desk.now = desk.engine.deadline().max(desk.now);
            desk.feed(Input::Tick);
        }
    };
    tick(&mut desk, residence.saturating_sub(interval));
    assert_eq!(desk.engine.moving().0, 0, "they have just come");
    tick(&mut desk, residence + 5 * interval);
    assert_eq!(desk.engine.moving().0, 2, "not all at once");
    let why: Vec<bool> =
        desk.events.iter().map(|event| matches!(event, Event::Started { why: Why::Load, .. })).collect();
    assert_eq!(why, [true, true]);

    let mut off = Desk::new(3, 1, Settings { enabled: false, ..Settings::default() });
    off.load(1.0);
    tick(&mut off, Duration::from_mins(5));
    assert_eq!(off.engine.moving().0, 0, "switched off");
    off.go(None);
    assert_eq!(off.engine.moving().0, 1, "what a person asks for is done");
}

#[test]
fn an_overloaded_node_takes_no_session_and_lets_go_of_one_that_is_coming() {
    let mut desk = Desk::new(1, 0, Settings::default());
    let request = |number: u64, attempt| Message::Request {
        handoff: HandoffId(number),
        session: session(9),
        epoch: Epoch(4),
        attempt,
        len: 10,
        needs: Needs { capabilities: echo() },
        fresh: false,
    };
    desk.feed(Input::Message { from: node(1), message: request(1, 1) });
    assert_eq!(desk.engine.moving().1, 1);
    desk.load(0.95);
    assert_eq!(desk.engine.moving().1, 0);
    let said = |handoff| Message::Reject { handoff, why: Rejection::Overloaded };
    assert_eq!(desk.sent.last(), Some(&(node(1), said(HandoffId(1)))));
    // Asked again, the same answer; a new one too.
    for number in [1, 2] {
        desk.feed(Input::Message { from: node(1), message: request(number, 1) });
        assert_eq!(desk.sent.last(), Some(&(node(1), said(HandoffId(number)))));
    }
}

#[test]
fn a_late_request_of_an_earlier_attempt_changes_nothing() {
    let mut desk = Desk::new(1, 0, Settings::default());
    let request = |number: u64, attempt| Message::Request {
        handoff: HandoffId(number),
        session: session(9),
        epoch: Epoch(4),
        attempt,
        len: 10,
        needs: Needs::default(),
        fresh: false,
    };
    let mut come = |message| {
        desk.feed(Input::Message { from: node(1), message });
        desk.sent.last().cloned()
    };
    come(request(2, 2));
    let late = come(request(1, 1));
    let (handoff, why) = (HandoffId(1), Rejection::Duplicate);
    assert_eq!(late, Some((node(1), Message::Reject { handoff, why })));
    // The next one takes the place of the one before.
    come(request(3, 3));
    desk.feed(Input::Reserved { handoff: HandoffId(2), outcome: Reserved::Room(0) });
    assert!(!desk.sent.iter().any(|(_, message)| matches!(message, Message::Accept { .. })));
    desk.feed(Input::Reserved { handoff: HandoffId(3), outcome: Reserved::Room(0) });
    let accepted = Message::Accept { handoff: HandoffId(3), have: 0, taken: Some(0) };
    assert_eq!(desk.sent.last(), Some(&(node(1), accepted)));
}

#[test]
fn an_owner_says_whom_it_follows_and_that_is_the_last_one_who_wrote() {
    let mut engine = Engine::new(Duration::ZERO, Owner { node: node(0), boot: 2 }, Settings::default(), 7);
    let mut feed = |input| {
        let mut effects = Vec::new();
        engine.handle(Duration::ZERO, input, &mut effects);
        effects
    };
    let epoch = |epoch, follows: Option<u64>| Record::Epoch {
        epoch: Epoch(epoch),
        owner: Owner { node: node(0), boot: 1 },
        follows: follows.map(Epoch),
    };
    let metadata = BTreeMap::new();
    let opening = Opening { agent: AgentKind::Echo, replayable: false, capabilities: echo(), metadata, at_us: 0 };
    let mut log = crate::session::LogSum::default();
    for record in [epoch(1, None), Record::Opened { opening }, epoch(2, Some(1))] {
        log.outline.apply(&record).unwrap();
    }
    let forked = log.outline.clone().apply(&epoch(4, Some(1)));
    assert!(matches!(forked, Err(OutlineError::Epoch { .. })), "two owners cannot both follow one in one log");

    // The owner of 3 was this node's earlier process, which ended before it wrote a word.
    feed(Input::Recover { session: session(0) });
    let record = OwnerRecord {
        session: session(0),
        epoch: Epoch(3),
        owner: Owner { node: node(0), boot: 1 },
        cause: Cause::Recovered,
    };
    let claims = feed(Input::Looked { session: session(0), outcome: Looked::Owned(record) });
    assert!(matches!(&claims[..], [Effect::Claim { record }] if record.epoch == Epoch(4)), "{claims:?}");
    feed(Input::Claimed { session: session(0), epoch: Epoch(4), outcome: ClaimOutcome::Won });
    let appends = feed(Input::Loaded { session: session(0), epoch: Epoch(4), log: Some(Box::new(log)) });
    let [Effect::Append { first: 4, records, .. }] = &appends[..] else { panic!("{appends:?}") };
    assert!(matches!(records[0], Record::Epoch { epoch: Epoch(4), follows: Some(Epoch(2)), .. }), "{records:?}");
}

#[test]
fn an_owner_that_reads_of_a_later_one_lets_go() {
    let mut desk = Desk::new(1, 0, Settings::default());
    let mut feed = |input| {
        let mut effects = Vec::new();
        desk.engine.handle(Duration::ZERO, input, &mut effects);
        effects
    };
    let owned = |epoch, number| {
        let owner = Owner { node: node(number), boot: 1 };
        let record = OwnerRecord { session: session(0), epoch: Epoch(epoch), owner, cause: Cause::Recovered };
        Input::Looked { session: session(0), outcome: Looked::Owned(record) }
    };
    feed(Input::Recover { session: session(0) });
    feed(owned(3, 0));
    feed(Input::Claimed { session: session(0), epoch: Epoch(4), outcome: ClaimOutcome::Won });
    // Stopped for a while; meanwhile the owner of 5 came, went on and made a checkpoint.
    let metadata = BTreeMap::new();
    let opening = Opening { agent: AgentKind::Echo, replayable: false, capabilities: echo(), metadata, at_us: 0 };
    let epoch = Record::Epoch { epoch: Epoch(5), owner: Owner { node: node(1), boot: 1 }, follows: None };
    let mut log = crate::session::LogSum::default();
    for record in [epoch, Record::Opened { opening }] {
        log.outline.apply(&record).unwrap();
    }
    let effects = feed(Input::Loaded { session: session(0), epoch: Epoch(4), log: Some(Box::new(log)) });
    assert!(matches!(effects[..], [Effect::Stop { epoch: Epoch(4), .. }, Effect::Look { .. }]), "{effects:?}");
    assert_eq!(feed(owned(5, 1)), []);
    assert_eq!(
        desk.engine.session(&session(0)).map(|view| (view.state, view.epoch)),
        Some((State::Migrated, Epoch(5)))
    );
}

#[test]
fn an_owner_whose_move_is_in_vain_looks_whether_it_still_is_one() {
    let mut desk = Desk::new(1, 1, Settings::default());
    // The second turn never ends: its tool no longer answers an owner of this epoch.
    desk.ask(0, "second");
    let before = desk.looks;
    desk.go(Some(node(1)));
    desk.wait(Duration::from_mins(10));
    assert!(matches!(desk.events.last(), Some(Event::Failed { .. })), "{:?}", desk.events);
    assert_eq!(desk.looks, before + 1);
    let owned = |epoch| {
        let owner = Owner { node: node(1), boot: 1 };
        let record = OwnerRecord { session: session(0), epoch: Epoch(epoch), owner, cause: Cause::TakenOver };
        Input::Looked { session: session(0), outcome: Looked::Owned(record) }
    };
    let state = |desk: &Desk| desk.engine.session(&session(0)).map(|view| view.state);
    desk.feed(owned(1));
    assert_eq!(state(&desk), Some(State::Active), "a look of long ago says nothing");
    desk.feed(owned(2));
    assert_eq!(state(&desk), Some(State::Migrated));
}

/// A session of some thousand bytes on its way to a target that has said yes; pieces of 100 bytes, four at a time.
fn copying() -> Desk {
    let timeout = Duration::from_mins(5);
    let settings = Settings { chunk: 100, window: 400, freeze_lag: 0, timeout, ..Settings::default() };
    let mut desk = Desk::new(1, 1, settings);
    for turn in 1.. {
        desk.ask(0, &format!("r{turn}"));
        desk.answer(0, turn);
        if desk.len[&session(0)] >= 4000 {
            break;
        }
    }
    desk.go(Some(node(1)));
    let handoff = desk.sent.last().unwrap().1.handoff();
    desk.feed(Input::Message { from: node(1), message: Message::Accept { handoff, have: 0, taken: Some(0) } });
    desk
}

impl Desk {
    fn handoff(&self) -> HandoffId {
        self.sent.last().unwrap().1.handoff()
    }

    fn chunk_bytes(&self) -> u64 {
        self.chunks.iter().map(|(_, len)| len).sum()
    }

    /// Lets time pass; whenever the source asks, the target says how far it is. `step` is what happens at the target each tenth of a second, and
    /// gives what it has on disk and what it has taken. Ends when all is over there.
    fn copy_for(&mut self, span: Duration, mut step: impl FnMut(Duration, &Self) -> (u64, Option<u64>)) {
        let (end, mut have) = (self.now + span, 0);
        while self.now < end && !matches!(self.sent.last(), Some((_, Message::Offer { .. }))) {
            self.now += Duration::from_millis(100);
            let before = self.sent.len();
            if self.engine.deadline() <= self.now {
                self.feed(Input::Tick);
            }
            let (len, taken) = step(self.now, self);
            let handoff = self.handoff();
            let asked = self.sent[before..].iter().any(|(_, message)| matches!(message, Message::Request { .. }));
            if len > have {
                have = len;
                let message = Message::Received { handoff, len, again: false };
                self.feed(Input::Message { from: node(1), message });
            } else if asked {
                let message = Message::Accept { handoff, have, taken };
                self.feed(Input::Message { from: node(1), message });
            }
        }
    }
}

#[test]
fn to_a_target_whose_disk_is_slow_nothing_is_sent_twice() {
    let mut desk = copying();
    let (begun, span) = (desk.now, Duration::from_secs(29));
    // A piece in three seconds; everything that is sent is taken at once, and waits.
    desk.copy_for(span, |now, desk| {
        let written = 100 * (now.saturating_sub(begun).as_secs() / 3);
        (written, Some(desk.chunk_bytes()))
    });
    assert_eq!(desk.chunk_bytes(), 900 + 400, "what is on disk and one window: {:?}", desk.chunks);
    assert!(desk.chunks.iter().enumerate().all(|(n, (offset, _))| *offset == 100 * n as u64), "{:?}", desk.chunks);
    let asked = desk.sent.iter().filter(|(_, message)| matches!(message, Message::Request { .. })).count();
    assert!(asked > 10, "it asks how far the target is, so that the place there is kept: {asked}");
}

#[test]
fn what_never_came_is_sent_again_ever_more_slowly_and_only_that() {
    let mut desk = copying();
    // Half of the window is lost, each time.
    desk.copy_for(Duration::from_secs(25), |_, _| (0, Some(200)));
    assert_eq!(desk.chunks[..4], [(0, 100), (100, 100), (200, 100), (300, 100)]);
    let again = &desk.chunks[4..];
    assert!(again.iter().all(|(offset, _)| *offset >= 200), "{again:?}");
    assert!((2 * 3..=2 * 5).contains(&again.len()), "after 1, 2, 4, 8 s: {again:?}");
    // In the end it gets through.
    let from = desk.chunks.len();
    let (mut have, mut seen) = (200, from);
    desk.copy_for(Duration::from_mins(1), |_, desk| {
        for (offset, len) in &desk.chunks[seen..] {
            if *offset <= have {
                have = have.max(offset + len);
            }
        }
        seen = desk.chunks.len();
        (have, Some(have))
    });
    assert_eq!(have, desk.len[&session(0)]);
    assert!(matches!(desk.sent.last(), Some((_, Message::Offer { .. }))), "{:?}", desk.sent.last());
}

#[test]
fn a_target_of_an_earlier_version_is_not_buried_under_repetitions() {
    let mut desk = copying();
    desk.copy_for(Duration::from_secs(25), |_, _| (0, None));
    let windows = desk.chunks.len() / 4;
    assert!((3..=8).contains(&windows), "{windows} in 25 s");
}

#[test]
fn a_target_that_lost_what_it_had_gets_it_again() {
    let mut desk = copying();
    desk.copy_for(Duration::from_secs(1), |_, _| (400, Some(400)));
    assert_eq!(desk.chunk_bytes(), 800);
    // It was started anew, and kept nothing.
    let (mut have, mut seen) = (0, desk.chunks.len());
    let handoff = desk.handoff();
    desk.copy_for(Duration::from_secs(10), |_, desk| {
        for (offset, len) in &desk.chunks[seen..] {
            if *offset <= have {
                have = have.max(offset + len);
            }
        }
        seen = desk.chunks.len();
        (have, Some(have))
    });
    assert_eq!((have, desk.handoff()), (desk.len[&session(0)], handoff), "in the same attempt");
}

fn interrupt(desk: &mut Desk, request: Option<&str>) -> Reply {
    let request = request.map(|name| name.parse().unwrap());
    desk.feed(Input::Interrupt { session: session(0), request, reply: ReplyTo(2) });
    desk.replies.last().cloned().unwrap()
}

#[test]
fn a_turn_that_is_to_end_early_is_answered_once_and_the_next_goes_on() {
    use crate::session::TurnFault;
    let mut desk = Desk::new(1, 1, Settings::default());
    let interrupted = |turn, request: &str| Reply::Interrupted { turn: Turn(turn), request: request.parse().unwrap() };
    assert_eq!(interrupt(&mut desk, None), Reply::Refused(Failure::UnknownTurn), "none runs");
    assert!(matches!(interrupt(&mut desk, Some("first")), Reply::Answer { turn: Turn(0), .. }));
    for request in ["second", "third", "fourth"] {
        desk.ask(0, request);
    }
    assert_eq!(interrupt(&mut desk, Some("unheard")), Reply::Refused(Failure::UnknownTurn));
    // One that waits ends when it comes up; the agent is only told of the one that it runs.
    assert_eq!(interrupt(&mut desk, Some("third")), interrupted(2, "third"));
    assert_eq!(desk.ends, []);
    for _ in 0..2 {
        assert_eq!(interrupt(&mut desk, None), interrupted(1, "second"));
    }
    assert_eq!(desk.ends, [(session(0), Turn(1)), (session(0), Turn(1))]);
    let outcome = crate::session::Outcome::Failed { fault: TurnFault::Interrupted, message: String::new() };
    let ended = || Input::Ended {
        session: session(0),
        epoch: Epoch(1),
        turn: Turn(1),
        outcome: outcome.clone(),
        notes: Vec::new(),
        at_us: 0,
    };
    desk.feed(ended());
    desk.feed(ended());
    assert_eq!(desk.faults, [(Turn(1), TurnFault::Interrupted), (Turn(2), TurnFault::Interrupted)]);
    assert_eq!(desk.runs.iter().map(|(_, turn)| turn.0).collect::<Vec<_>>(), [0, 1, 3], "the third never begins");
    for request in ["second", "third"] {
        assert!(matches!(interrupt(&mut desk, Some(request)), Reply::Answer { .. }));
    }
    desk.answer(0, 3);
    assert_eq!(desk.faults.len(), 2);
}

#[test]
fn a_turn_of_a_session_that_leaves_is_ended_where_it_is_or_where_it_goes() {
    let mut desk = Desk::new(1, 1, Settings::default());
    desk.ask(0, "second");
    desk.go(Some(node(1)));
    let handoff = desk.handoff();
    let from = node(1);
    let len = desk.len[&session(0)];
    desk.feed(Input::Message { from: from.clone(), message: Message::Accept { handoff, have: len, taken: Some(len) } });
    assert!(matches!(interrupt(&mut desk, None), Reply::Interrupted { .. }), "it waits for this turn to end");
    desk.answer(0, 1);
    let len = desk.len[&session(0)];
    desk.feed(Input::Message { from: from.clone(), message: Message::Received { handoff, len, again: false } });
    assert!(matches!(desk.sent.last(), Some((_, Message::Offer { .. }))));
    // From here on the turn is none of this node's.
    desk.ask(0, "third");
    assert_eq!(interrupt(&mut desk, Some("third")), Reply::Retry);
    desk.feed(Input::Message { from, message: Message::Committed { handoff, epoch: Epoch(2) } });
    assert!(matches!(interrupt(&mut desk, Some("third")), Reply::Redirect(record) if record.owner.node == node(1)));
}
