//! The command line. Each command's help ends with an example that can be pasted.

mod access;
mod dispatch;
mod sessions;
mod site;
mod swarms;
mod values;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub(crate) use access::*;
pub(crate) use dispatch::*;
pub(crate) use sessions::*;
pub(crate) use site::*;
pub(crate) use swarms::*;
use values::{daemon_help, host_port};

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
