//! What the demo writes into pages, and checks on arrival: every byte depends on its layer and place, and on the request
//! or, where the page is shared, on the prefix that it ends.

use crossdock::{CacheLayout, Memory};
use crossdock_replay::Arrival;

/// One request's bytes in a worker's cache.
pub struct Content<'a> {
    layout: &'a CacheLayout,
    memory: &'a Memory,
    tokens: u32,
    /// What the bytes of each of its pages come from.
    names: Vec<u64>,
}

impl<'a> Content<'a> {
    pub fn new(layout: &'a CacheLayout, memory: &'a Memory, room: u64, arrival: &Arrival) -> Self {
        let shared = arrival.blocks.iter().flat_map(|block| {
            (0..block.pages).map(move |place| mix(1 << 63 | block.id << 16 ^ u64::from(place)))
        });
        let mut names: Vec<u64> = shared.collect();
        let own = names.len() as u32..layout.pages_for(arrival.tokens);
        names.extend(own.map(|page| mix(room << 32 ^ u64::from(page))));
        Self { layout, memory, tokens: arrival.tokens, names }
    }

    /// Computes one layer into pages, as a prefill would. The first of them is the request's page with this number.
    pub fn fill(&self, layer: u32, first: u32, pages: &[u32]) {
        self.each_page(layer, first, pages, |place, expected| {
            self.memory.write(place, expected).expect("the layout lies within the memory");
        });
    }

    /// Whether one layer of pages holds what a prefill computes. The first of them is the request's page with this
    /// number.
    pub fn is_right(&self, layer: u32, first: u32, pages: &[u32]) -> bool {
        let mut right = true;
        let mut found = vec![0; self.layout.page_bytes() as usize];
        self.each_page(layer, first, pages, |place, expected| {
            let found = &mut found[..expected.len()];
            self.memory.read(place, found).expect("the layout lies within the memory");
            right &= found == expected;
        });
        right
    }

    fn each_page(&self, layer: u32, first: u32, pages: &[u32], mut each: impl FnMut(usize, &[u8])) {
        let layout = self.layout.page_layout(layer).expect("the layer is one of the layout's");
        let token_bytes = self.layout.token_bytes() as usize;
        let mut bytes = vec![0; self.layout.page_bytes() as usize];
        for (at, &page) in (first..).zip(pages) {
            let before = at * self.layout.page_tokens();
            let tokens = self.tokens.saturating_sub(before).min(self.layout.page_tokens());
            let bytes = &mut bytes[..tokens as usize * token_bytes];
            let name = self.names[at as usize] ^ u64::from(layer) << 24;
            for (token, bytes) in (0u64..).zip(bytes.chunks_exact_mut(token_bytes)) {
                let seed = mix(name ^ token);
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
