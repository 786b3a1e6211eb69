//! A table of bounded size whose ids are never used again: for the lanes and regions of a port.

use std::collections::VecDeque;

use crate::Error;

/// Values by id. Of an id the lower bits name a slot, and the upper bits count the uses of that slot.
#[derive(Debug)]
pub struct Slab<T> {
    slots: Vec<Slot<T>>,
    free: VecDeque<u32>,
    limit: u32,
    slot_bits: u32,
}

#[derive(Debug)]
struct Slot<T> {
    /// The id of the value that is here, or of the next one. Beyond 32 bits, the slot has no ids left.
    id: u64,
    value: Option<T>,
}

impl<T> Slab<T> {
    /// An empty table for up to `limit` values at a time.
    pub fn new(limit: u32) -> Self {
        let slot_bits = limit.next_power_of_two().trailing_zeros();
        Self { slots: Vec::new(), free: VecDeque::new(), limit, slot_bits }
    }

    /// Adds a value; `None` when the table is full, or when the ids of all free slots are spent.
    pub fn insert(&mut self, value: T) -> Option<u32> {
        self.insert_with(|_, _| value)
    }

    /// Adds a value that knows its id and its [slot](Slab::slot_of).
    pub fn insert_with(&mut self, value: impl FnOnce(u32, usize) -> T) -> Option<u32> {
        let at = match self.free.pop_front() {
            Some(at) => at,
            None if (self.slots.len() as u32) < self.limit => {
                let at = self.slots.len() as u32;
                self.slots.push(Slot { id: u64::from(at), value: None });
                at
            }
            None => return None,
        };
        let slot = &mut self.slots[at as usize];
        slot.value = Some(value(slot.id as u32, at as usize));
        Some(slot.id as u32)
    }

    /// Takes a value out.
    pub fn remove(&mut self, id: u32) -> Option<T> {
        let at = self.slot_of(id);
        let slot = self.slots.get_mut(at).filter(|slot| slot.id == u64::from(id))?;
        let value = slot.value.take()?;
        slot.id += 1 << self.slot_bits;
        if slot.id <= u64::from(u32::MAX) {
            self.free.push_back(at as u32);
        }
        Some(value)
    }

    /// The value with this id.
    #[inline]
    pub fn get(&self, id: u32) -> Option<&T> {
        self.slots.get(self.slot_of(id)).filter(|slot| slot.id == u64::from(id))?.value.as_ref()
    }

    /// The value with this id, to be changed.
    #[inline]
    pub fn get_mut(&mut self, id: u32) -> Option<&mut T> {
        let at = self.slot_of(id);
        self.slots.get_mut(at).filter(|slot| slot.id == u64::from(id))?.value.as_mut()
    }

    /// The error of an [`insert`](Slab::insert) that found no place.
    pub fn full(&self, what: &'static str) -> Error {
        Error::Limit { what, limit: u64::from(self.limit) }
    }

    /// Whether `id` named something once, and does no more.
    pub fn is_spent(&self, id: u32) -> bool {
        self.slots.get(self.slot_of(id)).is_some_and(|slot| u64::from(id) < slot.id)
    }

    /// All values with their ids.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.slots.iter().filter_map(|slot| Some((slot.id as u32, slot.value.as_ref()?)))
    }

    /// All values with their ids, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut T)> {
        self.slots.iter_mut().filter_map(|slot| Some((slot.id as u32, slot.value.as_mut()?)))
    }

    /// Which slot an id names: below the limit, and no other value's as long as this one is in the table.
    #[inline]
    pub fn slot_of(&self, id: u32) -> usize {
        (id & ((1 << self.slot_bits) - 1)) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_never_used_again() {
        let mut slab = Slab::new(3);
        let mut seen = std::collections::HashSet::new();
        for round in 0..100 {
            let ids: Vec<u32> = (0..3).map(|i| slab.insert(round * 3 + i).unwrap()).collect();
            assert_eq!(slab.insert(0), None);
            for (i, id) in ids.into_iter().enumerate() {
                assert!(seen.insert(id), "{id} came twice");
                assert_eq!(slab.get(id), Some(&(round * 3 + i as i32)));
                assert!(!slab.is_spent(id));
                assert_eq!(slab.remove(id), Some(round * 3 + i as i32));
                assert_eq!(slab.get(id), None);
                assert_eq!(slab.remove(id), None);
                assert!(slab.is_spent(id));
            }
        }
        assert!(!slab.is_spent(3), "slot 3 does not exist");
    }

    #[test]
    fn a_slot_whose_ids_are_spent_is_retired() {
        let mut slab = Slab::new(1 << 31);
        let first = slab.insert('a').unwrap();
        slab.remove(first);
        let last = slab.insert('b').unwrap();
        assert_eq!(last, first + (1 << 31));
        slab.remove(last);
        assert!(slab.is_spent(last));
        assert_eq!(slab.insert('c'), Some(1));
    }
}
