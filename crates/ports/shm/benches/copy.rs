//! Measures the copy routine against every other way to copy the same scattered pieces.
//!
//! `cargo bench -p crossdock-shm --bench copy -- [--sizes 1152,4096] [--repeats 5] [--pool-mib 512]
//! [--payload-mib 256] [--threads 1,2] [--only shared|process|latency|sharing]`
//!
//! Both pools are larger than the last-level cache, the page lists are random permutations, and the source is
//! written anew before each copy, as a cache that the model has just filled. The ways take turns within each
//! repeat, so that a busy machine hurts all of them alike; medians are printed, beside ratios to the plain
//! scattered memcpy and to the best of all ways. Without `--bench` (under `cargo test`) it runs once over small
//! pools, to see that it works.

use std::hint::black_box;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crossdock_shm::copy::{Copier, CopyThreads, Pieces, Strategy, Vectors};
use crossdock_shm::process_memory::{PeerProcess, ProcessPieces};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use rustix::process::Pid;

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(problem) => {
            eprintln!("{problem}");
            return ExitCode::FAILURE;
        }
    };
    // The child must be made before this process has threads.
    if options.runs("process") {
        process_memory(&options);
    }
    if options.runs("shared") {
        let pools = Pools::new(options.pool_bytes);
        for &piece_bytes in &options.sizes {
            for &threads in &options.threads {
                shared_memory(&options, &pools, piece_bytes, threads);
            }
        }
    }
    if options.runs("latency") {
        latency(&Pools::new(options.pool_bytes));
    }
    if options.runs("sharing") {
        sharing(&Pools::new(options.pool_bytes));
    }
    ExitCode::SUCCESS
}

struct Options {
    pool_bytes: usize,
    payload_bytes: usize,
    repeats: usize,
    sizes: Vec<usize>,
    threads: Vec<usize>,
    only: Option<String>,
}

impl Options {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Options, String> {
        let mut options = Options {
            pool_bytes: 8 << 20,
            payload_bytes: 4 << 20,
            repeats: 1,
            sizes: vec![576, 1152, 4096, 16384, 65536, 262144, 1 << 20],
            threads: vec![1, 2],
            only: None,
        };
        let mut given = Vec::new();
        while let Some(word) = words.next() {
            if word == "--bench" {
                options = Options { pool_bytes: 512 << 20, payload_bytes: 256 << 20, repeats: 5, ..options };
            } else {
                let value = words.next().ok_or(format!("{word} needs a value"))?;
                given.push((word, value));
            }
        }
        let number = |value: &str| value.parse::<usize>().map_err(|_| format!("{value} is no number"));
        let numbers = |value: &str| value.split(',').map(number).collect::<Result<Vec<_>, _>>();
        for (word, value) in given {
            match word.as_str() {
                "--pool-mib" => options.pool_bytes = number(&value)? << 20,
                "--payload-mib" => options.payload_bytes = number(&value)? << 20,
                "--repeats" => options.repeats = number(&value)?.max(1),
                "--sizes" => options.sizes = numbers(&value)?,
                "--threads" => options.threads = numbers(&value)?,
                "--only" => options.only = Some(value),
                _ => return Err(format!("{word} is not an option here")),
            }
        }
        if options.payload_bytes > options.pool_bytes {
            return Err("the payload must fit into the pool".into());
        }
        Ok(options)
    }

    fn runs(&self, part: &str) -> bool {
        self.only.as_deref().is_none_or(|only| only == part)
    }
}

/// Two shared mappings, the kind of memory that the port maps from its peer.
struct Pools {
    src: *mut u8,
    dst: *mut u8,
    bytes: usize,
}

impl Pools {
    fn new(bytes: usize) -> Pools {
        Pools { src: map(bytes, MapFlags::SHARED), dst: map(bytes, MapFlags::SHARED), bytes }
    }

    fn write_source(&self, salt: u64) {
        write(self.src, self.bytes, salt);
    }
}

impl Drop for Pools {
    fn drop(&mut self) {
        // SAFETY: both mappings are ours, and all users have returned.
        unsafe {
            rustix::mm::munmap(self.src.cast(), self.bytes).expect("our own mapping");
            rustix::mm::munmap(self.dst.cast(), self.bytes).expect("our own mapping");
        }
    }
}

fn map(bytes: usize, flags: MapFlags) -> *mut u8 {
    // SAFETY: a fresh mapping at no particular address.
    let base =
        unsafe { mmap_anonymous(core::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, flags) };
    let base = base.expect("the benchmark needs memory for its pools").cast::<u8>();
    // SAFETY: the mapping is that long.
    unsafe { base.write_bytes(1, bytes) };
    base
}

fn write(base: *mut u8, bytes: usize, salt: u64) {
    // SAFETY: every pool is that long, page-aligned and not in use by anybody else.
    let words = unsafe { core::slice::from_raw_parts_mut(base.cast::<u64>(), bytes / 8) };
    for (at, word) in words.iter_mut().enumerate() {
        *word = (at as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ salt;
    }
}

/// A random permutation's beginning: no slot appears twice, and neighbours are far apart.
fn scattered(slots: usize, count: usize, seed: u64) -> Vec<u32> {
    let mut state = seed;
    let mut random = move || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed ^ (mixed >> 27)
    };
    let mut index = (0..slots as u32).collect::<Vec<u32>>();
    for last in (1..slots).rev() {
        index.swap(last, (random() % (last as u64 + 1)) as usize);
    }
    index.truncate(count);
    index
}

fn cpu_seconds() -> f64 {
    // SAFETY: a zeroed rusage is valid, and the call fills it.
    let usage = unsafe {
        let mut usage = core::mem::zeroed::<libc::rusage>();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 * 1e-6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn lower_decile(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 10]
}

/// One way to copy, and what it took in each repeat.
struct Way<'a> {
    name: String,
    copy: Box<dyn FnMut(Pieces<'_>) + 'a>,
    gb_per_s: Vec<f64>,
    cpu_s_per_gb: Vec<f64>,
}

fn way<'a>(name: impl Into<String>, copy: impl FnMut(Pieces<'_>) + 'a) -> Way<'a> {
    Way { name: name.into(), copy: Box::new(copy), gb_per_s: Vec::new(), cpu_s_per_gb: Vec::new() }
}

/// Every piece list below consists of slots of two live pools, each named once, which is what the unsafe copy
/// routines ask for.
fn shared_memory(options: &Options, pools: &Pools, piece_bytes: usize, threads: usize) {
    let slots = pools.bytes / piece_bytes;
    let count = options.payload_bytes / piece_bytes;
    let src_index = scattered(slots, count, piece_bytes as u64);
    let dst_index = scattered(slots, count, piece_bytes as u64 + 1);
    let pieces = Pieces {
        dst_base: pools.dst,
        dst_stride: piece_bytes,
        src_base: pools.src,
        src_stride: piece_bytes,
        piece_bytes,
        dst_index: &dst_index,
        src_index: &src_index,
    };

    let mut ways = vec![way("memcpy", move |pieces| in_halves(pieces, threads, memcpy))];
    #[cfg(target_arch = "x86_64")]
    ways.push(way("rep movsb", move |pieces| in_halves(pieces, threads, rep_movsb)));
    for vectors in [Vectors::Plain, Vectors::Sse2, Vectors::Avx2, Vectors::Avx512, Vectors::Neon] {
        let Some(copier) = Copier::with_vectors(vectors) else {
            continue;
        };
        let strategy = if vectors == Vectors::Plain { Strategy::Cached } else { Strategy::Streamed };
        let copier = copier.force(strategy);
        ways.push(way(format!("{strategy:?} {vectors:?}"), move |pieces| {
            // SAFETY: see the function's comment.
            in_halves(pieces, threads, move |part| unsafe { copier.copy_pieces(part) })
        }));
    }
    let mut pool = CopyThreads::start(Copier::detect(), threads - 1).expect("helpers can start");
    // SAFETY: see the function's comment.
    ways.push(way("ours", move |pieces| unsafe { pool.copy_pieces(pieces) }));

    let total_gb = pieces.total_bytes() as f64 * 1e-9;
    for repeat in 0..options.repeats {
        for way in &mut ways {
            pools.write_source(repeat as u64);
            let (cpu, start) = (cpu_seconds(), Instant::now());
            (way.copy)(pieces);
            way.gb_per_s.push(total_gb / start.elapsed().as_secs_f64());
            way.cpu_s_per_gb.push((cpu_seconds() - cpu) / total_gb);
            verify(pieces, &way.name);
        }
    }
    let plain = median(&ways[0].gb_per_s);
    let best = ways.iter().map(|way| median(&way.gb_per_s)).fold(0.0, f64::max);
    println!("pieces of {piece_bytes} bytes, {threads} thread(s):");
    for way in &ways {
        let gb_per_s = median(&way.gb_per_s);
        let most = way.gb_per_s.iter().copied().fold(0.0, f64::max);
        println!(
            "  {:18} {gb_per_s:6.2} GB/s (most {most:6.2})  {:5.2} x memcpy  {:4.2} of best  {:.3} CPU s/GB",
            way.name,
            gb_per_s / plain,
            gb_per_s / best,
            median(&way.cpu_s_per_gb),
        );
    }
}

fn verify(pieces: Pieces<'_>, name: &str) {
    for piece in 0..pieces.count() {
        let from = pieces.src_index[piece] as usize * pieces.src_stride;
        let to = pieces.dst_index[piece] as usize * pieces.dst_stride;
        // SAFETY: the piece lies in the pools, which nobody writes now.
        let equal = unsafe {
            core::slice::from_raw_parts(pieces.src_base.add(from), pieces.piece_bytes)
                == core::slice::from_raw_parts(pieces.dst_base.add(to), pieces.piece_bytes)
        };
        assert!(equal, "{name} has not copied piece {piece}");
    }
}

/// Runs a copy over equal shares of the list, one on each thread.
fn in_halves(pieces: Pieces<'_>, threads: usize, copy: impl Fn(Pieces<'_>) + Copy + Send) {
    /// The pools outlive the scope, and the shares do not overlap.
    struct Share<'a>(Pieces<'a>);
    // SAFETY: as the type's comment says.
    unsafe impl Send for Share<'_> {}

    if threads == 1 {
        return copy(pieces);
    }
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let range = pieces.count() * thread / threads..pieces.count() * (thread + 1) / threads;
            let share = Share(Pieces {
                dst_index: &pieces.dst_index[range.clone()],
                src_index: &pieces.src_index[range],
                ..pieces
            });
            scope.spawn(move || {
                let share = share;
                copy(share.0)
            });
        }
    });
}

fn each_piece(pieces: Pieces<'_>, copy: impl Fn(*mut u8, *const u8)) {
    for (&from, &to) in pieces.src_index.iter().zip(pieces.dst_index) {
        copy(
            pieces.dst_base.wrapping_add(to as usize * pieces.dst_stride),
            pieces.src_base.wrapping_add(from as usize * pieces.src_stride),
        );
    }
}

fn memcpy(pieces: Pieces<'_>) {
    // SAFETY: the pieces are slots of two pools.
    each_piece(pieces, |dst, src| unsafe { core::ptr::copy_nonoverlapping(src, dst, pieces.piece_bytes) });
}

#[cfg(target_arch = "x86_64")]
fn rep_movsb(pieces: Pieces<'_>) {
    // SAFETY: the pieces are slots of two pools; the direction flag is clear in Rust code.
    each_piece(pieces, |dst, src| unsafe {
        core::arch::asm!(
            "rep movsb",
            inout("rcx") pieces.piece_bytes => _,
            inout("rdi") dst => _,
            inout("rsi") src => _,
            options(nostack, preserves_flags)
        );
    });
}

/// What a call costs its caller, and a reader on another core right after it, by strategy and total: the
/// ground of the threshold.
fn latency(pools: &Pools) {
    use std::sync::atomic::{AtomicU64, Ordering};

    const READER_STOPS: u64 = u64::MAX;
    println!("copy + read by another thread, median µs:");
    for piece_bytes in [1152usize, 4096, 65536] {
        for total_bytes in [4 << 10, 16 << 10, 32 << 10, 64 << 10, 256 << 10, 1 << 20] {
            let count = (total_bytes / piece_bytes).max(1);
            let slots = pools.bytes / piece_bytes;
            if count > slots || (total_bytes < piece_bytes) {
                continue;
            }
            let src_index = scattered(slots, slots, 1);
            let dst_index = scattered(slots, slots, 2);
            let (published, read) = (AtomicU64::new(0), AtomicU64::new(0));
            let mut copy_us = [const { Vec::new() }; 2];
            let mut read_us = [const { Vec::new() }; 2];
            let dst = pools.dst.expose_provenance();
            let batches = slots / count;
            std::thread::scope(|scope| {
                let (published, read, dst_index) = (&published, &read, &dst_index);
                scope.spawn(move || {
                    let mut seen = 0;
                    loop {
                        let now = published.load(Ordering::Acquire);
                        if now == READER_STOPS {
                            return;
                        }
                        if now == seen {
                            std::thread::yield_now();
                            continue;
                        }
                        let start = Instant::now();
                        let first = (now as usize - 1) % batches * count;
                        let mut sum = 0u64;
                        for &slot in &dst_index[first..first + count] {
                            let page =
                                core::ptr::with_exposed_provenance::<u64>(dst + slot as usize * piece_bytes);
                            for word in 0..piece_bytes / 8 {
                                // SAFETY: the slot lies in the pool; its words are aligned.
                                sum = sum.wrapping_add(unsafe { page.add(word).read() });
                            }
                        }
                        black_box(sum);
                        seen = now;
                        read.store(start.elapsed().as_nanos() as u64, Ordering::Release);
                    }
                });
                for call in 0..200usize {
                    let strategy = [Strategy::Cached, Strategy::Streamed][call % 2];
                    let copier = Copier::detect().force(strategy);
                    let first = call % batches * count;
                    let pieces = Pieces {
                        dst_base: pools.dst,
                        dst_stride: piece_bytes,
                        src_base: pools.src,
                        src_stride: piece_bytes,
                        piece_bytes,
                        dst_index: &dst_index[first..first + count],
                        src_index: &src_index[first..first + count],
                    };
                    for &slot in pieces.src_index {
                        write(pools.src.wrapping_add(slot as usize * piece_bytes), piece_bytes, call as u64);
                    }
                    let start = Instant::now();
                    // SAFETY: the pieces are slots of two pools, and the reader waits.
                    unsafe { copier.copy_pieces(pieces) };
                    copy_us[call % 2].push(micros(start.elapsed()));
                    read.store(0, Ordering::Relaxed);
                    published.store(call as u64 + 1, Ordering::Release);
                    let took = loop {
                        match read.load(Ordering::Acquire) {
                            0 => std::thread::yield_now(),
                            nanos => break nanos,
                        }
                    };
                    read_us[call % 2].push(took as f64 / 1e3);
                }
                published.store(READER_STOPS, Ordering::Release);
            });
            println!(
                "  {count:4} x {piece_bytes:5}: cached {:7.2} + {:7.2}   streamed {:7.2} + {:7.2}",
                median(&copy_us[0]),
                median(&read_us[0]),
                median(&copy_us[1]),
                median(&read_us[1]),
            );
        }
    }
}

/// What one helper saves in a single call, met awake (calls right after each other) and asleep (after a pause):
/// the ground of [`CopyThreads::SHARED_FROM_BYTES`].
fn sharing(pools: &Pools) {
    const PIECE_BYTES: usize = 16 << 10;
    println!(
        "one call with pieces of {PIECE_BYTES} bytes, median µs (lower decile: what a quiet moment gives):"
    );
    let slots = pools.bytes / PIECE_BYTES;
    let (src_index, dst_index) = (scattered(slots, slots, 1), scattered(slots, slots, 2));
    let mut alone = CopyThreads::start(Copier::detect(), 0).expect("nothing to start");
    let mut helped = CopyThreads::start(Copier::detect(), 1).expect("a helper can start");
    for total_bytes in [64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 4 << 20] {
        let count = total_bytes / PIECE_BYTES;
        let mut us = [const { Vec::new() }; 4];
        for call in 0..2000usize {
            // Runs of calls, so that the helper of the first two ways stays awake within its run.
            let way = call / 20 % 4;
            let first = call % (slots / count) * count;
            let pieces = Pieces {
                dst_base: pools.dst,
                dst_stride: PIECE_BYTES,
                src_base: pools.src,
                src_stride: PIECE_BYTES,
                piece_bytes: PIECE_BYTES,
                dst_index: &dst_index[first..first + count],
                src_index: &src_index[first..first + count],
            };
            if way >= 2 {
                std::thread::sleep(Duration::from_micros(300));
            }
            let start = Instant::now();
            // SAFETY: the pieces are slots of two pools.
            unsafe { if way % 2 == 0 { alone.copy_pieces(pieces) } else { helped.copy_pieces(pieces) } }
            us[way].push(micros(start.elapsed()));
        }
        print!("  {count:4} pieces:");
        for (way, name) in
            ["alone", "helped", "alone after a pause", "helped after a pause"].iter().enumerate()
        {
            print!("  {name} {:.2} ({:.2})", median(&us[way]), lower_decile(&us[way]));
        }
        println!();
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Scattered writes into another process that maps nothing of this one: one call a piece against batches.
fn process_memory(options: &Options) {
    let bytes = options.pool_bytes;
    // The child inherits the address, and its private pages are its own once it has written them.
    let (local, remote) = (map(bytes, MapFlags::PRIVATE), map(bytes, MapFlags::PRIVATE));
    let mut ready = [0; 2];
    // SAFETY: the array takes two descriptors; this process has no other threads, so the child may go on as it
    // likes; it leaves without running anything of the parent's.
    let child = unsafe {
        assert_eq!(libc::pipe(ready.as_mut_ptr()), 0);
        let child = libc::fork();
        if child == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            remote.write_bytes(2, bytes);
            libc::write(ready[1], [1u8].as_ptr().cast(), 1);
            loop {
                libc::pause();
            }
        }
        let mut byte = 0u8;
        assert_eq!(libc::read(ready[0], (&raw mut byte).cast(), 1), 1);
        child
    };
    let peer = PeerProcess::new(Pid::from_raw(child).expect("the fork worked"));
    if let Err(refusal) = peer.probe() {
        println!("process memory: not measured: {refusal}");
    } else {
        for &piece_bytes in &options.sizes {
            one_size_into_process(options, peer, piece_bytes, local, remote);
        }
    }
    // SAFETY: the child is ours and has not been waited for; the mappings are ours.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, core::ptr::null_mut(), 0);
        libc::close(ready[0]);
        libc::close(ready[1]);
        rustix::mm::munmap(local.cast(), bytes).expect("our own mapping");
        rustix::mm::munmap(remote.cast(), bytes).expect("our own mapping");
    }
}

fn one_size_into_process(
    options: &Options,
    peer: PeerProcess,
    piece_bytes: usize,
    local: *mut u8,
    remote: *mut u8,
) {
    let slots = options.pool_bytes / piece_bytes;
    // A quarter of the payload: these calls are several times slower than a copy.
    let count = (options.payload_bytes / piece_bytes / 4).max(1);
    let local_index = scattered(slots, count, piece_bytes as u64);
    let remote_index = scattered(slots, count, piece_bytes as u64 + 1);
    let list = ProcessPieces {
        local_base: local,
        local_stride: piece_bytes,
        remote_base: remote.expose_provenance() as u64,
        remote_stride: piece_bytes as u64,
        piece_bytes,
        local_index: &local_index,
        remote_index: &remote_index,
    };
    let contiguous = (0..count as u32).collect::<Vec<u32>>();
    let total_gb = (count * piece_bytes) as f64 * 1e-9;
    let mut gb_per_s = [const { Vec::new() }; 3];
    for repeat in 0..options.repeats {
        for (way, taken) in gb_per_s.iter_mut().enumerate() {
            write(local, options.pool_bytes, repeat as u64);
            let start = Instant::now();
            // SAFETY: the local pieces are slots of a pool that nobody else uses, and the child leaves its pool
            // to this process.
            unsafe {
                match way {
                    0 => {
                        for piece in 0..count {
                            let (local_index, remote_index) =
                                (&local_index[piece..=piece], &remote_index[piece..=piece]);
                            peer.write_pieces(ProcessPieces { local_index, remote_index, ..list })
                                .expect("written");
                        }
                    }
                    1 => peer.write_pieces(list).expect("written"),
                    _ => peer
                        .write_pieces(ProcessPieces { remote_index: &contiguous, ..list })
                        .expect("written"),
                }
            }
            taken.push(total_gb / start.elapsed().as_secs_f64());
        }
    }
    println!(
        "process memory, pieces of {piece_bytes} bytes: one call a piece {:.2} GB/s, batched {:.2}, batched and \
         adjacent there {:.2}",
        median(&gb_per_s[0]),
        median(&gb_per_s[1]),
        median(&gb_per_s[2]),
    );
}
