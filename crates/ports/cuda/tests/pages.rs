//! The page kernel, compiled as C++ and run on a CPU: every byte that it should move, and no other.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crossdock_cuda::moves::{Batch, Pieces, Side, Signal, Word};
use libloading::{Library, Symbol};
use proptest::prelude::*;

type Run = unsafe extern "C" fn(
    word_bytes: u32,
    blocks: u32,
    threads: u32,
    seed: u32,
    all: *const Pieces,
    count: u32,
    tiles: u64,
    signals: *const Signal,
    signal_count: u32,
    finished: *mut u32,
);

/// The kernels as a library; `None` where no C++ compiler is.
fn compiled() -> Option<&'static Library> {
    static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
    LIBRARY
        .get_or_init(|| {
            let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
            let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cpu/run.cpp");
            let made: PathBuf = [env!("CARGO_TARGET_TMPDIR"), "pages-on-a-cpu.so"].iter().collect();
            let built = Command::new(&compiler)
                .args(["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"])
                .args(["-fPIC", "-shared", "-pthread"])
                .args([&source, Path::new("-o"), &made])
                .output();
            match built {
                Err(error) => {
                    eprintln!("SKIPPED: {compiler}: {error}");
                    None
                }
                Ok(told) => {
                    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
                    // SAFETY: it was made here, and what it does when it is loaded is C++'s own.
                    Some(unsafe { Library::new(&made) }.expect("a library"))
                }
            }
        })
        .as_ref()
}

/// One launch for each length of words, on grids and in orders that the seed chooses. `false` where nothing can be run.
fn launch(batch: &Batch, threads: u32, seed: u32) -> bool {
    let Some(library) = compiled() else { return false };
    // SAFETY: it is the function's type.
    let run: Symbol<'_, Run> = unsafe { library.get(b"run_move_words\0") }.expect("the function");
    for word in Word::ALL {
        let launch = batch.launch(word);
        if launch.tiles == 0 {
            continue;
        }
        let (mut finished, mut told) = (0u32, [7u32; 2]);
        let at = told.as_mut_ptr();
        let signal = |nth: usize, value| Signal { at: at.wrapping_add(nth) as u64, value, reserved: 0 };
        let signals = [signal(0, 41), signal(1, 42)];
        // More blocks than tiles, and fewer.
        let blocks = 1 + seed % (launch.tiles as u32 + 2).min(9);
        let (count, bytes) = (launch.pieces.len() as u32, word.bytes() as u32);
        // SAFETY: the arrays live; the caller has made the pieces of memory that lives.
        unsafe {
            run(
                bytes,
                blocks,
                threads,
                seed,
                launch.pieces.as_ptr(),
                count,
                launch.tiles,
                signals.as_ptr(),
                2,
                &raw mut finished,
            );
        }
        assert_eq!(finished, 0, "the next launch begins as this one did");
        // SAFETY: `told` lives, and nobody else writes it now.
        assert_eq!(unsafe { [at.read_volatile(), at.add(1).read_volatile()] }, [41, 42]);
    }
    true
}

#[derive(Debug, Clone)]
struct Case {
    align: u32,
    offsets: (u64, u64),
    piece: u64,
    gaps: (u64, u64),
    lists: Option<(Vec<u32>, Vec<u32>)>,
    pieces: u64,
}

fn case() -> impl Strategy<Value = Case> {
    let shuffled = || Just((0..40u32).collect::<Vec<_>>()).prop_shuffle();
    let piece = prop_oneof![1u64..40, Just(576), Just(1152), 900u64..3000, Just(16384)];
    let gaps = (0u64..50, 0u64..50);
    (0u32..6, (0u64..50, 0u64..50), piece, gaps, prop::option::of((shuffled(), shuffled())), 0u64..40)
        .prop_map(|(align, offsets, piece, gaps, lists, pieces)| Case {
            align,
            offsets,
            piece,
            gaps,
            lists,
            pieces,
        })
}

fn bytes(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..count).map(|_| next()).collect()
}

/// The first place in it that a word of 16 bytes could have.
fn aligned(memory: &[u8]) -> usize {
    memory.as_ptr().align_offset(16)
}

proptest! {
    // Each block is as many threads of the machine's.
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn pieces_land_where_they_belong_and_nothing_else_changes(
        cases in prop::collection::vec(case(), 1..4),
        threads in prop::sample::select(vec![1u32, 3, 8, 32]),
        seed in any::<u32>(),
    ) {
        let mut batch = Batch::new(threads);
        // (source, destination, expected, lists): kept where they are until the launch is over.
        let mut kept = Vec::new();
        for (nth, case) in cases.iter().enumerate() {
            let even = |number: u64| (number >> case.align) << case.align;
            let piece = even(case.piece).max(1);
            let strides = [piece + even(case.gaps.0), piece + even(case.gaps.1)];
            let offsets = [even(case.offsets.0) as usize, even(case.offsets.1) as usize];
            let length = |side: usize| offsets[side] + 40 * strides[side] as usize + 64;
            let from = bytes(u64::from(seed) ^ 77 ^ nth as u64, length(0));
            let mut to = bytes(!u64::from(seed) ^ nth as u64, length(1));
            let (from_begin, to_begin) = (aligned(&from) + offsets[0], aligned(&to) + offsets[1]);
            let mut expected = to.clone();
            for i in 0..case.pieces as usize {
                let page = |side: usize| match &case.lists {
                    Some(lists) => [&lists.0, &lists.1][side][i] as usize,
                    None => i,
                };
                let source = from_begin + page(0) * strides[0] as usize;
                let destination = to_begin + page(1) * strides[1] as usize;
                expected[destination..][..piece as usize].copy_from_slice(&from[source..][..piece as usize]);
            }
            let side = |base: *const u8, nth: usize| Side {
                base: base as u64,
                stride_bytes: strides[nth],
                pages: case.lists.as_ref().map(|lists| [&lists.0, &lists.1][nth].as_ptr() as u64),
            };
            let sides = (side(from[from_begin..].as_ptr(), 0), side(to[to_begin..].as_mut_ptr(), 1));
            batch.pages(sides.0, sides.1, piece, case.pieces);
            kept.push((from, to, expected));
        }
        if launch(&batch, threads, seed) {
            for (_, to, expected) in &kept {
                prop_assert!(to == expected);
            }
        }
    }

    #[test]
    fn spans_land_where_they_belong_and_nothing_else_changes(
        (from_at, to_at, count) in (0usize..40, 0usize..40, 0usize..5000),
        threads in prop::sample::select(vec![1u32, 3, 32]),
        seed in any::<u32>(),
    ) {
        let from = bytes(seed.into(), 5100);
        let mut to = bytes(!u64::from(seed), 5100);
        let mut expected = to.clone();
        expected[to_at..][..count].copy_from_slice(&from[from_at..][..count]);
        let mut batch = Batch::new(threads);
        batch.span(from[from_at..].as_ptr() as u64, to[to_at..].as_mut_ptr() as u64, count as u64);
        if launch(&batch, threads, seed) {
            prop_assert!(to == expected);
        }
    }
}
