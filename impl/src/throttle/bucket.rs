//! Leaky buckets: how much has gone through a throttle group, and how long the next request has to wait.
//!
//! Rules: a request is let through when no bucket that it falls into is too full, however large it is, and fills them
//! afterwards. A bucket without a burst of its own holds a tenth of a second's worth, so that a few requests may come
//! together. Integers throughout: levels are counted in billionths of a byte or a request, what leaks in a nanosecond is then
//! the rate itself.

use super::Direction;
use super::limits::{KINDS, Limits, Rate};
use crate::env::Nanos;

const SECOND: u128 = 1_000_000_000;

/// Levels of one limit, in billionths.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    rate: Rate,
    /// Leaks at the average.
    level: u128,
    /// Leaks at the burst rate.
    burst_level: u128,
}

impl Bucket {
    fn new(rate: Rate) -> Bucket {
        Bucket {
            rate,
            ..Bucket::default()
        }
    }

    fn leak(&mut self, passed: Nanos) {
        let passed = u128::from(passed);
        self.level = self.level.saturating_sub(u128::from(self.rate.average) * passed);
        self.burst_level = self
            .burst_level
            .saturating_sub(u128::from(self.rate.burst) * passed);
    }

    fn fill(&mut self, amount: u128) {
        if self.rate.average > 0 {
            self.level += amount;
            if self.rate.seconds > 1 {
                self.burst_level += amount;
            }
        }
    }

    /// Nanoseconds until there is room again.
    fn wait(&self) -> Nanos {
        let Rate {
            average,
            burst,
            seconds,
        } = self.rate;
        let tenth = |rate: u64| u128::from(rate) * SECOND / 10;
        if average == 0 {
            return 0;
        }
        if burst == 0 {
            return leaks_in(self.level, tenth(average), average);
        }
        let whole = u128::from(burst) * u128::from(seconds) * SECOND;
        let long = leaks_in(self.level, whole, average);
        if long > 0 || seconds == 1 {
            return long;
        }
        leaks_in(self.burst_level, tenth(burst), burst)
    }
}

/// Nanoseconds until `level` is down to `room`.
fn leaks_in(level: u128, room: u128, rate: u64) -> Nanos {
    let above = level.saturating_sub(room);
    Nanos::try_from(above.div_ceil(u128::from(rate))).unwrap_or(Nanos::MAX)
}

/// The buckets of a group.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Buckets {
    bytes: [Bucket; KINDS],
    requests: [Bucket; KINDS],
    request_size: u64,
    /// Leaked up to here.
    now: Nanos,
}

/// The limits that a direction falls under: the total, and its own.
fn places(direction: Direction) -> [usize; 2] {
    match direction {
        Direction::Read => [0, 1],
        Direction::Write => [0, 2],
    }
}

impl Buckets {
    pub(super) fn new(limits: &Limits) -> Buckets {
        Buckets {
            bytes: limits.bytes.map(Bucket::new),
            requests: limits.requests.map(Bucket::new),
            request_size: limits.request_size,
            now: 0,
        }
    }

    fn leak(&mut self, now: Nanos) {
        let passed = now.saturating_sub(self.now);
        self.now = self.now.max(now);
        for bucket in self.bytes.iter_mut().chain(&mut self.requests) {
            bucket.leak(passed);
        }
    }

    /// How long a request has to wait, nanoseconds; 0: not at all.
    pub(super) fn wait(&mut self, direction: Direction, now: Nanos) -> Nanos {
        self.leak(now);
        let waits = places(direction).map(|at| self.bytes[at].wait().max(self.requests[at].wait()));
        waits[0].max(waits[1])
    }

    /// A request goes through.
    pub(super) fn charge(&mut self, direction: Direction, bytes: u64, now: Nanos) {
        self.leak(now);
        let amount = u128::from(bytes) * SECOND;
        let count = match self.request_size {
            0 => SECOND,
            size => (amount / u128::from(size)).max(SECOND),
        };
        for at in places(direction) {
            self.bytes[at].fill(amount);
            self.requests[at].fill(count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Direction = Direction::Read;
    const WRITE: Direction = Direction::Write;
    const MS: Nanos = 1_000_000;

    fn rate(average: u64, burst: u64, seconds: u32) -> Rate {
        Rate {
            average,
            burst,
            seconds,
        }
    }

    fn bytes(total: Rate) -> Buckets {
        let mut limits = Limits::default();
        limits.bytes[0] = total;
        limits.check().expect("good limits");
        Buckets::new(&limits)
    }

    #[test]
    fn without_limits_nothing_waits() {
        let mut buckets = Buckets::new(&Limits::default());
        for _ in 0..100 {
            buckets.charge(WRITE, u64::MAX, 5);
            assert_eq!(buckets.wait(WRITE, 5), 0);
        }
    }

    #[test]
    fn a_tenth_of_a_second_may_come_at_once() {
        let mut buckets = bytes(rate(1000, 0, 1));
        buckets.charge(READ, 100, 7);
        assert_eq!(buckets.wait(WRITE, 7), 0, "full, not too full");
        buckets.charge(READ, 50, 7);
        assert_eq!(
            buckets.wait(WRITE, 7),
            50 * MS,
            "the total is for both directions"
        );
        assert_eq!(buckets.wait(WRITE, 7 + 20 * MS), 30 * MS);
        assert_eq!(buckets.wait(WRITE, 7 + 50 * MS), 0);
    }

    #[test]
    fn directions_have_limits_of_their_own() {
        let mut limits = Limits::default();
        limits.requests[1] = rate(1, 0, 1);
        let mut buckets = Buckets::new(&limits);
        buckets.charge(READ, 1 << 20, 0);
        assert_eq!(buckets.wait(READ, 0), 900 * MS);
        assert_eq!(buckets.wait(WRITE, 0), 0);
        buckets.charge(WRITE, 512, 0);
        assert_eq!(buckets.wait(READ, 900 * MS), 0);
    }

    #[test]
    fn long_requests_count_as_several() {
        let mut limits = Limits::default();
        limits.requests[0] = rate(10, 0, 1);
        limits.request_size = 1000;
        let mut buckets = Buckets::new(&limits);
        buckets.charge(READ, 500, 0);
        assert_eq!(buckets.wait(READ, 0), 0, "at least one");
        buckets.charge(READ, 2500, 0);
        assert_eq!(buckets.wait(READ, 0), 250 * MS);
    }

    #[test]
    fn bursts() {
        let mut short = bytes(rate(100, 1000, 1));
        short.charge(WRITE, 1000, 0);
        assert_eq!(short.wait(WRITE, 0), 0);
        short.charge(WRITE, 1, 0);
        assert_eq!(short.wait(WRITE, 0), 10 * MS, "the rest leaks at the average");
        let mut long = bytes(rate(100, 1000, 3));
        long.charge(WRITE, 300, 0);
        assert_eq!(long.wait(WRITE, 0), 200 * MS, "within a burst its own rate holds");
        long.charge(WRITE, 2701, 200 * MS);
        assert!(long.wait(WRITE, 200 * MS) > 2 * 1000 * MS);
    }

    #[test]
    fn over_time_no_more_than_the_average_and_one_request() {
        let mut buckets = bytes(rate(10_000, 0, 1));
        let (mut now, mut through) = (0, 0);
        while now < 10_000 * MS {
            let wait = buckets.wait(READ, now);
            now += wait;
            if wait == 0 {
                buckets.charge(READ, 700, now);
                through += 700;
            }
        }
        assert!(
            (100_000 - 700..=100_000 + 1000 + 700).contains(&through),
            "{through}"
        );
    }

    #[test]
    fn the_highest_limits_overflow_nothing() {
        let top = super::super::limits::RATE_MAX;
        let mut buckets = bytes(rate(top, top, 1));
        for _ in 0..1000 {
            buckets.charge(WRITE, u64::MAX, 0);
        }
        assert!(buckets.wait(WRITE, 0) > 0);
        assert_eq!(buckets.wait(WRITE, Nanos::MAX), 0);
        let mut slow = bytes(rate(1, 0, 1));
        slow.charge(WRITE, u64::MAX, 0);
        assert_eq!(slow.wait(WRITE, 0), Nanos::MAX);
    }
}
