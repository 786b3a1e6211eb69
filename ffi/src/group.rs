//! The ranks of a group that exchange tokens for their experts.

use std::ffi::c_char;
use std::net::{IpAddr, SocketAddr};
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use bytemuck::Zeroable;
use crossdock::experts::{
    Group, GroupConfig, GroupOptions, LostWeight, Meeting, MeetingConfig, Mourner, Payload, Slot,
};
use parking_lot::Mutex;

use crate::arguments::{LONGEST, list, milliseconds, not_null, optional_text, put, text, text_out};
use crate::handles::Table;
use crate::layout::list_out;
use crate::node::{authentication_of, parsed, ports_of, unknown};
use crate::sized::{self, Sized as _};
use crate::status::{
    CROSSDOCK_BUSY, CROSSDOCK_OUT_OF_ORDER, CROSSDOCK_WRONG_KIND, Fault, call, crossdock_status,
};
use crate::step::Seat;

/// One rank of a group of experts. 0 is none.
pub type crossdock_group = u64;

/// Rows in bfloat16.
pub const CROSSDOCK_ROWS_BF16: u32 = 1;
/// Rows in FP8 e4m3, with an f32 scale for 128 channels.
pub const CROSSDOCK_ROWS_FP8: u32 = 2;
/// Rows in FP8 e4m3, with scales that are powers of two: a byte for 128 channels, four to a word.
pub const CROSSDOCK_ROWS_FP8_UE8M0: u32 = 3;
/// Rows and scales that mean nothing to the library.
pub const CROSSDOCK_ROWS_OPAQUE: u32 = 4;

/// A sum lacks what experts on masked ranks would have added.
pub const CROSSDOCK_LOST_DROP: u32 = 0;
/// The weights of the others are raised.
pub const CROSSDOCK_LOST_RENORMALISE: u32 = 1;
/// The call fails, after it is over for the other ranks too.
pub const CROSSDOCK_LOST_FAIL: u32 = 2;

/// How a rank of a group is opened. What all ranks agree on comes first; ranks that differ refuse each other.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_group_options {
    /// `sizeof(crossdock_group_options)`.
    pub size: usize,
    /// The most tokens that each rank dispatches in one step, by rank.
    pub max_tokens: *const u32,
    /// How many ranks there are.
    pub ranks: usize,
    /// Experts over all ranks.
    pub experts: u32,
    /// Experts that a token chooses, at most.
    pub top_k: u32,
    /// Channels of a token.
    pub hidden: u32,
    /// The largest form in which a dispatch may carry rows: one of `CROSSDOCK_ROWS_…`.
    pub rows: u32,
    /// Opaque rows: bytes of a row.
    pub row_bytes: u32,
    /// Opaque rows: bytes of its scales.
    pub scale_bytes: u32,
    /// Micro-batches that may be under way at once.
    pub slots: u32,
    /// 1 if rows, lists and results carry checksums that are compared.
    pub verify: u32,
    /// Which placement of the experts the ranks believe in.
    pub placement_version: u64,
    /// Which rank this is.
    pub rank: u32,
    /// One of `CROSSDOCK_LOST_…`.
    pub lost: u32,
    /// With fewer ranks than this that are not masked, calls fail.
    pub least_ranks: u32,
    /// `CROSSDOCK_AUTHENTICATION_KEY` or `CROSSDOCK_AUTHENTICATION_OFF`; required.
    pub authentication: u32,
    /// The key that all ranks share.
    pub key: *const u8,
    /// How long it is.
    pub key_bytes: usize,
    /// How long a rank may neither make its call nor wait itself before those who wait for it mask it.
    pub deadline_ms: u64,
    /// How long the waits of a slot's first step last.
    pub warm_up_ms: u64,
    /// Where the other ranks dial this one, as `"ip:port"`; NULL for `"127.0.0.1:0"`.
    pub bind: *const c_char,
    /// The address that they are told, if it is another.
    pub advertise: *const c_char,
    /// As of a node; NULL for `"shm,tcp"`.
    pub ports: *const c_char,
    /// For people, in logs and errors; NULL for a usual name.
    pub name: *const c_char,
}

// SAFETY: `size` is its first field, it has no padding, and any bytes are a value.
unsafe impl sized::Sized for crossdock_group_options {
    const FIRST_BYTES: usize = 144;
}

/// What memory one rank needs, in bytes; exact in the worst case, in which every token goes to this rank.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_group_sizes {
    /// `sizeof(crossdock_group_sizes)`, set by the caller.
    pub size: usize,
    /// What dispatched rows take between ranks that map each other's memory.
    pub dispatch_arenas_bytes: u64,
    /// What they take besides where every other rank is on another host.
    pub port_dispatch_arenas_bytes: u64,
    /// What results take besides the outputs between ranks that map each other's memory.
    pub combine_arenas_bytes: u64,
    /// What they take where every other rank is on another host.
    pub port_combine_arenas_bytes: u64,
    /// What this rank's experts read and write.
    pub outputs_bytes: u64,
}

// SAFETY: as above.
unsafe impl sized::Sized for crossdock_group_sizes {
    const FIRST_BYTES: usize = 48;
}

/// What a group agreed on, as far as calls need it.
#[repr(C)]
#[derive(Clone, Copy, Zeroable)]
pub struct crossdock_group_info {
    /// `sizeof(crossdock_group_info)`, set by the caller.
    pub size: usize,
    /// Which rank this is.
    pub rank: u32,
    /// How many there are.
    pub ranks: u32,
    /// Experts over all ranks.
    pub experts: u32,
    /// The first expert here.
    pub first_expert: u32,
    /// How many are here.
    pub local_experts: u32,
    /// Experts that a token chooses, at most.
    pub top_k: u32,
    /// Channels of a token.
    pub hidden: u32,
    /// Micro-batches that may be under way at once.
    pub slots: u32,
    /// The most tokens that this rank dispatches in one step.
    pub max_tokens: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: as above.
unsafe impl sized::Sized for crossdock_group_info {
    const FIRST_BYTES: usize = 48;
}

pub(crate) struct Rank {
    address: String,
    /// Before the ranks have met.
    meeting: Mutex<Option<Meeting>>,
    met: OnceLock<Met>,
    told: Told,
}

/// Nothing, except under ThreadSanitizer, which does not see into the precompiled standard library, and so not by what a
/// `OnceLock` hands over: there a release and an acquire of its own say the same in its words.
#[derive(Default)]
struct Told {
    #[cfg(tsan)]
    met: std::sync::atomic::AtomicBool,
}

impl Told {
    fn tell(&self) {
        #[cfg(tsan)]
        self.met.store(true, std::sync::atomic::Ordering::Release);
    }

    fn hear(&self) {
        #[cfg(tsan)]
        self.met.load(std::sync::atomic::Ordering::Acquire);
    }
}

/// A rank that has met the others.
pub(crate) struct Met {
    /// They borrow from the group, so they go first.
    seats: Vec<Mutex<Seat>>,
    mourner: Mourner,
    group: Owned,
}

/// A group whose slots are lent to its seats: only what they do not touch is read here.
struct Owned(NonNull<Group>);

// SAFETY: a group may be sent to another thread and looked at from several; it is only looked at here.
unsafe impl Send for Owned {}
// SAFETY: as above.
unsafe impl Sync for Owned {}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: it was made from a box, and the seats that borrow from it are gone: they are declared before it.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

static GROUPS: Table<Rank> = Table::new(11, "group");

impl Met {
    fn new(group: Group) -> Met {
        let mourner = group.mourner();
        let group = NonNull::from(Box::leak(Box::new(group)));
        // SAFETY: it is borrowed by nobody else.
        let slots: &mut [Slot] = unsafe { &mut *group.as_ptr() }.slots();
        let (first, count) = (slots.as_mut_ptr(), slots.len());
        // SAFETY: each slot gets one seat, and outlives it.
        let seat = |at| Mutex::new(unsafe { Seat::new(NonNull::new_unchecked(first.add(at))) });
        Met { seats: (0..count).map(seat).collect(), mourner, group: Owned(group) }
    }

    /// What the ranks agreed on, and which one this is.
    pub fn group(&self) -> &Group {
        // SAFETY: it lives as long as `self`, and is only looked at, but for its slots, which are elsewhere in memory.
        unsafe { self.group.0.as_ref() }
    }
}

pub(crate) fn rank_of(handle: crossdock_group) -> Result<Arc<Rank>, Fault> {
    GROUPS.get(handle)
}

impl Rank {
    pub fn met(&self) -> Result<&Met, Fault> {
        self.told.hear();
        self.met.get().ok_or_else(|| {
            let words = "the ranks of this group have not met";
            Fault::new(CROSSDOCK_OUT_OF_ORDER, words, "call crossdock_group_meet first")
        })
    }

    /// Does something with a slot, which is one thread's at a time.
    pub fn at<T>(
        &self,
        slot: u32,
        act: impl FnOnce(&Met, &mut Seat) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let met = self.met()?;
        let Some(seat) = met.seats.get(slot as usize) else {
            return Err(Fault::argument(format!("slot {slot} of {}", met.seats.len())));
        };
        let Some(mut seat) = seat.try_lock() else {
            let words = format!("another thread is in a call of slot {slot}");
            return Err(
                Fault::new(CROSSDOCK_BUSY, words, "use a slot in one thread at a time").retryable(true)
            );
        };
        act(met, &mut seat)
    }
}

/// What memory a rank of such a group needs, before anything is allocated.
///
/// # Safety
/// `options` and `sizes` point to structures that say their size, and what they point to can be read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_group_needs(
    options: *const crossdock_group_options,
    sizes: *mut crossdock_group_sizes,
) -> crossdock_status {
    call(|| {
        // SAFETY: as the caller promises, here and below.
        let (config, _) = unsafe { config_of(&crossdock_group_options::read(options)?) }?;
        let found = config.sizes().map_err(crossdock::experts::GroupError::from)?;
        let told = crossdock_group_sizes {
            size: 0,
            dispatch_arenas_bytes: found.dispatch_arenas,
            port_dispatch_arenas_bytes: found.port_dispatch_arenas,
            combine_arenas_bytes: found.combine_arenas,
            port_combine_arenas_bytes: found.port_combine_arenas,
            outputs_bytes: found.outputs,
        };
        // SAFETY: as above.
        unsafe { crossdock_group_sizes::write(sizes, told) }
    })
}

/// Opens a rank: its ports, and the address that the other ranks dial. Then all ranks tell each other their addresses, and
/// meet.
///
/// # Safety
/// `options` points to a structure that says its size, and what it points to can be read; `group` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_group_open(
    options: *const crossdock_group_options,
    group: *mut crossdock_group,
) -> crossdock_status {
    call(|| {
        not_null("group", group)?;
        // SAFETY: as the caller promises, here and below.
        let given = unsafe { crossdock_group_options::read(options) }?;
        // SAFETY: as above.
        let (config, options) = unsafe { config_of(&given) }?;
        // SAFETY: as above.
        let authentication = unsafe { authentication_of(given.authentication, given.key, given.key_bytes) }?;
        if given.rank as usize >= config.max_tokens.len() {
            return Err(Fault::argument(format!("rank {} of {}", given.rank, config.max_tokens.len())));
        }
        config.validate().map_err(crossdock::experts::GroupError::from)?;
        let mut meeting = MeetingConfig::new(config, given.rank, authentication);
        meeting.heartbeat_grace = options.warm_up;
        meeting.options = options;
        // SAFETY: as above.
        if let Some(name) = unsafe { optional_text("name", given.name) }? {
            meeting.name = name.to_owned();
        }
        // SAFETY: as above.
        if let Some(bind) = unsafe { optional_text("bind", given.bind) }? {
            meeting.bind = parsed::<SocketAddr>("bind", bind, "\"ip:port\"")?;
        }
        // SAFETY: as above.
        if let Some(advertise) = unsafe { optional_text("advertise", given.advertise) }? {
            meeting.advertise = Some(parsed::<IpAddr>("advertise", advertise, "an IP address")?);
        }
        // SAFETY: as above.
        meeting.ports = ports_of(unsafe { optional_text("ports", given.ports) }?.unwrap_or("shm,tcp"), 0)?;
        let opened = Meeting::open(meeting)?;
        let rank = Rank {
            address: opened.address().to_owned(),
            meeting: Mutex::new(Some(opened)),
            met: OnceLock::new(),
            told: Told::default(),
        };
        let handle = GROUPS.insert(|_| rank.into())?;
        // SAFETY: as above.
        unsafe { put("group", group, handle) }
    })
}

/// All ranks of a group in this process, which have met: for tests, and for ranks that are threads. `groups` gets as many
/// handles as there are ranks.
///
/// # Safety
/// `options` points to a structure that says its size, and what it points to can be read; `groups` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_group_in_process(
    options: *const crossdock_group_options,
    groups: *mut crossdock_group,
) -> crossdock_status {
    call(|| {
        not_null("groups", groups)?;
        // SAFETY: as the caller promises, here and below.
        let (config, options) = unsafe { config_of(&crossdock_group_options::read(options)?) }?;
        let mut handles = Vec::new();
        for group in Group::in_process(&config, &options)? {
            let met = Met::new(group);
            let rank = Rank {
                address: String::new(),
                meeting: Mutex::new(None),
                met: OnceLock::from(met),
                told: Told::default(),
            };
            match GROUPS.insert(|_| rank.into()) {
                Ok(handle) => handles.push(handle),
                Err(fault) => {
                    handles.into_iter().for_each(|handle| drop(GROUPS.remove(handle)));
                    return Err(fault);
                }
            }
        }
        for (at, handle) in handles.into_iter().enumerate() {
            // SAFETY: as above.
            unsafe { put("groups", groups.wrapping_add(at), handle) }?;
        }
        Ok(())
    })
}

/// What the other ranks dial, `"ip:port"`, with a NUL; `length` does not count it.
///
/// # Safety
/// `buffer` is NULL or `capacity` bytes can be written there; `length` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_group_address(
    group: crossdock_group,
    buffer: *mut c_char,
    capacity: usize,
    length: *mut usize,
) -> crossdock_status {
    // SAFETY: as the caller promises.
    call(|| unsafe { text_out(&GROUPS.get(group)?.address, buffer, capacity, length) })
}

/// Meets all other ranks within this time. `addresses` are those of all ranks, by rank. A rank that has not met them has to
/// be opened anew.
///
/// # Safety
/// So many texts can be read, each of which ends with a NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_group_meet(
    group: crossdock_group,
    addresses: *const *const c_char,
    count: usize,
    timeout_ms: u64,
) -> crossdock_status {
    call(|| {
        let rank = GROUPS.get(group)?;
        // SAFETY: as the caller promises, here and below.
        let addresses = unsafe { list("addresses", addresses, count) }?;
        // SAFETY: as above.
        let addresses = addresses.iter().map(|&address| Ok(unsafe { text("address", address) }?.to_owned()));
        let addresses: Vec<String> = addresses.collect::<Result<_, Fault>>()?;
        let Some(meeting) = rank.meeting.lock().take() else {
            let words = "this rank meets the others already, or has met them";
            return Err(Fault::new(CROSSDOCK_WRONG_KIND, words, "open a rank for each group"));
        };
        let met = meeting.meet(&addresses, std::time::Duration::from_millis(timeout_ms).min(LONGEST))?;
        // Only who took the meeting gets here.
        let _ = rank.met.set(Met::new(met));
        rank.told.tell();
        Ok(())
    })
}

/// Tells what the ranks of a group, which have met, agreed on.
///
/// # Safety
/// `info` points to a structure that says its size.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_group_describe(
    group: crossdock_group,
    info: *mut crossdock_group_info,
) -> crossdock_status {
    call(|| {
        let rank = GROUPS.get(group)?;
        let group = rank.met()?.group();
        let config = group.config();
        let here = config.spread().of_rank(group.rank());
        let told = crossdock_group_info {
            size: 0,
            rank: group.rank(),
            ranks: config.ranks(),
            experts: config.experts,
            first_expert: here.start,
            local_experts: here.len() as u32,
            top_k: config.top_k,
            hidden: config.hidden,
            slots: config.slots,
            max_tokens: config.max_tokens[group.rank() as usize],
            reserved: 0,
        };
        // SAFETY: as the caller promises.
        unsafe { crossdock_group_info::write(info, told) }
    })
}

/// The ranks that this one does not wait for any more, ascending; `count` tells how many they are.
///
/// # Safety
/// `ranks` is NULL or `capacity` numbers can be written there; `count` is NULL or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn crossdock_group_masked(
    group: crossdock_group,
    ranks: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> crossdock_status {
    call(|| {
        let rank = GROUPS.get(group)?;
        // SAFETY: as the caller promises.
        unsafe { list_out(&rank.met()?.group().masked(), ranks, capacity, count) }
    })
}

/// Tells this rank that another is dead, so that waits for it end at once; from any thread. It is masked by the next call
/// that would wait for it.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_group_mark_dead(group: crossdock_group, rank: u32) -> crossdock_status {
    call(|| {
        GROUPS.get(group)?.met()?.mourner.mark_dead(rank);
        Ok(())
    })
}

/// Leaves a group: the other ranks are told, and wait for this one no longer. It ends when the last call of it that is under
/// way has.
#[unsafe(no_mangle)]
pub extern "C" fn crossdock_group_close(group: crossdock_group) -> crossdock_status {
    call(|| GROUPS.remove(group).map(drop))
}

/// # Safety
/// What the options point to can be read.
unsafe fn config_of(given: &crossdock_group_options) -> Result<(GroupConfig, GroupOptions), Fault> {
    // SAFETY: as the caller promises.
    let max_tokens = unsafe { list("max_tokens", given.max_tokens, given.ranks) }?.to_vec();
    let usual = GroupOptions::default();
    let options = GroupOptions {
        deadline: milliseconds(given.deadline_ms, usual.deadline),
        warm_up: milliseconds(given.warm_up_ms, usual.warm_up),
        lost: match given.lost {
            CROSSDOCK_LOST_DROP => LostWeight::Drop,
            CROSSDOCK_LOST_RENORMALISE => LostWeight::Renormalise,
            CROSSDOCK_LOST_FAIL => LostWeight::Fail,
            other => return Err(unknown("lost", other)),
        },
        least_ranks: given.least_ranks.max(1),
        verify: given.verify != 0,
        ..usual
    };
    let config = GroupConfig {
        max_tokens,
        experts: given.experts,
        top_k: given.top_k,
        hidden: given.hidden,
        payload: payload_of(given.rows, given.row_bytes, given.scale_bytes)?,
        slots: given.slots,
        placement_version: given.placement_version,
    };
    Ok((config, options))
}

pub(crate) fn payload_of(rows: u32, row_bytes: u32, scale_bytes: u32) -> Result<Payload, Fault> {
    match rows {
        CROSSDOCK_ROWS_BF16 => Ok(Payload::Bf16),
        CROSSDOCK_ROWS_FP8 => Ok(Payload::Fp8),
        CROSSDOCK_ROWS_FP8_UE8M0 => Ok(Payload::Fp8Ue8m0),
        CROSSDOCK_ROWS_OPAQUE => Ok(Payload::Opaque { row_bytes, scale_bytes }),
        other => Err(unknown("rows", other)),
    }
}
