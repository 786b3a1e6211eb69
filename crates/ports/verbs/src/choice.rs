//! Which device, port and GID a port uses.

use std::fs;
use std::sync::Arc;

use crossdock_transport::{Error, Result};

use crate::address::{Gid, Link};
use crate::ibverbs::context::{Context, devices};
use crate::ibverbs::sys::*;
use crate::options::VerbsOptions;
use crate::topology::rdma::{GidKind, GidReach, best};
use crate::verbs::Verbs;

/// What was found.
#[derive(Clone)]
pub(crate) struct Chosen {
    pub device: ibv_device_attr,
    pub port: u8,
    pub link: Link,
    pub gid: Gid,
    pub gid_index: u8,
    pub gid_reach: GidReach,
    pub lid: u16,
    pub partition_key: u16,
    /// As the device counts it.
    pub mtu: u8,
    pub max_message_bytes: u32,
    pub bytes_per_second: u64,
    pub numa_node: Option<u32>,
}

impl Chosen {
    /// Ports connect whose links carry the same kind of packets.
    pub fn reach(&self) -> String {
        match self.gid_reach {
            GidReach::Subnet => "infiniband",
            GidReach::Link => "roce-v1",
            GidReach::LinkLocal => "roce-v2 link-local",
            GidReach::Ipv6 => "roce-v2 ipv6",
            GidReach::Ipv4 => "roce-v2 ipv4",
        }
        .into()
    }
}

/// Opens the device that the options ask for, or the first that is usable.
pub(crate) fn choose(verbs: &Verbs, options: &VerbsOptions) -> Result<(Arc<Context>, Chosen)> {
    let found = devices(verbs.library()).map_err(|failed| match failed.errno {
        libc::ENOSYS => Error::Unsupported {
            what: "RDMA",
            advice: "load the kernel's RDMA modules, and give a container /dev/infiniband: see `crossdock doctor`",
        },
        _ => failed.into(),
    })?;
    let names = match &options.device {
        Some(name) if !found.contains(name) => {
            return Err(Error::Unsupported {
                what: "RDMA over a device of that name",
                advice: "name one that `crossdock doctor` or `ibv_devices` lists",
            });
        }
        Some(name) => vec![name.clone()],
        None => found,
    };
    let mut refused =
        Error::Unsupported { what: "RDMA", advice: "no RDMA device was found: see `crossdock doctor`" };
    for name in names {
        match choose_port(verbs, &name, options) {
            Ok(found) => return Ok(found),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

fn choose_port(verbs: &Verbs, name: &str, options: &VerbsOptions) -> Result<(Arc<Context>, Chosen)> {
    let context = Context::open(verbs.library(), name)?;
    if !context.is_infiniband_transport() {
        return Err(Error::Unsupported {
            what: "RDMA over a device that speaks neither InfiniBand nor RoCE",
            advice: "name a device that does: iWARP, EFA and usNIC connect by other means",
        });
    }
    let device = context.attributes()?;
    let ports = match options.port {
        Some(port) => port..=port,
        None => 1..=device.phys_port_cnt,
    };
    let mut refused = Error::Unsupported {
        what: "RDMA over a device without ports",
        advice: "name another device, or see `crossdock doctor`",
    };
    for port in ports {
        match look_at(&context, device, port, options) {
            Ok(chosen) => return Ok((context, chosen)),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

pub(crate) fn look_at(
    context: &Context,
    device: ibv_device_attr,
    port: u8,
    options: &VerbsOptions,
) -> Result<Chosen> {
    let attributes = context.port(port)?;
    if attributes.state != IBV_PORT_ACTIVE {
        return Err(Error::Unsupported {
            what: "RDMA over a port that is not active",
            advice: "check cable, switch and subnet manager: see `crossdock doctor`",
        });
    }
    let link = match attributes.link_layer {
        IBV_LINK_LAYER_ETHERNET => Link::Ethernet,
        _ => Link::InfiniBand,
    };
    let (gid_index, gid, gid_reach) = choose_gid(context, port, link, &attributes, options)?;
    let mtu = match options.mtu_bytes {
        Some(bytes) => (bytes.trailing_zeros() - 7).min(attributes.active_mtu),
        None => attributes.active_mtu,
    };
    Ok(Chosen {
        device,
        port,
        link,
        gid,
        gid_index,
        gid_reach,
        lid: attributes.lid,
        partition_key: context.partition_key(port, options.partition_key_index)?,
        mtu: mtu.clamp(IBV_MTU_256, IBV_MTU_4096) as u8,
        max_message_bytes: attributes.max_msg_sz.max(1),
        bytes_per_second: bytes_per_second(&attributes),
        numa_node: numa_node(context.name()),
    })
}

fn choose_gid(
    context: &Context,
    port: u8,
    link: Link,
    attributes: &ibv_port_attr,
    options: &VerbsOptions,
) -> Result<(u8, Gid, GidReach)> {
    let table = gids(context, port, link, attributes);
    let chosen = match options.gid_index {
        Some(index) => table.iter().find(|(at, ..)| *at == index),
        None => best(&table, |(_, _, reach)| *reach),
    };
    chosen.copied().ok_or(Error::Unsupported {
        what: "RDMA over a port without a usable GID",
        advice: "give the network interface an IP address, or another gid_index: see `crossdock doctor`",
    })
}

/// The GIDs of a port that are set, with their index.
fn gids(context: &Context, port: u8, link: Link, attributes: &ibv_port_attr) -> Vec<(u8, Gid, GidReach)> {
    let set = |gid: &Gid| gid.0 != [0; 16];
    if let Some(table) = context.gid_table() {
        let of_port = table.iter().filter(|entry| entry.port_num == u32::from(port));
        let entries = of_port.filter_map(|entry| {
            let (index, gid) = (u8::try_from(entry.gid_index).ok()?, Gid(entry.gid.raw));
            set(&gid).then(|| (index, gid, reach(link, entry.gid_type, gid)))
        });
        return entries.collect();
    }
    // An old library lists none, and an old kernel says what they are in files.
    let last = u8::try_from(attributes.gid_tbl_len.clamp(1, 255)).expect("clamped");
    let entries = (0..last).filter_map(|index| {
        let gid = context.gid(port, index).ok()?;
        let file = format!("/sys/class/infiniband/{}/ports/{port}/gid_attrs/types/{index}", context.name());
        let roce_v2 = fs::read_to_string(file).is_ok_and(|kind| kind.contains("v2"));
        let gid_type = if roce_v2 { IBV_GID_TYPE_ROCE_V2 } else { IBV_GID_TYPE_IB };
        set(&gid).then(|| (index, gid, reach(link, gid_type, gid)))
    });
    entries.collect()
}

fn reach(link: Link, gid_type: u32, gid: Gid) -> GidReach {
    let kind = match (link, gid_type) {
        (Link::InfiniBand, _) => GidKind::InfiniBand,
        (Link::Ethernet, IBV_GID_TYPE_ROCE_V2) => GidKind::RoceV2,
        (Link::Ethernet, _) => GidKind::RoceV1,
    };
    GidReach::of(kind, gid.0.into())
}

/// What a port carries, from the width and the speed that it has negotiated.
fn bytes_per_second(attributes: &ibv_port_attr) -> u64 {
    let lanes: u64 = match attributes.active_width {
        1 => 1,
        2 => 4,
        4 => 8,
        8 => 12,
        16 => 2,
        _ => 4,
    };
    // Of one lane in megabits, without the encoding: SDR, DDR, QDR, FDR10, FDR, EDR, HDR, NDR.
    let megabits: u64 = match attributes.active_speed {
        1 => 2_000,
        2 => 4_000,
        4 => 8_000,
        8 => 10_000,
        16 => 13_636,
        32 => 25_000,
        64 => 50_000,
        128 => 100_000,
        _ => 2_000,
    };
    lanes * megabits * 1_000_000 / 8
}

/// Where the device is, as far as the kernel knows.
fn numa_node(device: &str) -> Option<u32> {
    let node = fs::read_to_string(format!("/sys/class/infiniband/{device}/device/numa_node")).ok()?;
    // -1 where it means nothing.
    node.trim().parse().ok()
}
