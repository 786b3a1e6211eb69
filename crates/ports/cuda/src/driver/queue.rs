//! Streams, events and kernels: work that a device does in order.

use std::ffi::{CString, c_void};
use std::ptr;
use std::sync::Arc;

use super::abi::{self, Handle};
use super::{Context, CudaError};

/// A queue of work on one device. Destroying it waits for nothing: what was enqueued goes on.
#[derive(Debug)]
pub struct Stream {
    context: Context,
    handle: Handle,
    /// Somebody else's is left alone.
    is_ours: bool,
}

/// A point in a stream.
#[derive(Debug)]
pub struct Event {
    context: Context,
    handle: Handle,
}

/// Loaded kernels. A clone is another handle.
#[derive(Clone, Debug)]
pub struct Module {
    loaded: Arc<Loaded>,
}

#[derive(Debug)]
struct Loaded {
    context: Context,
    handle: Handle,
}

/// One kernel of a module.
#[derive(Clone, Debug)]
pub struct Function {
    module: Module,
    handle: Handle,
}

// SAFETY: the driver lets every thread use its streams, events, modules and functions, and locks them.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}
// SAFETY: as above.
unsafe impl Send for Function {}

impl Context {
    /// A stream that does not wait for the default one.
    pub fn stream(&self) -> Result<Stream, CudaError> {
        let mut handle = ptr::null_mut();
        self.call("cuStreamCreate", |table| {
            // SAFETY: the handle can be written.
            unsafe { (table.cuStreamCreate)(&raw mut handle, abi::STREAM_NON_BLOCKING) }
        })?;
        Ok(Stream { context: self.clone(), handle, is_ours: true })
    }

    /// An event without a time.
    pub fn event(&self) -> Result<Event, CudaError> {
        let mut handle = ptr::null_mut();
        self.call("cuEventCreate", |table| {
            // SAFETY: the handle can be written.
            unsafe { (table.cuEventCreate)(&raw mut handle, abi::EVENT_DISABLE_TIMING) }
        })?;
        Ok(Event { context: self.clone(), handle })
    }

    /// Loads what a [compiler](crate::compiler::Compiler) has made, machine code or PTX.
    pub fn load(&self, image: &[u8]) -> Result<Module, CudaError> {
        // The driver finds the end of an image by itself: by its header, or, where it is a text, by a NUL.
        let mut image = image.to_vec();
        image.push(0);
        let mut handle = ptr::null_mut();
        self.call("cuModuleLoadData", |table| {
            // SAFETY: the handle can be written; the image is whole, and lives during the call.
            unsafe { (table.cuModuleLoadData)(&raw mut handle, image.as_ptr().cast()) }
        })?;
        Ok(Module { loaded: Arc::new(Loaded { context: self.clone(), handle }) })
    }
}

impl Module {
    /// One of its kernels.
    pub fn function(&self, name: &str) -> Result<Function, CudaError> {
        let (mut handle, name) = (ptr::null_mut(), CString::new(name).unwrap_or_default());
        self.loaded.context.call("cuModuleGetFunction", |table| {
            // SAFETY: the handle can be written; the name lives during the call.
            unsafe { (table.cuModuleGetFunction)(&raw mut handle, self.loaded.handle, name.as_ptr()) }
        })?;
        Ok(Function { module: self.clone(), handle })
    }
}

impl Stream {
    /// Somebody else's stream, which is not destroyed with this.
    ///
    /// # Safety
    /// It is a stream of the context's, and stays one as long as this lives.
    pub unsafe fn adopt(context: &Context, handle: *mut c_void) -> Stream {
        Stream { context: context.clone(), handle, is_ours: false }
    }

    /// Enqueues a kernel.
    ///
    /// # Safety
    /// `arguments` leads to as many values as the kernel has parameters, of its types; they are copied during the call. What the
    /// kernel is told to read and write stays as it needs it until the kernel has ended.
    pub unsafe fn launch(
        &self,
        function: &Function,
        blocks: u32,
        block_threads: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        debug_assert_eq!(function.module.loaded.context.device(), self.context.device());
        self.context.call("cuLaunchKernel", |table| {
            // SAFETY: as the caller promises; function and stream are alive.
            unsafe {
                (table.cuLaunchKernel)(
                    function.handle,
                    blocks,
                    1,
                    1,
                    block_threads,
                    1,
                    1,
                    0,
                    self.handle,
                    arguments.as_mut_ptr(),
                    ptr::null_mut(),
                )
            }
        })
    }

    /// Enqueues a copy of bytes, on a copy engine where there is one for it.
    ///
    /// # Safety
    /// Both ranges are the host's pinned or a device's memory that this one reaches, and stay so until the copy has ended.
    pub unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), CudaError> {
        self.context.call("cuMemcpyAsync", |table| {
            // SAFETY: as the caller promises; the stream is alive.
            unsafe { (table.cuMemcpyAsync)(to, from, bytes, self.handle) }
        })
    }

    /// Enqueues the filling of bytes.
    ///
    /// # Safety
    /// As [`copy`](Stream::copy).
    pub unsafe fn fill(&self, to: u64, bytes: usize, value: u8) -> Result<(), CudaError> {
        self.context.call("cuMemsetD8Async", |table| {
            // SAFETY: as the caller promises; the stream is alive.
            unsafe { (table.cuMemsetD8Async)(to, value, bytes, self.handle) }
        })
    }

    /// Enqueues the filling of words of 32 bits, from a multiple of 4 on.
    ///
    /// # Safety
    /// As [`copy`](Stream::copy).
    pub unsafe fn fill_words(&self, to: u64, words: usize, value: u32) -> Result<(), CudaError> {
        self.context.call("cuMemsetD32Async", |table| {
            // SAFETY: as the caller promises; the stream is alive.
            unsafe { (table.cuMemsetD32Async)(to, value, words, self.handle) }
        })
    }

    /// What follows waits until the event's point is reached.
    pub fn wait_for(&self, event: &Event) -> Result<(), CudaError> {
        self.context.call("cuStreamWaitEvent", |table| {
            // SAFETY: both are alive; the driver keeps what it needs of the event.
            unsafe { (table.cuStreamWaitEvent)(self.handle, event.handle, 0) }
        })
    }

    /// What follows waits until the word at an address is at least `value`.
    pub(crate) fn wait_value(&self, address: u64, value: u32) -> Result<(), CudaError> {
        self.context.call("cuStreamWaitValue32", |table| {
            // SAFETY: the stream is alive; the driver refuses an address that it has not mapped.
            unsafe { (table.cuStreamWaitValue32_v2)(self.handle, address, value, abi::WAIT_VALUE_GEQ) }
        })
    }

    /// Lets the event stand for all that was enqueued before.
    pub fn record(&self, event: &Event) -> Result<(), CudaError> {
        self.context.call("cuEventRecord", |table| {
            // SAFETY: both are alive.
            unsafe { (table.cuEventRecord)(event.handle, self.handle) }
        })
    }

    /// Whether all that was enqueued has ended.
    pub fn is_idle(&self) -> Result<bool, CudaError> {
        is_ready(self.context.call("cuStreamQuery", |table| {
            // SAFETY: the stream is alive.
            unsafe { (table.cuStreamQuery)(self.handle) }
        }))
    }

    /// Waits until all that was enqueued has ended.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.context.call("cuStreamSynchronize", |table| {
            // SAFETY: the stream is alive.
            unsafe { (table.cuStreamSynchronize)(self.handle) }
        })
    }
}

impl Event {
    /// Whether its point is reached.
    pub fn is_reached(&self) -> Result<bool, CudaError> {
        is_ready(self.context.call("cuEventQuery", |table| {
            // SAFETY: the event is alive.
            unsafe { (table.cuEventQuery)(self.handle) }
        }))
    }
}

fn is_ready(asked: Result<(), CudaError>) -> Result<bool, CudaError> {
    match asked {
        Ok(()) => Ok(true),
        Err(error) if error.code == abi::ERROR_NOT_READY => Ok(false),
        Err(error) => Err(error),
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.is_ours {
            // An answer would say that the context is lost.
            let _ = self.context.call("cuStreamDestroy", |table| {
                // SAFETY: this created it, and nothing is enqueued any more.
                unsafe { (table.cuStreamDestroy_v2)(self.handle) }
            });
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // As above.
        let _ = self.context.call("cuEventDestroy", |table| {
            // SAFETY: this created it; the driver keeps what is still waited for.
            unsafe { (table.cuEventDestroy_v2)(self.handle) }
        });
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // As above.
        let _ = self.context.call("cuModuleUnload", |table| {
            // SAFETY: this loaded it; whoever launches its kernels waits for their end first.
            unsafe { (table.cuModuleUnload)(self.handle) }
        });
    }
}
