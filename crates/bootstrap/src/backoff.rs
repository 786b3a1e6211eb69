//! Pauses between attempts that failed.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// Doubles the pause up to a limit, and shortens each one at random, so that the workers of a server that comes
/// back do not all knock at the same moment.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    least: Duration,
    most: Duration,
    next: Duration,
}

impl Backoff {
    pub(crate) fn new(least: Duration, most: Duration) -> Backoff {
        Backoff { least, most, next: least.min(most) }
    }

    /// The next pause: between half of the current one and all of it, by where `random` lies among all numbers.
    pub(crate) fn pause(&mut self, random: u64) -> Duration {
        let pause = shortened(self.next, 0.5, random);
        self.next = (self.next * 2).min(self.most);
        pause
    }

    /// An attempt succeeded: the next pause is the shortest again.
    pub(crate) fn reset(&mut self) {
        self.next = self.least.min(self.most);
    }
}

/// Between `share` of the time and all of it.
pub(crate) fn shortened(time: Duration, share: f64, random: u64) -> Duration {
    time.mul_f64(share + (1.0 - share) * (random as f64 / u64::MAX as f64))
}

/// A random number for spreading attempts out; not for secrets. The standard library seeds each of these hashers
/// differently, from the system's randomness.
pub(crate) fn random() -> u64 {
    RandomState::new().hash_one(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_limit_and_keep_their_bounds() {
        let ms = Duration::from_millis;
        let mut backoff = Backoff::new(ms(100), ms(500));
        for whole in [100, 200, 400, 500, 500] {
            assert_eq!(backoff.clone().pause(0), ms(whole / 2));
            assert_eq!(backoff.pause(u64::MAX), ms(whole));
        }
        backoff.reset();
        assert_eq!(backoff.pause(u64::MAX), ms(100));
        assert_eq!(Backoff::new(ms(100), ms(30)).pause(u64::MAX), ms(30));
    }

    #[test]
    fn random_numbers_differ() {
        assert_ne!(random(), random());
    }
}
