//! Who waits on the arrivals never sees old bytes: a stream, and a kernel that runs all the while.

mod machine;
mod pair;

use std::time::{Duration, Instant};

use crossdock_cuda::{Arrivals, Gpu};
use crossdock_memory::Memory;
use pair::{PAGE_BYTES, PATIENCE, Pair};

/// What is enqueued behind the wait sees the page of the round.
#[test]
fn a_stream_that_waits_on_arrivals_sees_the_page() {
    let gpu = machine::gpu();
    let mut pair = Pair::new(&gpu, 1);
    let arrivals = Arrivals::new(&gpu).unwrap();
    let (seen, stream) = (gpu.allocate(PAGE_BYTES).unwrap(), gpu.context().stream().unwrap());
    let base = |memory: &Memory| Gpu::memory_of(memory).unwrap().base();
    for round in 1..=200u32 {
        arrivals.wait_in(&stream, round).unwrap();
        // SAFETY: both live until the stream is idle.
        unsafe { stream.copy(base(&seen), base(&pair.pages[1]), PAGE_BYTES) }.unwrap();
        assert!(!stream.is_idle().unwrap(), "it waits");
        pair.pages[0].fill(0, PAGE_BYTES, round as u8).unwrap();
        pair.write(round);
        arrivals.advance(round);
        stream.synchronize().unwrap();
        let mut found = vec![0; PAGE_BYTES];
        seen.read(0, &mut found).unwrap();
        assert!(found.iter().all(|&byte| byte == round as u8), "round {round}");
    }
    assert_eq!(arrivals.now(), 200);
}

/// A kernel that waits by itself, round for round, for as long as `CROSSDOCK_CUDA_SECONDS` says.
#[test]
fn a_kernel_that_waits_on_arrivals_sees_no_old_bytes() {
    if machine::device().is_none() {
        eprintln!("SKIPPED: the kernel that looks at the bytes needs a GPU");
        return;
    }
    let seconds = std::env::var("CROSSDOCK_CUDA_SECONDS").map_or(5, |text| text.parse().unwrap());
    let gpu = machine::gpu();
    let mut pair = Pair::new(&gpu, 1);
    let context = gpu.context();
    let consume = context.load(CONSUMER.as_bytes()).unwrap().function("crossdock_consume").unwrap();
    let (arrivals, seen, wrong) =
        (Arrivals::new(&gpu).unwrap(), Arrivals::new(&gpu).unwrap(), Arrivals::new(&gpu).unwrap());
    let (consumer, filler) = (context.stream().unwrap(), context.stream().unwrap());
    let base = |memory: &Memory| Gpu::memory_of(memory).unwrap().base();
    let (source, target) = (base(&pair.pages[0]), base(&pair.pages[1]));
    let (begin, mut round) = (Instant::now(), 0u32);
    while begin.elapsed() < Duration::from_secs(seconds) {
        const ROUNDS: u32 = 10_000;
        let (mut arrivals_at, mut page, mut words) = (arrivals.address(), target, (PAGE_BYTES / 4) as u32);
        let (mut first, mut rounds, mut patience_ns) = (round + 1, ROUNDS, 5_000_000_000u64);
        let (mut seen_at, mut wrong_at) = (seen.address(), wrong.address());
        let mut arguments: [*mut std::ffi::c_void; 8] = [
            (&raw mut arrivals_at).cast(),
            (&raw mut page).cast(),
            (&raw mut words).cast(),
            (&raw mut first).cast(),
            (&raw mut rounds).cast(),
            (&raw mut patience_ns).cast(),
            (&raw mut seen_at).cast(),
            (&raw mut wrong_at).cast(),
        ];
        // SAFETY: these are the kernel's parameters, and all that they lead to lives until it has ended, below.
        unsafe { consumer.launch(&consume, 1, 256, &mut arguments) }.unwrap();
        for _ in 0..ROUNDS {
            round += 1;
            // Every word of the page is the round's number: filled on the GPU, by words.
            // SAFETY: the page lives; nobody else writes it now.
            unsafe { filler.fill_words(source, PAGE_BYTES / 4, round) }.unwrap();
            filler.synchronize().unwrap();
            pair.write(round);
            arrivals.advance(round);
            let until = Instant::now() + PATIENCE;
            while seen.now() != round {
                assert!(Instant::now() < until, "round {round} is seen, not only {}", seen.now());
                std::hint::spin_loop();
            }
        }
        consumer.synchronize().unwrap();
    }
    println!(
        "{round} rounds in {:.1} s, {} words of another round",
        begin.elapsed().as_secs_f64(),
        wrong.now()
    );
    assert_eq!(wrong.now(), 0);
}

/// As [`Compiler::portable`](crossdock_cuda::compiler::Compiler::portable) makes it of the source beside it.
const CONSUMER: &str = include_str!("kernels/consumer.ptx");
