//! Where one worker keeps its KV: the cache layout.

mod wire;

use std::ops::Range;

use crossdock_memory::{LayoutError, MAX_PAGES, PageLayout};

pub use wire::LayoutDecodeError;

/// Describes one worker's KV: what it holds, and where each layer's pages lie in the regions that the worker
/// announces to its peers.
///
/// A layout is checked when it is made, and again when it comes [from a peer](CacheLayout::decode); afterwards
/// every page that it names has an address, and no two layers share a byte. Layers are numbered as in the
/// model, so that a pipeline rank that holds layers 30 to 60 says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheLayout {
    model: String,
    model_layers: u32,
    first_layer: u32,
    kind: CacheKind,
    dtype: Dtype,
    page_tokens: u32,
    pages: u32,
    /// One for each layer, from `first_layer` on.
    buffers: Vec<LayerBuffer>,
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
    /// What is kept for a token.
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
}

impl CacheKind {
    /// What one token takes in one layer.
    pub fn token_bytes(&self) -> u64 {
        match *self {
            Self::Mla { latent_bytes, rope_bytes } => u64::from(latent_bytes) + u64::from(rope_bytes),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Mla { .. } => "mla",
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
    /// From the start of one region: all pages of the first layer, then all pages of the next, without gaps.
    LayerMajor {
        /// Which region.
        region: u32,
    },
    /// From the start of one region: page 0 of all layers, then page 1 of all layers, without gaps.
    PageMajor {
        /// Which region.
        region: u32,
    },
    /// As the engine has allocated them: one buffer for each layer, in the order of the layers.
    Buffers(Vec<LayerBuffer>),
}

impl CacheLayout {
    /// Layouts have at most this many layers.
    pub const MAX_LAYERS: u32 = 1024;
    /// Pages hold at most this many tokens.
    pub const MAX_PAGE_TOKENS: u32 = 1 << 16;
    /// A token takes at most this many bytes in a layer.
    pub const MAX_TOKEN_BYTES: u64 = 1 << 20;

    /// Checks the parts, and puts them together.
    pub fn new(options: LayoutOptions) -> Result<Self, CacheLayoutError> {
        let LayoutOptions { model, model_layers, layers, kind, dtype, page_tokens, pages, placement } =
            options;
        if model.is_empty() || model.len() > MODEL_BYTES_MAX || model.contains(char::is_control) {
            return Err(CacheLayoutError::BadModelName { model });
        }
        let count = layers.end.saturating_sub(layers.start);
        if count == 0 || count > Self::MAX_LAYERS || layers.end > model_layers {
            return Err(CacheLayoutError::BadLayers { layers, model_layers });
        }
        let token_bytes = kind.token_bytes();
        if token_bytes == 0 || token_bytes > Self::MAX_TOKEN_BYTES {
            return Err(CacheLayoutError::BadTokenBytes { token_bytes });
        }
        if page_tokens == 0 || page_tokens > Self::MAX_PAGE_TOKENS {
            return Err(CacheLayoutError::BadPageTokens { page_tokens });
        }
        if pages == 0 || pages > MAX_PAGES {
            return Err(CacheLayoutError::BadPages { pages });
        }
        let page_bytes = token_bytes * u64::from(page_tokens);
        let buffers = placement.buffers(&layers, page_bytes, pages)?;
        if buffers.len() != count as usize {
            return Err(CacheLayoutError::BufferCount { buffers: buffers.len(), layers: count });
        }
        let layout =
            Self { model, model_layers, first_layer: layers.start, kind, dtype, page_tokens, pages, buffers };
        layout.check_buffers()?;
        Ok(layout)
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

    /// The model's name.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// The layers of this worker, numbered as in the model.
    pub fn layers(&self) -> Range<u32> {
        self.first_layer..self.first_layer + self.buffers.len() as u32
    }

    /// What is kept for a token.
    pub fn kind(&self) -> CacheKind {
        self.kind
    }

    /// How numbers are stored.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// What one token takes in one layer.
    pub fn token_bytes(&self) -> u64 {
        self.kind.token_bytes()
    }

    /// How many tokens a page holds.
    pub fn page_tokens(&self) -> u32 {
        self.page_tokens
    }

    /// What one page takes in one layer.
    pub fn page_bytes(&self) -> u64 {
        self.token_bytes() * u64::from(self.page_tokens)
    }

    /// How many pages each layer has.
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// How many pages hold this many tokens.
    pub fn pages_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.page_tokens)
    }

    /// The buffers of all layers, in the order of the layers.
    pub fn buffers(&self) -> &[LayerBuffer] {
        &self.buffers
    }

    /// The buffer of a layer; `None` if the layer is not here.
    pub fn buffer(&self, layer: u32) -> Option<LayerBuffer> {
        self.buffers.get(layer.checked_sub(self.first_layer)? as usize).copied()
    }

    /// Where a layer's pages lie in its region; `None` if the layer is not here.
    pub fn page_layout(&self, layer: u32) -> Option<PageLayout> {
        self.buffer(layer).map(|buffer| self.pages_of(&buffer))
    }

    /// How long a region must be to hold what this layout places in it; 0 if nothing.
    pub fn bytes_needed(&self, region: u32) -> u64 {
        let ends = self.buffers.iter().filter(|b| b.region == region).filter_map(|b| self.pages_of(b).end());
        ends.max().unwrap_or(0)
    }

    /// What two workers must have in common, as named values to be compared in the handshake. What the planner
    /// bridges is not in it: page sizes, strides, the number of pages, which worker holds which layers.
    pub fn fingerprint(&self) -> Vec<(String, String)> {
        let mut values = vec![
            ("model", self.model.clone()),
            ("layers", self.model_layers.to_string()),
            ("kind", self.kind.name().to_string()),
            ("dtype", self.dtype.name().to_string()),
            ("token_bytes", self.token_bytes().to_string()),
        ];
        match self.kind {
            CacheKind::Mla { latent_bytes, rope_bytes } => {
                values.push(("latent_bytes", latent_bytes.to_string()));
                values.push(("rope_bytes", rope_bytes.to_string()));
            }
        }
        values.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
    }

    /// The first key of the [fingerprint](CacheLayout::fingerprint) in which two layouts differ, found without
    /// writing the fingerprints down.
    pub(crate) fn differs_in(&self, other: &Self) -> Option<&'static str> {
        if self.model != other.model {
            Some("model")
        } else if self.model_layers != other.model_layers {
            Some("layers")
        } else if self.kind != other.kind {
            Some("kind")
        } else if self.dtype != other.dtype {
            Some("dtype")
        } else {
            None
        }
    }

    fn pages_of(&self, buffer: &LayerBuffer) -> PageLayout {
        PageLayout {
            offset: buffer.offset,
            stride_bytes: buffer.stride_bytes,
            page_bytes: self.page_bytes(),
            pages: self.pages,
        }
    }

    /// Each buffer makes sense by itself, and no two share a byte.
    fn check_buffers(&self) -> Result<(), CacheLayoutError> {
        for (layer, buffer) in self.layers().zip(&self.buffers) {
            self.pages_of(buffer)
                .validate(u64::MAX)
                .map_err(|source| CacheLayoutError::BadBuffer { layer, source })?;
        }
        let mut order: Vec<usize> = (0..self.buffers.len()).collect();
        order.sort_by_key(|&at| (self.buffers[at].region, self.buffers[at].offset));
        for (nth, &at) in order.iter().enumerate() {
            let clash = order[nth + 1..]
                .iter()
                .take_while(|&&other| self.reaches(at, other))
                .find(|&&other| self.collide(at, other));
            if let Some(&other) = clash {
                let layer = |at: usize| self.first_layer + at as u32;
                return Err(CacheLayoutError::BuffersCollide { layer: layer(at), other: layer(other) });
            }
        }
        Ok(())
    }

    /// Whether a buffer ends behind the beginning of a later one.
    fn reaches(&self, at: usize, later: usize) -> bool {
        let (one, two) = (&self.buffers[at], &self.buffers[later]);
        one.region == two.region && self.pages_of(one).end().is_none_or(|end| end > two.offset)
    }

    /// Whether a page of one buffer shares a byte with a page of a later one that it reaches. With equal strides
    /// that is a question of one page; with different ones the pages would meet sooner or later, so that is refused
    /// without looking further.
    fn collide(&self, at: usize, later: usize) -> bool {
        let (one, two) = (&self.buffers[at], &self.buffers[later]);
        let into_page = (two.offset - one.offset) % one.stride_bytes;
        one.stride_bytes != two.stride_bytes
            || into_page < self.page_bytes()
            || one.stride_bytes - into_page < self.page_bytes()
    }
}

impl Placement {
    fn buffers(
        self,
        layers: &Range<u32>,
        page_bytes: u64,
        pages: u32,
    ) -> Result<Vec<LayerBuffer>, CacheLayoutError> {
        let evenly = |region, layer_bytes: Option<u64>, stride_bytes: Option<u64>| {
            layers
                .clone()
                .map(|layer| {
                    let offset =
                        layer_bytes.and_then(|bytes| bytes.checked_mul((layer - layers.start).into()));
                    let (Some(offset), Some(stride_bytes)) = (offset, stride_bytes) else {
                        return Err(CacheLayoutError::BadBuffer { layer, source: LayoutError::Overflow });
                    };
                    Ok(LayerBuffer { region, offset, stride_bytes })
                })
                .collect()
        };
        match self {
            Self::LayerMajor { region } => {
                evenly(region, page_bytes.checked_mul(pages.into()), Some(page_bytes))
            }
            Self::PageMajor { region } => {
                evenly(region, Some(page_bytes), page_bytes.checked_mul(layers.len() as u64))
            }
            Self::Buffers(buffers) => Ok(buffers),
        }
    }
}

/// Why parts make no layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CacheLayoutError {
    /// The model's name is empty, too long, or cannot be printed.
    #[error("{model:?} cannot name a model: 1 to 255 bytes without control characters")]
    BadModelName {
        /// The name.
        model: String,
    },
    /// No layers, too many, or not those of the model.
    #[error(
        "layers {}..{} of {model_layers}: there must be 1 to {}, within the model",
        layers.start, layers.end, CacheLayout::MAX_LAYERS
    )]
    BadLayers {
        /// The worker's layers.
        layers: Range<u32>,
        /// How many the model has.
        model_layers: u32,
    },
    /// A token takes nothing, or too much.
    #[error("a token of {token_bytes} bytes: 1 to {} are possible", CacheLayout::MAX_TOKEN_BYTES)]
    BadTokenBytes {
        /// How much it takes.
        token_bytes: u64,
    },
    /// A page holds no token, or too many.
    #[error("pages of {page_tokens} tokens: 1 to {} are possible", CacheLayout::MAX_PAGE_TOKENS)]
    BadPageTokens {
        /// How many it holds.
        page_tokens: u32,
    },
    /// There are no pages, or too many.
    #[error("{pages} pages: 1 to {MAX_PAGES} are possible")]
    BadPages {
        /// How many there are.
        pages: u32,
    },
    /// There is not one buffer for each layer.
    #[error("{buffers} buffers for {layers} layers")]
    BufferCount {
        /// How many buffers.
        buffers: usize,
        /// How many layers.
        layers: u32,
    },
    /// A layer's pages overlap, or leave what 64 bits can address.
    #[error("the buffer of layer {layer}: {source}")]
    BadBuffer {
        /// Whose buffer.
        layer: u32,
        /// What is wrong with it.
        source: LayoutError,
    },
    /// Pages of two layers share bytes, or lie between each other at different strides.
    #[error("the buffers of layers {layer} and {other} collide")]
    BuffersCollide {
        /// The one that begins first.
        layer: u32,
        /// The one that begins in it.
        other: u32,
    },
}

/// The length of a model's name is one byte on the wire.
const MODEL_BYTES_MAX: usize = 255;

#[cfg(test)]
mod tests {
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
            "kind mla",
            "dtype bf16",
            "token_bytes 1152",
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
