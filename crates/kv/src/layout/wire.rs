//! A cache layout on the wire.
//!
//! All numbers are little-endian.
//!
//! | bytes | field |
//! |---|---|
//! | 1 | version of this table: 1 |
//! | 1 | dtype: 1 bf16, 2 f16, 3 f32, 4 fp8_e4m3, 5 fp8_e5m2, 6 int8, 7 fp8_ds_mla |
//! | 1 | kind: 1 MLA |
//! | 1 | length of the model's name |
//! | 4 | layers of the model |
//! | 4 | first layer of this worker |
//! | 4 | layers of this worker |
//! | 4 | tokens a page |
//! | 4 | pages |
//! | 8 | for MLA: latent bytes (4), rope bytes (4) |
//! | n | the model's name, UTF-8 |
//! | 20 × layers of this worker | region (4), offset (8), stride bytes (8) |

use super::{CacheKind, CacheLayout, CacheLayoutError, Dtype, LayerBuffer, LayoutOptions, Placement};
use crate::fields::{Fields, Truncated};

impl CacheLayout {
    /// Appends the layout, as it travels to a peer, to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let CacheKind::Mla { latent_bytes, rope_bytes } = self.kind;
        out.extend([VERSION, dtype_code(self.dtype), KIND_MLA, self.model.len() as u8]);
        let layers = self.buffers.len() as u32;
        let numbers = [
            self.model_layers,
            self.first_layer,
            layers,
            self.page_tokens,
            self.pages,
            latent_bytes,
            rope_bytes,
        ];
        numbers.iter().for_each(|number| out.extend(number.to_le_bytes()));
        out.extend(self.model.as_bytes());
        for buffer in &self.buffers {
            out.extend(buffer.region.to_le_bytes());
            out.extend(buffer.offset.to_le_bytes());
            out.extend(buffer.stride_bytes.to_le_bytes());
        }
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
        let kind = fields.u8("kind")?;
        if kind != KIND_MLA {
            return Err(LayoutDecodeError::UnknownKind { code: kind });
        }
        let model_bytes = fields.u8("length of the model's name")?;
        let model_layers = fields.u32("layers of the model")?;
        let first_layer = fields.u32("first layer")?;
        let layers = fields.u32("layers")?;
        let page_tokens = fields.u32("tokens a page")?;
        let pages = fields.u32("pages")?;
        let kind = CacheKind::Mla {
            latent_bytes: fields.u32("latent bytes")?,
            rope_bytes: fields.u32("rope bytes")?,
        };
        let model = fields.take("model's name", model_bytes.into())?;
        let model = std::str::from_utf8(model).map_err(|_| LayoutDecodeError::ModelNotUtf8)?;
        // The buffers' bytes are here before any memory is reserved for them.
        let buffers = (layers as usize)
            .checked_mul(BUFFER_BYTES)
            .ok_or(Truncated { field: "buffers" })
            .and_then(|bytes| fields.take("buffers", bytes))?;
        if !fields.0.is_empty() {
            return Err(LayoutDecodeError::Trailing { bytes: fields.0.len() });
        }
        let buffers = buffers.chunks_exact(BUFFER_BYTES).map(buffer).collect::<Result<_, _>>()?;
        Ok(Self::new(LayoutOptions {
            model: model.to_string(),
            model_layers,
            layers: first_layer..first_layer.saturating_add(layers),
            kind,
            dtype,
            page_tokens,
            pages,
            placement: Placement::Buffers(buffers),
        })?)
    }
}

fn buffer(bytes: &[u8]) -> Result<LayerBuffer, Truncated> {
    let mut fields = Fields(bytes);
    Ok(LayerBuffer {
        region: fields.u32("region")?,
        offset: fields.u64("offset")?,
        stride_bytes: fields.u64("stride")?,
    })
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
    /// The model's name is no text.
    #[error("the model's name is not UTF-8")]
    ModelNotUtf8,
    /// There are bytes after the last buffer.
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

const VERSION: u8 = 1;
const KIND_MLA: u8 = 1;
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
            &[1, 4, 1, 3][..],
            &[7, 0, 0, 0, 6, 0, 0, 0, 1, 0, 0, 0, 16, 0, 0, 0, 9, 0, 0, 0],
            &[3, 2, 0, 0, 4, 0, 0, 0],
            b"mod",
            &[5, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0],
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
        assert_eq!(with(0, 2), Err(LayoutDecodeError::UnknownVersion { version: 2 }));
        assert_eq!(with(1, 99), Err(LayoutDecodeError::UnknownDtype { code: 99 }));
        assert_eq!(with(2, 2), Err(LayoutDecodeError::UnknownKind { code: 2 }));
        assert_eq!(with(32, 0xff), Err(LayoutDecodeError::ModelNotUtf8));
        // The claim of 2^32 - 1 buffers is refused for want of their bytes, not by an allocation.
        let mut many = bytes.clone();
        many[12..16].fill(0xff);
        assert_eq!(CacheLayout::decode(&many), Err(LayoutDecodeError::Truncated { field: "buffers" }));
    }

    /// Sums of independent gaps, so that most examples are valid layouts.
    fn layouts() -> impl Strategy<Value = CacheLayout> {
        let dtype = (1u8..=7).prop_map(|code| dtype_of(code).unwrap());
        let gaps = prop::collection::vec((0u32..3, 0u64..5000, 0u64..300), 1..20);
        ("[a-zé]{1,20}", dtype, 0u32..5, 1u32..600, 0u32..600, 1u32..200, 1u32..5000, gaps).prop_map(
            |(model, dtype, first_layer, latent_bytes, rope_bytes, page_tokens, pages, gaps)| {
                let page_bytes = u64::from(latent_bytes + rope_bytes) * u64::from(page_tokens);
                let mut ends = [0; 3];
                let place = |(region, gap, padding): (u32, u64, u64)| {
                    let end = &mut ends[region as usize];
                    let offset = *end + gap;
                    let stride_bytes = page_bytes + padding;
                    *end = offset + stride_bytes * u64::from(pages);
                    LayerBuffer { region, offset, stride_bytes }
                };
                let buffers: Vec<LayerBuffer> = gaps.into_iter().map(place).collect();
                let layers = first_layer..first_layer + buffers.len() as u32;
                CacheLayout::new(LayoutOptions {
                    model,
                    model_layers: layers.end + 1,
                    layers,
                    kind: CacheKind::Mla { latent_bytes, rope_bytes },
                    dtype,
                    page_tokens,
                    pages,
                    placement: Placement::Buffers(buffers),
                })
                .unwrap()
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(layout in layouts()) {
            prop_assert_eq!(CacheLayout::decode(&encoded(&layout)), Ok(layout));
        }

        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            // A good beginning leads the rest into the later checks.
            for bytes in [&bytes[..], &[&[VERSION, 1, KIND_MLA, 3][..], &bytes].concat()] {
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
