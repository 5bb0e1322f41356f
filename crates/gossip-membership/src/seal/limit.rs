//! How much of a thing is done for strangers: so much for each address, and so much for all together. The memory is the same
//! whatever comes in.

use std::net::IpAddr;
use std::time::Duration;

use ring::digest::{SHA256, digest};

use crate::core::Time;

const BUCKETS: usize = 256;

#[derive(Debug, Clone, Copy)]
pub(super) struct Rate {
    pub(super) burst: u32,
    pub(super) per_second: u32,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    /// Micro-tokens: a token a second fills one in a microsecond.
    left: u64,
    at: Time,
}

impl Bucket {
    fn full(rate: Rate) -> Self {
        Self { left: u64::from(rate.burst) * 1_000_000, at: Time::ZERO }
    }

    fn refill(&mut self, now: Time, rate: Rate) {
        let passed = u64::try_from(now.since(self.at).min(Duration::from_hours(1)).as_micros()).unwrap_or(0);
        self.left = (self.left + passed * u64::from(rate.per_second)).min(u64::from(rate.burst) * 1_000_000);
        self.at = now;
    }

    fn has(&self) -> bool {
        self.left >= 1_000_000
    }
}

/// One bucket for all, and one for the addresses that share a hash. Which ones share it is not to be foreseen.
#[derive(Debug, Clone)]
pub(super) struct Limit {
    secret: [u8; 16],
    each: Rate,
    all: Rate,
    total: Bucket,
    buckets: Box<[Bucket; BUCKETS]>,
}

impl Limit {
    pub(super) fn new(secret: [u8; 16], each: Rate, all: Rate) -> Self {
        Self { secret, each, all, total: Bucket::full(all), buckets: Box::new([Bucket::full(each); BUCKETS]) }
    }

    /// Takes one token, when both buckets have one.
    pub(super) fn take(&mut self, now: Time, from: IpAddr) -> bool {
        let mut input = self.secret.to_vec();
        match from {
            IpAddr::V4(ip) => input.extend(ip.octets()),
            IpAddr::V6(ip) => input.extend(&ip.octets()[..8]), // Whoever has one address of a network has all of it.
        }
        let first = digest(&SHA256, &input).as_ref().first().copied().unwrap_or(0);
        let bucket = &mut self.buckets[usize::from(first)];
        bucket.refill(now, self.each);
        self.total.refill(now, self.all);
        let has = bucket.has() && self.total.has();
        if has {
            bucket.left -= 1_000_000;
            self.total.left -= 1_000_000;
        }
        has
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_does_not_use_up_what_is_for_others() {
        let mut limit = Limit::new([7; 16], Rate { burst: 10, per_second: 5 }, Rate { burst: 25, per_second: 20 });
        let ip = |last: u8| IpAddr::from([10, 0, 0, last]);
        let taken = |limit: &mut Limit, now, from| (0..100).filter(|_| limit.take(now, from)).count();
        assert_eq!(taken(&mut limit, Time(1), ip(1)), 10);
        assert_eq!(taken(&mut limit, Time(1), ip(2)), 10);
        assert_eq!(taken(&mut limit, Time(1), ip(3)), 5, "all together");
        assert_eq!(taken(&mut limit, Time(1_000_001), ip(1)), 5);
        assert_eq!(taken(&mut limit, Time(1_000_000_000), ip(1)), 10, "never more than the burst");
    }
}
