//! Tables that count how often their entries are visited: a turn that goes through all of them, idle ones included, is
//! found by a number, on any machine.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

/// A map in which no entry is visited uncounted, whether it is found by its key or passed on the way through all.
pub struct Table<K, V> {
    entries: BTreeMap<K, V>,
    visits: Cell<u64>,
}

impl<K: Ord, V> Table<K, V> {
    /// Visits so far.
    pub fn visits(&self) -> u64 {
        self.visits.get()
    }

    /// The entry of this key.
    pub fn get(&self, key: &K) -> Option<&V> {
        visit(&self.visits);
        self.entries.get(key)
    }

    /// The entry of this key.
    pub fn get_mut(&mut self, key: &K) -> Option<&mut V> {
        visit(&self.visits);
        self.entries.get_mut(key)
    }

    /// Whether there is an entry of this key.
    pub fn contains_key(&self, key: &K) -> bool {
        self.get(key).is_some()
    }

    /// Puts an entry in the place of the one before, which is given back.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        visit(&self.visits);
        self.entries.insert(key, value)
    }

    /// Takes an entry out.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        visit(&self.visits);
        self.entries.remove(key)
    }

    /// The place of this key.
    pub fn entry(&mut self, key: K) -> Entry<'_, K, V> {
        visit(&self.visits);
        self.entries.entry(key)
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All of them, in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.entries.iter().inspect(|_| visit(&self.visits))
    }

    /// All keys, in their order.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.iter().map(|(key, _)| key)
    }

    /// All of them, in the order of their keys.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        let visits = &self.visits;
        self.entries.values_mut().inspect(|_| visit(visits))
    }
}

impl<K, V> Default for Table<K, V> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), visits: Cell::new(0) }
    }
}

/// Counts beside any search through a tree for nothing: one thread's own number, in memory that the search reads.
fn visit(visits: &Cell<u64>) {
    visits.set(visits.get() + 1);
}
