//! Money and days: leases of the budget, charges, and what the ledger counts for which day.

use std::time::Duration;

use drover_service::now_us;
use tokio::time::Instant;
use tracing::{info, warn};

use super::Driver;
use crate::call::Usage;
use crate::core::{Input, LaneId, LeaseId, Money};
use crate::ledger::{self, Day, Granted};
use crate::shell::client::{Message, Refused};
use crate::shell::{Lanes, Note};

/// The clock on the wall is looked at this often: it can be set, and a machine can sleep.
const LOOK_AT_CLOCK: Duration = Duration::from_mins(1);

/// Which day it is, by number and by name.
pub(super) struct Days {
    pub(super) number: u32,
    pub(super) names: Vec<Day>,
    pub(super) next_us: u64,
    /// When to look again whether it has come.
    pub(super) look: Instant,
    /// The ledger is being asked about it.
    pub(super) asking: bool,
}

impl Driver {
    pub(super) fn want_lease(&mut self, id: LeaseId, day: u32, amount: Money) {
        let (ledger, tell) = (self.ledger.clone(), self.queues.tell.clone());
        let (day, cap) = (self.day_name(day), self.cap);
        self.ctx.spawn("set money aside", async move {
            let granted = match (day, cap) {
                (Some(day), Some(cap)) => match ledger.set_aside(day, amount, cap).await {
                    Ok(Granted::Yes) => Ok(()),
                    Ok(Granted::No { left }) => Err(Refused::Left(left)),
                    Err(error) => Err(Refused::Ledger(error)),
                },
                // The core asks only where there is a cap, and for days that it was told of.
                _ => Err(Refused::Left(Money::ZERO)),
            };
            let _ = tell.send(Message::Lease { id, granted }).await;
        });
    }

    pub(super) fn granted(&mut self, id: LeaseId, granted: Result<(), Refused>) {
        let input = match granted {
            Ok(()) => {
                self.ledger_fails = None;
                Input::LeaseGranted { id }
            }
            Err(Refused::Left(available)) => Input::LeaseRefused { id, available },
            Err(Refused::Ledger(error)) => {
                let why = error.to_string();
                if self.ledger_fails.is_none() {
                    let hint = "free or repair the disk of the state directory; nothing is spent until then";
                    self.note(Note {
                        code: "ledger_unusable",
                        message: why.clone(),
                        hint: hint.to_owned(),
                        at_us: now_us(),
                    });
                }
                self.ledger_fails = Some(why);
                Input::LeaseRefused { id, available: Money::ZERO }
            }
        };
        self.tell(input);
    }

    pub(super) fn charge(&mut self, lane: LaneId, day: u32, amount: Money, estimated: bool, usage: Option<Usage>) {
        if lane == Lanes::ERRANDS {
            return;
        }
        // Fees are told as input, which they are not.
        let usage = usage.filter(|_| Some(lane) != self.lanes.fees());
        self.metrics.spent_usd.inc_by(amount.usd());
        if let Some(usage) = usage {
            self.metrics.tokens(usage.input_tokens, usage.output_tokens);
        }
        self.charges.add(lane, day, amount, estimated, usage);
    }

    pub(super) async fn write_charges(&mut self) {
        for sum in self.charges.take() {
            let (Some(lane), Some(day)) = (self.lanes.get(sum.lane), self.day_name(sum.day)) else { continue };
            let charge = ledger::Charge {
                day,
                provider: lane.name.clone(),
                model: lane.model.clone(),
                calls: sum.calls,
                amount: sum.amount,
                estimated: sum.estimated,
                usage: sum.usage,
            };
            if let Err(error) = self.ledger.charge(charge).await {
                warn!(%error, "a charge could not be written down");
            }
        }
    }

    /// When a day is over, what the ledger counts for the next one is asked.
    pub(super) fn look_at_clock(&mut self, at: Instant) {
        let now = now_us();
        let left = Duration::from_micros(self.days.next_us.saturating_sub(now));
        if self.days.asking || !left.is_zero() {
            self.days.look = at + if left.is_zero() { LOOK_AT_CLOCK } else { left.min(LOOK_AT_CLOCK) };
            return;
        }
        self.days.asking = true;
        self.days.look = at + LOOK_AT_CLOCK;
        let (day, ledger, tell) = (self.zone.day(now), self.ledger.clone(), self.queues.tell.clone());
        self.ctx.spawn("ask for the day", async move {
            let counted = ledger.counted(day).await;
            let _ = tell.send(Message::Day { day, counted }).await;
        });
    }

    pub(super) fn day(&mut self, day: Day, counted: Option<Money>) {
        self.days.asking = false;
        self.days.look = Instant::now();
        let Some(spent) = counted else {
            // Until the ledger can be read the old day goes on, whose cap holds.
            self.days.next_us = now_us() + 1_000_000;
            return;
        };
        self.days.number += 1;
        self.days.names.push(day);
        self.days.next_us = self.zone.next_day_us(now_us());
        info!(%day, "a new day of the budget");
        self.tell(Input::Day { day: self.days.number, spent });
    }

    pub(super) fn day_name(&self, number: u32) -> Option<Day> {
        self.days.names.get(number as usize).copied()
    }
}
