//! Which pages of a cache hold which tokens of a request.

use std::ops::Range;

use crate::{CacheLayout, CachePart, CachePool, ContextShare};

/// One worker's pages of one pool for one request. Entry `i` of the list holds the tokens from
/// `(first_page + i) * page_tokens` on, counted among the [tokens that are here](CacheLayout::context).
#[derive(Clone, Copy, Debug)]
pub struct PageTable<'a> {
    /// The worker's layout, which says how many tokens a page holds.
    pub layout: &'a CacheLayout,
    /// Of which of its pools the pages are.
    pub pool: usize,
    /// Which parts of each page take part in a move.
    pub parts: Parts,
    /// How many pages of the request come before the list: 0 unless the list leaves out a prefix that is not
    /// going to move, or belongs to a later chunk of the request.
    pub first_page: u32,
    /// The page numbers.
    pub pages: &'a [u32],
}

/// Which parts of a page take part in a move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Parts {
    /// All of them.
    #[default]
    All,
    /// Those that the ranks of a side share by their heads, and not what each of them keeps whole: another one brings it.
    Shared,
}

impl Parts {
    pub(crate) fn have(self, part: &CachePart) -> bool {
        self == Self::All || part.heads().of > 1
    }
}

impl<'a> PageTable<'a> {
    /// The pages of a whole request, from its first token on.
    pub fn new(layout: &'a CacheLayout, pages: &'a [u32]) -> Self {
        Self::from_token(layout, 0, pages)
    }

    /// The pages of a request's tokens from this one on: the first page is the one that holds it, or, if it is not here,
    /// the next one that is.
    pub fn from_token(layout: &'a CacheLayout, token: u32, pages: &'a [u32]) -> Self {
        Self::of_pool(layout, 0, token, pages)
    }

    /// The same of another pool.
    ///
    /// # Panics
    /// If the layout has no such pool.
    pub fn of_pool(layout: &'a CacheLayout, pool: usize, token: u32, pages: &'a [u32]) -> Self {
        let first_page = layout.context_of(pool).held_before(token) / layout.pools()[pool].page_tokens();
        Self { layout, pool, parts: Parts::All, first_page, pages }
    }

    /// The pool of the pages.
    pub(crate) fn of(&self) -> &'a CachePool {
        &self.layout.pools()[self.pool]
    }

    /// Which tokens are here.
    pub(crate) fn context(&self) -> ContextShare {
        self.layout.context_of(self.pool)
    }

    /// Which of these tokens are here, by their places among all that are.
    pub(crate) fn held(&self, tokens: &Range<u32>) -> Range<u32> {
        let context = self.context();
        context.held_before(tokens.start)..context.held_before(tokens.end)
    }

    /// The part of the list that holds these tokens, once it is known to be there and within the layout.
    pub(crate) fn covering(&self, tokens: &Range<u32>) -> Result<&'a [u32], PageTableError> {
        let tokens = self.held(tokens);
        if tokens.is_empty() {
            return Ok(&[]);
        }
        let page_tokens = self.of().page_tokens();
        let first = tokens.start / page_tokens;
        let end = tokens.end.div_ceil(page_tokens);
        let given = self.first_page..self.first_page.saturating_add(self.pages.len() as u32);
        if first < given.start || end > given.end {
            return Err(PageTableError::NotCovered { needed: first..end, given });
        }
        let pages = &self.pages[(first - given.start) as usize..(end - given.start) as usize];
        match pages.iter().copied().max() {
            Some(page) if page >= self.of().pages() => {
                Err(PageTableError::PageOutOfRange { page, pages: self.of().pages() })
            }
            _ => Ok(pages),
        }
    }
}

/// A place in a page table that moves forward.
#[derive(Clone, Debug)]
pub(crate) struct Walk<'a> {
    pages: &'a [u32],
    at: usize,
    offset: u32,
    page_tokens: u32,
}

impl<'a> Walk<'a> {
    /// From this token of the first page on.
    pub fn new(pages: &'a [u32], offset: u32, page_tokens: u32) -> Self {
        Self { pages, at: 0, offset, page_tokens }
    }

    /// The page, and the token in it.
    #[inline]
    pub fn place(&self) -> (u32, u32) {
        (self.pages[self.at], self.offset)
    }

    /// How many pages the whole walk goes through.
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// How many tokens are left in the page.
    #[inline]
    pub fn left(&self) -> u32 {
        self.page_tokens - self.offset
    }

    /// Goes on by at most what is left in the page.
    #[inline]
    pub fn advance(&mut self, tokens: u32) {
        self.offset += tokens;
        if self.offset == self.page_tokens {
            self.offset = 0;
            self.at += 1;
        }
    }
}

/// Why a page table does not serve.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PageTableError {
    /// The list does not hold all of the tokens.
    #[error(
        "pages {}..{} of the request are needed, {}..{} are listed",
        needed.start, needed.end, given.start, given.end
    )]
    NotCovered {
        /// Which pages of the request hold the tokens.
        needed: Range<u32>,
        /// Which pages of the request are listed.
        given: Range<u32>,
    },
    /// The list names a page that the layout does not have.
    #[error("page {page} is listed, the layout has {pages} pages")]
    PageOutOfRange {
        /// The page.
        page: u32,
        /// How many the layout has.
        pages: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_covers_what_its_list_holds() {
        let layout = CacheLayout::deepseek_r1(16, 100).unwrap();
        let pages = [7, 3, 99, 100];
        let table = PageTable { layout: &layout, pool: 0, parts: Parts::All, first_page: 2, pages: &pages };
        assert_eq!(table.covering(&(32..80)), Ok(&pages[..3]));
        assert_eq!(table.covering(&(47..49)), Ok(&pages[..2]));
        assert_eq!(table.covering(&(48..64)), Ok(&pages[1..2]));
        assert_eq!(table.covering(&(9000..9000)), Ok(&[][..]));
        assert_eq!(table.covering(&(31..64)), Err(PageTableError::NotCovered { needed: 1..4, given: 2..6 }));
        assert_eq!(table.covering(&(64..97)), Err(PageTableError::NotCovered { needed: 4..7, given: 2..6 }));
        assert_eq!(table.covering(&(32..96)), Err(PageTableError::PageOutOfRange { page: 100, pages: 100 }));
    }

    #[test]
    fn a_walk_enters_each_page_once() {
        let layout = CacheLayout::deepseek_r1(16, 100).unwrap();
        let table =
            PageTable { layout: &layout, pool: 0, parts: Parts::All, first_page: 1, pages: &[5, 4, 9] };
        let tokens = 20..50;
        let mut walk = Walk::new(table.covering(&tokens).unwrap(), 4, 16);
        let mut seen = Vec::new();
        let mut left = 30;
        while left > 0 {
            let step = walk.left().min(left);
            seen.push((walk.place(), step));
            walk.advance(step);
            left -= step;
        }
        assert_eq!(seen, [((5, 4), 12), ((4, 0), 16), ((9, 0), 2)]);
    }
}
