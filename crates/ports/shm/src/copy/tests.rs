use proptest::prelude::{Just, ProptestConfig, prop, prop_assert, proptest};
use proptest::strategy::Strategy as _;

use super::*;

const SLOTS: u32 = 24;

/// Sources may repeat, destinations may not.
fn lists() -> impl proptest::strategy::Strategy<Value = (Vec<u32>, Vec<u32>)> {
    (0..=SLOTS as usize).prop_flat_map(|count| {
        let slots = Just((0..SLOTS).collect::<Vec<u32>>()).prop_shuffle();
        (
            prop::collection::vec(0..SLOTS, count),
            slots.prop_map(move |mut slots| {
                slots.truncate(count);
                slots
            }),
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn helpers_share_any_list(
        (src_index, dst_index) in lists(),
        piece_bytes in prop::sample::select(vec![0_usize, 63, 576, 1152, 4096, 16_500]),
        gap in 0_usize..130,
        helpers in 1_usize..4,
    ) {
        let stride = piece_bytes + gap;
        let src: Vec<u8> = (0..SLOTS as usize * stride).map(|at| (at % 251) as u8).collect();
        for strategy in [Strategy::Cached, Strategy::Streamed] {
            let mut threads = CopyThreads::start(Copier::detect().force(strategy), helpers).unwrap();
            for _ in 0..3 {
                let mut dst = vec![0xA5; SLOTS as usize * stride];
                let mut expected = dst.clone();
                for (&from, &to) in src_index.iter().zip(&dst_index) {
                    let (from, to) = (from as usize * stride, to as usize * stride);
                    expected[to..to + piece_bytes].copy_from_slice(&src[from..from + piece_bytes]);
                }
                let pieces = Pieces {
                    dst_base: dst.as_mut_ptr(),
                    dst_stride: stride,
                    src_base: src.as_ptr(),
                    src_stride: stride,
                    piece_bytes,
                    dst_index: &dst_index,
                    src_index: &src_index,
                };
                // SAFETY: the pieces are slots of the two vectors, and destinations appear once.
                unsafe { threads.copy_pieces(pieces) };
                prop_assert!(dst == expected);
            }
        }
    }

    #[test]
    fn helpers_share_one_long_run(bytes in 200_000usize..3_000_000, shift in 0usize..70) {
        let mut threads = CopyThreads::start(Copier::detect(), 2).unwrap();
        let src = (0..bytes + shift).map(|at| (at % 251) as u8).collect::<Vec<u8>>();
        let mut dst = vec![0u8; bytes];
        // SAFETY: both runs are `bytes` long and belong to different vectors.
        unsafe { threads.copy(dst.as_mut_ptr(), src.as_ptr().add(shift), bytes) };
        prop_assert!(dst == src[shift..]);
    }
}

/// Calls of all sizes right after each other and after pauses, so that helpers are met asleep, on their way to
/// sleep and awake; far more helpers than processors, so that some are always interrupted.
#[test]
fn every_call_is_complete_when_it_returns() {
    const PIECE_BYTES: usize = 16 << 10;
    const PIECES: usize = 64;
    let mut threads = CopyThreads::start(Copier::detect(), 8).unwrap();
    let index = (0..PIECES as u32).collect::<Vec<u32>>();
    let mut src = vec![0u8; PIECES * PIECE_BYTES];
    let mut dst = vec![0u8; PIECES * PIECE_BYTES];
    for call in 0..400usize {
        let count = 1 + call * 7 % PIECES;
        src.fill(call as u8);
        let pieces = Pieces {
            dst_base: dst.as_mut_ptr(),
            dst_stride: PIECE_BYTES,
            src_base: src.as_ptr(),
            src_stride: PIECE_BYTES,
            piece_bytes: PIECE_BYTES,
            dst_index: &index[..count],
            src_index: &index[..count],
        };
        // SAFETY: the pieces are slots of the two vectors, each named once.
        unsafe { threads.copy_pieces(pieces) };
        assert!(dst[..count * PIECE_BYTES].iter().all(|&byte| byte == call as u8), "call {call}");
        if call % 16 == 0 {
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
    }
}
