//! Objects by number, so that a handle that is stale, of another kind or made up finds none.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::RwLock;

use crate::status::{CROSSDOCK_BAD_HANDLE, CROSSDOCK_BUSY, Fault};

/// What a handle's number is made of, from the top: the kind (8 bits), the generation of its place (32), the place (24).
/// A generation is never 0, so no handle is.
const PLACE_BITS: u32 = 24;
const KIND_SHIFT: u32 = 56;

/// All objects of one kind.
pub(crate) struct Table<T> {
    kind: u8,
    name: &'static str,
    places: RwLock<Places<T>>,
}

struct Places<T> {
    objects: Vec<Place<T>>,
    /// The one that has been free for longest is used next, so that generations are used up evenly.
    free: VecDeque<u32>,
}

struct Place<T> {
    generation: u32,
    object: Option<Arc<T>>,
}

impl<T> Table<T> {
    pub const fn new(kind: u8, name: &'static str) -> Table<T> {
        Table { kind, name, places: RwLock::new(Places { objects: Vec::new(), free: VecDeque::new() }) }
    }

    /// Gives an object a handle. What the object needs to know of it, `make` is told.
    pub fn insert(&self, make: impl FnOnce(u64) -> Arc<T>) -> Result<u64, Fault> {
        let mut places = self.places.write();
        let place = match places.free.pop_front() {
            Some(place) => place,
            None if places.objects.len() < 1 << PLACE_BITS => {
                places.objects.push(Place { generation: 1, object: None });
                places.objects.len() as u32 - 1
            }
            None => {
                let words = format!("{} {}s are open", places.objects.len(), self.name);
                return Err(Fault::new(CROSSDOCK_BUSY, words, "close those that are over").retryable(true));
            }
        };
        let at = &mut places.objects[place as usize];
        let handle =
            u64::from(self.kind) << KIND_SHIFT | u64::from(at.generation) << PLACE_BITS | u64::from(place);
        at.object = Some(make(handle));
        Ok(handle)
    }

    pub fn get(&self, handle: u64) -> Result<Arc<T>, Fault> {
        let found = self.place_of(handle).and_then(|(place, generation)| {
            let places = self.places.read();
            let at = places.objects.get(place)?;
            (at.generation == generation).then(|| at.object.clone()).flatten()
        });
        found.ok_or_else(|| self.unknown(handle))
    }

    /// Takes an object out; its handle is stale from now on.
    pub fn remove(&self, handle: u64) -> Result<Arc<T>, Fault> {
        let found = self.place_of(handle).and_then(|(place, generation)| {
            let mut places = self.places.write();
            let at = places.objects.get_mut(place)?;
            let object = at.object.take_if(|_| at.generation == generation)?;
            // A place whose generations are used up is not used again.
            if at.generation < u32::MAX {
                at.generation += 1;
                places.free.push_back(place as u32);
            }
            Some(object)
        });
        found.ok_or_else(|| self.unknown(handle))
    }

    fn place_of(&self, handle: u64) -> Option<(usize, u32)> {
        let place = handle as usize & ((1 << PLACE_BITS) - 1);
        let generation = (handle >> PLACE_BITS) as u32;
        (handle >> KIND_SHIFT == u64::from(self.kind)).then_some((place, generation))
    }

    fn unknown(&self, handle: u64) -> Fault {
        let words = format!("{handle:#018x} is no {}: it was closed, or never made", self.name);
        Fault::new(CROSSDOCK_BAD_HANDLE, words, "use a handle only until it is closed")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_closed_handle_never_comes_back() {
        let table = Table::new(7, "thing");
        let first = table.insert(|_| Arc::new(1)).unwrap();
        assert_eq!(*table.remove(first).unwrap(), 1);
        let second = table.insert(|_| Arc::new(2)).unwrap();
        assert_ne!(first, second);
        assert_eq!(table.get(first).unwrap_err().status, CROSSDOCK_BAD_HANDLE);
        assert_eq!(table.remove(first).unwrap_err().status, CROSSDOCK_BAD_HANDLE);
        assert_eq!(*table.get(second).unwrap(), 2);
        assert_eq!(Table::<u8>::new(8, "other").get(second).unwrap_err().status, CROSSDOCK_BAD_HANDLE);
    }

    proptest! {
        #[test]
        fn tables_agree_with_a_map(steps in prop::collection::vec((0u8..3, any::<prop::sample::Index>(), any::<u64>()), 1..200)) {
            let table = Table::new(3, "thing");
            let (mut open, mut closed) = (HashMap::new(), Vec::new());
            for (step, which, number) in steps {
                match step {
                    0 => {
                        let handle = table.insert(|_| Arc::new(number)).unwrap();
                        prop_assert!(handle != 0 && open.insert(handle, number).is_none() && !closed.contains(&handle));
                    }
                    1 if !open.is_empty() => {
                        let handle = *which.get(&open.keys().copied().collect::<Vec<_>>());
                        prop_assert_eq!(Some(*table.remove(handle).unwrap()), open.remove(&handle));
                        closed.push(handle);
                    }
                    _ => prop_assert_eq!(table.get(number).ok().map(|found| *found), open.get(&number).copied()),
                }
                for handle in &closed {
                    prop_assert!(table.get(*handle).is_err());
                }
                for (handle, number) in &open {
                    prop_assert_eq!(*table.get(*handle).unwrap(), *number);
                }
            }
        }
    }
}
