//! Rate limit of a job: bytes per slice of 100 ms, accounted after the fact.
//!
//! Rules: a request that was issued is charged once it is over, so the first one always passes; an overdrawn
//! slice is made longer in proportion. Integer arithmetic throughout: QEMU rounds through doubles, which gives
//! the same nanosecond for every amount below 2^53.
//! Not here: sleeping (`job`).

use crate::env::Nanos;

/// Length of a slice, nanoseconds.
pub const SLICE: Nanos = 100_000_000;
const SECOND: u128 = 1_000_000_000;

/// A limiter. Speed 0: unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimit {
    quota: u64,
    slice_start: Nanos,
    slice_end: Nanos,
    dispatched: u64,
}

impl RateLimit {
    /// Sets the speed, bytes per second; what the running slice has used stays.
    pub fn set_speed(&mut self, speed: u64) {
        let quota = u128::from(speed) * u128::from(SLICE) / SECOND;
        let quota = u64::try_from(quota).expect("a tenth of a u64 fits");
        self.quota = if speed == 0 { 0 } else { quota.max(1) };
    }

    /// Bytes per slice; 0: unlimited.
    #[must_use]
    pub fn quota(&self) -> u64 {
        self.quota
    }

    /// Charges `bytes` and says how long to wait before the next request, nanoseconds.
    pub fn delay(&mut self, bytes: u64, now: Nanos) -> Nanos {
        if self.quota == 0 {
            return 0;
        }
        if self.slice_end < now {
            self.slice_start = now;
            self.slice_end = now.saturating_add(SLICE);
            self.dispatched = 0;
        }
        self.dispatched = self.dispatched.saturating_add(bytes);
        if self.dispatched < self.quota {
            return 0;
        }
        let used = u128::from(self.dispatched) * u128::from(SLICE) / u128::from(self.quota);
        self.slice_end = self
            .slice_start
            .saturating_add(u64::try_from(used).unwrap_or(u64::MAX));
        self.slice_end.saturating_sub(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(speed: u64) -> RateLimit {
        let mut limit = RateLimit::default();
        limit.set_speed(speed);
        limit
    }

    #[test]
    fn quota_is_a_tenth_of_the_speed_but_at_least_one() {
        for (speed, quota) in [
            (0, 0),
            (1, 1),
            (9, 1),
            (10, 1),
            (19, 1),
            (20, 2),
            (65536, 6553),
            (u64::MAX, u64::MAX / 10),
        ] {
            assert_eq!(limiter(speed).quota(), quota, "speed {speed}");
        }
    }

    #[test]
    fn unlimited_never_waits() {
        let mut limit = limiter(0);
        assert_eq!(limit.delay(u64::MAX, 5), 0);
        assert_eq!(limit.delay(u64::MAX, 5), 0);
    }

    #[test]
    fn the_first_request_passes_and_is_paid_for_afterwards() {
        let mut limit = limiter(1);
        assert_eq!(limit.delay(0, 7), 0);
        // 524288 bytes at one byte per slice take 524288 slices.
        assert_eq!(limit.delay(524_288, 8), 524_288 * SLICE - 1);
        assert_eq!(limit.delay(0, 7 + 524_288 * SLICE), 0);
    }

    #[test]
    fn a_full_slice_waits_for_its_end_and_a_new_slice_starts_empty() {
        let mut limit = limiter(1000); // 100 bytes per slice
        assert_eq!(limit.delay(99, 10), 0);
        assert_eq!(limit.delay(1, 20), SLICE - 10);
        assert_eq!(limit.delay(50, 20), SLICE * 3 / 2 - 10);
        assert_eq!(limit.delay(99, 10 + 2 * SLICE), 0);
    }

    #[test]
    fn over_whole_slices_no_more_than_quota_and_one_overdraft() {
        let mut limit = limiter(10_000); // 1000 bytes per slice
        let (mut now, mut charged) = (1, 0);
        while now < 50 * SLICE {
            let wait = limit.delay(700, now);
            charged += 700;
            now += wait.max(1);
        }
        assert!(charged <= 51 * 1000 + 700, "{charged}");
    }

    #[test]
    fn a_new_speed_judges_what_the_slice_has_used() {
        let mut limit = limiter(1000);
        assert_eq!(limit.delay(150, 1), SLICE * 3 / 2);
        limit.set_speed(2000);
        assert_eq!(limit.delay(0, 1), 0);
    }
}
