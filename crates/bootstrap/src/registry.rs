//! Who is registered. The registry decides and does nothing else: time is passed in, and nothing here opens a
//! socket or reads a clock.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::group::{Counted, Group, GroupId, Misfit, Ranks, RoomPolicy, Topology, fits};
use crate::history::{History, Standing};
use crate::query::Query;
use crate::rooms::{self, DpRank, RoomRefusal, Rooms};
use crate::worker::{Incarnation, Listed, NodeId, State, Worker};

/// The live workers. `now` is the time since any fixed start; a time before an earlier one counts as that
/// earlier one. Every call first drops what has expired, so that no answer shows a worker past its time; that
/// costs each worker one step, once.
pub struct Registry {
    limits: Limits,
    now: Duration,
    workers: BTreeMap<NodeId, Held>,
    /// Every worker once, by the time at which it expires.
    expiries: BTreeSet<(Duration, NodeId)>,
    /// Every worker that warms up once, by the time at which that ends.
    warm_ends: BTreeSet<(Duration, NodeId)>,
    /// Who has which ranks of which group; no group is empty.
    groups: BTreeMap<GroupId, BTreeMap<Ranks, NodeId>>,
    rooms: Rooms,
    history: History,
    /// Grows whenever a list of the workers would show something else.
    revision: u64,
    tally: Tally,
}

/// What has happened to the workers and rooms of a registry so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Workers that did not renew in time.
    pub expired: u64,
    /// Nodes that were taken over by another incarnation.
    pub replaced: u64,
    /// Nodes whose address changed, in the same incarnation or with another.
    pub moved: u64,
    /// Workers whose time to warm up ended before they were ready.
    pub overdue: u64,
    /// Rooms whose rank was told.
    pub rooms_told: u64,
    /// Rooms that were forgotten when their time was over.
    pub rooms_expired: u64,
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
    /// The longest time that a worker may ask for to warm up.
    pub warm_up_ms: u64,
    /// How many rooms are held at once.
    pub rooms: usize,
    /// The longest time for which a room may be kept.
    pub room_ms: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            workers: 4096,
            remembered_nodes: 8192,
            remembered_incarnations: 8,
            ttl_ms: 500..=60 * 60 * 1000,
            warm_up_ms: 60 * 60 * 1000,
            rooms: 256 * 1024,
            room_ms: 60 * 60 * 1000,
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
    /// The time to warm up is longer than the server allows.
    #[error("warm_up_ms {given} is more than {most}")]
    WarmUp {
        /// What the worker asked for.
        given: u64,
        /// What the server allows.
        most: u64,
    },
    /// The worker does not fit into its group.
    #[error(transparent)]
    Misfit(#[from] Misfit),
}

struct Held {
    worker: Worker,
    since: Duration,
    /// When its time to live is over.
    expires: Duration,
    /// Until when it warms up, if it does.
    warm_until: Option<Duration>,
}

impl Registry {
    /// An empty registry.
    pub fn new(limits: Limits) -> Registry {
        let history = History::new(limits.remembered_nodes, limits.remembered_incarnations);
        let rooms = Rooms::new(limits.rooms);
        Registry {
            limits,
            now: Duration::ZERO,
            workers: BTreeMap::new(),
            expiries: BTreeSet::new(),
            warm_ends: BTreeSet::new(),
            groups: BTreeMap::new(),
            rooms,
            history,
            revision: 0,
            tally: Tally::default(),
        }
    }

    /// Registers a worker or renews it. Another incarnation of the node than the one held replaces it, unless
    /// it was itself replaced before. A worker that does not fit to the others of its group is refused.
    pub fn register(&mut self, now: Duration, worker: Worker) -> Result<Registered, Refusal> {
        self.sweep(now);
        self.limits.check(&worker)?;
        let standing = self.history.standing(&worker.node, worker.incarnation);
        let held = self.workers.get(&worker.node);
        let grace = Duration::from_millis(worker.warm_up_ms);
        let fresh = (worker.warm_up_ms > 0).then(|| self.now + grace);
        let (registered, since, warm_until) = match held {
            Some(held) if held.worker.incarnation == worker.incarnation => {
                let same = held.worker == worker;
                // It may end its warm-up and not prolong it, or silence could be put off for ever.
                let warm_until = held.warm_until.filter(|_| worker.warm_up_ms > 0);
                (if same { Registered::Renewed } else { Registered::Updated }, held.since, warm_until)
            }
            Some(_) if standing == Standing::New => (Registered::Replaced, self.now, fresh),
            // A node that is free may go back to the incarnation that left it last.
            None if standing != Standing::Superseded => {
                if self.workers.len() >= self.limits.workers {
                    return Err(Refusal::Full { workers: self.workers.len() });
                }
                (Registered::Created, self.now, fresh)
            }
            _ => return Err(self.stale(&worker.node, worker.incarnation)),
        };
        self.fits(&worker)?;
        let expires = self.now + Duration::from_millis(worker.ttl_ms);
        let before = self.remove(&worker.node);
        self.count_change(before.as_ref(), &worker, registered);
        self.insert(Held { worker, since, expires, warm_until });
        Ok(registered)
    }

    /// Starts a worker's time again. Where another incarnation holds the node, the caller was replaced: it has
    /// registered before, or it would not renew.
    pub fn renew(&mut self, now: Duration, node: &NodeId, incarnation: Incarnation) -> Result<(), Refusal> {
        self.sweep(now);
        let now = self.now;
        let held = self.held_by(node, incarnation)?;
        let before = held.lapses();
        held.expires = now + Duration::from_millis(held.worker.ttl_ms);
        let after = held.lapses();
        self.expiries.remove(&(before, node.clone()));
        self.expiries.insert((after, node.clone()));
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
        self.held_by(node, incarnation)?;
        self.remove(node);
        self.history.left(node, incarnation);
        self.revision += 1;
        Ok(())
    }

    /// Says for some time which data-parallel ranks serve these rooms of a group.
    pub fn tell_rooms(
        &mut self,
        now: Duration,
        group: &GroupId,
        rooms: &[(u64, u32)],
        keep: Duration,
    ) -> Result<(), RoomRefusal> {
        self.sweep(now);
        self.limits.check_keep(keep)?;
        rooms::admit(group, self.topology(group)?, rooms)?;
        self.rooms.tell(self.now, keep, group, rooms)?;
        self.tally.rooms_told += rooms.len() as u64;
        Ok(())
    }

    /// Which data-parallel rank of a group serves each of these rooms.
    pub fn dp_ranks(
        &mut self,
        now: Duration,
        group: &GroupId,
        rooms: &[u64],
    ) -> Result<Vec<DpRank>, RoomRefusal> {
        self.sweep(now);
        let topology = self.topology(group)?;
        let rank = |room: &u64| match topology.rooms {
            RoomPolicy::Follow => rooms::follow(*room, topology),
            RoomPolicy::Told => rooms::within(self.rooms.rank(group, *room), topology),
        };
        Ok(rooms.iter().map(rank).collect())
    }

    /// A group, if any of its members is registered.
    pub fn group(&mut self, now: Duration, group: &GroupId, counted: Counted) -> Option<Group> {
        self.sweep(now);
        self.summed_up(group, counted)
    }

    /// All groups of which any member is registered, ordered by name.
    pub fn groups(&mut self, now: Duration, counted: Counted) -> Vec<Group> {
        self.sweep(now);
        self.groups.keys().filter_map(|group| self.summed_up(group, counted)).collect()
    }

    /// Grows whenever a list of the workers would show something else.
    pub fn revision(&mut self, now: Duration) -> u64 {
        self.sweep(now);
        self.revision
    }

    /// When a list of the workers will show something else if nobody calls: a worker expires, or its time to warm up
    /// is over.
    pub fn next_change(&self) -> Option<Duration> {
        let first = |times: &BTreeSet<(Duration, NodeId)>| times.first().map(|(time, _)| *time);
        first(&self.expiries).into_iter().chain(first(&self.warm_ends)).min()
    }

    /// What has happened so far, and how many rooms are held.
    pub fn tally(&mut self, now: Duration) -> (Tally, usize) {
        self.sweep(now);
        (self.tally, self.rooms.len())
    }

    /// The workers that match, ordered by node.
    pub fn find(&mut self, now: Duration, query: &Query) -> Vec<Listed> {
        self.sweep(now);
        let matching = self.workers.values().filter(|held| query.matches(&held.worker, held.state()));
        matching.map(|held| held.listed(self.now)).collect()
    }

    /// How many workers match.
    pub fn count(&mut self, now: Duration, query: &Query) -> usize {
        self.sweep(now);
        self.workers.values().filter(|held| query.matches(&held.worker, held.state())).count()
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

    fn fits(&self, worker: &Worker) -> Result<(), Misfit> {
        let Some(member) = &worker.member else { return Ok(()) };
        let Some(ranks) = self.groups.get(member.group()) else { return Ok(()) };
        // All others agree with each other, so one of them speaks for all; who has the ranks is asked apart.
        let other = ranks.values().find(|node| **node != worker.node);
        for node in other.into_iter().chain(ranks.get(&member.ranks())) {
            if let Some(held) = self.workers.get(node) {
                fits(worker, &held.worker)?;
            }
        }
        Ok(())
    }

    fn topology(&self, group: &GroupId) -> Result<&Topology, RoomRefusal> {
        let unknown = || RoomRefusal::UnknownGroup { group: group.clone() };
        let held = self.members(group).next().ok_or_else(unknown)?;
        held.worker.member.as_ref().map(|member| member.topology()).ok_or_else(unknown)
    }

    fn summed_up(&self, group: &GroupId, counted: Counted) -> Option<Group> {
        Group::of(self.members(group).map(|held| (&held.worker, held.state())), counted)
    }

    fn members(&self, group: &GroupId) -> impl Iterator<Item = &Held> {
        let nodes = self.groups.get(group).into_iter().flat_map(BTreeMap::values);
        nodes.filter_map(|node| self.workers.get(node))
    }

    fn insert(&mut self, held: Held) {
        let node = held.worker.node.clone();
        self.expiries.insert((held.lapses(), node.clone()));
        if let Some(end) = held.warm_until {
            self.warm_ends.insert((end, node.clone()));
        }
        if let Some(member) = &held.worker.member {
            self.groups.entry(member.group().clone()).or_default().insert(member.ranks(), node.clone());
        }
        self.workers.insert(node, held);
    }

    fn remove(&mut self, node: &NodeId) -> Option<Held> {
        let held = self.workers.remove(node)?;
        self.expiries.remove(&(held.lapses(), node.clone()));
        if let Some(end) = held.warm_until {
            self.warm_ends.remove(&(end, node.clone()));
        }
        if let Some(member) = &held.worker.member
            && let Some(ranks) = self.groups.get_mut(member.group())
        {
            ranks.remove(&member.ranks());
            if ranks.is_empty() {
                self.groups.remove(member.group());
            }
        }
        Some(held)
    }

    fn count_change(&mut self, before: Option<&Held>, worker: &Worker, registered: Registered) {
        if registered != Registered::Renewed {
            self.revision += 1;
        }
        let Some(before) = before else { return };
        if registered == Registered::Replaced {
            self.history.left(&worker.node, before.worker.incarnation);
            self.tally.replaced += 1;
        }
        if before.worker.address != worker.address {
            self.tally.moved += 1;
        }
    }

    fn sweep(&mut self, now: Duration) {
        self.now = self.now.max(now);
        while self.warm_ends.first().is_some_and(|(end, _)| *end <= self.now) {
            if let Some((_, node)) = self.warm_ends.pop_first()
                && let Some(held) = self.workers.get_mut(&node)
            {
                let before = held.lapses();
                held.warm_until = None;
                // One whose time to live was over first expires at this moment, as a place in the order is of no use.
                self.expiries.remove(&(before, node.clone()));
                self.expiries.insert((held.expires, node));
                self.revision += 1;
                self.tally.overdue += 1;
            }
        }
        while self.expiries.first().is_some_and(|(expires, _)| *expires <= self.now) {
            if let Some((_, node)) = self.expiries.pop_first()
                && let Some(held) = self.remove(&node)
            {
                self.history.left(&node, held.worker.incarnation);
                self.revision += 1;
                self.tally.expired += 1;
            }
        }
        self.tally.rooms_expired += self.rooms.sweep(self.now);
    }
}

impl Limits {
    /// Whether a worker asks for times that are allowed.
    pub(crate) fn check(&self, worker: &Worker) -> Result<(), Refusal> {
        if !self.ttl_ms.contains(&worker.ttl_ms) {
            return Err(Refusal::Ttl { given: worker.ttl_ms, allowed: self.ttl_ms.clone() });
        }
        if worker.warm_up_ms > self.warm_up_ms {
            return Err(Refusal::WarmUp { given: worker.warm_up_ms, most: self.warm_up_ms });
        }
        Ok(())
    }

    /// Whether rooms may be kept for so long.
    pub(crate) fn check_keep(&self, keep: Duration) -> Result<(), RoomRefusal> {
        let given = whole_ms(keep.as_millis());
        if (1..=self.room_ms).contains(&given) {
            return Ok(());
        }
        Err(RoomRefusal::Keep { given, most: self.room_ms })
    }
}

impl Held {
    fn state(&self) -> State {
        if self.warm_until.is_some() { State::Warming } else { State::Ready }
    }

    /// When the worker expires unless it renews: its silence is not held against it while it warms up.
    fn lapses(&self) -> Duration {
        self.warm_until.map_or(self.expires, |warm_until| warm_until.max(self.expires))
    }

    fn listed(&self, now: Duration) -> Listed {
        let remaining = self.lapses().saturating_sub(now);
        Listed {
            worker: self.worker.clone(),
            state: self.state(),
            age_ms: Some(whole_ms(now.saturating_sub(self.since).as_nanos() / NANOS_PER_MS)),
            remaining_ms: Some(whole_ms(remaining.as_nanos().div_ceil(NANOS_PER_MS))),
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
    use crate::worker::{Labels, Role};

    fn worker(node: &str, incarnation: u64, ttl_ms: u64) -> Worker {
        Worker {
            node: NodeId::new(node).unwrap(),
            incarnation: Incarnation::new(incarnation),
            role: Role::Decode,
            address: "10.0.0.1:7000".parse().unwrap(),
            ttl_ms,
            warm_up_ms: ttl_ms % 3,
            member: None,
            labels: Labels::none(),
        }
    }

    #[test]
    fn memory_is_bounded_however_many_nodes_and_incarnations_come() {
        let limits = Limits {
            workers: 3,
            remembered_nodes: 5,
            remembered_incarnations: 2,
            ttl_ms: 1..=100,
            ..Limits::default()
        };
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
            assert!(registry.warm_ends.len() <= registry.workers.len());
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
