//! What single arguments may be, and what is said of those that may not.

use std::fmt::Write as _;

use clap::builder::PossibleValuesParser;
use drover_types::AgentKind;

pub(super) fn agents() -> PossibleValuesParser {
    PossibleValuesParser::new(AgentKind::ALL.iter().map(|agent| agent.as_str()))
}

pub(super) fn daemon_help() -> String {
    let mut text = "Daemons:\n".to_owned();
    for daemon in crate::daemons::ALL {
        let _ = writeln!(text, "  {:<17}{}", daemon.name, daemon.about);
    }
    text.push_str("\nExample:\n  drover daemon router --listen 127.0.0.1:0");
    text
}

pub(super) fn host_port(text: &str) -> Result<String, String> {
    let wrong = || format!("expected HOST:PORT such as 127.0.0.1:7950, got {text:?}");
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    if host.is_empty() || port.parse::<u16>().map_or(true, |port| port == 0) {
        return Err(wrong());
    }
    Ok(text.to_owned())
}

pub(super) fn price(text: &str) -> Result<(f64, f64), String> {
    let wrong = || format!("expected IN:OUT in US dollars per million tokens, such as 0.10:0.40, got {text:?}");
    let (input, output) = text.split_once(':').ok_or_else(wrong)?;
    let number = |text: &str| dollars(text).map_err(|_| wrong());
    Ok((number(input)?, number(output)?))
}

pub(super) fn dollars(text: &str) -> Result<f64, String> {
    let amount: Option<f64> = text.trim().parse().ok().filter(|amount: &f64| amount.is_finite() && *amount >= 0.0);
    amount.ok_or_else(|| format!("expected an amount of US dollars such as 2.50, got {text:?}"))
}

pub(super) fn node_index(text: &str) -> Result<u32, String> {
    text.parse().map_err(|_| "nodes are numbered from 0; `drover status SWARM` shows them".to_owned())
}

pub(super) fn key_id(text: &str) -> Result<u8, String> {
    let wrong = || format!("{text:?} is no key id; `drover keys list` shows them, such as 5e");
    if text.len() == 2 { u8::from_str_radix(text, 16).map_err(|_| wrong()) } else { Err(wrong()) }
}

pub(super) fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("expected KEY=VALUE, got {text:?}")),
    }
}
