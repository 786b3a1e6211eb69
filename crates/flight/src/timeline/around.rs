//! What happened between two nodes, and not to one room: it belongs to the story of each of their rooms of that time.

use std::collections::{BTreeMap, BTreeSet};

use super::{Entry, Room};
use crate::event::Kind;

/// Of each life, by the node that it was with. A room's part is looked up when it is told: copied into every room, it
/// would be as much as rooms times events.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Around {
    between: Vec<BTreeMap<String, Between>>,
}

/// Places, in order.
#[derive(Clone, Debug, Default, PartialEq)]
struct Between {
    all: Vec<usize>,
    downs: Vec<usize>,
}

impl Around {
    pub fn of(sources: usize, entries: &[Entry]) -> Self {
        let mut between: Vec<BTreeMap<String, Between>> = vec![BTreeMap::new(); sources];
        for (at, entry) in entries.iter().enumerate() {
            let (None, Some(node)) = (entry.room(), entry.peer_node()) else { continue };
            let nodes = &mut between[entry.source];
            if !nodes.contains_key(node) {
                nodes.insert(node.to_owned(), Between::default());
            }
            if let Some(found) = nodes.get_mut(node) {
                found.all.push(at);
                if entry.event.kind == Kind::SessionDown {
                    found.downs.push(at);
                }
            }
        }
        Self { between }
    }

    /// The last end of a session of the same two before an event, and not before another.
    pub fn session_down(&self, entries: &[Entry], from: usize, before: usize) -> Option<usize> {
        let entry = &entries[before];
        let downs = &self.between[entry.source].get(entry.peer_node()?)?.downs;
        let down = downs[..downs.partition_point(|&at| at < before)].last().copied();
        down.filter(|&at| at >= from)
    }

    /// A room's events with those of its sessions that lie between them, and the release of its own grants; and how many
    /// are too many to be told.
    pub fn told(&self, all: &[Entry], room: &Room) -> (Vec<usize>, usize) {
        let entries = &room.entries;
        let (Some(&first), Some(&last)) = (entries.first(), entries.last()) else { return (Vec::new(), 0) };
        let with: BTreeSet<(usize, &str)> =
            entries.iter().filter_map(|&at| Some((all[at].source, all[at].peer_node()?))).collect();
        let grants: BTreeSet<&str> =
            entries.iter().filter_map(|&at| all[at].event.grant.as_deref()).collect();
        let mut more: Vec<usize> = Vec::new();
        for (source, node) in with {
            let Some(Between { all: found, .. }) = self.between[source].get(node) else { continue };
            let from = found.partition_point(|&at| at < first);
            let to = found.partition_point(|&at| at <= last);
            more.extend(found[from..to].iter().filter(|&&at| {
                let event = &all[at].event;
                match event.kind {
                    Kind::ReleaseSent => event.grant.as_deref().is_some_and(|grant| grants.contains(grant)),
                    _ => true,
                }
            }));
        }
        more.sort_unstable();
        // The last ones are nearer to the end of it.
        let left_out = more.len().saturating_sub(MOST_AROUND);
        more.drain(..left_out);
        more.extend(entries);
        more.sort_unstable();
        (more, left_out)
    }
}

/// Sessions come and go a few times in the life of a room, and not more often.
const MOST_AROUND: usize = 256;
