//! By which means memory that is not the host's is registered, and what is said of those that did not do. A file that can
//! be mapped stands in for a GPU's memory: to the port it is an address, a length and a descriptor.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crossdock_memory::{AllocateOptions, DeviceFailed, DeviceMemory, Memory};
use crossdock_transport::{Direction, Error, Op, Port, Token};
use crossdock_verbs::fake::{Fabric, FabricOptions, Failure, Function};
use crossdock_verbs::{Means, OutOfReach, RegisterError, Why};

use crate::network::SoftwareFabric;
use crate::pair::{Pair, impatient};

#[test]
fn an_exported_range_is_registered_by_dma_buf_and_moves() {
    let mut network = SoftwareFabric::new();
    let mut options = impatient();
    options.probe_regions = true;
    let mut pair = Pair::new(&mut network, options);
    let (stand_in, memory) = device_memory(true);
    let (id, key, means) = pair.ports[1].register_device(&memory).expect("an exported range");
    assert_eq!(means, Means::DmaBuf);
    let lane = pair.lanes[0];
    pair.remotes[0] = pair.ports[0].attach(lane, &key).expect("a good key").id;
    pair.memory[0].fill(0, 4096, 0x42).expect("inside");
    let write = pair.op(0, Direction::Write, 0, 4096);
    pair.post(0, Op { imm: Some(1), token: Some(Token(1)), ..write });
    pair.wait("a write into device memory", |pair| pair.arrived(1) == 1);
    let mut found = vec![0; 4096];
    stand_in.read(0, &mut found).expect("inside");
    assert!(found.iter().all(|&byte| byte == 0x42));
    // Small writes out of it are not read by the processor: the device fetches them.
    pair.regions[1] = id;
    let small = pair.op(1, Direction::Write, 0, 16);
    pair.post(1, Op { imm: Some(2), token: Some(Token(2)), ..small });
    pair.wait("a small write out of device memory", |pair| pair.arrived(0) == 1);
}

/// A GPU's memory is registered like any other, by the first means that does, or refused with what to do.
#[test]
fn memory_of_a_device_is_registered_like_any_other() {
    let mut network = SoftwareFabric::new();
    let fabric = network.0.clone();
    let mut pair = Pair::new(&mut network, impatient());
    let (_stand_in, memory) = device_memory(true);
    let (id, _) = pair.ports[0].register(&memory).expect("an exported range");
    pair.ports[0].deregister(id).expect("nothing uses it");
    let (_stand_in, memory) = device_memory(false);
    fabric.fail(Failure::next(Function::RegMrIova2, libc::EFAULT));
    let Err(Error::Unsupported { what, advice }) = pair.ports[0].register(&memory) else {
        panic!("it was registered")
    };
    assert!(what.contains("GPU") && advice.contains("nvidia_peermem"), "{what}: {advice}");
}

#[test]
fn what_dma_buf_refuses_the_vendors_module_may_take() {
    for (errno, old) in [(libc::EOPNOTSUPP, false), (libc::EINVAL, false), (0, true)] {
        let fabric = Fabric::new(FabricOptions { old_library: old, ..FabricOptions::default() });
        let mut network = SoftwareFabric(fabric.clone());
        let mut pair = Pair::new(&mut network, impatient());
        if errno != 0 {
            // With the flags that it may not know, and without.
            fabric.fail(Failure { times: 2, ..Failure::next(Function::RegDmabufMr, errno) });
        }
        let (_stand_in, memory) = device_memory(true);
        let (.., means) = pair.ports[0].register_device(&memory).expect("the second means");
        let dma_buf = match old {
            true => Why::LibraryTooOld,
            false => Why::Refused { call: "ibv_reg_dmabuf_mr", errno },
        };
        assert_eq!(means, Means::PeerMemory { dma_buf });
    }
}

#[test]
fn what_no_means_reaches_says_why_of_each() {
    let mut network = SoftwareFabric::new();
    let fabric = network.0.clone();
    let mut pair = Pair::new(&mut network, impatient());
    for exported in [true, false] {
        if exported {
            fabric.fail(Failure { times: 2, ..Failure::next(Function::RegDmabufMr, libc::EOPNOTSUPP) });
        }
        fabric.fail(Failure::next(Function::RegMrIova2, libc::EFAULT));
        let (_stand_in, memory) = device_memory(exported);
        let Err(RegisterError::OutOfReach(why)) = pair.ports[0].register_device(&memory) else {
            panic!("it was registered")
        };
        let dma_buf = match exported {
            true => Why::Refused { call: "ibv_reg_dmabuf_mr", errno: libc::EOPNOTSUPP },
            false => Why::NotExported,
        };
        let peer_memory = Why::Refused { call: "ibv_reg_mr", errno: libc::EFAULT };
        assert_eq!(why, OutOfReach { dma_buf, peer_memory });
        assert!(why.to_string().contains("host memory") && why.advice().contains("nvidia_peermem"), "{why}");
    }
}

/// Relaxed ordering is asked for, and done without where the kernel does not know it.
#[test]
fn a_dma_buf_is_written_in_any_order_where_that_is_known() {
    for is_known in [true, false] {
        let mut network = SoftwareFabric::new();
        let fabric = network.0.clone();
        let mut pair = Pair::new(&mut network, impatient());
        let before = fabric.regions().len();
        if !is_known {
            fabric.fail(Failure::next(Function::RegDmabufMr, libc::EINVAL));
        }
        let (_stand_in, memory) = device_memory(true);
        let (.., means) = pair.ports[0].register_device(&memory).expect("an exported range");
        assert_eq!(means, Means::DmaBuf);
        let regions = fabric.regions();
        assert_eq!(regions.len(), before + 1);
        assert_eq!(regions.last().is_some_and(|region| region.access & RELAXED_ORDERING != 0), is_known);
    }
}

/// A device that registers memory and then does not move it does not reach it: the next means is tried.
#[test]
fn what_a_probe_finds_dead_is_reached_by_the_next_means_or_by_none() {
    for means in [1, 2] {
        let mut network = SoftwareFabric::new();
        let fabric = network.0.clone();
        let mut options = impatient();
        options.probe_regions = true;
        let mut pair = Pair::new(&mut network, options);
        fabric.fail(Failure { times: means, ..Failure::next(Function::CreateQp, libc::ENOMEM) });
        let (_stand_in, memory) = device_memory(true);
        match (means, pair.ports[0].register_device(&memory)) {
            (1, Ok((.., found))) => assert_eq!(found, Means::PeerMemory { dma_buf: Why::ProbeFailed }),
            (2, Err(RegisterError::OutOfReach(why))) => {
                assert_eq!(why, OutOfReach { dma_buf: Why::ProbeFailed, peer_memory: Why::ProbeFailed });
                assert!(why.advice().contains("IOMMU"), "{}", why.advice());
            }
            (_, told) => panic!("{means}: {told:?}"),
        }
    }
}

/// `IBV_ACCESS_RELAXED_ORDERING`.
const RELAXED_ORDERING: u32 = 1 << 20;

/// A file that can be mapped, in the place of a GPU's memory.
struct StandIn {
    memory: Memory,
    dma_buf: Option<OwnedFd>,
}

impl DeviceMemory for StandIn {
    fn device(&self) -> &str {
        "stand-in"
    }

    fn read(&self, offset: usize, into: &mut [u8]) -> Result<(), DeviceFailed> {
        self.memory.read(offset, into).map_err(|_| DeviceFailed { call: "read", code: 1 })
    }

    fn write(&self, offset: usize, from: &[u8]) -> Result<(), DeviceFailed> {
        self.memory.write(offset, from).map_err(|_| DeviceFailed { call: "write", code: 1 })
    }

    fn fill(&self, offset: usize, bytes: usize, value: u8) -> Result<(), DeviceFailed> {
        self.memory.fill(offset, bytes, value).map_err(|_| DeviceFailed { call: "fill", code: 1 })
    }

    fn dma_buf(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.dma_buf.as_ref().map(|fd| (fd.as_fd(), 0))
    }
}

/// A range that says it is not the host's, and the file behind it.
#[allow(unsafe_code)]
fn device_memory(exported: bool) -> (Memory, Memory) {
    let memory = Memory::allocate(64 << 10, &AllocateOptions::default()).expect("memory for a test");
    let fd = memory.fd().expect("it is a file").try_clone_to_owned().expect("a descriptor");
    let (base, bytes) = (memory.base().expose_provenance() as u64, memory.bytes());
    let stand_in = StandIn { memory: memory.clone(), dma_buf: exported.then_some(fd) };
    // SAFETY: the stand-in keeps the mapping, which nothing else of the test's relies on; the file is of the same bytes.
    (memory, unsafe { Memory::from_device(base, bytes, Box::new(stand_in)) }.expect("a range"))
}
