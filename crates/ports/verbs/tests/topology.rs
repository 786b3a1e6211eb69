//! The topology of machines of paper.

mod machine;

use crossdock_verbs::topology::{Distance, GidKind, LinkLayer, PortState, Topology};
use crossdock_verbs::{Near, VerbsOptions, rails};
use machine::{Card, Carrier, Machine, NO_GID};

fn names(devices: &[&crossdock_verbs::topology::RdmaDevice]) -> Vec<String> {
    devices.iter().map(|device| device.name.clone()).collect()
}

#[test]
fn each_gpu_has_its_adapter_below_its_switch() {
    let machine = Machine::with_eight_gpus();
    let topology = Topology::read(machine.root());
    assert_eq!((topology.gpus.len(), topology.devices.len(), topology.nodes.len()), (8, 8, 2));
    for (at, gpu) in topology.gpus.iter().enumerate() {
        assert_eq!((gpu.model.as_deref(), gpu.minor), (Some("NVIDIA H200"), Some(at as u32)));
        assert_eq!(names(&topology.near_gpu(gpu)), [format!("mlx5_{at}")]);
        for (other, device) in topology.devices.iter().enumerate() {
            let pci = device.pci.as_ref().expect("a card");
            let wanted = match (at == other, at / 4 == other / 4) {
                (true, _) => Distance::Pix,
                (_, true) => Distance::Node,
                _ => Distance::Sys,
            };
            assert_eq!(topology.distance(&gpu.pci, pci), wanted, "GPU {at}, mlx5_{other}");
            assert_eq!(topology.distance(pci, &gpu.pci), wanted);
        }
    }
    assert_eq!(names(&topology.near_node(1)), ["mlx5_4", "mlx5_5", "mlx5_6", "mlx5_7"]);
}

#[test]
fn a_port_is_told_as_the_kernel_tells_it() {
    let machine = Machine::with_eight_gpus();
    let device = Topology::read(machine.root()).devices.swap_remove(0);
    assert_eq!(
        (&device.firmware.as_deref(), &device.node_type.as_deref()),
        (&Some("28.43.2026"), &Some("CA"))
    );
    assert_eq!((device.driver.as_deref(), device.uverbs.as_deref()), (Some("mlx5_core"), Some("uverbs0")));
    assert!(!device.is_software());
    let link = device.pci.as_ref().and_then(|pci| pci.link).expect("a link");
    assert_eq!((link.current.width, link.slot.is_some(), link.is_degraded()), (16, true, false));
    let [port] = &device.ports[..] else { panic!("{:?}", device.ports) };
    assert_eq!((port.state, port.link_layer), (PortState::Active, LinkLayer::InfiniBand));
    assert_eq!(
        (port.physical_state.as_deref(), port.gbit_per_s, port.lid),
        (Some("LinkUp"), Some(400.0), Some(27))
    );
    assert_eq!(port.partition_keys, [0xffff]);
    assert_eq!(port.gids.len(), 1, "the empty place is left out");
    assert_eq!(port.gids[0].kind, GidKind::InfiniBand);
    assert_eq!(port.counters["out_of_sequence"], 0);
    assert!(port.is_usable());
}

#[test]
fn of_many_gids_the_one_that_goes_furthest_is_best() {
    let machine = Machine::tray();
    let port = |machine: &Machine| Topology::read(machine.root()).devices.swap_remove(1).ports.swap_remove(0);
    let whole = port(&machine);
    assert_eq!(whole.interfaces, ["rail1"]);
    assert_eq!(whole.interface_mtu, Some(9000));
    let best = whole.best_gid().expect("a GID");
    assert_eq!((best.index, best.kind, best.ipv4()), (2, GidKind::RoceV2, Some([10, 0, 0, 11].into())));
    let gids = "/sys/class/infiniband/mlx5_1/ports/1/gids";
    machine.file(&format!("{gids}/2"), NO_GID);
    assert_eq!(port(&machine).best_gid().map(|gid| (gid.index, gid.kind)), Some((1, GidKind::RoceV2)));
    machine.file(&format!("{gids}/1"), "fe80:0000:0000:0000:0000:0000:0000:0000\n");
    assert_eq!(port(&machine).best_gid().map(|gid| (gid.index, gid.kind)), Some((0, GidKind::RoceV1)));
    machine.file(&format!("{gids}/0"), NO_GID);
    assert_eq!(port(&machine).best_gid(), None);
    assert!(!port(&machine).is_usable());
}

#[test]
fn adapters_of_one_processor_are_near_its_gpus() {
    let machine = Machine::tray();
    let topology = Topology::read(machine.root());
    assert_eq!(names(&topology.near_gpu(&topology.gpus[0])), ["mlx5_0", "mlx5_1"]);
    assert_eq!(names(&topology.near_gpu(&topology.gpus[3])), ["mlx5_2", "mlx5_3"]);
}

#[test]
fn a_device_of_software_has_no_place() {
    let machine = Machine::bare();
    machine.software_rdma("rxe0", 0, "eth0");
    let topology = Topology::read(machine.root());
    let device = &topology.devices[0];
    assert!(device.is_software());
    assert_eq!((device.node(), device.ports[0].gids.len()), (None, 3));
    assert_eq!(names(&topology.near_node(0)), ["rxe0"], "it is as near as any");
}

#[test]
fn devices_are_counted_and_not_spelled() {
    let machine = Machine::bare();
    for number in [0, 2, 10, 11, 1] {
        let path = format!("pci0000:10/0000:10:01.0/0000:11:{number:02x}.0");
        machine.adapter(&path, 0);
        machine.rdma(&format!("mlx5_{number}"), &path, number, Carrier::InfiniBand);
    }
    let topology = Topology::read(machine.root());
    let devices: Vec<&str> = topology.devices.iter().map(|device| device.name.as_str()).collect();
    assert_eq!(devices, ["mlx5_0", "mlx5_1", "mlx5_2", "mlx5_10", "mlx5_11"]);
}

#[test]
fn a_node_without_devices_takes_those_of_the_nearest() {
    let machine = Machine::bare();
    machine.node(0, "0-3", "10 12 32");
    machine.node(1, "4-7", "12 10 32");
    machine.node(2, "8-11", "32 32 10");
    for (name, bus, node) in [("mlx5_0", 0x10, 0), ("mlx5_1", 0x20, 2)] {
        let path = format!("pci0000:{bus:x}/0000:{bus:x}:01.0/0000:{:x}:00.0", bus + 1);
        machine.adapter(&path, node);
        machine.rdma(name, &path, node as u32, Carrier::InfiniBand);
    }
    let topology = Topology::read(machine.root());
    assert_eq!(names(&topology.near_node(1)), ["mlx5_0"]);
    assert_eq!(names(&topology.near_node(2)), ["mlx5_1"]);
}

#[test]
fn what_is_not_told_is_not_known() {
    let machine = Machine::bare();
    let path = "pci0000:10/0000:10:01.0/0000:11:00.0";
    machine.card(&Card { path, vendor: "0x15b3", class: "0x020000", node: -1, driver: "mlx5_core" });
    machine.lanes(path, "current", "Unknown", 0);
    machine.file(&format!("/sys/devices/{path}/infiniband/mlx5_0/ports/1/state"), "9: ODD\n");
    machine.link("/sys/class/infiniband/mlx5_0", &format!("/sys/devices/{path}/infiniband/mlx5_0"));
    machine.folder("/sys/class/infiniband/mlx5_0/ports/none");
    let topology = Topology::read(machine.root());
    assert_eq!(topology.adapters.len(), 1);
    assert_eq!((topology.adapters[0].node, topology.adapters[0].link), (None, None));
    let device = &topology.devices[0];
    assert_eq!((device.pci.as_ref(), device.uverbs.as_ref(), device.ports.len()), (None, None, 1));
    assert_eq!(device.ports[0].state, PortState::Unknown);

    let nowhere = Topology::read(&machine.root().join("nowhere"));
    assert_eq!(nowhere, Topology::default());
}

#[test]
fn this_machine_can_be_read() {
    let topology = Topology::read(std::path::Path::new("/"));
    for gpu in &topology.gpus {
        assert_eq!(topology.distance(&gpu.pci, &gpu.pci), Distance::Same);
    }
    let sorted = topology.adapters.is_sorted_by_key(|adapter| adapter.address);
    assert!(
        sorted && topology.adapters.iter().all(|adapter| adapter.is_adapter()),
        "{:?}",
        topology.adapters
    );
}

/// The rails of a worker: those of its GPU, or of its NUMA node, unless it names one.
#[test]
fn rails_are_the_usable_ports_nearest() {
    let machine = Machine::with_eight_gpus();
    let chosen = |near, like: &VerbsOptions| -> Vec<String> {
        let all = rails(&Topology::read(machine.root()), near, like);
        all.into_iter().map(|one| format!("{}:{}", one.device.unwrap(), one.port.unwrap())).collect()
    };
    let any = VerbsOptions::default();
    let gpus = Topology::read(machine.root()).gpus;
    assert_eq!(chosen(Near::Gpu(gpus[5].pci.address), &any), ["mlx5_5:1"]);
    assert_eq!(chosen(Near::NumaNode(0), &any), ["mlx5_0:1", "mlx5_1:1", "mlx5_2:1", "mlx5_3:1"]);
    assert_eq!(chosen(Near::Anything, &any).len(), 8);
    let mut named = VerbsOptions::default();
    named.device = Some("mlx5_7".into());
    assert_eq!(chosen(Near::Gpu(gpus[0].pci.address), &named), ["mlx5_7:1"], "what is named is taken");
    named.device = Some("mlx5_77".into());
    assert_eq!(chosen(Near::Anything, &named), Vec::<String>::new());

    // The near one is down: the next nearest take its place.
    machine.file("/sys/class/infiniband/mlx5_5/ports/1/state", "1: DOWN");
    let next = chosen(Near::Gpu(gpus[5].pci.address), &any);
    assert_eq!(next, ["mlx5_4:1", "mlx5_6:1", "mlx5_7:1"], "those of the same NUMA node");
    // A slow one beside fast ones is no rail.
    machine.file("/sys/class/infiniband/mlx5_4/ports/1/rate", "25 Gb/sec (1X EDR)");
    assert_eq!(chosen(Near::Gpu(gpus[5].pci.address), &any), ["mlx5_6:1", "mlx5_7:1"]);
}

/// What a rail is like is as it was asked for.
#[test]
fn rails_keep_what_was_asked_for() {
    let machine = Machine::tray();
    let mut like = VerbsOptions::default();
    like.traffic_class = 104;
    like.gid_index = Some(2);
    let all = rails(&Topology::read(machine.root()), Near::Anything, &like);
    assert!(!all.is_empty());
    assert!(all.iter().all(|one| one.traffic_class == 104 && one.gid_index == Some(2)));
}
