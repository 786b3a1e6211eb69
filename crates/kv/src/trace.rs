//! Requests to replay in benchmarks: read from a recorded trace, or made up from a seed.
//!
//! A trace has one JSON object a line, in the order of time:
//!
//! ```json
//! {"timestamp": 1500, "input_length": 1300, "output_length": 120, "hash_ids": [0, 7, 8]}
//! ```
//!
//! Times are in milliseconds from the start, lengths in tokens. Each hash id names a prefix of the input that ends
//! [`BLOCK_TOKENS`] after the one before: requests with equal ids can share the KV of that prefix.

mod synthetic;

use std::collections::HashSet;
use std::io::{self, BufRead, Read};

use serde::Deserialize;

pub use synthetic::{Lengths, Synthetic, SyntheticError, SyntheticOptions};

/// How many tokens of a request one hash id stands for.
pub const BLOCK_TOKENS: u32 = 512;

/// One request of a trace.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Request {
    /// When it arrives, from the start of the trace.
    #[serde(rename = "timestamp")]
    pub at_ms: u64,
    /// How many tokens are to be prefilled.
    #[serde(rename = "input_length")]
    pub input_tokens: u32,
    /// How many tokens are decoded.
    #[serde(rename = "output_length")]
    pub output_tokens: u32,
    /// The prefixes of the input, shortest first, by blocks; equal ids, equal prefixes.
    #[serde(rename = "hash_ids", default)]
    pub prefix_ids: Vec<u64>,
}

impl Request {
    /// How many pages hold the input.
    ///
    /// # Panics
    /// If a page holds no tokens.
    pub fn pages(&self, page_tokens: u32) -> u32 {
        self.input_tokens.div_ceil(page_tokens)
    }

    /// Makes the request shorter; no length becomes 0 that was not. The prefix ids stay: each then stands for
    /// [fewer tokens](Scale::prefix_tokens), so that the same part of the request is shared.
    pub fn scale_lengths(&mut self, scale: Scale) {
        let shrink = |tokens: u32| ((f64::from(tokens) * scale.0).round() as u32).max(tokens.min(1));
        self.input_tokens = shrink(self.input_tokens);
        self.output_tokens = shrink(self.output_tokens);
    }

    /// Moves the request nearer to the start.
    pub fn scale_time(&mut self, scale: Scale) {
        self.at_ms = (self.at_ms as f64 * scale.0).round() as u64;
    }
}

/// A factor above 0 and up to 1, by which a trace is made to fit a machine.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
pub struct Scale(f64);

impl Scale {
    /// Leaves everything as it is.
    pub const ONE: Scale = Scale(1.0);

    /// Takes a factor; nothing needs a trace that is larger than recorded.
    pub fn new(factor: f64) -> Result<Self, BadScale> {
        match factor > 0.0 && factor <= 1.0 {
            true => Ok(Self(factor)),
            false => Err(BadScale { factor }),
        }
    }

    /// The factor.
    pub fn factor(self) -> f64 {
        self.0
    }

    /// How many tokens of a request of this scale its first `ids` prefix ids stand for; at most its input.
    pub fn prefix_tokens(self, request: &Request, ids: usize) -> u32 {
        let tokens = (ids as f64 * f64::from(BLOCK_TOKENS) * self.0).round() as u32;
        tokens.min(request.input_tokens)
    }
}

/// The factor cannot scale a trace.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("a trace cannot be scaled by {factor}: only by more than 0 and at most 1")]
pub struct BadScale {
    /// The factor.
    pub factor: f64,
}

/// What a number of requests come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// How many there are.
    pub requests: u64,
    /// How many tokens are prefilled.
    pub input_tokens: u64,
    /// How many tokens are decoded.
    pub output_tokens: u64,
    /// How many pages the inputs take, nothing shared.
    pub pages: u64,
    /// The longest input.
    pub longest_input_tokens: u32,
    /// When the last request arrives.
    pub last_at_ms: u64,
}

impl Totals {
    /// Adds the requests up.
    ///
    /// # Panics
    /// If a page holds no tokens.
    pub fn of<'a>(requests: impl IntoIterator<Item = &'a Request>, page_tokens: u32) -> Self {
        requests.into_iter().fold(Self::default(), |sum, request| Self {
            requests: sum.requests + 1,
            input_tokens: sum.input_tokens + u64::from(request.input_tokens),
            output_tokens: sum.output_tokens + u64::from(request.output_tokens),
            pages: sum.pages + u64::from(request.pages(page_tokens)),
            longest_input_tokens: sum.longest_input_tokens.max(request.input_tokens),
            last_at_ms: sum.last_at_ms.max(request.at_ms),
        })
    }
}

/// Reads a trace line by line, and stops at the first error. Empty lines are skipped.
#[derive(Debug)]
pub struct TraceReader<R> {
    lines: R,
    limits: TraceLimits,
    /// The number of the line read last, from 1 on.
    line: u64,
    requests: u64,
    last_at_ms: u64,
    buffer: Vec<u8>,
    failed: bool,
}

/// What a [`TraceReader`] accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceLimits {
    /// The longest line.
    pub line_bytes: usize,
    /// The longest input or output of a request.
    pub tokens: u32,
    /// The most requests.
    pub requests: u64,
    /// The latest time of a request.
    pub at_ms: u64,
}

impl Default for TraceLimits {
    /// 1 MiB a line, 16 Mi tokens, ten million requests, 139 years: times since 1970 are among them, and in nanoseconds
    /// they leave room to add to.
    fn default() -> Self {
        Self { line_bytes: 1 << 20, tokens: 1 << 24, requests: 10_000_000, at_ms: 1 << 42 }
    }
}

impl<R: BufRead> TraceReader<R> {
    /// Reads from the start of a trace.
    pub fn new(lines: R, limits: TraceLimits) -> Self {
        Self { lines, limits, line: 0, requests: 0, last_at_ms: 0, buffer: Vec::new(), failed: false }
    }

    /// Reads up to the next request; `None` at the end.
    fn read(&mut self) -> Result<Option<Request>, TraceError> {
        loop {
            self.line += 1;
            self.buffer.clear();
            let limit = self.limits.line_bytes;
            // As much as a line may have, and its end: what does not end there is too long.
            (&mut self.lines)
                .take((limit as u64).saturating_add(1))
                .read_until(b'\n', &mut self.buffer)
                .map_err(|source| TraceError::Io { line: self.line, source })?;
            if self.buffer.is_empty() {
                return Ok(None);
            }
            if self.buffer.len() > limit && !self.buffer.ends_with(b"\n") {
                return Err(TraceError::LineTooLong { line: self.line, limit });
            }
            let text = self.buffer.trim_ascii();
            if !text.is_empty() {
                let request = serde_json::from_slice(text)
                    .map_err(|source| TraceError::Json { line: self.line, source })?;
                return self.accept(request).map(Some);
            }
        }
    }

    fn accept(&mut self, request: Request) -> Result<Request, TraceError> {
        let line = self.line;
        let limits = self.limits;
        if self.requests == limits.requests {
            return Err(TraceError::TooManyRequests { line, limit: limits.requests });
        }
        let tokens = request.input_tokens.max(request.output_tokens);
        if request.input_tokens == 0 || tokens > limits.tokens {
            let (input_tokens, output_tokens) = (request.input_tokens, request.output_tokens);
            return Err(TraceError::BadLength { line, input_tokens, output_tokens, limit: limits.tokens });
        }
        if request.prefix_ids.len() > request.input_tokens.div_ceil(BLOCK_TOKENS) as usize {
            let (ids, input_tokens) = (request.prefix_ids.len(), request.input_tokens);
            return Err(TraceError::TooManyPrefixes { line, ids, input_tokens });
        }
        let mut ids = HashSet::with_capacity(request.prefix_ids.len());
        if let Some(&id) = request.prefix_ids.iter().find(|id| !ids.insert(**id)) {
            return Err(TraceError::RepeatedPrefix { line, id });
        }
        if request.at_ms > limits.at_ms {
            return Err(TraceError::TooLate { line, at_ms: request.at_ms, limit: limits.at_ms });
        }
        if request.at_ms < self.last_at_ms {
            let (at_ms, before_ms) = (request.at_ms, self.last_at_ms);
            return Err(TraceError::OutOfOrder { line, at_ms, before_ms });
        }
        self.requests += 1;
        self.last_at_ms = request.at_ms;
        Ok(request)
    }
}

impl<R: BufRead> Iterator for TraceReader<R> {
    type Item = Result<Request, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let read = self.read().transpose();
        self.failed = !matches!(read, Some(Ok(_)));
        read
    }
}

/// What is wrong with a trace, and where.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// It cannot be read.
    #[error("line {line}: {source}")]
    Io {
        /// At which line.
        line: u64,
        /// What the system says.
        source: io::Error,
    },
    /// A line is no request.
    #[error("line {line}, column {}: {}", source.column(), without_place(source))]
    Json {
        /// Which line.
        line: u64,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// A line is longer than allowed: probably not a trace.
    #[error("line {line} has more than {limit} bytes")]
    LineTooLong {
        /// Which line.
        line: u64,
        /// The limit.
        limit: usize,
    },
    /// There are more requests than allowed.
    #[error("line {line}: more than {limit} requests")]
    TooManyRequests {
        /// Which line is too much.
        line: u64,
        /// The limit.
        limit: u64,
    },
    /// A request has no input, or is longer than allowed.
    #[error(
        "line {line}: {input_tokens} tokens in, {output_tokens} out; 1 in, and at most {limit}, are possible"
    )]
    BadLength {
        /// Which line.
        line: u64,
        /// The length of the input.
        input_tokens: u32,
        /// The length of the output.
        output_tokens: u32,
        /// The limit.
        limit: u32,
    },
    /// A request names more prefixes than it has blocks.
    #[error("line {line}: {ids} hash ids for {input_tokens} tokens, in blocks of {BLOCK_TOKENS}")]
    TooManyPrefixes {
        /// Which line.
        line: u64,
        /// How many ids.
        ids: usize,
        /// The length of the input.
        input_tokens: u32,
    },
    /// A request gives two of its prefixes one name, although they differ in length.
    #[error("line {line}: the hash id {id} stands for two prefixes of one request")]
    RepeatedPrefix {
        /// Which line.
        line: u64,
        /// The name.
        id: u64,
    },
    /// A request comes later than allowed.
    #[error("line {line}: a request at {at_ms} ms; at most {limit} are possible")]
    TooLate {
        /// Which line.
        line: u64,
        /// Its time.
        at_ms: u64,
        /// The limit.
        limit: u64,
    },
    /// A request comes before the one on the line before.
    #[error("line {line}: a request at {at_ms} ms follows one at {before_ms} ms")]
    OutOfOrder {
        /// Which line.
        line: u64,
        /// Its time.
        at_ms: u64,
        /// The time before.
        before_ms: u64,
    },
}

/// The parser saw one line alone, so what it says of the place would mislead.
fn without_place(source: &serde_json::Error) -> String {
    let text = source.to_string();
    text.rsplit_once(" at line ").map_or(text.as_str(), |(what, _)| what).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, limits: TraceLimits) -> Vec<Result<Request, TraceError>> {
        TraceReader::new(text.as_bytes(), limits).collect()
    }

    fn request(at_ms: u64, input_tokens: u32, prefix_ids: &[u64]) -> Request {
        Request { at_ms, input_tokens, output_tokens: 10, prefix_ids: prefix_ids.to_vec() }
    }

    const LINE: &str = r#"{"timestamp": 5, "input_length": 600, "output_length": 10, "hash_ids": [0, 3]}"#;

    #[test]
    fn lines_become_requests() {
        let text = format!("{LINE}\n\n  {LINE}  \r\n{}", LINE.replace(r#", "hash_ids": [0, 3]"#, ""));
        let read: Result<Vec<_>, _> = read(&text, TraceLimits::default()).into_iter().collect();
        let with_ids = request(5, 600, &[0, 3]);
        assert_eq!(read.unwrap(), [with_ids.clone(), with_ids, request(5, 600, &[])]);
    }

    #[test]
    fn an_error_names_its_line_and_ends_the_reading() {
        type Is = fn(&TraceError) -> bool;
        let cases: [(String, Is); 10] = [
            ("{".into(), |e| matches!(e, TraceError::Json { line: 2, .. })),
            ("[]".into(), |e| matches!(e, TraceError::Json { line: 2, .. })),
            (LINE.replace("600", "-1"), |e| matches!(e, TraceError::Json { line: 2, .. })),
            (LINE.replace("600", "0"), |e| {
                matches!(
                    e,
                    TraceError::BadLength { line: 2, input_tokens: 0, output_tokens: 10, limit: 16_777_216 }
                )
            }),
            (LINE.replace("10", "16777217"), |e| {
                matches!(e, TraceError::BadLength { line: 2, output_tokens: 16_777_217, .. })
            }),
            (LINE.replace("600", "512"), |e| {
                matches!(e, TraceError::TooManyPrefixes { line: 2, ids: 2, input_tokens: 512 })
            }),
            (LINE.replace("[0, 3]", "[3, 3]"), |e| {
                matches!(e, TraceError::RepeatedPrefix { line: 2, id: 3 })
            }),
            (LINE.replace("5,", "18446744073709551615,"), |e| {
                matches!(e, TraceError::TooLate { line: 2, at_ms: u64::MAX, limit: 4_398_046_511_104 })
            }),
            (LINE.replace("5,", "4,"), |e| {
                matches!(e, TraceError::OutOfOrder { line: 2, at_ms: 4, before_ms: 5 })
            }),
            (" ".repeat(10) + &"x".repeat(1 << 20) + "x", |e| {
                matches!(e, TraceError::LineTooLong { line: 2, limit: 1_048_576 })
            }),
        ];
        for (second, expected) in cases {
            let read = read(&format!("{LINE}\n{second}\n{LINE}\n"), TraceLimits::default());
            assert_eq!(read.len(), 2);
            assert!(read[0].is_ok());
            let error = read[1].as_ref().unwrap_err();
            assert!(expected(error), "{error:?}");
        }
    }

    #[test]
    fn a_line_that_is_no_request_is_described() {
        let text = format!("{LINE}\n{}", LINE.replace("timestamp", "time"));
        let read = read(&text, TraceLimits::default());
        let expected = "line 2, column 73: missing field `timestamp`";
        assert_eq!(read[1].as_ref().unwrap_err().to_string(), expected);
    }

    #[test]
    fn limits_hold_exactly() {
        let limits = TraceLimits { line_bytes: LINE.len(), requests: 2, ..TraceLimits::default() };
        let text = format!("{LINE}\n{LINE}\n{LINE}\n");
        let all = read(&text, limits);
        assert!(all[0].is_ok() && all[1].is_ok());
        assert!(matches!(all[2], Err(TraceError::TooManyRequests { line: 3, limit: 2 })));
        assert!(read(&text, TraceLimits { at_ms: 5, ..limits })[0].is_ok());
        let late = read(&text, TraceLimits { at_ms: 4, ..limits });
        assert!(matches!(late[..], [Err(TraceError::TooLate { line: 1, at_ms: 5, limit: 4 })]));
        let short = TraceLimits { line_bytes: LINE.len() - 1, ..limits };
        for text in [LINE.to_string(), format!("{LINE}\n")] {
            let read: Vec<_> = TraceReader::new(text.as_bytes(), short).collect();
            assert!(matches!(read[..], [Err(TraceError::LineTooLong { line: 1, .. })]));
        }
    }

    #[test]
    fn a_shorter_request_shares_the_same_part_of_itself() {
        let whole = request(1001, 1300, &[4, 5, 6]);
        let mut half = whole.clone();
        let scale = Scale::new(0.5).unwrap();
        half.scale_lengths(scale);
        half.scale_time(scale);
        assert_eq!(half, Request { output_tokens: 5, ..request(501, 650, &[4, 5, 6]) });
        for (ids, tokens) in [(0, 0), (1, 256), (2, 512), (3, 650)] {
            assert_eq!(scale.prefix_tokens(&half, ids), tokens);
        }
        assert_eq!(Scale::ONE.prefix_tokens(&whole, 2), 1024);
        let mut same = whole.clone();
        same.scale_lengths(Scale::ONE);
        assert_eq!(same, whole);
        let mut least = Request { output_tokens: 0, ..request(0, 3, &[4]) };
        least.scale_lengths(Scale::new(1e-9).unwrap());
        assert_eq!(least, Request { output_tokens: 0, ..request(0, 1, &[4]) });
    }

    #[test]
    fn only_factors_that_shrink_are_taken() {
        for factor in [0.0, -1.0, 1.001, f64::NAN, f64::INFINITY] {
            assert!(Scale::new(factor).is_err(), "{factor}");
        }
        assert_eq!(Scale::new(0.25).unwrap().factor(), 0.25);
    }

    #[test]
    fn totals_add_up() {
        let totals = Totals::of(&[request(3, 65, &[]), request(9, 128, &[])], 64);
        let expected = Totals {
            requests: 2,
            input_tokens: 193,
            output_tokens: 20,
            pages: 4,
            longest_input_tokens: 128,
            last_at_ms: 9,
        };
        assert_eq!(totals, expected);
    }
}
