//! Which rooms a run moves.

use std::io::BufReader;

use crossdock::trace::{Scale, TraceLimits, TraceReader};

use crate::error::Error;
use crate::options::Options;
use crate::setup::Setup;

/// The rooms of each pass of a repeat, and the scale of a trace.
pub fn passes(options: &Options, setup: &Setup) -> Result<(Vec<Vec<u32>>, Option<f64>), Error> {
    let payload_pages = ((options.payload_mib << 20) / setup.slot_bytes()).max(1);
    let too_small = |pages| Err(Error::PoolTooSmall { pages, pool_pages: setup.pool_pages });
    let (passes, scale) = match &options.trace {
        None => {
            let pages = options.pages.map_or(payload_pages.min(LONGEST_ROOM.into()), u64::from);
            let count = (payload_pages / pages).max(options.in_flight.into());
            if pages * count > setup.pool_pages.into() {
                return too_small(pages * count);
            }
            (vec![vec![pages as u32; count as usize]], None)
        }
        Some(_) if options.model.is_none() => return Err(Error::TraceWithoutModel),
        Some(path) => {
            let unreadable =
                |error: &dyn std::fmt::Display| Error::Trace(format!("{}: {error}", path.display()));
            let file = std::fs::File::open(path).map_err(|error| unreadable(&error))?;
            let requests: Result<Vec<_>, _> =
                TraceReader::new(BufReader::new(file), TraceLimits::default()).collect();
            let mut requests = requests.map_err(|error| unreadable(&error))?;
            let token_bytes = setup.token_bytes as f64 * f64::from(setup.layers);
            let bytes = requests.iter().map(|r| f64::from(r.input_tokens) * token_bytes).sum::<f64>();
            let scale = match options.scale {
                Some(factor) => Scale::new(factor)?,
                None => Scale::new((TRACE_BYTES / bytes).min(1.0))?,
            };
            requests.iter_mut().for_each(|request| request.scale_lengths(scale));
            let mut passes = vec![Vec::new()];
            let mut in_pass = 0;
            for request in &requests {
                let pages = request.pages(setup.page_tokens);
                if in_pass + u64::from(pages) > payload_pages && in_pass > 0 {
                    passes.push(Vec::new());
                    in_pass = 0;
                }
                in_pass += u64::from(pages);
                if in_pass > setup.pool_pages.into() {
                    return too_small(in_pass);
                }
                passes.last_mut().expect("there is one").push(pages);
            }
            (passes, Some(scale.factor()))
        }
    };
    match passes.iter().flatten().find(|&&pages| pages > LONGEST_ROOM) {
        Some(&pages) => Err(Error::RoomTooLong { pages, limit: LONGEST_ROOM }),
        None => Ok((passes, scale)),
    }
}

/// The list of a room's pages must fit into one control message.
pub const LONGEST_ROOM: u32 = 131_072;
/// What a trace is shortened to.
const TRACE_BYTES: f64 = 4e9;
