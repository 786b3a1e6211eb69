//! The suite that every port passes, over the RDMA devices of this machine: those that `CROSSDOCK_VERBS_DEVICES` names,
//! which may be software (`tests/rdma-vm` has two).

use std::time::Duration;

use crossdock_memory::{AllocateOptions, Memory};
use crossdock_transport::conformance::Streamer;
use crossdock_transport::conformance::{self, Child, ProcessChild, Rig};
use crossdock_transport::{Fence, Port};
use crossdock_verbs::{VerbsOptions, VerbsPort};

#[test]
fn ports_conform() {
    let Some(rig) = DeviceRig::new(VerbsOptions::default(), 1) else { return };
    conformance::run(&mut { rig });
}

/// Everything comes back short, and immediates are held back at once.
#[test]
fn ports_with_short_queues_conform() {
    let mut options = VerbsOptions::default();
    options.requests_per_lane = 7;
    options.immediates_per_lane = 3;
    // Odd, and so short that pieces and spans are cut.
    options.request_bytes = 10_001;
    options.inline_bytes = 0;
    let Some(rig) = DeviceRig::new(options, 2) else { return };
    conformance::run(&mut { rig });
}

/// What [`ProcessChild`] runs.
#[test]
fn child() {
    if conformance::requested_child().is_none() {
        return;
    }
    let Some(mut rig) = DeviceRig::new(VerbsOptions::default(), 3) else { return };
    // Its parent has the first.
    let port = rig.ports(2).remove(1);
    let memory = rig.memory(256 << 10);
    conformance::serve(Streamer::new(port, memory));
}

struct DeviceRig {
    devices: Vec<String>,
    options: VerbsOptions,
    seed: u64,
}

impl DeviceRig {
    /// `None`, with a printed reason, where there is no device.
    fn new(mut options: VerbsOptions, seed: u64) -> Option<Self> {
        let Ok(devices) = std::env::var("CROSSDOCK_VERBS_DEVICES") else {
            eprintln!("SKIPPED: CROSSDOCK_VERBS_DEVICES names no RDMA device (run this in tests/rdma-vm)");
            return None;
        };
        let devices = devices.split(',').map(str::to_owned).collect();
        options.connect_timeout = Duration::from_millis(1500);
        options.keepalive = Duration::from_millis(200);
        // Found out sooner than by default: 0.3 s.
        options.retries = 3;
        Some(Self { devices, options, seed })
    }
}

impl Rig for DeviceRig {
    fn name(&self) -> String {
        format!(
            "verbs over {}, {} requests a lane",
            self.devices.join(" and "),
            self.options.requests_per_lane
        )
    }

    /// On the devices by turns, so that most lanes cross the wire.
    fn ports(&mut self, count: usize) -> Vec<Box<dyn Port>> {
        let port = |at: usize| {
            let mut options = self.options.clone();
            options.device = Some(self.devices[at % self.devices.len()].clone());
            Box::new(VerbsPort::open(options).expect("a port can be opened")) as Box<dyn Port>
        };
        (0..count).map(port).collect()
    }

    fn memory(&mut self, bytes: usize) -> Memory {
        Memory::allocate(bytes, &AllocateOptions::default()).expect("memory for a test")
    }

    fn pass(&mut self) {
        std::thread::yield_now();
    }

    fn fence(&self) -> Fence {
        Fence::WhenDown
    }

    fn checks(&self) -> bool {
        false
    }

    fn child(&mut self) -> Option<Box<dyn Child>> {
        Some(Box::new(ProcessChild::spawn("child", "verbs")))
    }

    /// Software RDMA in an emulated machine moves ten thousand pieces a second.
    fn patience(&self) -> Duration {
        Duration::from_secs(60)
    }

    fn seed(&self) -> u64 {
        self.seed
    }
}
