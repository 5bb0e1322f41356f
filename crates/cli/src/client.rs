//! The connection to the router.

use std::error::Error as _;
use std::future::Future;
use std::time::Duration;

use drover_config::Config;
use drover_proto::router as pb;
use drover_proto::router::router_service_client::RouterServiceClient;
use drover_service::{MAX_MESSAGE_BYTES, StateDir, Target, Token, address_book, process};
use drover_types::ErrorCode;
use tokio::time::Instant;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Response, Status};

use crate::app::App;
use crate::daemons;
use crate::fault::{self, Exit, Fault};
use crate::start;

/// The generated client over a channel that finds a restarted router again, and that shows the router's token.
pub(crate) type Rpc = RouterServiceClient<InterceptedService<Channel, Token>>;

/// A router that answered.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    pub(crate) rpc: Rpc,
    /// What it said of itself when we connected.
    pub(crate) info: pb::GetInfoResponse,
}

/// How long the first answer is waited for.
const FIRST_ANSWER: Duration = Duration::from_secs(5);
/// Stands for the swarm that was launched last. No id can begin so: ids are hexadecimal.
const LAST: &str = "last";
/// How long any other single answer is waited for.
const ANSWER: Duration = Duration::from_secs(30);

/// The client of a target, not connected yet.
pub(crate) fn rpc(target: Target, token: Token) -> Rpc {
    RouterServiceClient::with_interceptor(drover_service::connect(target), token)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// What the configuration says that the router wants to be shown.
pub(crate) fn token(config: &Config) -> Result<Token, Fault> {
    Token::load(config.security.token_file.as_deref()).map_err(|error| {
        let cause = error.source().map_or_else(String::new, |cause| format!(" ({cause})"));
        Fault::new(Exit::BadConfig, format!("{error}{cause}"))
    })
}

impl Client {
    /// Starts what is missing, unless that is not wanted, and waits up to five seconds for the router.
    pub(crate) async fn connect(app: &App) -> Result<Self, Fault> {
        let target = if let Some(addr) = &app.global.router {
            Target::Address(addr.clone())
        } else {
            let state = app.state()?;
            if app.may_start() {
                start::ensure(app, &state).await?;
            }
            on_this_host(&state)?;
            Target::Daemon { state, name: daemons::ROUTER.to_owned() }
        };
        let mut rpc = rpc(target, token(&app.config)?);
        let deadline = Instant::now() + FIRST_ANSWER;
        let info = loop {
            let asked = tokio::time::timeout(Duration::from_secs(2), rpc.get_info(pb::GetInfoRequest {})).await;
            let why = match asked {
                Ok(Ok(info)) => break info.into_inner(),
                Ok(Err(status)) if !fault::lost(&status) => return Err(refused(app, &status)),
                Ok(Err(status)) => fault::deepest(&status),
                Err(_) => "no answer within 2 s".to_owned(),
            };
            if Instant::now() >= deadline {
                return Err(unreachable(app, &why));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        check_version(&info)?;
        Ok(Self { rpc, info })
    }

    /// One swarm by its id, by a beginning of it, or as `last`.
    pub(crate) async fn swarm(&mut self, id: &str) -> Result<pb::GetSwarmResponse, Fault> {
        let id = id.trim();
        if id.is_empty() {
            return Err(Fault::usage("the swarm id is empty").hint("`drover list` shows the swarms"));
        }
        let swarm_id = self.in_full(id).await?;
        unary(self.rpc.get_swarm(pb::GetSwarmRequest { swarm_id })).await.map_err(|fault| named(fault, id))
    }

    /// `last` and `last/INDEX` with the id of the swarm that was launched last; anything else as it is.
    pub(crate) async fn in_full(&mut self, subject: &str) -> Result<String, Fault> {
        let (word, rest) = subject.split_at(subject.find('/').unwrap_or(subject.len()));
        if word != LAST {
            return Ok(subject.to_owned());
        }
        let swarms = unary(self.rpc.list_swarms(pb::ListSwarmsRequest {})).await?.swarms;
        let Some(last) = swarms.into_iter().max_by_key(|swarm| swarm.created_ms) else {
            let mut fault = Fault::failed("there is no last swarm: none was launched, or they ended long ago");
            fault.code = Some(ErrorCode::UnknownSwarm);
            return Err(fault.hint("launch one: drover launch --nodes 4 --agent echo"));
        };
        Ok(last.swarm_id + rest)
    }

    /// The same, when only the swarm matters.
    pub(crate) async fn find(&mut self, id: &str) -> Result<pb::Swarm, Fault> {
        let answer = self.swarm(id).await?;
        answer.swarm.ok_or_else(|| Fault::failed(format!("the router said nothing about swarm {id}")))
    }
}

/// One answer to one question.
pub(crate) async fn unary<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Fault> {
    match tokio::time::timeout(ANSWER, call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(Fault::of_status(&status)),
        Err(_) => Err(Fault::unreachable(&format!("no answer within {} s", ANSWER.as_secs()))),
    }
}

/// The router's protocol has fixed words for an unknown swarm; a person wants to read which one it was.
fn named(mut fault: Fault, id: &str) -> Fault {
    if fault.code == Some(ErrorCode::UnknownSwarm) && !fault.message.contains(id) {
        fault.message = format!("there is no swarm {id}");
        if let Some((swarm, node)) = id.split_once('/') {
            fault.hint = format!("name the swarm only: {swarm}; of node {node} alone speaks `drover why {id}`");
        }
    }
    fault
}

/// Programs of one minor version understand each other.
pub(crate) fn fits(theirs: &str) -> bool {
    let minor = |version: &str| version.splitn(3, '.').take(2).map(str::to_owned).collect::<Vec<_>>();
    minor(theirs) == minor(drover_types::VERSION)
}

fn check_version(info: &pb::GetInfoResponse) -> Result<(), Fault> {
    if fits(&info.version) {
        return Ok(());
    }
    let mut fault = Fault::failed(format!(
        "the router is version {}, this program is version {}",
        info.version,
        drover_types::VERSION
    ))
    .hint(format!(
        "use the drover of version {}, or stop the old daemons (`drover down` on {}, where the router is pid {}) and repeat the command; swarms go on meanwhile",
        info.version, info.host, info.pid
    ));
    fault.code = Some(ErrorCode::VersionMismatch);
    Err(fault)
}

/// A state directory on a network file system may have its router on another host, whose loopback is not ours.
fn on_this_host(state: &StateDir) -> Result<(), Fault> {
    match address_book::read(state, daemons::ROUTER) {
        Some(router) if router.host != process::hostname() => {
            let message =
                format!("the router of {} runs on {} (pid {})", state.path().display(), router.host, router.pid);
            Err(Fault::new(Exit::Unreachable, message).hint(format!(
                "work on {0}, or forward its port (ssh -L 7950:{1} {0}) and use --router, or set another DROVER_STATE_DIR",
                router.host, router.listen
            )))
        }
        _ => Ok(()),
    }
}

fn unreachable(app: &App, why: &str) -> Fault {
    let Some(addr) = &app.global.router else { return Fault::unreachable(why) };
    if let Some(holder) = addr.parse().ok().and_then(drover_service::who_listens) {
        let fault =
            Fault::new(Exit::Unreachable, format!("{holder} listens on {addr} and does not answer as a router: {why}"));
        if holder.starts_with("a program of uid ") {
            return fault.hint(
                "if it is another user's router, it refuses you until its security.allow_uids lists you; leave out --router to use your own",
            );
        }
        return fault
            .hint("--router wants the gRPC port of a router, 7950 unless it was taken; leave it out to use your own");
    }
    let fault = Fault::new(Exit::Unreachable, format!("cannot reach the router at {addr}: {why}"));
    if addr.ends_with(":8765") {
        fault.hint("8765 is the JSON-line port; --router wants the router's gRPC port, 7950 unless it was taken")
    } else {
        fault.hint("look whether it runs there (`drover doctor` on that host), or leave out --router to use your own")
    }
}

/// Something answered, but not the way a router does.
fn refused(app: &App, status: &Status) -> Fault {
    let mut fault = Fault::of_status(status);
    if fault.code == Some(ErrorCode::VersionMismatch) {
        let who = app.global.router.as_deref().unwrap_or("the router's address");
        fault.message = format!("what answers at {who} is no router of this version");
        fault =
            fault.hint("it may be another daemon's port, or a router of another version: `drover doctor` tells which");
    }
    fault
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_release_fits_and_a_minor_one_does_not() {
        let mut parts = drover_types::VERSION.split('.').map(|part| part.parse::<u32>().unwrap());
        let (major, minor) = (parts.next().unwrap(), parts.next().unwrap());
        assert!(fits(&format!("{major}.{minor}.99")));
        assert!(!fits(&format!("{major}.{}.0", minor + 1)) && !fits("") && !fits("nonsense"));
    }
}
