//! Arguments of the commands that ask models: tasks, research, money and the way there.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::values::{dollars, price};

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
    /// No subject begins a phase (search, fetch, analyze) before all have ended the one before it
    #[arg(long)]
    pub(crate) barrier: bool,
    /// Go on with a run that was stopped, given the same subjects: what was answered is not asked again
    #[arg(long, value_name = "RUN")]
    pub(crate) resume: Option<String>,
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
    /// No subject begins a phase before all have ended the one before it, whatever the plan says
    #[arg(long)]
    pub(crate) barrier: bool,
    /// Go on with a run that was stopped, given the same request: what was answered is not asked again
    #[arg(long, value_name = "RUN")]
    pub(crate) resume: Option<String>,
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
