//! The structs that the library's users hold pointers to.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::{Arc, Weak};

use super::Shared;
use crate::ibverbs::sys::{ibv_context, ibv_device};

/// A struct of libibverbs, and behind it the number by which the fabric knows the object.
#[repr(C)]
struct Tagged<H> {
    head: H,
    id: u32,
}

/// The owner of such a struct. Its users have pointers, so no reference to the whole is ever made.
pub(super) struct Raw<H>(NonNull<Tagged<H>>);

// SAFETY: it owns its struct as a box would, whose pointers lead to structs that live longer; all changes are made under the
// lock of the fabric.
unsafe impl<H> Send for Raw<H> {}

impl<H> Raw<H> {
    pub fn new(head: H, id: u32) -> Self {
        Self(NonNull::from(Box::leak(Box::new(Tagged { head, id }))))
    }

    pub fn head(&self) -> *mut H {
        self.0.as_ptr().cast()
    }
}

impl<H> Drop for Raw<H> {
    fn drop(&mut self) {
        // SAFETY: it came out of a box, and is dropped once.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

/// The number of an object.
///
/// # Safety
/// `head` came from [`Raw::head`], and its fabric lives.
pub(super) unsafe fn id_of<H>(head: *mut H) -> u32 {
    // SAFETY: the struct is kept, even after it was destroyed, as long as the fabric.
    unsafe { (*head.cast::<Tagged<H>>()).id }
}

/// A device, and how its fabric is found.
#[repr(C)]
pub(super) struct RawDevice {
    pub head: ibv_device,
    pub fabric: Weak<Shared>,
    pub index: usize,
}

// SAFETY: its pointers are null or to itself, and it is never changed.
unsafe impl Send for RawDevice {}
// SAFETY: as above.
unsafe impl Sync for RawDevice {}

/// An open device, which keeps its fabric.
#[repr(C)]
pub(super) struct RawContext {
    pub head: ibv_context,
    pub fabric: Arc<Shared>,
    pub id: u32,
}
