//! Memory that nobody else can map.
#![allow(unsafe_code)]

use std::ptr;

use crossdock::Memory;
use rustix::mm::{MapFlags, ProtFlags};

/// Private memory, present, as a program's own allocator would give it. It is never given back: a benchmark needs it
/// to its end.
pub fn anonymous(bytes: usize) -> std::io::Result<Memory> {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::POPULATE;
    // SAFETY: the kernel chooses a free place, so no mapping is replaced.
    let base = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), bytes, protection, flags)? };
    // SAFETY: the mapping is that long, is never unmapped, and nothing but the returned memory leads to it.
    unsafe { Memory::from_raw(base.cast(), bytes) }.map_err(std::io::Error::other)
}
