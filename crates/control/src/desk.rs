//! Carries out what clients ask for, and decides which answers come from the call and which from the event log.
//!
//! | answer | made from |
//! | --- | --- |
//! | `swarm_list`, `swarm_status`, `providers_list`, `approvals_list`, `command_rejected` | the call, to the asker |
//! | `swarm_launch_progress`, `swarm_launched`, `inject_*`, `swarm_terminate*`, `exec_approval_*` | the event log, to all |
//! | one of the latter whose event was given out before the request, or bears another's id | the call, to the asker |

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use drover_proto::failure_of;
use drover_proto::router as pb;
use drover_service::Caller;
use drover_types::{ErrorCode, Failure};
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};

use crate::answer;
use crate::hub::Hub;
use crate::line::{Command, RequestId};
use crate::lister::Lister;
use crate::metrics::CommandLabel;
use crate::outbox::Outbox;
use crate::request::{self, Approve, Inject, Refusal, Request, Targets};
use crate::upstream::Upstream;

/// How long the event of an answered approval may take before the asker is told from the call. The web backend waits
/// 1.5 s in all.
const APPROVAL_EVENT: Duration = Duration::from_millis(250);

/// What all clients share.
pub(crate) struct Desk {
    pub(crate) upstream: Arc<dyn Upstream>,
    pub(crate) hub: Arc<Hub>,
    pub(crate) lister: Lister,
}

/// One client's request: where its answers go.
struct Asker<'a> {
    outbox: &'a Outbox,
    request_id: &'a RequestId,
    /// In whose name the router is asked.
    caller: Caller,
    /// Cancelled when what is not finished has to be given up.
    give_up: &'a CancellationToken,
}

impl Desk {
    /// Answers a line that was meant for us and could not be read.
    pub(crate) fn reject(&self, outbox: &Outbox, request_id: &RequestId, reason: &str) {
        self.hub.metrics.rejections.inc();
        self.hub.debug(&format!("rejected a command: {reason}"));
        outbox.push_line(answer::rejected(request_id, reason));
    }

    /// The same, for a reason with a code.
    pub(crate) fn reject_failure_of(&self, outbox: &Outbox, request_id: &RequestId, failure: &Failure) {
        self.reject(outbox, request_id, &answer::reason_of(failure));
    }

    /// Carries out a command to its last answer.
    pub(crate) async fn carry_out(
        &self,
        outbox: Arc<Outbox>,
        caller: Caller,
        command: Command,
        give_up: CancellationToken,
    ) {
        let asker = Asker { outbox: &outbox, request_id: &command.request_id, caller, give_up: &give_up };
        let request = request::read(&command.name, &command.payload);
        self.count(&request);
        // The payload may hold megabytes that nobody needs any more.
        let payload = command.payload;
        drop(payload);
        match request {
            Err(Refusal { reason, inject: None }) => self.reject_request(&asker, &reason),
            Err(Refusal { reason, inject: Some((swarm_id, nodes)) }) => {
                self.fail_inject(&asker, &swarm_id, &nodes, &reason);
            }
            Ok(Request::List) => self.list(&asker).await,
            Ok(Request::Providers) => self.providers(&asker).await,
            Ok(Request::Approvals) => self.approvals(&asker).await,
            Ok(Request::Queue) => {
                outbox.push_line(answer::queue_list(asker.request_id));
                self.hub.broadcast(&answer::queue_updated());
            }
            Ok(Request::Projects) => {
                outbox.push_line(answer::project_list(asker.request_id));
                self.hub.broadcast(&answer::projects_updated());
            }
            Ok(Request::Status { swarm_id }) => self.status(&asker, swarm_id).await,
            Ok(Request::Launch(spec)) => self.launch(&asker, *spec).await,
            Ok(Request::Inject(inject)) => self.inject(&asker, inject).await,
            Ok(Request::Terminate { swarm_id, force }) => self.terminate(&asker, swarm_id, force).await,
            Ok(Request::Approve(approve)) => self.approve(&asker, approve).await,
        }
    }

    fn count(&self, request: &Result<Request, Refusal>) {
        let command = match request {
            Ok(Request::List) => "swarm_list",
            Ok(Request::Providers) => "providers_list",
            Ok(Request::Approvals) => "approvals_list",
            Ok(Request::Queue) => "queue_list",
            Ok(Request::Projects) => "project_list",
            Ok(Request::Status { .. }) => "swarm_status",
            Ok(Request::Launch(_)) => "swarm_launch",
            Ok(Request::Inject(_)) => "inject",
            Ok(Request::Terminate { .. }) => "swarm_terminate",
            Ok(Request::Approve(_)) => "approve_execution",
            Err(_) => "refused",
        };
        self.hub.metrics.requests.get_or_create(&CommandLabel { command }).inc();
    }

    fn reject_request(&self, asker: &Asker<'_>, reason: &str) {
        self.reject(asker.outbox, asker.request_id, reason);
    }

    fn reject_failure(&self, asker: &Asker<'_>, failure: &Failure) {
        self.reject_failure_of(asker.outbox, asker.request_id, failure);
    }

    async fn list(&self, asker: &Asker<'_>) {
        match asker.unless_given_up(self.lister.swarms()).await {
            Ok(Ok(swarms)) => {
                let (head, tail) = answer::swarm_list_frame(asker.request_id);
                asker.outbox.push_parts([head, swarms, tail]);
            }
            Ok(Err(failure)) => self.reject_failure(asker, &failure),
            Err(failure) => self.reject_failure(asker, &failure),
        }
    }

    async fn providers(&self, asker: &Asker<'_>) {
        match asker.call(self.upstream.providers(asker.caller)).await {
            Ok(list) => asker.outbox.push_line(answer::providers_list(asker.request_id, &list.providers)),
            Err(failure) => self.reject_failure(asker, &failure),
        }
    }

    async fn approvals(&self, asker: &Asker<'_>) {
        match asker.call(self.upstream.approvals(asker.caller)).await {
            Ok(list) => asker.outbox.push_line(answer::approvals_list(asker.request_id, &list)),
            Err(failure) => self.reject_failure(asker, &failure),
        }
    }

    async fn status(&self, asker: &Asker<'_>, swarm_id: String) {
        match self.exactly(asker, swarm_id).await {
            Ok((swarm, error)) => asker.outbox.push_line(answer::swarm_status(asker.request_id, &swarm, &error)),
            Err(failure) => self.reject_failure(asker, &failure),
        }
    }

    /// The router takes the beginning of an id. Clients of this protocol filter events by the id that they asked for, and
    /// none of them expects that an id it made up ends a swarm.
    async fn exactly(&self, asker: &Asker<'_>, swarm_id: String) -> Result<(pb::Swarm, String), Failure> {
        let answer =
            asker.call(self.upstream.swarm(asker.caller, pb::GetSwarmRequest { swarm_id: swarm_id.clone() })).await?;
        match answer.swarm {
            Some(swarm) if swarm.swarm_id == swarm_id => Ok((swarm, answer.backend_error)),
            _ => Err(Failure::new(ErrorCode::UnknownSwarm, "no swarm has this id")),
        }
    }

    /// The same for what does not need the swarm. A whole UUID is the beginning of no other id.
    async fn is_exact(&self, asker: &Asker<'_>, swarm_id: &str) -> Result<(), Failure> {
        if swarm_id.len() == 36 && uuid::Uuid::try_parse(swarm_id).is_ok() {
            return Ok(());
        }
        self.exactly(asker, swarm_id.to_owned()).await.map(drop)
    }

    async fn launch(&self, asker: &Asker<'_>, spec: drover_proto::common::LaunchSpec) {
        if let Err(failure) = self.event_log(asker).await {
            return self.reject_failure(asker, &failure);
        }
        let request_id = asker.request_id.as_text();
        let end = self.hub.expect_end(&request_id);
        let request = pb::LaunchSwarmRequest { request_id, spec: Some(spec), traceparent: String::new() };
        let mut last_seq = 0;
        let outcome = asker
            .stream(self.upstream.launch(asker.caller, request), |step: pb::LaunchSwarmResponse| {
                last_seq = last_seq.max(step.seq);
                match step.step {
                    Some(pb::launch_swarm_response::Step::Launched(swarm)) => Some(swarm),
                    _ => None,
                }
            })
            .await;
        // What the log has to say about this launch comes before the end of it.
        self.hub.reached(last_seq).await;
        match outcome {
            Ok(Some(_)) if end.seen() => {}
            Ok(Some(swarm)) => asker.outbox.push_line(answer::launched(asker.request_id, &swarm)),
            Ok(None) => self.reject_request(asker, "the launch ended without an outcome; look at the list of swarms"),
            Err(failure) => self.reject_failure(asker, &failure),
        }
    }

    async fn terminate(&self, asker: &Asker<'_>, swarm_id: String, force: bool) {
        let ready = match self.event_log(asker).await {
            Ok(_) => self.is_exact(asker, &swarm_id).await,
            Err(failure) => Err(failure),
        };
        if let Err(failure) = ready {
            return self.reject_failure(asker, &failure);
        }
        let request_id = asker.request_id.as_text();
        let end = self.hub.expect_end(&request_id);
        let request = pb::TerminateSwarmRequest { request_id, swarm_id, force };
        let mut last_seq = 0;
        let outcome = asker
            .stream(self.upstream.terminate(asker.caller, request), |step: pb::TerminateSwarmResponse| {
                last_seq = last_seq.max(step.seq);
                match step.step {
                    Some(pb::terminate_swarm_response::Step::Terminated(swarm)) => Some(swarm),
                    _ => None,
                }
            })
            .await;
        self.hub.reached(last_seq).await;
        match outcome {
            Ok(Some(_)) if end.seen() => {}
            // Another request ended the swarm; this one is told all the same.
            Ok(Some(swarm)) => asker.outbox.push_line(answer::terminated(asker.request_id, &swarm)),
            Ok(None) => self.reject_request(asker, "the termination ended without an outcome; ask for the status"),
            Err(failure) => self.reject_failure(asker, &failure),
        }
    }

    async fn inject(&self, asker: &Asker<'_>, inject: Inject) {
        let named = inject.targets.clone().named();
        let nodes = match &inject.targets {
            Targets::All => Vec::new(),
            Targets::Nodes(nodes) => nodes.iter().filter_map(|&node| u32::try_from(node).ok()).collect(),
        };
        if !matches!(inject.targets, Targets::All) && nodes.len() != named.len() {
            return self.fail_inject(asker, &inject.swarm_id, &named, "nodes are numbered from 0");
        }
        let ready = match self.is_exact(asker, &inject.swarm_id).await {
            Ok(()) => self.event_log(asker).await,
            Err(failure) => Err(failure),
        };
        let given_out = match ready {
            Ok(position) => position,
            Err(failure) => {
                return self.fail_inject(asker, &inject.swarm_id, &named, &answer::reason_of(&failure));
            }
        };
        let request = pb::InjectRequest {
            request_id: asker.request_id.as_text(),
            swarm_id: inject.swarm_id.clone(),
            nodes,
            content: inject.content,
            ..pb::InjectRequest::default()
        };
        let mut last_seq = 0;
        let mut accepted = BTreeSet::new();
        let outcome = asker
            .stream(self.upstream.inject(asker.caller, request), |step: pb::InjectResponse| {
                accepted.insert(i64::from(step.node_id));
                if step.seq > given_out {
                    last_seq = last_seq.max(step.seq);
                } else if let Some(line) = answer::inject_step(asker.request_id, &inject.swarm_id, &step) {
                    asker.outbox.push_line(line);
                }
                None::<()>
            })
            .await;
        self.hub.reached(last_seq).await;
        let Err(failure) = outcome else { return };
        let reason = answer::reason_of(&failure);
        if accepted.is_empty() {
            return self.fail_inject(asker, &inject.swarm_id, &named, &reason);
        }
        // What was accepted is on disk and will be carried out whatever became of this call.
        self.reject_request(asker, &format!("{reason} (prompts that were acknowledged will still be delivered)"));
    }

    /// The CLI waits for `inject_failed` and overlooks a rejection; other clients wait for the rejection.
    fn fail_inject(&self, asker: &Asker<'_>, swarm_id: &str, nodes: &[i64], reason: &str) {
        for &node in nodes {
            asker.outbox.push_line(answer::inject_failed(asker.request_id, swarm_id, node, reason));
        }
        self.reject_request(asker, reason);
    }

    async fn approve(&self, asker: &Asker<'_>, approve: Approve) {
        if let Err(failure) = self.event_log(asker).await {
            return self.reject_failure(asker, &failure);
        }
        let request_id = asker.request_id.as_text();
        let end = self.hub.expect_end(&request_id);
        let request = pb::ResolveApprovalRequest {
            request_id,
            approval_id: approve.approval_id,
            job_id: approve.job_id,
            call_id: approve.call_id,
            node_id: approve.node_id,
            approved: approve.approved,
            decision: approve.decision,
        };
        match asker.call(self.upstream.resolve(asker.caller, request)).await {
            Ok(outcome) => {
                let told = end.seen() || (!outcome.already_resolved && end.seen_within(APPROVAL_EVENT).await);
                if !told {
                    asker.outbox.push_line(answer::approval_answer(asker.request_id, &outcome, approve.approved));
                }
            }
            Err(failure) => self.reject_failure(asker, &failure),
        }
    }

    /// Up to where the event log has been given out. What a request brings about must not happen before the log is
    /// followed: its asker would never hear of it.
    async fn event_log(&self, asker: &Asker<'_>) -> Result<u64, Failure> {
        let position = asker.unless_given_up(self.hub.started()).await?;
        position.ok_or_else(|| {
            Failure::new(ErrorCode::BackendUnavailable, "the router's event log cannot be read").hint("try again")
        })
    }
}

impl Asker<'_> {
    async fn unless_given_up<F: Future>(&self, work: F) -> Result<F::Output, Failure> {
        self.give_up.run_until_cancelled(work).await.ok_or_else(|| {
            Failure::new(ErrorCode::ShuttingDown, "the router is shutting down")
                .hint("connect again; what was begun goes on when it is back")
        })
    }

    async fn call<M>(&self, call: impl Future<Output = Result<M, Status>>) -> Result<M, Failure> {
        self.unless_given_up(call).await?.map_err(|status| failure_of(&status))
    }

    /// Reads a stream of answers until `read` finds the last one, or the stream ends.
    async fn stream<M, R>(
        &self,
        call: impl Future<Output = Result<Streaming<M>, Status>>,
        mut read: impl FnMut(M) -> Option<R>,
    ) -> Result<Option<R>, Failure> {
        let mut steps = self.call(call).await?;
        while let Some(step) = self.call(steps.message()).await? {
            if let Some(last) = read(step) {
                return Ok(Some(last));
            }
        }
        Ok(None)
    }
}
