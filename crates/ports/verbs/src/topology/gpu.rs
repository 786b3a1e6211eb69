//! GPUs of NVIDIA, as the PCI bus and the driver's folder in `/proc` show them.

use std::path::Path;

use super::files::{below, text};
use super::pci::PciDevice;

/// A GPU.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpu {
    /// Its place on the PCI bus.
    pub pci: PciDevice,
    /// What the driver calls it. A GPU without this is not run by NVIDIA's driver, or was not given to this container.
    pub model: Option<String>,
    /// The number in `/dev/nvidia0`.
    pub minor: Option<u32>,
}

pub fn read(root: &Path, pci: &[PciDevice]) -> Vec<Gpu> {
    let known = below(root, "/proc/driver/nvidia/gpus");
    let gpus = pci.iter().filter(|device| device.is_nvidia_gpu());
    gpus.map(|device| {
        let information =
            text(&known.join(device.address.to_string()).join("information")).unwrap_or_default();
        let field = |name: &str| {
            let of_name = |line: &str| {
                Some(line.split_once(':').filter(|(key, _)| key.trim() == name)?.1.trim().to_owned())
            };
            information.lines().find_map(of_name)
        };
        Gpu {
            pci: device.clone(),
            model: field("Model"),
            minor: field("Device Minor").and_then(|minor| minor.parse().ok()),
        }
    })
    .collect()
}
