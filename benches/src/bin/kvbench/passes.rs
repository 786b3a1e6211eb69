//! Which rooms a run moves: equal ones, or those of a trace's requests.

use std::io::BufReader;
use std::path::Path;
use std::time::Duration;

use crossdock::trace::{Request, Scale, TraceLimits, TraceReader};

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
    /// By what its lengths and times were multiplied.
    pub scale: f64,
    /// When each room of each pass begins, from the first of its pass on.
    pub arrivals: Vec<Vec<Duration>>,
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
                let pass_pages = payload_pages.min(setup.pool_pages.into());
                let (requests, scale) = match options.scale {
                    Some(factor) => {
                        let scale = Scale::new(factor)?;
                        (read(path)?.into_iter().map(|request| scaled(request, scale)).collect(), scale)
                    }
                    None => fit(
                        read(path)?,
                        setup.page_tokens,
                        Limits {
                            pages: ((TRACE_BYTES / TIMES_MOVED) / setup.slot_bytes()).max(1),
                            longest_pages: pass_pages.min(LONGEST_ROOM.into()),
                            last_at_ms: REPLAY_MS,
                        },
                    ),
                };
                Self::of_trace(&requests, scale, setup, pass_pages, options.repeats)?
            }
        };
        match passes.rooms.iter().flatten().find(|&&pages| pages > LONGEST_ROOM) {
            Some(&pages) => Err(Error::RoomTooLong { pages, limit: LONGEST_ROOM }),
            None => Ok(passes),
        }
    }

    /// Cuts the requests so that each repeat has its share of them and each pass fits.
    fn of_trace(
        requests: &[Request],
        scale: Scale,
        setup: &Setup,
        pass_pages: u64,
        repeats: u32,
    ) -> Result<Self, Error> {
        let most = pass_pages.min(pages(requests, setup.page_tokens).div_ceil(repeats.into()));
        let (mut rooms, mut arrivals) = (vec![Vec::new()], vec![Vec::new()]);
        let (mut in_pass, mut first_ms) = (0, 0);
        for request in requests {
            let pages = request.pages(setup.page_tokens);
            if pages > setup.pool_pages {
                return Err(Error::PoolTooSmall { pages: pages.into(), pool_pages: setup.pool_pages });
            }
            if in_pass + u64::from(pages) > most && in_pass > 0 {
                rooms.push(Vec::new());
                arrivals.push(Vec::new());
                in_pass = 0;
            }
            if in_pass == 0 {
                first_ms = request.at_ms;
            }
            in_pass += u64::from(pages);
            rooms.last_mut().expect("there is one").push(pages);
            let at = Duration::from_millis(request.at_ms - first_ms);
            arrivals.last_mut().expect("there is one").push(at);
        }
        match in_pass {
            0 => Err(Error::Trace("it has no requests".into())),
            _ => Ok(Self { rooms, traced: Some(Traced { scale: scale.factor(), arrivals }) }),
        }
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
/// a page: where there are too many for that to leave them different, only some at equal distances are taken.
fn fit(mut requests: Vec<Request>, page_tokens: u32, limits: Limits) -> (Vec<Request>, Scale) {
    let most = (limits.pages / MEAN_PAGES).max(1) as usize;
    let every = requests.len().div_ceil(most).max(1);
    requests = requests.into_iter().step_by(every).collect();
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
    let scale = Scale::new(small).expect("it lies between two factors");
    (requests.into_iter().map(|request| scaled(request, scale)).collect(), scale)
}

fn scaled(mut request: Request, scale: Scale) -> Request {
    request.scale_lengths(scale);
    request.scale_time(scale);
    request
}

fn pages(requests: &[Request], page_tokens: u32) -> u64 {
    requests.iter().map(|request| u64::from(request.pages(page_tokens))).sum()
}

fn read(path: &Path) -> Result<Vec<Request>, Error> {
    let unreadable = |error: &dyn std::fmt::Display| Error::Trace(format!("{}: {error}", path.display()));
    let file = std::fs::File::open(path).map_err(|error| unreadable(&error))?;
    let requests: Result<Vec<_>, _> =
        TraceReader::new(BufReader::new(file), TraceLimits::default()).collect();
    requests.map_err(|error| unreadable(&error))
}

/// The list of a room's pages must fit into one control message.
pub const LONGEST_ROOM: u32 = 131_072;
/// What a pass moves if nothing else is asked for.
const PAYLOAD_BYTES: u64 = 256 << 20;
/// What a run moves of a trace at most, by all ways and in all repeats together.
const TRACE_BYTES: u64 = 4_000_000_000;
/// How often a trace is moved: by up to five ways in turn, and by ours when its requests arrive.
const TIMES_MOVED: u64 = 6;
/// When the last request of a shortened trace arrives: half of the minute that a run may take.
const REPLAY_MS: u64 = 30_000;
/// How many pages the requests of a shortened trace should have, in the mean.
const MEAN_PAGES: u64 = 4;

#[cfg(test)]
mod tests {
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
            assert!(!kept.is_empty() && kept.len() as u64 <= count.min(100), "{count}: {} kept", kept.len());
            assert!(pages(&kept, 64) <= 400 && kept.iter().all(|request| request.pages(64) <= 100));
            assert!(kept.last().unwrap().at_ms <= 30_000, "{count}");
            assert!(scale.factor() > 0.001, "{count}: {scale:?}");
        }
        assert_eq!(fit(requests(1), 64, limits()).1, Scale::ONE, "what fits is left as it is");
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
