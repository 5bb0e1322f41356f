//! What the mock remembers of its calls: the judge of those who call it.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

/// Most prompts and calls that are remembered one by one.
const MOST_KEPT: usize = 2_000_000;

/// Counts, money and stamps. Times are microseconds since the mock was started.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    /// Always true: no provider is behind it.
    pub mock: bool,
    /// Calls that came in.
    pub calls: u64,
    /// Calls that were answered well.
    pub answered: u64,
    /// Calls refused by the limit of requests or tokens.
    pub rejected_rate: u64,
    /// Calls refused because too many were under way.
    pub rejected_in_flight: u64,
    /// Calls refused for what they were: key, format, path.
    pub refused: u64,
    /// Calls answered with an error on purpose.
    pub errors: u64,
    /// Calls whose connection was reset.
    pub resets: u64,
    /// Calls that were left without an answer.
    pub hangs: u64,
    /// Calls answered with garbage.
    pub garbage: u64,
    /// Calls whose answer was torn.
    pub torn: u64,
    /// Calls whose caller went away before the answer, those left hanging included.
    pub aborted: u64,
    /// Calls under way.
    pub in_flight: u64,
    /// Most calls that were under way at once.
    pub max_in_flight: u64,
    /// Money earned, in pico-USD. A call is charged when work on it begins, also when its answer never arrives.
    pub spent_pico: u128,
    /// Tokens of input that were charged.
    pub input_tokens: u64,
    /// Tokens of output that were charged.
    pub output_tokens: u64,
    /// When the first call came in.
    pub first_us: u64,
    /// When the last answer went out.
    pub last_us: u64,
    /// Time that well answered calls took in all, from the request to the answer.
    pub service_us: u64,
    /// Different prompts that work was begun on.
    pub prompts: u64,
    /// Prompts that were answered well more than once.
    pub answered_again: u64,
}

/// One answered call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// When it came in.
    pub began_us: u64,
    /// When its answer went out.
    pub ended_us: u64,
    /// Status of the answer.
    pub status: u16,
}

/// The ledger with what it is made from.
#[derive(Debug, Default)]
pub(super) struct Book {
    pub(super) ledger: Ledger,
    pub(super) calls: Vec<Call>,
    prompts: HashMap<u64, u32>,
}

impl Book {
    pub(super) fn arrived(&mut self, now_us: u64) {
        let ledger = &mut self.ledger;
        ledger.mock = true;
        if ledger.calls == 0 {
            ledger.first_us = now_us;
        }
        ledger.calls += 1;
    }

    /// Work on a call begins.
    pub(super) fn accepted(&mut self, prompt: u64) {
        let ledger = &mut self.ledger;
        ledger.in_flight += 1;
        ledger.max_in_flight = ledger.max_in_flight.max(ledger.in_flight);
        if self.prompts.len() < MOST_KEPT {
            self.prompts.entry(prompt).or_default();
            ledger.prompts = self.prompts.len() as u64;
        }
    }

    pub(super) fn charge(&mut self, input: u64, output: u64, input_price: u64, output_price: u64) {
        let ledger = &mut self.ledger;
        ledger.input_tokens += input;
        ledger.output_tokens += output;
        // Micro-USD per million tokens is pico-USD per token.
        ledger.spent_pico +=
            u128::from(input) * u128::from(input_price) + u128::from(output) * u128::from(output_price);
    }

    pub(super) fn left(&mut self) {
        self.ledger.in_flight -= 1;
    }

    pub(super) fn answered(&mut self, prompt: u64, began_us: u64, ended_us: u64) {
        let ledger = &mut self.ledger;
        ledger.answered += 1;
        ledger.service_us += ended_us - began_us;
        ledger.last_us = ended_us;
        if let Some(times) = self.prompts.get_mut(&prompt) {
            *times += 1;
            if *times == 2 {
                ledger.answered_again += 1;
            }
        }
        self.kept(began_us, ended_us, 200);
    }

    pub(super) fn answers_to(&self, prompt: u64) -> u32 {
        self.prompts.get(&prompt).copied().unwrap_or_default()
    }

    pub(super) fn kept(&mut self, began_us: u64, ended_us: u64, status: u16) {
        if self.calls.len() < MOST_KEPT {
            self.calls.push(Call { began_us, ended_us, status });
        }
    }
}
