//! Money in whole pico-dollars, so that no sum ever rounds.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign};

use crate::call::Usage;

const PICO_PER_MICRO: u128 = 1_000_000;
const PICO_PER_USD: u128 = 1_000_000_000_000;

/// An amount of US dollars, in units of a millionth of a millionth. One token at 1 USD per million tokens is a million of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Money(u128);

impl Money {
    /// Nothing.
    pub const ZERO: Self = Self(0);

    /// From pico-dollars.
    pub const fn from_pico(pico: u128) -> Self {
        Self(pico)
    }

    /// From millionths of a dollar.
    pub const fn from_micro_usd(micro: u64) -> Self {
        Self(micro as u128 * PICO_PER_MICRO)
    }

    /// From dollars as people write them in a configuration; to the nearest micro-dollar, so that `0.1` is exactly that.
    /// Nothing for a negative amount or one that is no number.
    pub fn from_usd(usd: f64) -> Option<Self> {
        (usd.is_finite() && (0.0..1e12).contains(&usd)).then(|| Self::from_micro_usd((usd * 1e6).round() as u64))
    }

    /// In pico-dollars.
    pub const fn pico(self) -> u128 {
        self.0
    }

    /// In dollars, for people and JSON only: never calculate with it.
    pub fn usd(self) -> f64 {
        self.0 as f64 / PICO_PER_USD as f64
    }

    /// No money at all.
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// The rest, or nothing where `other` is more.
    #[must_use]
    pub const fn minus(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// That many parts of it, rounded down.
    #[must_use]
    pub const fn divided_by(self, parts: u128) -> Self {
        Self(self.0 / parts)
    }

    /// That many times.
    #[must_use]
    pub const fn times(self, count: u64) -> Self {
        Self(self.0.saturating_mul(count as u128))
    }
}

impl Add for Money {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl AddAssign for Money {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for Money {
    fn sum<I: Iterator<Item = Self>>(amounts: I) -> Self {
        amounts.fold(Self::ZERO, Add::add)
    }
}

impl fmt::Display for Money {
    /// Dollars with six decimals, the rest cut off.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:06}", self.0 / PICO_PER_USD, self.0 % PICO_PER_USD / PICO_PER_MICRO)
    }
}

/// What a lane asks for its work. A price per million tokens in micro-dollars is the same number as one per token in
/// pico-dollars.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Price {
    /// Pico-dollars per input token.
    pub input: u64,
    /// Pico-dollars per output token, thinking included.
    pub output: u64,
    /// Pico-dollars per input token that the provider had in its cache. Unset: as any other input.
    pub cached_input: Option<u64>,
    /// Pico-dollars per call, such as a search fee.
    pub per_call: u64,
}

impl Price {
    /// The most that a call can cost whose input is at most and whose output is limited to these many tokens.
    pub fn worst(&self, input_tokens: u64, max_tokens: u64) -> Money {
        // A provider may ask more for what it writes to its cache; no price here says so, so the dearer of the two input prices.
        let input = self.input.max(self.cached_input.unwrap_or(0));
        Money(
            u128::from(input) * u128::from(input_tokens)
                + u128::from(self.output) * u128::from(max_tokens)
                + u128::from(self.per_call),
        )
    }

    /// What a call cost by the provider's own count.
    pub fn of(&self, usage: &Usage) -> Money {
        let cached = usage.cached_input_tokens.min(usage.input_tokens);
        Money(
            u128::from(self.input) * u128::from(usage.input_tokens - cached)
                + u128::from(self.cached_input.unwrap_or(self.input)) * u128::from(cached)
                + u128::from(self.output) * u128::from(usage.output_tokens)
                + u128::from(self.per_call),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_tokens_cost_what_the_list_says() {
        let price = Price { input: 37_500, output: 300_000, cached_input: Some(3_750), per_call: 0 };
        let usage = Usage { input_tokens: 1_000_000, output_tokens: 1_000_000, ..Usage::default() };
        assert_eq!(price.of(&usage), Money::from_micro_usd(337_500));
        assert_eq!(price.worst(1_000_000, 1_000_000), Money::from_micro_usd(337_500));
        let cached = Usage { cached_input_tokens: 1_000_000, ..usage };
        assert_eq!(price.of(&cached), Money::from_micro_usd(303_750));
    }

    #[test]
    fn dollars_of_a_configuration_are_exact() {
        assert_eq!(Money::from_usd(0.1), Some(Money::from_micro_usd(100_000)));
        assert_eq!(Money::from_usd(5.0).map(|five| five.to_string()).as_deref(), Some("5.000000"));
        assert_eq!((Money::from_usd(-1.0), Money::from_usd(f64::NAN)), (None, None));
        assert_eq!(Money::from_pico(1_999_999).to_string(), "0.000001");
    }
}
