//! Memory of the host that devices reach.

use std::sync::atomic::{AtomicU32, Ordering};

use crossdock_memory::{Memory, MemoryKind};

use super::abi::{self, Address};
use super::{Context, CudaError};

/// A host's memory, pinned and mapped for every device, as long as this lives.
#[derive(Debug)]
pub struct HostRegistration {
    context: Context,
    address: Address,
    /// `None`: it was pinned by somebody else, who lets it go.
    memory: Option<Memory>,
}

impl Context {
    /// Pins a host's memory and maps it for this device. Memory that is pinned already stays as it is.
    ///
    /// # Panics
    /// If the memory is a device's.
    pub fn register_host(&self, memory: &Memory) -> Result<HostRegistration, CudaError> {
        assert_ne!(memory.kind(), MemoryKind::Device, "only a host's memory is pinned");
        let pinned = self.call("cuMemHostRegister", |table| {
            // SAFETY: the range is mapped as long as a handle of it lives, and one is kept until it is unregistered.
            unsafe {
                (table.cuMemHostRegister_v2)(memory.base().cast(), memory.bytes(), abi::HOST_REGISTER_FLAGS)
            }
        });
        let mut registration =
            HostRegistration { context: self.clone(), address: 0, memory: Some(memory.clone()) };
        match pinned {
            Ok(()) => {}
            Err(error) if error.code == abi::ERROR_HOST_MEMORY_ALREADY_REGISTERED => {
                registration.memory = None
            }
            Err(error) => {
                registration.memory = None;
                return Err(error);
            }
        }
        self.call("cuMemHostGetDevicePointer", |table| {
            // SAFETY: the address can be written; the range is registered.
            unsafe {
                (table.cuMemHostGetDevicePointer_v2)(&raw mut registration.address, memory.base().cast(), 0)
            }
        })?;
        Ok(registration)
    }
}

impl HostRegistration {
    /// Where the device finds it.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// The first word of the memory that is registered, which a kernel stores with a release: what the kernel has stored before
    /// is seen by whoever has seen this.
    ///
    /// # Panics
    /// If the memory is shorter than a word, or begins at an odd place.
    pub fn load(&self, memory: &Memory) -> u32 {
        // SAFETY: the word is the host's, mapped as long as the memory's handle, and aligned; others store there only as atomics,
        // or as a GPU does.
        unsafe { AtomicU32::from_ptr(first_word(memory)) }.load(Ordering::Acquire)
    }
}

impl HostRegistration {
    /// Stores the first word with a release: what this thread has done or seen before is seen by whoever acquires the value.
    ///
    /// # Panics
    /// As [`load`](HostRegistration::load).
    pub fn store(&self, memory: &Memory, value: u32) {
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(first_word(memory)) }.store(value, Ordering::Release);
    }
}

fn first_word(memory: &Memory) -> *mut u32 {
    let word = memory.at(0, size_of::<u32>()).expect("a memory of a word").cast::<u32>();
    assert!(word.is_aligned() && memory.kind() != MemoryKind::Device);
    word
}

impl Drop for HostRegistration {
    fn drop(&mut self) {
        if let Some(memory) = &self.memory {
            // An answer would say that the context is lost.
            let _ = self.context.call("cuMemHostUnregister", |table| {
                // SAFETY: this registered it.
                unsafe { (table.cuMemHostUnregister)(memory.base().cast()) }
            });
        }
    }
}
