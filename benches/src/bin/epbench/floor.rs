//! The same work with nobody to wait for: where each row goes is known beforehand, and nobody says that it is there.

use crossdock::Memory;
use crossdock_benches::Aligned;
use crossdock_benches::rows::{MOST_PLACES, Rows, Terms, sum};
use crossdock_ep::{Bf16, Quantiser, ScaleOrder, ScaleRule, Summer};
use crossdock_shm::copy::{Copier, Strategy};

use crate::control::Control;
use crate::error::Error;
use crate::options::{Dtype, Mode};
use crate::ours::Inputs;
use crate::setup::{Setup, Shared};

/// One rank's part.
pub struct Floor<'a> {
    setup: &'a Setup,
    shared: &'a Shared,
    rank: u32,
    /// By token, where its places begin, and the end.
    starts: Vec<u32>,
    /// Places of all tokens: rows of the floor's memory.
    places: Vec<u32>,
    /// How each counts in the sum.
    weights: Vec<f32>,
    /// What each of this rank's groups gets, in order: tokens, counted through all ranks.
    arrivals: Vec<Vec<u32>>,
    /// By slot and place: where its results are, and in whose region.
    results: Vec<Vec<(u32, usize)>>,
    hot: Box<Hot>,
    /// Its scales.
    scales: Vec<f32>,
    scale_bytes: Vec<u8>,
    quantiser: Quantiser,
    summer: Summer,
    copier: Copier,
    /// `[tokens, hidden]`.
    pub combined: Aligned<Bf16>,
}

/// A row on its way, at the beginning of a line.
#[repr(align(64))]
struct Hot([u8; MOST_ROW_BYTES]);

impl<'a> Floor<'a> {
    pub fn new(setup: &'a Setup, shared: &'a Shared, rank: u32) -> Self {
        let problem = &setup.problem;
        let place = |group: usize, row: usize| (group * setup.rows() + row) as u32;
        let mut next = vec![0_usize; problem.groups()];
        let mut arrivals = vec![Vec::new(); problem.groups_of(rank).len()];
        let (mut starts, mut places, mut weights) = (vec![0], Vec::new(), Vec::new());
        for (source, token) in
            (0..problem.ranks).flat_map(|rank| (0..problem.tokens).map(move |at| (rank, at)))
        {
            for (group, weight) in problem.goes_to(source, token) {
                if source == rank {
                    places.push(place(group, next[group]));
                    weights.push(weight);
                }
                if let Some(local) = group.checked_sub(problem.groups_of(rank).start)
                    && let Some(of_group) = arrivals.get_mut(local)
                {
                    of_group.push((source as usize * problem.tokens + token) as u32);
                }
                next[group] += 1;
            }
            if source == rank {
                starts.push(places.len() as u32);
            }
        }
        Self {
            setup,
            shared,
            starts,
            places,
            weights,
            arrivals,
            rank,
            results: Vec::new(),
            hot: Box::new(Hot([0; MOST_ROW_BYTES])),
            scales: vec![0.0; setup.scale_bytes() / 4],
            scale_bytes: vec![0; setup.scale_bytes()],
            quantiser: Quantiser::detect(),
            summer: Summer::detect(),
            copier: Copier::detect(),
            combined: Aligned::new(problem.tokens * problem.hidden),
        }
    }

    /// Learns where the results of each slot are, in turn.
    pub fn take_results<C: FnMut() -> Result<(), Error>>(&mut self, slot: u32, control: &Control<'_, C>) {
        let result_bytes = 2 * self.setup.problem.hidden;
        let find = |&place: &u32| {
            let (group, row) = (place as usize / self.setup.rows(), place as usize % self.setup.rows());
            (self.setup.problem.rank_of(group), control.results(slot, group) + row * result_bytes)
        };
        self.results.push(self.places.iter().map(find).collect());
    }

    /// Makes each row and stores it, with its scales, where it has to arrive.
    pub fn dispatch(&mut self, inputs: &Inputs, strategy: Strategy) {
        let setup = self.setup;
        let (hidden, row_bytes, scale_bytes) = (setup.problem.hidden, setup.row_bytes(), setup.scale_bytes());
        let rows = Rows { memory: &self.shared.floor, at: 0, row_bytes };
        let copier = self.copier.force(strategy);
        let quantises = (setup.options.mode, setup.options.dtype) == (Mode::Latency, Dtype::Fp8);
        let scale_rows = Rows { at: setup.floor_scales(), row_bytes: scale_bytes, ..rows };
        let token_scales = Rows { at: setup.floor_token_scales(), ..scale_rows };
        for token in 0..setup.problem.tokens {
            let (row, scales) = if quantises {
                let row = &inputs.rows[token * hidden..][..hidden];
                self.quantiser.quantise(
                    row,
                    ScaleRule::Plain,
                    &mut self.hot.0[..row_bytes],
                    &mut self.scales,
                );
                for (bytes, scale) in self.scale_bytes.chunks_exact_mut(4).zip(&self.scales) {
                    bytes.copy_from_slice(&scale.to_le_bytes());
                }
                (&self.hot.0[..row_bytes], &self.scale_bytes[..])
            } else {
                let values = &inputs.values[token * row_bytes..][..row_bytes];
                (values, inputs.scales.get(token * scale_bytes..(token + 1) * scale_bytes).unwrap_or(&[]))
            };
            let places = &self.places[self.starts[token] as usize..self.starts[token + 1] as usize];
            rows.scatter(copier, row, places);
            match setup.order() {
                ScaleOrder::ByRow => scale_rows.scatter(self.copier, scales, places),
                ScaleOrder::ByColumn => {
                    let token = self.rank as usize * setup.problem.tokens + token;
                    token_scales.scatter(self.copier, scales, &[token as u32]);
                }
            }
        }
        if setup.order() == ScaleOrder::ByColumn {
            self.store_columns(token_scales);
        }
    }

    /// Each rank writes the columns of its own experts, in runs of rows that lie next to each other: two ranks that write
    /// one line, or a line touched for every four bytes, would take much longer. The other ranks' scales are there, since
    /// they are the same each time.
    fn store_columns(&self, token_scales: Rows<'_>) {
        let setup = self.setup;
        let (words, rows, first) =
            (setup.scale_bytes() / 4, setup.rows(), setup.problem.groups_of(self.rank).start);
        for (local, tokens) in self.arrivals.iter().enumerate() {
            for (part, tokens) in tokens.chunks(RUN_ROWS).enumerate() {
                let column = (first + local) * words * rows + part * RUN_ROWS;
                token_scales.transpose(tokens, setup.floor_scales() + 4 * column, 4 * rows);
            }
        }
    }

    /// Reads the results of each token where they are, and sums them.
    pub fn combine(&mut self, slot: u32) {
        let hidden = self.setup.problem.hidden;
        let results = &self.results[slot as usize];
        for (token, out) in self.combined.chunks_exact_mut(hidden).enumerate() {
            let range = self.starts[token] as usize..self.starts[token + 1] as usize;
            let mut rows: [(&Memory, usize); MOST_PLACES] = [(&self.shared.floor, 0); MOST_PLACES];
            for (row, &(rank, at)) in rows.iter_mut().zip(&results[range.clone()]) {
                *row = (&self.shared.regions[rank as usize], at);
            }
            let terms = match self.setup.options.mode {
                Mode::Latency => Terms::Weighted(&self.weights[range.clone()]),
                Mode::Throughput => Terms::Plain,
            };
            sum(self.summer, &rows[..range.len()], terms, out);
        }
    }

    /// Only makes the rows.
    pub fn quantise(&mut self, inputs: &Inputs) {
        let hidden = self.setup.problem.hidden;
        for row in inputs.rows.chunks_exact(hidden) {
            self.quantiser.quantise(row, ScaleRule::Plain, &mut self.hot.0[..hidden], &mut self.scales);
        }
    }
}

/// As long as any row can be.
const MOST_ROW_BYTES: usize = 2 << 17;
/// Scales of so many rows are read while they are near.
const RUN_ROWS: usize = 128;
