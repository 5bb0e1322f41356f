//! Why something is where it is, in sentences for people, and what to do about it.

use drover_proto::router as pb;
use drover_types::{ErrorCode, Failure, InjectionId, InjectionState, NodeState, SwarmStatus};

use super::effects::Micros;
use super::input::PriorInjection;
use super::members::MemberState;
use super::model::{ApprovalStatus, EndStage, Injection, Link, Node, Side, Swarm, SwarmKey};
use super::{Core, SECOND};

/// What is known and what to do.
#[derive(Default)]
struct Words {
    because: Vec<String>,
    next: Vec<String>,
}

impl Words {
    fn say(&mut self, sentence: impl Into<String>) {
        self.because.push(sentence.into());
    }

    fn advise(&mut self, sentence: impl Into<String>) {
        let sentence = sentence.into();
        if !self.next.contains(&sentence) {
            self.next.push(sentence);
        }
    }
}

impl Core {
    /// The explanation of a swarm, a node or an open injection.
    pub(crate) fn explanation(&self, subject: &str, now: Micros) -> Result<pb::ExplainResponse, Failure> {
        let subject = subject.trim();
        if let Some((swarm, index)) = subject.rsplit_once('/') {
            return self.explain_node(swarm, index, now);
        }
        match self.find(subject) {
            Ok(key) => {
                self.swarms.get(&key).map(|swarm| self.explain_swarm(swarm, now)).ok_or_else(super::inject::gone)
            }
            Err(failure) if failure.code != ErrorCode::UnknownSwarm => Err(failure),
            Err(_) => self.explain_injection(subject, now),
        }
    }

    fn explain_swarm(&self, swarm: &Swarm, now: Micros) -> pb::ExplainResponse {
        let facts = &swarm.facts;
        let mut words = Words::default();
        match facts.status {
            SwarmStatus::Launching => launching_words(swarm, now, &mut words),
            SwarmStatus::Running => words.say(format!("All {} nodes are up.", swarm.nodes.len())),
            SwarmStatus::Degraded => {
                words.say(format!("{}.", sentence(&facts.reason)));
                for node in swarm.nodes.iter().filter(|node| !node.is_up()).take(5) {
                    let reason = node.reason();
                    if !reason.is_empty() {
                        words.say(format!("Node {}: {reason}.", node.index));
                    }
                }
                words.advise(format!("`drover why {}/INDEX` tells more of one node", swarm.head.id));
            }
            SwarmStatus::Terminating => terminating_words(swarm, now, &mut words),
            SwarmStatus::Terminated => words.say(format!("It ended: {}.", facts.reason)),
            SwarmStatus::Failed => {
                words.say(format!("It never came up: {}.", facts.reason));
                if let Some(trouble) = facts.trouble.as_ref().filter(|trouble| !trouble.hint.is_empty()) {
                    words.advise(sentence(&trouble.hint));
                }
            }
        }
        let open = swarm.open_turns();
        if open > 0 && !swarm.is_over() {
            let undelivered: usize = swarm.nodes.iter().map(|node| node.queue.len()).sum();
            words.say(format!(
                "Not ended: {}; not delivered: {}.",
                counted(open, "prompt"),
                counted(undelivered, "record")
            ));
        }
        let unwell = swarm.nodes.iter().filter(|node| {
            node.member.as_ref().is_some_and(|member| member.state != MemberState::Alive || member.overloaded)
                || node.facts.notes.iter().any(|note| note.current)
        });
        for node in unwell.take(3).filter(|_| !swarm.is_over()) {
            let mut of_node = Words::default();
            member_words(node, now, &mut of_node);
            for sentence in of_node.because {
                words.say(format!("Node {}: {sentence}", node.index));
            }
            words.advise(format!("`drover why {}/{}` tells more of that node", swarm.head.id, node.index));
        }
        let waiting = self.waiting_in(swarm.head.key, None);
        if waiting > 0 {
            words.say(format!("{waiting} approvals wait for a person's word."));
            words.advise(format!("`drover approvals {}` shows them", swarm.head.id));
        }
        if !swarm.is_over() {
            self.link_words(&facts.side, now, &mut words);
        }
        answer("swarm", swarm.head.id.to_string(), facts.status.as_str(), words)
    }

    fn explain_node(&self, swarm: &str, index: &str, now: Micros) -> Result<pb::ExplainResponse, Failure> {
        let key = self.find(swarm)?;
        let swarm = self.swarms.get(&key).ok_or_else(super::inject::gone)?;
        let node = index.parse::<usize>().ok().and_then(|index| swarm.nodes.get(index)).ok_or_else(|| {
            Failure::new(ErrorCode::NodeOutOfRange, format!("node {index} is out of range")).hint(format!(
                "swarm {} has {} nodes, from 0 to {}",
                swarm.head.id,
                swarm.nodes.len(),
                swarm.nodes.len().saturating_sub(1)
            ))
        })?;
        let mut words = Words::default();
        if swarm.is_over() {
            words.say(format!("Its swarm is {}: {}.", swarm.facts.status, swarm.facts.reason));
        } else {
            self.node_words(swarm, node, now, &mut words);
            self.link_words(&swarm.facts.side, now, &mut words);
        }
        Ok(answer("node", format!("{}/{}", swarm.head.id, node.index), node.state().as_str(), words))
    }

    fn node_words(&self, swarm: &Swarm, node: &Node, now: Micros, words: &mut Words) {
        let facts = &node.facts;
        match node.state() {
            NodeState::Busy => {
                if let Some((id, injection)) =
                    node.running.as_ref().and_then(|id| Some((id, self.book.injections.get(id)?)))
                {
                    words.say(format!("It carries out prompt {id}, begun {}.", ago(now, injection.since)));
                }
            }
            NodeState::Idle => words.say("Its worker is ready for prompts."),
            NodeState::Pending => words.say("It waits for resources."),
            NodeState::Starting => {
                words.say(format!("Its worker (pid {}) runs; its agent is not ready yet.", facts.pid));
            }
            NodeState::Restarting => {
                words.say(format!(
                    "Its worker ended unasked and is started again{}; {} restarts so far.",
                    because(&facts.reason),
                    facts.restarts
                ));
            }
            NodeState::Exited => words.say(format!("Its worker ended in order{}.", because(node.reason()))),
            NodeState::Failed => {
                words.say(format!("It was given up{} after {} restarts.", because(node.reason()), facts.restarts));
                words.advise("launch a new swarm; the rest of this one goes on without it");
            }
        }
        if let Some(trouble) = &facts.trouble {
            words.say(format!("Its worker said: {}.", trouble.message));
            if !trouble.hint.is_empty() {
                words.advise(sentence(&trouble.hint));
            }
        }
        member_words(node, now, words);
        if !node.queue.is_empty() {
            words.say(format!("{} records wait for delivery to its inbox.", node.queue.len()));
            if !node.delivery.error.is_empty() {
                words.say(format!("The last delivery failed: {}. It is tried again.", node.delivery.error));
            }
        }
        let waiting = self.waiting_in(swarm.head.key, Some(node.index.0));
        if waiting > 0 {
            words.say(format!("{waiting} approvals of it wait for a person's word."));
            words.advise(format!("`drover approvals {}` shows them", swarm.head.id));
        }
    }

    fn explain_injection(&self, name: &str, now: Micros) -> Result<pb::ExplainResponse, Failure> {
        let unknown = || {
            Failure::new(ErrorCode::UnknownInjection, format!("nothing is called {name}"))
                .hint("name a swarm, a node as SWARM/INDEX, or an injection; `drover list` shows the swarms")
        };
        let exact = name.parse::<InjectionId>().map_err(|_| unknown())?;
        let injections = &self.book.injections;
        let mut found = injections.get_key_value(&exact);
        if found.is_none() {
            let mut matching = injections.iter().filter(|(id, _)| id.as_str().starts_with(name));
            found = matching.next();
            if matching.next().is_some() {
                return Err(
                    Failure::new(ErrorCode::InvalidRequest, format!("{name} is ambiguous")).hint("give more of the id")
                );
            }
        }
        let (id, injection) = found.ok_or_else(unknown)?;
        let swarm = self.swarms.get(&injection.swarm).ok_or_else(unknown)?;
        let node = swarm.nodes.get(injection.node.0 as usize).ok_or_else(unknown)?;
        let mut words = Words::default();
        self.injection_words(id, injection, swarm, node, now, &mut words);
        Ok(answer("injection", id.to_string(), injection.state.as_str(), words))
    }

    fn injection_words(
        &self,
        id: &InjectionId,
        injection: &Injection,
        swarm: &Swarm,
        node: &Node,
        now: Micros,
        words: &mut Words,
    ) {
        let place = format!("node {} of swarm {}", node.index, swarm.head.id);
        let ahead = node.open.range(..injection.inbox_seq).count();
        match injection.state {
            InjectionState::Accepted => {
                words.say(format!("It was accepted for {place} {} and is not delivered.", ago(now, injection.created)));
                if swarm.head.job.is_empty() {
                    words.say("The swarm has no allocation yet; prompts are delivered as soon as it has one.");
                    launching_words(swarm, now, words);
                } else if node.in_flight > 0 {
                    words.say("A delivery to that node is under way.");
                }
                if !node.delivery.error.is_empty() {
                    words.say(format!("The last delivery failed: {}. It is tried again.", node.delivery.error));
                }
            }
            InjectionState::Delivered => {
                words.say(format!(
                    "It reached the inbox of {place} {}; its turn has not begun.",
                    ago(now, injection.since)
                ));
                if ahead > 0 {
                    words.say(format!("Before it: {}.", counted(ahead, "prompt")));
                }
                if node.is_up() && ahead == 0 {
                    words.say("The worker has not picked it up yet.");
                    words.advise(format!(
                        "if that lasts, look at the worker's log, or `drover why {}/{}`",
                        swarm.head.id, node.index
                    ));
                } else if !node.is_up() {
                    words.say(format!("The node is {}{}.", node.state(), because(node.reason())));
                }
            }
            InjectionState::Started if node.running.as_ref() == Some(id) => {
                words.say(format!("Its turn runs on {place}, begun {}.", ago(now, injection.since)));
            }
            InjectionState::Started => {
                words.say(format!("Its turn began on {place}, whose worker has been replaced since."));
                words.say("The new worker reports what became of it when it is ready.");
            }
            InjectionState::Completed => words.say(format!("It ended well on {place}.")),
            InjectionState::Failed => words.say(format!("It failed on {place}: {}.", injection.error)),
        }
        let waits =
            self.book.approvals.values().filter(|approval| {
                approval.status != ApprovalStatus::Resolved && approval.injection.as_ref() == Some(id)
            });
        for approval in waits {
            words.say(format!("Its turn waits for approval {}, asked {}.", approval.id, ago(now, approval.created)));
            words.advise(format!("`drover approve {}`, with --decline to refuse", approval.id));
        }
        if !injection.state.is_over() {
            self.link_words(&swarm.facts.side, now, words);
        }
    }

    fn waiting_in(&self, key: SwarmKey, node: Option<u32>) -> usize {
        self.book
            .approvals
            .values()
            .filter(|approval| {
                approval.swarm == key
                    && approval.status == ApprovalStatus::Pending
                    && node.is_none_or(|node| node == approval.node)
            })
            .count()
    }

    fn link_words(&self, side: &Side, now: Micros, words: &mut Words) {
        let mut told = |what: &str, means: &str, link: &Link, advice: String| {
            if !link.is_up() {
                words.say(format!("The {what} stopped answering {}: {}. {means}", ago(now, link.since), link.error));
                words.advise(advice);
            }
        };
        let start =
            |what: &str| format!("start it with `drover up`, or `drover daemon {what}`; `drover doctor` checks it");
        told(
            "slurm-allocator",
            "What the backend does is not known until it is back; nothing is given up.",
            &self.book.allocator,
            start("slurm-allocator"),
        );
        let (what, advice) = match side.split_once('@') {
            // Before its allocation is known nothing is read of a swarm, on any side.
            None => ("outbox-follower", start("outbox-follower")),
            Some((_, cluster)) => {
                (&**side, format!("`drover doctor --cluster {cluster}` looks at the way there; it is tried again"))
            }
        };
        told(
            what,
            "Prompts wait here and the workers' words in their outboxes until it is back.",
            &self.book.followers.of(side),
            advice,
        );
    }
}

/// How the other nodes see it, and what its membership daemon complains about.
fn member_words(node: &Node, now: Micros, words: &mut Words) {
    if let Some(member) = &node.member {
        let load = match (member.load, member.overloaded) {
            (None, _) => String::new(),
            (Some(load), false) => format!("; its load is {load:.2}"),
            (Some(load), true) => format!("; its load is {load:.2}, which is too much{}", because(&member.reason)),
        };
        let seen = match member.state {
            MemberState::Alive => "The other nodes see it alive",
            MemberState::Suspect => "The other nodes do not hear it and suspect that it is gone",
            MemberState::Dead => "The other nodes have given it up",
            MemberState::Left => "It has taken leave of the other nodes",
        };
        words.say(format!("{seen}, since {}{load}.", ago(now, member.since)));
        if matches!(member.state, MemberState::Suspect | MemberState::Dead) {
            words.advise("`drover members` shows who sees whom; its worker may be well and only its network cut off");
        }
    }
    for note in node.facts.notes.iter().filter(|note| note.current) {
        words.say(format!("Its membership says: {}.", note.message.trim_end_matches('.')));
        if !note.hint.is_empty() {
            words.advise(note.hint.clone());
        }
    }
}

fn launching_words(swarm: &Swarm, now: Micros, words: &mut Words) {
    let facts = &swarm.facts;
    if facts.ensured_at == 0 {
        words.say(format!("The allocator has not confirmed the allocation, asked for {}.", ago(now, facts.created)));
        if !swarm.ensure.error.is_empty() {
            words.say(format!(
                "The last of {} tries failed: {}. It is tried again until it works.",
                swarm.ensure.attempts, swarm.ensure.error
            ));
        }
    } else if facts.running_since == 0 {
        words.say(format!(
            "Waiting for its allocation {} ({}), asked for {}{}.",
            swarm.head.job,
            facts.backend_state,
            ago(now, facts.created),
            because(&facts.reason)
        ));
    } else {
        let up = swarm.nodes.iter().filter(|node| node.is_up()).count();
        words.say(format!(
            "{up} of {} workers have reported; the allocation came up {}.",
            swarm.nodes.len(),
            ago(now, facts.running_since)
        ));
        for node in swarm.nodes.iter().filter(|node| !node.is_up()).take(5) {
            words.say(format!("Node {} is {}{}.", node.index, node.state(), because(node.reason())));
        }
        words.advise("the workers' standard error is kept below nodes/ of the state directory, or in the job's output");
    }
}

fn terminating_words(swarm: &Swarm, now: Micros, words: &mut Words) {
    let Some(ending) = &swarm.facts.ending else { return };
    words.say(format!("Its end was asked for {}.", ago(now, ending.since)));
    match ending.stage {
        EndStage::Waiting => {
            words.say(format!("It waits for {} to end.", counted(swarm.open_turns(), "prompt")));
            words.advise("`drover terminate` once more ends it at once");
        }
        EndStage::Releasing if swarm.facts.over_since != 0 => {
            words.say("Its allocation is over; the workers' last words are being read.");
        }
        EndStage::Releasing => {
            words.say(format!("Its allocation {} is being released.", swarm.head.job));
            if !swarm.release.error.is_empty() {
                words.say(format!("The allocator refused so far: {}.", swarm.release.error));
            }
        }
    }
}

/// An injection that ended and is only in the store.
pub(crate) fn describe_ended(swarm: &str, stored: &PriorInjection) -> pb::ExplainResponse {
    let mut words = Words::default();
    let place = format!("node {} of swarm {swarm}", stored.node);
    if stored.state == InjectionState::Completed {
        words.say(format!("It ended well on {place}; event {} is its last word.", stored.end_seq));
    } else {
        words.say(format!("It did not end well on {place}: {}.", stored.error));
    }
    words.advise(format!("`drover events --since {}` shows its events", stored.ack_seq.saturating_sub(1)));
    answer("injection", stored.id.to_string(), stored.state.as_str(), words)
}

fn answer(kind: &str, id: String, state: &str, words: Words) -> pb::ExplainResponse {
    pb::ExplainResponse { kind: kind.to_owned(), id, state: state.to_owned(), because: words.because, next: words.next }
}

fn because(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(" ({reason})") }
}

fn sentence(fragment: &str) -> String {
    let mut letters = fragment.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// A number with its noun.
fn counted(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

fn ago(now: Micros, then: Micros) -> String {
    if then == 0 {
        return "the router's start".to_owned();
    }
    let seconds = now.saturating_sub(then) / SECOND;
    match seconds {
        0 => "a moment ago".to_owned(),
        1..=119 => format!("{seconds} s ago"),
        120..=7199 => format!("{} min ago", seconds / 60),
        _ => format!("{} h ago", seconds / 3600),
    }
}
