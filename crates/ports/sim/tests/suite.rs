//! The conformance suite itself: a port that breaks one promise fails the case that states it.

use std::any::Any;
use std::collections::{BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crossdock_memory::{AllocateOptions, Memory};
use crossdock_sim::{Fabric, FabricOptions, NodeId, Semantics, SimPort, SimPortOptions};
use crossdock_transport::conformance::{CASES, Rig};
use crossdock_transport::{
    Attached, DownCause, Error, Event, Events, Fence, Grant, GrantId, LaneAddress, LaneId, LaneTags, LocalId,
    Op, PeerId, Port, PortInfo, Posted, RemoteKey, Result, Shape,
};

/// What a faulty port does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    RepeatsImmediates,
    ReversesEvents,
    CutsSpansShort,
    SaysDoneAtOnce,
    SaysDownTwice,
    SaysDownAtOnce,
    KeepsRevokedGrants,
    TakesBadOps,
    ComparesNoTags,
    ForgetsThatRegionsAreInUse,
}

#[test]
fn each_broken_promise_is_found() {
    use Fault::*;
    use Semantics::{Checked, Verbs};
    let faults = [
        (RepeatsImmediates, Checked, "immediates_come_once_after_their_bytes", "came twice"),
        (ReversesEvents, Checked, "immediates_come_once_after_their_bytes", "came after"),
        (CutsSpansShort, Checked, "spans_of_every_size", "1 of 4194381 bytes are wrong"),
        (SaysDoneAtOnce, Verbs, "done_covers_earlier_ops", "after the sources were overwritten"),
        (SaysDoneAtOnce, Checked, "done_of_a_read_means_that_it_has_arrived", "heard before its bytes"),
        (SaysDownTwice, Checked, "every_lane_ends_once", "after Some(ClosedHere)"),
        (SaysDownAtOnce, Verbs, "nothing_is_written_after_down", "after Down of the receiving end"),
        (KeepsRevokedGrants, Checked, "revoke_keeps_its_promise", "after the fence of a revoked grant"),
        (TakesBadOps, Checked, "bad_ops_are_refused_before_anything_moves", "a local span too long"),
        (ComparesNoTags, Checked, "wrong_tags_never_come_up", "shown a wrong tag"),
        (ForgetsThatRegionsAreInUse, Checked, "regions_in_use_stay", "a granted region"),
    ];
    for (fault, semantics, name, complaint) in faults {
        let case = CASES.iter().find(|case| case.name == name).expect("a case of the suite");
        let mut rig =
            FaultyRig { fault, semantics, fabric: Fabric::new(1, FabricOptions::default()), nodes: 0 };
        let failure = catch_unwind(AssertUnwindSafe(|| (case.run)(&mut rig))).expect_err(name);
        let message = message(&*failure);
        assert!(message.contains(complaint), "{fault:?} fails {name} for another reason: {message}");
    }
}

struct FaultyRig {
    fault: Fault,
    semantics: Semantics,
    fabric: Fabric,
    nodes: u32,
}

impl Rig for FaultyRig {
    fn name(&self) -> String {
        format!("a port that {:?}", self.fault)
    }

    fn ports(&mut self, count: usize) -> Vec<Box<dyn Port>> {
        let port = |_| {
            self.nodes += 1;
            let port = self.fabric.port(NodeId(self.nodes), SimPortOptions::new(self.semantics));
            Box::new(Faulty::new(port, self.fault)) as Box<dyn Port>
        };
        (0..count).map(port).collect()
    }

    fn memory(&mut self, bytes: usize) -> Memory {
        Memory::allocate(bytes, &AllocateOptions::default()).expect("memory for a test")
    }

    fn pass(&mut self) {
        let next = self.fabric.next_event_ns().unwrap_or(self.fabric.now_ns() + 1000);
        self.fabric.advance_to(next);
    }

    fn fence(&self) -> Fence {
        if self.semantics == Semantics::Checked { Fence::Now } else { Fence::WhenDown }
    }

    fn checks(&self) -> bool {
        self.semantics == Semantics::Checked
    }
}

/// A good port behind one that is not.
struct Faulty {
    port: SimPort,
    fault: Fault,
    waiting: VecDeque<Event>,
    said_down: BTreeSet<LaneId>,
}

impl Faulty {
    fn new(port: SimPort, fault: Fault) -> Self {
        Self { port, fault, waiting: VecDeque::new(), said_down: BTreeSet::new() }
    }
}

impl Port for Faulty {
    fn info(&self) -> &PortInfo {
        self.port.info()
    }

    fn register(&mut self, memory: &Memory) -> Result<(LocalId, RemoteKey)> {
        self.port.register(memory)
    }

    fn deregister(&mut self, region: LocalId) -> Result<()> {
        match self.port.deregister(region) {
            Err(Error::RegionInUse { .. }) if self.fault == Fault::ForgetsThatRegionsAreInUse => Ok(()),
            answer => answer,
        }
    }

    fn open_lane(&mut self, peer: PeerId) -> Result<(LaneId, LaneAddress)> {
        self.port.open_lane(peer)
    }

    fn connect(&mut self, lane: LaneId, remote: &LaneAddress, tags: &LaneTags) -> Result<()> {
        let mut tags = *tags;
        if self.fault == Fault::ComparesNoTags {
            tags = LaneTags { ours: [0; 32], theirs: [0; 32] };
        }
        self.port.connect(lane, remote, &tags)
    }

    fn attach(&mut self, lane: LaneId, key: &RemoteKey) -> Result<Attached> {
        self.port.attach(lane, key)
    }

    fn grant(&mut self, grant: &Grant<'_>) -> Result<()> {
        self.port.grant(grant)
    }

    fn revoke(&mut self, grant: GrantId) -> Fence {
        if self.fault == Fault::KeepsRevokedGrants { Fence::Now } else { self.port.revoke(grant) }
    }

    fn close(&mut self, lane: LaneId) {
        self.port.close(lane);
        if self.fault == Fault::SaysDownAtOnce && self.said_down.insert(lane) {
            self.waiting.push_back(Event::Down { lane, cause: DownCause::ClosedHere });
        }
    }

    fn post(&mut self, lane: LaneId, ops: &[Op<'_>]) -> Result<Posted> {
        let mut ops = ops.to_vec();
        for op in &mut ops {
            if let (Fault::CutsSpansShort, Shape::Span { bytes: bytes @ 2.., .. }) =
                (self.fault, &mut op.shape)
            {
                *bytes -= 1;
            }
        }
        match self.port.post(lane, &ops) {
            Err(_) if self.fault == Fault::TakesBadOps => Ok(Posted::all(&ops)),
            Ok(posted) if self.fault == Fault::SaysDoneAtOnce => {
                let tokens = ops[..posted.ops].iter().filter_map(|op| op.token);
                self.waiting.extend(tokens.map(|token| Event::Done { lane, token }));
                Ok(posted)
            }
            answer => answer,
        }
    }

    fn poll(&mut self, events: &mut Events) {
        let mut fresh = Events::with_capacity(64);
        self.port.poll(&mut fresh);
        let mut fresh: Vec<Event> = fresh.drain().collect();
        if self.fault == Fault::ReversesEvents {
            fresh.reverse();
        }
        for event in fresh {
            let times = match (self.fault, event) {
                (Fault::RepeatsImmediates, Event::Arrived { .. })
                | (Fault::SaysDownTwice, Event::Down { .. }) => 2,
                (Fault::SaysDoneAtOnce, Event::Done { .. }) => 0,
                (Fault::SaysDownAtOnce, Event::Done { lane, .. } | Event::Arrived { lane, .. })
                    if self.said_down.contains(&lane) =>
                {
                    0
                }
                (Fault::SaysDownAtOnce, Event::Down { lane, .. }) if !self.said_down.insert(lane) => 0,
                _ => 1,
            };
            self.waiting.extend(std::iter::repeat_n(event, times));
        }
        while !events.is_full()
            && let Some(event) = self.waiting.pop_front()
        {
            events.push(event);
        }
    }
}

fn message(failure: &(dyn Any + Send)) -> &str {
    let literal = failure.downcast_ref::<&str>().copied();
    failure.downcast_ref::<String>().map(String::as_str).or(literal).unwrap_or("no message")
}
