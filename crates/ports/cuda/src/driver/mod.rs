//! The CUDA driver, looked for at run time: devices, contexts, memory, streams, kernels.
//!
//! All unsafe calls of the driver are in this folder. Nothing in here chooses anything; what is allocated, mapped or created is an
//! object that undoes that when it is dropped, on whichever thread.
#![allow(unsafe_code)]

pub(crate) mod abi;
mod context;
mod device;
mod host;
mod memory;
mod pointer;
mod queue;
pub(crate) mod table;

use std::fmt;
use std::sync::Arc;

pub use abi::FabricHandle;
pub use context::Context;
pub use device::{Device, Facts, HandleTypes, WritesOrdering};
pub use host::HostRegistration;
pub use memory::{Allocated, Foreign, IpcToken, Mapped, Physical, Shareable};
pub use pointer::{PointerFacts, Range, Residence};
pub use queue::{Event, Function, Module, Stream};

use abi::Answer;
use table::Table;

/// The driver, initialised. A clone is another handle.
#[derive(Clone, Debug)]
pub struct Driver {
    table: Arc<Table>,
    version: u32,
}

/// Why there is no driver.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The library is not there.
    #[error("libcuda.so.1 is not found")]
    NoLibrary,
    /// It is too old: a function is missing.
    #[error("libcuda.so.1 has no {name}")]
    NoFunction {
        /// Which.
        name: &'static str,
    },
    /// It is there, and finds no device.
    #[error("the driver finds no device")]
    NoDevice,
    /// It does not start.
    #[error(transparent)]
    Driver(#[from] CudaError),
}

impl LoadError {
    /// What can be done about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::NoLibrary => {
                "install NVIDIA's driver; in a container, ask the runtime for the GPU's `compute` capability"
            }
            Self::NoFunction { .. } => "update the driver: this needs one for CUDA 12.0 (525) or newer",
            Self::NoDevice => {
                "look at nvidia-smi, and at CUDA_VISIBLE_DEVICES; a container has to be given the device"
            }
            Self::Driver(error) => error.advice(),
        }
    }
}

/// The driver has refused a call, or reports that earlier work has failed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CudaError {
    /// Its function.
    pub call: &'static str,
    /// Its answer, a `CUresult`.
    pub code: i32,
    /// What the driver calls that.
    pub name: &'static str,
}

impl CudaError {
    /// What can be done about it.
    pub fn advice(&self) -> &'static str {
        match self.code {
            abi::ERROR_OUT_OF_MEMORY => "free memory of the GPU, or ask for less",
            abi::ERROR_NO_DEVICE => "look at nvidia-smi, and at CUDA_VISIBLE_DEVICES",
            abi::ERROR_NOT_PERMITTED => {
                "run both sides as one user; for fabric handles, an IMEX channel has to be given to this process"
            }
            abi::ERROR_NOT_SUPPORTED => {
                "this device or driver cannot: see what `crossdock doctor` says of the GPU"
            }
            abi::ERROR_SYSTEM_NOT_READY => {
                "the GPUs wait for their NVSwitches: systemctl status nvidia-fabricmanager, and what nvidia-smi -q says of the fabric"
            }
            abi::ERROR_SYSTEM_DRIVER_MISMATCH => {
                "libcuda.so.1 and the kernel's driver are of different versions: load the driver anew, or start the container again"
            }
            abi::ERROR_ILLEGAL_ADDRESS => {
                "the GPU's context is lost: something on it has touched memory that is not mapped; start the process again"
            }
            _ => "look at what `crossdock doctor` says of the GPU, and at the kernel log",
        }
    }

    /// Whether somebody captures a stream, and the call was not to be made meanwhile.
    pub fn is_of_capture(&self) -> bool {
        matches!(self.code, 900..=999)
    }

    /// Whether memory is short.
    pub fn is_out_of_memory(&self) -> bool {
        self.code == abi::ERROR_OUT_OF_MEMORY
    }

    /// Whether nothing more can be done in the process's context: everything in it fails from now on.
    pub fn is_sticky(&self) -> bool {
        // The driver is gone (4), the device has failed (214, 220, 226), a kernel has (700, 702, 710, 714 to 719, 721), or somebody
        // has destroyed the context (709).
        matches!(self.code, 4 | 214 | 220 | 226 | 700 | 702 | 709 | 710 | 714..=719 | 721)
    }
}

impl fmt::Display for CudaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} answers {} ({})", self.call, self.name, self.code)
    }
}

impl fmt::Debug for CudaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for CudaError {}

impl Driver {
    /// Looks for the driver and starts it.
    pub fn load() -> Result<Driver, LoadError> {
        Driver::with_table(Table::load()?)
    }

    pub(crate) fn with_table(table: Table) -> Result<Driver, LoadError> {
        let table = Arc::new(table);
        let mut version = 0;
        // SAFETY: takes no pointer.
        let started = unsafe { (table.cuInit)(0) };
        if started == abi::ERROR_NO_DEVICE {
            return Err(LoadError::NoDevice);
        }
        check(&table, "cuInit", started)?;
        // SAFETY: the number can be written.
        check(&table, "cuDriverGetVersion", unsafe { (table.cuDriverGetVersion)(&raw mut version) })?;
        Ok(Driver { table, version: version.unsigned_abs() })
    }

    /// The newest CUDA that it serves: 12080 is 12.8.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// All devices that this process may use.
    pub fn devices(&self) -> Result<Vec<Device>, CudaError> {
        let mut count = 0;
        // SAFETY: the number can be written.
        self.check("cuDeviceGetCount", unsafe { (self.table.cuDeviceGetCount)(&raw mut count) })?;
        (0..count).map(|ordinal| self.device(ordinal.unsigned_abs())).collect()
    }

    /// One device, by its place among those.
    pub fn device(&self, ordinal: u32) -> Result<Device, CudaError> {
        let mut number = 0;
        let ordinal = i32::try_from(ordinal).unwrap_or(i32::MAX);
        // SAFETY: the number can be written.
        self.check("cuDeviceGet", unsafe { (self.table.cuDeviceGet)(&raw mut number, ordinal) })?;
        Ok(Device::new(self.clone(), number, ordinal.unsigned_abs()))
    }

    fn table(&self) -> &Table {
        &self.table
    }

    fn check(&self, call: &'static str, answer: Answer) -> Result<(), CudaError> {
        check(&self.table, call, answer)
    }
}

fn check(table: &Table, call: &'static str, answer: Answer) -> Result<(), CudaError> {
    match answer {
        abi::SUCCESS => Ok(()),
        code => Err(CudaError { call, code, name: table.name_of(code) }),
    }
}
