//! Hearing of workers that come, move and leave.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::client::{Client, Pace};
use crate::error::Error;
use crate::exchange::Deadline;
use crate::query::{Mark, Query, Until, Wait};
use crate::wire::Workers;
use crate::worker::{Listed, NodeId};

/// Tells how the list of the workers that match a query changes, made by [`Client::watch`]. The first call of
/// [`Watch::next`] tells all that are there.
///
/// A registry that was restarted has forgotten everyone for a moment. That is not taken for their end: a worker that is
/// missing then is told as gone only when it has not registered again in the time that its entry still had.
#[derive(Debug)]
pub struct Watch {
    client: Client,
    query: Query,
    pace: Pace,
    seen: Seen,
}

/// What happened to one worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is there.
    Came(Listed),
    /// The node is another start of the worker, or has another address: what was known of it is stale.
    Moved {
        /// What it was.
        from: Box<Listed>,
        /// What it is.
        to: Listed,
    },
    /// It says something else of itself, or has become ready.
    Changed(Listed),
    /// It is no longer there: it left, expired, or no longer matches.
    Left(Listed),
}

impl Watch {
    pub(crate) fn new(client: Client, query: Query) -> Watch {
        Watch { client, query, pace: Pace::new(), seen: Seen::default() }
    }

    /// Waits for a change and tells all that there are, ordered by node; none if there is none in this time. While the
    /// registry is away it goes on asking, and gives the reason when the time is over.
    pub fn next(&mut self, time: Duration) -> Result<Vec<Change>, Error> {
        let deadline = Deadline::after(time);
        let (mut last, mut heard) = (None, false);
        while let Some((whole, by)) = self.pace.next(deadline, self.client.call_time()) {
            let asked = Instant::now();
            let departs = self.seen.next_departure().map(|at| at.saturating_duration_since(asked));
            let wait = departs.map_or(whole, |departs| departs.min(whole));
            let until = self.seen.mark.clone().map(|mark| Wait { until: Until::Changed(mark), time: wait });
            let mut kept = false;
            match self.client.find_by(&self.query, until.as_ref(), by) {
                Ok(list) => {
                    kept = asked.elapsed() >= wait / 2;
                    (last, heard) = (None, true);
                    let changes = self.seen.take_in(list, Instant::now());
                    if !changes.is_empty() {
                        return Ok(changes);
                    }
                }
                Err(error) if heard && self.pace.was_cut_short(by, &error) => {}
                Err(error) if error.retry_helps() => last = Some(error),
                Err(error) => return Err(error),
            }
            self.pace.pause(deadline, kept);
        }
        last.map_or(Ok(Vec::new()), Err)
    }
}

/// What a watch has told so far. No clock and no socket.
#[derive(Debug, Default)]
struct Seen {
    mark: Option<Mark>,
    workers: BTreeMap<NodeId, Known>,
}

#[derive(Debug)]
struct Known {
    listed: Listed,
    /// When its entry would have ended without a renewal, as far as was known when it was listed last.
    ends: Instant,
    /// A registry that has forgotten everyone does not list it.
    in_doubt: bool,
}

impl Seen {
    fn next_departure(&self) -> Option<Instant> {
        self.workers.values().filter(|known| known.in_doubt).map(|known| known.ends).min()
    }

    fn take_in(&mut self, list: Workers, now: Instant) -> Vec<Change> {
        let forgot = self.mark.as_ref().is_some_and(|before| list.mark.forgot(before));
        self.mark = Some(list.mark);
        let mut before = std::mem::take(&mut self.workers);
        let mut changes = Vec::new();
        for listed in list.workers {
            let node = listed.worker.node.clone();
            changes.extend(change(before.remove(&node).map(|known| known.listed), &listed));
            let left_ms = listed.remaining_ms.unwrap_or(listed.worker.ttl_ms.max(listed.worker.warm_up_ms));
            let known = Known { listed, ends: now + Duration::from_millis(left_ms), in_doubt: false };
            self.workers.insert(node, known);
        }
        for (node, mut known) in before {
            known.in_doubt |= forgot;
            if known.in_doubt && now < known.ends {
                self.workers.insert(node, known);
            } else {
                changes.push(Change::Left(known.listed));
            }
        }
        changes.sort_by(|a, b| a.node().cmp(b.node()));
        changes
    }
}

impl Change {
    fn node(&self) -> &NodeId {
        let (Change::Came(listed)
        | Change::Moved { to: listed, .. }
        | Change::Changed(listed)
        | Change::Left(listed)) = self;
        &listed.worker.node
    }
}

fn change(before: Option<Listed>, now: &Listed) -> Option<Change> {
    let Some(before) = before else { return Some(Change::Came(now.clone())) };
    let (was, is) = (&before.worker, &now.worker);
    if was.incarnation != is.incarnation || was.address != is.address {
        return Some(Change::Moved { from: Box::new(before), to: now.clone() });
    }
    (was != is || before.state != now.state).then(|| Change::Changed(now.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::{Incarnation, Labels, Role, State, Worker};

    fn listed(node: &str, incarnation: u64, port: u16) -> Listed {
        let worker = Worker {
            node: NodeId::new(node).unwrap(),
            incarnation: Incarnation::new(incarnation),
            role: Role::Prefill,
            address: format!("10.0.0.1:{port}").parse().unwrap(),
            ttl_ms: 10_000,
            warm_up_ms: 0,
            member: None,
            labels: Labels::none(),
        };
        Listed { worker, state: State::Ready, age_ms: Some(1), remaining_ms: Some(9_000) }
    }

    fn list(epoch: u64, revision: u64, workers: &[Listed]) -> Workers {
        Workers { workers: workers.to_vec(), mark: Mark { epoch, revision } }
    }

    #[test]
    fn each_change_is_told_once_and_by_its_kind() {
        let (mut seen, now) = (Seen::default(), Instant::now());
        let [a, b] = [listed("a", 1, 1), listed("b", 1, 1)];
        let came = seen.take_in(list(1, 1, &[a.clone(), b.clone()]), now);
        assert_eq!(came, [Change::Came(a.clone()), Change::Came(b.clone())]);
        let older = Listed { age_ms: Some(2), remaining_ms: Some(3), ..a.clone() };
        assert_eq!(
            seen.take_in(list(1, 2, &[older.clone(), b.clone()]), now),
            [],
            "times alone are no change"
        );
        for moved in [listed("a", 1, 2), listed("a", 2, 2)] {
            let from = Box::new(seen.workers[&moved.worker.node].listed.clone());
            let told = seen.take_in(list(1, 3, &[moved.clone(), b.clone()]), now);
            assert_eq!(told, [Change::Moved { from, to: moved }]);
        }
        let warming = Listed { state: State::Warming, ..b.clone() };
        let told = seen.take_in(list(1, 4, std::slice::from_ref(&warming)), now);
        assert_eq!(told, [Change::Left(listed("a", 2, 2)), Change::Changed(warming)]);
    }

    #[test]
    fn a_registry_that_has_forgotten_everyone_is_no_end_of_anyone() {
        let now = Instant::now();
        let after = |ms| now + Duration::from_millis(ms);
        let [a, b] = [listed("a", 1, 1), listed("b", 1, 1)];
        // Another start of the server, or an etcd whose data was lost.
        for (epoch, revision) in [(2, 50), (1, 1)] {
            let mut seen = Seen::default();
            seen.take_in(list(1, 40, &[a.clone(), b.clone()]), now);
            assert_eq!(seen.next_departure(), None);
            assert_eq!(seen.take_in(list(epoch, revision, &[]), after(100)), []);
            assert_eq!(seen.next_departure(), Some(after(9_000)));
            assert_eq!(seen.take_in(list(epoch, revision + 1, std::slice::from_ref(&a)), after(200)), []);
            assert_eq!(seen.take_in(list(epoch, revision + 1, std::slice::from_ref(&a)), after(8_999)), []);
            let told = seen.take_in(list(epoch, revision + 1, std::slice::from_ref(&a)), after(9_000));
            assert_eq!(told, [Change::Left(b.clone())]);
            // Whoever has come back may leave as any other.
            assert_eq!(seen.take_in(list(epoch, revision + 2, &[]), after(9_001)), [Change::Left(a.clone())]);
        }
    }
}
