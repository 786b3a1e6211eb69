//! Which rooms a run moves: equal ones, or those of a trace's requests.

use std::io::BufReader;
use std::path::Path;

use crossdock::trace::{Request, Scale};
use crossdock_replay::{Arrival, Pace};

use crate::error::Error;
use crate::options::Options;
use crate::setup::Setup;

/// The rooms of a run, in passes: those of a pass are open at once.
#[derive(Debug)]
pub struct Passes {
    /// Pages of each room.
    pub rooms: Vec<Vec<u32>>,
    pub traced: Option<Traced>,
}

/// What was made of a trace.
#[derive(Debug)]
pub struct Traced {
    /// By what its lengths were multiplied.
    pub scale: f64,
    /// By what its times were.
    pub time_scale: f64,
    /// All requests that are replayed.
    pub arrivals: Vec<Arrival>,
}

impl Passes {
    pub fn new(options: &Options, setup: &Setup) -> Result<Self, Error> {
        if options.asks_for_latency() {
            return Ok(Self { rooms: vec![vec![1]], traced: None });
        }
        let payload_bytes = match options.payload_mib {
            Some(mib) => mib << 20,
            None => PAYLOAD_BYTES.min((options.pool_mib << 20) / 2),
        };
        let payload_pages = (payload_bytes / setup.slot_bytes()).max(1);
        let passes = match &options.trace {
            None => {
                let pages = options.pages.map_or(payload_pages.min(LONGEST_ROOM.into()), u64::from);
                let count = (payload_pages / pages).max(options.in_flight.into());
                let pass_pages = pages * count;
                if pass_pages > setup.pool_pages.into() {
                    return Err(Error::PoolTooSmall { pages: pass_pages, pool_pages: setup.pool_pages });
                }
                Self { rooms: vec![vec![pages as u32; count as usize]], traced: None }
            }
            Some(path) => {
                let traced = Traced::read(path, options, setup)?;
                let pass_pages = payload_pages.min(setup.pool_pages.into());
                Self::of_trace(traced, setup, pass_pages, options.repeats)?
            }
        };
        match passes.rooms.iter().flatten().find(|&&pages| pages > LONGEST_ROOM) {
            Some(&pages) => Err(Error::RoomTooLong { pages, limit: LONGEST_ROOM }),
            None => Ok(passes),
        }
    }

    /// The first requests, as many as all ways can move in a while, cut so that each repeat has its share of them and
    /// each pass fits.
    fn of_trace(traced: Traced, setup: &Setup, pass_pages: u64, repeats: u32) -> Result<Self, Error> {
        let all = traced.arrivals.iter().map(|arrival| arrival.pages(setup.page_tokens));
        let mut left = (RATED_BYTES / setup.slot_bytes()).max(1);
        let mut lengths = Vec::new();
        for pages in all {
            if pages > setup.pool_pages {
                return Err(Error::PoolTooSmall { pages: pages.into(), pool_pages: setup.pool_pages });
            }
            if left > 0 {
                lengths.push(pages);
                left = left.saturating_sub(pages.into());
            }
        }
        let sum: u64 = lengths.iter().map(|&pages| u64::from(pages)).sum();
        let most = pass_pages.min(sum.div_ceil(repeats.into()));
        let mut rooms: Vec<Vec<u32>> = Vec::new();
        let mut in_pass = 0;
        for pages in lengths {
            match rooms.last_mut().filter(|_| in_pass + u64::from(pages) <= most) {
                Some(pass) => pass.push(pages),
                None => {
                    rooms.push(vec![pages]);
                    in_pass = 0;
                }
            }
            in_pass += u64::from(pages);
        }
        Ok(Self { rooms, traced: Some(traced) })
    }

    /// How many rooms there are in all.
    pub fn count(&self) -> usize {
        self.rooms.iter().map(Vec::len).sum()
    }

    /// Which passes a repeat moves at least: each pass has its repeat, and each repeat a pass.
    pub fn of_repeat(&self, repeat: u32, repeats: u32) -> std::ops::Range<usize> {
        let at = |repeat: u32| self.rooms.len() * repeat as usize / repeats as usize;
        at(repeat)..at(repeat + 1).max(at(repeat) + 1)
    }
}

impl Traced {
    fn read(path: &Path, options: &Options, setup: &Setup) -> Result<Self, Error> {
        let requests = read(path)?;
        if requests.is_empty() {
            return Err(Error::Trace("it has no requests".into()));
        }
        let (requests, lengths) = match options.scale {
            Some(factor) => (requests, Scale::new(factor)?),
            None => fit(
                requests,
                setup.page_tokens,
                Limits {
                    pages: (REPLAYED_BYTES / setup.slot_bytes()).max(1),
                    longest_pages: u64::from(setup.pool_pages / 2).clamp(1, LONGEST_ROOM.into()),
                    last_at_ms: REPLAY_MS,
                },
            ),
        };
        let times = options.time_scale.map_or(Ok(lengths), Scale::new)?;
        let pace =
            Pace { lengths, times, page_tokens: setup.page_tokens, token_ns: options.token_ms * 1_000_000 };
        let arrivals = requests.iter().map(|request| Arrival::of(request, &pace)).collect();
        Ok(Self { scale: lengths.factor(), time_scale: times.factor(), arrivals })
    }
}

/// What a trace has to fit.
struct Limits {
    /// All requests together.
    pages: u64,
    /// A request.
    longest_pages: u64,
    /// The last arrival.
    last_at_ms: u64,
}

/// Shortens the lengths and the times of a trace by one factor, the largest that fits. No request becomes shorter than
/// a page: where there are too many for that to leave them different, only the first ones are taken, which share what
/// they would share in the whole.
fn fit(mut requests: Vec<Request>, page_tokens: u32, limits: Limits) -> (Vec<Request>, Scale) {
    requests.truncate((limits.pages / MEAN_PAGES).max(1) as usize);
    let last_at_ms = requests.last().map_or(0, |request| request.at_ms);
    let fits = |factor: f64| {
        let Ok(scale) = Scale::new(factor) else { return false };
        let long =
            requests.iter().map(|request| u64::from(scaled(request.clone(), scale).pages(page_tokens)));
        let (sum, longest) = long.fold((0, 0), |(sum, longest), pages| (sum + pages, pages.max(longest)));
        sum <= limits.pages
            && longest <= limits.longest_pages
            && last_at_ms as f64 * factor <= limits.last_at_ms as f64
    };
    let (mut small, mut large) = (f64::MIN_POSITIVE, 1.0);
    if fits(large) {
        small = large;
    }
    for _ in 0..50 {
        let middle = f64::midpoint(small, large);
        *if fits(middle) { &mut small } else { &mut large } = middle;
    }
    (requests, Scale::new(small).expect("it lies between two factors"))
}

fn scaled(mut request: Request, scale: Scale) -> Request {
    request.scale_lengths(scale);
    request
}

fn read(path: &Path) -> Result<Vec<Request>, Error> {
    let unreadable = |error: &dyn std::fmt::Display| Error::Trace(format!("{}: {error}", path.display()));
    let file = std::fs::File::open(path).map_err(|error| unreadable(&error))?;
    crossdock_replay::requests(BufReader::new(file), usize::MAX).map_err(|error| unreadable(&error))
}

/// The list of a room's pages must fit into one control message.
pub const LONGEST_ROOM: u32 = 131_072;
/// What a pass moves if nothing else is asked for.
const PAYLOAD_BYTES: u64 = 256 << 20;
/// What one way moves of a trace at most, in all repeats together, where rates are measured.
const RATED_BYTES: u64 = 700_000_000;
/// What the requests of a shortened trace need.
const REPLAYED_BYTES: u64 = 16_000_000_000;
/// When the last request of a shortened trace arrives: half of the minute that a run may take.
const REPLAY_MS: u64 = 30_000;
/// How many pages the requests of a shortened trace should have, in the mean.
const MEAN_PAGES: u64 = 8;

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn requests(count: u64) -> Vec<Request> {
        let request = |at: u64| Request {
            at_ms: at * 100,
            input_tokens: 100 + (at % 50) as u32 * 400,
            output_tokens: 1,
            prefix_ids: Vec::new(),
        };
        (0..count).map(request).collect()
    }

    #[test]
    fn a_long_trace_is_made_to_fit() {
        let limits = || Limits { pages: 400, longest_pages: 100, last_at_ms: 30_000 };
        for count in [1, 10, 100, 1000, 20_000] {
            let (kept, scale) = fit(requests(count), 64, limits());
            assert!(!kept.is_empty() && kept.len() as u64 <= count.min(50), "{count}: {} kept", kept.len());
            let pages = |request: &Request| scaled(request.clone(), scale).pages(64);
            assert!(kept.iter().map(pages).sum::<u32>() <= 400 && kept.iter().all(|one| pages(one) <= 100));
            assert!(kept.last().unwrap().at_ms as f64 * scale.factor() <= 30_000.0, "{count}");
            assert_eq!(kept, requests(count)[..kept.len()], "the first ones are kept");
            assert!(scale.factor() > 0.001, "{count}: {scale:?}");
        }
        assert_eq!(fit(requests(1), 64, limits()).1, Scale::ONE, "what fits is left as it is");
    }

    #[test]
    fn a_slice_of_a_trace_is_scaled_as_if_it_began_at_once() {
        let options = Options::parse_from(["kvbench", "--model", "deepseek-r1", "--pool-mib", "64"]);
        let setup = Setup::new(&options).unwrap();
        let file = std::env::temp_dir().join(format!("kvbench-{}-slice.jsonl", std::process::id()));
        let scaled = |first_ms: u64| {
            let line = |at_ms: u64| {
                format!("{{\"timestamp\": {at_ms}, \"input_length\": 640, \"output_length\": 1}}\n")
            };
            std::fs::write(&file, [first_ms, first_ms + 60_000].map(line).concat()).unwrap();
            Traced::read(&file, &options, &setup).unwrap()
        };
        let (slice, whole) = (scaled(3_000_000), scaled(0));
        // A minute becomes half of one.
        assert!((slice.time_scale - 0.5).abs() < 1e-9, "{}", slice.time_scale);
        assert_eq!((slice.time_scale, slice.arrivals), (whole.time_scale, whole.arrivals));
        std::fs::remove_file(&file).unwrap();
    }

    #[test]
    fn each_pass_has_its_repeat() {
        for (passes, repeats) in [(1, 9), (9, 9), (20, 9), (3, 4)] {
            let passes = Passes { rooms: vec![vec![1]; passes], traced: None };
            let mut seen: Vec<usize> =
                (0..repeats).flat_map(|repeat| passes.of_repeat(repeat, repeats)).collect();
            seen.dedup();
            assert_eq!(seen, (0..passes.rooms.len()).collect::<Vec<_>>());
        }
    }
}
