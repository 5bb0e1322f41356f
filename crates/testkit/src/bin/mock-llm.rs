//! The mock of model providers as a program: `mock-llm [--listen ADDR] [--settings JSON]`.
//!
//! Prints `MOCK LLM READY host:port` once it listens, then serves until it is killed.

use std::io::Write as _;
use std::net::SocketAddr;

use anyhow::Context as _;
use clap::Parser;
use drover_testkit::mock_llm::{MockLlm, Settings};

/// A mock of model providers for tests and measurements: no model is behind it. It speaks the formats of OpenAI and Groq
/// (`/v1/chat/completions`, `/openai/v1/chat/completions`), Anthropic (`/v1/messages`) and Gemini
/// (`/v1beta/models/...:generateContent`), and keeps a ledger of calls and money at `/__mock/ledger`.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Address to listen on; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Settings as JSON, such as '{"latency_ms":200}'; `GET /__mock/settings` shows all of them.
    #[arg(long, default_value = "{}")]
    settings: String,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let settings: Settings = serde_json::from_str(&args.settings).context("--settings is no JSON of settings")?;
    let mock = MockLlm::start_on(args.listen, settings)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "MOCK LLM READY {}", mock.addr())?;
    out.flush()?;
    drop(out);
    mock.join();
    Ok(())
}
