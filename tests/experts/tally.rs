//! What has happened in all lives together.

use std::collections::BTreeMap;
use std::fmt;

use crate::plan::{Fault, Phase};

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tally {
    met: BTreeMap<(usize, Phase), u64>,
    counts: BTreeMap<&'static str, u64>,
}

impl Tally {
    pub fn met(&mut self, fault: usize, phase: Phase) {
        *self.met.entry((fault, phase)).or_default() += 1;
    }

    pub fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    pub fn add(&mut self, other: Tally) {
        other.met.into_iter().for_each(|(key, count)| *self.met.entry(key).or_default() += count);
        other.counts.into_iter().for_each(|(key, count)| *self.counts.entry(key).or_default() += count);
    }

    pub fn times(&self, fault: usize, phase: Phase) -> u64 {
        self.met.get(&(fault, phase)).copied().unwrap_or(0)
    }

    pub fn of(&self, what: &str) -> u64 {
        self.counts.get(what).copied().unwrap_or(0)
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<24}", "")?;
        Phase::ALL.iter().try_for_each(|phase| write!(f, "{:>10}", format!("{phase:?}")))?;
        writeln!(f)?;
        for (fault, name) in Fault::KINDS.iter().enumerate() {
            write!(f, "{name:<24}")?;
            Phase::ALL.iter().try_for_each(|&phase| write!(f, "{:>10}", self.times(fault, phase)))?;
            writeln!(f)?;
        }
        self.counts.iter().try_for_each(|(what, count)| writeln!(f, "{what:<44}{count:>10}"))
    }
}
