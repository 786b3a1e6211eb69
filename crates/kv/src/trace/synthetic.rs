//! Requests made up from a seed.

use super::{BLOCK_TOKENS, Request};
use crate::random::Random;

/// Makes up requests without end: the same ones for the same options.
///
/// Arrivals do not know of each other (exponential gaps); lengths are log-normal, which is what recorded lengths
/// look like.
#[derive(Clone, Debug)]
pub struct Synthetic {
    options: SyntheticOptions,
    random: Random,
    now_s: f64,
    next_prefix_id: u64,
}

/// What [`Synthetic`] requests are like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SyntheticOptions {
    /// Decides everything that the other options leave open.
    pub seed: u64,
    /// How many arrive in a second, on average.
    pub requests_per_second: f64,
    /// How long the inputs are.
    pub input: Lengths,
    /// How long the outputs are.
    pub output: Lengths,
    /// With how many blocks every input begins that are the same for all.
    pub shared_blocks: u32,
}

/// A log-normal distribution of lengths, clipped at both ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lengths {
    /// Half of the lengths are below.
    pub median_tokens: f64,
    /// The standard deviation of the logarithm.
    pub sigma: f64,
    /// What is shorter becomes this.
    pub shortest_tokens: u32,
    /// What is longer becomes this.
    pub longest_tokens: u32,
}

impl Default for SyntheticOptions {
    /// Like a conversation service: long inputs with a few very long ones, short outputs, one common block.
    fn default() -> Self {
        Self {
            seed: 0,
            requests_per_second: 3.4,
            input: Lengths {
                median_tokens: 6500.0,
                sigma: 1.2,
                shortest_tokens: 900,
                longest_tokens: 128 << 10,
            },
            output: Lengths { median_tokens: 300.0, sigma: 1.3, shortest_tokens: 1, longest_tokens: 2000 },
            shared_blocks: 1,
        }
    }
}

impl Synthetic {
    /// Begins with the first request.
    pub fn new(options: SyntheticOptions) -> Result<Self, SyntheticError> {
        let rate = options.requests_per_second;
        if !(rate.is_finite() && rate > 0.0) {
            return Err(SyntheticError::BadRate { requests_per_second: rate });
        }
        for (what, lengths) in [("input", options.input), ("output", options.output)] {
            let median = lengths.median_tokens.is_finite() && lengths.median_tokens > 0.0;
            let sigma = lengths.sigma.is_finite() && lengths.sigma >= 0.0;
            if !median || !sigma || !(1..=lengths.longest_tokens).contains(&lengths.shortest_tokens) {
                return Err(SyntheticError::BadLengths { what, lengths });
            }
        }
        let next_prefix_id = options.shared_blocks.into();
        Ok(Self { options, random: Random(options.seed), now_s: 0.0, next_prefix_id })
    }

    fn length(&mut self, lengths: Lengths) -> u32 {
        let tokens = lengths.median_tokens * (lengths.sigma * self.random.normal()).exp();
        (tokens.round() as u32).clamp(lengths.shortest_tokens, lengths.longest_tokens)
    }
}

impl Iterator for Synthetic {
    type Item = Request;

    fn next(&mut self) -> Option<Request> {
        self.now_s += self.random.exponential() / self.options.requests_per_second;
        let input_tokens = self.length(self.options.input);
        let output_tokens = self.length(self.options.output);
        let blocks = input_tokens.div_ceil(BLOCK_TOKENS);
        let shared = blocks.min(self.options.shared_blocks);
        let own = self.next_prefix_id..self.next_prefix_id + u64::from(blocks - shared);
        self.next_prefix_id = own.end;
        let prefix_ids = (0..shared.into()).chain(own).collect();
        Some(Request { at_ms: (self.now_s * 1e3) as u64, input_tokens, output_tokens, prefix_ids })
    }
}

/// Why no requests can be made up.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SyntheticError {
    /// The rate is no positive number.
    #[error("{requests_per_second} requests a second cannot be made")]
    BadRate {
        /// The rate.
        requests_per_second: f64,
    },
    /// The lengths cannot be drawn.
    #[error(
        "{what} lengths from {} to {} tokens around {} with sigma {} cannot be drawn",
        lengths.shortest_tokens, lengths.longest_tokens, lengths.median_tokens, lengths.sigma
    )]
    BadLengths {
        /// `"input"` or `"output"`.
        what: &'static str,
        /// The lengths.
        lengths: Lengths,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_decides() {
        let first = |seed| -> Vec<Request> {
            Synthetic::new(SyntheticOptions { seed, ..SyntheticOptions::default() })
                .unwrap()
                .take(50)
                .collect()
        };
        assert_eq!(first(7), first(7));
        assert_ne!(first(7), first(8));
    }

    #[test]
    fn requests_are_like_their_options() {
        let options = SyntheticOptions { shared_blocks: 2, ..SyntheticOptions::default() };
        let requests: Vec<Request> = Synthetic::new(options).unwrap().take(4000).collect();
        assert!(requests.is_sorted_by_key(|request| request.at_ms));
        let seconds = requests.last().unwrap().at_ms as f64 / 1e3;
        let rate = requests.len() as f64 / seconds;
        assert!((rate / options.requests_per_second - 1.0).abs() < 0.1, "{rate} a second");

        let median = |mut lengths: Vec<u32>| {
            lengths.sort_unstable();
            f64::from(lengths[lengths.len() / 2])
        };
        let input = median(requests.iter().map(|request| request.input_tokens).collect());
        assert!((input / options.input.median_tokens - 1.0).abs() < 0.15, "{input}");
        let output = median(requests.iter().map(|request| request.output_tokens).collect());
        assert!((output / options.output.median_tokens - 1.0).abs() < 0.15, "{output}");

        let mut own = std::collections::HashSet::new();
        for request in &requests {
            assert!((900..=128 << 10).contains(&request.input_tokens));
            assert!((1..=2000).contains(&request.output_tokens));
            assert_eq!(request.prefix_ids.len() as u32, request.input_tokens.div_ceil(BLOCK_TOKENS));
            assert_eq!(request.prefix_ids[..2], [0, 1]);
            assert!(request.prefix_ids[2..].iter().all(|id| own.insert(*id)));
        }
        for end in [900, 128 << 10] {
            assert!(requests.iter().any(|request| request.input_tokens == end), "clipped at {end}");
        }
    }

    #[test]
    fn options_that_make_no_requests_are_refused() {
        let options = SyntheticOptions::default();
        for requests_per_second in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let error = Synthetic::new(SyntheticOptions { requests_per_second, ..options }).unwrap_err();
            assert!(matches!(error, SyntheticError::BadRate { .. }));
        }
        let good = options.input;
        let bad = [
            Lengths { median_tokens: 0.0, ..good },
            Lengths { median_tokens: f64::NAN, ..good },
            Lengths { sigma: -0.1, ..good },
            Lengths { shortest_tokens: 0, ..good },
            Lengths { shortest_tokens: good.longest_tokens + 1, ..good },
        ];
        for output in bad {
            let error = Synthetic::new(SyntheticOptions { output, ..options }).unwrap_err();
            assert!(matches!(error, SyntheticError::BadLengths { what: "output", .. }));
        }
    }
}
