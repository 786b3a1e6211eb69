//! What tests run on: a driver without a GPU, or, where `CROSSDOCK_CUDA_DEVICE` names one by its place, a GPU of this machine.
#![allow(dead_code, reason = "not every test needs all of it")]

use std::sync::OnceLock;

use crossdock_cuda::driver::Driver;
use crossdock_cuda::{CudaOptions, Gpu, Kernels, PAGES, fake};
use crossdock_host::HostOptions;

/// The place of the GPU that tests may use.
pub fn device() -> Option<u32> {
    let place = std::env::var("CROSSDOCK_CUDA_DEVICE").ok()?;
    Some(place.parse().expect("CROSSDOCK_CUDA_DEVICE is a number"))
}

/// The driver.
pub fn driver() -> Driver {
    static REAL: OnceLock<Driver> = OnceLock::new();
    match device() {
        Some(_) => REAL.get_or_init(|| Driver::load().expect("a driver where a GPU is named")).clone(),
        None => fake::driver(),
    }
}

/// The GPU: the machine's, or one of software that is like those of a server.
pub fn gpu() -> Gpu {
    Gpu::open(&driver(), device().unwrap_or(0)).expect("a GPU")
}

/// Kernels for it; software carries them out by their definition.
pub fn image() -> &'static [u8] {
    PAGES.portable.as_bytes()
}

/// How ports of tests are opened: they give up soon.
pub fn options() -> CudaOptions {
    let connect_timeout = std::time::Duration::from_millis(if device().is_some() { 2_000 } else { 500 });
    CudaOptions {
        kernels: Kernels::Given(image().to_vec()),
        lanes: HostOptions { connect_timeout, ..CudaOptions::default().lanes },
        ..CudaOptions::default()
    }
}

/// For tests that need the driver without a GPU, and one of its devices for themselves: true where they are to do nothing.
pub fn is_skipped_on_a_gpu() -> bool {
    if device().is_some() {
        eprintln!("SKIPPED: needs the driver without a GPU");
    }
    device().is_some()
}
