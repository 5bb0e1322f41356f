//! A turn that is to end before it has its answer, wherever its session is or goes meanwhile.

use std::time::Duration;

use drover_proto::failure_of;
use drover_proto::handoff::{InterruptRequest, InterruptResponse};
use drover_types::{ErrorCode, Failure, RequestId, SessionId};
use tokio::time::{Instant, sleep, timeout};

use super::Shell;
use super::route::failure;
use super::sessions::{other_owner, peer};
use crate::core::{Input, Reply};

/// How often the core is asked whether the turn has ended: at first, and at most.
const AGAIN: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));
/// Longest wait for the turn's end. An agent is given less, and a takeover that comes between may take the rest.
const LIMIT: Duration = Duration::from_mins(2);
/// The core answers at once.
const CORE: Duration = Duration::from_secs(10);

/// Has a turn end; without a name the one that runs. Returns when it is answered: only that is durable, so until then the owner, whichever it
/// is by then, is told again.
pub(crate) async fn interrupt(
    shell: &Shell,
    session: SessionId,
    mut request: Option<RequestId>,
) -> Result<InterruptResponse, Failure> {
    let until = Instant::now() + LIMIT;
    let (mut pause, mut told) = (AGAIN.0, false);
    loop {
        if let Some(node) = other_owner(shell, &session).await? {
            let request_id = request.as_ref().map(ToString::to_string).unwrap_or_default();
            let mut ask = tonic::Request::new(InterruptRequest { session_id: session.to_string(), request_id });
            shell.links.sign(&mut ask);
            match peer(shell, &node)?.interrupt(ask).await.map_err(|status| failure_of(&status)) {
                Ok(answer) => {
                    let answer = answer.into_inner();
                    return Ok(InterruptResponse { answered: answer.answered && !told, ..answer });
                }
                // It is gone, or goes away; whoever has the session next is told.
                Err(lost) if is_lost(&lost) && Instant::now() < until => {}
                Err(failure) => return Err(failure),
            }
        } else {
            let mut waiter = shell.waiters.add();
            shell.jobs.input(Input::Recover { session: session.clone() }).await;
            let (of, turn) = (session.clone(), request.clone());
            shell.jobs.input(Input::Interrupt { session: of, request: turn, reply: waiter.to }).await;
            match timeout(CORE, waiter.reply()).await {
                Ok(Some(Reply::Answer { turn, .. })) => {
                    let node_id = shell.me.node.to_string();
                    return Ok(InterruptResponse { turn: turn.0, node_id, answered: !told });
                }
                Ok(Some(Reply::Interrupted { request: named, .. })) => (request, told) = (Some(named), true),
                Ok(Some(Reply::Refused(why))) => return Err(failure(&why)),
                _ => {}
            }
        }
        if Instant::now() >= until {
            let failure = Failure::new(ErrorCode::BackendUnavailable, "the turn does not end");
            return Err(failure.hint("ask again; `drover why SESSION` says where the session is"));
        }
        sleep(pause).await;
        pause = (pause * 2).min(AGAIN.1);
    }
}

fn is_lost(failure: &Failure) -> bool {
    matches!(failure.code, ErrorCode::BackendUnavailable | ErrorCode::ShuttingDown | ErrorCode::Internal)
}
