//! Memory of a device: what stands for it does the copies, within the range.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

use crossdock_memory::{
    AccessError, DeviceFailed, DeviceMemory, Memory, MemoryError, MemoryKind, OutOfRange,
};

/// Bytes that are nowhere, until the device fails.
#[derive(Clone)]
struct Device {
    bytes: Arc<Mutex<Option<Vec<u8>>>>,
}

impl Device {
    fn with<T>(&self, call: &'static str, used: impl FnOnce(&mut Vec<u8>) -> T) -> Result<T, DeviceFailed> {
        self.bytes.lock().unwrap().as_mut().map(used).ok_or(DeviceFailed { call, code: 700 })
    }
}

impl DeviceMemory for Device {
    fn device(&self) -> &str {
        "nowhere:0"
    }

    fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), DeviceFailed> {
        self.with("read", |bytes| into.copy_from_slice(&bytes[offset..][..into.len()]))
    }

    fn write(&self, offset: usize, from: &[u8]) -> Result<(), DeviceFailed> {
        self.with("write", |bytes| bytes[offset..][..from.len()].copy_from_slice(from))
    }

    fn fill(&self, offset: usize, bytes: usize, value: u8) -> Result<(), DeviceFailed> {
        self.with("fill", |all| all[offset..][..bytes].fill(value))
    }

    fn dma_buf(&self) -> Option<(BorrowedFd<'_>, u64)> {
        None
    }
}

#[test]
fn what_stands_for_a_device_copies_within_the_range() {
    let device = Device { bytes: Arc::new(Mutex::new(Some(vec![0; 100]))) };
    // SAFETY: no port gets it: only the device, which is nowhere, is asked for its bytes.
    let mut memory = unsafe { Memory::from_device(0x7000, 100, Box::new(device.clone())) }.unwrap();
    assert_eq!((memory.base().addr(), memory.bytes(), memory.kind()), (0x7000, 100, MemoryKind::Device));
    assert!(memory.fd().is_none() && memory.device().is_some_and(|device| device.device() == "nowhere:0"));
    memory.fill(10, 50, 7).unwrap();
    memory.write(98, &[1, 2]).unwrap();
    let mut found = [0; 92];
    memory.read(8, &mut found).unwrap();
    assert_eq!((&found[..3], &found[50..53], &found[90..]), (&[0, 0, 7][..], &[7, 7, 0][..], &[1, 2][..]));
    let beyond = OutOfRange { offset: 99, bytes: 2, memory_bytes: 100 };
    assert_eq!(memory.write(99, &[0; 2]), Err(AccessError::OutOfRange(beyond)));
    assert_eq!(memory.read(99, &mut [0; 2]), Err(AccessError::OutOfRange(beyond)));
    assert_eq!(memory.fill(99, 2, 0), Err(AccessError::OutOfRange(beyond)));
    *device.bytes.lock().unwrap() = None;
    assert_eq!(memory.fill(0, 1, 0), Err(AccessError::Device(DeviceFailed { call: "fill", code: 700 })));
    let other = memory.clone();
    assert!(!memory.is_last_handle());
    drop(other);
    assert!(memory.is_last_handle());
    drop(memory);
    assert_eq!(Arc::strong_count(&device.bytes), 1, "it is let go with the last handle");
}

#[test]
fn a_range_that_cannot_be_is_refused() {
    let device = || Box::new(Device { bytes: Arc::default() });
    // SAFETY: as above; and none of these is made.
    let refused = |base, bytes| unsafe { Memory::from_device(base, bytes, device()) }.unwrap_err();
    assert_eq!(refused(1, 0), MemoryError::ZeroBytes);
    assert_eq!(refused(0, 1), MemoryError::NullBase);
    assert_eq!(refused(u64::MAX - 5, 7), MemoryError::Wraps { base: usize::MAX - 5, bytes: 7 });
    assert_eq!(refused(1, usize::MAX), MemoryError::TooLarge { bytes: usize::MAX });
}
