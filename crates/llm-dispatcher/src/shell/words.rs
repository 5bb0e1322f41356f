//! What the core says in numbers, in words for people: what happened, and which setting changes it.

use std::time::Duration;

use crate::call::FailureKind;
use crate::core::{Money, Reason, Refusal, Status, Warning};
use crate::shell::{Lane, Note};

/// Why nothing is searched whose price nobody knows.
pub(super) const NO_FEE: &str = "what a search costs is not known, so no cap can hold: set node_scaling.search.price (for gemini \
                                 also model_pricing of its model), or node_scaling.cost.allow_unknown_prices";

/// Why a task has no answer, and what to do; empty for one that has. `last` is what the provider said last.
pub(super) fn error_of(status: Status, last: Option<&str>, ledger: Option<&str>) -> String {
    match status {
        Status::Answered => String::new(),
        Status::Blocked => "the provider withholds the answer".to_owned(),
        Status::Cancelled => "cancelled".to_owned(),
        Status::Failed(reason) => failed(reason, last, ledger),
        Status::Refused(refusal) => refused(refusal, ledger),
    }
}

fn failed(reason: Reason, last: Option<&str>, ledger: Option<&str>) -> String {
    match reason {
        Reason::Call(kind) => {
            let said = last.map_or_else(|| format!("the call failed ({})", kind.as_str()), str::to_owned);
            match advice(kind) {
                "" => said,
                advice => format!("{said}: {advice}"),
            }
        }
        Reason::Deadline => match last {
            Some(said) => format!("the deadline came before an answer; the last call ended so: {said}"),
            None => "the deadline came before an answer".to_owned(),
        },
        Reason::Budget { needed, left } => budget(needed, left, ledger),
    }
}

fn refused(refusal: Refusal, ledger: Option<&str>) -> String {
    match refusal {
        Refusal::NoLane => "there is no provider for it: configure one in node_scaling.provider".to_owned(),
        Refusal::Duplicate => "it was handed in twice".to_owned(),
        Refusal::QueueFull { limit } => format!("{limit} tasks wait already: hand it in again later"),
        Refusal::Deadline { expected, allowed } => format!(
            "the answer would be there in about {} and is wanted in {}: allow more time, or raise \
             node_scaling.limits.max_concurrent_api",
            seconds(expected),
            seconds(allowed)
        ),
        Refusal::Budget { needed, left } => budget(needed, left, ledger),
        Refusal::UnknownPrice => "its price is not known, so no cap can hold: add the model to model_pricing, or set \
                                  node_scaling.cost.allow_unknown_prices"
            .to_owned(),
    }
}

fn budget(needed: Money, left: Money, ledger: Option<&str>) -> String {
    if let Some(error) = ledger {
        return format!("nothing is spent while the ledger cannot be written: {error}");
    }
    format!(
        "the day's budget is used up: it could cost {needed} USD and {left} USD are left; raise \
         node_scaling.cost.max_daily_spend, lower max_tokens, or wait for tomorrow"
    )
}

/// What a person can do about a failure of this kind.
fn advice(kind: FailureKind) -> &'static str {
    match kind {
        FailureKind::RateLimited => {
            "reduce node_scaling.limits.max_concurrent_api, or use a provider with higher limits"
        }
        FailureKind::QuotaExhausted => "look at the quota and the balance of the provider's account",
        FailureKind::Auth => "check the key that node_scaling.provider names",
        FailureKind::NotFound => "check node_scaling.provider.model and base_url",
        FailureKind::TooLarge => "shorten the prompt, or use a model that takes more",
        FailureKind::Timeout => "raise node_scaling.limits.timeout, or use a faster model",
        FailureKind::Connect => "check the network and node_scaling.provider.base_url",
        FailureKind::Broken
        | FailureKind::Overloaded
        | FailureKind::Server
        | FailureKind::Malformed
        | FailureKind::Schema
        | FailureKind::BadRequest
        | FailureKind::Unsupported => "",
    }
}

/// A warning of the core, for the log and for whoever looks.
pub(super) fn note_of(warning: Warning, lane: Option<&Lane>, now: Duration, at_us: u64) -> Note {
    let at = lane.map_or_else(|| "a provider".to_owned(), |lane| format!("{}/{}", lane.name, lane.model));
    let (code, message, hint) = match warning {
        Warning::RateLimited { width, per_minute, .. } => {
            let mut pace = Vec::new();
            pace.extend(width.map(|width| format!("at most {width} calls at once")));
            pace.extend(per_minute.map(|rate| format!("at most {rate} calls a minute")));
            let pace = if pace.is_empty() { "more slowly".to_owned() } else { format!("with {}", pace.join(" and ")) };
            (
                "rate_limited",
                format!("API rate limit: {at} refuses calls for their number; going on {pace}"),
                "to avoid it reduce node_scaling.limits.max_concurrent_api or set requests_per_minute; or use a provider \
                 with higher limits",
            )
        }
        Warning::BreakerOpen { until, .. } => (
            "provider_failing",
            format!("{at} fails; it is left alone for {}", seconds(until.saturating_sub(now))),
            "name another provider in node_scaling.fallback to go on meanwhile",
        ),
        Warning::BreakerClosed { .. } => ("provider_works", format!("{at} works again"), ""),
        Warning::HedgingOff { .. } => (
            "hedging_off",
            format!("{at} is slow as a whole, so slow calls are not made a second time"),
            "nothing is to be done; lower node_scaling.limits.max_concurrent_api if the provider is yours and overloaded",
        ),
        Warning::SpendReached { spent, .. } => (
            "spend_warning",
            format!("{spent} USD of the day's budget are spent"),
            "node_scaling.cost.warn_at says when this is told, max_daily_spend where it ends",
        ),
        Warning::BudgetExhausted { .. } => (
            "budget_exhausted",
            "the day's budget is used up; tasks are refused".to_owned(),
            "raise node_scaling.cost.max_daily_spend, or wait for tomorrow",
        ),
    };
    Note { code, message, hint: hint.to_owned(), at_us }
}

fn seconds(time: Duration) -> String {
    if time < Duration::from_secs(1) {
        format!("{} ms", time.as_millis())
    } else {
        format!("{:.1} s", time.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::LaneId;

    #[test]
    fn a_rate_limit_and_an_empty_budget_name_the_setting() {
        let warning = Warning::RateLimited { lane: LaneId(1), width: Some(3), per_minute: None };
        let note = note_of(warning, None, Duration::ZERO, 0);
        assert!(note.message.contains("API rate limit") && note.message.contains("3 calls at once"), "{note:?}");
        assert!(note.hint.contains("max_concurrent_api"), "{note:?}");
        let status = Status::Refused(Refusal::Budget { needed: Money::from_micro_usd(5), left: Money::ZERO });
        let said = error_of(status, None, None);
        assert!(said.contains("max_daily_spend") && said.contains("0.000005"), "{said}");
        let said = error_of(status, None, Some("disk full"));
        assert!(said.contains("disk full"), "{said}");
        let said = error_of(Status::Failed(Reason::Call(FailureKind::Auth)), Some("status 401"), None);
        assert!(said.starts_with("status 401: ") && said.contains("key"), "{said}");
    }
}
