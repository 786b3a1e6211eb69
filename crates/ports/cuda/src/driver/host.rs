//! Memory of the host that devices reach.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};

use crossdock_memory::{Memory, MemoryKind};
use parking_lot::Mutex;

use super::abi::{self, Address};
use super::{Context, CudaError, Residence};

/// A host's memory, pinned and mapped for every device, as long as this lives.
#[derive(Debug)]
pub struct HostRegistration {
    context: Context,
    address: Address,
    /// `None`: it was pinned by somebody else, who lets it go.
    memory: Option<Memory>,
}

/// What this process has pinned: by where it begins, how long it is, and for how many registrations. The driver pins a range once
/// and lets it go at once, for all devices.
static PINNED: Mutex<BTreeMap<usize, (usize, usize)>> = Mutex::new(BTreeMap::new());

impl Context {
    /// Pins a host's memory and maps it for this device. Memory that is pinned already stays as it is.
    ///
    /// # Panics
    /// If the memory is a device's.
    pub fn register_host(&self, memory: &Memory) -> Result<HostRegistration, CudaError> {
        assert_ne!(memory.kind(), MemoryKind::Device, "only a host's memory is pinned");
        let memory_kept = self.pin(memory)?.then(|| memory.clone());
        let mut registration = HostRegistration { context: self.clone(), address: 0, memory: memory_kept };
        self.call("cuMemHostGetDevicePointer", |table| {
            // SAFETY: the address can be written; the range is registered.
            unsafe {
                (table.cuMemHostGetDevicePointer_v2)(&raw mut registration.address, memory.base().cast(), 0)
            }
        })?;
        Ok(registration)
    }
}

impl Context {
    /// Pins memory, or counts once more what is pinned; false if somebody else has pinned all of it.
    fn pin(&self, memory: &Memory) -> Result<bool, CudaError> {
        let mut all = PINNED.lock();
        let (base, bytes) = (memory.base().addr(), memory.bytes());
        if let Some((there, count)) = all.get_mut(&base)
            && *there == bytes
        {
            *count += 1;
            return Ok(true);
        }
        let pinned = self.call("cuMemHostRegister", |table| {
            // SAFETY: the range is mapped as long as a handle of it lives, and one is kept until it is unregistered.
            unsafe { (table.cuMemHostRegister_v2)(memory.base().cast(), bytes, abi::HOST_REGISTER_FLAGS) }
        });
        match pinned {
            Ok(()) => {
                all.insert(base, (bytes, 1));
                Ok(true)
            }
            Err(error) if error.code == abi::ERROR_HOST_MEMORY_ALREADY_REGISTERED => {
                drop(all);
                // A part of it would not do.
                let facts = self.facts_of(base as u64)?;
                let is_whole =
                    facts.residence == Residence::Host && facts.allocation.holds(base as u64, bytes as u64);
                if is_whole { Ok(false) } else { Err(error) }
            }
            Err(error) => Err(error),
        }
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
        // A forked child has pinned nothing, and the lock may be held for good there.
        if let Some(memory) = self.memory.as_ref().filter(|_| self.context.is_here()) {
            let mut all = PINNED.lock();
            if let Some((_, count)) = all.get_mut(&memory.base().addr()) {
                *count -= 1;
                if *count > 0 {
                    return;
                }
                all.remove(&memory.base().addr());
            }
            // An answer would say that the context is lost.
            let _ = self.context.call("cuMemHostUnregister", |table| {
                // SAFETY: this registered it.
                unsafe { (table.cuMemHostUnregister)(memory.base().cast()) }
            });
        }
    }
}
