//! A table of things with numbers that only grow and are never used again: lanes, regions, guests.

/// Sorted by number, since numbers come in order.
#[derive(Debug)]
pub(crate) struct Numbered<T> {
    entries: Vec<(u32, T)>,
}

impl<T> Default for Numbered<T> {
    fn default() -> Self {
        Self { entries: Vec::new() }
    }
}

impl<T> Numbered<T> {
    /// # Panics
    /// If `number` is not larger than every number in the table.
    pub(crate) fn push(&mut self, number: u32, entry: T) {
        assert!(self.last_number().is_none_or(|last| last < number), "numbers only grow");
        self.entries.push((number, entry));
    }

    pub(crate) fn get(&self, number: u32) -> Option<&T> {
        self.place(number).map(|at| &self.entries[at].1)
    }

    pub(crate) fn get_mut(&mut self, number: u32) -> Option<&mut T> {
        self.place(number).map(|at| &mut self.entries[at].1)
    }

    pub(crate) fn remove(&mut self, number: u32) -> Option<T> {
        self.place(number).map(|at| self.entries.remove(at).1)
    }

    pub(crate) fn clear(&mut self) {
        self.entries.clear();
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.entries.iter().map(|(number, entry)| (*number, entry))
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut T)> {
        self.entries.iter_mut().map(|(number, entry)| (*number, entry))
    }

    /// The number of the first entry that is as asked for.
    pub(crate) fn find(&self, wanted: impl Fn(&T) -> bool) -> Option<u32> {
        self.entries.iter().find(|(_, entry)| wanted(entry)).map(|(number, _)| *number)
    }

    /// The entry at a place in the order of the numbers.
    pub(crate) fn at_mut(&mut self, place: usize) -> (u32, &mut T) {
        let (number, entry) = &mut self.entries[place];
        (*number, entry)
    }

    pub(crate) fn last_number(&self) -> Option<u32> {
        self.entries.last().map(|(number, _)| *number)
    }

    fn place(&self, number: u32) -> Option<usize> {
        // Mostly nothing was ever removed, and the place is the distance from the first number.
        let guess = number.checked_sub(self.entries.first()?.0)? as usize;
        if self.entries.get(guess).is_some_and(|(found, _)| *found == number) {
            return Some(guess);
        }
        self.entries.binary_search_by_key(&number, |(number, _)| *number).ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_map(steps in proptest::collection::vec((any::<bool>(), 0u32..40), 0..80)) {
            let (mut table, mut model) = (Numbered::default(), std::collections::BTreeMap::new());
            let mut next = 0;
            for (add, number) in steps {
                if add {
                    next += 1 + number % 3;
                    table.push(next, number);
                    model.insert(next, number);
                } else {
                    prop_assert_eq!(table.remove(number), model.remove(&number));
                }
                for number in 0..=next + 1 {
                    prop_assert_eq!(table.get(number), model.get(&number));
                }
                prop_assert_eq!(table.len(), model.len());
                prop_assert_eq!(table.last_number(), model.keys().last().copied());
            }
        }
    }
}
