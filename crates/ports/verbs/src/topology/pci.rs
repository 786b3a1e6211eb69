//! The PCI tree: who hangs where, and what lies between two devices.

use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use super::files::{below, hexadecimal, names, number, target_name, text};

/// Domain, bus, device and function, `0000:18:00.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Of the host bridge, or of several.
    pub domain: u32,
    /// In the domain.
    pub bus: u8,
    /// On the bus.
    pub device: u8,
    /// Of the device.
    pub function: u8,
}

/// A device on the PCI bus.
#[derive(Clone, Debug, PartialEq)]
pub struct PciDevice {
    /// Its address.
    pub address: PciAddress,
    /// Who makes it: 0x10de is NVIDIA, 0x15b3 Mellanox.
    pub vendor: u32,
    /// What it is: 0x030200 is a GPU without a screen, 0x02.... a network adapter.
    pub class: u32,
    /// The kernel's driver that has it.
    pub driver: Option<String>,
    /// The NUMA node that its host bridge belongs to.
    pub node: Option<u32>,
    /// The host bridge that it hangs below, `pci0000:15`.
    pub root: Option<String>,
    /// What lies between host bridge and device, from above, with the device as the last.
    pub path: Vec<PciAddress>,
    /// Its PCIe link; a virtual function has none of its own.
    pub link: Option<PcieLink>,
    /// Whether it may mark its writes as ones that pass others; only root is told.
    pub relaxed_ordering: Option<bool>,
}

/// A PCIe link as it runs and as it could.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PcieLink {
    /// What was negotiated.
    pub current: PcieLanes,
    /// What the device can do.
    pub most: PcieLanes,
    /// What the slot can do: the port of the bridge above.
    pub slot: Option<PcieLanes>,
}

/// Speed and width of a link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PcieLanes {
    /// Of each lane; 32 is the fifth generation.
    pub gt_per_s: f64,
    /// Lanes.
    pub width: u32,
}

/// What lies between two devices, in the words of `nvidia-smi topo`; the nearest is the smallest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Distance {
    /// Both are one device.
    Same,
    /// One PCIe switch, or one adapter.
    Pix,
    /// Several PCIe switches, and no host bridge.
    Pxb,
    /// A host bridge.
    Phb,
    /// Two host bridges of one NUMA node.
    Node,
    /// The way between NUMA nodes; also where nobody knows.
    Sys,
}

impl PciDevice {
    /// A GPU of NVIDIA's, with a screen or without.
    pub fn is_nvidia_gpu(&self) -> bool {
        self.vendor == NVIDIA && matches!(self.class >> 8, 0x0300 | 0x0302)
    }

    /// A network adapter: Ethernet, InfiniBand or another.
    pub fn is_adapter(&self) -> bool {
        self.class >> 16 == 0x02
    }
}

impl PcieLink {
    /// Whether the link runs below what both its ends can do.
    pub fn is_degraded(&self) -> bool {
        let slot = self.slot.unwrap_or(self.most);
        self.current.gt_per_s < self.most.gt_per_s.min(slot.gt_per_s)
            || self.current.width < self.most.width.min(slot.width)
    }
}

impl PcieLanes {
    /// What the lanes carry, without the overhead of packets.
    pub fn gbit_per_s(&self) -> f64 {
        // Before the third generation eight bits took ten, since then 128 take 130.
        let of_ten = if self.gt_per_s < 8.0 { 0.8 } else { 128.0 / 130.0 };
        self.gt_per_s * f64::from(self.width) * of_ten
    }
}

impl Distance {
    /// As `nvidia-smi topo` writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Same => "X",
            Self::Pix => "PIX",
            Self::Pxb => "PXB",
            Self::Phb => "PHB",
            Self::Node => "NODE",
            Self::Sys => "SYS",
        }
    }
}

pub fn read(root: &Path) -> Vec<PciDevice> {
    let bus = below(root, "/sys/bus/pci/devices");
    let mut devices: Vec<PciDevice> = names(&bus).iter().filter_map(|name| at(&bus.join(name))).collect();
    devices.sort_by_key(|device| device.address);
    devices
}

/// The device whose folder this is, or a link to it.
pub fn at(folder: &Path) -> Option<PciDevice> {
    let folder = folder.canonicalize().ok()?;
    let address = folder.file_name()?.to_str()?.parse().ok()?;
    let (root, path) = place(&folder);
    Some(PciDevice {
        address,
        vendor: hexadecimal(&folder.join("vendor"))?,
        class: hexadecimal(&folder.join("class"))?,
        driver: target_name(&folder.join("driver")),
        node: node_of(&folder),
        link: link_of(&folder, path.len() > 1),
        relaxed_ordering: fs::read(folder.join("config")).ok().and_then(|config| relaxed_ordering(&config)),
        root,
        path,
    })
}

/// The NUMA node in a device's folder; -1 is none.
pub fn node_of(folder: &Path) -> Option<u32> {
    number(&folder.join("numa_node"))
}

/// Bit 4 of the Device Control register in the PCI Express capability, by the list of capabilities (PCI Express Base
/// Specification, 7.5.3.4). Others than root are given the first 64 bytes alone, in which it does not lie.
fn relaxed_ordering(config: &[u8]) -> Option<bool> {
    const STATUS_HAS_LIST: u8 = 1 << 4;
    const PCI_EXPRESS: u8 = 0x10;
    let byte = |at: usize| config.get(at).copied();
    if byte(0x06)? & STATUS_HAS_LIST == 0 {
        return None;
    }
    let mut at = usize::from(byte(0x34)? & !3);
    // A list that leads back to its beginning is no list.
    for _ in 0..48 {
        if at < 0x40 {
            return None;
        }
        if byte(at)? == PCI_EXPRESS {
            return Some(byte(at + 8)? & 1 << 4 != 0);
        }
        at = usize::from(byte(at + 1)? & !3);
    }
    None
}

/// Host bridge and path below it, by the names of the folders: `.../pci0000:15/0000:15:01.0/0000:16:00.0`.
fn place(folder: &Path) -> (Option<String>, Vec<PciAddress>) {
    let (mut root, mut path) = (None, Vec::new());
    for name in folder.iter().filter_map(|name| name.to_str()) {
        match (name.strip_prefix("pci"), name.parse()) {
            // A bridge that makes a domain of its own below another device begins anew.
            (Some(bus), _) if bus.contains(':') => (root, path) = (Some(name.to_owned()), Vec::new()),
            (_, Ok(address)) => path.push(address),
            _ => {}
        }
    }
    (root, path)
}

fn link_of(folder: &Path, has_bridge: bool) -> Option<PcieLink> {
    let bridge = folder.parent().filter(|_| has_bridge);
    Some(PcieLink {
        current: lanes(folder, "current")?,
        most: lanes(folder, "max")?,
        slot: bridge.and_then(|bridge| lanes(bridge, "max")),
    })
}

/// `32.0 GT/s PCIe` and `16`; a link that the kernel does not know is `Unknown`, or 0 or 255 lanes wide.
fn lanes(folder: &Path, which: &str) -> Option<PcieLanes> {
    let speed = text(&folder.join(format!("{which}_link_speed")))?;
    let gt_per_s = speed.split_whitespace().next()?.parse().ok()?;
    let width =
        number(&folder.join(format!("{which}_link_width"))).filter(|width| (1..=32).contains(width))?;
    Some(PcieLanes { gt_per_s, width })
}

pub fn distance(one: &PciDevice, other: &PciDevice, is_one_node: bool) -> Distance {
    if one.address == other.address {
        return Distance::Same;
    }
    if one.root.is_none() || one.root != other.root {
        return if is_one_node { Distance::Node } else { Distance::Sys };
    }
    let common = one.path.iter().zip(&other.path).take_while(|(one, other)| one == other).count();
    // Below what both share: a port of the switch and the device, or less where both are functions of one device.
    let below = one.path.len().max(other.path.len()) - common;
    match (common, below) {
        (0, _) => Distance::Phb,
        (_, ..=2) => Distance::Pix,
        _ => Distance::Pxb,
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl fmt::Display for PcieLanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} GT/s x{}", self.gt_per_s, self.width)
    }
}

impl fmt::Display for Distance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for PciAddress {
    type Err = NoPciAddress;

    fn from_str(text: &str) -> Result<Self, NoPciAddress> {
        let parts = || {
            let (domain, rest) = text.split_once(':')?;
            let (bus, rest) = rest.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            Some(Self {
                domain: u32::from_str_radix(domain, 16).ok()?,
                bus: u8::from_str_radix(bus, 16).ok()?,
                device: u8::from_str_radix(device, 16).ok()?,
                function: u8::from_str_radix(function, 16).ok()?,
            })
        };
        parts().ok_or(NoPciAddress)
    }
}

/// A text is no PCI address: `0000:18:00.0` is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoPciAddress;

impl fmt::Display for NoPciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no PCI address: 0000:18:00.0 is one")
    }
}

impl std::error::Error for NoPciAddress {}

const NVIDIA: u32 = 0x10de;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relaxed_ordering_is_found_behind_other_capabilities() {
        let mut config = vec![0; 256];
        (config[0x06], config[0x34]) = (0x10, 0x60);
        (config[0x60], config[0x61]) = (0x01, 0x48);
        (config[0x48], config[0x49]) = (0x10, 0x00);
        assert_eq!(relaxed_ordering(&config), Some(false));
        config[0x50] = 0x10;
        assert_eq!(relaxed_ordering(&config), Some(true));
        assert_eq!(relaxed_ordering(&config[..64]), None, "what others than root are told");
        assert_eq!(relaxed_ordering(&[]), None);
        config[0x48] = 0x05;
        config[0x49] = 0x60;
        assert_eq!(relaxed_ordering(&config), None, "a list without an end");
        config[0x06] = 0;
        assert_eq!(relaxed_ordering(&config), None);
    }

    fn device(path: &str) -> PciDevice {
        let (root, path) = place(Path::new(path));
        let address = *path.last().expect("a device");
        PciDevice {
            address,
            vendor: 0,
            class: 0,
            driver: None,
            node: None,
            root,
            path,
            link: None,
            relaxed_ordering: None,
        }
    }

    #[test]
    fn distances_are_those_of_nvidia_smi() {
        let gpu = device("/sys/devices/pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:00.0/0000:18:00.0");
        let between = |path: &str| distance(&gpu, &device(path), true);
        let far = |path: &str| distance(&gpu, &device(path), false);
        assert_eq!(
            between("/sys/devices/pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:01.0/0000:19:00.0"),
            Distance::Pix
        );
        assert_eq!(
            between("/sys/devices/pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:00.0/0000:18:00.1"),
            Distance::Pix
        );
        let below_another_switch = "/sys/devices/pci0000:15/0000:15:01.0/0000:16:00.0/0000:17:02.0/0000:1a:00.0/0000:1b:00.0/0000:1c:00.0";
        assert_eq!(between(below_another_switch), Distance::Pxb);
        assert_eq!(between("/sys/devices/pci0000:15/0000:15:02.0/0000:20:00.0"), Distance::Phb);
        assert_eq!(between("/sys/devices/pci0000:37/0000:37:01.0/0000:38:00.0"), Distance::Node);
        assert_eq!(far("/sys/devices/pci0000:37/0000:37:01.0/0000:38:00.0"), Distance::Sys);
        assert_eq!(distance(&gpu, &gpu, true), Distance::Same);
        assert!(
            Distance::Pix < Distance::Pxb && Distance::Pxb < Distance::Phb && Distance::Node < Distance::Sys
        );
    }

    #[test]
    fn a_domain_below_a_device_is_a_tree_of_its_own() {
        let path = "/sys/devices/pci0000:b0/0000:b0:00.5/pci10000:00/10000:00:02.0/10000:01:00.0";
        let (root, path) = place(Path::new(path));
        assert_eq!(root.as_deref(), Some("pci10000:00"));
        assert_eq!(
            path.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["10000:00:02.0", "10000:01:00.0"]
        );
    }

    #[test]
    fn a_link_is_degraded_only_below_what_both_ends_can() {
        let lanes = |gt_per_s, width| PcieLanes { gt_per_s, width };
        let link = |current, slot| PcieLink { current, most: lanes(32.0, 16), slot };
        assert!(!link(lanes(32.0, 16), Some(lanes(32.0, 16))).is_degraded());
        assert!(!link(lanes(16.0, 16), Some(lanes(16.0, 16))).is_degraded());
        assert!(link(lanes(32.0, 8), Some(lanes(32.0, 16))).is_degraded());
        assert!(link(lanes(16.0, 16), Some(lanes(32.0, 16))).is_degraded());
        assert!(link(lanes(16.0, 16), None).is_degraded());
        assert!((lanes(32.0, 16).gbit_per_s() - 504.1).abs() < 0.1);
        assert!((lanes(2.5, 1).gbit_per_s() - 2.0).abs() < 1e-9);
    }

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for text in ["0000:18:00.0", "10000:e1:1f.7"] {
            assert_eq!(text.parse::<PciAddress>().map(|address| address.to_string()).as_deref(), Ok(text));
        }
        for text in ["", "18:00.0", "0000:18:00", "0000:100:00.0", "pci0000:18", "virtual"] {
            assert_eq!(text.parse::<PciAddress>(), Err(NoPciAddress), "{text}");
        }
    }
}
