//! Sums in the making, a share at a time: a loop that has other things to do sums long requests between them.

use std::ops::Range;

use crossdock_memory::Memory;

use super::{ChecksumError, Checksums, VerifyError};
use crate::{LayerBuffer, PageTable};

/// Sums of one table's tokens, as far as they have been computed, or, where there is something to compare with, as far
/// as they have been compared.
pub(crate) struct Summing {
    sums: Checksums,
    /// The source's sums are in `sums`, and each is compared.
    is_compared: bool,
    /// How many blocks are done.
    blocks: u32,
    /// In the next block: layers that are done, tokens of the one after them, and the sum of all that.
    layers: u32,
    tokens: u32,
    sum: u32,
    copy: Box<[u8]>,
}

impl Summing {
    /// Begins to compute. Finds out whether the memory is there and the table covers all of the tokens, too.
    pub fn compute(
        memory: &[Memory],
        table: &PageTable<'_>,
        layers: Range<u32>,
        tokens: Range<u32>,
    ) -> Result<Self, ChecksumError> {
        check(memory, table, &layers, &tokens)?;
        let mut sums = Checksums::empty(table.layout, layers, tokens);
        sums.sums.reserve_exact(sums.blocks() as usize);
        Ok(Self::new(sums, false))
    }

    /// Begins to compare these sums with what is here, of which `layers` and `tokens` have been moved.
    pub fn compare(
        sums: Checksums,
        memory: &[Memory],
        table: &PageTable<'_>,
        layers: Range<u32>,
        tokens: Range<u32>,
    ) -> Result<Self, VerifyError> {
        if (&sums.layers, &sums.tokens) != (&layers, &tokens) {
            let (summed_layers, summed_tokens) = (sums.layers, sums.tokens);
            return Err(VerifyError::OtherExtent { layers, tokens, summed_layers, summed_tokens });
        }
        check(memory, table, &layers, &tokens)?;
        Ok(Self::new(sums, true))
    }

    fn new(sums: Checksums, is_compared: bool) -> Self {
        let copy = vec![0; COPY_BYTES].into();
        Self { sums, is_compared, blocks: 0, layers: 0, tokens: 0, sum: 0, copy }
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
                let first = block.start / table.layout.page_tokens() - table.first_page;
                let page = table.pages[first as usize];
                return Err(VerifyError::Mismatch { tokens: block, page, expected, found });
            }
        }
        (self.blocks, self.layers) = (self.blocks + 1, 0);
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
        let token_bytes = table.layout.token_bytes();
        for layer in self.sums.layers.start + self.layers..self.sums.layers.end {
            let (memory, buffer) = buffer(memory, table, layer)?;
            let tokens = block.start + self.tokens..block.end;
            let mut walk = table.walk(table.covering(&tokens).map_err(ChecksumError::Pages)?, &tokens);
            while block.start + self.tokens < block.end {
                if *left == 0 {
                    return Ok(false);
                }
                // One token is read in one go, however long it is.
                let most = u32::try_from((*left / token_bytes).max(1)).unwrap_or(u32::MAX);
                let some = walk.left().min(block.end - block.start - self.tokens).min(most);
                let (page, token) = walk.place();
                let in_page = u64::from(token) * token_bytes;
                let offset = buffer.offset + u64::from(page) * buffer.stride_bytes + in_page;
                let bytes = u64::from(some) * token_bytes;
                self.sum = add(self.sum, memory, offset, bytes, &mut self.copy)?;
                walk.advance(some);
                self.tokens += some;
                *left = left.saturating_sub(bytes);
            }
            self.layers += 1;
            self.tokens = 0;
        }
        Ok(true)
    }
}

fn check(
    memory: &[Memory],
    table: &PageTable<'_>,
    layers: &Range<u32>,
    tokens: &Range<u32>,
) -> Result<(), ChecksumError> {
    table.covering(tokens).map_err(ChecksumError::Pages)?;
    layers.clone().try_for_each(|layer| buffer(memory, table, layer).map(|_| ()))
}

fn buffer<'a>(
    memory: &'a [Memory],
    table: &PageTable<'_>,
    layer: u32,
) -> Result<(&'a Memory, LayerBuffer), ChecksumError> {
    let here = table.layout.layers();
    let buffer = table.layout.buffer(layer).ok_or(ChecksumError::LayerNotHere { layer, here })?;
    let memory = memory.get(buffer.region as usize);
    Ok((memory.ok_or(ChecksumError::UnknownRegion { region: buffer.region })?, buffer))
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
        memory.read(at, &mut copy[..part]).map_err(ChecksumError::OutOfRange)?;
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
    use crate::CacheLayout;

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
            let whole = Checksums::compute(&memory, &table, 3..9, tokens.clone()).unwrap();

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
            let (sums, rounds) = run(Summing::compute(&memory, &table, 3..9, tokens.clone()).unwrap()).unwrap();
            prop_assert_eq!(&sums, &whole);
            // No share is left unused, or much exceeded: a token may be read whole.
            let bytes = 6 * u64::from(tokens.end - tokens.start) * layout.token_bytes();
            let longest = shares.iter().max().unwrap() + layout.token_bytes();
            prop_assert!(rounds as u64 >= (bytes / longest).saturating_sub(1), "{} rounds for {} bytes", rounds, bytes);

            let compare = |sums| Summing::compare(sums, &memory, &table, 3..9, tokens.clone()).and_then(run);
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
