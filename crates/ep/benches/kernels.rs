//! Measures the kernels that work on whole rows, beside the floor: reading the same bytes and writing as many.
//!
//! ```text
//! cargo bench -p crossdock-ep --bench kernels                      # everything, about a minute
//! cargo bench -p crossdock-ep --bench kernels -- streamed quantise # what has both words in its name
//! ```
//!
//! *Hot* rows lie in the second-level cache. *Streamed* ones come from a pool of 512 MiB, each time from a part that no
//! way has touched for a while; rows to be summed are drawn from all over that part. The floor reads row after row, asked
//! for ahead, with wide loads, does next to nothing with them, and writes as much as the others do. All ways take turns
//! within each repeat, so that a busy machine hurts them alike. Printed are the bytes read and written in a second, by
//! the median, and last the median of the ratios to the floor of the same repeat. Without `--bench` (under `cargo test`)
//! all runs once over few rows, to see that it works.

use std::time::Instant;

use crossdock_ep::{Bf16, Quantiser, ScaleRule, Summer, Vectors};
use crossdock_memory::{prefetch_head_read, prefetch_read};

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let measured = words.iter().any(|word| word == "--bench");
    let chosen = |name: &str| words.iter().all(|word| word.starts_with("--") || name.contains(word.as_str()));
    let places = match measured {
        true => [("hot", 64, 64, 300), ("streamed", 37_376, 2048, 17)],
        false => [("hot", 64, 64, 1), ("streamed", 256, 128, 1)],
    };
    let sums = [2, 8, 64].map(Work::Weighted).into_iter().chain([2, 8, 64].map(Work::Plain));
    let works: Vec<Work> = [Work::Quantise].into_iter().chain(sums).collect();
    println!("rows of {HIDDEN} channels, GB/s read and written, of the floor's:");
    for (place, rows, part_rows, repeats) in places {
        let mut pool = Pool::new(rows, part_rows);
        for work in &works {
            let name = format!("{place} {}", work.name());
            if chosen(&name) {
                measure(&name, *work, &mut pool, repeats);
            }
        }
    }
}

const HIDDEN: usize = 7168;
const BLOCKS: usize = HIDDEN / 128;

fn measure(name: &str, work: Work, pool: &mut Pool, repeats: usize) {
    let ways = work.ways();
    let bytes = work.bytes(pool.part_rows) as f64;
    let mut gb_per_s = vec![Vec::new(); ways.len()];
    for _ in 0..repeats {
        for (way, gb_per_s) in ways.iter().zip(&mut gb_per_s) {
            let part = pool.next_part();
            let start = Instant::now();
            (way.run)(part);
            gb_per_s.push(bytes / start.elapsed().as_secs_f64() * 1e-9);
        }
    }
    let floor = gb_per_s[0].clone();
    for (way, gb_per_s) in ways.iter().zip(gb_per_s) {
        let ratios = gb_per_s.iter().zip(&floor).map(|(way, floor)| way / floor).collect();
        println!("{name:28} {:14} {:7.2} {:6.2}", way.name, median(gb_per_s), median(ratios));
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[derive(Clone, Copy)]
enum Work {
    Quantise,
    /// With so many rows to a sum.
    Weighted(usize),
    /// The same, and one bias for all sums.
    Plain(usize),
}

/// One way to do a part's work.
struct Way {
    name: String,
    run: Box<dyn Fn(Part<'_>)>,
}

fn way(name: &str, run: impl Fn(Part<'_>) + 'static) -> Way {
    Way { name: name.into(), run: Box::new(run) }
}

impl Work {
    fn name(self) -> String {
        match self {
            Work::Quantise => "quantise".into(),
            Work::Weighted(terms) => format!("weighted sum of {terms}"),
            Work::Plain(terms) => format!("plain sum of {terms}"),
        }
    }

    fn bytes(self, rows: usize) -> usize {
        match self {
            Work::Quantise => rows * (3 * HIDDEN + 4 * BLOCKS),
            Work::Weighted(terms) | Work::Plain(terms) => (rows + rows / terms) * 2 * HIDDEN,
        }
    }

    /// The floor is the first.
    fn ways(self) -> Vec<Way> {
        match self {
            Work::Quantise => quantise_ways(),
            Work::Weighted(terms) => sum_ways(terms, true),
            Work::Plain(terms) => sum_ways(terms, false),
        }
    }
}

fn quantise_ways() -> Vec<Way> {
    let mut ways = vec![way("floor", |part| {
        for (row, values) in part.channels.chunks_exact(HIDDEN).zip(part.values.chunks_exact_mut(HIDDEN)) {
            floor([row].into_iter(), values);
        }
    })];
    for quantiser in Vectors::ALL.into_iter().filter_map(Quantiser::with_vectors) {
        ways.push(way(&format!("{:?}", quantiser.vectors()), move |part| {
            let rows = part.channels.chunks_exact(HIDDEN).zip(part.values.chunks_exact_mut(HIDDEN));
            for ((row, values), scales) in rows.zip(part.scales.chunks_exact_mut(BLOCKS)) {
                quantiser.quantise(row, ScaleRule::Plain, values, scales);
            }
        }));
    }
    ways
}

fn sum_ways(terms: usize, weighted: bool) -> Vec<Way> {
    let mut ways = vec![way("floor", move |part| {
        for (group, out) in part.scattered.chunks_exact(terms).zip(part.sums.chunks_exact_mut(HIDDEN)) {
            floor(group.iter().copied(), out);
        }
    })];
    for summer in Vectors::ALL.into_iter().filter_map(Summer::with_vectors) {
        let weights: Vec<f32> = (1..=terms).map(|nth| 1.0 / nth as f32).collect();
        let bias = vec![Bf16::from_f32(0.5); HIDDEN];
        ways.push(way(&format!("{:?}", summer.vectors()), move |part| {
            let mut rows = Vec::with_capacity(terms);
            for (group, out) in part.scattered.chunks_exact(terms).zip(part.sums.chunks_exact_mut(HIDDEN)) {
                rows.clear();
                rows.extend(group.iter().map(|row| row.as_ptr()));
                // SAFETY: each row has all channels, and nobody writes the pool.
                unsafe {
                    match weighted {
                        true => summer.weighted(&rows, &weights, out),
                        false => summer.plain(&rows, &[&bias], out),
                    }
                }
            }
        }));
    }
    ways
}

/// Reads all rows, then writes `out` with what they have in common.
fn floor<'a, T: Copy + From8>(rows: impl Iterator<Item = &'a [Bf16]>, out: &mut [T]) {
    let mut common = [u64::MAX; 64];
    let mut rows = rows.peekable();
    while let Some(row) = rows.next() {
        if let Some(next) = rows.peek() {
            prefetch_head_read(next.as_ptr().cast(), size_of_val(*next));
        }
        // SAFETY: any bits are an integer, which needs no more alignment than the slice finds for it.
        let (_, words, _) = unsafe { row.align_to::<u64>() };
        common_bits(words, &mut common);
    }
    out.fill(T::from8(common.iter().fold(0, |all, &word| all | word) as u8));
}

trait From8 {
    fn from8(bits: u8) -> Self;
}

impl From8 for u8 {
    fn from8(bits: u8) -> u8 {
        bits
    }
}

impl From8 for Bf16 {
    fn from8(bits: u8) -> Bf16 {
        Bf16::from_bits(bits.into())
    }
}

fn common_bits(words: &[u64], common: &mut [u64; 64]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn wide(words: &[u64], common: &mut [u64; 64]) {
            and(words, common);
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2.
            return unsafe { wide(words, common) };
        }
    }
    and(words, common);
}

#[inline(always)]
fn and(words: &[u64], common: &mut [u64; 64]) {
    let mut local = *common;
    for words in words.as_chunks::<64>().0 {
        for line in words.as_chunks::<8>().0 {
            prefetch_read(line.as_ptr().wrapping_add(AHEAD_WORDS).cast());
        }
        for (common, word) in local.iter_mut().zip(words) {
            *common &= word;
        }
    }
    *common = local;
}

const AHEAD_WORDS: usize = 256;

/// Rows of usual values, and as much output as any way needs.
struct Pool {
    channels: Vec<Bf16>,
    values: Vec<u8>,
    scales: Vec<f32>,
    sums: Vec<Bf16>,
    scattered: Vec<usize>,
    part_rows: usize,
    part: usize,
}

/// What one way works on.
struct Part<'a> {
    channels: &'a [Bf16],
    values: &'a mut [u8],
    scales: &'a mut [f32],
    sums: &'a mut [Bf16],
    scattered: Vec<&'a [Bf16]>,
}

impl Pool {
    fn new(rows: usize, part_rows: usize) -> Pool {
        let mut random = Random(rows as u64);
        let mut channels = Vec::with_capacity(rows * HIDDEN);
        while channels.len() < rows * HIDDEN {
            let bits = random.next();
            // Both signs, and magnitudes from 2^-7 to 2.
            let channel = |bits: u64| Bf16::from_bits((bits as u16 & 0x83ff) + 0x3c00);
            channels.extend([0, 16, 32, 48].map(|shift| channel(bits >> shift)));
        }
        let mut scattered: Vec<usize> = (0..part_rows).collect();
        for last in (1..part_rows).rev() {
            scattered.swap(last, (random.next() % (last as u64 + 1)) as usize);
        }
        let values = vec![1; channels.len()];
        let sums = vec![Bf16::from_bits(1); channels.len() / 2];
        Pool { channels, values, scales: vec![1.0; rows * BLOCKS], sums, scattered, part_rows, part: 0 }
    }

    fn next_part(&mut self) -> Part<'_> {
        let parts = self.channels.len() / HIDDEN / self.part_rows;
        self.part = (self.part + 1) % parts;
        let rows = self.part * self.part_rows..(self.part + 1) * self.part_rows;
        let channels = rows.start * HIDDEN..rows.end * HIDDEN;
        let row = |&row: &usize| &self.channels[(rows.start + row) * HIDDEN..][..HIDDEN];
        Part {
            scattered: self.scattered.iter().map(row).collect(),
            channels: &self.channels[channels.clone()],
            values: &mut self.values[channels.clone()],
            scales: &mut self.scales[rows.start * BLOCKS..rows.end * BLOCKS],
            sums: &mut self.sums[channels.start / 2..channels.end / 2],
        }
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed ^ (mixed >> 27)
    }
}
