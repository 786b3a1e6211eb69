//! Memory of a device, which no CPU of this host reaches by itself.

use std::any::Any;
use std::os::fd::BorrowedFd;

/// What the owner of a device's memory does for [`Memory::read`](crate::Memory::read), `write` and `fill`.
///
/// The range that it stands for is the one that [`Memory::from_device`](crate::Memory::from_device) was told. It is freed
/// when this is dropped, which the last handle does.
pub trait DeviceMemory: Any + Send + Sync {
    /// The device, for messages: `"cuda:0"`.
    fn device(&self) -> &str;

    /// Copies `into.len()` bytes out, from `offset` on, which lie inside. They are there when this returns.
    fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), DeviceFailed>;

    /// Copies `from` in, from `offset` on, where it fits. Whatever runs on the device after this has returned sees it.
    fn write(&self, offset: usize, from: &[u8]) -> Result<(), DeviceFailed>;

    /// Sets `bytes` bytes to `value`, from `offset` on, which lie inside; otherwise as [`write`](DeviceMemory::write).
    fn fill(&self, offset: usize, bytes: usize, value: u8) -> Result<(), DeviceFailed>;

    /// The range as one driver passes it to another through the kernel, and where in that it begins; `None`: the device's
    /// driver exports none.
    fn dma_buf(&self) -> Option<(BorrowedFd<'_>, u64)>;
}

/// A device's driver refused a call, or the device failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{call} answers {code}")]
pub struct DeviceFailed {
    /// The driver's function.
    pub call: &'static str,
    /// Its answer, in its own numbers.
    pub code: i32,
}
