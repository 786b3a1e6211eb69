//! A device's primary context, and calls made in it.

use std::ffi::c_int;
use std::ptr;
use std::sync::Arc;

use super::abi::{self, Answer, Handle};
use super::{CudaError, Device, Driver};

/// A device's primary context in this process. A clone is another handle; the last one lets it go.
#[derive(Clone, Debug)]
pub struct Context {
    retained: Arc<Retained>,
}

#[derive(Debug)]
struct Retained {
    device: Device,
    handle: Handle,
    /// The process that retained it: a forked child has no context, and must not ask the driver anything.
    owner: u32,
}

// SAFETY: a context may be used from any thread that has made it current, which `call` does.
unsafe impl Send for Retained {}
// SAFETY: as above; the driver locks it.
unsafe impl Sync for Retained {}

impl Context {
    pub(super) fn retain(device: Device) -> Result<Context, CudaError> {
        let mut handle = ptr::null_mut();
        // SAFETY: the handle can be written.
        let retained =
            unsafe { (device.driver().table().cuDevicePrimaryCtxRetain)(&raw mut handle, device.number()) };
        device.driver().check("cuDevicePrimaryCtxRetain", retained)?;
        let owner = std::process::id();
        Ok(Context { retained: Arc::new(Retained { device, handle, owner }) })
    }

    /// Whose it is.
    pub fn device(&self) -> &Device {
        &self.retained.device
    }

    /// Whether this is the process that retained it.
    pub(super) fn is_here(&self) -> bool {
        self.retained.owner == std::process::id()
    }

    /// Makes it the thread's current one for one call, whatever is current outside of that.
    pub(super) fn call(
        &self,
        name: &'static str,
        call: impl FnOnce(&super::table::Table) -> Answer,
    ) -> Result<(), CudaError> {
        let driver = self.device().driver();
        let answer = self.within(|| call(driver.table()))?;
        driver.check(name, answer)
    }

    /// The same, for an answer that is no failure.
    pub(super) fn within<T>(&self, calls: impl FnOnce() -> T) -> Result<T, CudaError> {
        let driver = self.device().driver();
        if !self.is_here() {
            let name = "CUDA_ERROR_NOT_INITIALIZED";
            return Err(CudaError {
                call: "a call in a forked child",
                code: abi::ERROR_NOT_INITIALIZED,
                name,
            });
        }
        // SAFETY: it is retained.
        let pushed = unsafe { (driver.table().cuCtxPushCurrent_v2)(self.retained.handle) };
        driver.check("cuCtxPushCurrent", pushed)?;
        let pop = Pop(self);
        // While an engine captures one of its streams, the driver refuses what might disturb that, from any thread, and gives the
        // capture up; what is called here disturbs none.
        let mode = exchange_capture_mode(driver, abi::CAPTURE_RELAXED);
        let answer = calls();
        exchange_capture_mode(driver, mode);
        drop(pop);
        Ok(answer)
    }
}

/// Sets the thread's mode, and says which it was.
fn exchange_capture_mode(driver: &Driver, mut mode: c_int) -> c_int {
    // SAFETY: the mode can be written. An answer would say that it is none.
    unsafe { (driver.table().cuThreadExchangeStreamCaptureMode)(&raw mut mode) };
    mode
}

/// Takes the context off the thread's stack, also where a call panics.
struct Pop<'a>(&'a Context);

impl Drop for Pop<'_> {
    fn drop(&mut self) {
        let mut popped = ptr::null_mut();
        // SAFETY: it was pushed by this thread, and whatever was pushed since was popped; the handle can be written. An answer
        // would say that nothing was pushed.
        unsafe { (self.0.device().driver().table().cuCtxPopCurrent_v2)(&raw mut popped) };
    }
}

impl Drop for Retained {
    fn drop(&mut self) {
        if self.owner != std::process::id() {
            return;
        }
        // SAFETY: it was retained once by this. An answer would say that the driver is being unloaded.
        unsafe { (self.device.driver().table().cuDevicePrimaryCtxRelease_v2)(self.device.number()) };
    }
}
