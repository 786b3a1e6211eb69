//! Which RDMA devices, GPUs and NUMA nodes a machine has, and how near they are to each other: all that the kernel tells
//! in `/sys` and `/proc`, without libibverbs and without a driver's library.
//!
//! [`Topology::read`] takes the root folder, so that the tree of another machine can be read too. What a kernel does not
//! tell is `None` or empty here, and no error: a virtual machine has no PCIe slots, and a software device has no PCI
//! address at all.

mod files;
mod gpu;
mod numa;
mod pci;
pub(crate) mod rdma;

use std::path::Path;

pub use gpu::Gpu;
pub use numa::{NumaNode, numbers_of_list};
pub use pci::{Distance, PciAddress, PciDevice, PcieLanes, PcieLink};
pub use rdma::{Gid, GidKind, LinkLayer, PortState, RdmaDevice, RdmaPort};

/// What a machine has and where it is plugged in.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Topology {
    /// The RDMA devices, by name, `mlx5_2` before `mlx5_10`.
    pub devices: Vec<RdmaDevice>,
    /// The GPUs of NVIDIA, by PCI address.
    pub gpus: Vec<Gpu>,
    /// Network adapters on the PCI bus, by address, with RDMA or without.
    pub adapters: Vec<PciDevice>,
    /// The NUMA nodes, by number.
    pub nodes: Vec<NumaNode>,
}

impl Topology {
    /// Reads the machine whose `/sys`, `/proc` and `/dev` lie in `root`: `/` for this one.
    pub fn read(root: &Path) -> Self {
        let pci = pci::read(root);
        Self {
            devices: rdma::read(root),
            gpus: gpu::read(root, &pci),
            adapters: pci.into_iter().filter(PciDevice::is_adapter).collect(),
            nodes: numa::read(root),
        }
    }

    /// How far two devices are from each other.
    pub fn distance(&self, one: &PciDevice, other: &PciDevice) -> Distance {
        let is_one_node = self.nodes.len() <= 1 || (one.node.is_some() && one.node == other.node);
        pci::distance(one, other, is_one_node)
    }

    /// The RDMA devices that are nearest to a GPU, all those at the same distance. Devices without a place on the PCI
    /// bus are never near.
    pub fn near_gpu(&self, gpu: &Gpu) -> Vec<&RdmaDevice> {
        self.near_gpu_among(gpu, |_| true)
    }

    /// The same, of the devices that are `wanted`.
    pub fn near_gpu_among(&self, gpu: &Gpu, wanted: impl Fn(&RdmaDevice) -> bool) -> Vec<&RdmaDevice> {
        let placed = self
            .devices
            .iter()
            .filter(|device| wanted(device))
            .filter_map(|device| Some((self.distance(&gpu.pci, device.pci.as_ref()?), device)));
        let placed: Vec<(Distance, &RdmaDevice)> = placed.collect();
        let least = placed.iter().map(|(distance, _)| *distance).min();
        placed
            .into_iter()
            .filter(|(distance, _)| Some(*distance) == least)
            .map(|(_, device)| device)
            .collect()
    }

    /// The RDMA devices of a NUMA node; those of the node that is nearest, where it has none. A device whose node is
    /// not known is as near to one node as to another.
    pub fn near_node(&self, node: u32) -> Vec<&RdmaDevice> {
        self.near_node_among(node, |_| true)
    }

    /// The same, of the devices that are `wanted`.
    pub fn near_node_among(&self, node: u32, wanted: impl Fn(&RdmaDevice) -> bool) -> Vec<&RdmaDevice> {
        let distances =
            self.nodes.iter().find(|known| known.number == node).map(|known| &known.distances[..]);
        let far = |device: &RdmaDevice| match device.node() {
            None => None,
            Some(own) if own == node => Some(0),
            // The order of the list is that of the nodes; nodes without numbers in between are rare and harmless.
            Some(own) => {
                let at = self.nodes.iter().position(|known| known.number == own);
                Some(at.and_then(|at| distances?.get(at).copied()).unwrap_or(u32::MAX))
            }
        };
        let devices: Vec<&RdmaDevice> = self.devices.iter().filter(|device| wanted(device)).collect();
        let least = devices.iter().copied().filter_map(far).min();
        devices.into_iter().filter(|device| far(device).is_none_or(|far| Some(far) == least)).collect()
    }
}
