//! The topology as JSON. The crate that reads it is a port's and needs no serde.

use crossdock_verbs::topology::{
    Gid, NumaNode, PciDevice, PcieLanes, PcieLink, RdmaDevice, RdmaPort, Topology,
};
use serde::{Serialize, Serializer};
use serde_json::{Value, json};

pub fn topology<S: Serializer>(topology: &Topology, serializer: S) -> Result<S::Ok, S::Error> {
    let gpus = topology.gpus.iter().map(|gpu| {
        let distances = topology.devices.iter().filter_map(|device| {
            Some((device.name.clone(), topology.distance(&gpu.pci, device.pci.as_ref()?).name().into()))
        });
        json!({
            "pci": pci(&gpu.pci),
            "model": gpu.model,
            "minor": gpu.minor,
            "distances": distances.collect::<serde_json::Map<String, Value>>(),
        })
    });
    let whole = json!({
        "nodes": topology.nodes.iter().map(node).collect::<Vec<_>>(),
        "rdma": topology.devices.iter().map(device).collect::<Vec<_>>(),
        "gpus": gpus.collect::<Vec<_>>(),
        "adapters": topology.adapters.iter().map(pci).collect::<Vec<_>>(),
    });
    whole.serialize(serializer)
}

fn node(node: &NumaNode) -> Value {
    json!({ "number": node.number, "cpus": node.cpus, "distances": node.distances })
}

fn device(device: &RdmaDevice) -> Value {
    json!({
        "name": device.name,
        "firmware": device.firmware,
        "node_type": device.node_type,
        "model": device.model,
        "driver": device.driver,
        "uverbs": device.uverbs,
        "pci": device.pci.as_ref().map(pci),
        "ports": device.ports.iter().map(port).collect::<Vec<_>>(),
    })
}

fn port(port: &RdmaPort) -> Value {
    json!({
        "number": port.number,
        "state": port.state.name(),
        "physical_state": port.physical_state,
        "link_layer": port.link_layer.name(),
        "gbit_per_s": port.gbit_per_s,
        "lid": port.lid,
        "gids": port.gids.iter().map(gid).collect::<Vec<_>>(),
        "best_gid": port.best_gid().map(|gid| gid.index),
        "partition_keys": port.partition_keys,
        "interfaces": port.interfaces,
        "interface_mtu_bytes": port.interface_mtu,
        "counters": port.counters,
    })
}

fn gid(gid: &Gid) -> Value {
    json!({
        "index": gid.index,
        "address": gid.address,
        "ipv4": gid.ipv4(),
        "kind": gid.kind.name(),
        "interface": gid.interface,
    })
}

fn pci(device: &PciDevice) -> Value {
    json!({
        "address": device.address.to_string(),
        "vendor": format!("{:#06x}", device.vendor),
        "class": format!("{:#08x}", device.class),
        "driver": device.driver,
        "node": device.node,
        "link": device.link.as_ref().map(link),
        "relaxed_ordering": device.relaxed_ordering,
    })
}

fn link(link: &PcieLink) -> Value {
    json!({ "current": lanes(&link.current), "most": lanes(&link.most), "slot": link.slot.as_ref().map(lanes) })
}

fn lanes(lanes: &PcieLanes) -> Value {
    json!({ "gt_per_s": lanes.gt_per_s, "width": lanes.width })
}
