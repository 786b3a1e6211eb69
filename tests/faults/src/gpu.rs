//! The GPU that workers keep their caches on.

use std::fmt;
use std::str::FromStr;

use crossdock::cuda::driver::Driver;
use crossdock::cuda::{CudaOptions, Gpu, Kernels, fake};
use crossdock::{Error, PortConfig};

/// Which GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GpuChoice {
    /// One that is software of each process.
    Software,
    /// One of the machine's, by its place among those of the process.
    Device(u32),
}

impl GpuChoice {
    /// Opens it, and says how its port is opened.
    pub fn open(self) -> Result<(Gpu, PortConfig), Error> {
        let mut options = CudaOptions::default();
        let gpu = match self {
            GpuChoice::Software => {
                // Kernels are carried out by their definition.
                options.kernels = Kernels::Given(vec![1]);
                Gpu::open(&fake::driver(), 0)?
            }
            GpuChoice::Device(ordinal) => {
                Gpu::open(&Driver::load().map_err(crossdock::cuda::OpenError::Load)?, ordinal)?
            }
        };
        Ok((gpu.clone(), PortConfig::Cuda { gpu, options }))
    }
}

impl FromStr for GpuChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<GpuChoice, String> {
        match text {
            "software" => Ok(GpuChoice::Software),
            number => number.parse().map(GpuChoice::Device).map_err(|_| "software, or a number".into()),
        }
    }
}

impl fmt::Display for GpuChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GpuChoice::Software => f.write_str("software"),
            GpuChoice::Device(ordinal) => write!(f, "{ordinal}"),
        }
    }
}
