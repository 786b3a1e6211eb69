//! Where a worker keeps its KV.

use std::ffi::c_char;
use std::ops::Range;

use bytemuck::Zeroable;
use crossdock::{
    CacheKind, CacheLayout, CachePartOptions, CachePoolOptions, ContextShare, Dtype, Extent, HeadOrder,
    HeadShare, LayerBuffer, LayoutOptions, Parallelism, Parts, Placement, SourceRank,
};
use parking_lot::Mutex;

use crate::arguments::{list, not_null, put, text};
use crate::handles::Table;
use crate::node::unknown;
use crate::sized::{self, Sized as _};
use crate::status::{CROSSDOCK_BUFFER_TOO_SMALL, CROSSDOCK_LAYOUT, Fault, call, crossdock_status};

/// Describes one worker's KV: what is kept of each token, and where each layer's pages lie. 0 is none.
pub type crossdock_layout = u64;

/// Multi-head latent attention: one latent and one rotary key a token, the same on every TP rank.
pub const CROSSDOCK_MLA: u32 = 1;
/// Keys and values for each KV head (MHA, GQA, MQA).
pub const CROSSDOCK_HEADS: u32 = 2;

/// bfloat16.
pub const CROSSDOCK_BF16: u32 = 1;
/// IEEE half precision.
pub const CROSSDOCK_F16: u32 = 2;
/// IEEE single precision.
pub const CROSSDOCK_F32: u32 = 3;
/// 8-bit floating point, e4m3.
pub const CROSSDOCK_FP8_E4M3: u32 = 4;
/// 8-bit floating point, e5m2.
pub const CROSSDOCK_FP8_E5M2: u32 = 5;
/// 8-bit integers.
pub const CROSSDOCK_INT8: u32 = 6;
/// The packed MLA form: an e4m3 latent, its f32 scales, a bf16 rotary key.
pub const CROSSDOCK_FP8_DS_MLA: u32 = 7;

/// In a page, token after token, each with all its heads.
pub const CROSSDOCK_TOKENS_FIRST: u32 = 0;
/// In a page, head after head, each with all its tokens.
pub const CROSSDOCK_HEADS_FIRST: u32 = 1;

/// Layer after layer, each with all its pages, without gaps, in one region.
pub const CROSSDOCK_LAYER_MAJOR: u32 = 0;
/// Page after page, each with all its layers, without gaps, in one region.
pub const CROSSDOCK_PAGE_MAJOR: u32 = 1;
/// As `buffers` says: first the latents or keys of all layers, then, of a cache with heads, the values of all layers.
pub const CROSSDOCK_BUFFERS: u32 = 2;

/// A pool's pages hold every token.
pub const CROSSDOCK_ALL_TOKENS: u32 = 0;
/// They hold the last tokens of a request, as many as `window` says.
pub const CROSSDOCK_WINDOW: u32 = 1;
/// They hold entries of fixed size that do not grow with the request: a state.
pub const CROSSDOCK_ENTRIES: u32 = 2;

/// A source brings everything that it keeps.
pub const CROSSDOCK_ALL_PARTS: u32 = 0;
/// A source brings what the ranks of its side share by heads, and not what each of them keeps whole.
pub const CROSSDOCK_SHARED_PARTS: u32 = 1;

/// Where the pages of one layer are. It never grows.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_layer_buffer {
    /// The number of the memory among those of the node.
    pub region: u32,
    /// 0.
    pub reserved: u32,
    /// Where page 0 begins, from the start of the region.
    pub offset: u64,
    /// From the start of one page to the start of the next.
    pub stride_bytes: u64,
}

/// What a layout is made of.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_layout_options {
    /// `sizeof(crossdock_layout_options)`.
    pub size: usize,
    /// The model's name, compared with the peer's.
    pub model: *const c_char,
    /// How many layers the model has.
    pub model_layers: u32,
    /// The first layer of this worker, numbered as in the model.
    pub first_layer: u32,
    /// How many layers this worker has; 0 for all from the first one on.
    pub layers: u32,
    /// `CROSSDOCK_MLA` or `CROSSDOCK_HEADS`.
    pub kind: u32,
    /// MLA: bytes of a token's latent in a layer.
    pub latent_bytes: u32,
    /// MLA: bytes of a token's rotary key in a layer.
    pub rope_bytes: u32,
    /// Heads: how many KV heads the model has.
    pub heads: u32,
    /// Heads: the first one here.
    pub first_head: u32,
    /// Heads: how many are here; 0 for all from the first one on.
    pub local_heads: u32,
    /// Heads: bytes of one token's key, and of its value, for one head.
    pub head_bytes: u32,
    /// Heads: `CROSSDOCK_TOKENS_FIRST` or `CROSSDOCK_HEADS_FIRST`.
    pub head_order: u32,
    /// One of `CROSSDOCK_BF16` to `CROSSDOCK_FP8_DS_MLA`.
    pub dtype: u32,
    /// How many tokens a page holds.
    pub page_tokens: u32,
    /// How many pages each layer has.
    pub pages: u32,
    /// `CROSSDOCK_LAYER_MAJOR`, `CROSSDOCK_PAGE_MAJOR` or `CROSSDOCK_BUFFERS`.
    pub placement: u32,
    /// The region of the first two.
    pub region: u32,
    /// The buffers of the third.
    pub buffers: *const crossdock_layer_buffer,
    /// How many they are.
    pub buffer_count: usize,
    /// The worker's number among those of its side that serve a request together.
    pub rank: u32,
    /// Context parallelism: which of `context_ranks` this worker is.
    pub context_rank: u32,
    /// Over how many workers the tokens of a request are spread; 0 as 1.
    pub context_ranks: u32,
    /// How many tokens follow each other on one of them; 0 as 1.
    pub context_interleave: u32,
}

// SAFETY: `size` is its first field, it has no padding, and any bytes are a value.
unsafe impl sized::Sized for crossdock_layout_options {
    const FIRST_BYTES: usize = 112;
}

/// Something that is kept in the pages of a pool.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_part_options {
    /// `sizeof(crossdock_part_options)`.
    pub size: usize,
    /// Compared with the peer's.
    pub name: *const c_char,
    /// How many heads there are; 0 as 1, for what is not split.
    pub heads: u32,
    /// The first one here.
    pub first_head: u32,
    /// How many are here; 0 for all from the first one on.
    pub local_heads: u32,
    /// Bytes of one token, or one entry, for one head.
    pub head_bytes: u32,
    /// `CROSSDOCK_TOKENS_FIRST` or `CROSSDOCK_HEADS_FIRST`.
    pub head_order: u32,
    /// 0.
    pub reserved: u32,
    /// The layers that keep it, in ascending order, numbered as in the model.
    pub layers: *const u32,
    /// Where the pages of each of them are.
    pub buffers: *const crossdock_layer_buffer,
    /// How many layers, and buffers.
    pub layer_count: usize,
}

// SAFETY: as above.
unsafe impl sized::Sized for crossdock_part_options {
    const FIRST_BYTES: usize = 64;
}

/// Pages of their own, beside those of the tokens.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_cache_pool_options {
    /// `sizeof(crossdock_cache_pool_options)`.
    pub size: usize,
    /// Compared with the peer's.
    pub name: *const c_char,
    /// `CROSSDOCK_ALL_TOKENS`, `CROSSDOCK_WINDOW` or `CROSSDOCK_ENTRIES`.
    pub extent: u32,
    /// How many tokens a window has.
    pub window: u32,
    /// How many tokens a page holds; 1 where pages hold entries.
    pub page_tokens: u32,
    /// How many pages each layer has.
    pub pages: u32,
    /// What is in a page: pointers to as many parts.
    pub parts: *const *const crossdock_part_options,
    /// How many parts.
    pub part_count: usize,
}

// SAFETY: as above.
unsafe impl sized::Sized for crossdock_cache_pool_options {
    const FIRST_BYTES: usize = 48;
}

/// What a layout comes to.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_layout_info {
    /// `sizeof(crossdock_layout_info)`, set by the caller.
    pub size: usize,
    /// The first layer here.
    pub first_layer: u32,
    /// How many are here.
    pub layers: u32,
    /// How many tokens a page holds.
    pub page_tokens: u32,
    /// How many pages each layer has.
    pub pages: u32,
    /// How many pools of pages there are; the first one holds the tokens.
    pub pools: u32,
    /// The highest region that is used, plus one: so many memories a node needs.
    pub regions: u32,
    /// What one token takes in one layer, in the pages of the tokens.
    pub token_bytes: u64,
    /// What one page takes in one layer.
    pub page_bytes: u64,
    /// The rank.
    pub rank: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: as above.
unsafe impl sized::Sized for crossdock_layout_info {
    const FIRST_BYTES: usize = 56;
}

/// How one side spreads a model over its ranks.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_parallelism {
    /// `sizeof(crossdock_parallelism)`.
    pub size: usize,
    /// Tensor-parallel ranks; 0 as 1.
    pub tp: u32,
    /// Context-parallel ranks; 0 as 1.
    pub context: u32,
    /// How many tokens follow each other on one of them; 0 as 1.
    pub interleave: u32,
    /// How many KV heads the model has; 0 for one whose cache every TP rank keeps whole (MLA).
    pub kv_heads: u32,
    /// How many layers the model has.
    pub model_layers: u32,
    /// 0.
    pub reserved: u32,
    /// Pipeline stages: how many layers each has. NULL for one stage with all layers.
    pub stage_layers: *const u32,
    /// How many stages.
    pub stages: usize,
}

// SAFETY: as above.
unsafe impl sized::Sized for crossdock_parallelism {
    const FIRST_BYTES: usize = 48;
}

/// A rank that brings something. It never grows.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_source_rank {
    /// Its number among those of its side.
    pub rank: u32,
    /// `CROSSDOCK_ALL_PARTS` or `CROSSDOCK_SHARED_PARTS`.
    pub parts: u32,
}

static LAYOUTS: Table<Mutex<CacheLayout>> = Table::new(4, "layout");

pub(crate) fn layout_of(handle: crossdock_layout) -> Result<CacheLayout, Fault> {
    Ok(LAYOUTS.get(handle)?.lock().clone())
}

/// Puts a layout together, and checks it.
///
/// # Safety
/// `options` points to a structure that says its size, and what it points to can be read; `layout` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_layout_create(
    options: *const crossdock_layout_options,
    layout: *mut crossdock_layout,
) -> crossdock_status {
    call(|| {
        not_null("layout", layout)?;
        // SAFETY: as the caller promises.
        let options = unsafe { crossdock_layout_options::read(options) }?;
        // SAFETY: as the caller promises.
        let made = CacheLayout::new(unsafe { whole(&options) }?)?.with_rank(options.rank)?;
        let context = ContextShare {
            rank: options.context_rank,
            ranks: options.context_ranks.max(1),
            interleave: options.context_interleave.max(1),
        };
        // SAFETY: as the caller promises.
        unsafe { put("layout", layout, insert(made.with_context(context)?)?) }
    })
}

/// The share of a rank: `options` describe the whole model's cache on one worker, of which the layers, heads and tokens
/// that `rank` of `parallelism` keeps are taken.
///
/// # Safety
/// As [`crossdock_layout_create`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_layout_of_rank(
    options: *const crossdock_layout_options,
    parallelism: *const crossdock_parallelism,
    rank: u32,
    layout: *mut crossdock_layout,
) -> crossdock_status {
    call(|| {
        not_null("layout", layout)?;
        // SAFETY: as the caller promises, here and below.
        let options = unsafe { crossdock_layout_options::read(options) }?;
        // SAFETY: as above.
        let (whole, parallelism) = unsafe { (whole(&options)?, spread(parallelism)?) };
        let made = parallelism.layout(rank, whole).map_err(topology)?;
        // SAFETY: as above.
        unsafe { put("layout", layout, insert(made)?) }
    })
}

/// Keeps something more in the pages of the tokens, as the keys of an indexer beside a latent.
///
/// # Safety
/// `part` points to a structure that says its size, and what it points to can be read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_layout_add_part(
    layout: crossdock_layout,
    part: *const crossdock_part_options,
) -> crossdock_status {
    call(|| {
        let slot = LAYOUTS.get(layout)?;
        // SAFETY: as the caller promises.
        let part = unsafe { part_of(part) }?;
        let mut held = slot.lock();
        let grown = held.clone().with_part(part)?;
        *held = grown;
        Ok(())
    })
}

/// Keeps something more in pages of its own: a window of the last tokens, or a state. A room has a list of pages for each
/// pool, in the order in which they were added, after that of the tokens.
///
/// # Safety
/// `pool` points to a structure that says its size, and what it points to can be read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_layout_add_pool(
    layout: crossdock_layout,
    pool: *const crossdock_cache_pool_options,
) -> crossdock_status {
    call(|| {
        let slot = LAYOUTS.get(layout)?;
        // SAFETY: as the caller promises, here and below.
        let pool = unsafe { crossdock_cache_pool_options::read(pool) }?;
        // SAFETY: as above.
        let (name, parts) =
            unsafe { (text("name", pool.name)?, list("parts", pool.parts, pool.part_count)?) };
        let options = CachePoolOptions {
            name: name.to_owned(),
            extent: match pool.extent {
                CROSSDOCK_ALL_TOKENS => Extent::Tokens,
                CROSSDOCK_WINDOW => Extent::Window(pool.window),
                CROSSDOCK_ENTRIES => Extent::Entries,
                other => return Err(unknown("extent", other)),
            },
            page_tokens: pool.page_tokens,
            pages: pool.pages,
            // SAFETY: as above.
            parts: parts.iter().map(|&part| unsafe { part_of(part) }).collect::<Result<_, _>>()?,
        };
        let mut held = slot.lock();
        let grown = held.clone().with_pool(options)?;
        *held = grown;
        Ok(())
    })
}

/// Tells what a layout comes to.
///
/// # Safety
/// `info` points to a structure that says its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_layout_describe(
    layout: crossdock_layout,
    info: *mut crossdock_layout_info,
) -> crossdock_status {
    call(|| {
        let layout = layout_of(layout)?;
        let told = crossdock_layout_info {
            size: 0,
            first_layer: layout.layers().start,
            layers: layout.layers().len() as u32,
            page_tokens: layout.page_tokens(),
            pages: layout.pages(),
            pools: layout.pools().len() as u32,
            regions: layout.buffers().map(|buffer| buffer.region + 1).max().unwrap_or(0),
            token_bytes: layout.token_bytes(),
            page_bytes: layout.page_bytes(),
            rank: layout.rank(),
            reserved: 0,
        };
        // SAFETY: as the caller promises.
        unsafe { crossdock_layout_info::write(info, told) }
    })
}

/// How many bytes a region needs to hold what the layout places in it; 0 if nothing.
///
/// # Safety
/// `bytes` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_layout_region_bytes(
    layout: crossdock_layout,
    region: u32,
    bytes: *mut u64,
) -> crossdock_status {
    // SAFETY: as the caller promises.
    call(|| unsafe { put("bytes", bytes, layout_of(layout)?.bytes_needed(region)) })
}

/// How many pages hold what is kept here of a request of so many tokens.
///
/// # Safety
/// `pages` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_layout_pages_for(
    layout: crossdock_layout,
    tokens: u32,
    pages: *mut u32,
) -> crossdock_status {
    // SAFETY: as the caller promises.
    call(|| unsafe { put("pages", pages, layout_of(layout)?.pages_for(tokens)) })
}

/// Where the pages of a layer are: of which pool, and which part of it (0 is the latent or the keys, 1 the values, then
/// those that were added). `page_bytes` tells how long one is.
///
/// # Safety
/// `buffer` can be written; `page_bytes` is NULL or can be.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_layout_find(
    layout: crossdock_layout,
    pool: u32,
    part: u32,
    layer: u32,
    buffer: *mut crossdock_layer_buffer,
    page_bytes: *mut u64,
) -> crossdock_status {
    call(|| {
        not_null("buffer", buffer)?;
        let layout = layout_of(layout)?;
        let part = layout.pools().get(pool as usize).and_then(|pool| pool.parts().get(part as usize));
        let found = part.and_then(|part| Some((part.buffer(layer)?, part.page_layout(layer)?.page_bytes)));
        let Some((LayerBuffer { region, offset, stride_bytes }, bytes)) = found else {
            return Err(Fault::argument(format!("layer {layer} of that part of pool {pool} is not here")));
        };
        if !page_bytes.is_null() {
            // SAFETY: as the caller promises.
            unsafe { page_bytes.write_unaligned(bytes) };
        }
        // SAFETY: as the caller promises.
        unsafe { put("buffer", buffer, crossdock_layer_buffer { region, reserved: 0, offset, stride_bytes }) }
    })
}

/// Lets a layout go. Nodes that were opened with it keep their own.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_layout_close(layout: crossdock_layout) -> crossdock_status {
    call(|| LAYOUTS.remove(layout).map(drop))
}

/// Which ranks of the prefill side bring what `rank` of the decode side keeps. Where several could, `spread_by`, as the
/// room's number, chooses. `count` tells how many they are.
///
/// # Safety
/// Both sides point to structures that say their size; `sources` is NULL or `capacity` can be written there; `count` is
/// NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_sources(
    prefill: *const crossdock_parallelism,
    decode: *const crossdock_parallelism,
    rank: u32,
    spread_by: u64,
    sources: *mut crossdock_source_rank,
    capacity: usize,
    count: *mut usize,
) -> crossdock_status {
    call(|| {
        // SAFETY: as the caller promises.
        let (prefill, decode) = unsafe { (spread(prefill)?, spread(decode)?) };
        let found = prefill.sources(&decode, rank, spread_by).map_err(topology)?;
        let told = found.into_iter().map(|SourceRank { rank, parts, .. }| crossdock_source_rank {
            rank,
            parts: if parts == Parts::Shared { CROSSDOCK_SHARED_PARTS } else { CROSSDOCK_ALL_PARTS },
        });
        // SAFETY: as the caller promises.
        unsafe { list_out(&told.collect::<Vec<_>>(), sources, capacity, count) }
    })
}

/// Which ranks of the decode side need `rank` of the prefill side.
///
/// # Safety
/// As [`crossdock_sources`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_destinations(
    prefill: *const crossdock_parallelism,
    decode: *const crossdock_parallelism,
    rank: u32,
    spread_by: u64,
    ranks: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> crossdock_status {
    call(|| {
        // SAFETY: as the caller promises.
        let (prefill, decode) = unsafe { (spread(prefill)?, spread(decode)?) };
        let found = prefill.destinations(&decode, rank, spread_by).map_err(topology)?;
        // SAFETY: as the caller promises.
        unsafe { list_out(&found, ranks, capacity, count) }
    })
}

fn insert(layout: CacheLayout) -> Result<crossdock_layout, Fault> {
    LAYOUTS.insert(|_| Mutex::new(layout).into())
}

fn topology(error: crossdock::TopologyError) -> Fault {
    Fault::new(CROSSDOCK_LAYOUT, error.to_string(), "correct what the message names")
}

/// # Safety
/// What the options point to can be read.
unsafe fn whole(options: &crossdock_layout_options) -> Result<LayoutOptions, Fault> {
    let crossdock_layout_options { model_layers, first_layer, layers, .. } = *options;
    let last = match layers {
        0 => model_layers,
        layers => first_layer.saturating_add(layers),
    };
    Ok(LayoutOptions {
        // SAFETY: as the caller promises.
        model: unsafe { text("model", options.model) }?.to_owned(),
        model_layers,
        layers: first_layer..last,
        kind: match options.kind {
            CROSSDOCK_MLA => {
                CacheKind::Mla { latent_bytes: options.latent_bytes, rope_bytes: options.rope_bytes }
            }
            CROSSDOCK_HEADS => CacheKind::Heads {
                heads: share(options.heads, options.first_head, options.local_heads),
                head_bytes: options.head_bytes,
                order: order(options.head_order)?,
            },
            other => return Err(unknown("kind", other)),
        },
        dtype: match options.dtype {
            CROSSDOCK_BF16 => Dtype::Bf16,
            CROSSDOCK_F16 => Dtype::F16,
            CROSSDOCK_F32 => Dtype::F32,
            CROSSDOCK_FP8_E4M3 => Dtype::Fp8E4m3,
            CROSSDOCK_FP8_E5M2 => Dtype::Fp8E5m2,
            CROSSDOCK_INT8 => Dtype::Int8,
            CROSSDOCK_FP8_DS_MLA => Dtype::Fp8DsMla,
            other => return Err(unknown("dtype", other)),
        },
        page_tokens: options.page_tokens,
        pages: options.pages,
        placement: match options.placement {
            CROSSDOCK_LAYER_MAJOR => Placement::LayerMajor { region: options.region },
            CROSSDOCK_PAGE_MAJOR => Placement::PageMajor { region: options.region },
            CROSSDOCK_BUFFERS => {
                // SAFETY: as the caller promises.
                Placement::Buffers(unsafe { buffers(options.buffers, options.buffer_count) }?)
            }
            other => return Err(unknown("placement", other)),
        },
    })
}

/// # Safety
/// `part` is NULL or points to a structure that says its size, and what it points to can be read.
unsafe fn part_of(part: *const crossdock_part_options) -> Result<CachePartOptions, Fault> {
    // SAFETY: as the caller promises, here and below.
    let part = unsafe { crossdock_part_options::read(part) }?;
    // SAFETY: as above.
    let layers = unsafe { list("layers", part.layers, part.layer_count) }?.to_vec();
    Ok(CachePartOptions {
        // SAFETY: as above.
        name: unsafe { text("name", part.name) }?.to_owned(),
        heads: share(part.heads.max(1), part.first_head, part.local_heads),
        head_bytes: part.head_bytes,
        order: order(part.head_order)?,
        layers,
        // SAFETY: as above.
        buffers: unsafe { buffers(part.buffers, part.layer_count) }?,
    })
}

/// # Safety
/// So many can be read.
unsafe fn buffers(from: *const crossdock_layer_buffer, count: usize) -> Result<Vec<LayerBuffer>, Fault> {
    // SAFETY: as the caller promises.
    let given = unsafe { list("buffers", from, count) }?;
    let buffer = |&crossdock_layer_buffer { region, offset, stride_bytes, .. }: &_| LayerBuffer {
        region,
        offset,
        stride_bytes,
    };
    Ok(given.iter().map(buffer).collect())
}

fn share(of: u32, first: u32, count: u32) -> HeadShare {
    HeadShare { of, first, count: if count == 0 { of.saturating_sub(first) } else { count } }
}

fn order(order: u32) -> Result<HeadOrder, Fault> {
    match order {
        CROSSDOCK_TOKENS_FIRST => Ok(HeadOrder::TokensFirst),
        CROSSDOCK_HEADS_FIRST => Ok(HeadOrder::HeadsFirst),
        other => Err(unknown("head_order", other)),
    }
}

/// # Safety
/// `parallelism` is NULL or points to a structure that says its size, and what it points to can be read.
unsafe fn spread(parallelism: *const crossdock_parallelism) -> Result<Parallelism, Fault> {
    // SAFETY: as the caller promises, here and below.
    let given = unsafe { crossdock_parallelism::read(parallelism) }?;
    let kv_heads = (given.kv_heads != 0).then_some(given.kv_heads);
    let mut made = Parallelism::tensor(given.tp.max(1), given.model_layers, kv_heads);
    // SAFETY: as above.
    let stages = unsafe { list("stage_layers", given.stage_layers, given.stages) }?;
    if !stages.is_empty() {
        let mut first = 0u32;
        let stage = |&layers: &u32| -> Range<u32> {
            let stage = first..first.saturating_add(layers);
            first = stage.end;
            stage
        };
        made.stages = stages.iter().map(stage).collect();
    }
    made.context = given.context.max(1);
    made.interleave = given.interleave.max(1);
    Ok(made)
}

/// # Safety
/// `to` is NULL or `capacity` values can be written there; `count` is NULL or can be written.
pub(crate) unsafe fn list_out<T: Copy>(
    found: &[T],
    to: *mut T,
    capacity: usize,
    count: *mut usize,
) -> Result<(), Fault> {
    if !count.is_null() {
        // SAFETY: as the caller promises.
        unsafe { count.write_unaligned(found.len()) };
    }
    if capacity < found.len() {
        return Err(Fault::quiet(CROSSDOCK_BUFFER_TOO_SMALL));
    }
    if !found.is_empty() {
        not_null("the list", to)?;
        // SAFETY: as the caller promises; byte by byte, since C may have placed them anywhere.
        unsafe { to.cast::<u8>().copy_from_nonoverlapping(found.as_ptr().cast(), size_of_val(found)) };
    }
    Ok(())
}
