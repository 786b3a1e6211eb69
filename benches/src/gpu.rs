//! The GPU that a benchmark's pools are on, or that moves them.

use std::fmt;
use std::str::FromStr;

use crossdock::cuda::driver::Driver;
use crossdock::cuda::{CudaOptions, Gpu, Kernels, Mover, OpenError, fake};
use serde::{Deserialize, Serialize};

/// Which GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum GpuChoice {
    /// The driver without a GPU: software of each process.
    Software,
    /// One of the machine's, by its place among those of the process.
    Device(u32),
}

/// A GPU, and how ports of it are opened.
#[derive(Clone, Debug)]
pub struct OpenGpu {
    /// Which it is.
    pub choice: GpuChoice,
    /// The GPU.
    pub gpu: Gpu,
    /// With the kernels that it understands.
    pub options: CudaOptions,
}

impl GpuChoice {
    /// Opens it in this process.
    pub fn open(self) -> Result<OpenGpu, OpenError> {
        let mut options = CudaOptions::default();
        let gpu = match self {
            GpuChoice::Software => {
                // Nothing is compiled for it: it carries kernels out by their definition.
                options.kernels = Kernels::Given(vec![1]);
                Gpu::open(&fake::driver(), 0)?
            }
            GpuChoice::Device(ordinal) => Gpu::open(&Driver::load()?, ordinal)?,
        };
        Ok(OpenGpu { choice: self, gpu, options })
    }
}

impl OpenGpu {
    /// A mover with the kernels and the limits of the port's own.
    pub fn mover(&self) -> Result<Mover, OpenError> {
        let image = self.options.kernels.image(&self.gpu);
        Ok(Mover::new(&self.gpu, &image, self.options.limits)?)
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

impl TryFrom<String> for GpuChoice {
    type Error = String;

    fn try_from(text: String) -> Result<GpuChoice, String> {
        text.parse()
    }
}

impl From<GpuChoice> for String {
    fn from(choice: GpuChoice) -> String {
        choice.to_string()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_is_read_as_it_is_written() {
        for choice in [GpuChoice::Software, GpuChoice::Device(0), GpuChoice::Device(7)] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
            let told = serde_json::to_string(&choice).unwrap();
            assert_eq!(serde_json::from_str::<GpuChoice>(&told).unwrap(), choice);
        }
        assert!("hardware".parse::<GpuChoice>().is_err() && "-1".parse::<GpuChoice>().is_err());
    }
}
