//! A fake of `codex app-server`, for tests that need many of them or none of the real weight. It is not codex, and says so.
//!
//! It speaks the part of the protocol that drover uses, keeps its threads below `$CODEX_HOME/fake-threads`, one writer
//! each, and obeys the directives of [`drover_testkit::directive`] without any model behind it. Like the real one it treats
//! a second `turn/start` as steering and leaves the command of an interrupted turn running until it is told to clean up.
//!
//! Before it carries a prompt out it appends one line to `$CODEX_HOME/fake-ledger.jsonl` and brings it to disk:
//! `{"injection_id", "ts", "length", "head", "thread_id", "turn_id"}`. Whoever wants to know whether a prompt was ever
//! carried out twice reads that file.

mod server;
mod turn;

use std::io::BufRead as _;
use std::path::PathBuf;
use std::process::ExitCode;

const NAME: &str = "fake-app-server";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.iter().any(|arg| arg == "--version") {
        let version = env!("CARGO_PKG_VERSION");
        return say(&mut std::io::stdout(), &format!("{NAME} {version} (a fake for tests, not codex)"), 0);
    }
    if args.last().map(String::as_str) != Some("app-server") {
        return say(&mut std::io::stderr(), &format!("usage: {NAME} [-c KEY=VALUE]... app-server"), 2);
    }
    let Some(home) = std::env::var_os("CODEX_HOME").map(PathBuf::from).filter(|home| home.is_dir()) else {
        return say(&mut std::io::stderr(), "CODEX_HOME must be an existing directory", 1);
    };
    let server = server::Server::new(home);
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        if !line.trim().is_empty() {
            server.take(&line);
        }
    }
    // The end of its input is the end of the fake and of all that it has started.
    server.kill_commands();
    ExitCode::SUCCESS
}

fn say(to: &mut dyn std::io::Write, text: &str, code: u8) -> ExitCode {
    // Nobody is there to hear of a failure here.
    drop(writeln!(to, "{text}"));
    ExitCode::from(code)
}
