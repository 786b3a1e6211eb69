//! How fast this machine copies memory: what a call's floor is made of.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes that are read and written a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CopyRate(u64);

/// Measured once a process; a race measures twice.
static MEASURED: AtomicU64 = AtomicU64::new(0);

impl CopyRate {
    /// The best of a few copies of memory that does not stay in a second-level cache.
    pub fn measure() -> CopyRate {
        let measured = MEASURED.load(Ordering::Relaxed);
        if measured > 0 {
            return CopyRate(measured);
        }
        let (from, mut into) = (vec![1_u8; BYTES], vec![0_u8; BYTES]);
        let best = (0..TRIES).map(|_| {
            let begun = Instant::now();
            into.copy_from_slice(std::hint::black_box(&from));
            std::hint::black_box(&mut into);
            begun.elapsed()
        });
        let best = best.min().unwrap_or(Duration::MAX).as_nanos().max(1);
        let rate = (BYTES as u128 * 1_000_000_000 / best).clamp(1, u128::from(u64::MAX)) as u64;
        MEASURED.store(rate, Ordering::Relaxed);
        CopyRate(rate)
    }

    /// The time that so many bytes take.
    pub fn time_of(self, bytes: u64) -> Duration {
        Duration::from_nanos((u128::from(bytes) * 1_000_000_000 / u128::from(self.0)) as u64)
    }
}

const BYTES: usize = 8 << 20;
const TRIES: usize = 4;
