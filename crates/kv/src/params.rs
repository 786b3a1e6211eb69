//! What the two ends of a room tell each other beside pages (little-endian).
//!
//! | message | bytes | field |
//! |---|---|---|
//! | ask: with a push's grant, a pull's want | 1 | version: 2 |
//! | | 1 | of which pool of the layouts |
//! | | 4 | tokens of the request; entries, of a pool of these |
//! | | 4 | tokens that the decode side holds already |
//! | | 1 | bits: 1 send checksums, 2 only the parts that ranks share by heads |
//! | answer: with a push's finish, a pull's grant | 1 | version: 2 |
//! | | 4 | tokens of the request |
//! | | 4, n | the user's own bytes |
//! | | n | [checksums](crate::Checksums), or nothing |

use std::ops::Range;

use crate::fields::{Fields, Truncated};
use crate::{CacheLayout, Extent, PageTable, Parts};

const VERSION: u8 = 2;

/// What the decode side asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ask {
    pub pool: u8,
    pub tokens: u32,
    pub skip_tokens: u32,
    pub checksums: bool,
    pub parts: Parts,
}

/// What the prefill side says with the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub tokens: u32,
    pub aux: Vec<u8>,
    /// Encoded; empty for none.
    pub checksums: Vec<u8>,
}

impl CacheLayout {
    /// What a decode side asks for of a pool, of which it lists so many pages.
    pub(crate) fn ask(&self, pool: usize, tokens: u32, skip_tokens: u32, pages: usize) -> Ask {
        let (tokens, skip_tokens) = match self.pools()[pool].extent() {
            Extent::Tokens | Extent::Window(_) => (tokens, skip_tokens),
            Extent::Entries => (pages as u32, 0),
        };
        Ask { pool: pool as u8, tokens, skip_tokens, checksums: false, parts: Parts::All }
    }

    /// Which tokens move.
    pub(crate) fn moved(&self, ask: &Ask) -> Range<u32> {
        ask.skip_tokens.max(self.kept_from(ask))..ask.tokens
    }

    /// The pages of a decode side that asks so: they begin with what moves.
    pub(crate) fn decode_table<'a>(&'a self, ask: &Ask, pages: &'a [u32]) -> PageTable<'a> {
        let table = PageTable::of_pool(self, ask.pool.into(), self.moved(ask).start, pages);
        PageTable { parts: ask.parts, ..table }
    }

    /// The pages of the prefill side that is asked: they begin with what it keeps.
    pub(crate) fn prefill_table<'a>(&'a self, ask: &Ask, pages: &'a [u32]) -> PageTable<'a> {
        let table = PageTable::of_pool(self, ask.pool.into(), self.kept_from(ask), pages);
        PageTable { parts: ask.parts, ..table }
    }

    fn kept_from(&self, ask: &Ask) -> u32 {
        match self.pools()[usize::from(ask.pool)].extent() {
            Extent::Window(window) => ask.tokens.saturating_sub(window),
            Extent::Tokens | Extent::Entries => 0,
        }
    }
}

impl Ask {
    pub fn encode(self) -> Vec<u8> {
        let mut out = vec![VERSION, self.pool];
        out.extend(self.tokens.to_le_bytes());
        out.extend(self.skip_tokens.to_le_bytes());
        out.push(self.checksums as u8 | ((self.parts == Parts::Shared) as u8) << 1);
        out
    }

    /// `None`: not what this version can read.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let read = || -> Result<(u8, Self, bool), Truncated> {
            let mut fields = Fields(bytes);
            let version = fields.u8("version")?;
            let ask = Self {
                pool: fields.u8("pool")?,
                tokens: fields.u32("tokens")?,
                skip_tokens: fields.u32("skip tokens")?,
                checksums: false,
                parts: Parts::All,
            };
            let flags = fields.u8("flags")?;
            let parts = if flags & 2 == 0 { Parts::All } else { Parts::Shared };
            let ask = Self { checksums: flags & 1 == 1, parts, ..ask };
            Ok((version, ask, fields.0.is_empty() && flags < 4))
        };
        match read() {
            Ok((VERSION, ask, true)) if ask.skip_tokens <= ask.tokens => Some(ask),
            _ => None,
        }
    }
}

impl Answer {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        out.extend(self.tokens.to_le_bytes());
        out.extend((self.aux.len() as u32).to_le_bytes());
        out.extend(&self.aux);
        out.extend(&self.checksums);
        out
    }

    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let read = || -> Result<(u8, Self), Truncated> {
            let mut fields = Fields(bytes);
            let version = fields.u8("version")?;
            let tokens = fields.u32("tokens")?;
            let aux_bytes = fields.u32("aux")? as usize;
            let aux = fields.take("aux", aux_bytes)?.to_vec();
            Ok((version, Self { tokens, aux, checksums: fields.0.to_vec() }))
        };
        match read() {
            Ok((VERSION, answer)) => Some(answer),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(pool: u8, tokens: u32, aux: Vec<u8>, checksums: Vec<u8>, flag: bool) {
            let ask = Ask { pool, tokens, skip_tokens: tokens / 2, checksums: flag, parts: if flag { Parts::Shared } else { Parts::All } };
            prop_assert_eq!(Ask::decode(&ask.encode()), Some(ask));
            let answer = Answer { tokens, aux, checksums };
            prop_assert_eq!(Answer::decode(&answer.encode()), Some(answer));
        }

        #[test]
        fn anything_may_come(bytes: Vec<u8>) {
            let _ = (Ask::decode(&bytes), Answer::decode(&bytes));
        }
    }
}
