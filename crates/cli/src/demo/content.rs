//! What the demo writes into pages, and checks on arrival: every byte depends on room, layer, token and place.

use crossdock::{CacheLayout, Memory};

/// One room's bytes in a worker's cache.
pub struct Content<'a> {
    pub layout: &'a CacheLayout,
    pub memory: &'a Memory,
    pub room: u64,
    pub tokens: u32,
}

impl Content<'_> {
    /// Computes one layer into the pages, as a prefill would.
    pub fn fill(&self, layer: u32, pages: &[u32]) {
        self.each_page(layer, pages, |place, expected| {
            self.memory.write(place, expected).expect("the layout lies within the memory");
        });
    }

    /// Whether one layer of the pages holds what the prefill computed.
    pub fn is_right(&self, layer: u32, pages: &[u32]) -> bool {
        let mut right = true;
        let mut found = vec![0; self.layout.page_bytes() as usize];
        self.each_page(layer, pages, |place, expected| {
            let found = &mut found[..expected.len()];
            self.memory.read(place, found).expect("the layout lies within the memory");
            right &= found == expected;
        });
        right
    }

    fn each_page(&self, layer: u32, pages: &[u32], mut each: impl FnMut(usize, &[u8])) {
        let layout = self.layout.page_layout(layer).expect("the layer is one of the layout's");
        let token_bytes = self.layout.token_bytes() as usize;
        let mut bytes = vec![0; self.layout.page_bytes() as usize];
        for (at, &page) in pages.iter().enumerate() {
            let first = at as u32 * self.layout.page_tokens();
            let tokens = self.tokens.saturating_sub(first).min(self.layout.page_tokens());
            let bytes = &mut bytes[..tokens as usize * token_bytes];
            for (token, bytes) in (first..).zip(bytes.chunks_exact_mut(token_bytes)) {
                let seed = mix(self.room << 32 ^ u64::from(layer) << 24 ^ u64::from(token));
                for (word, bytes) in (0u64..).zip(bytes.chunks_exact_mut(8)) {
                    bytes.copy_from_slice(&seed.wrapping_add(word.wrapping_mul(GOLDEN)).to_le_bytes());
                }
            }
            let place = layout.page_offset(page).expect("the page is one of the layout's");
            each(place as usize, bytes);
        }
    }
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(mut word: u64) -> u64 {
    word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}
