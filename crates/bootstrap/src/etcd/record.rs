//! What lies in etcd, and under which keys.
//!
//! | key, after the prefix | value | lease |
//! |---|---|---|
//! | `live/{group}/{node}/kept` | the worker | its time to live, kept alive by renewals |
//! | `live/{group}/{node}/warming` | the worker | its time to warm up |
//! | `past/{node}` | the node's incarnations and its group | a day |
//! | `groups/{group}` | nothing; put at each registration, so that two of them cannot pass each other | a day |
//! | `rooms/{group}/{room}` | the data-parallel rank | the time for which it is kept |
//!
//! A worker is registered while either of its first two keys is there, and warms up while the second is. So its silence
//! is not held against it before its time to warm up is over. The group is empty for a worker without one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::gateway::{Pair, Range};
use crate::group::GroupId;
use crate::worker::{Incarnation, Listed, NodeId, State, Worker};

#[derive(Debug)]
pub(super) struct Keys {
    prefix: String,
}

impl Keys {
    pub(super) fn new(prefix: String) -> Keys {
        Keys { prefix }
    }

    /// What the keys of all live workers begin with, or of those of one group.
    pub(super) fn live(&self, group: Option<&GroupId>) -> String {
        let prefix = &self.prefix;
        group.map_or_else(|| format!("{prefix}live/"), |group| format!("{prefix}live/{group}/"))
    }

    /// What the keys of one live worker begin with.
    pub(super) fn node(&self, group: Option<&GroupId>, node: &NodeId) -> String {
        format!("{}live/{}/{node}/", self.prefix, group.map_or("", GroupId::as_str))
    }

    pub(super) fn kept(&self, group: Option<&GroupId>, node: &NodeId) -> String {
        self.node(group, node) + KEPT
    }

    pub(super) fn warming(&self, group: Option<&GroupId>, node: &NodeId) -> String {
        self.node(group, node) + WARMING
    }

    pub(super) fn past(&self, node: &NodeId) -> String {
        format!("{}past/{node}", self.prefix)
    }

    pub(super) fn fence(&self, group: &GroupId) -> String {
        format!("{}groups/{group}", self.prefix)
    }

    /// What the keys of a group's rooms begin with.
    pub(super) fn rooms(&self, group: &GroupId) -> String {
        format!("{}rooms/{group}/", self.prefix)
    }

    pub(super) fn room(&self, group: &GroupId, room: u64) -> String {
        format!("{}{room}", self.rooms(group))
    }

    /// The workers that a range of live keys holds. What does not belong there was put there by somebody else: it is
    /// passed over and told, and harms nobody but its own node.
    pub(super) fn entries(&self, range: Range) -> BTreeMap<NodeId, Entry> {
        let mut entries: BTreeMap<NodeId, Entry> = BTreeMap::new();
        for pair in range.kvs {
            let Some((worker, kind)) = self.worker(&pair) else {
                let key = String::from_utf8_lossy(&pair.key).into_owned();
                tracing::warn!(%key, "a key in etcd holds no worker, or another than it should; it is passed over");
                continue;
            };
            let entry = entries.entry(worker.node.clone()).or_default();
            match kind {
                Kind::Kept => entry.kept = Some((worker, pair.lease)),
                Kind::Warming => entry.warming = Some((worker, pair.lease)),
            }
        }
        entries
    }

    fn worker(&self, pair: &Pair) -> Option<(Worker, Kind)> {
        let key = std::str::from_utf8(&pair.key).ok()?;
        let mut parts = key.strip_prefix(&self.prefix)?.strip_prefix("live/")?.split('/');
        let (group, node, kind) = (parts.next()?, parts.next()?, parts.next()?);
        let kind = match (kind, parts.next()) {
            (KEPT, None) => Kind::Kept,
            (WARMING, None) => Kind::Warming,
            _ => return None,
        };
        let worker: Worker = serde_json::from_slice(&pair.value).ok()?;
        let own_group = worker.member.as_ref().map_or("", |member| member.group().as_str());
        (worker.node.as_str() == node && own_group == group).then_some((worker, kind))
    }
}

enum Kind {
    Kept,
    Warming,
}

/// What etcd holds of one live worker, each with its lease. Both are empty if it is not live.
#[derive(Debug, Default)]
pub(super) struct Entry {
    pub(super) kept: Option<(Worker, i64)>,
    pub(super) warming: Option<(Worker, i64)>,
}

impl Entry {
    pub(super) fn is_empty(&self) -> bool {
        self.kept.is_none() && self.warming.is_none()
    }

    pub(super) fn worker(&self) -> Option<&Worker> {
        self.kept.as_ref().or(self.warming.as_ref()).map(|(worker, _)| worker)
    }

    pub(super) fn group(&self) -> Option<&GroupId> {
        self.worker()?.member.as_ref().map(|member| member.group())
    }

    pub(super) fn listed(&self) -> Option<Listed> {
        let worker = self.worker()?.clone();
        let warms =
            self.warming.as_ref().is_some_and(|(warming, _)| warming.incarnation == worker.incarnation);
        let state = if warms { State::Warming } else { State::Ready };
        Some(Listed { worker, state, age_ms: None, remaining_ms: None })
    }
}

/// What is remembered of a node: which incarnations were here, and where it was last.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Past {
    /// Oldest first, with the one that is or was here last at the end.
    incarnations: Vec<Incarnation>,
    pub(super) group: Option<GroupId>,
    #[serde(skip)]
    pub(super) lease: i64,
}

/// What is known of one incarnation of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    New,
    Latest,
    Superseded,
}

impl Past {
    /// With the revision in which it was changed last. What cannot be read is as good as forgotten.
    pub(super) fn read(range: Range) -> Option<(Past, i64)> {
        let pair = range.kvs.into_iter().next()?;
        let past = serde_json::from_slice(&pair.value).unwrap_or(Past {
            incarnations: Vec::new(),
            group: None,
            lease: 0,
        });
        Some((Past { lease: pair.lease, ..past }, pair.mod_revision))
    }

    /// What is to be remembered when this incarnation has registered in this group.
    pub(super) fn after(
        before: Option<&Past>,
        incarnation: Incarnation,
        group: Option<&GroupId>,
        most: usize,
    ) -> Past {
        let earlier = before.map_or(&[][..], |past| &past.incarnations);
        let earlier = earlier.iter().copied().filter(|earlier| *earlier != incarnation);
        let mut incarnations: Vec<Incarnation> = earlier.chain([incarnation]).collect();
        // The latest, and as many as left before it.
        incarnations.drain(..incarnations.len().saturating_sub(most + 1));
        Past { incarnations, group: group.cloned(), lease: 0 }
    }

    pub(super) fn standing(&self, incarnation: Incarnation) -> Standing {
        if self.incarnations.last() == Some(&incarnation) {
            Standing::Latest
        } else if self.incarnations.contains(&incarnation) {
            Standing::Superseded
        } else {
            Standing::New
        }
    }
}

pub(super) fn encode(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("every key is a string and every value has a JSON form")
}

const KEPT: &str = "kept";
const WARMING: &str = "warming";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::worker::{Labels, Role};

    fn worker(node: &str) -> Worker {
        Worker {
            node: NodeId::new(node).unwrap(),
            incarnation: Incarnation::new(1),
            role: Role::Prefill,
            address: "10.0.0.1:7000".parse().unwrap(),
            ttl_ms: 1_000,
            warm_up_ms: 0,
            member: None,
            labels: Labels::none(),
        }
    }

    fn pair(key: &[u8], value: &[u8]) -> Pair {
        Pair { key: key.to_vec(), value: value.to_vec(), mod_revision: 1, lease: 2 }
    }

    #[test]
    fn a_worker_lies_under_its_own_name_and_group_alone() {
        let keys = Keys::new("p/".to_owned());
        let (n, encoded) = (worker("n"), encode(&worker("n")));
        assert_eq!(keys.kept(None, &n.node), "p/live//n/kept");
        let group = GroupId::new("g").unwrap();
        assert!(keys.warming(Some(&group), &n.node).starts_with(&keys.live(Some(&group))));
        for (key, there) in [
            ("p/live//n/kept", true),
            ("p/live//n/warming", true),
            ("p/live//n/kept/", false),
            ("p/live//n/other", false),
            ("p/live//m/kept", false),
            ("p/live/g/n/kept", false),
            ("p/live/n", false),
            ("q/live//n/kept", false),
        ] {
            let entries = keys.entries(Range { kvs: vec![pair(key.as_bytes(), &encoded)] });
            assert_eq!(entries.len(), usize::from(there), "{key}");
        }
        let both = [("p/live//n/kept", 1), ("p/live//n/warming", 2)];
        for (incarnation, state) in [(1, State::Warming), (2, State::Ready)] {
            let kvs = both.map(|(key, second)| {
                let incarnation = Incarnation::new(if second == 2 { incarnation } else { 1 });
                pair(key.as_bytes(), &encode(&Worker { incarnation, ..worker("n") }))
            });
            let entries = keys.entries(Range { kvs: kvs.into() });
            assert_eq!(
                entries[&n.node].listed().unwrap().state,
                state,
                "of another start is no warm-up of this one"
            );
        }
    }

    #[test]
    fn the_past_is_bounded_and_in_order() {
        let mut past: Option<Past> = None;
        for number in [1, 2, 2, 3, 4] {
            past = Some(Past::after(past.as_ref(), Incarnation::new(number), None, 2));
        }
        let past = past.unwrap();
        let standing = |number| past.standing(Incarnation::new(number));
        assert_eq!(standing(1), Standing::New, "only two before the latest are kept");
        assert_eq!([2, 3, 4].map(standing), [Standing::Superseded, Standing::Superseded, Standing::Latest]);
        let read = Past::read(Range { kvs: vec![pair(b"k", &encode(&past))] }).unwrap();
        assert_eq!((read.0.incarnations, read.0.lease, read.1), (past.incarnations, 2, 1));
        let garbage = Past::read(Range { kvs: vec![pair(b"k", b"\xff")] }).unwrap();
        assert_eq!((garbage.0.incarnations, garbage.1), (vec![], 1));
    }

    proptest! {
        #[test]
        fn any_keys_and_values_are_read_or_passed_over(
            pairs in proptest::collection::vec(
                (
                    prop_oneof!["p/live/(g)?/(n|m|[^/]{0,3})/(kept|warming)".prop_map(String::into_bytes),
                        proptest::collection::vec(any::<u8>(), 0..20)],
                    prop_oneof![Just(encode(&worker("n"))), proptest::collection::vec(any::<u8>(), 0..40)],
                ),
                0..8,
            ),
        ) {
            let kvs = |pairs: &[(Vec<u8>, Vec<u8>)]| pairs.iter().map(|(key, value)| pair(key, value)).collect();
            let entries = Keys::new("p/".to_owned()).entries(Range { kvs: kvs(&pairs) });
            for (node, entry) in &entries {
                prop_assert_eq!(&entry.worker().unwrap().node, node);
                prop_assert!(entry.listed().is_some());
            }
            let _ = Past::read(Range { kvs: kvs(&pairs) });
        }
    }
}
