//! RDMA devices and their ports, as `/sys/class/infiniband` shows them.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;

use super::files::{below, hexadecimal, names, number, target_name, text};
use super::pci::{self, PciDevice};

/// An RDMA device.
#[derive(Clone, Debug, PartialEq)]
pub struct RdmaDevice {
    /// Its name, `mlx5_0`.
    pub name: String,
    /// The version of its firmware.
    pub firmware: Option<String>,
    /// What it is: `CA` for a channel adapter, as nearly all are.
    pub node_type: Option<String>,
    /// The kind of adapter, `MT4129`.
    pub model: Option<String>,
    /// Its place on the PCI bus; a software device has none.
    pub pci: Option<PciDevice>,
    /// The kernel's driver that has it, `mlx5_core`; none of a software device.
    pub driver: Option<String>,
    /// The name of its file in `/dev/infiniband`; none where the kernel does not let programs use it.
    pub uverbs: Option<String>,
    /// Its ports, by number.
    pub ports: Vec<RdmaPort>,
}

/// A port of an RDMA device.
#[derive(Clone, Debug, PartialEq)]
pub struct RdmaPort {
    /// Its number; the first is 1.
    pub number: u32,
    /// Whether it can carry data.
    pub state: PortState,
    /// What the physical link does, `LinkUp`, `Polling`, `Disabled`.
    pub physical_state: Option<String>,
    /// What carries it.
    pub link_layer: LinkLayer,
    /// Its speed; a port that is down tells the least that it can do.
    pub gbit_per_s: Option<f64>,
    /// Its address in an InfiniBand subnet; 0 until a subnet manager has given it one.
    pub lid: Option<u32>,
    /// Its addresses, without the empty places of the table.
    pub gids: Vec<Gid>,
    /// Its partition keys, without the empty places.
    pub partition_keys: Vec<u16>,
    /// The network interfaces that its GIDs belong to, each once.
    pub interfaces: Vec<String>,
    /// The largest MTU that one of them has.
    pub interface_mtu: Option<u32>,
    /// What it has counted, by the names of the kernel and the driver.
    pub counters: BTreeMap<String, u64>,
}

/// An address of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gid {
    /// Its place in the port's table.
    pub index: u32,
    /// The address. An IPv4 address is one of the mapped kind.
    pub address: Ipv6Addr,
    /// The protocol that it stands for.
    pub kind: GidKind,
    /// The network interface that it belongs to.
    pub interface: Option<String>,
}

/// What a GID stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GidKind {
    /// An address in an InfiniBand subnet.
    InfiniBand,
    /// RoCE straight over Ethernet, which no router forwards.
    RoceV1,
    /// RoCE over UDP.
    RoceV2,
    /// The driver does not say, as those of adapters of another kind do.
    Unknown,
}

/// Where a GID is understood, from the worst to the best.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum GidReach {
    /// RoCE v1, or what the driver does not say.
    Link,
    /// RoCE v2, by an address that only the link knows.
    LinkLocal,
    /// RoCE v2, by IPv6.
    Ipv6,
    /// RoCE v2, by IPv4.
    Ipv4,
    Subnet,
}

impl GidReach {
    pub fn of(kind: GidKind, address: Ipv6Addr) -> Self {
        match kind {
            GidKind::InfiniBand => Self::Subnet,
            GidKind::RoceV2 if address.to_ipv4_mapped().is_some() => Self::Ipv4,
            GidKind::RoceV2 if address.is_unicast_link_local() => Self::LinkLocal,
            GidKind::RoceV2 => Self::Ipv6,
            GidKind::RoceV1 | GidKind::Unknown => Self::Link,
        }
    }
}

/// The first of the best.
pub(crate) fn best<T>(gids: &[T], reach: impl Fn(&T) -> GidReach) -> Option<&T> {
    gids.iter().rev().max_by_key(|gid| reach(gid))
}

/// Whether a port can carry data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortState {
    /// The link is down.
    Down,
    /// The link is up and a subnet manager has not come by.
    Init,
    /// A subnet manager is at it.
    Armed,
    /// It carries data.
    Active,
    /// Another, or none is told.
    Unknown,
}

/// What carries a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkLayer {
    /// InfiniBand.
    InfiniBand,
    /// Ethernet: RoCE or iWARP.
    Ethernet,
    /// Another, such as EFA.
    Other,
}

impl RdmaDevice {
    /// The NUMA node that it belongs to.
    pub fn node(&self) -> Option<u32> {
        self.pci.as_ref()?.node
    }

    /// Whether a program of the kernel stands in for an adapter: rxe, siw.
    pub fn is_software(&self) -> bool {
        self.pci.is_none()
    }
}

impl RdmaPort {
    /// Whether it carries data, and has an address to be reached at.
    pub fn is_usable(&self) -> bool {
        self.state == PortState::Active && !self.gids.is_empty()
    }

    /// The GID that a port takes where none is asked for, which peers in other subnets reach too: of RoCE v2 with an IPv4
    /// address, then with a global one of IPv6, then with one of the link alone; of other kinds the first.
    pub fn best_gid(&self) -> Option<&Gid> {
        best(&self.gids, |gid| GidReach::of(gid.kind, gid.address))
    }
}

impl Gid {
    /// The IPv4 address that it stands for.
    pub fn ipv4(&self) -> Option<Ipv4Addr> {
        self.address.to_ipv4_mapped()
    }
}

impl GidKind {
    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::InfiniBand => "InfiniBand",
            Self::RoceV1 => "RoCE v1",
            Self::RoceV2 => "RoCE v2",
            Self::Unknown => "unknown",
        }
    }
}

impl PortState {
    /// As the kernel writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Down => "DOWN",
            Self::Init => "INIT",
            Self::Armed => "ARMED",
            Self::Active => "ACTIVE",
            Self::Unknown => "unknown",
        }
    }
}

impl LinkLayer {
    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::InfiniBand => "InfiniBand",
            Self::Ethernet => "Ethernet",
            Self::Other => "other",
        }
    }
}

pub fn read(root: &Path) -> Vec<RdmaDevice> {
    let class = below(root, "/sys/class/infiniband");
    let files = uverbs(root);
    let devices = names(&class).into_iter();
    devices.map(|name| device(root, &class.join(&name), files.get(&name).cloned(), name)).collect()
}

/// The file in `/dev/infiniband` of each device.
fn uverbs(root: &Path) -> BTreeMap<String, String> {
    let class = below(root, "/sys/class/infiniband_verbs");
    let files = names(&class).into_iter().filter(|name| name.starts_with("uverbs"));
    files.filter_map(|name| Some((text(&class.join(&name).join("ibdev"))?, name))).collect()
}

fn device(root: &Path, folder: &Path, uverbs: Option<String>, name: String) -> RdmaDevice {
    let ports = folder.join("ports");
    let numbered = names(&ports).into_iter().filter_map(|port| Some((port.parse().ok()?, port)));
    RdmaDevice {
        name,
        firmware: text(&folder.join("fw_ver")),
        node_type: text(&folder.join("node_type")).map(word),
        model: text(&folder.join("hca_type")),
        pci: pci::at(&folder.join("device")),
        driver: target_name(&folder.join("device/driver")),
        uverbs,
        ports: numbered.map(|(number, port)| self::port(root, &ports.join(port), number)).collect(),
    }
}

fn port(root: &Path, folder: &Path, number: u32) -> RdmaPort {
    let link_layer = match text(&folder.join("link_layer")).as_deref() {
        Some("InfiniBand") => LinkLayer::InfiniBand,
        Some("Ethernet") => LinkLayer::Ethernet,
        _ => LinkLayer::Other,
    };
    let gids = gids(folder, link_layer);
    let mut interfaces: Vec<String> = gids.iter().filter_map(|gid| gid.interface.clone()).collect();
    interfaces.sort();
    interfaces.dedup();
    let class = below(root, "/sys/class/net");
    RdmaPort {
        number,
        state: text(&folder.join("state")).map_or(PortState::Unknown, |state| match &word(state)[..] {
            "DOWN" => PortState::Down,
            "INIT" => PortState::Init,
            "ARMED" => PortState::Armed,
            "ACTIVE" => PortState::Active,
            _ => PortState::Unknown,
        }),
        physical_state: text(&folder.join("phys_state")).map(word),
        link_layer,
        gbit_per_s: text(&folder.join("rate")).and_then(|rate| rate.split_whitespace().next()?.parse().ok()),
        lid: hexadecimal(&folder.join("lid")),
        partition_keys: partition_keys(folder),
        interface_mtu: interfaces.iter().filter_map(|name| self::number(&class.join(name).join("mtu"))).max(),
        interfaces,
        gids,
        counters: counters(folder),
    }
}

/// The GIDs that are not zero. A table has up to 1,024 places, nearly all of them empty, and only of the others more is
/// asked.
fn gids(port: &Path, link_layer: LinkLayer) -> Vec<Gid> {
    let attributes = port.join("gid_attrs");
    let places = names(&port.join("gids")).into_iter().filter_map(|name| Some((name.parse().ok()?, name)));
    let known = places.filter_map(|(index, name): (u32, String)| {
        let address: Ipv6Addr = number(&port.join("gids").join(&name)).filter(is_told)?;
        let kind = match (text(&attributes.join("types").join(&name)).as_deref(), link_layer) {
            (Some("RoCE v2"), _) => GidKind::RoceV2,
            (Some(_), LinkLayer::Ethernet) => GidKind::RoceV1,
            (_, LinkLayer::InfiniBand) => GidKind::InfiniBand,
            _ => GidKind::Unknown,
        };
        Some(Gid { index, address, kind, interface: text(&attributes.join("ndevs").join(&name)) })
    });
    known.collect()
}

/// Not zero, and not the bare prefix of the link, which some drivers leave in an empty place.
fn is_told(address: &Ipv6Addr) -> bool {
    let interface = address.octets()[8..].iter().any(|&byte| byte != 0);
    interface || !(address.is_unspecified() || address.is_unicast_link_local())
}

fn partition_keys(port: &Path) -> Vec<u16> {
    let folder = port.join("pkeys");
    let keys = names(&folder).into_iter().filter_map(|name| hexadecimal(&folder.join(name)));
    keys.filter_map(|key| u16::try_from(key).ok()).filter(|&key| key != 0).collect()
}

fn counters(port: &Path) -> BTreeMap<String, u64> {
    let mut counted = BTreeMap::new();
    for folder in ["counters", "hw_counters"] {
        let folder = port.join(folder);
        let found = names(&folder).into_iter().filter_map(|name| Some((number(&folder.join(&name))?, name)));
        counted.extend(found.map(|(count, name)| (name, count)));
    }
    counted
}

/// `4: ACTIVE` without its number.
fn word(text: String) -> String {
    text.split_once(": ").map(|(_, word)| word.to_owned()).unwrap_or(text)
}
