//! Where the pages of each layer are, and whether any two of them share a byte.

use std::ops::Range;

use crossdock_memory::{LayoutError, PageLayout};

use super::CacheLayoutError;

/// One layer's pages: page `i` begins at `offset + i * stride_bytes` of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerBuffer {
    /// The region's number in the worker's announcement.
    pub region: u32,
    /// Where page 0 begins in it.
    pub offset: u64,
    /// From the start of one page to the start of the next.
    pub stride_bytes: u64,
}

/// Where the pages of all layers are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Placement {
    /// From the start of one region: all pages of the first layer, then all pages of the next, without gaps. Where keys
    /// and values have buffers of their own, the keys of all layers come before the values of all layers.
    LayerMajor {
        /// Which region.
        region: u32,
    },
    /// From the start of one region: page 0 of all layers, then page 1 of all layers, without gaps; keys before values.
    PageMajor {
        /// Which region.
        region: u32,
    },
    /// As the engine has allocated them: one buffer for each layer, in the order of the layers; where keys and values
    /// have buffers of their own, first the keys' of all layers, then the values'.
    Buffers(Vec<LayerBuffer>),
}

/// The pages of one layer and part.
pub(super) struct Placed {
    pub layer: u32,
    pub region: u32,
    pub pages: PageLayout,
}

impl Placed {
    /// Whether it ends behind the beginning of a later one.
    pub fn reaches(&self, later: &Self) -> bool {
        self.region == later.region && self.pages.end().is_none_or(|end| end > later.pages.offset)
    }

    /// Whether a page shares a byte with a page of a later one that it reaches. With equal strides that is a question of
    /// one page; with different ones the pages would meet sooner or later, so that is refused without looking further.
    pub fn collides_with(&self, later: &Self) -> bool {
        let (one, two) = (&self.pages, &later.pages);
        let into_page = (two.offset - one.offset) % one.stride_bytes;
        one.stride_bytes != two.stride_bytes
            || into_page < one.page_bytes
            || one.stride_bytes - into_page < two.page_bytes
    }
}

impl Placement {
    /// The buffers of all layers of each part; all parts take equally many bytes.
    pub(super) fn buffers(
        self,
        layers: &Range<u32>,
        parts: usize,
        page_bytes: u64,
        pages: u32,
    ) -> Result<Vec<LayerBuffer>, CacheLayoutError> {
        let evenly = |region, step_bytes: Option<u64>, stride_bytes: Option<u64>| {
            let places = (0..parts as u64).flat_map(|part| layers.clone().map(move |layer| (part, layer)));
            let buffer = |(part, layer): (u64, u32)| {
                let nth = part * layers.len() as u64 + u64::from(layer - layers.start);
                let offset = step_bytes.and_then(|bytes| bytes.checked_mul(nth));
                let (Some(offset), Some(stride_bytes)) = (offset, stride_bytes) else {
                    return Err(CacheLayoutError::BadBuffer { layer, source: LayoutError::Overflow });
                };
                Ok(LayerBuffer { region, offset, stride_bytes })
            };
            places.map(buffer).collect()
        };
        match self {
            Self::LayerMajor { region } => {
                evenly(region, page_bytes.checked_mul(pages.into()), Some(page_bytes))
            }
            Self::PageMajor { region } => {
                evenly(region, Some(page_bytes), page_bytes.checked_mul((layers.len() * parts) as u64))
            }
            Self::Buffers(buffers) => Ok(buffers),
        }
    }
}
