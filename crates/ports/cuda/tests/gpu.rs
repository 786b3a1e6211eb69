//! Memory on a GPU, and moves between.

mod machine;

use std::time::{Duration, Instant};

use crossdock_cuda::driver::{HandleTypes, LoadError, Residence};
use crossdock_cuda::fake::{self, Model, Origin};
use crossdock_cuda::sharing::{Refusal, Sharing};
use crossdock_cuda::{Ends, Export, Gpu, GpuError, Limits, Mover, Progress};
use crossdock_memory::{AccessError, DeviceFailed, Memory, MemoryError, MemoryKind};
use proptest::prelude::*;

const SERVER: u32 = 0;
const RACK: u32 = 2;
const NO_CHANNEL: u32 = 4;
const VIRTUAL: u32 = 5;
/// What each test that spoils, stops or counts has for itself.
const OF_FAILURES: u32 = 6;
const OF_LEAKS: u32 = 7;
const OF_PAUSES: u32 = 8;
const OF_REFUSALS: u32 = 10;

/// One of those that are software.
fn software(ordinal: u32) -> Gpu {
    Gpu::open(&fake::driver(), ordinal).unwrap()
}

fn content(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; memory.bytes()];
    memory.read(0, &mut bytes).unwrap();
    bytes
}

fn pattern(bytes: usize, seed: u8) -> Vec<u8> {
    (0..bytes).map(|at| (at as u8).wrapping_mul(31).wrapping_add((at >> 8) as u8) ^ seed).collect()
}

#[test]
fn devices_say_what_they_are() {
    if machine::is_skipped_on_a_gpu() {
        return;
    }
    let driver = fake::driver();
    assert_eq!(driver.version(), 12_080);
    let devices = driver.devices().unwrap();
    assert_eq!(devices.len(), fake::MODELS.len());
    for (device, model) in devices.iter().zip(fake::MODELS) {
        let facts = device.facts().unwrap();
        assert_eq!(facts.handles, HandleTypes { posix_fd: model.posix_fd, fabric: model.fabric });
        assert_eq!(facts.has_dma_buf, model.dma_buf);
        assert_eq!((facts.architecture.major, facts.architecture.minor), (9, 0));
        assert_eq!(facts.pci_address, format!("0000:{:02x}:00.0", device.ordinal() + 1));
    }
    assert!(devices[0].reaches(&devices[1]).unwrap() && !devices[0].reaches(&devices[2]).unwrap());
    assert!(driver.device(99).is_err());
}

/// What the driver says of fabric handles is not believed: they are tried.
#[test]
fn handles_are_tried() {
    if machine::is_skipped_on_a_gpu() {
        return;
    }
    let found = [SERVER, RACK, NO_CHANNEL, VIRTUAL].map(|device| software(device).handles());
    let of = |posix_fd, fabric| HandleTypes { posix_fd, fabric };
    assert_eq!(found, [of(true, false), of(true, true), of(true, false), of(false, false)]);
    assert_eq!(software(VIRTUAL).allocate(1).unwrap_err(), GpuError::NoVirtualMemory);
}

#[test]
fn memory_is_zero_read_written_and_filled() {
    let gpu = machine::gpu();
    // Longer than what is copied at once.
    let memory = gpu.allocate(9 << 20).unwrap();
    assert_eq!((memory.kind(), memory.bytes(), memory.fd().is_none()), (MemoryKind::Device, 9 << 20, true));
    assert!(content(&memory).iter().all(|&byte| byte == 0));
    let written = pattern(5 << 20, 7);
    memory.write(3 << 20, &written).unwrap();
    memory.fill((9 << 20) - 5, 5, 9).unwrap();
    let mut expected = vec![0; 9 << 20];
    expected[3 << 20..8 << 20].copy_from_slice(&written);
    expected[(9 << 20) - 5..].fill(9);
    assert!(content(&memory) == expected);
    assert!(matches!(memory.read(9 << 20, &mut [0]), Err(AccessError::OutOfRange(_))));
    assert_eq!(gpu.allocate(0).unwrap_err(), GpuError::Memory(MemoryError::ZeroBytes));
    let dma_buf = memory.device().unwrap().dma_buf();
    assert_eq!(dma_buf.map(|(_, offset)| offset), gpu.facts().has_dma_buf.then_some(0));
}

#[test]
fn memory_of_others_is_adopted_or_refused_by_its_name() {
    if machine::is_skipped_on_a_gpu() {
        return;
    }
    let gpu = machine::gpu();
    let bytes = 1 << 20;
    // SAFETY: what is allocated below is freed after its last handle.
    let adopt = |address, bytes| unsafe { gpu.adopt(address, bytes) };
    let refusal = |address, bytes| match adopt(address, bytes) {
        Err(GpuError::Refused(refusal)) => refusal,
        other => panic!("{other:?}"),
    };
    let malloc = fake::allocate(Origin::Malloc, SERVER, bytes);
    let memory = adopt(malloc + 4096, bytes - 4096).unwrap();
    memory.write(0, &pattern(100, 3)).unwrap();
    let held = Gpu::memory_of(&memory).unwrap();
    assert!(
        matches!(held.sharing(), Sharing::Ipc(within) if (within.offset, within.whole_bytes) == (4096, 1 << 20))
    );
    assert!(matches!(held.export().unwrap(), Export::Ipc(..)));
    // Not on a page's boundary: the exported range begins before.
    let odd = adopt(malloc + 100, 1000).unwrap();
    assert_eq!(odd.device().unwrap().dma_buf().unwrap().1, 100);
    assert!(matches!(refusal(malloc, bytes + 1), Refusal::LeavesAllocation { .. }));
    drop((memory, odd));
    for (origin, name) in
        [(Origin::Managed, "managed"), (Origin::Pool, "stream-ordered"), (Origin::Host, "host")]
    {
        let address = fake::allocate(origin, SERVER, bytes);
        let refusal = refusal(address, bytes);
        assert!(refusal.to_string().contains(name), "{refusal}");
        fake::free(address);
    }
    let elsewhere = fake::allocate(Origin::Malloc, RACK, bytes);
    assert!(matches!(refusal(elsewhere, 1), Refusal::OfAnotherDevice { found: RACK, asked: SERVER, .. }));
    assert!(matches!(refusal(16, 1), Refusal::NotOfTheDriver { .. }));
    assert!(matches!(refusal(malloc, 0), Refusal::NoBytes));
    // Our own, as an engine would name it: its piece is found by its address.
    let ours = gpu.allocate(bytes).unwrap();
    let again = adopt(Gpu::memory_of(&ours).unwrap().base() + 64, 1000).unwrap();
    assert!(
        matches!(Gpu::memory_of(&again).unwrap().export().unwrap(), Export::Descriptor(_, within) if within.offset == 64)
    );
    fake::free(malloc);
    fake::free(elsewhere);
}

/// What is exported is mapped by another process: here by this one, which has no other way.
#[test]
fn pieces_are_mapped_from_what_was_exported() {
    let gpus = match machine::device() {
        Some(_) => vec![machine::gpu()],
        None => vec![software(SERVER), software(RACK)],
    };
    for gpu in gpus {
        let memory = gpu.allocate(3 << 20).unwrap();
        memory.write(0, &pattern(3 << 20, 1)).unwrap();
        let Export::Descriptor(fd, within) = Gpu::memory_of(&memory).unwrap().export().unwrap() else {
            panic!("descriptors come first");
        };
        let context = gpu.context();
        let piece = context.import_fd(std::os::fd::AsFd::as_fd(&fd), within.whole_bytes as usize).unwrap();
        let mapped = std::sync::Arc::new(piece).map(&[]).unwrap();
        // SAFETY: the mapping lives longer.
        let there = unsafe { gpu.adopt(mapped.base(), 3 << 20) }.unwrap();
        assert!(content(&there) == pattern(3 << 20, 1));
        drop(memory);
        there.write(5, &[1, 2, 3]).unwrap();
        assert_eq!(content(&there)[5..8], [1, 2, 3], "a piece lives as long as it is mapped");
        // A file that is no piece, and a length that the piece does not have.
        let file = std::fs::File::open("/proc/self/maps").unwrap();
        assert!(context.import_fd(std::os::fd::AsFd::as_fd(&file), 2 << 20).is_err());
        let short = context.import_fd(std::os::fd::AsFd::as_fd(&fd), 64 << 20).unwrap();
        assert!(std::sync::Arc::new(short).map(&[]).is_err());
    }
    if machine::device().is_some() {
        return;
    }
    let context = software(NO_CHANNEL).context().clone();
    let refused = context.import_fabric(&[0; 64], 2 << 20).unwrap_err();
    assert_eq!((refused.call, refused.name), ("cuMemImportFromShareableHandle", "CUDA_ERROR_NOT_PERMITTED"));
    assert!(refused.advice().contains("IMEX"));
}

#[test]
fn failures_are_told_and_leave_nothing_behind() {
    if machine::is_skipped_on_a_gpu() {
        return;
    }
    const OUT_OF_MEMORY: i32 = 2;
    let before = fake::alive(OF_FAILURES);
    for call in ["cuStreamCreate", "cuMemHostRegister", "cuMemHostGetDevicePointer"] {
        fake::fail_next(OF_FAILURES, call, OUT_OF_MEMORY);
        let refused = Gpu::open(&fake::driver(), OF_FAILURES).unwrap_err();
        let GpuError::Driver(refused) = refused else { panic!("{refused:?}") };
        assert_eq!((refused.call, refused.code), (call, OUT_OF_MEMORY));
        assert_eq!(fake::alive(OF_FAILURES), before, "{call}");
    }
    for call in ["cuMemCreate", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess", "cuMemsetD8Async"] {
        let gpu = software(OF_FAILURES);
        fake::fail_next(OF_FAILURES, call, OUT_OF_MEMORY);
        let refused = gpu.allocate(1 << 20).unwrap_err();
        let GpuError::Driver(refused) = refused else { panic!("{refused:?}") };
        assert_eq!((refused.call, refused.code), (call, OUT_OF_MEMORY));
        drop(gpu);
        assert_eq!(fake::alive(OF_FAILURES), before, "{call}");
    }
}

/// What a forked child drops, it drops without a word to the driver: that would wait for locks that nobody lets go there.
#[test]
fn a_forked_child_asks_the_driver_nothing() {
    let gpu = machine::gpu();
    let memory = gpu.allocate(1 << 20).unwrap();
    memory.fill(0, 1 << 20, 5).unwrap();
    let mut mover = Mover::new(&gpu, machine::image(), Limits::default()).unwrap();
    let base = Gpu::memory_of(&memory).unwrap().base();
    // One that is on its way, or was just now.
    // SAFETY: in memory of the test's, which outlives the launch.
    unsafe { mover.span(base, base + (1 << 19), 1 << 19) };
    mover.launch();
    let held = (memory.clone(), mover, gpu.clone());
    // SAFETY: the child makes no call but those that this test is about, and ends without running anything of the parent's.
    match unsafe { libc::fork() } {
        0 => {
            let refused = memory.read(0, &mut [0]).is_err();
            drop((held, memory, gpu));
            // SAFETY: as above.
            unsafe { libc::_exit(if refused { 7 } else { 8 }) }
        }
        child => {
            let (mut status, until) = (0, Instant::now() + Duration::from_secs(20));
            // SAFETY: the status can be written.
            while unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } == 0 {
                assert!(Instant::now() < until, "the child ends");
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7, "{status:#x}");
            assert!(content(&memory).iter().all(|&byte| byte == 5));
        }
    }
}

#[test]
fn what_was_made_is_let_go() {
    if machine::is_skipped_on_a_gpu() {
        return;
    }
    let before = fake::alive(OF_LEAKS);
    let gpu = software(OF_LEAKS);
    let memory = gpu.allocate(1 << 20).unwrap();
    let mover = Mover::new(&gpu, machine::image(), Limits::default()).unwrap();
    let alive = fake::alive(OF_LEAKS);
    assert!(alive.physical > before.physical && alive.pinned > before.pinned && alive.queues > before.queues);
    drop((gpu, mover));
    memory.write(0, &[1]).unwrap();
    drop(memory);
    assert_eq!(fake::alive(OF_LEAKS), before);
}

#[test]
fn no_driver_is_an_error_with_advice() {
    // This machine may have one.
    match crossdock_cuda::driver::Driver::load() {
        Ok(driver) => assert!(driver.version() >= 12_000),
        Err(error) => assert!(!error.advice().is_empty() && error != LoadError::NoFunction { name: "" }),
    }
}

fn ended(mover: &mut Mover) -> u64 {
    let Progress { ended, failed } = mover.progress();
    assert_eq!(failed, None);
    ended
}

fn wait(mover: &mut Mover, ticket: u64) {
    let until = Instant::now() + Duration::from_secs(20);
    while ended(mover) < ticket {
        assert!(Instant::now() < until, "launch {ticket} ends");
        std::thread::yield_now();
    }
}

#[derive(Clone, Debug)]
enum Step {
    Span { from: usize, to: usize, bytes: usize, copies: bool },
    Pages { from: usize, to: usize, piece_bytes: usize, pairs: Vec<(u8, u8)> },
    Launch,
}

fn step() -> impl Strategy<Value = Step> {
    let span = (0usize..30_000, 0usize..30_000, 0usize..5_000, any::<bool>())
        .prop_map(|(from, to, bytes, copies)| Step::Span { from, to, bytes, copies });
    let pages =
        ((0usize..1_000, 0usize..1_000, 1usize..300), prop::collection::btree_map(0u8..100, 0u8..100, 0..60));
    let pages = pages.prop_map(|((from, to, piece_bytes), pairs)| Step::Pages {
        from,
        to,
        piece_bytes,
        // Destinations are distinct.
        pairs: pairs.into_iter().map(|(to, from)| (from, to)).collect(),
    });
    prop_oneof![span, pages, Just(Step::Launch)]
}

const STRIDE: u64 = 320;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever is gathered and launched moves once, nothing else changes, and small rings move it in parts.
    #[test]
    fn moves_are_those_of_the_model(steps in prop::collection::vec(step(), 1..30), small in any::<bool>()) {
        let gpu = machine::gpu();
        let staging_bytes = if small { 64 << 10 } else { 4 << 20 };
        let limits = Limits { staging_bytes, launches: 4, ..Limits::default() };
        let mut mover = Mover::new(&gpu, machine::image(), limits).unwrap();
        let (source, target) = (gpu.allocate(40_000).unwrap(), gpu.allocate(40_000).unwrap());
        let sent = pattern(40_000, 5);
        source.write(0, &sent).unwrap();
        let mut model = vec![0; 40_000];
        let base = |memory: &Memory| Gpu::memory_of(memory).unwrap().base();
        let (from_base, to_base) = (base(&source), base(&target));
        for step in steps {
            // Ops of one launch may overlap where they are written, and the order within is not kept: so each is a launch.
            let ticket = mover.ticket();
            match step {
                Step::Launch => {}
                Step::Span { from, to, bytes, copies } => {
                    while !mover.has_room_for_span() {
                        ended(&mut mover);
                    }
                    let (from_there, to_there) = (from_base + from as u64, to_base + to as u64);
                    // SAFETY: both lie in memory of the test's, which outlives the mover's launches.
                    unsafe {
                        match copies {
                            true => mover.copy(from_there, to_there, bytes as u64),
                            false => mover.span(from_there, to_there, bytes as u64),
                        }
                    }
                    model[to..to + bytes].copy_from_slice(&sent[from..from + bytes]);
                }
                Step::Pages { from, to, piece_bytes, pairs } => {
                    let (from_pages, to_pages): (Vec<u32>, Vec<u32>) =
                        pairs.iter().map(|&(from, to)| (u32::from(from), u32::from(to))).unzip();
                    let mut done = 0;
                    while done < pairs.len() {
                        let ends = |base, pages| Ends { base, stride_bytes: STRIDE, pages };
                        let (from_list, to_list) = (&from_pages[done..], &to_pages[done..]);
                        let count = mover.room_for_pages(from_list, to_list, piece_bytes as u64);
                        if count == 0 {
                            mover.launch();
                            ended(&mut mover);
                            continue;
                        }
                        // SAFETY: in memory of the test's, which outlives the mover's launches.
                        unsafe { mover.pages(
                            ends(from_base + from as u64, &from_list[..count]),
                            ends(to_base + to as u64, &to_list[..count]),
                            piece_bytes as u64,
                        ) };
                        done += count;
                    }
                    for (from_page, to_page) in pairs {
                        let at = |start: usize, page: u8| start + usize::from(page) * STRIDE as usize;
                        let (from, to) = (at(from, from_page), at(to, to_page));
                        model[to..to + piece_bytes].copy_from_slice(&sent[from..from + piece_bytes]);
                    }
                }
            }
            mover.launch();
            prop_assert!(mover.ticket() <= ticket + 60);
        }
        let last = mover.ticket() - 1;
        wait(&mut mover, last);
        prop_assert!(mover.is_idle());
        prop_assert!(content(&target) == model);
        prop_assert!(content(&source) == sent);
    }
}

/// A list that many ops have in common is staged once a launch, and each moves its own layer.
#[test]
fn a_list_of_many_layers_is_staged_once() {
    const LAYERS: usize = 20;
    const PAGES: usize = 4_000;
    const PIECE: usize = 16;
    let gpu = machine::gpu();
    let limits = Limits { staging_bytes: 64 << 10, ..Limits::default() };
    let mut mover = Mover::new(&gpu, machine::image(), limits).unwrap();
    let bytes = LAYERS * PAGES * PIECE;
    let [source, target] = [0, 1].map(|_| gpu.allocate(bytes).unwrap());
    let sent = pattern(bytes, 11);
    source.write(0, &sent).unwrap();
    let base = |memory: &Memory| Gpu::memory_of(memory).unwrap().base();
    let from_pages: Vec<u32> = (0..PAGES as u32).collect();
    let to_pages: Vec<u32> = (0..PAGES as u32).rev().collect();
    // Twice 16 KB of lists; twenty times that would not fit.
    for layer in 0..LAYERS {
        let at = (layer * PIECE) as u64;
        let ends = |base, pages| Ends { base, stride_bytes: (LAYERS * PIECE) as u64, pages };
        assert_eq!(mover.room_for_pages(&from_pages, &to_pages, PIECE as u64), PAGES);
        let (from, to) = (ends(base(&source) + at, &from_pages[..]), ends(base(&target) + at, &to_pages[..]));
        // SAFETY: in memory of the test's, which outlives the launch.
        unsafe { mover.pages(from, to, PIECE as u64) };
    }
    let ticket = mover.ticket();
    mover.launch();
    wait(&mut mover, ticket);
    let rows = sent.chunks_exact(LAYERS * PIECE).rev().flatten().copied();
    assert!(content(&target).into_iter().eq(rows));
}

/// More threads than a block can have are as many as it can: nothing is left out.
#[test]
fn limits_that_cannot_be_are_those_that_can() {
    let gpu = machine::gpu();
    for block_threads in [0, 1, 33, 2_048, u32::MAX] {
        let limits = Limits { blocks: 0, block_threads, staging_bytes: 0, launches: 0 };
        let mut mover = Mover::new(&gpu, machine::image(), limits).unwrap();
        let [source, target] = [0, 1].map(|_| gpu.allocate(1 << 20).unwrap());
        source.write(0, &pattern(1 << 20, 2)).unwrap();
        let base = |memory: &Memory| Gpu::memory_of(memory).unwrap().base();
        // SAFETY: in memory of the test's, which outlives the launch.
        unsafe { mover.span(base(&source), base(&target), 1 << 20) };
        let ticket = mover.ticket();
        mover.launch();
        wait(&mut mover, ticket);
        assert!(content(&target) == pattern(1 << 20, 2), "{block_threads} threads");
    }
}

/// The driver pins a range once: two that are registered for it keep it until the last.
#[test]
fn memory_of_the_host_is_pinned_until_its_last_registration() {
    let gpu = machine::gpu();
    let memory = Memory::allocate(1 << 20, &crossdock_memory::AllocateOptions::default()).unwrap();
    let first = gpu.context().register_host(&memory).unwrap();
    let second = gpu.context().register_host(&memory).unwrap();
    assert_eq!(first.address(), second.address());
    drop(first);
    let facts = gpu.context().facts_of(memory.base() as u64).unwrap();
    assert_eq!(facts.residence, Residence::Host);
    drop(second);
    let facts = gpu.context().facts_of(memory.base() as u64).unwrap();
    assert_eq!(facts.residence, Residence::Unknown);
}

/// A launch that the driver refuses fails, with all that comes later; what was launched before ends as it does.
#[test]
fn a_refused_launch_fails_and_earlier_ones_end() {
    if machine::is_skipped_on_a_gpu() {
        return;
    }
    let gpu = software(OF_REFUSALS);
    let mut mover = Mover::new(&gpu, machine::image(), Limits::default()).unwrap();
    let memory = gpu.allocate(2 << 20).unwrap();
    memory.fill(0, 1000, 7).unwrap();
    let base = Gpu::memory_of(&memory).unwrap().base();
    fake::pause(OF_REFUSALS, true);
    // SAFETY: as the test is about, or in memory of its own that outlives the launch.
    unsafe { mover.span(base, base + 1000, 1000) };
    mover.launch();
    fake::fail_next(OF_REFUSALS, "cuLaunchKernel", 701);
    // SAFETY: as the test is about, or in memory of its own that outlives the launch.
    unsafe { mover.span(base, base + 2000, 1000) };
    mover.launch();
    let Progress { ended: 0, failed: Some((2, failure)) } = mover.progress() else { panic!() };
    assert_eq!(
        (failure.call, failure.is_sticky(), mover.has_room_for_span()),
        ("cuLaunchKernel", false, false)
    );
    fake::pause(OF_REFUSALS, false);
    let until = Instant::now() + Duration::from_secs(20);
    while mover.progress().ended < 2 {
        assert!(Instant::now() < until);
    }
    assert!(content(&memory)[1000..2000].iter().all(|&byte| byte == 7));
    assert!(content(&memory)[2000..].iter().all(|&byte| byte == 0));
}

#[test]
fn nothing_ends_before_it_has_moved_and_rings_are_bounded() {
    if machine::is_skipped_on_a_gpu() {
        return;
    }
    let gpu = software(OF_PAUSES);
    let mut mover = Mover::new(&gpu, machine::image(), Limits { launches: 3, ..Limits::default() }).unwrap();
    let memory = gpu.allocate(2 << 20).unwrap();
    memory.fill(0, 1 << 20, 7).unwrap();
    let base = Gpu::memory_of(&memory).unwrap().base();
    fake::pause(OF_PAUSES, true);
    for nth in 0..3 {
        assert!(mover.has_room_for_span());
        // SAFETY: as the test is about, or in memory of its own that outlives the launch.
        unsafe { mover.span(base, base + (1 << 20) + nth * 100, 100) };
        mover.launch();
    }
    assert!(!mover.has_room_for_span(), "three launches are on their way");
    assert_eq!(mover.room_for_pages(&[0], &[0], 1), 0);
    for _ in 0..2_000 {
        assert_eq!(ended(&mut mover), 0);
    }
    assert!(!mover.wait(Instant::now()));
    fake::pause(OF_PAUSES, false);
    wait(&mut mover, 3);
    assert!(content(&memory)[1 << 20..][..300].iter().all(|&byte| byte == 7));
    assert!(mover.has_room_for_span());
    // SAFETY: as the test is about, or in memory of its own that outlives the launch.
    unsafe { mover.span(base, base + (1 << 20), 100) };
    mover.launch();
    assert!(mover.wait(Instant::now() + Duration::from_secs(20)));
}

#[test]
fn a_lost_context_fails_what_is_on_its_way() {
    if machine::is_skipped_on_a_gpu() {
        return;
    }
    let device = 9;
    let gpu = software(device);
    let mut mover = Mover::new(&gpu, machine::image(), Limits::default()).unwrap();
    let memory = gpu.allocate(1 << 20).unwrap();
    let base = Gpu::memory_of(&memory).unwrap().base();
    // SAFETY: as the test is about, or in memory of its own that outlives the launch.
    unsafe { mover.span(base, base + 1000, 100) };
    mover.launch();
    wait(&mut mover, 1);
    // An address that nothing is mapped at: as on a GPU, the context is lost with it.
    // SAFETY: as the test is about, or in memory of its own that outlives the launch.
    unsafe { mover.span(base, 1 << 20, 100) };
    mover.launch();
    // SAFETY: as the test is about, or in memory of its own that outlives the launch.
    unsafe { mover.span(base, base + 1000, 100) };
    mover.launch();
    let until = Instant::now() + Duration::from_secs(20);
    let failure = loop {
        match mover.progress() {
            Progress { ended, failed: Some((first, failure)) } => {
                assert_eq!((first, ended), (2, 3), "nothing runs in a context that is lost");
                break failure;
            }
            Progress { ended, failed: None } => assert_eq!(ended, 1),
        }
        assert!(Instant::now() < until);
    };
    assert_eq!(failure.name, "CUDA_ERROR_ILLEGAL_ADDRESS");
    assert!(failure.is_sticky() && failure.advice().contains("context is lost"));
    assert!(!mover.has_room_for_span(), "nothing is taken any more");
    let Err(AccessError::Device(DeviceFailed { code, .. })) = memory.read(0, &mut [0]) else { panic!() };
    assert_eq!(code, failure.code);
    assert_eq!(fake::MODELS[device as usize], Model::SERVER);
}
