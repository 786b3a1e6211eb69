//! Where the pages of a buffer lie inside a region.

/// Page `i` begins at `offset + i * stride_bytes` and is `page_bytes` long.
///
/// The fields are public and come from configuration or from a peer, so every method checks its arithmetic;
/// [`PageLayout::validate`] says once whether the whole layout fits a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageLayout {
    /// Where page 0 begins, from the start of the region.
    pub offset: u64,
    /// From the start of one page to the start of the next.
    pub stride_bytes: u64,
    /// Length of each page. What lies between its end and the next page is padding, or belongs to someone else.
    pub page_bytes: u64,
    /// How many pages there are.
    pub pages: u32,
}

impl PageLayout {
    /// Pages that touch each other: the stride is the page.
    pub const fn dense(offset: u64, page_bytes: u64, pages: u32) -> PageLayout {
        PageLayout { offset, stride_bytes: page_bytes, page_bytes, pages }
    }

    /// Whether the layout describes at least one page, without overlap, inside a region of `region_bytes`.
    pub fn validate(&self, region_bytes: u64) -> Result<(), LayoutError> {
        if self.pages == 0 || self.page_bytes == 0 {
            return Err(LayoutError::Empty { pages: self.pages, page_bytes: self.page_bytes });
        }
        if self.stride_bytes < self.page_bytes {
            return Err(LayoutError::Overlap {
                stride_bytes: self.stride_bytes,
                page_bytes: self.page_bytes,
            });
        }
        match self.end() {
            None => Err(LayoutError::Overflow),
            Some(end) if end > region_bytes => Err(LayoutError::OutsideRegion { end, region_bytes }),
            Some(_) => Ok(()),
        }
    }

    /// The first byte after the last page; the offset itself when there is no page, `None` when it does not fit
    /// 64 bits.
    #[inline]
    pub fn end(&self) -> Option<u64> {
        match self.pages.checked_sub(1) {
            None => Some(self.offset),
            Some(last) => self.page_offset(last)?.checked_add(self.page_bytes),
        }
    }

    /// Where page `page` begins; `None` when there is no such page.
    #[inline]
    pub fn page_offset(&self, page: u32) -> Option<u64> {
        if page >= self.pages {
            return None;
        }
        self.stride_bytes.checked_mul(u64::from(page))?.checked_add(self.offset)
    }

    /// Whether the pages touch each other, so that a run of pages is one run of bytes.
    #[inline]
    pub fn is_dense(&self) -> bool {
        self.stride_bytes == self.page_bytes
    }

    /// The first and the last page that the bytes `offset .. offset + bytes` touch.
    ///
    /// `None` unless every one of these bytes lies in a page: not when the range leaves the layout, nor when it
    /// touches what lies between two pages, nor when it is empty. A receiver can therefore check a write against
    /// the pages that were granted and know that no other byte changes.
    #[inline]
    pub fn locate(&self, offset: u64, bytes: u64) -> Option<(u32, u32)> {
        let from = offset.checked_sub(self.offset)?;
        let last_byte = from.checked_add(bytes.checked_sub(1)?)?;
        let first = self.page_at(from)?;
        let last = self.page_at(last_byte)?;
        (first == last || self.is_dense()).then_some((first, last))
    }

    /// The page that holds the byte `from` bytes after the layout's offset.
    #[inline]
    fn page_at(&self, from: u64) -> Option<u32> {
        let page = u32::try_from(from.checked_div(self.stride_bytes)?).ok()?;
        (page < self.pages && from % self.stride_bytes < self.page_bytes).then_some(page)
    }
}

/// Why a layout cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// There is no page, or the pages have no bytes.
    #[error("a layout of {pages} pages of {page_bytes} bytes holds nothing")]
    Empty {
        /// How many pages it has.
        pages: u32,
        /// How long each is.
        page_bytes: u64,
    },
    /// A page would begin before the one before it ends.
    #[error("a stride of {stride_bytes} bytes makes pages of {page_bytes} bytes overlap")]
    Overlap {
        /// From one page to the next.
        stride_bytes: u64,
        /// Length of a page.
        page_bytes: u64,
    },
    /// The end of the layout does not fit 64 bits.
    #[error("the end of the layout does not fit 64 bits")]
    Overflow,
    /// The layout is longer than the region.
    #[error("the layout ends at byte {end}, the region at byte {region_bytes}")]
    OutsideRegion {
        /// Where the layout ends.
        end: u64,
        /// Where the region ends.
        region_bytes: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    const PADDED: PageLayout = PageLayout { offset: 100, stride_bytes: 64, page_bytes: 48, pages: 4 };

    #[test]
    fn pages_lie_where_the_formula_says() {
        assert_eq!(PADDED.page_offset(0), Some(100));
        assert_eq!(PADDED.page_offset(3), Some(292));
        assert_eq!(PADDED.page_offset(4), None);
        assert_eq!(PADDED.end(), Some(340));
        assert!(!PADDED.is_dense());
        assert!(PageLayout::dense(0, 16, 3).is_dense());
        assert_eq!(PageLayout::dense(7, 16, 0).end(), Some(7));
    }

    #[test]
    fn validate_names_what_is_wrong() {
        assert_eq!(PADDED.validate(340), Ok(()));
        assert_eq!(PADDED.validate(339), Err(LayoutError::OutsideRegion { end: 340, region_bytes: 339 }));
        assert_eq!(
            PageLayout { pages: 0, ..PADDED }.validate(1000),
            Err(LayoutError::Empty { pages: 0, page_bytes: 48 })
        );
        assert_eq!(
            PageLayout { page_bytes: 0, ..PADDED }.validate(1000),
            Err(LayoutError::Empty { pages: 4, page_bytes: 0 })
        );
        assert_eq!(
            PageLayout { stride_bytes: 47, ..PADDED }.validate(1000),
            Err(LayoutError::Overlap { stride_bytes: 47, page_bytes: 48 })
        );
    }

    #[test]
    fn arithmetic_that_leaves_64_bits_is_refused_at_each_step() {
        let multiplication = PageLayout { offset: 0, stride_bytes: u64::MAX / 2, page_bytes: 1, pages: 4 };
        let addition = PageLayout { offset: u64::MAX - 63, stride_bytes: 64, page_bytes: 1, pages: 2 };
        let last_page = PageLayout { offset: u64::MAX - 4, stride_bytes: 8, page_bytes: 8, pages: 1 };
        for layout in [multiplication, addition, last_page] {
            assert_eq!(layout.end(), None, "{layout:?}");
            assert_eq!(layout.validate(u64::MAX), Err(LayoutError::Overflow), "{layout:?}");
        }
        assert_eq!(multiplication.page_offset(3), None);
        let fits = PageLayout { offset: u64::MAX - 8, stride_bytes: 8, page_bytes: 8, pages: 1 };
        assert_eq!(fits.end(), Some(u64::MAX));
        assert_eq!(fits.validate(u64::MAX), Ok(()));
    }

    #[test]
    fn locate_takes_only_bytes_of_pages() {
        assert_eq!(PADDED.locate(100, 48), Some((0, 0)));
        assert_eq!(PADDED.locate(147, 1), Some((0, 0)));
        assert_eq!(PADDED.locate(292, 48), Some((3, 3)));
        for (offset, bytes) in
            [(99, 1), (99, 2), (100, 49), (148, 1), (148, 16), (147, 18), (100, 64), (292, 49)]
        {
            assert_eq!(PADDED.locate(offset, bytes), None, "{offset} + {bytes}");
        }
        for (offset, bytes) in
            [(100, 0), (356, 1), (0, u64::MAX), (u64::MAX, 1), (u64::MAX, u64::MAX), (101, u64::MAX)]
        {
            assert_eq!(PADDED.locate(offset, bytes), None, "{offset} + {bytes}");
        }
        assert_eq!(PageLayout { stride_bytes: 0, ..PADDED }.locate(100, 1), None);
        assert_eq!(PageLayout::dense(0, u64::MAX, 1).locate(0, u64::MAX), Some((0, 0)));
    }

    #[test]
    fn locate_spans_pages_only_where_they_touch() {
        let dense = PageLayout::dense(100, 64, 4);
        assert_eq!(dense.locate(100, 256), Some((0, 3)));
        assert_eq!(dense.locate(163, 2), Some((0, 1)));
        assert_eq!(dense.locate(164, 64), Some((1, 1)));
        assert_eq!(dense.locate(100, 257), None);
    }

    proptest::proptest! {
        #[test]
        fn locate_agrees_with_a_look_at_every_byte(
            offset in 0u64..20, padding in 0u64..5, page_bytes in 1u64..9, pages in 0u32..6,
            at in 0u64..90, bytes in 0u64..40,
        ) {
            let layout = PageLayout { offset, stride_bytes: page_bytes + padding, page_bytes, pages };
            let page_of = |byte: u64| (0..pages).find(|&page| {
                let begin = layout.page_offset(page).unwrap();
                (begin..begin + page_bytes).contains(&byte)
            });
            let touched: Option<Vec<u32>> = (at..at + bytes).map(page_of).collect();
            let expected = touched.and_then(|touched| Some((*touched.first()?, *touched.last()?)));
            proptest::prop_assert_eq!(layout.locate(at, bytes), expected);
        }
    }
}
