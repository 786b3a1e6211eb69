//! What the pages hold, so that every word at the destination can be checked.

use crossdock::Memory;

/// The content of a source pool: word `i` of the pool's slot `s` follows from `s`, `i` and the salt alone.
#[derive(Clone, Copy, Debug)]
pub struct Content {
    /// Differs from pass to pass: what an earlier pass left is wrong in the next.
    pub salt: u64,
    /// The length of a page.
    pub page_bytes: usize,
    /// How many pages lie between a page of one layer and the same page of the next.
    pub layer_pages: u32,
    /// How many layers there are.
    pub layers: u32,
}

/// How many pages were wrong, and the first of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wrong {
    /// How many.
    pub pages: u64,
}

impl Content {
    /// Writes the pages of a list, in every layer.
    pub fn write(&self, memory: &Memory, pages: &[u32]) {
        let mut page = vec![0; self.page_bytes];
        for slot in self.slots(pages) {
            self.fill(&mut page, slot);
            memory.write(slot * self.page_bytes, &page).expect("the page lies in the pool");
        }
    }

    /// Compares every word of the destination's pages with what the source's pages hold.
    pub fn check(&self, memory: &Memory, source: &[u32], destination: &[u32]) -> Wrong {
        let (mut expected, mut found) = (vec![0; self.page_bytes], vec![0; self.page_bytes]);
        let pairs = self.slots(source).zip(self.slots(destination));
        let wrong = pairs.filter(|&(from, to)| {
            self.fill(&mut expected, from);
            memory.read(to * self.page_bytes, &mut found).expect("the page lies in the pool");
            expected != found
        });
        Wrong { pages: wrong.count() as u64 }
    }

    /// Writes the first bytes of one page, in every layer: they follow from a name and the layer, wherever it lies.
    pub fn write_named(&self, memory: &Memory, page: u32, name: u64, bytes: usize) -> u64 {
        let mut words = vec![0; bytes];
        for layer in 0..self.layers {
            self.fill(&mut words, named(name, layer));
            memory.write(self.place(layer, page), &words).expect("the page lies in the pool");
        }
        0
    }

    /// In how many layers the first bytes of one page are not what [`write_named`](Content::write_named) writes.
    pub fn check_named(&self, memory: &Memory, page: u32, name: u64, bytes: usize) -> u64 {
        let (mut expected, mut found) = (vec![0; bytes], vec![0; bytes]);
        let wrong = (0..self.layers).filter(|&layer| {
            self.fill(&mut expected, named(name, layer));
            memory.read(self.place(layer, page), &mut found).expect("the page lies in the pool");
            expected != found
        });
        wrong.count() as u64
    }

    fn place(&self, layer: u32, page: u32) -> usize {
        (layer as usize * self.layer_pages as usize + page as usize) * self.page_bytes
    }

    fn slots<'a>(&self, pages: &'a [u32]) -> impl Iterator<Item = usize> + use<'a> {
        let layer_pages = self.layer_pages as usize;
        (0..self.layers as usize)
            .flat_map(move |layer| pages.iter().map(move |&page| layer * layer_pages + page as usize))
    }

    fn fill(&self, page: &mut [u8], slot: usize) {
        let first = (slot * self.page_bytes.div_ceil(8)) as u64;
        let word = |at: u64| ((first + at).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ self.salt).to_le_bytes();
        let mut words = page.chunks_exact_mut(8);
        for (at, bytes) in (&mut words).enumerate() {
            bytes.copy_from_slice(&word(at as u64));
        }
        let rest = words.into_remainder();
        let last = word(first.wrapping_add(u64::MAX / 3));
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// Stands for a slot of a pool larger than any.
fn named(name: u64, layer: u32) -> usize {
    let mixed = (name ^ u64::from(layer) << 48).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    // So large that no page's words reach into the next one's, and no product overflows.
    ((mixed ^ mixed >> 31).wrapping_mul(0x94D0_49BB_1331_11EB) >> 28) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_byte_and_an_old_pass_are_found() {
        let memory = Memory::allocate(2 * 4 * 12, &crossdock::AllocateOptions::default()).unwrap();
        let content = Content { salt: 5, page_bytes: 12, layer_pages: 4, layers: 2 };
        content.write(&memory, &[0, 3, 1, 2]);
        assert_eq!(content.check(&memory, &[3, 1], &[3, 1]).pages, 0);
        assert_eq!(content.check(&memory, &[3, 1], &[1, 3]).pages, 4);
        assert_eq!(Content { salt: 6, ..content }.check(&memory, &[0], &[0]).pages, 2);
        let mut byte = [0];
        memory.read(6 * 12 + 11, &mut byte).unwrap();
        memory.write(6 * 12 + 11, &[byte[0] ^ 1]).unwrap();
        assert_eq!(content.check(&memory, &[0, 1, 2, 3], &[0, 1, 2, 3]).pages, 1);
    }

    #[test]
    fn a_name_says_what_a_page_holds_wherever_it_lies() {
        let memory = Memory::allocate(2 * 4 * 16, &crossdock::AllocateOptions::default()).unwrap();
        let content = Content { salt: 5, page_bytes: 16, layer_pages: 4, layers: 2 };
        content.write_named(&memory, 1, 77, 16);
        content.write_named(&memory, 3, 77, 8);
        assert_eq!(content.check_named(&memory, 1, 77, 16), 0);
        assert_eq!(content.check_named(&memory, 3, 77, 8), 0);
        assert_eq!(content.check_named(&memory, 3, 77, 16), 2);
        assert_eq!(content.check_named(&memory, 1, 78, 8), 2);
        memory.write((4 + 1) * 16 + 15, &[0xA5]).unwrap();
        assert_eq!(content.check_named(&memory, 1, 77, 16), 1);
    }
}
