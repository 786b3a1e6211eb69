//! Where the rows of a dispatch arrive.

use std::ffi::c_void;
use std::sync::Arc;

use bytemuck::Zeroable;
use crossdock::experts::{LatencyOutputs, Payload, ScaleOrder, ThroughputOutputs};
use parking_lot::Mutex;

use crate::arguments::{not_null, put};
use crate::group::{crossdock_group, payload_of, rank_of};
use crate::handles::Table;
use crate::layout::list_out;
use crate::node::unknown;
use crate::sized::{self, Sized as _};
use crate::status::{CROSSDOCK_BUSY, CROSSDOCK_WRONG_KIND, Fault, call, crossdock_status};

/// Memory for what a dispatch gives. 0 is none.
pub type crossdock_outputs = u64;

/// Each row's scales together.
pub const CROSSDOCK_SCALES_BY_ROW: u32 = 0;
/// Latency mode: `[local experts, scale bytes / 4, rows]` words of four bytes, as matrix units want them.
pub const CROSSDOCK_SCALES_BY_COLUMN: u32 = 1;

/// What a dispatch gave in the latency mode: for each of this rank's experts the rows of the tokens that chose it, in the
/// order of (source rank, source token). Pointers are valid until the outputs are closed; what they point to changes with
/// the next dispatch that is received into them.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_latency_outputs {
    /// `sizeof(crossdock_latency_outputs)`, set by the caller.
    pub size: usize,
    /// How many experts are here.
    pub experts: usize,
    /// Rows that each expert has room for.
    pub rows: usize,
    /// Bytes of a row.
    pub row_bytes: usize,
    /// Bytes of a row's scales.
    pub scale_bytes: usize,
    /// `[experts, rows, row_bytes]`.
    pub values: *const c_void,
    /// The scales, in the order that was asked for.
    pub scales: *const c_void,
    /// `[experts, rows]`: which of its source's tokens each row is.
    pub tokens: *const u32,
    /// `[experts]`: how many rows came.
    pub counts: *const u32,
    /// `[experts]`: how many rows came in all steps since the outputs were made.
    pub totals: *const u64,
}

// SAFETY: `size` is its first field, it has no padding, and any bytes are a value.
unsafe impl sized::Sized for crossdock_latency_outputs {
    const FIRST_BYTES: usize = 80;
}

/// What a dispatch gave in the throughput mode: the rows of the tokens that chose any of this rank's experts, in the order
/// of (source rank, source token). Pointers as of the latency mode.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_throughput_outputs {
    /// `sizeof(crossdock_throughput_outputs)`, set by the caller.
    pub size: usize,
    /// How many rows came.
    pub rows: usize,
    /// How many there is room for.
    pub most_rows: usize,
    /// Bytes of a row.
    pub row_bytes: usize,
    /// Bytes of a row's scales.
    pub scale_bytes: usize,
    /// `[most_rows, row_bytes]`.
    pub values: *const c_void,
    /// `[most_rows, scale_bytes]`.
    pub scales: *const c_void,
    /// `[most_rows, top_k]`: which of this rank's experts each choice is; -1 for those of other ranks and for none.
    pub experts: *const i64,
    /// `[most_rows, top_k]`: the weights of this rank's choices; 0 elsewhere.
    pub weights: *const f32,
    /// `[rows]`: which of its source's tokens each row is.
    pub tokens: *const u32,
}

// SAFETY: as above.
unsafe impl sized::Sized for crossdock_throughput_outputs {
    const FIRST_BYTES: usize = 80;
}

pub(crate) enum Outputs {
    Latency { outputs: LatencyOutputs, experts: usize, ranks: u32, hidden: u32 },
    Throughput { outputs: ThroughputOutputs, most_rows: usize, ranks: u32, hidden: u32 },
}

static OUTPUTS: Table<Mutex<Outputs>> = Table::new(12, "outputs");

pub(crate) fn outputs_of(handle: crossdock_outputs) -> Result<Arc<Mutex<Outputs>>, Fault> {
    OUTPUTS.get(handle)
}

pub(crate) fn busy() -> Fault {
    let words = "a dispatch is being received into these outputs";
    Fault::new(CROSSDOCK_BUSY, words, "wait until it is, or use others").retryable(true)
}

pub(crate) fn other_mode() -> Fault {
    let words = "these outputs are of the other mode";
    Fault::new(CROSSDOCK_WRONG_KIND, words, "make outputs for the mode that receives into them")
}

/// A form of rows that the group can carry.
fn payload_in(
    group: &crossdock::experts::Group,
    (rows, row_bytes, scale_bytes): (u32, u32, u32),
) -> Result<Payload, Fault> {
    let (payload, config) = (payload_of(rows, row_bytes, scale_bytes)?, group.config());
    config.check_payload(payload).map_err(crossdock::experts::EpError::from)?;
    let bytes = |payload: Payload| payload.row_bytes(config.hidden) + payload.scale_bytes(config.hidden);
    if bytes(payload) > bytes(config.payload) {
        return Err(Fault::argument(format!(
            "rows of {payload} are larger than the group's of {}",
            config.payload
        )));
    }
    Ok(payload)
}

/// Memory for what a rank may get in one dispatch of the latency mode, in this form: one of `CROSSDOCK_ROWS_…`, with the
/// bytes of opaque rows and scales.
///
/// # Safety
/// `outputs` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_latency_outputs_create(
    group: crossdock_group,
    rows: u32,
    row_bytes: u32,
    scale_bytes: u32,
    scale_order: u32,
    outputs: *mut crossdock_outputs,
) -> crossdock_status {
    call(|| {
        not_null("outputs", outputs)?;
        let rank = rank_of(group)?;
        let group = rank.met()?.group();
        let payload = payload_in(group, (rows, row_bytes, scale_bytes))?;
        let hidden = group.config().hidden;
        let order = match scale_order {
            CROSSDOCK_SCALES_BY_ROW => ScaleOrder::ByRow,
            CROSSDOCK_SCALES_BY_COLUMN if payload.scale_bytes(hidden) % 4 == 0 => ScaleOrder::ByColumn,
            CROSSDOCK_SCALES_BY_COLUMN => {
                return Err(Fault::argument("scales that are not whole words cannot lie by column"));
            }
            other => return Err(unknown("scale_order", other)),
        };
        let made = LatencyOutputs::new(group, payload, order);
        let (experts, ranks) = (made.counts().len(), group.config().ranks());
        let made = Outputs::Latency { outputs: made, experts, ranks, hidden };
        let handle = OUTPUTS.insert(|_| Mutex::new(made).into())?;
        // SAFETY: as the caller promises.
        unsafe { put("outputs", outputs, handle) }
    })
}

/// Memory for what a rank may get in one dispatch of the throughput mode, in this form.
///
/// # Safety
/// `outputs` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_throughput_outputs_create(
    group: crossdock_group,
    rows: u32,
    row_bytes: u32,
    scale_bytes: u32,
    outputs: *mut crossdock_outputs,
) -> crossdock_status {
    call(|| {
        not_null("outputs", outputs)?;
        let rank = rank_of(group)?;
        let group = rank.met()?.group();
        let made = ThroughputOutputs::new(group, payload_in(group, (rows, row_bytes, scale_bytes))?);
        let config = group.config();
        let most_rows = made.experts().len() / config.top_k as usize;
        let made =
            Outputs::Throughput { outputs: made, most_rows, ranks: config.ranks(), hidden: config.hidden };
        let handle = OUTPUTS.insert(|_| Mutex::new(made).into())?;
        // SAFETY: as the caller promises.
        unsafe { put("outputs", outputs, handle) }
    })
}

/// Tells what a dispatch in the latency mode gave, and where it is.
///
/// # Safety
/// `info` points to a structure that says its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_latency_outputs_describe(
    outputs: crossdock_outputs,
    info: *mut crossdock_latency_outputs,
) -> crossdock_status {
    call(|| {
        let slot = OUTPUTS.get(outputs)?;
        let Outputs::Latency { outputs, experts, hidden, .. } = &*slot.try_lock().ok_or_else(busy)? else {
            return Err(other_mode());
        };
        let told = crossdock_latency_outputs {
            size: 0,
            experts: *experts,
            rows: outputs.rows(),
            row_bytes: outputs.payload().row_bytes(*hidden) as usize,
            scale_bytes: outputs.payload().scale_bytes(*hidden) as usize,
            values: outputs.values().as_ptr().cast(),
            scales: outputs.scales().as_ptr().cast(),
            tokens: outputs.sources().as_ptr(),
            counts: outputs.counts().as_ptr(),
            totals: outputs.totals().as_ptr(),
        };
        // SAFETY: as the caller promises.
        unsafe { crossdock_latency_outputs::write(info, told) }
    })
}

/// Tells what a dispatch in the throughput mode gave, and where it is.
///
/// # Safety
/// `info` points to a structure that says its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_throughput_outputs_describe(
    outputs: crossdock_outputs,
    info: *mut crossdock_throughput_outputs,
) -> crossdock_status {
    call(|| {
        let slot = OUTPUTS.get(outputs)?;
        let Outputs::Throughput { outputs, most_rows, hidden, .. } = &*slot.try_lock().ok_or_else(busy)?
        else {
            return Err(other_mode());
        };
        let told = crossdock_throughput_outputs {
            size: 0,
            rows: outputs.len(),
            most_rows: *most_rows,
            row_bytes: outputs.payload().row_bytes(*hidden) as usize,
            scale_bytes: outputs.payload().scale_bytes(*hidden) as usize,
            values: outputs.values().as_ptr().cast(),
            scales: outputs.scales().as_ptr().cast(),
            experts: outputs.experts().as_ptr(),
            weights: outputs.weights().as_ptr(),
            tokens: outputs.tokens().as_ptr(),
        };
        // SAFETY: as the caller promises.
        unsafe { crossdock_throughput_outputs::write(info, told) }
    })
}

/// Where the rows of each source begin, and where the last one's end: of the latency mode `[experts, ranks, 2]`, begin and
/// end among an expert's rows; of the throughput mode `[ranks, 2]`. `count` tells how many numbers they are.
///
/// # Safety
/// `ranges` is NULL or `capacity` numbers can be written there; `count` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_outputs_ranges(
    outputs: crossdock_outputs,
    ranges: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> crossdock_status {
    call(|| {
        let slot = OUTPUTS.get(outputs)?;
        let found: Vec<u32> = match &*slot.try_lock().ok_or_else(busy)? {
            Outputs::Latency { outputs, experts, ranks, .. } => {
                let places = (0..*experts).flat_map(|expert| (0..*ranks).map(move |rank| (expert, rank)));
                let range = |(expert, rank)| outputs.range(expert, rank);
                places.map(range).flat_map(|range| [range.start, range.end]).collect()
            }
            Outputs::Throughput { outputs, ranks, .. } => {
                let range = |rank| outputs.range(rank);
                (0..*ranks).map(range).flat_map(|range| [range.start as u32, range.end as u32]).collect()
            }
        };
        // SAFETY: as the caller promises.
        unsafe { list_out(&found, ranges, capacity, count) }
    })
}

/// By local expert, of the throughput mode: how many choices fell on it, rounded up to a multiple of `alignment`.
///
/// # Safety
/// `counts` is NULL or `capacity` numbers can be written there; `count` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_throughput_outputs_counts(
    outputs: crossdock_outputs,
    alignment: u32,
    counts: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> crossdock_status {
    call(|| {
        let slot = OUTPUTS.get(outputs)?;
        if alignment > 1 << 20 {
            return Err(Fault::argument(format!("alignment {alignment}: at most 2^20")));
        }
        let Outputs::Throughput { outputs, .. } = &*slot.try_lock().ok_or_else(busy)? else {
            return Err(other_mode());
        };
        // SAFETY: as the caller promises.
        unsafe { list_out(&outputs.counts(alignment), counts, capacity, count) }
    })
}

/// Frees the memory of outputs, after the dispatch that is being received into them, if any.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_outputs_close(outputs: crossdock_outputs) -> crossdock_status {
    call(|| OUTPUTS.remove(outputs).map(drop))
}
