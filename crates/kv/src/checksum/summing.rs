//! Sums in the making, a share at a time: a loop that has other things to do sums long requests between them.

use std::ops::Range;

use crossdock_memory::Memory;

use super::{ChecksumError, Checksums, VerifyError};
use crate::{CacheLayout, CachePart, ContextShare, HeadShare, PageTable};

/// Sums of one table's tokens, as far as they have been computed, or, where there is something to compare with, as far
/// as they have been compared.
pub(crate) struct Summing {
    sums: Checksums,
    /// The source's sums are in `sums`, and each is compared.
    is_compared: bool,
    /// What the peer holds, too: a layer, a part of the pool, and the heads of it.
    places: Box<[(u32, usize, HeadShare)]>,
    peer_context: ContextShare,
    /// How many blocks are done.
    blocks: u32,
    /// In the next block: places that are done, tokens of the one after them, and the sum of all that.
    at: usize,
    tokens: u32,
    sum: u32,
    copy: Box<[u8]>,
}

impl Summing {
    /// Begins to compute. Finds out whether the memory is there and the table covers all of the tokens, too.
    pub fn compute(
        memory: &[Memory],
        table: &PageTable<'_>,
        peer: &CacheLayout,
        layers: Range<u32>,
        tokens: Range<u32>,
    ) -> Result<Self, ChecksumError> {
        check(memory, table, &layers, &tokens)?;
        let mut sums = Checksums::empty(table, layers, tokens);
        sums.sums.reserve_exact(sums.blocks() as usize);
        Ok(Self::new(sums, false, table, peer))
    }

    /// Begins to compare these sums with what is here, of which `layers` and `tokens` have been moved.
    pub fn compare(
        sums: Checksums,
        memory: &[Memory],
        table: &PageTable<'_>,
        peer: &CacheLayout,
        layers: Range<u32>,
        tokens: Range<u32>,
    ) -> Result<Self, VerifyError> {
        if (&sums.layers, &sums.tokens) != (&layers, &tokens) {
            let (summed_layers, summed_tokens) = (sums.layers, sums.tokens);
            return Err(VerifyError::OtherExtent { layers, tokens, summed_layers, summed_tokens });
        }
        check(memory, table, &layers, &tokens)?;
        Ok(Self::new(sums, true, table, peer))
    }

    fn new(sums: Checksums, is_compared: bool, table: &PageTable<'_>, peer: &CacheLayout) -> Self {
        let places = sums.layers.clone().flat_map(|layer| moving(table, peer, layer)).collect();
        let peer_context = peer.context_of(table.pool);
        let copy = vec![0; COPY_BYTES].into();
        Self { sums, is_compared, places, peer_context, blocks: 0, at: 0, tokens: 0, sum: 0, copy }
    }

    /// Reads some more bytes, about as many as `left` says, which it counts down; true when all has been summed.
    /// Memory and table are the same in each call. Others may write the memory meanwhile, so bytes are copied before
    /// they are summed.
    pub fn advance(
        &mut self,
        memory: &[Memory],
        table: &PageTable<'_>,
        left: &mut u64,
    ) -> Result<bool, VerifyError> {
        while self.blocks < self.sums.blocks() {
            let block = self.sums.block(self.blocks);
            if !self.sum_block(memory, table, &block, left)? {
                return Ok(false);
            }
            self.take(table, block)?;
        }
        Ok(true)
    }

    /// What was computed.
    pub fn into_sums(self) -> Checksums {
        self.sums
    }

    fn take(&mut self, table: &PageTable<'_>, block: Range<u32>) -> Result<(), VerifyError> {
        let found = std::mem::take(&mut self.sum);
        if !self.is_compared {
            self.sums.sums.push(found);
        } else {
            let expected = self.sums.sums[self.blocks as usize];
            if found != expected {
                let first = table.held(&block).start / table.of().page_tokens() - table.first_page;
                // Of a block of which no token is here there is no page.
                let page = table.pages.get(first as usize).or(table.pages.last()).copied().unwrap_or(0);
                return Err(VerifyError::Mismatch { tokens: block, page, expected, found });
            }
        }
        (self.blocks, self.at) = (self.blocks + 1, 0);
        Ok(())
    }

    /// True when all of the block has been summed.
    fn sum_block(
        &mut self,
        memory: &[Memory],
        table: &PageTable<'_>,
        block: &Range<u32>,
        left: &mut u64,
    ) -> Result<bool, ChecksumError> {
        while let Some(&(layer, part, heads)) = self.places.get(self.at) {
            let part = &table.of().parts()[part];
            let buffer = buffer(memory, part, layer)?;
            let token_bytes = u64::from(heads.count) * u64::from(part.head_bytes());
            while let Some(run) = self.next_run(table, block) {
                if *left == 0 {
                    return Ok(false);
                }
                // One token is read in one go, however long it is.
                let most = u32::try_from((*left / token_bytes).max(1)).unwrap_or(u32::MAX);
                let some = run.tokens.min(most);
                for (offset, bytes) in stretches(part, heads, run.token, some) {
                    let offset = buffer.1 + u64::from(run.page) * buffer.2 + offset;
                    self.sum = add(self.sum, buffer.0, offset, bytes, &mut self.copy)?;
                }
                self.tokens = run.first - block.start + some;
                *left = left.saturating_sub(u64::from(some) * token_bytes);
            }
            (self.at, self.tokens) = (self.at + 1, 0);
            // Going by tokens that the peer has not costs time, too.
            *left = left.saturating_sub(1);
            if *left == 0 && self.at < self.places.len() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The next tokens of the block that both sides hold, in one page here.
    fn next_run(&self, table: &PageTable<'_>, block: &Range<u32>) -> Option<Run> {
        let (context, peer) = (table.context(), self.peer_context);
        let mut next = u64::from(block.start) + u64::from(self.tokens);
        loop {
            let token = u32::try_from(next).ok().filter(|token| *token < block.end)?;
            let (here, here_run) = context.next_run(token);
            let (there, there_run) = peer.next_run(token);
            next = here.max(there);
            if here == there && next < u64::from(block.end) {
                let first = next as u32;
                let place = context.held_before(first);
                let page_tokens = table.of().page_tokens();
                let token = place % page_tokens;
                let tokens = here_run.min(there_run).min(block.end - first).min(page_tokens - token);
                let page = *table.pages.get((place / page_tokens - table.first_page) as usize)?;
                return Some(Run { first, page, token, tokens });
            }
        }
    }
}

/// Tokens in one page.
struct Run {
    /// The first one, in the request.
    first: u32,
    page: u32,
    /// The first one, in the page.
    token: u32,
    tokens: u32,
}

/// Which parts of a layer move between a table's worker and a peer.
fn moving<'a>(
    table: &PageTable<'a>,
    peer: &'a CacheLayout,
    layer: u32,
) -> impl Iterator<Item = (u32, usize, HeadShare)> + use<'a> {
    let theirs = peer.pools().get(table.pool).map_or(&[][..], |pool| pool.parts());
    let parts = table.of().parts().iter().zip(theirs).enumerate();
    let wanted = table.parts;
    parts.filter(move |(_, (one, _))| wanted.have(one)).filter_map(move |(nth, (one, two))| {
        one.buffer(layer).and(two.buffer(layer))?;
        Some((layer, nth, one.heads().common(&two.heads())?))
    })
}

/// Where the bytes of these heads lie in a page, token by token and head by head: the same order on both sides.
fn stretches(
    part: &CachePart,
    heads: HeadShare,
    token: u32,
    tokens: u32,
) -> impl Iterator<Item = (u64, u64)> + use<'_> {
    let head_bytes = u64::from(part.head_bytes());
    let is_whole = heads.count == part.heads().count && !part.is_by_head();
    let (tokens_at_once, heads_at_once) = match (is_whole, part.is_by_head()) {
        (true, _) => (tokens.max(1), heads.count),
        (false, false) => (1, heads.count),
        (false, true) => (1, 1),
    };
    let bytes = head_bytes * u64::from(tokens_at_once) * u64::from(heads_at_once);
    (token..token + tokens).step_by(tokens_at_once as usize).flat_map(move |token| {
        let heads = (heads.first..heads.first + heads.count).step_by(heads_at_once as usize);
        heads.map(move |head| (part.place(token, head), bytes))
    })
}

fn check(
    memory: &[Memory],
    table: &PageTable<'_>,
    layers: &Range<u32>,
    tokens: &Range<u32>,
) -> Result<(), ChecksumError> {
    table.covering(tokens).map_err(ChecksumError::Pages)?;
    let here = table.layout.layers();
    for layer in layers.clone() {
        if !here.contains(&layer) {
            return Err(ChecksumError::LayerNotHere { layer, here });
        }
        let parts = table.of().parts().iter().filter(|part| part.buffer(layer).is_some());
        parts.into_iter().try_for_each(|part| buffer(memory, part, layer).map(|_| ()))?;
    }
    Ok(())
}

/// A layer's memory, where its pages begin in it, and how far they are apart.
fn buffer<'a>(
    memory: &'a [Memory],
    part: &CachePart,
    layer: u32,
) -> Result<(&'a Memory, u64, u64), ChecksumError> {
    let here = 0..0;
    let buffer = part.buffer(layer).ok_or(ChecksumError::LayerNotHere { layer, here })?;
    let memory = memory.get(buffer.region as usize);
    let memory = memory.ok_or(ChecksumError::UnknownRegion { region: buffer.region })?;
    Ok((memory, buffer.offset, buffer.stride_bytes))
}

fn add(
    mut sum: u32,
    memory: &Memory,
    offset: u64,
    bytes: u64,
    copy: &mut [u8],
) -> Result<u32, ChecksumError> {
    let mut done = 0;
    while done < bytes {
        let part = (bytes - done).min(copy.len() as u64) as usize;
        // An offset that no address can have is out of range like any other.
        let at = usize::try_from(offset + done).unwrap_or(usize::MAX);
        memory.read(at, &mut copy[..part]).map_err(ChecksumError::Access)?;
        sum = crc32c::crc32c_append(sum, &copy[..part]);
        done += part as u64;
    }
    Ok(sum)
}

/// Small enough to stay in the first-level cache between the copy and the sum.
const COPY_BYTES: usize = 16 << 10;

#[cfg(test)]
mod tests {
    use crossdock_memory::AllocateOptions;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn sums_do_not_depend_on_the_shares(
            shares in prop::collection::vec(0u64..300_000, 1..20),
            page_tokens in 1u32..100, ends in (0u32..200, 0u32..200), flip in 0usize..150_000,
        ) {
            let tokens = ends.0.min(ends.1)..ends.0.max(ends.1);
            let pages: Vec<u32> = (0..200u32.div_ceil(page_tokens)).rev().collect();
            let layout = CacheLayout::deepseek_r1(page_tokens, pages.len() as u32).unwrap();
            let memory = [Memory::allocate(layout.bytes_needed(0) as usize, &AllocateOptions::default()).unwrap()];
            memory[0].write(flip, &[1, 2, 3]).unwrap();
            let table = PageTable::new(&layout, &pages);
            let whole = Checksums::compute(&memory, &table, &layout, 3..9, tokens.clone()).unwrap();

            let run = |mut summing: Summing| {
                for round in 0.. {
                    let share = shares[round % shares.len()] + 1;
                    let mut left = share;
                    let done = summing.advance(&memory, &table, &mut left)?;
                    assert!(done || left == 0, "all of the share is used");
                    if done {
                        return Ok((summing.sums, round));
                    }
                }
                unreachable!()
            };
            let (sums, rounds) = run(Summing::compute(&memory, &table, &layout, 3..9, tokens.clone()).unwrap()).unwrap();
            prop_assert_eq!(&sums, &whole);
            // No share is left unused, or much exceeded: a token may be read whole.
            let bytes = 6 * u64::from(tokens.end - tokens.start) * layout.token_bytes();
            let longest = shares.iter().max().unwrap() + layout.token_bytes();
            prop_assert!(rounds as u64 >= (bytes / longest).saturating_sub(1), "{} rounds for {} bytes", rounds, bytes);

            let compare = |sums| Summing::compare(sums, &memory, &table, &layout, 3..9, tokens.clone()).and_then(run);
            prop_assert!(compare(whole.clone()).is_ok());
            let mut wrong = whole.clone();
            if let Some(last) = wrong.sums.last_mut() {
                *last ^= 1;
                let differs = matches!(compare(wrong), Err(VerifyError::Mismatch { .. }));
                prop_assert!(differs);
            }
        }
    }
}
