//! The suite that every port passes, with roomy and with tiny buffers.

use std::time::Duration;

use crossdock_memory::{AllocateOptions, Memory};
use crossdock_tcp::{TcpOptions, TcpPort};
use crossdock_transport::conformance::{self, Child, ProcessChild, Rig, Streamer};
use crossdock_transport::{Fence, Port};

#[test]
fn ports_conform() {
    conformance::run(&mut TcpRig { options: options(), seed: 1, passes: 0 });
}

/// Everything comes back short, and every frame arrives in parts.
#[test]
fn ports_with_tiny_buffers_conform() {
    let options = TcpOptions {
        send_buffer_bytes: Some(4096),
        receive_buffer_bytes: Some(4096),
        send_queue_bytes: 4096,
        ..options()
    };
    conformance::run(&mut TcpRig { options, seed: 2, passes: 0 });
}

/// What [`ProcessChild`] runs.
#[test]
fn child() {
    if conformance::requested_child().is_none() {
        return;
    }
    let mut rig = TcpRig { options: options(), seed: 3, passes: 0 };
    let port = rig.ports(1).remove(0);
    let memory = rig.memory(256 << 10);
    conformance::serve(Streamer::new(port, memory));
}

struct TcpRig {
    options: TcpOptions,
    seed: u64,
    passes: u32,
}

/// The ports of a case share one thread, and the kernel carries bytes between them within their own calls. On a busy
/// machine each yield costs the turns of all other programs, and with tiny buffers a case takes thousands of polls.
const PASSES_PER_YIELD: u32 = 8;

impl Rig for TcpRig {
    fn name(&self) -> String {
        format!("tcp, {} bytes queued", self.options.send_queue_bytes)
    }

    fn ports(&mut self, count: usize) -> Vec<Box<dyn Port>> {
        let port = || TcpPort::open(self.options.clone()).expect("a port can be opened");
        (0..count).map(|_| Box::new(port()) as Box<dyn Port>).collect()
    }

    fn memory(&mut self, bytes: usize) -> Memory {
        Memory::allocate(bytes, &AllocateOptions::default()).expect("memory for a test")
    }

    fn pass(&mut self) {
        self.passes += 1;
        if self.passes.is_multiple_of(PASSES_PER_YIELD) {
            std::thread::yield_now();
        }
    }

    fn fence(&self) -> Fence {
        Fence::Now
    }

    fn checks(&self) -> bool {
        true
    }

    fn child(&mut self) -> Option<Box<dyn Child>> {
        Some(Box::new(ProcessChild::spawn("child", "tcp")))
    }

    fn seed(&self) -> u64 {
        self.seed
    }
}

fn options() -> TcpOptions {
    TcpOptions { connect_timeout: Duration::from_millis(500), ..TcpOptions::default() }
}
