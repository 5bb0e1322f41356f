//! What the membership says of nodes, from the router, which hears it from the node that leads.

use std::collections::BTreeMap;
use std::time::Duration;

use drover_proto::router::router_service_client::RouterServiceClient;
use drover_proto::router::{ListMembersRequest, Member as Told};
use drover_service::{Context, MAX_MESSAGE_BYTES, Token};
use tokio::time::{Instant, timeout};
use tracing::{debug, warn};

use super::kinds::Kinds;
use super::roster::{Life, Member};
use super::{CAPABILITY, Nodes};

/// How often the router is asked.
const ASK: Duration = Duration::from_millis(500);
/// How long it may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// What was heard holds for so long when it cannot be asked any more.
const HOLDS: Duration = Duration::from_secs(30);

/// Keeps the roster informed until the daemon ends.
pub(super) async fn follow(nodes: Nodes, ctx: Context) {
    let token = ctx.token().unwrap_or_else(|error| {
        warn!(%error, "the router will not say who the nodes are");
        Token::default()
    });
    let mut router = RouterServiceClient::with_interceptor(ctx.channel("router"), token)
        .max_decoding_message_size(MAX_MESSAGE_BYTES);
    let mut heard = Instant::now();
    loop {
        tokio::select! {
            () = tokio::time::sleep(ASK) => {}
            () = ctx.shutdown().cancelled() => return,
        }
        match timeout(PATIENCE, router.list_members(ListMembersRequest::default())).await {
            Ok(Ok(told)) => {
                heard = Instant::now();
                let members: BTreeMap<String, Member> =
                    told.into_inner().members.into_iter().map(|told| (told.node_id.clone(), member(&told))).collect();
                nodes.act(|roster, now, out| roster.members(now, members, out));
            }
            Ok(Err(status)) => debug!(%status, "the router does not say who the members are"),
            Err(_) => debug!("the router does not answer"),
        }
        if heard.elapsed() >= HOLDS {
            nodes.act(|roster, _, _| roster.members_unknown());
        }
    }
}

fn member(told: &Told) -> Member {
    let state = match told.state.as_str() {
        "alive" => Life::Alive,
        "suspect" => Life::Suspect,
        _ => Life::Dead,
    };
    let kinds = told.capabilities.get(CAPABILITY).map(|kinds| Kinds::of(kinds.split('/'))).unwrap_or_default();
    Member { state, load: told.load_score.unwrap_or(0.0), overloaded: told.overloaded, kinds }
}
