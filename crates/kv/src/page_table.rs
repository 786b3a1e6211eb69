//! Which pages of a cache hold which tokens of a request.

use std::ops::Range;

use crate::CacheLayout;

/// One worker's pages for one request. Entry `i` of the list holds the tokens from
/// `(first_page + i) * page_tokens` on.
#[derive(Clone, Copy, Debug)]
pub struct PageTable<'a> {
    /// The worker's layout, which says how many tokens a page holds.
    pub layout: &'a CacheLayout,
    /// How many pages of the request come before the list: 0 unless the list leaves out a prefix that is not
    /// going to move, or belongs to a later chunk of the request.
    pub first_page: u32,
    /// The page numbers.
    pub pages: &'a [u32],
}

impl<'a> PageTable<'a> {
    /// The pages of a whole request, from its first token on.
    pub fn new(layout: &'a CacheLayout, pages: &'a [u32]) -> Self {
        Self { layout, first_page: 0, pages }
    }

    /// The part of the list that holds these tokens, once it is known to be there and within the layout.
    pub(crate) fn covering(&self, tokens: &Range<u32>) -> Result<&'a [u32], PageTableError> {
        if tokens.is_empty() {
            return Ok(&[]);
        }
        let first = tokens.start / self.layout.page_tokens();
        let end = tokens.end.div_ceil(self.layout.page_tokens());
        let given = self.first_page..self.first_page.saturating_add(self.pages.len() as u32);
        if first < given.start || end > given.end {
            return Err(PageTableError::NotCovered { needed: first..end, given });
        }
        let pages = &self.pages[(first - given.start) as usize..(end - given.start) as usize];
        match pages.iter().copied().max() {
            Some(page) if page >= self.layout.pages() => {
                Err(PageTableError::PageOutOfRange { page, pages: self.layout.pages() })
            }
            _ => Ok(pages),
        }
    }

    /// Goes through these tokens page by page. [`covering`](PageTable::covering) has found their pages.
    pub(crate) fn walk(&self, covering: &'a [u32], tokens: &Range<u32>) -> Walk<'a> {
        let page_tokens = self.layout.page_tokens();
        Walk { pages: covering, at: 0, offset: tokens.start % page_tokens, page_tokens }
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

impl Walk<'_> {
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
        let table = PageTable { layout: &layout, first_page: 2, pages: &pages };
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
        let table = PageTable { layout: &layout, first_page: 1, pages: &[5, 4, 9] };
        let tokens = 20..50;
        let mut walk = table.walk(table.covering(&tokens).unwrap(), &tokens);
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
