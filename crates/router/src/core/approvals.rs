//! Commands and file changes that wait for a person's word: the first answer counts.

use drover_proto::router as pb;
use drover_types::{ErrorCode, Failure, InjectionId};
use serde_json::{Value, json};
use tracing::warn;

use super::delivery::queue_control;
use super::effects::{Answer, Effects, Out, Token};
use super::input::{OutRecord, ResolveOrder};
use super::model::{Approval, ApprovalStatus, SwarmKey};
use super::{Core, of_node, with_fields};

/// Settled approvals that are remembered, so that a repeated answer finds the first one.
const MOST_SETTLED: usize = 4096;

impl Core {
    /// A worker asks.
    #[expect(clippy::too_many_arguments, reason = "a record's place in the world, taken apart")]
    pub(super) fn approval_required(
        &mut self,
        key: SwarmKey,
        index: u32,
        generation: u32,
        record: &OutRecord,
        approval_id: &str,
        call_id: &str,
        injection: Option<InjectionId>,
        fx: &mut Effects,
    ) {
        let Some(swarm) = self.swarms.get(&key) else { return };
        let asked_as = approval_id;
        let own = format!("{}-{index}-{generation}-{}", swarm.head.id, record.seq);
        let approval_id = match self.book.approvals.get(asked_as) {
            _ if asked_as.is_empty() => own,
            None => asked_as.to_owned(),
            Some(_) => {
                let again = self.book.approvals.values().any(|known| {
                    known.asks(key, index, asked_as)
                        && known.generation == generation
                        && (known.status != ApprovalStatus::Resolved || known.call_id == call_id)
                });
                if again {
                    return; // The same question in another shape.
                }
                // Nothing keeps two workers from choosing the same name: each of the two is to be answered for itself.
                warn!(
                    swarm_id = %swarm.head.id, node_id = index, approval_id = asked_as, called = own,
                    "another question has this name already"
                );
                own
            }
        };
        let version = self.new_approvals_version();
        let data = with_fields(&record.data, &json!({ "approval_id": approval_id, "approvals_version": version }));
        let mut asked = record.clone();
        asked.data = data.clone();
        self.pass_on(key, index, &asked, false, fx);
        let approval = Approval {
            id: approval_id.clone(),
            asked_as: asked_as.to_owned(),
            swarm: key,
            node: index,
            generation,
            injection: injection.or_else(|| record.injection.clone()),
            call_id: call_id.to_owned(),
            status: ApprovalStatus::Pending,
            created: fx.now,
            updated: fx.now,
            data: String::from_utf8_lossy(&data).into_owned(),
            decision: String::new(),
        };
        self.book.dirty.approvals.insert(approval_id.clone());
        self.book.approvals.insert(approval_id, approval);
    }

    /// A worker says that a question is settled.
    #[expect(clippy::too_many_arguments, reason = "a record's place in the world, taken apart")]
    pub(super) fn approval_resolved(
        &mut self,
        key: SwarmKey,
        index: u32,
        generation: u32,
        record: &OutRecord,
        approval_id: &str,
        call_id: &str,
        fenced: bool,
        fx: &mut Effects,
    ) {
        let found = self
            .book
            .approvals
            .values()
            .filter(|approval| {
                if approval_id.is_empty() {
                    approval.swarm == key && approval.node == index && approval.call_id == call_id
                } else {
                    approval.asks(key, index, approval_id)
                }
            })
            // Of several questions of one name: what waits before what is settled, what this worker asked before what an
            // earlier one did, what names this call before what does not, the latest before the others.
            .max_by_key(|approval| {
                let open = approval.status != ApprovalStatus::Resolved;
                (open, approval.generation == generation, approval.call_id == call_id, approval.created)
            });
        let Some(id) = found.map(|approval| approval.id.clone()) else {
            self.pass_on(key, index, record, fenced, fx);
            return;
        };
        if self.book.approvals.get(&id).is_some_and(|approval| approval.status == ApprovalStatus::Resolved) {
            return; // Settled by us when its turn was lost.
        }
        let version = self.new_approvals_version();
        let mut settled = record.clone();
        settled.data = with_fields(&record.data, &json!({ "approval_id": id, "approvals_version": version }));
        self.pass_on(key, index, &settled, fenced, fx);
        let decision = serde_json::from_slice::<Value>(&record.data)
            .ok()
            .and_then(|data| data.get("decision").filter(|decision| !decision.is_null()).map(ToString::to_string));
        if let Some(approval) = self.book.approvals.get_mut(&id) {
            approval.status = ApprovalStatus::Resolved;
            approval.updated = fx.now;
            if let (true, Some(decision)) = (approval.decision.is_empty(), decision) {
                approval.decision = decision;
            }
        }
        self.book.dirty.approvals.insert(id);
    }

    /// A turn has ended: nobody waits for an answer any more.
    pub(super) fn settle_approvals_of(&mut self, injection: &InjectionId, fx: &mut Effects) {
        let open: Vec<String> = self
            .book
            .approvals
            .values()
            .filter(|approval| {
                approval.status != ApprovalStatus::Resolved && approval.injection.as_ref() == Some(injection)
            })
            .map(|approval| approval.id.clone())
            .collect();
        for id in open {
            let version = self.new_approvals_version();
            let Some(approval) = self.book.approvals.get_mut(&id) else { continue };
            let approved = approval.status == ApprovalStatus::ApprovedPendingAck;
            approval.status = ApprovalStatus::Resolved;
            approval.updated = fx.now;
            let data = json!({
                "approval_id": id, "call_id": approval.call_id, "approved": approved, "source": "turn_end",
                "decision": decision_value(&approval.decision, approved), "approvals_version": version,
            });
            if let Some(swarm) = self.swarms.get(&approval.swarm) {
                let what = of_node("exec_approval_resolved", approval.node, Some(injection), &data);
                self.book.say(fx, &swarm.head, what);
            }
            self.book.dirty.approvals.insert(id);
        }
    }

    /// A person answers.
    pub(super) fn resolve_approval(&mut self, token: Token, order: &ResolveOrder, fx: &mut Effects) {
        let answer = self.begin_resolve(order, fx).map(|answer| Answer::Resolved(Box::new(answer)));
        fx.out.push(Out::Answer(token, answer));
    }

    fn begin_resolve(
        &mut self,
        order: &ResolveOrder,
        fx: &mut Effects,
    ) -> Result<pb::ResolveApprovalResponse, Failure> {
        if !order.decision.is_empty() && serde_json::from_str::<Value>(&order.decision).is_err() {
            return Err(Failure::new(ErrorCode::InvalidRequest, format!("decision {} is not JSON", order.decision))
                .hint("write a JSON string such as \"acceptForSession\", or an object"));
        }
        let id = self.find_approval(order)?;
        let done = |core: &Self, already_resolved| pb::ResolveApprovalResponse {
            approval: core.book.approvals.get(&id).and_then(|approval| super::approval_view(core, approval)),
            already_resolved,
        };
        let Some(approval) = self.book.approvals.get(&id) else { return Err(unknown(&self.pending_names())) };
        if approval.status != ApprovalStatus::Pending {
            return Ok(done(self, true));
        }
        let (key, index, injection) = (approval.swarm, approval.node, approval.injection.clone());
        let call_id = approval.call_id.clone();
        let asked_as = approval.asked_as().to_owned();
        let decision = decision_value(&order.decision, order.approved);
        let version = self.new_approvals_version();
        let Some(swarm) = self.swarms.get_mut(&key) else { return Err(unknown(&[])) };
        let data = json!({
            "request_id": order.request_id, "approval_id": id, "call_id": call_id, "approved": order.approved,
            "decision": decision, "approvals_version": version,
        });
        self.book.say(fx, &swarm.head, of_node("exec_approval_submitted", index, injection.as_ref(), &data));
        let word = json!({
            "approval_id": asked_as, "call_id": call_id, "approved": order.approved, "decision": decision,
        });
        queue_control(&mut self.book, &mut swarm.nodes, key, index, injection, "approval", &word.to_string());
        if let Some(approval) = self.book.approvals.get_mut(&id) {
            approval.status =
                if order.approved { ApprovalStatus::ApprovedPendingAck } else { ApprovalStatus::DeniedPendingAck };
            approval.updated = fx.now;
            approval.decision = decision.to_string();
        }
        self.book.dirty.approvals.insert(id.clone());
        self.pump_swarm(key, fx);
        Ok(done(self, false))
    }

    fn find_approval(&self, order: &ResolveOrder) -> Result<String, Failure> {
        let approvals = &self.book.approvals;
        if !order.approval_id.is_empty() {
            if approvals.contains_key(&order.approval_id) {
                return Ok(order.approval_id.clone());
            }
            let mut matching = approvals.keys().filter(|id| id.starts_with(&order.approval_id));
            return match (matching.next(), matching.next()) {
                (Some(id), None) => Ok(id.clone()),
                _ => Err(unknown(&self.pending_names())),
            };
        }
        if order.call_id.is_empty() {
            return Err(Failure::new(ErrorCode::InvalidRequest, "no approval is named")
                .hint("name it by its approval id, or by job id and call id"));
        }
        let mut matching: Vec<&Approval> = approvals
            .values()
            .filter(|approval| {
                approval.call_id == order.call_id
                    && order.node.is_none_or(|node| node == approval.node)
                    && (order.job_id.is_empty()
                        || self.swarms.get(&approval.swarm).is_some_and(|swarm| *swarm.head.job == *order.job_id))
            })
            .collect();
        // A call that was settled long ago must not hide one that waits now.
        if matching.len() > 1 && matching.iter().any(|approval| approval.status == ApprovalStatus::Pending) {
            matching.retain(|approval| approval.status == ApprovalStatus::Pending);
        }
        matching.sort_by_key(|approval| approval.created);
        match matching.as_slice() {
            [.., last] if matching.len() == 1 || last.status != ApprovalStatus::Pending => Ok(last.id.clone()),
            [] => Err(unknown(&self.pending_names())),
            _ => Err(Failure::new(ErrorCode::InvalidRequest, "more than one node waits for this call")
                .hint("name the node too, or the approval id")),
        }
    }

    fn pending_names(&self) -> Vec<String> {
        let pending = self.book.approvals.values().filter(|approval| approval.status == ApprovalStatus::Pending);
        pending.take(5).map(|approval| approval.id.clone()).collect()
    }

    fn new_approvals_version(&mut self) -> u64 {
        self.book.approvals_version += 1;
        self.book.dirty.approvals_view = true;
        self.book.approvals_version
    }

    /// Keeps the memory of settled approvals within bounds.
    pub(super) fn forget_old_approvals(&mut self) {
        if self.book.approvals.len() <= MOST_SETTLED {
            return;
        }
        let mut settled: Vec<(u64, String)> = self
            .book
            .approvals
            .values()
            .filter(|approval| approval.status == ApprovalStatus::Resolved)
            .map(|approval| (approval.updated, approval.id.clone()))
            .collect();
        settled.sort();
        let surplus = self.book.approvals.len() - MOST_SETTLED;
        for (_, id) in settled.into_iter().take(surplus) {
            self.book.approvals.remove(&id);
            // The row goes with the next commit.
            self.book.dirty.approvals_gone.push(id);
        }
    }
}

/// The decision for the agent: the caller's own word, else plain yes or no.
fn decision_value(decision: &str, approved: bool) -> Value {
    serde_json::from_str(decision).unwrap_or_else(|_| if approved { "accept" } else { "decline" }.into())
}

fn unknown(pending: &[String]) -> Failure {
    let hint = if pending.is_empty() {
        "nothing waits for an answer at the moment".to_owned()
    } else {
        format!("waiting now: {}", pending.join(", "))
    };
    Failure::new(ErrorCode::UnknownApproval, "unknown approval request").hint(hint)
}
