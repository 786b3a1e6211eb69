//! RDMA devices: whether they are there, may be used, carry data, and are plugged in as they should be.

use crossdock_verbs::topology::{Gid, GidKind, LinkLayer, PciDevice, PortState, RdmaDevice, RdmaPort};

use super::{Check, count};
use crate::doctor::facts::{Access, Facts};

pub fn checks(facts: &Facts) -> Vec<Check> {
    let mut checks = adapters(facts);
    let devices = &facts.topology.devices;
    if devices.is_empty() {
        if checks.is_empty() {
            checks.push(Check::note("rdma", "no RDMA device: other hosts are reached over TCP"));
        }
        return checks;
    }
    let names: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
    checks.push(Check::good(
        "rdma",
        format!("{}: {}", count(devices.len(), "device", "devices"), names.join(", ")),
    ));
    checks.push(library(facts));
    for device in devices {
        checks.push(access(facts, device).of(&device.name));
        checks.extend(pcie(device).map(|check| check.of(&device.name)));
        checks.extend(ordering(device).map(|check| check.of(&device.name)));
        for port in &device.ports {
            let of = format!("{}/{}", device.name, port.number);
            checks.push(state(port).of(&of));
            if port.state == PortState::Active {
                checks.push(gids(port).of(&of));
                checks.extend(mtu(port).map(|check| check.of(&of)));
                checks.extend(partition_keys(port).map(|check| check.of(&of)));
            }
            checks.extend(counters(port).map(|check| check.of(&of)));
        }
    }
    checks
}

/// The ports that can carry data across switches and that this process may use, with their devices.
pub fn rails(facts: &Facts) -> Vec<(&RdmaDevice, &RdmaPort)> {
    let may = |device: &&RdmaDevice| {
        device.uverbs.as_ref().is_some_and(|file| facts.uverbs.get(file) == Some(&Access::Open))
    };
    let devices = facts.topology.devices.iter().filter(may);
    let ports = devices.flat_map(|device| device.ports.iter().map(move |port| (device, port)));
    let goes_far = |port: &RdmaPort| port.best_gid().is_some_and(|gid| gid.kind != GidKind::RoceV1);
    ports.filter(|(_, port)| port.is_usable() && goes_far(port)).collect()
}

/// Adapters whose kind is known to do RDMA, and that are no RDMA devices.
fn adapters(facts: &Facts) -> Vec<Check> {
    let topology = &facts.topology;
    let is_device = |adapter: &PciDevice| {
        let mut placed = topology.devices.iter().filter_map(|device| device.pci.as_ref());
        placed.any(|pci| pci.address == adapter.address)
    };
    // One that another driver has, for a virtual machine for instance, was given away on purpose.
    let idle = topology.adapters.iter().filter(|adapter| !is_device(adapter)).filter_map(|adapter| {
        let (_, driver, module) = RDMA_ADAPTERS.iter().find(|(vendor, driver, _)| {
            *vendor == adapter.vendor && adapter.driver.as_deref().is_none_or(|has| has == *driver)
        })?;
        Some((adapter, *driver, *module))
    });
    let check = |(adapter, driver, module): (&PciDevice, &str, &str)| {
        let loaded = if facts.has_module(module) { ", though its module is loaded" } else { "" };
        let says = format!("an adapter of a kind that can do RDMA ({driver}) is no RDMA device here{loaded}");
        let advice =
            format!("modprobe {module}; in a container, the host's devices have to be shared with it");
        Check::degraded("rdma-adapter", says, advice).of(adapter.address.to_string())
    };
    idle.map(check).collect()
}

fn library(facts: &Facts) -> Check {
    match &facts.libibverbs {
        Some(library) => Check::good("libibverbs", format!("at {}", library.path)),
        None => Check::degraded(
            "libibverbs",
            "libibverbs.so.1 is in none of the loader's folders, so no program can use the devices",
            "apt install libibverbs1 ibverbs-providers (dnf install libibverbs), in the container too",
        ),
    }
}

fn access(facts: &Facts, device: &RdmaDevice) -> Check {
    let name = "rdma-access";
    let Some(file) = &device.uverbs else {
        let says = "the kernel gives programs no file for this device";
        return Check::degraded(name, says, "modprobe ib_uverbs");
    };
    let path = format!("/dev/infiniband/{file}");
    match facts.uverbs.get(file).unwrap_or(&Access::Missing) {
        Access::Open => Check::good(name, format!("{path} can be opened")),
        Access::Missing => Check::degraded(
            name,
            format!("{path} is not there"),
            "docker --device /dev/infiniband, or the cluster's plugin for RDMA devices; on a host, start udev",
        ),
        Access::Refused(why) => Check::degraded(
            name,
            format!("{path} cannot be opened: {why}"),
            format!("chmod 666 {path} by an udev rule; in a container, --device {path}"),
        ),
    }
}

fn pcie(device: &RdmaDevice) -> Option<Check> {
    let name = "rdma-pcie";
    let link = device.pci.as_ref()?.link?;
    if link.is_degraded() {
        let slot = link.slot.map(|slot| format!(", the slot {slot}")).unwrap_or_default();
        return Some(Check::degraded(
            name,
            format!("the PCIe link runs at {}; the device can do {}{slot}", link.current, link.most),
            "take the card out and put it in again; look for bad lanes with lspci -vv and dmesg (AER)",
        ));
    }
    let wanted: f64 = device
        .ports
        .iter()
        .filter(|port| port.state == PortState::Active)
        .filter_map(|port| port.gbit_per_s)
        .sum();
    let carries = link.current.gbit_per_s();
    Some(match carries < wanted {
        false => Check::good(name, format!("{}: {carries:.0} Gbit/s for {wanted:.0}", link.current)),
        true => Check::note(
            name,
            format!(
                "{} carries {carries:.0} Gbit/s, less than the {wanted:.0} Gbit/s of the ports",
                link.current
            ),
        )
        .advice("a slot with more lanes or of a later generation, if there is one"),
    })
}

/// Whether the device's writes may pass each other on their way into memory, as the verbs port asks for.
fn ordering(device: &RdmaDevice) -> Option<Check> {
    let name = "rdma-ordering";
    Some(match device.pci.as_ref()?.relaxed_ordering? {
        true => Check::good(name, "PCIe relaxed ordering is on"),
        false => Check::note(
            name,
            "PCIe relaxed ordering is off: writes into memory of another socket or of a GPU wait for each other",
        )
        .advice("the adapter's PCI_WR_ORDERING (mlxconfig) and the BIOS decide; some platforms switch it off for a bug"),
    })
}

fn state(port: &RdmaPort) -> Check {
    let name = "rdma-port";
    let physical = port.physical_state.as_deref().unwrap_or("unknown");
    let what = format!("{}, the link {physical}", port.state.name());
    match (port.state, port.link_layer) {
        (PortState::Active, _) => {
            let rate = port.gbit_per_s.map(|rate| format!(" at {rate} Gbit/s")).unwrap_or_default();
            Check::good(name, format!("active, {}{rate}", port.link_layer.name()))
        }
        (PortState::Init | PortState::Armed, LinkLayer::InfiniBand) => Check::degraded(
            name,
            format!("{what}: no subnet manager has come by, so the port has no address"),
            "start a subnet manager in the fabric (opensm, or the switch's own)",
        ),
        (_, LinkLayer::Ethernet) if physical == "Disabled" => Check::degraded(
            name,
            format!("{what}: its interface is not up"),
            match port.interfaces.first() {
                Some(interface) => format!("ip link set {interface} up"),
                None => "ip link set NAME up: rdma link tells the name".into(),
            },
        ),
        _ => Check::degraded(
            name,
            format!("{what}: it carries nothing"),
            "look at the cable, the transceiver and the other end's port (mlxlink, ethtool, ibstat)",
        ),
    }
}

fn gids(port: &RdmaPort) -> Check {
    let name = "rdma-gid";
    let Some(best) = port.best_gid() else {
        let interface = port.interfaces.first().map_or("NAME", String::as_str);
        let advice = match port.link_layer {
            LinkLayer::Ethernet => format!(
                "ip link set {interface} up, and give it an address; in a container, the interface has to be in its \
                 network namespace"
            ),
            _ => "wait for the subnet manager, or load the driver again".into(),
        };
        return Check::degraded(name, "the table of GIDs is empty: no queue pair can be connected", advice);
    };
    let known = told(best);
    match best.kind {
        GidKind::RoceV1 => Check::degraded(
            name,
            format!("{known}: RoCE v1 does not leave the switch, and most fabrics drop it"),
            "give the interface an IPv4 address: its GID of RoCE v2 comes with it",
        ),
        GidKind::RoceV2 if best.ipv4().is_none() && best.address.is_unicast_link_local() => Check::note(
            name,
            format!("{known}: of the link alone, so peers in other subnets cannot reach it"),
        )
        .advice(format!("ip addr add ADDRESS/PREFIX dev {}", best.interface.as_deref().unwrap_or("NAME"))),
        _ => Check::good(name, known),
    }
}

/// `3 is 10.0.0.1, RoCE v2`.
fn told(gid: &Gid) -> String {
    let address = gid.ipv4().map_or_else(|| gid.address.to_string(), |address| address.to_string());
    match gid.kind {
        GidKind::Unknown => format!("GID {} is {address}", gid.index),
        kind => format!("GID {} is {address}, {}", gid.index, kind.name()),
    }
}

/// RoCE packets carry a power of two, and their headers come on top.
fn mtu(port: &RdmaPort) -> Option<Check> {
    let mtu = port.interface_mtu.filter(|_| port.link_layer == LinkLayer::Ethernet)?;
    let payload =
        [4096, 2048, 1024, 512].into_iter().find(|payload| payload + ROCE_HEADER_BYTES <= mtu).unwrap_or(256);
    let interface = port.interfaces.first().map_or("NAME", String::as_str);
    let says = format!("{interface} takes packets of {mtu} bytes, so RDMA sends {payload} bytes each");
    Some(match payload {
        4096 => Check::good("rdma-mtu", says),
        _ => Check::note("rdma-mtu", format!("{says} instead of 4096"))
            .advice(format!("ip link set {interface} mtu 9000, on the switches and on the peers too")),
    })
}

/// Only full members of a partition reach each other.
fn partition_keys(port: &RdmaPort) -> Option<Check> {
    if port.link_layer != LinkLayer::InfiniBand {
        return None;
    }
    let is_full = |key: &&u16| *key & 0x8000 != 0;
    let keys: Vec<String> = port.partition_keys.iter().map(|key| format!("{key:#06x}")).collect();
    Some(match port.partition_keys.iter().find(is_full) {
        Some(_) => Check::good("rdma-partition", format!("partition keys {}", keys.join(", "))),
        None => Check::degraded(
            "rdma-partition",
            match keys.is_empty() {
                true => "the port has no partition key: it reaches nobody".into(),
                false => format!(
                    "only limited member of its partitions ({}): such ports do not reach each other",
                    keys.join(", ")
                ),
            },
            "make it a full member in the subnet manager's partitions.conf",
        ),
    })
}

/// What has gone wrong since the port was started. Nobody can tell from one look whether it still does.
fn counters(port: &RdmaPort) -> Option<Check> {
    let counted = |name: &str| port.counters.get(name).copied().filter(|&count| count > 0);
    let troubles = TROUBLES.iter().filter_map(|name| Some(format!("{name} {}", counted(name)?)));
    let troubles: Vec<String> = troubles.collect();
    if port.counters.is_empty() {
        return None;
    }
    let is_lossy = LOSSES.iter().any(|name| counted(name).is_some());
    Some(match (troubles.is_empty(), is_lossy && port.link_layer == LinkLayer::Ethernet) {
        (true, _) => Check::good("rdma-counters", "no counter tells of trouble"),
        (_, true) => Check::note("rdma-counters", format!("packets were lost: {}", troubles.join(", ")))
            .advice(
                "if they grow under load: flow control (PFC) or ECN for RoCE is missing on a switch or here",
            ),
        (_, false) => {
            Check::note("rdma-counters", format!("since the port was started: {}", troubles.join(", ")))
                .advice("if they grow: a bad cable or transceiver, or a peer that answers too late")
        }
    })
}

/// Vendor, the kernel's driver, and the module that makes an RDMA device of it. Other vendors' adapters may be of kinds
/// that cannot.
const RDMA_ADAPTERS: &[(u32, &str, &str)] = &[(0x15b3, "mlx5_core", "mlx5_ib")];

/// Ethernet's, IP's, UDP's and InfiniBand's, with a margin that the kernel takes too.
const ROCE_HEADER_BYTES: u32 = 96;

const LOSSES: &[&str] = &["out_of_sequence", "packet_seq_err", "local_ack_timeout_err"];

const TROUBLES: &[&str] = &[
    "out_of_sequence",
    "packet_seq_err",
    "local_ack_timeout_err",
    "rnr_nak_retry_err",
    "out_of_buffer",
    "rx_icrc_encapsulated",
    "req_transport_retries_exceeded",
    "symbol_error",
    "link_error_recovery",
    "link_downed",
    "port_rcv_errors",
    "port_xmit_discards",
    "local_link_integrity_errors",
    "excessive_buffer_overrun_errors",
    "VL15_dropped",
];
