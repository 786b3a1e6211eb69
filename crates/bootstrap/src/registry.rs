//! Who is registered. The registry decides and does nothing else: time is passed in, and nothing here opens a
//! socket or reads a clock.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::history::{History, Standing};
use crate::query::Query;
use crate::worker::{Incarnation, Listed, NodeId, Worker};

/// The live workers. `now` is the time since any fixed start; a time before an earlier one counts as that
/// earlier one. Every call first drops what has expired, so that no answer shows a worker past its time; that
/// costs each worker one step, once.
pub struct Registry {
    limits: Limits,
    now: Duration,
    workers: BTreeMap<NodeId, Held>,
    /// Every worker once, by the time at which it expires.
    expiries: BTreeSet<(Duration, NodeId)>,
    history: History,
}

/// What bounds the registry's memory and the promises it makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How many workers are held at once.
    pub workers: usize,
    /// For how many nodes the incarnations that left are remembered.
    pub remembered_nodes: usize,
    /// How many incarnations that left are remembered for each of these nodes.
    pub remembered_incarnations: usize,
    /// The times to live that a worker may ask for.
    pub ttl_ms: RangeInclusive<u64>,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            workers: 4096,
            remembered_nodes: 8192,
            remembered_incarnations: 8,
            ttl_ms: 500..=60 * 60 * 1000,
        }
    }
}

/// What a registration did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Registered {
    /// The node was not there.
    Created,
    /// The same registration was there; its time starts again.
    Renewed,
    /// The same incarnation was there and has changed what it says of itself.
    Updated,
    /// Another incarnation of the node was there and is gone.
    Replaced,
}

/// Why the registry refused a call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A later incarnation of the node has registered.
    #[error("incarnation {incarnation} of node {node} was replaced{}", held_by(.held))]
    Stale {
        /// The node.
        node: NodeId,
        /// The incarnation that came too late.
        incarnation: Incarnation,
        /// The incarnation that holds the node now, if one does.
        held: Option<Incarnation>,
    },
    /// The node is not registered, or no longer.
    #[error("node {node} is not registered")]
    Unknown {
        /// The node.
        node: NodeId,
    },
    /// The registry holds as many workers as it may.
    #[error("the registry is full: it holds {workers} workers")]
    Full {
        /// How many it holds.
        workers: usize,
    },
    /// The time to live is outside the server's limits.
    #[error("ttl_ms {given} is not within {} to {}", .allowed.start(), .allowed.end())]
    Ttl {
        /// What the worker asked for.
        given: u64,
        /// What the server allows.
        allowed: RangeInclusive<u64>,
    },
}

struct Held {
    worker: Worker,
    since: Duration,
    expires: Duration,
}

impl Registry {
    /// An empty registry.
    pub fn new(limits: Limits) -> Registry {
        let history = History::new(limits.remembered_nodes, limits.remembered_incarnations);
        Registry { limits, now: Duration::ZERO, workers: BTreeMap::new(), expiries: BTreeSet::new(), history }
    }

    /// Registers a worker or renews it. Another incarnation of the node than the one held replaces it, unless
    /// it was itself replaced before.
    pub fn register(&mut self, now: Duration, worker: Worker) -> Result<Registered, Refusal> {
        self.sweep(now);
        if !self.limits.ttl_ms.contains(&worker.ttl_ms) {
            return Err(Refusal::Ttl { given: worker.ttl_ms, allowed: self.limits.ttl_ms.clone() });
        }
        let standing = self.history.standing(&worker.node, worker.incarnation);
        let held = self.workers.get(&worker.node);
        let (registered, since) = match held {
            Some(held) if held.worker.incarnation == worker.incarnation => {
                let same = held.worker == worker;
                (if same { Registered::Renewed } else { Registered::Updated }, held.since)
            }
            Some(_) if standing == Standing::New => (Registered::Replaced, self.now),
            // A node that is free may go back to the incarnation that left it last.
            None if standing != Standing::Superseded => {
                if self.workers.len() >= self.limits.workers {
                    return Err(Refusal::Full { workers: self.workers.len() });
                }
                (Registered::Created, self.now)
            }
            _ => return Err(self.stale(&worker.node, worker.incarnation)),
        };
        let node = worker.node.clone();
        if let Some(held) = self.workers.remove(&node) {
            self.expiries.remove(&(held.expires, node.clone()));
            if registered == Registered::Replaced {
                self.history.left(&node, held.worker.incarnation);
            }
        }
        let expires = self.now + Duration::from_millis(worker.ttl_ms);
        self.expiries.insert((expires, node.clone()));
        self.workers.insert(node, Held { worker, since, expires });
        Ok(registered)
    }

    /// Starts a worker's time again. Where another incarnation holds the node, the caller was replaced: it has
    /// registered before, or it would not renew.
    pub fn renew(&mut self, now: Duration, node: &NodeId, incarnation: Incarnation) -> Result<(), Refusal> {
        self.sweep(now);
        let now = self.now;
        let held = self.held_by(node, incarnation)?;
        let expires = now + Duration::from_millis(held.worker.ttl_ms);
        let before = std::mem::replace(&mut held.expires, expires);
        self.expiries.remove(&(before, node.clone()));
        self.expiries.insert((expires, node.clone()));
        Ok(())
    }

    /// Takes a worker out. It may register again for as long as no other incarnation has.
    pub fn deregister(
        &mut self,
        now: Duration,
        node: &NodeId,
        incarnation: Incarnation,
    ) -> Result<(), Refusal> {
        self.sweep(now);
        let expires = self.held_by(node, incarnation)?.expires;
        self.expiries.remove(&(expires, node.clone()));
        self.workers.remove(node);
        self.history.left(node, incarnation);
        Ok(())
    }

    /// The workers that match, ordered by node.
    pub fn find(&mut self, now: Duration, query: &Query) -> Vec<Listed> {
        self.sweep(now);
        let matching = self.workers.values().filter(|held| query.matches(&held.worker));
        matching.map(|held| held.listed(self.now)).collect()
    }

    /// How many workers match.
    pub fn count(&mut self, now: Duration, query: &Query) -> usize {
        self.sweep(now);
        self.workers.values().filter(|held| query.matches(&held.worker)).count()
    }

    /// One worker.
    pub fn worker(&mut self, now: Duration, node: &NodeId) -> Option<Listed> {
        self.sweep(now);
        self.workers.get(node).map(|held| held.listed(self.now))
    }

    /// The held worker, if it is this incarnation of the node.
    fn held_by(&mut self, node: &NodeId, incarnation: Incarnation) -> Result<&mut Held, Refusal> {
        let stale = match self.workers.get(node) {
            Some(held) => held.worker.incarnation != incarnation,
            None => self.history.standing(node, incarnation) == Standing::Superseded,
        };
        if stale {
            return Err(self.stale(node, incarnation));
        }
        self.workers.get_mut(node).ok_or_else(|| Refusal::Unknown { node: node.clone() })
    }

    fn stale(&self, node: &NodeId, incarnation: Incarnation) -> Refusal {
        let held = self.workers.get(node).map(|held| held.worker.incarnation);
        Refusal::Stale { node: node.clone(), incarnation, held }
    }

    fn sweep(&mut self, now: Duration) {
        self.now = self.now.max(now);
        while self.expiries.first().is_some_and(|(expires, _)| *expires <= self.now) {
            if let Some((_, node)) = self.expiries.pop_first()
                && let Some(held) = self.workers.remove(&node)
            {
                self.history.left(&node, held.worker.incarnation);
            }
        }
    }
}

impl Held {
    fn listed(&self, now: Duration) -> Listed {
        let remaining = self.expires.saturating_sub(now);
        Listed {
            worker: self.worker.clone(),
            age_ms: whole_ms(now.saturating_sub(self.since).as_nanos() / NANOS_PER_MS),
            remaining_ms: whole_ms(remaining.as_nanos().div_ceil(NANOS_PER_MS)),
        }
    }
}

fn whole_ms(ms: u128) -> u64 {
    u64::try_from(ms).unwrap_or(u64::MAX)
}

fn held_by(held: &Option<Incarnation>) -> String {
    held.map_or_else(String::new, |held| format!(" by incarnation {held}"))
}

const NANOS_PER_MS: u128 = 1_000_000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::{Labels, Rank, Role};

    fn worker(node: &str, incarnation: u64, ttl_ms: u64) -> Worker {
        Worker {
            node: NodeId::new(node).unwrap(),
            incarnation: Incarnation::new(incarnation),
            role: Role::Decode,
            rank: Rank::new(0, 1).unwrap(),
            address: "10.0.0.1:7000".parse().unwrap(),
            ttl_ms,
            labels: Labels::none(),
        }
    }

    #[test]
    fn memory_is_bounded_however_many_nodes_and_incarnations_come() {
        let limits = Limits { workers: 3, remembered_nodes: 5, remembered_incarnations: 2, ttl_ms: 1..=100 };
        let mut registry = Registry::new(limits);
        for step in 0..2_000u64 {
            let now = Duration::from_millis(step / 3);
            let _ = registry.register(now, worker(&format!("n{}", step % 17), step % 29, 1 + step % 7));
            if step % 5 == 0 {
                let _ = registry.deregister(
                    now,
                    &NodeId::new(&format!("n{}", step % 11)).unwrap(),
                    Incarnation::new(step % 29),
                );
            }
            assert!(registry.workers.len() <= 3);
            assert_eq!(registry.expiries.len(), registry.workers.len());
            let (nodes, incarnations) = registry.history.size();
            assert!(nodes <= 5 && incarnations <= 2);
        }
        assert_eq!(registry.history.size(), (5, 2), "the bounds were reached");
    }

    #[test]
    fn time_that_goes_back_brings_nobody_back() {
        let mut registry = Registry::new(Limits::default());
        registry.register(Duration::ZERO, worker("n", 1, 1_000)).unwrap();
        assert_eq!(registry.count(Duration::from_millis(1_000), &Query::all()), 0);
        assert_eq!(registry.count(Duration::from_millis(999), &Query::all()), 0);
    }
}
