//! What it costs to take pages, to give them back and to share them, by how many pages the pool has and in what state
//! it is: the time must not grow with the pool.
//!
//! ```text
//! cargo bench -p crossdock-memory --bench pool                            # nanoseconds, all cases
//! cargo bench -p crossdock-memory --bench pool -- 1000000 fragmented 16   # one case
//! ```
//!
//! - *empty*: all pages are free, in one run.
//! - *fragmented*: half of the pages are held, by holders of 1 to 32 pages that came and went in a wild order. The free
//!   half lies in as many runs as that makes; a take of many pages has to put runs together.
//! - *checkerboard*: every second page is held, the worst there is: all free runs have one page.
//!
//! In the latter two, requests hold a quarter of the pool, and the one that gives its pages back is drawn at random, so
//! that a large pool pays its cache misses. Beside it stands the floor of what any pool must do for so many pages: a list
//! of their ids, and a word written for each page in a table of the pool's size, from a random place on.
//!
//! Time grows with cache misses; the work does not, which counting the instructions of 10,000 exchanges shows:
//!
//! ```text
//! cargo bench -p crossdock-memory --bench pool --no-run
//! valgrind --tool=callgrind --callgrind-out-file=/dev/null --collect-atstart=no \
//!     --toggle-collect='*exchange*' target/release/deps/pool-???????????????? --once 1000000 fragmented 16
//! ```

use std::hint::black_box;
use std::time::{Duration, Instant};

use crossdock_memory::{PagePool, PageRef, PageSet, PoolOptions};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let (flags, words): (Vec<_>, Vec<_>) = arguments.iter().partition(|argument| argument.starts_with("--"));
    let once = flags.iter().any(|flag| *flag == "--once");
    let chosen = |nth: usize, word: &str| words.get(nth).is_none_or(|chosen| *chosen == word);
    if !once {
        println!("ns each, median (nanoseconds a page)");
        println!(
            "{:>9} {:<13} {:>6} {:>20} {:>20} {:>20} {:>20}",
            "pages",
            "pool",
            "taken",
            "take and put",
            "a list and a table",
            "share and unshare",
            "reference and drop"
        );
    }
    for pages in [10_000, 100_000, 1_000_000] {
        for (state, fill, share) in [
            ("empty", empty as fn(&PagePool) -> Vec<PageSet>, 0),
            ("fragmented", fragmented, pages / 4),
            ("checkerboard", checkerboard, pages / 4),
        ] {
            if !chosen(0, &pages.to_string()) || !chosen(1, state) {
                continue;
            }
            let pool = PagePool::new(pages, PoolOptions::default());
            let held = fill(&pool);
            for taken in [1, 16, 256].into_iter().filter(|taken| chosen(2, &taken.to_string())) {
                let mut requests = Requests::new(&pool, taken, share / taken + 1);
                match once {
                    true => requests.exchange(10_000),
                    false => measure(&pool, state, taken, requests),
                }
            }
            drop(held);
        }
    }
}

/// Hold pages of one pool, equally many each.
struct Requests<'a> {
    pool: &'a PagePool,
    taken: u32,
    holders: Vec<PageSet>,
    random: Random,
}

impl<'a> Requests<'a> {
    fn new(pool: &'a PagePool, taken: u32, requests: u32) -> Self {
        let take = |_| pool.take(taken).expect("half of the pages are free");
        Self { pool, taken, holders: (0..requests).map(take).collect(), random: Random(7) }
    }

    /// A new request comes, and one of the others goes, so many times.
    #[inline(never)]
    fn exchange(&mut self, times: u32) {
        for _ in 0..times {
            let goes = self.random.below(self.holders.len() as u32) as usize;
            self.holders[goes] = self.pool.take(self.taken).expect("half of the pages are free");
        }
    }
}

fn measure(pool: &PagePool, state: &str, taken: u32, mut requests: Requests<'_>) {
    let mut random = Random(7);
    let take_and_put = median_ns(|| requests.exchange(1));
    // Ones, since zeroes would not be there before they are touched.
    let mut table = vec![1u32; pool.pages() as usize];
    let floor = median_ns(|| {
        let first = random.below(pool.pages() - taken);
        let ids: Vec<u32> = (first..first + taken).collect();
        ids.iter().for_each(|&id| table[id as usize] += 1);
        drop(black_box(ids));
    });
    let mut set = Some(requests.holders.swap_remove(0));
    let share = median_ns(|| {
        let shared = set.take().expect("it is put back").share();
        set = Some(shared.try_into_set().expect("there is one reference"));
    });
    let shared: PageRef = set.take().expect("it is put back").share();
    let reference = median_ns(|| drop(black_box(shared.clone())));
    let told = |ns: f64| format!("{ns:.0} ({:.1})", ns / f64::from(taken));
    println!(
        "{:>9} {state:<13} {taken:>6} {:>20} {:>20} {:>20} {:>20}",
        pool.pages(),
        told(take_and_put),
        told(floor),
        told(share),
        told(reference),
    );
}

fn empty(_: &PagePool) -> Vec<PageSet> {
    Vec::new()
}

fn fragmented(pool: &PagePool) -> Vec<PageSet> {
    let mut random = Random(1);
    let mut held = Vec::new();
    while let Ok(set) = pool.take(1 + random.below(32)) {
        held.push(set);
    }
    // As many come and go as there are holders, so that the first order is forgotten.
    for _ in 0..2 * held.len() {
        let at = random.below(held.len() as u32) as usize;
        drop(held.swap_remove(at));
        while pool.stats().free > 32 {
            held.extend(pool.take(1 + random.below(32)));
        }
    }
    while pool.stats().free < pool.pages() / 2 {
        let at = random.below(held.len() as u32) as usize;
        drop(held.swap_remove(at));
    }
    held
}

fn checkerboard(pool: &PagePool) -> Vec<PageSet> {
    let all: Vec<PageSet> = (0..pool.pages()).map(|_| pool.take(1).expect("enough are free")).collect();
    all.into_iter().filter(|set| set.ids()[0] % 2 == 0).collect()
}

struct Random(u32);

impl Random {
    fn below(&mut self, end: u32) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((u64::from(self.0) * u64::from(end)) >> 32) as u32
    }
}

/// Of 200 batches that are long enough for the clock.
fn median_ns(mut work: impl FnMut()) -> f64 {
    let mut batch = |times: u32| {
        let begin = Instant::now();
        (0..times).for_each(|_| work());
        begin.elapsed()
    };
    let mut times = 1;
    while batch(times) < Duration::from_micros(200) {
        times *= 2;
    }
    let mut found: Vec<f64> = (0..200).map(|_| batch(times).as_nanos() as f64 / f64::from(times)).collect();
    found.sort_unstable_by(f64::total_cmp);
    found[found.len() / 2]
}
