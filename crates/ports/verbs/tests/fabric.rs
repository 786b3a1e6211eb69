//! The suite that every port passes, over a network of devices in this process: at once, in scrambled steps, with a thread
//! of its own, with packets that are lost, and with the library of years ago.

use std::time::Duration;

use crossdock_memory::{AllocateOptions, Memory};
use crossdock_transport::conformance::{self, Rig};
use crossdock_transport::{Fence, Port};
use crossdock_verbs::fake::{Fabric, FabricOptions, Faults, Pace};
use crossdock_verbs::{VerbsOptions, VerbsPort};

#[test]
fn ports_conform_where_all_happens_at_once() {
    run(FabricOptions { pace: Pace::AtOnce, ..FabricOptions::default() }, VerbsOptions::default());
}

#[test]
fn ports_conform_in_scrambled_steps() {
    for seed in 0..3 {
        let pace = Pace::Stepped { most: 40 };
        run(FabricOptions { pace, seed, ..FabricOptions::default() }, VerbsOptions::default());
    }
}

#[test]
fn ports_conform_beside_a_thread() {
    run(FabricOptions { pace: Pace::Thread, ..FabricOptions::default() }, VerbsOptions::default());
}

#[test]
fn ports_with_short_queues_conform() {
    let mut options = VerbsOptions::default();
    options.requests_per_lane = 7;
    options.immediates_per_lane = 3;
    options.request_bytes = 10_001;
    options.inline_bytes = 0;
    let pace = Pace::Stepped { most: 40 };
    run(FabricOptions { pace, seed: 11, ..FabricOptions::default() }, options);
}

#[test]
fn ports_conform_where_packets_are_lost() {
    let pace = Pace::Stepped { most: 60 };
    let faults = Faults { lost_one_in: 50 };
    run(FabricOptions { pace, faults, seed: 5, ..FabricOptions::default() }, VerbsOptions::default());
}

#[test]
fn ports_conform_over_an_old_library() {
    let pace = Pace::AtOnce;
    run(FabricOptions { pace, old_library: true, ..FabricOptions::default() }, VerbsOptions::default());
}

fn run(fabric: FabricOptions, mut options: VerbsOptions) {
    options.connect_timeout = Duration::from_millis(500);
    options.keepalive = Duration::from_millis(100);
    let mut rig = FabricRig { fabric: fabric.clone(), made: Vec::new(), options };
    conformance::run(&mut rig);
    for fabric in rig.made {
        assert_eq!(fabric.take_violations(), Vec::<String>::new());
        let counters = fabric.counters();
        assert_eq!(counters.receivers_not_ready, 0, "a receive was missing");
        assert_eq!(counters.completions_lost, 0, "the completion queue was too short");
        assert_eq!(fabric.leaks(), Vec::<String>::new(), "after all ports were dropped");
    }
}

/// A network for each case, with its ports on two devices by turns.
struct FabricRig {
    fabric: FabricOptions,
    made: Vec<Fabric>,
    options: VerbsOptions,
}

impl Rig for FabricRig {
    fn name(&self) -> String {
        let FabricOptions { pace, seed, .. } = &self.fabric;
        format!("verbs, {pace:?}, seed {seed}, {} requests a lane", self.options.requests_per_lane)
    }

    fn ports(&mut self, count: usize) -> Vec<Box<dyn Port>> {
        let fabric = Fabric::new(self.fabric.clone());
        let port = |at: usize| {
            let mut options = self.options.clone();
            options.verbs = Some(fabric.verbs());
            options.device = Some(format!("fake{}", at % 2));
            Box::new(VerbsPort::open(options).expect("a port can be opened")) as Box<dyn Port>
        };
        let ports = (0..count).map(port).collect();
        self.made.push(fabric);
        ports
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

    fn seed(&self) -> u64 {
        self.fabric.seed
    }
}
