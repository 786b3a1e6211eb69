//! Requests of a trace, scaled to a machine.

use std::collections::HashSet;
use std::io::BufRead;

use crossdock_kv::trace::{BLOCK_TOKENS, Request, Scale, TraceError, TraceLimits, TraceReader};
use serde::{Deserialize, Serialize};

/// One request as it is replayed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrival {
    /// When it comes, from the start of the replay.
    pub at_ns: u64,
    /// How many tokens are to be handed over; at least one.
    pub tokens: u32,
    /// The pages that it may share, from its first token on. They are whole, and never all of it: the last token is
    /// always its own, as an engine computes it again to begin the output.
    pub blocks: Vec<Block>,
    /// How long its pages are read after they have arrived.
    pub decode_ns: u64,
}

/// A run of whole pages that all requests with the same prefix have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Block {
    /// Names the prefix that ends with this block.
    pub id: u64,
    /// How many pages lie between the end of the block before and the end of this one.
    pub pages: u32,
}

/// How a trace is made to fit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pace {
    /// By what lengths shrink.
    pub lengths: Scale,
    /// By what times shrink.
    pub times: Scale,
    /// The tokens of a page.
    pub page_tokens: u32,
    /// What decoding a token takes, before it shrinks as the other times do.
    pub token_ns: u64,
}

impl Arrival {
    /// Scales a request.
    ///
    /// Lengths shrink, pages do not: a block of the trace may end within a page. What is shared are the whole pages up
    /// to the end of a prefix, so a block of few tokens adds none to those before it, and the next one that completes
    /// a page stands for both.
    ///
    /// # Panics
    /// If a page holds no tokens.
    pub fn of(request: &Request, pace: &Pace) -> Self {
        let mut scaled = Request { prefix_ids: Vec::new(), ..request.clone() };
        scaled.scale_lengths(pace.lengths);
        let tokens = scaled.input_tokens.max(1);
        let decode_ns = u64::from(request.output_tokens).saturating_mul(pace.token_ns);
        let shrink = |ns: u64| (ns as f64 * pace.times.factor()).round() as u64;
        Self {
            at_ns: shrink(request.at_ms.saturating_mul(1_000_000)),
            tokens,
            blocks: blocks(request, pace, (tokens - 1) / pace.page_tokens),
            decode_ns: shrink(decode_ns),
        }
    }

    /// The share of their tokens that the delivered requests would find held where nothing is ever evicted that any
    /// request before them, delivered or not, has had.
    pub fn possible_hit_share(
        arrivals: &[Self],
        is_delivered: impl Fn(usize) -> bool,
        page_tokens: u32,
    ) -> f64 {
        let mut seen = HashSet::new();
        let (mut held, mut all) = (0, 0);
        for (at, arrival) in arrivals.iter().enumerate() {
            if is_delivered(at) {
                let hits = arrival.blocks.iter().take_while(|block| seen.contains(*block));
                held += hits.map(|block| u64::from(block.pages) * u64::from(page_tokens)).sum::<u64>();
                all += u64::from(arrival.tokens);
            }
            seen.extend(arrival.blocks.iter().copied());
        }
        if all > 0 { held as f64 / all as f64 } else { 0.0 }
    }

    /// How many pages hold it.
    ///
    /// # Panics
    /// If a page holds no tokens.
    pub fn pages(&self, page_tokens: u32) -> u32 {
        self.tokens.div_ceil(page_tokens)
    }
}

/// Reads the first requests of a trace, so many of them. Times count from the first one: a slice of a trace keeps those
/// of the whole, which neither a scale nor a replay is to fit.
pub fn requests(lines: impl BufRead, most: usize) -> Result<Vec<Request>, TraceError> {
    let read = TraceReader::new(lines, TraceLimits::default()).take(most);
    let mut requests: Vec<Request> = read.collect::<Result<_, _>>()?;
    let first_ms = requests.first().map_or(0, |request| request.at_ms);
    requests.iter_mut().for_each(|request| request.at_ms -= first_ms);
    Ok(requests)
}

/// The blocks of a request that end within so many pages.
fn blocks(request: &Request, pace: &Pace, most_pages: u32) -> Vec<Block> {
    let whole = (request.input_tokens / BLOCK_TOKENS) as usize;
    let pages_up_to = |blocks: usize| {
        let tokens = blocks as f64 * f64::from(BLOCK_TOKENS) * pace.lengths.factor();
        (tokens / f64::from(pace.page_tokens)).floor() as u32
    };
    let mut blocks = Vec::new();
    let mut before = 0;
    for (at, &id) in request.prefix_ids.iter().take(whole).enumerate() {
        let end = pages_up_to(at + 1);
        if end > most_pages {
            break;
        }
        if end > before {
            blocks.push(Block { id, pages: end - before });
            before = end;
        }
    }
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(lengths: f64, page_tokens: u32) -> Pace {
        let lengths = Scale::new(lengths).unwrap();
        Pace { lengths, times: Scale::new(0.5).unwrap(), page_tokens, token_ns: 1_000 }
    }

    fn request(input_tokens: u32, ids: u64) -> Request {
        Request { at_ms: 3, input_tokens, output_tokens: 10, prefix_ids: (0..ids).collect() }
    }

    fn block(id: u64, pages: u32) -> Block {
        Block { id, pages }
    }

    #[test]
    fn times_and_lengths_shrink() {
        let arrival = Arrival::of(&request(1300, 3), &pace(0.5, 64));
        let blocks = vec![block(0, 4), block(1, 4)];
        assert_eq!(arrival, Arrival { at_ns: 1_500_000, tokens: 650, blocks, decode_ns: 5_000 });
        assert_eq!(arrival.pages(64), 11);
        assert_eq!(Arrival::of(&request(1, 0), &pace(0.0001, 64)).tokens, 1);
    }

    #[test]
    fn a_slice_of_a_trace_begins_at_once() {
        let line =
            |at_ms: u64| format!("{{\"timestamp\": {at_ms}, \"input_length\": 9, \"output_length\": 1}}\n");
        let text = [3_000_000, 3_060_000, 3_070_000].map(line).concat();
        let read = requests(text.as_bytes(), 2).unwrap();
        assert_eq!(read.iter().map(|request| request.at_ms).collect::<Vec<_>>(), [0, 60_000]);
        assert!(requests([text, line(5)].concat().as_bytes(), usize::MAX).is_err());
        assert_eq!(requests(&b""[..], 1).unwrap(), []);
    }

    #[test]
    fn what_an_unlimited_pool_would_hold_is_known() {
        let requests = [request(1300, 3), request(1300, 3), request(600, 1), request(100, 0)];
        let arrivals = requests.map(|request| Arrival::of(&request, &pace(1.0, 64)));
        // Two blocks of the second, one of the third.
        let share =
            |is_delivered: fn(usize) -> bool| Arrival::possible_hit_share(&arrivals, is_delivered, 64);
        assert_eq!(share(|_| true), f64::from(3 * 512) / 3300.0);
        // What the others needed is no part of it.
        assert_eq!(share(|at| at == 2), 512.0 / 600.0);
        assert_eq!(share(|_| false), 0.0);
        assert_eq!(Arrival::possible_hit_share(&[], |_| true, 64), 0.0);
    }

    #[test]
    fn a_block_is_whole_pages_of_a_whole_block_of_the_trace() {
        let blocks = |tokens, ids, scale| Arrival::of(&request(tokens, ids), &pace(scale, 64)).blocks;
        // The last id names a block that is not whole.
        assert_eq!(blocks(1300, 3, 1.0), [block(0, 8), block(1, 8)]);
        // 153.6 tokens a block.
        let uneven = [block(0, 2), block(1, 2), block(2, 3), block(3, 2), block(4, 3)];
        assert_eq!(blocks(2600, 6, 0.3), uneven);
        // 25.6 tokens a block: the first page is whole with the third block, the second with the fifth.
        assert_eq!(blocks(2600, 6, 0.05), [block(2, 1), block(4, 1)]);
        // A token is left to the request.
        assert_eq!(blocks(1024, 2, 1.0), [block(0, 8)]);
        assert_eq!(blocks(512, 1, 0.125), []);
        assert_eq!(blocks(100, 0, 1.0), []);
    }
}
