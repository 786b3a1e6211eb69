//! What the pages hold, so that every word at the destination can be checked.

use crossdock::{Memory, MemoryKind};

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
        if memory.kind() == MemoryKind::Device {
            return self.write_far(memory, pages);
        }
        let mut page = vec![0; self.page_bytes];
        for slot in self.slots(pages) {
            self.fill(&mut page, slot);
            memory.write(slot * self.page_bytes, &page).expect("the page lies in the pool");
        }
    }

    /// Compares every word of the destination's pages with what the source's pages hold.
    pub fn check(&self, memory: &Memory, source: &[u32], destination: &[u32]) -> Wrong {
        if memory.kind() == MemoryKind::Device {
            return self.check_far(memory, source, destination);
        }
        let (mut expected, mut found) = (vec![0; self.page_bytes], vec![0; self.page_bytes]);
        let pairs = self.slots(source).zip(self.slots(destination));
        let wrong = pairs.filter(|&(from, to)| {
            self.fill(&mut expected, from);
            memory.read(to * self.page_bytes, &mut found).expect("the page lies in the pool");
            expected != found
        });
        Wrong { pages: wrong.count() as u64 }
    }

    /// As [`write`](Content::write), in few calls, each of which is a copy to a device that is waited for: pages that lie near
    /// each other are written as one stretch, with what lies between them as it was. Nobody else may write there meanwhile.
    fn write_far(&self, memory: &Memory, pages: &[u32]) {
        let mut slots: Vec<usize> = self.slots(pages).collect();
        slots.sort_unstable();
        slots.dedup();
        let mut bytes = Vec::new();
        for near in slots.chunk_by(|&one, &next| self.are_near(one, next)) {
            let first = near[0];
            let count = near[near.len() - 1] - first + 1;
            bytes.resize(count * self.page_bytes, 0);
            if near.len() < count {
                memory.read(first * self.page_bytes, &mut bytes).expect(OF_DEVICE);
            }
            for &slot in near {
                self.fill(&mut bytes[(slot - first) * self.page_bytes..][..self.page_bytes], slot);
            }
            memory.write(first * self.page_bytes, &bytes).expect(OF_DEVICE);
        }
    }

    /// As [`check`](Content::check), in few calls.
    fn check_far(&self, memory: &Memory, source: &[u32], destination: &[u32]) -> Wrong {
        let mut pairs: Vec<(usize, usize)> = self.slots(destination).zip(self.slots(source)).collect();
        pairs.sort_unstable();
        let (mut expected, mut found) = (vec![0; self.page_bytes], Vec::new());
        let mut wrong = Wrong::default();
        for near in pairs.chunk_by(|&(one, _), &(next, _)| self.are_near(one, next)) {
            let (first, last) = (near[0].0, near[near.len() - 1].0);
            found.resize((last - first + 1) * self.page_bytes, 0);
            memory.read(first * self.page_bytes, &mut found).expect(OF_DEVICE);
            for &(to, from) in near {
                self.fill(&mut expected, from);
                let found = &found[(to - first) * self.page_bytes..][..self.page_bytes];
                wrong.pages += u64::from(expected != found);
            }
        }
        wrong
    }

    /// Whether two slots, the second behind the first, are read and written in one call.
    fn are_near(&self, one: usize, next: usize) -> bool {
        let stretch_slots = STRETCH_BYTES.div_ceil(self.page_bytes);
        let between_bytes = (next - one).saturating_sub(1) * self.page_bytes;
        one / stretch_slots == next / stretch_slots && between_bytes <= NEAR_BYTES
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

/// What a device is asked for lies in it, and it goes on working.
const OF_DEVICE: &str = "the pages lie in the pool, and its device has not failed";

/// What one call to a device moves at most, beside a page that is longer.
const STRETCH_BYTES: usize = 16 << 20;

/// What goes over a bus in about the time that a call takes.
const NEAR_BYTES: usize = 32 << 10;

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

    /// What is written and found in stretches is what is written and found page by page.
    #[test]
    fn memory_of_a_device_holds_the_same() {
        let on = crate::GpuChoice::Software.open().unwrap();
        // Of pages of 12 bytes all are near, of pages of 40,000 only neighbours.
        for page_bytes in [12, 40_000] {
            let (layer_pages, layers) = (600, 2);
            let bytes = page_bytes * (layer_pages * layers) as usize;
            let here = Memory::allocate(bytes, &crossdock::AllocateOptions::default()).unwrap();
            let there = on.gpu.allocate(bytes).unwrap();
            let pages = crate::scattered(layer_pages, 300, 9);
            for salt in [5, 6] {
                let content = Content { salt, page_bytes, layer_pages, layers };
                let pages = &pages[..if salt == 5 { 300 } else { 100 }];
                content.write(&here, pages);
                content.write(&there, pages);
                assert_eq!(content.check(&there, pages, pages).pages, 0);
            }
            let (mut expected, mut found) = (vec![0; bytes], vec![0; bytes]);
            here.read(0, &mut expected).unwrap();
            there.read(0, &mut found).unwrap();
            assert!(expected == found, "something else was written");

            let content = Content { salt: 5, page_bytes, layer_pages, layers };
            assert_eq!(content.check(&there, &pages[100..], &pages[100..]).pages, 0);
            assert_eq!(
                content.check(&there, &pages, &pages).pages,
                content.check(&here, &pages, &pages).pages
            );
            there
                .write(
                    pages[100] as usize * page_bytes + 11,
                    &[!found[pages[100] as usize * page_bytes + 11]],
                )
                .unwrap();
            assert_eq!(content.check(&there, &pages[100..], &pages[100..]).pages, 1);
        }
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
