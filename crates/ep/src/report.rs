//! What a call cost, what it waited for, and what was lost.

use std::time::Duration;

use crate::error::EpError;
use crate::group::{LostWeight, Shared};
use crate::planted::{Planted, is_planted};
use crate::route::{NOWHERE, Routes};

/// What a call cost and what it waited for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Bytes of rows, results and lists that this rank reads from other ranks, or writes there through ports.
    pub wire_bytes: u64,
    /// Bytes that DeepEP's formula counts: each choice's row once, wherever its expert is; in the combine of the throughput
    /// mode the result of each rank that a token went to.
    pub logical_bytes: u64,
    /// Bytes of rows and sums that this rank wrote into memory: into its staging, its outputs, its combined rows.
    pub copied_bytes: u64,
    /// How long this rank was in the call, its waits included.
    pub time: Duration,
    /// How long it takes this machine to copy `copied_bytes` once, in one thread, from memory to memory.
    pub floor: Duration,
    /// How long this rank waited for each other, by rank; and in its own place, until its ports had sent earlier calls.
    pub waits: Vec<Duration>,
    /// The ranks that are masked now, ascending.
    pub masked: Vec<u32>,
    /// By token: the weight of those of its choices that masked ranks did not answer; in a throughput mode whose dispatch
    /// had no weights, how many they were. Empty where nothing was lost.
    pub lost: Vec<f32>,
}

impl Report {
    pub(crate) fn new(ranks: u32) -> Report {
        Report { waits: vec![Duration::ZERO; ranks as usize], ..Report::default() }
    }

    /// How near the call is to its floor, waits left out: below 1, but for copies that stay in a cache. `None` if it copied
    /// nothing.
    pub fn efficiency(&self) -> Option<f64> {
        let busy = self.time.saturating_sub(self.waits.iter().sum());
        (self.copied_bytes > 0 && !busy.is_zero()).then(|| self.floor.as_secs_f64() / busy.as_secs_f64())
    }

    /// How often each logical byte was copied here. `None` if there was none.
    pub fn copies(&self) -> Option<f64> {
        (self.logical_bytes > 0).then(|| self.copied_bytes as f64 / self.logical_bytes as f64)
    }

    /// Ends a half of a call that began then.
    pub(crate) fn end_half(&mut self, begun: Duration, shared: &Shared) {
        self.time += shared.pace.now().saturating_sub(begun);
        self.floor = shared.copy_rate.time_of(self.copied_bytes);
        self.masked = shared.masked();
    }
}

impl Routes {
    /// The weights that ranks which have not answered lost, by token, into the report; and what to multiply the others
    /// with, by token, or nothing.
    pub(crate) fn account(
        &self,
        shared: &Shared,
        answered: &[bool],
        weights: Option<&[f32]>,
        report: &mut Report,
    ) -> Result<Vec<f32>, EpError> {
        let missing = |choice: usize| {
            let rank = self.ranks[choice];
            rank != NOWHERE && !answered[rank as usize]
        };
        if answered.iter().all(|&answered| answered) || !(0..self.ranks.len()).any(missing) {
            return Ok(Vec::new());
        }
        let top_k = shared.config.top_k as usize;
        if shared.options.lost == LostWeight::Fail {
            let has_lost = |token: &usize| (token * top_k..(token + 1) * top_k).any(missing);
            let tokens = (0..self.tokens).filter(has_lost).count();
            return Err(EpError::WeightLost { tokens, masked: shared.masked() });
        }
        let weight = |choice: usize| weights.map_or(1.0, |weights| weights[choice]);
        let mut raise = vec![1.0; self.tokens];
        let mut lost = vec![0.0; self.tokens];
        for (token, raise) in raise.iter_mut().enumerate() {
            let mut kept = 0.0;
            for choice in token * top_k..(token + 1) * top_k {
                match self.ranks[choice] {
                    NOWHERE => {}
                    _ if missing(choice) => lost[token] += weight(choice),
                    _ => kept += weight(choice),
                }
            }
            if shared.options.lost == LostWeight::Renormalise && lost[token] > 0.0 && kept > 0.0 {
                *raise = (kept + lost[token]) / kept;
            }
        }
        if !is_planted(Planted::LostUnreported) {
            report.lost = lost;
        }
        Ok(raise)
    }
}
