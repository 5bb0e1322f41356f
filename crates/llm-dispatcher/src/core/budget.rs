//! The day's money: reserved before a call, settled after it.
//!
//! ```text
//!   ledger (on disk)                      purse (here)
//!   set aside for us on this day    =     spent  +  reserved for calls under way  +  free
//! ```
//!
//! Money is asked of the ledger in leases of a 256th of the cap, before it is needed, so that a call reserves
//! without waiting for a disk. After a crash the ledger counts all that was set aside as spent: calls that were under way may
//! well have been billed, and what was free is given up, which is never more than [`MOST_FREE`] leases.

use std::collections::BTreeMap;

use super::money::Money;
use super::task::LeaseId;

/// A lease is the cap divided by this.
const LEASES_IN_CAP: u128 = 256;

/// More free money than so many leases is given back.
const MOST_FREE: u64 = 2;

/// Whether a call can be paid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Funds {
    /// Its worst case was reserved.
    Reserved,
    /// More money is being asked for, or calls under way hold what may be left of it.
    Wait,
    /// There is no more for it on this day.
    Exhausted {
        /// What is left.
        left: Money,
    },
}

/// What is to be asked of the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// A lease.
    Lease { id: LeaseId, day: u32, amount: Money },
    /// To take money back.
    Return { day: u32, amount: Money },
}

/// One day's money.
#[derive(Debug, Clone, Default)]
struct Day {
    granted: Money,
    reserved: Money,
    spent: Money,
    /// What the day's calls had cost before this run of the core, by the ledger.
    before: Money,
    warned: bool,
}

impl Day {
    fn free(&self) -> Money {
        self.granted.minus(self.reserved + self.spent)
    }
}

#[derive(Debug, Clone, Copy)]
struct Asked {
    id: LeaseId,
    day: u32,
    amount: Money,
}

/// The money of the core.
#[derive(Debug, Clone)]
pub(super) struct Purse {
    cap: Option<Money>,
    warn_at: Option<Money>,
    lease: Money,
    days: BTreeMap<u32, Day>,
    today: Option<u32>,
    asked: Option<Asked>,
    next_lease: u64,
    /// What the ledger had left when it refused last, and nothing was given back or settled since.
    left: Option<Money>,
}

impl Purse {
    pub(super) fn new(cap: Option<Money>, warn_at: Option<Money>) -> Self {
        Self {
            cap,
            warn_at,
            lease: cap.map_or(Money::ZERO, |cap| cap.divided_by(LEASES_IN_CAP)),
            days: BTreeMap::new(),
            // Without a cap the day matters only to those who read the ledger.
            today: cap.is_none().then_some(0),
            asked: None,
            next_lease: 1,
            left: None,
        }
    }

    pub(super) fn has_cap(&self) -> bool {
        self.cap.is_some()
    }

    pub(super) fn today(&self) -> u32 {
        self.today.unwrap_or(0)
    }

    /// A day begins. What is free of the one before goes back; what is reserved is settled there later.
    pub(super) fn begin_day(&mut self, day: u32, before: Money, wishes: &mut Vec<Wish>) {
        if self.today == Some(day) {
            return;
        }
        let yesterday = self.today.replace(day);
        self.left = None;
        let entry = self.days.entry(day).or_default();
        entry.before = before;
        if let Some(yesterday) = yesterday {
            self.give_back(yesterday, Money::ZERO, wishes);
        }
    }

    /// Reserves the worst case of a call, or asks for the money.
    pub(super) fn reserve(&mut self, worst: Money, wishes: &mut Vec<Wish>) -> Funds {
        if self.cap.is_none() {
            let today = self.today();
            self.days.entry(today).or_default().reserved += worst;
            return Funds::Reserved;
        }
        let Some(today) = self.today else { return Funds::Wait };
        let day = self.days.entry(today).or_default();
        let free = day.free();
        if free >= worst {
            day.reserved += worst;
            // The next lease is asked for before it is needed.
            if day.free() < self.lease.divided_by(2) && self.left.is_none() {
                self.ask(today, self.lease, wishes);
            }
            return Funds::Reserved;
        }
        let under_way = !day.reserved.is_zero();
        let missing = worst.minus(free);
        if self.asked.is_some() {
            return Funds::Wait;
        }
        match self.left {
            Some(left) if left < missing => {
                if under_way {
                    Funds::Wait
                } else {
                    Funds::Exhausted { left: left + free }
                }
            }
            Some(left) => {
                self.ask(today, missing.max(self.lease).min(left), wishes);
                Funds::Wait
            }
            None => {
                self.ask(today, missing.max(self.lease), wishes);
                Funds::Wait
            }
        }
    }

    /// A call is over that reserved `worst` on that day and cost `cost`. Says what was spent on the day in all, when that is the
    /// amount a person wanted to hear of.
    pub(super) fn settle(&mut self, day: u32, worst: Money, cost: Money, wishes: &mut Vec<Wish>) -> Option<Money> {
        let entry = self.days.entry(day).or_default();
        entry.reserved = entry.reserved.minus(worst);
        entry.spent += cost;
        let total = entry.before + entry.spent;
        let warn = !entry.warned && self.warn_at.is_some_and(|mark| total >= mark);
        entry.warned |= warn;
        if self.cap.is_some() {
            let keep = if self.today == Some(day) { self.lease.times(MOST_FREE) } else { Money::ZERO };
            self.give_back(day, keep, wishes);
        }
        warn.then_some(total)
    }

    /// The ledger set a lease aside.
    pub(super) fn granted(&mut self, id: LeaseId, wishes: &mut Vec<Wish>) {
        let Some(asked) = self.asked.take_if(|asked| asked.id == id) else { return };
        self.days.entry(asked.day).or_default().granted += asked.amount;
        if let Some(left) = &mut self.left {
            *left = left.minus(asked.amount);
        }
        if self.today != Some(asked.day) {
            self.give_back(asked.day, Money::ZERO, wishes);
        }
    }

    /// It did not.
    pub(super) fn refused(&mut self, id: LeaseId, available: Money) {
        let Some(asked) = self.asked.take_if(|asked| asked.id == id) else { return };
        if self.today == Some(asked.day) {
            self.left = Some(available);
        }
    }

    /// The ledger may have more than it said, because time has passed or others gave back.
    pub(super) fn ask_again(&mut self) {
        self.left = None;
    }

    /// The ledger's last word was that the cap is reached.
    pub(super) fn is_short(&self) -> bool {
        self.left.is_some()
    }

    /// Gives all back that is free, when there is nothing to do.
    pub(super) fn rest(&mut self, wishes: &mut Vec<Wish>) {
        if self.cap.is_some() {
            for day in self.days.keys().copied().collect::<Vec<_>>() {
                self.give_back(day, Money::ZERO, wishes);
            }
        }
    }

    /// Money that is free on this day.
    pub(super) fn free(&self) -> Money {
        self.today.and_then(|day| self.days.get(&day)).map_or(Money::ZERO, Day::free)
    }

    /// What the calls under way could cost in all.
    pub(super) fn reserved(&self) -> Money {
        self.days.values().map(|day| day.reserved).sum()
    }

    /// What was spent today in this run of the core.
    pub(super) fn spent(&self) -> Money {
        self.days.get(&self.today()).map_or(Money::ZERO, |day| day.spent)
    }

    fn ask(&mut self, day: u32, amount: Money, wishes: &mut Vec<Wish>) {
        if self.asked.is_none() && !amount.is_zero() {
            let id = LeaseId(self.next_lease);
            self.next_lease += 1;
            self.asked = Some(Asked { id, day, amount });
            wishes.push(Wish::Lease { id, day, amount });
        }
    }

    /// Keeps that much free, or half of it when there is more, and gives the rest back.
    fn give_back(&mut self, day: u32, keep: Money, wishes: &mut Vec<Wish>) {
        let Some(entry) = self.days.get_mut(&day) else { return };
        let free = entry.free();
        if free > keep {
            let amount = free.minus(keep.divided_by(2));
            entry.granted = entry.granted.minus(amount);
            wishes.push(Wish::Return { day, amount });
            if self.today == Some(day)
                && let Some(left) = &mut self.left
            {
                *left += amount;
            }
        }
        let entry = &self.days[&day];
        let over = self.today != Some(day) && entry.reserved.is_zero() && entry.free().is_zero();
        if over && self.asked.is_none_or(|asked| asked.day != day) {
            self.days.remove(&day);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CENT: Money = Money::from_micro_usd(10_000);

    #[test]
    fn nothing_is_reserved_before_the_lease_is_on_disk() {
        let mut purse = Purse::new(Some(CENT.times(256)), None);
        let mut wishes = Vec::new();
        assert_eq!(purse.reserve(CENT.divided_by(10), &mut wishes), Funds::Wait, "no day has begun");
        purse.begin_day(7, Money::ZERO, &mut wishes);
        assert_eq!(purse.reserve(CENT.divided_by(10), &mut wishes), Funds::Wait);
        assert_eq!(wishes, [Wish::Lease { id: LeaseId(1), day: 7, amount: CENT }]);
        assert_eq!(purse.reserve(CENT.divided_by(10), &mut wishes), Funds::Wait);
        assert_eq!(wishes.len(), 1, "asked once");
        purse.granted(LeaseId(1), &mut wishes);
        assert_eq!(purse.reserve(CENT.divided_by(10), &mut wishes), Funds::Reserved);
        assert_eq!(purse.free(), CENT.minus(CENT.divided_by(10)));
    }

    #[test]
    fn the_rest_of_the_cap_is_used_and_then_it_is_exhausted() {
        let mut purse = Purse::new(Some(CENT.times(256)), Some(CENT));
        let mut wishes = Vec::new();
        purse.begin_day(1, Money::ZERO, &mut wishes);
        let call = CENT.divided_by(4);
        purse.reserve(call, &mut wishes);
        purse.refused(LeaseId(1), CENT.divided_by(2));
        assert_eq!(purse.reserve(call, &mut wishes), Funds::Wait);
        assert_eq!(wishes[1], Wish::Lease { id: LeaseId(2), day: 1, amount: CENT.divided_by(2) });
        purse.granted(LeaseId(2), &mut wishes);
        assert_eq!(purse.reserve(call, &mut wishes), Funds::Reserved);
        assert_eq!(purse.reserve(call, &mut wishes), Funds::Reserved);
        assert_eq!(purse.reserve(call, &mut wishes), Funds::Wait, "a call under way may cost less");
        assert_eq!(purse.settle(1, call, call, &mut wishes), None);
        purse.settle(1, call, call, &mut wishes);
        assert_eq!(purse.reserve(call, &mut wishes), Funds::Exhausted { left: Money::ZERO });
    }

    #[test]
    fn a_call_belongs_to_the_day_on_which_it_began() {
        let mut purse = Purse::new(Some(CENT.times(256)), Some(CENT.divided_by(2)));
        let mut wishes = Vec::new();
        purse.begin_day(1, Money::ZERO, &mut wishes);
        purse.reserve(CENT, &mut wishes);
        purse.granted(LeaseId(1), &mut wishes);
        assert_eq!(purse.reserve(CENT, &mut wishes), Funds::Reserved);
        wishes.clear();
        purse.begin_day(2, Money::ZERO, &mut wishes);
        purse.granted(LeaseId(2), &mut wishes);
        assert_eq!(wishes, [Wish::Return { day: 1, amount: CENT }], "asked for yesterday, needed no more");
        wishes.clear();
        assert_eq!(purse.settle(1, CENT, CENT.divided_by(2), &mut wishes), Some(CENT.divided_by(2)));
        assert_eq!(wishes, [Wish::Return { day: 1, amount: CENT.divided_by(2) }]);
        assert_eq!((purse.spent(), purse.free(), purse.days.len()), (Money::ZERO, Money::ZERO, 1));
    }
}
