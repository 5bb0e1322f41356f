//! One call that is made without the daemon, such as the one by which `drover setup` sees whether a key works.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rusqlite::{Connection, params};

use super::spend::{self, Charge};
use super::{FILE, Granted, LedgerError, schema, unusable};
use crate::call::Usage;
use crate::core::Money;

/// No start of the daemon has this number, so nothing of what one has set aside is touched.
const NO_START: i64 = 0;

/// A call that is written down at its worst case until it is known what it cost. When the program dies in between, that is what
/// counts.
#[derive(Debug)]
pub struct Outside {
    connection: Connection,
    path: Arc<PathBuf>,
    charge: Charge,
}

impl Outside {
    /// Writes a call down, when the day's cap allows it; a daemon may be running. `charge` has its worst case.
    pub fn set_down(dir: &Path, charge: Charge, cap: Option<Money>) -> Result<Result<Self, Money>, LedgerError> {
        let (connection, path) = schema::open(&dir.join(FILE))?;
        let granted = granted(&connection, &charge, cap);
        match granted.map_err(unusable("write", &path))? {
            Granted::Yes => Ok(Ok(Self { connection, path, charge })),
            Granted::No { left } => Ok(Err(left)),
        }
    }

    /// Puts what it cost in place of its worst case.
    pub fn settle(self, amount: Money, usage: Option<Usage>) -> Result<(), LedgerError> {
        let usage = usage.unwrap_or_default();
        let counter = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let update = "UPDATE charges SET cost = max(cost - ?4 + ?5, 0), estimated = max(estimated - ?4, 0),
                          input_tokens = input_tokens + ?6, output_tokens = output_tokens + ?7
                      WHERE day = ?1 AND provider = ?2 AND model = ?3";
        let Charge { day, provider, model, amount: worst, .. } = &self.charge;
        let (worst, amount) = (spend::stored(*worst), spend::stored(amount));
        let tokens = (counter(usage.input_tokens), counter(usage.output_tokens));
        let values = params![day.to_string(), provider, model, worst, amount, tokens.0, tokens.1];
        self.connection.execute(update, values).map(drop).map_err(unusable("write", &self.path))
    }
}

fn granted(connection: &Connection, charge: &Charge, cap: Option<Money>) -> rusqlite::Result<Granted> {
    connection.execute_batch("BEGIN IMMEDIATE")?;
    if let Some(cap) = cap {
        let left = cap.minus(spend::counted(connection, charge.day)?);
        if left < charge.amount {
            connection.execute_batch("ROLLBACK")?;
            return Ok(Granted::No { left });
        }
    }
    spend::charge(connection, NO_START, charge)?;
    connection.execute_batch("COMMIT").map(|()| Granted::Yes)
}
