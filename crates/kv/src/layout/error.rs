//! Why parts make no layout.

use std::ops::Range;

use crossdock_memory::{LayoutError, MAX_PAGES};

use super::{CacheLayout, ContextShare, HeadShare};

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
    /// Heads that the model does not have, or none.
    #[error("heads {}.. ({}) of {}", heads.first, heads.count, heads.of)]
    BadHeads {
        /// The heads.
        heads: HeadShare,
    },
    /// No turn of the ranks that share a context.
    #[error("turn {} of {}, of {} tokens each", context.rank, context.ranks, context.interleave)]
    BadContext {
        /// The share.
        context: ContextShare,
    },
    /// The number of a region is too large.
    #[error("region {region}: numbers are below {}", CacheLayout::MAX_REGIONS)]
    BadRegion {
        /// The number.
        region: u32,
    },
    /// The number of a rank is too large.
    #[error("rank {rank}: there are fewer than {} of one side", CacheLayout::MAX_RANKS)]
    BadRank {
        /// The number.
        rank: u32,
    },
    /// The name of a pool or a part is empty, too long, or cannot be printed.
    #[error("{name:?} cannot name a part of a cache: 1 to 255 bytes without control characters")]
    BadName {
        /// The name.
        name: String,
    },
    /// Two pools, or two parts of one, have the same name.
    #[error("{name:?} is there twice")]
    SameName {
        /// The name.
        name: String,
    },
    /// A part's layers are none, are not in ascending order, or are not here.
    #[error("the layers of part {part:?} are not some of the worker's in ascending order")]
    BadPartLayers {
        /// Which part.
        part: String,
    },
    /// A pool has no parts, or too many.
    #[error("pool {pool:?} has {parts} parts: 1 to {} are possible", CacheLayout::MAX_PARTS)]
    PartCount {
        /// Which pool.
        pool: String,
        /// How many.
        parts: usize,
    },
    /// There are too many layers and parts.
    #[error("{buffers} buffers: at most {} are possible", CacheLayout::MAX_BUFFERS)]
    TooManyBuffers {
        /// How many.
        buffers: usize,
    },
    /// There are too many pools.
    #[error("{pools} pools: at most {} are possible", CacheLayout::MAX_POOLS)]
    PoolCount {
        /// How many.
        pools: usize,
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
