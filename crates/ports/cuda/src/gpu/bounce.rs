//! Bytes to and from a GPU, by the host's pinned memory.
#![allow(unsafe_code)]

use crossdock_memory::{AccessError, DeviceFailed};

use super::Bounce;

impl Bounce {
    /// Copies no more than the bounce holds from the GPU.
    pub(super) fn take(&self, from: u64, into: &mut [u8]) -> Result<(), DeviceFailed> {
        // SAFETY: the caller's range is a GPU's memory that is mapped; the bounce is pinned, and locked until the copy has ended.
        unsafe { self.stream.copy(self.registration.address(), from, into.len())? };
        self.stream.synchronize()?;
        self.memory.read(0, into).map_err(of_host)
    }

    /// Copies no more than the bounce holds to the GPU.
    pub(super) fn put(&self, to: u64, from: &[u8]) -> Result<(), DeviceFailed> {
        self.memory.write(0, from).map_err(of_host)?;
        // SAFETY: as above.
        unsafe { self.stream.copy(to, self.registration.address(), from.len())? };
        Ok(self.stream.synchronize()?)
    }

    pub(super) fn fill(&self, to: u64, bytes: usize, value: u8) -> Result<(), DeviceFailed> {
        // SAFETY: the caller's range is a GPU's memory that is mapped until the fill has ended.
        unsafe { self.stream.fill(to, bytes, value)? };
        Ok(self.stream.synchronize()?)
    }
}

/// The bounce is the host's memory, and as long as any part.
fn of_host(error: AccessError) -> DeviceFailed {
    match error {
        AccessError::Device(failed) => failed,
        AccessError::OutOfRange(range) => unreachable!("parts fit the bounce: {range}"),
    }
}
