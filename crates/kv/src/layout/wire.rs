//! A cache layout on the wire.
//!
//! All numbers are little-endian. A *name* is its length (1) and UTF-8; a *buffer* is region (4), offset (8), stride
//! bytes (8); *heads* are heads of the model (4), the first one here (4), how many are here (4), bytes of each (4) and
//! their order in a page (1): 0 tokens first, 1 heads first.
//!
//! | bytes | field |
//! |---|---|
//! | 1 | version of this table: 2 |
//! | 1 | dtype: 1 bf16, 2 f16, 3 f32, 4 fp8_e4m3, 5 fp8_e5m2, 6 int8, 7 fp8_ds_mla |
//! | n | the model's name |
//! | 4 | layers of the model |
//! | 4 | first layer of this worker |
//! | 4 | layers of this worker |
//! | 4 | the worker's rank |
//! | 4, 4, 4 | context: whose turn is this worker's, how many take turns, tokens a turn |
//! | 4 | tokens a page |
//! | 4 | pages |
//! | 1 | kind: 1 MLA, 2 heads |
//! | 8 or 17 | for MLA: latent bytes (4), rope bytes (4); else heads |
//! | 20 × n | for MLA a buffer for each layer; else one for each layer's keys, then one for each layer's values |
//! | 1 | how many more parts the tokens' pages have |
//! | n | each: a name, heads, how many layers (4), and for each of these its number (4) and a buffer |
//! | 1 | how many more pools there are |
//! | n | each: a name, extent (1): 0 tokens, 1 window, 2 entries, the window's tokens (4), tokens a page (4), pages (4), how many parts (1), these as above |

use super::{
    CacheKind, CacheLayout, CacheLayoutError, CachePart, CachePartOptions, CachePool, CachePoolOptions,
    ContextShare, Dtype, Extent, HeadOrder, HeadShare, LayerBuffer, LayoutOptions, Placement,
};
use crate::fields::{Fields, Truncated};

impl CacheLayout {
    /// Appends the layout, as it travels to a peer, to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend([VERSION, dtype_code(self.dtype)]);
        put_name(out, &self.model);
        let ContextShare { rank, ranks, interleave } = self.context;
        put(out, &[self.model_layers, self.layers.start, self.layers.len() as u32, self.rank]);
        put(out, &[rank, ranks, interleave, self.page_tokens(), self.pages()]);
        let (of_kind, more) = self.tokens().parts().split_at(self.kind.parts().len());
        match self.kind {
            CacheKind::Mla { latent_bytes, rope_bytes } => {
                out.push(KIND_MLA);
                put(out, &[latent_bytes, rope_bytes]);
            }
            CacheKind::Heads { heads, head_bytes, order } => {
                out.push(KIND_HEADS);
                put_heads(out, heads, head_bytes, order);
            }
        }
        of_kind.iter().flat_map(|part| &part.buffers).for_each(|buffer| put_buffer(out, buffer));
        out.push(more.len() as u8);
        more.iter().for_each(|part| put_part(out, part));
        out.push(self.pools.len() as u8 - 1);
        self.pools[1..].iter().for_each(|pool| put_pool(out, pool));
    }

    /// Reads a peer's layout, and checks it like one of our own.
    pub fn decode(bytes: &[u8]) -> Result<Self, LayoutDecodeError> {
        let mut fields = Fields(bytes);
        let version = fields.u8("version")?;
        if version != VERSION {
            return Err(LayoutDecodeError::UnknownVersion { version });
        }
        let dtype = fields.u8("dtype")?;
        let dtype = dtype_of(dtype).ok_or(LayoutDecodeError::UnknownDtype { code: dtype })?;
        let model = take_name(&mut fields)?;
        let model_layers = fields.u32("layers of the model")?;
        let first_layer = fields.u32("first layer")?;
        let layers = fields.u32("layers")?;
        let rank = fields.u32("rank")?;
        let context = ContextShare {
            rank: fields.u32("turn")?,
            ranks: fields.u32("turns")?,
            interleave: fields.u32("tokens a turn")?,
        };
        let page_tokens = fields.u32("tokens a page")?;
        let pages = fields.u32("pages")?;
        let kind = match fields.u8("kind")? {
            KIND_MLA => CacheKind::Mla {
                latent_bytes: fields.u32("latent bytes")?,
                rope_bytes: fields.u32("rope bytes")?,
            },
            KIND_HEADS => {
                let (heads, head_bytes, order) = take_heads(&mut fields)?;
                CacheKind::Heads { heads, head_bytes, order }
            }
            code => return Err(LayoutDecodeError::UnknownKind { code }),
        };
        let buffers = (layers as usize).checked_mul(kind.parts().len());
        let buffers = take_list(&mut fields, "buffers", buffers, BUFFER_BYTES, take_buffer)?;
        let mut layout = Self::new(LayoutOptions {
            model,
            model_layers,
            layers: first_layer..first_layer.saturating_add(layers),
            kind,
            dtype,
            page_tokens,
            pages,
            placement: Placement::Buffers(buffers),
        })?
        .with_rank(rank)?
        .with_context(context)?;
        for _ in 0..fields.u8("parts")? {
            layout.add_part(take_part(&mut fields)?)?;
        }
        for _ in 0..fields.u8("pools")? {
            layout.add_pool(take_pool(&mut fields)?)?;
        }
        layout.check_buffers()?;
        match fields.0.len() {
            0 => Ok(layout),
            bytes => Err(LayoutDecodeError::Trailing { bytes }),
        }
    }
}

/// The rank in a peer's layout, of which the rest may be wrong; `None` if it has none.
pub(crate) fn rank_of(bytes: &[u8]) -> Option<u32> {
    let mut fields = Fields(bytes);
    let mut rank = || -> Result<(u8, u32), Truncated> {
        let version = fields.u8("version")?;
        fields.u8("dtype")?;
        let name_bytes = fields.u8("length of a name")?;
        fields.take("name", name_bytes.into())?;
        fields.take("layers", 12)?;
        Ok((version, fields.u32("rank")?))
    };
    rank().ok().filter(|(version, _)| *version == VERSION).map(|(_, rank)| rank)
}

fn put(out: &mut Vec<u8>, numbers: &[u32]) {
    numbers.iter().for_each(|number| out.extend(number.to_le_bytes()));
}

fn put_name(out: &mut Vec<u8>, name: &str) {
    out.push(name.len() as u8);
    out.extend(name.as_bytes());
}

fn put_heads(out: &mut Vec<u8>, heads: HeadShare, head_bytes: u32, order: HeadOrder) {
    put(out, &[heads.of, heads.first, heads.count, head_bytes]);
    out.push(match order {
        HeadOrder::TokensFirst => 0,
        HeadOrder::HeadsFirst => 1,
    });
}

fn put_buffer(out: &mut Vec<u8>, buffer: &LayerBuffer) {
    put(out, &[buffer.region]);
    out.extend(buffer.offset.to_le_bytes());
    out.extend(buffer.stride_bytes.to_le_bytes());
}

fn put_part(out: &mut Vec<u8>, part: &CachePart) {
    put_name(out, &part.name);
    put_heads(out, part.heads, part.head_bytes, part.order);
    put(out, &[part.layers.len() as u32]);
    for (layer, buffer) in part.layers.iter().zip(&part.buffers) {
        put(out, &[*layer]);
        put_buffer(out, buffer);
    }
}

fn put_pool(out: &mut Vec<u8>, pool: &CachePool) {
    put_name(out, &pool.name);
    let (code, tokens) = match pool.extent {
        Extent::Tokens => (0, 0),
        Extent::Window(tokens) => (1, tokens),
        Extent::Entries => (2, 0),
    };
    out.push(code);
    put(out, &[tokens, pool.page_tokens, pool.pages]);
    out.push(pool.parts.len() as u8);
    pool.parts.iter().for_each(|part| put_part(out, part));
}

fn take_name(fields: &mut Fields<'_>) -> Result<String, LayoutDecodeError> {
    let bytes = fields.u8("length of a name")?;
    let name = fields.take("name", bytes.into())?;
    Ok(std::str::from_utf8(name).map_err(|_| LayoutDecodeError::NameNotUtf8)?.to_string())
}

fn take_heads(fields: &mut Fields<'_>) -> Result<(HeadShare, u32, HeadOrder), LayoutDecodeError> {
    let heads = HeadShare {
        of: fields.u32("heads of the model")?,
        first: fields.u32("first head")?,
        count: fields.u32("heads")?,
    };
    let head_bytes = fields.u32("head bytes")?;
    let order = match fields.u8("order")? {
        0 => HeadOrder::TokensFirst,
        1 => HeadOrder::HeadsFirst,
        code => return Err(LayoutDecodeError::UnknownOrder { code }),
    };
    Ok((heads, head_bytes, order))
}

fn take_buffer(fields: &mut Fields<'_>) -> Result<LayerBuffer, Truncated> {
    Ok(LayerBuffer {
        region: fields.u32("region")?,
        offset: fields.u64("offset")?,
        stride_bytes: fields.u64("stride")?,
    })
}

fn take_part(fields: &mut Fields<'_>) -> Result<CachePartOptions, LayoutDecodeError> {
    let name = take_name(fields)?;
    let (heads, head_bytes, order) = take_heads(fields)?;
    let count = fields.u32("layers of a part")? as usize;
    let placed = |fields: &mut Fields<'_>| Ok((fields.u32("layer")?, take_buffer(fields)?));
    let placed = take_list(fields, "layers of a part", Some(count), 4 + BUFFER_BYTES, placed)?;
    let (layers, buffers) = placed.into_iter().unzip();
    Ok(CachePartOptions { name, heads, head_bytes, order, layers, buffers })
}

fn take_pool(fields: &mut Fields<'_>) -> Result<CachePoolOptions, LayoutDecodeError> {
    let name = take_name(fields)?;
    let code = fields.u8("extent")?;
    let tokens = fields.u32("window")?;
    let extent = match (code, tokens) {
        (0, 0) => Extent::Tokens,
        (1, tokens) => Extent::Window(tokens),
        (2, 0) => Extent::Entries,
        _ => return Err(LayoutDecodeError::UnknownExtent { code }),
    };
    let (page_tokens, pages) = (fields.u32("tokens a page")?, fields.u32("pages")?);
    let parts = fields.u8("parts of a pool")?;
    let parts = (0..parts).map(|_| take_part(fields)).collect::<Result<_, _>>()?;
    Ok(CachePoolOptions { name, extent, page_tokens, pages, parts })
}

/// So many entries, whose bytes are there before any memory is reserved for them.
fn take_list<T>(
    fields: &mut Fields<'_>,
    field: &'static str,
    count: Option<usize>,
    entry_bytes: usize,
    take: impl Fn(&mut Fields<'_>) -> Result<T, Truncated>,
) -> Result<Vec<T>, Truncated> {
    let bytes = count.and_then(|count| count.checked_mul(entry_bytes)).ok_or(Truncated { field })?;
    fields.take(field, bytes)?.chunks_exact(entry_bytes).map(|entry| take(&mut Fields(entry))).collect()
}

/// Why bytes are no layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutDecodeError {
    /// They end too early.
    #[error("the layout ends in its {field}")]
    Truncated {
        /// In which field.
        field: &'static str,
    },
    /// The peer speaks another version of the form.
    #[error("layout version {version} is unknown; {VERSION} is known")]
    UnknownVersion {
        /// Which.
        version: u8,
    },
    /// The peer's dtype has no name here: the peer is newer.
    #[error("dtype {code} is unknown")]
    UnknownDtype {
        /// Its code.
        code: u8,
    },
    /// The peer's kind of cache has no name here: the peer is newer.
    #[error("cache kind {code} is unknown")]
    UnknownKind {
        /// Its code.
        code: u8,
    },
    /// The order of heads and tokens has no name here: the peer is newer.
    #[error("order {code} of heads and tokens is unknown")]
    UnknownOrder {
        /// Its code.
        code: u8,
    },
    /// What a pool's pages hold has no name here: the peer is newer.
    #[error("extent {code} of a pool is unknown")]
    UnknownExtent {
        /// Its code.
        code: u8,
    },
    /// A name is no text.
    #[error("a name is not UTF-8")]
    NameNotUtf8,
    /// There are bytes after the last pool.
    #[error("{bytes} bytes follow the layout")]
    Trailing {
        /// How many.
        bytes: usize,
    },
    /// The bytes say what no layout can be.
    #[error(transparent)]
    Invalid(#[from] CacheLayoutError),
}

impl From<Truncated> for LayoutDecodeError {
    fn from(Truncated { field }: Truncated) -> Self {
        Self::Truncated { field }
    }
}

const VERSION: u8 = 2;
const KIND_MLA: u8 = 1;
const KIND_HEADS: u8 = 2;
const BUFFER_BYTES: usize = 20;

fn dtype_code(dtype: Dtype) -> u8 {
    match dtype {
        Dtype::Bf16 => 1,
        Dtype::F16 => 2,
        Dtype::F32 => 3,
        Dtype::Fp8E4m3 => 4,
        Dtype::Fp8E5m2 => 5,
        Dtype::Int8 => 6,
        Dtype::Fp8DsMla => 7,
    }
}

fn dtype_of(code: u8) -> Option<Dtype> {
    Some(match code {
        1 => Dtype::Bf16,
        2 => Dtype::F16,
        3 => Dtype::F32,
        4 => Dtype::Fp8E4m3,
        5 => Dtype::Fp8E5m2,
        6 => Dtype::Int8,
        7 => Dtype::Fp8DsMla,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(layout: &CacheLayout) -> Vec<u8> {
        let mut bytes = Vec::new();
        layout.encode(&mut bytes);
        bytes
    }

    #[test]
    fn the_form_is_the_table() {
        let layout = CacheLayout::new(LayoutOptions {
            model: "mod".into(),
            model_layers: 7,
            layers: 6..7,
            kind: CacheKind::Mla { latent_bytes: 0x0203, rope_bytes: 4 },
            dtype: Dtype::Fp8E4m3,
            page_tokens: 16,
            pages: 9,
            placement: Placement::Buffers(vec![LayerBuffer {
                region: 5,
                offset: 8,
                stride_bytes: 0x0001_0000,
            }]),
        })
        .unwrap();
        let expected = [
            &[2, 4, 3][..],
            b"mod",
            &[7, 0, 0, 0, 6, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
            &[0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 16, 0, 0, 0, 9, 0, 0, 0],
            &[1, 3, 2, 0, 0, 4, 0, 0, 0],
            &[5, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0],
            &[0, 0],
        ]
        .concat();
        assert_eq!(encoded(&layout), expected);
    }

    #[test]
    fn every_cut_and_every_extra_byte_is_refused() {
        let bytes = encoded(&CacheLayout::deepseek_r1(64, 10).unwrap());
        for cut in 0..bytes.len() {
            let error = CacheLayout::decode(&bytes[..cut]).unwrap_err();
            assert!(matches!(error, LayoutDecodeError::Truncated { .. }), "cut at {cut}: {error}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert_eq!(CacheLayout::decode(&longer), Err(LayoutDecodeError::Trailing { bytes: 1 }));
    }

    #[test]
    fn what_a_newer_peer_says_is_named() {
        let bytes = encoded(&CacheLayout::deepseek_r1(64, 10).unwrap());
        let with = |at: usize, value: u8| {
            let mut changed = bytes.clone();
            changed[at] = value;
            CacheLayout::decode(&changed)
        };
        assert_eq!(with(0, 1), Err(LayoutDecodeError::UnknownVersion { version: 1 }));
        assert_eq!(with(1, 99), Err(LayoutDecodeError::UnknownDtype { code: 99 }));
        assert_eq!(with(50, 3), Err(LayoutDecodeError::UnknownKind { code: 3 }));
        assert_eq!(with(3, 0xff), Err(LayoutDecodeError::NameNotUtf8));
        // The claim of 2^32 - 1 buffers is refused for want of their bytes, not by an allocation.
        let mut many = bytes.clone();
        many[22..26].fill(0xff);
        assert_eq!(CacheLayout::decode(&many), Err(LayoutDecodeError::Truncated { field: "buffers" }));
    }

    /// Buffers with gaps between them and between their pages, so that most examples are valid layouts.
    struct Placing {
        ends: [u64; 3],
        gaps: Vec<(usize, u64, u64)>,
        next: usize,
    }

    impl Placing {
        fn buffer(&mut self, page_bytes: u64, pages: u32) -> LayerBuffer {
            let (region, gap, padding) = self.gaps[self.next % self.gaps.len()];
            self.next += 1;
            let (offset, stride_bytes) = (self.ends[region] + gap, page_bytes + padding);
            self.ends[region] = offset + stride_bytes * u64::from(pages);
            LayerBuffer { region: region as u32, offset, stride_bytes }
        }
    }

    fn heads() -> impl Strategy<Value = (HeadShare, HeadOrder)> {
        (0u32..4, 1u32..5, 0u32..3, any::<bool>()).prop_map(|(first, count, more, by_head)| {
            let order = if by_head { HeadOrder::HeadsFirst } else { HeadOrder::TokensFirst };
            (HeadShare { of: first + count + more, first, count }, order)
        })
    }

    fn kinds() -> impl Strategy<Value = CacheKind> {
        let mla = (1u32..600, 0u32..600)
            .prop_map(|(latent_bytes, rope_bytes)| CacheKind::Mla { latent_bytes, rope_bytes });
        let heads = (heads(), 1u32..100).prop_map(|((heads, order), head_bytes)| CacheKind::Heads {
            heads,
            head_bytes,
            order,
        });
        prop_oneof![mla, heads]
    }

    fn layouts() -> impl Strategy<Value = CacheLayout> {
        let dtype = (1u8..=7).prop_map(|code| dtype_of(code).unwrap());
        let gaps = prop::collection::vec((0usize..3, 0u64..5000, 0u64..300), 1..20);
        let context = (0u32..4, 1u32..5, 1u32..9);
        let layers = (0u32..5, 1u32..20);
        let pages = (1u32..200, 1u32..5000);
        let more = prop::collection::vec((heads(), 1u32..50), 0..3);
        let pools = prop::collection::vec((0u32..3, heads(), 1u32..50, 1u32..20), 0..3);
        let parts = ("[a-zé]{1,20}", dtype, kinds(), 0u32..4096, more, pools);
        (parts, layers, pages, context, gaps).prop_map(|(parts, layers, pages, context, gaps)| {
            let (model, dtype, kind, rank, more, pools) = parts;
            let layers = layers.0..layers.0 + layers.1;
            let (page_tokens, pages) = pages;
            let mut placing = Placing { ends: [0; 3], gaps, next: 0 };
            let parts_of_kind = kind.parts().len() as u64;
            let page_bytes = kind.token_bytes() / parts_of_kind * u64::from(page_tokens);
            let count = layers.len() * parts_of_kind as usize;
            let buffers = (0..count).map(|_| placing.buffer(page_bytes, pages)).collect();
            let mut part = |nth: usize, (heads, order): (HeadShare, HeadOrder), head_bytes, tokens, pages| {
                let layers: Vec<u32> = layers.clone().step_by(nth + 1).collect();
                let page_bytes = u64::from(heads.count * head_bytes) * u64::from(tokens);
                let buffers = layers.iter().map(|_| placing.buffer(page_bytes, pages)).collect();
                CachePartOptions { name: format!("part {nth}"), heads, head_bytes, order, layers, buffers }
            };
            let more: Vec<_> = more
                .into_iter()
                .enumerate()
                .map(|(nth, (heads, bytes))| part(nth, heads, bytes, page_tokens, pages))
                .collect();
            let pools: Vec<_> = pools
                .into_iter()
                .enumerate()
                .map(|(nth, (extent, heads, bytes, tokens))| {
                    let (extent, page_tokens) = match extent {
                        0 => (Extent::Tokens, tokens),
                        1 => (Extent::Window(bytes), tokens),
                        _ => (Extent::Entries, 1),
                    };
                    let parts = vec![part(nth, heads, bytes, page_tokens, 7)];
                    CachePoolOptions { name: format!("pool {nth}"), extent, page_tokens, pages: 7, parts }
                })
                .collect();
            let options = LayoutOptions {
                model,
                model_layers: layers.end + 1,
                layers: layers.clone(),
                kind,
                dtype,
                page_tokens,
                pages,
                placement: Placement::Buffers(buffers),
            };
            let context =
                ContextShare { rank: context.0 % context.1, ranks: context.1, interleave: context.2 };
            let layout = CacheLayout::new(options).unwrap().with_rank(rank).unwrap();
            let layout = layout.with_context(context).unwrap();
            let layout = more.into_iter().fold(layout, |layout, part| layout.with_part(part).unwrap());
            pools.into_iter().fold(layout, |layout, pool| layout.with_pool(pool).unwrap())
        })
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(layout in layouts()) {
            prop_assert_eq!(CacheLayout::decode(&encoded(&layout)), Ok(layout));
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            // A good beginning leads the rest into the later checks.
            for bytes in [&bytes[..], &[&[VERSION, 1, 3, b'm', b'o', b'd'][..], &bytes].concat()] {
                if let Ok(decoded) = CacheLayout::decode(bytes) {
                    prop_assert_eq!(encoded(&decoded), bytes);
                }
            }
        }

        #[test]
        fn a_changed_byte_gives_an_error_or_a_layout_that_encodes_to_it(
            layout in layouts(), at in any::<prop::sample::Index>(), value in any::<u8>(),
        ) {
            let mut bytes = encoded(&layout);
            let at = at.index(bytes.len());
            bytes[at] = value;
            if let Ok(decoded) = CacheLayout::decode(&bytes) {
                prop_assert_eq!(encoded(&decoded), bytes);
            }
        }
    }
}
