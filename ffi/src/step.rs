//! One step of a micro-batch: tokens to their experts, results back. Each of dispatch and combine has a send half, which
//! waits for nobody, and a receive half, which waits for every rank.

use std::ffi::c_void;
use std::ptr::NonNull;
use std::slice;

use bytemuck::Zeroable;
use crossdock::experts::{
    Bf16, Dispatch, EpError, LatencyCombine, LatencyStep, Payload, Report, Route, Rows, ScaleRule, Scales,
    Slot, ThroughputCombine, ThroughputStep, Tokens,
};

use crate::arguments::{copy_out, list, not_null, put};
use crate::group::{
    CROSSDOCK_ROWS_BF16, CROSSDOCK_ROWS_FP8, CROSSDOCK_ROWS_FP8_UE8M0, CROSSDOCK_ROWS_OPAQUE, Met,
    crossdock_group, payload_of, rank_of,
};
use crate::handles::Table;
use crate::layout::list_out;
use crate::node::unknown;
use crate::outputs::{Outputs, busy, crossdock_outputs, other_mode, outputs_of};
use crate::sized::{self, Sized as _};
use crate::status::{CROSSDOCK_OUT_OF_ORDER, Fault, call, crossdock_status};

/// Where the tokens of a dispatch go: found once, used for several dispatches, or recorded. 0 is none.
pub type crossdock_route = u64;

/// The scale is `amax / 448`.
pub const CROSSDOCK_SCALE_PLAIN: u32 = 0;
/// The scale is the smallest power of two that is not below that.
pub const CROSSDOCK_SCALE_POWER_OF_TWO: u32 = 1;

/// A rank's tokens for one step.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_tokens {
    /// `sizeof(crossdock_tokens)`.
    pub size: usize,
    /// How many tokens.
    pub count: usize,
    /// `[count, hidden]` in bfloat16, or rows that have their form already (`is_made`).
    pub rows: *const c_void,
    /// `[count, top_k]`: the experts that each token chose, or -1. Not looked at where a route is given.
    pub choices: *const i64,
    /// `[count, top_k]`: the weights of the choices, which go with the rows; NULL for none.
    pub weights: *const f32,
    /// The form in which rows travel: one of `CROSSDOCK_ROWS_…`.
    pub form: u32,
    /// 0: bfloat16 rows, made FP8 on the way where that is the form. 1: rows and scales have the form already.
    pub is_made: u32,
    /// `CROSSDOCK_ROWS_FP8` that is made on the way: `CROSSDOCK_SCALE_PLAIN` or `CROSSDOCK_SCALE_POWER_OF_TWO`.
    pub scale_rule: u32,
    /// Opaque rows: bytes of a row.
    pub row_bytes: u32,
    /// Opaque rows: bytes of its scales.
    pub scale_bytes: u32,
    /// Rows that are made: bytes of one element of their scales.
    pub scale_element_bytes: u32,
    /// Rows that are made: their scales; element e of token t is at `t * scale_token_stride + e * scale_element_stride`.
    pub scales: *const c_void,
    /// How many bytes there are.
    pub scales_bytes: usize,
    /// From one token to the next, in bytes; 0, with the next too, for scales without gaps.
    pub scale_token_stride: usize,
    /// From one element of a token to its next, in bytes.
    pub scale_element_stride: usize,
    /// Where the tokens go, if that was found before; 0 to find it by `choices`.
    pub route: crossdock_route,
}

// SAFETY: `size` is its first field, it has no padding, and any bytes are a value.
unsafe impl sized::Sized for crossdock_tokens {
    const FIRST_BYTES: usize = 104;
}

/// What a call cost, and what it waited for.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_report {
    /// `sizeof(crossdock_report)`, set by the caller.
    pub size: usize,
    /// Bytes that this rank reads from other ranks, or writes there through ports.
    pub wire_bytes: u64,
    /// Bytes that DeepEP's formula counts.
    pub logical_bytes: u64,
    /// Bytes of rows and sums that this rank wrote into memory.
    pub copied_bytes: u64,
    /// How long this rank was in the call, its waits included.
    pub time_ns: u64,
    /// How long it takes this machine to copy `copied_bytes` once, in one thread.
    pub floor_ns: u64,
    /// How long this rank waited, for all ranks together; `crossdock_slot_waits` tells it by rank.
    pub waited_ns: u64,
    /// How many ranks are masked now.
    pub masked: u64,
    /// How many tokens lost weight; `crossdock_slot_lost` tells how much each.
    pub lost_tokens: u64,
}

// SAFETY: as above.
unsafe impl sized::Sized for crossdock_report {
    const FIRST_BYTES: usize = 72;
}

/// A slot, and how far its step has come.
pub(crate) struct Seat {
    /// Borrows the slot: nobody else does meanwhile.
    stage: Stage,
    slot: NonNull<Slot>,
    report: Report,
}

enum Stage {
    Idle,
    Dispatched(Dispatch<'static>),
    Latency(LatencyStep<'static>),
    LatencyCombine(LatencyCombine<'static>),
    Throughput(ThroughputStep<'static>),
    ThroughputCombine(ThroughputCombine<'static>),
}

// SAFETY: a slot, and what borrows it, may be sent to another thread; the pointer is followed under the seat's lock alone.
unsafe impl Send for Seat {}

impl Seat {
    /// # Safety
    /// The slot outlives the seat, and nobody else uses it.
    pub unsafe fn new(slot: NonNull<Slot>) -> Seat {
        Seat { stage: Stage::Idle, slot, report: Report::default() }
    }

    /// The slot, where no step is under way.
    fn slot(&mut self) -> Result<&'static mut Slot, Fault> {
        match self.stage {
            // SAFETY: it outlives the seat and is nobody else's; and as no stage borrows it, neither is it borrowed here.
            // What the caller makes of it goes into `stage`, or is dropped before the lock is released.
            Stage::Idle => Ok(unsafe { self.slot.as_mut() }),
            _ => Err(out_of_order("a step is under way in this slot")),
        }
    }

    /// Keeps what a call cost, and tells it.
    ///
    /// # Safety
    /// `to` is NULL or points to a structure that says its size.
    unsafe fn told(&mut self, report: &Report, to: *mut crossdock_report) -> Result<(), Fault> {
        self.report.clone_from(report);
        if to.is_null() {
            return Ok(());
        }
        let nanoseconds = |time: std::time::Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let told = crossdock_report {
            size: 0,
            wire_bytes: report.wire_bytes,
            logical_bytes: report.logical_bytes,
            copied_bytes: report.copied_bytes,
            time_ns: nanoseconds(report.time),
            floor_ns: nanoseconds(report.floor),
            waited_ns: nanoseconds(report.waits.iter().sum()),
            masked: report.masked.len() as u64,
            lost_tokens: report.lost.iter().filter(|&&lost| lost != 0.0).count() as u64,
        };
        // SAFETY: as the caller promises.
        unsafe { crossdock_report::write(to, told) }
    }
}

fn out_of_order(words: &str) -> Fault {
    let advice = "make the calls of a step in their order: dispatch, receive, combine, finish; or abandon it";
    Fault::new(CROSSDOCK_OUT_OF_ORDER, words, advice)
}

/// Takes the stage that a call goes on from; another one stays as it is.
macro_rules! take_stage {
    ($seat:expr, $stage:ident, $words:literal) => {
        match std::mem::replace(&mut $seat.stage, Stage::Idle) {
            Stage::$stage(stage) => stage,
            other => {
                $seat.stage = other;
                return Err(out_of_order($words));
            }
        }
    };
}

static ROUTES: Table<Route> = Table::new(13, "route");

/// The send half of a dispatch: leaves each token's row where the ranks of its experts find it. Waits for nobody, except
/// where the last step of this slot was not taken to its end. The receive half is `crossdock_latency_receive` or
/// `crossdock_throughput_receive`, which all ranks choose alike.
///
/// # Safety
/// `tokens` points to a structure that says its size, and what it points to can be read; `report` is NULL or points to one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_dispatch(
    group: crossdock_group,
    slot: u32,
    tokens: *const crossdock_tokens,
    report: *mut crossdock_report,
) -> crossdock_status {
    call(|| {
        // SAFETY: as the caller promises, here and below.
        let given = unsafe { crossdock_tokens::read(tokens) }?;
        rank_of(group)?.at(slot, |met, seat| {
            // SAFETY: as above.
            let (rows, choices, weights) = unsafe { tokens_of(met, &given) }?;
            let dispatched = match given.route {
                0 => seat.slot()?.dispatch(&Tokens { rows, choices, weights })?,
                route => seat.slot()?.dispatch_along(&*ROUTES.get(route)?, rows, weights)?,
            };
            let cost = dispatched.report().clone();
            seat.stage = Stage::Dispatched(dispatched);
            // SAFETY: as above.
            unsafe { seat.told(&cost, report) }
        })
    })
}

/// # Safety
/// What `given` points to can be read.
#[allow(clippy::type_complexity)]
unsafe fn tokens_of<'a>(
    met: &Met,
    given: &crossdock_tokens,
) -> Result<(Rows<'a>, &'a [i64], Option<&'a [f32]>), Fault> {
    let config = met.group().config();
    let top_k = config.top_k as usize;
    let times = |count: usize, each: usize| {
        count
            .checked_mul(each)
            .ok_or_else(|| Fault::argument(format!("count is {count}, more than memory holds")))
    };
    let chosen = times(given.count, top_k)?;
    let choices = match given.route {
        // SAFETY: as the caller promises, here and below.
        0 => unsafe { list("choices", given.choices, chosen) }?,
        _ => &[],
    };
    let weights = match given.weights.is_null() {
        true => None,
        // SAFETY: as above.
        false => Some(unsafe { list("weights", given.weights, chosen) }?),
    };
    let values = times(given.count, config.hidden as usize)?;
    // SAFETY: as above; bfloat16 is 16 bits, of which any are a value.
    let bf16 = || unsafe { list("rows", given.rows.cast::<Bf16>(), values) };
    let rows = match (given.form, given.is_made) {
        (CROSSDOCK_ROWS_BF16, _) => Rows::Bf16(bf16()?),
        (CROSSDOCK_ROWS_FP8, 0) => match given.scale_rule {
            CROSSDOCK_SCALE_PLAIN => Rows::Fp8(bf16()?, ScaleRule::Plain),
            CROSSDOCK_SCALE_POWER_OF_TWO => Rows::Fp8(bf16()?, ScaleRule::PowerOfTwo),
            other => return Err(unknown("scale_rule", other)),
        },
        (CROSSDOCK_ROWS_FP8_UE8M0, 0) => Rows::Fp8Ue8m0(bf16()?),
        (CROSSDOCK_ROWS_FP8 | CROSSDOCK_ROWS_FP8_UE8M0 | CROSSDOCK_ROWS_OPAQUE, _) => {
            let payload: Payload = payload_of(given.form, given.row_bytes, given.scale_bytes)?;
            config.check_payload(payload).map_err(EpError::from)?;
            let row_bytes = payload.row_bytes(config.hidden) as usize;
            let scale_bytes = payload.scale_bytes(config.hidden) as usize;
            // SAFETY: as above.
            let (values, scales) = unsafe {
                (
                    list("rows", given.rows.cast::<u8>(), times(given.count, row_bytes)?)?,
                    list("scales", given.scales.cast::<u8>(), given.scales_bytes)?,
                )
            };
            let scales = match (given.scale_token_stride, given.scale_element_stride) {
                (0, 0) if scale_bytes == 0 => Scales::NONE,
                (0, 0) => Scales::by_token(scales, scale_bytes),
                (token_stride, element_stride) => Scales {
                    bytes: scales,
                    element_bytes: given.scale_element_bytes.max(1) as usize,
                    token_stride,
                    element_stride,
                },
            };
            Rows::Made { payload, values, scales }
        }
        (other, _) => return Err(unknown("form", other)),
    };
    Ok((rows, choices, weights))
}

/// The receive half of a dispatch in the latency mode: waits for every rank's rows, and packs them by expert.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_latency_receive(
    group: crossdock_group,
    slot: u32,
    outputs: crossdock_outputs,
) -> crossdock_status {
    call(|| {
        let place = outputs_of(outputs)?;
        let mut place = place.try_lock().ok_or_else(busy)?;
        let Outputs::Latency { outputs, .. } = &mut *place else { return Err(other_mode()) };
        rank_of(group)?.at(slot, |_, seat| {
            let step =
                take_stage!(seat, Dispatched, "nothing was dispatched in this slot").latency(outputs)?;
            seat.report.clone_from(step.report());
            seat.stage = Stage::Latency(step);
            Ok(())
        })
    })
}

/// Latency mode: where this rank's results for one local expert go, `[rows, hidden]` in bfloat16, in the order of its packed
/// rows, as many as came. The other ranks read them there: valid until `crossdock_latency_combine`.
///
/// # Safety
/// `results` can be written; `rows` is NULL or can be.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_latency_results(
    group: crossdock_group,
    slot: u32,
    expert: u32,
    results: *mut *mut c_void,
    rows: *mut usize,
) -> crossdock_status {
    call(|| {
        rank_of(group)?.at(slot, |met, seat| {
            let Stage::Latency(step) = &mut seat.stage else {
                return Err(out_of_order("no dispatch was received in the latency mode"));
            };
            let config = met.group().config();
            let experts = config.spread().of_rank(met.group().rank()).len();
            if expert as usize >= experts {
                return Err(Fault::argument(format!("local expert {expert} of {experts}")));
            }
            let place = step.results_mut(expert as usize);
            if !rows.is_null() {
                // SAFETY: as the caller promises.
                unsafe { rows.write_unaligned(place.len() / config.hidden as usize) };
            }
            // SAFETY: as the caller promises.
            unsafe { put("results", results, place.as_mut_ptr().cast()) }
        })
    })
}

/// Latency mode: copies results from `[local experts, rows, hidden]` in bfloat16, as the outputs have them, for whom they lie
/// elsewhere.
///
/// # Safety
/// So many can be read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_latency_copy_results(
    group: crossdock_group,
    slot: u32,
    results: *const c_void,
    count: usize,
) -> crossdock_status {
    call(|| {
        // SAFETY: as the caller promises; bfloat16 is 16 bits, of which any are a value.
        let results = unsafe { list("results", results.cast::<Bf16>(), count) }?;
        rank_of(group)?.at(slot, |_, seat| match &mut seat.stage {
            Stage::Latency(step) => Ok(step.copy_results(results)?),
            _ => Err(out_of_order("no dispatch was received in the latency mode")),
        })
    })
}

/// The send half of a combine in the latency mode: says that the results are there. Waits for nobody.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_latency_combine(group: crossdock_group, slot: u32) -> crossdock_status {
    call(|| {
        rank_of(group)?.at(slot, |_, seat| {
            let step = take_stage!(seat, Latency, "no dispatch was received in the latency mode");
            seat.stage = Stage::LatencyCombine(step.combine());
            Ok(())
        })
    })
}

/// The receive half of a combine in the latency mode: waits for every rank's results, and sums those of each token:
/// `weights` is `[tokens, top_k]`, `combined` gets `[tokens, hidden]` in bfloat16.
///
/// # Safety
/// So many weights can be read, so many values written; `report` is NULL or points to a structure that says its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_latency_finish(
    group: crossdock_group,
    slot: u32,
    weights: *const f32,
    weight_count: usize,
    combined: *mut c_void,
    value_count: usize,
    report: *mut crossdock_report,
) -> crossdock_status {
    call(|| {
        // SAFETY: as the caller promises, here and below.
        let weights = unsafe { list("weights", weights, weight_count) }?;
        // SAFETY: as above; bfloat16 is 16 bits, of which any are a value.
        let combined = unsafe { list_mut("combined", combined.cast::<Bf16>(), value_count) }?;
        rank_of(group)?.at(slot, |_, seat| {
            let combine = take_stage!(seat, LatencyCombine, "no combine was sent in the latency mode");
            let cost = combine.receive(weights, combined)?;
            // SAFETY: as above.
            unsafe { seat.told(&cost, report) }
        })
    })
}

/// The receive half of a dispatch in the throughput mode: waits for every rank's rows, in the order of the ranks.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_throughput_receive(
    group: crossdock_group,
    slot: u32,
    outputs: crossdock_outputs,
) -> crossdock_status {
    call(|| {
        let place = outputs_of(outputs)?;
        let mut place = place.try_lock().ok_or_else(busy)?;
        let Outputs::Throughput { outputs, .. } = &mut *place else { return Err(other_mode()) };
        rank_of(group)?.at(slot, |_, seat| {
            let step =
                take_stage!(seat, Dispatched, "nothing was dispatched in this slot").throughput(outputs)?;
            seat.report.clone_from(step.report());
            seat.stage = Stage::Throughput(step);
            Ok(())
        })
    })
}

/// Throughput mode: where this rank's results go, `[rows, hidden]` in bfloat16, one for each row that came, weighed and
/// summed over this rank's experts. The other ranks read them there: valid until `crossdock_throughput_combine`.
///
/// # Safety
/// `results` can be written; `rows` is NULL or can be.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_throughput_results(
    group: crossdock_group,
    slot: u32,
    results: *mut *mut c_void,
    rows: *mut usize,
) -> crossdock_status {
    call(|| {
        rank_of(group)?.at(slot, |met, seat| {
            let Stage::Throughput(step) = &mut seat.stage else {
                return Err(out_of_order("no dispatch was received in the throughput mode"));
            };
            let place = step.results_mut();
            if !rows.is_null() {
                // SAFETY: as the caller promises.
                unsafe { rows.write_unaligned(place.len() / met.group().config().hidden as usize) };
            }
            // SAFETY: as the caller promises.
            unsafe { put("results", results, place.as_mut_ptr().cast()) }
        })
    })
}

/// The send half of a combine in the throughput mode. `weights`, `[rows, top_k]` or NULL, go back as they are. Waits for
/// nobody.
///
/// # Safety
/// So many weights can be read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_throughput_combine(
    group: crossdock_group,
    slot: u32,
    weights: *const f32,
    weight_count: usize,
) -> crossdock_status {
    call(|| {
        let weights = match weights.is_null() {
            true => None,
            // SAFETY: as the caller promises.
            false => Some(unsafe { list("weights", weights, weight_count) }?),
        };
        rank_of(group)?.at(slot, |_, seat| {
            let step = take_stage!(seat, Throughput, "no dispatch was received in the throughput mode");
            seat.stage = Stage::ThroughputCombine(step.combine(weights)?);
            Ok(())
        })
    })
}

/// The receive half of a combine in the throughput mode: waits for every rank's results, and sums those of each token.
/// `combined` gets `[tokens, hidden]` in bfloat16: the biases, of which each is NULL or as long, and what the ranks made of
/// the token. `weights`, NULL or `[tokens, top_k]`, get the sums of the weights that the ranks gave back.
///
/// # Safety
/// So many values can be read or written; `report` is NULL or points to a structure that says its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_throughput_finish(
    group: crossdock_group,
    slot: u32,
    first_bias: *const c_void,
    second_bias: *const c_void,
    weights: *mut f32,
    weight_count: usize,
    combined: *mut c_void,
    value_count: usize,
    report: *mut crossdock_report,
) -> crossdock_status {
    call(|| {
        let given = [first_bias, second_bias].into_iter().filter(|bias| !bias.is_null());
        // SAFETY: as the caller promises, here and below; bfloat16 is 16 bits, of which any are a value.
        let biases = given.map(|bias| unsafe { list("a bias", bias.cast::<Bf16>(), value_count) });
        let biases: Vec<&[Bf16]> = biases.collect::<Result<_, _>>()?;
        // SAFETY: as above.
        let combined = unsafe { list_mut("combined", combined.cast::<Bf16>(), value_count) }?;
        let weights = match weights.is_null() {
            true => None,
            // SAFETY: as above.
            false => Some(unsafe { list_mut("weights", weights, weight_count) }?),
        };
        rank_of(group)?.at(slot, |_, seat| {
            let combine = take_stage!(seat, ThroughputCombine, "no combine was sent in the throughput mode");
            let cost = combine.receive(&biases, weights, combined)?;
            // SAFETY: as above.
            unsafe { seat.told(&cost, report) }
        })
    })
}

/// Gives up a step of a slot: the next dispatch brings it to its end.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_slot_abandon(group: crossdock_group, slot: u32) -> crossdock_status {
    call(|| {
        rank_of(group)?.at(slot, |_, seat| {
            seat.stage = Stage::Idle;
            Ok(())
        })
    })
}

/// How long the slot's last call waited for each rank, in nanoseconds; in its own place, until its ports had sent earlier
/// calls.
///
/// # Safety
/// `waits_ns` is NULL or `capacity` numbers can be written there; `count` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_slot_waits(
    group: crossdock_group,
    slot: u32,
    waits_ns: *mut u64,
    capacity: usize,
    count: *mut usize,
) -> crossdock_status {
    call(|| {
        rank_of(group)?.at(slot, |_, seat| {
            let waits: Vec<u64> = seat.report.waits.iter().map(|wait| wait.as_nanos() as u64).collect();
            // SAFETY: as the caller promises.
            unsafe { list_out(&waits, waits_ns, capacity, count) }
        })
    })
}

/// By token of the slot's last call: the weight of those of its choices that masked ranks did not answer; empty where nothing
/// was lost.
///
/// # Safety
/// `lost` is NULL or `capacity` numbers can be written there; `count` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_slot_lost(
    group: crossdock_group,
    slot: u32,
    lost: *mut f32,
    capacity: usize,
    count: *mut usize,
) -> crossdock_status {
    call(|| {
        rank_of(group)?.at(slot, |_, seat| {
            // SAFETY: as the caller promises.
            unsafe { list_out(&seat.report.lost, lost, capacity, count) }
        })
    })
}

/// Finds where tokens that choose like this go, `[tokens, top_k]`, to be used for several dispatches of any slot.
///
/// # Safety
/// So many choices can be read; `route` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_route_create(
    group: crossdock_group,
    slot: u32,
    choices: *const i64,
    count: usize,
    route: *mut crossdock_route,
) -> crossdock_status {
    call(|| {
        not_null("route", route)?;
        // SAFETY: as the caller promises, here and below.
        let choices = unsafe { list("choices", choices, count) }?;
        let found = rank_of(group)?.at(slot, |_, seat| Ok(seat.slot()?.route(choices)?))?;
        let handle = ROUTES.insert(|_| found.into())?;
        // SAFETY: as above.
        unsafe { put("route", route, handle) }
    })
}

/// The route of the dispatch that is under way in a slot.
///
/// # Safety
/// `route` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_route_of_dispatch(
    group: crossdock_group,
    slot: u32,
    route: *mut crossdock_route,
) -> crossdock_status {
    call(|| {
        not_null("route", route)?;
        let found = rank_of(group)?.at(slot, |_, seat| match &seat.stage {
            Stage::Dispatched(dispatch) => Ok(dispatch.route()),
            _ => Err(out_of_order("nothing was dispatched in this slot, or it was received already")),
        })?;
        let handle = ROUTES.insert(|_| found.into())?;
        // SAFETY: as the caller promises.
        unsafe { put("route", route, handle) }
    })
}

/// A route as bytes, to be kept: `length` tells how many.
///
/// # Safety
/// `buffer` is NULL or `capacity` bytes can be written there; `length` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_route_write(
    route: crossdock_route,
    buffer: *mut u8,
    capacity: usize,
    length: *mut usize,
) -> crossdock_status {
    // SAFETY: as the caller promises.
    call(|| unsafe { copy_out(&ROUTES.get(route)?.to_bytes(), buffer, capacity, length) })
}

/// A route that was kept, of a rank of the same group.
///
/// # Safety
/// So many bytes can be read; `route` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_route_read(
    group: crossdock_group,
    bytes: *const u8,
    count: usize,
    route: *mut crossdock_route,
) -> crossdock_status {
    call(|| {
        not_null("route", route)?;
        let rank = rank_of(group)?;
        let group = rank.met()?.group();
        // SAFETY: as the caller promises, here and below.
        let read = Route::from_bytes(unsafe { list("bytes", bytes, count) }?, group.config(), group.rank())
            .map_err(|error| Fault::argument(error.to_string()))?;
        let handle = ROUTES.insert(|_| read.into())?;
        // SAFETY: as above.
        unsafe { put("route", route, handle) }
    })
}

/// Lets a route go.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_route_close(route: crossdock_route) -> crossdock_status {
    call(|| ROUTES.remove(route).map(drop))
}

/// How tokens spread: by rank how many distinct ones go there, by expert how many choices fell on it, and by token and rank
/// whether it goes there (`[count / top_k, ranks]`, a byte each). Each is NULL or as long as there are ranks, experts, tokens
/// times ranks.
///
/// # Safety
/// So many choices can be read, and so many numbers written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_spread(
    group: crossdock_group,
    choices: *const i64,
    count: usize,
    tokens_per_rank: *mut u32,
    tokens_per_expert: *mut u32,
    is_token_in_rank: *mut u8,
) -> crossdock_status {
    call(|| {
        // SAFETY: as the caller promises, here and below.
        let choices = unsafe { list("choices", choices, count) }?;
        let rank = rank_of(group)?;
        let config = rank.met()?.group().config();
        let layout = crossdock::experts::Layout::of(choices, config.top_k as usize, config.spread());
        let layout = layout.map_err(EpError::from)?;
        let is_in: Vec<u8> = layout.is_token_in_rank.iter().map(|&is_in| is_in.into()).collect();
        // SAFETY: as above.
        unsafe {
            fill(&layout.tokens_per_rank, tokens_per_rank);
            fill(&layout.tokens_per_expert, tokens_per_expert);
            fill(&is_in, is_token_in_rank);
        }
        Ok(())
    })
}

/// # Safety
/// `to` is NULL, or as many values can be written there.
unsafe fn fill<T: Copy>(from: &[T], to: *mut T) {
    if !to.is_null() {
        // SAFETY: as the caller promises; byte by byte, since C may have placed them anywhere.
        unsafe { to.cast::<u8>().copy_from_nonoverlapping(from.as_ptr().cast(), size_of_val(from)) };
    }
}

/// # Safety
/// As [`list`], and nobody else reads or writes the values meanwhile.
unsafe fn list_mut<'a, T>(name: &'static str, values: *mut T, count: usize) -> Result<&'a mut [T], Fault> {
    // SAFETY: as the caller promises: it is checked alike.
    unsafe { list(name, values, count) }?;
    match count {
        0 => Ok(&mut []),
        // SAFETY: it was checked just now; the rest as the caller promises.
        count => Ok(unsafe { slice::from_raw_parts_mut(values, count) }),
    }
}
