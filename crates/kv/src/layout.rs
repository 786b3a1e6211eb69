//! Where one worker keeps its KV: the cache layout.

mod error;
mod placement;
mod pool;
mod share;
mod wire;

use std::ops::Range;

use crossdock_memory::PageLayout;

pub use error::CacheLayoutError;
pub use placement::{LayerBuffer, Placement};
pub use pool::{CachePart, CachePartOptions, CachePool, CachePoolOptions, Extent};
pub use share::{ContextShare, HeadOrder, HeadShare};
pub use wire::LayoutDecodeError;
pub(crate) use wire::rank_of;

use placement::Placed;

/// Describes one worker's KV: which share of it is here, and where each layer's pages lie in the regions that the worker
/// announces to its peers.
///
/// A layout is checked when it is made, and again when it comes [from a peer](CacheLayout::decode); afterwards
/// every page that it names has an address, and no two layers share a byte. Layers are numbered as in the
/// model, so that a pipeline rank that holds layers 30 to 60 says so.
///
/// [`new`](CacheLayout::new) makes the pool that holds the tokens of requests, [`with_part`](CacheLayout::with_part)
/// adds what is kept in the same pages beside keys and values, [`with_pool`](CacheLayout::with_pool) what has pages of
/// its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheLayout {
    model: String,
    model_layers: u32,
    layers: Range<u32>,
    kind: CacheKind,
    dtype: Dtype,
    rank: u32,
    context: ContextShare,
    /// The first one holds the tokens.
    pools: Vec<CachePool>,
}

/// What a [`CacheLayout`] is made of.
#[derive(Clone, Debug)]
pub struct LayoutOptions {
    /// The model's name, compared with the peer's; 1 to 255 bytes, no control characters.
    pub model: String,
    /// How many layers the model has.
    pub model_layers: u32,
    /// The layers of this worker, numbered as in the model.
    pub layers: Range<u32>,
    /// What is kept for a token, and which share of it is here.
    pub kind: CacheKind,
    /// How numbers are stored.
    pub dtype: Dtype,
    /// How many tokens a page holds.
    pub page_tokens: u32,
    /// How many pages each layer has.
    pub pages: u32,
    /// Where they are.
    pub placement: Placement,
}

/// What a layer keeps for each token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheKind {
    /// Multi-head latent attention: one compressed vector and one rotary key, equal on every TP rank.
    Mla {
        /// Of the compressed vector, with its scales where the dtype has them.
        latent_bytes: u32,
        /// Of the rotary key.
        rope_bytes: u32,
    },
    /// Attention with keys and values for each KV head (MHA, GQA, MQA), in buffers of their own.
    Heads {
        /// Which heads are here.
        heads: HeadShare,
        /// What one token's key, and as much again its value, takes for one head.
        head_bytes: u32,
        /// How they lie in a page.
        order: HeadOrder,
    },
}

impl CacheKind {
    /// What one token takes in one layer, keys and values together.
    pub fn token_bytes(&self) -> u64 {
        match *self {
            Self::Mla { latent_bytes, rope_bytes } => u64::from(latent_bytes) + u64::from(rope_bytes),
            Self::Heads { heads, head_bytes, .. } => {
                2 * u64::from(heads.count).saturating_mul(head_bytes.into())
            }
        }
    }

    /// The parts of a page.
    fn parts(&self) -> &'static [&'static str] {
        match self {
            Self::Mla { .. } => &["latent"],
            Self::Heads { .. } => &["k", "v"],
        }
    }

    /// Whether the same is kept, whichever share of it.
    fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Heads { heads: a, head_bytes: b, .. }, Self::Heads { heads: c, head_bytes: d, .. }) => {
                (a.of, b) == (c.of, d)
            }
            _ => self == other,
        }
    }
}

/// How the numbers of a cache are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Dtype {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
    /// 8-bit floating point, 4 bits of exponent, no infinities.
    Fp8E4m3,
    /// 8-bit floating point, 5 bits of exponent.
    Fp8E5m2,
    /// 8-bit integers.
    Int8,
    /// The packed MLA form: an e4m3 latent, its f32 scales, a bf16 rotary key.
    Fp8DsMla,
}

impl Dtype {
    /// The name that serving engines use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::Fp8E4m3 => "fp8_e4m3",
            Self::Fp8E5m2 => "fp8_e5m2",
            Self::Int8 => "int8",
            Self::Fp8DsMla => "fp8_ds_mla",
        }
    }
}

impl CacheLayout {
    /// Layouts have at most this many layers.
    pub const MAX_LAYERS: u32 = 1024;
    /// Pages hold at most this many tokens.
    pub const MAX_PAGE_TOKENS: u32 = 1 << 16;
    /// A token, or an entry, takes at most this many bytes in a layer.
    pub const MAX_TOKEN_BYTES: u64 = 1 << 26;
    /// All pools together have at most this many buffers, one for each layer and part.
    pub const MAX_BUFFERS: usize = 2048;
    /// The numbers of regions are below this.
    pub const MAX_REGIONS: u32 = 4096;
    /// A pool has at most this many parts.
    pub const MAX_PARTS: usize = 8;
    /// Ranks of one side that serve a request together are fewer than this.
    pub const MAX_RANKS: u32 = 1 << 12;
    /// A layout has at most this many pools.
    pub const MAX_POOLS: usize = 8;

    /// Checks the parts, and puts them together.
    pub fn new(options: LayoutOptions) -> Result<Self, CacheLayoutError> {
        let LayoutOptions { model, model_layers, layers, kind, dtype, page_tokens, pages, placement } =
            options;
        if model.is_empty() || model.len() > NAME_BYTES_MAX || model.contains(char::is_control) {
            return Err(CacheLayoutError::BadModelName { model });
        }
        let count = layers.end.saturating_sub(layers.start);
        if count == 0 || count > Self::MAX_LAYERS || layers.end > model_layers {
            return Err(CacheLayoutError::BadLayers { layers, model_layers });
        }
        let (heads, head_bytes, order) = match kind {
            CacheKind::Mla { .. } => (HeadShare::WHOLE, kind.token_bytes(), HeadOrder::TokensFirst),
            CacheKind::Heads { heads, head_bytes, order } => (heads, head_bytes.into(), order),
        };
        if !heads.is_sound() {
            return Err(CacheLayoutError::BadHeads { heads });
        }
        let token_bytes = head_bytes.saturating_mul(heads.count.into());
        if token_bytes == 0 || token_bytes > Self::MAX_TOKEN_BYTES {
            return Err(CacheLayoutError::BadTokenBytes { token_bytes });
        }
        if page_tokens == 0 || page_tokens > Self::MAX_PAGE_TOKENS {
            return Err(CacheLayoutError::BadPageTokens { page_tokens });
        }
        let names = kind.parts();
        let page_bytes = token_bytes * u64::from(page_tokens);
        let mut buffers = placement.buffers(&layers, names.len(), page_bytes, pages)?;
        if buffers.len() != count as usize * names.len() {
            return Err(CacheLayoutError::BufferCount { buffers: buffers.len(), layers: count });
        }
        let part = |name: &&str| CachePartOptions {
            name: name.to_string(),
            heads,
            head_bytes: head_bytes as u32,
            order,
            layers: layers.clone().collect(),
            buffers: buffers.drain(..count as usize).collect(),
        };
        let parts = names.iter().map(part).collect();
        let tokens = CachePool::checked(CachePoolOptions {
            name: "tokens".into(),
            extent: Extent::Tokens,
            page_tokens,
            pages,
            parts,
        })?;
        let context = ContextShare::ALL;
        let layout = Self { model, model_layers, layers, kind, dtype, rank: 0, context, pools: vec![tokens] };
        layout.check_buffers()?;
        Ok(layout)
    }

    /// Keeps something more in the pages of the tokens, as the keys of an indexer beside a latent.
    pub fn with_part(mut self, part: CachePartOptions) -> Result<Self, CacheLayoutError> {
        self.add_part(part)?;
        self.check_buffers()?;
        Ok(self)
    }

    /// Keeps something more, in pages of its own. A room has a list of pages for each pool.
    pub fn with_pool(mut self, pool: CachePoolOptions) -> Result<Self, CacheLayoutError> {
        self.add_pool(pool)?;
        self.check_buffers()?;
        Ok(self)
    }

    /// Whether its buffers collide is still to be checked.
    fn add_part(&mut self, part: CachePartOptions) -> Result<(), CacheLayoutError> {
        self.check_layers(&part)?;
        self.pools[0].add(part)
    }

    /// Whether its buffers collide is still to be checked.
    fn add_pool(&mut self, pool: CachePoolOptions) -> Result<(), CacheLayoutError> {
        if self.pools.len() == Self::MAX_POOLS {
            return Err(CacheLayoutError::PoolCount { pools: self.pools.len() + 1 });
        }
        if self.pools.iter().any(|known| known.name == pool.name) {
            return Err(CacheLayoutError::SameName { name: pool.name });
        }
        pool.parts.iter().try_for_each(|part| self.check_layers(part))?;
        self.pools.push(CachePool::checked(pool)?);
        Ok(())
    }

    /// The worker's number among those of its side that serve a request together, below
    /// [`MAX_RANKS`](CacheLayout::MAX_RANKS); 0 where it is alone.
    pub fn with_rank(self, rank: u32) -> Result<Self, CacheLayoutError> {
        match rank < Self::MAX_RANKS {
            true => Ok(Self { rank, ..self }),
            false => Err(CacheLayoutError::BadRank { rank }),
        }
    }

    /// Keeps only some tokens of each request. Pools of entries are not shared so.
    pub fn with_context(self, context: ContextShare) -> Result<Self, CacheLayoutError> {
        match context.is_sound() {
            true => Ok(Self { context, ..self }),
            false => Err(CacheLayoutError::BadContext { context }),
        }
    }

    /// All layers of DeepSeek-V3 or R1 in bf16, layer-major and without gaps in region 0.
    pub fn deepseek_r1(page_tokens: u32, pages: u32) -> Result<Self, CacheLayoutError> {
        Self::new(LayoutOptions {
            model: "deepseek-r1".into(),
            model_layers: 61,
            layers: 0..61,
            kind: CacheKind::Mla { latent_bytes: 1024, rope_bytes: 128 },
            dtype: Dtype::Bf16,
            page_tokens,
            pages,
            placement: Placement::LayerMajor { region: 0 },
        })
    }

    /// The KV of Llama-3-70B in bf16 on rank `rank` of `ranks`: its share of 8 heads in all 80 layers, layer-major and
    /// without gaps in region 0.
    pub fn llama_3_70b(
        page_tokens: u32,
        pages: u32,
        rank: u32,
        ranks: u32,
    ) -> Result<Self, CacheLayoutError> {
        let nobody = HeadShare { of: 8, first: rank, count: 0 };
        let heads = HeadShare::of_rank(8, rank, ranks).unwrap_or(nobody);
        Self::new(LayoutOptions {
            model: "llama-3-70b".into(),
            model_layers: 80,
            layers: 0..80,
            kind: CacheKind::Heads { heads, head_bytes: 256, order: HeadOrder::TokensFirst },
            dtype: Dtype::Bf16,
            page_tokens,
            pages,
            placement: Placement::LayerMajor { region: 0 },
        })?
        .with_rank(rank)
    }

    /// The model's name.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// The layers of this worker, numbered as in the model.
    pub fn layers(&self) -> Range<u32> {
        self.layers.clone()
    }

    /// What is kept for a token, and which share of it is here.
    pub fn kind(&self) -> CacheKind {
        self.kind
    }

    /// How numbers are stored.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The worker's number among those of its side that serve a request together.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Which tokens of a request are here.
    pub fn context(&self) -> ContextShare {
        self.context
    }

    /// Which tokens, or entries, a pool holds.
    pub(crate) fn context_of(&self, pool: usize) -> ContextShare {
        match self.pools[pool].extent {
            Extent::Entries => ContextShare::ALL,
            Extent::Tokens | Extent::Window(_) => self.context,
        }
    }

    /// The pools; the first one holds the tokens.
    pub fn pools(&self) -> &[CachePool] {
        &self.pools
    }

    /// The pool that holds the tokens.
    pub fn tokens(&self) -> &CachePool {
        &self.pools[0]
    }

    /// What one token takes in one layer, in the pages of the tokens.
    pub fn token_bytes(&self) -> u64 {
        self.tokens().token_bytes()
    }

    /// How many tokens a page holds.
    pub fn page_tokens(&self) -> u32 {
        self.tokens().page_tokens
    }

    /// What one page takes in one layer.
    pub fn page_bytes(&self) -> u64 {
        self.token_bytes() * u64::from(self.page_tokens())
    }

    /// How many pages each layer has.
    pub fn pages(&self) -> u32 {
        self.tokens().pages
    }

    /// How many pages hold what is kept here of a request of this many tokens.
    pub fn pages_for(&self, tokens: u32) -> u32 {
        self.context.held_before(tokens).div_ceil(self.page_tokens())
    }

    /// The buffers of everything.
    pub fn buffers(&self) -> impl Iterator<Item = &LayerBuffer> {
        self.pools.iter().flat_map(|pool| &pool.parts).flat_map(|part| &part.buffers)
    }

    /// The buffer of a layer's latent or keys, the first part of the tokens' pages; `None` if the layer is not here.
    pub fn buffer(&self, layer: u32) -> Option<LayerBuffer> {
        self.tokens().parts[0].buffer(layer)
    }

    /// Where the pages of a layer's latent or keys lie in their region; `None` if the layer is not here.
    pub fn page_layout(&self, layer: u32) -> Option<PageLayout> {
        self.tokens().parts[0].page_layout(layer)
    }

    /// How long a region must be to hold what this layout places in it; 0 if nothing.
    pub fn bytes_needed(&self, region: u32) -> u64 {
        let ends =
            self.placed().filter(|placed| placed.region == region).filter_map(|placed| placed.pages.end());
        ends.max().unwrap_or(0)
    }

    /// What two workers must have in common, as named values to be compared in the handshake. What the planner
    /// bridges is not in it: page sizes, strides, the number of pages, which worker holds which layers, heads and
    /// tokens.
    pub fn fingerprint(&self) -> Vec<(String, String)> {
        let mut values = vec![
            ("model".to_string(), self.model.clone()),
            ("layers".into(), self.model_layers.to_string()),
            ("dtype".into(), self.dtype.name().into()),
        ];
        let mut add = |key: &str, value: String| values.push((key.to_string(), value));
        match self.kind {
            CacheKind::Mla { latent_bytes, rope_bytes } => {
                add("kind", "mla".into());
                add("latent_bytes", latent_bytes.to_string());
                add("rope_bytes", rope_bytes.to_string());
            }
            CacheKind::Heads { heads, head_bytes, .. } => {
                add("kind", "heads".into());
                add("kv_heads", heads.of.to_string());
                add("head_bytes", head_bytes.to_string());
            }
        }
        let of_kind = self.kind.parts().len();
        for (nth, pool) in self.pools.iter().enumerate() {
            if nth > 0 {
                add(&format!("pool {}", pool.name), format!("{:?}", pool.extent).to_lowercase());
            }
            for part in pool.parts.iter().skip(if nth == 0 { of_kind } else { 0 }) {
                let value = format!("{} x {} bytes", part.heads.of, part.head_bytes);
                add(&format!("part {} of {}", part.name, pool.name), value);
            }
        }
        values
    }

    /// In what two layouts differ that their [fingerprints](CacheLayout::fingerprint) hold, found without writing these
    /// down.
    pub(crate) fn differs_in(&self, other: &Self) -> Option<&'static str> {
        if self.model != other.model {
            Some("model")
        } else if self.model_layers != other.model_layers {
            Some("layers")
        } else if !self.kind.is_like(&other.kind) {
            Some("kind")
        } else if self.dtype != other.dtype {
            Some("dtype")
        } else if !self.are_pools_like(other) {
            Some("pools")
        } else {
            None
        }
    }

    fn are_pools_like(&self, other: &Self) -> bool {
        let is_like = |(one, two): (&CachePool, &CachePool)| {
            (&one.name, one.extent, one.parts.len()) == (&two.name, two.extent, two.parts.len())
                && one.parts.iter().zip(&two.parts).all(|(one, two)| one.is_like(two))
        };
        self.pools.len() == other.pools.len() && self.pools.iter().zip(&other.pools).all(is_like)
    }

    fn check_layers(&self, part: &CachePartOptions) -> Result<(), CacheLayoutError> {
        match part.layers.iter().all(|layer| self.layers.contains(layer)) {
            true => Ok(()),
            false => Err(CacheLayoutError::BadPartLayers { part: part.name.clone() }),
        }
    }

    fn placed(&self) -> impl Iterator<Item = Placed> {
        self.pools.iter().flat_map(|pool| &pool.parts).flat_map(|part| {
            part.layers.iter().zip(&part.buffers).map(|(&layer, buffer)| Placed {
                layer,
                region: buffer.region,
                pages: part.placed(buffer),
            })
        })
    }

    /// No two buffers share a byte.
    fn check_buffers(&self) -> Result<(), CacheLayoutError> {
        let buffers = self.buffers().count();
        // The check compares buffers that lie between each other's pages with each other, and a peer sends as many as it
        // likes.
        if buffers > Self::MAX_BUFFERS {
            return Err(CacheLayoutError::TooManyBuffers { buffers });
        }
        let mut order: Vec<Placed> = self.placed().collect();
        order.sort_by_key(|placed| (placed.region, placed.pages.offset));
        for (nth, one) in order.iter().enumerate() {
            let clash = order[nth + 1..]
                .iter()
                .take_while(|other| one.reaches(other))
                .find(|other| one.collides_with(other));
            if let Some(other) = clash {
                return Err(CacheLayoutError::BuffersCollide { layer: one.layer, other: other.layer });
            }
        }
        Ok(())
    }
}

/// The length of a name is one byte on the wire.
const NAME_BYTES_MAX: usize = 255;

#[cfg(test)]
mod tests {
    use crossdock_memory::{LayoutError, MAX_PAGES};

    use super::*;

    fn options(placement: Placement) -> LayoutOptions {
        LayoutOptions {
            model: "m".into(),
            model_layers: 8,
            layers: 2..5,
            kind: CacheKind::Mla { latent_bytes: 6, rope_bytes: 2 },
            dtype: Dtype::Bf16,
            page_tokens: 4,
            pages: 10,
            placement,
        }
    }

    fn buffers(buffers: [(u32, u64, u64); 3]) -> Placement {
        let buffer = |(region, offset, stride_bytes)| LayerBuffer { region, offset, stride_bytes };
        Placement::Buffers(buffers.map(buffer).to_vec())
    }

    #[test]
    fn deepseek_r1_takes_what_the_arithmetic_says() {
        let layout = CacheLayout::deepseek_r1(64, 128).unwrap();
        assert_eq!(layout.token_bytes(), 1152);
        assert_eq!(layout.page_bytes(), 73_728);
        assert_eq!(layout.bytes_needed(0), 8192 * 70_272);
        assert_eq!(layout.bytes_needed(1), 0);
        assert_eq!(layout.layers(), 0..61);
        assert_eq!((layout.pages_for(0), layout.pages_for(64), layout.pages_for(65)), (0, 1, 2));
    }

    #[test]
    fn both_even_placements_fill_the_region_without_gaps() {
        let layer_major = CacheLayout::new(options(Placement::LayerMajor { region: 3 })).unwrap();
        assert_eq!(layer_major.page_layout(4), Some(PageLayout::dense(640, 32, 10)));
        let page_major = CacheLayout::new(options(Placement::PageMajor { region: 3 })).unwrap();
        let expected = PageLayout { offset: 64, stride_bytes: 96, page_bytes: 32, pages: 10 };
        assert_eq!(page_major.page_layout(4), Some(expected));
        for layout in [layer_major, page_major] {
            assert_eq!(layout.bytes_needed(3), 960);
            assert_eq!(layout.layers(), 2..5);
            assert_eq!((layout.page_layout(1), layout.page_layout(5)), (None, None));
        }
    }

    #[test]
    fn parts_that_make_no_sense_are_named() {
        type Change = fn(&mut LayoutOptions);
        let cases: [(Change, CacheLayoutError); 10] = [
            (|o| o.model.clear(), CacheLayoutError::BadModelName { model: "".into() }),
            (|o| o.model = "a\n".into(), CacheLayoutError::BadModelName { model: "a\n".into() }),
            (|o| o.layers = 2..2, CacheLayoutError::BadLayers { layers: 2..2, model_layers: 8 }),
            (|o| o.layers = 7..9, CacheLayoutError::BadLayers { layers: 7..9, model_layers: 8 }),
            (
                |o| o.kind = CacheKind::Mla { latent_bytes: 0, rope_bytes: 0 },
                CacheLayoutError::BadTokenBytes { token_bytes: 0 },
            ),
            (
                |o| o.kind = CacheKind::Mla { latent_bytes: u32::MAX, rope_bytes: u32::MAX },
                CacheLayoutError::BadTokenBytes { token_bytes: 2 * u64::from(u32::MAX) },
            ),
            (|o| o.page_tokens = 0, CacheLayoutError::BadPageTokens { page_tokens: 0 }),
            (|o| o.pages = 0, CacheLayoutError::BadPages { pages: 0 }),
            (
                |o| o.placement = Placement::Buffers(Vec::new()),
                CacheLayoutError::BufferCount { buffers: 0, layers: 3 },
            ),
            (
                |o| o.placement = buffers([(0, 0, 32), (0, 320, 31), (1, 0, 32)]),
                CacheLayoutError::BadBuffer {
                    layer: 3,
                    source: LayoutError::Overlap { stride_bytes: 31, page_bytes: 32 },
                },
            ),
        ];
        for (change, expected) in cases {
            let mut changed = options(Placement::LayerMajor { region: 0 });
            change(&mut changed);
            assert_eq!(CacheLayout::new(changed), Err(expected));
        }
    }

    #[test]
    fn the_largest_parts_overflow_into_an_error() {
        for placement in [Placement::LayerMajor { region: 0 }, Placement::PageMajor { region: 0 }] {
            let largest = LayoutOptions {
                model_layers: CacheLayout::MAX_LAYERS,
                layers: 0..CacheLayout::MAX_LAYERS,
                kind: CacheKind::Mla { latent_bytes: 1 << 20, rope_bytes: 0 },
                page_tokens: CacheLayout::MAX_PAGE_TOKENS,
                pages: MAX_PAGES,
                ..options(placement)
            };
            let error = CacheLayout::new(largest).unwrap_err();
            assert!(
                matches!(error, CacheLayoutError::BadBuffer { source: LayoutError::Overflow, .. }),
                "{error}"
            );
        }
    }

    #[test]
    fn layers_that_share_bytes_are_refused() {
        let fits = [
            [(0, 0, 32), (0, 320, 32), (0, 640, 32)],
            [(0, 640, 32), (0, 0, 32), (0, 320, 32)],
            [(0, 0, 32), (1, 0, 32), (2, 0, 32)],
            [(0, 64, 100), (0, 0, 100), (0, 32, 100)],
            [(0, 0, 32), (0, 320, 77), (0, 2000, 32)],
        ];
        for placement in fits {
            CacheLayout::new(options(buffers(placement))).unwrap();
        }
        let clashes = [
            ([(0, 0, 32), (0, 319, 32), (0, 640, 32)], (2, 3)),
            ([(0, 5, 32), (0, 320, 32), (0, 5, 32)], (2, 4)),
            ([(0, 0, 96), (0, 32, 96), (0, 65, 96)], (2, 4)),
            ([(0, 0, 96), (0, 64, 96), (0, 31, 96)], (2, 4)),
            ([(0, 0, 96), (0, 32, 192), (1, 0, 32)], (2, 3)),
        ];
        for (placement, (layer, other)) in clashes {
            assert_eq!(
                CacheLayout::new(options(buffers(placement))),
                Err(CacheLayoutError::BuffersCollide { layer, other }),
            );
        }
    }

    #[test]
    fn the_fingerprint_holds_what_cannot_be_bridged_and_nothing_else() {
        let text: Vec<String> = CacheLayout::deepseek_r1(64, 10)
            .unwrap()
            .fingerprint()
            .into_iter()
            .map(|(key, value)| format!("{key} {value}"))
            .collect();
        let expected = [
            "model deepseek-r1",
            "layers 61",
            "dtype bf16",
            "kind mla",
            "latent_bytes 1024",
            "rope_bytes 128",
        ];
        assert_eq!(text, expected);
        let one = CacheLayout::new(options(Placement::LayerMajor { region: 0 })).unwrap();
        let bridged = LayoutOptions {
            layers: 0..8,
            page_tokens: 16,
            pages: 3,
            ..options(Placement::PageMajor { region: 9 })
        };
        let two = CacheLayout::new(bridged).unwrap();
        assert_eq!(one.fingerprint(), two.fingerprint());
        assert_eq!(one.differs_in(&two), None);
    }

    #[test]
    fn two_layouts_differ_where_their_fingerprints_do() {
        type Change = fn(&mut LayoutOptions);
        let base = CacheLayout::new(options(Placement::LayerMajor { region: 0 })).unwrap();
        let changes: [(Change, &str); 4] = [
            (|o| o.model = "other".into(), "model"),
            (|o| o.model_layers = 9, "layers"),
            (|o| o.dtype = Dtype::Fp8E4m3, "dtype"),
            (|o| o.kind = CacheKind::Mla { latent_bytes: 5, rope_bytes: 3 }, "kind"),
        ];
        for (change, key) in changes {
            let mut changed = options(Placement::LayerMajor { region: 0 });
            change(&mut changed);
            let other = CacheLayout::new(changed).unwrap();
            assert_eq!(base.differs_in(&other), Some(key));
            assert_ne!(base.fingerprint(), other.fingerprint());
        }
    }
}
