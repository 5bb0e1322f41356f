//! The mock Responses API as a program: `mock-responses [--listen ADDR] [--api-key KEY]`.
//!
//! Prints `MOCK RESPONSES READY host:port` once it listens, then serves until it is killed.

use std::io::Write as _;
use std::net::SocketAddr;

use clap::Parser;
use drover_testkit::mock_responses::MockResponses;

/// A mock of the OpenAI Responses API for tests. It answers as the directives in the prompt say; no model is behind it.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Address to listen on; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Refuse requests that do not carry this key.
    #[arg(long)]
    api_key: Option<String>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mock = MockResponses::start_on(args.listen, args.api_key)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "MOCK RESPONSES READY {}", mock.addr())?;
    out.flush()?;
    drop(out);
    mock.join();
    Ok(())
}
