//! Pools of pages, and the parts that are kept in each of their pages.

use crossdock_memory::{LayoutError, MAX_PAGES, PageLayout};

use super::{CacheLayout, CacheLayoutError, HeadOrder, HeadShare, LayerBuffer};

/// Pages of one kind of a worker's cache. The first pool of every layout holds the tokens of a request; others hold what
/// is kept beside them: a window of the last tokens, or the state of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachePool {
    pub(super) name: String,
    pub(super) extent: Extent,
    pub(super) page_tokens: u32,
    pub(super) pages: u32,
    pub(super) parts: Vec<CachePart>,
}

/// What of a request a pool's pages hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Extent {
    /// Every token.
    Tokens,
    /// The last so many tokens (sliding-window attention). Their pages begin with the one that holds the first of them.
    Window(u32),
    /// Entries of fixed size that do not grow with the request (Mamba's state, an indexer's state): entry by entry, as
    /// many as are listed on both sides.
    Entries,
}

/// What a pool's pages hold of each layer: keys, values, a latent, an indexer's keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachePart {
    pub(super) name: String,
    pub(super) heads: HeadShare,
    pub(super) head_bytes: u32,
    pub(super) order: HeadOrder,
    pub(super) page_tokens: u32,
    pub(super) pages: u32,
    /// In ascending order.
    pub(super) layers: Vec<u32>,
    /// One for each of them.
    pub(super) buffers: Vec<LayerBuffer>,
}

/// What a [`CachePool`] is made of.
#[derive(Clone, Debug)]
pub struct CachePoolOptions {
    /// Compared with the peer's; 1 to 255 bytes, no control characters.
    pub name: String,
    /// What of a request its pages hold.
    pub extent: Extent,
    /// How many tokens a page holds; 1 where pages hold entries.
    pub page_tokens: u32,
    /// How many pages each layer has.
    pub pages: u32,
    /// What is in a page; at least one part.
    pub parts: Vec<CachePartOptions>,
}

/// What a [`CachePart`] is made of.
#[derive(Clone, Debug)]
pub struct CachePartOptions {
    /// Compared with the peer's; 1 to 255 bytes, no control characters.
    pub name: String,
    /// Which heads are here; [`HeadShare::WHOLE`] for what is not split.
    pub heads: HeadShare,
    /// What one token, or one entry, takes for one head.
    pub head_bytes: u32,
    /// How they lie in a page.
    pub order: HeadOrder,
    /// The layers that keep this part, in ascending order, numbered as in the model.
    pub layers: Vec<u32>,
    /// Where the pages of each of them are.
    pub buffers: Vec<LayerBuffer>,
}

impl CachePool {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What of a request its pages hold.
    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// How many tokens a page holds.
    pub fn page_tokens(&self) -> u32 {
        self.page_tokens
    }

    /// How many pages each layer has.
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// What its pages hold.
    pub fn parts(&self) -> &[CachePart] {
        &self.parts
    }

    /// The part of this name: `"latent"` of an MLA cache, `"k"` and `"v"` of one with heads, or as it was named when it was
    /// added.
    pub fn part(&self, name: &str) -> Option<&CachePart> {
        self.parts.iter().find(|part| part.name == name)
    }

    /// What one token takes in one layer that keeps all parts.
    pub fn token_bytes(&self) -> u64 {
        self.parts.iter().map(CachePart::token_bytes).sum()
    }

    pub(super) fn checked(options: CachePoolOptions) -> Result<Self, CacheLayoutError> {
        let CachePoolOptions { name, extent, page_tokens, pages, parts } = options;
        check_name(&name)?;
        if page_tokens == 0 || page_tokens > CacheLayout::MAX_PAGE_TOKENS {
            return Err(CacheLayoutError::BadPageTokens { page_tokens });
        }
        if extent == Extent::Entries && page_tokens != 1 {
            return Err(CacheLayoutError::BadPageTokens { page_tokens });
        }
        if pages == 0 || pages > MAX_PAGES {
            return Err(CacheLayoutError::BadPages { pages });
        }
        if parts.is_empty() || parts.len() > CacheLayout::MAX_PARTS {
            return Err(CacheLayoutError::PartCount { pool: name, parts: parts.len() });
        }
        let mut pool = Self { name, extent, page_tokens, pages, parts: Vec::with_capacity(parts.len()) };
        parts.into_iter().try_for_each(|part| pool.add(part))?;
        Ok(pool)
    }

    pub(super) fn add(&mut self, options: CachePartOptions) -> Result<(), CacheLayoutError> {
        let CachePartOptions { name, heads, head_bytes, order, layers, buffers } = options;
        check_name(&name)?;
        if self.parts.len() == CacheLayout::MAX_PARTS {
            return Err(CacheLayoutError::PartCount { pool: self.name.clone(), parts: self.parts.len() + 1 });
        }
        if self.parts.iter().any(|part| part.name == name) {
            return Err(CacheLayoutError::SameName { name });
        }
        if !heads.is_sound() {
            return Err(CacheLayoutError::BadHeads { heads });
        }
        let token_bytes = u64::from(heads.count) * u64::from(head_bytes);
        if token_bytes == 0 || token_bytes > CacheLayout::MAX_TOKEN_BYTES {
            return Err(CacheLayoutError::BadTokenBytes { token_bytes });
        }
        if layers.is_empty() || !layers.is_sorted_by(|a, b| a < b) {
            return Err(CacheLayoutError::BadPartLayers { part: name });
        }
        if buffers.len() != layers.len() {
            return Err(CacheLayoutError::BufferCount {
                buffers: buffers.len(),
                layers: layers.len() as u32,
            });
        }
        let (page_tokens, pages) = (self.page_tokens, self.pages);
        let part = CachePart { name, heads, head_bytes, order, page_tokens, pages, layers, buffers };
        for (&layer, buffer) in part.layers.iter().zip(&part.buffers) {
            if buffer.region >= CacheLayout::MAX_REGIONS {
                return Err(CacheLayoutError::BadRegion { region: buffer.region });
            }
            let placed = part.placed(buffer).validate(u64::MAX);
            placed.map_err(|source: LayoutError| CacheLayoutError::BadBuffer { layer, source })?;
        }
        self.parts.push(part);
        Ok(())
    }
}

impl CachePart {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which heads are here.
    pub fn heads(&self) -> HeadShare {
        self.heads
    }

    /// What one token takes for one head.
    pub fn head_bytes(&self) -> u32 {
        self.head_bytes
    }

    /// How the heads and tokens of a page lie in it.
    pub fn order(&self) -> HeadOrder {
        self.order
    }

    /// How many tokens a page holds.
    pub fn page_tokens(&self) -> u32 {
        self.page_tokens
    }

    /// How many pages each layer has.
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// The layers that keep it, in ascending order.
    pub fn layers(&self) -> &[u32] {
        &self.layers
    }

    /// What one token takes in one layer.
    pub fn token_bytes(&self) -> u64 {
        u64::from(self.heads.count) * u64::from(self.head_bytes)
    }

    /// What one page takes in one layer.
    pub fn page_bytes(&self) -> u64 {
        self.token_bytes() * u64::from(self.page_tokens)
    }

    /// The buffers, in the order of the layers.
    pub fn buffers(&self) -> &[LayerBuffer] {
        &self.buffers
    }

    /// The buffer of a layer; `None` if the layer does not keep this part, or is not here.
    pub fn buffer(&self, layer: u32) -> Option<LayerBuffer> {
        // The layers of most parts follow each other.
        let at = layer.checked_sub(*self.layers.first()?)? as usize;
        let at = match self.layers.get(at) {
            Some(&found) if found == layer => at,
            _ => self.layers.binary_search(&layer).ok()?,
        };
        Some(self.buffers[at])
    }

    /// Where a layer's pages lie in its region; `None` as for [`buffer`](CachePart::buffer).
    pub fn page_layout(&self, layer: u32) -> Option<PageLayout> {
        self.buffer(layer).map(|buffer| self.placed(&buffer))
    }

    /// Where in a page the bytes of a token begin for a head that is here.
    pub fn place(&self, token: u32, head: u32) -> u64 {
        let (token, head) = (u64::from(token), u64::from(head - self.heads.first));
        let (count, tokens) = (u64::from(self.heads.count), u64::from(self.page_tokens));
        let nth = match self.order {
            HeadOrder::TokensFirst => token * count + head,
            HeadOrder::HeadsFirst => head * tokens + token,
        };
        nth * u64::from(self.head_bytes)
    }

    /// Where in its region the bytes of a token of a page begin for a head that is here; `None` if the layer does not keep
    /// this part, or there is no such page.
    pub fn offset(&self, layer: u32, page: u32, token: u32, head: u32) -> Option<u64> {
        Some(self.page_layout(layer)?.page_offset(page)? + self.place(token, head))
    }

    pub(super) fn placed(&self, buffer: &LayerBuffer) -> PageLayout {
        PageLayout {
            offset: buffer.offset,
            stride_bytes: buffer.stride_bytes,
            page_bytes: self.page_bytes(),
            pages: self.pages,
        }
    }

    /// Whether the tokens of one head follow each other, and those of other heads lie elsewhere. With one head both
    /// orders are the same.
    pub(crate) fn is_by_head(&self) -> bool {
        self.order == HeadOrder::HeadsFirst && self.heads.count > 1
    }

    /// Whether what is kept is the same, whichever share of it.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        self.name == other.name && self.heads.of == other.heads.of && self.head_bytes == other.head_bytes
    }
}

fn check_name(name: &str) -> Result<(), CacheLayoutError> {
    match name.is_empty() || name.len() > super::NAME_BYTES_MAX || name.contains(char::is_control) {
        true => Err(CacheLayoutError::BadName { name: name.to_string() }),
        false => Ok(()),
    }
}
