//! The command line. Each command's help ends with an example that can be pasted.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::{Args, Parser, Subcommand};
use drover_types::AgentKind;

/// Launches swarms of coding agents, sends them prompts and shows what they answer
#[derive(Debug, Parser)]
#[command(name = "drover", version = drover_types::VERSION, max_term_width = 100, after_help = "\
Try it, with no keys and no cluster:  drover demo
Then:                                 drover launch --nodes 4 --agent echo
                                      drover inject SWARM --prompt \"Optimize GEMM tiling.\"

Exit codes: 0 done, 1 failed, 2 usage, 69 cannot reach a daemon, 78 bad configuration.
State is kept in $DROVER_STATE_DIR [default: $XDG_STATE_HOME/drover].")]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every command takes.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Global {
    /// Configuration file (YAML or JSON) for this command and for the daemons it starts
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "DROVER_CONFIG",
        hide_env_values = true,
        help_heading = "Everywhere"
    )]
    pub(crate) config: Option<PathBuf>,
    /// Router to talk to (its gRPC port), instead of the one of the state directory
    #[arg(long, global = true, value_name = "HOST:PORT", value_parser = host_port, help_heading = "Everywhere")]
    pub(crate) router: Option<String>,
    /// Print JSON: one document, or JSON Lines where a command streams
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub(crate) json: bool,
    /// Do not start daemons that are not running
    #[arg(long, global = true, help_heading = "Everywhere")]
    pub(crate) no_start: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show everything once, on this machine: no keys, no cluster, 30 seconds at most
    #[command(after_help = "Example:\n  drover demo")]
    Demo(Demo),
    /// Run all daemons in the foreground and restart what dies
    #[command(after_help = "Example:\n  drover up --nodes 4 --agent echo")]
    Up(Up),
    /// Stop the daemons of the state directory; swarms go on
    #[command(after_help = "Example:\n  drover down")]
    Down,
    /// Launch a swarm and follow it until every node has answered its first prompt
    #[command(after_help = "\
Examples:
  drover launch --nodes 4 --agent echo
  drover launch --nodes 4 --partition mi2508x --time 00:10:00 \\
      --prompt \"You are a focused autonomous agent.\" --config configs/hpcfund.json")]
    Launch(Launch),
    /// Send a prompt to a swarm, stream the answers and wait for the turns to end
    #[command(after_help = "\
Examples:
  drover inject 6c1f --prompt \"Optimize GEMM tiling.\"
  git diff | drover inject 6c1f --node 0 --prompt -")]
    Inject(Inject),
    /// List the swarms
    #[command(after_help = "Example:\n  drover list --json")]
    List(List),
    /// Show a swarm and its nodes
    #[command(after_help = "Example:\n  drover status 6c1f")]
    Status(Swarm),
    /// Follow a swarm: everything its nodes say, until Ctrl-C
    #[command(after_help = "Example:\n  drover attach 6c1f")]
    Attach(Attach),
    /// End a swarm
    #[command(after_help = "Example:\n  drover terminate 6c1f")]
    Terminate(Terminate),
    /// Print events of the log, and live ones with --follow
    #[command(after_help = "\
Examples:
  drover events --since 0
  drover events --follow --json --swarm 6c1f")]
    Events(Events),
    /// List commands and file changes that wait for an answer
    #[command(after_help = "Example:\n  drover approvals")]
    Approvals(Approvals),
    /// Answer an approval
    #[command(after_help = "Examples:\n  drover approve 91ce\n  drover approve 91ce --decline")]
    Approve(Approve),
    /// Show who changed what: every command that the router was given and that is no mere look
    #[command(
        after_help = "Examples:\n  drover audit\n  drover audit --user 1002 --last 20\n  drover audit --all --json"
    )]
    Audit(Audit),
    /// Interrupt the running turns of a swarm, or withdraw a waiting prompt
    #[command(after_help = "Example:\n  drover interrupt 6c1f --node 2")]
    Interrupt(Interrupt),
    /// Say why a swarm, a node, an injection or a session is where it is
    #[command(after_help = "Examples:\n  drover why 6c1f\n  drover why 6c1f/2\n  drover why notes")]
    Why(Why),
    /// Show who is there: every node as the other nodes see it, with its state and load
    #[command(after_help = "Examples:\n  drover members\n  drover members --watch\n  drover members 6c1f --json")]
    Members(Members),
    /// List the sessions: conversations, and the node on which each lives
    #[command(after_help = "Examples:\n  drover sessions\n  drover sessions notes\n  drover sessions --all --json")]
    Sessions(Sessions),
    /// Say something in a session and stream the answer; the session is opened when the id is new
    #[command(after_help = "\
A session is a conversation that may move to another node while it goes on. What is said is
answered once: said again with the same --request, it is the same turn.

Examples:
  drover send notes --prompt \"Remember the word heliotrope.\"
  drover send notes --prompt \"Which word was it?\"
  git diff | drover send review --agent codex --prompt -")]
    Send(SendArgs),
    /// Move a session to another node, while it goes on
    #[command(after_help = "Examples:\n  drover handoff notes\n  drover handoff notes --to 6c1f/2")]
    Handoff(Handoff),
    /// Move all sessions away from a node, and let it take no new ones
    #[command(after_help = "Examples:\n  drover drain 6c1f/0\n  drover drain 6c1f/0 --undo")]
    Drain(Drain),
    /// Show and change the ring of keys that the nodes' gossip is sealed with
    #[command(after_help = "\
A key is changed in three steps, and each waits until nobody is cut off by it:
  drover keys add                 every node can read what is sealed with it
  drover keys use 5e              every node seals with it
  drover keys remove a1           nobody takes the old one any more")]
    Keys(Keys),
    /// Make, list, renew and revoke the certificates by which nodes of this instance know each other
    #[command(after_help = "\
Launches issue what their nodes need, and renew it. These are for hosts outside of swarms and for thefts:
  drover pki issue spare/0 --to DIR   an identity for a daemon's --identity DIR
  drover pki revoke 6c1f.../2          no node takes it any more
  drover pki rotate                    fresh keys for every node of this host, while they run")]
    Pki(Pki),
    /// Have many prompts answered at once, as fast as limits and money allow
    #[command(after_help = "\
A file has one prompt a line, or one JSON object a line, such as
  {\"id\": \"q1\", \"prompt\": \"Sum up: ...\", \"system\": \"Be brief.\", \"max_tokens\": 200}
with any of: id, prompt, system, kind, url, max_tokens, temperature, schema, priority, deadline_ms, hedge, cache.

Examples:
  drover dispatch prompts.txt --provider sim
  drover dispatch tasks.jsonl --json > results.jsonl
  drover dispatch tasks.jsonl --resume 1a2b3c4d
  git ls-files | sed 's/^/What may this file be for: /' | drover dispatch - --unordered")]
    Dispatch(Dispatch),
    /// Find something out about many subjects at once: search, read, and let a model answer for each
    #[command(after_help = "\
Every answer says what it rests on. Without a search engine (node_scaling.search) it rests on nothing, and says so.

Examples:
  drover research OpenAI Anthropic \"Google DeepMind\" --topic \"products and prices\"
  drover research Merino Cheviot --provider sim --json")]
    Research(Research),
    /// Have a request in plain words planned, researched and answered
    #[command(after_help = "\
Examples:
  drover ask \"Research the top 5 AI companies and compare their products\"
  drover ask --dry-run \"Compare the three largest sheep breeds\"")]
    Ask(Ask),
    /// Show what a worker sees of a web page, or why it does not read it
    #[command(after_help = "\
Only pages of the public internet are read, as their sites' robots.txt allow. node_scaling.fetch.allow lists hosts of your
own network that may be read too.

Examples:
  drover fetch https://example.org/
  drover fetch https://example.org/ --json")]
    Fetch(Fetch),
    /// Show what model calls cost, and what is left of the day's cap
    #[command(after_help = "Examples:\n  drover spend\n  drover spend --days 30 --json")]
    Spend(Spend),
    /// Set a model provider up: write the configuration, find the key, see with one call that it works
    #[command(after_help = "\
A key comes from the provider's variable, from a file that only you can read, or from standard
input; never from the command line, which everybody on the machine can see. On a terminal what is
left out is asked for.

Examples:
  drover setup --list
  drover setup --provider gemini
  drover setup --provider openai --model gpt-4o-mini --key-stdin < key.txt
  drover setup --provider local --base-url http://127.0.0.1:8000/v1 --model my-model --price 0:0
  drover setup --provider sim --json")]
    Setup(Setup),
    /// Teach an agent such as Clawdbot, OpenClaw or Codex to use drover
    #[command(
        after_help = "Examples:\n  drover skill install\n  drover skill install --to ~/.codex/skills\n  drover skill show"
    )]
    Skill(Skill),
    /// Check this machine, the configuration and the daemons, and say what to do
    #[command(after_help = "Examples:\n  drover doctor\n  drover doctor --fix")]
    Doctor(Doctor),
    /// Run one daemon of this file in the foreground
    #[command(after_help = daemon_help())]
    Daemon(DaemonArgs),
    /// Internal: connect standard input and output to an address, where a login host forbids the forwarding of ports
    #[command(hide = true, after_help = "Example:\n  ssh login bin/drover connect 127.0.0.1:7952")]
    Connect(Connect),
    /// Internal: what a drover elsewhere asks of the one that it has placed on a cluster
    #[command(hide = true, after_help = "Example:\n  ssh login bin/drover site probe --dir shared")]
    Site(Site),
    /// Print a completion script for a shell
    #[command(after_help = "Example:\n  source <(drover completions bash)")]
    Completions(Completions),
    /// Write the manual pages of every command and daemon into a directory
    #[command(hide = true, after_help = "Example:\n  drover manual share/man/man1")]
    Manual(Manual),
}

#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Agent to show; without it codex when it is ready to use and answers in time, else echo
    #[arg(long, value_name = "AGENT", value_parser = agents())]
    pub(crate) agent: Option<String>,
    /// Number of nodes
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) nodes: u32,
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    /// Also launch a local swarm of so many nodes; it ends with this command
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) nodes: Option<u32>,
    /// Agent of that swarm
    #[arg(long, value_name = "AGENT", value_parser = agents(), requires = "nodes")]
    pub(crate) agent: Option<String>,
    /// First prompt of that swarm
    #[arg(long, value_name = "P", requires = "nodes")]
    pub(crate) prompt: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Launch {
    /// Number of nodes
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) nodes: u32,
    /// First prompt, sent to every node; `-` reads it from standard input
    #[arg(long, value_name = "P", default_value = "", hide_default_value = true)]
    pub(crate) prompt: String,
    /// Slurm partition
    #[arg(long, value_name = "P")]
    pub(crate) partition: Option<String>,
    /// Slurm time limit, such as 00:10:00
    #[arg(long, value_name = "T")]
    pub(crate) time: Option<String>,
    /// Slurm account
    #[arg(long, value_name = "A")]
    pub(crate) account: Option<String>,
    /// Slurm quality of service
    #[arg(long, value_name = "Q")]
    pub(crate) qos: Option<String>,
    /// Where to launch: an id of the catalogue; without it the first
    #[arg(long, value_name = "C", alias = "provider")]
    pub(crate) cluster: Option<String>,
    /// Agent that the nodes run; without it worker.agent of the configuration
    #[arg(long, value_name = "AGENT", value_parser = agents())]
    pub(crate) agent: Option<String>,
    /// AGENTS.md for the nodes, or a directory with AGENTS.md and skills
    #[arg(long, value_name = "PATH")]
    pub(crate) agents_md: Option<PathBuf>,
    /// Further parameter of the backend
    #[arg(long = "param", value_name = "KEY=VALUE", value_parser = key_value, alias = "provider-param")]
    pub(crate) params: Vec<(String, String)>,
    /// Return when the swarm is up, without waiting for answers; implied by --json
    #[arg(long)]
    pub(crate) detach: bool,
    /// Print what would be launched and where, and launch nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct List {
    /// Only jobs on clusters that look like ours and are of no swarm of this instance
    #[arg(long)]
    pub(crate) orphans: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Inject {
    /// Swarm id, an unambiguous beginning of it, or `last`
    pub(crate) swarm: String,
    /// The prompt; `-` reads it from standard input
    #[arg(long, value_name = "P", required_unless_present = "prompt_file")]
    pub(crate) prompt: Option<String>,
    /// File that holds the prompt
    #[arg(long, value_name = "F", conflicts_with = "prompt")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// Index of a node, from 0; may be repeated. Without it every node
    #[arg(long = "node", value_name = "I", value_parser = node_index, allow_negative_numbers = true)]
    pub(crate) nodes: Vec<u32>,
    /// Add to the running turn instead of waiting for its end
    #[arg(long)]
    pub(crate) steer: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Swarm {
    /// Swarm id, an unambiguous beginning of it, or `last`
    pub(crate) swarm: String,
}

#[derive(Debug, Args)]
pub(crate) struct Attach {
    /// Swarm id, an unambiguous beginning of it, or `last`
    pub(crate) swarm: String,
    /// Begin behind this sequence number; 0 is the first. Without it begin now
    #[arg(long, value_name = "SEQ")]
    pub(crate) since: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct Terminate {
    /// Swarm id, an unambiguous beginning of it, or `last`
    pub(crate) swarm: String,
    /// Do not wait for running turns
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Begin behind this sequence number; 0 is the first. Without it: the first, or now with --follow
    #[arg(long, value_name = "SEQ")]
    pub(crate) since: Option<u64>,
    /// Stay and print events as they come
    #[arg(long)]
    pub(crate) follow: bool,
    /// Only events of this swarm
    #[arg(long, value_name = "SWARM")]
    pub(crate) swarm: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Audit {
    /// How many of the last commands
    #[arg(long, value_name = "N", default_value_t = 50, conflicts_with = "all")]
    pub(crate) last: usize,
    /// All that were ever written down
    #[arg(long)]
    pub(crate) all: bool,
    /// Only of this user, by id
    #[arg(long, value_name = "UID")]
    pub(crate) user: Option<u32>,
    /// Only of this swarm, by its id or a beginning of it
    #[arg(long, value_name = "SWARM")]
    pub(crate) swarm: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Approvals {
    /// Only of this swarm
    pub(crate) swarm: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Approve {
    /// Approval id, or an unambiguous beginning of it
    pub(crate) id: String,
    /// Say no
    #[arg(long, conflicts_with = "session")]
    pub(crate) decline: bool,
    /// Say yes, also to the same command later in the agent's session
    #[arg(long)]
    pub(crate) session: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Interrupt {
    /// Swarm id, an unambiguous beginning of it, or `last`
    pub(crate) swarm: String,
    /// Index of a node, from 0; may be repeated. Without it every node
    #[arg(long = "node", value_name = "I", value_parser = node_index, allow_negative_numbers = true)]
    pub(crate) nodes: Vec<u32>,
    /// Only this injection, running or waiting
    #[arg(long, value_name = "ID")]
    pub(crate) injection: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Why {
    /// SWARM, SWARM/INDEX, an injection id or a session; `last` is the swarm that was launched last
    #[arg(value_name = "SWARM|NODE|INJECTION|SESSION")]
    pub(crate) subject: String,
}

#[derive(Debug, Args)]
pub(crate) struct Members {
    /// Only of this swarm
    pub(crate) swarm: Option<String>,
    /// Stay and show changes as they come
    #[arg(long)]
    pub(crate) watch: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Sessions {
    /// Show what was said in this one
    pub(crate) session: Option<String>,
    /// Those that are over, too
    #[arg(long)]
    pub(crate) all: bool,
    /// End the session once its turns are answered
    #[arg(long, requires = "session")]
    pub(crate) end: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SendArgs {
    /// Session: letters, digits, `-`, `_` and `.`
    pub(crate) session: String,
    /// What is said; `-` reads it from standard input
    #[arg(long, value_name = "P", required_unless_present = "prompt_file")]
    pub(crate) prompt: Option<String>,
    /// File that holds what is said
    #[arg(long, value_name = "F", conflicts_with = "prompt")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// Agent of a new session; without it the one that nodes are configured with
    #[arg(long, value_name = "AGENT", value_parser = agents())]
    pub(crate) agent: Option<String>,
    /// What a node of a new session must be able to do, as `drover members` shows it; may be repeated
    #[arg(long = "needs", value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) needs: Vec<(String, String)>,
    /// Something to be known of a new session; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = key_value)]
    pub(crate) labels: Vec<(String, String)>,
    /// A node's own door instead of the router; may be repeated, and the next is taken when one fails
    #[arg(long = "entry", value_name = "HOST:PORT", value_parser = host_port)]
    pub(crate) entries: Vec<String>,
    /// Name of this turn; said again under the same name it is the same turn. Without it a fresh one
    #[arg(long, value_name = "ID")]
    pub(crate) request: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Handoff {
    /// Session
    pub(crate) session: String,
    /// Node that is to have it, such as 6c1f/2; without it the one that suits best
    #[arg(long, value_name = "NODE")]
    pub(crate) to: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Drain {
    /// Node, as `drover members` shows it, such as 6c1f/0
    pub(crate) node: String,
    /// Let it take sessions again
    #[arg(long)]
    pub(crate) undo: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Keys {
    #[command(subcommand)]
    pub(crate) action: KeyAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeyAction {
    /// List the keys, and how many nodes have each
    #[command(after_help = "Example:\n  drover keys list --json")]
    List,
    /// Add a key that nodes can read with from now on
    #[command(after_help = "Example:\n  drover keys add")]
    Add(KeyAdd),
    /// Let all nodes seal with a key; refused while a node that is alive does not have it
    #[command(after_help = "Example:\n  drover keys use 5e")]
    Use(KeyNamed),
    /// Let all nodes forget a key; refused while one of them seals with it
    #[command(after_help = "Example:\n  drover keys remove a1")]
    Remove(KeyNamed),
}

#[derive(Debug, Args)]
pub(crate) struct Pki {
    #[command(subcommand)]
    pub(crate) action: PkiAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PkiAction {
    /// Make the authority of this instance, unless there is one: the first launch does so too
    #[command(after_help = "Example:\n  drover pki init")]
    Init,
    /// Issue an identity: a directory with key, certificate and whom to trust
    #[command(after_help = "Example:\n  drover pki issue spare/0 --to identity")]
    Issue(PkiIssue),
    /// List every certificate that was issued, and whether it is still good
    #[command(after_help = "Example:\n  drover pki list --json")]
    List,
    /// Put a fresh key and certificate into identities; daemons that run show them at their next connection
    #[command(after_help = "Examples:\n  drover pki rotate\n  drover pki rotate identity --revoke")]
    Rotate(PkiRotate),
    /// Revoke certificates for good: by node, by serial number
    #[command(after_help = "Example:\n  drover pki revoke spare/0")]
    Revoke(PkiRevoke),
}

#[derive(Debug, Args)]
pub(crate) struct PkiIssue {
    /// Whose it is: `SWARM/INDEX`, or any name for a host outside of swarms
    #[arg(value_name = "NODE")]
    pub(crate) node: String,
    /// The directory to make
    #[arg(long, value_name = "DIR")]
    pub(crate) to: PathBuf,
    /// How long it is good
    #[arg(long, value_name = "DAYS", default_value_t = 90, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub(crate) days: u32,
}

#[derive(Debug, Args)]
pub(crate) struct PkiRotate {
    /// Identity directories; without any: those of all nodes whose files this host has
    #[arg(value_name = "DIR")]
    pub(crate) dirs: Vec<PathBuf>,
    /// Also revoke what these nodes had before
    #[arg(long)]
    pub(crate) revoke: bool,
    /// How long the new ones are good
    #[arg(long, value_name = "DAYS", default_value_t = 90, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub(crate) days: u32,
}

#[derive(Debug, Args)]
pub(crate) struct PkiRevoke {
    /// Nodes, or serial numbers of `drover pki list`
    #[arg(value_name = "NODE|SERIAL", required = true)]
    pub(crate) names: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct KeyAdd {
    /// File with the key: 64 hexadecimal digits. Without it a fresh one is made
    #[arg(long, value_name = "FILE")]
    pub(crate) key_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct KeyNamed {
    /// Id of the key: two hexadecimal digits of `drover keys list`
    #[arg(value_parser = key_id)]
    pub(crate) id: u8,
    /// Also when nodes are cut off by it until they have caught up
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Dispatch {
    /// File with the tasks; `-` is standard input. Without it the file that the run to resume began with
    #[arg(value_name = "FILE|-", required_unless_present_any = ["resume", "runs"])]
    pub(crate) file: Option<String>,
    /// Most tasks at once; the limits of the configuration hold all the same
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) concurrency: Option<u32>,
    /// Go on with this run: what it has answered is not asked, and not paid for, again
    #[arg(long, value_name = "RUN", conflicts_with = "run")]
    pub(crate) resume: Option<String>,
    /// Name of the run; without it a fresh one
    #[arg(long, value_name = "RUN")]
    pub(crate) run: Option<String>,
    /// Print results as they come, not in the order of the tasks
    #[arg(long)]
    pub(crate) unordered: bool,
    /// Provider to ask instead of the configured one; `sim` only pretends, and needs no key
    #[arg(long, value_name = "NAME")]
    pub(crate) provider: Option<String>,
    /// Model to ask instead of the configured one
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// List the runs instead
    #[arg(long, conflicts_with_all = ["file", "resume", "run"])]
    pub(crate) runs: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Research {
    /// About whom or what
    #[arg(value_name = "SUBJECT", required = true)]
    pub(crate) subjects: Vec<String>,
    /// What is to be found out about each; without it an overview
    #[arg(long, value_name = "T")]
    pub(crate) topic: Option<String>,
    #[command(flatten)]
    pub(crate) whose: WhoseModel,
}

#[derive(Debug, Args)]
pub(crate) struct Ask {
    /// What is wanted, in plain words; `-` reads it from standard input
    #[arg(value_name = "REQUEST")]
    pub(crate) request: String,
    /// Show the plan and what it can cost at most, and end there
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Show what was found about each subject, too
    #[arg(long)]
    pub(crate) findings: bool,
    #[command(flatten)]
    pub(crate) whose: WhoseModel,
}

/// Whose model answers.
#[derive(Debug, Clone, Args)]
pub(crate) struct WhoseModel {
    /// Provider to ask instead of the configured one; `sim` only pretends, and needs no key
    #[arg(long, value_name = "NAME")]
    pub(crate) provider: Option<String>,
    /// Model to ask instead of the configured one
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Fetch {
    /// The page
    #[arg(value_name = "URL")]
    pub(crate) url: String,
}

#[derive(Debug, Args)]
pub(crate) struct Spend {
    /// How many days to show
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) days: u32,
}

#[derive(Debug, Args)]
pub(crate) struct Setup {
    /// Provider: gemini, groq, openai, anthropic, sim, or any name together with --base-url
    #[arg(long, value_name = "NAME")]
    pub(crate) provider: Option<String>,
    /// Its model; without it the cheapest that is known
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// Address of the provider, or of any server that speaks like OpenAI's
    #[arg(long, value_name = "URL")]
    pub(crate) base_url: Option<String>,
    /// Environment variable that holds the key, instead of the provider's usual one
    #[arg(long, value_name = "VARIABLE", conflicts_with_all = ["key_file", "key_stdin"])]
    pub(crate) api_key_env: Option<String>,
    /// File that holds the key and that only its owner can read (mode 0600)
    #[arg(long, value_name = "FILE", conflicts_with = "key_stdin")]
    pub(crate) key_file: Option<PathBuf>,
    /// Read the key from standard input, and keep it in a file of mode 0600
    #[arg(long)]
    pub(crate) key_stdin: bool,
    /// What the model costs, in US dollars per million tokens of input and of output, where the table does not know it
    #[arg(long, value_name = "IN:OUT", value_parser = price)]
    pub(crate) price: Option<(f64, f64)>,
    /// Most workers at once; without it what this machine is good for
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_nodes: Option<u32>,
    /// Most calls to the provider at once [default: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_concurrent_api: Option<u32>,
    /// Most US dollars in a day [default: 5]
    #[arg(long, value_name = "USD", value_parser = dollars, conflicts_with = "no_cap")]
    pub(crate) max_daily_spend: Option<f64>,
    /// No cap on a day's spending
    #[arg(long)]
    pub(crate) no_cap: bool,
    /// Do not call the provider
    #[arg(long)]
    pub(crate) no_check: bool,
    /// File to write, instead of ~/.config/clawdbot/node-scaling.yaml
    #[arg(long, value_name = "FILE")]
    pub(crate) to: Option<PathBuf>,
    /// Replace a file that setup did not write; it is kept beside, as .bak
    #[arg(long)]
    pub(crate) force: bool,
    /// List the providers, and where their keys come from, instead
    #[arg(long, conflicts_with_all = ["provider", "model", "base_url", "to"])]
    pub(crate) list: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Skill {
    #[command(subcommand)]
    pub(crate) action: SkillAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SkillAction {
    /// Write the skill where agents look for skills
    #[command(after_help = "Examples:\n  drover skill install\n  drover skill install --to ~/.codex/skills")]
    Install(SkillInstall),
    /// Print the skill
    #[command(after_help = "Example:\n  drover skill show")]
    Show,
}

#[derive(Debug, Args)]
pub(crate) struct SkillInstall {
    /// Directory of an agent's skills; without it those of the agents that are set up here
    #[arg(long, value_name = "DIR")]
    pub(crate) to: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// Repair what can be repaired without harm
    #[arg(long)]
    pub(crate) fix: bool,
    /// Look at this entry of the catalogue; without it at the first, which launches use
    #[arg(long, value_name = "C", alias = "provider")]
    pub(crate) cluster: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct DaemonArgs {
    /// Which one
    pub(crate) name: String,
    /// Its own arguments; `drover daemon NAME --help` explains them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    pub(crate) args: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct Connect {
    /// Where to
    pub(crate) addr: std::net::SocketAddr,
}

#[derive(Debug, Args)]
pub(crate) struct Site {
    #[command(subcommand)]
    pub(crate) action: SiteAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SiteAction {
    /// See to it that an outbox follower runs on this host, and print where; its settings come as JSON on standard input
    Follower(SiteFollower),
    /// Print what this host is like, as JSON
    Probe(SiteProbe),
    /// Do something to the files of swarms on this host's shared file system: what, comes as JSON on standard input
    Ground(SiteFollower),
    /// Install codex into the shared file system, and print where
    Codex(SiteCodex),
}

#[derive(Debug, Args)]
pub(crate) struct SiteFollower {
    /// Directory on the shared file system that is drover's
    #[arg(long, value_name = "DIR")]
    pub(crate) base: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct SiteCodex {
    /// Directory on the shared file system that is drover's
    #[arg(long, value_name = "DIR")]
    pub(crate) base: PathBuf,
    /// Version
    #[arg(long, value_name = "V")]
    pub(crate) version: String,
    /// Archive of npm's directory to take it from; without it npm fetches it
    #[arg(long, value_name = "FILE")]
    pub(crate) from: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct SiteProbe {
    /// Directory to look at
    #[arg(long, value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// File below it that is to be seen
    #[arg(long, value_name = "NAME")]
    pub(crate) sees: Option<String>,
    /// Look for codex too
    #[arg(long)]
    pub(crate) codex: bool,
    /// Where codex is; without it where workers find it by themselves
    #[arg(long, value_name = "FILE", requires = "codex")]
    pub(crate) codex_bin: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Manual {
    /// Where to
    pub(crate) dir: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// Which shell
    #[arg(value_enum)]
    pub(crate) shell: Shell,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum Shell {
    Bash,
    Zsh,
    Fish,
}

fn agents() -> PossibleValuesParser {
    PossibleValuesParser::new(AgentKind::ALL.iter().map(|agent| agent.as_str()))
}

fn daemon_help() -> String {
    let mut text = "Daemons:\n".to_owned();
    for daemon in crate::daemons::ALL {
        let _ = writeln!(text, "  {:<17}{}", daemon.name, daemon.about);
    }
    text.push_str("\nExample:\n  drover daemon router --listen 127.0.0.1:0");
    text
}

fn host_port(text: &str) -> Result<String, String> {
    let wrong = || format!("expected HOST:PORT such as 127.0.0.1:7950, got {text:?}");
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    if host.is_empty() || port.parse::<u16>().map_or(true, |port| port == 0) {
        return Err(wrong());
    }
    Ok(text.to_owned())
}

fn price(text: &str) -> Result<(f64, f64), String> {
    let wrong = || format!("expected IN:OUT in US dollars per million tokens, such as 0.10:0.40, got {text:?}");
    let (input, output) = text.split_once(':').ok_or_else(wrong)?;
    let number = |text: &str| dollars(text).map_err(|_| wrong());
    Ok((number(input)?, number(output)?))
}

fn dollars(text: &str) -> Result<f64, String> {
    let amount: Option<f64> = text.trim().parse().ok().filter(|amount: &f64| amount.is_finite() && *amount >= 0.0);
    amount.ok_or_else(|| format!("expected an amount of US dollars such as 2.50, got {text:?}"))
}

fn node_index(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| "nodes are numbered from 0; `drover status SWARM` shows them".to_owned())
}

fn key_id(text: &str) -> Result<u8, String> {
    let wrong = || format!("{text:?} is no key id; `drover keys list` shows them, such as 5e");
    if text.len() == 2 { u8::from_str_radix(text, 16).map_err(|_| wrong()) } else { Err(wrong()) }
}

fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("expected KEY=VALUE, got {text:?}")),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_quick_start_of_the_founding_document_parses_as_written() {
        let line =
            "drover launch --nodes 4 --partition mi2508x --time 00:10:00 --prompt P --config ../configs/hpcfund.json";
        let cli = Cli::try_parse_from(line.split(' ')).unwrap();
        let Command::Launch(launch) = cli.command else { panic!("not a launch") };
        assert_eq!(
            (launch.nodes, launch.partition.as_deref(), launch.time.as_deref()),
            (4, Some("mi2508x"), Some("00:10:00"))
        );
        assert_eq!(cli.global.config, Some("../configs/hpcfund.json".into()));
    }

    #[test]
    fn every_command_shows_an_example() {
        for command in Cli::command().get_subcommands() {
            let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(after.contains("drover "), "{} has no example", command.get_name());
        }
    }

    #[test]
    fn a_router_address_needs_a_host_and_a_port() {
        for bad in ["7950", ":7950", "host:", "host:0", "host:70000"] {
            assert!(host_port(bad).is_err(), "{bad}");
        }
        assert!(host_port("127.0.0.1:7950").is_ok() && host_port("[::1]:7950").is_ok());
    }
}
