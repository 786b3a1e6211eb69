//! Which devices a node uses as its rails.

use crate::options::VerbsOptions;
use crate::topology::{LinkLayer, PciAddress, RdmaDevice, RdmaPort, Topology};

/// What the rails of a node are to be near to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Near {
    /// Nothing: every usable port of the machine is a rail.
    Anything,
    /// A GPU, by its PCI address.
    Gpu(PciAddress),
    /// The memory and processors of a NUMA node.
    NumaNode(u32),
}

/// Options for a port on each usable device port that is nearest to what they are to be near to: each as `like`, with its
/// device and port named. A device that `like` names is taken wherever it is. Empty where there is none.
///
/// Of a machine's devices only those with the fastest link that the near ones have are taken: a management adapter of
/// 25 Gb/s beside eight of 400 would be a rail that nobody wants.
pub fn rails(topology: &Topology, near: Near, like: &VerbsOptions) -> Vec<VerbsOptions> {
    let devices: Vec<&RdmaDevice> = match (&like.device, near) {
        (Some(name), _) => topology.devices.iter().filter(|device| device.name == *name).collect(),
        (None, Near::Anything) => topology.devices.iter().collect(),
        (None, Near::Gpu(address)) => near_gpu(topology, address),
        (None, Near::NumaNode(node)) => topology.near_node_among(node, is_usable),
    };
    // An iWARP adapter has ports that look usable, and another way to connect.
    let devices = devices.into_iter().filter(|device| device.node_type.as_deref() != Some("RNIC"));
    let wanted = |port: &&RdmaPort| {
        port.is_usable()
            && port.link_layer != LinkLayer::Other
            && like.port.is_none_or(|number| u32::from(number) == port.number)
    };
    let ports: Vec<(&RdmaDevice, &RdmaPort)> = devices
        .flat_map(|device| device.ports.iter().filter(wanted).map(move |port| (device, port)))
        .collect();
    let rate = |port: &RdmaPort| port.gbit_per_s.unwrap_or(0.0);
    let fastest = ports.iter().map(|(_, port)| rate(port)).fold(0.0, f64::max);
    let chosen = ports.into_iter().filter(|(_, port)| like.device.is_some() || rate(port) >= fastest);
    chosen
        .filter_map(|(device, port)| {
            let mut options = like.clone();
            options.device = Some(device.name.clone());
            options.port = Some(u8::try_from(port.number).ok()?);
            Some(options)
        })
        .collect()
}

/// The usable devices at the least distance from a GPU; where none has a place on the PCI bus, all that are usable.
fn near_gpu(topology: &Topology, address: PciAddress) -> Vec<&RdmaDevice> {
    let Some(gpu) = topology.gpus.iter().find(|gpu| gpu.pci.address == address) else { return Vec::new() };
    let near = topology.near_gpu_among(gpu, is_usable);
    if near.is_empty() { topology.devices.iter().filter(|device| is_usable(device)).collect() } else { near }
}

fn is_usable(device: &RdmaDevice) -> bool {
    device.ports.iter().any(RdmaPort::is_usable)
}
