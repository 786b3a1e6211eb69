//! The suite that every port passes, over a medium whose moves go on behind the port's back.

mod later;

use std::time::Duration;

use crossdock_host::HostOptions;
use crossdock_memory::{AllocateOptions, Memory};
use crossdock_transport::conformance::{self, Child, ProcessChild, Rig, Streamer};
use crossdock_transport::{Fence, Port};
use later::{Limits, Pace};

#[test]
fn moves_in_each_poll() {
    conformance::run(&mut LaterRig {
        pace: Pace::EachPoll(3),
        limits: Limits::default(),
        options: options(),
    });
}

#[test]
fn moves_by_a_thread() {
    conformance::run(&mut LaterRig { pace: Pace::ByThread, limits: Limits::default(), options: options() });
}

/// Everything comes back short all the time.
#[test]
fn moves_with_small_limits() {
    for pace in [Pace::EachPoll(1), Pace::ByThread] {
        let limits = Limits { moves: 5, span_bytes: 10_000, pieces: 500 };
        let options = HostOptions { immediates_per_lane: 4, ..options() };
        conformance::run(&mut LaterRig { pace, limits, options });
    }
}

/// What [`ProcessChild`] runs.
#[test]
fn child() {
    let Some(pace) = conformance::requested_child() else { return };
    let pace = if pace == "ByThread" { Pace::ByThread } else { Pace::EachPoll(2) };
    let mut rig = LaterRig { pace, limits: Limits::default(), options: options() };
    let port = rig.ports(1).remove(0);
    let memory = rig.memory(256 << 10);
    conformance::serve(Streamer::new(port, memory));
}

struct LaterRig {
    pace: Pace,
    limits: Limits,
    options: HostOptions,
}

impl Rig for LaterRig {
    fn name(&self) -> String {
        format!("moves {:?}, {} immediates", self.pace, self.options.immediates_per_lane)
    }

    fn ports(&mut self, count: usize) -> Vec<Box<dyn Port>> {
        let port = || later::open(self.options.clone(), self.pace, self.limits).0;
        (0..count).map(|_| Box::new(port()) as Box<dyn Port>).collect()
    }

    fn memory(&mut self, bytes: usize) -> Memory {
        Memory::allocate(bytes, &AllocateOptions::default()).expect("memory can be allocated")
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
        Some(Box::new(ProcessChild::spawn("child", &format!("{:?}", self.pace))))
    }
}

fn options() -> HostOptions {
    HostOptions { connect_timeout: Duration::from_millis(500), ..HostOptions::default() }
}
