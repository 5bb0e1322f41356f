//! Pictures of the core for readers, who never wait for it.

use drover_proto::router as pb;
use drover_types::NodeState;

use super::Core;
use super::members::MemberFacts;
use super::model::{Approval, ApprovalStatus, Side, Swarm, SwarmView};
use super::ring::NoteWord;

/// Longest part of a system prompt that a listing shows, in characters.
const MOST_PROMPT: usize = 200;

impl Swarm {
    /// The whole swarm.
    pub(crate) fn message(&self) -> pb::Swarm {
        let mut swarm = self.picture();
        swarm.system_prompt.clone_from(&self.spec.system_prompt);
        swarm
    }

    /// What readers see.
    pub(crate) fn view(&self) -> SwarmView {
        let mut swarm = self.picture();
        swarm.system_prompt = self.spec.system_prompt.chars().take(MOST_PROMPT).collect();
        SwarmView { swarm, prompt: self.request.content.clone(), side: Side::clone(&self.facts.side) }
    }

    fn picture(&self) -> pb::Swarm {
        let facts = &self.facts;
        pb::Swarm {
            swarm_id: self.head.id.to_string(),
            job_id: self.head.job.to_string(),
            node_count: self.nodes.len() as u32,
            system_prompt: String::new(),
            status: facts.status.as_str().to_owned(),
            reason: facts.reason.clone(),
            slurm_state: facts.backend_state.clone(),
            partition: self.spec.partition.clone(),
            time: self.spec.time.clone(),
            nodes: self.nodes.iter().map(|node| self.node(node)).collect(),
            provider: facts.provider.clone(),
            provider_id: facts.provider_id.clone(),
            agent: facts.agent.clone(),
            created_ms: facts.created / 1000,
            ended_ms: facts.ended / 1000,
            request_id: facts.request_id.clone(),
        }
    }

    fn node(&self, node: &super::model::Node) -> pb::Node {
        let state = match (self.is_over(), node.state()) {
            (true, state) if state != NodeState::Failed => NodeState::Exited,
            (_, state) => state,
        };
        pb::Node {
            node_id: node.index.0,
            host: node.facts.host.clone(),
            state: state.as_str().to_owned(),
            reason: node.reason().to_owned(),
            generation: node.facts.generation.max(node.facts.hello),
            outstanding: node.open.len() as u32,
            pid: node.facts.pid,
            running_injection: node.running.as_ref().map_or_else(String::new, ToString::to_string),
            membership: node.member.as_ref().map_or_else(String::new, |member| member.state.as_str().to_owned()),
            load_score: node.member.as_ref().and_then(|member| member.load),
            overloaded: node.member.as_ref().is_some_and(|member| member.overloaded),
            overload_reason: node.member.as_ref().map_or_else(String::new, |member| member.reason.clone()),
            membership_notes: node.facts.notes.iter().map(note).collect(),
        }
    }
}

fn note(note: &NoteWord) -> pb::MembershipNote {
    pb::MembershipNote {
        code: note.code.clone(),
        message: note.message.clone(),
        hint: note.hint.clone(),
        count: note.count,
        last_us: note.last_us,
        current: note.current,
    }
}

impl Core {
    /// A member as callers see it.
    pub(crate) fn member_view(&self, facts: &MemberFacts) -> pb::Member {
        let word = &facts.word;
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let swarm = word.swarm_id.as_ref().and_then(|id| self.swarms.get(self.by_id.get(id)?));
        let node = swarm.and_then(|swarm| swarm.nodes.get(word.node_index? as usize));
        pb::Member {
            node_id: word.node_id.clone(),
            swarm_id: word.swarm_id.as_ref().map_or_else(String::new, ToString::to_string),
            node_index: word.node_index,
            addr: word.addr.clone(),
            port: word.port,
            state: word.state.as_str().to_owned(),
            load_score: word.load_score,
            overloaded: word.overloaded,
            overload_reason: text(&word.overload_reason),
            incarnation: word.incarnation,
            boot: word.boot,
            capabilities: word.capabilities.clone().into_iter().collect(),
            labels: word.labels.clone().into_iter().collect(),
            region: text(&word.region),
            version: word.version.clone(),
            timestamp_us: word.timestamp,
            since_us: facts.since,
            cause: text(&word.cause),
            host: node.map_or_else(String::new, |node| node.facts.host.clone()),
        }
    }

    /// Approvals that wait, oldest first.
    pub(crate) fn waiting_approvals(&self) -> Vec<pb::Approval> {
        let mut waiting: Vec<&Approval> =
            self.book.approvals.values().filter(|approval| approval.status != ApprovalStatus::Resolved).collect();
        waiting.sort_by_key(|approval| approval.created);
        waiting.into_iter().filter_map(|approval| approval_view(self, approval)).collect()
    }
}

/// An approval as callers see it.
pub(crate) fn approval_view(core: &Core, approval: &Approval) -> Option<pb::Approval> {
    let swarm = core.swarms.get(&approval.swarm)?;
    Some(pb::Approval {
        approval_id: approval.id.clone(),
        swarm_id: swarm.head.id.to_string(),
        job_id: swarm.head.job.to_string(),
        node_id: approval.node,
        injection_id: approval.injection.as_ref().map_or_else(String::new, ToString::to_string),
        call_id: approval.call_id.clone(),
        status: approval.status.as_str().to_owned(),
        created_ms: approval.created / 1000,
        updated_ms: approval.updated / 1000,
        data: approval.data.clone().into_bytes().into(),
        decision: approval.decision.clone(),
    })
}
