//! The simulated port under the suite that every port passes, in each of its semantics.

use std::cell::RefCell;
use std::rc::Rc;

use crossdock_memory::{AllocateOptions, Memory};
use crossdock_sim::{Fabric, FabricOptions, NodeId, OneIn, Semantics, SimPortOptions};
use crossdock_transport::conformance::{self, Child, Rig, Streamer};
use crossdock_transport::{Fence, Port};

#[test]
fn checked_ports_conform() {
    conform(Semantics::Checked);
}

#[test]
fn verbs_ports_conform() {
    conform(Semantics::Verbs);
}

#[test]
fn mapped_ports_conform() {
    conform(Semantics::Mapped);
}

#[test]
fn fabric_ports_conform() {
    conform(Semantics::Fabric);
}

fn conform(semantics: Semantics) {
    for (seed, unordered) in [(1, false), (2, true)] {
        let options = FabricOptions { short_post: OneIn(4), partial_landing: OneIn(2), ..Default::default() };
        let fabric = Fabric::new(seed, options);
        conformance::run(&mut SimRig {
            semantics,
            unordered,
            seed,
            fabric,
            nodes: 0,
            child: Default::default(),
        });
    }
}

struct SimRig {
    semantics: Semantics,
    unordered: bool,
    seed: u64,
    fabric: Fabric,
    /// Each port gets a node of its own.
    nodes: u32,
    /// The peer that runs as if in a process of its own, while it runs.
    child: Rc<RefCell<Option<(NodeId, Streamer)>>>,
}

struct SimChild {
    fabric: Fabric,
    node: NodeId,
    child: Rc<RefCell<Option<(NodeId, Streamer)>>>,
}

impl SimRig {
    fn port(&mut self) -> (NodeId, Box<dyn Port>) {
        self.nodes += 1;
        let node = NodeId(self.nodes);
        let options = SimPortOptions { unordered: self.unordered, ..SimPortOptions::new(self.semantics) };
        (node, Box::new(self.fabric.port(node, options)))
    }
}

impl Rig for SimRig {
    fn name(&self) -> String {
        format!("sim, {}, {}", self.semantics.name(), if self.unordered { "unordered" } else { "ordered" })
    }

    fn ports(&mut self, count: usize) -> Vec<Box<dyn Port>> {
        (0..count).map(|_| self.port().1).collect()
    }

    fn memory(&mut self, bytes: usize) -> Memory {
        Memory::allocate(bytes, &AllocateOptions::default()).expect("memory for a test")
    }

    fn pass(&mut self) {
        if let Some((node, streamer)) = &mut *self.child.borrow_mut()
            && self.fabric.is_running(*node)
        {
            streamer.turn();
        }
        let next = self.fabric.next_event_ns().unwrap_or(self.fabric.now_ns() + 1000);
        self.fabric.advance_to(next);
    }

    fn fence(&self) -> Fence {
        match self.semantics {
            Semantics::Checked => Fence::Now,
            Semantics::Verbs | Semantics::Mapped => Fence::WhenDown,
            Semantics::Fabric => Fence::Never,
        }
    }

    fn checks(&self) -> bool {
        self.semantics == Semantics::Checked
    }

    fn child(&mut self) -> Option<Box<dyn Child>> {
        let (node, port) = self.port();
        let memory = self.memory(256 << 10);
        *self.child.borrow_mut() = Some((node, Streamer::new(port, memory)));
        Some(Box::new(SimChild { fabric: self.fabric.clone(), node, child: self.child.clone() }))
    }

    fn seed(&self) -> u64 {
        self.seed
    }
}

impl Child for SimChild {
    fn ask(&mut self, question: &str) -> String {
        let mut child = self.child.borrow_mut();
        child.as_mut().expect("the child lives").1.answer(question)
    }

    fn stop(&mut self) {
        self.fabric.stop(self.node);
    }

    fn cont(&mut self) {
        self.fabric.cont(self.node);
    }

    fn kill(&mut self) {
        self.fabric.kill(self.node);
        *self.child.borrow_mut() = None;
    }
}

impl Drop for SimChild {
    fn drop(&mut self) {
        *self.child.borrow_mut() = None;
    }
}
