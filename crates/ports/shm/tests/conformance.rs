//! The suite that every port passes, over both kinds of memory, with and without copy threads.

mod common;

use std::time::Duration;

use common::{private, private_memory_can_be_reached, shared};
use crossdock_memory::Memory;
use crossdock_shm::{ShmOptions, ShmPort};
use crossdock_transport::conformance::{self, Child, ProcessChild, Rig, Streamer};
use crossdock_transport::{Fence, Port};

#[test]
fn shared_memory() {
    conformance::run(&mut ShmRig { kind: Kind::Shared, options: options() });
}

#[test]
fn private_memory() {
    if !private_memory_can_be_reached() {
        return;
    }
    conformance::run(&mut ShmRig { kind: Kind::Private, options: options() });
}

/// Everything comes back short all the time.
#[test]
fn shared_memory_with_small_limits() {
    let options = ShmOptions { immediates_per_lane: 4, bytes_per_turn: 10_000, copy_threads: 2, ..options() };
    conformance::run(&mut ShmRig { kind: Kind::Shared, options });
}

#[test]
fn private_memory_with_small_limits() {
    if !private_memory_can_be_reached() {
        return;
    }
    let options = ShmOptions { immediates_per_lane: 1, bytes_per_turn: 10_000, ..options() };
    conformance::run(&mut ShmRig { kind: Kind::Private, options });
}

/// What [`ProcessChild`] runs.
#[test]
fn child() {
    let Some(kind) = conformance::requested_child() else { return };
    let mut rig = ShmRig { kind: Kind::named(&kind), options: options() };
    let port = rig.ports(1).remove(0);
    let memory = rig.memory(256 << 10);
    conformance::serve(Streamer::new(port, memory));
}

struct ShmRig {
    kind: Kind,
    options: ShmOptions,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Shared,
    Private,
}

impl Kind {
    fn named(name: &str) -> Self {
        match name {
            "Shared" => Self::Shared,
            "Private" => Self::Private,
            _ => panic!("no kind of memory is named {name}"),
        }
    }
}

impl Rig for ShmRig {
    fn name(&self) -> String {
        format!("shm, {:?} memory, {} immediates", self.kind, self.options.immediates_per_lane)
    }

    fn ports(&mut self, count: usize) -> Vec<Box<dyn Port>> {
        let port = || ShmPort::open(self.options.clone()).expect("a port can be opened");
        (0..count).map(|_| Box::new(port()) as Box<dyn Port>).collect()
    }

    fn memory(&mut self, bytes: usize) -> Memory {
        match self.kind {
            Kind::Shared => shared(bytes),
            Kind::Private => private(bytes),
        }
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
        Some(Box::new(ProcessChild::spawn("child", &format!("{:?}", self.kind))))
    }
}

fn options() -> ShmOptions {
    ShmOptions { connect_timeout: Duration::from_millis(500), allow_ptrace: true, ..ShmOptions::default() }
}
