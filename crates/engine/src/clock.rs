//! The one place where the process's clock is read.

use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime};

/// Nanoseconds of the monotonic clock. Setting the wall clock does not move it, and only differences mean
/// anything; it is the clock of [`std::time::Instant`].
pub fn now_ns() -> u64 {
    let Timespec { tv_sec, tv_nsec } = clock_gettime(ClockId::Monotonic);
    // The monotonic clock begins at boot: neither part is negative, and 64 bits hold 584 years.
    tv_sec as u64 * 1_000_000_000 + tv_nsec as u64
}

/// A duration in nanoseconds; one that 64 bits do not hold is as good as endless.
pub fn duration_ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A duration as the kernel takes it.
pub(crate) fn timespec(ns: u64) -> Timespec {
    Timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn never_goes_back_and_keeps_pace_with_instant() {
        let (began, began_ns) = (std::time::Instant::now(), now_ns());
        let mut last = began_ns;
        for _ in 0..10_000 {
            let now = now_ns();
            assert!(now >= last);
            last = now;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        let here = now_ns() - began_ns;
        let there = began.elapsed().as_nanos() as u64;
        assert!(here >= 20_000_000 && there >= here && there - here < 1_000_000_000);
    }

    #[test]
    fn splits_at_the_second() {
        let split = timespec(3_000_000_007);
        assert_eq!((split.tv_sec, split.tv_nsec), (3, 7));
    }
}
