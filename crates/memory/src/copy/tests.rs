use proptest::prelude::{Just, ProptestConfig, TestCaseError, any, prop, prop_assert, prop_oneof, proptest};
use proptest::strategy::Strategy as _;

use super::*;

const ALL_VECTORS: [Vectors; 5] =
    [Vectors::Plain, Vectors::Sse2, Vectors::Avx2, Vectors::Avx512, Vectors::Neon];

fn copiers() -> Vec<Copier> {
    ALL_VECTORS
        .into_iter()
        .filter_map(Copier::with_vectors)
        .flat_map(|copier| [copier.force(Strategy::Cached), copier.force(Strategy::Streamed), copier])
        .collect()
}

/// Memory between two pages that nobody may touch, so that a step beyond either end is a crash even where a
/// sanitizer does not look into the instructions.
struct Fenced {
    map: *mut u8,
    map_bytes: usize,
    start: *mut u8,
    bytes: usize,
}

const GUARD_BYTES: usize = 4096;

impl Fenced {
    /// `bytes` bytes that begin `shift` bytes behind the first guard or end `shift` bytes before the second.
    fn new(bytes: usize, shift: usize, against_end: bool) -> Fenced {
        let middle_bytes = (bytes + shift).next_multiple_of(GUARD_BYTES).max(GUARD_BYTES);
        let map_bytes = middle_bytes + 2 * GUARD_BYTES;
        // Through the C library, so that the thread sanitizer sees that this address was another thread's before.
        // SAFETY: a fresh mapping at no particular address; the middle is made accessible and nothing else.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let map = libc::mmap(core::ptr::null_mut(), map_bytes, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(map, libc::MAP_FAILED);
            let map = map.cast::<u8>();
            let middle = map.add(GUARD_BYTES);
            assert_eq!(libc::mprotect(middle.cast(), middle_bytes, libc::PROT_READ | libc::PROT_WRITE), 0);
            let start =
                if against_end { middle.add(middle_bytes - bytes - shift) } else { middle.add(shift) };
            Fenced { map, map_bytes, start, bytes }
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the range is mapped, initialised by the kernel and borrowed through `self`.
        unsafe { core::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Fenced {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nobody refers to it any more.
        unsafe { assert_eq!(libc::munmap(self.map.cast(), self.map_bytes), 0) }
    }
}

/// A page list over two pools, and what the destination pool must hold afterwards.
#[derive(Clone, Debug)]
struct Case {
    piece_bytes: usize,
    src_gap: usize,
    dst_gap: usize,
    src_shift: usize,
    dst_shift: usize,
    against_end: bool,
    src_index: Vec<u32>,
    dst_index: Vec<u32>,
}

const SLOTS: u32 = 24;

fn case() -> impl proptest::strategy::Strategy<Value = Case> {
    let piece_bytes = prop_oneof![
        0usize..=200,
        500usize..=1400,
        4000usize..=4200,
        prop::sample::select(vec![64usize, 576, 1152, 2048, 4096, 16384]),
        16000usize..=17000,
    ];
    let gap = || prop_oneof![Just(0usize), 0usize..=130, Just(64)];
    let shift = || prop_oneof![Just(0usize), 0usize..=70];
    let indices = (0..=SLOTS as usize).prop_flat_map(|count| {
        let slots = (0..SLOTS).collect::<Vec<u32>>();
        (
            // A source piece may feed several destinations; a destination appears once.
            prop::collection::vec(0..SLOTS, count),
            Just(slots).prop_shuffle().prop_map(move |mut slots| {
                slots.truncate(count);
                slots
            }),
        )
    });
    (piece_bytes, gap(), gap(), shift(), shift(), any::<bool>(), indices).prop_map(
        |(piece_bytes, src_gap, dst_gap, src_shift, dst_shift, against_end, (src_index, dst_index))| Case {
            piece_bytes,
            src_gap,
            dst_gap,
            src_shift,
            dst_shift,
            against_end,
            src_index,
            dst_index,
        },
    )
}

impl Case {
    /// Runs a copy over fresh pools and compares every byte of the destination pool, gaps included.
    fn check(&self, copy: impl FnOnce(Pieces<'_>)) -> Result<(), TestCaseError> {
        let (src_stride, dst_stride) = (self.piece_bytes + self.src_gap, self.piece_bytes + self.dst_gap);
        let mut src = Fenced::new(pool_bytes(self.piece_bytes, src_stride), self.src_shift, self.against_end);
        let mut dst = Fenced::new(pool_bytes(self.piece_bytes, dst_stride), self.dst_shift, self.against_end);
        for (at, byte) in src.bytes().iter_mut().enumerate() {
            *byte = (at as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes()[0];
        }
        dst.bytes().fill(0xA5);
        let mut expected = dst.bytes().to_vec();
        for (&from, &to) in self.src_index.iter().zip(&self.dst_index) {
            let (from, to) = (from as usize * src_stride, to as usize * dst_stride);
            expected[to..to + self.piece_bytes].copy_from_slice(&src.bytes()[from..from + self.piece_bytes]);
        }
        copy(Pieces {
            dst_base: dst.start,
            dst_stride,
            src_base: src.start,
            src_stride,
            piece_bytes: self.piece_bytes,
            dst_index: &self.dst_index,
            src_index: &self.src_index,
        });
        prop_assert!(dst.bytes() == expected.as_slice());
        Ok(())
    }
}

/// The last piece has no gap behind it, so that the guard page follows it.
fn pool_bytes(piece_bytes: usize, stride: usize) -> usize {
    (SLOTS as usize - 1) * stride + piece_bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_way_copies_like_memcpy(case in case()) {
        for copier in copiers() {
            // SAFETY: the pieces lie within the case's pools and destinations appear once.
            case.check(|pieces| unsafe { copier.copy_pieces(pieces) })?;
        }
    }

    #[test]
    fn a_run_of_any_length_is_copied(bytes in 0usize..70_000, src_shift in 0usize..70, dst_shift in 0usize..70) {
        for copier in copiers() {
            let mut src = Fenced::new(bytes, src_shift, true);
            let mut dst = Fenced::new(bytes, dst_shift, true);
            for (at, byte) in src.bytes().iter_mut().enumerate() {
                *byte = (at % 251) as u8;
            }
            // SAFETY: both runs are `bytes` long and lie in different mappings.
            unsafe { copier.copy(dst.start, src.start, bytes) };
            prop_assert!(dst.bytes() == src.bytes());
        }
    }
}

#[test]
fn every_short_length_and_alignment_is_copied() {
    for copier in copiers() {
        for bytes in 0..=192 {
            for shift in 0..64 {
                let mut src = [0u8; 320];
                let mut dst = [0u8; 320];
                for (at, byte) in src.iter_mut().enumerate() {
                    *byte = at as u8 | 1;
                }
                // SAFETY: both runs end within their arrays: 63 + 192 < 320.
                unsafe { copier.copy(dst.as_mut_ptr().add(shift), src.as_ptr().add(63 - shift), bytes) };
                assert_eq!(&dst[shift..shift + bytes], &src[63 - shift..63 - shift + bytes]);
                assert!(dst[..shift].iter().chain(&dst[shift + bytes..]).all(|&byte| byte == 0));
            }
        }
    }
}

#[test]
fn every_processor_has_the_streaming_stores_of_its_architecture() {
    let least = match std::env::consts::ARCH {
        "x86_64" => Vectors::Sse2,
        "aarch64" => Vectors::Neon,
        _ => Vectors::Plain,
    };
    assert!(Copier::with_vectors(least).is_some());
    assert_eq!(Copier::detect().vectors() == Vectors::Plain, least == Vectors::Plain);
    let foreign = if least == Vectors::Neon { Vectors::Sse2 } else { Vectors::Neon };
    assert_eq!(Copier::with_vectors(foreign), None);
}

#[test]
fn small_totals_and_short_pieces_stay_in_the_cache() {
    let copier = Copier::detect();
    if copier.vectors() == Vectors::Plain {
        eprintln!("skipped: this processor has no streaming stores that are used here");
        return;
    }
    assert_eq!(copier.strategy(4096, 4096), Strategy::Cached);
    assert_eq!(copier.strategy(4096, 1 << 20), Strategy::Streamed);
    assert_eq!(copier.strategy(64, 1 << 20), Strategy::Cached);
    assert_eq!(Copier::with_vectors(Vectors::Plain).unwrap().strategy(4096, 1 << 20), Strategy::Cached);
}

#[test]
#[should_panic(expected = "each piece has a source and a destination")]
fn lists_of_different_length_are_refused() {
    let pieces = Pieces { dst_index: &[0, 1], ..Pieces::run(core::ptr::null_mut(), core::ptr::null(), 0) };
    // SAFETY: the lists are refused before any memory is touched.
    unsafe { Copier::detect().copy_pieces(pieces) }
}
