//! Bytes to and from a GPU, by the host's pinned memory.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

use crossdock_memory::{AccessError, DeviceFailed};

use super::Bounce;
use crate::driver::abi;

impl Bounce {
    /// Copies no more than the bounce holds from the GPU.
    pub(super) fn take(&self, from: u64, into: &mut [u8]) -> Result<(), DeviceFailed> {
        self.settle()?;
        // SAFETY: the caller's range is a GPU's memory that is mapped; the bounce is pinned, and locked until the copy has ended.
        unsafe { self.stream.copy(self.registration.address(), from, into.len())? };
        self.settle()?;
        self.memory.read(0, into).map_err(of_host)
    }

    /// Copies no more than the bounce holds to the GPU.
    pub(super) fn put(&self, to: u64, from: &[u8]) -> Result<(), DeviceFailed> {
        self.settle()?;
        self.memory.write(0, from).map_err(of_host)?;
        // SAFETY: as above.
        unsafe { self.stream.copy(to, self.registration.address(), from.len())? };
        self.settle()
    }

    pub(super) fn fill(&self, to: u64, bytes: usize, value: u8) -> Result<(), DeviceFailed> {
        // SAFETY: the caller's range is a GPU's memory that is mapped until the fill has ended.
        unsafe { self.stream.fill(to, bytes, value)? };
        self.settle()
    }
}

impl Bounce {
    /// Waits until nothing uses the bounce, but not for ever: a GPU that has come to a standstill is said to have, by this call and
    /// by those that follow.
    fn settle(&self) -> Result<(), DeviceFailed> {
        let until = Instant::now() + LONGEST_COPY;
        loop {
            match self.stream.is_idle()? {
                true => return Ok(()),
                false if Instant::now() < until => std::thread::yield_now(),
                false => return Err(DeviceFailed { call: "cuStreamQuery", code: abi::ERROR_NOT_READY }),
            }
        }
    }
}

/// Some megabytes take a millisecond.
const LONGEST_COPY: Duration = Duration::from_secs(30);

/// The bounce is the host's memory, and as long as any part.
fn of_host(error: AccessError) -> DeviceFailed {
    match error {
        AccessError::Device(failed) => failed,
        AccessError::OutOfRange(range) => unreachable!("parts fit the bounce: {range}"),
    }
}
