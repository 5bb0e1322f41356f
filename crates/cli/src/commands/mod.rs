//! One module per command.

mod approvals;
mod ask;
mod attach;
mod audit;
pub(crate) mod connect;
mod demo;
mod dispatch;
mod doctor;
mod down;
mod drain;
mod events;
mod fetch;
mod follow;
mod handoff;
mod inject;
mod interrupt;
mod keys;
mod launch;
mod list;
mod members;
mod pki;
mod research;
mod send;
mod sessions;
mod setup;
mod site;
mod site_codex;
mod skill;
mod spend;
mod status;
mod terminate;
mod up;
mod why;

use crate::app::App;
use crate::args::Command;
use crate::fault::{Exit, Fault};

/// Carries out a command.
pub(crate) async fn run(app: &App, command: Command) -> anyhow::Result<Exit> {
    match command {
        Command::Demo(args) => Box::pin(demo::run(app, args)).await,
        Command::Up(args) => up::run(app, args).await,
        Command::Down => down::run(app).await,
        Command::Launch(args) => launch::run(app, args).await,
        Command::Inject(args) => inject::run(app, args).await,
        Command::List(args) => list::run(app, &args).await,
        Command::Status(args) => status::run(app, &args).await,
        Command::Attach(args) => attach::run(app, &args).await,
        Command::Terminate(args) => terminate::run(app, &args).await,
        Command::Events(args) => events::run(app, &args).await,
        Command::Approvals(args) => approvals::list(app, &args).await,
        Command::Approve(args) => approvals::approve(app, &args).await,
        Command::Audit(args) => audit::run(app, &args),
        Command::Interrupt(args) => interrupt::run(app, &args).await,
        Command::Why(args) => why::run(app, &args).await,
        Command::Members(args) => members::run(app, &args).await,
        Command::Sessions(args) => sessions::run(app, &args).await,
        Command::Send(args) => send::run(app, args).await,
        Command::Handoff(args) => handoff::run(app, &args).await,
        Command::Drain(args) => drain::run(app, &args).await,
        Command::Keys(args) => keys::run(app, args).await,
        Command::Pki(args) => pki::run(app, &args),
        Command::Dispatch(args) => dispatch::run(app, args).await,
        Command::Research(args) => research::run(app, &args).await,
        Command::Ask(args) => ask::run(app, &args).await,
        Command::Fetch(args) => fetch::run(app, &args).await,
        Command::Spend(args) => spend::run(app, &args).await,
        Command::Setup(args) => setup::run(app, args).await,
        Command::Skill(args) => skill::run(app, &args),
        Command::Doctor(args) => doctor::run(app, &args).await,
        Command::Site(args) => site::run(app, args).await,
        // These need no runtime and are carried out before there is one.
        Command::Daemon(_) | Command::Connect(_) | Command::Completions(_) | Command::Manual(_) => Ok(Exit::Usage),
    }
}

impl Command {
    /// Answers Ctrl-C itself: it has something to say or to clean up.
    pub(crate) fn tidies_up(&self) -> bool {
        matches!(
            self,
            Self::Demo(_)
                | Self::Up(_)
                | Self::Launch(_)
                | Self::Inject(_)
                | Self::Send(_)
                | Self::Drain(_)
                | Self::Attach(_)
                | Self::Events(_)
                | Self::Members(_)
                | Self::Dispatch(_)
                | Self::Terminate(_)
        )
    }
}

/// A fresh name for a request that may have to be repeated.
fn request_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// Begins a W3C trace that covers the request and everything that comes of it.
fn traceparent() -> String {
    let span = uuid::Uuid::new_v4().simple().to_string();
    format!("00-{}-{}-01", uuid::Uuid::new_v4().simple(), &span[..16])
}

/// Now, in milliseconds of Unix time.
fn now_ms() -> u64 {
    drover_service::now_us() / 1000
}

/// Text of an argument where `-` means standard input.
fn text_or_stdin(text: &str) -> Result<String, Fault> {
    if text != "-" {
        return Ok(text.to_owned());
    }
    let mut all = String::new();
    std::io::Read::read_to_string(&mut std::io::stdin(), &mut all).map_err(|error| {
        Fault::failed(format!("cannot read the prompt from standard input: {error}"))
            .hint("a prompt is UTF-8 text; larger or other things belong into files of the nodes' working directory")
    })?;
    Ok(all)
}

/// A request with a longer prompt would not reach the router at all; what does, it judges itself.
const LONGEST_PROMPT: usize = drover_service::MAX_MESSAGE_BYTES / 2;

/// Refuses a prompt that no request can carry.
fn carriable(prompt: String) -> Result<String, Fault> {
    if prompt.len() <= LONGEST_PROMPT {
        return Ok(prompt);
    }
    let mut fault = Fault::failed(format!("the prompt has {} bytes, more than any request can carry", prompt.len()));
    fault.code = Some(drover_types::ErrorCode::InvalidRequest);
    Err(fault.hint("put large texts into files of the nodes' working directory"))
}

/// The nodes meant by repeated `--node`, in order and each once. Empty means all.
fn nodes_of(swarm: &drover_proto::router::Swarm, asked: &[u32]) -> Result<Vec<u32>, Fault> {
    let mut nodes = asked.to_vec();
    nodes.sort_unstable();
    nodes.dedup();
    match nodes.last() {
        Some(&last) if last >= swarm.node_count => {
            let valid = match swarm.node_count {
                1 => "its only node is 0".to_owned(),
                count => format!("its nodes are 0 to {}", count - 1),
            };
            let mut fault = Fault::failed(format!("swarm {} has no node {last}: {valid}", swarm.swarm_id));
            fault.code = Some(drover_types::ErrorCode::NodeOutOfRange);
            Err(fault.hint(format!("drover status {}", swarm.swarm_id)))
        }
        _ => Ok(nodes),
    }
}
