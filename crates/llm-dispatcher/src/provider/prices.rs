//! What tokens cost: a table with a date, in whole numbers. A model that is not in the table has no price, which is not zero.

use std::collections::BTreeMap;

use serde::Deserialize;
use thiserror::Error;

use crate::core::Price;

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The price.
    pub price: Price,
    /// The day on which the provider was to switch the model off.
    pub retired: Option<String>,
    /// Longer inputs cost more than this price says, so no price is known for them.
    pub up_to_input_tokens: Option<u64>,
}

/// Why a table is not taken.
#[derive(Debug, Error)]
pub enum PriceError {
    /// It is no table.
    #[error("the price table cannot be read")]
    Table(#[from] serde_json::Error),
    /// A number is none.
    #[error("{text:?} is no price: write US dollars per million tokens, such as \"0.15\", with at most six decimals")]
    Number {
        /// What stands there.
        text: String,
    },
}

/// The table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prices {
    /// The day on which it was true, as `YYYY-MM-DD`.
    pub date: String,
    models: BTreeMap<(String, String), Listed>,
}

#[derive(Deserialize)]
struct Table {
    date: String,
    models: Vec<Line>,
}

#[derive(Deserialize)]
struct Line {
    provider: String,
    model: String,
    input: String,
    output: String,
    cached_input: Option<String>,
    retired: Option<String>,
    up_to_input_tokens: Option<u64>,
}

impl Prices {
    /// The table that comes with the program.
    pub fn built_in() -> Result<Self, PriceError> {
        Self::parse(include_str!("prices.json"))
    }

    /// An empty table.
    pub fn none() -> Self {
        Self { date: String::new(), models: BTreeMap::new() }
    }

    /// Reads a table in the format of the built-in one.
    pub fn parse(text: &str) -> Result<Self, PriceError> {
        let table: Table = serde_json::from_str(text)?;
        let mut models = BTreeMap::new();
        for line in table.models {
            let price = Price {
                input: per_million(&line.input)?,
                output: per_million(&line.output)?,
                cached_input: line.cached_input.as_deref().map(per_million).transpose()?,
                per_call: 0,
            };
            let listed = Listed { price, retired: line.retired, up_to_input_tokens: line.up_to_input_tokens };
            models.insert((line.provider, line.model), listed);
        }
        Ok(Self { date: table.date, models })
    }

    /// Sets a price, in place of the one of the table.
    pub fn set(&mut self, provider: &str, model: &str, price: Price) {
        let listed = Listed { price, retired: None, up_to_input_tokens: None };
        self.models.insert((provider.to_owned(), model.to_owned()), listed);
    }

    /// What is known of a model.
    pub fn listed(&self, provider: &str, model: &str) -> Option<&Listed> {
        let model = model.strip_prefix("models/").unwrap_or(model);
        self.models.get(&(provider.to_owned(), model.to_owned()))
    }

    /// All models of a provider.
    pub fn of_provider<'a>(&'a self, provider: &'a str) -> impl Iterator<Item = (&'a str, &'a Listed)> {
        let of = move |((named, model), listed)| {
            let (named, model): (&String, &String) = (named, model);
            (named == provider).then_some((model.as_str(), listed))
        };
        self.models.iter().map(|((named, model), listed)| ((named, model), listed)).filter_map(of)
    }

    /// The price of a model for an input of at most so many tokens; `None`: unknown, and whoever has a budget should refuse.
    pub fn price(&self, provider: &str, model: &str, input_upper_bound: u64) -> Option<Price> {
        let listed = self.listed(provider, model)?;
        listed.up_to_input_tokens.is_none_or(|most| input_upper_bound <= most).then_some(listed.price)
    }
}

/// US dollars per million tokens, as text, in micro-USD; no floating point comes near money.
pub fn per_million(text: &str) -> Result<u64, PriceError> {
    let wrong = || PriceError::Number { text: text.chars().take(40).collect() };
    let (whole, fraction) = text.trim().split_once('.').unwrap_or((text.trim(), ""));
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || whole.len() > 7 || fraction.len() > 6 || !digits(whole) || !digits(fraction) {
        return Err(wrong());
    }
    let fraction: u64 = format!("{fraction:0<6}").parse().map_err(|_| wrong())?;
    Ok(whole.parse::<u64>().map_err(|_| wrong())? * 1_000_000 + fraction)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_table_is_dated_and_exact() {
        let prices = Prices::built_in().unwrap();
        assert_eq!(prices.date.len(), 10);
        let small = prices.price("groq", "openai/gpt-oss-20b", 1).unwrap();
        assert_eq!(small, Price { input: 75_000, output: 300_000, cached_input: Some(37_500), per_call: 0 });
        assert_eq!(prices.price("gemini", "models/gemini-2.5-flash", 1).unwrap().output, 2_500_000);
        // Unknown is not free, and neither is an input beyond what a price holds for.
        assert_eq!(prices.price("openai", "gpt-17", 1), None);
        assert_eq!(prices.price("openai", "gemini-2.5-flash", 1), None);
        assert!(prices.price("gemini", "gemini-2.5-pro", 200_000).is_some());
        assert_eq!(prices.price("gemini", "gemini-2.5-pro", 200_001), None);
        assert!(prices.listed("gemini", "gemini-2.0-flash").unwrap().retired.is_some());
    }

    #[test]
    fn a_price_is_a_decimal_number_and_nothing_else() {
        assert_eq!(per_million("0.0375").unwrap(), 37_500);
        assert_eq!(per_million("10").unwrap(), 10_000_000);
        for text in ["", "-1", "1e3", "0.0000001", "1,5", ".5", "99999999", "NaN"] {
            assert!(per_million(text).is_err(), "{text}");
        }
    }
}
