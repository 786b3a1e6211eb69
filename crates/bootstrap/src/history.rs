//! Which incarnations of a node were here before. Incarnations are random and have no order of their own, so
//! the order in which they registered is kept: one that was replaced may not come back.

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::worker::{Incarnation, NodeId};

/// The incarnations that are no longer held, for a bounded number of nodes and a bounded number of each. The
/// node that changed longest ago is forgotten first.
pub(crate) struct History {
    nodes_max: usize,
    incarnations_max: usize,
    nodes: HashMap<NodeId, Past>,
    /// Every key of `nodes` once, by its `touched`.
    by_age: BTreeMap<u64, NodeId>,
    touches: u64,
}

struct Past {
    /// Oldest first, never empty.
    incarnations: VecDeque<Incarnation>,
    touched: u64,
}

/// What the history knows of one incarnation of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It was not here, as far as is remembered.
    New,
    /// It left last, and none has left after it.
    Latest,
    /// Another one left after it.
    Superseded,
}

impl History {
    pub(crate) fn new(nodes_max: usize, incarnations_max: usize) -> History {
        History { nodes_max, incarnations_max, nodes: HashMap::new(), by_age: BTreeMap::new(), touches: 0 }
    }

    pub(crate) fn standing(&self, node: &NodeId, incarnation: Incarnation) -> Standing {
        let Some(past) = self.nodes.get(node) else {
            return Standing::New;
        };
        if past.incarnations.back() == Some(&incarnation) {
            Standing::Latest
        } else if past.incarnations.contains(&incarnation) {
            Standing::Superseded
        } else {
            Standing::New
        }
    }

    /// Notes that this incarnation of the node is no longer held.
    pub(crate) fn left(&mut self, node: &NodeId, incarnation: Incarnation) {
        if self.nodes_max == 0 || self.incarnations_max == 0 {
            return;
        }
        self.touches += 1;
        let past = self
            .nodes
            .entry(node.clone())
            .or_insert_with(|| Past { incarnations: VecDeque::new(), touched: 0 });
        self.by_age.remove(&past.touched);
        past.touched = self.touches;
        self.by_age.insert(self.touches, node.clone());
        // An incarnation that expired, came back and left again is the latest already.
        if past.incarnations.back() != Some(&incarnation) {
            past.incarnations.push_back(incarnation);
        }
        if past.incarnations.len() > self.incarnations_max {
            past.incarnations.pop_front();
        }
        if self.nodes.len() > self.nodes_max
            && let Some((_, oldest)) = self.by_age.pop_first()
        {
            self.nodes.remove(&oldest);
        }
    }

    #[cfg(test)]
    pub(crate) fn size(&self) -> (usize, usize) {
        assert_eq!(self.nodes.len(), self.by_age.len());
        let most = self.nodes.values().map(|past| past.incarnations.len()).max();
        (self.nodes.len(), most.unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Incarnation = Incarnation::new(1);
    const B: Incarnation = Incarnation::new(2);
    const C: Incarnation = Incarnation::new(3);

    #[test]
    fn the_latest_is_told_from_those_before_it() {
        let mut history = History::new(8, 2);
        let node = NodeId::new("n").unwrap();
        assert_eq!(history.standing(&node, A), Standing::New);
        history.left(&node, A);
        assert_eq!(history.standing(&node, A), Standing::Latest);
        history.left(&node, B);
        // One that comes back and leaves again takes no second place.
        history.left(&node, B);
        assert_eq!(history.standing(&node, A), Standing::Superseded);
        assert_eq!(history.standing(&node, B), Standing::Latest);
        history.left(&node, C);
        assert_eq!(history.standing(&node, A), Standing::New, "only two are kept");
        assert_eq!(history.standing(&node, B), Standing::Superseded);
    }

    #[test]
    fn the_node_that_changed_longest_ago_is_forgotten() {
        let mut history = History::new(2, 2);
        let [x, y, z] = ["x", "y", "z"].map(|name| NodeId::new(name).unwrap());
        history.left(&x, A);
        history.left(&y, A);
        history.left(&x, B);
        history.left(&z, A);
        assert_eq!(history.standing(&y, A), Standing::New);
        assert_eq!(history.standing(&x, A), Standing::Superseded);
        assert_eq!(history.standing(&z, A), Standing::Latest);
        assert_eq!(history.size(), (2, 2));
    }
}
