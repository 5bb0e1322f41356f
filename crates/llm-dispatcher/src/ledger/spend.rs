//! Money in the tables.

use rusqlite::{Connection, OptionalExtension as _, params};

use super::{Day, Granted};
use crate::call::Usage;
use crate::core::Money;

/// What calls cost, one or several of the same day, provider and model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Charge {
    /// The day that they began on.
    pub day: Day,
    /// Who was asked.
    pub provider: String,
    /// Which model.
    pub model: String,
    /// How many they are.
    pub calls: u64,
    /// What they cost.
    pub amount: Money,
    /// The provider did not say, so this is the most that they can have cost.
    pub estimated: bool,
    /// What the provider counted; nothing where it did not say.
    pub usage: Usage,
}

/// What was spent on one day.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpentDay {
    /// Which, as `2026-11-21`.
    pub day: String,
    /// By provider and model.
    pub spent: Vec<SpentOn>,
    /// What is set aside and not charged: for calls under way, or by a process that crashed.
    pub set_aside: Money,
}

/// What one model cost on one day.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpentOn {
    /// Provider.
    pub provider: String,
    /// Its model.
    pub model: String,
    /// Calls.
    pub calls: u64,
    /// Input tokens as the provider counted them.
    pub input_tokens: u64,
    /// Output tokens likewise.
    pub output_tokens: u64,
    /// What it cost.
    pub cost: Money,
    /// The part of it that the provider did not confirm.
    pub estimated: Money,
}

/// SQLite's integers have a sign. Beyond nine million dollars a day the sum errs on the safe side of any cap there can be.
pub(super) fn stored(amount: Money) -> i64 {
    i64::try_from(amount.pico()).unwrap_or(i64::MAX)
}

pub(super) fn loaded(amount: i64) -> Money {
    Money::from_pico(u128::try_from(amount).unwrap_or(0))
}

fn counter(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// What counts against the cap of a day.
pub(super) fn counted(connection: &Connection, day: Day) -> rusqlite::Result<Money> {
    let day = day.to_string();
    // Summed here: SQLite's sums fail when they overflow.
    let mut charges = connection.prepare_cached("SELECT cost FROM charges WHERE day = ?1")?;
    let charged = charges.query_map([&day], |row| row.get(0))?.map(|cost| cost.map(loaded));
    let charged: Money = charged.sum::<rusqlite::Result<Money>>()?;
    Ok(charged + set_aside_of(connection, &day)?)
}

fn set_aside_of(connection: &Connection, day: &str) -> rusqlite::Result<Money> {
    let mut leases = connection.prepare_cached("SELECT max(set_aside - charged, 0) FROM leases WHERE day = ?1")?;
    leases.query_map([day], |row| row.get(0))?.map(|rest| rest.map(loaded)).sum()
}

/// Sets money aside when the cap allows it.
pub(super) fn set_aside(
    connection: &Connection,
    start: i64,
    day: Day,
    amount: Money,
    cap: Money,
) -> rusqlite::Result<Granted> {
    let left = cap.minus(counted(connection, day)?);
    if left < amount {
        return Ok(Granted::No { left });
    }
    let mut add = connection.prepare_cached(
        "INSERT INTO leases (start, day, set_aside, charged, open) VALUES (?1, ?2, ?3, 0, 1)
         ON CONFLICT DO UPDATE SET set_aside = set_aside + ?3",
    )?;
    add.execute(params![start, day.to_string(), stored(amount)])?;
    Ok(Granted::Yes)
}

/// Gives back what was set aside.
pub(super) fn give_back(connection: &Connection, start: i64, day: Day, amount: Money) -> rusqlite::Result<()> {
    let mut take = connection
        .prepare_cached("UPDATE leases SET set_aside = max(set_aside - ?3, charged) WHERE start = ?1 AND day = ?2")?;
    take.execute(params![start, day.to_string(), stored(amount)]).map(|_| ())
}

/// Writes down what calls cost.
pub(super) fn charge(connection: &Connection, start: i64, charge: &Charge) -> rusqlite::Result<()> {
    let (day, amount) = (charge.day.to_string(), stored(charge.amount));
    let mut add = connection.prepare_cached(
        "INSERT INTO charges (day, provider, model, calls, input_tokens, output_tokens, cost, estimated)
         VALUES (?1, ?2, ?3, ?8, ?4, ?5, ?6, ?7)
         ON CONFLICT DO UPDATE SET calls = calls + ?8, input_tokens = input_tokens + ?4,
             output_tokens = output_tokens + ?5, cost = cost + ?6, estimated = estimated + ?7",
    )?;
    let estimated = if charge.estimated { amount } else { 0 };
    let (input, output) = (counter(charge.usage.input_tokens), counter(charge.usage.output_tokens));
    let calls = counter(charge.calls);
    add.execute(params![day, charge.provider, charge.model, input, output, amount, estimated, calls])?;
    let mut take =
        connection.prepare_cached("UPDATE leases SET charged = charged + ?3 WHERE start = ?1 AND day = ?2")?;
    take.execute(params![start, day, amount]).map(|_| ())
}

/// What this start has set aside and not charged is free again.
pub(super) fn settle(connection: &Connection, start: i64) -> rusqlite::Result<()> {
    let mut close = connection
        .prepare_cached("UPDATE leases SET set_aside = min(set_aside, charged), open = 0 WHERE start = ?1")?;
    close.execute([start]).map(|_| ())
}

/// The number of this start. What earlier ones had set aside stays set aside: they crashed, or it would have been settled.
pub(super) fn begin(connection: &Connection) -> rusqlite::Result<(i64, Money)> {
    let mut open = connection.prepare("SELECT max(set_aside - charged, 0) FROM leases WHERE open = 1")?;
    let lost: Money =
        open.query_map([], |row| row.get(0))?.map(|rest| rest.map(loaded)).sum::<rusqlite::Result<Money>>()?;
    connection.execute("UPDATE leases SET open = 0 WHERE open = 1", [])?;
    let last: Option<i64> =
        connection.query_row("SELECT max(start) FROM leases", [], |row| row.get(0)).optional()?.flatten();
    Ok((last.unwrap_or(0) + 1, lost))
}

/// The last days on which something was spent or set aside, the latest first.
pub(super) fn spent(connection: &Connection, days: u32) -> rusqlite::Result<Vec<SpentDay>> {
    let mut which = connection.prepare_cached(
        "SELECT day FROM charges UNION SELECT day FROM leases WHERE set_aside > charged ORDER BY day DESC LIMIT ?1",
    )?;
    let days: Vec<String> = which.query_map([days], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
    let mut lines = connection.prepare_cached(
        "SELECT provider, model, calls, input_tokens, output_tokens, cost, estimated FROM charges WHERE day = ?1
         ORDER BY cost DESC, provider, model",
    )?;
    let number = |n: i64| u64::try_from(n).unwrap_or(0);
    days.into_iter()
        .map(|day| {
            let spent = lines.query_map([&day], |row| {
                Ok(SpentOn {
                    provider: row.get(0)?,
                    model: row.get(1)?,
                    calls: number(row.get(2)?),
                    input_tokens: number(row.get(3)?),
                    output_tokens: number(row.get(4)?),
                    cost: loaded(row.get(5)?),
                    estimated: loaded(row.get(6)?),
                })
            })?;
            let spent = spent.collect::<rusqlite::Result<_>>()?;
            Ok(SpentDay { spent, set_aside: set_aside_of(connection, &day)?, day })
        })
        .collect()
}
