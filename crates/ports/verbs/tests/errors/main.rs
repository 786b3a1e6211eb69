//! What goes wrong between two ports, and what each then says: one list of cases, run over the network of devices in this
//! process and over the real devices that `CROSSDOCK_VERBS_DEVICES` names (`tests/rdma-vm` has two). The real ones are the
//! truth; where they and the specification differ, a case says so.

mod cases;
mod device_memory;
mod found;
mod network;
mod pair;
mod random;

use network::{Devices, SoftwareFabric};

#[test]
fn the_fabric_answers_as_expected() {
    for (name, case) in cases::CASES {
        eprintln!("{name}");
        case(&mut SoftwareFabric::new());
    }
}

#[test]
fn real_devices_answer_the_same() {
    let Some(mut devices) = Devices::new() else { return };
    for (name, case) in cases::CASES {
        eprintln!("{name}");
        case(&mut devices);
        devices.mend();
    }
}
