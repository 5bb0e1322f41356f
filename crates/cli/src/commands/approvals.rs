//! `drover approvals` and `drover approve`: what waits for a person's word, and the word.

use drover_proto::router as pb;
use drover_types::ErrorCode;
use serde_json::{Value, json};

use super::{now_ms, request_id};
use crate::app::App;
use crate::args::{Approvals, Approve};
use crate::client::{Client, unary};
use crate::fault::{Exit, Fault};
use crate::render::json as fields;
use crate::render::table::{Table, cut};
use crate::render::words;

pub(super) async fn list(app: &App, args: &Approvals) -> anyhow::Result<Exit> {
    let mut client = Client::connect(app).await?;
    let swarm_id = match &args.swarm {
        Some(id) => client.find(id).await?.swarm_id,
        None => String::new(),
    };
    let answer = unary(client.rpc.list_approvals(pb::ListApprovalsRequest { swarm_id })).await?;
    if app.global.json {
        let approvals: Vec<Value> = answer.approvals.iter().map(fields::approval).collect();
        app.screen.out(&json!({"approvals_version": answer.approvals_version, "approvals": approvals}).to_string())?;
    } else if answer.approvals.is_empty() {
        app.screen.note("nothing waits for an answer");
    } else {
        app.screen.table(&table(&answer.approvals, now_ms()))?;
    }
    Ok(Exit::Done)
}

fn table(approvals: &[pb::Approval], now_ms: u64) -> Table {
    let length = words::telling_length(approvals.iter().map(|approval| approval.approval_id.as_str()));
    let mut table = Table::new(&["APPROVAL", "NODE", ">AGE", "COMMAND"]);
    for approval in approvals {
        table.row(vec![
            words::short(&approval.approval_id, length).into(),
            format!("{}/{}", words::short(&approval.swarm_id, 13), approval.node_id).into(),
            words::age(now_ms, approval.created_ms).into(),
            what(approval).into(),
        ]);
    }
    table
}

/// What is asked for, in a line.
fn what(approval: &pb::Approval) -> String {
    let data: Value = serde_json::from_slice(&approval.data).unwrap_or_default();
    let text = |key: &str| data.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let command = match data.get("command") {
        Some(Value::Array(words)) => words.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "),
        _ => text("command"),
    };
    match (command, text("reason")) {
        (command, reason) if command.is_empty() => reason,
        (command, reason) if reason.is_empty() => command,
        (command, reason) => format!("{command} ({reason})"),
    }
}

pub(super) async fn approve(app: &App, args: &Approve) -> anyhow::Result<Exit> {
    let mut client = Client::connect(app).await?;
    let waiting = unary(client.rpc.list_approvals(pb::ListApprovalsRequest::default())).await?.approvals;
    let approval_id = resolve(&waiting, &args.id)?;
    let decision = if args.session { "\"acceptForSession\"".to_owned() } else { String::new() };
    let request = pb::ResolveApprovalRequest {
        request_id: request_id(),
        approval_id,
        approved: !args.decline,
        decision,
        ..Default::default()
    };
    let answer = unary(client.rpc.resolve_approval(request)).await.map_err(|mut fault| {
        if fault.code == Some(ErrorCode::UnknownApproval) {
            fault.message = format!("no approval {} waits for an answer", args.id);
        }
        fault
    })?;
    let approval = answer.approval.unwrap_or_default();
    if app.global.json {
        let mut document = fields::approval(&approval);
        document["already_resolved"] = answer.already_resolved.into();
        app.screen.out(&document.to_string())?;
    }
    if answer.already_resolved {
        let earlier = if approval.decision.is_empty() { &approval.status } else { &approval.decision };
        return Err(Fault::failed(format!("approval {} had been answered before: {earlier}", approval.approval_id))
            .hint("the earlier answer stands")
            .into());
    }
    if !app.global.json {
        let word = if args.decline { "declined" } else { "approved" };
        app.screen.out(&format!("{word}: {}", cut(&what(&approval), 100)))?;
    }
    Ok(Exit::Done)
}

/// The full id behind a beginning of it. An id that is not waiting goes to the router as it is, which knows the answered.
fn resolve(waiting: &[pb::Approval], id: &str) -> Result<String, Fault> {
    if id.is_empty() {
        return Err(Fault::usage("the approval id is empty").hint("`drover approvals` shows what waits for an answer"));
    }
    let found: Vec<&str> =
        waiting.iter().map(|approval| approval.approval_id.as_str()).filter(|full| full.starts_with(id)).collect();
    match found.as_slice() {
        [one] => Ok((*one).to_owned()),
        all if all.contains(&id) || all.is_empty() => Ok(id.to_owned()),
        all => Err(Fault::failed(format!("{id} could be {}", all.join(" or "))).hint("give more of the id")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::colour::Paint;

    fn approval(id: &str) -> pb::Approval {
        pb::Approval {
            approval_id: id.into(),
            swarm_id: "0199c7a2-7d58-7c4e-9a35-2f4f6a1c0b11".into(),
            node_id: 2,
            created_ms: 1_000,
            data: bytes::Bytes::from_static(br#"{"command":["git","push"],"reason":"publish"}"#),
            ..Default::default()
        }
    }

    #[test]
    fn a_beginning_is_enough_unless_two_begin_so() {
        let waiting = [approval("91ce0000-1"), approval("91cf0000-2"), approval("91ce")];
        assert_eq!(resolve(&waiting, "91cf").unwrap(), "91cf0000-2");
        assert_eq!(resolve(&waiting, "91ce").unwrap(), "91ce", "an exact id wins");
        assert_eq!(resolve(&waiting, "gone").unwrap(), "gone");
        let fault = resolve(&waiting, "91c").unwrap_err();
        assert!(fault.message.contains("91ce0000-1") && fault.message.contains("91cf0000-2"), "{fault:?}");
        insta::assert_snapshot!(table(&waiting[..2], 61_000).render(80, Paint::OFF), @r"
        APPROVAL  NODE             AGE  COMMAND
        91ce0000  0199c7a2-7d58/2   1m  git push (publish)
        91cf0000  0199c7a2-7d58/2   1m  git push (publish)
        ");
    }
}
