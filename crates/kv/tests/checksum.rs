//! Checksums across page sizes: what the source sums, the destination finds, and a changed byte does not pass.

use std::num::NonZeroU32;
use std::ops::Range;

use crossdock_kv::{
    CacheKind, CacheLayout, ChecksumDecodeError, ChecksumError, Checksums, Dtype, LayoutOptions, PageTable,
    PageTableError, Placement, Verify, VerifyError,
};
use crossdock_memory::{AccessError, AllocateOptions, Memory};
use proptest::prelude::*;

const TOKEN_BYTES: u32 = 24;

/// A worker whose memory holds, for each token and layer, bytes that say which they are.
struct Worker {
    layout: CacheLayout,
    pages: Vec<u32>,
    memory: Vec<Memory>,
}

impl Worker {
    /// The request's tokens in pages that step through the pool from its end.
    fn new(layers: Range<u32>, page_tokens: u32, placement: Placement, tokens: u32) -> Self {
        let pages = tokens.div_ceil(page_tokens).max(1) * 2;
        let layout = CacheLayout::new(LayoutOptions {
            model: "m".into(),
            model_layers: 4,
            layers,
            kind: CacheKind::Mla { latent_bytes: TOKEN_BYTES, rope_bytes: 0 },
            dtype: Dtype::Bf16,
            page_tokens,
            pages,
            placement,
        })
        .unwrap();
        let bytes = layout.bytes_needed(0) as usize;
        let memory = vec![Memory::allocate(bytes, &AllocateOptions::default()).unwrap()];
        let pages = (0..layout.pages_for(tokens)).map(|nth| pages - 1 - nth * 2).collect();
        let worker = Self { layout, pages, memory };
        for layer in worker.layout.layers() {
            for token in 0..tokens {
                let bytes: Vec<u8> =
                    (0..TOKEN_BYTES).map(|byte| (layer * 101 + token * 7 + byte) as u8).collect();
                worker.memory[0].write(worker.place(layer, token), &bytes).unwrap();
            }
        }
        worker
    }

    fn table(&self) -> PageTable<'_> {
        PageTable::new(&self.layout, &self.pages)
    }

    fn place(&self, layer: u32, token: u32) -> usize {
        let page = self.pages[(token / self.layout.page_tokens()) as usize];
        let offset = self.layout.page_layout(layer).unwrap().page_offset(page).unwrap();
        offset as usize + (token % self.layout.page_tokens() * TOKEN_BYTES) as usize
    }

    fn sums(&self, layers: Range<u32>, tokens: Range<u32>) -> Checksums {
        Checksums::compute(&self.memory, &self.table(), &self.layout, layers, tokens).unwrap()
    }
}

fn over_the_wire(sums: &Checksums) -> Checksums {
    let mut bytes = Vec::new();
    sums.encode(&mut bytes);
    Checksums::decode(&bytes).unwrap()
}

const LAYER_MAJOR: Placement = Placement::LayerMajor { region: 0 };
const PAGE_MAJOR: Placement = Placement::PageMajor { region: 0 };

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn both_sides_agree_until_a_byte_changes(
        source_tokens in 1u32..130, destination_tokens in 1u32..130, ends in (0u32..400, 0u32..400),
        layer in 1u32..3, at in any::<prop::sample::Index>(), byte in 0..TOKEN_BYTES, flip in 1u8..=255,
    ) {
        let tokens = ends.0.min(ends.1)..ends.0.max(ends.1);
        // The source holds fewer layers than the destination; the common ones are summed.
        let source = Worker::new(1..3, source_tokens, LAYER_MAJOR, 400);
        let destination = Worker::new(0..4, destination_tokens, PAGE_MAJOR, 400);
        let sums = over_the_wire(&source.sums(1..3, tokens.clone()));
        let verify = || sums.verify(&destination.memory, &destination.table(), &source.layout, 1..3, tokens.clone());
        prop_assert_eq!(verify(), Ok(()));

        let token = at.index(400) as u32;
        let place = destination.place(layer, token) + byte as usize;
        let mut changed = [0];
        destination.memory[0].read(place, &mut changed).unwrap();
        destination.memory[0].write(place, &[changed[0] ^ flip]).unwrap();
        match verify() {
            Ok(()) => prop_assert!(!tokens.contains(&token)),
            Err(VerifyError::Mismatch { tokens: block, page, expected, found }) => {
                prop_assert!(block.contains(&token) && tokens.contains(&token));
                prop_assert!(tokens.start <= block.start && block.end <= tokens.end);
                prop_assert_eq!(page, destination.pages[(block.start / destination_tokens) as usize]);
                prop_assert_ne!(expected, found);
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    #[test]
    fn random_bytes_decode_to_nothing_or_to_themselves(
        head in prop::collection::vec(0u32..200, 5), sums in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut bytes = vec![1];
        head.iter().for_each(|number| bytes.extend(number.to_le_bytes()));
        bytes.extend(&sums);
        if let Ok(decoded) = Checksums::decode(&bytes) {
            let mut again = Vec::new();
            decoded.encode(&mut again);
            prop_assert_eq!(again, bytes);
        }
    }
}

#[test]
fn the_sum_is_crc32c_of_the_tokens_layer_by_layer() {
    let worker = Worker::new(0..2, 3, PAGE_MAJOR, 10);
    let mut stream = Vec::new();
    for layer in 0..2 {
        for token in 2..9 {
            let mut bytes = [0; TOKEN_BYTES as usize];
            worker.memory[0].read(worker.place(layer, token), &mut bytes).unwrap();
            stream.extend(bytes);
        }
    }
    let mut bytes = Vec::new();
    worker.sums(0..2, 2..9).encode(&mut bytes);
    // Blocks are whole pages of 3 tokens, and at least 64 tokens long.
    let mut expected = vec![1];
    [0, 2, 2, 9, 66, crc32c::crc32c(&stream)].iter().for_each(|n: &u32| expected.extend(n.to_le_bytes()));
    assert_eq!(bytes, expected);
}

#[test]
fn many_tokens_make_longer_blocks_not_more_of_them() {
    let worker = Worker::new(0..1, 1, LAYER_MAJOR, 1);
    let pages = vec![0; 64 * 4096 + 1];
    let table = PageTable::new(&worker.layout, &pages);
    let encoded_bytes = |tokens: Range<u32>| {
        let mut bytes = Vec::new();
        Checksums::compute(&worker.memory, &table, &worker.layout, 0..1, tokens).unwrap().encode(&mut bytes);
        bytes.len()
    };
    assert_eq!(encoded_bytes(0..64 * 4096), 21 + 4 * 4096);
    assert_eq!(encoded_bytes(0..64 * 4096 + 1), 21 + 4 * 2049);
    assert_eq!(encoded_bytes(7..7), 21);
}

#[test]
fn sums_of_something_else_prove_nothing() {
    let worker = Worker::new(0..4, 16, LAYER_MAJOR, 64);
    let sums = worker.sums(0..4, 0..32);
    let other = |layers: Range<u32>, tokens: Range<u32>| VerifyError::OtherExtent {
        layers,
        tokens,
        summed_layers: 0..4,
        summed_tokens: 0..32,
    };
    for (layers, tokens) in [(0..4, 0..64), (0..4, 16..32), (0..3, 0..32)] {
        let verified =
            sums.verify(&worker.memory, &worker.table(), &worker.layout, layers.clone(), tokens.clone());
        assert_eq!(verified, Err(other(layers, tokens)));
    }
}

#[test]
fn what_cannot_be_summed_is_named() {
    let worker = Worker::new(1..3, 16, LAYER_MAJOR, 64);
    let table = worker.table();
    let compute = |memory: &[Memory], table: &PageTable<'_>, layers, tokens| {
        Checksums::compute(memory, table, table.layout, layers, tokens).unwrap_err()
    };
    assert_eq!(
        compute(&worker.memory, &table, 1..3, 0..65),
        ChecksumError::Pages(PageTableError::NotCovered { needed: 0..5, given: 0..4 })
    );
    assert_eq!(
        compute(&worker.memory, &table, 0..3, 0..64),
        ChecksumError::LayerNotHere { layer: 0, here: 1..3 }
    );
    assert_eq!(compute(&[], &table, 1..3, 0..64), ChecksumError::UnknownRegion { region: 0 });
    let short = Memory::allocate(4096, &AllocateOptions::default()).unwrap();
    let error = compute(&[short], &table, 1..3, 0..64);
    let ChecksumError::Access(AccessError::OutOfRange(out)) = error else { panic!("{error:?}") };
    assert_eq!(out.memory_bytes, 4096);
}

#[test]
fn bad_encodings_are_named() {
    let worker = Worker::new(0..1, 16, LAYER_MAJOR, 130);
    let mut good = Vec::new();
    worker.sums(0..1, 5..130).encode(&mut good);
    assert_eq!(good.len(), 21 + 4 * 3);
    for cut in 0..21 {
        let error = Checksums::decode(&good[..cut]).unwrap_err();
        assert!(matches!(error, ChecksumDecodeError::Truncated { .. }), "cut at {cut}: {error}");
    }
    for cut in 21..good.len() {
        let expected = ChecksumDecodeError::BadCount { bytes: cut - 21, blocks: 3 };
        assert_eq!(Checksums::decode(&good[..cut]), Err(expected));
    }
    let with = |at: usize, number: u32| {
        let mut changed = good.clone();
        changed[at..at + 4].copy_from_slice(&number.to_le_bytes());
        Checksums::decode(&changed).unwrap_err()
    };
    let bad = |layers, tokens, block_tokens| ChecksumDecodeError::BadExtent { layers, tokens, block_tokens };
    assert_eq!(with(1, 2), bad(Range { start: 2, end: 1 }, 5..130, 64));
    assert_eq!(with(13, 4), bad(0..1, Range { start: 5, end: 4 }, 64));
    assert_eq!(with(17, 0), bad(0..1, 5..130, 0));
    assert_eq!(with(13, u32::MAX), ChecksumDecodeError::BadCount { bytes: 12, blocks: 1 << 26 });
    good[0] = 2;
    assert_eq!(Checksums::decode(&good), Err(ChecksumDecodeError::UnknownVersion { version: 2 }));
}

#[test]
fn sampling_takes_its_share_and_always_the_same_rooms() {
    let one_in = |n| Verify::OneIn(NonZeroU32::new(n).unwrap());
    let share = |verify: Verify| (0..10_000).filter(|&room| verify.covers(room)).count();
    assert_eq!((share(Verify::Off), share(Verify::All), share(one_in(1))), (0, 10_000, 10_000));
    assert!((80..120).contains(&share(one_in(100))), "{}", share(one_in(100)));
    // Rooms that a router numbers in even steps are sampled like any others.
    let stepped = (0..10_000).filter(|room| one_in(100).covers(room * 100)).count();
    assert!((80..120).contains(&stepped), "{stepped}");
}
